"""Slow, obvious definitions of the ops: what the fast paths are tested against. Loops, no cleverness, any float dtype.

Same arguments and results as the public ops; float64 inputs are computed in float64 throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """out[b, k] = x[b, indices[b, k]]."""
    out = x.new_zeros(*indices.shape, *x.shape[2:])
    for b in range(indices.shape[0]):
        for k in range(indices.shape[1]):
            out[b, k] = x[b, int(indices[b, k])]
    return out


def merge_tokens(
    x: Tensor, assignment: Tensor, slots: int, weights: Tensor | None = None, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """y[b, s] = sum of w[b, n] x[b, n] over the n with assignment s, over their sum of w for a mean."""
    dtype = _dtype(x)
    y = [[torch.zeros(x.shape[2], dtype=dtype)] * slots for _ in range(x.shape[0])]
    totals = [[torch.zeros((), dtype=dtype)] * slots for _ in range(x.shape[0])]
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            slot = int(assignment[b, n])
            weight = torch.ones((), dtype=dtype) if weights is None else weights[b, n].to(dtype)
            if slot >= 0:
                y[b][slot] = y[b][slot] + weight * x[b, n].to(dtype)
                totals[b][slot] = totals[b][slot] + weight
        if reduce == "mean":
            y[b] = [sums / total if total != 0 else sums for sums, total in zip(y[b], totals[b], strict=True)]
    return _stack(y, (x.shape[0], slots, x.shape[2]), dtype).to(x.dtype), _stack(totals, (x.shape[0], slots), dtype)


def unmerge_tokens(y: Tensor, assignment: Tensor) -> Tensor:
    """out[b, n] = y[b, assignment[b, n]], or zeros for -1."""
    zero = y.new_zeros(y.shape[2])
    rows = [[y[b, s] if s >= 0 else zero for s in row] for b, row in enumerate(assignment.tolist())]
    return _stack(rows, (*assignment.shape, y.shape[2]), y.dtype)


def attention_rows(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, log_size: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T + log_size + mask) with every key head repeated; rows without any key are zeros."""
    dtype = _dtype(q, k)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * torch.einsum("bhqd,bhnd->bhqn", q.to(dtype), k.to(dtype))
    if log_size is not None:
        scores = scores + log_size.to(dtype)[:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(dead, 0.0, scores.amax(-1, keepdim=True)))
    return torch.where(dead, 0.0, weights / weights.sum(-1, keepdim=True))


def attention_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None = None,
    log_size: Tensor | None = None,
    query_weights: Tensor | None = None,
) -> Tensor:
    """The column sums of the whole matrix, rows weighted by query_weights (B, Q)."""
    rows = attention_rows(q, k, scale, mask, log_size)
    if query_weights is not None:
        rows = rows * query_weights.to(rows.dtype)[:, None, :, None]
    return rows.sum(2)


def similarity(a: Tensor, b: Tensor, metric: str = "cosine") -> Tensor:
    """(D,), (D,) -> a number, larger = more alike: cosine, dot product, or minus a distance."""
    if metric == "dot":
        return (a * b).sum()
    if metric == "cosine":
        return (a / a.norm().clamp_min(1e-12) * (b / b.norm().clamp_min(1e-12))).sum()
    if metric == "linf":
        return -(a - b).abs().max()
    p = {"l1": 1, "l2": 2, "euclidean": 2, "minkowski3": 3, "minkowski4": 4, "minkowski5": 5}[metric]
    return -(((a - b).abs() ** p).sum() ** (1 / p))


def bipartite_match(
    a: Tensor, b: Tensor, metric: str = "cosine", block_size: int | None = None, valid_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each a the first b of the largest similarity; block_size has no effect on the result."""
    dtype = _dtype(a, b)
    value = torch.full(a.shape[:2], -math.inf, dtype=dtype)
    index = torch.zeros(a.shape[:2], dtype=torch.int64)
    for n in range(a.shape[0]):
        for i in range(a.shape[1]):
            for j in range(b.shape[1]):
                if valid_b is None or valid_b[n, j]:
                    s = similarity(a[n, i].to(dtype), b[n, j].to(dtype), metric)
                    if s > value[n, i]:  # false for NaN, false for a tie
                        value[n, i], index[n, i] = s, j
    return value, index


def page_rank(
    attention: Tensor,
    start: Tensor,
    iterations: int,
    alive: Tensor | None = None,
    renorm: bool = True,
    damping: float = 0.0,
    tol: float | None = None,
) -> Tensor:
    """Zero-TPrune, Algorithm 1, per image and head, on the sub-matrix of alive tokens."""
    batch, heads, tokens, _ = attention.shape
    dtype = _dtype(attention)
    out = torch.zeros(batch, heads, tokens, dtype=dtype)
    graphs, scores = {}, {}
    for b in range(batch):
        nodes = torch.arange(tokens) if alive is None else alive[b].nonzero()[:, 0]
        for h in range(heads):
            graph = attention[b, h].to(dtype)[nodes][:, nodes]
            graphs[b, h] = graph / graph.sum(-1, keepdim=True).clamp_min(1e-12) if renorm else graph
            weights = (start[b] if start.dim() == 2 else start[b, h]).to(dtype)[nodes]
            scores[b, h] = weights / weights.sum().clamp_min(1e-12)
    for _ in range(iterations):
        new = {key: (1 - damping) * graphs[key].T @ s + damping / max(len(s), 1) for key, s in scores.items()}
        still = tol is not None and all((new[key] - s).abs().sum() <= tol for key, s in scores.items())
        scores = new
        if still:
            break
    for (b, h), s in scores.items():
        out[b, h, torch.arange(tokens) if alive is None else alive[b].nonzero()[:, 0]] = s
    return out


def rank(scores: Tensor, descending: bool = True) -> Tensor:
    """Positions sorted by (NaN last, score, position)."""
    sign = -1 if descending else 1
    rows = [
        sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0 if math.isnan(row[i]) else sign * row[i], i))
        for row in scores.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(scores.shape)


def top_indices(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """The first k of :func:`rank`, in ascending order."""
    rows = [sorted(row[:k]) for row in rank(scores, largest).tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(scores.shape[0], k)


def _dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _stack(rows: list[list[Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat = [t for row in rows for t in row]
    return torch.stack(flat).reshape(shape) if flat else torch.zeros(shape, dtype=dtype)
