"""Any small size, with ties and special values, against the slow definitions; and laws that hold for every input."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import METRICS
from tokred import ops
from tokred.ops import reference

counts = st.integers(1, 3), st.integers(0, 9), st.integers(1, 5)
seeds = st.integers(0, 10**6)
few = settings(max_examples=40)
special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("nan"), float("inf"), float("-inf")])


def grid(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Small whole numbers: sums and products are exact in every dtype, and ties are frequent."""
    return torch.randint(-2, 3, shape, generator=generator).float()


@few
@given(st.lists(st.lists(special, min_size=6, max_size=6), min_size=1, max_size=3), st.integers(0, 6), st.booleans())
def test_selection_is_stable_and_puts_nan_last(rows: list[list[float]], k: int, largest: bool) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        scores = torch.tensor(rows, dtype=dtype)
        assert torch.equal(ops.rank(scores, largest), reference.rank(scores, largest))
        assert torch.equal(ops.top_indices(scores, k, largest), reference.top_indices(scores, k, largest))


@few
@given(st.integers(0, 7), seeds)
def test_selection_of_whole_numbers(n: int, seed: int) -> None:
    scores = torch.randint(0, 3, (2, n), generator=torch.Generator().manual_seed(seed))
    for largest in (True, False):
        assert torch.equal(ops.rank(scores, largest), reference.rank(scores, largest))


@few
@given(*counts, st.integers(0, 12), seeds)
def test_gather(batch: int, tokens: int, channels: int, kept: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=g)
    index = torch.randint(max(tokens, 1), (batch, kept if tokens else 0), generator=g)
    assert torch.equal(ops.gather_tokens(x, index), reference.gather_tokens(x, index))


@few
@given(*counts, st.integers(0, 6), seeds, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_merge_and_unmerge(batch: int, tokens: int, channels: int, slots: int, seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weights = grid(g, batch, tokens, channels), torch.randint(0, 4, (batch, tokens), generator=g).float()
    where = torch.randint(-1, slots, (batch, tokens), generator=g) if slots else torch.full((batch, tokens), -1)
    y, totals = ops.merge_tokens(x.to(dtype), where, slots, weights, "sum")
    want = reference.merge_tokens(x, where, slots, weights, "sum")
    assert torch.equal(y, want[0].to(dtype))  # whole numbers: exact
    assert torch.equal(totals, want[1])
    mean, _ = ops.merge_tokens(x, where, slots, weights)
    torch.testing.assert_close(mean, reference.merge_tokens(x, where, slots, weights)[0])
    # Nothing is lost: the weighted sum over tokens that were not dropped is unchanged (tome.md, invariant 3).
    kept = x * (weights * (where >= 0))[..., None]
    torch.testing.assert_close((mean * totals[..., None]).sum(1), kept.sum(1))
    assert torch.equal(ops.unmerge_tokens(y, where), reference.unmerge_tokens(y, where))
    # Merging what was unmerged gives the slots back, where they have members.
    again, members = ops.merge_tokens(ops.unmerge_tokens(mean, where), where, slots)
    torch.testing.assert_close(again, mean * (members > 0)[..., None])


@few
@given(st.integers(1, 2), st.integers(0, 6), st.integers(1, 6), st.integers(1, 4), seeds, st.sampled_from(METRICS))
def test_matching_with_ties(batch: int, rows: int, columns: int, d: int, seed: int, metric: str) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = grid(g, batch, rows, d), grid(g, batch, columns, d)
    valid = torch.rand(batch, columns, generator=g) > 0.2
    blocked = ops.bipartite_match(a, b, metric, 2, valid)
    whole = ops.bipartite_match(a, b, metric, None, valid)
    want, index = reference.bipartite_match(a.double(), b.double(), metric, valid_b=valid)
    for value, chosen in (blocked, whole):
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)
        # Cosines of one direction differ in their last bits: there any of the best is right.
        if metric != "cosine":
            assert torch.equal(chosen, index)
        elif rows:
            best = [
                [reference.similarity(a[n, i].double(), b[n, c].double()) for i, c in enumerate(row)]
                for n, row in enumerate(chosen.tolist())
            ]
            dead = want == float("-inf")
            torch.testing.assert_close(torch.tensor(best)[~dead], want[~dead], rtol=1e-6, atol=1e-6, check_dtype=False)


@few
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), seeds)
def test_attention_rows_are_distributions(b: int, g: int, queries: int, keys: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, 2 * g, queries, d, generator=generator)
    k = torch.randn(b, 2, keys, d, generator=generator)
    mask = torch.rand(b, 1, queries, keys, generator=generator) > 0.5
    rows = ops.attention_rows(q, k, d**-0.5, mask)
    assert not rows[~mask.expand_as(rows)].any()
    torch.testing.assert_close(rows.sum(-1), mask.any(-1).expand(-1, 2 * g, -1).float())
    mass = ops.attention_mass(q, k, d**-0.5, mask)
    torch.testing.assert_close(mass, rows.sum(2), rtol=1e-5, atol=1e-5)


@few
@given(st.integers(1, 5), seeds)
def test_proportional_attention_equals_attention_over_copies(keys: int, seed: int) -> None:
    """tome.md, section 13: a token of size n is n equal tokens."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 2, 4, 3, generator=g), torch.randn(1, 2, keys, 3, generator=g)
    sizes = torch.randint(1, 5, (keys,), generator=g)
    copies = ops.attention_rows(q, k.repeat_interleave(sizes, 2), 0.7)
    owner = torch.arange(keys).repeat_interleave(sizes)
    want = torch.zeros(1, 2, 4, keys).index_add(3, owner, copies)
    torch.testing.assert_close(ops.attention_rows(q, k, 0.7, log_size=sizes.float().log()[None]), want)


@few
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 6), st.sampled_from([0.0, 0.2]), seeds)
def test_page_rank_keeps_the_sum(heads: int, tokens: int, iterations: int, damping: float, seed: int) -> None:
    """zero_tprune.md, invariants 2 and 4."""
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, heads, tokens, tokens, generator=g).softmax(-1)
    alive = torch.rand(2, tokens, generator=g) > 0.4
    start = torch.rand(2, tokens, generator=g) + 0.01
    scores = ops.page_rank(attention, start, iterations, alive, damping=damping)
    torch.testing.assert_close(scores.sum(-1), alive.any(-1)[:, None].expand(-1, heads).float())
    assert not scores[~alive[:, None].expand_as(scores)].any()
    want = reference.page_rank(attention, start, iterations, alive, damping=damping)
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-6)
    constant = attention[:, :, :1].expand(-1, -1, tokens, -1)
    if iterations and not damping:
        got = ops.page_rank(constant, start, iterations, renorm=False)
        torch.testing.assert_close(got, constant[:, :, 0], rtol=1e-5, atol=1e-6)
