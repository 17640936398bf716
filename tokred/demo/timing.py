"""Times of a model as it is and under a method, for the jobs that answer questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokred.eval import speed

__all__ = ["Timed", "timed_pairs"]


class Timed:
    """A result with two sides, `before` and `after`, each with `seconds` to the first token or None."""

    before: Any
    after: Any

    @property
    def speedup(self) -> float | None:
        """Of the time to the first token; None where it was not measured."""
        if self.before.seconds is None or self.after.seconds is None:
            return None
        return self.before.seconds / self.after.seconds


def timed_pairs(
    plain: Callable[[], float], reduced: Callable[[], float], rounds: int, bundled: bool
) -> list[tuple[float, float]]:
    """Seconds of (plain, reduced) runs in turns: `rounds` of a bundled model, of others, which are slow, one."""
    if not rounds:
        return []
    if not bundled:
        return [(plain(), reduced())]
    return speed.pairs([""], lambda _: plain(), lambda _: reduced(), rounds)[""]
