"""Merging tokens into slots: the weighted sum or mean of each slot's members (ToMe, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.ops import _common as common
from tokred.ops.gather import gather_or_zero


def merge_tokens(
    x: Tensor, assignment: Tensor, slots: int, weights: Tensor | None = None, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Sum or average the tokens that share a slot.

    ``x``: (B, N, C); ``assignment``: (B, N) int64 in [-1, slots), -1 = the token is dropped; ``weights``: (B, N) or
    None for ones (ToMe: the token sizes). Returns ``y`` (B, slots, C) in the dtype of x, and ``totals`` (B, slots),
    the sums of the weights, in float32 (float64 for float64 x), the dtype of all the arithmetic.

    ``reduce="mean"`` gives sum(w x) / sum(w), ``"sum"`` gives sum(w x). An empty slot is zero. A slot with one member
    is that token, bit for bit, under "mean" (if its weight is not 0) and under "sum" with weight 1. Differentiable in
    x and weights.
    """
    common.check_rank("x", x, 3, "(B, N, C)")
    common.check_float("x", x)
    common.check_index("assignment", assignment, "x", x)
    common.check_shape("assignment", assignment, tuple(x.shape[:2]), "the (B, N) of x")
    if weights is not None:
        common.check_shape("weights", weights, tuple(x.shape[:2]), "the (B, N) of x")
        common.check_float("weights", weights)
        common.check_same_batch("weights", weights, "x", x)
    if reduce not in ("mean", "sum"):
        raise ValueError(f'reduce: expected "mean" or "sum", got {reduce!r}.')
    if slots < 0:
        raise ValueError(f"slots: expected a count >= 0, got {slots}.")
    if x.is_cuda:
        return torch.ops.tokred.merge_rows(x, assignment, slots, weights, reduce == "mean")
    trains = torch.is_grad_enabled() and (x.requires_grad or (weights is not None and weights.requires_grad))
    merge = _PlainMerge.apply if trains else _merge
    return merge(x, assignment, slots, weights, reduce == "mean")


def slot_keys(assignment: Tensor, slots: int) -> Tensor:
    """(B, N) -> (B * N,) row of the flattened (B * slots) result; dropped tokens share one row more, at the end."""
    batch = assignment.shape[0]
    keys = assignment + torch.arange(batch, device=assignment.device)[:, None] * slots
    return keys.masked_fill(assignment < 0, batch * slots).flatten()


def shares(keys: Tensor, rows: int, weights: Tensor | None, mean: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Totals (rows,) and what each token counts in its row (B * N,): its weight, over the row's total for a mean.

    Dividing the weights and not the sums makes a row with one member exact, and cannot overflow.
    """
    w = torch.ones(keys.shape, dtype=dtype, device=keys.device) if weights is None else weights.flatten().to(dtype)
    totals = torch.zeros(rows, dtype=dtype, device=keys.device).index_add_(0, keys, w)
    return totals, (w / nonzero(totals)[keys] if mean else w)


def nonzero(totals: Tensor) -> Tensor:
    return totals.masked_fill(totals == 0, 1)


def _merge(x: Tensor, assignment: Tensor, slots: int, weights: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    """Plain torch. The members of each slot, in order, are a bag of ``F.embedding_bag``: one read of x, one write of y,
    no atomic and no weighted copy of x. Beside index_add_, scatter_add_ and a dense one-hot product:
    python benchmarks/ops.py merge
    """
    batch, _, channels = x.shape
    dtype, rows = common.score_dtype(x), batch * slots
    keys = slot_keys(assignment, slots)
    totals, share = shares(keys, rows + 1, weights, mean, dtype)
    if x.numel() == 0 or rows == 0:
        return x.new_zeros(batch, slots, channels), totals[:rows].view(batch, slots)
    sorted_keys, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(sorted_keys, torch.arange(rows + 1, device=x.device))
    y = F.embedding_bag(order, x.reshape(-1, channels).to(dtype), starts, mode="sum", per_sample_weights=share[order])
    return y[:rows].view(batch, slots, channels).to(x.dtype), totals[:rows].view(batch, slots)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, assignment, _, weights, mean = inputs
    y, totals = output
    ctx.mean = mean
    ctx.save_for_backward(x, assignment, weights, y, totals)


def _gradients(ctx: Any, grad_y: Tensor, grad_totals: Tensor, gather: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x and weights. y = sum_n share_n x_n, so each token reads its slot's gradient back (an unmerge);
    for a mean, dy / dw_n = (x_n - y) / total."""
    x, assignment, weights, y, totals = ctx.saved_tensors
    dtype = common.score_dtype(x)
    grad_y = grad_y.to(dtype)
    rows = gather(grad_y, assignment)
    scale = nonzero(totals).reciprocal() if ctx.mean else torch.ones_like(totals)
    own = (grad_y * y.to(dtype)).sum(-1) * scale if ctx.mean else torch.zeros_like(totals)
    # The numbers of each slot travel to its tokens in one more gather.
    scale, own, grad_totals = gather(torch.stack([scale, own, grad_totals.to(dtype)], -1), assignment).unbind(-1)
    grad_x = (rows * (scale if weights is None else scale * weights.to(dtype))[..., None]).to(x.dtype)
    grad_weights = None
    if weights is not None and ctx.needs_input_grad[3]:
        grad_weights = ((rows * x.to(dtype)).sum(-1) * scale - own + grad_totals).to(weights.dtype)
    return grad_x, None, None, grad_weights, None


class _PlainMerge(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, assignment: Tensor, slots: int, weights: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
        return _merge(x, assignment, slots, weights, mean)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_totals: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _gradients(ctx, grad_y, grad_totals, gather_or_zero)


# --- torch.ops.tokred.merge_rows: (B, N, C), (B, N) in [-1, slots) -> (B, slots, C), (B, slots)


@torch.library.custom_op("tokred::merge_rows", mutates_args=())
def _merge_rows(x: Tensor, assignment: Tensor, slots: int, weights: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    triton = common.kernels(x)
    if triton is None:
        return _merge(x, assignment, slots, weights, mean)
    keys = slot_keys(assignment, slots)
    rows = x.shape[0] * slots
    totals, share = shares(keys, rows + 1, weights, mean, torch.float32)
    sorted_keys, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(sorted_keys, torch.arange(rows + 1, device=x.device))
    y = triton.merge_rows(x, order, starts, share, slots)
    return y, totals[:rows].view(x.shape[0], slots)


@_merge_rows.register_fake
def _(x: Tensor, assignment: Tensor, slots: int, weights: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(batch, slots, channels), x.new_empty(batch, slots, dtype=common.score_dtype(x))


def _merge_backward(ctx: Any, grad_y: Tensor, grad_totals: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_y, grad_totals, torch.ops.tokred.gather_rows)


_merge_rows.register_autograd(_merge_backward, setup_context=_save)
