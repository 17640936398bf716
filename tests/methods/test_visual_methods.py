"""VisionZip, DivPrune, CDPruner, VisPruner, EVS and RandomTokens before a language model: against slow definitions."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tests.methods.visual import NO_CLASS, TOWER, item_of, mosaic, single, video, view_of
from tokred.core.errors import LayoutError
from tokred.core.sites import MediaLayout, VisualFeatures
from tokred.core.tokens import Keep
from tokred.vlm.cdpruner import greedy_map, scaled_relevance
from tokred.vlm.divprune import max_min_diverse
from tokred.vlm.select import partition_budgets
from tokred.vlm.visionzip import contextual_assignment, merge_contextual
from tokred.vlm.vispruner import remove_duplicates, vispruner_mask

KEEPING = {
    "divprune": tokred.DivPrune,
    "cdpruner": tokred.CDPruner,
    "vispruner": tokred.VisPruner,
    "evs": tokred.EVS,
    "random_tokens": tokred.RandomTokens,
}
EVERY = {**KEEPING, "visionzip": tokred.VisionZip, "hired": tokred.HiRED}
LAYOUTS = {
    "one tile": single(5, 7),
    "tiles": mosaic((2, 2), cut_rows=2),
    "wide": mosaic((1, 3), grid=(3, 5)),
    "video": video(),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
NO_PROJECTION = dataclasses.replace(NO_CLASS, projects=False)


def unit(x: Tensor) -> list[list[float]]:
    x = x.double()
    return (x / x.norm(dim=-1, keepdim=True)).tolist()


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def tokens_of(layout: MediaLayout, p: int) -> list[int]:
    n = layout.cells_per_partition
    return [place for cell, place in sorted((c, i) for i, c in enumerate(layout.cells)) if cell // n == p]


# -- properties of all -----------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("budget", [0.3, 0.6, 7])
def test_what_is_kept(name: str, layout: MediaLayout, budget: float) -> None:
    method, view = KEEPING[name](budget=budget), view_of(layout, items=3)
    answer = method.select(view)
    if name == "evs" and layout.kind == "image":
        assert answer is None
        assert method.bypasses(layout)
        return
    assert isinstance(answer, Keep)
    assert answer.indices.shape == (3, method.kept(layout))
    assert answer.valid is None
    assert (answer.indices.diff(dim=1) > 0).all()
    if isinstance(budget, int) and name != "evs":
        assert method.kept(layout) == budget
    for item in range(3):
        alone = method.select(item_of(view, item))
        assert torch.equal(alone.indices, answer.indices[item : item + 1])


@each_layout
@pytest.mark.parametrize("name", EVERY)
def test_keeping_everything_bypasses(name: str, layout: MediaLayout) -> None:
    total = layout.total_cells if name == "hired" else len(layout.cells)
    assert EVERY[name](budget=1.0).bypasses(layout)
    assert EVERY[name](budget=total).bypasses(layout)
    assert EVERY[name](budget=3).bypasses(layout) == (name == "evs" and layout.kind == "image")
    if name in KEEPING and not (name == "evs" and layout.kind == "image"):
        all_of_them = KEEPING[name](budget=1.0).select(view_of(layout)).indices
        assert torch.equal(all_of_them, torch.arange(total).expand(2, -1))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "random_tokens"])
def test_a_count_above_the_tokens_is_an_error(name: str) -> None:
    layout = video()
    with pytest.raises(ValueError, match=r"budget=37 tokens, .* has 36"):
        EVERY[name](budget=37).kept(layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    view = view_of(video(4, 5, 5), dtype=dtype)
    method = EVERY[name](budget=0.4)
    answer = method.select(view)
    if isinstance(answer, Keep):
        assert answer.indices.shape[1] <= method.kept(view.layout)
    else:
        assert all(one.features.dtype == dtype for one in answer)
        assert all(len(one.features) == len(one.sources) == method.kept(view.layout) for one in answer)


@pytest.mark.parametrize("name", [*KEEPING, "visionzip"])
def test_scaling_features_changes_nothing(name: str) -> None:
    def larger(source: Any) -> None:
        source.key = {layer: 4 * keys for layer, keys in source.key.items()}
        source.tokens = 4 * source.tokens

    view, other = view_of(video(), NO_PROJECTION), view_of(video(), NO_PROJECTION, change=larger)
    other.features = 4 * view.features
    a, b = (EVERY[name](budget=0.5).select(v) for v in (view, other))
    if isinstance(a, Keep):
        assert torch.equal(a.indices, b.indices)
    else:
        for one, four in zip(a, b, strict=True):
            assert torch.equal(one.sources, four.sources)
            torch.testing.assert_close(4 * one.features, four.features)


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_reordered_tokens_give_the_same_set(name: str) -> None:
    view = view_of(single(6, 6), items=1)
    order = torch.randperm(36)
    other = dataclasses.replace(view, features=view.features[:, order])
    options = {"relevance": "question"} if name == "cdpruner" else {}  # without, all first gains are equal
    a, b = (KEEPING[name](budget=6, **options).select(v).indices[0] for v in (view, other))
    assert a.tolist() == order[b].sort().values.tolist()


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "hired"])
def test_methods_of_tower_cells_refuse_resampled_layouts(name: str) -> None:
    layout = dataclasses.replace(mosaic((2, 2)), uniform=False)
    for call in (EVERY[name](budget=0.3).kept, lambda one: EVERY[name](budget=0.3).select(view_of(one))):
        with pytest.raises(LayoutError, match="resampled over the tiles"):
            call(layout)
    assert tokred.DivPrune(0.3).select(view_of(layout)) is not None


@pytest.mark.parametrize("name", ["visionzip", "vispruner"])
def test_what_they_ask_of_the_tower(name: str) -> None:
    needs = EVERY[name]().needs(TOWER)
    assert (needs.rows, needs.mass, needs.hidden) == ({4}, frozenset(), True)
    needs = EVERY[name]().needs(NO_PROJECTION)
    assert (needs.rows, needs.mass, needs.hidden) == (frozenset(), {4}, False)
    for other in ("divprune", "cdpruner", "evs", "random_tokens"):
        assert EVERY[other]().needs(TOWER) == tokred.core.sites.Needs()


# -- budgets of partitions -------------------------------------------------------------------------------------------


@given(st.integers(0, 1), st.integers(1, 68) | st.floats(0.01, 1.0))
def test_budgets_of_partitions(cut: int, budget: float) -> None:
    layout = mosaic((2, 2), cut_rows=2 * cut)
    sizes = [len(tokens_of(layout, p)) for p in range(5)]
    if isinstance(budget, int):
        budget = min(budget, sum(sizes))
    budgets = partition_budgets("it", budget, layout)
    assert all(0 <= b <= size for b, size in zip(budgets, sizes, strict=True))
    if isinstance(budget, int):
        assert sum(budgets) == budget
    else:
        assert budgets == [max(1, math.floor(budget * size + 1e-6)) for size in sizes]


# -- VisionZip -------------------------------------------------------------------------------------------------------


def slow_visionzip(
    view: VisualFeatures, item: int, split: list[tuple[int, int]], normalise: bool
) -> tuple[list[int], list[Tensor]]:
    sources, features = [], []
    tower, layout = view.tower, view.layout
    received = (view.class_attention(4) if tower.has_class else view.attention_mass(4))[item].sum(dim=1)
    keys = view.keys(4)[item].mean(dim=1)
    for p, (dominant, contextual) in enumerate(split):
        tokens = tokens_of(layout, p)
        cell = {t: layout.cells[t] % layout.cells_per_partition for t in tokens}
        with_class = tower.has_class and tower.projects and dominant > 0
        if with_class:
            sources.append(-1)
            features.append(view.project(view.class_hidden()[item, p]))
        scores = {t: received[p, cell[t]].item() for t in tokens}
        best = sorted(sorted(tokens, key=lambda t: -scores[t])[: dominant - with_class])
        sources += best
        features += [view.features[item, t] for t in best]
        rest = [t for t in tokens if t not in best]
        if not contextual:
            continue
        targets = rest[:: len(rest) // contextual][:contextual]
        owner = {}
        for t in rest:
            similarity = [dot(unit(keys[p, cell[t]]), unit(keys[p, cell[u]])) for u in targets]
            owner[t] = t if t in targets else targets[similarity.index(max(similarity))]
        for target in targets:
            space = {t: view.hidden()[item, p, cell[t]] if tower.projects else view.features[item, t] for t in rest}
            others = [space[t] for t in rest if owner[t] == target and t != target]
            merged = space[target]
            if others:
                total = torch.stack(others).sum(dim=0)
                merged = (merged + total) / (1 + len(others)) if normalise else merged + total / len(others)
            sources.append(target)
            features.append(view.project(merged) if tower.projects else merged)
    return sources, features


@each_layout
@pytest.mark.parametrize("tower", [TOWER, NO_CLASS, NO_PROJECTION], ids=["class", "no class", "no projection"])
@pytest.mark.parametrize("options", [{}, {"normalise": True, "contextual": 0.5}, {"budget": 20, "contextual": 7}])
def test_visionzip(layout: MediaLayout, tower: Any, options: dict[str, Any]) -> None:
    method, view = tokred.VisionZip(**{"budget": 0.6, **options}), view_of(layout, tower)
    split = method.split(layout)
    assert sum(map(sum, split)) == method.kept(layout)
    for item, answer in enumerate(method.select(view)):
        sources, features = slow_visionzip(view, item, split, method.normalise)
        assert answer.sources.tolist() == sources
        assert len(sources) == method.kept(layout)
        torch.testing.assert_close(answer.features, torch.stack(features), atol=1e-5, rtol=1e-5)
        alone = method.select(item_of(view, item))[0]
        assert torch.equal(alone.sources, answer.sources)
        torch.testing.assert_close(alone.features, answer.features)


@pytest.mark.parametrize(("budget", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (1 / 9, (54, 10))])
def test_visionzip_splits_as_the_paper(budget: float, split: tuple[int, int]) -> None:
    assert tokred.VisionZip(budget).split(single(24, 24)) == [split]


@pytest.mark.parametrize(("budget", "split"), [(640, (108, 20)), (320, (54, 10)), (160, (27, 5))])
def test_visionzip_splits_each_tile_of_llava_next(budget: int, split: tuple[int, int]) -> None:
    assert tokred.VisionZip(budget).split(mosaic((2, 2), grid=(24, 24))) == [split] * 5


def test_visionzip_merges_by_hand() -> None:
    x = torch.tensor([[[1.0], [10.0], [2.0], [4.0], [7.0]]])
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 2.0], [9.0, 0.0]]])
    targets, assignment = contextual_assignment(keys, 2)
    assert targets.tolist() == [0, 2]
    assert assignment.tolist() == [[0, 0, 1, 1, 0]]
    assert merge_contextual(x, targets, assignment).tolist() == [[[1 + 8.5], [6.0]]]
    assert merge_contextual(x, targets, assignment, normalise=True).tolist() == [[[6.0], [3.0]]]
    # a target that no token chose stays; equal targets: the lower one, but each keeps itself
    targets, assignment = contextual_assignment(torch.ones(1, 5, 2), 2)
    assert assignment.tolist() == [[0, 0, 1, 0, 0]]
    assert merge_contextual(x, targets, assignment)[0, 1].tolist() == [2.0]


# -- DivPrune --------------------------------------------------------------------------------------------------------


def slow_divprune(x: Tensor, count: int) -> list[int]:
    rows = unit(x)
    n = len(rows)
    distance = [[1 - dot(a, b) for b in rows] for a in rows]
    nearest = [min(distance[i][j] for j in range(n) if j != i) for i in range(n)]
    chosen = {nearest.index(max(nearest))}
    while len(chosen) < count:
        gap = {j: min(distance[s][j] for s in chosen) for j in range(n) if j not in chosen}
        chosen.add(min(gap, key=lambda j: (-gap[j], j)))
    return sorted(chosen)


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_divprune(n: int, count: int, seed: int) -> None:
    x = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))
    got = max_min_diverse(x, min(count, n)).tolist()
    assert got == [slow_divprune(one, min(count, n)) for one in x]


def test_divprune_in_blocks_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 50, 4)
    whole = max_min_diverse(x, 9)
    monkeypatch.setattr("tokred.vlm.divprune._BLOCK", 16)
    assert torch.equal(max_min_diverse(x, 9), whole)


def with_duplicates(distinct: int = 5, times: int = 4) -> Tensor:
    return torch.eye(8)[:distinct].repeat(times, 1)[None]


@pytest.mark.parametrize("count", [1, 3, 5, 8, 20])
def test_no_duplicate_while_distinct_tokens_remain(count: int) -> None:
    x = with_duplicates()
    for got in (max_min_diverse(x, count), greedy_map(x, torch.ones(1, 20), count)):
        # one of each, then the lowest
        assert len({j % 5 for j in got[0].tolist()}) == min(count, 5)
        assert got[0].tolist() == list(range(count))


def test_divprune_rounds_as_released() -> None:
    assert tokred.DivPrune().kept(single(24, 24)) == 56
    assert tokred.DivPrune(0.1).kept(single(4, 4)) == 2
    assert tokred.DivPrune(0.01).kept(single(4, 4)) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_very_few_tokens(n: int) -> None:
    x = torch.randn(2, n, 4)
    for count in range(1, n + 1):
        assert max_min_diverse(x, count).shape == greedy_map(x, torch.ones(2, n), count).shape == (2, count)


def test_zeros_and_what_is_no_number() -> None:
    x = torch.randn(2, 9, 4)
    x[0, 3], x[0, 4, 1] = 0.0, math.nan
    choices = (lambda x: max_min_diverse(x, 5), lambda x: greedy_map(x, torch.ones(x.shape[:2]), 5))
    for choose in choices:
        got = choose(x)
        assert (got.diff(dim=1) > 0).all()
        assert torch.equal(got[1:], choose(x[1:]))


# -- CDPruner --------------------------------------------------------------------------------------------------------


def slow_map(x: Tensor, relevance: Tensor, count: int) -> list[int]:
    """Greedy by determinants."""
    weighted = torch.tensor(unit(x), dtype=torch.float64) * relevance.double()[:, None]
    kernel = weighted @ weighted.T
    chosen: list[int] = []
    for _ in range(count):
        sets = {j: [*chosen, j] for j in range(len(x)) if j not in chosen}
        value = {j: torch.det(kernel[rows][:, rows]).item() for j, rows in sets.items()}
        chosen.append(min(value, key=lambda j: (-round(value[j], 12), j)))
    return sorted(chosen)


@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 10**6), st.none() | st.floats(0, 0.9))
def test_cdpruner_adds_what_raises_the_determinant_most(n: int, count: int, seed: int, theta: float | None) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, raw = torch.randn(2, n, 16, generator=rng), torch.rand(2, n, generator=rng)
    relevance = scaled_relevance(raw, theta)
    count = min(count, n - 1)  # the last has no relevance at all
    got = greedy_map(x, relevance, count).tolist()
    assert got == [slow_map(x[g], relevance[g], count) for g in range(2)]


def test_relevance_is_scaled_image_by_image() -> None:
    raw = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 20.0], [5.0, 5.0, 5.0]])
    got = scaled_relevance(raw)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert (got > 0).all()
    torch.testing.assert_close(scaled_relevance(raw, 0.5), torch.exp(got / 2))
    assert torch.equal(scaled_relevance(raw, 0.0), torch.ones(3, 3))


def test_cdpruner_asks_for_the_question_or_a_function() -> None:
    view = view_of(single())
    questions = torch.stack([view.question_features(item).mean(dim=0) for item in range(2)])
    raw = torch.cosine_similarity(view.features, questions[:, None], dim=2)
    by_question = tokred.CDPruner(5, relevance="question").select(view).indices
    assert torch.equal(by_question, greedy_map(view.features, scaled_relevance(raw), 5))
    by_function = tokred.CDPruner(5, relevance=lambda v: -raw).select(view).indices
    assert torch.equal(by_function, greedy_map(view.features, scaled_relevance(-raw), 5))
    plain = tokred.CDPruner(5).select(view).indices
    assert torch.equal(plain, greedy_map(view.features, torch.ones(2, 16), 5))
    assert len({tuple(one.flatten().tolist()) for one in (by_question, by_function, plain)}) == 3


# -- VisPruner -------------------------------------------------------------------------------------------------------


def slow_vispruner(scores: list[float], x: Tensor, count: int, important: int, step: int) -> list[int]:
    rows = unit(x)
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    kept, left = order[:important], order[important:]
    target = count - important
    while len(left) > target and target:
        even, odd = left[::2], left[1::2]
        closest = {j: max(dot(rows[j], rows[i]) for i in odd) for j in even}
        drop = min(step, len(left) - target, len(even))
        left = sorted(even, key=lambda j: -closest[j])[drop:] + odd
    return sorted(kept + (left if target else []))


@given(st.integers(1, 33), st.integers(0, 33), st.integers(0, 33), st.integers(1, 9), st.integers(0, 10**6))
def test_vispruner(n: int, count: int, important: int, step: int, seed: int) -> None:
    count = min(count, n)
    important = min(important, count)
    rng = torch.Generator().manual_seed(seed)
    scores, x = torch.rand(2, n, generator=rng), torch.randn(2, n, 6, generator=rng)
    mask = vispruner_mask(scores, x, count, important, step)
    for g in range(2):
        assert mask[g].nonzero()[:, 0].tolist() == slow_vispruner(scores[g].tolist(), x[g], count, important, step)


@each_layout
@pytest.mark.parametrize("tower", [TOWER, NO_PROJECTION], ids=["class", "no projection"])
def test_vispruner_works_tile_by_tile(layout: MediaLayout, tower: Any) -> None:
    view, method = view_of(layout, tower), tokred.VisPruner(0.4, important=0.3, step=3)
    rows = (view.class_attention(4) if tower.has_class else view.attention_mass(4)).sum(dim=2)
    scores = view.at_tokens(rows)
    x = view.at_tokens(view.hidden()) if tower.projects else view.features
    got = method.select(view).indices
    for item, (p, k) in itertools.product(range(2), enumerate(partition_budgets("", 0.4, layout))):
        tokens = tokens_of(layout, p)
        want = slow_vispruner(scores[item, tokens].tolist(), x[item, tokens], k, int(k * 0.3), 3)
        assert sorted(set(got[item].tolist()) & set(tokens)) == sorted(tokens[j] for j in want)


def test_vispruner_with_importance_alone_is_a_top_k() -> None:
    view = view_of(single())
    scores = view.class_attention(4).sum(dim=2)[:, 0]
    got = tokred.VisPruner(6, important=1.0).select(view).indices
    assert torch.equal(got, scores.topk(6).indices.sort().values)


def test_an_odd_list_loses_at_most_its_even_places() -> None:
    x = torch.randn(1, 5, 4)
    left = remove_duplicates(x, torch.tensor([[4, 3, 2, 1, 0]]), 2, step=9)
    assert left.tolist() == [[3, 1]]
    assert remove_duplicates(x, torch.tensor([[4, 3, 2, 1, 0]]), 1, step=9).shape == (1, 1)


# -- EVS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.01, 0.34, 0.5, 0.9, 14, 30])
def test_evs(budget: float) -> None:
    view = view_of(video(4, 3, 3), NO_PROJECTION)
    got = tokred.EVS(budget).select(view).indices
    count = max(9, int(36 * budget) if isinstance(budget, float) else budget)
    for item in range(2):
        rows = unit(view.features[item])
        change = [255.0] * 9 + [1 - dot(rows[j], rows[j - 9]) for j in range(9, 36)]
        want = sorted(sorted(range(36), key=lambda j: (-change[j], j))[:count])
        assert got[item].tolist() == want


def test_evs_of_a_video_that_stands_still_keeps_its_first_cells() -> None:
    view = view_of(video(3, 2, 2), NO_PROJECTION, items=1)
    view.features = torch.eye(8)[:4].repeat(3, 1)[None]
    assert tokred.EVS(0.6).select(view).indices.tolist() == [list(range(7))]
    assert tokred.EVS(0.1).select(view).indices.tolist() == [list(range(4))]
    assert tokred.EVS.own_positions == "original"
    assert tokred.EVS(0.5).bypasses(video(1))


# -- RandomTokens ----------------------------------------------------------------------------------------------------


def test_random_tokens_act_before_the_language_model_where_a_budget_is_given() -> None:
    both = ("EncoderBlock", "VisualFeatures", "PrefillLayer")
    assert tokred.RandomTokens(budget=0.5).acts_at(both) == ("VisualFeatures",)
    assert tokred.RandomTokens(budget=0.5).acts_at(("EncoderBlock",)) == ("EncoderBlock",)
    assert tokred.RandomTokens(keep_rate=0.5).acts_at(both) == ("EncoderBlock",)
    assert tokred.RandomTokens(counts={0: 3}).acts_at(both) == ("EncoderBlock",)


def test_random_tokens_choose_cells_by_their_number() -> None:
    chosen = set()
    for seed in range(20):
        method = tokred.RandomTokens(budget=9, seed=seed)
        answer = method.select(view_of(single(6, 6), items=3)).indices
        assert (answer == answer[:1]).all()
        chosen.add(tuple(answer[0].tolist()))
        # a cell that is cut leaves the order of the others alone
        whole, cut = mosaic((2, 2)), mosaic((2, 2), cut_rows=2)
        kept = [[layout.cells[j] for j in method.select(view_of(layout)).indices[0]] for layout in (whole, cut)]
        assert {cell for cell in kept[0] if cell in cut.cells} <= set(kept[1])
    assert len(chosen) == 20


# -- fields ----------------------------------------------------------------------------------------------------------

budgets = st.floats(0.01, 1.0) | st.integers(1, 900)
shared = {"budget": budgets, "positions": st.sampled_from([None, "compact", "original"]), "keep_newline": st.booleans()}
OWN: dict[Any, dict[str, Any]] = {
    tokred.HiRED: {
        "alpha": st.floats(0, 1),
        "official": st.booleans(),
        "score": st.sampled_from([None, "mass", "count"]),
        "count_m": st.none() | st.integers(0, 99),
        "regions": st.sampled_from([None, "grid2d", "strips"]),
        "init_layer": st.integers(0, 40),
        "final_layer": st.none() | st.integers(0, 40),
        "remainder": st.sampled_from(["drop", "largest"]),
        "min_per_partition": st.integers(0, 9),
        "mask_padding": st.booleans(),
        "cls_source": st.sampled_from(["auto", "cls"]),
    },
    tokred.VisionZip: {"contextual": st.none() | st.floats(0, 0.9) | st.just(1), "normalise": st.booleans()},
    tokred.DivPrune: {},
    tokred.CDPruner: {"relevance": st.sampled_from(["question", "none"]), "theta": st.none() | st.floats(0, 0.9)},
    tokred.VisPruner: {"important": st.floats(0, 1), "step": st.integers(1, 20)},
    tokred.EVS: {},
    tokred.RandomTokens: {"seed": st.integers(0, 2**40)},
}
made = st.one_of(
    *(
        st.fixed_dictionaries({}, optional={**shared, **own}).map(lambda options, cls=cls: cls(**options))
        for cls, own in OWN.items()
    )
)


@given(made)
def test_a_method_survives_json_copies_and_pickle(method: Any) -> None:
    text = json.dumps(method.to_dict(), allow_nan=False)
    again = tokred.from_dict(json.loads(text))
    assert again == method
    assert type(again) is type(method)
    assert hash(again) == hash(method)
    assert json.dumps(again.to_dict()) == text
    assert copy.deepcopy(method) == method == pickle.loads(pickle.dumps(method)) == method.replace()
    assert eval(repr(method), {type(method).__name__: type(method)}) == method


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        *((cls, {"budget": 0}, "budget=0: ") for cls in OWN),
        *((cls, {"budget": -0.5}, "fraction") for cls in OWN),
        *((cls, {"positions": "old"}, "'compact', 'original'") for cls in OWN),
        (tokred.VisionZip, {"contextual": 1.0}, r"\[0, 1\)"),
        (tokred.VisionZip, {"contextual": -1}, "contextual=-1"),
        (tokred.VisionZip, {"budget": 8, "contextual": 9}, "more than the whole budget=8"),
        (tokred.CDPruner, {"relevance": "clip"}, "'question', 'none'"),
        (tokred.CDPruner, {"theta": 1.0}, r"theta=1.0: .*\[0, 1\)"),
        (tokred.VisPruner, {"important": 1.5}, r"\[0, 1\]"),
        (tokred.VisPruner, {"step": 0}, "step=0"),
    ],
)
def test_fields_are_checked(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**options)
    with pytest.raises(TypeError, match="did you mean 'budget'"):
        cls(budgets=0.5)
