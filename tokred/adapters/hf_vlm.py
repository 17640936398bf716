"""Multimodal models of transformers: visual tokens are reduced between the vision encoder and the language model.

One generic pair of hooks serves every family. The first, on the inner multimodal model, notes which columns of the
prompt are visual, and translates masks and positions of steps on a cache that holds a reduced prompt. The second, on
the language model, sees the merged sequence, asks the method, and hands on a shorter one: embeddings, mask, positions,
token types, deepstack rows. The cache says the prompt's own length to whoever slices by it (`logical_cache`), so
`generate` keeps its contract and no library function is copied. What families differ in is in `vlm_families`.

Scores of the vision tower are caught while `get_image_features` runs and travel on its output, which `generate` makes
once and carries to every pass that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokred.adapters.logical_cache import Reduced, physical_length, reduced_state, set_reduced
from tokred.adapters.prompt_rows import Built, Item, Row, join_images, place_items
from tokred.adapters.swap import swap_class, unswap_class
from tokred.adapters.towers import Seen
from tokred.adapters.visual_source import GroupSource, Request, make_request
from tokred.adapters.vlm_families import FAMILIES, check_tower, family_of
from tokred.core.budget import check_choice
from tokred.core.encoded import Encoded
from tokred.core.errors import (
    ConflictError,
    InvalidParameterError,
    PaddingError,
    PreEncodedError,
    RequestError,
    StaleCacheError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from tokred.core.host import Attachment, Host
from tokred.core.method import Method, VisualMethod
from tokred.core.sites import MediaLayout, Needs, PromptInfo, VisualFeatures
from tokred.core.tokens import Keep, Resample
from tokred.core.trace import MediaStep, Trace

__all__ = ["HFVLMHost", "VisualSession"]

#: outer models (with a language head) by the inner one they hold
_OUTER = tuple(sorted(f"{name.removesuffix('Model')}ForConditionalGeneration" for name in FAMILIES))


class HFVLMHost(Host):
    """Multimodal models of transformers that put visual tokens into the prompt of a language model.

    Attributes:
        outer: the model with the language head, None where the inner model alone was given. inner: without it.
    """

    family = "transformers multimodal"
    classes = _OUTER
    sites = ("VisualFeatures", "EncoderBlock")
    refusals: ClassVar[dict[str, str]] = {
        "prefill_chunk_size": "chunks of a prompt would be reduced one by one, as if each were the whole",
        "assistant_model": "the assistant would have to see the same reduced prompt (also prompt_lookup_num_tokens)",
        "generate_batch": "its paged cache counts the tokens of the prompt by itself",
        "positions='compact' on Qwen-VL": "its positions are places in time and space, which a survivor keeps",
        "right padding in generate": "the next token would be predicted from padding, patched or not",
        "Pixtral": "a Pixtral tower packs images of many sizes into one sequence without a grid of their own",
        "Mllama": "its images enter by cross-attention, not as tokens of the prompt",
        "Blip2": "its query tokens are few and learnt, there is nothing to reduce",
        "InstructBlip": "its query tokens are few and learnt, there is nothing to reduce",
    }

    def __init__(self, model: Any) -> None:
        self.outer: Any = None if family_of(model) is not None else model
        self.inner: Any = model if self.outer is None else model.model
        kind = family_of(self.inner)
        assert kind is not None
        self.parts = kind(self.inner)
        self.root = model

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        if not isinstance(model, PreTrainedModel):
            return False
        return family_of(model) is not None or family_of(getattr(model, "model", model)) is not None

    def place(self, root: nn.Module) -> None:
        self.root = root

    def describe_prompt(self, given: object) -> PromptInfo:
        """A call in numbers: from sizes, or from what the processor returned (as `tokred.flops` takes them)."""
        from tokred.adapters.vlm_describe import describe_prompt

        return describe_prompt(self, given)

    def tower_host(self) -> Host:
        """The host of the vision tower, for methods that act inside it."""
        from tokred.adapters.registry import find_host

        host = find_host(self.parts.tower_module)
        host.place(self.outer if self.outer is not None else self.inner)
        return host

    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Attachment:
        visual = [m for m in methods if "VisualFeatures" in m.acts_at(self.sites)]
        inside = [m for m in methods if m not in visual]
        if len(visual) > 1:
            names = " and ".join(type(m).__name__ for m in visual)
            raise ConflictError(
                f"{names} both choose the visual tokens that the language model reads; give one of them"
            )
        parts: list[Any] = []
        try:
            if inside:
                parts.append(self.tower_host().attach(inside, options))
            if visual:
                method = visual[0]
                assert isinstance(method, VisualMethod)
                parts.append(VisualSession(self, method, options))
                parts[-1].install()
        except BaseException:
            for part in reversed(parts):
                part.remove()
            raise
        return parts[0] if len(parts) == 1 else Pipeline(parts)


class Pipeline:
    """Several attachments of one model, in the order of the data."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    @property
    def trace(self) -> Trace:
        first, *rest = [part.trace for part in self.parts]
        for trace in rest:
            first = first.followed_by(trace)
        return first

    def encode_inputs(self, inputs: Mapping[str, Any]) -> Encoded:
        return next(part for part in self.parts if hasattr(part, "encode_inputs")).encode_inputs(inputs)

    def request(self, **given: Any) -> Any:
        return next(part for part in self.parts if hasattr(part, "request")).request(**given)

    def remove(self) -> None:
        for part in reversed(self.parts):
            part.remove()


