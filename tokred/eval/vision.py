"""Accuracy of a reduced classifier, and what may be said of a difference between two of them.

Two methods that see the same scenes make many of the same mistakes, so their difference is known better than either
accuracy: all comparisons here are paired.
"""

from __future__ import annotations

import copy
import math
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.core.method import Method
from tokred.core.patch import patch

__all__ = ["BATCH", "Estimate", "Pass", "mean", "measure", "paired", "side_by_side"]

M = TypeVar("M")
T = TypeVar("T")
R = TypeVar("R")

#: Scenes a forward pass. Also the number that share one random subset (see `Pass.reseed`).
BATCH = 25


class Estimate(NamedTuple):
    """A value and its standard error (NaN where one observation says nothing about spread), both as fractions."""

    value: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the value is more than two standard errors from zero."""
        return abs(self.value) > 2 * self.error

    def to_dict(self) -> dict[str, Any]:
        """As the difference between two methods."""
        return {"difference": self.value, "se": self.error, "significant": self.significant}


def mean(values: Tensor, groups: Tensor | None = None) -> Estimate:
    """Mean of (N,) observations with its standard error.

    Args:
        values: (N,) bool or float.
        groups: (N,) int64 or None. Observations of one group may depend on each other (they share a random subset);
            groups are independent. The error is that of cluster sampling, ``sqrt(G / (G - 1) * sum_g e_g^2) / N`` with
            e_g the summed deviations of group g; without groups it is the usual ``s / sqrt(N)``.
    """
    values = values.double()
    count = len(values)
    if count == 0:
        raise InvalidParameterError("the mean of no observations was asked for")
    average = values.mean()
    deviation = values - average
    if groups is not None:
        _, index = groups.unique(return_inverse=True)
        deviation = deviation.new_zeros(int(index.max()) + 1).index_add(0, index, deviation)
    clusters = len(deviation)
    if clusters < 2:
        return Estimate(average.item(), math.nan)
    error = (clusters / (clusters - 1) * deviation.square().sum()).sqrt() / count
    return Estimate(average.item(), error.item())


def paired(first: Tensor, second: Tensor, groups: Tensor | None = None) -> Estimate:
    """Mean of ``first - second``, (N,) each, observed on the same N scenes; `groups` as in `mean`."""
    if first.shape != second.shape:
        raise InvalidParameterError(
            f"paired observations have shapes {tuple(first.shape)} and {tuple(second.shape)}, expected equal ones"
        )
    return mean(first.double() - second.double(), groups)


@dataclass(frozen=True, eq=False)
class Pass:
    """One run over all scenes.

    Attributes:
        method: None is the model as it is.
        reseed: replace the method by one with a new seed in every batch. A random subset is then drawn anew for each
            `BATCH` scenes, so that one pass averages over many subsets.
    """

    method: Method | None
    reseed: bool = False


def measure(
    model: nn.Module,
    passes: Sequence[Pass],
    images: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor],
    threads: int = 1,
    seed: int = 0,
    done: Callable[[int], object] = lambda scenes: None,
) -> list[Tensor]:
    """Run each pass over the same scenes and say which were named right.

    Args:
        model: classifier (B, 3, H, W) -> (B, classes), not patched; it is copied once a thread and left as it was.
        images: (N, 3, H, W) uint8. labels: (N,) int64. prepare: images as the model takes them.
        threads: passes run side by side in so many Python threads; the result does not depend on it.
        seed: first of the seeds of `Pass.reseed`.
        done: called with the number of scenes just finished, from the threads.

    Returns:
        One (N,) bool for each pass.
    """

    def run(mine: nn.Module, one: Pass) -> Tensor:
        return _run(mine, one, images, labels, prepare, seed, done)

    return side_by_side(model, run, passes, threads)


def side_by_side(model: M, run: Callable[[M, T], R], jobs: Sequence[T], threads: int) -> list[R]:
    """``run(copy of the model, job)`` for each job, in so many Python threads; results in the order of the jobs."""
    models: queue.SimpleQueue[M] = queue.SimpleQueue()
    for _ in range(min(threads, len(jobs))):
        models.put(copy.deepcopy(model))

    def take(job: T) -> R:
        mine = models.get()
        try:
            return run(mine, job)
        finally:
            models.put(mine)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(take, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@torch.inference_mode()
def _run(
    model: nn.Module,
    one: Pass,
    images: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor],
    seed: int,
    done: Callable[[int], object],
) -> Tensor:
    handle = patch(model, one.method) if one.method is not None else None
    try:
        right = []
        for number, start in enumerate(range(0, len(images), BATCH)):
            if handle is not None and one.reseed:
                handle.replace(one.method.replace(seed=seed + number))  # type: ignore[union-attr]
            part = slice(start, start + BATCH)
            right.append(model(prepare(images[part])).argmax(1) == labels[part])
            done(len(right[-1]))
        return torch.cat(right)
    finally:
        if handle is not None:
            handle.remove()
