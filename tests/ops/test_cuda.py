"""The kernels on a GPU: the same comparisons as on the CPU, and the sizes of real models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ops.cases import each_check, each_dtype
from tokred import ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
public = SimpleNamespace(**{name: getattr(ops, name) for name in ops.__all__})


@each_dtype
@each_check
def test_kernel_equals_its_definition(check: Any, dtype: torch.dtype) -> None:
    check(public, "cuda", dtype)


def test_the_kernels_are_in_use() -> None:
    from tokred.ops import _common

    assert _common.kernels(torch.zeros(1, device="cuda")) is not None


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens"), [(16, 6, 6, 197), (1, 28, 4, 3000)])
def test_real_sizes_agree_with_the_cpu(batch: int, heads: int, key_heads: int, tokens: int) -> None:
    q, k = torch.randn(batch, heads, tokens, 64), torch.randn(batch, key_heads, tokens, 64)
    torch.cuda.reset_peak_memory_stats()
    mass = ops.attention_mass(q.cuda(), k.cuda(), 0.125)
    assert torch.cuda.max_memory_allocated() < 4 * batch * heads * tokens * tokens  # no square matrix
    torch.testing.assert_close(mass.cpu(), ops.attention_mass(q, k, 0.125), rtol=1e-4, atol=1e-4)
    a, b = q[:, 0, ::2], q[:, 0, 1::2]
    value, index = ops.bipartite_match(a.cuda(), b.cuda())
    want = ops.bipartite_match(a, b)
    torch.testing.assert_close(value.cpu(), want[0], rtol=1e-5, atol=1e-5)
    assert (index.cpu() != want[1]).float().mean() < 1e-3  # near-ties
    where = torch.randint(-1, tokens - 13, (batch, tokens))
    x = q.transpose(1, 2).flatten(2)
    y, totals = ops.merge_tokens(x.cuda(), where.cuda(), tokens - 13)
    want_y, want_totals = ops.merge_tokens(x, where, tokens - 13)
    torch.testing.assert_close(y.cpu(), want_y, rtol=1e-5, atol=1e-5)
    assert torch.equal(totals.cpu(), want_totals)
    attention = ops.attention_rows(q[:1, :4, :500].cuda(), k[:1, :4, :500].cuda(), 0.125)
    start = torch.ones(1, attention.shape[2])
    got = ops.page_rank(attention, start.cuda(), 30)
    torch.testing.assert_close(got.cpu(), ops.page_rank(attention.cpu(), start, 30), rtol=1e-4, atol=1e-7)


def test_compiled_equals_eager() -> None:
    x = torch.randn(2, 50, 16, device="cuda", requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        _, match = ops.bipartite_match(x[:, ::2], x[:, 1::2])
        y, _ = ops.merge_tokens(x[:, ::2], match, 25)
        return ops.unmerge_tokens(y, match)

    got = torch.compile(run, fullgraph=True)(x)
    torch.testing.assert_close(got, run(x))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(run(x).sum(), x))


@pytest.mark.parametrize("tokens", [7, 300, 5000])
def test_selection_among_ties_equals_the_cpu(tokens: int) -> None:
    scores = torch.randint(-2, 3, (3, tokens)).float() * torch.tensor([1.0, -1.0]).repeat(tokens)[:tokens]  # with -0.0
    scores[:, ::5] = float("nan")
    for largest in (True, False):
        assert torch.equal(ops.rank(scores.cuda(), largest).cpu(), ops.rank(scores, largest))
        assert torch.equal(
            ops.top_indices(scores.cuda(), tokens // 3, largest).cpu(), ops.top_indices(scores, tokens // 3, largest)
        )
