"""Rows of an evaluation of language models: methods, and what papers say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokred.core.errors import TokredError, UnknownMethodError
from tokred.core.method import Method
from tokred.eval.runs import Chosen, drawn, redrawn

__all__ = ["EvalRow", "level_field", "make_rows", "reported"]

#: the parameter that says how much is kept, where it is not called budget
_LEVELS = {
    "corematching": "keep_tokens",
    "gemfilter": "k",
    "mustdrop": "preset",
    "tome": "r",
    "topk": "keep_rate",
    "zero_tprune": "keep_rate",
}


def level_field(name: str) -> str:
    """The parameter of a method that papers' tables vary."""
    return _LEVELS.get(name, "budget")


@dataclass(frozen=True, eq=False)
class EvalRow:
    """One line of the table before it is measured.

    Attributes:
        label: names it: the method and its parameters as they were given. method: None is the model as it is.
        options: of `patch`. described: the method in JSON types.
    """

    label: str
    method: Method | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    described: Mapping[str, Any] | None = None

    @property
    def level(self) -> float | int | None:
        """The value of `level_field`; None where it has none, or no number."""
        value = None if self.described is None else self.described.get(level_field(self.described["method"]))
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def usual(self) -> bool:
        """Whether nothing but the level differs from the method's defaults, which are the papers'."""
        if self.method is None or self.described is None:
            return True
        name = level_field(self.described["method"])
        try:
            other = type(self.method)(**({} if self.level is None else {name: self.level}))
        except TokredError:  # a method without defaults, such as one that wants a schedule
            return False
        return not self.options and other.to_dict() == self.described

    @property
    def key(self) -> str:
        """The same for the same method with the same parameters; names the records."""
        if self.described is None:
            return "unpatched"
        level = "" if self.level is None else f" {self.level:g}"
        return f"{self.described['method']}{level} {json.dumps([self.described, self.options], sort_keys=True)}"

    @property
    def random(self) -> bool:
        """Whether its choice is drawn anew for each batch."""
        return drawn(self.method)

    def numbered(self, number: int) -> Method | None:
        """The method for batch `number`."""
        return None if self.method is None else redrawn(self.method, number)


def make_rows(chosen: Sequence[Chosen], known: Sequence[str]) -> list[EvalRow]:
    """The unpatched row, then each method once.

    Args:
        known: names of the methods that fit the model.

    Raises:
        UnknownMethodError: one that does not.
    """
    rows, seen = [EvalRow("unpatched")], {"unpatched"}
    for label, method, options in chosen:
        if method.name not in known:
            raise UnknownMethodError(f"--method {method.name} does not fit this model; that fit: {', '.join(known)}")
        row = EvalRow(label, method, options, method.to_dict())
        if row.key not in seen:
            rows.append(row)
            seen.add(row.key)
    return rows


# -- what papers say ---------------------------------------------------------------------------------------------------


def _numbers(names: str, row: Sequence[float | None]) -> dict[str, float]:
    return {name: value for name, value in zip(names.split(), row, strict=True) if value is not None}


