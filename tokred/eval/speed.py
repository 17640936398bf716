"""Speed by interleaved pairs: each patched run is timed beside an unpatched run of the same batch, moments apart.

Other work on the machine slows both halves of a pair alike, so the median of the paired ratios holds where the two
speeds do not. Both halves use the model's own (fused) attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.core.method import Method
from tokred.core.patch import patch

__all__ = ["Speed", "interleaved", "pairs", "ratio"]

T = TypeVar("T")


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
    times = pairs(
        list(methods),
        lambda label: _time(model, batch),
        lambda label: _time_patched(model, methods[label], batch),
        rounds,
        done,
    )
    return {label: _summary(found, len(batch)) for label, found in times.items()}


def pairs(
    labels: Sequence[str],
    plain: Callable[[str], T],
    reduced: Callable[[str], T],
    rounds: int,
    done: Callable[[int], object] = lambda pairs: None,
) -> dict[str, list[tuple[T, T]]]:
    """{label: (plain, reduced) of each round}: a round visits every label once, see `interleaved`."""
    if rounds < 1:
        raise InvalidParameterError(f"rounds={rounds!r}: expected at least one pair")
    found: dict[str, list[tuple[T, T]]] = {label: [] for label in labels}
    for number in range(rounds + 1):
        for label in labels:
            if number % 2:
                first, second = plain(label), reduced(label)
            else:
                second, first = reduced(label), plain(label)
            if number:
                found[label].append((first, second))
            done(1)
    return found


def _time(model: nn.Module, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    model(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start


def _time_patched(model: nn.Module, method: Method, batch: Tensor) -> float:
    with patch(model, method):
        return _time(model, batch)


def _summary(times: list[tuple[float, float]], images: int) -> Speed:
    middle, low, high = ratio(times)
    return Speed(
        images / statistics.median(reduced for _, reduced in times),
        images / statistics.median(plain for plain, _ in times),
        middle,
        low,
        high,
    )


def ratio(times: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Median and quartiles of plain / reduced."""
    ratios = sorted(plain / reduced for plain, reduced in times)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return middle, low, high
