"""Resizing one frame to its share of the budget, and packing the frames (QuoTA, arXiv 2503.08689).

The paper names bilinear interpolation, adaptive pooling and token merging; the released code has five versions, v1 to
v5, in the order of `SHRINK_MODES`. A `ShrinkPlan` is made once from the features that the language model reads and can
then be applied to others of the same cells (the deepstack features of Qwen3-VL). Gradients flow through all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError
from tokred.vlm.allocate import grid_shape

__all__ = [
    "SHRINK_MODES",
    "NewlineMode",
    "ShrinkMode",
    "ShrinkPlan",
    "Shrunk",
    "VideoPlan",
    "grid_sources",
    "pack",
    "shrink",
    "shrink_plan",
    "video_plan",
]

ShrinkMode = Literal["bilinear", "adaptive_pool", "linspace", "tome", "tome_separable"]
SHRINK_MODES: tuple[ShrinkMode, ...] = get_args(ShrinkMode)
NewlineMode = Literal["grid", "one_token", "none"]


class Shrunk(NamedTuple):
    """One frame after shrinking.

    tokens: (m, D). sources: (m,) int64, the raster cell of the full grid whose position each token takes. grid: (h, w)
    with m = h w in raster order, or None where the tokens form no grid.
    """

    tokens: Tensor
    sources: Tensor
    grid: tuple[int, int] | None


class _Round(NamedTuple):
    """One matching of ToMe: (B, t) int64, the slot of each token, and the token that lends each slot its place."""

    assignment: Tensor
    representative: Tensor


@dataclass(frozen=True, eq=False)
class ShrinkPlan:
    """How B frames of one grid become m tokens each; for "tome" and "tome_separable" it holds the assignment too.

    Attributes:
        mode, rows, cols: what was asked. pool: stride of the host's own pooling, which "tome" applies first.
        sources: (B, m) int64, see `Shrunk`. grid: (h, w) or None.
        rounds: the matchings of "tome"; of "tome_separable" those along the rows. column_rounds: along the columns.
    """

    mode: ShrinkMode
    rows: int
    cols: int
    sources: Tensor
    grid: tuple[int, int] | None
    pool: int = 1
    rounds: tuple[_Round, ...] = ()
    column_rounds: tuple[_Round, ...] = ()

    def apply(self, x: Tensor) -> Tensor:
        """Shrink (B, rows cols, D) features of the same frames to (B, m, D), in their dtype.

        The arithmetic is float32 for float16 and bfloat16 features (the released code stays in bfloat16).
        """
        _check_features(x, self.rows, self.cols)
        if len(x) != len(self.sources):
            raise InvalidParameterError(f"x has {len(x)} frames, the plan was made for {len(self.sources)}")
        if self.mode == "linspace":
            return ops.gather_tokens(x, self.sources)
        if self.grid == (self.rows, self.cols):
            return x  # every mode with a grid is the identity here
        return self._resize(x.to(_compute_dtype(x))).to(x.dtype)

    def _resize(self, x: Tensor) -> Tensor:
        if self.mode == "tome":
            return _merge(_pool(x, self.rows, self.cols, self.pool), self.rounds)
        assert self.grid is not None
        if self.mode == "tome_separable":
            return _merge_separably(x, self.rows, self.cols, self.rounds, self.column_rounds)
        return _resample(x, self.rows, self.cols, self.grid, self.mode)


@dataclass(frozen=True, eq=False)
class VideoPlan:
    """Plans for the frames of one video; frames that share a shape are shrunk together.

    Attributes:
        kept: the frames with tokens, ascending. groups: (frames, plan) pairs; each kept frame is in one of them.
    """

    kept: tuple[int, ...]
    groups: tuple[tuple[tuple[int, ...], ShrinkPlan], ...]

    def apply(self, x: Tensor) -> list[Shrunk]:
        """Shrink (T, rows cols, D) features: one `Shrunk` a kept frame, in the order of time."""
        done: dict[int, Shrunk] = {}
        for frames, plan in self.groups:
            tokens = plan.apply(x[list(frames)])
            for frame, own, sources in zip(frames, tokens, plan.sources, strict=True):
                done[frame] = Shrunk(own, sources, plan.grid)
        return [done[frame] for frame in self.kept]


def shrink(x: Tensor, rows: int, cols: int, n: int, mode: ShrinkMode = "bilinear", pool: int = 1) -> Shrunk:
    """Shrink one frame, (rows cols, D) tokens in raster order, to at most `n` tokens; see `shrink_plan`."""
    if x.dim() != 2:
        raise InvalidParameterError(f"x has shape {tuple(x.shape)}: expected one frame, (rows cols, D)")
    plan = shrink_plan(x[None], rows, cols, n, mode, pool)
    return Shrunk(plan.apply(x[None])[0], plan.sources[0], plan.grid)


def shrink_plan(x: Tensor, rows: int, cols: int, n: int, mode: ShrinkMode = "bilinear", pool: int = 1) -> ShrinkPlan:
    """Plan how frames of `n` tokens each are shrunk.

    * "bilinear" (v1, the default): interpolation to the grid `grid_shape(n)`, without anti-aliasing or corner
      alignment, straight from the full grid; `n` may exceed rows x cols.
    * "adaptive_pool" (v2): adaptive average pooling to that grid.
    * "linspace" (v3): the tokens at ``floor(linspace(0, rows cols - 1, n))``.
    * "tome" (v4): bilinear pooling by `pool`, then token merging until n tokens are left. They are in no spatial order.
    * "tome_separable" (v5): each row merged to w tokens, then each column of the result to h.

    All but "bilinear" give at most as many tokens as there are ("tome": after pooling); a larger `n` means all of them.

    Args:
        x: (B, rows cols, D), B frames in raster order; only the two "tome" modes look at the values.
        n: tokens a frame, >= 1. pool: stride of the pooling that the host does by itself (LLaVA-OneVision: 2, as
            released; 1 where tokens reach the language model unpooled).
    """
    _check_features(x, rows, cols)
    check_count("n", n, minimum=1)
    check_count("pool", pool, minimum=1)
    check_choice("mode", mode, SHRINK_MODES)
    frames = len(x)
    if mode == "tome":
        return _plan_tome(x, rows, cols, n, pool)
    if mode != "bilinear":
        n = min(n, rows * cols)
    if mode == "linspace":
        # In float32, as released: where a step lands on a whole number it may round to the cell before.
        picked = torch.linspace(0, rows * cols - 1, n, dtype=torch.float32).long()
        return ShrinkPlan(mode, rows, cols, picked.to(x.device).expand(frames, -1), None)
    grid = grid_shape(n, rows, cols)
    sources = grid_sources(grid, rows, cols).to(x.device).expand(frames, -1)
    if mode == "tome_separable" and grid != (rows, cols):
        rounds, column_rounds = _plan_separable(x, rows, cols, grid)
        return ShrinkPlan(mode, rows, cols, sources, grid, rounds=rounds, column_rounds=column_rounds)
    return ShrinkPlan(mode, rows, cols, sources, grid)


def video_plan(
    x: Tensor, rows: int, cols: int, counts: Tensor | Sequence[int], mode: ShrinkMode = "bilinear", pool: int = 1
) -> VideoPlan:
    """Plan a video, (T, rows cols, D), whose frames get `counts` (T,) tokens; frames with 0 are dropped."""
    numbers = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(numbers) != len(x):
        raise InvalidParameterError(f"counts has {len(numbers)} entries for {len(x)} frames")
    alike: dict[object, list[int]] = {}
    for frame, n in enumerate(numbers):
        if check_count("counts", n):
            alike.setdefault(_shape_key(n, rows, cols, mode), []).append(frame)
    groups = []
    for frames in alike.values():
        # only merging looks at values: elsewhere one frame, seen several times, has the shape and is no copy
        seen = x[frames] if mode in ("tome", "tome_separable") else x[:1].expand(len(frames), -1, -1)
        groups.append((tuple(frames), shrink_plan(seen, rows, cols, numbers[frames[0]], mode, pool)))
    return VideoPlan(tuple(frame for frame, n in enumerate(numbers) if n), tuple(groups))


def grid_sources(grid: tuple[int, int], rows: int, cols: int) -> Tensor:
    """(h w,) int64: the cell of a rows x cols grid under the centre of each cell of `grid`, in raster order.

    ``r_k = floor((k + 1/2) rows / h)``, and columns alike. Cells repeat where `grid` is the finer one; they must not be
    sorted, since that would mix its rows.
    """
    h, w = grid
    row = torch.tensor([(2 * k + 1) * rows // (2 * h) for k in range(h)])
    col = torch.tensor([(2 * k + 1) * cols // (2 * w) for k in range(w)])
    return (row[:, None] * cols + col).flatten()


def pack(frames: Sequence[Shrunk], newline: Tensor | None, mode: NewlineMode) -> Tensor:
    """Concatenate shrunk frames, in the order of time, to the (L, D) rows that replace the video's placeholder.

    Args:
        newline: (D,) the model's `image_newline`; not charged to the budget. mode: "grid" puts it behind every row of
            every frame (LLaVA-Video: h (w + 1) rows a frame), "one_token" once at the end (LLaVA-OneVision), "none"
            nowhere. A frame that forms no grid has no rows: its tokens stand flat in every mode (the released code
            cannot pack them at all).

    Any tensor can be packed so: with `tokens` replaced by `sources[:, None]` and a newline of -1, the result says where
    each row comes from.
    """
    check_choice("newline mode", mode, get_args(NewlineMode))
    if not frames:
        raise InvalidParameterError("frames is empty: expected at least one frame with tokens")
    if mode == "none":
        return torch.cat([frame.tokens for frame in frames])
    if newline is None:
        raise InvalidParameterError(f"newline mode {mode!r} needs the newline vector (D,), got None; use mode 'none'")
    newline = newline.to(frames[0].tokens).reshape(1, -1)
    if mode == "one_token":
        return torch.cat([*(frame.tokens for frame in frames), newline])
    return torch.cat([_with_newlines(frame, newline) for frame in frames])


def _with_newlines(frame: Shrunk, newline: Tensor) -> Tensor:
    if frame.grid is None:
        return frame.tokens
    h, w = frame.grid
    rows = rearrange(frame.tokens, "(h w) d -> h w d", h=h, w=w)
    return torch.cat([rows, newline.expand(h, 1, -1)], dim=1).flatten(0, 1)


# -- interpolation ---------------------------------------------------------------------------------------------------


def _resample(x: Tensor, rows: int, cols: int, grid: tuple[int, int], mode: str) -> Tensor:
    """(B, rows cols, D) -> (B, h w, D)."""
    image = rearrange(x, "b (r c) d -> b d r c", r=rows, c=cols).contiguous()
    if mode == "adaptive_pool":
        image = F.adaptive_avg_pool2d(image, grid)
    else:
        image = F.interpolate(image, grid, mode="bilinear", align_corners=False, antialias=False)
    return rearrange(image, "b d h w -> b (h w) d")


def _pooled_grid(rows: int, cols: int, pool: int) -> tuple[int, int]:
    return math.ceil(rows / pool), math.ceil(cols / pool)


def _pool(x: Tensor, rows: int, cols: int, pool: int) -> Tensor:
    """The host's own pooling, as the model does it without a token budget."""
    return x if pool == 1 else _resample(x, rows, cols, _pooled_grid(rows, cols, pool), "bilinear")


