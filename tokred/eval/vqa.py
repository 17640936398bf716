"""`tokred eval vqa`: a multimodal model under methods, on the benchmarks of question answering.

Every row answers the same questions, the unpatched model first. Answers are recorded as they come, so that a run that
was killed goes on; several processes (`accelerate launch`) share the batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.core.catalog import compatibility
from tokred.core.errors import InvalidParameterError
from tokred.eval.bench import Progress, require
from tokred.eval.clock import Clock, spent
from tokred.eval.processes import Processes, finish, join
from tokred.eval.records import Records, check_out, claim, complete, digest, identity, read
from tokred.eval.report import percent, signed, table
from tokred.eval.runs import Chosen, Run, choose
from tokred.eval.vision import paired
from tokred.eval.vqa_formats import BENCHMARKS, Question, Source, benchmark, read_questions
from tokred.eval.vqa_hosts import BUNDLED, TOGETHER, Answers, VLMHost, frame_scorer, load_vlm, parted
from tokred.eval.vqa_media import Picture, Video, path_of, size_of
from tokred.eval.vqa_metrics import (
    Metric,
    anls,
    choice,
    gqa_answer,
    group_numbers,
    joined,
    mme_answer,
    mme_scores,
    normalise_textvqa,
    normalise_vqa,
    share,
    vqa_accuracy,
    yes_no,
    yes_no_metrics,
)
from tokred.eval.vqa_rows import EvalRow, make_rows, reported

__all__ = ["VqaOptions", "judge", "run", "show", "summary"]

DIGITS = "digits"
#: questions of the bundled benchmark, and its methods where none are named
DIGIT_QUESTIONS = 500
DIGIT_RUNS: dict[str, tuple[Run, ...]] = {
    "image": (("hired", {"budget": 0.25}), ("visionzip", {"budget": 0.25})),
    "video": (("quota", {"budget": 0.25}), ("evs", {"budget": 0.25})),
}
#: frames of a bundled clip, of which a row is shown some
CLIP_FRAMES = 64
FRAMES = {DIGITS: 16}
MULTIPLE_CHOICE = ("scienceqa", "videomme", "mlvu")
LEGEND = """
tokens: visual tokens left of a question behind the last layer; read: that a layer of the language model reads, on
average. Then the benchmark's own metric ± standard error (questions about one image or video, and those of a batch that
shares a random choice, count as one observation). vs unpatched: paired difference of the score of a question; * better,
! worse by more than 2 standard errors. same: share of questions answered as the unpatched model does. s: seconds of
generate for a question, in batches.
""".strip()


@dataclass(frozen=True)
class VqaOptions:
    """What `tokred eval vqa` was asked for. None leaves the choice to the benchmark.

    Attributes:
        benchmark: by name, or "digits", bundled. source: its data, None for digits.
        model: see `vqa_hosts.load_vlm`. runs: methods with parameters; None is none, with
            digits `DIGIT_RUNS`.
        batch: prompts of one `generate`. tokens: of an answer, at most. instruction: behind a question.
        prompt: template of prompts. frames: of a video. method_frames: that rows with a method see, None for as many.
        scorer: of frames, for QuoTA. seed: of random choices and of the bundled questions. out: folder.
        fresh: forget what is recorded there. device, dtype: of the model.
    """

    benchmark: str
    out: Path
    model: str | None = None
    source: Source | None = None
    runs: Sequence[Run] | None = None
    batch: int = 8
    tokens: int | None = None
    instruction: str | None = None
    prompt: str | None = None
    frames: int | None = None
    method_frames: int | None = None
    scorer: str | None = None
    seed: int = 0
    fresh: bool = False
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("tokens", 1), ("frames", 1), ("method_frames", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidParameterError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.source is not None and self.source.limit is not None and self.source.limit < 1:
            raise InvalidParameterError(f"--limit {self.source.limit}: expected at least 1")


@dataclass(eq=False)
class _Run:
    """Everything that does not change from batch to batch. `sizes`: of pictures and videos that are files."""

    host: VLMHost
    media: str
    questions: Sequence[Question]
    rows: Sequence[EvalRow]
    instruction: str
    tokens: int
    frames: int
    method_frames: int
    scorer: Any
    equal: bool
    sizes: Mapping[Path, int]

    def batches(self, size: int) -> list[list[Question]]:
        """Questions with a picture or video first, for one call cannot hold both sorts."""
        seen = [one for one in self.questions if one.media is not None]
        blind = [one for one in self.questions if one.media is None]
        return [part[i : i + size] for part in (seen, blind) for i in range(0, len(part), size)]

    def size(self, question: Question) -> int | None:
        """Bytes of its picture or video; None where that is no file."""
        path = path_of(question.media)
        return None if path is None else self.sizes[path]

    def frames_of(self, row: EvalRow) -> int:
        return self.frames if row.method is None else self.method_frames


# -- the run -----------------------------------------------------------------------------------------------------------


def run(options: VqaOptions, progress: Progress) -> dict[str, Any] | None:
    """Ask every question of every row, write results.json into `options.out`, and return the results (JSON types).

    Call it in every process of a run; all but the first return None.
    """
    require("eval", "transformers", "torchvision", "tqdm", what="tokred eval vqa")
    began = time.perf_counter()
    options, media = _settled(options)
    chosen = [choose(one) for one in options.runs or ()]
    check_out(options.out)
    title = "digits" if options.benchmark == DIGITS else benchmark(options.benchmark).title
    questions = _questions(options, media)
    processes = join(options.device)
    assert options.model is not None
    host = load_vlm(options.model, processes.device, options.dtype, options.prompt)
    made = _prepared(options, chosen, host, media, questions)
    if processes.first:
        claim(options.out, _settings(options, made), options.fresh)
    processes.wait()
    clock = Clock()
    with clock.running():
        _ask_all(made, options, processes, clock, progress)
    processes.wait()
    if not processes.first:
        processes.leave()
        return None
    results: dict[str, Any] = {
        "task": "vqa",
        "benchmark": options.benchmark,
        "title": title,
        "model": options.model,
        "data": None if options.source is None else options.source.data,
        "questions": len(questions),
        "frames": {"unpatched": made.frames, "methods": made.method_frames} if media == "video" else None,
        "machine": {"torch": torch.__version__, "device": str(host.model.device), "dtype": str(host.model.dtype)},
        "batch": options.batch,
        "processes": processes.count,
        "rows": _measured(made, options, processes.count),
        "time": clock.to_dict(),
        "files": {"results": str(options.out / "results.json"), "records": str(options.out / "records")},
    }
    return finish(processes, results, options.out, began)


def _settled(options: VqaOptions) -> tuple[VqaOptions, str]:
    """The options with what was left to the benchmark, and "image" or "video"."""
    if options.benchmark != DIGITS:
        media = benchmark(options.benchmark).media
        _check_frames(options, media)
        if options.source is None:
            raise InvalidParameterError(
                f"--data is missing: {benchmark(options.benchmark).title} is read from "
                f"{benchmark(options.benchmark).files}"
            )
        if options.model is None:
            raise InvalidParameterError("--model is missing: a folder, an id of the hub, or a bundled model")
        return options, media
    if options.source is not None and options.source.data:
        raise InvalidParameterError("--data: the benchmark digits is bundled and reads none; leave it away")
    model = options.model or "digit-vlm"
    media = BUNDLED.get(model, "image")
    _check_frames(options, media)
    runs = DIGIT_RUNS[media] if options.runs is None else options.runs
    return dataclasses.replace(options, model=model, runs=runs), media


def _check_frames(options: VqaOptions, media: str) -> None:
    for name in ("frames", "method_frames"):
        if media != "video" and getattr(options, name) is not None:
            raise InvalidParameterError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is of videos, and these questions are about "
                "images; leave it away"
            )


def _prepared(
    options: VqaOptions, chosen: Sequence[Chosen], host: VLMHost, media: str, questions: Sequence[Question]
) -> _Run:
    """Refuse what does not fit before anything is measured."""
    if host.bundled and BUNDLED[host.name] != media and any(one.media is not None for one in questions):
        other = next(name for name, kind in BUNDLED.items() if kind == media)
        raise InvalidParameterError(f"{host.name} is not made for {media}s; the bundled model that is: {other}")
    known = [name for name, fits in compatibility().items() if fits.get("transformers multimodal")]
    rows, scorer = make_rows(chosen, known), None
    if any(row.described is not None and row.described["method"] == "quota" for row in rows):
        scorer = frame_scorer(options.scorer, host)
        rows = [_with_scorer(row, scorer) for row in rows]
    elif options.scorer is not None:
        raise InvalidParameterError("--scorer is for QuoTA, which no --method names")
    for row in rows:
        with host.under(row.method, options=row.options):
            pass
    found = BENCHMARKS.get(options.benchmark)
    instruction = options.instruction
    if instruction is None:
        instruction = found.instruction if found is not None and not host.bundled else ""
    frames = options.frames or FRAMES.get(options.benchmark, 64)
    return _Run(
        host,
        media,
        questions,
        rows,
        instruction,
        options.tokens or (found.tokens if found is not None else 3),
        frames,
        options.method_frames or frames,
        scorer,
        options.scorer == "equal",
        {path: size_of(path) for path in {path_of(one.media) for one in questions} if path is not None},
    )


def _with_scorer(row: EvalRow, scorer: Any) -> EvalRow:
    if row.described is None or row.described["method"] != "quota" or scorer is None:
        return row
    assert row.method is not None
    return dataclasses.replace(row, method=row.method.replace(scorer=scorer))


def _questions(options: VqaOptions, media: str) -> list[Question]:
    if options.benchmark == DIGITS:
        limit = options.source.limit if options.source is not None else None
        return _bundled_questions(media, limit or DIGIT_QUESTIONS, options.seed)
    assert options.source is not None
    return read_questions(options.benchmark, options.source)


def _bundled_questions(media: str, count: int, seed: int) -> list[Question]:
    """Held-out scenes or clips, with a question each."""
    require("demo", "sklearn", "skimage", what="the bundled questions")
    from tokred.data import DigitClips, QuestionScenes, uniform_frames

    if media == "image":
        batch = QuestionScenes("test", seed).batch(0, count)
        asked = zip(batch.images, batch.questions, batch.answers, batch.kinds, strict=True)
        return [
            Question(str(i), text, Picture(f"scene {i}", partial(_drawn, image)), (answer,), kinds={"kind": kind})
            for i, (image, text, answer, kind) in enumerate(asked)
        ]
    clips = DigitClips("test", seed, CLIP_FRAMES)

    def frames(number: int, wanted: int) -> Any:
        chosen = uniform_frames(CLIP_FRAMES, min(wanted, CLIP_FRAMES))
        return clips.clip(number, chosen).frames.permute(0, 2, 3, 1).numpy()

    found = []
    for i in range(count):
        clip = clips.clip(i, [0])
        video = Video(f"clip {i}", partial(frames, i))
        found.append(Question(str(i), clip.question, video, (clip.answer,), kinds={"kind": clip.kind}))
    return found


def _drawn(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _settings(options: VqaOptions, made: _Run) -> dict[str, Any]:
    """What must not change when a run goes on; rows may come and go."""
    told = [[one.id, one.text, list(one.answers), _inside(options.source, one)] for one in made.questions]
    return {
        "task": "vqa",
        "benchmark": options.benchmark,
        "model": options.model,
        "questions": len(made.questions),
        "digest": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        **identity(made.host.model, made.host.model.device, "transformers", "torchvision", "pillow"),
        "batch": options.batch,
        "instruction": made.instruction,
        "prompt": options.prompt,
        "tokens": made.tokens,
        "frames": [made.frames, made.method_frames] if made.media == "video" else None,
        "scorer": [options.scorer, None if made.scorer is None else digest(made.scorer.model)],
        "seed": options.seed,
        "dtype": str(made.host.model.dtype),
    }


def _inside(source: Source | None, question: Question) -> str | None:
    """The name of the file that a question is about, which a folder keeps that is moved."""
    path = path_of(question.media)
    if path is None or source is None:
        return None
    for folder in (source.images, source.videos, Path(source.data)):
        if folder is not None and path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name


def _check_media(made: _Run, records: Records) -> None:
    """Refuse to go on where an answer was about another file of that name."""
    for one in made.questions:
        if one.id in records and records.done[one.id].get("bytes") != made.size(one):
            raise InvalidParameterError(
                f"{path_of(one.media)} has {made.size(one)} bytes, and had {records.done[one.id].get('bytes')} when "
                "its question was answered; put that file back, or begin anew with --fresh"
            )


def _ask_all(made: _Run, options: VqaOptions, processes: Processes, clock: Clock, progress: Progress) -> None:
    batches = list(enumerate(made.batches(options.batch)))[processes.rank :: processes.count]
    kept = [Records(options.out, row.key, processes.rank) for row in made.rows]
    progress.quiet = progress.quiet or not processes.first
    progress.start("answers", len(made.rows) * sum(len(batch) for _, batch in batches), "answers")
    try:
        for records in kept:
            _check_media(made, records)
        for part in parted(batches, 1 if made.media == "video" else max(TOGETHER // options.batch, 1)):
            _ask(made, part, kept, clock, progress, options.seed)
    finally:
        progress.stop()
        for records in kept:
            records.close()


def _ask(
    made: _Run,
    part: Sequence[tuple[int, Sequence[Question]]],
    kept: Sequence[Records],
    clock: Clock,
    progress: Progress,
    seed: int,
) -> None:
    """Some batches under the rows that have not answered them, each row patched once for all that it has not."""
    host, prepared = made.host, {}
    for row, records in zip(made.rows, kept, strict=True):
        waiting = [(number, batch) for number, batch in part if not all(one.id in records for one in batch)]
        progress.advance(sum(len(batch) for _, batch in part) - sum(len(batch) for _, batch in waiting))
        for own in parted(waiting, 1) if row.random else [waiting] if waiting else []:
            with host.under(row.numbered(seed + own[0][0]), options=row.options) as handle:
                for number, batch in own:
                    key = number, made.frames_of(row)
                    if key not in prepared:
                        with clock.loading():
                            prepared[key] = _inputs(made, batch, made.frames_of(row))
                    inputs, frame_counts = prepared[key]
                    with host.told(handle, [one.text for one in batch], frame_counts, made.equal):
                        answers = host.answer(inputs, made.tokens, handle)
                    clock.model += answers.seconds
                    _record(made, batch, answers, records)
                    progress.advance(len(batch))


def _record(made: _Run, batch: Sequence[Question], answers: Answers, records: Records) -> None:
    records.append(
        {
            "key": one.id,
            "answer": text,
            "tokens": tokens,
            "read": read,
            "seconds": answers.seconds / len(batch),
            "bytes": made.size(one),
        }
        for one, text, tokens, read in zip(batch, answers.texts, answers.tokens, answers.read, strict=True)
        if one.id not in records
    )


def _inputs(made: _Run, batch: Sequence[Question], frames: int) -> tuple[Any, list[int]]:
    """What the model takes, and the frames of each video."""
    host = made.host
    prompts, images, videos, counts = [], [], [], []
    for one in batch:
        text = f"{one.text}\n{made.instruction}" if made.instruction else one.text
        kinds: list[str] = []
        own_images: list[Any] = []
        own_videos: list[Any] = []
        if isinstance(one.media, Picture):
            picture = one.media.open()
            kinds, own_images = ["image"], [_sized(picture, host.side)]
        elif isinstance(one.media, Video):
            shown = one.media.frames(frames)
            counts.append(len(shown))
            if host.takes_videos:
                kinds, own_videos = ["video"], [_sized_frames(shown, host.side)]
            else:
                from PIL import Image

                kinds = ["image"] * len(shown)
                own_images = [_sized(Image.fromarray(frame), host.side) for frame in shown]
        prompts.append(host.prompt(text, kinds))
        images.append(own_images)
        videos.append(own_videos)
    return host.inputs(prompts, images, videos), counts


def _sized(picture: Any, side: int | None) -> Any:
    return picture if side is None or picture.size == (side, side) else picture.resize((side, side))


def _sized_frames(frames: Any, side: int | None) -> Any:
    if side is None or frames.shape[1:3] == (side, side):
        return frames
    import numpy as np
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames])


# -- scores ------------------------------------------------------------------------------------------------------------


def judge(name: str, answer: str, question: Question) -> float:
    """The score of one answer in [0, 1], as the benchmark gives it."""
    return _JUDGES.get(name, _judge_words)(answer, question)


def _judge_words(answer: str, question: Question) -> float:
    return float(gqa_answer(answer) == gqa_answer(question.answers[0]))


def _judge_vqa(normalise: Callable[[str], str]) -> Callable[[str, Question], float]:
    def judged(answer: str, question: Question) -> float:
        return vqa_accuracy(normalise(answer), [normalise(one) for one in question.answers])

    return judged


def _judge_choice(answer: str, question: Question) -> float:
    found = choice(answer, question.options)
    return float(found is not None and question.options[found] == question.answers[0])


_JUDGES: dict[str, Callable[[str, Question], float]] = {
    "vqav2": _judge_vqa(normalise_vqa),
    "textvqa": _judge_vqa(normalise_textvqa),
    "pope": lambda answer, question: float(yes_no(answer) == question.answers[0]),
    "mme": lambda answer, question: float(mme_answer(answer) == question.answers[0]),
    "docvqa": lambda answer, question: anls(answer, question.answers),
    **dict.fromkeys(MULTIPLE_CHOICE, _judge_choice),
}


def summary(
    name: str, questions: Sequence[Question], answers: Sequence[str], scores: Tensor, groups: Tensor
) -> dict[str, Metric]:
    """The metrics of a benchmark, the one that papers print first.

    Args:
        scores: (N,) of `judge`. groups: (N,) int64, questions of one group may depend on each other.
    """
    if name == "mme":
        right = [score == 1 for score in scores.tolist()]
        return mme_scores(right, [one.kinds["sub-task"] for one in questions], [one.group for one in questions])
    if name == "pope":
        said, right_ones = [yes_no(answer) for answer in answers], [one.answers[0] for one in questions]
        found = yes_no_metrics(said, right_ones, groups)
        files = {
            kind: yes_no_metrics([said[i] for i in rows], [right_ones[i] for i in rows], groups[rows])
            for kind, rows in _split(questions).items()
        }
        # F1 of each file first: tables have room for that
        return found | {f"{kind} {metric}": own[metric] for metric in found for kind, own in files.items()}
    kinds = {kind: share(scores[rows], groups[rows]) for kind, rows in _split(questions).items()}
    whole = share(scores, groups)
    if name == "mlvu":
        error = math.sqrt(sum(part.error**2 for part in kinds.values())) / max(len(kinds), 1)
        average = Metric(statistics.mean(part.value for part in kinds.values()), error)
        return {"M-Avg": average, "accuracy": whole, **kinds}
    return {"ANLS" if name == "docvqa" else "accuracy": whole, **kinds}


def _split(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Places of the questions of each kind."""
    found: dict[str, list[int]] = {}
    for i, one in enumerate(questions):
        for heading, value in one.kinds.items():
            name = (
                value
                if heading in ("kind", "duration", "task", "objects", "answer type", "type")
                else f"{heading} {value}"
            )
            found.setdefault(name, []).append(i)
    return dict(sorted(found.items()))


