"""The plain torch path of every op against the slow definitions, and their claims about memory and precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ops.cases import close, each_check, each_dtype, masks, random_assignment, registered
from tokred import ops
from tokred.ops import reference

public = SimpleNamespace(**{name: getattr(ops, name) for name in ops.__all__})


@each_dtype
@each_check
def test_public_op_equals_its_definition(check: Any, dtype: torch.dtype) -> None:
    check(public, "cpu", dtype)


@each_check
def test_registered_op_on_the_cpu_equals_its_definition(check: Any) -> None:
    check(registered, "cpu", torch.float32)


def test_float64_stays_float64() -> None:
    q, k = torch.randn(2, 1, 4, 30, 8, dtype=torch.float64).unbind()
    mask = masks(1, 4, 30, 30)["bool with an empty row"]
    close(ops.attention_rows(q, k, 0.3, mask), reference.attention_rows(q, k, 0.3, mask), 1e-14)
    close(ops.attention_mass(q, k, 0.3, mask), reference.attention_mass(q, k, 0.3, mask), 1e-13)
    value, _ = ops.bipartite_match(q[0], k[0])
    close(value, reference.bipartite_match(q[0], k[0])[0], 1e-14)
    attention = reference.attention_rows(q, k, 1.0)
    start = torch.rand(1, 30, dtype=torch.float64)
    close(ops.page_rank(attention, start, 20), reference.page_rank(attention, start, 20), 1e-14)
    y, totals = ops.merge_tokens(q[0], random_assignment(4, 30, 9), 9)
    assert {t.dtype for t in (y, totals, value)} == {torch.float64}


def test_gather_keeps_any_trailing_shape_and_dtype() -> None:
    index = torch.tensor([[2, 0], [1, 1]])
    for x in (
        torch.randn(2, 3),
        torch.randn(2, 3, 4, 5),
        torch.arange(6).view(2, 3),
        torch.rand(2, 3, 4) > 0.5,
        torch.randn(3, 4).expand(2, 3, 4),
        torch.randn(2, 5, 4)[:, 1:4],
        torch.randn(3, 2, 4).transpose(0, 1),
        torch.randn(1, 5, 4)[:, ::2].expand(2, -1, -1),
        torch.randn(2, 3, 0),
    ):
        assert torch.equal(ops.gather_tokens(x, index), reference.gather_tokens(x, index))
    assert ops.gather_tokens(torch.randn(2, 0, 4), torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 4)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_slot_of_one_member_is_that_token(reduce: str, dtype: torch.dtype) -> None:
    x, order = torch.randn(2, 7, 33).to(dtype), torch.stack([torch.randperm(7), torch.randperm(7)])
    for weights in (None, torch.ones(2, 7)):
        y, totals = ops.merge_tokens(x, order, 8, weights, reduce)
        assert torch.equal(ops.unmerge_tokens(y, order), x)
        assert torch.equal(totals, torch.tensor([[1.0] * 7 + [0.0]] * 2, dtype=totals.dtype))
    y, _ = ops.merge_tokens(x, order, 7, torch.full((2, 7), 3.7), "mean")
    assert torch.equal(ops.unmerge_tokens(y, order), x)


def test_merge_in_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 4, 3), 60000.0, dtype=torch.float16)
    y, totals = ops.merge_tokens(x, torch.zeros(1, 4, dtype=torch.int64), 1, torch.full((1, 4), 300.0))
    assert torch.equal(y, x[:, :1])
    assert totals.item() == 1200.0


def test_empty_merges() -> None:
    none = torch.full((2, 3), -1)
    y, totals = ops.merge_tokens(torch.full((2, 3, 4), float("nan")), none, 5)
    assert not y.any()
    assert not totals.any()
    assert ops.merge_tokens(torch.randn(2, 3, 4), none, 0)[0].shape == (2, 0, 4)
    y, totals = ops.merge_tokens(torch.randn(2, 0, 4), torch.empty(2, 0, dtype=torch.int64), 3)
    assert not y.any()
    assert y.shape == (2, 3, 4)
    y, _ = ops.merge_tokens(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), 1, torch.zeros(1, 2))
    assert not y.any()  # weights of zero: zeros, not NaN


def test_gradients_in_float64() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    where = torch.tensor([[0, 2, 2, -1, 0], [3, 3, 3, 1, -1]])
    index = torch.tensor([[0, 3, 3], [4, 4, 4]])
    for form in (public, registered):
        assert torch.autograd.gradcheck(lambda x, f=form: f.gather_tokens(x, index), x)
        assert torch.autograd.gradcheck(lambda x, f=form: f.unmerge_tokens(x, where), x)
        for reduce in ("mean", "sum"):
            assert torch.autograd.gradcheck(lambda x, r=reduce, f=form: f.merge_tokens(x, where, 4, None, r), x)
            assert torch.autograd.gradcheck(
                lambda x, w, r=reduce, f=form: f.merge_tokens(x, where, 4, w, r), (x, weights)
            )


def test_scores_carry_no_gradient_and_do_not_raise_in_backward() -> None:
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    attention = ops.attention_rows(q, q, 0.5)
    value, index = ops.bipartite_match(q[0], q[0])
    results = (
        attention,
        ops.attention_mass(q, q, 0.5, query_weights=q[:, 0, :, 0]),
        ops.attention_mass(q, q, 0.5, mask=q.new_zeros(5, 5).requires_grad_(), log_size=q[:, 0, :, 0]),
        value,
        ops.page_rank(q[..., :4, :].softmax(-1), q[:, 0, :4, 0].abs(), 3),
        ops.top_indices(q[0, :, :, 0], 2),
        ops.rank(q[0, :, :, 0]),
    )
    assert not any(r.requires_grad for r in results)
    (q.sum() + ops.gather_tokens(q[0], index[:, :2]).sum()).backward()


def test_autocast_does_not_lower_scores() -> None:
    q, k = torch.randn(2, 1, 2, 40, 16).unbind()
    start = torch.rand(1, 40)

    def scores() -> list[Tensor]:
        rows = ops.attention_rows(q, k, 0.3)
        return [
            rows,
            ops.attention_mass(q, k, 0.3, query_weights=start),
            ops.bipartite_match(q[0], k[0])[0],
            ops.page_rank(rows, start, 5),
        ]

    want = scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = torch.matmul(q, k.transpose(2, 3)).dtype
        got = scores()
    assert lowered == torch.bfloat16  # autocast was on
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_page_rank_stops_early_on_a_small_change() -> None:
    attention, start = torch.randn(2, 3, 12, 12).softmax(-1), torch.rand(2, 12)
    far = ops.page_rank(attention, start, 200)
    assert torch.equal(ops.page_rank(attention, start, 200, tol=2.1), ops.page_rank(attention, start, 1))
    for tol in (1e-1, 1e-2, 1e-4):
        got = ops.page_rank(attention, start, 200, tol=tol)
        close(got, reference.page_rank(attention, start, 200, tol=tol), 1e-6)
        assert not torch.equal(got, far)


def test_page_rank_starts_from_the_scaled_weights() -> None:
    start, alive = torch.tensor([[3.0, 1.0, 4.0]]), torch.tensor([[True, True, False]])
    got = ops.page_rank(torch.eye(3).expand(1, 2, 3, 3), start, 0, alive)
    assert torch.equal(got, torch.tensor([[[0.75, 0.25, 0.0]] * 2]))


class LargestAllocation(TorchDispatchMode):
    """The numbers in the largest storage that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return result


