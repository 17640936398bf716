"""ToMe for Stable Diffusion: merge tokens around attention, unmerge behind it (Bolya & Hoffman, 2023, 2303.17604)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_choice, check_count
from tokred.core.diffusion import BlockInfo, DenoiserInfo, DiffusionBlock, DiffusionMethod, Part
from tokred.core.errors import InvalidParameterError, LayerError
from tokred.core.tokens import Merge

__all__ = ["ToMeSD", "match_windows"]


@dataclass(frozen=True, repr=False)
class ToMeSD(DiffusionMethod):
    """Token merging for denoisers: in every window of the grid one token receives, the others look for their likes.

    Of the others the ``int(ratio N)`` that are most like a receiver merge into it; behind the module each gets its
    receiver's row (section 4). Tokens are compared as they enter the block. With `use_rand` the receiver is a random
    cell of its window: by `seed`, block and the sample's timestep, so that a step draws what it drew in the last run,
    both halves of a guided batch draw alike, and a batch equals its samples one by one. (The released code draws from a
    generator that goes on from call to call, and turns it off for batches of odd size.)

    Attributes:
        ratio: share of the tokens that is merged away, in [0, 1); no more than the windows allow (0.75 for 2 x 2).
        sx, sy: width and height of a window. Cells of an odd grid that fill no window never receive.
        max_downsample: act in blocks whose grid is at most so many times coarser than the finest (1, 2, 4 or 8).
        use_rand: random receivers; off takes the first cell of each window.
        merge_attn, merge_crossattn, merge_mlp: which modules run on merged tokens; released defaults.
        seed: of the random receivers.
    """

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    max_downsample: int = 1
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int = 0

    name: ClassVar[str] = "tome_sd"
    title: ClassVar[str] = "ToMe for diffusion"
    paper: ClassVar[str] = "Token Merging for Fast Stable Diffusion (CVPRW 2023, arXiv 2303.17604)"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real) or not 0 <= float(self.ratio) < 1:
            raise InvalidParameterError(f"ratio={self.ratio!r}: expected a share in [0, 1), 0 merges nothing")
        for field in ("sx", "sy"):
            check_count(field, getattr(self, field), minimum=1)
        if self.sx * self.sy == 1:
            raise InvalidParameterError("sx=1, sy=1: a window of one token has nothing to merge; give 2 or more to one")
        check_choice("max_downsample", self.max_downsample, (1, 2, 4, 8))
        for field in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
            check_choice(field, getattr(self, field), (True, False))
        if not self.parts:
            raise InvalidParameterError(
                "merge_attn, merge_crossattn and merge_mlp are all off: nothing would be merged"
            )
        check_count("seed", self.seed)

    @property
    def parts(self) -> tuple[Part, ...]:
        asked: list[tuple[bool, Part]] = [
            (self.merge_attn, "attention"),
            (self.merge_crossattn, "cross_attention"),
            (self.merge_mlp, "mlp"),
        ]
        return tuple(part for on, part in asked if on)

    def bind(self, info: DenoiserInfo) -> dict[int, float]:
        if self.ratio == 0:
            return {}
        near = [block for block in info.blocks if block.level <= self.max_downsample]
        if not near:
            level = min(block.level for block in info.blocks)
            raise LayerError(
                f"ToMeSD: the first attention of this model is on a grid {level} times coarser than its finest; "
                f"pass max_downsample={level}"
            )
        for part in self.parts:
            if not any(part in block.parts for block in near):
                raise InvalidParameterError(
                    f"ToMeSD: no block of this model has {part} that merged tokens could run in"
                )
        for block in near:
            if block.grid is not None:
                self.count(block.grid, self.ratio)
        return {block.layer: self.ratio for block in near}

    def count(self, grid: tuple[int, int], rule: float) -> int:
        tokens = grid[0] * grid[1]
        return tokens - min(int(tokens * rule), tokens - self._receivers(grid))

    def _receivers(self, grid: tuple[int, int]) -> int:
        rows, columns = grid
        if rows < self.sy or columns < self.sx:
            raise InvalidParameterError(
                f"sx={self.sx}, sy={self.sy}: no window of {self.sy} x {self.sx} fits a grid of {rows} x {columns} "
                "tokens"
            )
        return (rows // self.sy) * (columns // self.sx)

    def reduce(self, view: DiffusionBlock, rule: float) -> Merge:
        cells = None
        if self.use_rand:
            windows, device = self._receivers(view.grid), view.tokens.device
            noise = _hash_noise(windows, self.seed * 1009 + view.block.layer, view.timestep, device)
            cells = noise % (self.sx * self.sy)
        r = view.count - self.count(view.grid, rule)
        return match_windows(view.tokens, view.grid, (self.sy, self.sx), r, cells)

    def cost(self, block: BlockInfo, grid: tuple[int, int], rule: float) -> int:
        receivers = self._receivers(grid)
        return (grid[0] * grid[1] - receivers) * receivers * block.dim


def match_windows(
    metric: Tensor, grid: tuple[int, int], window: tuple[int, int], r: int, cells: Tensor | None = None
) -> Merge:
    """Bipartite matching between one receiver in each window of a grid and all other tokens (section 4.1).

    Args:
        metric: (B, rows * columns, d), compared by cosine. grid: (rows, columns). window: (height, width) <= grid.
        r: tokens to remove, at most those that are no receivers.
        cells: (1 or B, windows) int64 in [0, height * width), which cell of each window receives, counted row by row,
            windows too; None is the first.

    Returns:
        Slots of the tokens that stay single in order of falling similarity, then of the receivers as they lie.
    """
    batch, n, _ = metric.shape
    receivers = _receivers(grid, window, cells, metric.device).expand(batch, -1)
    receives = torch.zeros(batch, n, dtype=torch.uint8, device=metric.device).scatter(1, receivers, 1)
    order = receives.sort(dim=1, stable=True).indices  # the others, then the receivers, each as they lie
    others, receivers = order[:, : n - receivers.shape[1]], order[:, n - receivers.shape[1] :]
    value, destination = ops.bipartite_match(ops.gather_tokens(metric, others), ops.gather_tokens(metric, receivers))
    ranked = ops.rank(value)
    merged, single = ranked[:, :r], ranked[:, r:]
    representative = torch.cat([others.gather(1, single), receivers], dim=1)
    slots = torch.arange(representative.shape[1], device=metric.device).expand(batch, -1)
    assignment = order.new_empty(batch, n).scatter(1, representative, slots)
    into = single.shape[1] + destination.gather(1, merged)
    return Merge(assignment.scatter(1, others.gather(1, merged), into), representative)


def _receivers(grid: tuple[int, int], window: tuple[int, int], cells: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, windows) int64: the position in the grid of each window's receiver."""
    (rows, columns), (height, width) = grid, window
    top = torch.arange(rows // height, device=device)[:, None] * height
    left = torch.arange(columns // width, device=device)[None] * width
    corner = (top * columns + left).reshape(1, -1)
    return corner if cells is None else corner + cells // width * columns + cells % width


def _hash_noise(count: int, seed: int, timestep: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, count) int64 in [0, 2^32), pseudo-random by an integer hash of position, seed and the bits of each
    sample's timestep: no generator, so it compiles, and a step repeats whatever ran before."""
    x = torch.arange(count, device=device)[None] + (0x9E3779B9 * (seed + 1) & 0xFFFFFFFF)
    if timestep is not None:
        bits = timestep.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
        x = _mix(x) ^ _mix(bits)[:, None]
    return _mix(x)


def _mix(x: Tensor) -> Tensor:
    for multiplier in (0x45D9F3B, 0x45D9F3B, 0x2545F491):
        x = (x ^ (x >> 16)) * multiplier & 0xFFFFFFFF
    return x ^ (x >> 16)
