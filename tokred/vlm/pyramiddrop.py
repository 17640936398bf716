"""PyramidDrop: fewer visual tokens, stage by stage, in deeper layers (arXiv 2410.17247, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tokred.core.budget import budget_tokens, check_budget, check_choice, check_fraction
from tokred.core.decoder import DecoderMethod, LayerNeeds, Positions, PrefillLayer, Survivors
from tokred.core.errors import InvalidParameterError, LayerError
from tokred.core.sites import DecoderInfo
from tokred.vlm.survivors import (
    check_stages,
    dropping_stages,
    keep_best,
    kept_of_rows,
    plan_stages,
    scale_stages,
    spread,
)

__all__ = ["PyramidDrop"]


@dataclass(frozen=True, repr=False)
class PyramidDrop(DecoderMethod):
    """Where a stage begins, keep the visual tokens that the last token of the instruction attends to most.

    The attention is that of the layer which opens the stage: queries and keys of what enters it, softmax over all that
    the token sees, averaged over heads (section 3.2). Survivors are numbered anew, as released. The instruction ends
    the prompt here (in the paper's training there is one for each answer). The released code takes one image a
    prompt; of several, the tokens are ranked together.

    Attributes:
        stages: the layers that open them, 1 ... depth - 1; None is (8, 16, 24), as far as the model has them.
        keep_rates: for each stage, of the visual tokens that entered the language model (rounded down, at least 1);
            they must not ascend.
        budget: visual tokens that are left after the last stage, as a fraction or a number; `keep_rates` then say only
            how many more the other stages have (4 : 2 : 1).
        positions: see `DecoderMethod`.
    """

    stages: Sequence[int] | None = None
    keep_rates: Sequence[float] = (0.5, 0.25, 0.125)
    budget: float | int | None = None
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "pyramiddrop"
    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = "PyramidDrop: Pyramid Visual Redundancy Reduction (CVPR 2025, arXiv 2410.17247)"
    own_positions: ClassVar[Positions] = "compact"
    default_stages: ClassVar[tuple[int, ...]] = (8, 16, 24)

    def __post_init__(self) -> None:
        stages = check_stages(self.stages, self.default_stages, "keep_rates", self.keep_rates)
        if stages is not None and stages[0] < 1:
            raise LayerError(f"stages={stages!r}: a stage can begin at layer 1 or later")
        object.__setattr__(self, "stages", stages)
        rates = tuple(check_fraction("keep_rates", rate) for rate in self.keep_rates)
        if list(rates) != sorted(rates, reverse=True):
            raise InvalidParameterError(f"keep_rates={self.keep_rates!r}: shares of the first tokens cannot ascend")
        object.__setattr__(self, "keep_rates", rates)
        if self.budget is not None:
            object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_choice("positions", self.positions, (None, "compact", "original"))

    def _plan(self, info: DecoderInfo) -> dict[int, float | int]:
        """{layer: what is left from there on}."""
        plan = plan_stages("PyramidDrop", self.stages, self.default_stages, self.keep_rates, info.depth)
        return dropping_stages(scale_stages(plan, self.budget))

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        return dict.fromkeys(self._plan(info), LayerNeeds(own=True))

    def prune(self, view: PrefillLayer) -> Survivors | None:
        counts = kept_of_rows(view, self._plan(view.info)[view.layer], view.initial)
        if counts is None:
            return None
        scores = view.attention_rows(view.last, own=True).mean(dim=1)[:, 0]
        return Survivors(keep_best(scores, view.visual, counts) | view.text)

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        counts = {layer: budget_tokens(budget, visual) for layer, budget in self._plan(info).items()}
        return spread(visual, counts, info.depth)

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """Queries and keys of what enters a stage (all of it, as released), and one row of q k^T."""
        projected = info.dim * (info.width + info.kv_heads * info.head_dim)
        return sum((projected + info.width) * (entering[layer - 1] + text) for layer in self._plan(info))
