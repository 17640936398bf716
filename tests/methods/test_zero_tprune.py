"""Zero-TPrune: every stage against a slow definition, and the invariants of the method on small timm models."""

from __future__ import annotations

import copy
import math
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
from tests.parity.test_zero_tprune import layer_view
from tokred import ops
from tokred.core.method import Method
from tokred.vision.zero_tprune import PRESETS, Stage, default_iterations, importance, similar_tokens

each_kind = pytest.mark.parametrize("kind", KINDS)
SCHEDULE = {0: (5, 1.0), 1: (3, 0.8, 4), 3: (0, 0.6)}
OPEN = {"prefix": 1, "boosted": (0,)}


def run(model: Any, method: Any, x: Tensor) -> tuple[Tensor, tokred.Trace]:
    with tokred.patch(model, method) as patch, torch.no_grad():
        return model(x), patch.trace


def info(model: Any) -> Any:
    from tokred.adapters.registry import find_host

    return find_host(model).info


def graph(batch: int, heads: int, tokens: int, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # heads of different sharpness: some are flat, some look at one token, as the head filter expects
    scale = torch.linspace(0.05, sharpness, heads).view(1, heads, 1, 1)
    return (torch.randn(batch, heads, tokens, tokens, generator=generator) * scale).softmax(-1)


# -- one layer against the slow definition ---------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    prefix = draw(st.integers(0, 5))
    tokens = prefix + draw(st.integers(1, 14))
    batch, heads, seed = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 2**20))
    feature = torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):  # exact cosines, many ties
        feature = torch.where(feature > 0, 0.5, -0.5)
    return {
        "attention": graph(batch, heads, tokens, seed, draw(st.sampled_from([0.5, 2.0, 4.0]))),
        "feature": feature,
        "prefix": prefix,
        "boosted": tuple(sorted(draw(st.sets(st.integers(0, max(prefix - 1, 0)))))) if prefix else (),
        "r_s": draw(st.integers(0, 9)),
        "keep": draw(st.sampled_from([1.0, 0.9, 0.7, 0.5, 0.29, 0.05])),
        "iterations": draw(st.sampled_from([1, 2, 5, 30])),
        "order": draw(st.sampled_from(["SI", "IS"])),
        "partition": draw(st.sampled_from(["sequential_u", "sequential_i", "alternate"])),
        "vhf": draw(st.sampled_from([(0.01, 0.7), None])),
        "eir": draw(st.booleans()),
        "renorm": draw(st.booleans()),
    }


@given(layers())
def test_a_layer_equals_its_slow_definition(layer: dict[str, Any]) -> None:
    attention, feature, prefix = layer.pop("attention"), layer.pop("feature"), layer.pop("prefix")
    amounts = {key: layer.pop(key) for key in ("r_s", "keep", "iterations")}
    boosted = layer.pop("boosted")
    method = tokred.ZeroTPrune(boosted=boosted, **layer)
    view = layer_view(attention, feature, prefix)
    rule = Stage(amounts["r_s"], amounts["keep"], amounts["iterations"])
    kept = method.reduce(view, rule).indices + prefix
    assert kept.shape[1] == method.count(view.count, rule)
    for b in range(len(attention)):
        want = oracles.zero_tprune(attention[b], feature[b], prefix, boosted, **amounts, **layer)
        assert kept[b].tolist() == want


@given(layers(), st.data())
def test_a_vote_equals_its_slow_definition(layer: dict[str, Any], data: st.DataObject) -> None:
    attention, prefix = layer["attention"], layer["prefix"]
    n = attention.shape[2] - prefix
    options = {key: layer[key] for key in ("vhf", "eir", "renorm")}
    # without renormalisation scores fall by the share of dead tokens in each round, in the end below float32
    rounds = layer["iterations"] if layer["renorm"] else min(layer["iterations"], 5)
    alive = torch.zeros(len(attention), n, dtype=torch.bool)
    for row in alive:
        row[data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))] = True
    found = importance(attention, alive, rounds, prefix=prefix, boosted=layer["boosted"], **options)
    for b in range(len(attention)):
        candidates = (torch.nonzero(alive[b])[:, 0] + prefix).tolist()
        want = oracles.vote(attention[b], candidates, prefix, rounds, layer["boosted"], **options)
        at = [c - prefix for c in candidates]
        close(found.score[b, at], [want.score[c] for c in candidates])
        assert found.head_mask[b].tolist() == want.counted
        close(found.head_variance[b], want.variance)
        for h, scores in enumerate(want.heads):
            close(found.head_scores[b, h, at], [scores[c] for c in candidates])
        assert not found.score[b][~alive[b]].any()