class _Thread(threading.local):
    """What a running call knows, one for each thread."""

    def __init__(self) -> None:
        self.seen: Seen | None = None  # of the get_image_features that runs now
        self.made: dict[str, Seen] = {}  # in the inner forward that runs now, by media
        self.frames: list[Frame] = []
        self.request: Request | None = None
        self.prompt: Tensor | None = None  # the ids of the `generate` that runs now
        self.known_mask: tuple[Tensor | None] | None = None  # (B, keys), as `generate` had it before it made a 4-D one
        self.generation: object | None = None  # the `generate` that runs now; all its passes choose the same tokens
        self.encoding = False  # whether the pass ends before the language model
        self.steps: tuple[MediaStep, ...] = ()


@dataclass
class Frame:
    """One pass of the inner model.

    Attributes:
        ids: (B, S) or None. columns: {media: (B, S) bool}, where its placeholders are; None while there are no media.
        mask: (B, keys) of this pass, None for all real. types: (B, S or keys) token types.
        cache: given. past: its keys.
        back: (B, S) int64, the reduced column for each original one; None while nothing was reduced.
        state: what the cache will carry. types_out: (B, L) token types of the reduced sequence.
    """

    ids: Tensor | None = None
    columns: dict[str, Tensor] | None = None
    seen: dict[str, Seen | None] = field(default_factory=dict)
    mask: Tensor | None = None
    types: Tensor | None = None
    cache: Any = None
    past: int = 0
    back: Tensor | None = None
    state: Reduced | None = None
    types_out: Tensor | None = None


