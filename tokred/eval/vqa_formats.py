"""The benchmarks of `tokred eval vqa`: how their files are laid out, and what is asked.

Every benchmark is read from its own files as its authors publish them, or from rows of the same names: a ``.jsonl``,
``.json`` or ``.parquet`` file, a folder that `datasets` saved, or a data set of the hub. What is wrong with a file is
said with its line and field, before anything is measured.
"""

from __future__ import annotations

import importlib.util
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokred.core.errors import InvalidParameterError, TokredError, nearest
from tokred.eval.data_sets import load_data_set
from tokred.eval.hub import brief, unreachable, what_to_do
from tokred.eval.vqa_media import Picture, Video, find_picture, find_video

__all__ = ["BENCHMARKS", "Benchmark", "DataFormatError", "Question", "Source", "benchmark", "read_questions"]

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


class DataFormatError(TokredError, ValueError):
    """A file of a benchmark is not laid out as that benchmark's files are."""


class _NothingError(DataFormatError):
    """A folder has no file of rows in it."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question.

    Attributes:
        id: unique in its benchmark. text: what is asked, options and all, without the benchmark's instruction.
        media: what it is about; None for text alone. answers: right ones (of VQA one an annotator).
        options: of multiple choice, in order. group: questions that may depend on each other share it.
        kinds: what tables are split by, {heading: value}.
    """

    id: str
    text: str
    media: Picture | Video | None
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a benchmark's data is.

    Attributes:
        data: a file or folder, or the name of a data set of the hub. images, videos, subtitles: folders.
        annotations: file of VQAv2's answers, where it does not lie beside the questions.
        split: of a data set or of ScienceQA; None is the benchmark's own. config: of a data set of the hub.
        limit: so many first questions.
    """

    data: str
    images: Path | None = None
    videos: Path | None = None
    subtitles: Path | None = None
    annotations: Path | None = None
    split: str | None = None
    config: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """What there is to know of a benchmark to ask its questions.

    Attributes:
        title: of tables. media: "image" or "video". instruction: behind each question; tokens: of an answer, at most.
        question: a row and where it stands make a `Question`, or None for a row that belongs to another split.
        rows: local files (path, source) -> (where, row); None: by `table_rows`.
        hub: name, config and split of a data set with such rows, as an example. files: what --data may be.
    """

    title: str
    media: str
    instruction: str
    tokens: int
    question: Callable[[Row, Source], Question | None]
    files: str
    rows: Callable[[Path, Source], Iterator[tuple[str, Mapping[str, Any]]]] | None = None
    hub: tuple[str, str | None, str] | None = None


class Row:
    """A row with the place that messages name."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, *names: str, kind: type | tuple[type, ...] = str) -> Any:
        """The first of these fields that is there.

        Raises:
            DataFormatError: none is, or it is of another kind.
        """
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if hasattr(value, "tolist") and not isinstance(value, (bytes, str)):  # arrays of parquet
                    value = value.tolist()
                if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
                    wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
                    raise DataFormatError(f"{self.where}: {name!r} is {_shown(value)}, expected {wanted}")
                return value
        there = ", ".join(map(str, self.values)) or "none"
        raise DataFormatError(f"{self.where}: there is no field {names[0]!r} (fields: {there})")

    def text(self, *names: str) -> str:
        return str(self.get(*names, kind=(str, int))).strip()

    def texts(self, *names: str) -> tuple[str, ...]:
        value = self.get(*names, kind=(list, tuple))
        if not value or not all(isinstance(one, str) for one in value):
            raise DataFormatError(f"{self.where}: {names[0]!r} is {_shown(value)}, expected a list of strings")
        return tuple(one.strip() for one in value)

    def picture(self, source: Source, *names: str) -> Picture:
        """The picture in the row itself, else a file below --images."""
        inside = self.values.get("image")
        if inside is not None and not isinstance(inside, str):
            if not (isinstance(inside, (bytes, Mapping)) or callable(inside) or hasattr(inside, "convert")):
                raise DataFormatError(f"{self.where}: 'image' is {_shown(inside)}, expected a file's name or a picture")
            return Picture(f"the picture of {self.where}", _loader(inside, self.where))
        return find_picture(source.images, names or (self.text("image"),), self.where)


