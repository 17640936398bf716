"""Comparisons with the slow definitions, for any form of the ops: plain torch, the kernels interpreted, the kernels.

Each ``check_*`` takes ``ops`` (the functions to test, with the public signatures), a device and a dtype; the truth is
the reference on the same numbers in float64. Sizes are as small as the kernels' blocks allow: the interpreter is slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tokred.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One rounding of the result: merged rows come back in the dtype of x.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
METRICS = ("cosine", "dot", "l1", "l2", "euclidean", "minkowski3", "minkowski4", "minkowski5", "linf")


def _four(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


# The registered ops under the public signatures: on the CPU the public functions would go round them.
registered = SimpleNamespace(
    gather_tokens=lambda x, i: torch.ops.tokred.gather_rows(x, i),
    unmerge_tokens=lambda y, i: torch.ops.tokred.gather_rows(y, i),
    merge_tokens=lambda x, i, slots, weights=None, reduce="mean": torch.ops.tokred.merge_rows(
        x, i, slots, weights, reduce == "mean"
    ),
    attention_rows=lambda q, k, scale, mask=None, log_size=None: torch.ops.tokred.attention_rows(
        q, k, scale, _four(mask), log_size
    ),
    attention_mass=lambda q, k, scale, mask=None, log_size=None, query_weights=None: torch.ops.tokred.attention_mass(
        q, k, scale, _four(mask), log_size, query_weights
    ),
    bipartite_match=lambda a, b, metric="cosine", block_size=None, valid_b=None: torch.ops.tokred.bipartite_match(
        a, b, metric, block_size, valid_b
    ),
    page_rank=lambda a, s, n, alive=None, renorm=True, damping=0.0, tol=None: torch.ops.tokred.page_rank(
        a, s, n, alive, renorm, damping, tol
    ),
)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double().cpu(), want.double(), rtol=tolerance, atol=tolerance)


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in a tensor whose last dimension has stride 2 and whose others have gaps."""
    return torch.randn(*shape[:-1], 2 * shape[-1] + 1, device=device).to(dtype)[..., 1::2]


def random_assignment(batch: int, tokens: int, slots: int) -> Tensor:
    """Some tokens dropped, the last slot empty (where there are two slots)."""
    return torch.randint(-1, max(1, slots - 1), (batch, tokens))


def check_gather(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    for batch, tokens, kept, channels in ((2, 7, 7, 5), (1, 1, 1, 1), (3, 6, 1, 130), (2, 5, 0, 4), (2, 4, 11, 33)):
        x, index = strided((batch, tokens, channels), dtype, device), torch.randint(tokens, (batch, kept))
        got = ops.gather_tokens(x, index.to(device))
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), reference.gather_tokens(x.cpu(), index))


def check_unmerge(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    for batch, slots, tokens, channels in ((2, 4, 9, 5), (1, 1, 1, 1), (2, 3, 0, 7), (2, 5, 6, 129)):
        y, where = strided((batch, slots, channels), dtype, device), torch.randint(-1, slots, (batch, tokens))
        got = ops.unmerge_tokens(y, where.to(device))
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), reference.unmerge_tokens(y.cpu(), where))