class VisualSession:
    """A method at work between the vision encoder and the language model of one multimodal model."""

    def __init__(self, host: HFVLMHost, method: VisualMethod, options: Mapping[str, Any]) -> None:
        self.host, self.method, self.parts = host, method, host.parts
        self.processor = options.get("processor")
        self.restore_length = options.get("restore_length", True)
        check_choice("restore_length", self.restore_length, (True, False))
        check_tower(self.parts)
        self.positions = self._positions()
        self.tower = self.parts.make_tower()
        self.needs: Needs = method.needs(self.tower.info)
        self.handles: list[Any] = []
        self.swapped: list[nn.Module] = []
        self.names = tuple(inspect.signature(type(self.parts.inner).forward).parameters)[1:]
        self._reset()

    def _positions(self) -> str:
        chosen = self.method.positions
        if chosen is None:
            return "original" if self.parts.mrope else self.method.own_positions
        if chosen == "compact" and self.parts.mrope:
            raise InvalidParameterError(
                "positions='compact': positions of Qwen-VL models are places in time and space, which a token keeps; "
                "use positions='original' or None"
            )
        return chosen

    # -- installation --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        self.handles += self.tower.watch(self.needs, functools.partial(_current, self))
        if self.needs.dense:
            self.handles += self.parts.dense_hook(functools.partial(_collect, self))
        inner, language = self.parts.inner, self.parts.language_model
        self._swap(inner, _inner_class)
        if self.host.outer is not None:
            self._swap(self.host.outer, _outer_class)
        self.handles.append(inner.register_forward_pre_hook(BeforeInner(self), with_kwargs=True))
        self.handles.append(inner.register_forward_hook(AfterInner(self), always_call=True))
        self.handles.append(language.register_forward_pre_hook(BeforeLanguage(self), with_kwargs=True))

    def _swap(self, module: nn.Module, extend: Callable[[type], dict[str, Any]]) -> None:
        hooked = module.__dict__.pop("forward", None)  # no forward of ours: one set by accelerate may stay where it is
        try:
            swap_class(module, extend)
        finally:
            if hooked is not None:
                module.__dict__["forward"] = hooked
        module._tokred_visual = self  # type: ignore[assignment]
        self.swapped.append(module)

    def remove(self) -> None:
        """Take everything away again; safe to call twice."""
        for handle in reversed(self.handles):
            handle.remove()
        for module in reversed(self.swapped):
            unswap_class(module)
            module.__dict__.pop("_tokred_visual", None)
        self.handles, self.swapped = [], []

    def _reset(self) -> None:
        self.thread = _Thread()
        self._newest: tuple[MediaStep, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("thread", "_newest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def trace(self) -> Trace:
        """What the last pass of this thread (else of any thread) kept."""
        return Trace(None, media=self.thread.steps or self._newest)

    # -- vision encoder ------------------------------------------------------------------------------------------------

    def encode(self, media: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `get_image_features` (or `get_video_features`), watching the tower; what was seen goes on the output."""
        if self.thread.seen is not None:  # one inside the other (Qwen3-VL)
            return function(*args, **kwargs)
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
        seen = Seen(media, {key: value for key, value in given.items() if key != "kwargs"})
        self.thread.seen = seen
        try:
            output = function(*args, **kwargs)
        finally:
            self.thread.seen = None
        seen.output = output
        seen.parts.clear()
        if not self.needs.pixels:
            seen.arguments = {key: _shape_only(key, value) for key, value in seen.arguments.items()}
        seen.session = weakref.ref(self)
        if hasattr(output, "pooler_output"):
            output._tokred_seen = seen
        self.thread.made[media] = seen
        return output

    # -- the inner model -----------------------------------------------------------------------------------------------

    def before_inner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        frame = Frame(cache=given.get("past_key_values"), types=given.get("token_type_ids"))
        self.thread.frames.append(frame)
        self.thread.made = {}
        known, self.thread.known_mask = self.thread.known_mask, None
        state = reduced_state(frame.cache)
        if state is not None:
            state.armed = True
            self._continue(given, frame, state)
        if not self._has_media(given):
            return (), given
        frame.past = _length(frame.cache)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        frame.ids = ids
        frame.columns = {media: self._columns(media, ids, embeds) for media in self.parts.medias}
        outputs = given.get("mm_encoder_outputs") or {}
        frame.seen = {media: getattr(outputs.get(media), "_tokred_seen", None) for media in self.parts.medias}
        length = frame.columns[self.parts.medias[0]].shape[1]
        frame.mask = self._real(given.get("attention_mask"), known, frame.past + length)
        return (), given

    def _has_media(self, given: Mapping[str, Any]) -> bool:
        if any(given.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
            return True
        outputs = given.get("mm_encoder_outputs")
        if isinstance(outputs, Tensor):  # a deprecated way of Idefics3
            raise PreEncodedError("mm_encoder_outputs is a tensor: what the vision tower saw is unknown; pass pixels")
        return isinstance(outputs, Mapping) and any(outputs.get(media) is not None for media in self.parts.medias)

    def _columns(self, media: str, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if ids is not None:
            return ids.eq(self.parts.placeholder(media))
        assert embeds is not None
        return (embeds == self.parts.embed_placeholder(media, embeds)).all(-1)

    def _real(self, mask: Any, known: tuple[Tensor | None] | None, keys: int) -> Tensor | None:
        """(B, keys) of real tokens: the mask given, or, where that has four dimensions, the one it was `known` to be
        made of (a window shows only a part of the keys)."""
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None or mask.dim() == 2:
            return mask
        if known is not None and (known[0] is None or known[0].shape[1] == keys):
            return known[0]
        visible = mask[:, 0, :, :keys]  # every real key is seen at least by its own row, padding by none
        visible = visible if visible.dtype == torch.bool else visible > torch.finfo(visible.dtype).min / 2
        return visible.any(dim=1).long()

    def _continue(self, given: dict[str, Any], frame: Frame, state: Reduced) -> None:
        """A pass on a cache that holds a reduced prompt: masks and positions of the columns that are there."""
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        mask = given.get("attention_mask")
        if frame.types is not None:
            total = _length(frame.cache) + tokens.shape[1] + state.removed
            given["token_type_ids"] = frame.types = state.translate_types(frame.types, total)
        if (mask is None and not state.whole) or (isinstance(mask, Tensor) and mask.dim() == 2):
            physical = _length(frame.cache) + tokens.shape[1]
            if mask is None or mask.shape[1] == physical + state.removed:
                given["attention_mask"] = state.translate(mask, physical + state.removed)
            elif mask.shape[1] != physical:
                raise StaleCacheError(
                    f"the attention mask covers {mask.shape[1]} columns; with this cache and the new tokens there are "
                    f"{physical + state.removed} ({physical} after the reduction)"
                )
        positions = given.get("position_ids")
        if positions is None and not self.parts.mrope:
            start = _length(frame.cache) + state.removed + self.parts.position_base
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        if positions is not None and state.shift is not None:
            positions = positions - state.shift.to(positions.device)
        given["position_ids"] = positions

    def after_inner(self, output: Any) -> Any:
        """Give back as many positions as came in, and let the cache carry what it holds."""
        frame = self.thread.frames.pop()
        self.thread.made = {}  # tower outputs are large
        state = reduced_state(frame.cache)
        if state is not None:
            state.armed = False
        if output is None:
            return None
        if frame.state is not None:
            cache = output.past_key_values if hasattr(output, "past_key_values") else frame.cache
            if cache is not None:
                set_reduced(cache, frame.state)
        if frame.back is None or not self.restore_length:
            return None
        hidden = output[0]
        index = frame.back.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        restored = hidden.gather(1, index)
        if isinstance(output, tuple):
            return (restored, *output[1:])
        output.last_hidden_state = restored
        return None

    # -- the language model --------------------------------------------------------------------------------------------

    def before_language(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = self.thread.frames[-1] if self.thread.frames else None
        if frame is None or frame.columns is None:
            return None
        embeds = kwargs["inputs_embeds"]
        items = self._items(frame)
        if not items:
            return None
        answers = self._choose(frame, items, embeds)
        if answers is None and self.thread.encoding:
            answers = [None] * len(items)
        if answers is None:
            self._record([])
            return None
        return args, self._reduce(frame, items, answers, kwargs)

    def _items(self, frame: Frame) -> list[Item]:
        """The images and videos of this pass, each with its row and columns."""
        assert frame.columns is not None
        items: list[Item] = []
        for media, columns in frame.columns.items():
            if not bool(columns.any()):
                continue
            seen = frame.seen.get(media) or self.thread.made.get(media)
            if seen is None or seen.session is None or seen.session() is not self:
                raise PreEncodedError(
                    f"the {media} features were encoded elsewhere (mm_encoder_outputs made before this patch, or by "
                    "another model), so what the vision tower saw is unknown; pass pixel values, or encode with "
                    f"model.model.get_{media}_features() while the model is patched"
                )
            items += place_items(media, seen, self.parts.layouts(seen), columns)
        if self.method.joins_images:
            items = join_images(items)
        items.sort(key=lambda item: (item.row, int(item.columns[0])))
        return items

    def _choose(self, frame: Frame, items: list[Item], embeds: Tensor) -> list[Keep | Resample | None] | None:
        """The method's answer for each item; None where every item goes on untouched."""
        run = self.thread.generation
        known = [item.seen.plans.get(item.index) for item in items]
        made = [plan[1] for plan in known if plan is not None and plan[0] is run]
        if run is not None and len(made) == len(items):
            answers = made
        else:
            answers = self._ask(frame, items, embeds)
            for item, answer in zip(items, answers, strict=True):
                item.seen.plans[item.index] = (run, answer)
        return answers if any(answer is not None for answer in answers) else None

    def _ask(self, frame: Frame, items: list[Item], embeds: Tensor) -> list[Keep | Resample | None]:
        """Ask the method about groups of items of one layout. Rows that generate repeated (beams) are asked once."""
        groups: dict[MediaLayout, list[int]] = {}
        first: dict[tuple[str, int], int] = {}
        for place, item in enumerate(items):
            if (item.media, item.index) in first:
                continue
            first[item.media, item.index] = place
            groups.setdefault(item.layout, []).append(place)
        found: dict[tuple[str, int], Keep | Resample | None] = {}
        for layout, places in groups.items():
            members = [items[place] for place in places]
            for item, answer in zip(members, self._ask_group(frame, layout, members, embeds), strict=True):
                found[item.media, item.index] = answer
        return [found[item.media, item.index] for item in items]

    def _ask_group(
        self, frame: Frame, layout: MediaLayout, members: list[Item], embeds: Tensor
    ) -> Sequence[Keep | Resample | None]:
        if not layout.cells or self.method.bypasses(layout):
            return [None] * len(members)
        features = torch.stack([embeds[item.row, item.cell_columns.to(embeds.device)] for item in members])
        cells = torch.tensor(layout.cells, device=embeds.device)
        source = GroupSource(self, layout, members, features, embeds, self._text(frame), frame.ids, self.thread.request)
        gaps = any(bool((item.columns[1:] != item.columns[:-1] + 1).any()) for item in members)
        view = VisualFeatures(layout, source.tower, features, cells, source, self.parts.mrope, gaps)
        with torch.no_grad():
            answer = self.method.select(view)
        if answer is None:
            return [None] * len(members)
        if isinstance(answer, Keep):
            valid = answer.valid if answer.valid is not None else torch.ones_like(answer.indices, dtype=torch.bool)
            return [Keep(row[real][None]) for row, real in zip(answer.indices, valid, strict=True)]
        return list(answer)

    def _text(self, frame: Frame) -> Tensor:
        """(B, S) bool: real tokens that are not visual."""
        assert frame.columns is not None
        visual = functools.reduce(torch.logical_or, frame.columns.values())
        if frame.mask is None:
            return ~visual
        return ~visual & frame.mask[:, frame.past :].bool().to(visual.device)

    def _reduce(self, frame: Frame, items: list[Item], answers: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Build the shorter sequence and everything that goes with it."""
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        text = self._text(frame).to(embeds.device)
        rows: list[Row] = [Row(text[b].nonzero()[:, 0], embeds[b]) for b in range(batch)]
        keep_row_ends = self.method.keep_newline
        for item, answer in zip(items, answers, strict=True):
            rows[item.row].add(item, answer, keep_row_ends)
        built = [row.build() for row in rows]
        width = max(one.columns.shape[0] for one in built)
        source = torch.zeros(batch, width, dtype=torch.long, device=embeds.device)
        real = torch.zeros(batch, width, dtype=torch.bool, device=embeds.device)
        back = torch.zeros(batch, length, dtype=torch.long, device=embeds.device)
        grid = torch.arange(length, device=embeds.device)
        parts = []
        for b, one in enumerate(built):
            start = width - one.columns.shape[0]
            source[b, start:], real[b, start:] = one.columns, True
            parts.append(torch.nn.functional.pad(one.embeds, (0, 0, start, 0)))
            back[b] = start + (torch.searchsorted(one.keys, grid, right=True) - 1).clamp_min(0)
        merged = torch.stack(parts).to(embeds.dtype)
        frame.back = back
        out = {**kwargs, "inputs_embeds": merged}
        self._fit_positions(frame, out, source, real)
        self._fit_mask(frame, out, source, real, merged)
        self._fit_deepstack(kwargs, out, built, real)
        self._record(built)
        if self.thread.encoding:
            raise Stop(self._encoded(out, built))
        return out

    def _encoded(self, out: dict[str, Any], built: list[Built]) -> Encoded:
        media: dict[str, list[Tensor]] = {}
        for one in built:
            for number, (item, _) in enumerate(one.items):
                media.setdefault(item.media, []).append(one.embeds[one.owner == number])
        if out.get("deepstack_visual_embeds") is not None:
            raise UnsupportedModelError(
                f"{type(self.parts.inner).__name__} adds visual features behind its first layers, which embeddings "
                "alone cannot carry; use the patched model itself"
            )
        return Encoded(
            inputs_embeds=out["inputs_embeds"],
            attention_mask=self.thread.frames[-1].state.mask.long(),  # type: ignore[union-attr]
            position_ids=out["position_ids"] if self.parts.mrope or self.positions == "original" else None,
            token_type_ids=self.thread.frames[-1].types_out,
            media=media,
            trace=self.trace,
        )

    def encode_inputs(self, inputs: Mapping[str, Any]) -> Encoded:
        """Run the vision encoder and the reduction on a processor's output, and stop before the language model."""
        names = {*self.names, "mm_encoder_outputs"}
        self.thread.encoding = True
        try:
            with torch.no_grad():
                self.parts.inner(**{key: value for key, value in inputs.items() if key in names})
        except Stop as stop:
            return stop.encoded
        finally:
            self.thread.encoding = False
        raise RequestError(
            "nothing to encode: the inputs hold no image or video (pixel_values, pixel_values_videos); "
            "pass what the processor returned"
        )

    def _fit_positions(self, frame: Frame, out: dict[str, Any], source: Tensor, real: Tensor) -> None:
        positions = out.get("position_ids")
        base = self.parts.position_base
        if positions is None:
            if self.parts.mrope:
                raise RequestError(
                    "a Qwen-VL model was called without what its positions are made of; pass mm_token_type_ids and "
                    "the grid sizes that the processor returns"
                )
            positions = self._logical_positions(frame, source)
        if positions.dim() == 3:
            index = source.to(positions.device)[None].expand(positions.shape[0], -1, -1)
            out["position_ids"] = positions.expand(-1, source.shape[0], -1).gather(2, index)
            return
        positions = positions.expand(source.shape[0], -1)
        gathered = positions.gather(1, source.to(positions.device))
        if self.positions == "compact":
            first = positions[:, :1]
            if frame.mask is not None:  # of the first column that is no padding, whether or not it survived
                given = frame.mask[:, frame.past :].to(positions.device)
                first = positions.gather(1, given.long().argmax(dim=1, keepdim=True))
            gathered = first + real.to(positions.device).long().cumsum(dim=1) - 1
        out["position_ids"] = torch.where(real.to(positions.device), gathered, base)

    def _logical_positions(self, frame: Frame, source: Tensor) -> Tensor:
        """Positions as the library makes them by itself: by column, whatever the padding."""
        assert frame.columns is not None
        length = next(iter(frame.columns.values())).shape[1]
        start = frame.past + self._removed(frame) + self.parts.position_base
        return torch.arange(start, start + length, device=source.device)[None]

    def _removed(self, frame: Frame) -> int:
        state = reduced_state(frame.cache)
        return 0 if state is None else state.removed

    def _fit_mask(self, frame: Frame, out: dict[str, Any], source: Tensor, real: Tensor, merged: Tensor) -> None:
        batch = source.shape[0]
        mask = frame.mask
        if mask is None:
            mask = real.new_ones(batch, frame.past + frame.back.shape[1])  # type: ignore[union-attr]
        before = mask[:, : frame.past].bool().to(real.device)
        keys = torch.cat([before, real], dim=1)
        types = None
        if frame.types is not None:
            given_types = frame.types.to(source.device)
            new = frame.back.shape[1]  # type: ignore[union-attr]
            types = torch.cat([given_types[:, :-new], given_types[:, -new:].gather(1, source)], dim=1)
        frame.types_out = types
        out["attention_mask"] = self.parts.rebuild_mask(types, keys.long(), merged, frame.cache)
        if out.get("token_type_ids") is not None:
            out["token_type_ids"] = types
        shift = None
        full = mask.shape[1] + self._removed(frame)
        if self.positions == "compact":
            held = reduced_state(frame.cache)
            earlier = 0 if held is None or held.shift is None else held.shift.to(real.device)
            given = mask[:, frame.past :].bool().to(real.device).sum(1, keepdim=True)
            shift = given - real.sum(1, keepdim=True) + earlier
        held_types = types if types is not None and types.shape == keys.shape else None
        frame.state = Reduced(mask=keys, full=full, shift=shift, whole=bool(keys.all()), types=held_types)

    def _fit_deepstack(self, given: dict[str, Any], out: dict[str, Any], built: list[Built], real: Tensor) -> None:
        """Further features for the visual tokens (Qwen3-VL adds some behind its first layers)."""
        if given.get("deepstack_visual_embeds") is None:
            return
        old = given["visual_pos_masks"]
        numbers = (old.flatten().long().cumsum(0) - 1).reshape(old.shape)
        masks = torch.zeros_like(real)
        for b, one in enumerate(built):
            masks[b, real.shape[1] - one.owner.shape[0] :] = one.owner >= 0
        out["visual_pos_masks"] = masks
        out["deepstack_visual_embeds"] = [
            torch.cat([one.further(rows, numbers[b].to(rows.device)) for b, one in enumerate(built)])
            for rows in given["deepstack_visual_embeds"]
        ]

    def _record(self, built: list[Built]) -> None:
        steps = tuple(
            MediaStep.of(self.method.name, item.row, item.layout, tokens) for one in built for item, tokens in one.items
        )
        self.thread.steps = self._newest = steps

    # -- generate ------------------------------------------------------------------------------------------------------

    def generate(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `generate`, but refuse what cannot work on a reduced prompt."""
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **{k: v for k, v in given.items() if k != "kwargs"}}
        if self._has_media(given) or reduced_state(given.get("past_key_values")) is not None:
            self._check_generation(given)
        before = self.thread.generation, self.thread.prompt
        ids = given.get("input_ids")
        self.thread.generation, self.thread.prompt = object(), given.get("inputs") if ids is None else ids
        try:
            return function(*args, **kwargs)
        finally:
            self.thread.generation, self.thread.prompt = before

    def _check_generation(self, given: Mapping[str, Any]) -> None:
        configs = (given.get("generation_config"), getattr(self.host.outer, "generation_config", None))
        reasons = {
            "prefill_chunk_size": HFVLMHost.refusals["prefill_chunk_size"],
            "assistant_model": HFVLMHost.refusals["assistant_model"],
            "prompt_lookup_num_tokens": "candidates from the prompt would be checked against a prompt that is shorter",
            "assistant_early_exit": HFVLMHost.refusals["assistant_model"],
        }
        for name, reason in reasons.items():
            if given.get(name) is not None or any(getattr(config, name, None) is not None for config in configs):
                raise UnsupportedGenerationError(
                    f"generate({name}=...) is refused on a model whose prompt tokred reduces: {reason}; leave it out"
                )
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise PaddingError(
                "generate() was given a batch padded on the right; its next token would be predicted from padding. "
                "Pad on the left: processor.tokenizer.padding_side = 'left'"
            )

    def prepare(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`prepare_inputs_for_generation`: static caches get their 4-D mask here, so keys are translated before."""
        state = reduced_state(kwargs.get("past_key_values"))
        if state is None:
            self.thread.known_mask = (kwargs.get("attention_mask"),)
            return function(*args, **kwargs)
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None or not state.whole:
            step = kwargs.get("next_sequence_length")
            logical = kwargs["past_key_values"].get_seq_length()
            total = mask.shape[1] if mask is not None else int(logical) + (ids.shape[1] if step is None else step)
            kwargs["attention_mask"] = state.translate(mask, total)
        self.thread.known_mask = (kwargs.get("attention_mask"),)
        state.armed = True
        try:
            return function(*args, **kwargs)
        finally:
            state.armed = False

    def room(self, given: Mapping[str, Any]) -> int:
        """Columns that a static cache needs beyond those of the prompt: methods may enlarge what they resize."""
        outputs, ids = given.get("mm_encoder_outputs") or {}, self.thread.prompt
        if given.get("past_key_values") is not None:  # the caller's own: nothing is reserved for it
            return 0
        extra: dict[int, int] = {}
        row_ends = self.method.keep_newline
        for media in self.parts.medias if ids is not None else ():
            seen = getattr(outputs.get(media), "_tokred_seen", None)
            if seen is None:
                continue
            items = place_items(media, seen, self.parts.layouts(seen), self._columns(media, ids, None))
            for item in join_images(items) if self.method.joins_images else items:
                stay = item.slot_columns(MediaLayout.CLASS, MediaLayout.END, *[MediaLayout.NEWLINE] * row_ends)
                more = self.method.largest(item.layout) + len(stay) - len(item.layout.slots)
                extra[item.row] = extra.get(item.row, 0) + max(0, more)
        return max(extra.values(), default=0)

    @contextlib.contextmanager
    def request(self, **given: Any) -> Iterator[None]:
        """Give query, frames or frame scores for the calls inside the `with`."""
        before = self.thread.request
        self.thread.request = make_request(**given)
        try:
            yield
        finally:
            self.thread.request = before


def _length(cache: Any) -> int:
    return int(physical_length(cache))


def _shape_only(key: str, value: Any) -> Any:
    """Pixels weigh much and are not needed any more; their shape is."""
    if isinstance(value, Tensor) and key.startswith("pixel_values"):
        return torch.empty(value.shape, device="meta")
    return value


def _current(session: VisualSession) -> Seen | None:
    return session.thread.seen


def _collect(session: VisualSession, value: Tensor) -> None:
    if session.thread.seen is not None and session.thread.seen.kind == "video":
        session.thread.seen.dense.append(value.detach())


def _inner_class(base: type) -> dict[str, Any]:
    """An inner model whose encoder calls are watched. Signatures stay: `generate` reads them."""

    def watched(media: str) -> Callable[..., Any]:
        inherited = getattr(base, f"get_{media}_features")

        @functools.wraps(inherited)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._tokred_visual.encode(media, functools.partial(inherited, self), args, kwargs)

        return method

    return {f"get_{m}_features": watched(m) for m in ("image", "video") if hasattr(base, f"get_{m}_features")}


def _outer_class(base: type) -> dict[str, Any]:
    """A model whose `generate` knows that its prompt gets shorter."""
    inherited = {name: getattr(base, name) for name in ("generate", "prepare_inputs_for_generation")}
    make_cache = base._prepare_cache_for_generation  # type: ignore[attr-defined]

    @functools.wraps(inherited["generate"])
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._tokred_visual.generate(functools.partial(inherited["generate"], self), args, kwargs)

    @functools.wraps(inherited["prepare_inputs_for_generation"])
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(inherited["prepare_inputs_for_generation"], self)
        return self._tokred_visual.prepare(function, args, kwargs)

    @functools.wraps(make_cache)
    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(make_cache).bind(self, *args, **kwargs)
        if "max_cache_length" in bound.arguments:
            bound.arguments["max_cache_length"] += self._tokred_visual.room(bound.arguments["model_kwargs"])
        return make_cache(*bound.args, **bound.kwargs)

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = HFVLMHost.refusals["generate_batch"]
        raise UnsupportedGenerationError(f"generate_batch() is refused on a patched multimodal model: {reason}")

    return {
        "generate": generate,
        "generate_batch": generate_batch,
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
        "_prepare_cache_for_generation": _prepare_cache_for_generation,
    }


class Stop(Exception):
    """Ends a pass that was run for its embeddings only."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__("the pass ends before the language model")
        self.encoded = encoded


class BeforeInner:
    """Forward pre-hook of the inner multimodal model."""

    def __init__(self, session: VisualSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.session.before_inner(args, kwargs)


class AfterInner:
    """Forward hook of the inner multimodal model; it also runs, without an output, when the pass raised."""

    def __init__(self, session: VisualSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.session.after_inner(output)


class BeforeLanguage:
    """Forward pre-hook of the language model."""

    def __init__(self, session: VisualSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.session.before_language(args, kwargs)
