"""Visual tokens are reduced between the vision encoder and the language model of a multimodal model of transformers.

One generic pair of hooks serves every family. The first, on the inner multimodal model, notes which columns of the
prompt are visual (`PromptSession`). The second, on the language model, sees the merged sequence, asks the method, and
hands on a shorter one: embeddings, mask, positions, token types, deepstack rows. What families differ in is in
`vlm_families`.

Scores of the vision tower are caught while `get_image_features` runs and travel on its output, which `generate` makes
once and carries to every pass that needs it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokred.adapters.hooks import Hook
from tokred.adapters.logical_cache import Reduced, reduced_state
from tokred.adapters.prompt_rows import Built, Item, Row, join_images, place_items
from tokred.adapters.prompt_session import Columns, Frame, PromptSession, Thread
from tokred.adapters.towers import Seen
from tokred.adapters.visual_source import GroupSource
from tokred.adapters.vlm_families import check_tower
from tokred.core.encoded import Encoded
from tokred.core.errors import InvalidParameterError, PreEncodedError, RequestError, UnsupportedModelError
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, VisualFeatures
from tokred.core.tokens import Keep, Resample
from tokred.core.trace import MediaStep, Trace

__all__ = ["VisualSession"]


class VisualThread(Thread):
    """What a running call of a multimodal model knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen | None = None  # of the get_image_features that runs now
        self.made: dict[str, Seen] = {}  # in the inner forward that runs now, by media
        self.encoding = False  # whether the pass ends before the language model
        self.steps: tuple[MediaStep, ...] = ()


class VisualSession(PromptSession):
    """A method at work between the vision encoder and the language model of one multimodal model.

    Attributes:
        chooser: None where only methods inside the language model act, which want to know what is visual.
        encoder: the session inside the vision tower, whose marks and order of tokens travel on.
    """

    thread: VisualThread

    def __init__(self, host: Any, method: VisualMethod | None, options: Mapping[str, Any], encoder: Any = None) -> None:
        super().__init__(host.outer, host.inner, host.parts, options)
        self.chooser, self.encoder = method, encoder
        self.processor = options.get("processor")
        check_tower(self.parts)
        self.positions = self._positions()
        self.tower = self.parts.make_tower()
        self.needs: Needs = method.needs(self.tower.info) if method is not None else Needs()

    def make_thread(self) -> Thread:
        return VisualThread()

    @property
    def method(self) -> VisualMethod:
        """The method, where there is one."""
        assert self.chooser is not None
        return self.chooser

    def _positions(self) -> str:
        if self.chooser is None:
            return "original"
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
        self.swap(self.parts.inner, _inner_class)
        super().install()
        language = self.parts.language_model
        self.handles.append(language.register_forward_pre_hook(Hook(self, "before_language"), with_kwargs=True))

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
        if self.encoder is not None:
            seen.table = self.encoder.last_table
        seen.parts.clear()
        if not self.needs.pixels:
            seen.arguments = {key: _shape_only(key, value) for key, value in seen.arguments.items()}
        seen.session = weakref.ref(self)
        if hasattr(output, "pooler_output"):
            output._tokred_seen = seen
        self.thread.made[media] = seen
        return output

    # -- the inner model -----------------------------------------------------------------------------------------------

    def look(self, given: dict[str, Any], frame: Frame) -> None:
        self.thread.made = {}
        if not self.has_media(given):
            return
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        frame.columns = {media: self._columns(media, ids, embeds) for media in self.parts.medias}
        outputs = given.get("mm_encoder_outputs") or {}
        frame.seen = {media: getattr(outputs.get(media), "_tokred_seen", None) for media in self.parts.medias}

    def after_inner(self, args: tuple[Any, ...], output: Any) -> Any:
        self.thread.made = {}  # tower outputs are large
        return super().after_inner(args, output)

    def has_media(self, given: Mapping[str, Any]) -> bool:
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

    # -- the language model --------------------------------------------------------------------------------------------

    def before_language(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = self.frame
        if frame is None or frame.columns is None:
            return None
        embeds = kwargs["inputs_embeds"]
        items = self._items(frame)
        if not items:
            return None
        answers = self._choose(frame, items, embeds) if self.chooser is not None else None
        if answers is None and self.thread.encoding:
            answers = [None] * len(items)
        if answers is None:
            self._record([])
            self._note(frame, items, embeds)
            return None
        return args, self._reduce(frame, items, answers, kwargs)

    def _note(self, frame: Frame, items: list[Item], embeds: Tensor) -> None:
        """What the columns are where nothing was reduced, for methods inside the language model."""
        if not self.notes_columns:
            return
        new = Columns.plain(frame.real(embeds))
        for item in items:
            self._mark(new, item, item.columns.to(embeds.device), item.tokens.to(embeds.device))
        frame.new = new

    def _mark(self, new: Columns, item: Item, places: Tensor, tokens: Tensor) -> None:
        """Note that at `places` of the item's row stand the tokens numbered `tokens` (-1: none) of the item."""
        row = item.row
        number = int(new.media[row].max()) + 1
        new.visual[row, places] = True
        new.media[row, places] = number
        new.tokens[row, places] = tokens
        new.layouts[row, number] = item.layout
        for name, values in self._marks_of(item).items():
            if name not in new.marks:
                empty = values.new_zeros(())
                new.marks[name] = empty.expand(*new.visual.shape, *values.shape[1:]).clone()
            written = values[tokens.clamp_min(0)]
            written[tokens < 0] = 0
            new.marks[name][row, places] = written

    def _marks_of(self, item: Item) -> dict[str, Tensor]:
        """Marks from inside the vision tower, for each prunable token of an item (n, ...)."""
        table = item.seen.table
        if table is None or not table.marks:
            return {}
        source = GroupSource(
            self, item.layout, [item], torch.empty(1, 0, 0), torch.empty(0), torch.empty(0), None, None
        )
        return {name: source.mark(name)[0] for name in table.marks}

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
        if self.chooser is not None and self.chooser.joins_images:
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
        return ~visual & frame.real(visual)

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
        if self.notes_columns:
            frame.new = new = Columns.plain(real)
            new.origin = source
            for one in built:
                start = width - one.columns.shape[0]
                for number, (item, _) in enumerate(one.items):
                    own = (one.owner == number).nonzero()[:, 0]
                    self._mark(new, item, start + own, one.tokens[own])
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

    def room(self, given: Mapping[str, Any]) -> int:
        """Columns that a static cache needs beyond those of the prompt: methods may enlarge what they resize."""
        outputs, ids = given.get("mm_encoder_outputs") or {}, self.thread.prompt
        if given.get("past_key_values") is not None or self.chooser is None:  # nothing is reserved in the caller's own
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
            return self._tokred_prompt.encode(media, functools.partial(inherited, self), args, kwargs)

        return method

    return {f"get_{m}_features": watched(m) for m in ("image", "video") if hasattr(base, f"get_{m}_features")}


class Stop(Exception):
    """Ends a pass that was run for its embeddings only."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__("the pass ends before the language model")
        self.encoded = encoded