def _measured(made: _Run, options: VqaOptions, processes: int) -> list[dict[str, Any]]:
    questions = [one for batch in made.batches(options.batch) for one in batch]
    groups = group_numbers([one.group or one.id for one in questions])
    drawn_together = [number for number, batch in enumerate(made.batches(options.batch)) for _ in batch]
    shared = joined(groups, torch.tensor(drawn_together))
    asked = [name for name, _ in options.runs or ()]
    plain: Sequence[Mapping[str, Any]] = []
    plain_scores = torch.empty(0)
    measured = []
    name = options.benchmark + ("+subtitles" if options.source is not None and options.source.subtitles else "")
    for row in made.rows:
        own = complete(read(options.out, row.key), [one.id for one in questions], options.out, processes)
        answers = [record["answer"] for record in own]
        scores = torch.tensor([judge(options.benchmark, a, q) for a, q in zip(answers, questions, strict=True)])
        scores = scores.double()
        by = shared if row.random else groups
        metrics = summary(options.benchmark, questions, answers, scores, by)
        record: dict[str, Any] = {
            "kind": "unpatched" if row.method is None else ("random" if row.random else "method"),
            "label": row.label,
            "level": row.level,
            "method": row.described,
            "main": next(iter(metrics)),
            "metrics": {key: asdict_metric(value) for key, value in metrics.items()},
            "visual_tokens": statistics.mean(one["tokens"] for one in own),
            "tokens_read": statistics.mean(one["read"] for one in own),
            "seconds_per_question": statistics.mean(one["seconds"] for one in own),
            "reported": reported(options.model or "", name, row, asked),
        }
        if options.benchmark in MULTIPLE_CHOICE:
            unread = [choice(a, q.options) is None for a, q in zip(answers, questions, strict=True)]
            record["no_option_named"] = sum(unread) / len(unread)
        if row.method is None:
            plain, plain_scores = own, scores
        else:
            same = [gqa_answer(a["answer"]) == gqa_answer(b["answer"]) for a, b in zip(own, plain, strict=True)]
            agreement = share(torch.tensor(same), by)
            record["agreement"], record["agreement_se"] = agreement.value, agreement.error
            record["vs_unpatched"] = paired(scores, plain_scores, by).to_dict()
        measured.append(record)
    return measured


