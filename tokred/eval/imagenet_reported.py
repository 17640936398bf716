"""Accuracies on ImageNet-1k that papers report, for the rows of `tokred eval imagenet` that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokred.core.method import Method, resolve

__all__ = ["REPORTED", "Reported", "paper_runs", "reported"]


@dataclass(frozen=True)
class Reported:
    """One published row.

    Attributes:
        architecture, tag: timm's names; the tag says which released weights. method: name and parameters; None is the
            model as it is. top1, top5: percent. gmacs: where the paper prints them. source: which table.
    """

    architecture: str
    tag: str
    method: tuple[str, dict[str, Any]] | None
    top1: float
    source: str
    top5: float | None = None
    gmacs: float | None = None


_TOME = "ToMe, README of the code, off the shelf"
# which of timm's weights that README used is not said there: these have its accuracies
_AUGREG = "augreg_in21k_ft_in1k"
_ZERO = "Zero-TPrune, table of DeiT-S without fine-tuning"
_PLOT = "Zero-TPrune, project page: ToMe read from a plot, ±0.05"
_STRIP = "Strip-MLP, README of the code"
_S = "deit_small_patch16_224"


def _plot(r: int, top1: float, gmacs: float) -> Reported:
    return Reported(_S, "fb_in1k", ("tome", {"r": r}), top1, _PLOT, gmacs=gmacs)


def _zero(preset: str, top1: float, gmacs: float, name: str) -> Reported:
    # the authors' schedules were not published: the presets are ours, of the same shape at that cost
    return Reported(_S, "fb_in1k", ("zero_tprune", {"preset": preset}), top1, f"{_ZERO}: {name}", gmacs=gmacs)


def _strip(size: str, top1: float, top5: float, gmacs: float) -> Reported:
    return Reported(f"strip_mlp_{size}", "in1k", None, top1, _STRIP, top5, gmacs)


REPORTED = (
    Reported(_S, "fb_in1k", None, 79.8, _ZERO, gmacs=4.55),
    _zero("deit_s_2.97g", 79.4, 2.97, "Zero-TP-a"),
    _zero("deit_s_2.50g", 79.1, 2.50, "Zero-TP-b"),
    _zero("deit_s_3.97g", 79.8, 3.97, "Zero-TP-c"),
    _zero("deit_s_3.08g", 79.4, 3.08, "ablation, with S-stage"),
    _plot(8, 79.4, 3.43),
    _plot(10, 79.3, 3.14),
    _plot(12, 78.9, 2.85),
    _plot(14, 78.6, 2.57),
    _plot(16, 78.0, 2.30),
    Reported("deit_tiny_patch16_224", "fb_in1k", None, 72.136, "Zero-TPrune, notebooks of the authors", gmacs=1.259),
    Reported("deit_base_patch16_224", "fb_in1k", None, 81.794, "Zero-TPrune, notebooks of the authors", gmacs=17.583),
    Reported("vit_small_patch16_224", _AUGREG, None, 81.41, _TOME),
    Reported("vit_small_patch16_224", _AUGREG, ("tome", {"r": 13}), 79.30, _TOME),
    Reported("vit_base_patch16_224", _AUGREG, None, 84.57, _TOME),
    Reported("vit_base_patch16_224", _AUGREG, ("tome", {"r": 13}), 82.60, _TOME),
    Reported("vit_large_patch16_224", _AUGREG, None, 85.82, _TOME),
    Reported("vit_large_patch16_224", _AUGREG, ("tome", {"r": 7}), 84.26, _TOME),
    Reported("vit_large_patch16_384", _AUGREG, None, 86.92, _TOME),
    Reported("vit_large_patch16_384", _AUGREG, ("tome", {"r": 23}), 86.14, _TOME),
    _strip("tiny_light", 81.2, 95.6, 2.5),
    _strip("tiny", 82.2, 96.1, 3.7),
    _strip("small", 83.3, 96.6, 6.8),
    _strip("base", 83.6, 96.5, 9.2),
)


def reported(architecture: str | None, tag: str | None, method: Method | None) -> Reported | None:
    """What a paper says of a model under a method; None where none does.

    Args:
        architecture: timm's name; None is a model that timm does not name. tag: of its released weights; None (weights
            from a file) fits every tag.
    """
    for row in REPORTED:
        if row.architecture == architecture and tag in (None, row.tag):
            theirs = resolve(*row.method)[0] if row.method is not None else None
            if theirs == method:
                return row
    return None


def paper_runs(architecture: str | None, tag: str | None) -> Sequence[tuple[str, dict[str, Any]]]:
    """Every method and setting of which a paper reports the accuracy with this model."""
    rows = [r for r in REPORTED if r.architecture == architecture and tag in (None, r.tag)]
    return [row.method for row in rows if row.method is not None]
