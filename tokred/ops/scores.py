"""Exact attention scores from q and k, without the attention matrix of all queries.

A host's fused attention makes its output; these ops make the few numbers that a method asks for.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tokred.ops import _common as common

# Scores formed at a time, in numbers: 1 MB of float32 stays in a core's cache (python benchmarks/ops.py mass).
BLOCK_NUMBERS = 2**18
BLOCK_QUERIES = 256


def attention_rows(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, log_size: Tensor | None = None
) -> Tensor:
    """Attention probabilities of some queries: softmax(scale q k^T + log_size + mask) -> (B, H, Q, N) float32.

    ``q``: (B, H, Q, d); ``k``: (B, H_k, N, d) with H a multiple of H_k (grouped-query attention: query head h reads key
    head h // (H // H_k)). ``mask``: bool (True = may attend) or an additive float, broadcastable to (B, H, Q, N).
    ``log_size``: (B, N), added on the key index (proportional attention, ToMe section 3). A row that may attend to
    nothing (all scores -inf) is zeros. No gradient. float64 in, float64 out.
    """
    q, k, mask, log_size = _check(q, k, mask, log_size)
    if q.is_cuda:
        return torch.ops.tokred.attention_rows(q, k, scale, mask, log_size)
    return _rows(q, k, scale, mask, log_size)


def attention_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None = None,
    log_size: Tensor | None = None,
    query_weights: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives, summed over the queries -> (B, H, N) float32 (float64 in, float64 out).

    Arguments as :func:`attention_rows`; ``query_weights``: (B, Q), the weight of each query in the sum (None = ones).
    The matrix is never formed: blocks of queries on the CPU; on CUDA one kernel for the rows' log-sum-exp and one for
    the column sums. O(N) memory besides the inputs, half the FLOPs of the attention itself. No gradient.
    """
    q, k, mask, log_size = _check(q, k, mask, log_size)
    if query_weights is not None:
        common.check_shape("query_weights", query_weights, (q.shape[0], q.shape[2]), "(B, Q)")
        query_weights = query_weights.detach()
    # Compiled, the loop over blocks stays behind the op: unrolled, it would bind the graph to one number of queries.
    if q.is_cuda or torch.compiler.is_compiling():
        return torch.ops.tokred.attention_mass(q, k, scale, mask, log_size, query_weights)
    return _mass(q, k, scale, mask, log_size, query_weights)


def _check(
    q: Tensor, k: Tensor, mask: Tensor | None, log_size: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Validates; returns everything detached, the mask with four dimensions."""
    common.check_rank("q", q, 4, "(B, H, Q, d)")
    common.check_rank("k", k, 4, "(B, H_k, N, d)")
    common.check_float("q", q)
    common.check_float("k", k)
    common.check_same_batch("k", k, "q", q)
    if q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"q {common.describe(q)} and k {common.describe(k)}: expected equal last dimensions, and a number of query "
            "heads that is a multiple of the number of key heads."
        )
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if log_size is not None:
        common.check_shape("log_size", log_size, (batch, keys), "(B, N)")
        log_size = log_size.detach()
    q, k = q.detach(), k.detach()
    if mask is None:
        return q, k, None, log_size
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask: expected bool (True = may attend) or an additive float, got {common.describe(mask)}.")
    full = (batch, heads, queries, keys)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"mask: expected a shape broadcastable to (B, H, Q, N) = {full}, got {common.describe(mask)}.")
    return q, k, mask.detach()[(None,) * (4 - mask.dim())], log_size


def _grouped(t: Tensor, key_heads: int) -> Tensor:
    """(B, H or 1, Q or 1, N or 1) -> (B, H_k or 1, G or 1, Q, N): query heads beside the key head that they read."""
    heads = t.shape[1]
    return t[:, :, None] if heads == 1 else t.unflatten(1, (key_heads, heads // key_heads))


def _softmax(scores: Tensor, mask: Tensor | None, log_size: Tensor | None) -> Tensor:
    """Over the last dimension of scores (B, H_k, G, Q, N), mask broadcastable to it, log_size (B, N)."""
    if log_size is not None:
        scores = scores + log_size.to(scores.dtype)[:, None, None, None]
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask.to(scores.dtype)
    if log_size is None and mask is None:
        return scores.softmax(-1)
    nothing = scores.amax(-1, keepdim=True) == float("-inf")
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None) -> Tensor:
    batch, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    dtype = common.score_dtype(q, k)
    if keys == 0:
        return q.new_zeros(batch, heads, queries, 0, dtype=dtype)
    with common.full_precision(q):
        # The query heads of one key head are more rows of one product: keys are never repeated.
        scores = (q.to(dtype) * scale).reshape(batch, key_heads, -1, q.shape[3]) @ k.to(dtype).transpose(2, 3)
        scores = scores.view(batch, key_heads, heads // key_heads, queries, keys)
        probs = _softmax(scores, None if mask is None else _grouped(mask, key_heads), log_size)
    return probs.view(batch, heads, queries, keys)


def _mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    log_size: Tensor | None,
    query_weights: Tensor | None,
) -> Tensor:
    """Plain torch: blocks of samples, key heads and queries whose scores fit in the cache."""
    batch, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    dtype, group = common.score_dtype(q, k), heads // key_heads
    mass = q.new_zeros(batch, heads, keys, dtype=dtype)
    if mass.numel() == 0:
        return mass
    n_q = min(queries, BLOCK_QUERIES, max(16, BLOCK_NUMBERS // (group * keys)))
    n_h = min(key_heads, max(1, BLOCK_NUMBERS // (group * keys * max(n_q, 1))))
    n_b = min(batch, max(1, BLOCK_NUMBERS // (heads * keys * max(n_q, 1)))) if n_h == key_heads else 1
    with common.full_precision(q):
        for b, h in itertools.product(_blocks(batch, n_b), _blocks(key_heads, n_h)):
            hq = slice(h.start * group, h.stop * group)
            k_part = k[b, h].to(dtype)
            sizes = None if log_size is None else log_size[b]
            for i in _blocks(queries, n_q):
                probs = _rows(q[b, hq, i], k_part, scale, _part(mask, b, hq, i), sizes)
                if query_weights is None:
                    mass[b, hq] += probs.sum(2)
                else:
                    weights = query_weights[b, None, None, i].to(dtype).expand(-1, probs.shape[1], -1, -1)
                    mass[b, hq] += torch.matmul(weights, probs).squeeze(2)
    return mass


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, max(size, 1))]


def _part(mask: Tensor | None, *where: slice) -> Tensor | None:
    """The part of a broadcastable mask at slices of its leading dimensions; a dimension of size one stays."""
    if mask is None:
        return None
    return mask[tuple(slice(None) if n == 1 else s for n, s in zip(mask.shape, where, strict=False))]


# --- torch.ops.tokred.attention_rows, attention_mass


@torch.library.custom_op("tokred::attention_rows", mutates_args=())
def _rows_op(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None) -> Tensor:
    triton = common.kernels(q)
    if triton is None or q.dtype != k.dtype:
        return _rows(q, k, scale, mask, log_size)
    return triton.attention_rows(q, k, scale, mask, log_size)


@_rows_op.register_fake
def _(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=common.score_dtype(q, k))


@torch.library.custom_op("tokred::attention_mass", mutates_args=())
def _mass_op(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None, query_weights: Tensor | None
) -> Tensor:
    triton = common.kernels(q)
    if triton is None or q.dtype != k.dtype:
        return _mass(q, k, scale, mask, log_size, query_weights)
    return triton.attention_mass(q, k, scale, mask, log_size, query_weights)


@_mass_op.register_fake
def _(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None, query_weights: Tensor | None
) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=common.score_dtype(q, k))
