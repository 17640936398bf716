"""GemFilter's selection against slow definitions, and the automatic choice of its layer on made-up models."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tokred.core.decoder import Prompt
from tokred.core.errors import InvalidParameterError, LayerError
from tokred.core.sites import DecoderInfo
from tokred.vlm.gemfilter import GemFilter, choose_top, covering_layer, pool_scores, prompt_scores

INFO = DecoderInfo(depth=6, dim=32, width=32, layer_macs=1, heads=4, kv_heads=2, head_dim=8, vocabulary=500)
TEXT, VISUAL, PAD = "t", "v", "."
POOLS = ("avg", "max", None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view_of(rows: Sequence[str], seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Prompt:
    """Random queries and keys for prompts such as "..tvvtvv": padding, text, visual tokens (a run is an image)."""
    batch, n = len(rows), len(rows[0])
    visual = torch.tensor([[c == VISUAL for c in row] for row in rows])
    text = torch.tensor([[c == TEXT for c in row] for row in rows])
    media = torch.full((batch, n), -1)
    for b, row in enumerate(rows):
        image = -1
        for i, c in enumerate(row):
            if c == VISUAL:
                image += i == 0 or row[i - 1] != VISUAL
                media[b, i] = image
    query, keys = normal(batch, 4, 8, seed=seed) * scale, normal(batch, 2, n, 8, seed=seed + 1) * scale
    return Prompt(2, INFO, query.to(dtype), keys.to(dtype), visual, text, torch.arange(n).expand(batch, -1), media)


def rows_of(view: Prompt, rows: slice, columns: slice = slice(None)) -> Prompt:
    """A part of a view."""
    tensors = (one[rows, columns] for one in (view.visual, view.text, view.columns, view.media))
    return Prompt(view.layer, view.info, view.query[rows], view.keys[rows, :, columns], *tensors)


# -- slow definitions ------------------------------------------------------------------------------------------------


def slow_scores(query: Tensor, keys: Tensor) -> list[list[float]]:
    """Keys repeated for every query head; one dot product after the other, in float64."""
    repeated = keys.double().repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    return [
        [
            math.fsum(a * b for h in range(query.shape[1]) for a, b in zip(q[h], k[h][j], strict=True))
            for j in range(keys.shape[2])
        ]
        for q, k in zip(query.double().tolist(), repeated.tolist(), strict=True)
    ]


def slow_pool(scores: Sequence[float], kernel_size: int, pool: str | None) -> list[float]:
    n, half = len(scores), kernel_size // 2
    around = [[scores[i] for i in range(j - half, j + half + 1) if 0 <= i < n] for j in range(n)]
    if pool is None:
        return list(scores)
    return [max(window) if pool == "max" else math.fsum(window) / kernel_size for window in around]


def slow_top(scores: Mapping[int, float], k: int) -> set[int]:
    return set(sorted(scores, key=lambda i: (-scores[i], i))[:k])


def slow_choice(method: GemFilter, view: Prompt) -> list[set[int]]:
    """Row by row, without its padding."""
    answer = []
    for b in range(len(view.visual)):
        own = [i for i in range(view.visual.shape[1]) if view.valid[b, i]]
        alone = slow_scores(view.query[b : b + 1], view.keys[b : b + 1, :, own])[0]
        scores = dict(zip(own, slow_pool(alone, method.kernel_size, method.pool), strict=True))
        ends = {*own[: method.keep_first], *(own[-method.keep_last :] if method.keep_last else [])}
        wanted = {"all": "tv", "visual": "v", "text": "t"}[method.scope]
        kinds = {i: VISUAL if view.visual[b, i] else TEXT for i in own}
        groups: dict[int, list[int]] = {}
        for i in own:
            if kinds[i] in wanted:
                groups.setdefault(int(view.media[b, i]) if method.per_image else 0, []).append(i)
        kept = {i for i in own if kinds[i] not in wanted}
        for members in groups.values():
            k = method.k if isinstance(method.k, int) else math.ceil(method.k * len(members) - 1e-6)
            forced = [i for i in members if i in ends][:k]
            kept |= set(forced) | slow_top({i: scores[i] for i in members if i not in forced}, k - len(forced))
        answer.append(kept)
    return answer


def chosen_sets(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in mask]


prompts = st.integers(1, 18).flatmap(
    lambda n: st.lists(
        st.tuples(st.integers(0, n - 1), st.text(alphabet="tv", min_size=n, max_size=n)), min_size=1, max_size=3
    ).map(lambda rows: [PAD * pad + row[pad:] for pad, row in rows])
)


# -- selection -------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    n=st.integers(1, 9),
    d=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_scores_are_those_of_repeated_keys(batch: int, kv: int, group: int, n: int, d: int, seed: int) -> None:
    query, keys = normal(batch, kv * group, d, seed=seed), normal(batch, kv, n, d, seed=seed + 1)
    want = torch.tensor(slow_scores(query, keys), dtype=torch.float64)
    got = prompt_scores(query, keys)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    exact = prompt_scores(query.double(), keys.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, want, atol=1e-12, rtol=1e-12)


@given(
    scores=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    pool=st.sampled_from(POOLS),
    pad=st.integers(0, 4),
)
def test_pooling(scores: list[float], kernel_size: int, pool: Any, pad: int) -> None:
    padded = torch.tensor([[77.0] * pad + scores])
    valid = torch.arange(padded.shape[1])[None] >= pad
    got = pool_scores(padded, valid, kernel_size, pool)
    assert (got[:, :pad] == -math.inf).all()
    want = torch.tensor([slow_pool(scores, kernel_size, pool)])
    torch.testing.assert_close(got[:, pad:], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[:, pad:], pool_scores(padded[:, pad:], valid[:, pad:], kernel_size, pool))


@given(
    rows=prompts,
    k=st.one_of(st.integers(1, 20), st.sampled_from([0.01, 0.1, 0.5, 0.75, 1.0])),
    kernel_size=st.sampled_from([1, 3, 5]),
    pool=st.sampled_from(POOLS),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    scope=st.sampled_from(["all", "visual", "text", "image"]),
    seed=st.integers(0, 50),
)
def test_choice(
    rows: list[str], k: float, kernel_size: int, pool: Any, ends: tuple[int, int], scope: Any, seed: int
) -> None:
    if isinstance(k, int):
        k = max(k, sum(ends))
    per_image, scope = scope == "image", "visual" if scope == "image" else scope
    method = GemFilter(k, None, kernel_size, pool, *ends, scope, per_image)
    view = view_of(rows, seed, torch.float64)
    assert chosen_sets(method.choose(view)) == slow_choice(method, view)


@given(rows=prompts, k=st.sampled_from([1, 3, 5, 0.3, 1.0]), scope=st.sampled_from(["all", "visual", "text"]))
def test_how_many_stay(rows: list[str], k: float, scope: Any) -> None:
    view = view_of(rows)
    method = GemFilter(k, scope=scope)
    chosen = method.choose(view)
    assert not (chosen & ~view.valid).any()
    for row, text, visual in zip(chosen, view.text, view.visual, strict=True):
        tokens = int(visual.sum()), int(text.sum())
        assert row.sum() == method.kept(*tokens)
        assert method.bypasses(*tokens) == bool(row.sum() == sum(tokens))
        if scope != "all":
            other = text if scope == "visual" else visual
            assert torch.equal(row & other, other)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scope", ["all", "visual", "text"])
def test_a_smaller_budget_keeps_a_part_of_what_a_larger_one_keeps(scope: Any, pool: Any) -> None:
    view = view_of(["..ttvvvtvvtt", "tvtvtvtvtvtv"])
    masks = [GemFilter(k, pool=pool, scope=scope).choose(view) for k in range(1, 13)]
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()
    assert torch.equal(masks[-1], view.valid)


def test_order_of_heads_and_constants_do_not_matter() -> None:
    view = view_of(["ttttttttttttttttt"] * 2, seed=3, dtype=torch.float64)
    method = GemFilter(6)
    other = Prompt(**{**vars(view), "query": view.query[:, [3, 2, 0, 1]], "keys": view.keys[:, [1, 0]]})
    assert torch.equal(method.choose(view), method.choose(other))
    scores = prompt_scores(view.query, view.keys)
    six = torch.tensor([6, 6])
    assert torch.equal(choose_top(scores, view.valid, six), choose_top(scores + 1000, view.valid, six))


@pytest.mark.parametrize("k", [4, 0.3])
@pytest.mark.parametrize("pool", POOLS)
def test_padding_and_company_do_not_matter(pool: Any, k: float) -> None:
    view = view_of([".....tvvttvv", "tttvvvttvvvt", "...........t", "............"], seed=5)
    view.keys[0, :, :3] = math.nan
    view.keys[0, :, 3:5] = 1e30
    method = GemFilter(k, pool=pool, keep_last=1)
    chosen = method.choose(view)
    for b, pad in enumerate([5, 0, 11, 12]):
        assert not chosen[b, :pad].any()
        if pad < 12:
            alone = method.choose(rows_of(view, slice(b, b + 1), slice(pad, None)))
            assert torch.equal(alone[0], chosen[b, pad:])


def test_ties_go_to_the_lower_position() -> None:
    view = view_of(["..ttttttttt"])
    view.keys[:] = view.keys[:, :, :1]
    assert chosen_sets(GemFilter(3, pool=None).choose(view)) == [{2, 3, 4}]
    # zeros outside weaken both ends, or favour them where scores are negative
    positive = float(prompt_scores(view.query, view.keys)[0, 0]) > 0
    assert chosen_sets(GemFilter(3).choose(view)) == [{4, 5, 6} if positive else {2, 3, 10}]
    scores = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, 2.0, math.nan]])
    allowed = torch.ones(1, 7, dtype=torch.bool)
    for k, want in enumerate(
        [set(), {1}, {1, 2}, {1, 2, 5}, {0, 1, 2, 5}, {0, 1, 2, 3, 5}, {0, 1, 2, 3, 4, 5}, set(range(7))]
    ):
        assert chosen_sets(choose_top(scores, allowed, torch.tensor([k]))) == [want]


def test_what_is_no_number_ranks_last_but_before_padding() -> None:
    scores = torch.tensor([[5.0, math.nan, -math.inf, 1.0, math.inf]])
    allowed = torch.tensor([[False, True, True, True, True]])
    wanted = [{4}, {3, 4}, {1, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4}]
    for k, want in enumerate(wanted, start=1):
        assert chosen_sets(choose_top(scores, allowed, torch.tensor([k]))) == [want]


def test_ends_are_a_part_of_the_budget() -> None:
    view = view_of(["...tttttttttt", "ttttttttttttt"])
    chosen = chosen_sets(GemFilter(4, keep_first=1, keep_last=2).choose(view))
    assert all(len(row) == 4 for row in chosen)
    assert {3, 11, 12} <= chosen[0]
    assert {0, 11, 12} <= chosen[1]
    assert chosen_sets(GemFilter(3, keep_first=3).choose(view)) == [{3, 4, 5}, {0, 1, 2}]
    assert chosen_sets(GemFilter(0.1, keep_first=3, keep_last=1).choose(view)) == [{3}, {0, 1}]


def test_ends_of_one_scope_are_ends_of_the_prompt() -> None:
    view = view_of(["ttvvvvtvvvtt"])
    assert {11, 10, 0, 1, 6} <= chosen_sets(GemFilter(1, scope="visual", keep_last=1).choose(view))[0]
    assert 9 in chosen_sets(GemFilter(1, scope="visual", keep_last=1).choose(view_of(["ttvvvvtvvv"])))[0]


def test_a_budget_for_each_image() -> None:
    view = view_of(["tvvvvvtvvvvtvt", "tttttvvvvtttvv"])
    chosen = GemFilter(2, scope="visual", per_image=True).choose(view)
    for row, media, text in zip(chosen, view.media, view.text, strict=True):
        assert [int((row & (media == image)).sum()) for image in range(int(media.max()) + 1)] == [
            min(2, int((media == image).sum())) for image in range(int(media.max()) + 1)
        ]
        assert torch.equal(row & text, text)
    half = GemFilter(0.5, scope="visual", per_image=True).choose(view)
    assert int((half & view.visual)[0].sum()) == 3 + 2 + 1


def test_a_fraction_rounds_up() -> None:
    for n in range(1, 200):
        for tenths in range(1, 11):
            assert GemFilter(tenths / 10).kept(0, n) == -(-n * tenths // 10)
    assert GemFilter(1e-9).kept(3, 4) == 1
    assert GemFilter(1.0).bypasses(5, 9)
    assert GemFilter(0.2, scope="visual").kept(11, 4) == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    view = view_of(["." * 3 + "t" * 30, "t" * 33], dtype=dtype, scale=60.0)
    view.keys[1, :, 20] = view.query[1].view(2, 2, 8).sum(dim=1)
    scores = prompt_scores(view.query, view.keys)
    assert scores.dtype == torch.float32
    assert scores.abs().max() > 65504
    torch.testing.assert_close(
        scores.double(), prompt_scores(view.query.double(), view.keys.double()), rtol=1e-5, atol=0.5
    )
    chosen = GemFilter(7, pool=None).choose(view)
    assert chosen_sets(chosen) == slow_choice(GemFilter(7, pool=None), view)
    assert chosen[1, 20]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GemFilter(7, pool=None).choose(view), chosen)


def test_no_gradient() -> None:
    view = view_of(["t" * 9])
    view.query.requires_grad_()
    assert not prompt_scores(view.query, view.keys).requires_grad


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 0), ("k", 1.5), ("k", True), ("k", 0.0), ("layer", -1), ("layer", "first"), ("layer", 2.0),
        ("layer", True), ("kernel_size", 4), ("kernel_size", 0), ("pool", "mean"), ("keep_first", -1),
        ("keep_last", 0.5), ("scope", "image"), ("per_image", "yes"), ("per_image", True), ("positions", "packed"),
    ],
)  # fmt: skip
def test_parameters_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match=f"{field}={value!r}"):
        GemFilter(**{field: value})


def test_ends_must_fit_the_budget() -> None:
    with pytest.raises(InvalidParameterError, match=r"keep_first=3 and keep_last=2 are more than k=4"):
        GemFilter(4, keep_first=3, keep_last=2)


def test_even_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        pool_scores(torch.zeros(1, 8), torch.ones(1, 8, dtype=torch.bool), 4)


@pytest.mark.parametrize(
    "method",
    [
        GemFilter(),
        GemFilter(0.25, layer=3, kernel_size=7, pool="max", keep_first=2, keep_last=3, positions="original"),
        GemFilter(64, layer="auto", pool=None, scope="visual", per_image=True),
    ],
)
def test_json(method: GemFilter) -> None:
    read = GemFilter(**{k: v for k, v in json.loads(json.dumps(method.to_dict())).items() if k != "method"})
    assert read == method
    assert method.to_dict()["method"] == "gemfilter"
    assert isinstance(method, tokred.Method)


# -- the layer -------------------------------------------------------------------------------------------------------


def never(ids: Tensor, layers: Sequence[int]) -> dict[int, Prompt]:
    raise AssertionError("nothing should be measured")


def info_of(**changes: Any) -> DecoderInfo:
    return DecoderInfo(**{**vars(INFO), **changes})


SHAPES = [
    (13, "meta-llama/Meta-Llama-3.1-8B-Instruct", ("llama", 32, 4096, 32, 128256)),
    (13, "meta-llama/LLAMA-3.1-8B", ("llama", 32, 4096, 32, 128256)),
    (19, "mistralai/Mistral-Nemo-Instruct-2407", ("mistral", 40, 5120, 32, 131072)),
    (19, "microsoft/Phi-3.5-mini-instruct", ("phi3", 32, 3072, 32, 32064)),
]


@pytest.mark.parametrize(("layer", "name", "shape"), SHAPES)
def test_published_layers(layer: int, name: str, shape: tuple[Any, ...]) -> None:
    family, depth, dim, heads, vocabulary = shape
    by_name = info_of(name=name, depth=depth)
    by_shape = info_of(family=family, depth=depth, dim=dim, heads=heads, vocabulary=vocabulary)
    for info in (by_name, by_shape):
        assert GemFilter().filter_layer(info, never) == layer
        assert GemFilter(layer=2).filter_layer(info, never) == 2
        with pytest.raises(AssertionError, match="nothing should be measured"):
            GemFilter(layer="auto").filter_layer(info, never)
    for other in ({"depth": depth - 1}, {"dim": dim + 64}, {"vocabulary": vocabulary + 64}, {"family": "other"}):
        with pytest.raises(AssertionError, match="nothing should be measured"):
            GemFilter().filter_layer(info_of(**{**vars(by_shape), **other}), never)
    with pytest.raises(AssertionError, match="nothing should be measured"):
        GemFilter().filter_layer(info_of(name=name, depth=6), never)


def test_a_layer_that_does_not_exist() -> None:
    assert GemFilter(layer=5).filter_layer(INFO, never) == 5
    with pytest.raises(LayerError, match=r"layer=6, but this model has 6 layers \(0 to 5\)"):
        GemFilter(layer=6).filter_layer(INFO, never)


Behaviour = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def noise(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing of use."""
    return table[ids[:, -1]], table[(ids * 7 + 3) % len(table)]


