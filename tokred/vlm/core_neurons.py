"""Core neurons, match scores and the knee of a score curve: the maths of `CoreMatching` (arXiv 2505.19235, 2410.18311).

An activation A is what enters the down projection of an MLP, (B, T, I), and Gamma(x) = {i : A_i(x) > 0} is the set of
neurons that a token x activates, by a strict sign test in the dtype of A. Counts are integers; ties go to the lower
index; rows of a batch never mix, and padding takes no part.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred import ops

__all__ = ["above_knee", "core_counts", "core_neurons", "knee_distances", "match_scores", "projections", "token_limits"]

#: activations looked at in one piece, so that no second tensor of their size is formed
_PIECE = 1 << 22

CountRule = Literal["shared_limit", "per_token"]
KneeRule = Literal["absolute", "below"]


def token_limits(positives: Tensor, valid: Tensor, rho: float, rule: CountRule = "shared_limit") -> Tensor:
    """(B, T) int64, at least 1: how many of its largest activations each token counts.

    Args:
        positives: (B, T), size of Gamma of each token. valid: (B, T) bool, real tokens.
        rule: "shared_limit": ``floor(rho sum(positives) / M)`` for all M tokens of a row, as CoreInfer released it;
            "per_token": ``ceil(rho positives)``, the formula of the paper.
    """
    found = positives.masked_fill(~valid, 0).double()
    if rule == "per_token":
        limits = (rho * found).ceil()
    else:
        tokens = valid.sum(dim=1, keepdim=True).clamp_min(1)
        limits = (rho * found.sum(dim=1, keepdim=True) / tokens).floor().expand_as(found)
    return limits.long().clamp_min(1)


def core_counts(activations: Tensor, valid: Tensor, rho: float, rule: CountRule = "shared_limit") -> Tensor:
    """f, (B, I) int32: in how many of its tokens each neuron is one of the largest activations.

    Args:
        activations: (B, T, I). valid: (B, T) bool. rho, rule: see `token_limits`.
    """
    positives = torch.cat([(piece > 0).sum(dim=2) for piece in _pieces(activations)], dim=1)
    limits = token_limits(positives, valid, rho, rule)
    counts = torch.zeros(len(activations), activations.shape[2], dtype=torch.int32, device=activations.device)
    start = 0
    for piece in _pieces(activations):
        part = slice(start, start + piece.shape[1])
        largest = _largest(piece, limits[:, part]) & valid[:, part, None]
        counts += largest.sum(dim=1, dtype=torch.int32)
        start = part.stop
    return counts


def core_neurons(counts: Tensor, beta: float) -> Tensor:
    """C, (B, I) bool: the ``floor(beta I)`` neurons of largest frequency (B, I), of those that occur at all."""
    best = ops.rank(counts)[:, : int(beta * counts.shape[1])]
    return torch.zeros_like(counts, dtype=torch.bool).scatter(1, best, True) & (counts > 0)


def match_scores(activations: Tensor, valid: Tensor, core: Tensor) -> Tensor:
    """S, (B, T) int32: ``|Gamma(x) & C|`` of each token, given activations (B, T, I) and C (B, I) bool; padding 0."""
    pieces = [((piece > 0) & core[:, None]).sum(dim=2, dtype=torch.int32) for piece in _pieces(activations)]
    return torch.cat(pieces, dim=1).masked_fill(~valid, 0)


def knee_distances(ranked: Tensor) -> Tensor:
    """How far each point (i, s_i) of a curve lies below the chord between its ends, times N - 1.

    ``ranked``: (N,) descending. int64 and exact for integers, else float64. The perpendicular distance is a constant
    times this, so scales of the axes do not matter.
    """
    s = ranked.to(torch.float64 if ranked.is_floating_point() else torch.int64)
    places = torch.arange(len(s), device=s.device)
    return places * (s[-1] - s[0]) - (s - s[0]) * (len(s) - 1)


def above_knee(scores: Tensor, inclusive: bool = True, rule: KneeRule = "absolute") -> Tensor:
    """(N,) bool: the scores that reach the knee of their sorted curve, the first point farthest from its chord.

    Fewer than three scores, and scores that are all equal, are all kept.

    Args:
        scores: (N,), higher is kept.
        inclusive: ``>=`` the score at the knee (equation 6 of the paper) instead of ``>`` (its released code).
        rule: "absolute" takes the distance on either side of the chord, so a curve that bulges above it keeps almost
            everything; "below" looks below the chord only, and keeps everything where no point lies there.
    """
    everything = torch.ones_like(scores, dtype=torch.bool)
    if len(scores) < 3:
        return everything
    ranked = scores.sort(descending=True, stable=True).values
    distances = knee_distances(ranked)
    if rule == "absolute":
        distances = distances.abs()
    if ranked[0] == ranked[-1] or (rule == "below" and not (distances > 0).any()):
        return everything
    threshold = ranked[distances.argmax()]
    return scores >= threshold if inclusive else scores > threshold


def projections(attention: Tensor, values: Tensor) -> Tensor:
    """P, (B, T) float32: each token's part of the output of an attention row, along the direction of that output.

    ``c_i = concat_h(alpha_i^h V_i^h)``, ``o = sum_i c_i``, ``P_i = <c_i, o> / |o|``, before the output projection.

    Args:
        attention: (B, H, T), one softmax row of each head. values: (B, H_kv, T, d), shared by H / H_kv heads each.
    """
    alpha = attention.float().unflatten(1, (values.shape[1], -1))  # (B, H_kv, G, T)
    v = values.float()
    with torch.autocast(v.device.type, enabled=False):
        output = alpha @ v  # (B, H_kv, G, d)
        along = (alpha * (output @ v.transpose(2, 3))).sum(dim=(1, 2))
    return along / output.flatten(1).norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _pieces(activations: Tensor) -> tuple[Tensor, ...]:
    """Activations (B, T, I) in runs of tokens."""
    batch, _, neurons = activations.shape
    return activations.split(max(_PIECE // max(batch * neurons, 1), 1), dim=1)


def _largest(activations: Tensor, limits: Tensor) -> Tensor:
    """(B, T, I) bool: the ``limits`` (B, T) largest activations of each token, ties to the lower neuron.

    `topk` finds the value at the limit; which of several equal ones it would return is up to it.
    """
    if not activations.shape[1]:
        return torch.zeros_like(activations, dtype=torch.bool)
    best = activations.topk(int(limits.max()), dim=2).values
    last = best.gather(2, limits[..., None] - 1)
    above, equal = activations > last, activations == last
    room = limits[..., None] - above.sum(dim=2, keepdim=True)
    return above | (equal & (equal.cumsum(dim=2, dtype=torch.int32) <= room))
