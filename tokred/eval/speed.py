"""Speed by interleaved pairs: each patched run is timed beside an unpatched run of the same batch, moments apart.

Other work on the machine slows both halves of a pair alike, so the median of the paired ratios holds where the two
speeds do not. Both halves use the model's own (fused) attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.core.method import Method
from tokred.core.patch import patch

__all__ = ["Speed", "interleaved"]


class Speed(NamedTuple):
    """Images per second of the patched and the unpatched model (medians), and the median of the paired ratios.

    `low` and `high` are the quartiles of the ratios.
    """

    images_per_s: float
    unpatched_images_per_s: float
    speedup: float
    low: float
    high: float


@torch.inference_mode()
def interleaved(
    model: nn.Module,
    methods: Mapping[str, Method],
    batch: Tensor,
    rounds: int = 7,
    done: Callable[[int], object] = lambda pairs: None,
) -> dict[str, Speed]:
    """Time every method against the unpatched model in the calling thread.

    A round visits every method once, with one pair each; which half of a pair goes first alternates. One more round
    beforehand is not counted.

    Args:
        model: not patched; it is left as it was. methods: by any label. batch: (B, 3, H, W) as the model takes it.
        rounds: pairs for each method. done: called with 1 after each pair.
    """
    if rounds < 1:
        raise InvalidParameterError(f"rounds={rounds!r}: expected at least one pair")
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in methods}
    for number in range(rounds + 1):
        for label, method in methods.items():
            if number % 2:
                plain, reduced = _time(model, batch), _time_patched(model, method, batch)
            else:
                reduced, plain = _time_patched(model, method, batch), _time(model, batch)
            if number:
                times[label].append((plain, reduced))
            done(1)
    return {label: _summary(pairs, len(batch)) for label, pairs in times.items()}


def _time(model: nn.Module, batch: Tensor) -> float:
    start = time.perf_counter()
    model(batch)
    return time.perf_counter() - start


def _time_patched(model: nn.Module, method: Method, batch: Tensor) -> float:
    with patch(model, method):
        return _time(model, batch)


def _summary(pairs: list[tuple[float, float]], images: int) -> Speed:
    ratios = sorted(plain / reduced for plain, reduced in pairs)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios * 3)
    return Speed(
        images / statistics.median(reduced for _, reduced in pairs),
        images / statistics.median(plain for plain, _ in pairs),
        statistics.median(ratios),
        low,
        high,
    )
