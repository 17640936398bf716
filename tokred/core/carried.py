"""Handing visual tokens on as methods inside the vision tower left them: merged ones once, in the tower's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.budget import check_choice
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Resample

__all__ = ["CarriedTokens"]


@dataclass(frozen=True, repr=False)
class CarriedTokens(VisualMethod):
    """The `VisualFeatures` part of a method that merges or drops tokens inside the vision tower.

    Where a token of the language model is no single token of the tower (pixel shuffle, pooling, resampling over tiles,
    projectors that mix tokens), everything goes on whole: there, reductions in the tower save work in the tower only.

    Attributes:
        flat: the tiles of an image follow each other, with the cells that unpadding would cut and without the tokens
            that end rows (LLaVA's "flat" packing, of MustDrop's released code). Otherwise the prompt stays as the
            host packs it, less the cells that the tower gave up; tiles that are stitched together stay so, whatever
            the order of the tower.
        positions: see `VisualMethod`.
    """

    flat: bool = False
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "carried"
    title: ClassVar[str] = "Tokens as the vision tower left them"
    paper: ClassVar[str] = ""
    listed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, (None, "compact", "original"))

    @property
    def keep_newline(self) -> bool:  # type: ignore[override]
        return not self.flat

    def needs(self, tower: TowerInfo) -> Needs:
        return Needs(hidden=self.flat and tower.projects)  # cut cells are not in the prompt: they are projected again

    def kept(self, layout: MediaLayout) -> int:
        """Tokens if the tower gave up none: how many it does is its data's."""
        return layout.total_cells if self.flat else len(layout.cells)

    def bypasses(self, layout: MediaLayout) -> bool:
        return not layout.cells

    def select(self, view: VisualFeatures) -> Sequence[Resample] | None:
        layout = view.layout
        if layout.merge > 1 or not layout.uniform or not view.tower.projects:
            return None
        positions = torch.full((layout.total_cells,), -1, device=view.cells.device)
        positions[view.cells] = torch.arange(view.count, device=view.cells.device)
        answers = [self._hand_on(view, item, positions) for item in range(view.items)]
        if self.flat and MediaLayout.NEWLINE in layout.slots:
            return answers
        plain = torch.arange(view.count, device=view.cells.device)
        return None if all(torch.equal(answer.sources, plain) for answer in answers) else answers

    def _hand_on(self, view: VisualFeatures, item: int, positions: Tensor) -> Resample:
        """Answer for one item; `positions` (P N,) are those of the cells among the tokens, -1 for none."""
        cells = view.carried(item).to(positions.device)
        sources = positions[cells]
        cut = sources < 0
        if not self.flat:
            sources = sources[~cut] if view.layout.mosaic is None else sources[~cut].sort().values
            return Resample(sources, view.features[item, sources])
        features = view.features[item, sources.clamp_min(0)]
        if bool(cut.any()):
            hidden = view.hidden()[item].flatten(0, 1)
            again = view.project(hidden[cells[cut].to(hidden.device)])
            features = features.index_put((cut.nonzero()[:, 0],), again.to(features))
        return Resample(sources, features)
