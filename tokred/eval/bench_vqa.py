"""`tokred bench --task vqa`: which visual tokens to keep, on the bundled LLaVA and held-out questions about images.

Every method leaves the same number of the 144 visual tokens, before the language model or inside it; each is compared,
question by question, with a random choice of as many. Answers are those of `generate`, compared exactly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.core.decoder import DecoderMethod, PromptMethod
from tokred.core.errors import InvalidParameterError
from tokred.core.flops import flops
from tokred.core.method import Method, VisualMethod
from tokred.core.sites import Needs
from tokred.eval.bench import TASKS, BenchOptions, Progress, require
from tokred.eval.inside import (
    SETTINGS,
    RandomLayer,
    budget_field,
    fit_threshold,
    inside_method,
    tokens_read,
)
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
    load,
    machine,
    patched,
    prompt_info,
    refuse,
    remembered,
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
#: validation questions on which MustDrop's threshold is fitted to a budget, and their seed
FITTED, FITTED_SEED = 50, 4021
LEGEND = f"""
tokens: visual tokens left behind the last layer of the language model (all that its layers read, where they go before
it). mean: those that a layer reads, averaged over layers; GemFilter's first pass counts. accuracy ± standard error over
questions. vs random: paired on the same questions with a random choice of as many tokens before the language model (a
new one every {BATCH} questions); vs inside: with random tokens dropped before its layer 2, the twin of DART;
* better, ! worse by more than 2 standard errors. Then the accuracy of each kind of question. GMACs: prefill of one
prompt, vision tower and scoring included. speed-up: of the time to the first token of generate on one prompt, median of
interleaved pairs with the unreduced model; limit: ratio of GMACs. tok/s: after the first token. kB: keys and values
behind the prefill, float32. MustDrop drops by thresholds, which are fitted to the budget on {FITTED} validation
questions.
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
    rows = _rows(options, model, processor, one)  # settings that do not fit are refused before anything is measured
    rows = _fitted(rows, options, model, processor, progress)
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
        "rows": _measured(rows, answered, timed, batches, model, processor, one),
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


def _rows(options: BenchOptions, model: Any, processor: Any, one: Mapping[str, Any]) -> list[Row]:
    layout = prompt_info(model, one).layouts[0]
    total = len(layout.cells)
    before = choosers(layout)
    known = [*before, *dict.fromkeys(name for name, _ in SETTINGS.values())]
    names = check_methods(options, known, known)
    rows = [Row("unpatched", "unreduced", None)]
    levels = options.shares("visual tokens") or TASK.levels
    for tokens in dict.fromkeys(max(1, round(level * total)) for level in levels):
        rows.append(Row("random", "Random", tokens, visual_method("random_tokens", tokens, options, seed=options.seed)))
        for name in names:
            if name in before:
                method = visual_method(name, tokens, options)
                rows.append(Row("method", method.title, tokens, method))
        inside = _inside(options, names, tokens)
        if inside:
            control = RandomLayer(budget=tokens, seed=options.seed)
            rows += [Row("random", control.title, tokens, control, inside=True), *inside]
    for row in rows:
        with patched(model, row.method, processor):
            if row.method is not None and not row.inside:
                flops(model, one)  # refuses a tower that does not have what the method needs
    return rows


def _inside(options: BenchOptions, names: Sequence[str], tokens: int) -> list[Row]:
    """Rows of methods inside the language model."""
    rows: list[Row] = []
    for label, (name, own) in SETTINGS.items():
        if name in names:
            parameters = options.parameters.get(name, {})
            fixed = [key for key in ("budget", "keep_rate", "counts", budget_field(name)) if key in parameters]
            if fixed:
                raise InvalidParameterError(f"--set {name}.{fixed[0]}: is set by the benchmark; set other parameters")
            method = inside_method(name, tokens, {**own, **parameters})
            if all(method != row.method for row in rows):
                rows.append(Row("method", label, tokens, method, inside=True))
    return rows


