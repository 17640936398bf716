"""Slow definitions of QuoTA's maths: one frame, one token, one number at a time. Nothing is shared with the library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "adaptive_pool",
    "bilinear",
    "counts",
    "grid",
    "linspace",
    "official_cap",
    "tome",
    "tome_separable",
    "weights",
]


def weights(scores: Sequence[float], power: float) -> list[float]:
    raised = [(100 * p) ** power for p in scores]
    return [r / sum(raised) for r in raised]


def official_cap(w: Sequence[float], m: float) -> list[float]:
    w = list(w)
    excess = 0.0
    for i in range(len(w)):
        if w[i] > m:
            excess += w[i] - m
            w[i] = m
    if excess > 0:
        s = sum(w)
        for i in range(len(w)):
            if w[i] < m:
                w[i] += w[i] / s * excess
                if w[i] > m:
                    excess += w[i] - m
                    w[i] = m
    return w


def counts(w: Sequence[float], budget: int) -> list[int]:
    return [math.floor(budget * x + 1e-6) for x in w]


def grid(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    return (side + 1, side) if (side + 1) * side <= n else (side, side)


def bilinear(x: Tensor, h: int, w: int) -> Tensor:
    """x (R, C, D) float64."""
    rows, cols, _ = x.shape

    def sample(place: float, size: int) -> list[tuple[int, float]]:
        place = min(max(place, 0.0), size - 1.0)
        low = math.floor(place)
        high = min(low + 1, size - 1)
        return [(low, 1 - (place - low)), (high, place - low)]

    out = torch.zeros(h, w, x.shape[2], dtype=x.dtype)
    for a in range(h):
        for b in range(w):
            for r, u in sample((a + 0.5) * rows / h - 0.5, rows):
                for c, v in sample((b + 0.5) * cols / w - 0.5, cols):
                    out[a, b] += u * v * x[r, c]
    return out


def adaptive_pool(x: Tensor, h: int, w: int) -> Tensor:
    rows, cols, _ = x.shape
    out = torch.zeros(h, w, x.shape[2], dtype=x.dtype)
    for a in range(h):
        for b in range(w):
            r = range(a * rows // h, math.ceil((a + 1) * rows / h))
            c = range(b * cols // w, math.ceil((b + 1) * cols / w))
            cells = [x[i, j] for i in r for j in c]
            out[a, b] = sum(cells) / len(cells)
    return out


def linspace(x: Tensor, n: int) -> Tensor:
    """x (N, D)."""
    return x[torch.linspace(0, len(x) - 1, n).floor().long()]


def tome(tokens: Sequence[Tensor], target: int) -> tuple[list[Tensor], list[list[int]]]:
    """Token vectors down to `target`; the vectors left, and the original tokens in each."""
    tokens, members = list(tokens), [[i] for i in range(len(tokens))]
    while len(tokens) > target:
        t = len(tokens)
        r = min(t - target, t // 2)
        unit = [v / v.norm() for v in tokens]
        even, odd = list(range(0, t, 2)), list(range(1, t, 2))
        best = {a: max(odd, key=lambda b, a=a: (float(unit[a] @ unit[b]), -b)) for a in even}
        ranked = sorted(even, key=lambda a: (-float(unit[a] @ unit[best[a]]), a))
        source, kept = ranked[:r], ranked[r:]
        groups = [[a] for a in kept] + [[b, *(a for a in source if best[a] == b)] for b in odd]
        tokens = [sum(tokens[i] for i in group) / len(group) for group in groups]
        members = [[original for i in group for original in members[i]] for group in groups]
    return tokens, members


def tome_separable(x: Tensor, h: int, w: int) -> Tensor:
    """x (R, C, D) -> (h, w, D)."""
    narrow = [tome(list(row), w)[0] for row in x]
    columns = [tome([row[j] for row in narrow], h)[0] for j in range(w)]
    return torch.stack([torch.stack([columns[j][i] for j in range(w)]) for i in range(h)])
