"""KV caches of a reduced prompt: shorter than the prompt, while everybody who asks is told the prompt's length.

`generate`, multi-turn slicing and the default positions of models go by the *logical* length (columns of the caller's
ids and masks); mask builders go by the *physical* one (keys that are there). A cache that holds a reduced prompt
becomes a subclass that answers each with its own number, and carries what a later step needs to know of the reduction.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokred.core.errors import StaleCacheError

__all__ = [
    "Layered",
    "Reduced",
    "arm",
    "disarm",
    "layer_states",
    "physical_length",
    "reduced_state",
    "set_layers",
    "set_reduced",
]


@dataclass
class Reduced:
    """What became of the first columns of a request.

    Attributes:
        mask: (B, L) bool, which of the L physical columns are real.
        full: how many logical columns they stand for; columns behind are one to one.
        shift: (B, 1) int64, what compact positions lie below the logical ones; None where positions are original.
        whole: whether `mask` is all True. types: (B, L) token types of the columns, where the family has them.
    """

    mask: Tensor
    full: int
    shift: Tensor | None
    whole: bool
    types: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def removed(self) -> int:
        """Logical columns less physical ones (negative where a method made more tokens)."""
        return self.full - self.mask.shape[1]

    def translate(self, mask: Tensor | None, total: int) -> Tensor | None:
        """The (B, physical) mask for a (B, `total`) mask over logical columns; None stays None where that is exact."""
        if mask is None:
            if self.whole:
                return None
            mask = self.mask.new_ones(self.mask.shape[0], total, dtype=torch.long)
        return torch.cat([self.mask.to(mask.dtype), mask[:, self.full :]], dim=1)

    def translate_types(self, types: Tensor | None, total: int) -> Tensor | None:
        """Token types of physical columns, for those of `total` logical ones; others (of new columns) stay."""
        if types is None or self.types is None or types.shape[1] != total:
            return types
        return torch.cat([self.types.to(types), types[:, self.full :]], dim=1)

    def select(self, rows: Tensor) -> Reduced:
        """The state after the batch was reordered, repeated or cut."""
        rows = rows.to(self.mask.device)
        shift = None if self.shift is None else self.shift[rows]
        types = None if self.types is None else self.types[rows]
        return replace(self, mask=self.mask[rows], shift=shift, types=types)


@dataclass
class Layered:
    """What each layer of a cache holds of the columns that entered the language model.

    Attributes:
        full: how many columns entered it with the prompt; columns behind are one to one in every layer.
        rows: of the batch. states: for each layer what it holds, None for all `full` columns. A state's `shift` is what
            positions at that layer lie below those of the language model.
        sparse: {layer: the part of its MLP that goes on}, as the host made it; rows move with `select`.
    """

    full: int
    rows: int
    states: tuple[Reduced | None, ...]
    sparse: Mapping[int, Any] = field(default_factory=dict)

    def removed_of(self, layer: int) -> int:
        """Columns less entries of one layer."""
        state = self.states[layer] if layer < len(self.states) else None
        return 0 if state is None else state.removed

    @property
    def removed(self) -> int:
        return self.removed_of(0)

    def select(self, rows: Tensor) -> Layered:
        made: dict[int, Reduced] = {}
        for state in self.states:
            if state is not None and id(state) not in made:
                made[id(state)] = state.select(rows)
        states = tuple(None if state is None else made[id(state)] for state in self.states)
        sparse = {layer: part.select(rows) for layer, part in self.sparse.items()}
        return Layered(self.full, len(rows), states, sparse)


def reduced_state(cache: Any) -> Reduced | None:
    """The state of a cache that holds a reduced prompt, else None."""
    return cache.__dict__.get("_tokred_reduced") if isinstance(cache, Cache) else None


def layer_states(cache: Any) -> Layered | None:
    """What the layers of a cache hold of the prompt that entered the language model; None where all hold all of it."""
    return cache.__dict__.get("_tokred_layers") if isinstance(cache, Cache) else None


def physical_length(cache: Any) -> Any:
    """Columns that entered the language model so far: an int, or a tensor for static caches.

    As many keys are in its first layer, unless that was cut afterwards.
    """
    if cache is None:
        return 0
    base = getattr(type(cache), "_tokred_base", type(cache))
    length = base.get_seq_length(cache)
    layered = layer_states(cache)
    return length if layered is None else length + layered.removed


def arm(cache: Any) -> None:
    """Tell a cache that a patched model is at work on it."""
    _set_armed(cache, True)


def disarm(cache: Any) -> None:
    """Tell a cache that nobody is at work on it who knows what it holds."""
    _set_armed(cache, False)


def _set_armed(cache: Any, armed: bool) -> None:
    if isinstance(cache, Cache) and "_tokred_base" in vars(type(cache)):
        cache._tokred_armed = armed  # type: ignore[attr-defined]


def set_reduced(cache: Cache, state: Reduced) -> None:
    """Let `cache` carry `state`, and answer with logical lengths from now on."""
    _extend(cache)
    cache._tokred_reduced = state  # type: ignore[attr-defined]


def set_layers(cache: Cache, layered: Layered) -> None:
    """Let `cache` carry what each of its layers holds."""
    _extend(cache)
    cache._tokred_layers = layered  # type: ignore[attr-defined]


def _extend(cache: Cache) -> None:
    if "_tokred_base" not in vars(type(cache)):
        cache.__class__ = _subclass(type(cache))
        cache._tokred_reduced = None  # type: ignore[attr-defined]
        cache._tokred_layers = None  # type: ignore[attr-defined]
        cache._tokred_armed = False  # type: ignore[attr-defined]


class _Logical:
    """Methods of a cache that holds a reduced prompt."""

    _tokred_base: type
    _tokred_reduced: Reduced | None
    _tokred_layers: Layered | None
    _tokred_armed: bool

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        length = self._tokred_base.get_seq_length(self, layer_idx)  # type: ignore[attr-defined]
        if isinstance(length, int) and length == 0:
            return length
        if self._tokred_layers is not None:
            length = length + self._tokred_layers.removed_of(layer_idx)
        return length if self._tokred_reduced is None else length + self._tokred_reduced.removed

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        if (self._tokred_reduced is not None or self._tokred_layers is not None) and not self._tokred_armed:
            raise StaleCacheError(
                "this KV cache holds a prompt that tokred reduced, and the model is not patched (any more): its masks "
                "would not fit. Keep the patch while a conversation goes on, or start it anew without the cache"
            )
        return self._tokred_base.get_seq_length(self, layer_idx)  # type: ignore[attr-defined]

    def reset(self) -> None:
        self._tokred_reduced = self._tokred_layers = None
        self._tokred_base.reset(self)  # type: ignore[attr-defined]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; a positive number is the (logical) length that is left."""
        state, layered = self._tokred_reduced, self._tokred_layers
        if state is None and layered is None:
            return self._tokred_base.crop(self, tokens_to_remove)  # type: ignore[attr-defined]
        held = int(physical_length(self))
        logical = held if state is None else held + state.removed
        removed = -tokens_to_remove if tokens_to_remove <= 0 else logical - tokens_to_remove
        left = held - removed
        bound = max(0 if state is None else state.mask.shape[1], 0 if layered is None else layered.full)
        if 0 < left < bound:
            raise StaleCacheError(
                f"crop({tokens_to_remove}) would cut into the reduced prompt ({bound} of its "
                f"{bound + logical - held} columns are in the cache); crop at most what came after it"
            )
        if left <= 0:
            self.reset()
            return
        self._tokred_base.crop(self, -removed)  # type: ignore[attr-defined]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move(beam_idx)
        self._tokred_base.reorder_cache(self, beam_idx)  # type: ignore[attr-defined]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(indices)
        self._tokred_base.batch_select_indices(self, indices)  # type: ignore[attr-defined]

    def batch_repeat_interleave(self, repeats: int) -> None:
        known = self._tokred_reduced if self._tokred_reduced is not None else self._tokred_layers
        if known is not None:
            self._move(torch.arange(known.rows).repeat_interleave(repeats))
        self._tokred_base.batch_repeat_interleave(self, repeats)  # type: ignore[attr-defined]

    def _move(self, rows: Tensor) -> None:
        if self._tokred_reduced is not None:
            self._tokred_reduced = self._tokred_reduced.select(rows)
        if self._tokred_layers is not None:
            self._tokred_layers = self._tokred_layers.select(rows)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self._tokred_base,), self.__dict__


_CLASSES: dict[type, type] = {}


def _subclass(base: type) -> type:
    if base not in _CLASSES:
        names = {
            key: value for key, value in vars(_Logical).items() if not key.startswith("__") or key == "__reduce_ex__"
        }
        names |= {"_tokred_base": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
        _CLASSES[base] = types.new_class(base.__name__, (base,), exec_body=lambda space: space.update(names))
    return _CLASSES[base]


def _rebuild(base: type) -> Any:
    return object.__new__(_subclass(base))
