"""Metrics of question answering, written from their public definitions: how answers are normalised and judged.

Judges give one answer a score in [0, 1]; `share` and `ratio` give many of them a value and its standard error, where
questions about one image (or of one batch that shares a random choice) may depend on each other.
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.eval.vision import mean

__all__ = [
    "Metric",
    "anls",
    "choice",
    "gqa_answer",
    "group_numbers",
    "joined",
    "mme_answer",
    "mme_scores",
    "normalise_textvqa",
    "normalise_vqa",
    "ratio",
    "share",
    "vqa_accuracy",
    "yes_no",
    "yes_no_metrics",
]


class Metric(NamedTuple):
    """A number of a table and its standard error; fractions where `percent`, else points of the benchmark's own."""

    value: float
    error: float
    percent: bool = True


def share(scores: Tensor, groups: Tensor | None = None) -> Metric:
    """Mean of (N,) scores; the error is that of clusters where (N,) int64 `groups` are given (`vision.mean`)."""
    return Metric(*mean(scores, groups))


def ratio(above: Tensor, below: Tensor, groups: Tensor | None = None) -> Metric:
    """Sum of (N,) `above` over the sum of (N,) `below`: precision, recall, F1.

    The error is that of a ratio estimator, ``sqrt(G / (G - 1) sum_g e_g^2) / sum below`` with e_g the sum over a group
    of ``above - R below``. NaN where `below` sums to nothing.
    """
    total = below.double().sum().item()
    if total == 0:
        return Metric(math.nan, math.nan)
    value = above.double().sum().item() / total
    rest = mean(above.double() - value * below.double(), groups)
    return Metric(value, rest.error * len(below) / total)


# -- VQA accuracy ------------------------------------------------------------------------------------------------------

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
#: stems that take an ending with an apostrophe; left out are those that are words without it (its, were, wed, ill)
_ENDINGS = {
    "n't": "ai are could did does do had has have is might must need ought should was were would",
    "'ve": "could i might must not should they we what where who would you",
    "'re": "there they what why you",
    "'ll": "how it somebody someone something that there they what who why you",
    "'d": "he how it someone something there they what where who you",
    "'s": "he how that there what when where who why somebody someone everyone",
    "n't've": "could had might should would",
    "'d've": "he i it she somebody someone something there they we who you",
}


def _without_one(whole: str) -> set[str]:
    """A contraction that lacks an apostrophe, or two."""
    return {whole.replace("'", ""), *(whole[:i] + whole[i + 1 :] for i, letter in enumerate(whole) if letter == "'")}


_WHOLE = {stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()}
_WHOLE |= {"can't", "shan't", "won't", "i'm", "ma'am", "o'clock", "y'all", "'twas"}
_CONTRACTIONS = {lacking: whole for whole in _WHOLE for lacking in _without_one(whole)}


@functools.lru_cache(maxsize=1 << 16)
def normalise_vqa(answer: str) -> str:
    """The answer as VQA compares it (visualqa.org, evaluation).

    Lower case; full stops go unless a digit follows; other punctuation but apostrophes and colons becomes a space, or
    nothing beside a space and in answers with a comma between digits; number words become digits; articles go; a
    contraction gets its missing apostrophe. Our list has the contractions that are no words without one.
    """
    text = " ".join(answer.split())
    together = _DIGIT_COMMA.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if together or beside else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@functools.lru_cache(maxsize=1 << 16)
