"""DART: drop the visual tokens that duplicate a few pivots (arXiv 2502.11494, EMNLP 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import budget_tokens, check_choice, check_count, resolve_layers
from tokred.core.decoder import DecoderMethod, LayerNeeds, PrefillLayer, Survivors
from tokred.core.errors import LayerError
from tokred.core.sites import DecoderInfo
from tokred.vlm.select import exact, unit
from tokred.vlm.survivors import check_rate_or_budget, spread

__all__ = ["DART", "least_similar"]


def least_similar(similarity: Tensor, taken: Tensor, picks: Sequence[int]) -> Tensor:
    """(n,) bool: what is taken once each pivot in turn took, of what was left, the tokens that are least like it.

    Args:
        similarity: (P, n) of each pivot to each token. taken: (n,) bool, at the start. picks: of each pivot.
    """
    for row, count in zip(similarity, picks, strict=True):
        order = ops.rank(row.masked_fill(taken, math.inf)[None], descending=False)[0]
        taken = taken.scatter(0, order[:count], True)
    return taken


@dataclass(frozen=True, repr=False)
class DART(DecoderMethod):
    """Before layer l, keep pivots and the visual tokens that are least like them.

    Pivots are the visual tokens and the text tokens behind the last visual one whose keys at layer l - 1 have the
    largest L1 norm, all heads together. Each pivot in turn (visual ones by norm, then text by norm; the released order
    is that of a Python set) picks those of the tokens left that have the lowest cosine similarity to it after the
    model's final norm. Visual pivots stay, too. Tokens keep their positions.

    Where a prompt has fewer pivots than asked for, those that there are pick as many tokens in all.

    Attributes:
        layer: l, 1 ... depth - 1.
        keep_rate: 1 - rho, of the visual tokens of a prompt, all its images together. As in the released arithmetic,
            P pivots pick floor(n keep_rate / P) each, and the visual pivots come on top: 4 + 8 * 24 of 576 tokens at
            1/3. None and no budget is 1/3.
        budget: instead, the visual tokens that stay from layer l on, pivots included, as a fraction or a number (exact:
            where pivots cannot pick equally many, the first ones pick one more).
        image_pivots, text_pivots: how many (at least one visual).
        positions: see `DecoderMethod`.
    """

    layer: int = 2
    keep_rate: float | None = None
    budget: float | int | None = None
    image_pivots: int = 4
    text_pivots: int = 4
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "dart"
    title: ClassVar[str] = "DART"
    paper: ClassVar[str] = "DART: Duplication Matters More (EMNLP 2025, arXiv 2502.11494)"

    def __post_init__(self) -> None:
        if check_count("layer", self.layer) < 1:
            raise LayerError("layer=0: DART takes the keys of the layer before, so layer >= 1")
        keep_rate, budget = check_rate_or_budget(self.keep_rate, self.budget, default=1 / 3)
        object.__setattr__(self, "keep_rate", keep_rate)
        object.__setattr__(self, "budget", budget)
        check_count("image_pivots", self.image_pivots, minimum=1)
        check_count("text_pivots", self.text_pivots)
        check_choice("positions", self.positions, (None, "compact", "original"))

    def kept(self, visual: int) -> int:
        """Visual tokens that stay, of so many."""
        if self.budget is not None:
            return budget_tokens(self.budget, visual)
        assert self.keep_rate is not None
        pivots = self.image_pivots + self.text_pivots
        each = math.floor(visual * self.keep_rate / pivots + 1e-6)
        return min(self.image_pivots + pivots * each, visual) if self.keep_rate < 1 else visual

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        layers = resolve_layers("layer", (self.layer,), (), info.depth, "DART")
        keeps_all = self.keep_rate == 1 or (isinstance(self.budget, float) and self.budget == 1)
        return {} if keeps_all else dict.fromkeys(layers, LayerNeeds(previous=True))

    def prune(self, view: PrefillLayer) -> Survivors | None:
        counts = view.visual.sum(dim=1).tolist()
        if all(self.kept(n) == n for n in counts):
            return None
        keys = view.keys()
        norms = keys.detach().to(torch.promote_types(keys.dtype, torch.float32)).abs().sum(dim=(1, 3))  # (B, T)
        states = unit(view.final_norm(view.hidden))
        keep = view.valid.clone()
        for row, n in enumerate(counts):
            if self.kept(n) < n:
                visual = view.visual[row].nonzero()[:, 0]
                text = view.text[row].nonzero()[:, 0]
                keep[row, visual] = self._choose(norms[row], states[row], visual, text[text > visual[-1]])
        return Survivors(keep)

    def _choose(self, norms: Tensor, states: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """(n,) bool: which of the visual places (n,) stay, given norms (T,) and unit states (T, D) of a row."""
        total = self.kept(len(visual))
        first = ops.rank(norms[visual][None])[0, : min(self.image_pivots, total)]
        pivots = torch.cat([visual[first], text[ops.rank(norms[text][None])[0, : self.text_pivots]]])
        each, more = divmod(total - len(first), len(pivots))
        picks = [each + (place < more) for place in range(len(pivots))]
        with exact(states):
            similarity = states[pivots] @ states[visual].T
        taken = torch.zeros_like(visual, dtype=torch.bool).scatter(0, first, True)
        return least_similar(similarity, taken, picks)

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        return spread(visual, dict.fromkeys(self.layers(info), self.kept(visual)), info.depth)

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """Similarities of the pivots to the visual tokens."""
        pivots = self.image_pivots + self.text_pivots
        return sum(pivots * entering[layer - 1] * info.dim for layer in self.layers(info))