@torch.inference_mode()
def _fitted(rows: Sequence[Row], options: BenchOptions, model: Any, processor: Any, progress: Progress) -> list[Row]:
    """The rows, with thresholds for MustDrop that leave about the budget of validation questions.

    One threshold serves as the global and the individual one (the released ones are nearly equal), unless one is given.
    """
    from tokred.data.questions import QuestionScenes

    free = [row for row in rows if row.method is not None and row.method.name == "mustdrop"]
    given = options.parameters.get("mustdrop", {})
    if not free or "global_threshold" in given or "individual_threshold" in given:
        return list(rows)
    inputs = _inputs(processor, QuestionScenes("val", FITTED_SEED).batch(0, min(FITTED, options.scenes or FITTED)))
    visual = _visual(model, inputs)
    steps = 8
    progress.start("fitting MustDrop", len(free) * steps, "prefills")
    fitted = {}
    for row in free:
        assert row.method is not None

        def left(threshold: float, method: Method = row.method) -> float:
            tried = method.replace(global_threshold=threshold, individual_threshold=threshold)
            with patched(model, tried, processor) as handle:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                assert handle is not None
                counts = tokens_read(handle.trace, visual, _depth(model)).left
            progress.advance()
            return sum(counts) / len(counts)

        assert row.tokens is not None
        found = fit_threshold(left, row.tokens, steps)
        method = row.method.replace(global_threshold=found, individual_threshold=found)
        fitted[row.key] = replace(row, method=method)
    return [fitted.get(row.key, row) for row in rows]


