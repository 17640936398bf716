"""KV caches of a reduced prompt: shorter than the prompt, while everybody who asks is told the prompt's length.

`generate`, multi-turn slicing and the default positions of models go by the *logical* length (columns of the caller's
ids and masks); mask builders go by the *physical* one (keys that are there). A cache that holds a reduced prompt
becomes a subclass that answers each with its own number, and carries what a later step needs to know of the reduction.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokred.core.errors import StaleCacheError

__all__ = ["Reduced", "physical_length", "reduced_state", "set_reduced"]


@dataclass
class Reduced:
    """What became of the first columns of a request.

    Attributes:
        mask: (B, L) bool, which of the L physical columns are real.
        full: how many logical columns they stand for; columns behind are one to one.
        shift: (B, 1) int64, what compact positions lie below the logical ones; None where positions are original.
        whole: whether `mask` is all True. types: (B, L) token types of the columns, where the family has them.
        armed: whether a patched model is at work on the cache: others would build wrong masks for it.
    """

    mask: Tensor
    full: int
    shift: Tensor | None
    whole: bool
    types: Tensor | None = None
    armed: bool = False

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


def reduced_state(cache: Any) -> Reduced | None:
    """The state of a cache that holds a reduced prompt, else None."""
    return cache.__dict__.get("_tokred_reduced") if isinstance(cache, Cache) else None


def physical_length(cache: Any) -> Any:
    """Keys in the cache's first layer: an int, or a tensor for static caches."""
    if cache is None:
        return 0
    base = getattr(type(cache), "_tokred_base", type(cache))
    return base.get_seq_length(cache)


def set_reduced(cache: Cache, state: Reduced) -> None:
    """Let `cache` carry `state`, and answer with logical lengths from now on."""
    if "_tokred_base" not in vars(type(cache)):
        cache.__class__ = _subclass(type(cache))
    cache._tokred_reduced = state  # type: ignore[attr-defined]


class _Logical:
    """Methods of a cache that holds a reduced prompt."""

    _tokred_base: type
    _tokred_reduced: Reduced | None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        length = self._tokred_base.get_seq_length(self, layer_idx)  # type: ignore[attr-defined]
        state = self._tokred_reduced
        empty = isinstance(length, int) and length == 0
        return length if state is None or empty else length + state.removed

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        state = self._tokred_reduced
        if state is not None and not state.armed:
            raise StaleCacheError(
                "this KV cache holds a prompt that tokred reduced, and the model is not patched (any more): its masks "
                "would not fit. Keep the patch while a conversation goes on, or start it anew without the cache"
            )
        return self._tokred_base.get_seq_length(self, layer_idx)  # type: ignore[attr-defined]

    def reset(self) -> None:
        self._tokred_reduced = None
        self._tokred_base.reset(self)  # type: ignore[attr-defined]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; a positive number is the (logical) length that is left."""
        state = self._tokred_reduced
        if state is None:
            return self._tokred_base.crop(self, tokens_to_remove)  # type: ignore[attr-defined]
        held = int(physical_length(self))
        removed = -tokens_to_remove if tokens_to_remove <= 0 else held + state.removed - tokens_to_remove
        left = held - removed
        if 0 < left < state.mask.shape[1]:
            raise StaleCacheError(
                f"crop({tokens_to_remove}) would cut into the reduced prompt ({state.mask.shape[1]} of its "
                f"{state.full} columns are in the cache); crop at most what came after it"
            )
        if left <= 0:
            self._tokred_reduced = None
        self._tokred_base.crop(self, -removed)  # type: ignore[attr-defined]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move(beam_idx)
        self._tokred_base.reorder_cache(self, beam_idx)  # type: ignore[attr-defined]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(indices)
        self._tokred_base.batch_select_indices(self, indices)  # type: ignore[attr-defined]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._tokred_reduced is not None:
            rows = torch.arange(self._tokred_reduced.mask.shape[0]).repeat_interleave(repeats)
            self._move(rows)
        self._tokred_base.batch_repeat_interleave(self, repeats)  # type: ignore[attr-defined]

    def _move(self, rows: Tensor) -> None:
        if self._tokred_reduced is not None:
            self._tokred_reduced = self._tokred_reduced.select(rows)

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
