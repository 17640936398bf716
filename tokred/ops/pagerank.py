"""Weighted page rank on an attention graph (Zero-TPrune, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.ops import _common as common

# Attention numbers iterated at a time: 1 MB of float32 stays in a core's cache (python benchmarks/ops.py pagerank).
BLOCK_NUMBERS = 2**18
TINY = 1e-12


def page_rank(
    attention: Tensor,
    start: Tensor,
    iterations: int,
    alive: Tensor | None = None,
    renorm: bool = True,
    damping: float = 0.0,
    tol: float | None = None,
) -> Tensor:
    """Scores (B, H, N) float32 after ``iterations`` votes s <- A_hat^T s: voter j gives its score along its row of A.

    ``attention``: (B, H, N, N), row i = query i; ``start``: (B, N) or (B, H, N), not negative, scaled here to sum to
    one over the alive tokens; ``alive``: (B, N) bool (None = all). A_hat is ``attention`` restricted to alive rows and
    columns, each row divided by its sum (``renorm``; sums clamped to 1e-12). Pass ``renorm=False`` where the rows sum
    to one and all tokens are alive: it saves one pass. ``damping`` d: s <- (1 - d) A_hat^T s + d / N_alive. ``tol``
    stops early when every score vector of the call moves by at most tol (L1 norm). Dead tokens score zero;
    ``iterations=0`` is the scaled start. Half inputs are scored in float32, float64 in float64. No gradient.
    """
    common.check_rank("attention", attention, 4, "(B, H, N, N)")
    common.check_float("attention", attention)
    batch, heads, tokens = attention.shape[:3]
    if attention.shape[3] != tokens:
        raise ValueError(f"attention: expected a square (B, H, N, N), got {common.describe(attention)}.")
    if tuple(start.shape) not in ((batch, tokens), (batch, heads, tokens)):
        raise ValueError(
            f"start: expected (B, N) = {(batch, tokens)} or (B, H, N) = {(batch, heads, tokens)}, "
            f"got {common.describe(start)}."
        )
    if alive is not None:
        common.check_shape("alive", alive, (batch, tokens), "(B, N)")
        if alive.dtype != torch.bool:
            raise TypeError(f"alive: expected bool, got {common.describe(alive)}.")
    if iterations < 0 or not 0 <= damping <= 1:
        raise ValueError(f"expected iterations >= 0 and 0 <= damping <= 1, got {iterations} and {damping}.")
    attention, start = attention.detach(), start.detach()
    if attention.is_cuda or torch.compiler.is_compiling():
        return torch.ops.tokred.page_rank(attention, start, iterations, alive, renorm, damping, tol)
    return _page_rank(attention, start, iterations, alive, renorm, damping, tol)


def starting_scores(start: Tensor, alive: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """The start weights (B, N) or (B, H, N) -> (B, H, N), alive ones only, summing to one."""
    scores = (start[:, None] if start.dim() == 2 else start).to(dtype)
    if alive is not None:
        scores = scores * alive[:, None]
    scores = scores / scores.sum(-1, keepdim=True).clamp_min(TINY)
    return scores.expand(-1, heads, -1)


def _page_rank(
    attention: Tensor,
    start: Tensor,
    iterations: int,
    alive: Tensor | None,
    renorm: bool,
    damping: float,
    tol: float | None,
) -> Tensor:
    batch, heads, tokens = attention.shape[:3]
    dtype = common.score_dtype(attention)
    scores = starting_scores(start, alive, heads, dtype).contiguous()
    if iterations == 0 or scores.numel() == 0:
        return scores
    # Restriction by masking the vectors, not by gathering N x N numbers (the same result).
    mask = scores.new_ones(batch, 1, tokens) if alive is None else alive[:, None].to(dtype)
    teleport = mask * (damping / mask.sum(-1, keepdim=True).clamp_min(1))
    # An early stop looks at the whole call, so it needs all scores in step.
    samples = batch if tol is not None else max(1, BLOCK_NUMBERS // (heads * tokens * tokens))
    done = [
        _iterate(a, s, m, t, iterations, alive is not None, renorm, damping, tol)
        for a, s, m, t in zip(*(t.split(samples) for t in (attention, scores, mask, teleport)), strict=True)
    ]
    return torch.cat(done) if len(done) > 1 else done[0]


def _iterate(
    attention: Tensor,
    scores: Tensor,
    mask: Tensor,
    teleport: Tensor,
    iterations: int,
    masked: bool,
    renorm: bool,
    damping: float,
    tol: float | None,
) -> Tensor:
    """attention (b, H, N, N), scores (b, H, N), mask and teleport (b, 1, N) -> scores (b, H, N)."""
    heads, tokens = scores.shape[1:]
    with common.full_precision(attention):
        # Row vector times matrix: 3 to 30 times faster here than the einsum or the transposed product.
        a = attention.to(scores.dtype).reshape(-1, tokens, tokens)
        give = mask.expand(-1, heads, -1).reshape(-1, 1, tokens)
        take, jump = give * (1 - damping), teleport.expand(-1, heads, -1).reshape(-1, 1, tokens)
        if renorm:
            give = give / torch.bmm(a, give.transpose(1, 2)).transpose(1, 2).clamp_min(TINY)
        s = scores.reshape(-1, 1, tokens)
        for _ in range(iterations):
            new = torch.bmm(s * give if masked or renorm else s, a)
            if masked or damping:
                new = torch.addcmul(jump, new, take)
            before, s = s, new
            if tol is not None and bool(((s - before).abs().sum(-1) <= tol).all()):
                break
    return s.view(-1, heads, tokens)


@torch.library.custom_op("tokred::page_rank", mutates_args=())
def _page_rank_op(
    attention: Tensor,
    start: Tensor,
    iterations: int,
    alive: Tensor | None,
    renorm: bool,
    damping: float,
    tol: float | None,
) -> Tensor:
    triton = common.kernels(attention)
    if triton is None or tol is not None or attention.shape[-1] > triton.PAGE_RANK_MAX_TOKENS:
        return _page_rank(attention, start, iterations, alive, renorm, damping, tol)
    scores = starting_scores(start, alive, attention.shape[1], torch.float32)
    return triton.page_rank(attention, scores, iterations, alive, renorm, damping)


@_page_rank_op.register_fake
def _(
    attention: Tensor,
    start: Tensor,
    iterations: int,
    alive: Tensor | None,
    renorm: bool,
    damping: float,
    tol: float | None,
) -> Tensor:
    return attention.new_empty(attention.shape[:3], dtype=common.score_dtype(attention))
