"""Random dropping: the floor that every method has to beat at equal cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import (
    budget_tokens,
    check_budget,
    check_choice,
    check_count,
    check_fraction,
    check_layers,
    resolve_layers,
)
from tokred.core.errors import InvalidParameterError, LayerError
from tokred.core.method import EncoderMethod, VisualMethod, keep_top
from tokred.core.sites import EncoderBlock, EncoderInfo, MediaLayout, Placement, VisualFeatures
from tokred.core.tokens import Keep

__all__ = ["RandomTokens"]


@dataclass(frozen=True, repr=False)
class RandomTokens(EncoderMethod, VisualMethod):
    """Keep a random subset, the same positions for every image of a size (so a batch equals its images one by one).

    Attributes:
        keep_rate: share of the present tokens kept at each of the layers (rounded up).
        budget: instead, keep this share or number of the tokens, once: on a multimodal model of the visual tokens of
            each image or video before the language model, else at the first of the layers.
        counts: instead, {block: tokens to keep}: the twin of another method at the same cost.
        layers: 0-based blocks; None is (3, 6, 9), as far as the model has them.
        where: "attn" drops between attention and MLP, "block" after the block.
        seed: of the choice.
        positions, keep_newline: before a language model, see `VisualMethod`.
    """

    keep_rate: float | None = None
    budget: float | int | None = None
    counts: Mapping[int, int] | None = None
    layers: Sequence[int] | None = None
    where: Literal["attn", "block"] = "attn"
    seed: int = 0
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False

    name: ClassVar[str] = "random_tokens"
    title: ClassVar[str] = "Random"
    paper: ClassVar[str] = "control"
    sites: ClassVar[tuple[str, ...]] = ("EncoderBlock", "VisualFeatures")
    any_site: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    default_layers: ClassVar[tuple[int, ...]] = (3, 6, 9)

    def __post_init__(self) -> None:
        given = [field for field in ("keep_rate", "budget", "counts") if getattr(self, field) is not None]
        if len(given) > 1:
            raise InvalidParameterError(f"{' and '.join(given)} exclude each other; give one")
        if not given:
            object.__setattr__(self, "keep_rate", 0.7)
        if self.keep_rate is not None:
            check_fraction("keep_rate", self.keep_rate)
        if self.budget is not None:
            object.__setattr__(self, "budget", check_budget("budget", self.budget))
        if self.counts is not None:
            counts = {check_count("counts", k): check_count("counts", v, minimum=1) for k, v in self.counts.items()}
            object.__setattr__(self, "counts", counts)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        check_choice("where", self.where, ("attn", "block"))
        check_count("seed", self.seed)
        check_choice("positions", self.positions, (None, "compact", "original"))

    def __hash__(self) -> int:
        counts = None if self.counts is None else tuple(sorted(self.counts.items()))
        own = (self.keep_rate, self.budget, counts, self.layers, self.where, self.seed)
        return hash((*own, self.positions, self.keep_newline))

    def acts_at(self, offered: Sequence[str]) -> tuple[str, ...]:
        visual = self.budget is not None and "VisualFeatures" in offered
        return ("VisualFeatures",) if visual else ("EncoderBlock",)

    @property
    def placement(self) -> Placement:
        return self.where

    @property
    def taps(self) -> frozenset[str]:
        return frozenset()

    def bind(self, info: EncoderInfo) -> dict[int, float | int]:
        if self.counts is not None:
            outside = [layer for layer in self.counts if layer >= info.depth]
            if outside:
                raise LayerError(f"RandomTokens: counts names block {outside[0]}, but this model has {info.depth}")
            return dict(self.counts)
        layers = resolve_layers("layers", self.layers, self.default_layers, info.depth, "RandomTokens")
        if self.budget is not None:
            return {layers[0]: self.budget} if self.budget != 1.0 or isinstance(self.budget, int) else {}
        assert self.keep_rate is not None
        return dict.fromkeys(layers, self.keep_rate) if self.keep_rate < 1 else {}

    def count(self, tokens: int, rule: float | int) -> int:
        if self.keep_rate is not None:
            return math.ceil(rule * tokens)
        return budget_tokens(rule, tokens)

    def reduce(self, view: EncoderBlock, rule: float | int) -> Keep:
        noise = _hash_noise(view.table.total, self.seed * 1009 + view.layer, view.tokens.device)
        origins = view.table.origins  # noise belongs to places in the image, so that padding does not move it
        scores = noise.expand(view.tokens.shape[0], -1) if origins is None else noise[origins]
        return keep_top(view, scores, lambda n: self.count(n, rule))

    def kept(self, layout: MediaLayout) -> int:
        assert self.budget is not None
        return budget_tokens(self.budget, len(layout.cells))

    def select(self, view: VisualFeatures) -> Keep:
        noise = _hash_noise(view.layout.total_cells, self.seed * 1009, view.cells.device)
        kept = ops.top_indices(noise[view.cells][None], self.kept(view.layout))
        return Keep(kept.expand(view.items, -1))


def _hash_noise(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) float32 pseudo-random by an integer hash of the position: no generator, so it compiles and repeats."""
    x = torch.arange(count, device=device, dtype=torch.int64) + (0x9E3779B9 * (seed + 1) & 0xFFFFFFFF)
    for multiplier in (0x45D9F3B, 0x45D9F3B, 0x2545F491):
        x = (x ^ (x >> 16)) * multiplier & 0xFFFFFFFF
    return (x ^ (x >> 16)).float()
