"""What every patched language model of transformers shares, with or without pictures: the books of a shorter prompt.

A `PromptSession` sits around the model that `generate` prepares inputs for. Before each pass it notes which columns are
real, and translates masks and positions of steps on a cache that holds a reduced prompt; after it, the cache carries
what it holds, and hidden states go back to the caller's length. The cache says the prompt's own length to whoever
slices by it (`logical_cache`), so `generate` keeps its contract and no library function is copied.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokred import ops
from tokred.adapters.hooks import Hook
from tokred.adapters.logical_cache import Reduced, arm, disarm, physical_length, reduced_state, set_reduced
from tokred.adapters.swap import swap_class, unswap_class
from tokred.adapters.visual_source import Request, make_request
from tokred.core.budget import check_choice
from tokred.core.errors import (
    InvalidParameterError,
    PaddingError,
    StaleCacheError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from tokred.core.sites import MediaLayout

__all__ = ["REFUSALS", "Frame", "PromptSession"]

#: ways of `generate` that cannot work on a prompt that gets shorter, and why
REFUSALS: dict[str, str] = {
    "prefill_chunk_size": "chunks of a prompt would be reduced one by one, as if each were the whole",
    "assistant_model": "the assistant would have to see the same reduced prompt (also prompt_lookup_num_tokens)",
    "generate_batch": "its paged cache counts the tokens of the prompt by itself",
}


class Thread(threading.local):
    """What a running call knows, one for each thread."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.request: Request | None = None
        self.prompt: Tensor | None = None  # the ids of the `generate` that runs now
        self.known_mask: tuple[Tensor | None] | None = None  # (B, keys), as `generate` had it before it made a 4-D one
        self.generation: object | None = None  # the `generate` that runs now; all its passes choose the same tokens


@dataclass
class Frame:
    """One pass of the model.

    Attributes:
        ids: (B, S) or None. columns: {media: (B, S) bool}, where its placeholders are; None while there are no media.
        mask: (B, keys) of this pass, None for all real. types: (B, S or keys) token types.
        cache: given. past: columns that it holds, of the language model.
        back: (B, S) int64, the reduced column for each original one; None while nothing was reduced.
        state: what the cache will carry. types_out: (B, L) token types of the reduced sequence.
        length: S. new: what the columns of the language model are, where anything about them is known.
    """

    ids: Tensor | None = None
    columns: dict[str, Tensor] | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    types: Tensor | None = None
    cache: Any = None
    past: int = 0
    length: int = 0
    back: Tensor | None = None
    state: Reduced | None = None
    types_out: Tensor | None = None
    new: Columns | None = None

    @property
    def types_now(self) -> Tensor | None:
        """Token types of what enters the language model."""
        return self.types if self.types_out is None else self.types_out

    def real(self, x: Tensor) -> Tensor:
        """(B, S) bool: which of the columns that this pass brings, x (B, S) or (B, S, D), are no padding."""
        if self.mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self.mask[:, self.past :].bool().to(x.device)


@dataclass
class Columns:
    """The columns that enter the language model in one pass, L of them (new ones only).

    Attributes:
        origin: (B, L) int64, the column of the caller's prompt that each is. valid: (B, L) bool.
        visual: (B, L) bool. media: (B, L) int64, the image or video of its row, -1 for none.
        tokens: (B, L) int64, which prunable token of its image or video each is, -1 for none.
        marks: values that methods in the vision tower wrote, (B, L, ...). layouts: {(row, media): how it lies}.
    """

    origin: Tensor
    valid: Tensor
    visual: Tensor
    media: Tensor
    tokens: Tensor
    marks: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[tuple[int, int], MediaLayout] = field(default_factory=dict)

    @classmethod
    def plain(cls, valid: Tensor) -> Columns:
        """Columns (B, L) of which nothing is visual."""
        origin = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape[0], -1)
        none = torch.full_like(origin, -1)
        return cls(origin, valid, torch.zeros_like(valid), none, none.clone())

    def take(self, index: Tensor, real: Tensor) -> Columns:
        """Those at `index` (B, K); `real` (B, K) is False where one only pads its row."""
        return Columns(
            origin=self.origin.gather(1, index),
            valid=real,
            visual=self.visual.gather(1, index) & real,
            media=self.media.gather(1, index).masked_fill(~real, -1),
            tokens=self.tokens.gather(1, index).masked_fill(~real, -1),
            marks={name: ops.gather_tokens(value, index) for name, value in self.marks.items()},
            layouts=self.layouts,
        )


