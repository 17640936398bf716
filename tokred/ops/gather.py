"""Selecting tokens, and giving merged tokens back to the places that they came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.ops import _common as common


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens of ``x`` (B, N, *rest) at ``indices`` (B, K) int64 -> (B, K, *rest), same dtype.

    Indices lie in [0, N) (not checked, see :mod:`tokred.ops`) and may repeat; gradients of repeats add up.
    """
    common.check_rank("x", x, 2, "(B, N, ...)", at_least=True)
    common.check_index("indices", indices, "x", x)
    if x.is_cuda and x.is_floating_point():
        rows = x[..., None] if x.dim() == 2 else x.flatten(2)
        return torch.ops.tokred.gather_rows(rows, indices).reshape(*indices.shape, *x.shape[2:])
    return _gather(x, indices)


def unmerge_tokens(y: Tensor, assignment: Tensor) -> Tensor:
    """Every token gets its slot's row: ``y`` (B, K, C), ``assignment`` (B, N) in [-1, K) -> (B, N, C).

    The inverse of :func:`tokred.ops.merge_tokens` up to the averaging: ``out[b, n] = y[b, assignment[b, n]]``, and
    zeros where the assignment is -1 (a dropped token). Differentiable in y.
    """
    common.check_rank("y", y, 3, "(B, K, C)")
    common.check_float("y", y)
    common.check_index("assignment", assignment, "y", y)
    if y.is_cuda:
        return torch.ops.tokred.gather_rows(y, assignment)
    return gather_or_zero(y, assignment)


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    batch, tokens = x.shape[:2]
    if batch > 1 and x.stride(0) != tokens * x.stride(1):
        # Batch and token dimensions are not one: flattening would copy all of x, to keep K rows of it.
        return x[torch.arange(batch, device=x.device)[:, None], indices]
    # The fastest of five ways on the CPU: python benchmarks/ops.py gather
    flat = indices + torch.arange(batch, device=x.device)[:, None] * tokens
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, indices.shape)


def gather_or_zero(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x`` (B, N, C) at ``indices`` (B, K) in [-1, N) -> (B, K, C); a -1 gives zeros. Plain torch."""
    batch, tokens, channels = x.shape
    # One more row of zeros, then a single gather: no second pass over the result. python benchmarks/ops.py unmerge
    rows = torch.cat([x.reshape(-1, channels), x.new_zeros(1, channels)])
    flat = indices + torch.arange(batch, device=x.device)[:, None] * tokens
    flat = flat.masked_fill(indices < 0, batch * tokens)
    return rows.index_select(0, flat.flatten()).view(*indices.shape, channels)


# --- torch.ops.tokred.gather_rows: (B, N, C), (B, K) in [-1, N) -> (B, K, C)


@torch.library.custom_op("tokred::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    triton = common.kernels(x)
    return gather_or_zero(x, indices) if triton is None else triton.gather_rows(x, indices)


@_gather_rows.register_fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(*indices.shape, x.shape[2])


def _save_indices(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, indices = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    # The transpose of a gather is a sum over the rows that were gathered from one place: a merge with weight 1.
    (indices,) = ctx.saved_tensors
    return torch.ops.tokred.merge_rows(grad, indices, ctx.tokens, None, False)[0], None


_gather_rows.register_autograd(_gather_backward, setup_context=_save_indices)
