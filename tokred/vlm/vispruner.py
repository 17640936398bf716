"""VisPruner: important tokens by attention, and diverse ones among the rest (arXiv 2412.01818, ICCV 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_budget, check_choice, check_count
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep
from tokred.vlm.select import (
    attention_received,
    attention_source,
    check_share,
    exact,
    groups,
    keep_marked,
    needed_attention,
    partition_budgets,
    require_uniform,
    unit,
)

__all__ = ["VisPruner", "remove_duplicates", "vispruner_mask"]


def remove_duplicates(features: Tensor, residual: Tensor, count: int, step: int = 8) -> Tensor:
    """(B, count): what is left of `residual` (B, R), positions in features (B, n, C), when duplicates are removed.

    At most `step` at a time: of the tokens at even places of the list, those most similar to any at an odd place go.
    The list goes on with the even survivors, most similar first, then the odd ones (released order).
    """
    if count == 0:
        return residual[:, :0]
    x = unit(features)
    items = torch.arange(len(x), device=x.device)[:, None]
    while residual.shape[1] > count:
        even, odd = residual[:, 0::2], residual[:, 1::2]
        # of an odd number of tokens the released shapes assume one even place too few
        removed = min(step, residual.shape[1] - count, even.shape[1])
        with exact(x):
            closest = (x[items, even] @ x[items, odd].transpose(1, 2)).amax(dim=2)
        survivors = even.gather(1, ops.rank(closest)[:, removed:])
        residual = torch.cat([survivors, odd], dim=1)
    return residual


def vispruner_mask(scores: Tensor, features: Tensor, count: int, important: int, step: int = 8) -> Tensor:
    """(B, n) bool: the `important` best by scores (B, n), and count - important of the rest without duplicates."""
    order = ops.rank(scores)
    diverse = remove_duplicates(features, order[:, important:], count - important, step)
    kept = torch.cat([order[:, :important], diverse], dim=1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)


@dataclass(frozen=True, repr=False)
class VisPruner(VisualMethod):
    """Keep what the class token attends to, and of the rest what is not a duplicate.

    Follows Theia-4869/VisPruner at aefa01ad (its shapes for an odd number of tokens put right). Each tile of an image,
    or frame of a video, has its own budget. Similarity is that of the tower's tokens before the projector; where
    the projector mixes tokens, that of the features of the language model. ``important=1`` is FasterVLM.

    Attributes:
        budget: fraction of the tokens of each tile or frame, or a number of tokens for the whole image or video.
        important: rho in [0, 1], the part of the budget that goes by attention (rounded down).
        step: tokens removed at most between two looks at the similarities.
        positions, keep_newline: see `VisualMethod`.
    """

    budget: float | int = 1 / 9
    important: float = 0.5
    step: int = 8
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False

    name: ClassVar[str] = "vispruner"
    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = "VisPruner: Beyond Text-Visual Attention (ICCV 2025, arXiv 2412.01818)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_share("important", self.important)
        check_count("step", self.step, minimum=1)
        check_choice("positions", self.positions, (None, "compact", "original"))

    def needs(self, tower: TowerInfo) -> Needs:
        needs = needed_attention("VisPruner", "auto", tower, (tower.feature_layer,))
        return dataclasses.replace(needs, hidden=tower.projects)

    def kept(self, layout: MediaLayout) -> int:
        require_uniform("VisPruner", layout)
        return sum(partition_budgets("VisPruner", self.budget, layout))

    def select(self, view: VisualFeatures) -> Keep:
        require_uniform("VisPruner", view.layout)
        source = attention_source("VisPruner", "auto", view.tower)
        scores = view.at_tokens(attention_received(view, source, view.tower.feature_layer))
        features = view.at_tokens(view.hidden()) if view.tower.projects else view.features
        marked = torch.zeros_like(scores, dtype=torch.bool)
        for _, tokens, count in groups(view.layout, partition_budgets("VisPruner", self.budget, view.layout)):
            tokens = tokens.to(scores.device)  # (Q, n)
            own = (scores[:, tokens].flatten(0, 1), features[:, tokens].flatten(0, 1))
            mask = vispruner_mask(*own, count, int(count * self.important), self.step)
            marked[:, tokens] = mask.unflatten(0, (view.items, -1))
        return keep_marked(marked)

    def scoring_macs(self, tower: TowerInfo, layout: MediaLayout, width: int) -> int:
        total = 0
        for members, tokens, count in groups(layout, partition_budgets("VisPruner", self.budget, layout)):
            left, target = tokens.shape[1] - int(count * self.important), count - int(count * self.important)
            while target and left > target:
                total += len(members) * (left - left // 2) * (left // 2) * tower.dim
                left -= min(self.step, left - target, left - left // 2)
        return total + layout.total_cells * tower.dim