# -- token merging ---------------------------------------------------------------------------------------------------


def _plan_tome(x: Tensor, rows: int, cols: int, n: int, pool: int) -> ShrinkPlan:
    pooled = _pooled_grid(rows, cols, pool)
    rounds, _ = _match_down(_pool(x.detach().to(_compute_dtype(x)), rows, cols, pool), n)
    cells = grid_sources(pooled, rows, cols).to(x.device).expand(len(x), -1)
    for matching in rounds:
        cells = cells.gather(1, matching.representative)
    return ShrinkPlan("tome", rows, cols, cells, None if rounds else pooled, pool, rounds)


def _plan_separable(
    x: Tensor, rows: int, cols: int, grid: tuple[int, int]
) -> tuple[tuple[_Round, ...], tuple[_Round, ...]]:
    h, w = grid
    x = x.detach().to(_compute_dtype(x))
    rounds, narrow = _match_down(rearrange(x, "b (r c) d -> (b r) c d", r=rows, c=cols), w)
    column_rounds, _ = _match_down(rearrange(narrow, "(b r) w d -> (b w) r d", r=rows), h)
    return rounds, column_rounds


def _merge_separably(
    x: Tensor, rows: int, cols: int, rounds: Sequence[_Round], column_rounds: Sequence[_Round]
) -> Tensor:
    frames = len(x)
    narrow = _merge(rearrange(x, "b (r c) d -> (b r) c d", r=rows, c=cols), rounds)
    small = _merge(rearrange(narrow, "(b r) w d -> (b w) r d", r=rows), column_rounds)
    return rearrange(small, "(b w) h d -> b (h w) d", b=frames)


