"""SparseVLM: text-guided sparsification with recycling of dropped tokens (arXiv 2410.04417, ICML 2025), version 1.5.

SparseVLM+ (version 2 of the released code) is not here: it divides attention by what rotary positions alone would
make of it, and the site does not offer the model's rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import ops
from tokred.core.budget import budget_tokens, check_budget, check_choice, check_count
from tokred.core.decoder import DecoderMethod, LayerNeeds, Positions, PrefillLayer, Survivors
from tokred.core.errors import InvalidParameterError
from tokred.core.sites import DecoderInfo
from tokred.vlm.select import check_share, exact
from tokred.vlm.survivors import check_stages, dropping_stages, plan_stages, scale_stages, spread

__all__ = ["SparseVLM", "find_raters", "merge_clusters"]

#: visual tokens of the released settings, and what each keeps of them after its stages
TOKENS = 576
RETAINED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
RATERS = "sparsevlm.raters"


def find_raters(embeddings: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """(B, T) bool: the text tokens that rate visual ones, by what enters the language model (section 3.2).

    A text token's relevance is its share of the softmax over text of ``V T^T``, averaged over the visual tokens; raters
    are above the mean. Only text behind the last visual token rates, since no other sees them all; if none is above the
    mean, all of it does; without any, the last token.

    Args:
        embeddings: (B, T, D). visual, text: (B, T) bool, of which a row has at least one.
    """
    raters = torch.zeros_like(visual)
    for row in range(len(visual)):
        images = visual[row].nonzero()[:, 0]
        rating = text[row].nonzero()[:, 0]
        rating = rating[rating > images[-1]] if len(images) else rating[:0]
        if len(rating) == 0:
            raters[row, (visual | text)[row].nonzero()[-1]] = True
            continue
        x = embeddings[row].detach().to(torch.promote_types(embeddings.dtype, torch.float32))
        with exact(x):
            relevance = (x[images] @ x[rating].T).softmax(dim=1).mean(dim=0)
        above = relevance > relevance.mean()
        raters[row, rating] = above if bool(above.any()) else True
    return raters


def merge_clusters(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters of tokens (n, D) around density peaks: their centres (C,) int64, ascending, and their means (C, D).

    Density is ``exp(-mean d^2)`` over the nearest tokens, as many as there are clusters (the token itself is one), with
    d the distance over the root of D. Centres have the largest density times distance to the nearest denser token;
    of equally dense ones the lower counts as denser (released: random noise). Others join the nearest centre. Computed
    in logarithms, which do not underflow.
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    d = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    density = -d.sort(dim=1).values[:, :clusters].square().mean(dim=1)
    places = torch.arange(len(x), device=x.device)
    denser = density > density[:, None]
    denser = denser | ((density == density[:, None]) & (places < places[:, None]))
    gap = torch.where(denser, d, math.inf).amin(dim=1)
    gap = torch.where(gap == math.inf, d.max(), gap)  # nothing is denser than the densest
    centres = ops.top_indices((density + gap.log())[None], clusters)[0]
    owner = d[:, centres].argmin(dim=1).scatter(0, centres, torch.arange(clusters, device=x.device))
    members = F.one_hot(owner, clusters).T.to(wide.dtype)
    with exact(wide):
        means = members @ x.to(wide.dtype) / members.sum(dim=1, keepdim=True)
    return centres, means.to(x.dtype)


@dataclass(frozen=True, repr=False)
class SparseVLM(DecoderMethod):
    """Behind some layers, keep the visual tokens that relevant text attends to, and clusters of the best of the others.

    Raters are found once, from the embeddings (`find_raters`). A visual token's score is the attention that it receives
    from them in the layer that has just run, averaged over raters and heads. Of the dropped tokens, the best share is
    recycled: clustered (`merge_clusters`), and the mean of each cluster stands behind the last visual token that the
    prompt keeps, in the order of the cluster centres. All tokens are numbered anew. As released (version 1.5), what is
    kept comes from a table, not from the rank of the attention matrix as in section 3.3 of the paper.

    The released numbers are for 576 visual tokens; other prompts keep the same shares (rounded down, at least 1).

    Attributes:
        stages: the layers behind which tokens are dropped; None is (2, 6, 15), as far as the model has them.
        retained: 192, 128, 96 or 64: the row of the released table, by its average number of tokens over the layers
            (in the authors' count). None and no counts is 192.
        counts: instead, the numbers of tokens to keep behind each stage, whatever the prompt; recycled ones are extra.
        budget: visual tokens that are left after the last stage, recycled ones included, as a fraction or a number;
            `retained` or `counts` then say only how many more the other stages have.
        recycle: the share of the dropped tokens that is recycled, plus one; 0 recycles none.
        positions: see `DecoderMethod`.
    """

    stages: Sequence[int] | None = None
    retained: int | None = None
    counts: Sequence[int] | None = None
    budget: float | int | None = None
    recycle: float = 0.3
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "sparsevlm"
    title: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str] = "SparseVLM: Visual Token Sparsification (ICML 2025, arXiv 2410.04417), version 1.5"
    own_positions: ClassVar[Positions] = "compact"
    default_stages: ClassVar[tuple[int, ...]] = (2, 6, 15)

    def __post_init__(self) -> None:
        if self.counts is not None and self.retained is not None:
            raise InvalidParameterError("retained and counts exclude each other; give one")
        if self.counts is None:
            object.__setattr__(self, "retained", 192 if self.retained is None else self.retained)
            check_choice("retained", self.retained, tuple(RETAINED))
        rows = RETAINED[self.retained] if self.retained is not None else self.counts
        assert rows is not None
        object.__setattr__(self, "stages", check_stages(self.stages, self.default_stages, "counts", rows))
        if self.counts is not None:
            counts = tuple(check_count("counts", count, minimum=1) for count in self.counts)
            if list(counts) != sorted(counts, reverse=True):
                raise InvalidParameterError(f"counts={self.counts!r}: the tokens that are left cannot ascend")
            object.__setattr__(self, "counts", counts)
        if self.budget is not None:
            object.__setattr__(self, "budget", check_budget("budget", self.budget))
        check_share("recycle", self.recycle)
        check_choice("positions", self.positions, (None, "compact", "original"))

    def _plan(self, info: DecoderInfo) -> dict[int, float | int]:
        """{site layer: what is left from there on}, recycled tokens included only if there is a budget."""
        rows: Sequence[float | int]
        if self.counts is not None:
            rows = self.counts
        else:
            assert self.retained is not None
            rows = [count / TOKENS for count in RETAINED[self.retained]]
        plan = plan_stages("SparseVLM", self.stages, self.default_stages, rows, info.depth)
        if self.budget is not None:
            plan = dropping_stages(scale_stages(plan, self.budget))
        return {layer + 1: left for layer, left in plan.items()}

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        plan = self._plan(info)
        return {layer: LayerNeeds(previous=True, embeddings=layer == min(plan)) for layer in plan}

    def recycled(self, dropped: int) -> tuple[int, int]:
        """(how many of so many dropped tokens are recycled, into how many clusters)."""
        if not self.recycle or not dropped:
            return 0, 0
        count = min(int(dropped * self.recycle) + 1, dropped)
        return count, count // 10 + 1

    def split(self, tokens: int, left: int) -> tuple[int, int]:
        """(tokens to keep, clusters of others) of so many tokens that enter a stage which leaves `left`."""
        if left >= tokens:
            return tokens, 0
        if self.budget is None:
            clusters = self.recycled(tokens - left)[1]
            return (left, clusters) if left + clusters < tokens else (tokens, 0)
        fitting = (kept for kept in range(left, 0, -1) if kept + self.recycled(tokens - kept)[1] == left)
        kept = next(fitting, left)  # too few for a cluster: nothing is recycled
        return kept, left - kept

    def prune(self, view: PrefillLayer) -> Survivors | None:
        raters = view.marks.get(RATERS)
        if raters is None:
            raters = find_raters(view.embeddings(), view.visual, view.text)
        budget, first = self._plan(view.info)[view.layer], view.initial.tolist()
        here = view.visual.sum(dim=1).tolist()
        splits = [self.split(n, budget_tokens(budget, total)) for n, total in zip(here, first, strict=True)]
        keep = view.valid
        if all(kept == n for n, (kept, _) in zip(here, splits, strict=True)):
            return None if RATERS in view.marks else Survivors(keep, marks={RATERS: raters})
        scores = rated(view, raters)
        order = 2 * torch.arange(keep.shape[1], device=keep.device).repeat(len(keep), 1)
        hidden = view.hidden.clone()
        for row, (kept, clusters) in enumerate(splits):
            places = view.visual[row].nonzero()[:, 0]
            ranking = places[ops.rank(scores[row, places][None])[0]]
            dropped = ranking[kept:]
            keep[row, dropped] = False
            if clusters:
                recycled = dropped[: self.recycled(len(dropped))[0]].sort().values
                centres, means = merge_clusters(view.hidden[row, recycled], clusters)
                centres = recycled[centres]
                keep[row, centres] = True
                hidden[row, centres] = means
                order[row, centres] = 2 * ranking[:kept].max() + 1  # behind the last one that is kept
        return Survivors(keep, order, hidden, marks={RATERS: raters})

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        counts, left = {}, visual
        for layer, budget in self._plan(info).items():
            left = sum(self.split(left, budget_tokens(budget, visual)))
            counts[layer] = left
        return spread(visual, counts, info.depth)

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """``V T^T`` once; rows of q k^T as if all text rated (raters are a part of it); distances between recycled."""
        macs, plan, visual = 0, self._plan(info), entering[0]
        for layer, budget in plan.items():
            before = entering[layer - 1]
            macs += info.dim * before * text if layer == min(plan) else 0
            macs += info.width * text * (before + text)
            dropped = before - self.split(before, budget_tokens(budget, visual))[0]
            macs += self.recycled(dropped)[0] ** 2 * info.dim
        return macs


def rated(view: PrefillLayer, raters: Tensor) -> Tensor:
    """(B, T) float32: attention of the raters (B, T) at the layer that has just run, averaged over them and heads."""
    most = int(raters.sum(dim=1).max())
    rows = ops.top_indices(raters.to(torch.uint8), most)
    is_rater = raters.gather(1, rows)
    rows = torch.where(is_rater, rows, view.last)  # rows with fewer raters ask again for what is then left out
    attention = view.attention_rows(rows).mean(dim=1).masked_fill(~is_rater[..., None], 0)  # (B, R, T)
    return attention.sum(dim=1) / is_rater.sum(dim=1, keepdim=True)