_HIRED = "HiRED, Table 3 (MME: perception)"
_SIX = "HiRED, Table 6 (ScienceQA and VQAv2 cells are suspect)"
_MUSTDROP = "MustDrop, as later papers quote it (MME: perception + cognition)"
_SECOND = "a later paper's table, not the method's own (MME: perception + cognition)"
_QUOTA = "QuoTA, Table 1"
#: (model, method, budget): (source, {benchmark: number}); fractions are budgets of all tokens, counts are tokens
_REPORTED: list[tuple[str, str, float | int | None, str, dict[str, float]]] = [
    *[
        (model, "hired", budget, _HIRED, _numbers("vqav2 scienceqa textvqa docvqa mme pope", row))
        for model, rows in {
            "llava-v1.6-vicuna-7b": (
                (None, (80.3, 73.2, 64.8, 73.4, 1519, 87.6)),
                (0.4, (78.8, 73.8, 63.6, 68.7, 1474, 88.2)),
                (0.2, (77.5, 73.4, 61.4, 60.8, 1483, 87.0)),
            ),
            "llava-v1.6-vicuna-13b": (
                (None, (80.9, 73.6, 66.9, 77.5, 1572, 87.1)),
                (0.4, (79.3, 73.2, 65.2, 72.5, 1570, 87.7)),
                (0.2, (77.9, 71.9, 63.6, 64.3, 1545, 86.7)),
            ),
        }.items()
        for budget, row in rows
    ],
    *[
        ("llava-1.5-7b", "hired", budget, _SIX, _numbers("scienceqa vqav2 textvqa docvqa", row))
        for budget, row in (
            (None, (69.5, 76.6, 46.1, 28.1)),
            (0.4, (67.2, 79.0, 47.0, 29.4)),
            (0.2, (66.4, 74.7, 44.2, 24.6)),
        )
    ],
    *[
        ("llava-1.5-7b", method, tokens, source, _numbers("gqa mme pope scienceqa vqav2 textvqa", row))
        for method, tokens, source, row in (
            ("*", None, _MUSTDROP, (61.9, 1862, 85.9, 69.5, 78.5, 58.2)),
            ("mustdrop", 192, _MUSTDROP, (58.2, 1787, 82.6, 69.2, 76.0, 56.5)),
            ("mustdrop", 128, _MUSTDROP, (56.9, 1745, 78.7, 68.5, 74.6, 56.3)),
            ("mustdrop", 64, _MUSTDROP, (53.1, 1612, 68.0, 63.4, 69.3, 54.2)),
            ("fastv", 192, _SECOND, (52.7, 1612, 64.8, 67.3, 67.1, 52.5)),
            ("fastv", 128, _SECOND, (49.6, 1490, 59.6, 60.2, 61.8, 50.6)),
            ("fastv", 64, _SECOND, (46.1, 1256, 48.0, 51.1, 55.0, 47.8)),
            ("sparsevlm", 192, _SECOND, (59.5, 1787, 85.3, 68.7, 75.6, 57.8)),
            ("sparsevlm", 128, _SECOND, (58.4, 1746, 85.0, 68.6, 73.8, 56.7)),
            ("sparsevlm", 64, _SECOND, (53.8, 1589, 77.5, 69.8, 68.2, 53.4)),
            ("pyramiddrop", 192, _SECOND, (57.3, 1797, 82.3, 69.2, 75.1, 56.5)),
            ("pyramiddrop", 128, _SECOND, (57.1, 1761, 82.3, 68.4, 72.9, 56.6)),
            ("pyramiddrop", 64, _SECOND, (47.5, 1561, 55.9, 69.0, 69.2, 50.6)),
            ("visionzip", 192, _SECOND, (59.3, 1782, 85.3, 68.9, 76.8, 57.3)),
            ("visionzip", 128, _SECOND, (57.6, 1761.7, 83.2, 68.9, 75.6, 56.8)),
            ("visionzip", 64, _SECOND, (55.1, 1690, 77.0, 69.0, 72.4, 55.5)),
            ("dart", 192, _SECOND, (60.0, 1856, 82.8, 69.8, 76.7, 57.4)),
            ("dart", 128, _SECOND, (58.7, 1840, 80.1, 69.1, 75.9, 56.4)),
            ("dart", 64, _SECOND, (55.9, 1765, 73.9, 69.8, 72.4, 54.4)),
            ("cdpruner", 192, _SECOND, (60.3, None, 87.3, 68.8, None, None)),
            ("vispruner", 128, _SECOND, (58.4, None, 85.0, 69.1, 75.8, 57.2)),
            ("vispruner", 64, _SECOND, (55.6, None, 80.4, 68.5, 72.6, 55.9)),
            ("divprune", 128, _SECOND, (59.4, None, 87.0, 68.5, 76.0, 55.9)),
            ("divprune", 64, _SECOND, (57.7, None, 85.5, 67.9, 74.2, 54.5)),
            ("divprune", 32, _SECOND, (54.9, None, 81.5, 68.7, 71.2, 52.9)),
            ("cdpruner", 128, _SECOND, (59.6, None, 87.5, 69.0, 76.6, 56.1)),
            ("cdpruner", 64, _SECOND, (58.6, None, 87.5, 68.0, 75.3, 55.1)),
            ("cdpruner", 32, _SECOND, (56.9, None, 87.7, 69.4, 73.5, 53.2)),
        )
    ],
    ("llava-onevision-qwen2-7b", "quota", None, _QUOTA, {"videomme": 58.1, "videomme+subtitles": 66.9, "mlvu": 64.7}),
    ("llava-onevision-qwen2-7b", "quota", 12544, _QUOTA, {"videomme": 60.7, "videomme+subtitles": 68.0, "mlvu": 69.7}),
    ("llava-video-7b", "quota", None, _QUOTA, {"videomme": 63.3, "videomme+subtitles": 69.5, "mlvu": 70.8}),
    ("llava-video-7b", "quota", 12544, _QUOTA, {"videomme": 65.9, "videomme+subtitles": 70.0, "mlvu": 71.9}),
]  # fmt: skip
#: visual tokens of the models whose budgets papers give as counts
_WHOLE = {"llava-1.5-7b": 576}


def reported(model: str, benchmark: str, row: EvalRow, asked: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What papers print of this row: [{"value", "source"}]; nothing where none does, or not at this budget.

    Args:
        model: as it was given, an id or a path that ends in one. asked: names of the methods of the run, whose papers'
            unreduced numbers stand beside the unpatched row.
    """
    name = model.rstrip("/").rpartition("/")[2].lower()
    found = []
    for family, method, budget, source, numbers in _REPORTED:
        if family not in name or benchmark not in numbers:
            continue
        if row.described is None:
            fits = budget is None and ((method == "*" and bool(asked)) or method in asked)
        else:
            same = method == row.described["method"] and row.usual
            fits = same and budget is not None and _same(budget, row.level, family)
        if fits:
            found.append({"value": numbers[benchmark], "source": source})
    return found


def _same(budget: float | int, level: float | int | None, family: str) -> bool:
    if level is None:
        return False
    if isinstance(budget, float) == isinstance(level, float):
        return budget == level
    whole = _WHOLE.get(family)
    if whole is None:
        return False
    counts = [value if isinstance(value, int) else int(value * whole + 1e-6) for value in (budget, level)]
    return counts[0] == counts[1]
