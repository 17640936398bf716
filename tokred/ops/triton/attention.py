"""Attention probabilities and their column sums in two passes: log-sum-exp of the rows, then exp(score - lse).

Nothing of size Q x N is stored, except the result of ``attention_rows``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred.ops._common import interpreting

BLOCK_Q, BLOCK_N = 64, 64
INF = tl.constexpr(float("inf"))


@triton.jit
def _tile(pointer, rows, columns, row_stride, column_stride, n_rows, n_columns):
    where = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    return tl.load(where, mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :], other=0.0)


@triton.jit
def _scores(
    q, k, scale, mask, log_size, rows, keys, Q, N, m_q, m_n, l_n,
    MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries q (rows, d) and keys k (keys, d); -inf where there is no key."""
    if UPCAST:  # the interpreter multiplies the raw bits of bfloat16
        q, k = q.to(tl.float32), k.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    key_ok = (keys < N)[None, :]
    if log_size is not None:
        s += tl.load(log_size + keys * l_n, mask=keys < N, other=0.0).to(tl.float32)[None, :]
    if MASK != "none":
        where = mask + rows[:, None].to(tl.int64) * m_q + keys[None, :] * m_n
        m = tl.load(where, mask=(rows < Q)[:, None] & key_ok, other=0)
        s = tl.where(m != 0, s, -INF) if MASK == "bool" else s + m.to(tl.float32)
    return tl.where(key_ok, s, -INF)