def largest_allocation(function: Any) -> int:
    with LargestAllocation() as mode:
        function()
    return mode.largest


@pytest.mark.parametrize("tokens", [700, 1500])
def test_attention_mass_and_blocked_matching_form_no_square_matrix(tokens: int) -> None:
    q, k = torch.randn(2, 1, 1, tokens, 8).unbind()
    a, b = q[0], k[0]
    causal = torch.ones(1, tokens, dtype=torch.bool)  # broadcast: the mask itself is no square either
    square = tokens * tokens
    assert largest_allocation(lambda: ops.attention_rows(q, k, 1.0)) >= square  # the recorder sees a square
    assert largest_allocation(lambda: ops.bipartite_match(a, b, block_size=tokens)) >= square
    assert largest_allocation(lambda: ops.attention_mass(q, k, 1.0, causal)) < square * 0.6
    for metric in ("cosine", "l1", "l2", "minkowski3", "linf"):
        assert largest_allocation(lambda m=metric: ops.bipartite_match(a, b, m, block_size=32)) < square * 0.3


def test_large_matchings_are_blocked_without_being_asked() -> None:
    a, b = torch.randn(2, 1, 3000, 2).unbind()
    assert largest_allocation(lambda: ops.bipartite_match(a, b)) < 3000 * 3000 / 2
    assert torch.equal(ops.bipartite_match(a, b)[1], ops.bipartite_match(a, b, block_size=3000)[1])


