"""Taking entries out of one layer of a KV cache of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from tokred import ops
from tokred.core.errors import UnsupportedGenerationError

__all__ = ["UNCUTTABLE", "cut_layer", "held_entries", "zero_entries"]

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_REASON = "its layers keep keys in a form (compressed, or on another device) that entries cannot be taken from"
#: settings of `generate` whose caches are refused, and why
UNCUTTABLE = {
    f"cache_implementation={name}": _REASON for name in ("quantized", "offloaded", "offloaded_static", "paged")
}


def held_entries(layer: Any, number: int) -> int:
    """How many entries a cache layer holds: all that it was given, or, where it attends in a window, the last of them.

    Raises:
        UnsupportedGenerationError: the layer is of a kind whose entries cannot be got at.
    """
    if type(layer) not in _KINDS:
        raise UnsupportedGenerationError(
            f"the cache of layer {number} is a {type(layer).__name__}, which cannot be cut: {_REASON}; use a dynamic "
            "or a static cache"
        )
    given = int(layer.get_seq_length())
    if not layer.is_sliding:
        return given
    window = layer.max_cache_len if isinstance(layer, StaticLayer) else layer.sliding_window
    return given if given < window else window - 1  # a new token sees itself and window - 1 before it


def _stored(layer: Any, number: int) -> slice:
    """Where those entries lie in the tensors of a cache layer."""
    held = held_entries(layer, number)
    end = min(int(layer.get_seq_length()), layer.keys.shape[2])
    return slice(end - held, end)


def cut_layer(layer: Any, index: Tensor, number: int) -> None:
    """Keep the entries `index` (B, K) of the `held_entries` of a cache layer.

    A layer whose window has filled begins to count anew: entries that left are no part of it any more.
    """
    stored, kept = _stored(layer, number), index.shape[1]
    keys, values = (_gather(x[:, :, stored], index) for x in (layer.keys, layer.values))
    if isinstance(layer, StaticLayer):
        for buffer, x in ((layer.keys, keys), (layer.values, values)):
            buffer.zero_()
            buffer[:, :, :kept] = x
        layer.cumulative_length.fill_(kept)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int = kept
        return
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = kept


def zero_entries(layer: Any, where: Tensor, number: int) -> None:
    """Set key and value of some entries to zero, though they stay; `where` is (B, T) bool over all that were given."""
    stored = _stored(layer, number)
    mask = where[:, None, where.shape[1] - (stored.stop - stored.start) :, None]
    for x in (layer.keys, layer.values):
        x[:, :, stored].masked_fill_(mask.to(x.device), 0)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, H, K, d)."""
    batch, heads = x.shape[:2]
    flat = ops.gather_tokens(x.flatten(0, 1), index.repeat_interleave(heads, dim=0).to(x.device))
    return flat.unflatten(0, (batch, heads))
