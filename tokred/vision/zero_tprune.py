"""Zero-TPrune: pruning by the attention graph, without training (Wang, Dedhia, Jha; CVPR 2024, arXiv 2305.17328).

No official code of the published method exists. Comments mark what is the paper's and what is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_choice, check_count, check_fraction, check_layers, resolve_layers
from tokred.core.errors import InvalidParameterError, LayerError, nearest
from tokred.core.method import EncoderMethod
from tokred.core.sites import EncoderBlock, EncoderInfo, Placement
from tokred.core.tokens import Keep
from tokred.vision.zero_tprune_search import fit_flops, shape

__all__ = ["PRESETS", "Importance", "Similar", "Stage", "ZeroTPrune", "importance", "similar_tokens"]

Partition = Literal["sequential_u", "sequential_i", "alternate", "random", "none"]
Feature = Literal["key", "key_mean", "query", "value", "x_before", "x_after"]
SIMILARITIES = ("cosine", "dot", "l1", "l2", "minkowski3", "minkowski4", "minkowski5", "linf")


class Stage(NamedTuple):
    """What happens after one block: drop `r_s` near-copies, then keep the share `keep` by `iters` voting rounds."""

    r_s: int
    keep: float
    iters: int


#: Schedules for 12 blocks and 196 tokens: {block: (r_S, keep)}. "deit_s_3.08g" is recalled from the paper and its count
#: agrees with the published 3.08 G; the others are our own of the same shape at the published (or round) costs.
PRESETS: dict[str, dict[int, tuple[int, float]]] = {
    "deit_s_3.08g": {0: (10, 1.0), 2: (10, 0.9), 5: (10, 0.8), 8: (10, 0.7), 10: (10, 1.0)},
    "deit_s_3.97g": shape(0.2, 6),  # cost of Zero-TP-c
    "deit_s_3.40g": shape(0.58, 10),
    "deit_s_2.97g": shape(1.16, 10),  # cost of Zero-TP-a
    "deit_s_2.80g": shape(1.42, 10),
    "deit_s_2.50g": shape(1.95, 10),  # cost of Zero-TP-b
    "deit_s_2.21g": shape(2.585, 10),
}


@dataclass(frozen=True, repr=False)
class ZeroTPrune(EncoderMethod):
    """Prune by importance on the attention graph (I-stage) after removing near-copies (S-stage).

    One of `keep_rate`, `preset`, `schedule` and `flops` says how much.

    Attributes:
        keep_rate: I-stage alone, this share after each of `layers`.
        preset: a schedule of `PRESETS` (12 blocks, made for 196 tokens), such as "deit_s_3.08g" or "3.08G" for short.
        schedule: {block: (r_S, keep)} or {block: (r_S, keep, iterations)}, 0-based.
        flops: multiply-adds of the whole pruned model, as a fraction of the unpruned one (up to 1) or absolute; the
            schedule is found when the method meets the model, and meets the target within 1 %.
        layers: of `keep_rate`; None is (1, 3, 6, 9), as far as the model has them.
        iterations: of the importance vote; None is the paper's 30 in the first three blocks, 1 in the last three and 5
            between them.
        cls_boost: start weight of class tokens: "sqrt" of the number of tokens (paper), "none" ("Zero-TPrune-uni"),
            or "half_n", 1 + N / 2 (a third-party reading).
        boosted: positions of the prefix tokens that get it; None is the class token, and the distillation token where
            there is one (the paper names only the class token).
        order: "SI" removes copies first (paper); "IS" for ablation. The paper's I' vote precedes S in "SI".
        partition: which half copies are pruned from: the less important ("sequential_u", best in the paper), the more
            important ("sequential_i"), every second rank ("alternate"), a seeded half ("random"), or no halves
            ("none": the less important of any two alike tokens goes).
        feature: compared in the S-stage: "key" is all heads concatenated, "key_mean" their mean; "query", "value";
            "x_before" and "x_after" the block.
        similarity: "cosine" (best in the paper), "dot", or a negative distance.
        vhf: variance range of heads that may vote, None turns the filter off. var_norm: variance of scores rescaled
            to mean 1 ("mean1", our reading: raw scores cannot reach the paper's threshold) or of raw scores ("none").
        eir: root mean square over heads (paper's eq. of emphasizing); off is the plain mean.
        renorm: renormalise attention rows over the tokens that are left. damping, tau_imp, tol: options of the
            authors' early code (damping d, softmax temperature) and an early stop on the L1 change of scores.
        hook: prune after the "block" (paper), or after its attention ("attn").
        seed: of partition="random".
    """

    keep_rate: float | None = None
    preset: str | None = None
    schedule: Mapping[int, Sequence[float]] | None = None
    flops: float | None = None
    layers: Sequence[int] | None = None
    iterations: int | None = None
    cls_boost: Literal["sqrt", "none", "half_n"] = "sqrt"
    boosted: Sequence[int] | None = None
    order: Literal["SI", "IS"] = "SI"
    partition: Partition = "sequential_u"
    feature: Feature = "key"
    similarity: str = "cosine"
    vhf: tuple[float, float] | None = (0.01, 0.7)
    var_norm: Literal["mean1", "none"] = "mean1"
    eir: bool = True
    renorm: bool = True
    damping: float = 0.0
    tau_imp: float = 1.0
    tol: float | None = None
    hook: Literal["block", "attn"] = "block"
    seed: int = 0

    name: ClassVar[str] = "zero_tprune"
    title: ClassVar[str] = "Zero-TPrune"
    paper: ClassVar[str] = "Zero-TPrune: Zero-Shot Token Pruning (CVPR 2024, arXiv 2305.17328)"
    conflicts: ClassVar[dict[str, str]] = {"tome": "pruning by importance assumes that every token still is one patch"}
    default_layers: ClassVar[tuple[int, ...]] = (1, 3, 6, 9)

    def __post_init__(self) -> None:
        given = [name for name in ("keep_rate", "preset", "schedule", "flops") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidParameterError(f"{' and '.join(given)} exclude each other; give one")
        if not given:
            object.__setattr__(self, "keep_rate", 0.7)
        if self.keep_rate is not None:
            check_fraction("keep_rate", self.keep_rate)
        if self.preset is not None and f"deit_s_{self.preset}".lower() in PRESETS:
            object.__setattr__(self, "preset", f"deit_s_{self.preset}".lower())
        if self.preset is not None and self.preset not in PRESETS:
            raise InvalidParameterError(
                f"preset={self.preset!r}{nearest(str(self.preset), PRESETS)}; known: {', '.join(PRESETS)}"
            )
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _check_schedule(self.schedule))
        if self.flops is not None and not _positive(self.flops):
            raise InvalidParameterError(
                f"flops={self.flops!r}: expected a fraction up to 1 or a number of multiply-adds"
            )
        if self.layers is not None:
            if self.keep_rate is None:
                raise InvalidParameterError(f"layers belongs to keep_rate; {given[0]} brings its own blocks")
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if self.iterations is not None:
            check_count("iterations", self.iterations, minimum=1)
        check_choice("cls_boost", self.cls_boost, ("sqrt", "none", "half_n"))
        check_choice("order", self.order, ("SI", "IS"))
        check_choice("partition", self.partition, ("sequential_u", "sequential_i", "alternate", "random", "none"))
        check_choice("feature", self.feature, ("key", "key_mean", "query", "value", "x_before", "x_after"))
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("var_norm", self.var_norm, ("mean1", "none"))
        check_choice("hook", self.hook, ("block", "attn"))
        check_count("seed", self.seed)
        if self.boosted is not None:
            object.__setattr__(self, "boosted", _check_positions("boosted", self.boosted))
        if self.vhf is not None:
            object.__setattr__(self, "vhf", _check_range("vhf", self.vhf))
        if not _number(self.damping) or not 0 <= self.damping < 1:
            raise InvalidParameterError(f"damping={self.damping!r}: expected a number in [0, 1)")
        if not _positive(self.tau_imp):
            raise InvalidParameterError(f"tau_imp={self.tau_imp!r}: expected a positive temperature")
        if self.tol is not None and not _positive(self.tol):
            raise InvalidParameterError(f"tol={self.tol!r}: expected a positive number, or None for no early stop")

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def placement(self) -> Placement:
        return self.hook

    @property
    def taps(self) -> frozenset[str]:
        extra = {"value": {"v"}, "x_before": {"input"}}.get(self.feature, set())
        return frozenset({"qk", *extra, *({"matrix"} if self.tau_imp == 1.0 else set())})

    def bind(self, info: EncoderInfo) -> dict[int, Stage]:
        if self.keep_rate is not None:
            layers = resolve_layers("layers", self.layers, self.default_layers, info.depth, "ZeroTPrune")
            plan: Mapping[int, Sequence[float]] = dict.fromkeys(layers, (0, self.keep_rate))
        elif self.preset is not None:
            plan = PRESETS[self.preset]
        elif self.schedule is not None:
            plan = self.schedule
        else:
            assert self.flops is not None
            plan = fit_flops(self, info, self.flops)
        foreign = [position for position in self.boosted or () if position >= info.prefix]
        if foreign:
            raise InvalidParameterError(
                f"boosted={self.boosted!r}: position {foreign[0]} is none of this model's {info.prefix} prefix tokens"
            )
        outside = [layer for layer in plan if layer >= info.depth]
        if outside:
            what = f"preset {self.preset!r}" if self.preset else "schedule"
            raise LayerError(
                f"ZeroTPrune: the {what} names block {outside[0]}, but this model has {info.depth} blocks "
                f"(0 to {info.depth - 1})"
            )
        stages = {layer: self._stage(layer, entry, info.depth) for layer, entry in sorted(plan.items())}
        return {layer: stage for layer, stage in stages.items() if stage.r_s > 0 or stage.keep < 1}

    def _stage(self, layer: int, entry: Sequence[float], depth: int) -> Stage:
        iters = int(entry[2]) if len(entry) > 2 else self.iterations
        return Stage(int(entry[0]), float(entry[1]), iters or default_iterations(layer, depth))

    # -- counts ------------------------------------------------------------------------------------------------------

    def count(self, tokens: int, rule: Stage) -> int:
        if self.order == "SI":
            return self._keep_count(tokens - self._copies(tokens, rule), rule)
        kept = self._keep_count(tokens, rule)
        return kept - self._copies(kept, rule)

    def _keep_count(self, tokens: int, rule: Stage) -> int:
        # the epsilon removes float artefacts such as int(0.29 * 100) = 28
        return tokens if rule.keep >= 1 else min(tokens, max(1, math.floor(tokens * rule.keep + 1e-6)))

    def _copies(self, tokens: int, rule: Stage) -> int:
        return min(rule.r_s, group_a_size(tokens, self.partition)) if tokens >= 2 else 0

    # -- one pruning layer -------------------------------------------------------------------------------------------

    def reduce(self, view: EncoderBlock, rule: Stage) -> Keep | None:
        attention = view.attention_matrix(self.tau_imp)
        alive = torch.ones(attention.shape[0], view.count, dtype=torch.bool, device=attention.device)
        if self.order == "SI":
            if self._copies(view.count, rule):
                score = _rankable(self.importance(attention, None, 1, view.prefix, view.info.class_tokens).score)
                alive = self._drop_copies(view, score, alive, view.count, rule)
            if rule.keep < 1:
                # before the S-stage removed anything, every row is whole: no restriction needed
                restriction = alive if self._copies(view.count, rule) else None
                alive = self._keep_important(view, attention, restriction, alive, rule)[0]
        else:
            score = _rankable(self.importance(attention, None, rule.iters, view.prefix, view.info.class_tokens).score)
            if rule.keep < 1:
                alive = _alive(ops.top_indices(score, self._keep_count(view.count, rule)), view.count)
            alive = self._drop_copies(view, score, alive, self._keep_count(view.count, rule), rule)
        return Keep(ops.top_indices(alive.float(), self.count(view.count, rule)))

    def importance(
        self, attention: Tensor, alive: Tensor | None, iterations: int, prefix: int, class_tokens: int
    ) -> Importance:
        """Importance of the prunable tokens by the options of this method; see the function `importance`."""
        boosted: Sequence[int] = range(class_tokens) if self.boosted is None else self.boosted
        return importance(
            attention,
            alive,
            iterations,
            prefix=prefix,
            boosted=() if self.cls_boost == "none" else boosted,
            boost="half_n" if self.cls_boost == "half_n" else "sqrt",
            vhf=self.vhf,
            var_norm=self.var_norm,
            eir=self.eir,
            renorm=self.renorm,
            damping=self.damping,
            tol=self.tol,
        )

    def _keep_important(
        self, view: EncoderBlock, attention: Tensor, restriction: Tensor | None, alive: Tensor, rule: Stage
    ) -> tuple[Tensor, Importance]:
        found = self.importance(attention, restriction, rule.iters, view.prefix, view.info.class_tokens)
        score = _rankable(found.score).masked_fill(~alive, -math.inf)
        return _alive(ops.top_indices(score, self.count(view.count, rule)), view.count), found

    def _drop_copies(self, view: EncoderBlock, score: Tensor, alive: Tensor, present: int, rule: Stage) -> Tensor:
        r = self._copies(present, rule)
        if r == 0:
            return alive
        found = similar_tokens(
            self._feature(view), score, alive, present, r, self.partition, self.similarity, self.seed + view.layer
        )
        return alive.scatter(1, found.pruned, False)

    def _feature(self, view: EncoderBlock) -> Tensor:
        """(B, n, C_f) compared in the S-stage."""
        if self.feature == "x_before":
            return view.block_input()[:, view.prefix :]
        if self.feature == "x_after":
            return view.tokens[:, view.prefix :]
        source = {"query": view.queries, "value": view.values}.get(self.feature, view.keys)
        heads = source()[:, :, view.prefix :]
        return heads.mean(dim=1) if self.feature == "key_mean" else heads.transpose(1, 2).flatten(2)

    def cost(self, info: EncoderInfo, tokens: int, rule: Stage) -> int:
        total = tokens + info.prefix
        votes = (1 if rule.r_s and self.order == "SI" else 0) + (
            rule.iters if rule.keep < 1 or self.order == "IS" else 0
        )
        width = {"key_mean": info.head_dim, "x_before": info.dim, "x_after": info.dim}.get(
            self.feature, info.kv_heads * info.head_dim
        )
        compared = tokens if self.order == "SI" else self._keep_count(tokens, rule)
        half = group_a_size(compared, self.partition)
        pairs = half * (compared if self.partition == "none" else compared - half) * width if rule.r_s else 0
        again = total**2 * info.heads * info.head_dim if self.tau_imp != 1.0 else 0  # q k^T at a second temperature
        return votes * info.heads * total**2 + pairs + again


class Importance(NamedTuple):
    """Result of one vote.

    Attributes:
        score: (B, n) float32 importance of prunable tokens (0 where not alive).
        head_scores: (B, H, n). head_variance: (B, H). head_mask: (B, H) bool, heads that counted.
    """

    score: Tensor
    head_scores: Tensor
    head_variance: Tensor
    head_mask: Tensor


def importance(
    attention: Tensor,
    alive: Tensor | None,
    iterations: int,
    *,
    prefix: int,
    boosted: Sequence[int] = (),
    boost: Literal["sqrt", "half_n"] = "sqrt",
    vhf: tuple[float, float] | None = (0.01, 0.7),
    var_norm: Literal["mean1", "none"] = "mean1",
    eir: bool = True,
    renorm: bool = True,
    damping: float = 0.0,
    tol: float | None = None,
) -> Importance:
    """Weighted page rank, variance-based head filter and emphasizing of informative regions (paper, I-stage).

    Args:
        attention: (B, H, N, N) softmax attention, row i is query i; the first `prefix` tokens vote but do not rank.
        alive: (B, n) bool of prunable tokens that take part, None for all.
        boosted: positions that start with weight sqrt(N_alive) ("sqrt") or 1 + N_alive / 2 ("half_n").
    """
    batch, _, total, _ = attention.shape
    everyone = None
    alive_count: Any = total
    if alive is not None:
        everyone = torch.cat([alive.new_ones(batch, prefix), alive], dim=1)
        alive_count = everyone.sum(dim=1, keepdim=True).float()
    start = attention.new_ones(batch, total)
    if boosted:
        weight = alive_count**0.5 if boost == "sqrt" else 1 + alive_count / 2
        start[:, list(boosted)] = weight
    # rows of a whole softmax matrix sum to one: nothing to renormalise until tokens are masked out
    ranks = ops.page_rank(
        attention, start, iterations, alive=everyone, renorm=renorm and alive is not None, damping=damping, tol=tol
    )
    scores = ranks[:, :, prefix:]
    count: Any = scores.shape[-1] if alive is None else alive.sum(dim=1).float()[:, None]
    variance = _head_variance(scores, alive, count, var_norm)
    mask = torch.ones_like(variance, dtype=torch.bool)
    if vhf is not None:
        mask = (variance >= vhf[0]) & (variance <= vhf[1])
        mask = mask | ~mask.any(dim=1, keepdim=True)  # no head passes: all of them count
    share = mask.float() / mask.sum(dim=1, keepdim=True)
    if eir:
        score = torch.einsum("bh,bhn->bn", share, scores**2).sqrt()
    else:
        score = torch.einsum("bh,bhn->bn", share, scores)
    return Importance(score, scores, variance, mask)


def _head_variance(scores: Tensor, alive: Tensor | None, count: Any, var_norm: str) -> Tensor:
    """(B, H): biased variance over the alive candidates; dead ones have score 0 and are taken out of the sum."""
    total = scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    n = count if isinstance(count, int) else count[:, :, None]
    if var_norm == "mean1":
        deviation = (scores * n / total - 1) ** 2
    else:
        deviation = (scores - total / n) ** 2
    if alive is not None:
        deviation = deviation * alive[:, None]
    return deviation.sum(dim=-1) / count


class Similar(NamedTuple):
    """Result of one S-stage.

    Attributes:
        pruned: (B, r) int64 positions in pruning order.
        group_a, group_b: (B, .) int64 positions, least important first. best_b: (B, |A|) int64 position of the most
            similar member of B. similarity: (B, |A|).
    """

    pruned: Tensor
    group_a: Tensor
    group_b: Tensor
    best_b: Tensor
    similarity: Tensor


def similar_tokens(
    feature: Tensor,
    score: Tensor,
    alive: Tensor,
    present: int,
    r: int,
    partition: Partition = "sequential_u",
    metric: str = "cosine",
    seed: int = 0,
) -> Similar:
    """Find the r tokens of one half that are most like a token of the other (paper, S-stage).

    Args:
        feature: (B, n, C_f). score: (B, n) importance. alive: (B, n) bool with `present` True entries in each row.
    """
    order = ops.rank(score.masked_fill(~alive, math.inf), descending=False)[:, :present]  # least important first
    if partition == "none":
        return _any_pair(feature, order, r, metric)
    a, b = _split(order, partition, seed)
    value, match = ops.bipartite_match(ops.gather_tokens(feature, a), ops.gather_tokens(feature, b), metric=metric)
    chosen = ops.rank(value)[:, :r]
    return Similar(a.gather(1, chosen), a, b, b.gather(1, match), value)


def group_a_size(tokens: int, partition: Partition) -> int:
    """Tokens from which copies may be pruned; the odd one goes to the other group (except for "alternate")."""
    if partition == "none":
        return max(tokens - 1, 0)
    return (tokens + 1) // 2 if partition == "alternate" else tokens // 2


def _split(order: Tensor, partition: Partition, seed: int) -> tuple[Tensor, Tensor]:
    n = order.shape[1]
    half = group_a_size(n, partition)
    if partition == "sequential_i":
        return order[:, n - half :], order[:, : n - half]
    if partition == "alternate":
        return order[:, ::2], order[:, 1::2]
    if partition == "random":
        shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(order.device)
        first, second = shuffled[:half].sort().values, shuffled[half:].sort().values
        return order[:, first], order[:, second]
    return order[:, :half], order[:, half:]


def _any_pair(feature: Tensor, order: Tensor, r: int, metric: str) -> Similar:
    """No halves: a token is compared with every more important one, and goes if it is a copy of one of them."""
    ordered = ops.gather_tokens(feature, order)
    n = ordered.shape[1]
    value, match = _best_later(ordered, metric)
    chosen = ops.rank(value)[:, :r]
    a = order[:, : n - 1]
    return Similar(a.gather(1, chosen), a, order, order.gather(1, match), value)


def _best_later(ordered: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """For each token but the last, its best match among the tokens behind it: (B, n - 1) values and positions."""
    batch, n, width = ordered.shape
    later = torch.ones(n - 1, n, dtype=torch.bool, device=ordered.device).triu(1)
    one = ordered[:, :-1].reshape(batch * (n - 1), 1, width)
    rest = ordered[:, None].expand(-1, n - 1, -1, -1).reshape(batch * (n - 1), n, width)
    value, match = ops.bipartite_match(one, rest, metric=metric, valid_b=later.repeat(batch, 1))
    return value.reshape(batch, n - 1), match.reshape(batch, n - 1)


def default_iterations(layer: int, depth: int) -> int:
    """The paper's counts: 30 to 50 in the first three blocks, 5 to 10 between, 1 in the last three."""
    if layer < 3:
        return 30
    return 1 if layer >= depth - 3 else 5


def _check_schedule(schedule: Mapping[int, Sequence[float]]) -> dict[int, tuple[float, ...]]:
    checked: dict[int, tuple[float, ...]] = {}
    if not isinstance(schedule, Mapping) or not schedule:
        raise InvalidParameterError(
            f"schedule={schedule!r}: expected {{block: (r_S, keep)}} or (r_S, keep, iterations)"
        )
    for layer, entry in schedule.items():
        if not isinstance(entry, Sequence) or len(entry) not in (2, 3):
            raise InvalidParameterError(f"schedule[{layer}]={entry!r}: expected (r_S, keep) or (r_S, keep, iterations)")
        r_s, keep = check_count(f"schedule[{layer}] r_S", entry[0]), check_fraction(f"schedule[{layer}] keep", entry[1])
        iters = tuple(check_count(f"schedule[{layer}] iterations", i, minimum=1) for i in entry[2:])
        checked[check_count("schedule block", layer)] = (r_s, keep, *iters)
    return dict(sorted(checked.items()))


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _check_range(field: str, value: object) -> tuple[float, float]:
    """Return (low, high)."""
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(_number(v) for v in pair) or not pair[0] <= pair[1]:
        raise InvalidParameterError(f"{field}={value!r}: expected (low, high) with low <= high, or None")
    return float(pair[0]), float(pair[1])


def _check_positions(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidParameterError(f"{field}={value!r}: expected a sequence of token positions, e.g. (0, 1)")
    return tuple(check_count(field, position) for position in value)


def _rankable(score: Tensor) -> Tensor:
    """Importance with NaN below every number: scores are not negative, and -inf and inf mark tokens that are gone."""
    return score.nan_to_num(nan=-1.0)


def _alive(kept: Tensor, n: int) -> Tensor:
    return torch.zeros(kept.shape[0], n, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