@triton.jit
def _lse_kernel(
    q, k, mask, log_size, lse, scale, H, GROUP, Q, N, D,
    q_b, q_h, q_q, q_d, k_b, k_h, k_n, k_d, m_b, m_h, m_q, m_n, l_b, l_n,
    MASK: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows, dims = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    q, k = q + b * q_b + h * q_h, k + b * k_b + (h // GROUP) * k_h
    if MASK != "none":
        mask = mask + b * m_b + h * m_h
    if log_size is not None:
        log_size = log_size + b * l_b
    q_tile = _tile(q, rows, dims, q_q, q_d, Q, D)
    top = tl.full([BLOCK_Q], -INF, dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = _tile(k, keys, dims, k_n, k_d, N, D)
        s = _scores(q_tile, k_tile, scale, mask, log_size, rows, keys, Q, N, m_q, m_n, l_n, MASK, UPCAST)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == -INF, 0.0, new_top)  # -inf - -inf would be NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new_top
    # A row that may attend to nothing gets +inf, and with it the probabilities exp(s - inf) = 0.
    dead = top == -INF
    result = tl.where(dead, INF, top + tl.log(tl.where(dead, 1.0, total)))
    tl.store(lse + (b * H + h) * Q + rows, result, mask=rows < Q)


@triton.jit
def _rows_kernel(
    q, k, mask, log_size, lse, out, scale, H, GROUP, Q, N, D,
    q_b, q_h, q_q, q_d, k_b, k_h, k_n, k_d, m_b, m_h, m_q, m_n, l_b, l_n,
    MASK: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(1) // blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    if MASK != "none":
        mask = mask + b * m_b + h * m_h
    if log_size is not None:
        log_size = log_size + b * l_b
    q_tile = _tile(q + b * q_b + h * q_h, rows, dims, q_q, q_d, Q, D)
    k_tile = _tile(k + b * k_b + (h // GROUP) * k_h, keys, dims, k_n, k_d, N, D)
    s = _scores(q_tile, k_tile, scale, mask, log_size, rows, keys, Q, N, m_q, m_n, l_n, MASK, UPCAST)
    row_lse = tl.load(lse + (b * H + h) * Q + rows, mask=rows < Q, other=INF)
    to = out + ((b * H + h) * Q + rows[:, None]) * N + keys[None, :]
    tl.store(to, tl.exp(s - row_lse[:, None]), mask=(rows < Q)[:, None] & (keys < N)[None, :])


@triton.jit
def _mass_kernel(
    q, k, mask, log_size, lse, weights, out, scale, H, GROUP, Q, N, D,
    q_b, q_h, q_q, q_d, k_b, k_h, k_n, k_d, m_b, m_h, m_q, m_n, l_b, l_n, w_b, w_q,
    MASK: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    keys, dims = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q, k = q + b * q_b + h * q_h, k + b * k_b + (h // GROUP) * k_h
    if MASK != "none":
        mask = mask + b * m_b + h * m_h
    if log_size is not None:
        log_size = log_size + b * l_b
    k_tile = _tile(k, keys, dims, k_n, k_d, N, D)
    mass = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, Q, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q_tile = _tile(q, rows, dims, q_q, q_d, Q, D)
        s = _scores(q_tile, k_tile, scale, mask, log_size, rows, keys, Q, N, m_q, m_n, l_n, MASK, UPCAST)
        row_lse = tl.load(lse + (b * H + h) * Q + rows, mask=rows < Q, other=INF)
        p = tl.exp(s - row_lse[:, None])
        if weights is not None:
            p *= tl.load(weights + b * w_b + rows * w_q, mask=rows < Q, other=0.0).to(tl.float32)[:, None]
        mass += tl.sum(p, 0)
    tl.store(out + (b * H + h) * N + keys, mass, mask=keys < N)


def _arguments(q: Tensor, k: Tensor, mask: Tensor | None, log_size: Tensor | None) -> tuple[tuple, tuple, dict]:
    """What the three kernels share: tensors, strides, constants. A broadcast dimension of the mask has stride 0."""
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    if mask is not None:
        mask = (mask.view(torch.uint8) if kind == "bool" else mask).expand(*q.shape[:3], k.shape[2])
    strides = (
        *q.stride(),
        *k.stride(),
        *(mask.stride() if mask is not None else (0,) * 4),
        *(log_size.stride() if log_size is not None else (0, 0)),
    )
    constants = {
        "MASK": kind,
        "UPCAST": interpreting(),
        "BLOCK_Q": BLOCK_Q if q.shape[2] > 16 else 16,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
    }
    return (q, k, mask, log_size), strides, constants


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3]


def _row_lse(q: Tensor, k: Tensor, scale: float, tensors: tuple, strides: tuple, constants: dict) -> Tensor:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    grid = (q.shape[0] * q.shape[1], triton.cdiv(q.shape[2], constants["BLOCK_Q"]))
    _lse_kernel[grid](*tensors, lse, scale, *_sizes(q, k), *strides, **constants)
    return lse


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None) -> Tensor:
    """See :func:`tokred.ops.attention_rows`; mask None or four-dimensional."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    out = q.new_empty(batch, heads, queries, keys, dtype=torch.float32)
    if out.numel() == 0:
        return out
    tensors, strides, constants = _arguments(q, k, mask, log_size)
    tiles = triton.cdiv(queries, constants["BLOCK_Q"]) * triton.cdiv(keys, BLOCK_N)
    with torch.cuda.device_of(q):
        lse = _row_lse(q, k, scale, tensors, strides, constants)
        _rows_kernel[(batch * heads, tiles)](*tensors, lse, out, scale, *_sizes(q, k), *strides, **constants)
    return out


def attention_mass(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, log_size: Tensor | None, query_weights: Tensor | None
) -> Tensor:
    """See :func:`tokred.ops.attention_mass`; mask None or four-dimensional."""
    (batch, heads, _, _), keys = q.shape, k.shape[2]
    out = q.new_zeros(batch, heads, keys, dtype=torch.float32)
    if out.numel() == 0:
        return out
    tensors, strides, constants = _arguments(q, k, mask, log_size)
    weight_strides = query_weights.stride() if query_weights is not None else (0, 0)
    with torch.cuda.device_of(q):
        lse = _row_lse(q, k, scale, tensors, strides, constants)
        _mass_kernel[(batch * heads, triton.cdiv(keys, BLOCK_N))](
            *tensors, lse, query_weights, out, scale, *_sizes(q, k), *strides, *weight_strides, **constants
        )
    return out
