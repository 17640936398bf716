"""How many tokens each frame gets, and on what grid (QuoTA, arXiv 2503.08689; released code MAC-AutoML/QuoTA).

Everything here is float64 on the CPU, whatever the scores come in: a weight that rounds down to one token less changes
the grid of a frame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError

__all__ = ["CapMode", "allocate", "cap_weights", "frame_weights", "grid_shape"]

CapMode = Literal["official", "waterfill"]

#: Added before rounding down. With 64 equal scores and 196 tokens a frame, the plain product gives 195 for one score in
#: five; with it, the counts of every recorded run of the released code are reproduced.
ROUNDING_GUARD = 1e-6
MAX_POWER = 8.0


def frame_weights(scores: Tensor | Sequence[float], power: float = 2.0) -> Tensor:
    """Shares of the budget, ``w_i = p_i^power / sum_j p_j^power``: (T,) scores -> (T,) float64 that add up to 1.

    The released code scales scores by 100 first, which cancels. `power` is its sharpness: 0 is uniform, 1 linear, 2 the
    released value. Where no score is above zero, or one is not finite, the weights are uniform and a warning says so
    (the released code divides by zero).

    Raises:
        InvalidParameterError: scores that are not one-dimensional, empty or negative; power outside [0, 8].
    """
    p = _check_scores(scores)
    _check_power(power)
    uniform = torch.full_like(p, 1 / len(p))
    if power == 0:
        return uniform
    peak = p.max().item()  # NaN if any score is
    if not (math.isfinite(peak) and peak > 0):
        reason = "all frame scores are zero" if peak == 0 else "a frame score is not finite"
        warnings.warn(f"{reason}: every frame gets the same share of the budget", stacklevel=2)
        return uniform
    # Relative to the largest score, so that no power overflows and scores times a constant give the same weights.
    raised = (p / peak) ** power
    return raised / math.fsum(raised.tolist())  # an exact sum: frames in another order get the same weights


def cap_weights(weights: Tensor, limit: float, mode: CapMode = "official") -> Tensor:
    """Bound each weight by `limit` (a frame's largest share) and pass what it loses on to the others: (T,) -> (T,).

    Args:
        weights: (T,) from `frame_weights`. limit: above 0.
        mode: "official" is the released code: one pass in the order of the frames, which hands on the whole excess to
            each frame in turn by its share of the clipped sum. It depends on the order and spends less than it could.
            "waterfill" repeats {clip, spread over the frames below the limit in proportion} until none exceeds it:
            the sum is min(1, K limit) with K frames of positive weight, and equal frames get equal weights.
    """
    check_choice("cap_mode", mode, ("official", "waterfill"))
    if isinstance(limit, bool) or not isinstance(limit, Real) or not float(limit) > 0:
        raise InvalidParameterError(f"limit={limit!r}: expected a share of the budget > 0")
    w = _check_scores(weights, "weights")
    capped = _cap_as_released(w, float(limit)) if mode == "official" else _waterfill(w, float(limit))
    return torch.tensor(capped, dtype=torch.float64)


def _cap_as_released(weights: Tensor, limit: float) -> list[float]:
    excess = math.fsum(max(w - limit, 0.0) for w in weights.tolist())
    capped = [min(w, limit) for w in weights.tolist()]
    if excess <= 0:
        return capped
    total = math.fsum(capped)  # the clipped frames count, so less than the excess is handed on
    for i, w in enumerate(capped):
        if w < limit:
            capped[i] = w + w / total * excess
            if capped[i] > limit:
                excess += capped[i] - limit  # later frames get a part of this too, and of all that was given already
                capped[i] = limit
    return capped


def _waterfill(weights: Tensor, limit: float) -> list[float]:
    """min(limit, c w) with the c that conserves the sum; the frames at the limit are found round by round."""
    filled, total = weights.tolist(), math.fsum(weights.tolist())
    while any(w > limit for w in filled):
        below = math.fsum(w for w in filled if w < limit)
        spare = total - limit * sum(w >= limit for w in filled)
        factor = max(spare / below, 1.0) if below > 0 else 1.0
        filled = [limit if w >= limit else w * factor for w in filled]
    return filled


def allocate(
    scores: Tensor | Sequence[float],
    budget: int,
    power: float = 2.0,
    max_tokens: int | None = None,
    cap_mode: CapMode = "official",
    min_tokens: int = 0,
) -> Tensor:
    """Tokens of each frame, ``n_i = floor(budget w_i)``: (T,) scores -> (T,) int64 on the CPU, sum <= budget.

    A frame with 0 tokens is dropped. If rounding leaves none at all, the best frame gets one token.

    Args:
        scores: (T,) relevance of each frame, >= 0; a constant factor does not matter.
        budget: N_t, tokens of the whole video (released: 64 frames of 196 = 12544).
        power: gamma, see `frame_weights`.
        max_tokens: most tokens of one frame, None for no limit (as released for bilinear resizing, which then enlarges
            a frame beyond its own grid). `cap_mode`: see `cap_weights`.
        min_tokens: tokens that every frame gets, taken off the budget first; `max_tokens` counts them.

    Raises:
        InvalidParameterError: a value outside its range, or a budget below ``T * min_tokens``.
    """
    check_count("budget", budget, minimum=1)
    check_count("min_tokens", min_tokens)
    weights = frame_weights(scores, power)
    frames = len(weights)
    rest = budget - frames * min_tokens
    if rest < 0:
        raise InvalidParameterError(
            f"min_tokens={min_tokens}: {frames} frames need {frames * min_tokens} tokens, budget={budget} has fewer"
        )
    if max_tokens is not None:
        check_count("max_tokens", max_tokens, minimum=max(min_tokens, 1))
        if rest and max_tokens > min_tokens:
            weights = cap_weights(weights, (max_tokens - min_tokens) / rest, cap_mode)
    counts = min_tokens + (rest * weights + ROUNDING_GUARD).floor().long()
    if max_tokens is not None:
        counts.clamp_(max=max_tokens)
    if not counts.any():
        counts[max(range(frames), key=weights.tolist().__getitem__)] = 1  # of several the first
    return counts


def grid_shape(n: int, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns (h, w) of a frame of `n` tokens whose full grid is `rows` x `cols`, with h w <= n.

    On a square grid this is the released rule: ``h = w = isqrt(n)``, and one row more if that still fits. On others
    (the released code has none) the shape is the one nearest to the grid's proportions, and ``n = rows cols`` gives the
    grid itself.
    """
    for field, value in (("n", n), ("rows", rows), ("cols", cols)):
        check_count(field, value, minimum=1)
    h = max(1, math.isqrt(n * rows // cols))
    w = max(1, math.isqrt(n * cols // rows))
    while h * w > n:
        if w == 1 or (h > 1 and h * cols >= w * rows):  # the side that is longer for its grid, never below 1
            h -= 1
        else:
            w -= 1
    larger = [(a, b) for a, b in ((h + 1, w), (h, w + 1)) if a * b <= n]
    return min(larger, key=lambda shape: abs(shape[0] * cols - shape[1] * rows), default=(h, w))  # a tie grows h


def _check_scores(scores: Tensor | Sequence[float], field: str = "scores") -> Tensor:
    """(T,) float64 on the CPU."""
    p = torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach()
    if p.dim() != 1 or not len(p):
        raise InvalidParameterError(f"{field}: expected one number a frame, (T,) with T >= 1, got {tuple(p.shape)}")
    if (p < 0).any():
        raise InvalidParameterError(f"{field}: expected numbers >= 0, got {p.min().item()!r} at frame {p.argmin()}")
    return p


def _check_power(power: object) -> None:
    if isinstance(power, bool) or not isinstance(power, Real) or not 0 <= float(power) <= MAX_POWER:
        raise InvalidParameterError(f"power={power!r}: expected a number in [0, {MAX_POWER:g}]")
