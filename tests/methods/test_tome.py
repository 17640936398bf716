"""ToMe: the matching against a slow definition, and its invariants on small timm models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tests.methods import oracles
from tests.methods.models import KINDS, images, tiny
from tests.parity._golden import block_outputs, recorded
from tokred import ops
from tokred.core.budget import check_removals, removals_per_layer
from tokred.core.tokens import TokenTable
from tokred.vision.tome import match_bipartite, match_every_kth, match_random

each_kind = pytest.mark.parametrize("kind", KINDS)


def run(model: Any, method: Any, x: Tensor) -> tuple[Tensor, tokred.Trace]:
    with tokred.patch(model, method) as patch, torch.no_grad():
        return model(x), patch.trace


def sizes_of(trace: tokred.Trace, step: int = -1) -> Tensor:
    group = trace[step].group
    return torch.zeros(len(group), trace[step].tokens_out).scatter_add(1, group, torch.ones(group.shape))


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "r", "expected"),
    [
        (12, (13, -1), [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        (12, (16, -1), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        (12, (8, 0.5), [4, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12]),
        (12, (7, -0.3), [9, 8, 8, 7, 7, 7, 6, 6, 6, 5, 5, 5]),
        (12, [5, 0, 20], [5, 0, 20] + [0] * 9),
        (12, [5, 7], [5, 7] + [0] * 10),
        (12, [8, -1.0], [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
        (4, 6, [6, 6, 6, 6]),
        (1, (9, -1), [9]),
        (3, (4, 0), [4, 4, 4]),
    ],
)
def test_r_becomes_a_count_for_each_block(depth: int, r: Any, expected: list[int]) -> None:
    assert list(removals_per_layer(check_removals("r", r), depth)) == expected
    method = tokred.ToMe(r=r)
    model = tiny(depth=depth, img_size=8 * 30, embed_dim=2, num_heads=1)
    left, counts = 900, []
    for removed in expected:
        left -= removed
        counts.append(left)
    assert method.plan(info(model)) == counts


def test_r_with_inflection_sums_as_in_the_paper() -> None:
    assert sum(removals_per_layer(check_removals("r", (8, -1)), 24)) == 181


def info(model: Any) -> Any:
    from tokred.adapters.registry import find_host

    return find_host(model).info


def test_constant_r_on_deit_leaves_the_published_counts() -> None:
    with torch.device("meta"):
        model = tiny(img_size=224, patch_size=16, embed_dim=48, num_heads=3, depth=12)
    for r, expected in ((8, 101), (13, 41), (16, 11)):
        assert tokred.ToMe(r=r).plan(info(model))[-1] + 1 == expected


def test_a_ratio_counts_from_the_tokens_that_are_present() -> None:
    method = tokred.ToMe(ratio=0.3)
    left, counts = 25, []
    for _ in range(4):
        left -= round(0.3 * left)
        counts.append(left)
    assert method.plan(info(tiny())) == counts
    _, trace = run(tiny(), method, images())
    assert [step.tokens_out for step in trace] == counts


# -- matching --------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Metric, x, sizes, r and prefix; half of the metrics are +-1/2 vectors of length 4: exact cosines, many ties."""
    batch, prefix = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    tokens = prefix + draw(st.integers(2, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        metric = torch.randint(0, 2, (batch, tokens, 4), generator=generator) - 0.5
    else:
        metric = torch.randn(batch, tokens, draw(st.integers(1, 6)), generator=generator)
    x = torch.randn(batch, tokens, 3, generator=generator)
    sizes = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    sizes[:, :prefix] = 1
    return metric, x, sizes, draw(st.integers(0, tokens)), prefix


@given(problems(), st.sampled_from(["official", "ascending"]))
def test_matching_equals_its_slow_definition(problem: Any, order: Any) -> None:
    metric, x, sizes, r, prefix = problem
    n = metric.shape[1] - prefix
    removed = n - tokred.ToMe(r=r).count(n, r)
    assert removed == min(r, n // 2)
    merge = match_bipartite(metric[:, prefix:].double(), removed, prefix, order)
    table = TokenTable(len(x), n, sizes=sizes[:, prefix:]).apply(0, "tome", merge)
    y, totals = ops.merge_tokens(x[:, prefix:], merge.assignment, merge.slots, sizes[:, prefix:])
    assert torch.equal(totals, table.sizes)
    for b in range(len(x)):
        want = oracles.tome(metric[b], x[b], sizes[b].tolist(), removed, prefix, order == "official")
        if removed:
            assert merge.representative[b].tolist() == [owner - prefix for owner in want.owners[prefix:]]
            groups = [sorted(torch.nonzero(merge.assignment[b] == slot)[:, 0].tolist()) for slot in range(merge.slots)]
            assert groups == [sorted(t - prefix for t in group) for group in want.groups[prefix:]]
            torch.testing.assert_close(y[b].double(), want.x[prefix:], atol=1e-5, rtol=1e-5)
            assert totals[b].tolist() == want.sizes[prefix:]


@given(problems())
def test_a_merge_keeps_the_weighted_sum_and_undoes_in_place(problem: Any) -> None:
    metric, x, sizes, r, prefix = problem
    metric, x, sizes = metric[:, prefix:], x[:, prefix:], sizes[:, prefix:]
    n = metric.shape[1]
    merge = match_bipartite(metric, min(r, n // 2), prefix)
    y, totals = ops.merge_tokens(x, merge.assignment, merge.slots, sizes)
    torch.testing.assert_close((y * totals[..., None]).sum(1), (x * sizes[..., None]).sum(1), atol=1e-4, rtol=1e-4)
    back = ops.unmerge_tokens(y, merge.assignment)
    assert back.shape == x.shape
    alone = totals.gather(1, merge.assignment) == sizes  # tokens that nothing merged into, in their own place
    assert torch.equal(back[alone], x[alone])
    assert torch.equal(merge.assignment.gather(1, merge.representative), torch.arange(merge.slots).expand(len(x), -1))


@given(st.integers(2, 5), st.integers(2, 23), st.integers(0, 99))
def test_every_kth_receives_and_the_rest_of_the_tokens_is_dropped(k: int, tokens: int, seed: int) -> None:
    metric = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed))
    assert tokred.ToMe(matching="kth", k=k).count(tokens, 1) == (tokens // k or tokens)
    if tokens < k:
        return
    merge = match_every_kth(metric, k)
    receivers = list(range(k - 1, tokens // k * k, k))
    for b in range(2):
        assert merge.representative[b].tolist() == receivers
        for t in range(tokens):
            if t >= tokens // k * k:
                want = -1
            elif t in receivers:
                want = receivers.index(t)
            else:
                similar = [oracles.cosine(metric[b, t], metric[b, j]) for j in receivers]
                want = similar.index(max(similar))
            assert merge.assignment[b, t] == want


@given(st.integers(2, 15), st.data())
def test_random_matching_removes_r_and_joins_the_most_similar(tokens: int, data: st.DataObject) -> None:
    r, seed = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, 99))
    metric = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed))
    merge = match_random(metric, r, seed)
    assert merge.slots == tokens - r
    assert torch.equal(merge.representative[0], merge.representative[1])
    for b in range(2):
        keep = merge.representative[b].tolist()
        assert len(set(keep)) == len(keep)
        for t in set(range(tokens)) - set(keep):
            similar = [oracles.cosine(metric[b, t], metric[b, j]) for j in keep]
            assert merge.assignment[b, t] == similar.index(max(similar))


def test_blocks_with_fewer_tokens_than_one_run_are_left_alone() -> None:
    _, trace = run(tiny("no class token", depth=6), tokred.ToMe(matching="kth", k=3), images())
    assert [step.tokens_out for step in trace] == [8, 2]


def test_the_single_patch_and_r_zero_change_nothing() -> None:
    for model, x, method in (
        (tiny(img_size=8), images(2, 8), tokred.ToMe(r=8)),
        (tiny(), images(), tokred.ToMe(r=0)),
        (tiny(), images(), tokred.ToMe(r=[0, 0, 0, 0])),
    ):
        want = model(x)
        got, trace = run(model, method, x)
        assert len(trace) == 0
        assert torch.equal(got, want)


# -- whole models ----------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("r", [3, [4, 0, 6, 1], (5, -1), 100])
def test_a_model_equals_its_slow_definition(kind: str, r: Any) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    with recorded(tokred.ToMe) as log, block_outputs(model) as outputs:
        logits, trace = run(model, tokred.ToMe(r=r), x)
    assert log
    plan = removals_per_layer(check_removals("r", r), 4)

    def merge(block: oracles.Block) -> tuple[Tensor, list[float]] | None:
        answer = oracles.tome(block.keys.mean(0), block.x, block.sizes, plan[block.layer], prefix)
        return (answer.x, answer.sizes) if plan[block.layer] else None

    exact = copy.deepcopy(model).double()
    for b in range(len(x)):
        with torch.no_grad():
            want, normed, sizes = oracles.slow_vit(exact, x[b], after_attention=merge, proportional=True)
            if exact.global_pool == "avg":  # the mean over what the tokens represent
                weight = torch.tensor(sizes[prefix:], dtype=torch.float64)[:, None]
                pooled = (weight * normed[prefix:]).sum(0) / weight.sum()
                head = exact.head(exact.fc_norm(pooled[None]))
            else:
                head = exact.forward_head(normed[None])
        for layer in range(4):
            torch.testing.assert_close(outputs[layer][b].double(), want[layer], atol=1e-4, rtol=1e-4)
        assert sizes_of(trace)[b].tolist() == sizes[prefix:]
        torch.testing.assert_close(logits[b].double(), head[0], atol=1e-4, rtol=1e-4)


@each_kind
def test_counts_sizes_and_sources_add_up(kind: str) -> None:
    model, x, r = tiny(kind), images(3), [5, 9, 100, 2]
    prefix = model.num_prefix_tokens
    with block_outputs(model) as outputs:
        _, trace = run(model, tokred.ToMe(r=r), x)
    left = 25
    for layer, step in enumerate(trace):
        left -= min(r[layer], left // 2)
        assert (step.layer, step.tokens_out) == (layer, left)
        assert outputs[layer].shape[1] == prefix + left
        assert (sizes_of(trace, layer) >= 1).all()
        assert torch.equal(sizes_of(trace, layer).sum(1), torch.full((3,), 25.0))
        assert torch.equal(step.group.gather(1, step.origins), torch.arange(left).expand(3, -1))


@each_kind
def test_prefix_tokens_stay_in_front_and_whole(kind: str) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    first: list[Tensor] = []
    block = model.blocks[0]
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        whole = tokens + block.ls1(block.attn(block.norm1(tokens)))  # the host's own x before merging
        untouched = whole + block.ls2(block.mlp(block.norm2(whole)))
    block.register_forward_hook(lambda *call: first.append(call[-1]))
    with recorded(tokred.ToMe) as log:
        run(model, tokred.ToMe(r=7), x)
    torch.testing.assert_close(log[0].view.tokens, whole)
    torch.testing.assert_close(first[0][:, :prefix], untouched[:, :prefix], atol=1e-5, rtol=1e-5)
    assert first[0].shape[1] == prefix + 18


def test_proportional_attention_equals_attention_over_copies() -> None:
    """Block 1 of the patched model on merged tokens, against the untouched block on every token's copies."""
    model, x = tiny(), images(1)
    with block_outputs(model) as outputs:
        _, trace = run(model, tokred.ToMe(r=[9]), x)
    merged, sizes = outputs[0], [1, *sizes_of(trace)[0].long().tolist()]
    copies = [token for token, size in enumerate(sizes) for _ in range(size)]
    assert len(copies) == 26
    with torch.no_grad():
        expanded = model.blocks[1](merged[:, copies])
    firsts = [copies.index(token) for token in range(len(sizes))]
    torch.testing.assert_close(outputs[1], expanded[:, firsts], atol=1e-5, rtol=1e-5)

    a = model.blocks[1].attn
    q, k, v = a.qkv(model.blocks[1].norm1(merged)).detach().view(len(sizes), 3, 2, 16).permute(1, 2, 0, 3)
    bias = torch.tensor(sizes).log()[None, None]
    got = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias)[0, 0]
    torch.testing.assert_close(got.double(), oracles.expanded_attention(q[0], k[0], v[0], sizes), atol=1e-5, rtol=1e-5)


def test_merging_exact_copies_changes_nothing_only_with_proportional_attention() -> None:
    model = tiny(img_size=32)
    x = images(2, 32)
    with torch.no_grad():
        model.pos_embed.zero_()
        x[..., 8:16], x[..., 24:32] = x[..., :8].clone(), x[..., 16:24].clone()  # even columns of patches copied
        want = model(x)
    got, trace = run(model, tokred.ToMe(r=[8]), x)
    assert torch.equal(sizes_of(trace), torch.full((2, 8), 2.0))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    lifted, _ = run(model, tokred.ToMe(r=[3]), x)  # some tokens are pairs now, some are not
    torch.testing.assert_close(lifted, want, atol=1e-5, rtol=1e-5)
    off, _ = run(model, tokred.ToMe(r=[3], prop_attn=False), x)
    assert (off - want).abs().max() > 1e-3


@each_kind
def test_a_batch_equals_its_images(kind: str) -> None:
    model, x = tiny(kind), images(3)
    together, trace = run(model, tokred.ToMe(r=6), x)
    for b in range(3):
        alone, own = run(model, tokred.ToMe(r=6), x[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(trace[-1].group[b], own[-1].group[0])


@pytest.mark.parametrize("kind", ["no class token", "class token, average"])
def test_average_pooling_weighs_by_size_unless_told_otherwise(kind: str) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    for weighted in (True, False):
        with tokred.patch(model, tokred.ToMe(r=6, weighted_pool=weighted)) as patch, torch.no_grad():
            features = model.forward_features(x)
            logits = model.forward_head(features)
            spread = patch.trace.restore(features)[:, prefix:] if weighted else features[:, prefix:]
        want = model.head(model.fc_norm(spread.mean(1)))
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_attention_pooling_sees_every_merged_token_as_often_as_it_stands() -> None:
    model, x = tiny("no class token", global_pool="map"), images()
    with tokred.patch(model, tokred.ToMe(r=6)) as patch, torch.no_grad():
        features = model.forward_features(x)
        logits = model.forward_head(features)
        spread = patch.trace.restore(features)
    torch.testing.assert_close(logits, model.forward_head(spread), atol=1e-5, rtol=1e-5)


@each_kind
def test_fused_and_explicit_attention_agree(kind: str) -> None:
    model, x = tiny(kind), images()
    fused, trace = run(model, tokred.ToMe(r=5), x)
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    explicit, own = run(model, tokred.ToMe(r=5), x)
    torch.testing.assert_close(fused, explicit, atol=1e-4, rtol=1e-4)
    assert torch.equal(trace[-1].group, own[-1].group)


@each_kind
def test_undo_leaves_no_trace(kind: str) -> None:
    model, x = tiny(kind), images()
    want, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    with tokred.patch(model, tokred.ToMe(r=4)):
        assert not torch.equal(model(x), want)
        assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), want)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [
    {"metric": "key_concat"}, {"metric": "query"}, {"metric": "value"}, {"metric": "x"},
    {"matching": "kth", "k": 3}, {"matching": "random"}, {"order": "ascending"}, {"ratio": 0.2},
])  # fmt: skip
def test_every_option_changes_the_result(options: dict[str, Any]) -> None:
    model, x = tiny("no class token"), images()
    plain, _ = run(model, tokred.ToMe(r=4), x)
    got, trace = run(model, tokred.ToMe(r=4, **options), x)
    assert len(trace) > 0
    assert got.isfinite().all()
    assert not torch.allclose(got, plain, atol=1e-4)


def test_metrics_are_what_they_say() -> None:
    model, x = tiny(), images()
    for metric, expected in (
        ("key", lambda v: v.keys().mean(1)[:, 1:]),
        ("query", lambda v: v.queries().mean(1)[:, 1:]),
        ("value", lambda v: v.values().mean(1)[:, 1:]),
        ("key_concat", lambda v: v.keys()[:, :, 1:].transpose(1, 2).flatten(2)),
        ("x", lambda v: v.tokens[:, 1:]),
    ):
        with recorded(tokred.ToMe) as log:
            run(model, tokred.ToMe(r=[0, 5, 0, 0], metric=metric), x)
        seen = log[1]
        want = match_bipartite(expected(seen.view), 5, 1)
        assert torch.equal(seen.change.assignment, want.assignment)


def test_random_matching_is_drawn_anew_for_each_block() -> None:
    model, x = tiny(), images()
    with recorded(tokred.ToMe) as log:
        run(model, tokred.ToMe(r=[4, 4], matching="random", seed=5), x)
    for layer, seen in log.items():
        want = match_random(seen.view.keys().mean(1)[:, 1:], 4, 5 + layer)
        assert torch.equal(seen.change.assignment, want.assignment)
        assert not torch.equal(
            seen.change.assignment, match_random(seen.view.keys().mean(1)[:, 1:], 4, 4 + layer).assignment
        )


def test_keys_and_values_are_those_of_the_block() -> None:
    model, x = tiny("layer scale, q/k norm"), images()
    with recorded(tokred.ToMe) as log:
        run(model, tokred.ToMe(r=[3], metric="value"), x)
    a = model.blocks[0].attn
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        q, k, v = a.qkv(model.blocks[0].norm1(tokens)).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        view = log[0].view
        torch.testing.assert_close(view.keys(), a.k_norm(k))
        torch.testing.assert_close(view.queries(), a.q_norm(q))
        torch.testing.assert_close(view.values(), v)


def test_gradients_pass_through_merges_and_not_through_the_matching() -> None:
    model = tiny()
    with tokred.patch(model, tokred.ToMe(r=5)):
        model(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_token_that_is_not_a_number_is_merged_last() -> None:
    metric = torch.randn(1, 12, 4)
    metric[0, 4] = float("nan")
    merge = match_bipartite(metric, 5)
    assert merge.slots == 7
    assert 4 in merge.representative[0].tolist()  # the other five even tokens went
    run(tiny(), tokred.ToMe(r=6), torch.full((1, 3, 40, 40), float("nan")))
