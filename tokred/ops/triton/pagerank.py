"""All iterations of the weighted page rank of one attention head in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program holds a score vector of this many numbers, and as many columns of a tile, in registers.
PAGE_RANK_MAX_TOKENS = 4096
TILE_NUMBERS = 8192


@triton.jit
def _page_rank_kernel(
    attention, scores, alive, out, iterations, damping, H, N,
    a_b, a_h, a_i, a_j, s_b, s_h, s_n, m_b, m_n,
    RENORM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    columns = tl.arange(0, BLOCK_N)
    mask = (columns < N).to(tl.float32)
    if alive is not None:
        mask *= tl.load(alive + b * m_b + columns * m_n, mask=columns < N, other=0).to(tl.float32)
    jump = mask * (damping / tl.maximum(tl.sum(mask, 0), 1.0))
    s = tl.load(scores + b * s_b + h * s_h + columns * s_n, mask=columns < N, other=0.0)
    attention = attention + b * a_b + h * a_h
    for _ in range(iterations):
        s *= mask
        new = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, N, BLOCK_I):
            rows = start + tl.arange(0, BLOCK_I)
            where = attention + rows[:, None].to(tl.int64) * a_i + columns[None, :] * a_j
            ok = (rows < N)[:, None] & (columns < N)[None, :]
            tile = tl.load(where, mask=ok, other=0.0).to(tl.float32)
            # The scores of these rows, picked out of the vector by a one-hot sum: no trip through memory, no barrier.
            voters = tl.sum(tl.where(rows[:, None] == columns[None, :], s[None, :], 0.0), 1)
            if RENORM:
                voters = voters / tl.maximum(tl.sum(tile * mask[None, :], 1), 1e-12)
            new += tl.sum(tile * voters[:, None], 0)
        s = new * mask * (1.0 - damping) + jump
    tl.store(out + (b * H + h) * N + columns, s, mask=columns < N)


def page_rank(
    attention: Tensor, scores: Tensor, iterations: int, alive: Tensor | None, renorm: bool, damping: float
) -> Tensor:
    """See :func:`tokred.ops.page_rank`; scores (B, H, N) float32 is the scaled start."""
    batch, heads, tokens = attention.shape[:3]
    out = scores.new_empty(batch, heads, tokens)
    if out.numel() == 0:
        return out
    block_n = triton.next_power_of_2(tokens)
    alive = None if alive is None else alive.view(torch.uint8)
    with torch.cuda.device_of(attention):
        _page_rank_kernel[(batch * heads,)](
            attention, scores, alive, out, iterations, damping, heads, tokens, *attention.stride(), *scores.stride(),
            *(alive.stride() if alive is not None else (0, 0)),
            RENORM=renorm, BLOCK_I=min(max(1, TILE_NUMBERS // block_n), block_n), BLOCK_N=block_n, num_warps=8,
        )  # fmt: skip
    return out
