"""`tokred bench --task vqa`: which visual tokens to keep, on the bundled LLaVA and held-out questions about images.

Every method keeps the same number of the 144 visual tokens; each is compared, question by question, with a random
choice of as many. Answers are those of `generate`, compared exactly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.core.flops import flops
from tokred.eval.bench import TASKS, BenchOptions, Progress, require
from tokred.eval.report import Panel, accuracy_plot, contact_sheet, curves, dumps, percent, signed
from tokred.eval.speed import pairs
from tokred.eval.vision import BATCH, paired, side_by_side
from tokred.eval.vlm import (
    Answered,
    Call,
    Row,
    ask,
    cache_bytes,
    check_methods,
    choosers,
    judged,
    load,
    machine,
    patched,
    prompt_info,
    refuse,
    report,
    scores,
    serving,
    time_call,
    visual_method,
)

__all__ = ["run", "show"]

MODEL = "digit-vlm"
TASK = TASKS["vqa"]
PICTURED = 5  # questions in kept.png, one of each kind
COLUMNS = {
    "digit_of_colour": "digit",
    "colour_of_digit": "colour",
    "exists": "exists",
    "count": "count",
    "side": "side",
}
LEGEND = f"""
accuracy ± standard error over questions. vs random: paired on the same questions with a random choice of as many tokens
(a new one every {BATCH} questions); * better, ! worse by more than 2 standard errors. Then the accuracy of each kind of
question. GMACs: prefill of one prompt, vision tower and scoring included. TTFT: time to the first token of generate on
one prompt; speed-up: median of interleaved pairs with the unreduced model; limit: ratio of GMACs. tok/s: after the
first token. cache: keys and values behind the prefill, float32.
""".strip()


def run(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """Measure, write the pictures and results.json into `options.out`, and return the results (JSON types)."""
    what = "tokred bench --task vqa"
    require("demo,transformers", "transformers", "torchvision", "sklearn", "skimage", "matplotlib", "tqdm", what=what)
    from tokred.data.questions import QuestionScenes
    from tokred.zoo.digit_vlm import FOLDER, digit_vlm

    began = time.perf_counter()
    refuse(options, "vqa", "ablate")
    options.check_split()
    (model, processor), weights = load(digit_vlm, options.checkpoint, FOLDER, "config.json")
    scenes = QuestionScenes(options.split, options.seed)
    one = _inputs(processor, scenes.batch(0, 1))
    rows = _rows(options, model, one)  # settings that do not fit are refused before anything is measured
    batches = _drawn(scenes, options.scenes or TASK.scenes, progress)
    options.out.mkdir(parents=True, exist_ok=True)
    answered = _answers(model, processor, rows, batches, options, progress)
    timed = _timed(model, processor, rows, one, options.rounds, progress)
    results: dict[str, Any] = {
        "task": "vqa",
        "model": MODEL,
        "weights": weights,
        "scenes": {"count": sum(map(_size, batches)), "split": options.split, "seed": options.seed},
        "machine": machine(options),
        "rows": _measured(rows, answered, timed, batches, model, one),
    }
    results["files"] = _pictures(results, rows, model, processor, batches[0], options.out)
    results["seconds"] = round(time.perf_counter() - began, 1)
    Path(results["files"]["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return results


def _size(batch: Any) -> int:
    return len(batch.answers)


def _drawn(scenes: Any, count: int, progress: Progress) -> list[Any]:
    """The first `count` scenes with their questions, in batches."""
    progress.start("drawing scenes", count, "scenes")
    batches = []
    for start in range(0, count, BATCH):
        batches.append(scenes.batch(start, min(BATCH, count - start)))
        progress.advance(_size(batches[-1]))
    return batches


def _inputs(processor: Any, batch: Any, count: int | None = None) -> Mapping[str, Any]:
    from tokred.zoo import question_prompt

    prompts = [question_prompt(question) for question in batch.questions[:count]]
    images = [image.permute(1, 2, 0).numpy() for image in batch.images[:count]]
    return processor(text=prompts, images=images, return_tensors="pt", padding=True)


def _rows(options: BenchOptions, model: Any, one: Mapping[str, Any]) -> list[Row]:
    layout = prompt_info(model, one).layouts[0]
    total = len(layout.cells)
    known = choosers(layout)
    names = check_methods(options, known, known)
    rows = [Row("unpatched", "unreduced", None)]
    levels = options.shares("visual tokens") or TASK.levels
    for tokens in dict.fromkeys(max(1, round(level * total)) for level in levels):
        random = visual_method("random_tokens", tokens, options, seed=options.seed)
        rows.append(Row("random", "Random", tokens, random))
        for name in names:
            method = visual_method(name, tokens, options)
            flops(model, one, method)  # refuses a tower that does not have what the method needs
            rows.append(Row("method", method.title, tokens, method))
    return rows


def _answers(
    model: Any, processor: Any, rows: Sequence[Row], batches: Sequence[Any], options: BenchOptions, progress: Progress
) -> dict[str, Answered]:
    progress.start("accuracy", len(rows) * sum(map(_size, batches)), "answers")

    @torch.inference_mode()
    def run(mine: tuple[Any, Any], job: tuple[int, Any]) -> list[Answered]:
        (model, processor), (number, batch) = mine, job
        inputs, found = _inputs(processor, batch), []
        for row in rows:
            with patched(model, row.numbered(number), processor) as handle:
                words, left = ask(model, processor, inputs, handle)
            found.append(judged(words, batch.answers, left, model.config.image_seq_length))
            progress.advance(_size(batch))
        return found

    done = side_by_side((model, processor), run, list(enumerate(batches)), options.threads)
    return {row.key: Answered.joined(parts) for row, parts in zip(rows, zip(*done, strict=True), strict=True)}


@torch.inference_mode()
def _timed(
    model: Any, processor: Any, rows: Sequence[Row], one: Mapping[str, Any], rounds: int, progress: Progress
) -> dict[str, Any]:
    """For each row what `serving` says of one prompt; the unreduced one's times are medians over all pairs."""
    unpatched, *others = {row.key: row for row in rows}.items()
    by_key = dict(others)
    progress.start("speed, one thread", len(others) * (rounds + 1), "pairs")

    def reduced(key: str) -> Call:
        with patched(model, by_key[key].method, processor):
            return time_call(model, one)

    times = pairs(list(by_key), lambda key: time_call(model, one), reduced, rounds, progress.advance)
    plain = [pair[0] for found in times.values() for pair in found]
    found = {unpatched[0]: serving([(call, call) for call in plain], cache_bytes(model, one))}
    for key, row in by_key.items():
        with patched(model, row.method, processor):
            found[key] = serving(times[key], cache_bytes(model, one))
    return found


