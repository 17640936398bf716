"""VisionZip: dominant tokens, and the rest merged into a few contextual ones (arXiv 2412.04467, CVPR 2025)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_budget, check_choice
from tokred.core.errors import InvalidParameterError
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Resample
from tokred.vlm.select import (
    attention_received,
    attention_source,
    exact,
    groups,
    needed_attention,
    partition_budgets,
    require_uniform,
    unit,
)

__all__ = ["VisionZip", "contextual_assignment", "dominant_tokens", "merge_contextual"]

#: contextual tokens of a budget in the paper: 10 of 64, 20 of 128, 30 of 192
PAPER_SHARE = 10 / 64


def dominant_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of scores (B, n), and the rest: (B, count) and (B, n - count), both ascending."""
    marked = torch.zeros_like(scores, dtype=torch.uint8).scatter(1, ops.top_indices(scores, count), 1)
    order = ops.rank(marked)
    return order[:, :count], order[:, count:]


def contextual_assignment(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Targets among n tokens, every (n // count)-th, and the most similar target of each token.

    Args:
        keys: (B, n, d) keys, mean over heads.

    Returns:
        targets (count,) positions, and assignment (B, n) into them; a target is assigned to itself.
    """
    n = keys.shape[1]
    targets = torch.arange(count, device=keys.device) * max(n // count, 1)
    keys = unit(keys)
    with exact(keys):
        assignment = (keys @ keys[:, targets].transpose(1, 2)).argmax(dim=2)
    return targets, assignment.index_copy(1, targets, torch.arange(count, device=keys.device).expand(len(keys), -1))


def merge_contextual(x: Tensor, targets: Tensor, assignment: Tensor, normalise: bool = False) -> Tensor:
    """(B, count, C): each target plus the mean of the tokens (B, n, C) assigned to it, as released: a sum, not a mean.

    `normalise` gives the mean of the target and its tokens instead.
    """
    count = targets.shape[0]
    own = x[:, targets]
    if normalise:
        return ops.merge_tokens(x, assignment, count, weights=torch.ones_like(assignment, dtype=torch.float32))[0]
    others = assignment.index_fill(1, targets, -1)
    weights = torch.ones_like(assignment, dtype=torch.float32)
    return own + ops.merge_tokens(x, others, count, weights=weights)[0]


@dataclass(frozen=True, repr=False)
class VisionZip(VisualMethod):
    """Keep the tokens that the class token attends to, and it; merge the rest into targets spread over the image.

    Follows dvlab-research/VisionZip at 3151f6df. Each tile of an image, or frame of a video, has its own budget and
    is answered with its dominant tokens (class token first, then raster order) and then its contextual ones. Merging
    happens in the space of the tower where its tokens can be projected one by one; elsewhere (pixel shuffle, Qwen) in
    that of the language model, and without a class token. Towers without one are scored by the attention received
    from all tokens.

    Attributes:
        budget: fraction of the tokens of each tile or frame, or a number of tokens for the whole image or video; it
            includes class token and contextual tokens.
        contextual: the part of the budget for contextual tokens, a fraction in [0, 1) or a number for the whole image
            or video; None is the paper's 10 of 64 (rounded down).
        normalise: contextual tokens are means, not released sums of the target and the mean of its tokens.
        positions, keep_newline: see `VisualMethod`. Contextual tokens have the place of their target.
    """

    budget: float | int = 1 / 9
    contextual: float | int | None = None
    normalise: bool = False
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False

    name: ClassVar[str] = "visionzip"
    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary (CVPR 2025, arXiv 2412.04467)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_choice("positions", self.positions, (None, "compact", "original"))
        if self.contextual is not None and self.contextual != 0:
            object.__setattr__(self, "contextual", check_budget("contextual", self.contextual))
        if isinstance(self.contextual, float) and self.contextual == 1:
            raise InvalidParameterError("contextual=1.0: expected a fraction in [0, 1) of the budget, or a count")
        if isinstance(self.contextual, int) and isinstance(self.budget, int) and self.contextual > self.budget:
            raise InvalidParameterError(f"contextual={self.contextual} is more than the whole budget={self.budget}")

    def needs(self, tower: TowerInfo) -> Needs:
        layers = (tower.feature_layer,)
        needs = needed_attention("VisionZip", "auto", tower, layers)
        return dataclasses.replace(needs, keys=frozenset(layers), hidden=tower.projects)

    def kept(self, layout: MediaLayout) -> int:
        require_uniform("VisionZip", layout)
        return sum(partition_budgets("VisionZip", self.budget, layout))

    def split(self, layout: MediaLayout) -> list[tuple[int, int]]:
        """(dominant, contextual) tokens of each partition."""
        budgets = partition_budgets("VisionZip", self.budget, layout)
        share, parts = self.contextual, len(budgets)
        if share is None:
            share = PAPER_SHARE
        if isinstance(share, float):
            merged = [int(budget * share) for budget in budgets]
        else:
            merged = [share * (p + 1) // parts - share * p // parts for p in range(parts)]
        return [(budget - min(c, budget), min(c, budget)) for budget, c in zip(budgets, merged, strict=True)]

    def select(self, view: VisualFeatures) -> Sequence[Resample]:
        require_uniform("VisionZip", view.layout)
        layer = view.tower.feature_layer
        received = attention_received(view, attention_source("VisionZip", "auto", view.tower), layer)
        scores = view.at_tokens(received)
        keys = view.at_tokens(view.keys(layer).movedim(2, 3)).float().mean(dim=2)  # (G, n, d)
        splits = self.split(view.layout)
        pieces: dict[int, tuple[Tensor, Tensor]] = {}
        for members, tokens, (dominant, contextual) in groups(view.layout, splits):
            tokens = tokens.to(view.cells.device)
            found = self._partitions(view, members, tokens, scores, keys, dominant, contextual)
            for place, p in enumerate(members):
                pieces[p] = (found[0][:, place], found[1][:, place])
        sources, features = (torch.cat([pieces[p][i] for p in sorted(pieces)], dim=1) for i in range(2))
        return [Resample(sources[g], features[g]) for g in range(view.items)]

    def _partitions(
        self,
        view: VisualFeatures,
        members: Sequence[int],
        tokens: Tensor,
        scores: Tensor,
        keys: Tensor,
        dominant: int,
        contextual: int,
    ) -> tuple[Tensor, Tensor]:
        """(G, Q, K) sources and (G, Q, K, D) features of Q partitions with `tokens` (Q, n) each."""
        items, parts = view.items, len(members)
        with_class = view.tower.has_class and view.tower.projects and dominant > 0
        flat = tokens.expand(items, -1, -1).flatten(0, 1)  # (G Q, n)
        best, rest = (
            flat.gather(1, one) for one in dominant_tokens(scores[:, tokens].flatten(0, 1), dominant - with_class)
        )
        sources, features = [best], [_rows(view.features, best)]
        if with_class:
            sources.insert(0, flat.new_full((len(flat), 1), -1))
            own = view.class_hidden()[:, list(members)].flatten(0, 1)
            features.insert(0, view.project(own[:, None]).to(view.features))
        if contextual:
            targets, assignment = contextual_assignment(_rows(keys, rest), contextual)
            merge = functools.partial(
                merge_contextual, targets=targets, assignment=assignment, normalise=self.normalise
            )
            sources.append(rest[:, targets])
            features.append(self._merged(view, rest, merge))
        return (
            torch.cat(sources, dim=1).unflatten(0, (items, parts)),
            torch.cat(features, dim=1).unflatten(0, (items, parts)),
        )

    def _merged(self, view: VisualFeatures, rest: Tensor, merge: functools.partial[Tensor]) -> Tensor:
        if not view.tower.projects:
            return merge(_rows(view.features, rest)).to(view.features)
        hidden = _rows(view.at_tokens(view.hidden()), rest)
        return view.project(merge(hidden).to(hidden)).to(view.features)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (G, n, C) at index (G Q, m): (G Q, m, C)."""
    items = torch.arange(x.shape[0], device=x.device).repeat_interleave(len(index) // x.shape[0])
    return x[items[:, None], index]