def _visual(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(B, S) bool: the visual tokens of prompts."""
    return inputs["input_ids"] == model.config.image_token_id


def _depth(model: Any) -> int:
    return int(model.config.text_config.num_hidden_layers)


def _blind(row: Row, model: Any, one: Mapping[str, Any]) -> bool:
    """Whether the vision tower may answer from memory: nothing happens in it, and nobody looks into it."""
    if isinstance(row.method, VisualMethod):
        return row.method.needs(prompt_info(model, one).tower) == Needs()
    if isinstance(row.method, DecoderMethod):
        return row.method.encoder_part() is None and row.method.visual_part() is None
    return row.method is None or isinstance(row.method, PromptMethod)


def _answers(
    model: Any, processor: Any, rows: Sequence[Row], batches: Sequence[Any], options: BenchOptions, progress: Progress
) -> dict[str, Answered]:
    progress.start("accuracy", len(rows) * sum(map(_size, batches)), "answers")
    blind = {row.key for row in rows if _blind(row, model, _inputs(processor, batches[0], 1))}

    @torch.inference_mode()
    def run(mine: tuple[Any, Any], job: tuple[int, Any]) -> list[Answered]:
        (model, processor), (number, batch) = mine, job
        inputs, found = _inputs(processor, batch), []
        visual, memory = _visual(model, inputs), {}  # type: ignore[var-annotated]
        for row in rows:
            once = remembered(model.model.vision_tower, memory) if row.key in blind else contextlib.nullcontext()
            with patched(model, row.numbered(number), processor) as handle, once:
                words, _ = ask(model, processor, inputs, handle)
            read = tokens_read(handle.trace if handle is not None else None, visual, _depth(model))
            right = [word == answer for word, answer in zip(words, batch.answers, strict=True)]
            found.append(Answered(*map(torch.tensor, (right, read.left, read.mean, read.entered))))
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
    processor: Any,
    one: Mapping[str, Any],
) -> list[dict[str, Any]]:
    kinds = [kind for batch in batches for kind in batch.kinds]
    groups = torch.arange(len(kinds)) // BATCH  # questions that share a random subset
    controls = {(row.tokens, row.inside): answered[row.key].right for row in rows if row.kind == "random"}
    unreduced = answered[rows[0].key].right
    measured = []
    for row in rows:
        found = answered[row.key]
        own = groups if row.kind == "random" else None
        record: dict[str, Any] = {
            "kind": row.kind,
            "label": row.label,
            "inside": row.inside,
            "level": row.tokens,
            "method": row.method.to_dict() if row.method is not None else None,
            "visual_tokens": found.tokens.double().mean().item(),
            "entered_tokens": found.entered.double().mean().item(),
            "read_tokens": found.read.double().mean().item(),
            **scores(found.right, kinds, own),
            **_cost(row, found, model, processor, one),
            **timed[row.key],
        }
        if row.method is not None:
            record["vs_unreduced"] = paired(found.right, unreduced, own).to_dict()
        if row.kind == "method" or row.inside:
            record["vs_random"] = paired(found.right, controls[row.tokens, False], groups).to_dict()
        if row.kind == "method" and row.inside:
            record["vs_inside"] = paired(found.right, controls[row.tokens, True], groups).to_dict()
        measured.append(record)
    return measured


def _cost(row: Row, found: Answered, model: Any, processor: Any, one: Mapping[str, Any]) -> dict[str, Any]:
    """Multiply-adds of one prompt; where counts depend on the data, of the average numbers of tokens."""
    method = row.method
    if method is not None and method.name == "mustdrop":  # how many windows were merged
        method = method.replace(retained_tokens=round(found.entered.double().mean().item()))
    sizes = {**one, "kept_tokens": round(found.tokens.double().mean().item())}
    with patched(model, method, processor):  # the layer that GemFilter measures is the model's
        counted = flops(model, sizes)
    parts = {name: getattr(counted, name) / 1e9 for name in ("vision", "llm", "scoring")}
    limit = counted.unreduced / counted.total
    return {"gmacs": counted.total / 1e9, "gmacs_parts": parts, "limit": limit, "decode_gmacs": counted.decode / 1e9}


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean."""
    kinds = list(results["rows"][0]["kinds"])
    header = ["method", "tokens", "mean", "accuracy %", "vs random", "vs inside", *(COLUMNS[kind] for kind in kinds)]
    header += ["GMACs", "speed-up", "limit", "tok/s", "kB"]
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
        f"{row['read_tokens']:.0f}",
        percent(row["accuracy"], row["accuracy_se"]),
        signed(row.get("vs_random")),
        signed(row.get("vs_inside")),
        *(f"{100 * row['kinds'][kind]['accuracy']:.1f}" for kind in kinds),
        f"{row['gmacs']:.3f}",
        f"{row['speedup']:.2f}x",
        f"{row['limit']:.2f}x",
        f"{row['decode_tokens_per_s']:.0f}",
        f"{row['cache_bytes'] / 1000:.0f}",
    ]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(
    results: Mapping[str, Any], rows: Sequence[Row], model: Any, processor: Any, batch: Any, out: Path
) -> dict[str, str]:
    files = {"results": out / "results.json"}
    levels = sorted({row.tokens for row in rows if row.tokens is not None})
    for inside, end in ((False, ""), (True, "_llm")):
        shown = [row for row in rows if row.tokens == levels[len(levels) // 2] and row.inside == inside]
        if shown:
            files[f"kept{end}"], files[f"plot{end}"] = out / f"kept{end}.png", out / f"accuracy_vs_tokens{end}.png"
            _kept(shown, model, processor, batch).save(files[f"kept{end}"])
            _plot(results, levels, inside, files[f"plot{end}"])
    return {name: str(path) for name, path in files.items()}


def _plot(results: Mapping[str, Any], levels: Sequence[int], inside: bool, path: Path) -> None:
    """Accuracy against the visual tokens that a layer reads, of the methods before the language model or inside it."""
    full, scenes = results["rows"][0], results["scenes"]
    where = "inside the language model" if inside else "before the language model"
    accuracy_plot(
        path,
        curves([row for row in results["rows"] if row["inside"] == inside or row["label"] == "Random"], "read_tokens"),
        (full["read_tokens"], full["accuracy"], full["accuracy_se"]),
        f"{MODEL}: visual tokens dropped {where}, no training",
        f"{scenes['count']} {scenes['split']} questions; bars and band are one standard error",
        cost="visual tokens that a layer of the language model reads, on average",
        of="questions",
        whole="unreduced",
        ticks=[*levels, full["read_tokens"]],
    )


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
        [Panel(image, f"{question} {answer}", word == answer)]
        for image, question, answer, word in zip(big, batch.questions, batch.answers, words, strict=False)
    ]
    titles = [(1, "unreduced", f"{model.config.image_seq_length} tokens")]
    for row in shown:
        with patched(model, row.method, processor) as handle:
            words, _ = ask(model, processor, inputs, handle)
            assert handle is not None
            for sample, (panels, word, answer) in enumerate(zip(sheet, words, batch.answers, strict=False)):
                drawn = handle.trace.draw(big[sample], sample=sample) if len(handle.trace) else big[sample]
                panels.append(Panel(drawn, f"reads {word or 'nothing'}", word == answer))
        titles.append((1, row.label, f"{row.tokens} tokens"))
    return contact_sheet(sheet, side, titles)


def _hwc(image: Tensor) -> Any:
    return image.permute(1, 2, 0).numpy()
