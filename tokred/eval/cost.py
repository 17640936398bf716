"""Settings of different methods that cost the same, and the random twin of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokred.core.errors import InvalidParameterError, UnknownMethodError, nearest
from tokred.core.flops import encoder_macs
from tokred.core.method import EncoderMethod
from tokred.core.sites import EncoderInfo
from tokred.vision.random_tokens import RandomTokens
from tokred.vision.tome import ToMe
from tokred.vision.topk import TopK
from tokred.vision.zero_tprune import ZeroTPrune

__all__ = ["MATCHED", "ablation", "fraction", "match_cost", "nearest_level", "twin"]


def fraction(info: EncoderInfo, method: EncoderMethod) -> float:
    """Multiply-adds of the whole model under `method`, scoring included, as a share of the unreduced ones."""
    counted = encoder_macs(info, method)
    return counted.total / counted.unreduced


def _closest(info: EncoderInfo, candidates: Iterable[EncoderMethod], target: float) -> EncoderMethod:
    return min(candidates, key=lambda method: abs(fraction(info, method) - target))


def _tome(info: EncoderInfo, target: float, parameters: Mapping[str, Any]) -> EncoderMethod:
    return _closest(info, (ToMe(r=r, **parameters) for r in range(1, info.tokens // 2 + 1)), target)


def _topk(info: EncoderInfo, target: float, parameters: Mapping[str, Any]) -> EncoderMethod:
    return _closest(info, (TopK(keep_rate=step / 200, **parameters) for step in range(4, 200)), target)


def _zero_tprune(info: EncoderInfo, target: float, parameters: Mapping[str, Any]) -> EncoderMethod:
    return ZeroTPrune(flops=round(target, 4), **parameters)


#: Methods that can be set to a cost: name -> (the parameter that sets it, how it is found).
MATCHED: dict[str, tuple[str, Callable[[EncoderInfo, float, Mapping[str, Any]], EncoderMethod]]] = {
    "topk": ("keep_rate", _topk),
    "zero_tprune": ("flops", _zero_tprune),
    "tome": ("r", _tome),
}


def match_cost(name: str, info: EncoderInfo, target: float, **parameters: Any) -> EncoderMethod:
    """The method `name` with the setting whose cost is nearest to `target` (a share of the unreduced multiply-adds).

    `parameters` are the method's other ones.

    Raises:
        UnknownMethodError: the method cannot be set to a cost. InvalidParameterError: the target is out of range.
    """
    if name not in MATCHED:
        raise UnknownMethodError(
            f"{name!r} cannot be set to a cost{nearest(name, MATCHED)}; it can be one of: {', '.join(MATCHED)}"
        )
    if not 0 < target < 1:
        raise InvalidParameterError(f"level {target!r}: expected a share of the unpatched multiply-adds, in (0, 1)")
    driver, find = MATCHED[name]
    if driver in parameters:
        raise InvalidParameterError(f"{name}: {driver} is found from the level; set other parameters")
    return find(info, target, parameters)


def nearest_level(info: EncoderInfo, level: float) -> float:
    """The cost nearest to `level` that ToMe meets with one r in all blocks.

    Its r is the coarsest setting of all; the others follow it, so that all rows of a level cost the same.

    Raises:
        InvalidParameterError: no cost within 0.05 of `level` is to be had.
    """
    found = fraction(info, match_cost("tome", info, level))
    if abs(found - level) > 0.05:
        raise InvalidParameterError(f"level {level} is out of reach on this encoder: the nearest is {found:.2f}")
    return found


def twin(method: EncoderMethod, info: EncoderInfo, seed: int = 0) -> RandomTokens:
    """Random dropping with the same number of tokens as `method` in every block, at the same place in the block."""
    left = method.plan(info)
    counts = {layer: left[layer] for layer in method.bind(info)}
    return RandomTokens(counts=counts, where=method.placement, seed=seed)


def ablation(
    info: EncoderInfo, target: float, vhf: tuple[float, float]
) -> list[tuple[str, EncoderMethod, float | None]]:
    """Zero-TPrune part by part at equal cost: [(label, method, the paper's accuracy in % at 3.08 G on DeiT-S)].

    Without the S-stage the keep rates alone have to meet the cost, in the schedule's usual shape (blocks 2, 5 and 8 of
    12, keep rates falling with depth). `vhf` is the head filter's range; where it is not the paper's, the whole method
    with the paper's comes last.
    """
    whole = ZeroTPrune(flops=round(target, 4), vhf=vhf)
    layers = sorted(whole.bind(info))[1:]  # the first block has the S-stage alone
    slopes = [0.1 * (place + 1) for place in range(len(layers))]

    def votes(step: int) -> ZeroTPrune:
        rates = (max(1 - step / 200 * slope, 0.02) for slope in slopes)
        return ZeroTPrune(schedule={layer: (0, rate) for layer, rate in zip(layers, rates, strict=True)}, vhf=vhf)

    low, high = 1, 2000
    while low < high:  # the cost falls with the step
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fraction(info, votes(middle)) > target else (low, middle)
    filtered = _closest(info, (votes(step) for step in (low, max(low - 1, 1))), target)
    printed = ZeroTPrune(flops=round(target, 4))
    return [
        ("random drop", twin(filtered, info), 76.8),
        ("WPR", filtered.replace(eir=False, vhf=None), 78.6),
        ("+ EIR", filtered.replace(vhf=None), 78.8),
        ("+ VHF", filtered, 78.9),
        ("+ S-stage", whole, 79.4),
        *([("printed VHF", printed, None)] if printed != whole else []),
    ]
