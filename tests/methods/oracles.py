"""Slow definitions of the methods: one image at a time, in float64, with loops over tokens.

Written from the papers' equations; nothing here is shared with the library. Positions count all tokens, prefix first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# -- ToMe ------------------------------------------------------------------------------------------------------------


@dataclass
class Merged:
    """Groups of input positions, in the order of the output; the token that stands for each group; x and sizes."""

    groups: list[list[int]]
    owners: list[int]
    x: Tensor
    sizes: list[float]


def cosine(a: Tensor, b: Tensor) -> float:
    norms = max(a.double().norm().item(), 1e-12) * max(b.double().norm().item(), 1e-12)
    return float(a.double() @ b.double()) / norms


def tome(metric: Tensor, x: Tensor, sizes: Sequence[float], r: int, prefix: int, official_order: bool = True) -> Merged:
    """metric (N, d), x (N, C)."""
    tokens = len(metric)
    even = [i for i in range(0, tokens, 2) if i >= prefix]
    odd = [i for i in range(1, tokens, 2) if i >= prefix]
    best: dict[int, tuple[float, int]] = {}
    for a in even:
        for b in odd:
            similarity = cosine(metric[a], metric[b])
            if a not in best or similarity > best[a][0]:
                best[a] = (similarity, b)
    ranked = sorted(even, key=lambda a: (-best[a][0], a)) if odd else even
    r = min(r, (tokens - prefix) // 2)
    source = ranked[:r]
    kept = ranked[r:] if official_order and prefix == 0 else sorted(ranked[r:])
    owners = [*range(prefix), *kept, *odd]
    if r == 0:
        owners = list(range(tokens))
    groups = [[owner, *(s for s in source if best[s][1] == owner)] for owner in owners]
    merged, totals = [], []
    for group in groups:
        total = sum(sizes[t] for t in group)
        merged.append(sum(sizes[t] * x[t].double() for t in group) / total)
        totals.append(total)
    return Merged(groups, owners, torch.stack(merged), totals)


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
    """Plain attention in which token j stands there sizes[j] times. q, k, v: (N, d)."""
    copies = [j for j, size in enumerate(sizes) for _ in range(size)]
    weights = (q.double() @ k.double()[copies].T / math.sqrt(q.shape[1])).softmax(-1)
    return weights @ v.double()[copies]


# -- Zero-TPrune -----------------------------------------------------------------------------------------------------


@dataclass
class Vote:
    """Importance of each candidate by position; per head: scores, variance, and whether it counted."""

    score: dict[int, float]
    heads: list[dict[int, float]] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)


def vote(
    attention: Tensor,
    candidates: Sequence[int],
    prefix: int,
    iterations: int,
    boosted: Sequence[int],
    vhf: tuple[float, float] | None = (0.01, 0.7),
    eir: bool = True,
    renorm: bool = True,
) -> Vote:
    """attention (H, N, N); `candidates` are the prunable positions that are alive."""
    alive = [*range(prefix), *candidates]
    result = Vote({})
    for a in attention.double().tolist():
        start = [math.sqrt(len(alive)) if i in boosted else 1.0 for i in alive]
        s = [w / sum(start) for w in start]
        sums = [sum(a[j][i] for i in alive) if renorm else 1.0 for j in alive]
        for _ in range(iterations):
            s = [sum(a[j][i] / sums[m] * s[m] for m, j in enumerate(alive)) for i in alive]
        scores = dict(zip(alive, s, strict=True))
        scores = {i: scores[i] for i in candidates}
        mean = sum(scores.values()) / len(scores)
        result.heads.append(scores)
        result.variance.append(sum((value / mean - 1) ** 2 for value in scores.values()) / len(scores))
    result.counted = [vhf is None or vhf[0] <= value <= vhf[1] for value in result.variance]
    if not any(result.counted):
        result.counted = [True] * len(result.counted)
    voters = [scores for scores, counted in zip(result.heads, result.counted, strict=True) if counted]
    for i in candidates:
        if eir:
            result.score[i] = math.sqrt(sum(scores[i] ** 2 for scores in voters) / len(voters))
        else:
            result.score[i] = sum(scores[i] for scores in voters) / len(voters)
    return result


def copies(
    feature: Tensor, score: dict[int, float], r: int, partition: str = "sequential_u"
) -> tuple[list[int], dict[int, tuple[float, int]]]:
    """Positions pruned, in order, and for each of group A its best match (similarity, position)."""
    ranked = sorted(score, key=lambda i: (score[i], i))
    half = len(ranked) // 2
    if partition == "sequential_u":
        a, b = ranked[:half], ranked[half:]
    elif partition == "sequential_i":
        a, b = ranked[len(ranked) - half :], ranked[: len(ranked) - half]
    elif partition == "alternate":
        a, b = ranked[::2], ranked[1::2]
    else:
        raise ValueError(partition)
    if not b:
        return [], {}
    best = {i: max(((cosine(feature[i], feature[j]), j) for j in b), key=lambda pair: pair[0]) for i in a}
    order = sorted(a, key=lambda i: -best[i][0])  # stable: the less important first
    return order[: min(r, len(a))], best


def zero_tprune(
    attention: Tensor,
    feature: Tensor,
    prefix: int,
    boosted: Sequence[int],
    r_s: int,
    keep: float,
    iterations: int,
    order: str = "SI",
    partition: str = "sequential_u",
    **options: object,
) -> list[int]:
    """Kept positions (prefix excluded) of one image. attention (H, N, N), feature (N, C)."""
    alive = list(range(prefix, attention.shape[1]))

    def importance(rounds: int) -> dict[int, float]:
        return vote(attention, alive, prefix, rounds, boosted, **options).score  # type: ignore[arg-type]

    def best(score: dict[int, float]) -> list[int]:
        k = max(1, math.floor(len(alive) * keep + 1e-6))
        return sorted(sorted(alive, key=lambda i: (-score[i], i))[:k])

    if order == "IS":
        score = importance(iterations)
        alive = best(score)
        gone, _ = copies(feature, {i: score[i] for i in alive}, r_s, partition)
        return [i for i in alive if i not in gone]
    if r_s:
        gone, _ = copies(feature, importance(1), r_s, partition)
        alive = [i for i in alive if i not in gone]
    return best(importance(iterations)) if keep < 1 else alive


# -- whole models ----------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """What one block of the slow transformer hands to a reduction: its attention (H, N, N), keys (H, N, d), tokens."""

    layer: int
    attention: Tensor
    keys: Tensor
    x: Tensor
    sizes: list[float]


#: returns the tokens (N', C) and sizes that go on, or None to leave them
Reduction = Callable[[Block], "tuple[Tensor, list[float]] | None"]


def slow_vit(
    model: object, image: Tensor, after_attention: Reduction | None = None, after_block: Reduction | None = None,
    proportional: bool = False,
) -> tuple[list[Tensor], Tensor, list[float]]:  # fmt: skip
    """One image (3, H, W) through a timm VisionTransformer (in float64) with explicit attention.

    Returns the tokens after each block, those after the last norm, and their sizes.
    """
    m: object = model
    x = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(image[None].double()))))[0]  # type: ignore[attr-defined]
    sizes = [1.0] * len(x)
    outputs = []
    for layer, block in enumerate(m.blocks):  # type: ignore[attr-defined]
        a = block.attn
        q, k, v = a.qkv(block.norm1(x)).view(len(x), 3, a.num_heads, a.head_dim).permute(1, 2, 0, 3)
        q, k = a.q_norm(q), a.k_norm(k)
        logits = q @ k.transpose(1, 2) / math.sqrt(a.head_dim)
        if proportional:
            logits = logits + torch.tensor(sizes, dtype=torch.float64).log()
        attention = logits.softmax(-1)
        y = (attention @ v).transpose(0, 1).reshape(len(x), -1)
        x = x + block.ls1(a.proj(a.norm(y)))
        view = Block(layer, attention, k, x, sizes)
        if after_attention is not None and (answer := after_attention(view)) is not None:
            x, sizes = answer
        x = x + block.ls2(block.mlp(block.norm2(x)))
        view.x = x
        if after_block is not None and (answer := after_block(view)) is not None:
            x, sizes = answer
        outputs.append(x)
    return outputs, m.norm(x), sizes  # type: ignore[attr-defined]
