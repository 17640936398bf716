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

__all__ = ["UNCUTTABLE", "cut_layer", "zero_entries"]

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_REASON = "its layers keep keys in a form (compressed, or on another device) that entries cannot be taken from"
#: settings of `generate` whose caches are refused, and why
UNCUTTABLE = {
    f"cache_implementation={name}": _REASON for name in ("quantized", "offloaded", "offloaded_static", "paged")
}


def cut_layer(layer: Any, index: Tensor, number: int) -> None:
    """Keep the entries `index` (B, K) of a cache layer.

    Raises:
        UnsupportedGenerationError: the layer is of a kind that cannot be cut, or its window has dropped entries itself.
    """
    held = _check(layer, number)
    keys, values = (_gather(x[:, :, :held], index) for x in (layer.keys, layer.values))
    kept = index.shape[1]
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
    """Set key and value of some entries (B, T) bool to zero, though they stay."""
    held = _check(layer, number)
    mask = where[:, None, :held, None]
    for x in (layer.keys, layer.values):
        x[:, :, :held].masked_fill_(mask.to(x.device), 0)


def _check(layer: Any, number: int) -> int:
    """How many entries a layer holds, if they can be got at."""
    if type(layer) not in _KINDS:
        raise UnsupportedGenerationError(
            f"the cache of layer {number} is a {type(layer).__name__}, which cannot be cut: {_REASON}; use a dynamic "
            "or a static cache"
        )
    held = int(layer.get_seq_length())
    window = getattr(layer, "sliding_window", None) or (layer.max_cache_len if layer.is_sliding else None)
    if layer.is_sliding and window is not None and held >= window:
        raise UnsupportedGenerationError(
            f"layer {number} attends in a window of {window} tokens and has dropped entries of the prompt ({held} "
            "tokens) by itself; what a method wants to cut there is gone. Use a shorter prompt, or a method that "
            "leaves the cache alone"
        )
    return held


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, H, K, d)."""
    batch, heads = x.shape[:2]
    flat = ops.gather_tokens(x.flatten(0, 1), index.repeat_interleave(heads, dim=0).to(x.device))
    return flat.unflatten(0, (batch, heads))
