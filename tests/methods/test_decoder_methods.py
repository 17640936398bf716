"""FastV, PyramidDrop, DART and SparseVLM between the layers of a language model: against slow definitions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokred import ops
from tokred.core.decoder import DecoderMethod, LayerNeeds, PrefillLayer, Survivors
from tokred.core.errors import InvalidParameterError, LayerError, UnknownParameterError
from tokred.core.method import from_dict
from tokred.core.sites import DecoderInfo
from tokred.vlm.dart import DART, least_similar
from tokred.vlm.fastv import FastV
from tokred.vlm.pyramiddrop import PyramidDrop
from tokred.vlm.sparsevlm import RATERS, SparseVLM, find_raters, merge_clusters

HEADS, KV_HEADS, HEAD_DIM, DIM = 4, 2, 6, 16
INFO = DecoderInfo(
    depth=28, dim=DIM, width=HEADS * HEAD_DIM, layer_macs=1000, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM
)
SMALL = dataclasses.replace(INFO, depth=6)
METHODS = [FastV, PyramidDrop, DART, SparseVLM]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.name)


@dataclass
class Layers:
    """A `LayerSource` of given tensors, which hands out what was declared and nothing else.

    ``real``: (B, T) bool; ``given``: {own: (queries, keys)} after rotary embedding; ``embedded``: (B, T, D).
    """

    real: Tensor
    given: dict[bool, tuple[Tensor, Tensor]]
    embedded: Tensor
    needs: LayerNeeds
    gain: Tensor
    asked: list[str] = field(default_factory=list)

    def _check(self, own: bool) -> None:
        assert self.needs.own if own else self.needs.previous
        self.asked.append("own" if own else "previous")

    def attention_rows(self, own: bool, rows: Tensor) -> Tensor:
        self._check(own)
        q, k = self.given[own]
        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        seen = torch.arange(k.shape[2]) <= rows[..., None]  # (B, R, T)
        mask = seen & self.real[:, None]
        return ops.attention_rows(q, k, HEAD_DIM**-0.5, mask=mask[:, None])

    def queries(self, own: bool) -> Tensor:
        self._check(own)
        return self.given[own][0]

    def keys(self, own: bool) -> Tensor:
        self._check(own)
        return self.given[own][1]

    def values(self, own: bool) -> Tensor:
        raise AssertionError("nothing here should ask for values")

    def embeddings(self) -> Tensor:
        assert self.needs.embeddings
        self.asked.append("embeddings")
        return self.embedded

    def final_norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype) * self.gain.to(x.dtype)


def view_of(
    method: DecoderMethod,
    rows: Sequence[str],
    layer: int | None = None,
    info: DecoderInfo = INFO,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    initial: Sequence[int] | None = None,
) -> PrefillLayer:
    """A view of prompts such as "tvvvtt" (t text, v visual), padded on the left, which a method is asked about.

    What is made up of a row does not depend on the other rows; padding holds rubbish.
    """
    needs = method.layers(info)
    layer = min(needs) if layer is None else layer
    longest = max(map(len, rows))

    def padded(row: int, *shape: int, axis: int, salt: int) -> Tensor:
        rng = torch.Generator().manual_seed(1000 * seed + 10 * sum(map(ord, rows[row])) + salt)
        real = torch.randn(shape, generator=rng)
        rubbish = torch.full((*shape[:axis], longest - len(rows[row]), *shape[axis + 1 :]), 1e4)
        return torch.cat([rubbish, real], dim=axis).to(dtype)

    def stacked(*shape: int, axis: int, salt: int) -> Tensor:
        return torch.stack(
            [padded(r, *shape[:axis], len(rows[r]), *shape[axis + 1 :], axis=axis, salt=salt) for r in range(len(rows))]
        )

    letters = ["." * (longest - len(row)) + row for row in rows]
    visual = torch.tensor([[c == "v" for c in row] for row in letters])
    text = torch.tensor([[c == "t" for c in row] for row in letters])
    given = {
        own: (
            stacked(HEADS, 0, HEAD_DIM, axis=1, salt=1 + 2 * own),
            stacked(KV_HEADS, 0, HEAD_DIM, axis=1, salt=2 + 2 * own),
        )
        for own in (False, True)
    }
    source = Layers(visual | text, given, stacked(0, DIM, axis=0, salt=6), needs[layer], torch.linspace(0.5, 2, DIM))
    columns = torch.arange(longest).expand(len(rows), -1)
    return PrefillLayer(
        layer=layer,
        info=info,
        hidden=stacked(0, DIM, axis=0, salt=7),
        visual=visual,
        text=text,
        columns=columns,
        media=torch.where(visual, 0, -1),
        initial=visual.sum(dim=1) if initial is None else torch.tensor(initial),
        marks={},
        source=source,
    )


def places_of(view: PrefillLayer, kind: str, row: int) -> list[int]:
    return [p for p, is_one in enumerate(getattr(view, kind)[row].tolist()) if is_one]


def kept_of(view: PrefillLayer, answer: Survivors | None, row: int) -> list[int]:
    keep = view.visual if answer is None else answer.keep
    return [p for p in places_of(view, "visual", row) if keep[row, p]]


def slow_attention(view: PrefillLayer, row: int, place: int, own: bool = False) -> list[float]:
    """Attention of one query, averaged over heads, by loops."""
    q, k = view.source.given[own]  # type: ignore[attr-defined]
    total = [0.0] * view.visual.shape[1]
    for head in range(HEADS):
        seen = [p for p in range(place + 1) if view.valid[row, p]]
        query = q[row, head, place].double()
        logits = {p: float(query @ k[row, head // (HEADS // KV_HEADS), p].double()) * HEAD_DIM**-0.5 for p in seen}
        norm = math.fsum(math.exp(value) for value in logits.values())
        for p, value in logits.items():
            total[p] += math.exp(value) / norm / HEADS
    return total


def best(places: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(places, key=lambda p: (-scores[p], p))[:count])


def floor_rate(rate: float, n: int) -> int:
    return min(n, max(1, math.floor(rate * n + 1e-6))) if n else 0


prompts = st.lists(st.text("tv", min_size=1, max_size=30).map(lambda s: s + "t"), min_size=1, max_size=3, unique=True)
EXAMPLES = ["t" + "v" * 40 + "ttttttt", "tttvvvvvvvvvvvvvvvvvvvvttvvvvvvvvvvtttttt", "tttt", "v" * 12 + "tt"]


# -- FastV, PyramidDrop ----------------------------------------------------------------------------------------------


@given(prompts, st.floats(0.05, 0.95), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_fastv_is_its_definition(rows: list[str], rate: float, seed: int) -> None:
    method = FastV(layer=3, keep_rate=rate)
    view = view_of(method, rows, seed=seed)
    answer = method.prune(view)
    for row in range(len(rows)):
        visual = places_of(view, "visual", row)
        scores = slow_attention(view, row, view.visual.shape[1] - 1)
        assert kept_of(view, answer, row) == best(visual, scores, floor_rate(rate, len(visual)))
    if answer is not None:
        assert answer.keep[view.text].all()
        assert (answer.order, answer.hidden, answer.cut_earlier_cache, dict(answer.marks)) == (None, None, False, {})


@given(prompts, st.sampled_from([1, 2, 3]), st.integers(0, 99), st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_pyramiddrop_is_its_definition(rows: list[str], stage: int, seed: int, gone: int) -> None:
    method = PyramidDrop()
    initial = [row.count("v") + gone for row in rows]
    view = view_of(method, rows, layer=8 * stage, seed=seed, initial=initial)
    answer = method.prune(view)
    for row in range(len(rows)):
        visual = places_of(view, "visual", row)
        scores = slow_attention(view, row, view.visual.shape[1] - 1, own=True)
        count = floor_rate(0.5**stage, initial[row])
        assert kept_of(view, answer, row) == best(visual, scores, count)
    assert set(view.source.asked) <= {"own"}  # type: ignore[attr-defined]


def test_equal_scores_keep_the_first() -> None:
    for method in (FastV(budget=3), PyramidDrop(budget=3), SparseVLM(stages=(2,), counts=(3,), recycle=0)):
        view = view_of(method, ["tvvvvvvvtt", "vvvvvtt"], layer=max(method.layers(INFO)))
        for q, _ in view.source.given.values():  # type: ignore[attr-defined]
            q[:] = 0
        answer = method.prune(view)
        assert [kept_of(view, answer, row) for row in (0, 1)] == [[1, 2, 3], [3, 4, 5]]


def test_scores_that_are_no_number_come_last() -> None:
    method = FastV(budget=2)
    view = view_of(method, ["vvvvtt"])
    _, keys = view.source.given[False]  # type: ignore[attr-defined]
    keys[:, :, 0] = math.nan
    assert len(kept_of(view, method.prune(view), 0)) == 2


# -- DART ------------------------------------------------------------------------------------------------------------


def slow_dart(view: PrefillLayer, row: int, total: int, image_pivots: int, text_pivots: int) -> list[int]:
    visual = places_of(view, "visual", row)
    if total >= len(visual):
        return visual
    keys = view.source.given[False][1][row].double()  # type: ignore[attr-defined]
    norms = [float(keys[:, p].abs().sum()) for p in range(keys.shape[1])]
    first = sorted(visual, key=lambda p: (-norms[p], p))[: min(image_pivots, total)]
    text = [p for p in places_of(view, "text", row) if p > visual[-1]]
    pivots = first + sorted(text, key=lambda p: (-norms[p], p))[:text_pivots]
    h = view.final_norm(view.hidden)[row].double()
    h = h / h.norm(dim=-1, keepdim=True)
    chosen = list(first)
    for place, pivot in enumerate(pivots):
        share = (total - len(first)) // len(pivots) + (place < (total - len(first)) % len(pivots))
        left = [p for p in visual if p not in chosen]
        chosen += sorted(left, key=lambda p: (float(h[pivot] @ h[p]), p))[:share]
    return sorted(chosen)


@given(prompts, st.integers(1, 30), st.integers(1, 5), st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_dart_is_its_definition(rows: list[str], budget: int, image: int, text: int, seed: int) -> None:
    method = DART(budget=budget, image_pivots=image, text_pivots=text)
    view = view_of(method, rows, seed=seed)
    answer = method.prune(view)
    for row, prompt in enumerate(rows):
        kept = kept_of(view, answer, row)
        assert kept == slow_dart(view, row, budget, image, text)
        assert len(kept) == min(budget, prompt.count("v")) == method.kept(prompt.count("v"))


@pytest.mark.parametrize(
    ("n", "rate", "kept"), [(576, None, 196), (576, 2 / 9, 132), (40, 0.5, 20), (5, 0.5, 4), (2, 0.5, 2)]
)
def test_dart_counts_as_released(n: int, rate: float | None, kept: int) -> None:
    method = DART(keep_rate=rate)
    assert method.kept(n) == kept
    view = view_of(method, ["t" + n * "v" + "ttttt"])
    assert kept_of(view, method.prune(view), 0) == slow_dart(view, 0, kept, 4, 4)


def test_dart_never_picks_twice_and_prefers_lower_places() -> None:
    taken = torch.tensor([False, True, False, False, False])
    same = torch.zeros(2, 5)
    assert least_similar(same, taken, [2, 1]).tolist() == [True, True, True, True, False]
    assert least_similar(torch.tensor([[0.9, -1, 0.1, 0.1, 0.1]]), taken, [1]).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert torch.equal(least_similar(same, taken, [0, 0]), taken)


def test_dart_without_text_behind_the_images() -> None:
    method = DART(budget=9)
    view = view_of(method, ["ttt" + 20 * "v"])
    assert kept_of(view, method.prune(view), 0) == slow_dart(view, 0, 9, 4, 0)


# -- SparseVLM -------------------------------------------------------------------------------------------------------


def slow_raters(view: PrefillLayer, row: int) -> list[int]:
    visual, text = places_of(view, "visual", row), places_of(view, "text", row)
    behind = [p for p in text if visual and p > visual[-1]]
    if not behind:
        return [view.visual.shape[1] - 1]
    x = view.source.embedded[row].double()  # type: ignore[attr-defined]
    relevance = dict.fromkeys(behind, 0.0)
    for v in visual:
        weights = {p: math.exp(float(x[v] @ x[p])) for p in behind}
        for p in behind:
            relevance[p] += weights[p] / math.fsum(weights.values()) / len(visual)
    mean = math.fsum(relevance.values()) / len(behind)
    return [p for p in behind if relevance[p] > mean * (1 + 1e-9)] or behind


def slow_clusters(x: Tensor, clusters: int) -> dict[int, list[int]]:
    """{centre: members} by loops in float64."""
    n, x = len(x), x.double()
    d = ((x[:, None] - x).norm(dim=-1) / x.shape[1] ** 0.5).tolist()
    density = [math.exp(-sum(v * v for v in sorted(d[i])[:clusters]) / clusters) for i in range(n)]
    score = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * (min(denser) if denser else max(map(max, d))))
    centres = sorted(sorted(range(n), key=lambda i: (-score[i], i))[:clusters])
    members: dict[int, list[int]] = {c: [c] for c in centres}
    for i in range(n):
        if i not in centres:
            members[min(centres, key=lambda c: (d[i][c], c))].append(i)
    return members


@given(st.integers(1, 25), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_clusters_are_their_definition(n: int, clusters: int, seed: int) -> None:
    clusters = min(clusters, n)
    x = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))
    centres, means = merge_clusters(x, clusters)
    slow = slow_clusters(x, clusters)
    assert centres.tolist() == list(slow)
    for mean, members in zip(means, slow.values(), strict=True):
        torch.testing.assert_close(mean, x[members].mean(dim=0))


def test_clusters_of_equal_and_of_distant_tokens() -> None:
    centres, means = merge_clusters(torch.ones(7, DIM), 3)
    assert centres.tolist() == [0, 1, 2]
    assert torch.equal(means, torch.ones(3, DIM))
    far = 1e4 * torch.tensor([0.0, 0, 0, 1, 1, 1, 1])[:, None].expand(-1, DIM)  # exp(-d^2) is zero
    centres, means = merge_clusters(far + torch.randn(7, DIM), 2)
    assert (centres < 3).tolist() == [True, False]
    torch.testing.assert_close(means[:, 0], torch.tensor([0.0, 1e4]), atol=5, rtol=0)


@given(prompts)
@settings(max_examples=25, deadline=None)
def test_raters_are_their_definition(rows: list[str]) -> None:
    view = view_of(SparseVLM(), rows)
    raters = find_raters(view.source.embedded, view.visual, view.text)  # type: ignore[attr-defined]
    for row in range(len(rows)):
        assert raters[row].nonzero()[:, 0].tolist() == slow_raters(view, row)


def test_who_rates_where_nobody_stands_out() -> None:
    visual = torch.tensor([[False, True, True, False, False], [False, True, False, True, True]])
    text = torch.tensor([[True, False, False, True, True], [True, False, True, False, False]])
    raters = find_raters(torch.zeros(2, 5, 3), visual, text)
    assert raters.tolist() == [[False, False, False, True, True], [False, False, False, False, True]]


def slow_sparse(view: PrefillLayer, row: int, kept: int, clusters: int, raters: list[int]) -> tuple[list[int], Tensor]:
    """(places of what stays, in order; their hidden states)."""
    rows = [slow_attention(view, row, place) for place in raters]
    scores = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    visual = places_of(view, "visual", row)
    ranking = sorted(visual, key=lambda p: (-scores[p], p))
    chosen, dropped = sorted(ranking[:kept]), ranking[kept:]
    recycled = sorted(dropped[: int(len(dropped) * 0.3) + 1]) if clusters else []
    hidden = {p: view.hidden[row, p] for p in places_of(view, "valid", row)}
    centres = []
    if recycled:
        for centre, members in slow_clusters(view.hidden[row, recycled], clusters).items():
            centres.append(recycled[centre])
            hidden[recycled[centre]] = view.hidden[row, [recycled[m] for m in members]].mean(dim=0)
    order = []
    for place in sorted({*chosen, *places_of(view, "text", row)}):
        order.append(place)
        if place == chosen[-1]:
            order += centres
    return order, torch.stack([hidden[p] for p in order])


def after(view: PrefillLayer, answer: Survivors, row: int) -> tuple[list[int], Tensor]:
    """What a host makes of an answer: (places in order, hidden states)."""
    places = torch.tensor([p for p in places_of(view, "valid", row) if answer.keep[row, p]])
    if answer.order is not None:
        places = places[answer.order[row, places].argsort(stable=True)]
    hidden = view.hidden if answer.hidden is None else answer.hidden
    return places.tolist(), hidden[row, places]


@given(st.lists(st.sampled_from(EXAMPLES[:2] + EXAMPLES[3:]), min_size=1, max_size=3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_sparsevlm_is_its_definition(rows: list[str], seed: int) -> None:
    method = SparseVLM(stages=(1, 3), counts=(9, 4))
    view = view_of(method, rows, seed=seed)
    answer = method.prune(view)
    assert answer is not None
    for row in range(len(rows)):
        raters = slow_raters(view, row)
        assert answer.marks[RATERS][row].nonzero()[:, 0].tolist() == raters
        kept, clusters = method.split(len(places_of(view, "visual", row)), 9)
        order, hidden = slow_sparse(view, row, kept, clusters, raters)
        found, states = after(view, answer, row)
        assert found == order
        torch.testing.assert_close(states, hidden)


def test_raters_travel_to_later_stages() -> None:
    method = SparseVLM(stages=(1, 3), counts=(9, 4))
    view = view_of(method, ["t" + 15 * "v" + "tttt", "v" * 10 + "tt"], layer=4)
    marked = torch.zeros_like(view.visual)
    marked[0, [17, 19]] = marked[1, -1] = True
    view.marks = {RATERS: marked}
    answer = method.prune(view)
    assert answer is not None
    assert view.source.asked == ["previous"]  # type: ignore[attr-defined]
    for row, raters in enumerate(([17, 19], [19])):
        assert after(view, answer, row)[0] == slow_sparse(view, row, 4, method.split(15, 4)[1], raters)[0]
    view.visual[:, 8:16] = False
    view.visual[:, 1:5] = False
    assert SparseVLM(stages=(1, 3), counts=(9, 9)).prune(view) is None


def test_the_first_stage_marks_even_if_nothing_goes() -> None:
    method = SparseVLM(stages=(1, 3), counts=(9, 4))
    view = view_of(method, ["tvvvvvtt"])
    answer = method.prune(view)
    assert answer is not None
    assert bool(answer.keep.all())
    assert answer.order is None
    assert answer.hidden is None
    assert answer.marks[RATERS].any()


def test_released_numbers_of_sparsevlm() -> None:
    assert SparseVLM().entering(INFO, 576) == (576,) * 3 + (309,) * 4 + (204,) * 9 + (113,) * 12
    assert SparseVLM(recycle=0).entering(INFO, 576)[2::4] == (576, 300, 200, 200, 110, 110, 110)
    assert SparseVLM(retained=64, recycle=0).entering(INFO, 288)[3] == 33
    assert SparseVLM(counts=(300, 200, 110), recycle=0).entering(INFO, 250)[3::5] == (250, 200, 200, 110, 110)
    for tokens in range(1, 300):
        for left in range(1, 40):
            method = SparseVLM(budget=left)
            assert sum(method.split(tokens, left)) == min(tokens, left)
            kept, clusters = SparseVLM().split(tokens, left)
            assert kept == min(left, tokens) or (kept == tokens and clusters == 0)
            assert kept + clusters <= tokens


# -- all of them -----------------------------------------------------------------------------------------------------

SETTINGS: list[DecoderMethod] = [
    FastV(),
    FastV(layer=1, budget=5),
    FastV(budget=0.3),
    PyramidDrop(),
    PyramidDrop(budget=3),
    PyramidDrop(stages=(2, 5), keep_rates=(0.6, 0.6)),
    DART(),
    DART(keep_rate=0.5),
    DART(budget=6),
    SparseVLM(),
    SparseVLM(retained=64),
    SparseVLM(budget=5),
    SparseVLM(budget=0.25),
    SparseVLM(counts=(8, 4, 4), recycle=0.6),
]
each_setting = pytest.mark.parametrize("method", SETTINGS, ids=repr)


@each_setting
def test_counts_are_static_and_rows_do_not_see_each_other(method: DecoderMethod) -> None:
    layer = min(method.layers(INFO))
    view = view_of(method, EXAMPLES)
    answer = method.prune(view)
    assert answer is not None
    for row, prompt in enumerate(EXAMPLES):
        places, hidden = after(view, answer, row)
        text = [view.text[row, p] for p in places]
        n = prompt.count("v")
        assert len(places) - sum(text) == method.entering(INFO, n)[layer]
        assert [p for p, is_text in zip(places, text, strict=True) if is_text] == places_of(view, "text", row)
        alone = view_of(method, [prompt])
        single = method.prune(alone)
        pad = len(EXAMPLES[0]) - len(prompt)
        if single is None:
            assert places == places_of(view, "valid", row)
            continue
        expected, states = after(alone, single, 0)
        assert places == [p + pad for p in expected]
        assert torch.equal(hidden, states)


@each_setting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(method: DecoderMethod, dtype: torch.dtype) -> None:
    view = view_of(method, EXAMPLES, dtype=dtype)
    answer = method.prune(view)
    assert answer is not None
    assert answer.keep.dtype == torch.bool
    assert answer.hidden is None or answer.hidden.dtype == dtype
    layer = min(method.layers(INFO))
    for row, prompt in enumerate(EXAMPLES):
        places, hidden = after(view, answer, row)
        assert len(places) == method.entering(INFO, prompt.count("v"))[layer] + prompt.count("t")
        assert hidden.isfinite().all()


@each_setting
def test_autocast_changes_nothing(method: DecoderMethod) -> None:
    plain, cast = view_of(method, EXAMPLES), view_of(method, EXAMPLES)
    answer = method.prune(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = method.prune(cast)
    assert answer is not None
    assert other is not None
    assert torch.equal(answer.keep, other.keep)
    if answer.hidden is not None:
        assert torch.equal(answer.hidden, other.hidden)


@each_setting
def test_prompts_of_text_alone_stay_whole(method: DecoderMethod) -> None:
    answer = method.prune(view_of(method, ["tttt", "tt"]))
    assert answer is None or (bool(answer.keep[0].all()) and answer.order is None)
    assert method.entering(INFO, 0) == (0,) * INFO.depth


@each_setting
@given(n=st.integers(0, 700), text=st.integers(1, 90))
@settings(max_examples=10, deadline=None)
def test_counts_by_layer(method: DecoderMethod, n: int, text: int) -> None:
    entering = method.entering(INFO, n)
    assert len(entering) == INFO.depth
    assert list(entering) == sorted(entering, reverse=True)
    assert entering[0] == n
    layers = method.layers(INFO)
    falls = {layer for layer in range(1, INFO.depth) if entering[layer] < entering[layer - 1]}
    assert falls <= set(layers)
    assert n == 0 or entering[-1] >= 1
    budget = getattr(method, "budget", None)
    if budget is not None:
        expected = min(n, budget) if isinstance(budget, int) else floor_rate(budget, n)
        assert entering[-1] == expected
    assert method.scoring_macs(INFO, entering, text) >= 0


@each_method
def test_keeping_everything_bypasses(method: Any) -> None:
    assert dict(method(budget=1.0).layers(INFO)) == {}
    assert method(budget=1.0).entering(INFO, 50) == (50,) * INFO.depth
    assert method(budget=1.0).scoring_macs(INFO, (50,) * INFO.depth, 9) == 0
    view = view_of(method(budget=200), EXAMPLES)
    answer = method(budget=200).prune(view)
    assert answer is None or (bool(answer.keep[view.valid].all()) and answer.order is None and answer.hidden is None)


def test_keep_rates_of_one_bypass() -> None:
    assert dict(FastV(keep_rate=1.0).layers(INFO)) == {}
    assert dict(DART(keep_rate=1.0).layers(INFO)) == {}
    assert DART(keep_rate=1.0).entering(INFO, 15) == (15,) * INFO.depth
    assert list(PyramidDrop(keep_rates=(1.0, 0.5, 0.5)).layers(INFO)) == [16]
    assert list(PyramidDrop(budget=0.4).layers(INFO)) == [16, 24]
    assert PyramidDrop(budget=0.4).entering(INFO, 10)[7::8] == (10, 10, 8)


def test_what_they_ask_for() -> None:
    assert FastV().layers(INFO) == {2: LayerNeeds(previous=True)}
    assert DART(layer=5).layers(INFO) == {5: LayerNeeds(previous=True)}
    assert PyramidDrop().layers(INFO) == dict.fromkeys((8, 16, 24), LayerNeeds(own=True))
    plain = LayerNeeds(previous=True)
    assert SparseVLM().layers(INFO) == {3: LayerNeeds(previous=True, embeddings=True), 7: plain, 16: plain}
    assert [cls().own_positions for cls in METHODS] == ["original", "compact", "original", "compact"]
    assert PyramidDrop(budget=64).entering(INFO, 576)[7::8] == (576, 256, 128)


def test_depths() -> None:
    medium = dataclasses.replace(INFO, depth=20)
    assert list(PyramidDrop().layers(medium)) == [8, 16]
    assert PyramidDrop(budget=5).entering(medium, 50)[-5:] == (10, 5, 5, 5, 5)  # the last stage that there is
    assert list(SparseVLM().layers(SMALL)) == [3]
    assert SparseVLM(budget=5).entering(SMALL, 50) == (50, 50, 50, 5, 5, 5)
    for method in (FastV(layer=6), DART(layer=6), PyramidDrop(), PyramidDrop(stages=(2, 6), keep_rates=(0.5, 0.2))):
        with pytest.raises(LayerError):
            method.layers(SMALL)
        with pytest.raises(LayerError):
            method.entering(SMALL, 9)
    with pytest.raises(LayerError, match="pass stages="):
        SparseVLM().layers(dataclasses.replace(INFO, depth=2))


def test_multiply_adds_of_scoring() -> None:
    entering = FastV().entering(INFO, 40)
    assert FastV().scoring_macs(INFO, entering, 10) == 50 * 24
    assert DART().scoring_macs(INFO, entering, 10) == 8 * 40 * 16
    entering = PyramidDrop().entering(INFO, 40)
    assert PyramidDrop().scoring_macs(INFO, entering, 10) == (50 + 30 + 20) * (16 * (24 + 12) + 24)
    method = SparseVLM(stages=(2,), counts=(10,))
    assert method.recycled(30) == (10, 2)
    expected = 16 * 40 * 10 + 24 * 10 * 50 + 10 * 10 * 16
    assert method.scoring_macs(INFO, method.entering(INFO, 40), 10) == expected


# -- parameters ------------------------------------------------------------------------------------------------------

DEFAULTS = {
    FastV: {"layer": 2, "keep_rate": 0.5, "budget": None, "positions": None},
    PyramidDrop: {"stages": None, "keep_rates": (0.5, 0.25, 0.125), "budget": None, "positions": None},
    DART: {
        "layer": 2, "keep_rate": 1 / 3, "budget": None, "image_pivots": 4, "text_pivots": 4, "positions": None,
    },
    SparseVLM: {
        "stages": None, "retained": 192, "counts": None, "budget": None, "recycle": 0.3, "positions": None,
    },
}  # fmt: skip


@each_method
def test_defaults(method: Any) -> None:
    assert dataclasses.asdict(method()) == DEFAULTS[method]
    assert method.sites == ("PrefillLayer",)


@pytest.mark.parametrize("method", [*SETTINGS, *(cls() for cls in METHODS), SparseVLM(positions="original")], ids=repr)
def test_json_copies_and_hash(method: DecoderMethod) -> None:
    again = from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert hash(again) == hash(method)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    assert eval(repr(method)) == method


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (FastV, {"keep_rate": 0}, r"keep_rate=0: expected a fraction in \(0, 1\]"),
        (FastV, {"keep_rate": 0.5, "budget": 9}, "keep_rate and budget exclude each other"),
        (FastV, {"budget": -1}, r"budget=-1: expected a fraction in \(0, 1\] or"),
        (FastV, {"layer": -1}, "layer=-1: expected an integer >= 0"),
        (FastV, {"positions": "new"}, "positions='new': expected one of"),
        (DART, {"image_pivots": 0}, "image_pivots=0: expected an integer >= 1"),
        (DART, {"text_pivots": -1}, "text_pivots=-1: expected an integer >= 0"),
        (DART, {"keep_rate": 1.5}, "keep_rate=1.5"),
        (PyramidDrop, {"stages": (2, 4)}, r"keep_rates=\(0.5, 0.25, 0.125\): expected one for each of 2 stages"),
        (PyramidDrop, {"stages": (4, 2, 1)}, "stages=.*must ascend"),
        (PyramidDrop, {"keep_rates": (0.1, 0.2, 0.3)}, "keep_rates=.*cannot ascend"),
        (PyramidDrop, {"keep_rates": (0.3, 0.2, 0)}, "keep_rates=0: expected a fraction"),
        (PyramidDrop, {"keep_rates": 0.3}, "keep_rates=0.3: expected one for each of 3 stages"),
        (SparseVLM, {"retained": 100}, "retained=100: expected one of 192, 128, 96, 64"),
        (SparseVLM, {"retained": 192, "counts": (3, 2, 1)}, "retained and counts exclude each other"),
        (SparseVLM, {"counts": (3, 2)}, r"counts=\(3, 2\): expected one for each of 3 stages"),
        (SparseVLM, {"counts": (1, 2, 3)}, "counts=.*cannot ascend"),
        (SparseVLM, {"counts": (3, 2, 0)}, "counts=0: expected an integer >= 1"),
        (SparseVLM, {"recycle": 2}, r"recycle=2: expected a number in \[0, 1\]"),
    ],
)
def test_errors(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        method(**options)


def test_layer_zero_has_no_layer_before() -> None:
    for call in (lambda: FastV(layer=0), lambda: DART(layer=0), lambda: PyramidDrop(stages=(0, 2, 4))):
        with pytest.raises(LayerError, match=r"layer >= 1|layer 1 or later"):
            call()
    with pytest.raises(UnknownParameterError, match="keep_rate"):
        FastV(keep_rat=0.5)  # type: ignore[call-arg]
