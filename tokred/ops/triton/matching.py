"""The best match of each row of a among the rows of b, with a running maximum: no Na x Nb matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred.ops._common import interpreting

INF = tl.constexpr(float("inf"))
PRODUCT = tl.constexpr(-1)  # the value of POWER for "dot" and "cosine"


@triton.jit
def _rows(pointer, rows, dims, row_stride, dim_stride, n_rows, D):
    where = pointer + rows[:, None].to(tl.int64) * row_stride + dims[None, :] * dim_stride
    return tl.load(where, mask=(rows < n_rows)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _products(
    a, b, rows, columns, NA, NB, D, a_n, a_d, b_n, b_d,
    COSINE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    a_square, b_square = tl.zeros([BLOCK_A], dtype=tl.float32), tl.zeros([BLOCK_B], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        a_tile, b_tile = _rows(a, rows, dims, a_n, a_d, NA, D), _rows(b, columns, dims, b_n, b_d, NB, D)
        if UPCAST:  # the interpreter multiplies the raw bits of bfloat16
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        total += tl.dot(a_tile, tl.trans(b_tile), input_precision="ieee")
        if COSINE:
            a_wide, b_wide = a_tile.to(tl.float32), b_tile.to(tl.float32)
            a_square += tl.sum(a_wide * a_wide, 1)
            b_square += tl.sum(b_wide * b_wide, 1)
    if COSINE:
        total = total / tl.maximum(tl.sqrt(a_square), 1e-12)[:, None] / tl.maximum(tl.sqrt(b_square), 1e-12)[None, :]
    return total


@triton.jit
def _powers(
    a, b, rows, columns, NA, NB, D, a_n, a_d, b_n, b_d,
    POWER: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Minus the sum over dimensions of |a - b| to the power (or the maximum, for power 0)."""
    total = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for d in range(0, D):
        a_column = tl.load(a + rows.to(tl.int64) * a_n + d * a_d, mask=rows < NA, other=0.0).to(tl.float32)
        b_column = tl.load(b + columns.to(tl.int64) * b_n + d * b_d, mask=columns < NB, other=0.0).to(tl.float32)
        x = tl.abs(a_column[:, None] - b_column[None, :])
        if POWER == 0:
            total = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
        elif POWER == 1:
            total += x
        elif POWER == 2:
            total += x * x
        elif POWER == 3:
            total += x * x * x
        elif POWER == 4:
            total += x * x * x * x
        else:
            total += x * x * x * x * x
    return -total


@triton.jit
def _match_kernel(
    a, b, valid, value, index, NA, NB, D, a_b, a_n, a_d, b_b, b_n, b_d, v_b, v_n,
    POWER: tl.constexpr, COSINE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    a, b = a + batch * a_b, b + batch * b_b
    best = tl.full([BLOCK_A], -INF, dtype=tl.float32)
    best_index = tl.zeros([BLOCK_A], dtype=tl.int64)
    for start in range(0, NB, BLOCK_B):
        columns = start + tl.arange(0, BLOCK_B)
        if POWER == PRODUCT:
            s = _products(a, b, rows, columns, NA, NB, D, a_n, a_d, b_n, b_d, COSINE, UPCAST, BLOCK_A, BLOCK_B, BLOCK_D)
        else:
            s = _powers(a, b, rows, columns, NA, NB, D, a_n, a_d, b_n, b_d, POWER, BLOCK_A, BLOCK_B)
        ok = columns < NB
        if valid is not None:
            ok = ok & (tl.load(valid + batch * v_b + columns * v_n, mask=ok, other=0) != 0)
        s = tl.where(ok[None, :] & (s == s), s, -INF)  # no NaN reaches the maximum
        top, where = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        better = top > best  # strictly: an earlier column keeps a tie
        best = tl.where(better, top, best)
        best_index = tl.where(better, start + where, best_index)
    tl.store(value + batch * NA + rows, best, mask=rows < NA)
    tl.store(index + batch * NA + rows, best_index, mask=rows < NA)


def bipartite_match(
    a: Tensor, b: Tensor, metric: str, power: int | None, valid_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred.ops.bipartite_match`; power: None for products, p of the Minkowski distance, 0 for p = inf."""
    batch, rows, dims = a.shape
    value = a.new_empty(batch, rows, dtype=torch.float32)
    index = a.new_empty(batch, rows, dtype=torch.int64)
    if index.numel() == 0:
        return value, index
    valid = None if valid_b is None else valid_b.view(torch.uint8)
    block_a, block_b = (64, 64) if power is None else (32, 32)
    with torch.cuda.device_of(a):
        _match_kernel[(batch, triton.cdiv(rows, block_a))](
            a, b, valid, value, index, rows, b.shape[1], dims, *a.stride(), *b.stride(),
            *(valid.stride() if valid is not None else (0, 0)),
            POWER=PRODUCT.value if power is None else power, COSINE=metric == "cosine", UPCAST=interpreting(),
            BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_D=32 if dims <= 32 else 64,
        )  # fmt: skip
    # The root keeps the order, so only the winners need it.
    if power is not None and power > 1:
        value = -value.neg_().pow_(1 / power) if power > 2 else -value.neg_().sqrt_()
    return value, index