def _loader(inside: Any, where: str) -> Callable[[], Any]:
    """Pictures in rows: opened by `datasets`, {bytes, path} of parquet, or a function that fetches one."""

    def load() -> Any:
        import io

        from PIL import Image

        value = inside() if callable(inside) else inside
        if isinstance(value, Mapping):
            return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if not hasattr(value, "convert"):
            raise DataFormatError(f"{where}: 'image' is {_shown(value)}, expected a picture")
        return value

    return load


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- rows of any benchmark ---------------------------------------------------------------------------------------------


def read_text(path: Path, expected: str = "JSON in UTF-8") -> str:
    """A file of text. `DataFormatError` says what was `expected` where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path} is no text ({error}); expected {expected}") from error


def read_json(path: Path) -> Any:
    """A JSON file, or a list for JSON lines. `DataFormatError` with line and column."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataFormatError(f"{path}: no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    return [row for _, row in json_lines(path)]


def json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of each line that is not empty."""
    with path.open("rb") as opened:  # in lines, for LongBench's files are large
        for number, line in enumerate(opened, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise DataFormatError(f"{where} is no text ({error}); expected JSON in UTF-8") from error
            except json.JSONDecodeError as error:
                raise DataFormatError(f"{where}: no JSON: column {error.colno}: {error.msg}") from error
            if text.strip():
                yield where, _object(row, where)


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataFormatError(f"{where} is {_shown(row)}, expected an object with fields")
    return row


def table_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a .jsonl, .json (a list) or .parquet file, or of a folder that `datasets` saved or of parquet files."""
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            yield from _saved_rows(path, source)
            return
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise _NothingError(f"{path} holds neither parquet files nor a data set saved by `datasets`")
        wanted = [one for one in files if source.split is None or source.split in one.stem]
        if not wanted:
            raise InvalidParameterError(
                f"--split {source.split}: no parquet file of {path} has that in its name; the first is {files[0].name}"
            )
        for one in wanted:
            yield from _parquet_rows(one)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl":
        yield from json_lines(path)
    else:
        yield from _listed(path, read_json(path))