@torch.no_grad()
def _match_down(x: Tensor, target: int) -> tuple[tuple[_Round, ...], Tensor]:
    """Match (B, t, D) tokens, at most half of them a round, until `target` are left; the rounds and what is left."""
    rounds = []
    while (t := x.shape[1]) > target:
        rounds.append(_match(x, min(t - target, t // 2)))
        x = _merge(x, rounds[-1:])
    return tuple(rounds), x


def _match(x: Tensor, r: int) -> _Round:
    """ToMe's bipartite matching by the features themselves: the r even tokens most like an odd one go into it.

    What is left stands as the surviving even tokens, most similar first, then the odd ones: the next round's partition.
    """
    batch, t, _ = x.shape
    position = torch.arange(t, device=x.device)
    value, destination = ops.bipartite_match(x[:, ::2], x[:, 1::2])
    ranked = ops.rank(value)
    merged, left = ranked[:, :r], ranked[:, r:]
    kept = left.shape[1]
    even = torch.empty_like(ranked).scatter(1, left, position[:kept].expand(batch, -1))
    even = even.scatter(1, merged, kept + destination.gather(1, merged))
    assignment = position.repeat(batch, 1)
    assignment[:, ::2] = even
    assignment[:, 1::2] = kept + position[: t // 2]
    return _Round(assignment, torch.cat([2 * left, position[1::2].expand(batch, -1)], dim=1))


def _merge(x: Tensor, rounds: Sequence[_Round]) -> Tensor:
    """Each slot becomes the plain mean of its tokens; sizes start anew every round, as released."""
    for matching in rounds:
        x = ops.merge_tokens(x, matching.assignment, matching.representative.shape[1])[0]
    return x


# -- checks ----------------------------------------------------------------------------------------------------------


def _shape_key(n: int, rows: int, cols: int, mode: ShrinkMode) -> object:
    """Frames with one key can be shrunk together."""
    if mode in ("linspace", "tome"):
        return n
    return grid_shape(n if mode == "bilinear" else min(n, rows * cols), rows, cols)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_features(x: Tensor, rows: int, cols: int) -> None:
    check_count("rows", rows, minimum=1)
    check_count("cols", cols, minimum=1)
    if x.dim() != 3 or x.shape[1] != rows * cols or not x.is_floating_point():
        raise InvalidParameterError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: expected floating features (B, rows cols, D) "
            f"with rows cols = {rows} * {cols} = {rows * cols}"
        )
