"""Standard errors of rows that chance decides, and records that are not there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import tokred
from tokred.core.errors import InvalidParameterError
from tokred.eval import needle_eval, vqa
from tokred.eval.records import Records
from tokred.eval.vqa_formats import Question
from tokred.eval.vqa_media import Picture
from tokred.eval.vqa_metrics import joined
from tokred.eval.vqa_rows import EvalRow


def together(*groupings: list[int]) -> list[set[int]]:
    """The clusters, by merging until nothing changes."""
    clusters = [{i} for i in range(len(groupings[0]))]
    for grouping in groupings:
        clusters += [{i for i, other in enumerate(grouping) if other == number} for number in set(grouping)]
    while True:
        pair = next(((a, b) for a in clusters for b in clusters if a is not b and a & b), None)
        if pair is None:
            return clusters
        clusters = [one for one in clusters if one is not pair[0] and one is not pair[1]] + [pair[0] | pair[1]]


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1)))
def test_joined_groups(groupings):
    found = joined(*(torch.tensor(one) for one in groupings))
    assert found.dtype == torch.int64
    parts = {frozenset((found == number).nonzero().flatten().tolist()) for number in found.tolist()}
    assert parts == {frozenset(one) for one in together(*groupings)}


def error(scores: list[float], clusters: list[set[int]]) -> float:
    """Of the mean of clustered observations (`tokred.eval.vision.mean`)."""
    average = sum(scores) / len(scores)
    sums = [sum(scores[i] - average for i in one) for one in clusters]
    return (len(sums) / (len(sums) - 1) * sum(one**2 for one in sums)) ** 0.5 / len(scores)


def prepared(tmp_path: Path, pictures: list[str | None], batch: int) -> tuple[vqa._Run, vqa.VqaOptions]:
    """A run whose questions are about these pictures, None for text alone, with answers at random."""
    questions = [
        Question(str(i), "Q", None if name is None else Picture(name, lambda: None), ("yes",), group=name or "")
        for i, name in enumerate(pictures)
    ]
    method = tokred.RandomTokens(budget=36)
    rows = [EvalRow("unpatched"), EvalRow("random_tokens", method, {}, method.to_dict())]
    made = vqa._Run(None, "image", questions, rows, "", 1, 1, 1, None, False, {})
    chance = random.Random(0)
    for row in rows:
        with Records(tmp_path, row.key) as records:
            records.append(
                {"key": one.id, "answer": chance.choice(("yes", "no")), "tokens": 1, "read": 1, "seconds": 1}
                for one in questions
            )
    return made, vqa.VqaOptions("gqa", tmp_path, model="m", batch=batch)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_errors_of_rows_by_chance(tmp_path, batch):
    """Questions about one picture depend on each other, and those of a batch; text alone makes batches of its own."""
    pictures = [None, *"aabbbc", None, *"deeff", None, *"gghij"]
    made, options = prepared(tmp_path, pictures, batch)
    assert made.rows[1].random
    plain, by_chance = vqa._measured(made, options, 1)
    order = [i for i, name in enumerate(pictures) if name is not None]
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    blind = [i for i, name in enumerate(pictures) if name is None]
    parts += [blind[i : i + batch] for i in range(0, len(blind), batch)]
    number = {i: n for n, part in enumerate(parts) for i in part}
    names = [name or f"none {i}" for i, name in enumerate(pictures)]
    alone = together([sorted(set(names)).index(name) for name in names])
    shared = together(
        [sorted(set(names)).index(name) for name in names], [number[i] for i in range(len(pictures))]
    )  # fmt: skip
    assert len(shared) < len(alone) or batch == 1
    for row, one, clusters in ((made.rows[0], plain, alone), (made.rows[1], by_chance, shared)):
        with Records(tmp_path, row.key) as records:
            scores = [float(records.done[str(i)]["answer"] == "yes") for i in range(len(pictures))]
        assert one["metrics"]["accuracy"]["value"] == pytest.approx(sum(scores) / len(scores))
        if len(clusters) > 1:
            assert one["metrics"]["accuracy"]["se"] == pytest.approx(error(scores, clusters))


def test_lacking_records_are_told(tmp_path):
    """--out of this machine alone: the records of others are not in it."""
    made, options = prepared(tmp_path, ["a", "b"], 1)
    (file,) = (tmp_path / "records").glob("unpatched*")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(InvalidParameterError, match="lacks 1 of 2 records of a row, those of other processes: --out"):
        vqa._measured(made, options, 2)
    case = needle_eval.Case("c", "P", (0, 1), ("a",), {}, 1)
    asked = needle_eval.NeedleOptions(tmp_path)
    with pytest.raises(InvalidParameterError, match="lacks 1 of 1 records of a row, those of other processes: --out"):
        needle_eval._measured(asked, None, [EvalRow("unpatched")], [case], 2)
