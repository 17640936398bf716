"""Schedules of Zero-TPrune that meet a budget of multiply-adds: in closed form, and by seeded Monte-Carlo search.

The paper searches locations, retention rates and iteration counts by Monte-Carlo simulation; its ranges are not
published, so the ranges here are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError
from tokred.core.flops import encoder_info, encoder_macs
from tokred.core.patch import patch
from tokred.core.sites import EncoderInfo

if TYPE_CHECKING:
    from tokred.vision.zero_tprune import ZeroTPrune

__all__ = ["SearchResult", "Trial", "fit_flops", "search"]

Plan = dict[int, tuple[int, float]]

SHAPE_LAYERS = (0, 2, 5, 8)  # the paper's layers 1, 3, 6, 9 of 12, which it counts from 1
SHAPE_SLOPE = (0.0, 0.1, 0.2, 0.3)
TOLERANCE = 0.01
_LAYERS, _KEEP, _COPIES = (3, 6), (0.5, 1.0), (0, 16)
_DRAWS_PER_TRIAL = 4000


def shape(c: float, r_s: int, layers: tuple[int, ...] = SHAPE_LAYERS) -> Plan:
    """The family of schedules behind the presets: keep rates fall with depth by the slope c, r_S is constant."""
    rates = (max(round(1 - c * slope, 6), 0.02) for slope in SHAPE_SLOPE)
    return {layer: (r_s, rate) for layer, rate in zip(layers, rates, strict=False)}


def fit_flops(method: ZeroTPrune, info: EncoderInfo, target: float) -> Plan:
    """Find the schedule of the presets' shape whose multiply-adds meet `target` within 1 %.

    The presets' blocks scale with the depth, r_S = 10 of 196 tokens with the number of tokens. The slope of the keep
    rates is found by bisection; where whole tokens are too coarse for the tolerance, other r_S are tried.

    Args:
        target: multiply-adds of the whole pruned encoder, up to 1 as a share of the unpruned one.

    Raises:
        InvalidParameterError: the target is out of reach; the reachable range is named.
    """
    full, wanted = _target(info, target)
    layers = tuple(sorted({round(layer * info.depth / 12) for layer in SHAPE_LAYERS}))
    usual = round(10 * info.tokens / 196)

    def macs(c: float, r_s: int) -> int:
        return _macs(method, info, shape(c, r_s, layers))

    best = (float("inf"), 0.0, usual)
    for r_s in sorted(range(2 * usual + 1), key=lambda r: abs(r - usual)):
        low, high = 0.0, 10.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if macs(middle, r_s) > wanted else (low, middle)
        best = min(best, (abs(macs(high, r_s) / wanted - 1), high, r_s))
        if best[0] <= TOLERANCE / 2:
            break
    if best[0] > TOLERANCE:
        raise InvalidParameterError(
            f"flops={target!r} cannot be met within 1 % on this encoder: schedules of this shape reach "
            f"{macs(10.0, 2 * usual) / full:.2f} to {macs(0.0, 0) / full:.2f} of its {full / 1e9:.3f} G; give schedule="
        )
    return shape(best[1], best[2], layers)


@dataclass(frozen=True)
class Trial:
    """One schedule that met the budget: its multiply-adds and its score in [0, 1]."""

    schedule: Plan
    macs: int
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The best method found, and every trial in the order they were drawn."""

    best: ZeroTPrune
    score: float
    trials: tuple[Trial, ...]


def search(
    model: nn.Module,
    images: Tensor,
    flops: float,
    *,
    labels: Tensor | None = None,
    trials: int = 32,
    seed: int = 0,
    method: ZeroTPrune | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda done: None,
) -> SearchResult:
    """Monte-Carlo search of pruning blocks, keep rates and r_S under a budget.

    Draws 3 to 6 blocks, keep rates in [0.5, 1] and r_S in 0..16; schedules further than 1 % from the budget are
    rejected before anything runs. A trial scores by accuracy on `images` where `labels` are given, else by agreement
    of its top-1 class with the unpruned model. Equal scores: the first drawn wins.

    Args:
        model: a classifier that `tokred.patch` takes; it is left as it was.
        images: (M, 3, H, W) as the model takes them. labels: (M,) int64 or None.
        flops: multiply-adds of the pruned model, up to 1 as a share of the unpruned one.
        method: other options of the method (order, partition, ...) that every trial uses.
    """
    from tokred.vision.zero_tprune import ZeroTPrune

    check_count("trials", trials, minimum=1)
    if len(images) == 0:
        raise InvalidParameterError("images is empty: the search needs images to score schedules on")
    method = method or ZeroTPrune()
    info = encoder_info(model, images)
    plans = _draw(method, info, flops, trials, seed)
    wanted = labels if labels is not None else _top1(model, images, batch_size)
    done: list[Trial] = []
    for plan in plans:
        with patch(model, _with(method, plan)):
            score = float((_top1(model, images, batch_size) == wanted).float().mean())
        done.append(Trial(plan, _macs(method, info, plan), score))
        progress(1)
    winner = max(done, key=lambda trial: trial.score)
    return SearchResult(_with(method, winner.schedule), winner.score, tuple(done))


def _draw(method: ZeroTPrune, info: EncoderInfo, target: float, trials: int, seed: int) -> list[Plan]:
    generator = random.Random(seed)
    full, wanted = _target(info, target)
    found: list[Plan] = []
    for _ in range(_DRAWS_PER_TRIAL * trials):
        count = generator.randint(_LAYERS[0], min(_LAYERS[1], info.depth - 1))
        layers = sorted(generator.sample(range(info.depth - 1), count))
        plan = {layer: (generator.randint(*_COPIES), round(generator.uniform(*_KEEP), 3)) for layer in layers}
        if abs(_macs(method, info, plan) / wanted - 1) <= TOLERANCE:
            found.append(plan)
            if len(found) == trials:
                return found
    raise InvalidParameterError(
        f"flops={target!r}: only {len(found)} of {trials} schedules within 1 % of {wanted / full:.2f} of "
        f"{full / 1e9:.3f} G turned up; ask for fewer trials or a budget nearer the middle"
    )


def _target(info: EncoderInfo, target: float) -> tuple[int, float]:
    """(unpruned, wanted) multiply-adds."""
    if info.tokens < 2:
        raise InvalidParameterError("a budget of multiply-adds needs an encoder of known image size; give schedule=")
    full = encoder_macs(info).total
    return full, target * full if target <= 1 else float(target)


def _with(method: ZeroTPrune, plan: Plan) -> ZeroTPrune:
    return method.replace(keep_rate=None, preset=None, flops=None, layers=None, schedule=plan)


def _macs(method: ZeroTPrune, info: EncoderInfo, plan: Plan) -> int:
    return encoder_macs(info, _with(method, plan)).total


@torch.inference_mode()
def _top1(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    outputs = (model(batch) for batch in images.split(batch_size))
    return torch.cat([getattr(output, "logits", output).argmax(dim=-1) for output in outputs])
