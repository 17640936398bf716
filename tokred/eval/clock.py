"""Where the time of an evaluation goes: to its data loader, to its model, or to itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Clock", "spent"]


class Clock:
    """Seconds of this process in the data loader, in the models, and in all; what is left is the evaluation's own."""

    def __init__(self) -> None:
        self.loader = self.model = self.total = 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What happens inside is the data loader's: reading, decoding, preprocessing, making inputs."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.loader += time.perf_counter() - began

    @contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside is all there is."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.total += time.perf_counter() - began

    def to_dict(self) -> dict[str, float]:
        outside = max(self.total - self.loader - self.model, 0.0)
        share = outside / self.total if self.total else 0.0
        return {"loader": self.loader, "model": self.model, "outside": outside, "outside_share": share}


def spent(times: Mapping[str, float]) -> list[str]:
    """A line of the table's legend; none where all was recorded before."""
    if not times["loader"] + times["model"]:
        return []
    return [
        f"time of this run: data loader {times['loader']:.1f} s, models {times['model']:.1f} s, all else "
        f"{times['outside_share']:.1%}."
    ]
