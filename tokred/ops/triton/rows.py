"""Moving and averaging whole token rows. Both kernels are bound by memory: each row is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_kernel(x, indices, out, K, C, x_b, x_n, x_c, i_b, i_k, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(K, BLOCK_K)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ok, column_ok = rows < K, columns < C
    source = tl.load(indices + b * i_b + rows * i_k, mask=row_ok, other=-1)
    # A source of -1 reads nothing and stores zeros.
    where = x + b * x_b + source[:, None] * x_n + columns[None, :] * x_c
    values = tl.load(where, mask=(source >= 0)[:, None] & column_ok[None, :], other=0.0)
    to = out + (b * K + rows[:, None]) * C + columns[None, :]
    tl.store(to, values, mask=row_ok[:, None] & column_ok[None, :])


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """x (B, N, C), indices (B, K) in [-1, N) -> (B, K, C); -1 gives zeros."""
    (batch, kept), channels = indices.shape, x.shape[2]
    out = x.new_empty(batch, kept, channels)
    if out.numel() == 0:
        return out
    block_c = min(triton.next_power_of_2(channels), 1024)
    block_k = max(1, 2048 // block_c)
    grid = (batch * triton.cdiv(kept, block_k), triton.cdiv(channels, block_c))
    with torch.cuda.device_of(x):
        _gather_kernel[grid](
            x, indices, out, kept, channels, *x.stride(), *indices.stride(), BLOCK_K=block_k, BLOCK_C=block_c
        )
    return out


@triton.jit
def _merge_kernel(x, order, starts, share, out, N, C, x_b, x_n, x_c, BLOCK_C: tl.constexpr):
    # One program per slot: it adds its members in order, so the sum is the same in every run (no atomics).
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = columns < C
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i in range(tl.load(starts + slot), tl.load(starts + slot + 1)):
        token = tl.load(order + i)
        row = x + (token // N) * x_b + (token % N) * x_n + columns * x_c
        total += tl.load(share + token) * tl.load(row, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + slot * C + columns, total.to(out.dtype.element_ty), mask=ok)


def merge_rows(x: Tensor, order: Tensor, starts: Tensor, share: Tensor, slots: int) -> Tensor:
    """x (B, N, C) -> (B, slots, C): slot s (of B * slots) is the sum of share[t] x[t] over t in
    order[starts[s]:starts[s + 1]]; share (B * N,) float32, t counts tokens of the whole batch."""
    batch, tokens, channels = x.shape
    out = x.new_empty(batch, slots, channels)
    if out.numel() == 0:
        return out
    block_c = min(triton.next_power_of_2(channels), 1024)
    with torch.cuda.device_of(x):
        _merge_kernel[(batch * slots, triton.cdiv(channels, block_c))](
            x, order, starts, share, out, tokens, channels, *x.stride(), BLOCK_C=block_c
        )
    return out