def close(got: Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=1e-4)


@given(
    st.integers(2, 17), st.integers(1, 20), st.sampled_from(["sequential_u", "sequential_i", "alternate"]), st.data()
)
def test_copies_equal_their_slow_definition_with_ties(n: int, r: int, partition: Any, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    feature = torch.randint(0, 2, (2, n, 4), generator=generator) - 0.5
    score = torch.randint(0, 4, (2, n), generator=generator).float()
    method = tokred.ZeroTPrune(partition=partition)
    count = n - method.count(n, Stage(r, 1.0, 1))
    found = similar_tokens(feature, score, torch.ones(2, n, dtype=torch.bool), n, count, partition)
    for b in range(2):
        gone, best = oracles.copies(feature[b], dict(enumerate(score[b].tolist())), r, partition)
        assert found.pruned[b].tolist() == gone
        assert dict(zip(found.group_a[b].tolist(), found.similarity[b].tolist(), strict=True)) == {
            i: pytest.approx(similarity, abs=1e-6) for i, (similarity, _) in best.items()
        }
        for a, b_position in zip(found.group_a[b].tolist(), found.best_b[b].tolist(), strict=True):
            assert oracles.cosine(feature[b, a], feature[b, b_position]) == pytest.approx(best[a][0], abs=1e-6)


# -- whole models against the slow definition ------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("options", [{}, {"order": "IS", "feature": "key_mean"}, {"hook": "attn", "cls_boost": "none"}])
def test_a_model_equals_its_slow_definition(kind: str, options: dict[str, Any]) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    method = tokred.ZeroTPrune(schedule=SCHEDULE, **options)
    with block_outputs(model) as outputs:
        logits, trace = run(model, method, x)
    classes = {"registers": 1, "layer scale, q/k norm": 1}.get(kind, min(prefix, 2))
    boosted = range(0 if options.get("cls_boost") == "none" else classes)
    rules = {layer: (*entry, default_iterations(layer, 4))[:3] for layer, entry in SCHEDULE.items()}
    kept: list[list[int]] = []

    def prune(block: oracles.Block) -> tuple[Tensor, list[float]] | None:
        if block.layer not in rules:
            return None
        mean = options.get("feature") == "key_mean"
        feature = block.keys.mean(0) if mean else block.keys.transpose(0, 1).flatten(1)
        r_s, keep, iterations = rules[block.layer]
        order = options.get("order", "SI")
        stays = oracles.zero_tprune(block.attention, feature, prefix, boosted, r_s, keep, iterations, order=order)
        kept.append(stays)
        stays = [*range(prefix), *stays]
        return block.x[stays], [1.0] * len(stays)

    exact = copy.deepcopy(model).double()
    where = "after_attention" if options.get("hook") == "attn" else "after_block"
    for b in range(len(x)):
        kept.clear()
        with torch.no_grad():
            want, normed, _ = oracles.slow_vit(exact, x[b], **{where: prune})
            head = exact.forward_head(normed[None])
        origins = list(range(25))
        for step, stays in zip(trace, kept, strict=True):
            origins = [origins[position - prefix] for position in stays]
            assert step.origins[b].tolist() == origins
        for layer in range(4):
            torch.testing.assert_close(outputs[layer][b].double(), want[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[b].double(), head[0], atol=1e-4, rtol=1e-4)


# -- invariants of the vote ------------------------------------------------------------------------------------------


def test_votes_sum_to_one_after_every_round() -> None:
    a = graph(2, 3, 12)
    alive = torch.rand(2, 11) > 0.4
    alive[:, 0] = True
    everyone = torch.cat([torch.ones(2, 1, dtype=torch.bool), alive], dim=1)
    for iterations in (1, 2, 7, 30):
        for present in (None, everyone):
            ranks = ops.page_rank(a, torch.rand(2, 12), iterations, alive=present)
            torch.testing.assert_close(ranks.sum(-1), torch.ones(2, 3), atol=1e-5, rtol=0)


def test_one_round_has_a_closed_form() -> None:
    a = graph(2, 3, 12)
    uniform = importance(a, None, 1, prefix=1, boosted=())
    torch.testing.assert_close(uniform.head_scores, a.mean(2)[:, :, 1:], atol=1e-6, rtol=1e-5)
    root = math.sqrt(12)
    boosted = importance(a, None, 1, **OPEN)
    want = (root * a[:, :, 0] + a[:, :, 1:].sum(2)) / (11 + root)
    torch.testing.assert_close(boosted.head_scores, want[:, :, 1:], atol=1e-6, rtol=1e-5)
    half = importance(a, None, 1, **OPEN, boost="half_n")
    want = (7 * a[:, :, 0] + a[:, :, 1:].sum(2)) / (11 + 7)
    torch.testing.assert_close(half.head_scores, want[:, :, 1:], atol=1e-6, rtol=1e-5)


def test_stationary_votes() -> None:
    pi = torch.rand(9).softmax(0)
    same_rows = pi.expand(1, 1, 9, 9)
    for iterations in (1, 3, 30):
        found = importance(same_rows, None, iterations, **OPEN, vhf=None)
        torch.testing.assert_close(found.score[0], pi[1:], atol=1e-6, rtol=1e-5)
    turn = torch.eye(9)[torch.arange(9).roll(1)]
    doubly = (0.5 * torch.eye(9) + 0.3 * turn + 0.2 * turn.T).expand(1, 1, 9, 9)
    uniform = importance(doubly, None, 30, prefix=0, boosted=(), vhf=None)
    torch.testing.assert_close(uniform.score, torch.full((1, 9), 1 / 9), atol=1e-6, rtol=1e-5)


def test_many_rounds_reach_a_fixed_point_and_forget_the_start() -> None:
    a = graph(2, 3, 12)
    boosted, uniform = (importance(a, None, 100, prefix=1, boosted=start) for start in ((0,), ()))
    torch.testing.assert_close(boosted.score, uniform.score, atol=1e-4, rtol=0)
    s = ops.page_rank(a, torch.ones(2, 12), 100)
    torch.testing.assert_close(torch.einsum("bhij,bhi->bhj", a, s), s, atol=1e-5, rtol=1e-4)
    one = importance(a, None, 1, **OPEN).score
    assert (one - importance(a, None, 1, prefix=1, boosted=()).score).abs().max() > 1e-3  # at T = 1 it does matter


def test_heads() -> None:
    one_head = graph(1, 1, 10, sharpness=2.0)
    found = importance(one_head, None, 5, **OPEN)
    torch.testing.assert_close(found.score, found.head_scores[:, 0])
    heads = graph(1, 3, 10)
    rms, mean = (importance(heads, None, 5, **OPEN, eir=eir, vhf=None).score for eir in (True, False))
    assert (rms >= mean - 1e-7).all()
    assert (rms > mean + 1e-4).any()
    flat = torch.full((1, 1, 10, 10), 0.1)
    sharp = graph(1, 2, 10, sharpness=1.0)[:, 1:]  # one head that the filter lets pass
    for vhf, changes in (((0.01, 0.7), False), (None, True)):
        without = importance(sharp, None, 5, **OPEN, vhf=vhf).score
        added = importance(torch.cat([sharp, flat], dim=1), None, 5, **OPEN, vhf=vhf).score
        assert torch.allclose(without, added, atol=1e-7) != changes
    rejected = importance(flat.expand(1, 4, -1, -1), None, 5, **OPEN)
    off = importance(flat.expand(1, 4, -1, -1), None, 5, **OPEN, vhf=None)
    assert rejected.head_mask.all()
    assert torch.equal(rejected.score, off.score)
    single = torch.zeros(1, 1, 10, 10)
    single[..., 4] = 1.0
    assert importance(single, None, 1, **OPEN).head_variance.item() == pytest.approx(8.0)  # n - 1
    assert importance(flat, None, 1, **OPEN).head_variance.item() == pytest.approx(0.0, abs=1e-9)


def test_the_variance_of_raw_scores_cannot_pass_the_papers_threshold() -> None:
    found = importance(graph(1, 4, 50, sharpness=5.0), None, 1, **OPEN, var_norm="none")
    scores = found.head_scores
    torch.testing.assert_close(found.head_variance, scores.var(dim=-1, unbiased=False), atol=1e-9, rtol=1e-4)
    assert (found.head_variance < 0.01).all()


# -- invariants of the S-stage ---------------------------------------------------------------------------------------


def test_copies_come_from_the_less_important_half() -> None:
    score, feature = torch.rand(3, 15), torch.randn(3, 15, 6)
    alive = torch.ones(3, 15, dtype=torch.bool)
    found = similar_tokens(feature, score, alive, 15, 4)
    assert found.pruned.shape == (3, 4)
    median = score.median(dim=1, keepdim=True).values
    assert (score.gather(1, found.pruned) <= median).all()
    for b in range(3):
        assert set(found.pruned[b].tolist()) <= set(found.group_a[b].tolist())
        assert len(found.group_a[b]) == 7
        assert set(found.group_a[b].tolist()) | set(found.group_b[b].tolist()) == set(range(15))
    more = similar_tokens(feature, score, alive, 15, 4, "sequential_i")
    assert (score.gather(1, more.pruned) >= median).all()
    mixed = similar_tokens(feature, score, alive, 15, 4, "random", seed=3)
    assert mixed.group_a.shape == (3, 7)
    again = similar_tokens(feature, score, alive, 15, 4, "random", seed=3)
    assert torch.equal(mixed.pruned, again.pruned)
    assert not torch.equal(mixed.group_a, similar_tokens(feature, score, alive, 15, 4, "random", seed=4).group_a)


def test_without_halves_the_less_important_of_two_copies_goes() -> None:
    feature, score = torch.randn(1, 8, 5), torch.tensor([[5.0, 1.0, 7.0, 2.0, 3.0, 8.0, 6.0, 4.0]])
    feature[0, 2] = 3 * feature[0, 6]  # two important tokens, alike, and neither is the most important one
    found = similar_tokens(feature, score, torch.ones(1, 8, dtype=torch.bool), 8, 1, "none")
    assert found.pruned.tolist() == [[6]]


def test_the_random_half_is_drawn_anew_for_each_block() -> None:
    model, x = tiny(), images()
    with recorded(tokred.ZeroTPrune) as log:
        run(model, tokred.ZeroTPrune(schedule={0: (5, 1.0), 2: (5, 1.0)}, partition="random", seed=3), x)
    for layer, seen in log.items():
        view, n = seen.view, seen.view.count
        score = importance(view.attention_matrix(), None, 1, **OPEN).score
        keys = view.keys()[:, :, 1:].transpose(1, 2).flatten(2)
        found = similar_tokens(keys, score, torch.ones(2, n, dtype=torch.bool), n, 5, "random", seed=3 + layer)
        gone = torch.ones(2, n).scatter(1, seen.change.indices, 0.0)
        assert torch.equal(found.pruned.sort(dim=1).values, gone.nonzero()[:, 1].view(2, 5))


def test_an_exact_copy_goes_first_and_scale_does_not_matter() -> None:
    feature, score = torch.randn(1, 10, 6), torch.arange(10.0)[None]
    alive = torch.ones(1, 10, dtype=torch.bool)
    feature[0, 3] = feature[0, 8]
    found = similar_tokens(feature, score, alive, 10, 2)
    assert found.pruned[0, 0] == 3
    assert found.similarity[0, 3].item() == pytest.approx(1.0)
    scaled = similar_tokens(feature * (torch.rand(1, 10, 1) + 0.1), score, alive, 10, 2)
    assert torch.equal(found.pruned, scaled.pruned)


POWERS = {"l1": 1.0, "l2": 2.0, "minkowski3": 3.0, "minkowski4": 4.0, "minkowski5": 5.0, "linf": math.inf}


@pytest.mark.parametrize("similarity", ["cosine", "dot", *POWERS])
def test_similarities(similarity: str) -> None:
    model, x = tiny(), images()
    with recorded(tokred.ZeroTPrune) as log:
        run(model, tokred.ZeroTPrune(schedule={1: (6, 1.0)}, similarity=similarity), x)
    view = log[1].view
    score = importance(view.attention_matrix(), None, 1, **OPEN).score
    keys = view.keys()[:, :, 1:].transpose(1, 2).flatten(2)
    for b in range(2):
        ranked = score[b].argsort().tolist()
        a, rest = ranked[:12], ranked[12:]
        best = {}
        for i in a:
            for j in rest:
                if similarity == "cosine":
                    value = oracles.cosine(keys[b, i], keys[b, j])
                elif similarity == "dot":
                    value = float(keys[b, i].double() @ keys[b, j].double())
                else:
                    value = -float((keys[b, i].double() - keys[b, j].double()).norm(POWERS[similarity]))
                best[i] = max(best.get(i, -math.inf), value)
        gone = sorted(sorted(best, key=lambda i: -best[i])[:6])
        assert sorted(set(range(25)) - set(log[1].change.indices[b].tolist())) == gone


# -- whole models ----------------------------------------------------------------------------------------------------


@each_kind
def test_keeping_everything_changes_no_bit(kind: str) -> None:
    model, x = tiny(kind), images()
    want = model(x)
    for method in (tokred.ZeroTPrune(keep_rate=1.0), tokred.ZeroTPrune(schedule={1: (0, 1.0), 2: (0, 1.0, 7)})):
        got, trace = run(model, method, x)
        assert torch.equal(got, want)
        assert len(trace) == 0


@each_kind
def test_kept_tokens_ascend_and_counts_follow_the_rule(kind: str) -> None:
    model, x = tiny(kind), images(3)
    method = tokred.ZeroTPrune(schedule=SCHEDULE)
    prefix = model.num_prefix_tokens
    with torch.no_grad(), block_outputs(model) as whole:
        model(x)
    with block_outputs(model) as outputs:
        _, trace = run(model, method, x)
    assert [step.tokens_out for step in trace] == [20, 13, 7]
    assert method.plan(info(model)) == [20, 13, 13, 7]
    for step in trace:
        assert (step.origins.diff(dim=1) > 0).all()
    assert [y.shape[1] - prefix for y in outputs] == [20, 13, 13, 7]
    torch.testing.assert_close(outputs[0][:, :prefix], whole[0][:, :prefix], atol=1e-5, rtol=1e-5)


def test_the_preset_leaves_the_counts_of_the_paper() -> None:
    with torch.device("meta"):
        model = tiny(img_size=224, patch_size=16, embed_dim=48, num_heads=3, depth=12)
    plan = tokred.ZeroTPrune(preset="deit_s_3.08g").plan(info(model))
    assert [plan[layer] for layer in (1, 3, 6, 9, 11)] == [186, 158, 118, 75, 65]
    assert all(tokred.ZeroTPrune(preset=name).plan(info(model)) for name in PRESETS)


def test_keep_rate_counts_without_float_artefacts_and_keeps_one_token() -> None:
    method = tokred.ZeroTPrune(keep_rate=0.29)
    assert method.count(100, Stage(0, 0.29, 1)) == 29  # int(0.29 * 100) is 28
    assert method.count(3, Stage(0, 0.01, 1)) == 1
    assert method.count(1, Stage(8, 1.0, 1)) == 1
    assert method.count(7, Stage(100, 1.0, 1)) == 4


def test_default_rounds() -> None:
    assert [default_iterations(layer, 12) for layer in range(12)] == [30] * 3 + [5] * 6 + [1] * 3
    bound = tokred.ZeroTPrune(keep_rate=0.7).bind(info(tiny(depth=12)))
    assert bound == {1: Stage(0, 0.7, 30), 3: Stage(0, 0.7, 5), 6: Stage(0, 0.7, 5), 9: Stage(0, 0.7, 1)}
    own = tokred.ZeroTPrune(schedule={1: (2, 0.5, 4), 2: (2, 0.5)}, iterations=9).bind(info(tiny()))
    assert own == {1: Stage(2, 0.5, 4), 2: Stage(2, 0.5, 9)}


@each_kind
def test_pruning_equals_masking_the_pruned_tokens_out_as_keys(kind: str) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    with block_outputs(model) as outputs:
        _, trace = run(model, tokred.ZeroTPrune(schedule={0: (4, 0.9), 2: (2, 0.6)}), x)
    with torch.no_grad():
        y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        mask = None
        for layer, block in enumerate(model.blocks):
            y = block(y, attn_mask=mask)
            for step in trace:
                if step.layer == layer:
                    seen = torch.zeros(2, prefix + 25, dtype=torch.bool)
                    seen[:, :prefix] = True
                    seen.scatter_(1, step.origins + prefix, True)
                    mask = seen[:, None, None]
    assert mask is not None
    rows = torch.cat([torch.arange(prefix).expand(2, -1), trace[-1].origins + prefix], dim=1)
    torch.testing.assert_close(outputs[-1], ops.gather_tokens(y, rows), atol=1e-4, rtol=1e-4)


@each_kind
def test_a_batch_equals_its_images(kind: str) -> None:
    model, x = tiny(kind), images(3)
    together, trace = run(model, tokred.ZeroTPrune(schedule=SCHEDULE), x)
    for b in range(3):
        alone, own = run(model, tokred.ZeroTPrune(schedule=SCHEDULE), x[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(trace[-1].origins[b], own[-1].origins[0])


@given(st.integers(0, 999), st.sampled_from(["SI", "IS"]))
def test_a_permutation_of_the_patches_permutes_what_is_kept(seed: int, order: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, feature = graph(1, 2, 12, seed), torch.randn(1, 12, 5, generator=generator)
    moved = torch.cat([torch.tensor([0]), torch.randperm(11, generator=generator) + 1])
    method, rule = tokred.ZeroTPrune(order=order, boosted=(0,)), Stage(3, 0.7, 5)
    kept = method.reduce(layer_view(a, feature, 1), rule).indices[0] + 1
    again = method.reduce(layer_view(a[:, :, moved][:, :, :, moved], feature[:, moved], 1), rule).indices[0] + 1
    assert sorted(moved[again].tolist()) == kept.tolist()


@pytest.mark.parametrize("options", [
    {"cls_boost": "none"}, {"cls_boost": "half_n"}, {"vhf": None}, {"eir": False}, {"renorm": False}, {"damping": 0.4},
    {"tau_imp": 0.5}, {"order": "IS"}, {"partition": "sequential_i"}, {"partition": "alternate"},
    {"partition": "random"}, {"partition": "none"}, {"feature": "query"}, {"feature": "value"},
    {"feature": "x_before"}, {"feature": "x_after"}, {"feature": "key_mean"}, {"similarity": "l2"},
    {"iterations": 20}, {"var_norm": "none", "vhf": (0.0, 1e-4)}, {"boosted": (0, 2)}, {"tol": 0.5, "iterations": 9},
])  # fmt: skip
def test_every_option_changes_the_result(options: dict[str, Any]) -> None:
    model, x = tiny("registers", num_heads=4), images(6)
    schedule = {1: (6, 0.7), 2: (3, 0.6)}
    base = {"iterations": 9} if "tol" in options else {"iterations": 1}
    plain, before = run(model, tokred.ZeroTPrune(schedule=schedule, **base), x)
    got, trace = run(model, tokred.ZeroTPrune(schedule=schedule, **{**base, **options}), x)
    assert got.isfinite().all()
    assert [step.tokens_out for step in before] == [13, 6]
    assert [step.tokens_out for step in trace] == ([11, 3] if options.get("order") == "IS" else [13, 6])
    assert not torch.allclose(got, plain, atol=1e-4)


def test_pruning_before_the_mlp_keeps_the_same_and_saves_more() -> None:
    model, x = tiny(), images()
    methods = [tokred.ZeroTPrune(schedule=SCHEDULE, hook=hook) for hook in ("block", "attn")]
    (after, trace), (before, own) = (run(model, method, x) for method in methods)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)  # the MLP sees one token at a time
    assert torch.equal(trace[-1].origins, own[-1].origins)
    costs = [tokred.flops(model, None, method).total for method in methods]
    assert costs[1] < costs[0]


def test_a_boosted_position_must_be_a_prefix_token() -> None:
    with pytest.raises(ValueError, match=r"boosted=\(0, 2\).*2.*1 prefix"):
        tokred.patch(tiny(), tokred.ZeroTPrune(boosted=(0, 2)))


def test_the_temperature_is_that_of_the_scores_alone() -> None:
    model, x = tiny(), images()
    with recorded(tokred.ZeroTPrune) as log:
        run(model, tokred.ZeroTPrune(schedule={1: (0, 0.5, 1)}, tau_imp=0.5, cls_boost="none", vhf=None), x)
    view = log[1].view
    q, k = view.queries(), view.keys()
    want = (2 * q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    torch.testing.assert_close(view.attention_matrix(0.5), want, atol=1e-6, rtol=1e-5)
    score = want.mean(2)[:, :, 1:].square().mean(1).sqrt()
    assert torch.equal(log[1].change.indices, score.topk(12).indices.sort(dim=1).values)


def test_scores_that_are_not_numbers_rank_last() -> None:
    a, feature = graph(2, 2, 13), torch.randn(2, 13, 4)
    feature[0, 3:7] = float("nan")
    for order in ("SI", "IS"):
        kept = tokred.ZeroTPrune(order=order).reduce(layer_view(a, feature, 1), Stage(2, 0.8, 3))
        assert kept.indices.shape == (2, 8 if order == "SI" else 7)
        broken = a.clone()
        broken[0] = float("nan")
        kept = tokred.ZeroTPrune(order=order).reduce(layer_view(broken, feature, 1), Stage(3, 0.6, 3)).indices
        assert (kept.diff(dim=1) > 0).all()
        assert kept.shape[1] == (5 if order == "SI" else 4)
        want = tokred.ZeroTPrune(order=order).reduce(layer_view(a[1:], feature[1:], 1), Stage(3, 0.6, 3)).indices
        assert torch.equal(kept[1:], want)
    # equal (no) importance: the lower positions are ranked first, and what the S-stage dropped does not come back
    everyone = torch.ones(1, 12, dtype=torch.bool)
    gone = similar_tokens(feature[1:, 1:], -torch.ones(1, 12), everyone, 12, 3).pruned[0].tolist()
    broken[1] = float("nan")
    kept = tokred.ZeroTPrune().reduce(layer_view(broken, feature, 1), Stage(3, 0.6, 3)).indices[1].tolist()
    assert kept == [i for i in range(12) if i not in gone][:5]
    model, x = tiny(), images()
    x[0, 0, 0, 0] = float("nan")
    got, _ = run(model, tokred.ZeroTPrune(schedule=SCHEDULE), x)
    want, _ = run(model, tokred.ZeroTPrune(schedule=SCHEDULE), x[1:])
    torch.testing.assert_close(got[1:], want, atol=1e-5, rtol=1e-5)


def test_it_does_not_share_a_model_with_merging() -> None:
    with pytest.raises(ValueError, match="ToMe"):
        tokred.patch(tiny(), [tokred.ZeroTPrune(schedule={1: (2, 0.9)}), tokred.ToMe(r=[2])])
    assert isinstance(tokred.ZeroTPrune(), Method)