# -- results -----------------------------------------------------------------------------------------------------------


def _measured(
    rows: Sequence[Row],
    answered: Mapping[str, Answered],
    timed: Mapping[str, Any],
    batches: Sequence[Any],
    model: Any,
    one: Mapping[str, Any],
) -> list[dict[str, Any]]:
    kinds = [kind for batch in batches for kind in batch.kinds]
    groups = torch.arange(len(kinds)) // BATCH  # questions that share a random subset
    random = {row.tokens: answered[row.key].right for row in rows if row.kind == "random"}
    unreduced = answered[rows[0].key].right
    measured = []
    for row in rows:
        right, tokens = answered[row.key]
        record: dict[str, Any] = {
            "kind": row.kind,
            "label": row.label,
            "level": row.tokens,
            "method": row.method.to_dict() if row.method is not None else None,
            "visual_tokens": tokens.double().mean().item(),
            **scores(right, kinds, groups if row.kind == "random" else None),
            **_cost(flops(model, one, [row.method] if row.method else [])),
            **timed[row.key],
        }
        if row.method is not None:
            record["vs_unreduced"] = paired(right, unreduced, groups if row.kind == "random" else None).to_dict()
        if row.kind == "method":
            record["vs_random"] = paired(right, random[row.tokens], groups).to_dict()
        measured.append(record)
    return measured


