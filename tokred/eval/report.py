"""Tables for a terminal, JSON, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Curve",
    "Look",
    "Panel",
    "accuracy_figure",
    "accuracy_plot",
    "contact_sheet",
    "curves",
    "dumps",
    "percent",
    "signed",
    "stacked",
    "table",
    "token_chain",
]

_INK, _FAINT, _GOOD, _BAD = "#1f2430", "#6b7280", "#15803d", "#b91c1c"


# -- text --------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], left: int = 1) -> str:
    """Lay out a plain-text table.

    Args:
        header: column titles. groups: rows of cells, in groups that a rule divides.
        left: so many columns from the left are set flush left, the others flush right.
    """
    rows = [row for group in groups for row in group]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    parts = [line(header), rule]
    for number, group in enumerate(groups):
        parts += [rule] * bool(number) + [line(row) for row in group]
    return "\n".join(parts)


def token_chain(total: int, counts: Sequence[int], longest: int = 5) -> str:
    """Write the tokens that leave each block compactly: ``144>101>71``; a long chain is cut in the middle."""
    chain = [total]
    for count in counts:
        if count != chain[-1]:
            chain.append(count)
    if len(chain) > longest:
        return f"{chain[0]}>{chain[1]}>{chain[2]}>..>{chain[-1]}"
    return ">".join(map(str, chain))


def percent(value: float, error: float) -> str:
    """An accuracy and its standard error, fractions, as ``93.1 ±0.8``."""
    return f"{100 * value:.1f} ±{100 * error:.1f}"


def signed(found: Mapping[str, Any] | None) -> str:
    """A paired difference (`Estimate.to_dict`) in points; * better, ! worse by more than two standard errors."""
    if found is None:
        return ""
    mark = ("*" if found["difference"] > 0 else "!") if found["significant"] else " "
    return f"{100 * found['difference']:+.1f} ±{100 * found['se']:.1f} {mark}"


def dumps(data: Any) -> str:
    """JSON with NaN as null (a standard error of one observation)."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# -- pictures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One picture of a contact sheet with its caption; `good` colours the caption green or red."""

    image: Image
    caption: str = ""
    good: bool | None = None