def asdict_metric(metric: Metric) -> dict[str, Any]:
    """JSON types."""
    return {"value": metric.value, "se": metric.error, "percent": metric.percent}


# -- the table ---------------------------------------------------------------------------------------------------------

#: further metrics that the table has room for; all are in results.json
COLUMNS = 7


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean and what papers say."""
    first = results["rows"][0]
    names = [name for name in first["metrics"] if not name.endswith("accuracy+")]
    main, further = names[0], names[1 : COLUMNS + 1]
    header = ["row", "tokens", "read", main, "vs unpatched", "same", *further, "s", "paper says"]
    rows = []
    for row in results["rows"]:
        rows.append(
            [
                row["label"],
                f"{row['visual_tokens']:.0f}",
                f"{row['tokens_read']:.0f}",
                _shown(row["metrics"][main]),
                signed(row.get("vs_unpatched")),
                f"{100 * row['agreement']:.1f}" if "agreement" in row else "",
                *(_plain(row["metrics"].get(name)) for name in further),
                f"{row['seconds_per_question']:.3f}",
                ", ".join(f"{one['value']:g}" for one in row["reported"]),
            ]
        )
    title = f"{results['model']} on {results['title']}: {results['questions']} questions, greedy answers"
    if results["frames"]:
        shown = dict.fromkeys(results["frames"].values())
        title += f", {' or '.join(map(str, shown))} frames"
    machine = results["machine"]
    title += f"; {machine['device']}, {machine['dtype'].removeprefix('torch.')}, torch {machine['torch']}"
    lines = [title, "", table(header, [rows]), "", *textwrap.wrap(LEGEND, 118), *spent(results["time"])]
    sources = dict.fromkeys(one["source"] for row in results["rows"] for one in row["reported"])
    if sources:
        lines += textwrap.wrap(f"paper says: {'; '.join(sources)}", 118)
    return "\n".join(lines)


def _shown(metric: Mapping[str, Any]) -> str:
    if metric["percent"]:
        return percent(metric["value"], metric["se"])
    return f"{metric['value']:.0f} ±{metric['se']:.0f}"


def _plain(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ""
    return f"{100 * metric['value']:.1f}" if metric["percent"] else f"{metric['value']:.0f}"
