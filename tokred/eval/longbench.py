"""LongBench (arXiv 2308.14508): its files, what is asked, and its metrics, written from their definitions.

Prompts of ours are short; `--prompts` takes LongBench's own file of them. The Chinese data sets need a word splitter
and are refused.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokred.core.errors import InvalidParameterError, nearest
from tokred.eval.vqa_formats import DataFormatError, Row, Source, read_json, table_rows

__all__ = ["DATASETS", "LongQuestion", "judge_long", "read_longbench", "read_prompts", "rouge_1", "rouge_l", "word_f1"]


class LongQuestion(NamedTuple):
    """A row of LongBench: a question about a long text, the right answers, and of TREC the classes there are."""

    id: str
    dataset: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


# -- metrics -----------------------------------------------------------------------------------------------------------


def plain_words(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, no punctuation, no articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _f1(common: int, said: int, right: int) -> float:
    return 2 * common / (said + right) if common else 0.0


def word_f1(said: str, right: str) -> float:
    """F1 of the words of both, counted as often as they stand there (SQuAD)."""
    first, second = plain_words(said), plain_words(right)
    return _f1(sum((Counter(first) & Counter(second)).values()), len(first), len(second))


def rouge_1(said: str, right: str) -> float:
    """ROUGE-1, F1: of lower-case words without punctuation."""
    first, second = _words(said), _words(right)
    return _f1(sum((Counter(first) & Counter(second)).values()), len(first), len(second))


def rouge_l(said: str, right: str) -> float:
    """ROUGE-L, F1 (Lin 2004, beta 1): of the longest common subsequence of the words of the whole text."""
    first, second = _words(said), _words(right)
    return _f1(common_subsequence(first, second), len(first), len(second))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one machine word of bits a row (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    return len(first) - row.bit_count()


def _class_score(said: str, right: str, classes: Sequence[str]) -> float:
    """TREC: one part of the classes that the answer names, where the right one is among them.

    A class whose name is only a part of the right one's does not count as named.
    """
    named = [one for one in classes if one in said and not (one in right and one != right)]
    return 1 / len(named) if right in named else 0.0


def _count_score(said: str, right: str) -> float:
    """The share of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", said)
    return sum(number == right.strip() for number in numbers) / len(numbers) if numbers else 0.0


def _paragraph_score(said: str, right: str) -> float:
    """The same with the number of a paragraph."""
    number = re.search(r"\d+", right)
    return _count_score(said, number[0]) if number else 0.0


def _code_score(said: str, right: str) -> float:
    """Similarity of the first line that is no comment, by `difflib`."""
    lines = said.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, line, right).ratio()


class Dataset(NamedTuple):
    """How a data set is asked and judged: its prompt, its metric, tokens of an answer, whether one line counts."""

    prompt: str
    metric: str
    tokens: int
    one_line: bool = False


_QA = "Read the text and answer the question about it in a few words.\n\n{context}\n\nQuestion: {input}\nAnswer:"
_REPORT = "Write a summary of the text, about one page long.\n\n{context}\n\nSummary:"
_ASKED = "Read the text and answer the question about it in one or more sentences.\n\n{context}\n\n{input}\nAnswer:"
_SHOTS = "Go on as the examples do.\n\n{context}\n{input}"
_COUNT = "Some of these paragraphs may be the same. How many different ones are there?\n\n{context}\n\nOnly the number:"
_FIND = "{context}\n\nWhich paragraph does this summarise?\n\n{input}\n\nAnswer as in: Paragraph 1\nAnswer:"
_CODE = "Write the next line of the code.\n{context}{input}Next line:\n"
#: the English data sets, in the order of the table of the GemFilter paper, then code
DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(_QA, "F1", 128),
    "qasper": Dataset(_QA, "F1", 128),
    "multifieldqa_en": Dataset(_QA, "F1", 64),
    "hotpotqa": Dataset(_QA, "F1", 32),
    "2wikimqa": Dataset(_QA, "F1", 32),
    "musique": Dataset(_QA, "F1", 32),
    "gov_report": Dataset(_REPORT, "ROUGE-L", 512),
    "qmsum": Dataset(_ASKED, "ROUGE-L", 512),
    "multi_news": Dataset(_REPORT, "ROUGE-L", 512),
    "trec": Dataset(_SHOTS, "accuracy", 64, True),
    "triviaqa": Dataset(_SHOTS, "F1", 32, True),
    "samsum": Dataset(_SHOTS, "ROUGE-L", 128, True),
    "passage_count": Dataset(_COUNT, "count", 32),
    "passage_retrieval_en": Dataset(_FIND, "paragraph", 32),
    "lcc": Dataset(_CODE, "code", 64),
    "repobench-p": Dataset(_CODE, "code", 64),
}
_METRICS: dict[str, Callable[[str, str], float]] = {
    "F1": word_f1,
    "ROUGE-L": rouge_l,
    "count": _count_score,
    "paragraph": _paragraph_score,
    "code": _code_score,
}