@pytest.mark.parametrize("keys", [5, 1200])
def test_attention_mass_blocks_grouped_heads_and_samples(keys: int) -> None:
    """Sizes at which the loop runs over samples, over key heads and over queries."""
    for batch, heads, key_heads, queries in ((3, 4, 2, 300), (2, 8, 1, 17), (40, 2, 2, 3)):
        q, k = torch.randn(batch, heads, queries, 4), torch.randn(batch, key_heads, keys, 4)
        weights, log_size = torch.rand(batch, queries), torch.rand(batch, keys)
        mask = torch.rand(batch, heads, 1, keys) > 0.2
        got = ops.attention_mass(q, k, 0.5, mask, log_size, weights)
        want = (ops.attention_rows(q, k, 0.5, mask, log_size) * weights[:, None, :, None]).sum(2)
        close(got, want, 1e-5)


x3, i2, q4 = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.gather_tokens(x3, i2.float()), TypeError, "indices: expected int64"),
        (lambda: ops.gather_tokens(x3, i2[:1]), ValueError, "differ in batch size"),
        (lambda: ops.gather_tokens(x3, i2[0]), ValueError, r"indices: expected shape \(B, K\), got \(3,\) int64"),
        (lambda: ops.gather_tokens([1], i2), TypeError, "x: expected a tensor"),
        (lambda: ops.merge_tokens(x3, i2[:, :2], 3), ValueError, r"the \(B, N\) of x = \(2, 3\)"),
        (lambda: ops.merge_tokens(x3, i2, 3, torch.ones(2, 4)), ValueError, "weights"),
        (lambda: ops.merge_tokens(x3, i2, 3, i2), TypeError, "weights: expected a floating-point tensor"),
        (lambda: ops.merge_tokens(x3, i2, -1), ValueError, "slots"),
        (lambda: ops.merge_tokens(x3, i2, 3, reduce="max"), ValueError, '"mean" or "sum", got \'max\''),
        (lambda: ops.merge_tokens(x3.long(), i2, 3), TypeError, "x: expected a floating-point tensor"),
        (lambda: ops.unmerge_tokens(x3[0], i2), ValueError, r"y: expected shape \(B, K, C\)"),
        (lambda: ops.attention_rows(q4, x3, 1.0), ValueError, "k: expected shape"),
        (lambda: ops.attention_rows(q4, q4[..., :2], 1.0), ValueError, "equal last dimensions"),
        (lambda: ops.attention_rows(q4, torch.randn(2, 3, 5, 4), 1.0), ValueError, "multiple"),
        (lambda: ops.attention_rows(q4, q4, 1.0, torch.ones(2, 3)), ValueError, "mask: .* broadcastable"),
        (lambda: ops.attention_mass(q4, q4, 1.0, torch.ones(3, 3).long()), TypeError, "mask: expected bool"),
        (lambda: ops.attention_mass(q4, q4, 1.0, None, torch.ones(2, 4)), ValueError, "log_size"),
        (lambda: ops.attention_mass(q4, q4, 1.0, query_weights=torch.ones(2, 4)), ValueError, "query_weights"),
        (lambda: ops.bipartite_match(x3, x3, "l7"), ValueError, "metric: expected one of cosine"),
        (lambda: ops.bipartite_match(x3, x3[:, :0]), ValueError, "Nb >= 1"),
        (lambda: ops.bipartite_match(x3, x3, block_size=0), ValueError, "block_size"),
        (lambda: ops.bipartite_match(x3, x3, valid_b=i2), TypeError, "valid_b: expected bool"),
        (lambda: ops.page_rank(q4, i2, 1), ValueError, "square"),
        (lambda: ops.page_rank(q4[..., :3], i2[:, :2], 1), ValueError, "start"),
        (lambda: ops.page_rank(q4[..., :3], i2, -1), ValueError, "iterations"),
        (lambda: ops.page_rank(q4[..., :3], i2, 1, i2), TypeError, "alive: expected bool"),
        (lambda: ops.top_indices(x3[0], 5), ValueError, "0 <= k <= n = 4, got 5"),
        (lambda: ops.rank(x3), ValueError, "scores: expected shape"),
    ],
)
def test_errors_say_what_was_given_and_expected(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