def same(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The last token sees tokens like itself."""
    return table[ids[:, -1]] * 9, table[ids]


def recent(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The last token sees what is near."""
    keys = torch.zeros(*ids.shape, table.shape[1])
    keys[:, :, 0] = torch.arange(ids.shape[1])
    return keys[:, -1], keys


def induction(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The last token sees what came after tokens like itself."""
    keys = table[ids.roll(1, dims=1)]
    keys[:, 0] = 0
    return table[ids[:, -1]] * 9, keys


def model_of(behaviours: Sequence[Behaviour], vocabulary: int = INFO.vocabulary) -> tuple[Any, list[Tensor]]:
    """A `probe` whose layers behave so, and the ids that it was given."""
    table, calls = normal(vocabulary, 256, seed=9), []

    def probe(ids: Tensor, layers: Sequence[int]) -> dict[int, Prompt]:
        calls.append(ids)
        views = {}
        for layer in layers:
            query, keys = behaviours[layer](ids, table)
            every = torch.ones_like(ids, dtype=torch.bool)
            heads = query.unflatten(1, (4, 64)), keys.unflatten(2, (4, 64)).transpose(1, 2)
            columns = torch.arange(ids.shape[1]).expand_as(ids)
            views[layer] = Prompt(layer, INFO, *heads, ~every, every, columns, torch.full_like(ids, -1))
        return views

    return probe, calls


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 13])
@pytest.mark.parametrize("pool", POOLS)
def test_the_first_layer_that_finds_what_followed(kernel_size: int, pool: Any) -> None:
    layers = [noise, same, recent, induction, noise, induction]
    kernel_size = kernel_size if pool else 1
    method = GemFilter(layer="auto", kernel_size=kernel_size, pool=pool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method.filter_layer(INFO, model_of(layers)[0]) == 3
        assert GemFilter(kernel_size=kernel_size, pool=pool).filter_layer(INFO, model_of(layers)[0]) == 3
        assert method.filter_layer(INFO, model_of([induction, *layers[1:]])[0]) == 0


@pytest.mark.parametrize("vocabulary", [24, 97, 2**15])
def test_probe_prompts(vocabulary: int) -> None:
    info = info_of(vocabulary=vocabulary)
    seen = []
    for _ in range(2):
        torch.rand(3)  # the global generator plays no part
        probe, calls = model_of([noise] * 5 + [induction], vocabulary)
        GemFilter(layer="auto").filter_layer(info, probe)
        assert len(calls) == 1
        seen.append(calls[0])
    assert torch.equal(*seen)
    ids = seen[0]
    assert ids.dtype == torch.int64
    assert ids.shape[1] == 256
    assert ids.min() >= min(16, vocabulary // 8)
    assert ids.max() < vocabulary - vocabulary // 16
    for row in ids.tolist():
        cue = row[-3:]
        places = [i for i in range(253) if row[i : i + 3] == cue]
        assert len(places) == 1
        assert all(row.count(one) == 2 for one in cue)
        follows = row[places[0] + 3 : places[0] + 6]
        assert all(row.count(one) == 1 for one in follows)


@pytest.mark.parametrize(("depth", "guess"), [(1, 0), (2, 1), (6, 3), (32, 13), (40, 17), (80, 34)])
@pytest.mark.parametrize("vocabulary", [0, 3, 500])
def test_a_guess_says_so(depth: int, guess: int, vocabulary: int) -> None:
    probe, _ = model_of([noise] * depth)
    with pytest.warns(UserWarning, match=rf"layer {guess} of {depth} is a guess. Pass layer="):
        assert GemFilter().filter_layer(info_of(depth=depth, vocabulary=vocabulary), probe) == guess


def test_find_filter_layer() -> None:
    ids = torch.arange(40).repeat(5, 1)
    ids[:, -1] = torch.tensor([3, 9, 14, 20, 27])
    spans = [(i + 1, i + 2) for i in ids[:, -1].tolist()]
    probe, calls = model_of([same, induction, induction, same, same, same])

    def find(**changes: Any) -> int | None:
        arguments = {"prompts": ids, "needle_spans": spans, "k": 1, "kernel_size": 1, **changes}
        return covering_layer(probe, INFO, **arguments)

    assert find() == 1
    assert len(calls) == 1
    assert find(k=0.02, pool=None) == 1
    assert find(needle_spans=[(i - 1, i + 1) for i, _ in spans]) is None
    assert find(needle_spans=[(i - 1, i) for i, _ in spans]) == 0  # the last token is like it as well, but later
    wrong = [*spans[:4], (0, 1)]
    assert find(needle_spans=wrong) is None
    assert find(needle_spans=wrong, share=0.8) == 1
    for changes in ({"needle_spans": spans[:4]}, {"needle_spans": [*spans[:4], (3, 3)]}, {"share": 0}, {"k": 0}):
        with pytest.raises(InvalidParameterError, match=next(iter(changes))):
            find(**changes)
    with pytest.raises(InvalidParameterError, match=r"needle_spans\[4\]=\(3, 41\): expected 0 <= start < stop <= 40"):
        find(needle_spans=[*spans[:4], (3, 41)])


def test_find_filter_layer_on_a_model() -> None:
    """On the bundled needle model: the layer that looks up names, by its own kind of prompt and by the probes."""
    from tokred.data.needles import NeedleContexts
    from tokred.zoo import needle_llm

    model, _ = needle_llm()
    batch = NeedleContexts("val", 5, tokens=256, needles=8, questions=1).batch(0, 12)
    prompts = batch.prompts()
    spans = [(start + 2, stop - 1) for start, stop in batch.answer_spans().tolist()]  # NAME is VALUE
    before = {name: type(module) for name, module in model.named_modules()}
    assert tokred.vlm.find_filter_layer(model, prompts, spans, 32) == 1
    assert tokred.vlm.find_filter_layer(model, prompts, spans, 1) is None
    assert {name: type(module) for name, module in model.named_modules()} == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tokred.patch(model, GemFilter(32)) as patch:
            model.generate(prompts[:1], max_new_tokens=1, do_sample=False)
            assert patch.trace.prompt[0].layer == 1