def judge_long(said: str, question: LongQuestion) -> float:
    """The score of an answer in [0, 1], by the metric of its data set: of several right answers the best counts."""
    data = DATASETS[question.dataset]
    if data.one_line:
        said = said.lstrip("\n").partition("\n")[0]
    if data.metric == "accuracy":
        return max(_class_score(said, right, question.classes) for right in question.answers)
    return max(_METRICS[data.metric](said, right) for right in question.answers)


# -- files -------------------------------------------------------------------------------------------------------------


def read_longbench(path: Path, wanted: Sequence[str] = (), limit: int | None = None) -> list[LongQuestion]:
    """Questions of a .jsonl (.json, .parquet) file or of all of a folder.

    Args:
        wanted: data sets by name, () for all English ones that are there. limit: questions of each.

    Raises:
        DataFormatError: a row is laid out otherwise. InvalidParameterError: an unknown data set, or none is there.
    """
    for name in wanted:
        known_dataset(name, "--datasets")
    if not path.exists():
        raise FileNotFoundError(
            f"--data {path} is not there; LongBench is read from its data folder (narrativeqa.jsonl ...) or one file"
        )
    found: list[LongQuestion] = []
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for where, values in _rows(path, wanted):
        row = Row(where, values)
        name = row.text("dataset")
        if wanted and name not in wanted:
            continue
        known_dataset(name, where)
        if limit is not None and counts[name] >= limit:
            continue
        counts[name] += 1
        classes = row.texts("all_classes") if "all_classes" in row else ()
        if DATASETS[name].metric == "accuracy" and not classes:
            raise DataFormatError(f"{where}: there is no field 'all_classes', which {name} is judged by")
        number = f"{name}/{row.text('_id') if '_id' in row else counts[name]}"
        if number in seen:
            raise DataFormatError(f"{where}: the id {number!r} is there twice")
        seen.add(number)
        asked = row.get("input") if values.get("input") is not None else ""
        found.append(LongQuestion(number, name, row.get("context"), asked, row.texts("answers"), classes))
    if not found:
        raise InvalidParameterError(
            f"--data {path}: no question of {', '.join(wanted) or 'LongBench'} is in it; expected "
            "its data folder (narrativeqa.jsonl ...) or one such file"
        )
    return found


def known_dataset(name: str, where: str) -> None:
    if name not in DATASETS:
        raise InvalidParameterError(
            f"{where}: no LongBench data set {name!r}{nearest(name, DATASETS)} that can be judged here; there are: "
            f"{', '.join(DATASETS)}"
        )


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    files = [path]
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in (".jsonl", ".parquet"))
        files = [one for one in files if one.stem in (wanted or DATASETS)]
        missing = [name for name in wanted if name not in {one.stem for one in files}]
        if missing:
            raise FileNotFoundError(f"{path} has no {missing[0]}.jsonl")
    for one in files:
        for where, values in table_rows(one, Source(str(one))):
            yield where, values if values.get("dataset") else {"dataset": one.stem, **values}


def read_prompts(path: Path) -> dict[str, str]:
    """LongBench's file of prompts: {data set: template with {context}, and {input} where it asks something}."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path} is no file; expected LongBench's dataset2prompt.json")
    found = read_json(path)
    if not isinstance(found, Mapping):
        raise DataFormatError(f"{path}: expected an object {{data set: prompt}}")
    for name, prompt in found.items():
        if not isinstance(prompt, str) or "{context}" not in prompt:
            raise DataFormatError(f"{path}: the prompt of {name!r} has no {{context}}")
    return dict(found)
