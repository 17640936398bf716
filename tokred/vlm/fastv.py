"""FastV: visual tokens that the last token hardly attends to leave after a few layers (arXiv 2403.06764, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tokred.core.budget import budget_tokens, check_choice, check_count, resolve_layers
from tokred.core.decoder import DecoderMethod, LayerNeeds, PrefillLayer, Survivors
from tokred.core.errors import LayerError
from tokred.core.sites import DecoderInfo
from tokred.vlm.survivors import check_rate_or_budget, keep_best, kept_of_rows, spread

__all__ = ["FastV"]


@dataclass(frozen=True, repr=False)
class FastV(DecoderMethod):
    """Before layer K, keep the visual tokens that the last token attended to most at layer K - 1.

    The score is the attention of the last token of the prompt, averaged over heads (section 4.1). Tokens keep their
    positions, and the layers below K keep all of them in their cache. The released code that masks instead of dropping
    gives the same output without the gain.

    Attributes:
        layer: K, 1 ... depth - 1. (The released K = 0 chooses at random: `RandomTokens(budget=...)` does that.)
        keep_rate: 1 - R, of the visual tokens of a prompt, all its images together (rounded down, at least 1); None
            and no budget is 0.5.
        budget: instead, the visual tokens that stay from layer K on, as a fraction or a number. A prompt that has no
            more than so many keeps them all.
        positions: see `DecoderMethod`.
    """

    layer: int = 2
    keep_rate: float | None = None
    budget: float | int | None = None
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "fastv"
    title: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "FastV: An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024, arXiv 2403.06764)"

    def __post_init__(self) -> None:
        if check_count("layer", self.layer) < 1:
            raise LayerError(
                "layer=0: FastV scores by the attention of the layer before, so layer >= 1; to drop tokens at random "
                "before the language model use RandomTokens(budget=...)"
            )
        keep_rate, budget = check_rate_or_budget(self.keep_rate, self.budget, default=0.5)
        object.__setattr__(self, "keep_rate", keep_rate)
        object.__setattr__(self, "budget", budget)
        check_choice("positions", self.positions, (None, "compact", "original"))

    @property
    def _share(self) -> float | int:
        if self.budget is not None:
            return self.budget
        assert self.keep_rate is not None
        return self.keep_rate

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        layers = resolve_layers("layer", (self.layer,), (), info.depth, "FastV")
        keeps_all = isinstance(self._share, float) and self._share == 1
        return {} if keeps_all else dict.fromkeys(layers, LayerNeeds(previous=True))

    def prune(self, view: PrefillLayer) -> Survivors | None:
        counts = kept_of_rows(view, self._share)
        if counts is None:
            return None
        scores = view.attention_rows(view.last).mean(dim=1)[:, 0]
        return Survivors(keep_best(scores, view.visual, counts) | view.text)

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        return spread(visual, dict.fromkeys(self.layers(info), budget_tokens(self._share, visual)), info.depth)

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """One row of q k^T."""
        return sum(info.width * (entering[layer - 1] + text) for layer in self.layers(info))
