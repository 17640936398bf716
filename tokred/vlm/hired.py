"""HiRED: attention-guided visual token dropping under a fixed budget (arXiv 2408.10945, AAAI 2025).

The paper's rule is the default; `official=True` is the released code (hasanar1f/HiRED at 502d6dd), which differs in
how tiles share the budget, in the grid of the tiles and in batches (each difference is named where it is made).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_budget, check_choice, check_count
from tokred.core.errors import InvalidParameterError, NoClassTokenError
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep, Resample
from tokred.vlm.select import (
    ClassSource,
    attention_received,
    attention_source,
    check_fits,
    check_share,
    keep_marked,
    needed_attention,
    partition_tokens,
    require_uniform,
)

__all__ = ["HiRED", "content_scores", "hired_mask", "official_order", "regions_of_cells", "tile_budgets"]


def regions_of_cells(
    grid: tuple[int, int], mosaic: tuple[int, int], regions: Literal["grid2d", "strips"] = "grid2d"
) -> Tensor:
    """(N,) int64: the tile whose part of the image each cell of the overview shows.

    Args:
        grid: (rows, columns) of the overview. mosaic: (R, C) of the tiles.
        regions: "grid2d": cell (y, x) belongs to tile ``(y R // rows) C + x C // columns`` (the paper's rectangles).
            "strips": the flattened cells are cut into R C runs, as released (which needs runs of equal length).
    """
    (rows, columns), (big_rows, big_columns) = grid, mosaic
    cell = torch.arange(rows * columns)
    if regions == "strips":
        return cell * (big_rows * big_columns) // (rows * columns)
    return cell // columns * big_rows // rows * big_columns + cell % columns * big_columns // columns


def content_scores(overview: Tensor, regions: Tensor, tiles: int, marks: int | None = None) -> Tensor:
    """(G, tiles) float64 visual content score of each tile (equation 1).

    Args:
        overview: (G, N) attention to the cells of the overview at the first layer, summed over heads.
        regions: (N,) from `regions_of_cells`.
        marks: None adds up the attention itself (paper); a number counts how many of so many top cells lie in each
            region (released code).
    """
    if marks is not None:
        top = ops.top_indices(overview, min(marks, overview.shape[1]))
        overview = torch.zeros_like(overview).scatter(1, top, 1.0)
    overview = overview.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    inside = regions.to(overview.device) == torch.arange(tiles, device=overview.device)[:, None]  # (tiles, N)
    return (overview.double()[:, None] * inside).sum(dim=2)  # no scatter_add: its order on a GPU is not always the same


def tile_budgets(
    content: Tensor,
    pool: int,
    capacity: Sequence[int],
    remainder: Literal["drop", "largest"] = "drop",
    minimum: int = 0,
    official: bool = False,
) -> Tensor:
    """(G, tiles) int64: how the tiles share a pool of tokens in proportion to their content scores.

    Args:
        content: (G, tiles). pool: tokens to share. capacity: tokens that each tile has.
        remainder: "drop": what rounding down and full tiles leave over is lost (paper and released code); "largest":
            it goes on, in proportion, to tiles that are not full, the last ones by largest remainder.
        minimum: tokens that every tile gets before the rest of the pool is shared.
        official: ``(content / sum) pool`` in float32, as released, not ``(pool content) / sum`` in float64.

    Where there is no content at all, tiles share evenly (the released code divides by zero).
    """
    content = content.to(torch.float32 if official else torch.float64)
    content = torch.where(content.sum(dim=1, keepdim=True) > 0, content, 1.0)
    sums = content.sum(dim=1, keepdim=True)
    caps = torch.tensor(list(capacity), device=content.device)
    minimum = min(minimum, pool // len(capacity))
    base = caps.clamp_max(minimum)
    if remainder == "largest":
        return base + _fill(content / sums, pool - int(base.sum()), caps - base)
    rest = pool - minimum * len(capacity)
    quota = content / sums * rest if official else content * rest / sums
    return torch.minimum(base + quota.long(), caps)


def _fill(shares: Tensor, pool: int, caps: Tensor) -> Tensor:
    """(G, tiles): share a pool in proportion; what is over a capacity goes to the others; largest remainders last."""
    pool = min(pool, int(caps.sum()))
    full = (caps == 0).expand_as(shares)
    quota = torch.zeros_like(shares)
    for _ in range(shares.shape[1]):
        weights = torch.where(full, 0.0, shares)
        weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, (~full).to(shares.dtype))
        left = pool - torch.where(full, caps, 0).sum(dim=1, keepdim=True)
        open_quota = left * weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
        quota = torch.where(full, caps.to(shares.dtype), open_quota)
        full = full | (quota >= caps)
    quota = torch.minimum(quota, caps.to(shares.dtype))
    budgets = quota.floor().long()
    fractions = torch.where(budgets < caps, quota - budgets, -1.0)
    left = pool - budgets.sum(dim=1, keepdim=True)
    place = ops.rank(fractions).argsort(dim=1)
    return budgets + (place < left).long()


def hired_mask(importance: Tensor, budgets: Tensor, visible: Tensor | None = None) -> Tensor:
    """(G, P, N) bool: the `budgets` (G, P) cells of largest `importance` (G, P, N) of each partition (equation 2).

    `visible` (P, N) bool: cells outside it are never kept. Ties go to the lower cell, what is not a number comes last.
    """
    scores = importance.nan_to_num(nan=torch.finfo(importance.dtype).min)
    if visible is not None:
        scores = scores.masked_fill(~visible.to(scores.device), -math.inf)
        budgets = torch.minimum(budgets, visible.sum(dim=1).to(budgets.device))
    order = ops.rank(scores.flatten(0, 1))
    chosen = torch.arange(order.shape[1], device=order.device) < budgets.reshape(-1, 1).to(order.device)
    return torch.zeros_like(chosen).scatter(1, order, chosen).view_as(importance)


def official_order(layout: MediaLayout) -> tuple[int, ...]:
    """Cells in the order of the released packing: (rows, columns) of the mosaic swapped, then unpadded.

    Harmless for square mosaics; for others, tiles are scrambled and most of their cells are cut.
    """
    assert layout.mosaic is not None
    assert layout.overview is not None
    assert layout.size is not None
    (rows, columns), n = layout.grid, layout.cells_per_partition
    across, down = layout.mosaic  # swapped: as many tiles in a row as the mosaic has rows
    tiles = torch.tensor([p for p in range(layout.partitions) if p != layout.overview])
    cells = (tiles[:, None] * n + torch.arange(n)).view(down, across, rows, columns)
    stitched = cells.transpose(1, 2).reshape(down * rows, across * columns)
    height, width = layout.size
    all_rows, all_columns = stitched.shape
    if width / height > all_columns / all_rows:  # int() without rounding first, as in the transformers of then
        cut = (all_rows - int(height * (all_columns / width))) // 2
        stitched = stitched[cut : all_rows - cut]
    else:
        cut = (all_columns - int(width * (all_rows / height))) // 2
        stitched = stitched[:, cut : all_columns - cut]
    return (*range(layout.overview * n, (layout.overview + 1) * n), *stitched.flatten().tolist())


@dataclass(frozen=True, repr=False)
class HiRED(VisualMethod):
    """Keep the cells that the class token attends to at a late layer; tiles share the budget by early attention.

    An image of P tiles (partitions) of N cells keeps at most ``B = int(P N budget)`` tokens: the overview (whole
    image) gets ``min(int(alpha B), N)``, the other tiles share the rest in proportion to their content score. Images
    of one tile, frames of a video and mosaics without an overview keep ``int(N budget)`` tokens of each partition.

    Attributes:
        budget: fraction in (0, 1] of the tokens of an image, or their number; 1.0 changes nothing.
        alpha: in [0, 1], the overview's share of the budget.
        official: the released code: score="count", regions="strips", float32 budgets, the mosaic's rows and columns
            swapped when tokens are packed, and in a batch of one-tile images everywhere the mask of the first.
        score: of the content of tiles: "mass" (paper, equation 1) adds up attention, "count" counts the top
            `count_m` cells of the overview. None is the preset's.
        count_m: cells of the overview whose attention counts for score="count"; None is ``int(N (1 - alpha))``.
        regions: cells of the overview that stand for a tile: "grid2d" (paper) or "strips". None is the preset's.
        init_layer, final_layer: 0-based tower layers of the content score and of the importance (equation 2); None is
            the last layer that contributes to the features.
        remainder: "drop" or "largest", see `tile_budgets`.
        min_per_partition: tokens that every partition gets at least, as far as it has them. They come out of the
            budget: with ``m = min(min_per_partition, B // P)``, the overview gets ``int(alpha B)`` clamped to
            ``[m, B - (P - 1) m]``, and tiles share by content what is left after m for each of them.
        mask_padding: cells that unpadding cut from the prompt are no candidates and do not count in P N. By default,
            as in paper and code, the budget spent on them is lost.
        keep_newline: keep the tokens that end rows, on top of the budget.
        cls_source: whose attention: "cls"; "mean_received" (ours), that of all tokens, for towers without a class
            token; "map_head" (ours), the pooling head's probe; "auto" takes the first two in this order.
        positions: see `VisualMethod`.
    """

    budget: float | int = 0.2
    alpha: float = 0.5
    official: bool = False
    score: Literal["mass", "count"] | None = None
    count_m: int | None = None
    regions: Literal["grid2d", "strips"] | None = None
    init_layer: int = 0
    final_layer: int | None = None
    remainder: Literal["drop", "largest"] = "drop"
    min_per_partition: int = 0
    mask_padding: bool = False
    keep_newline: bool = False
    cls_source: ClassSource = "auto"
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "hired"
    title: ClassVar[str] = "HiRED"
    paper: ClassVar[str] = "HiRED: Attention-Guided Token Dropping (AAAI 2025, arXiv 2408.10945)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_share("alpha", self.alpha)
        check_choice("score", self.score, (None, "mass", "count"))
        check_choice("regions", self.regions, (None, "grid2d", "strips"))
        check_choice("remainder", self.remainder, ("drop", "largest"))
        check_choice("cls_source", self.cls_source, ("auto", "cls", "mean_received", "map_head"))
        check_choice("positions", self.positions, (None, "compact", "original"))
        check_count("init_layer", self.init_layer)
        check_count("min_per_partition", self.min_per_partition)
        for field in ("count_m", "final_layer"):
            if getattr(self, field) is not None:
                check_count(field, getattr(self, field))
        if self.official and self.cls_source not in ("auto", "cls"):
            raise InvalidParameterError(f"official=True scores by the class token, not cls_source={self.cls_source!r}")

    # -- what the host asks --------------------------------------------------------------------------------------------

    def needs(self, tower: TowerInfo) -> Needs:
        if self.official and not tower.has_class:
            raise NoClassTokenError("HiRED: the released code needs a class token, which this vision tower lacks")
        layers = (self.init_layer, self._last(tower))
        needs = needed_attention("HiRED", self.cls_source, tower, layers)
        # the swapped grid brings back cells that are not in the prompt
        return dataclasses.replace(needs, hidden=True) if self.official and tower.projects else needs

    def kept(self, layout: MediaLayout) -> int:
        require_uniform("HiRED", layout)
        if _has_overview(layout):
            return min(self._total(layout), len(layout.cells))
        return min(sum(self._even(layout)), len(layout.cells))

    def bypasses(self, layout: MediaLayout) -> bool:
        return self._total(layout) == self._tokens(layout)

    def select(self, view: VisualFeatures) -> Keep | Sequence[Resample] | None:
        require_uniform("HiRED", view.layout)
        source = attention_source("HiRED", self.cls_source, view.tower)
        importance = attention_received(view, source, self._last(view.tower))
        first = attention_received(view, source, self.init_layer) if _has_overview(view.layout) else None
        if self.official and view.layout.partitions == 1:
            importance = importance[:1].expand_as(importance)  # attention of image 0 for the whole batch, as released
        mask = self.mask(view.layout, importance, first)
        if self.official and _has_overview(view.layout) and view.layout.size is not None:
            order = official_order(view.layout)
            if order != view.layout.cells:
                return [_take(view, item, order, mask[item]) for item in range(view.items)]
        return keep_marked(view.at_tokens(mask.to(view.cells.device)))

    def scoring_macs(self, tower: TowerInfo, layout: MediaLayout, width: int) -> int:
        cells = layout.total_cells * layout.merge**2
        layers = len({self.init_layer, self._last(tower)}) if _has_overview(layout) else 1
        if attention_source("HiRED", self.cls_source, tower) == "mean_received":
            return layers * cells * cells // layout.partitions * tower.dim
        return layers * cells * tower.dim

    # -- the rule ------------------------------------------------------------------------------------------------------

    def mask(self, layout: MediaLayout, importance: Tensor, first: Tensor | None = None) -> Tensor:
        """(G, P, N) bool: the kept cells, those that unpadding cuts included.

        Args:
            importance: (G, P, N) attention to each cell at the final layer, summed over heads.
            first: the same at the first layer, for images of several tiles with an overview.
        """
        visible = self._visible(layout) if self.mask_padding else None
        return hired_mask(importance, self.budgets(layout, importance.shape[0], first), visible)

    def budgets(self, layout: MediaLayout, items: int, first: Tensor | None = None) -> Tensor:
        """(G, P) int64: tokens of each partition."""
        if first is None or not _has_overview(layout):
            return torch.tensor(self._even(layout)).expand(items, -1)
        assert layout.overview is not None
        capacity = self._capacity(layout)
        total, top = self._total(layout), capacity.pop(layout.overview)
        least = min(self.min_per_partition, total // layout.partitions)
        overview = max(int(total * self.alpha), least)
        overview = min(overview, total - least * len(capacity), top)
        pool = min(total - overview, sum(capacity))
        content = self._content(layout, first[:, layout.overview])
        tiles = tile_budgets(content, pool, capacity, self.remainder, least, self.official)
        own = tiles.new_full((items, 1), overview)
        return torch.cat([tiles[:, : layout.overview], own, tiles[:, layout.overview :]], dim=1)

    def _content(self, layout: MediaLayout, overview: Tensor) -> Tensor:
        assert layout.mosaic is not None
        regions = regions_of_cells(
            layout.grid, layout.mosaic, self.regions or ("strips" if self.official else "grid2d")
        )
        marks = None
        if (self.score or ("count" if self.official else "mass")) == "count":
            cells = layout.cells_per_partition
            marks = int(cells * (1 - self.alpha)) if self.count_m is None else self.count_m
        return content_scores(overview, regions, layout.partitions - 1, marks)

    def _last(self, tower: TowerInfo) -> int:
        return tower.feature_layer if self.final_layer is None else self.final_layer

    def _visible(self, layout: MediaLayout) -> Tensor:
        visible = torch.zeros(layout.total_cells, dtype=torch.bool)
        visible[list(layout.cells)] = True
        return visible.unflatten(0, (layout.partitions, -1))

    def _capacity(self, layout: MediaLayout) -> list[int]:
        if self.mask_padding:
            return [len(tokens) for tokens in partition_tokens(layout)]
        return [layout.cells_per_partition] * layout.partitions

    def _tokens(self, layout: MediaLayout) -> int:
        return len(layout.cells) if self.mask_padding else layout.total_cells

    def _total(self, layout: MediaLayout) -> int:
        """B, of P N tokens."""
        tokens = self._tokens(layout)
        check_fits("HiRED", self.budget, tokens)
        return self.budget if isinstance(self.budget, int) else int(tokens * self.budget)

    def _even(self, layout: MediaLayout) -> list[int]:
        """Budgets of partitions that do not share one: a fraction of each, or an even part of a count."""
        capacity = self._capacity(layout)
        if isinstance(self.budget, float):
            return [int(tokens * self.budget) for tokens in capacity]
        total, parts = self._total(layout), layout.partitions
        return [min(total * (p + 1) // parts - total * p // parts, capacity[p]) for p in range(parts)]


def _has_overview(layout: MediaLayout) -> bool:
    return layout.partitions > 1 and layout.mosaic is not None and layout.overview is not None


def _take(view: VisualFeatures, item: int, order: Sequence[int], mask: Tensor) -> Resample:
    """The kept cells in the given order; those that are not in the prompt are projected again."""
    device = view.features.device
    cells = torch.tensor(order, device=device)
    cells = cells[mask.to(device).flatten()[cells]]
    position = torch.full((view.layout.total_cells,), -1, device=device)
    position[view.cells] = torch.arange(view.count, device=device)
    sources = position[cells]
    features = view.features[item, sources.clamp_min(0)]
    cut = sources < 0
    if bool(cut.any()):
        again = view.project(view.hidden()[item].flatten(0, 1)[cells[cut]])
        features = features.index_put((cut.nonzero()[:, 0],), again.to(features))
    return Resample(sources, features)
