"""`tokred.eval.runs`: methods as command lines write them, and rows that say what they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.core.errors import InvalidParameterError, UnknownMethodError, UnknownParameterError
from tokred.eval.runs import choose, drawn, parse_runs, redrawn
from tokred.eval.vqa_rows import EvalRow, make_rows, reported


def test_what_is_read() -> None:
    assert parse_runs(["tome"]) == [("tome", {})]
    layers = " zero-tprune  keep_rate=0.7 layers=(1, 3) "
    assert parse_runs([layers]) == [("zero_tprune", {"keep_rate": 0.7, "layers": (1, 3)})]
    assert parse_runs(["tome r=8|13 metric=none|k", "topk"]) == [
        ("tome", {"r": 8, "metric": None}), ("tome", {"r": 8, "metric": "k"}),
        ("tome", {"r": 13, "metric": None}), ("tome", {"r": 13, "metric": "k"}), ("topk", {}),
    ]  # fmt: skip
    assert parse_runs(["random_tokens counts={1: 5, 2: 4}"]) == [("random_tokens", {"counts": {1: 5, 2: 4}})]
    assert parse_runs([]) == []


names = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
values = st.one_of(st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.integers()))


@given(names, st.dictionaries(names, st.lists(values, min_size=1, max_size=3), max_size=3))
def test_whatever_is_written_is_read_again(name: str, parameters: dict[str, list[Any]]) -> None:
    text = " ".join([name, *(f"{key}={'|'.join(map(repr, own))}" for key, own in parameters.items())])
    slow: list[dict[str, Any]] = [{}]
    for key, own in parameters.items():
        slow = [{**chosen, key: value} for chosen in slow for value in own]
    assert parse_runs([text]) == [(name, chosen) for chosen in slow]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected METHOD KEY=VALUE"),
        ("tome r", "expected METHOD KEY=VALUE"),
        ("r=8", "expected METHOD KEY=VALUE"),
        ("hired:0.2:0.4,gemfilter:1024", "one method, and its parameters by name"),
        ("tome,topk", "say --method again for another"),
        ("tome r=", "r has no value"),
        ("tome r=8|", "r has no value"),
        ("tome r=8 r=13", "r is there twice; a bar parts values"),
    ],
)
def test_what_is_not(text: str, said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said.replace("|", r"\|")):
        parse_runs([text])


def test_methods_are_chosen_with_options_of_patch() -> None:
    label, method, options = choose(("topk", {"keep_rate": 0.5, "layers": (1, 3), "exit": "restore"}))
    assert label == "topk keep_rate=0.5 layers=(1,3) exit=restore"
    assert method == tokred.TopK(keep_rate=0.5, layers=(1, 3))
    assert options == {"exit": "restore"}
    with pytest.raises(UnknownMethodError, match="did you mean 'hired'"):
        choose(("hird", {}))
    with pytest.raises(UnknownParameterError, match="did you mean 'budget'"):
        choose(("hired", {"budgets": 0.2}))
    with pytest.raises(InvalidParameterError, match="processor is the model's own"):
        choose(("hired", {"processor": 1}))


def test_chance_is_drawn_anew_for_each_batch() -> None:
    for method in (tokred.RandomTokens(keep_rate=0.5, seed=3), tokred.ToMe(r=2, matching="random", seed=3)):
        assert drawn(method)
        assert redrawn(method, 4) == method.replace(seed=7)
    assert not drawn(tokred.ToMe(r=2))
    assert not drawn(None)
    assert redrawn(tokred.ToMe(r=2, seed=3), 4) == tokred.ToMe(r=2, seed=3)


# -- rows of vqa and needle --------------------------------------------------------------------------------------------


def rows(*texts: str) -> list[EvalRow]:
    return make_rows([choose(run) for run in parse_runs(texts)], ["hired", "fastv", "mustdrop", "quota"])


def test_rows() -> None:
    found = rows("hired budget=0.2|0.4", "hired budget=0.2", "mustdrop", "fastv layer=3 budget=36")
    assert [row.label for row in found] == [
        "unpatched", "hired budget=0.2", "hired budget=0.4", "mustdrop", "fastv layer=3 budget=36"
    ]  # fmt: skip
    assert [row.level for row in found] == [None, 0.2, 0.4, 192, 36]
    assert len({row.key for row in found}) == 5
    assert len({row.key for row in rows("hired budget=0.2", "hired budget=0.2 score_backend=matrix")}) == 3
    with pytest.raises(UnknownMethodError, match="does not fit this model; that fit: hired"):
        rows("gemfilter")


def test_papers_are_quoted_for_their_own_settings_only() -> None:
    def said(model: str, text: str, benchmark: str = "pope") -> list[float]:
        return [one["value"] for one in reported(model, benchmark, rows(text)[1])]

    next_7b = "llava-hf/llava-v1.6-vicuna-7b-hf"
    assert said(next_7b, "hired budget=0.2") == [87.0]
    assert said(next_7b, "hired budget=0.3") == []
    assert said(next_7b, "hired budget=0.2 alpha=0.3") == []
    assert said(next_7b, "hired budget=0.2 score_backend=matrix") == []
    assert said("llava-hf/llava-1.5-7b-hf", "mustdrop") == [82.6]
    assert said("llava-hf/llava-1.5-7b-hf", "fastv budget=128") == [59.6]
    assert said("llava-hf/llava-1.5-7b-hf", "fastv budget=128 layer=3") == []
    assert said("digit-vlm", "hired budget=0.2") == []
    (plain,) = (row for row in rows("hired budget=0.2") if row.method is None)
    assert [one["value"] for one in reported(next_7b, "pope", plain, ["hired"])] == [87.6]
