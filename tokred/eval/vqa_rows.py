"""Rows of an evaluation: methods at budgets, as they are written on a command line, and what papers say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokred.core.errors import InvalidParameterError, UnknownMethodError, nearest
from tokred.core.method import Method, registered

__all__ = ["EvalRow", "Wanted", "level_field", "make_rows", "parse_methods", "reported"]

#: the parameter that is the budget, where it is not called so
_LEVELS = {
    "corematching": "keep_tokens",
    "gemfilter": "k",
    "mustdrop": "preset",
    "tome": "r",
    "topk": "keep_rate",
    "zero_tprune": "keep_rate",
}


def level_field(name: str) -> str:
    """The parameter of a method that its budget on the command line sets."""
    return _LEVELS.get(name, "budget")


@dataclass(frozen=True)
class Wanted:
    """A method by name, with budgets of its own (none: those of the whole run)."""

    name: str
    levels: tuple[float | int, ...] = ()


@dataclass(frozen=True, eq=False)
class EvalRow:
    """One line of the table before it is measured.

    Attributes:
        label: of the table. method: None is the model as it is. level: its budget, None without one.
        described: the method in JSON types.
    """

    label: str
    method: Method | None = None
    level: float | int | None = None
    described: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """The same for the same method with the same parameters; names the records."""
        if self.described is None:
            return "unpatched"
        name = self.described["method"] + ("" if self.level is None else f" {self.level:g}")
        return f"{name} {json.dumps(self.described, sort_keys=True)}"

    @property
    def random(self) -> bool:
        """Whether its choice is drawn anew for each batch."""
        return self.described is not None and self.described["method"].startswith("random")

    def numbered(self, number: int) -> Method | None:
        """The method for batch `number`."""
        if not self.random or self.method is None:
            return self.method
        return self.method.replace(seed=self.method.seed + number)  # type: ignore[attr-defined]


def parse_methods(text: str) -> list[Wanted]:
    """``hired:0.2:0.4,gemfilter:1024,evs``: names, each with its own budgets where it has some.

    Raises:
        InvalidParameterError: a budget is no number.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, *levels = part.split(":")
        found.append(Wanted(name.strip().replace("-", "_"), tuple(parse_level(level) for level in levels)))
    return found


def parse_level(text: str) -> float | int:
    """A count (192) or a fraction (0.2)."""
    try:
        return float(text) if any(letter in text for letter in ".eE") else int(text)
    except ValueError:
        raise InvalidParameterError(f"{text!r} is no budget; expected a fraction such as 0.2 or a count") from None


def make_rows(
    wanted: Sequence[Wanted],
    budgets: Sequence[float | int],
    settings: Mapping[str, Mapping[str, Any]],
    known: Sequence[str],
) -> list[EvalRow]:
    """The unpatched row, then each method at each budget; a method without any budget has one row.

    Args:
        settings: {method: {parameter: value}}. known: names of the methods that fit the model.

    Raises:
        UnknownMethodError: no such method here. InvalidParameterError, UnknownParameterError: of a method.
    """
    rows, seen = [EvalRow("unpatched")], {"unpatched"}
    for name in settings:
        if name not in {one.name for one in wanted}:
            raise InvalidParameterError(f"--set {name}...: it is not among --methods")
    for one in wanted:
        if one.name not in known:
            what = "does not fit this model" if one.name in registered() else "is no method"
            raise UnknownMethodError(
                f"--methods {one.name} {what}{nearest(one.name, known)}; that fit: {', '.join(known)}"
            )
        own, kind = dict(settings.get(one.name, {})), registered()[one.name]
        field = level_field(one.name)
        fixed = field in own
        if fixed and one.levels:
            raise InvalidParameterError(f"--set {one.name}.{field} and --methods {one.name}:... say it twice")
        levels: Sequence[float | int | None] = (own[field],) if fixed else (one.levels or budgets or (None,))
        for level in levels:
            method = kind(**own, **({} if level is None or fixed else {field: level}))  # type: ignore[call-arg]
            row = EvalRow(method.title, method, level, method.to_dict())
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
            fits = method == row.described["method"] and budget is not None and _same(budget, row.level, family)
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
