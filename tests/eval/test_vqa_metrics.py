"""Metrics of question answering: hand-made cases of each definition, and slow definitions beside fast ones."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.eval import longbench
from tokred.eval.longbench import LongQuestion, common_subsequence, judge_long, rouge_1, rouge_l, word_f1
from tokred.eval.vqa import judge, summary
from tokred.eval.vqa_formats import Question
from tokred.eval.vqa_metrics import (
    anls,
    choice,
    gqa_answer,
    group_numbers,
    levenshtein,
    mme_answer,
    mme_scores,
    normalise_textvqa,
    normalise_vqa,
    ratio,
    share,
    vqa_accuracy,
    yes_no,
    yes_no_metrics,
)

WORDS = st.text("abc", max_size=7)


# -- VQA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("The Dog", "dog"),
        ("two dogs.", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("3.5", "3.5"),
        ("Mr. Smith", "mr smith"),
        ("100,978", "100978"),
        ("red,green", "red green"),
        ("red, green", "red green"),
        ("black/white", "black white"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("whod've", "who'd've"),
        ("twas whatre", "'twas what're"),
        ("its", "its"),
        ("a  man\tand\nan apple", "man and apple"),
        ("", ""),
    ],
)
def test_vqa_normalises_by_its_definition(said: str, normal: str) -> None:
    assert normalise_vqa(said) == normal
    assert normalise_vqa(normal) == normal


def test_textvqa_sets_apart_what_vqa_does_not() -> None:
    assert normalise_textvqa("Dave's") == "dave 's"
    assert normalise_vqa("Dave's") == "dave's"
    assert normalise_textvqa("red,green?") == "redgreen"


def leave_one_out(answer: str, annotated: list[str]) -> float:
    parts = []
    for i in range(len(annotated)):
        others = annotated[:i] + annotated[i + 1 :]
        parts.append(min(sum(one == answer for one in others) / 3, 1))
    return sum(parts) / len(parts)


@given(st.sampled_from("ab"), st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_vqa_accuracy_is_the_mean_over_annotators_left_out(answer: str, annotated: list[str]) -> None:
    assert vqa_accuracy(answer, annotated) == pytest.approx(leave_one_out(answer, annotated))


def test_vqa_accuracy_of_ten() -> None:
    for agreeing, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert vqa_accuracy("yes", ["yes"] * agreeing + ["no"] * (10 - agreeing)) == pytest.approx(expected)
    with pytest.raises(InvalidParameterError, match="at least two"):
        vqa_accuracy("yes", ["yes"])


# -- words -------------------------------------------------------------------------------------------------------------


def test_gqa_and_yes_no() -> None:
    assert gqa_answer(" On the  Left. ") == gqa_answer("on the left")
    assert gqa_answer("left") != gqa_answer("on the left")
    assert [yes_no(text) for text in ("Yes", "No, it is", "There is not. Yes", "A dog. No")] == [
        "yes",
        "no",
        "no",
        "yes",
    ]
    assert [mme_answer(text) for text in ("Yes.", " no", "Nope", "maybe yes", "1")] == ["yes", "no", "no", None, None]


@pytest.mark.parametrize(
    ("said", "which"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B. cat", 1), ("B) cat", 1), ("The answer is C.", 2), ("answer: (d)", 3),
        ("cat", 1), ("A fish.", 2), ("A", 0), ("A.", 0), ("a dog", 0), ("I would say D here", 3), ("it is a cat", 1),
        ("it is A or B", None), ("nothing fits", None), ("", None), ("a dog and a cat", None),
    ],
)  # fmt: skip
def test_choice_reads_letters_and_texts(said: str, which: int | None) -> None:
    assert choice(said, ["A. a dog", "B. cat", "C. A fish", "D. none of these"]) == which


@functools.cache
def slow_distance(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        slow_distance(first[1:], second) + 1,
        slow_distance(first, second[1:]) + 1,
        slow_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@given(WORDS, WORDS)
def test_levenshtein(first: str, second: str) -> None:
    assert levenshtein(first, second) == slow_distance(first, second)


def test_anls() -> None:
    assert anls("Paris", ["paris", "Rome"]) == 1
    assert anls("1000 USD", ["$1000"]) == 0  # 5 of 8 characters differ
    assert anls("abcd", ["abcx"]) == 0.75
    assert anls("ab", ["ax"]) == 0.5  # the threshold itself counts
    assert anls("abc", ["axy"]) == 0  # two of three differ
    assert anls("abc", ["axy", "abd"]) == pytest.approx(2 / 3)
    assert anls("a  b", ["A B"]) == 1
    assert anls("", [""]) == 1


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_yes_no_metrics_by_hand() -> None:
    said, right = ["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"]
    found = yes_no_metrics(said, right)  # 2 hits, 1 false alarm, 1 miss, 1 right no
    values = {name: one.value for name, one in found.items()}
    assert values == pytest.approx(
        {"F1": 2 / 3, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "yes ratio": 3 / 5}
    )
    assert next(iter(found)) == "F1"
    assert math.isnan(yes_no_metrics(["no"], ["yes"])["precision"].value)


def test_the_error_of_a_ratio_is_that_of_a_mean_where_it_is_one() -> None:
    above = torch.tensor([1.0, 0, 1, 1, 0, 1])
    plain, mean = ratio(above, torch.ones(6)), share(above)
    assert plain == pytest.approx(mean)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    assert ratio(above, torch.ones(6), groups) == pytest.approx(share(above, groups))


def test_the_error_of_a_ratio_is_near_that_of_leaving_groups_out() -> None:
    generator = torch.Generator().manual_seed(0)
    below = torch.randint(1, 4, (400,), generator=generator).double()
    above = (torch.rand(400, generator=generator) * below).round()
    groups = torch.arange(400) // 4
    found = ratio(above, below, groups)
    left_out = torch.tensor([ratio(above[groups != g], below[groups != g]).value for g in range(100)])
    jackknife = (99 / 100 * (left_out - left_out.mean()).square().sum()).sqrt().item()
    assert found.error == pytest.approx(jackknife, rel=0.05)


def test_mme_scores_by_hand() -> None:
    tasks = ["existence"] * 4 + ["code_reasoning"] * 2
    images = ["1", "1", "2", "2", "3", "3"]
    found = mme_scores([True, True, True, False, False, True], tasks, images)
    assert found["existence"].value == pytest.approx(75 + 50)
    assert found["existence accuracy+"].value == pytest.approx(0.5)
    assert found["code_reasoning"].value == pytest.approx(50 + 0)
    assert found["perception"].value == pytest.approx(125)
    assert found["cognition"].value == pytest.approx(50)
    assert found["total"].value == pytest.approx(175)
    assert found["accuracy"].value == pytest.approx(4 / 6)
    assert next(iter(found)) == "perception"
    whole = mme_scores([True] * 4, ["count"] * 4, ["1", "1", "2", "2"])
    assert (whole["count"].value, whole["count"].error) == pytest.approx((200, 0))


def test_groups_number_names() -> None:
    assert group_numbers(["b", "a", "b"]).tolist() == [0, 1, 0]


# -- each benchmark, from answers to the numbers of the table ----------------------------------------------------------


def question(answers: tuple[str, ...], options: tuple[str, ...] = (), group: str = "", **kinds: str) -> Question:
    return Question("1", "?", None, answers, options, group, {key.replace("_", " "): v for key, v in kinds.items()})


ONE_OF_TEN = (*["2"] * 3, *["two dogs"] * 2, *["3"] * 5)


@pytest.mark.parametrize(
    ("name", "said", "asked", "score"),
    [
        ("vqav2", "Two.", question(ONE_OF_TEN), 0.9),
        ("vqav2", "the 2 dogs", question(ONE_OF_TEN), 0.6),
        ("vqav2", "3", question(ONE_OF_TEN), 1),
        ("vqav2", "4", question(ONE_OF_TEN), 0),
        ("textvqa", "Dave's, cafe?", question(("dave 's cafe",) * 3 + ("no",) * 7), 0.9),
        ("gqa", "Left.", question(("left",)), 1),
        ("gqa", "the left", question(("left",)), 0),
        ("pope", "No, there is none.", question(("no",)), 1),
        ("pope", "I see it", question(("yes",)), 1),
        ("mme", "Yes, it is", question(("yes",)), 1),
        ("mme", "It is, yes", question(("yes",)), 0),
        ("scienceqa", "The answer is B.", question(("fire",), ("ice", "fire")), 1),
        ("scienceqa", "ice", question(("fire",), ("ice", "fire")), 0),
        ("scienceqa", "C", question(("fire",), ("ice", "fire")), 0),
        ("docvqa", "$ 1,000", question(("$1,000", "1000")), 1 - 1 / 7),
        ("docvqa", "none", question(("$1,000",)), 0),
        ("videomme", "(C)", question(("C. z",), ("A. x", "B. y", "C. z")), 1),
        ("mlvu", "y", question(("y",), ("x", "y")), 1),
    ],
)
def test_benchmarks_judge_an_answer(name: str, said: str, asked: Question, score: float) -> None:
    assert judge(name, said, asked) == pytest.approx(score)


def summed(name: str, pairs: Sequence[tuple[str, Question]]) -> dict[str, float]:
    answers, questions = [said for said, _ in pairs], [asked for _, asked in pairs]
    scores = torch.tensor([judge(name, *pair) for pair in pairs], dtype=torch.float64)
    found = summary(name, questions, answers, scores, torch.arange(len(pairs)))
    return {key: one.value for key, one in found.items()}


def test_pope_of_each_file() -> None:
    told = [
        ("yes", "yes", "random"), ("yes", "no", "random"), ("no", "no", "random"), ("no", "no", "random"),
        ("yes", "yes", "popular"), ("no", "yes", "popular"),
    ]  # fmt: skip
    found = summed("pope", [(said, question((right,), objects=kind)) for said, right, kind in told])
    assert found == pytest.approx(
        {
            "F1": 2 * 2 / (3 + 3), "accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "yes ratio": 3 / 6,
            "random F1": 2 / 3, "random accuracy": 3 / 4, "random precision": 1 / 2, "random recall": 1,
            "random yes ratio": 1 / 2, "popular F1": 2 / 3, "popular accuracy": 1 / 2, "popular precision": 1,
            "popular recall": 1 / 2, "popular yes ratio": 1 / 2,
        }
    )  # fmt: skip
    assert list(found)[:7] == ["F1", "accuracy", "precision", "recall", "yes ratio", "popular F1", "random F1"]


def test_benchmarks_are_split_as_papers_split_them() -> None:
    letters = ("x", "y")
    mlvu = [("A", "count"), ("A", "count"), ("B", "order")]
    found = summed("mlvu", [(said, question(("x",), letters, task=task)) for said, task in mlvu])
    assert found == pytest.approx({"M-Avg": (1 + 0) / 2, "accuracy": 2 / 3, "count": 1, "order": 0})

    video = [("A", "short"), ("B", "short"), ("A", "long")]
    found = summed("videomme", [(said, question(("x",), letters, duration=kind)) for said, kind in video])
    assert found == pytest.approx({"accuracy": 2 / 3, "short": 1 / 2, "long": 1})

    asked = [question(("x",), letters, context="image", subject="NAT"), question(("x",), letters, context="none")]
    found = summed("scienceqa", [("A", asked[0]), ("B", asked[1])])
    assert found == pytest.approx({"accuracy": 1 / 2, "context image": 1, "context none": 0, "subject NAT": 1})

    vqa = [("3", question(ONE_OF_TEN, answer_type="number")), ("2", question(ONE_OF_TEN, answer_type="other"))]
    assert summed("vqav2", vqa) == pytest.approx({"accuracy": 0.95, "number": 1, "other": 0.9})
    assert summed("docvqa", [("ab", question(("ax", "abc")))]) == pytest.approx({"ANLS": 2 / 3})

    mme = [("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "yes")]
    pairs = [
        (said, Question(str(i), "?", None, (right,), group=str(i // 2), kinds={"sub-task": "OCR"}))
        for i, (said, right) in enumerate(mme)
    ]
    found = summed("mme", pairs)  # three of four, one of two pictures
    assert found["perception"] == found["OCR"] == pytest.approx(75 + 50)
    assert found["OCR accuracy+"] == pytest.approx(0.5)


# -- LongBench ---------------------------------------------------------------------------------------------------------


def slow_subsequence(first: str, second: str) -> int:
    """Every subsequence of the first that is one of the second."""

    def within(part: tuple[str, ...]) -> bool:
        rest = iter(second)
        return all(letter in rest for letter in part)

    sizes = range(len(first), -1, -1)
    return next(size for size in sizes if any(within(part) for part in itertools.combinations(first, size)))


@given(WORDS, WORDS)
def test_longest_common_subsequence(first: str, second: str) -> None:
    assert common_subsequence(list(first), list(second)) == slow_subsequence(first, second)


def test_scores_of_texts_by_hand() -> None:
    assert word_f1("The cat, sat.", "a cat") == pytest.approx(2 * 0.5 / 1.5)  # cat sat / cat
    assert word_f1("x", "y") == 0
    assert rouge_1("b a", "a b") == 1
    assert rouge_l("b a", "a b") == 0.5
    assert rouge_l("the cat sat on the mat", "the cat is on the mat") == pytest.approx(5 / 6)
    assert rouge_l("", "a") == 0


def test_longbench_judges_each_data_set_by_its_metric() -> None:
    def score(dataset: str, said: str, *right: str, classes: tuple[str, ...] = ()) -> float:
        return judge_long(said, LongQuestion("1", dataset, "", "", right, classes))

    assert score("hotpotqa", "Paris", "Rome", "paris") == 1
    assert score("gov_report", "b a", "a b") == 0.5
    assert score("triviaqa", "\nParis\nRome is not", "paris") == 1  # the first line counts
    assert score("trec", "Date", "Date", classes=("Date", "City")) == 1
    assert score("trec", "Date or City", "Date", classes=("Date", "City")) == 0.5
    assert score("trec", "City in general", "City in general", classes=("City", "City in general")) == 1
    assert score("trec", "City", "Date", classes=("Date", "City")) == 0
    assert score("passage_count", "7 or 8", "7") == 0.5
    assert score("passage_count", "none", "7") == 0
    assert score("passage_retrieval_en", "Paragraph 12", "Paragraph 12") == 1
    assert score("passage_retrieval_en", "Paragraph 1", "Paragraph 12") == 0
    assert score("lcc", "# a comment\nreturn x", "return x") == 1
    assert set(longbench._METRICS) | {"accuracy"} == {one.metric for one in longbench.DATASETS.values()}
