"""CoreMatching: core neurons, match scores and knee against slow definitions; what each site asks and is answered."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tokred.core.decoder import CacheAfterPrefill, DecoderMethod, FeedForward, LayerNeeds, PrefillLayer
from tokred.core.sites import DecoderInfo
from tokred.vlm import core_neurons as maths
from tokred.vlm.core_neurons import above_knee, core_counts, core_neurons, match_scores, projections, token_limits
from tokred.vlm.corematching import SCORE, CoreMatching

INFO = DecoderInfo(
    depth=20, dim=16, width=16, layer_macs=2000, heads=4, kv_heads=2, head_dim=4, neurons=24, mlp_macs=1200
)
VICUNA = DecoderInfo(32, 4096, 4096, 4 * 4096**2 + 3 * 4096 * 11008, 32, 32, 128, 11008, 3 * 4096 * 11008, 32000)


# -- slow definitions ------------------------------------------------------------------------------------------------


def active(x: list[float]) -> set[int]:
    return {i for i, a in enumerate(x) if a > 0}


def slow_limits(rows: list[list[float]], rho: float, rule: str) -> list[int]:
    sizes = [len(active(x)) for x in rows]
    if rule == "per_token":
        return [max(math.ceil(rho * size), 1) for size in sizes]
    return [max(math.floor(rho * sum(sizes) / len(rows)), 1)] * len(rows)


def slow_counts(rows: list[list[float]], rho: float, rule: str) -> list[int]:
    counts = [0] * len(rows[0])
    for x, limit in zip(rows, slow_limits(rows, rho, rule), strict=True):
        for i in sorted(range(len(x)), key=lambda i: (-x[i], i))[:limit]:
            counts[i] += 1
    return counts


def slow_core(counts: list[int], beta: float) -> set[int]:
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    return {i for i in order[: math.floor(beta * len(counts))] if counts[i] > 0}


def slow_kept(scores: list[int], inclusive: bool, rule: str = "absolute") -> set[int]:
    """By the perpendicular distance to the chord, with a little room for rounding."""
    n, s = len(scores), sorted(scores, reverse=True)
    if n < 3 or s[0] == s[-1]:
        return set(range(n))
    dx, dy = n - 1, s[-1] - s[0]
    signed = [(i * dy - (s[i] - s[0]) * dx) / math.hypot(dx, dy) for i in range(n)]
    distances = [abs(d) if rule == "absolute" else d for d in signed]
    if rule == "below" and max(distances) < 1e-9:
        return set(range(n))
    knee = next(i for i in range(n) if distances[i] > max(distances) - 1e-9)
    return {j for j in range(n) if scores[j] > s[knee] or (inclusive and scores[j] == s[knee])}


def places(mask: Tensor) -> set[int]:
    return set(mask.nonzero()[:, 0].tolist())


# -- views -----------------------------------------------------------------------------------------------------------


def acts(batch: int = 2, tokens: int = 30, neurons: int = 24, seed: int = 0) -> Tensor:
    """(B, T, I), every fourth value 0."""
    x = torch.randn(batch, tokens, neurons, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(torch.arange(x.numel()).view_as(x) % 4 == 1, 0)


def masks(batch: int = 2, tokens: int = 30, start: int = 3, stop: int = 24, padding: int = 0) -> tuple[Tensor, Tensor]:
    """visual, text (B, T): row 0 has `padding` places less, on the left."""
    places = torch.arange(tokens).expand(batch, -1)
    visual = (places >= start + padding) & (places < stop)
    real = torch.ones_like(visual)
    real[0] = places[0] >= padding
    return visual, real & ~visual


def mlp(layer: int = 1, padding: int = 0, info: DecoderInfo = INFO, **given: Any) -> FeedForward:
    x = given.pop("activations", None)
    x = acts(**given) if x is None else x
    return FeedForward(layer, info, x, *masks(x.shape[0], x.shape[1], padding=padding))


class Source:
    def __init__(self, batch: int, tokens: int) -> None:
        draw = torch.Generator().manual_seed(5)
        self.rows = torch.randn(batch, 4, 1, tokens, generator=draw)
        self.value = torch.randn(batch, 2, tokens, 4, generator=draw)

    def attention_rows(self, own: bool, rows: Tensor) -> Tensor:
        assert not own
        assert rows.shape[1] == 1
        self.asked = rows
        return self.rows.softmax(dim=3)

    def values(self, own: bool) -> Tensor:
        assert not own
        return self.value


def layer_view(scores: Tensor | None = None, padding: int = 0, batch: int = 2, tokens: int = 30) -> PrefillLayer:
    visual, text = masks(batch, tokens, padding=padding)
    columns = torch.arange(tokens).expand(batch, -1)
    return PrefillLayer(
        layer=2,
        info=INFO,
        hidden=torch.zeros(batch, tokens, INFO.dim),
        visual=visual,
        text=text,
        columns=columns,
        media=torch.where(visual, (columns >= 12).long(), -1),
        initial=visual.sum(dim=1),
        marks={} if scores is None else {SCORE: scores},
        source=Source(batch, tokens),  # type: ignore[arg-type]
    )


def cache_view(
    marks: dict[int, Tensor], info: DecoderInfo = INFO, batch: int = 2, tokens: int = 30
) -> CacheAfterPrefill:
    visual, text = masks(batch, tokens)
    columns = [torch.arange(tokens).expand(batch, -1)] * info.depth
    written = {layer: {SCORE: values} for layer, values in marks.items()}
    return CacheAfterPrefill(info, columns, [visual | text] * info.depth, [visual] * info.depth, written)


# -- core neurons ----------------------------------------------------------------------------------------------------

#: few values, so that there are ties, zeros of both signs, and tokens without a positive one
values = st.sampled_from([-1.5, -1.0, -0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.5, 2.0])
matrices = st.tuples(st.integers(1, 9), st.integers(1, 14)).flatmap(
    lambda size: st.lists(st.lists(values, min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0])
)
parts = st.sampled_from([0.2, 0.4, 0.05, 0.55, 1.0]) | st.floats(0.01, 1)


@given(matrices, parts, parts, st.sampled_from(["shared_limit", "per_token"]), st.sampled_from(["float32", "bfloat16"]))
def test_core_neurons_are_those_of_the_slow_definition(
    rows: list[list[float]], rho: float, beta: float, rule: Any, dtype: str
) -> None:
    x = torch.tensor(rows, dtype=getattr(torch, dtype))[None]
    valid = torch.ones(1, len(rows), dtype=torch.bool)
    limits = slow_limits(rows, rho, rule)
    assert token_limits((x > 0).sum(dim=2), valid, rho, rule)[0].tolist() == limits
    counts = core_counts(x, valid, rho, rule)
    assert counts.dtype == torch.int32
    assert counts[0].tolist() == slow_counts(rows, rho, rule)
    assert counts.sum() == sum(limits)  # each token counts as many neurons as its limit says
    core = core_neurons(counts, beta)
    want = slow_core(counts[0].tolist(), beta)
    assert places(core[0]) == want
    assert len(want) == min(int(beta * len(rows[0])), int((counts > 0).sum()))
    if want and len(want) < len(rows[0]):
        assert counts[core].min() >= counts[~core].max()
    scores = match_scores(x, valid, core)
    assert scores.dtype == torch.int32
    assert scores[0].tolist() == [len(active(row) & want) for row in rows]


@given(st.integers(1, 400))
def test_a_piece_at_a_time_gives_the_same(piece: int) -> None:
    x, valid = acts(), masks(padding=4)[0] | masks(padding=4)[1]
    want = core_counts(x, valid, 0.3)
    core = core_neurons(want, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maths, "_PIECE", piece)
        assert torch.equal(core_counts(x, valid, 0.3), want)
        assert torch.equal(match_scores(x, valid, core), match_scores(x.double(), valid, core))


@pytest.mark.parametrize("rule", ["shared_limit", "per_token"])
@pytest.mark.parametrize("criterion", ["core_neurons", "ref_token"])
def test_padding_changes_nothing(rule: Any, criterion: Any) -> None:
    method = CoreMatching(count=rule, criterion=criterion)
    view = mlp(padding=6)
    view.activations[0, :6] = math.inf
    batch = method.neurons(view)
    assert batch is not None
    assert (batch.marks[SCORE][0, :6] == 0).all()
    for row, start in ((0, 6), (1, 0)):
        single = FeedForward(
            1, INFO, *(tensor[row : row + 1, start:] for tensor in (view.activations, view.visual, view.text))
        )
        alone = method.neurons(single)
        assert torch.equal(alone.active[0], batch.active[row])
        assert torch.equal(alone.marks[SCORE][0], batch.marks[SCORE][row, start:])


def test_a_row_of_padding_has_no_core_neurons() -> None:
    valid = torch.tensor([[False] * 5, [True] * 5])
    counts = core_counts(acts(2, 5), valid, 0.2)
    assert not counts[0].any()
    assert counts[1].any()
    empty = core_counts(torch.zeros(1, 0, 8), torch.ones(1, 0, dtype=torch.bool), 0.2)
    assert empty.tolist() == [[0] * 8]


# -- the knee --------------------------------------------------------------------------------------------------------

curves = st.lists(st.integers(0, 12), max_size=40) | st.lists(st.integers(0, 4000), max_size=60)
bulging = st.lists(st.integers(0, 60), min_size=3, max_size=60).map(lambda xs: [int(100 * math.sqrt(x)) for x in xs])


@given(curves | bulging, st.sampled_from(["absolute", "below"]))
def test_the_knee_is_the_point_farthest_from_the_chord(scores: list[int], rule: Any) -> None:
    got = {
        inclusive: above_knee(torch.tensor(scores, dtype=torch.int32), inclusive, rule) for inclusive in (True, False)
    }
    for inclusive, kept in got.items():
        assert places(kept) == slow_kept(scores, inclusive, rule)
    assert not (got[False] & ~got[True]).any()
    assert not scores or got[True].any()


@given(curves.filter(len), st.integers(-50, 50), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_knee_knows_no_origin_no_scale_and_no_order(scores: list[int], shift: int, scale: int, random: Any) -> None:
    x = torch.tensor(scores)
    kept = above_knee(x)
    assert torch.equal(above_knee(scale * x + shift), kept)
    assert torch.equal(above_knee(x.double()), kept)
    order = torch.tensor(random.sample(range(len(scores)), len(scores)))
    assert torch.equal(above_knee(x[order]), kept[order])


def test_curves_above_the_chord_keep_nearly_everything_unless_only_points_below_count() -> None:
    bulge = torch.tensor([100, 99, 98, 97, 95, 90, 80, 0])
    assert above_knee(bulge).tolist() == [True] * 7 + [False]
    assert above_knee(bulge, rule="below").all()
    line = torch.arange(9)
    assert places(above_knee(line)) == {8}  # no point is farther away than the first
    assert above_knee(line, rule="below").all()


# -- the FeedForward site --------------------------------------------------------------------------------------------


def test_what_each_layer_answers() -> None:
    method = CoreMatching(neuron_layers=(3, 4), prune_layer=1)
    assert method.sparse_layers(INFO) == {1, 3, 4}
    scored, reduced = method.neurons(mlp(1)), method.neurons(mlp(3))
    assert scored.active is None
    assert set(scored.marks) == {SCORE}
    assert reduced.active.shape == (2, 24)
    assert not reduced.marks
    assert method.neurons(mlp(5)) is None
    both = CoreMatching(prune_layer=7).neurons(mlp(7))
    assert torch.equal(both.active, reduced.active)
    assert torch.equal(both.marks[SCORE], scored.marks[SCORE])


def test_beta_1_leaves_every_mlp_whole() -> None:
    method = CoreMatching(beta=1)
    assert method.sparse_layers(INFO) == {1}
    assert method.neurons(mlp(1)).active is None
    assert CoreMatching(beta=1, criterion="attention").sparse_layers(INFO) == frozenset()


def test_scores_come_from_a_samples_own_neurons_even_where_decoding_shares_them() -> None:
    view = mlp()
    own, shared = (CoreMatching(batch_neurons=how).neurons(view) for how in ("per_sample", "shared"))
    assert torch.equal(own.marks[SCORE], shared.marks[SCORE])
    assert torch.equal(shared.active[0], shared.active[1])
    assert not torch.equal(own.active[0], own.active[1])
    counts = core_counts(view.activations, view.valid, 0.2)
    assert places(shared.active[0]) == slow_core(counts.sum(dim=0).tolist(), 0.4)
    one = CoreMatching(batch_neurons="shared").neurons(mlp(batch=1))
    assert torch.equal(one.active, CoreMatching().neurons(mlp(batch=1)).active)


@pytest.mark.parametrize(("position", "place"), [(-5, 25), (-1, 29), (0, 4), (7, 11), ("last_text", 29)])
def test_the_reference_token_is_a_place_in_the_prompt(position: Any, place: int) -> None:
    method = CoreMatching(criterion="ref_token", ref_position=position)
    view = mlp(padding=4)
    scores = method.neurons(view).marks[SCORE]
    reference = active(view.activations[0, place].tolist())
    for token in range(4, 30):
        assert scores[0, token] == len(reference & active(view.activations[0, token].tolist()))


def test_a_reference_that_no_prompt_has_is_an_error_only_where_tokens_could_go() -> None:
    method = CoreMatching(criterion="ref_token", ref_position=28)
    method.neurons(mlp())
    with pytest.raises(ValueError, match=r"ref_position=28 names no token of prompt 0, which has 26"):
        method.neurons(mlp(padding=4))
    x = acts(tokens=3)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert CoreMatching(criterion="ref_token").neurons(FeedForward(1, INFO, x, nothing, ~nothing)) is not None


# -- the PrefillLayer site -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("padding", [0, 5])
def test_visual_tokens_below_the_knee_go(inclusive: bool, padding: int) -> None:
    scores = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(3)).int()
    view = layer_view(scores, padding)
    answer = CoreMatching(inclusive=inclusive).prune(view)
    assert answer.cut_earlier_cache
    assert not CoreMatching(prune_early_cache=False).prune(view).cut_earlier_cache
    for row in range(2):
        visual = sorted(places(view.visual[row]))
        kept = {visual[i] for i in slow_kept(scores[row, visual].tolist(), inclusive)}
        assert places(answer.keep[row] & view.valid[row]) == kept | places(view.text[row])


def test_each_image_can_have_a_knee_of_its_own() -> None:
    scores = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(4)).int()
    view = layer_view(scores)
    answer = CoreMatching(per_image=True).prune(view)
    for row in range(2):
        kept = set()
        for image in (0, 1):
            of_image = sorted(places(view.media[row] == image))
            kept |= {of_image[i] for i in slow_kept(scores[row, of_image].tolist(), True)}
        assert places(answer.keep[row] & view.visual[row]) == kept


@pytest.mark.parametrize(("keep", "count"), [(4, 4), (0.5, 10), (1, 1), (0.01, 1), (50, 21)])
def test_a_count_stands_in_for_the_knee(keep: float, count: int) -> None:
    scores = torch.randint(0, 6, (2, 30), generator=torch.Generator().manual_seed(4)).int()
    view = layer_view(scores)
    answer = CoreMatching(keep_tokens=keep).prune(view)
    if count == 21:
        assert answer is None
        return
    for row in range(2):
        visual = sorted(places(view.visual[row]), key=lambda i: (-scores[row, i].item(), i))
        assert places(answer.keep[row] & view.visual[row]) == set(visual[:count])


def test_nothing_to_prune_answers_none() -> None:
    assert CoreMatching().prune(layer_view(torch.full((2, 30), 7))) is None  # one token many times over
    view = layer_view(torch.arange(60).view(2, 30))
    view.visual, view.text = torch.zeros_like(view.visual), view.valid
    assert CoreMatching().prune(view) is None
    assert CoreMatching(keep_tokens=3).prune(view) is None


@pytest.mark.parametrize("criterion", ["attention", "projection"])
def test_criteria_of_attention(criterion: Any) -> None:
    method = CoreMatching(criterion=criterion, keep_tokens=6)
    assert method.layers(INFO) == {2: LayerNeeds(previous=True)}
    view = layer_view()
    answer = method.prune(view)
    assert view.source.asked.tolist() == [[29], [29]]  # type: ignore[attr-defined]
    alpha, value = view.source.rows.softmax(dim=3)[:, :, 0], view.source.value  # type: ignore[attr-defined]
    for row in range(2):
        parts = [torch.cat([alpha[row, h, i] * value[row, h // 2, i] for h in range(4)]) for i in range(30)]
        output = torch.stack(parts).sum(dim=0)
        scores = [(part @ output / output.norm()).item() for part in parts]
        if criterion == "attention":
            scores = alpha[row].mean(dim=0).tolist()
        else:
            assert torch.allclose(projections(alpha, value)[row], torch.tensor(scores), atol=1e-6)
            assert sum(scores) == pytest.approx(output.norm().item(), rel=1e-5)
        best = sorted(places(view.visual[row]), key=lambda i: -scores[i])[:6]
        assert places(answer.keep[row] & view.visual[row]) == set(best)


def test_no_output_has_no_direction() -> None:
    assert not projections(torch.zeros(1, 2, 5), torch.randn(1, 1, 5, 4)).any()


# -- the released preset ---------------------------------------------------------------------------------------------


def test_the_release_zeroes_entries_layer_by_layer() -> None:
    method = CoreMatching(preset="released")
    assert method.acts_at(()) == ("FeedForward", "CacheAfterPrefill")
    assert method.sparse_layers(INFO) == frozenset(range(5, 19))
    assert not method.layers(INFO)
    assert method.cuts_cache(INFO)
    answers = {layer: method.neurons(mlp(layer, seed=layer)) for layer in range(20)}
    assert all((answer is None) == (layer not in range(5, 19)) for layer, answer in answers.items())
    assert all(answer is None or answer.active is None for answer in answers.values())

    marks = {layer: answers[layer].marks[SCORE] for layer in range(5, 19)}
    view = cache_view({**marks, 19: marks[18]})  # marks travel on to layers that write none
    cut = method.cut_cache(view)
    assert not cut.keep
    assert sorted(cut.zero) == list(range(5, 19))
    for layer in range(5, 19):
        x = acts(seed=layer)
        for row in range(2):
            visual = sorted(places(view.visual[layer][row]))
            reference = active(x[row, -5].tolist())
            scores = [len(reference & active(x[row, i].tolist())) for i in visual]
            kept = {visual[i] for i in slow_kept(scores, inclusive=False)}
            assert places(cut.zero[layer][row]) == set(visual) - kept


def test_the_release_takes_other_layers_and_shallow_models() -> None:
    assert CoreMatching(preset="released", zero_layers=[2, 4]).sparse_layers(INFO) == {2, 4}
    shallow = dataclasses.replace(INFO, depth=8)
    assert CoreMatching(preset="released").sparse_layers(shallow) == {5, 6, 7}
    for method, depth in ((CoreMatching(preset="released"), 5), (CoreMatching(preset="released", zero_layers=[9]), 8)):
        with pytest.raises(ValueError, match="zero_layers"):
            method.sparse_layers(dataclasses.replace(INFO, depth=depth))
    assert CoreMatching(preset="released").cut_cache(cache_view({6: torch.ones(2, 30)})) is None


# -- layers and cost -------------------------------------------------------------------------------------------------


def test_layers() -> None:
    assert CoreMatching().layers(INFO) == {2: LayerNeeds()}
    assert CoreMatching().acts_at(()) == ("FeedForward", "PrefillLayer")
    assert CoreMatching(beta=1, criterion="attention").acts_at(()) == ("PrefillLayer",)
    assert CoreMatching().sparse_layers(INFO) == frozenset(range(20))
    assert CoreMatching(neuron_layers="coreinfer").sparse_layers(VICUNA) == {1, *range(6, 27)}
    assert CoreMatching(prune_layer=18).layers(INFO) == {19: LayerNeeds()}
    with pytest.raises(ValueError, match=r"prune_layer=19 .* at most 18 in a model of 20"):
        CoreMatching(prune_layer=19).layers(INFO)
    with pytest.raises(ValueError, match="neuron_layers names block 20"):
        CoreMatching(neuron_layers=(3, 20)).sparse_layers(INFO)
    with pytest.raises(ValueError, match="name the layers in neuron_layers="):
        CoreMatching(neuron_layers="coreinfer").sparse_layers(dataclasses.replace(INFO, depth=11))


def test_counts_and_cost() -> None:
    method = CoreMatching()
    with pytest.raises(ValueError, match=r"give kept= .*64 of 576"):
        method.entering(VICUNA, 576)
    assert method.entering(VICUNA, 576, 64) == (576,) * 2 + (64,) * 30
    assert method.entering(VICUNA, 0) == (0,) * 32
    assert CoreMatching(keep_tokens=0.25, prune_layer=0).entering(VICUNA, 576) == (576,) + (144,) * 31
    with pytest.raises(ValueError, match="kept=577: expected 0 to 576"):
        method.entering(VICUNA, 576, 577)
    entering = method.entering(VICUNA, 576, 64)
    assert method.scoring_macs(VICUNA, entering, 64) == 576 * int(0.4 * 11008)
    assert CoreMatching(criterion="ref_token").scoring_macs(VICUNA, entering, 64) == 576 * 11008
    assert CoreMatching(criterion="attention").scoring_macs(VICUNA, entering, 64) == 640 * 4096
    assert CoreMatching(criterion="projection").scoring_macs(VICUNA, entering, 64) == 3 * 640 * 4096
    released = CoreMatching(preset="released")
    assert released.entering(VICUNA, 576) == (576,) * 32
    assert released.scoring_macs(VICUNA, (576,) * 32, 64) == 14 * 576 * 11008
    assert released.decode_macs(VICUNA) == 32 * VICUNA.layer_macs
    assert 2 * method.decode_macs(VICUNA) / 32e6 == pytest.approx(242, abs=1)
    assert released.decode_macs(VICUNA) / method.decode_macs(VICUNA) == pytest.approx(1.67, abs=0.005)
    assert CoreMatching(beta=1).decode_macs(VICUNA) == 32 * VICUNA.layer_macs


# -- parameters ------------------------------------------------------------------------------------------------------

EXAMPLES = [
    CoreMatching(),
    CoreMatching(preset="released", ref_position=-3, keep_tokens=0.5, zero_layers=(2, 3)),
    CoreMatching(rho=0.4, beta=1, neuron_layers=(1, 2), count="per_token", criterion="ref_token", positions="compact"),
    CoreMatching(inclusive=False, knee="below", per_image=True, prune_early_cache=False, batch_neurons="shared"),
    CoreMatching(criterion="ref_token", ref_position="last_text", keep_tokens=64, neuron_layers="coreinfer"),
]


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_json(method: CoreMatching) -> None:
    assert tokred.from_dict(json.loads(json.dumps(method.to_dict()))) == method


WRONG = [
    ({"rho": 0}, "rho=0: expected a number in (0, 1]"),
    ({"rho": True}, "rho=True"),
    ({"beta": 1.2}, "beta=1.2: expected a number in (0, 1]"),
    ({"beta": float("nan")}, "beta=nan"),
    ({"prune_layer": -1}, "prune_layer=-1: expected an integer >= 0"),
    ({"preset": "official"}, "preset='official': expected one of 'paper', 'released'"),
    ({"neuron_layers": "some"}, "neuron_layers='some': expected one of 'all', 'coreinfer'"),
    ({"neuron_layers": (3, 2)}, "neuron_layers=(3, 2)"),
    ({"neuron_layers": ()}, "neuron_layers=()"),
    ({"count": "mean"}, "count='mean'"),
    ({"criterion": "norm"}, "criterion='norm'"),
    ({"criterion": "ref_token", "ref_position": 1.5}, "ref_position=1.5: expected an integer or 'last_text'"),
    ({"criterion": "ref_token", "ref_position": True}, "ref_position=True"),
    ({"inclusive": "yes"}, "inclusive='yes'"),
    ({"knee": "above"}, "knee='above'"),
    ({"keep_tokens": 0}, "keep_tokens=0"),
    ({"keep_tokens": 1.5}, "keep_tokens=1.5"),
    ({"per_image": None}, "per_image=None"),
    ({"prune_early_cache": "no"}, "prune_early_cache='no'"),
    ({"batch_neurons": "union"}, "batch_neurons='union'"),
    ({"positions": "3d"}, "positions='3d'"),
    ({"zero_layers": (3,)}, "zero_layers=(3,): preset='paper' makes no use of it"),
    ({"preset": "released", "zero_layers": ()}, "zero_layers=()"),
    ({"preset": "released", "beta": 0.3}, "beta=0.3: preset='released' makes no use of it"),
    ({"preset": "released", "prune_layer": 3}, "prune_layer=3: preset='released' makes no use of it"),
    ({"preset": "released", "criterion": "core_neurons"}, "criterion='core_neurons': preset='released'"),
    ({"ref_position": -3}, "ref_position=-3: only criterion='ref_token' reads it"),
    ({"keep_tokens": 3, "inclusive": True}, "keep_tokens stands in for the knee"),
    ({"keep_tokens": 3, "knee": "below"}, "keep_tokens stands in for the knee"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_errors_name_field_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        CoreMatching(**options)
    assert message in str(error.value)


def test_as_a_decoder_method() -> None:
    assert isinstance(CoreMatching(), DecoderMethod)
    assert CoreMatching.own_positions == "original"
    assert CoreMatching().decode_position == "logical"
    assert CoreMatching(positions="compact").decode_position == "cache_length"
    known = {"use_cache=False", "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "past_key_values"}
    assert set(CoreMatching.refuses) == known | {"training", "labels"}