def normalise_textvqa(answer: str) -> str:
    """The answer as TextVQA's server compares it: no commas or question marks, 's apart, then VQA's rules."""
    return normalise_vqa(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """Mean over annotators of min(others who said so / 3, 1), after normalisation: three of ten are right.

    Raises:
        InvalidParameterError: fewer than two annotators, of whom none could be left out.
    """
    if len(annotated) < 2:
        raise InvalidParameterError(
            f"{len(annotated)} annotated answers: VQA accuracy leaves one annotator out, so at least two are needed"
        )
    agree = sum(one == answer for one in annotated)
    # each of the `agree` annotators finds one fewer among the others
    total = agree * min((agree - 1) / 3, 1) + (len(annotated) - agree) * min(agree / 3, 1)
    return total / len(annotated)


# -- words -------------------------------------------------------------------------------------------------------------


def gqa_answer(answer: str) -> str:
    """The answer as GQA compares it, exactly: lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(" .")


def yes_no(answer: str) -> str:
    """POPE: "no" if the first sentence has the word no or not, else "yes"."""
    words = answer.partition(".")[0].replace(",", "").lower().split()
    return "no" if "no" in words or "not" in words else "yes"


def mme_answer(answer: str) -> str | None:
    """MME: yes or no where the first four characters have it, else None, which is wrong."""
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


#: the letter A that is an article
_ARTICLE_A = r"\bA\s+(?!or\b|and\b)(?=[a-z])"


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names: its letter, or its text; None where it names none or several.

    Read in this order: a letter at the beginning ("B", "(B)", "B. a dog"); one behind "answer is"; the text of one
    option, alone; the only capital letter that stands alone; the only option whose text occurs.
    """
    text = answer.strip()
    letters = string.ascii_uppercase[: len(options)]
    patterns = (
        rf"^[\s\W]*([{letters}])(?:$|[).:,\s])",
        rf"answer(?:\s+is)?\s*:?\s*[\(\[*\"']*([{letters}])(?![A-Za-z])",
    )
    for number, pattern in enumerate(patterns):
        found = re.search(pattern, text, re.IGNORECASE if number else 0)
        if found and not (number == 0 and found[1] == "A" and re.match(_ARTICLE_A, text)):
            return letters.index(found[1].upper())
    if len(text) == 1 and text.upper() in letters:
        return letters.index(text.upper())
    plain = gqa_answer(text)
    told = [gqa_answer(_without_letter(option)) for option in options]
    if told.count(plain) == 1:
        return told.index(plain)
    alone = set(re.findall(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", re.sub(_ARTICLE_A, "", text)))
    if len(alone) == 1:
        return letters.index(alone.pop())
    inside = [number for number, option in enumerate(told) if option and re.search(rf"\b{re.escape(option)}\b", plain)]
    return inside[0] if len(inside) == 1 else None


def _without_letter(option: str) -> str:
    return re.sub(r"^\(?[A-Z][).:]\s*", "", option.strip())


def anls(answer: str, expected: Sequence[str], threshold: float = 0.5) -> float:
    """DocVQA: the best 1 - edit distance / longer length, 0 where that is below `threshold`; case is nothing.

    A similarity of the threshold itself counts, as in DocVQA's released evaluator; the paper's formula has it 0.
    """
    said = " ".join(answer.lower().split())
    best = 0.0
    for one in expected:
        right = " ".join(one.lower().split())
        longest = max(len(said), len(right))
        alike = 1 - levenshtein(said, right) / longest if longest else 1.0
        best = max(best, alike)
    return best if best >= threshold else 0.0


def levenshtein(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of single characters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


# -- yes and no --------------------------------------------------------------------------------------------------------


def yes_no_metrics(said: Sequence[str], right: Sequence[str], groups: Tensor | None = None) -> dict[str, Metric]:
    """POPE's numbers; "yes" is positive, and F1 is named first, for it is what papers print."""
    positive = torch.tensor([one == "yes" for one in said], dtype=torch.float64)
    true = torch.tensor([one == "yes" for one in right], dtype=torch.float64)
    hit = positive * true
    return {
        "F1": ratio(2 * hit, positive + true, groups),
        "accuracy": share((positive == true).double(), groups),
        "precision": ratio(hit, positive, groups),
        "recall": ratio(hit, true, groups),
        "yes ratio": share(positive, groups),
    }


MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_scores(right: Sequence[bool], tasks: Sequence[str], images: Sequence[str]) -> dict[str, Metric]:
    """MME's points: of a sub-task 100 (accuracy + accuracy+), where accuracy+ is the share of images of which every
    question is right; perception and cognition are sums over their sub-tasks (at most 2,000 and 800).

    Errors are over the images of a sub-task.
    """
    found: dict[str, dict[str, list[bool]]] = {}
    for ok, task, image in zip(right, tasks, images, strict=True):
        found.setdefault(task, {}).setdefault(image, []).append(ok)
    parts: dict[str, Metric] = {}
    plus: dict[str, Metric] = {}
    for task, by_image in found.items():
        every = torch.tensor([float(all(answers)) for answers in by_image.values()])
        asked = torch.tensor([float(len(answers)) for answers in by_image.values()])
        hits = torch.tensor([float(sum(answers)) for answers in by_image.values()])
        accuracy = ratio(hits, asked)
        # per image, its part of both shares; over images they add up to the score
        points = mean((hits - accuracy.value * asked) / asked.mean() + every + accuracy.value)
        parts[task] = Metric(100 * points.value, 100 * points.error, percent=False)
        plus[task] = Metric(*mean(every))
    known = {"perception": MME_PERCEPTION, "cognition": MME_COGNITION}
    lowered = {task.lower(): parts[task] for task in parts}
    sums = {}
    for name, members in known.items():
        own = [lowered[task.lower()] for task in members if task.lower() in lowered]
        if own:
            sums[name] = _sum(own)
    if len(sums) == 2:
        sums["total"] = _sum(list(sums.values()))
    every_answer = torch.tensor([float(ok) for ok in right])
    image_groups = group_numbers([f"{task}/{image}" for task, image in zip(tasks, images, strict=True)])
    return {
        **(sums or {"score": _sum(list(parts.values()))}),
        "accuracy": share(every_answer, image_groups),
        **parts,
        **{f"{task} accuracy+": value for task, value in plus.items()},
    }


def _sum(parts: Sequence[Metric]) -> Metric:
    return Metric(sum(p.value for p in parts), math.sqrt(sum(p.error**2 for p in parts)), percent=False)


def group_numbers(names: Sequence[str]) -> Tensor:
    """(N,) int64: the same number for the same name."""
    numbers: Mapping[str, int] = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)


def joined(*groupings: Tensor) -> Tensor:
    """(N,) int64: the same number for what one of the groupings, (N,) int64 each, puts together, over any detours."""
    above = list(range(len(groupings[0])))

    def first(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    for grouping in groupings:
        seen: dict[int, int] = {}
        for i, number in enumerate(grouping.tolist()):
            above[first(i)] = first(seen.setdefault(number, i))
    return torch.tensor([first(i) for i in range(len(above))], dtype=torch.int64)
