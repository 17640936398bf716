"""QuoTA: query-oriented token budgets for the frames of a video (AAAI 2026, arXiv 2503.08689).

The paper's running text was not at hand; the rules follow its released code (MAC-AutoML/QuoTA) unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.budget import check_budget, check_choice, check_count
from tokred.core.errors import InvalidParameterError, ScorerError
from tokred.core.method import VisualMethod
from tokred.core.scoring import Decoupled, Decoupler, FrameScorer, score_frames, validate_scores
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Resample
from tokred.vlm.allocate import CapMode, allocate, frame_weights
from tokred.vlm.shrink import SHRINK_MODES, ShrinkMode, Shrunk, VideoPlan, pack, video_plan

__all__ = ["QuoTA"]


@dataclass(frozen=True, repr=False)
class QuoTA(VisualMethod):
    """Spend a fixed number of visual tokens on the frames of a video, in proportion to their relevance to the question.

    Every frame p_i scored in [0, 1] gets ``floor(N p_i^gamma / sum_j p_j^gamma)`` tokens and is resized to a grid of as
    many; frames without tokens vanish. Images are left alone.

    Attributes:
        budget: N, tokens of a video: a count, or a share of those that the host makes of it by itself. (Released: 64
            frames of 196 = 12544.) It may exceed them: the paper samples more frames than the model is used to.
        scorer: what scores frames: a callable (frames, query, objects) -> (T,), or the scores themselves. None takes
            what `Patch.request(frame_scores=)` gives, or else the library's CLIP scorer.
        decoupler: prepares the question for the scorer (chain-of-thought decoupling); None hands it on as it is.
        power: gamma in [0, 8], sharpness (released: 2); 0 is uniform.
        shrink: how a frame is resized: "bilinear" (released default), "adaptive_pool", "linspace", "tome",
            "tome_separable".
        max_tokens_per_frame: None is the released rule: no limit for "bilinear", which then enlarges a frame beyond
            its own grid, and the frame's own tokens for the others.
        min_tokens_per_frame: tokens that every frame gets first; None is 0, or 1 where text stands between the frames
            (Qwen3-VL's timestamps), so that no timestamp is left without a frame.
        cap_mode: how what exceeds the limit is handed on: "official" (one pass, underspends) or "waterfill".
        reduce: of the scores of the frames that a model joins into one (Qwen: 2), "max" or "mean".
        frames: "video" acts on the videos of a prompt; "images" reads its images as the frames of one video (for models
            without video placeholders: InternVL, whose processor writes videos so, LLaVA, Gemma 3). They must be of
            one size and one tile.
        newline: "host" packs as the host does, "grid" puts the model's newline behind every row (LLaVA-Video).
        positions: "compact" or "original"; None is compact, and original where positions are places (Qwen).
    """

    budget: float | int = 12544
    scorer: FrameScorer | Tensor | None = None
    decoupler: Decoupler | None = None
    power: float = 2.0
    shrink: ShrinkMode = "bilinear"
    max_tokens_per_frame: int | None = None
    min_tokens_per_frame: int | None = None
    cap_mode: CapMode = "official"
    reduce: Literal["max", "mean"] = "max"
    frames: Literal["video", "images"] = "video"
    newline: Literal["host", "grid"] = "host"
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "quota"
    title: ClassVar[str] = "QuoTA"
    paper: ClassVar[str] = "QuoTA: Query-oriented Token Assignment for Long Video Comprehension (arXiv 2503.08689)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_choice("shrink", self.shrink, SHRINK_MODES)
        check_choice("cap_mode", self.cap_mode, ("official", "waterfill"))
        check_choice("reduce", self.reduce, ("max", "mean"))
        check_choice("frames", self.frames, ("video", "images"))
        check_choice("newline", self.newline, ("host", "grid"))
        check_choice("positions", self.positions, ("compact", "original", None))
        frame_weights([1.0], self.power)  # refuses a power out of range
        if self.max_tokens_per_frame is not None:
            check_count("max_tokens_per_frame", self.max_tokens_per_frame, minimum=1)
        if self.min_tokens_per_frame is not None:
            check_count("min_tokens_per_frame", self.min_tokens_per_frame)
        for field, value in (("scorer", self.scorer), ("decoupler", self.decoupler)):
            if value is not None and not callable(value) and not (field == "scorer" and isinstance(value, Tensor)):
                raise InvalidParameterError(f"{field}={value!r}: expected a callable{_OR_SCORES[field]}")

    def __hash__(self) -> int:
        return hash((type(self), self.budget, id(self.scorer), id(self.decoupler), self.power, self.shrink))

    def to_dict(self) -> dict[str, Any]:
        """JSON types; a scorer or decoupler is code and cannot be written: that is an error, not a silent loss."""
        for field in ("scorer", "decoupler"):
            if getattr(self, field) is not None:
                raise InvalidParameterError(
                    f"QuoTA({field}=...) holds an object, which JSON cannot; write QuoTA without it and give it again"
                )
        return super().to_dict()

    @property
    def joins_images(self) -> bool:  # type: ignore[override]
        return self.frames == "images"

    def needs(self, tower: TowerInfo) -> Needs:
        return Needs(dense=True, pixels=not isinstance(self.scorer, Tensor))

    def bypasses(self, layout: MediaLayout) -> bool:
        return layout.kind != "video"

    def kept(self, layout: MediaLayout) -> int:
        total = len(layout.cells)
        if layout.kind != "video":
            return total
        tokens = self.budget if isinstance(self.budget, int) else math.floor(self.budget * total + 1e-6)
        return max(tokens, 1)

    def largest(self, layout: MediaLayout) -> int:
        rows = self.kept(layout) if self.newline == "grid" and layout.kind == "video" else 0  # at worst a column each
        return self.kept(layout) + rows

    def select(self, view: VisualFeatures) -> list[Resample]:
        dense, grid, finish = view.dense()
        made = []
        for item in range(view.items):
            counts = self.frame_tokens(self.frame_scores(view, item), view, grid)
            plan = video_plan(dense[item], *grid, counts, self.shrink, _stride(grid, view.layout.grid))
            made.append(self._answer(view, dense[item], grid, plan, finish))
        return made

    def frame_scores(self, view: VisualFeatures, item: int) -> Tensor:
        """(T,) float64 relevance of the frames as the language model reads them."""
        scores = view.frame_scores(item)
        if scores is None and isinstance(self.scorer, Tensor):
            scores = self.scorer
        if scores is None:
            frames, query = view.frames(item), view.query(item)
            scorer = self.scorer if self.scorer is not None else view.default_scorer()
            asked = Decoupled(query) if self.decoupler is None else self.decoupler(query)
            scores = score_frames(scorer, list(frames), asked.query, asked.objects)
        count = view.layout.partitions
        if scores.dim() != 1:
            raise ScorerError(f"frame scores have shape {tuple(scores.shape)}: expected ({count},), one for each frame")
        step = math.ceil(len(scores) / count) if view.mrope else 1  # Qwen joins neighbouring frames into one
        if not 0 < math.ceil(len(scores) / max(step, 1)) == count:
            raise ScorerError(f"there are {len(scores)} frame scores for a video of {count} frames; give one for each")
        groups = validate_scores(scores, len(scores)).split(step)
        return torch.stack([group.max() if self.reduce == "max" else group.mean() for group in groups])

    def frame_tokens(self, scores: Tensor, view: VisualFeatures, grid: tuple[int, int]) -> Tensor:
        """(T,) int64: tokens of each frame (0: the frame vanishes)."""
        limit = self.max_tokens_per_frame
        if self.shrink != "bilinear":
            own = math.prod(view.layout.grid if self.shrink == "tome" else grid)
            limit = own if limit is None else min(limit, own)
        least = self.min_tokens_per_frame
        if least is None:
            least = 1 if view.separated else 0
        least = min(least, self.kept(view.layout) // len(scores))
        return allocate(scores, self.kept(view.layout), self.power, limit, self.cap_mode, least)

    def _answer(
        self, view: VisualFeatures, dense: Tensor, grid: tuple[int, int], plan: VideoPlan, finish: Any
    ) -> Resample:
        frames = plan.apply(dense)
        lengths = [len(frame.sources) for frame in frames]
        tokens = finish(torch.cat([frame.tokens for frame in frames])).split(lengths)
        own = math.prod(view.layout.grid)
        cells = [
            t * own + _coarser(frame.sources, grid, view.layout.grid)
            for t, frame in zip(plan.kept, frames, strict=True)
        ]
        ready = [Shrunk(x, c, f.grid) for x, c, f in zip(tokens, cells, frames, strict=True)]
        mode: Literal["grid", "none"] = "grid" if self.newline == "grid" else "none"
        if mode == "grid" and view.newline is None:
            raise InvalidParameterError("newline='grid': this model has no newline embedding; use newline='host'")
        where = [Shrunk(f.sources[:, None].double(), f.sources, f.grid) for f in ready]
        sources = pack(where, torch.tensor([-1.0]), mode)[:, 0].long()

        def transfer(x: Tensor) -> Tensor:
            resized = plan.apply(x.unflatten(0, (view.layout.partitions, -1)))
            return torch.cat([frame.tokens for frame in resized])

        return Resample(sources, pack(ready, view.newline, mode), transfer, keep_end=mode == "none")


_OR_SCORES = {
    "scorer": " (frames, query, objects) -> (T,) or a tensor of scores (T,)",
    "decoupler": " query -> Decoupled",
}


def _stride(dense: tuple[int, int], own: tuple[int, int]) -> int:
    """Stride of the pooling that the host does by itself."""
    return max(1, round(dense[0] / own[0]))


def _coarser(cells: Tensor, fine: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """Cells of one grid -> the cells of a coarser one that hold them."""
    rows, columns = cells // fine[1], cells % fine[1]
    return rows * coarse[0] // fine[0] * coarse[1] + columns * coarse[1] // fine[1]
