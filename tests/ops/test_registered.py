"""The registered ops: schema, fake kernels and autograd (opcheck), and torch.compile of the public functions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import masks, random_assignment
from tokred import ops

registered = torch.ops.tokred


def check(op: Any, *args: object) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck_of_rows(dtype: torch.dtype) -> None:
    x, where = torch.randn(2, 9, 5).to(dtype).requires_grad_(), random_assignment(2, 9, 4)
    check(registered.gather_rows.default, x, where)
    for weights, mean in itertools.product((None, torch.rand(2, 9, requires_grad=True)), (True, False)):
        check(registered.merge_rows.default, x, where, 4, weights, mean)


def test_opcheck_of_scores() -> None:
    for dtype, mask in itertools.product((torch.float32, torch.bfloat16, torch.float64), masks(2, 4, 5, 6).values()):
        q, k = torch.randn(2, 4, 5, 8).to(dtype), torch.randn(2, 2, 6, 8).to(dtype)
        mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
        check(registered.attention_rows.default, q, k, 0.3, mask, torch.rand(2, 6))
        check(registered.attention_mass.default, q, k, 0.3, mask, None, torch.rand(2, 5))
    for metric in ("cosine", "l2", "minkowski3"):
        check(registered.bipartite_match.default, q[:, 0], k[:, 0], metric, 4, torch.rand(2, 6) > 0.5)
    start, alive = torch.rand(2, 6), torch.rand(2, 6) > 0.3
    for dtype, iterations in ((torch.float32, 3), (torch.float16, 3), (torch.float64, 0)):
        attention = torch.rand(2, 3, 6, 6).to(dtype)
        check(registered.page_rank.default, attention, start, iterations, alive, True, 0.1, None)
        check(registered.page_rank.default, attention, start, iterations, None, False, 0.0, 1e-3)


def everything(x: Tensor, attention: Tensor, where: Tensor, mask: Tensor) -> list[Tensor]:
    """One call of each public function, with the counts taken from shapes."""
    batch, tokens, channels = x.shape
    heads = x.view(batch, tokens, 2, channels // 2).transpose(1, 2)
    value, match = ops.bipartite_match(x[:, ::2], x[:, 1::2])
    kept = ops.top_indices(ops.attention_mass(heads, heads, 0.4, mask)[:, 0], tokens // 2)
    y, totals = ops.merge_tokens(x, where, tokens - 2, x[..., 0].abs())
    return [
        value,
        match,
        kept,
        ops.gather_tokens(x, kept),
        y,
        totals,
        ops.unmerge_tokens(y, where),
        ops.attention_rows(heads[:, :, :1], heads, 0.4),
        ops.page_rank(attention, torch.ones_like(x[..., 0]), 4, mask[:, 0, 0]),
        ops.rank(value),
    ]


def inputs(batch: int, tokens: int) -> tuple[Tensor, ...]:
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
    mask[..., -1] = False
    attention = torch.rand(batch, 7, tokens, tokens).softmax(-1)
    return torch.randn(batch, tokens, 8), attention, random_assignment(batch, tokens, tokens - 2), mask


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_equals_eager(dynamic: bool) -> None:
    run = compiled(everything, dynamic=dynamic)
    for batch, tokens in ((3, 12), (5, 17)):
        args = inputs(batch, tokens)
        with torch._dynamo.config.patch(error_on_recompile=dynamic and batch == 5):  # sizes stay symbols
            got = run(*args)
        for g, w in zip(got, everything(*args), strict=True):
            assert torch.equal(g, w)


def test_compiled_gradients_equal_eager() -> None:
    x, _, where, _ = inputs(2, 9)
    index = torch.tensor([[0, 3, 3], [8, 1, 1]])

    def loss(x: Tensor, weights: Tensor) -> Tensor:
        y, totals = ops.merge_tokens(x, where, 7, weights)
        return (ops.unmerge_tokens(y, where).square().sum() + (totals**3).sum()) * ops.gather_tokens(x, index).sum()

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), x[..., 0].abs().requires_grad_()
        return torch.autograd.grad(function(*leaves), leaves)

    for got, want in zip(gradients(compiled(loss)), gradients(loss), strict=True):
        torch.testing.assert_close(got, want)


def test_early_stop_works_in_a_compiled_graph() -> None:
    attention, start = torch.rand(1, 2, 8, 8).softmax(-1), torch.rand(1, 8)

    def run(a: Tensor, s: Tensor) -> Tensor:
        return ops.page_rank(a, s, 100, tol=1e-2)

    got = compiled(run)(attention, start)
    assert torch.equal(got, run(attention, start))
    assert not torch.equal(got, ops.page_rank(attention, start, 100))


def test_importing_the_ops_loads_no_triton() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import tokred.ops
new = {name.partition('.')[0] for name in set(sys.modules) - before}
assert 'triton' not in new, new
assert not any(name.startswith('tokred.ops.triton') for name in sys.modules)
assert not {name for name in new if name != 'tokred'} - set(sys.stdlib_module_names), new
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
