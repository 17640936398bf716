"""Parameters of every vision encoder method: defaults, JSON, and errors that name field, value and range."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tests.methods.models import images, tiny
from tokred.vision.zero_tprune import PRESETS

METHODS = [tokred.ToMe, tokred.TopK, tokred.ZeroTPrune, tokred.RandomTokens]

DEFAULTS = {
    tokred.ToMe: {
        "r": 8, "ratio": None, "prop_attn": True, "weighted_pool": True, "metric": "key", "matching": "bipartite",
        "k": 2, "order": "official", "seed": 0,
    },
    tokred.TopK: {"keep_rate": 0.7, "layers": None, "score": "cls", "fuse": False},
    tokred.ZeroTPrune: {
        "keep_rate": 0.7, "preset": None, "schedule": None, "flops": None, "layers": None, "iterations": None,
        "cls_boost": "sqrt", "boosted": None, "order": "SI", "partition": "sequential_u", "feature": "key",
        "similarity": "cosine", "vhf": (0.01, 0.7), "var_norm": "mean1", "eir": True, "renorm": True, "damping": 0.0,
        "tau_imp": 1.0, "tol": None, "hook": "block", "seed": 0,
    },
    tokred.RandomTokens: {
        "keep_rate": 0.7, "budget": None, "counts": None, "layers": None, "where": "attn", "seed": 0,
        "positions": None, "keep_newline": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_defaults(method: Any) -> None:
    assert dataclasses.asdict(method()) == DEFAULTS[method]
    assert method().default_layers == (1, 3, 6, 9) if method is tokred.ZeroTPrune else True
    assert tokred.from_dict({"method": method.name}) == method()


# -- JSON ------------------------------------------------------------------------------------------------------------

fractions = st.floats(0.01, 1.0)
blocks = st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).map(sorted)
counts = st.integers(0, 40)
inflections = st.floats(-1, 1)

tome = st.fixed_dictionaries(
    {},
    optional={
        "r": counts | st.lists(counts, min_size=1, max_size=14) | st.tuples(counts, inflections | st.integers(-1, 1)),
        "ratio": st.floats(0.01, 0.5),
        "prop_attn": st.booleans(),
        "weighted_pool": st.booleans(),
        "metric": st.sampled_from(["key", "key_concat", "query", "value", "x"]),
        "matching": st.sampled_from(["bipartite", "kth", "random"]),
        "k": st.integers(2, 9),
        "order": st.sampled_from(["official", "ascending"]),
        "seed": st.integers(0, 2**40),
    },
).map(lambda options: tokred.ToMe(**options))

topk = st.one_of(
    st.builds(tokred.TopK, fractions, st.none() | blocks, st.sampled_from(["cls", "mass"]), st.booleans()),
    blocks.flatmap(
        lambda layers: st.lists(fractions, min_size=len(layers), max_size=len(layers)).map(
            lambda rates: tokred.TopK(rates, layers)
        )
    ),
)

entries = st.tuples(counts, fractions) | st.tuples(counts, fractions, st.integers(1, 50))
amounts = st.one_of(
    st.fixed_dictionaries({"keep_rate": fractions, "layers": st.none() | blocks}),
    st.fixed_dictionaries({"preset": st.sampled_from(sorted(PRESETS))}),
    st.fixed_dictionaries({"schedule": st.dictionaries(st.integers(0, 30), entries | entries.map(list), min_size=1)}),
    st.fixed_dictionaries({"flops": fractions | st.integers(10**6, 10**12)}),
    st.just({}),
)
others = st.fixed_dictionaries(
    {},
    optional={
        "iterations": st.none() | st.integers(1, 50),
        "cls_boost": st.sampled_from(["sqrt", "none", "half_n"]),
        "boosted": st.none() | st.lists(st.integers(0, 4), unique=True),
        "order": st.sampled_from(["SI", "IS"]),
        "partition": st.sampled_from(["sequential_u", "sequential_i", "alternate", "random", "none"]),
        "feature": st.sampled_from(["key", "key_mean", "query", "value", "x_before", "x_after"]),
        "similarity": st.sampled_from(["cosine", "dot", "l1", "l2", "minkowski3", "linf"]),
        "vhf": st.none() | st.tuples(st.floats(0, 0.5), st.floats(0.5, 9)) | st.just([0, 1]),
        "var_norm": st.sampled_from(["mean1", "none"]),
        "eir": st.booleans(),
        "renorm": st.booleans(),
        "damping": st.floats(0, 0.9),
        "tau_imp": st.floats(0.1, 4),
        "tol": st.none() | st.floats(1e-9, 1),
        "hook": st.sampled_from(["block", "attn"]),
        "seed": st.integers(0, 2**40),
    },
)
zero_tprune = st.tuples(amounts, others).map(lambda parts: tokred.ZeroTPrune(**parts[0], **parts[1]))

random_tokens = st.tuples(
    st.one_of(
        st.fixed_dictionaries({"keep_rate": fractions}),
        st.fixed_dictionaries({"budget": fractions | st.integers(1, 999)}),
        st.fixed_dictionaries({"counts": st.dictionaries(st.integers(0, 30), st.integers(1, 999), min_size=1)}),
    ),
    st.none() | blocks,
    st.sampled_from(["attn", "block"]),
    st.integers(0, 2**40),
).map(lambda parts: tokred.RandomTokens(**parts[0], layers=parts[1], where=parts[2], seed=parts[3]))


@given(st.one_of(tome, topk, zero_tprune, random_tokens))
def test_a_method_survives_json_copies_and_pickle(method: Any) -> None:
    text = json.dumps(method.to_dict(), allow_nan=False)
    again = tokred.from_dict(json.loads(text))
    assert type(again) is type(method)
    assert again == method
    assert hash(again) == hash(method)
    assert json.dumps(again.to_dict()) == text
    assert json.loads(text)["method"] == method.name
    assert copy.deepcopy(method) == method == pickle.loads(pickle.dumps(method)) == method.replace()
    assert eval(repr(method), {type(method).__name__: type(method)}) == method


def test_the_round_trip_is_not_trivial() -> None:
    a, b = tokred.ToMe(r=(8, -1)), tokred.ToMe(r=[8, 1])
    assert tokred.from_dict(json.loads(json.dumps(a.to_dict()))) != b
    assert a.to_dict()["r"] == [8, -1.0]
    assert b.to_dict()["r"] == [8, 1, 0]


# -- errors ----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (tokred.ToMe, {"r": -1}, "integer >= 0"),
    (tokred.ToMe, {"r": 1.5}, "integer >= 0"),
    (tokred.ToMe, {"r": True}, "integer >= 0"),
    (tokred.ToMe, {"r": "8"}, "integer >= 0"),
    (tokred.ToMe, {"r": [3, -2, 1]}, "integer >= 0"),
    (tokred.ToMe, {"r": [8, 1.5]}, r"\[-1, 1\]"),
    (tokred.ToMe, {"r": []}, "a count, a list of counts"),
    (tokred.ToMe, {"ratio": 0.0}, r"\(0, 1\]"),
    (tokred.ToMe, {"ratio": 0.6}, "half"),
    (tokred.ToMe, {"metric": "keys"}, "'key', 'key_concat'"),
    (tokred.ToMe, {"matching": "hungarian"}, "'bipartite', 'kth', 'random'"),
    (tokred.ToMe, {"k": 1}, "integer >= 2"),
    (tokred.ToMe, {"order": "spatial"}, "'official', 'ascending'"),
    (tokred.ToMe, {"seed": -1}, "integer >= 0"),
    (tokred.TopK, {"keep_rate": 0}, r"\(0, 1\]"),
    (tokred.TopK, {"keep_rate": 1.1}, r"\(0, 1\]"),
    (tokred.TopK, {"keep_rate": "0.7"}, r"\(0, 1\]"),
    (tokred.TopK, {"keep_rate": float("nan")}, r"\(0, 1\]"),
    (tokred.TopK, {"keep_rate": [0.5, 2.0, 0.5]}, r"\(0, 1\]"),
    (tokred.TopK, {"layers": 3}, "sequence of 0-based"),
    (tokred.TopK, {"layers": []}, "sequence of 0-based"),
    (tokred.TopK, {"layers": (6, 3)}, "ascend"),
    (tokred.TopK, {"layers": (3, 3)}, "ascend"),
    (tokred.TopK, {"layers": (-1,)}, "integer >= 0"),
    (tokred.TopK, {"score": "mean"}, "'cls', 'mass'"),
    (tokred.ZeroTPrune, {"keep_rate": 1.2}, r"\(0, 1\]"),
    (tokred.ZeroTPrune, {"preset": "deit_s_3g"}, "known: deit_s_3.08g"),
    (tokred.ZeroTPrune, {"schedule": {}}, "block: "),
    (tokred.ZeroTPrune, {"schedule": {1: 0.5}}, r"\(r_S, keep\)"),
    (tokred.ZeroTPrune, {"schedule": {1: (10, 1.5)}}, r"\(0, 1\]"),
    (tokred.ZeroTPrune, {"schedule": {1: (-1, 0.5)}}, "integer >= 0"),
    (tokred.ZeroTPrune, {"schedule": {1: (1, 0.5, 0)}}, "integer >= 1"),
    (tokred.ZeroTPrune, {"schedule": {-1: (1, 0.5)}}, "integer >= 0"),
    (tokred.ZeroTPrune, {"flops": 0}, "fraction up to 1"),
    (tokred.ZeroTPrune, {"flops": "3G"}, "fraction up to 1"),
    (tokred.ZeroTPrune, {"flops": float("nan")}, "fraction up to 1"),
    (tokred.ZeroTPrune, {"layers": "13"}, "sequence of 0-based"),
    (tokred.ZeroTPrune, {"iterations": 0}, "integer >= 1"),
    (tokred.ZeroTPrune, {"cls_boost": "cls"}, "'sqrt', 'none', 'half_n'"),
    (tokred.ZeroTPrune, {"boosted": 1}, "sequence of token positions"),
    (tokred.ZeroTPrune, {"boosted": (-1,)}, "integer >= 0"),
    (tokred.ZeroTPrune, {"order": "ISI"}, "'SI', 'IS'"),
    (tokred.ZeroTPrune, {"partition": "seq-u"}, "'sequential_u'"),
    (tokred.ZeroTPrune, {"feature": "keys"}, "'key', 'key_mean'"),
    (tokred.ZeroTPrune, {"similarity": "cos"}, "'cosine', 'dot'"),
    (tokred.ZeroTPrune, {"vhf": (0.7, 0.01)}, "low <= high"),
    (tokred.ZeroTPrune, {"vhf": (0.1,)}, "low <= high"),
    (tokred.ZeroTPrune, {"vhf": 0.5}, "low <= high"),
    (tokred.ZeroTPrune, {"vhf": "ab"}, "low <= high"),
    (tokred.ZeroTPrune, {"var_norm": "max"}, "'mean1', 'none'"),
    (tokred.ZeroTPrune, {"damping": 1.0}, r"\[0, 1\)"),
    (tokred.ZeroTPrune, {"damping": "0"}, r"\[0, 1\)"),
    (tokred.ZeroTPrune, {"tau_imp": 0}, "positive"),
    (tokred.ZeroTPrune, {"tau_imp": "1"}, "positive"),
    (tokred.ZeroTPrune, {"tol": -1e-3}, "positive"),
    (tokred.ZeroTPrune, {"hook": "post_attn"}, "'block', 'attn'"),
    (tokred.ZeroTPrune, {"seed": 0.5}, "integer >= 0"),
    (tokred.RandomTokens, {"keep_rate": -0.1}, r"\(0, 1\]"),
    (tokred.RandomTokens, {"budget": 0}, "number of tokens >= 1"),
    (tokred.RandomTokens, {"budget": 1.5}, "number of tokens >= 1"),
    (tokred.RandomTokens, {"budget": float("inf")}, "number of tokens >= 1"),
    (tokred.RandomTokens, {"counts": {1: 0}}, "integer >= 1"),
    (tokred.RandomTokens, {"counts": {-1: 5}}, "integer >= 0"),
    (tokred.RandomTokens, {"layers": [1, 0]}, "ascend"),
    (tokred.RandomTokens, {"where": "post"}, "'attn', 'block'"),
    (tokred.RandomTokens, {"seed": True}, "integer >= 0"),
    (tokred.RandomTokens, {"positions": "old"}, "'compact', 'original'"),
]


@pytest.mark.parametrize(
    ("method", "options", "allowed"),
    REFUSED,
    ids=[f"{m.name}-{next(iter(o))}-{n}" for n, (m, o, _) in enumerate(REFUSED)],
)
def test_values_outside_the_range_are_refused_by_name(method: Any, options: dict[str, Any], allowed: str) -> None:
    (field, value), *_ = options.items()
    inner = value
    if isinstance(value, (dict, list, tuple)) and value:  # the message may name the entry that is wrong
        inner = list(value.values()) if isinstance(value, dict) else list(value)
    with pytest.raises(tokred.TokredError, match=allowed) as caught:
        method(**options)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert field in message
    named = [repr(value), *(map(repr, inner) if isinstance(inner, list) else [])]
    named += [
        repr(part) for entry in (inner if isinstance(inner, list) else []) if isinstance(entry, tuple) for part in entry
    ]
    named += [repr(key) for key in value] if isinstance(value, dict) else []
    assert any(f"={text}" in message or f" {text}" in message for text in named), message


def test_every_field_has_a_refused_value() -> None:
    flags = {"prop_attn", "weighted_pool", "fuse", "eir", "renorm", "keep_newline"}
    for method in METHODS:
        tried = {next(iter(options)) for m, options, _ in REFUSED if m is method}
        assert {f.name for f in dataclasses.fields(method)} - flags == tried


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (tokred.ZeroTPrune, {"keep_rate": 0.7, "preset": "deit_s_3.08g"}),
        (tokred.ZeroTPrune, {"schedule": {1: (2, 0.5)}, "flops": 0.5}),
        (tokred.ZeroTPrune, {"schedule": {1: (2, 0.5)}, "layers": (1,)}),
        (tokred.RandomTokens, {"keep_rate": 0.7, "budget": 9}),
        (tokred.RandomTokens, {"budget": 9, "counts": {1: 3}}),
        (tokred.TopK, {"keep_rate": [0.5, 0.5], "layers": (1, 2, 3)}),
    ],
)
def test_fields_that_exclude_each_other(method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        method(**options)
    assert all(re.search(rf"\b{field}\b|layers", str(caught.value)) for field in options)


@pytest.mark.parametrize(
    ("method", "given", "meant"),
    [
        (tokred.ToMe, "R", "r"),
        (tokred.ToMe, "prop_attention", "prop_attn"),
        (tokred.ToMe, "metrics", "metric"),
        (tokred.TopK, "keeprate", "keep_rate"),
        (tokred.TopK, "layer", "layers"),
        (tokred.ZeroTPrune, "iters", "iterations"),
        (tokred.ZeroTPrune, "keep_rates", "keep_rate"),
        (tokred.ZeroTPrune, "clsboost", "cls_boost"),
        (tokred.RandomTokens, "sed", "seed"),
    ],
)
def test_an_unknown_parameter_suggests_the_nearest(method: Any, given: str, meant: str) -> None:
    calls = (
        lambda: method(**{given: 1}),
        lambda: tokred.from_dict({"method": method.name, given: 1}),
        lambda: tokred.patch(tiny(), method.name, **{given: 1}),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"{given!r}, did you mean {meant!r}"):
            call()


def test_an_unknown_method_suggests_the_nearest() -> None:
    for typed, meant in (
        ("tomee", "tome"),
        ("zerotprun", "zero_tprune"),
        ("top_k", "topk"),
        ("random", "random_tokens"),
    ):
        with pytest.raises(ValueError, match=f"{typed!r}, did you mean {meant!r}"):
            tokred.from_dict({"method": typed})
    for name in ("ToMe", "tome", "zero-tprune", "ZeroTPrune", "TopK", "RandomTokens"):
        assert tokred.from_dict({"method": name}).name in {"tome", "zero_tprune", "topk", "random_tokens"}


def test_blocks_that_the_model_lacks_are_refused() -> None:
    model = tiny()
    for method in (
        tokred.ToMe(r=[1] * 5),
        tokred.TopK(layers=(1, 4)),
        tokred.ZeroTPrune(layers=(4,), keep_rate=0.5),
        tokred.ZeroTPrune(schedule={4: (1, 0.5)}),
        tokred.ZeroTPrune(preset="deit_s_3.08g"),
        tokred.RandomTokens(layers=(9,)),
        tokred.RandomTokens(counts={4: 3}),
    ):
        with pytest.raises(ValueError, match=r"4"):
            tokred.patch(model, method)
    want = model(images())
    assert torch.equal(model(images()), want)
    assert not hasattr(model, "_tokred")


def test_default_blocks_are_used_as_far_as_the_model_has_them() -> None:
    model = tiny(depth=8)
    for method, layers in (
        (tokred.TopK(), [3, 6]), (tokred.RandomTokens(), [3, 6]), (tokred.ZeroTPrune(), [1, 3, 6]),
    ):  # fmt: skip
        with tokred.patch(model, method) as patch, torch.no_grad():
            model(images())
            assert [layer for layer, _ in patch.trace.counts] == layers
    with pytest.raises(ValueError, match="depth 3; pass layers="):
        tokred.patch(tiny(depth=3), tokred.TopK())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["class token", "no class token", "layer scale, q/k norm"])
def test_half_precision_runs_stay_finite(dtype: torch.dtype, kind: str) -> None:
    model, x = tiny(kind).to(dtype), images().to(dtype)
    methods = [
        tokred.ToMe(r=5),
        tokred.TopK(keep_rate=0.5, layers=(1, 2), score="mass"),
        tokred.ZeroTPrune(schedule={1: (4, 0.8), 2: (2, 0.5)}),
        tokred.RandomTokens(keep_rate=0.5),
    ]
    methods += [tokred.TopK(keep_rate=0.5, layers=(1,), fuse=True)] if kind != "no class token" else []
    for method in methods:
        with tokred.patch(model, method) as patch, torch.no_grad():
            y = model(x)
            assert len(patch.trace) > 0
        assert y.dtype == dtype
        assert y.isfinite().all()
        half = tiny(kind)
        with tokred.patch(half, method), torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert half(images()).isfinite().all()


def test_half_precision_sizes_stay_whole() -> None:
    model = tiny(img_size=160).to(torch.bfloat16)
    with tokred.patch(model, tokred.ToMe(r=[200, 100, 50, 25])) as patch, torch.no_grad():
        model(images(1, 160).to(torch.bfloat16))
        group = patch.trace[-1].group
        sizes = patch.trace._table.sizes
    assert sizes.dtype == torch.float32
    assert torch.equal(sizes, torch.zeros_like(sizes).scatter_add(1, group, torch.ones(group.shape)))
    assert sizes.sum() == 400


def test_a_preset_may_be_named_by_its_cost_alone() -> None:
    assert tokred.ZeroTPrune(preset="3.08G") == tokred.ZeroTPrune(preset="deit_s_3.08g")