def check_merge(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    sizes = ((2, 9, 5, 7), (1, 1, 1, 1), (3, 20, 1, 33), (2, 6, 9, 130))
    for (batch, tokens, slots, channels), weighted, reduce in itertools.product(sizes, (0, 1), ("mean", "sum")):
        x, where = strided((batch, tokens, channels), dtype, device), random_assignment(batch, tokens, slots)
        weights = torch.rand(batch, tokens) if weighted else None
        on_device = None if weights is None else weights.to(device)
        y, totals = ops.merge_tokens(x, where.to(device), slots, on_device, reduce)
        want = reference.merge_tokens(
            x.double().cpu(), where, slots, None if weights is None else weights.double(), reduce
        )
        assert y.dtype == dtype
        assert totals.dtype == torch.float32
        close(y, want[0], ROUNDING[dtype] * (1 if reduce == "mean" else 4))
        close(totals, want[1], 1e-6)


def check_merge_gradients(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    for reduce in ("mean", "sum"):
        x, where = torch.randn(2, 9, 5).to(dtype), random_assignment(2, 9, 4)
        weights, upstream = torch.rand(2, 9), (torch.randn(2, 4, 5).to(dtype), torch.randn(2, 4))
        inputs = [t.to(device).requires_grad_() for t in (x, weights)]
        outputs = ops.merge_tokens(inputs[0], where.to(device), 4, inputs[1], reduce)
        got = torch.autograd.grad(outputs, inputs, [u.to(device) for u in upstream])
        exact = [t.double().requires_grad_() for t in (x, weights)]
        outputs = reference.merge_tokens(exact[0], where, 4, exact[1], reduce)
        want = torch.autograd.grad(outputs, exact, [u.double() for u in upstream])
        for g, w, given in zip(got, want, inputs, strict=True):
            assert g.dtype == given.dtype
            close(g, w, 10 * ROUNDING[dtype])


def check_gather_gradients(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    x, index = torch.randn(2, 6, 5).to(dtype), torch.tensor([[0, 3, 3, 3], [5, 0, 5, 1]])  # repeats add up
    upstream = torch.randn(2, 4, 5).to(dtype)
    given = x.to(device).requires_grad_()
    (got,) = torch.autograd.grad(ops.gather_tokens(given, index.to(device)), given, upstream.to(device))
    want = torch.zeros(2, 6, 5, dtype=torch.float64)
    for b, k in itertools.product(range(2), range(4)):
        want[b, index[b, k]] += upstream[b, k]
    close(got, want, 4 * ROUNDING[dtype])


def masks(batch: int, heads: int, queries: int, keys: int) -> dict[str, Tensor | None]:
    empty_row = torch.rand(batch, 1, queries, keys) > 0.4
    empty_row[0, 0, 0] = False
    padding = torch.zeros(batch, 1, 1, keys)
    padding[-1, ..., keys // 2 :] = float("-inf")
    return {
        "none": None,
        "bool with an empty row": empty_row,
        "two-dimensional, causal": torch.ones(queries, keys).tril(keys - queries).bool(),
        "additive padding": padding,
        "additive, by head": torch.randn(heads, queries, keys),
        "all masked": torch.zeros(1, dtype=torch.bool),
    }


ATTENTION_SIZES = ((2, 4, 2, 9, 11, 8), (1, 1, 1, 1, 1, 3), (1, 2, 1, 70, 75, 20), (2, 1, 1, 1, 130, 33))


def check_attention(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    """attention_rows and attention_mass: grouped heads, every kind of mask, sizes, weights."""
    for batch, heads, key_heads, queries, keys, d in ATTENTION_SIZES:
        q, k = strided((batch, heads, queries, d), dtype, device), strided((batch, key_heads, keys, d), dtype, device)
        for i, mask in enumerate(masks(batch, heads, queries, keys).values()):
            log_size = torch.randint(1, 9, (batch, keys)).float().log() if i % 2 else None
            weights = torch.rand(batch, queries) if i % 3 else None
            moved = [None if t is None else t.to(device) for t in (mask, log_size, weights)]
            exact = [
                None if t is None else t if t.dtype == torch.bool else t.double() for t in (mask, log_size, weights)
            ]
            want = reference.attention_rows(q.double().cpu(), k.double().cpu(), 0.3, *exact[:2])
            got = ops.attention_rows(q, k, 0.3, *moved[:2])
            assert got.dtype == torch.float32
            close(got, want, 2e-6)
            want = reference.attention_mass(q.double().cpu(), k.double().cpu(), 0.3, *exact)
            got = ops.attention_mass(q, k, 0.3, *moved)
            assert got.dtype == torch.float32
            close(got, want, 5e-6)


def check_match(ops: SimpleNamespace, device: str, dtype: torch.dtype, metrics: tuple[str, ...] = METRICS) -> None:
    for (batch, rows, columns, d), metric in itertools.product(
        ((2, 7, 9, 5), (1, 1, 1, 1), (1, 5, 70, 3), (1, 70, 3, 70)), metrics
    ):
        if d > 64 and metric not in ("cosine", "dot"):
            continue  # a second block of dimensions, which only products have
        a, b = strided((batch, rows, d), dtype, device), strided((batch, columns, d), dtype, device)
        valid = torch.rand(batch, columns) > 0.3
        for block_size, valid_b in ((None, None), (4, valid)):
            value, index = ops.bipartite_match(
                a, b, metric, block_size, None if valid_b is None else valid_b.to(device)
            )
            assert (value.dtype, index.dtype) == (torch.float32, torch.int64)
            want = reference.bipartite_match(a.double().cpu(), b.double().cpu(), metric, valid_b=valid_b)
            close(value, want[0], 3e-6)
            assert torch.equal(index.cpu(), want[1])


def check_match_ties(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    """Equal columns: the first one wins. NaN: never chosen. Nothing left: (-inf, 0)."""
    a = torch.randn(1, 3, 4).to(dtype)
    # On an axis: a product has one term, and no order of summation can break the tie.
    b = torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=dtype).expand(1, 70, 4).clone()
    for metric in ("cosine", "dot", "l2", "minkowski3", "linf"):
        _, index = ops.bipartite_match(a.to(device), b.to(device), metric, 16)
        assert index.tolist() == [[0, 0, 0]]
        nan = b.clone()
        nan[0, 0] = float("nan")
        value, index = ops.bipartite_match(a.to(device), nan.to(device), metric)
        assert index.tolist() == [[1, 1, 1]]
        assert bool(value.isfinite().all())
        none = torch.zeros(1, 70, dtype=torch.bool, device=device)
        value, index = ops.bipartite_match(a.to(device), b.to(device), metric, None, none)
        assert index.tolist() == [[0, 0, 0]]
        assert value.tolist() == [[float("-inf")] * 3]
    value, _ = ops.bipartite_match(torch.zeros_like(a).to(device), b.to(device))
    assert value.tolist() == [[0.0] * 3]


def check_page_rank(ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    for batch, heads, tokens, iterations in ((2, 2, 13, 3), (1, 1, 1, 2), (1, 1, 40, 1), (1, 2, 9, 0)):
        attention = torch.randn(batch, heads, tokens, tokens).softmax(-1).to(device).to(dtype).transpose(2, 3)
        alive = torch.rand(batch, tokens) > 0.3
        alive[:, 0] = True
        for mask, renorm, damping, per_head in itertools.product((None, alive), (True, False), (0.0, 0.15), (0, 1)):
            start = torch.rand(batch, heads, tokens) if per_head else torch.rand(batch, tokens)
            on_device = None if mask is None else mask.to(device)
            got = ops.page_rank(attention, start.to(device), iterations, on_device, renorm, damping)
            assert got.dtype == torch.float32
            want = reference.page_rank(attention.double().cpu(), start.double(), iterations, mask, renorm, damping)
            close(got, want, 2e-6)


CHECKS: dict[str, Callable[[SimpleNamespace, str, torch.dtype], None]] = {
    name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")
}

each_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
