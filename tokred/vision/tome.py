"""ToMe: merge similar tokens between attention and MLP of every block (Bolya et al., ICLR 2023, arXiv 2210.09461)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_choice, check_count, check_fraction, check_removals, removals_per_layer
from tokred.core.errors import InvalidParameterError
from tokred.core.method import EncoderMethod
from tokred.core.sites import EncoderBlock, EncoderInfo, Placement
from tokred.core.tokens import Merge

__all__ = ["ToMe", "match_bipartite", "match_every_kth", "match_random"]

Metric = Literal["key", "key_concat", "query", "value", "x"]


@dataclass(frozen=True, repr=False)
class ToMe(EncoderMethod):
    """Token merging by bipartite soft matching.

    Attributes:
        r: tokens removed in each block: a count for every block, a list of counts, or ``(r, inflection)`` with the
            inflection in [-1, 1] (-1 removes most early, 0 is constant). Capped at half of the tokens of a block.
        ratio: instead of `r`, the share of the present tokens that each block removes, in (0, 0.5].
        prop_attn: proportional attention, ``+ log size`` on the logits of each key (eq. 1). Off for off-the-shelf MAE.
        weighted_pool: average and attention pooling weigh tokens by size; off reproduces the released timm patch.
        metric: what is compared: mean key over heads ("key", the paper's choice), all heads concatenated
            ("key_concat"), mean query or value, or the residual stream ("x").
        matching: "bipartite" (section 3), or of the released file "kth" (in every run of `k` tokens the last one
            receives the others) and "random" (r random tokens merge into the rest).
        k: run length of "kth"; it merges in the blocks where `r` is not 0.
        order: without prefix tokens the released code leaves the unmerged even tokens in order of similarity
            ("official"), which decides the next block's even/odd split; "ascending" keeps the spatial order.
        seed: of "random".
    """

    r: int | Sequence[float] = 8
    ratio: float | None = None
    prop_attn: bool = True
    weighted_pool: bool = True
    metric: Metric = "key"
    matching: Literal["bipartite", "kth", "random"] = "bipartite"
    k: int = 2
    order: Literal["official", "ascending"] = "official"
    seed: int = 0

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe"
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster (ICLR 2023, arXiv 2210.09461)"
    conflicts: ClassVar[dict[str, str]] = {
        "zero_tprune": "pruning by importance assumes that every token still is one patch"
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", check_removals("r", self.r))
        if self.ratio is not None:
            check_fraction("ratio", self.ratio)
            if self.ratio > 0.5:
                raise InvalidParameterError(f"ratio={self.ratio!r}: one matching merges at most half of the tokens")
        check_choice("metric", self.metric, ("key", "key_concat", "query", "value", "x"))
        check_choice("matching", self.matching, ("bipartite", "kth", "random"))
        check_choice("order", self.order, ("official", "ascending"))
        check_count("k", self.k, minimum=2)
        check_count("seed", self.seed)

    @property
    def proportional_attention(self) -> bool:  # type: ignore[override]
        return self.prop_attn

    @property
    def placement(self) -> Placement:
        return "attn"

    @property
    def taps(self) -> frozenset[str]:
        return frozenset({"qk", "v"} if self.metric == "value" else {"qk"})

    def bind(self, info: EncoderInfo) -> dict[int, float]:
        if self.ratio is not None:
            return dict.fromkeys(range(info.depth), self.ratio)
        assert isinstance(self.r, (int, tuple))
        return {layer: r for layer, r in enumerate(removals_per_layer(self.r, info.depth)) if r > 0}

    def count(self, tokens: int, rule: float) -> int:
        if self.matching == "kth":
            return tokens // self.k or tokens  # less than one whole run: nothing to merge
        return tokens - self._removals(tokens, rule)

    def _removals(self, tokens: int, rule: float) -> int:
        r = round(rule * tokens) if self.ratio is not None else int(rule)
        return min(r, tokens // 2 if self.matching == "bipartite" else max(tokens - 1, 0))

    def reduce(self, view: EncoderBlock, rule: float) -> Merge | None:
        metric = self._metric(view)
        if self.matching == "kth":
            return match_every_kth(metric, self.k)
        r = self._removals(view.count, rule)
        if self.matching == "random":
            return match_random(metric, r, seed=self.seed + view.layer)
        return match_bipartite(metric, r, view.prefix, self.order)

    def _metric(self, view: EncoderBlock) -> Tensor:
        """(B, n, d) of the prunable tokens."""
        if self.metric == "x":
            return view.tokens[:, view.prefix :]
        source = {"query": view.queries, "value": view.values}.get(self.metric, view.keys)
        heads = source()[:, :, view.prefix :]
        return heads.transpose(1, 2).flatten(2) if self.metric == "key_concat" else heads.mean(dim=1)

    def cost(self, info: EncoderInfo, tokens: int, rule: float) -> int:
        width = {"key_concat": info.kv_heads * info.head_dim, "x": info.dim}.get(self.metric, info.head_dim)
        left = self.count(tokens, rule)
        if self.matching == "kth":
            return (tokens // self.k * self.k - left) * left * width
        if self.matching == "random":
            return (tokens - left) * left * width
        return math.ceil(tokens / 2) * (tokens // 2) * width


def match_bipartite(
    metric: Tensor, r: int, prefix: int = 0, order: Literal["official", "ascending"] = "official"
) -> Merge:
    """Bipartite soft matching (section 3): the r even tokens that are most like an odd one merge into it.

    Even and odd are counted over all positions, prefix tokens in front included; prefix tokens take no part. The
    result lists the surviving even tokens, then all odd ones: this order is the next block's partition.

    Args:
        metric: (B, n, d) of the prunable tokens. r: tokens to remove, at most n // 2.
        prefix: prefix tokens in front of them.
        order: see `ToMe.order`; it matters only for `prefix` = 0.
    """
    batch, n, _ = metric.shape
    even, odd = slice(prefix % 2, None, 2), slice(1 - prefix % 2, None, 2)
    value, destination = ops.bipartite_match(metric[:, even], metric[:, odd])
    ranked = ops.rank(value)
    source, unmerged = ranked[:, :r], ranked[:, r:]
    if prefix or order == "ascending":
        unmerged = unmerged.sort(dim=1).values
    position = torch.arange(n, device=metric.device)
    even_at, odd_at = position[even], position[odd]
    kept = unmerged.shape[1]
    representative = torch.cat([even_at[unmerged], odd_at.expand(batch, -1)], dim=1)
    slots = torch.arange(representative.shape[1], device=metric.device).expand(batch, -1)
    assignment = representative.new_empty(batch, n).scatter(1, representative, slots)
    return Merge(assignment.scatter(1, even_at[source], kept + destination.gather(1, source)), representative)


def match_every_kth(metric: Tensor, k: int) -> Merge:
    """Of each run of k tokens the last receives; every other token merges into the receiver most like it.

    As in the released file, the ``n % k`` tokens behind the last whole run are dropped.
    """
    batch, n, _ = metric.shape
    position = torch.arange(n, device=metric.device)
    whole = n // k * k
    receives = (position % k == k - 1) & (position < whole)
    source, receiver = position[~receives & (position < whole)], position[receives]
    _, destination = ops.bipartite_match(metric[:, source], metric[:, receiver])
    return _into(receiver.expand(batch, -1), source.expand(batch, -1), destination, n)


def match_random(metric: Tensor, r: int, seed: int = 0) -> Merge:
    """r random tokens each merge into the most similar of the others (the released file's control)."""
    batch, n, _ = metric.shape
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(metric.device)
    source, receiver = shuffled[:r], shuffled[r:]
    _, destination = ops.bipartite_match(metric[:, source], metric[:, receiver])
    return _into(receiver.expand(batch, -1), source.expand(batch, -1), destination, n)


def _into(receiver: Tensor, source: Tensor, destination: Tensor, n: int) -> Merge:
    """Receivers keep slots 0, 1, ... in the order given; each source goes to the slot of its destination."""
    slots = torch.arange(receiver.shape[1], device=receiver.device).expand_as(receiver)
    assignment: Any = receiver.new_full((receiver.shape[0], n), -1).scatter(1, receiver, slots)
    return Merge(assignment.scatter(1, source, destination), receiver)
