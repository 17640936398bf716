"""Alternatives for each op of ``tokred.ops``, side by side: what chose the code there.

    OMP_NUM_THREADS=1 python benchmarks/ops.py [group ...] [--runs 15] [--device cpu|cuda] [--dry-run] [--json]

Alternatives of one case run interleaved, in a random order, ``--runs`` times; a line is the median with its 95 %
interval (order statistics), and the ratio to the first line, the code in use. Sizes: DeiT-S, batch 16 (16, 197, 384),
six heads of 64; ``--dry-run`` takes tiny sizes and three runs, to see that the script works. With a CUDA device, each
group runs there too: the kernels against plain torch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import ops
from tokred.ops import matching, pagerank, scores
from tokred.ops.gather import _gather, gather_or_zero
from tokred.ops.merge import _merge

Alternatives = dict[str, Callable[[], object]]


class Size(NamedTuple):
    batch: int
    tokens: int
    channels: int
    heads: int
    merged: int

    @property
    def head(self) -> int:
        return self.channels // self.heads


FULL, TINY = Size(16, 197, 384, 6, 13), Size(2, 21, 24, 2, 3)


def assignment(size: Size, device: str) -> Tensor:
    """A ToMe-like map: each slot has one token, and ``merged`` more tokens have a random slot."""
    slots = size.tokens - size.merged
    rows = [
        torch.cat([torch.arange(slots), torch.randint(slots, (size.merged,))])[torch.randperm(size.tokens)]
        for _ in range(size.batch)
    ]
    return torch.stack(rows).to(device)


def gather(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    x = torch.randn(size.batch, size.tokens, size.channels, device=device)
    index = torch.rand(size.batch, size.tokens, device=device).argsort(1)[:, : size.tokens // 2].sort(1).values
    rows = torch.arange(size.batch, device=device)[:, None]
    yield (
        "half of the tokens",
        {
            "gather_tokens": lambda: ops.gather_tokens(x, index),
            "index_select, flattened": lambda: _gather(x, index),
            "gather": lambda: x.gather(1, index[..., None].expand(-1, -1, size.channels)),
            "x[rows, index]": lambda: x[rows, index],
        },
    )


def merge(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    x, slots = torch.randn(size.batch, size.tokens, size.channels, device=device), size.tokens - size.merged
    where, weights = assignment(size, device), torch.rand(size.batch, size.tokens, device=device) + 1
    flat = (where + torch.arange(size.batch, device=device)[:, None] * slots).flatten()

    def divided(y: Tensor) -> Tensor:
        totals = x.new_zeros(size.batch * slots).index_add_(0, flat, weights.flatten())
        return y.view(size.batch, slots, -1) / totals.view(size.batch, slots, 1)

    def index_add() -> Tensor:
        rows = (x * weights[..., None]).view(-1, size.channels)
        return divided(x.new_zeros(size.batch * slots, size.channels).index_add_(0, flat, rows))

    def scatter_add() -> Tensor:
        index = where[..., None].expand_as(x)
        return divided(x.new_zeros(size.batch, slots, size.channels).scatter_add_(1, index, x * weights[..., None]))

    def one_hot() -> Tensor:
        return divided(x.new_zeros(size.batch, slots, size.tokens).scatter_(1, where[:, None], weights[:, None]) @ x)

    def tome_style() -> Tensor:
        """What a bipartite method can do that knows which r tokens move: gather the others, add these."""
        y = gather_or_zero(x, keep)
        return y.scatter_add_(1, target, gather_or_zero(x, moved))

    keep, moved = where.argsort(1)[:, :slots], where.argsort(1)[:, slots:]
    target = where.gather(1, moved)[..., None].expand(-1, -1, size.channels)
    yield (
        f"mean, weights, r = {size.merged}",
        {
            "merge_tokens": lambda: ops.merge_tokens(x, where, slots, weights),
            "embedding_bag": lambda: _merge(x, where, slots, weights, True),
            "index_add_": index_add,
            "scatter_add_": scatter_add,
            "one-hot bmm": one_hot,
            "gather + scatter_add of r (no weights)": tome_style,
            "copy of x (a bound)": lambda: x.clone(),
        },
    )
    leaf, upstream = x.clone().requires_grad_(), torch.randn(size.batch, slots, size.channels, device=device)

    def backward(function: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(function(leaf), leaf, upstream)

    yield (
        "the same, forward and backward",
        {
            "merge_tokens": lambda: backward(lambda t: ops.merge_tokens(t, where, slots, weights)[0]),
            "index_add": lambda: backward(
                lambda t: divided(
                    x.new_zeros(size.batch * slots, size.channels).index_add(
                        0, flat, (t * weights[..., None]).flatten(0, 1)
                    )
                )
            ),
            "one-hot bmm": lambda: backward(
                lambda t: divided(
                    x.new_zeros(size.batch, slots, size.tokens).scatter_(1, where[:, None], weights[:, None]) @ t
                )
            ),
        },
    )


def unmerge(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    slots = size.tokens - size.merged
    y, where = torch.randn(size.batch, slots, size.channels, device=device), assignment(size, device)
    flat = (where + torch.arange(size.batch, device=device)[:, None] * slots).flatten()
    dropped = (where < 0)[..., None]

    def filled() -> Tensor:
        return y.view(-1, size.channels).index_select(0, flat).view(*where.shape, -1).masked_fill_(dropped, 0)

    yield (
        "with room for dropped tokens",
        {
            "unmerge_tokens": lambda: ops.unmerge_tokens(y, where),
            "row of zeros + index_select": lambda: gather_or_zero(y, where),
            "index_select + masked_fill": filled,
            "gather (no dropped tokens)": lambda: y.gather(1, where[..., None].expand(-1, -1, size.channels)),
        },
    )


def mass(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    scale = size.head**-0.5
    for tokens, batch in ((size.tokens, size.batch), (size.tokens * 3, max(1, size.batch // 8))):
        q, k = torch.randn(2, batch, size.heads, tokens, size.head, device=device)

        def blocked(numbers: int, queries: int, q: Tensor = q, k: Tensor = k) -> Tensor:
            before = scores.BLOCK_NUMBERS, scores.BLOCK_QUERIES
            scores.BLOCK_NUMBERS, scores.BLOCK_QUERIES = numbers, queries
            try:
                return scores._mass(q, k, scale, None, None, None)
            finally:
                scores.BLOCK_NUMBERS, scores.BLOCK_QUERIES = before

        cases: Alternatives = {"attention_mass": lambda q=q, k=k: ops.attention_mass(q, k, scale)}
        for power in (16, 17, 18, 20):
            for queries in (64, 128, 256):
                cases[f"blocked, 2**{power} numbers, <= {queries} queries"] = lambda f=blocked, n=2**power, m=queries: (
                    f(n, m)
                )
        cases["whole matrix"] = lambda q=q, k=k: (q @ k.transpose(2, 3)).mul_(scale).softmax(-1).sum(2)
        cases["fused attention of the layer (to compare)"] = lambda q=q, k=k: F.scaled_dot_product_attention(q, k, k)
        cases["attention_rows, one query"] = lambda q=q, k=k: ops.attention_rows(q[:, :, :1], k, scale)
        yield f"batch {batch}, {tokens} tokens", cases
    q = torch.randn(1, size.heads * 4, size.tokens * 3, size.head, device=device)
    k = torch.randn(1, size.heads, size.tokens * 3, size.head, device=device)
    yield (
        "grouped queries, 4 to a key head",
        {
            "attention_mass": lambda: ops.attention_mass(q, k, scale),
            "attention_mass, keys repeated": lambda: ops.attention_mass(q, k.repeat_interleave(4, 1), scale),
            "attention_rows, 16 queries": lambda: ops.attention_rows(q[:, :, :16], k, scale),
            "attention_rows, 16 queries, keys repeated": lambda: ops.attention_rows(
                q[:, :, :16], k.repeat_interleave(4, 1), scale
            ),
        },
    )


def match(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    for tokens, batch in ((size.tokens, size.batch), (size.tokens * 24, 1)):
        x = torch.randn(batch, tokens, size.head, device=device)
        a, b = x[:, ::2], x[:, 1::2]
        cases: Alternatives = {"bipartite_match": lambda a=a, b=b: ops.bipartite_match(a, b)}
        for block in (64, 256, 1024, b.shape[1]):
            cases[f"blocks of {block}"] = lambda a=a, b=b, n=block: matching._match(a, b, "cosine", n, None)
        yield f"batch {batch}, {tokens} tokens, halves", cases


def distance(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    x = torch.randn(size.batch, size.tokens, size.head, device=device)
    a, b = x[:, ::2], x[:, 1::2]
    yield (
        "l2",
        {
            "in use": lambda: matching._similarity(a, b, "l2"),
            "cdist by a product (inexact)": lambda: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        },
    )
    yield (
        "minkowski3",
        {
            "in use": lambda: matching._similarity(a, b, "minkowski3"),
            "cdist p=3": lambda: torch.cdist(a, b, p=3.0),
            "one block": lambda: (a[:, :, None] - b[:, None]).abs_().pow_(3).sum(-1).pow_(1 / 3),
        },
    )


def pagerank_(size: Size, device: str) -> Iterator[tuple[str, Alternatives]]:
    shape = size.batch, size.heads, size.tokens, size.tokens
    attention = torch.randn(shape, device=device).softmax(-1)
    start = torch.ones(size.batch, size.tokens, device=device)
    alive = torch.rand(size.batch, size.tokens, device=device) > 0.2

    def chunked(numbers: int) -> Tensor:
        before, pagerank.BLOCK_NUMBERS = pagerank.BLOCK_NUMBERS, numbers
        try:
            return pagerank._page_rank(attention, start, 30, None, False, 0.0, None)
        finally:
            pagerank.BLOCK_NUMBERS = before

    def transposed() -> Tensor:
        s, a = start[:, None].expand(-1, size.heads, -1)[..., None], attention.transpose(2, 3).contiguous()
        for _ in range(30):
            s = a @ s
        return s

    yield (
        "30 iterations",
        {
            "page_rank, renorm=False": lambda: ops.page_rank(attention, start, 30, renorm=False),
            "page_rank": lambda: ops.page_rank(attention, start, 30),
            "page_rank, alive, damping": lambda: ops.page_rank(attention, start, 30, alive, damping=0.1),
            **{f"chunks of 2**{power} numbers": lambda n=2**power: chunked(n) for power in (18, 19, 20, 24)},
            "transposed copy": transposed,
            "page_rank, 1 iteration": lambda: ops.page_rank(attention, start, 1, renorm=False),
        },
    )


GROUPS = {
    "gather": gather, "merge": merge, "unmerge": unmerge, "mass": mass, "match": match, "distance": distance,
    "pagerank": pagerank_,
}  # fmt: skip


def measure(cases: Alternatives, runs: int, device: str) -> dict[str, tuple[float, float, float]]:
    """Median and its 95 % interval, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 2):  # two warm-up rounds
        for name in random.sample(list(cases), len(cases)):
            synchronize(device)
            start = time.perf_counter()
            cases[name]()
            synchronize(device)
            if run >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    # Binomial interval of the median: 1.96 standard deviations of the number of runs below it.
    low = max(0, math.floor(runs / 2 - 0.98 * math.sqrt(runs)))
    return {n: (statistics.median(t), sorted(t)[low], sorted(t)[runs - 1 - low]) for n, t in times.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default all")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, then CUDA where there is one")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown group {', '.join(sorted(unknown))}; expected {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    size, runs = (TINY, 3) if args.dry_run else (FULL, args.runs)
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        for group in args.groups or GROUPS:
            for case, alternatives in GROUPS[group](size, device):
                result = measure(alternatives, runs, device)
                report(f"{group} ({device}): {case}", result, args.json)


def report(title: str, result: dict[str, tuple[float, float, float]], as_json: bool) -> None:
    if as_json:
        for name, (median, low, high) in result.items():
            print(json.dumps({"case": title, "name": name, "ms": median, "low": low, "high": high}))
        return
    first = next(iter(result.values()))[0]
    print(f"\n{title}\n  {'ms':>9} {'95 % interval':>20} {'ratio':>6}")
    for name, (median, low, high) in result.items():
        print(f"  {median:9.3f} {f'{low:.3f} - {high:.3f}':>20} {median / first:6.2f}  {name}")


if __name__ == "__main__":
    main()
