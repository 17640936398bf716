"""The most similar token of another set, for each token (ToMe section 3; Zero-TPrune section 3, the S-stage)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.ops import _common as common

METRICS = ("cosine", "dot", "l1", "l2", "euclidean", "minkowski3", "minkowski4", "minkowski5", "linf")
POWERS = {"l1": 1, "l2": 2, "euclidean": 2, "minkowski3": 3, "minkowski4": 4, "minkowski5": 5, "linf": 0}

# Similarities formed at a time, in numbers (8 MB of float32): python benchmarks/ops.py match
FULL_NUMBERS, BLOCK_COLUMNS = 2**21, 512
# Differences |a - b| formed at a time where a metric needs them one by one: python benchmarks/ops.py distance
DIFFERENCE_NUMBERS = 2**17


def bipartite_match(
    a: Tensor, b: Tensor, metric: str = "cosine", block_size: int | None = None, valid_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each token of ``a`` the most similar one of ``b``: value (B, Na) float32 and index (B, Na) int64.

    ``a``: (B, Na, D), ``b``: (B, Nb, D) with Nb >= 1. ``metric``: "cosine" (norms clamped to 1e-12), "dot", or the
    negative of a distance: "l1", "l2" = "euclidean", "minkowski3", "minkowski4", "minkowski5", "linf"; larger is more
    alike. ``valid_b``: (B, Nb) bool, False = never chosen. Ties go to the lower index (products that are equal on paper
    may differ in their last bits, as matrix products round by position); a NaN similarity counts as -inf, and if
    nothing is left the answer is (-inf, 0). No gradient; float64 in, float64 values out.

    ``block_size``: columns of b at a time, so that no (Na, Nb) matrix is formed; None forms it where it is small.
    """
    common.check_rank("a", a, 3, "(B, Na, D)")
    common.check_rank("b", b, 3, "(B, Nb, D)")
    common.check_float("a", a)
    common.check_float("b", b)
    common.check_same_batch("b", b, "a", a)
    if a.shape[2] != b.shape[2] or b.shape[1] == 0:
        raise ValueError(
            f"a {common.describe(a)}, b {common.describe(b)}: expected (B, Na, D), (B, Nb, D) with one D and Nb >= 1."
        )
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}.")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size: expected None or a count >= 1, got {block_size}.")
    if valid_b is not None:
        common.check_shape("valid_b", valid_b, tuple(b.shape[:2]), "(B, Nb)")
        if valid_b.dtype != torch.bool:
            raise TypeError(f"valid_b: expected bool, got {common.describe(valid_b)}.")
    a, b = a.detach(), b.detach()
    if a.is_cuda or torch.compiler.is_compiling():
        return torch.ops.tokred.bipartite_match(a, b, metric, block_size, valid_b)
    return _match(a, b, metric, block_size, valid_b)


def _match(a: Tensor, b: Tensor, metric: str, block_size: int | None, valid_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain torch: one block of b after the other, keeping the best so far; a strict > keeps the lower index."""
    dtype = common.score_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    if metric == "cosine":
        a, b = (t / torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(1e-12) for t in (a, b))
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    if block_size is None:
        whole = batch * rows * columns <= FULL_NUMBERS
        block_size = columns if whole else max(64, min(BLOCK_COLUMNS, FULL_NUMBERS // (batch * rows)))
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, columns, block_size):
        block = slice(start, start + block_size)
        similar = _similarity(a, b[:, block], metric)
        if valid_b is not None:
            similar.masked_fill_(~valid_b[:, None, block], float("-inf"))
        value, index = similar.nan_to_num_(float("-inf"), float("inf"), float("-inf")).max(-1)
        if best is None:
            best = value, index
        else:
            better = value > best[0]
            best = torch.where(better, value, best[0]), torch.where(better, index + start, best[1])
    assert best is not None  # Nb >= 1
    power = POWERS.get(metric, 0)
    # Only winners get their root: it keeps the order, and the rounding of pow() depends on the position.
    return (-(-best[0]).pow(1 / power), best[1]) if power > 2 else best


def _similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """(B, Na, D), (B, n, D) -> (B, Na, n), a new tensor; for p > 2 without the root."""
    power = POWERS.get(metric)
    if power is None:
        with common.full_precision(a):
            return torch.bmm(a, b.transpose(1, 2))
    if power in (1, 2):
        # Not by |a|^2 + |b|^2 - 2 a b: it loses the small distances, those of the near-copies that one looks for.
        return -torch.cdist(a, b, p=float(power), compute_mode="donot_use_mm_for_euclid_dist")
    # cdist calls pow() for p > 2, where whole powers are products, and overlooks NaN for p = inf. A few columns at a
    # time, for the cache.
    step = max(1, DIFFERENCE_NUMBERS // max(1, a.shape[0] * a.shape[1] * a.shape[2]))
    parts = []
    for columns in b.split(step, dim=1):
        d = (a[:, :, None] - columns[:, None]).abs_()
        parts.append(_power(d, power).sum(-1) if power else d.amax(-1))
    return torch.cat(parts, -1).neg_()


def _power(d: Tensor, power: int) -> Tensor:
    square = d * d
    return square * d if power == 3 else square * square if power == 4 else square * square * d


@torch.library.custom_op("tokred::bipartite_match", mutates_args=())
def _match_op(
    a: Tensor, b: Tensor, metric: str, block_size: int | None, valid_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    triton = common.kernels(a)
    if triton is None or a.dtype != b.dtype:
        return _match(a, b, metric, block_size, valid_b)
    return triton.bipartite_match(a, b, metric, POWERS.get(metric), valid_b)


@_match_op.register_fake
def _(a: Tensor, b: Tensor, metric: str, block_size: int | None, valid_b: Tensor | None) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=common.score_dtype(a, b)), a.new_empty(a.shape[:2], dtype=torch.int64)