def _cost(counted: Any) -> dict[str, Any]:
    parts = {name: getattr(counted, name) / 1e9 for name in ("vision", "llm", "scoring")}
    limit = counted.unreduced / counted.total
    return {"gmacs": counted.total / 1e9, "gmacs_parts": parts, "limit": limit}


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean."""
    kinds = list(results["rows"][0]["kinds"])
    header = ["method", "tokens", "accuracy %", "vs random", *(COLUMNS[kind] for kind in kinds)]
    header += ["GMACs", "TTFT ms", "speed-up", "limit", "tok/s", "cache kB"]
    scenes, machine = results["scenes"], results["machine"]
    title = (
        f"{results['model']}: {scenes['count']} {scenes['split']} questions (seed {scenes['seed']}), exact match of "
        f"greedy answers; {machine['speed_threads']} thread for speed, torch {machine['torch']}"
    )
    return report(results, title, header, _cells, LEGEND)


def _cells(row: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    return [
        row["label"],
        f"{row['visual_tokens']:.0f}",
        percent(row["accuracy"], row["accuracy_se"]),
        signed(row.get("vs_random")),
        *(f"{100 * row['kinds'][kind]['accuracy']:.1f}" for kind in kinds),
        f"{row['gmacs']:.3f}",
        f"{row['ttft_ms']:.1f}",
        f"{row['speedup']:.2f}x",
        f"{row['limit']:.2f}x",
        f"{row['decode_tokens_per_s']:.0f}",
        f"{row['cache_bytes'] / 1000:.0f}",
    ]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(
    results: Mapping[str, Any], rows: Sequence[Row], model: Any, processor: Any, batch: Any, out: Path
) -> dict[str, str]:
    files = {"results": out / "results.json", "kept": out / "kept.png", "plot": out / "accuracy_vs_tokens.png"}
    levels = sorted({row.tokens for row in rows if row.tokens is not None})
    shown = [row for row in rows if row.tokens == levels[len(levels) // 2]]
    _kept(shown, model, processor, batch).save(files["kept"])
    full, scenes = results["rows"][0], results["scenes"]
    accuracy_plot(
        files["plot"],
        curves(results["rows"], "visual_tokens"),
        (full["visual_tokens"], full["accuracy"], full["accuracy_se"]),
        f"{MODEL}: accuracy against visual tokens, no training",
        f"{scenes['count']} {scenes['split']} questions; bars and band are one standard error",
        cost="visual tokens that the language model reads",
        of="questions",
        whole="unreduced",
        ticks=[*levels, full["visual_tokens"]],
    )
    return {name: str(path) for name, path in files.items()}


@torch.inference_mode()
def _kept(shown: Sequence[Row], model: Any, processor: Any, batch: Any) -> Any:
    """Questions by rows: the image, then for each method the patches that it keeps, and what the model answers."""
    from PIL import Image

    side, count = 180, min(PICTURED, _size(batch))
    big = [
        Image.fromarray(_hwc(image)).resize((side, side), Image.Resampling.LANCZOS) for image in batch.images[:count]
    ]
    inputs = _inputs(processor, batch, count)
    words, _ = ask(model, processor, inputs, None)
    sheet = [
        [Panel(picture, f"{question} {answer}", word == answer)]
        for picture, question, answer, word in zip(big, batch.questions, batch.answers, words, strict=False)
    ]
    titles = [(1, "unreduced", f"{model.config.image_seq_length} tokens")]
    for row in shown:
        with patched(model, row.method, processor) as handle:
            words, left = ask(model, processor, inputs, handle)
            assert handle is not None
            for sample, (panels, word, answer) in enumerate(zip(sheet, words, batch.answers, strict=False)):
                drawn = handle.trace.draw(big[sample], sample=sample) if left else big[sample]
                panels.append(Panel(drawn, f"reads {word or 'nothing'}", word == answer))
        titles.append((1, row.label, f"{row.tokens} tokens"))
    return contact_sheet(sheet, side, titles)


def _hwc(image: Tensor) -> Any:
    return image.permute(1, 2, 0).numpy()
