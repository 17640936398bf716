"""Top-K by class attention: EViT's rule without its training (Liang et al., ICLR 2022, arXiv 2202.07800)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_choice, check_fraction, check_layers, resolve_layers
from tokred.core.errors import InvalidParameterError, NoClassTokenError
from tokred.core.method import EncoderMethod, keep_top
from tokred.core.sites import EncoderBlock, EncoderInfo, Placement
from tokred.core.tokens import Keep, Merge

__all__ = ["TopK"]


@dataclass(frozen=True, repr=False)
class TopK(EncoderMethod):
    """Keep the tokens that the class token attends to most.

    Attributes:
        keep_rate: rho in (0, 1], of the tokens present at each of the layers; or one rate a layer.
        layers: 0-based blocks; None is the paper's (3, 6, 9), as far as the model has them.
        score: "cls" is the class token's attention, mean over heads (section 3.1); "mass" is the attention received
            from all tokens, for encoders without a class token.
        fuse: append one token, the attention-weighted sum of the dropped ones (section 3.2; weights are not
            normalised, as released).
    """

    keep_rate: float | Sequence[float] = 0.7
    layers: Sequence[int] | None = None
    score: Literal["cls", "mass"] = "cls"
    fuse: bool = False

    name: ClassVar[str] = "topk"
    title: ClassVar[str] = "Top-K (EViT)"
    paper: ClassVar[str] = "Not All Patches are What You Need: EViT (ICLR 2022, arXiv 2202.07800)"
    default_layers: ClassVar[tuple[int, ...]] = (3, 6, 9)

    def __post_init__(self) -> None:
        check_choice("score", self.score, ("cls", "mass"))
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if isinstance(self.keep_rate, Sequence) and not isinstance(self.keep_rate, str):
            object.__setattr__(self, "keep_rate", tuple(check_fraction("keep_rate", rate) for rate in self.keep_rate))
            expected = len(self.layers if self.layers is not None else self.default_layers)
            if len(self.keep_rate) != expected:
                raise InvalidParameterError(f"keep_rate has {len(self.keep_rate)} entries for {expected} layers")
        else:
            check_fraction("keep_rate", self.keep_rate)

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return not self.fuse

    @property
    def placement(self) -> Placement:
        return "attn"

    @property
    def taps(self) -> frozenset[str]:
        return frozenset({"qk"} if self.score == "cls" else {"qk", "mass"})

    def bind(self, info: EncoderInfo) -> dict[int, float]:
        if self.score == "cls" and info.class_tokens == 0:
            raise NoClassTokenError("TopK: this encoder has no class token to score by; use score='mass'")
        layers = resolve_layers("layers", self.layers, self.default_layers, info.depth, "TopK")
        rates = self.keep_rate if isinstance(self.keep_rate, Sequence) else [self.keep_rate] * len(layers)
        return {layer: rate for layer, rate in zip(layers, rates, strict=False) if rate < 1}

    def count(self, tokens: int, rule: float) -> int:
        kept = math.ceil(rule * tokens)
        return kept + 1 if self.fuse and kept < tokens else kept

    def acts(self, tokens: int, rule: float) -> bool:
        return math.ceil(rule * tokens) < tokens  # with fuse, one token may take the place of one

    def reduce(self, view: EncoderBlock, rule: float) -> Keep | Merge | None:
        scores = view.class_attention() if self.score == "cls" else view.attention_mass()
        scores = scores.mean(dim=1)
        if not self.fuse:
            return keep_top(view, scores, lambda n: math.ceil(rule * n))
        return _fuse(scores, math.ceil(rule * view.count))

    def cost(self, info: EncoderInfo, tokens: int, rule: float) -> int:
        total = tokens + info.prefix
        queries = 1 if self.score == "cls" else total
        return queries * total * info.heads * info.head_dim


def _fuse(scores: Tensor, kept: int) -> Merge | None:
    """Keep the top tokens as they are; the rest goes, weighted by score, into one more slot at the end."""
    batch, n = scores.shape
    if kept >= n:
        return None
    top = ops.top_indices(scores, kept)
    slots = torch.arange(kept, device=scores.device).expand(batch, -1)
    assignment = top.new_full((batch, n), kept).scatter(1, top, slots)
    strongest = scores.scatter(1, top, -1.0).argmax(dim=1, keepdim=True)
    weights = scores.float().scatter(1, top, 1.0)
    return Merge(assignment, torch.cat([top, strongest], dim=1), weights, reduce="sum")