def _listed(path: Path, found: Any, key: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a list, or of the list under `key`."""
    if key is not None:
        if not isinstance(found, Mapping) or not isinstance(found.get(key), list):
            there = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise DataFormatError(f"{path}: expected an object with a list under {key!r}, found {there[:80]}")
        found = found[key]
    if not isinstance(found, list):
        raise DataFormatError(f"{path}: expected a list of rows, found {_shown(found)}")
    for number, row in enumerate(found):
        where = f"{path}, {key or 'row'}[{number}]" if key else f"{path}, row {number}"
        yield where, _object(row, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(f'{path} is parquet, which needs datasets; run: pip install "tokred[eval]"') from error
    try:
        opened = parquet.ParquetFile(path)
    except Exception as error:
        raise DataFormatError(f"{path} is no parquet file: {brief(error)}") from error
    number = 0
    for batch in opened.iter_batches(batch_size=64):
        for row in batch.to_pylist():
            yield f"{path}, row {number}", row
            number += 1


def _saved_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        split = source.split or ("test" if "test" in found else next(iter(found)))
        if split not in found:
            raise InvalidParameterError(f"--split {split}: {path} has {', '.join(found)}")
        found = found[split]
    yield from _dataset_rows(found, str(path))


def _dataset_rows(found: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a `datasets.Dataset`; a picture is fetched when it is opened."""
    pictures = [column for column, kind in found.features.items() if type(kind).__name__ == "Image"]
    slim = found.remove_columns(pictures)
    rows: Iterable[dict[str, Any]] = slim if slim.column_names else ({} for _ in range(len(found)))
    one = found.select_columns(pictures) if pictures else found
    for number, row in enumerate(rows):
        for column in pictures:
            row[column] = lambda number=number, column=column: one[number][column]
        yield f"{name}, row {number}", row


def _hub_rows(source: Source, hub: tuple[str, str | None, str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"--data {source.data} is no path here, and data sets of the hub need datasets; run: "
            'pip install "tokred[eval]"'
        )
    usual = hub if hub is not None and hub[0] == source.data else None
    config = source.config or (usual[1] if usual else None)
    split = source.split or (usual[2] if usual else "test")
    name = f"{source.data} ({split})"
    try:
        if source.limit is not None:  # a few rows are not worth the download of all
            streamed = load_data_set(source.data, config, split=split, streaming=True)
            yield from ((f"{name}, row {i}", row) for i, row in enumerate(streamed.take(source.limit)))
            return
        found = load_data_set(source.data, config, split=split)
    except Exception as error:
        if unreachable(error):
            raise DataFormatError(
                what_to_do(f"the data set {source.data}", "download its files and give --data PATH")
            ) from error
        raise DataFormatError(
            f"--data {source.data}: neither a path here nor a data set that can be had ({brief(error)}); "
            f"download its files and give --data PATH, or see "
            "--config and --split"
        ) from error
    yield from _dataset_rows(found, name)


def read_questions(name: str, source: Source) -> list[Question]:
    """All questions of a benchmark, in the order of its files.

    Raises:
        DataFormatError: a file is laid out otherwise. InvalidParameterError: an option is missing or wrong.
        MediaError: a picture or video is not there.
    """
    found = benchmark(name)
    path = Path(source.data)
    _check_options(name, found, source, path)
    if path.exists():
        rows = (found.rows or table_rows)(path, source)
    elif "/" in source.data and not source.data.startswith((".", "/", "~")) and source.data.count("/") == 1:
        rows = _hub_rows(source, found.hub)
    else:
        raise FileNotFoundError(
            f"--data {source.data} is not there; {found.title} is read from {found.files}"
            + (f", or a data set such as {found.hub[0]}" if found.hub else "")
        )
    try:
        questions = _asked(found, rows, source)
    except _NothingError as error:
        raise DataFormatError(f"{error}, and no file of {found.title}'s own: {found.files}") from error
    if not questions:
        raise DataFormatError(
            f"--data {source.data}: no question of {found.title} is in it; it is read from {found.files}"
        )
    return questions


def _check_options(name: str, found: Benchmark, source: Source, path: Path) -> None:
    """Refuse an option that would be read by nobody."""
    parts = name in ("scienceqa", "vqav2") or not path.exists() or _has_splits(path)
    for option, given, wrong in (
        ("--annotations", source.annotations, "of VQAv2" if name != "vqav2" else ""),
        ("--subtitles", source.subtitles, "of Video-MME" if name != "videomme" else ""),
        ("--images", source.images, "of benchmarks about images" if found.media != "image" else ""),
        ("--videos", source.videos, "of benchmarks about videos" if found.media != "video" else ""),
        ("--config", source.config, "of data sets of the hub" if path.exists() else ""),
        ("--split", source.split, "" if parts else "of data sets"),
    ):
        if given is not None and wrong:
            raise InvalidParameterError(
                f"{option} {given} is {wrong}; {found.title} from {source.data} has none: leave it away"
            )


def _has_splits(path: Path) -> bool:
    """Whether it is a folder that `datasets` saved, or one of parquet files."""
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return path.is_dir() and (saved or next(path.rglob("*.parquet"), None) is not None)


def _asked(found: Benchmark, rows: Iterator[tuple[str, Mapping[str, Any]]], source: Source) -> list[Question]:
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for where, values in rows:
        question = found.question(Row(where, values), source)
        if question is None:
            continue
        if question.id in seen:
            raise DataFormatError(f"{where}: the id {question.id!r} is that of {seen[question.id]} too")
        seen[question.id] = where
        questions.append(question)
        if source.limit is not None and len(questions) >= source.limit:
            break
    return questions


# -- pictures: VQAv2, GQA, TextVQA, POPE, ScienceQA, MME, DocVQA -------------------------------------------------------


def _vqa_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """VQAv2's questions with their annotations."""
    if path.is_dir():
        files = sorted(path.glob("*OpenEnded*questions.json"))
        if len(files) > 1 and source.split:
            files = [one for one in files if source.split in one.name]
        if len(files) != 1:
            if not files and list(path.rglob("*.parquet")) + list(path.glob("*.json")):
                yield from table_rows(path, source)
                return
            raise DataFormatError(
                f"{path} has {len(files)} files *OpenEnded*questions.json; give one of them as --data"
            )
        path = files[0]
    found = read_json(path) if path.suffix == ".json" else None
    if not isinstance(found, Mapping):
        yield from table_rows(path, source)
        return
    annotated = source.annotations or _beside(path)
    answers: dict[Any, Mapping[str, Any]] = {}
    for where, row in _listed(annotated, read_json(annotated), "annotations"):
        answers[Row(where, row).get("question_id", kind=(int, str))] = row
    subtype = str(found.get("data_subtype", "val2014"))
    for where, row in _listed(path, found, "questions"):
        number = Row(where, row).get("question_id", kind=(int, str))
        if number not in answers:
            raise DataFormatError(f"{where}: question_id {number} has no answers in {annotated}")
        yield where, {**answers[number], **row, "data_subtype": subtype}


def _beside(path: Path) -> Path:
    core = path.name.replace("OpenEnded_", "").replace("_questions.json", "_annotations.json")
    annotated = path.with_name(core)
    if annotated == path or not annotated.is_file():
        raise FileNotFoundError(
            f"the answers to {path.name} are not beside it ({core}); name their file with --annotations"
        )
    return annotated


def _vqa_question(row: Row, source: Source) -> Question:
    answers = row.get("answers", kind=(list, tuple))
    told = []
    for number, one in enumerate(answers):
        if isinstance(one, Mapping):
            one = one.get("answer")
        if not isinstance(one, str):
            raise DataFormatError(f"{row.where}: 'answers'[{number}] is {_shown(one)}, expected an answer")
        told.append(one)
    if len(told) < 2:
        raise DataFormatError(f"{row.where}: 'answers' has {len(told)}, expected those of about ten annotators")
    image = row.text("image_id") if "image_id" in row else row.text("question_id")
    names = [image]
    if image.isdigit():
        subtype = row.values.get("data_subtype", "val2014")
        names = [f"COCO_{subtype}_{int(image):012d}.jpg", f"{int(image):012d}.jpg", f"{image}.jpg"]
    kinds = {"answer type": row.text("answer_type")} if "answer_type" in row else {}
    return Question(
        row.text("question_id"),
        row.text("question"),
        row.picture(source, *names),
        tuple(told),
        group=image,
        kinds=kinds,
    )


def _gqa_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """GQA's questions: an object {id: question}."""
    found = read_json(path) if path.suffix == ".json" else None
    if not isinstance(found, Mapping):
        yield from table_rows(path, source)
        return
    for number, row in found.items():
        where = f"{path}, question {number}"
        yield where, {"id": number, **_object(row, where)}


def _gqa_question(row: Row, source: Source) -> Question:
    image = row.text("imageId", "image_id")
    types = row.values.get("types")
    structural = types.get("structural") if isinstance(types, Mapping) else None
    return Question(
        row.text("id", "question_id"),
        row.text("question"),
        row.picture(source, image),
        (row.text("answer"),),
        group=image,
        kinds={"type": structural} if isinstance(structural, str) else {},
    )


def _data_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Questions under "data", as TextVQA and DocVQA have them."""
    found = read_json(path) if path.suffix == ".json" and path.is_file() else None
    if isinstance(found, Mapping):
        yield from _listed(path, found, "data")
    else:
        yield from table_rows(path, source)


def _textvqa_question(row: Row, source: Source) -> Question:
    image = row.text("image_id")
    answers = row.texts("answers")
    if len(answers) < 2:
        raise DataFormatError(f"{row.where}: 'answers' has {len(answers)}, expected those of about ten annotators")
    return Question(row.text("question_id"), row.text("question"), row.picture(source, image), answers, group=image)


def _pope_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """POPE's JSON lines; of a folder all files *pope*.json, whose names end in the way objects were sampled."""
    files = [path]
    if path.is_dir():
        files = sorted(one for one in path.glob("*pope*.json*"))
        if not files:
            yield from table_rows(path, source)
            return
    for one in files:
        by_line = one.suffix in (".json", ".jsonl") and not read_text(one).lstrip().startswith("[")
        rows = json_lines(one) if by_line else table_rows(one, source)
        for where, row in rows:
            yield where, {"category": one.stem.rpartition("_")[2], **row}


def _pope_question(row: Row, source: Source) -> Question:
    answer = row.text("label", "answer").lower()
    if answer not in ("yes", "no"):
        raise DataFormatError(f"{row.where}: 'label' is {answer!r}, expected yes or no")
    category = row.text("category")
    image = row.values.get("image")
    name = image if isinstance(image, str) else str(row.values.get("image_source") or row.text("question_id"))
    return Question(
        f"{category}/{row.text('question_id')}",
        row.text("text", "question"),
        row.picture(source),
        (answer,),
        group=name,
        kinds={"objects": category},
    )


def _science_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """ScienceQA's problems.json, an object {id: problem}."""
    if path.is_dir() and (path / "problems.json").is_file():
        path = path / "problems.json"
    found = read_json(path) if path.suffix == ".json" and path.is_file() else None
    if not isinstance(found, Mapping):
        yield from table_rows(path, source)
        return
    for number, row in found.items():
        where = f"{path}, problem {number}"
        yield where, {"id": number, **_object(row, where)}


_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def _science_question(row: Row, source: Source) -> Question | None:
    split = source.split or "test"
    if "split" in row and row.text("split") != split:
        return None
    choices, answer = row.texts("choices"), row.get("answer", kind=int)
    if not 0 <= answer < len(choices):
        raise DataFormatError(f"{row.where}: 'answer' is {answer}, expected one of 0 ... {len(choices) - 1}")
    hint = str(row.values.get("hint") or "").strip()
    number = row.text("id", "question_id", "pid") if any(n in row for n in ("id", "question_id", "pid")) else row.where
    media = None
    if row.values.get("image") is not None:
        media = row.picture(source, f"{split}/{number}/image.png", f"{number}/image.png")
    grade = row.values.get("grade")
    kinds = {"context": "image" if media is not None else ("text" if hint else "none")}
    if isinstance(row.values.get("subject"), str):
        kinds["subject"] = _SUBJECTS.get(row.values["subject"], row.values["subject"])
    if isinstance(grade, str) and grade.removeprefix("grade").isdigit():
        kinds["grade"] = "1-6" if int(grade.removeprefix("grade")) <= 6 else "7-12"
    text = (f"Context: {hint}\n" if hint else "") + row.text("question") + "\n" + lettered(choices)
    return Question(number, text, media, (choices[answer],), choices, group=number, kinds=kinds)


def lettered(options: Sequence[str]) -> str:
    """Options as lines "A. ..." (those that begin with their letter stay)."""
    lines = []
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        has = option[:2] in (f"{letter}.", f"{letter})", f"{letter}:") or option.startswith(f"({letter})")
        lines.append(option if has else f"{letter}. {option}")
    return "\n".join(lines)


def _mme_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """MME's folders, one a sub-task: a .txt for each picture, with lines "question<TAB>Yes|No"."""
    folders = [one for one in sorted(path.iterdir()) if one.is_dir()] if path.is_dir() else []
    told = [(one, sorted([*one.glob("*.txt"), *one.glob("questions_answers_YN/*.txt")])) for one in folders]
    if not any(files for _, files in told):
        yield from table_rows(path, source)
        return
    for folder, files in told:
        for one in files:
            pictures = folder / "images" if one.parent.name == "questions_answers_YN" else folder
            for number, line in enumerate(read_text(one, "lines of a question, a tab, and Yes or No").splitlines(), 1):
                where = f"{one}, line {number}"
                if not line.strip():
                    continue
                question, tab, answer = line.rstrip().rpartition("\t")
                if not tab:
                    raise DataFormatError(f"{where}: expected a question, a tab, and Yes or No; found {_shown(line)}")
                image = find_picture(pictures, (one.stem,), where)
                yield (
                    where,
                    {
                        "question_id": f"{folder.name}/{one.stem}",
                        "line": number,
                        "question": question,
                        "answer": answer,
                        "category": folder.name,
                        "image": image.load,
                    },
                )


def _mme_question(row: Row, source: Source) -> Question:
    answer = row.text("answer").lower()
    if answer not in ("yes", "no"):
        raise DataFormatError(f"{row.where}: 'answer' is {answer!r}, expected Yes or No")
    category, image = row.text("category"), row.text("question_id")
    text = row.text("question")
    # two questions share the id of their picture
    return Question(
        f"{category}/{image}/{text}", text, row.picture(source), (answer,), group=f"{category}/{image}",
        kinds={"sub-task": category},
    )  # fmt: skip


def _docvqa_question(row: Row, source: Source) -> Question:
    if "answers" not in row:
        raise DataFormatError(f"{row.where}: there are no 'answers': DocVQA's test split has none, take val")
    image = row.values.get("image")
    names = (image, Path(image).name) if isinstance(image, str) else ()
    number = row.text("questionId", "question_id")
    group = str(row.values.get("docId") or (image if isinstance(image, str) else number))
    return Question(number, row.text("question"), row.picture(source, *names), row.texts("answers"), group=group)


# -- videos: Video-MME, MLVU -------------------------------------------------------------------------------------------


def _videomme_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Video-MME's rows, or its JSON of videos with their questions."""
    for where, row in table_rows(path, source):
        asked = row.get("questions")
        if asked is None:
            yield where, row
            continue
        about = {key: value for key, value in row.items() if key != "questions"}
        for number, one in enumerate(Row(where, row).get("questions", kind=(list, tuple))):
            place = f"{where}, questions[{number}]"
            yield place, {**about, **_object(one, place)}


def _letter(row: Row, options: Sequence[str]) -> int:
    answer = row.text("answer")
    letters = string.ascii_uppercase[: len(options)]
    if len(answer) == 1 and answer in letters:
        return letters.index(answer)
    plain = [option.strip() for option in options]
    if answer in plain:
        return plain.index(answer)
    raise DataFormatError(
        f"{row.where}: 'answer' is {answer!r}, expected one of {', '.join(letters)} or of the options"
    )


def _videomme_question(row: Row, source: Source) -> Question:
    options = row.texts("options")
    duration = row.text("duration")
    if duration not in ("short", "medium", "long"):
        raise DataFormatError(f"{row.where}: 'duration' is {duration!r}, expected short, medium or long")
    name = row.text("videoID", "video_id")
    names = (name, f"{name}.mp4", f"data/{name}.mp4")
    text = row.text("question") + "\n" + lettered(options)
    if source.subtitles is not None:
        spoken = _subtitles(source.subtitles / f"{name}.srt")
        text = (f"Subtitles of the video:\n{spoken}\n" if spoken else "") + text
    return Question(
        row.text("question_id"),
        text,
        find_video(source.videos, names, row.where),
        (options[_letter(row, options)],),
        options,
        group=name,
        kinds={"duration": duration},
    )


def _subtitles(path: Path) -> str:
    """The words of an .srt file; nothing where a video has none."""
    if not path.is_file():
        return ""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return "\n".join(line for line in lines if line and not line.isdigit() and "-->" not in line)


def _mlvu_rows(path: Path, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """MLVU's JSON files, one a task."""
    if not path.is_dir():
        yield from ((where, {"file": path.stem, **row}) for where, row in table_rows(path, source))
        return
    files = sorted(path.glob("*.json"))
    if not files:
        yield from table_rows(path, source)
    for one in files:
        for where, row in table_rows(one, source):
            yield where, {"file": one.stem, **row}


def _mlvu_question(row: Row, source: Source) -> Question | None:
    if "candidates" not in row and "options" not in row:  # summaries and descriptions are judged by people
        return None
    options = row.texts("candidates", "options")
    name = row.text("video", "video_name")
    stem = str(row.values.get("file", ""))
    task = str(row.values.get("question_type") or row.values.get("task_type") or stem)
    text = row.text("question") + "\n" + lettered(options)
    number = row.text("question_id") if "question_id" in row else f"{task}/{name}/{row.text('question')}"
    video = find_video(source.videos, (name, f"{stem}/{name}", f"{task}/{name}", Path(name).name), row.where)
    right = options[_letter(row, options)]
    return Question(number, text, video, (right,), options, group=name, kinds={"task": task})


BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "VQAv2", "image", SHORT, 16, _vqa_question,
        "v2_OpenEnded_mscoco_val2014_questions.json with its annotations beside it, or the folder of both",
        _vqa_rows, ("lmms-lab/VQAv2", None, "validation"),
    ),
    "gqa": Benchmark(
        "GQA", "image", SHORT, 16, _gqa_question, "testdev_balanced_questions.json", _gqa_rows,
    ),
    "textvqa": Benchmark(
        "TextVQA", "image", SHORT, 16, _textvqa_question, "TextVQA_0.5.1_val.json", _data_rows,
        ("lmms-lab/textvqa", None, "validation"),
    ),
    "pope": Benchmark(
        "POPE", "image", SHORT, 8, _pope_question, "coco_pope_*.json, or their folder", _pope_rows,
        ("lmms-lab/POPE", None, "test"),
    ),
    "scienceqa": Benchmark(
        "ScienceQA", "image", LETTER, 16, _science_question, "problems.json, or its folder", _science_rows,
        ("derek-thomas/ScienceQA", None, "test"),
    ),
    "mme": Benchmark(
        "MME", "image", "", 8, _mme_question, "the folder of its sub-tasks", _mme_rows,
        ("lmms-lab/MME", None, "test"),
    ),
    "docvqa": Benchmark(
        "DocVQA", "image", SHORT, 32, _docvqa_question, "val_v1.0.json or val_v1.0_withQT.json", _data_rows,
        ("lmms-lab/DocVQA", "DocVQA", "validation"),
    ),
    "videomme": Benchmark(
        "Video-MME", "video", LETTER, 16, _videomme_question, "its parquet file, or JSON of the same fields",
        _videomme_rows, ("lmms-lab/Video-MME", "videomme", "test"),
    ),
    "mlvu": Benchmark(
        "MLVU", "video", LETTER, 16, _mlvu_question, "the folder of its JSON files, or one of them", _mlvu_rows,
    ),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """By name. `InvalidParameterError` says which is nearest."""
    if name not in BENCHMARKS:
        known = [*BENCHMARKS, "digits"]
        raise InvalidParameterError(f"--benchmark {name}{nearest(name, known)}; there are: {', '.join(known)}")
    return BENCHMARKS[name]
