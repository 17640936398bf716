"""`tokred bench --task video`: what to show of a clip for as many visual tokens, on the bundled video model.

Evenly spaced frames in full against more frames of which tokens are dropped before the language model (at random, by
EVS, by methods for images) or inside it, or which share the budget (QuoTA, by equal scores or by those of the bundled
CLIP). More frames cost more before the language model: vision tower and scorer are counted apart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.core.decoder import DecoderMethod, PromptMethod
from tokred.core.errors import InvalidParameterError
from tokred.core.flops import flops
from tokred.core.method import Method, VisualMethod
from tokred.core.patch import Patch
from tokred.core.sites import TowerInfo
from tokred.eval.bench import TASKS, BenchOptions, Progress, require
from tokred.eval.inside import SETTINGS, RandomLayer, budget_field, inside_method, tokens_read
from tokred.eval.report import accuracy_plot, curves, dumps, percent, signed, stacked
from tokred.eval.speed import pairs
from tokred.eval.vision import paired, side_by_side
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
    remembered,
    report,
    scores,
    serving,
    time_call,
    visual_method,
)

__all__ = ["INSIDE", "run", "show"]

MODEL = "digit-video-vlm"
TASK = TASKS["video"]
CLIP_FRAMES = 64  # of a clip
FRAMES = 16  # that methods see of them: of each take with an answer at least one
BATCH = 8  # clips that are answered together, and that share one random subset
#: Methods inside the language model, with the settings of questions about images. MustDrop is not among them: it drops
#: by thresholds, which would have to be fitted to each budget on clips.
INSIDE = {label: own for label, own in SETTINGS.items() if own[0] != "mustdrop"}
COLUMNS = {"digit_of_colour": "digit", "colour_of_digit": "colour"}
LEGEND = """
frames: encoded of each clip. tokens: visual tokens that are left behind the last layer of the language model (all that
its layers read, where they go before it), mean over clips (QuoTA rounds down).
accuracy ± standard error over clips. vs even frames: paired on the same clips with evenly spaced frames in full; *
better, ! worse by more than 2 standard errors. Then the accuracy of each kind of question. GMACs (G) of one clip:
prefill of the language model; vision tower; scorer and selection. TTFT: time to the first token of generate on one
clip, vision tower and scorer included, drawing and preprocessing not; speed-up: median of interleaved pairs with even
frames. tok/s: after the first token. cache: keys and values behind the prefill, float32. In a model this small the
vision tower outweighs the language model, so that more frames cost more time than their dropped tokens save.
""".strip()


@dataclass(eq=False)
class Setup:
    """A model, its processor, and the scorer of frames."""

    model: Any
    processor: Any
    scorer: Any

    @contextlib.contextmanager
    def under(self, row: Row, method: Method | None) -> Iterator[Patch | None]:
        """The model as a row has it."""
        if row.scores == "clip":
            method = method.replace(scorer=self.scorer)  # type: ignore[union-attr]
        with patched(self.model, method, self.processor) as handle:
            if row.scores == "equal":
                assert handle is not None
                with handle.request(frame_scores=torch.full((row.frames,), 0.5)):
                    yield handle
            else:
                yield handle

    def forgetful(self) -> Setup:
        """With a scorer that remembers no frames: for timing."""
        return Setup(self.model, self.processor, self.scorer.fresh())


def run(options: BenchOptions, progress: Progress, middle: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, write the pictures and results.json into `options.out`, and return the results (JSON types).

    `middle`: further methods, at the middle budget alone.
    """
    packages = ("transformers", "torchvision", "open_clip", "sklearn", "skimage", "matplotlib", "tqdm")
    require("demo,transformers,openclip", *packages, what="tokred bench --task video")
    began = time.perf_counter()
    refuse(options, "video", "ablate")
    options.check_split()
    setup, weights = _load(options.checkpoint)
    one = _prepared(setup, options, [0], _frame_counts(options))
    rows = _rows(options, setup, one, middle)  # settings that do not fit are refused before anything is measured
    options.out.mkdir(parents=True, exist_ok=True)
    answered, kinds = _answers(setup, rows, options, progress)
    timed = _timed(setup, rows, one.inputs, options.rounds, progress)
    results: dict[str, Any] = {
        "task": "video",
        "model": MODEL,
        "weights": weights,
        "scenes": {"count": len(kinds), "split": options.split, "seed": options.seed, "frames": CLIP_FRAMES},
        "machine": machine(options),
        "rows": _measured(rows, answered, kinds, timed, setup, one.inputs),
    }
    results["files"] = _pictures(results, rows, setup, one, options.out)
    results["seconds"] = round(time.perf_counter() - began, 1)
    Path(results["files"]["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return results


def _load(checkpoint: Path | None) -> tuple[Setup, dict[str, Any]]:
    from tokred.adapters.scorers import OpenClipScorer
    from tokred.zoo.digit_clip import FOLDER as SCORER
    from tokred.zoo.digit_clip import digit_clip
    from tokred.zoo.digit_vlm import FOLDER, digit_video_vlm

    (model, processor), weights = load(digit_video_vlm, checkpoint, FOLDER, "config.json")
    (scoring, preprocess, tokenizer), scorer_weights = load(digit_clip, None, SCORER)
    scorer = OpenClipScorer(scoring, preprocess=preprocess, tokenizer=tokenizer)
    return Setup(model, processor, scorer), {**weights, "scorer": scorer_weights}


# -- rows --------------------------------------------------------------------------------------------------------------


def _levels(options: BenchOptions) -> list[int]:
    from tokred.zoo.digit_vlm import FRAME_TOKENS

    levels = options.levels or TASK.levels
    for level in levels:
        if level % FRAME_TOKENS or not FRAME_TOKENS <= level < FRAMES * FRAME_TOKENS:
            raise InvalidParameterError(
                f"--levels {level:g}: expected numbers of tokens in whole frames of {FRAME_TOKENS}, "
                f"below {FRAMES * FRAME_TOKENS}"
            )
    return [int(level) for level in dict.fromkeys(levels)]


def _frame_counts(options: BenchOptions) -> list[int]:
    """Frames that any row is shown."""
    from tokred.zoo.digit_vlm import FRAME_TOKENS

    return [FRAMES, *(level // FRAME_TOKENS for level in _levels(options))]


def _rows(options: BenchOptions, setup: Setup, one: _Batch, middle: Sequence[str] = ()) -> list[Row]:
    from tokred.zoo.digit_vlm import FRAME_TOKENS

    long = one.inputs[FRAMES]
    before = choosers(prompt_info(setup.model, long).layouts[0])
    known = [*before, *dict.fromkeys(name for name, _ in INSIDE.values())]
    names = check_methods(options, TASK.methods.split(","), known)
    levels = _levels(options)
    half = sorted(levels)[len(levels) // 2]
    rows = [Row("unpatched", f"all {FRAMES} frames", None, frames=FRAMES)]
    for tokens in levels:
        asked = [*names, *(name for name in middle if tokens == half and name not in names)]
        random = visual_method("random_tokens", tokens, options, seed=options.seed)
        rows.append(Row("uniform", "even frames", tokens, frames=tokens // FRAME_TOKENS))
        rows.append(Row("random", "Random", tokens, random, FRAMES))
        for name in (name for name in asked if name in before):
            method = visual_method(name, tokens, options)
            flops(setup.model, long, method)  # refuses a tower that does not have what the method needs
            if name == "quota":
                rows.append(Row("method", "QuoTA, equal", tokens, method, FRAMES, "equal"))
                rows.append(Row("method", "QuoTA, CLIP", tokens, method, FRAMES, "clip"))
            else:
                rows.append(Row("method", method.title, tokens, method, FRAMES))
        inside = _inside(options, asked, tokens)
        if inside:
            control = RandomLayer(budget=tokens, seed=options.seed)
            rows += [Row("random", control.title, tokens, control, FRAMES, inside=True), *inside]
    for row in (row for row in rows if row.inside):
        with patched(setup.model, row.method, setup.processor):
            pass
    return rows


def _inside(options: BenchOptions, names: Sequence[str], tokens: int) -> list[Row]:
    """Rows of methods inside the language model."""
    rows: list[Row] = []
    for label, (name, own) in INSIDE.items():
        if name in names:
            given = options.parameters.get(name, {})
            fixed = [key for key in ("budget", "keep_rate", "counts", budget_field(name)) if key in given]
            if fixed:
                raise InvalidParameterError(f"--set {name}.{fixed[0]}: is set by the benchmark; set other parameters")
            method = inside_method(name, tokens, {**own, **given})
            if all(method != row.method for row in rows):
                rows.append(Row("method", label, tokens, method, FRAMES, inside=True))
    return rows


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    """Some clips: the model's inputs for each number of frames, the frames themselves, and what is asked."""

    inputs: dict[int, Mapping[str, Any]]
    frames: dict[int, list[Tensor]]
    relevant: dict[int, list[Tensor]]
    questions: list[str]
    answers: list[str]
    kinds: list[str]


def _prepared(setup: Setup, options: BenchOptions, clips: Sequence[int], counts: Sequence[int]) -> _Batch:
    """Draw the frames that rows see, and no others."""
    from tokred.data.clips import DigitClips, uniform_frames
    from tokred.zoo import question_prompt

    source = DigitClips(options.split, options.seed, CLIP_FRAMES)
    chosen = {count: uniform_frames(CLIP_FRAMES, count) for count in dict.fromkeys(counts)}
    every = [index for indices in chosen.values() for index in indices]
    batch = _Batch({}, {count: [] for count in chosen}, {count: [] for count in chosen}, [], [], [])
    for number in clips:
        clip = source.clip(number, every)
        for count, frames in zip(chosen, clip.frames.split(list(chosen)), strict=True):
            batch.frames[count].append(frames)
            batch.relevant[count].append(clip.relevant[chosen[count]])
        batch.questions.append(clip.question)
        batch.answers.append(clip.answer)
        batch.kinds.append(clip.kind)
    prompts = [question_prompt(question, "video") for question in batch.questions]
    for count, frames in batch.frames.items():
        videos = [one.numpy() for one in frames]
        batch.inputs[count] = setup.processor(text=prompts, videos=videos, return_tensors="pt", padding=True)
    return batch


def _answers(
    setup: Setup, rows: Sequence[Row], options: BenchOptions, progress: Progress
) -> tuple[dict[str, Answered], list[str]]:
    from tokred.zoo.digit_vlm import FRAME_TOKENS

    count = options.scenes or TASK.scenes
    batches = [list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]
    progress.start("accuracy", count, "clips")

    @torch.inference_mode()
    def run(mine: Setup, job: tuple[int, list[int]]) -> tuple[list[Answered], list[str]]:
        number, clips = job
        batch = _prepared(mine, options, clips, _frame_counts(options))
        tower, memory, found = mine.model.model.vision_tower, {}, []  # type: ignore[var-annotated]
        for row in rows:
            whole = row.frames * FRAME_TOKENS
            once = remembered(tower, memory) if _blind(row, tower) else contextlib.nullcontext()
            with once, mine.under(row, row.numbered(number)) as handle:
                words, left = ask(mine.model, mine.processor, batch.inputs[row.frames], handle)
                if row.inside:
                    assert handle is not None
                    visual = batch.inputs[row.frames]["input_ids"] == mine.model.config.video_token_id
                    left = tokens_read(handle.trace, visual, mine.model.config.text_config.num_hidden_layers).left
            found.append(judged(words, batch.answers, left, whole))
        progress.advance(len(clips))
        return found, batch.kinds

    done = side_by_side(setup, run, list(enumerate(batches)), options.threads)
    parts = zip(*(found for found, _ in done), strict=True)
    answered = {row.key: Answered.joined(part) for row, part in zip(rows, parts, strict=True)}
    return answered, [kind for _, kinds in done for kind in kinds]


def _blind(row: Row, tower: Any) -> bool:
    """Whether a row needs nothing of the layers of the vision tower."""
    if isinstance(row.method, DecoderMethod):
        return row.method.encoder_part() is None and row.method.visual_part() is None
    if not isinstance(row.method, VisualMethod):
        return row.method is None or isinstance(row.method, PromptMethod)
    config = tower.config
    needs = row.method.needs(TowerInfo(config.num_hidden_layers, config.num_attention_heads, True, 0))
    return not (needs.rows or needs.mass or needs.keys or needs.probe)


@torch.inference_mode()
def _timed(
    setup: Setup, rows: Sequence[Row], inputs: Mapping[int, Mapping[str, Any]], rounds: int, progress: Progress
) -> dict[str, Any]:
    """For each row what `serving` says of one clip; the reference is that of evenly spaced frames at equal tokens."""
    uniform = {row.tokens: row for row in rows if row.kind == "uniform"}
    others = {row.key: row for row in rows if row.kind != "uniform"}
    last = rows[-1].tokens
    progress.start("speed, one thread", len(others) * (rounds + 1), "pairs")

    def reference(key: str) -> Call:
        frames = uniform[others[key].tokens or last].frames
        return time_call(setup.model, inputs[frames])

    def reduced(key: str) -> Call:
        row = others[key]
        with setup.forgetful().under(row, row.method):
            return time_call(setup.model, inputs[row.frames])

    times = pairs(list(others), reference, reduced, rounds, progress.advance)
    for tokens, row in uniform.items():
        calls = [plain for key, other in others.items() for plain, _ in times[key] if (other.tokens or last) == tokens]
        times[row.key] = [(call, call) for call in calls]
    found = {}
    for row in rows:
        with setup.under(row, row.method):
            found[row.key] = serving(times[row.key], cache_bytes(setup.model, inputs[row.frames]))
    found[rows[0].key] |= {"speedup": None, "speedup_quartiles": None}  # it has no reference at equal tokens
    return found


# -- results -----------------------------------------------------------------------------------------------------------


def _measured(
    rows: Sequence[Row],
    answered: Mapping[str, Answered],
    kinds: Sequence[str],
    timed: Mapping[str, Any],
    setup: Setup,
    inputs: Mapping[int, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    groups = torch.arange(len(kinds)) // BATCH  # clips that share a random subset
    uniform = {row.tokens: answered[row.key].right for row in rows if row.kind == "uniform"}
    scorer = flops(setup.scorer.model).vision
    measured = []
    for row in rows:
        right, tokens, *_ = answered[row.key]
        own = groups if row.kind == "random" else None
        record: dict[str, Any] = {
            "kind": row.kind,
            "label": row.label,
            "level": row.tokens,
            "inside": row.inside,
            "method": row.method.to_dict() if row.method is not None else None,
            "frame_scores": row.scores,
            "frames": row.frames,
            "visual_tokens": tokens.double().mean().item(),
            **scores(right, kinds, own),
            **_cost(row, setup.model, inputs[row.frames], tokens, scorer),
            **timed[row.key],
        }
        if row.tokens is not None and row.kind != "uniform":
            record["vs_uniform"] = paired(right, uniform[row.tokens], own).to_dict()
        measured.append(record)
    return measured


def _cost(row: Row, model: Any, inputs: Mapping[str, Any], tokens: Tensor, scorer: int) -> dict[str, Any]:
    """Multiply-adds of one clip: of the language model at the tokens that were read, vision tower, and scoring."""
    if row.inside:
        with patched(model, row.method, None):  # the layer that GemFilter measures is the model's
            found = flops(model, {**inputs, "kept_tokens": round(tokens.double().mean().item())})
        parts = {name: getattr(found, name) / 1e9 for name in ("llm", "vision", "scoring")}
        return {"gmacs": sum(parts.values()), "gmacs_parts": parts}
    info = prompt_info(model, inputs)
    counted = flops(model, inputs, [row.method] if row.method else [])
    read, times = tokens.unique(return_counts=True)
    llm = sum(info.decoder.macs(info.text + int(n)) * int(k) for n, k in zip(read, times, strict=True)) / len(tokens)
    scoring = counted.scoring + (scorer * row.frames if row.scores == "clip" else 0)
    parts = {"llm": llm / 1e9, "vision": counted.vision / 1e9, "scoring": scoring / 1e9}
    return {"gmacs": sum(parts.values()), "gmacs_parts": parts}


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean."""
    kinds = list(results["rows"][0]["kinds"])
    header = ["method", "frames", "tokens", "accuracy %", "vs even frames", *(COLUMNS[kind] for kind in kinds)]
    header += ["LLM G", "vision G", "scorer G", "TTFT ms", "speed-up", "tok/s", "cache kB"]
    scenes, machine = results["scenes"], results["machine"]
    title = (
        f"{results['model']}: {scenes['count']} {scenes['split']} clips of {scenes['frames']} frames "
        f"(seed {scenes['seed']}), exact match of greedy answers; {machine['speed_threads']} thread for speed, torch "
        f"{machine['torch']}"
    )
    return report(results, title, header, _cells, LEGEND)


def _cells(row: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    parts = row["gmacs_parts"]
    return [
        row["label"],
        f"{row['frames']}",
        f"{row['visual_tokens']:.0f}",
        percent(row["accuracy"], row["accuracy_se"]),
        signed(row.get("vs_uniform")),
        *(f"{100 * row['kinds'][kind]['accuracy']:.1f}" for kind in kinds),
        f"{parts['llm']:.3f}",
        f"{parts['vision']:.3f}",
        f"{parts['scoring']:.3f}" if parts["scoring"] else "",
        f"{row['ttft_ms']:.0f}",
        f"{row['speedup']:.2f}x" if row["speedup"] is not None else "",
        f"{row['decode_tokens_per_s']:.0f}",
        f"{row['cache_bytes'] / 1000:.0f}",
    ]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(results: Mapping[str, Any], rows: Sequence[Row], setup: Setup, one: _Batch, out: Path) -> dict[str, str]:
    files = {"results": out / "results.json", "frames": out / "frames.png", "plot": out / "accuracy_vs_tokens.png"}
    levels = sorted({row.tokens for row in rows if row.tokens is not None})
    middle = [row for row in rows if row.tokens == levels[len(levels) // 2] and row.method is not None]
    before = [row for row in middle if not row.inside]
    shown = before if len(before) > 1 else middle  # what goes inside is dropped after each frame has been read
    _strips(shown, setup, one).save(files["frames"])
    full, scenes = results["rows"][0], results["scenes"]
    accuracy_plot(
        files["plot"],
        curves([row for row in results["rows"] if not row["inside"]], "visual_tokens"),
        (full["visual_tokens"], full["accuracy"], full["accuracy_se"]),
        f"{MODEL}: what to show of a clip for as many tokens, no training",
        f"{scenes['count']} {scenes['split']} clips of {CLIP_FRAMES} frames; bars and band are one standard error",
        cost="visual tokens that the language model reads",
        of="clips",
        whole=full["label"],
        ticks=[*levels, full["visual_tokens"]],
    )
    return {name: str(path) for name, path in files.items()}


@torch.inference_mode()
def _strips(shown: Sequence[Row], setup: Setup, one: _Batch) -> Any:
    """The first clip as each method leaves it: every frame with its tokens."""
    frames = one.frames[FRAMES][0]
    there = ", ".join(str(i) for i, relevant in enumerate(one.relevant[FRAMES][0].tolist()) if relevant)
    sections = []
    for row in shown:
        with setup.under(row, row.method) as handle:
            words, _ = ask(setup.model, setup.processor, one.inputs[FRAMES], handle)
            assert handle is not None
            title = f"{row.label}: {one.questions[0]} reads {words[0] or 'nothing'}, answer {one.answers[0]}"
            sections.append((f"{title} (in frames {there})", handle.trace.draw(frames)))
    return stacked(sections)
