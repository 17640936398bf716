"""EVS: of a video, the cells that changed since the frame before (Efficient Video Sampling, as vLLM serves it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_budget, check_choice
from tokred.core.errors import LayoutError
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep
from tokred.vlm.select import check_fits, exact, unit

__all__ = ["EVS", "changes"]

#: dissimilarity of the cells of the first frame, which all stay
FIRST = 255.0


def changes(features: Tensor) -> Tensor:
    """(G, T, N) float32: 1 - cosine of each cell of features (G, T, N, D) to the same cell one frame before."""
    x = unit(features)
    with exact(x):
        later = 1 - (x[:, 1:] * x[:, :-1]).sum(dim=3)
    return torch.cat([torch.full_like(x[:, :1, :, 0], FIRST), later], dim=1)


@dataclass(frozen=True, repr=False)
class EVS(VisualMethod):
    """Keep the first frame of a video, and of the others the cells that differ most from the frame before.

    Written from the formula of vLLM's `--video-pruning-rate` q = 1 - budget: ``max(N, int(T N budget))`` of T N cells,
    by a stable sort. Images go on untouched. On Qwen's hosts a frame is a temporal patch, and a kept token keeps its
    place in space and time.

    Attributes:
        budget: fraction of the tokens of a video, or their number; never less than one frame is kept.
        positions, keep_newline: see `VisualMethod`; the method's own rule is "original".
    """

    budget: float | int = 0.5
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False

    name: ClassVar[str] = "evs"
    title: ClassVar[str] = "EVS"
    paper: ClassVar[str] = "Efficient Video Sampling (vLLM)"
    own_positions: ClassVar[Literal["compact", "original"]] = "original"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_choice("positions", self.positions, (None, "compact", "original"))

    def kept(self, layout: MediaLayout) -> int:
        total = len(layout.cells)
        if layout.kind == "image":
            return total
        check_fits("EVS", self.budget, total)
        wanted = self.budget if isinstance(self.budget, int) else int(total * self.budget)
        return max(layout.cells_per_partition, wanted)

    def select(self, view: VisualFeatures) -> Keep | None:
        layout = view.layout
        if layout.kind == "image":
            return None
        if layout.total_cells != view.count:
            raise LayoutError(f"EVS compares frames, but the prompt has {view.count} of {layout.total_cells} cells")
        raster = view.cells.argsort()
        video = view.features[:, raster].unflatten(1, (layout.partitions, -1))
        scores = torch.empty_like(view.features[:, :, 0], dtype=torch.float32)
        scores[:, raster] = changes(video).flatten(1).float()
        return Keep(ops.top_indices(scores, self.kept(layout)))

    def scoring_macs(self, tower: TowerInfo, layout: MediaLayout, width: int) -> int:
        return 0 if layout.kind == "image" else (len(layout.cells) - layout.cells_per_partition) * width