class PromptSession:
    """One model whose prompt gets shorter on its way.

    Attributes:
        outer: the model with the language head, None where it was not given. inner: without it.
        parts: says of the inner model what its family does (`Family`, or `TextParts`).
        refuses: ways of generating that are refused, and why. checks_always: whether without media too.
        notes_columns: whether anybody wants to know what the columns are. asks_prunable: whether the caller has to say
            which tokens may be dropped.
    """

    def __init__(self, outer: Any, inner: Any, parts: Any, options: Mapping[str, Any]) -> None:
        self.outer, self.inner, self.parts = outer, inner, parts
        self.restore_length = options.get("restore_length", True)
        check_choice("restore_length", self.restore_length, (True, False))
        self.refuses = {
            **REFUSALS,
            "prompt_lookup_num_tokens": "candidates from the prompt would be checked against a prompt that is shorter",
            "assistant_early_exit": REFUSALS["assistant_model"],
        }
        self.checks_always = False
        self.notes_columns = False
        self.asks_prunable = False
        self.handles: list[Any] = []
        self.swapped: list[nn.Module] = []
        self.names = tuple(inspect.signature(type(inner).forward).parameters)[1:]
        self._reset()

    def make_thread(self) -> Thread:
        return Thread()

    # -- installation --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        if self.outer is not None:
            self.swap(self.outer, outer_class)
            self.handles.append(self.outer.register_forward_pre_hook(Hook(self, "check_call"), with_kwargs=True))
        self.handles.append(self.inner.register_forward_pre_hook(Hook(self, "before_inner"), with_kwargs=True))
        self.handles.append(self.inner.register_forward_hook(Hook(self, "after_inner"), always_call=True))

    def swap(self, module: nn.Module, extend: Callable[[type], dict[str, Any]]) -> None:
        hooked = module.__dict__.pop("forward", None)  # no forward of ours: one set by accelerate may stay where it is
        try:
            swap_class(module, extend)
        finally:
            if hooked is not None:
                module.__dict__["forward"] = hooked
        module._tokred_prompt = self  # type: ignore[assignment]
        self.swapped.append(module)

    def remove(self) -> None:
        """Take everything away again; safe to call twice."""
        for handle in reversed(self.handles):
            handle.remove()
        for module in reversed(self.swapped):
            unswap_class(module)
            module.__dict__.pop("_tokred_prompt", None)
        self.handles, self.swapped = [], []

    def _reset(self) -> None:
        self.thread = self.make_thread()
        self._newest: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("thread", "_newest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def frame(self) -> Frame | None:
        """The pass that runs now."""
        return self.thread.frames[-1] if self.thread.frames else None

    # -- the inner model -----------------------------------------------------------------------------------------------

    def before_inner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        frame = Frame(cache=given.get("past_key_values"), types=given.get("token_type_ids"))
        self.thread.frames.append(frame)
        known, self.thread.known_mask = self.thread.known_mask, None
        arm(frame.cache)
        state = reduced_state(frame.cache)
        if state is not None:
            self._continue(given, frame, state)
        frame.past = _length(frame.cache)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        frame.ids = ids
        entering = embeds if ids is None else ids
        frame.length = 0 if entering is None else entering.shape[1]
        frame.mask = self._real(given.get("attention_mask"), known, frame.past + frame.length)
        self.look(given, frame)
        return (), given

    def look(self, given: dict[str, Any], frame: Frame) -> None:
        """What else a pass begins with, for subclasses."""

    def has_media(self, given: Mapping[str, Any]) -> bool:
        """Whether a call brings images or videos."""
        return False

    def _real(self, mask: Any, known: tuple[Tensor | None] | None, keys: int) -> Tensor | None:
        """(B, keys) of real tokens: the mask given, or, where that has four dimensions, the one it was `known` to be
        made of (a window shows only a part of the keys)."""
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise UnsupportedModelError(
                f"an attention mask of type {type(mask).__name__} cannot be fitted to a shorter prompt; use the "
                "attention implementation 'sdpa', 'eager' or a flash one"
            )
        if mask.dim() == 2:
            return mask
        held = mask if known is None else known[0]
        if held is None or (held.dim() == 2 and held.shape[1] == keys):
            return held
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

    def after_inner(self, args: tuple[Any, ...], output: Any) -> Any:
        """Give back as many positions as came in, and let the cache carry what it holds."""
        frame = self.thread.frames.pop()
        disarm(frame.cache)
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

    # -- generate ------------------------------------------------------------------------------------------------------

    def generate(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `generate`, but refuse what cannot work on a reduced prompt."""
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **{k: v for k, v in given.items() if k != "kwargs"}}
        if self.checks_always or self.has_media(given) or reduced_state(given.get("past_key_values")) is not None:
            self._check_generation(given)
        before = self.thread.generation, self.thread.prompt
        ids = given.get("input_ids")
        self.thread.generation, self.thread.prompt = object(), given.get("inputs") if ids is None else ids
        try:
            return function(*args, **kwargs)
        finally:
            self.thread.generation, self.thread.prompt = before

    def _check_generation(self, given: Mapping[str, Any]) -> None:
        configs = (given.get("generation_config"), getattr(self.outer, "generation_config", None))

        def setting(name: str) -> Any:
            found = (given.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in found if value is not None), None)

        for name, reason in self.refuses.items():
            option, _, value = name.partition("=")
            wanted = setting(option)
            if name == "past_key_values":
                refused = wanted is not None and _length(wanted) > 0
            elif name == "past_key_values=whole":
                refused = wanted is not None and _length(wanted) > 0 and reduced_state(wanted) is None
            elif value:
                refused = str(wanted) == value
            else:
                refused = wanted is not None
            if refused:
                shown = "..." if value in ("", "whole") else value
                raise UnsupportedGenerationError(
                    f"generate({option}={shown}) is refused on a model whose prompt tokred reduces: {reason}; leave "
                    "it out"
                )
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise PaddingError(
                "generate() was given a batch padded on the right; its next token would be predicted from padding. "
                "Pad on the left: processor.tokenizer.padding_side = 'left'"
            )

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse calls of the whole model that cannot work."""
        if kwargs.get("labels") is None:
            return
        if "labels" in self.refuses:
            raise InvalidParameterError(f"labels are refused on this model: {self.refuses['labels']}")
        if not self.restore_length:
            raise InvalidParameterError(
                "labels have the caller's length, and restore_length=False gives logits of the reduced prompt; "
                "patch with restore_length=True"
            )

    def prepare(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`prepare_inputs_for_generation`: static caches get their 4-D mask here, so keys are translated before."""
        cache = kwargs.get("past_key_values")
        state = reduced_state(cache)
        mask = kwargs.get("attention_mask")
        ids = args[0] if args else kwargs.get("input_ids")
        if cache is not None and state is not None and ids is not None and (mask is not None or not state.whole):
            step = kwargs.get("next_sequence_length")
            total = mask.shape[1] if mask is not None else int(cache.get_seq_length()) + (step or ids.shape[1])
            kwargs["attention_mask"] = state.translate(mask, total)
        self.thread.known_mask = (kwargs.get("attention_mask"),)
        arm(cache)
        try:
            return function(*args, **kwargs)
        finally:
            disarm(cache)

    def room(self, given: Mapping[str, Any]) -> int:
        """Columns that a static cache needs beyond those of the prompt."""
        return 0

    @contextlib.contextmanager
    def request(self, **given: Any) -> Iterator[None]:
        """Give what methods read beside the inputs for the calls inside the `with`."""
        before = self.thread.request
        self.thread.request = make_request(**given)
        try:
            yield
        finally:
            self.thread.request = before


def _length(cache: Any) -> int:
    return int(physical_length(cache))


def outer_class(base: type) -> dict[str, Any]:
    """A model whose `generate` knows that its prompt gets shorter."""
    inherited = {name: getattr(base, name) for name in ("generate", "prepare_inputs_for_generation")}
    make_cache = base._prepare_cache_for_generation  # type: ignore[attr-defined]

    @functools.wraps(inherited["generate"])
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._tokred_prompt.generate(functools.partial(inherited["generate"], self), args, kwargs)

    @functools.wraps(inherited["prepare_inputs_for_generation"])
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(inherited["prepare_inputs_for_generation"], self)
        return self._tokred_prompt.prepare(function, args, kwargs)

    @functools.wraps(make_cache)
    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(make_cache).bind(self, *args, **kwargs)
        if "max_cache_length" in bound.arguments:
            bound.arguments["max_cache_length"] += self._tokred_prompt.room(bound.arguments["model_kwargs"])
        return make_cache(*bound.args, **bound.kwargs)

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = REFUSALS["generate_batch"]
        raise UnsupportedGenerationError(f"generate_batch() is refused on a patched model: {reason}")

    return {
        "generate": generate,
        "generate_batch": generate_batch,
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
        "_prepare_cache_for_generation": _prepare_cache_for_generation,
    }
