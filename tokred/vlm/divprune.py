"""DivPrune: the most diverse tokens, by greedy max-min distance (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.budget import check_budget, check_choice
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep
from tokred.vlm.select import check_fits, exact, unit

__all__ = ["DivPrune", "max_min_diverse"]

#: rows of a block of the distance matrix, which is never stored as a whole
_BLOCK = 1024


def max_min_diverse(features: Tensor, count: int) -> Tensor:
    """(G, count) int64, ascending: greedy max-min choice among features (G, n, D) by cosine distance.

    The first token is the one whose nearest other token is farthest; then always the one whose nearest chosen token
    is farthest. Ties go to the lower token. Time O(n^2 D) for the first token and O(n D) for each other.
    """
    x = unit(features)
    chosen = [_most_isolated(x)]
    nearest = torch.full(x.shape[:2], math.inf, dtype=x.dtype, device=x.device)
    with exact(x):
        for _ in range(count - 1):
            last = x.gather(1, chosen[-1][:, None, None].expand(-1, 1, x.shape[2]))
            nearest = torch.minimum(nearest, 1 - (x @ last.transpose(1, 2))[:, :, 0])
            nearest = nearest.scatter(1, chosen[-1][:, None], -math.inf)  # a chosen one is never chosen again
            chosen.append(nearest.argmax(dim=1))
    return torch.stack(chosen, dim=1).sort(dim=1).values


def _most_isolated(x: Tensor) -> Tensor:
    """(G,) the token of x (G, n, D), unit rows, with the largest distance to its nearest other."""
    closest = []
    with exact(x):
        for start in range(0, x.shape[1], _BLOCK):
            similarity = x[:, start : start + _BLOCK] @ x.transpose(1, 2)
            rows = torch.arange(similarity.shape[1], device=x.device)
            similarity[:, rows, rows + start] = -math.inf
            closest.append(similarity.amax(dim=2))
    return torch.cat(closest, dim=1).argmin(dim=1)


@dataclass(frozen=True, repr=False)
class DivPrune(VisualMethod):
    """Keep the tokens that are most unlike each other, whatever the question and the attention.

    Written from the equations: the released code (vbdi/divprune, CC BY-NC) was not used. It counts on 35 tokens before
    the image and picks already chosen tokens again once only duplicates are left; neither happens here.

    Attributes:
        budget: fraction of the tokens of an image or video, tiles and frames together, rounded to the nearest whole
            number as released (0.098 is 56 of 576); or their number.
        positions, keep_newline: see `VisualMethod`.
    """

    budget: float | int = 0.098
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False

    name: ClassVar[str] = "divprune"
    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "DivPrune: Diversity-based Visual Token Pruning (CVPR 2025, arXiv 2503.02175)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_choice("positions", self.positions, (None, "compact", "original"))

    def kept(self, layout: MediaLayout) -> int:
        total = len(layout.cells)
        check_fits("DivPrune", self.budget, total)
        return self.budget if isinstance(self.budget, int) else min(max(round(self.budget * total), 1), total)

    def select(self, view: VisualFeatures) -> Keep:
        return Keep(max_min_diverse(view.features, self.kept(view.layout)))

    def scoring_macs(self, tower: TowerInfo, layout: MediaLayout, width: int) -> int:
        n = len(layout.cells)
        return (n + self.kept(layout) - 1) * n * width
