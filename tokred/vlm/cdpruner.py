"""CDPruner: a determinantal point process of tokens, conditioned on the question (arXiv 2506.10967, NeurIPS 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.budget import budget_tokens, check_budget, check_choice
from tokred.core.errors import InvalidParameterError
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep
from tokred.vlm.select import check_fits, exact, unit

__all__ = ["CDPruner", "greedy_map", "scaled_relevance"]

Relevance = Callable[[VisualFeatures], Tensor]


def scaled_relevance(raw: Tensor, theta: float | None = None) -> Tensor:
    """(G, n) float32 relevance of each token, min-max scaled per image; 1 where all are equal.

    The released code takes minimum and maximum over the batch, so that an image depends on its neighbours; we do not.
    `theta` in [0, 1) weighs relevance against diversity: ``exp(r theta / (2 (1 - theta)))``.
    """
    raw = raw.detach().float().nan_to_num()
    low, high = raw.amin(dim=1, keepdim=True), raw.amax(dim=1, keepdim=True)
    relevance = torch.where(high > low, (raw - low + 1e-6) / (high - low), 1.0)
    return relevance if theta is None else torch.exp(relevance * theta / (2 * (1 - theta)))


def greedy_map(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """(G, count) int64, ascending: greedy MAP of the DPP with kernel ``diag(r) S diag(r)``, S the cosine similarity.

    Each step adds the token that raises the log-determinant most (Cholesky form of Chen et al., 2018), in float32.
    Tokens that are linear combinations of chosen ones gain nothing; when only such are left, and in general, ties go
    to the lower token. Time O(n D count + n count^2).

    Args:
        features: (G, n, D). relevance: (G, n), positive.
    """
    x = unit(features)
    relevance = relevance.to(x.dtype)
    whole = relevance.square() * (x != 0).any(dim=2)  # the diagonal without rounding, so that ties are ties
    x = x * relevance[:, :, None]
    gain, items = whole.clone(), torch.arange(len(x), device=x.device)
    rows = x.new_zeros(len(x), count, x.shape[1])  # c_t of the steps so far
    taken, chosen = torch.zeros_like(whole, dtype=torch.bool), []
    with exact(x):
        for step in range(count):
            best = gain.argmax(dim=1)
            chosen.append(best)
            root = gain[items, best].clamp_min(1e-12).sqrt()
            kernel = (x @ x[items, best][:, :, None])[:, :, 0]
            done = rows[:, :step]
            row = (kernel - (done[items, :, best][:, None] @ done)[:, 0]) / root[:, None]
            row = torch.where(gain[items, best][:, None] > 0, row, 0.0)
            rows[:, step] = row
            gain = gain - row * row
            gain = torch.where(gain < 1e-6 * whole, 0.0, gain)  # what is left of it is rounding
            taken[items, best] = True
            gain = gain.masked_fill(taken, -math.inf)
    return torch.stack(chosen, dim=1).sort(dim=1).values


@dataclass(frozen=True, repr=False)
class CDPruner(VisualMethod):
    """Keep tokens that are unlike each other and relevant to the question.

    Follows Theia-4869/CDPruner at 9541616c, which takes relevance from CLIP: the *negated* cosine of patch states and
    the text's embedding. That needs the text tower that belongs to the host's vision tower, which no host carries:
    give it as ``relevance=tokred.ClipRelevance(clip, tokenizer)``. Without it relevance is 1.

    Attributes:
        budget: fraction of the tokens of an image or video (rounded down), or their number.
        relevance: a function of the view that returns raw relevance (G, n), the larger the more relevant (not part of
            JSON); "none", a plain DPP; or "question", the cosine of tokens and the mean of the question's tokens in
            the space of the language model (ours: nobody could check the authors' recipe for such hosts; on the
            bundled model it does worse than "none").
        theta: None, or in [0, 1): how much relevance weighs against diversity.
        positions, keep_newline: see `VisualMethod`.
    """

    budget: float | int = 1 / 9
    relevance: Literal["question", "none"] | Relevance = "none"
    theta: float | None = None
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False

    name: ClassVar[str] = "cdpruner"
    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = "Beyond Attention or Similarity: Conditional Diversity (NeurIPS 2025, arXiv 2506.10967)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_choice("positions", self.positions, (None, "compact", "original"))
        if not callable(self.relevance):
            check_choice("relevance", self.relevance, ("question", "none"))
        theta: Any = self.theta
        number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
        if theta is not None and not (number and 0 <= theta < 1):
            raise InvalidParameterError(f"theta={theta!r}: expected a number in [0, 1)")

    def needs(self, tower: TowerInfo) -> Needs:
        return getattr(self.relevance, "needs", Needs())

    def to_dict(self) -> dict[str, Any]:
        if callable(self.relevance):
            raise InvalidParameterError("CDPruner(relevance=...) holds a function, which JSON cannot; write it without")
        return super().to_dict()

    def kept(self, layout: MediaLayout) -> int:
        total = len(layout.cells)
        check_fits("CDPruner", self.budget, total)
        return budget_tokens(self.budget, total)

    def select(self, view: VisualFeatures) -> Keep:
        relevance = scaled_relevance(self._raw(view), self.theta)
        return Keep(greedy_map(view.features, relevance, self.kept(view.layout)))

    def _raw(self, view: VisualFeatures) -> Tensor:
        if callable(self.relevance):
            return self.relevance(view).to(view.features.device)
        if self.relevance == "none":
            return view.features.new_ones(view.features.shape[:2])
        questions = [view.question_features(item).float().mean(dim=0) for item in range(view.items)]
        question = torch.stack(questions).to(view.features.device)
        return F.cosine_similarity(unit(view.features), unit(question)[:, None], dim=2)

    def scoring_macs(self, tower: TowerInfo, layout: MediaLayout, width: int) -> int:
        n, count = len(layout.cells), self.kept(layout)
        return n * width * (count + 1) + n * count * count // 2
