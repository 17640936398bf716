"""What methods that prune between the layers of a language model share: budgets of stages, the best tokens of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import budget_tokens, check_budget, check_fraction, check_layers, resolve_layers
from tokred.core.decoder import PrefillLayer
from tokred.core.errors import InvalidParameterError

__all__ = [
    "check_rate_or_budget",
    "check_stages",
    "dropping_stages",
    "keep_best",
    "kept_of_rows",
    "plan_stages",
    "scale_stages",
    "spread",
]


def check_rate_or_budget(
    keep_rate: float | None, budget: float | int | None, default: float
) -> tuple[float | None, float | int | None]:
    """Return (keep_rate, budget), one of which is None; `default` is the keep rate where neither is given."""
    if keep_rate is not None and budget is not None:
        raise InvalidParameterError("keep_rate and budget exclude each other; give one")
    if budget is not None:
        return None, check_budget("budget", budget)
    return check_fraction("keep_rate", default if keep_rate is None else keep_rate), None


def check_stages(
    stages: Sequence[int] | None, default: Sequence[int], field: str, values: Sequence[float]
) -> tuple[int, ...] | None:
    """Return the field `stages`, or None for the default; `values` of the field `field` must be one for each stage."""
    checked = None if stages is None else check_layers("stages", stages)
    expected = len(default if checked is None else checked)
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != expected:
        raise InvalidParameterError(f"{field}={values!r}: expected one for each of {expected} stages")
    return checked


def plan_stages(
    method: str, stages: Sequence[int] | None, default: Sequence[int], values: Sequence[float | int], depth: int
) -> dict[int, float | int]:
    """{stage: its value} in a model of `depth` layers; default stages that it lacks are left out, the deepest first."""
    return dict(zip(resolve_layers("stages", stages, default, depth, method), values, strict=False))


def scale_stages(plan: Mapping[int, float | int], budget: float | int | None) -> dict[int, float | int]:
    """{stage: fraction of the first tokens, or number, that is left after it}.

    Args:
        plan: the same. budget: None takes the plan as it is; else this is left after the last stage, and the plan only
            says how many times as many the stages before have.
    """
    if budget is None:
        return dict(plan)
    ratios = {stage: left / plan[max(plan)] for stage, left in plan.items()}
    if isinstance(budget, float):
        return {stage: min(1.0, budget * ratio) for stage, ratio in ratios.items()}
    return {stage: math.floor(budget * ratio + 1e-6) for stage, ratio in ratios.items()}


def dropping_stages(plan: Mapping[int, float | int]) -> dict[int, float | int]:
    """The stages that can drop something: those that leave less than all tokens, and less than the stage before."""
    dropping: dict[int, float | int] = {}
    for stage, left in plan.items():
        before = min(dropping.values(), default=1.0 if isinstance(left, float) else math.inf)
        if left < before:
            dropping[stage] = left
    return dropping


def spread(visual: int, counts: Mapping[int, int], depth: int) -> tuple[int, ...]:
    """Visual tokens that enter each of `depth` layers, given {layer: how many from there on}."""
    entering = []
    for layer in range(depth):
        visual = counts.get(layer, visual)
        entering.append(visual)
    return tuple(entering)


def kept_of_rows(view: PrefillLayer, budget: float | int, of: Tensor | None = None) -> Tensor | None:
    """(B,) int64: visual tokens that each row keeps; None where no row would lose any.

    Args:
        budget: a fraction of the (B,) tokens `of` (None: of those that are here), or a number.
    """
    here = view.visual.sum(dim=1).tolist()
    counts = [min(budget_tokens(budget, n), m) for n, m in zip(here if of is None else of.tolist(), here, strict=True)]
    return None if counts == here else torch.tensor(counts, device=view.visual.device)


def keep_best(scores: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """(B, T) bool: in each row the `counts` (B,) best of the allowed tokens by scores (B, T).

    Ties go to the lower place; scores that are not a number come last.
    """
    order = ops.rank(scores)
    order = order.gather(1, ops.rank(allowed.gather(1, order).to(torch.uint8)))  # allowed ones in front, still in order
    places = torch.arange(order.shape[1], device=order.device)
    return torch.zeros_like(allowed).scatter(1, order, places < counts[:, None]) & allowed