def contact_sheet(
    rows: Sequence[Sequence[Panel]],
    side: int,
    titles: Sequence[tuple[int, str, str]] = (),
    heading: str = "",
    gap: int = 10,
) -> Image:
    """Paste panels into rows and columns.

    Args:
        rows: panels; rows may have different lengths. side: of a panel in pixels (panels are resized to it, with hard
            pixel edges when they grow).
        titles: (columns, title, subtitle) of column groups from the left; groups stand further apart than panels.
        heading: one line above everything.
    """
    from PIL import Image, ImageDraw

    title_font, font = _font(15), _font(12)
    spans = [columns for columns, _, _ in titles]
    starts = [sum(spans[:number]) for number in range(len(spans))]
    columns = max(len(row) for row in rows)
    lefts = [gap + i * (side + gap) + 2 * gap * sum(i >= start for start in starts[1:]) for i in range(columns)]
    caption = 20 if any(panel.caption for row in rows for panel in row) else 0
    top = gap + (26 if heading else 0) + (44 if titles else 0)
    width = lefts[-1] + side + gap
    height = top + len(rows) * (side + caption + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((gap, gap), _fit(draw, heading, title_font, width - 2 * gap), _INK, title_font)
    for number, (span, title, subtitle) in enumerate(titles):
        x, y = lefts[starts[number]], top - 44
        room = lefts[starts[number] + span - 1] + side - x
        draw.text((x, y), _fit(draw, title, title_font, room), _INK, title_font)
        draw.text((x, y + 20), _fit(draw, subtitle, font, room), _FAINT, font)
        draw.line((x, y + 39, x + room, y + 39), "#d1d5db")
    for y, row in zip(range(top, height, side + caption + gap), rows, strict=True):
        for x, panel in zip(lefts, row, strict=False):
            kind = Image.Resampling.NEAREST if panel.image.width <= side else Image.Resampling.LANCZOS
            sheet.paste(panel.image.convert("RGB").resize((side, side), kind), (x, y))
            draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#d1d5db")
            colour = _FAINT if panel.good is None else (_GOOD if panel.good else _BAD)
            draw.text((x, y + side + 3), _fit(draw, panel.caption, font, side), colour, font)
    return sheet


def stacked(sections: Sequence[tuple[str, Image]], gap: int = 10) -> Image:
    """Pictures one below the other, each under its title."""
    from PIL import Image, ImageDraw

    title_font, bar = _font(15), 24
    height = sum(picture.height + bar + gap for _, picture in sections) + gap
    sheet = Image.new("RGB", (max(picture.width for _, picture in sections) + 2 * gap, height), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for title, picture in sections:
        draw.text((gap, y), _fit(draw, title, title_font, sheet.width - 2 * gap), _INK, title_font)
        sheet.paste(picture, (gap, y + bar))
        y += picture.height + bar + gap
    return sheet


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fit(draw: Any, text: str, font: Any, room: int) -> str:
    """Shorten `text` to `room` pixels."""
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "...", font) > room:
        text = text[:-1]
    return text + "..."


@dataclass(frozen=True)
class Curve:
    """One method in the plot: (cost, accuracy, standard error) by level, and the same of its random twin, if any."""

    label: str
    points: Sequence[tuple[float, float, float]]
    floor: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False


def curves(rows: Sequence[Mapping[str, Any]], cost: str) -> list[Curve]:
    """A curve for each label of the rows that have a level, over their `cost`; that of random choice is dashed."""
    mine: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["level"] is not None:
            mine.setdefault(row["label"], []).append(row)
    return [
        Curve(
            label, [(row[cost], row["accuracy"], row["accuracy_se"]) for row in own], dashed=own[0]["kind"] == "random"
        )
        for label, own in mine.items()
    ]


@dataclass(frozen=True)
class Look:
    """How a plot is drawn.

    Attributes:
        ink, faint, grid: colours of writing and of what is unpatched, of small writing, of the grid.
        styles: matplotlib's line properties of a curve, by its label; those of the others come one after the other.
        size: inches. below: the legend stands below the axes, where it covers no point.
    """

    ink: str = _INK
    faint: str = _FAINT
    grid: str = "#e5e7eb"
    styles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    size: tuple[float, float] = (8, 5)
    below: bool = False


def accuracy_plot(
    path: Path,
    curves: Sequence[Curve],
    unpatched: tuple[float, float, float],
    title: str,
    subtitle: str,
    cost: str = "GMACs per image (multiply-adds, scoring included)",
    of: str = "scenes",
    whole: str = "unpatched",
    ticks: Sequence[float] = (),
) -> None:
    """Plot accuracy against cost; bars are one standard error, accuracies are fractions.

    `cost` and `of` name the axes, `whole` the point without reduction; `ticks` are marks of a logarithmic axis.
    """
    figure = accuracy_figure(curves, unpatched, cost, f"accuracy on held-out {of}, %", whole, ticks)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    figure.axes[0].set_title(subtitle, loc="left", fontsize=9, color=_FAINT)
    figure.savefig(path)


def accuracy_figure(
    curves: Sequence[Curve],
    unpatched: tuple[float, float, float] | None,
    cost: str,
    accuracy: str,
    whole: str = "unpatched",
    ticks: Sequence[float] = (),
    look: Look | None = None,
) -> Any:
    """The matplotlib figure of `accuracy_plot`, without a title; `cost` and `accuracy` name the axes.

    Without `unpatched` the point and the band of the model as it is are left out.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no screen

    look = look or Look()
    figure = Figure(figsize=look.size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#6b7280", "#be185d", "#1e3a8a",
               "#78350f", "#4d7c0f", "#f472b6")  # fmt: skip
    if unpatched is not None:
        most, value, error = unpatched
        error = error if math.isfinite(error) else 0
        axes.axhspan(100 * (value - error), 100 * (value + error), color=look.ink, alpha=0.08, lw=0)
        axes.axhline(100 * value, color=look.ink, lw=1, ls=":")
        axes.plot([most], [100 * value], "s", color=look.ink, ms=7, label=whole, zorder=4)
    dashed = {"marker": "x", "ms": 6, "lw": 1.2, "ls": "--", "alpha": 0.65}
    for number, curve in enumerate(curves):
        own = look.styles.get(curve.label, {"color": colours[number % len(colours)]})
        style = dashed if curve.dashed else {"marker": "o", "ms": 6, "lw": 2}
        _plot(axes, curve.points, label=curve.label, **{**style, **own})
        if curve.floor:
            _plot(axes, curve.floor, color=own["color"], label=f"{curve.label}: random twin", **dashed)
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(cost)
    axes.set_ylabel(accuracy)
    axes.grid(color=look.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if look.below:
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=9, loc="lower right" if len(curves) <= 8 else "best")
    return figure


def _plot(axes: Any, points: Sequence[tuple[float, float, float]], **style: Any) -> None:
    x, y, e = zip(*sorted(points), strict=True)
    bars = [100 * error if math.isfinite(error) else 0 for error in e]
    axes.errorbar(x, [100 * value for value in y], bars, capsize=3, elinewidth=1, **style)
