"""`tokred bench --task needle`: questions about needles in long prompts, on the bundled text model.

A prompt names 16 values among filler words and asks for one of them. GemFilter lets the model read k of its tokens,
chosen by an early layer; methods inside the model (`INSIDE`) drop tokens of the context before a layer. Recall is the
share of prompts whose answer, by greedy `generate`, is the value and the end.
"""

from __future__ import annotations

import contextlib
import functools
import html
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.core.decoder import DecoderMethod
from tokred.core.errors import InvalidParameterError
from tokred.core.flops import flops
from tokred.core.method import Method
from tokred.core.patch import Patch
from tokred.core.trace import LayerStep, PromptStep, Trace
from tokred.eval.bench import TASKS, BenchOptions, Progress, require
from tokred.eval.inside import RandomLayer, RandomPrompt, budget_field, inside_method
from tokred.eval.report import Curve, accuracy_plot, dumps, percent, signed
from tokred.eval.speed import pairs
from tokred.eval.vision import mean, paired, side_by_side
from tokred.eval.vlm import Call, cache_bytes, check_methods, load, machine, patched, refuse, report, serving, time_call

__all__ = ["INSIDE", "run", "show"]

MODEL = "needle-llm"
TASK = TASKS["needle"]
#: tokens of a context and needles in it; prompts of a batch, which share a random choice of columns
CONTEXT, NEEDLES, BATCH = 512, 16, 16
#: GemFilter's layer here, chosen on validation prompts (the table has every other one at the middle budget)
LAYER = 1
#: Settings of methods inside the model, all of which drop before the layer that finds the value, or at it: behind it
#: the last word holds what was asked for, and a random choice before layer 2 loses nothing (the table has that, too).
INSIDE: dict[str, dict[str, Any]] = {
    "fastv": {"layer": LAYER},
    "pyramiddrop": {"stages": (1, 2, 3)},
    "dart": {"layer": LAYER},
    "sparsevlm": {"stages": (0, 1, 2)},
    "corematching": {"prune_layer": 0, "beta": 1.0},
}
LEGEND = f"""
tokens: of the prompt that are left behind the last layer (GemFilter: that all layers read); layer: the one that chose
them, from 0, inside the model the one before which the first went. recall ± standard error over prompts: the value and
the end, by greedy generate. vs random: paired on the same prompts with random tokens of the context and the whole
question (other ones every {BATCH} prompts); * better, ! worse by more than 2 standard errors. needle: share of prompts
of which both the name and the value of the needle were kept. of whole: recall as a share of that of the unreduced
model. GMACs: prefill of one prompt, the choice included. TTFT: time to the first token of generate on one prompt;
speed-up: median of interleaved pairs with the unreduced model; limit: ratio of GMACs. tok/s: after the first token.
cache: keys and values behind the prefill, float32.
""".strip()
INSIDE_LEGEND = f"""
Methods inside drop tokens of the context alone; vs inside: paired with random ones dropped before layer {LAYER}.
""".strip()


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table before it is measured.

    Attributes:
        kind: "unpatched", "random", "method", or "layer" for one of the other layers. label: of the table.
        tokens: k, None for all. method: None runs the model as it is.
    """

    kind: str
    label: str
    tokens: int | None = None
    method: Method | None = None

    @property
    def key(self) -> str:
        return f"{self.kind} {self.label} {self.tokens} {getattr(self.method, 'layer', None)}"

    @property
    def inside(self) -> bool:
        return isinstance(self.method, DecoderMethod)

    def numbered(self, number: int) -> Method | None:
        """The method for batch `number`: random tokens are drawn anew for each batch."""
        if isinstance(self.method, (RandomPrompt, RandomLayer)):
            return self.method.replace(seed=self.method.seed + number)
        return self.method


class Answered(NamedTuple):
    """Of one row, prompt by prompt: (N,) bool, whether the answer was right, and whether name and value were kept."""

    right: Tensor
    found: Tensor


def run(options: BenchOptions, progress: Progress, middle: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, write the pictures and results.json into `options.out`, and return the results (JSON types).

    `middle`: further methods, at the middle budget alone.
    """
    require("demo,transformers", "transformers", "matplotlib", "tqdm", what="tokred bench --task needle")
    from tokred.data.needles import NeedleContexts
    from tokred.zoo.needle_llm import FOLDER, needle_llm

    began = time.perf_counter()
    refuse(options, "needle", "ablate")
    options.check_split()
    (model, _), weights = load(needle_llm, options.checkpoint, FOLDER, "config.json")
    context = _context(options, model)
    contexts = NeedleContexts(options.split, options.seed, context, NEEDLES)
    rows = _rows(options, model, context, middle)  # settings that do not fit are refused before anything is measured
    count = options.scenes or TASK.scenes
    batches = [contexts.batch(start, min(BATCH, count - start)) for start in range(0, count, BATCH)]
    one = _inputs(contexts.batch(0, 1))
    options.out.mkdir(parents=True, exist_ok=True)
    answered = _answers(model, rows, batches, options, progress)
    timed = _timed(model, rows, one, options.rounds, progress)
    results: dict[str, Any] = {
        "task": "needle",
        "model": MODEL,
        "weights": weights,
        "scenes": {
            "count": count,
            "split": options.split,
            "seed": options.seed,
            "tokens": context,
            "prompt_tokens": one["input_ids"].shape[1],
            "needles": NEEDLES,
        },
        "machine": machine(options),
        "rows": _measured(rows, answered, timed, model, one),
    }
    results["example"] = _example(rows, model, batches[0])
    results["files"] = _pictures(results, options.out)
    results["seconds"] = round(time.perf_counter() - began, 1)
    Path(results["files"]["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return results


def _context(options: BenchOptions, model: Any) -> int:
    context = options.context or CONTEXT
    most = model.config.max_position_embeddings - 8  # the question and the answer
    if not 8 * NEEDLES <= context <= most:
        raise InvalidParameterError(f"--context {context}: expected {8 * NEEDLES} to {most} tokens")
    return context


def _rows(options: BenchOptions, model: Any, context: int, middle: Sequence[str] = ()) -> list[Row]:
    names = check_methods(options, ("gemfilter",), ("gemfilter", *INSIDE), control=None)
    counts = list(dict.fromkeys(options.counts("tokens of the prompt") or map(int, TASK.levels)))
    if max(counts) > context:
        raise InvalidParameterError(f"--levels {max(counts)}: expected numbers of tokens up to {context}")
    if min(counts) <= _fixed() and any(name in INSIDE for name in names):
        raise InvalidParameterError(f"--levels {min(counts)}: methods inside keep {_fixed()} tokens in any case")
    half = counts[len(counts) // 2]
    rows = [Row("unpatched", "unreduced")]
    for tokens in counts:
        asked = [*names, *(name for name in middle if tokens == half and name not in names)]
        rows.append(Row("random", "Random", tokens, RandomPrompt(k=tokens, keep_last=_question(), seed=options.seed)))
        if "gemfilter" in asked:
            method = _method("gemfilter", tokens, options, {"layer": LAYER})
            rows.append(Row("method", method.title, tokens, method))
        inside = [_method(name, tokens - _fixed(), options, INSIDE[name]) for name in asked if name in INSIDE]
        if inside:
            control = RandomLayer(layer=LAYER, budget=tokens - _fixed(), seed=options.seed)
            rows.append(Row("random", control.title, tokens, control))
            rows += [Row("method", method.title, tokens, method) for method in inside]
    if any(row.inside for row in rows):
        later = RandomLayer(layer=LAYER + 1, budget=half - _fixed(), seed=options.seed)
        rows.append(Row("random", f"{later.title}, later", half, later))
    if "gemfilter" in names:
        chosen = _method("gemfilter", half, options, {"layer": LAYER})
        others = [chosen.replace(layer=other) for other in range(model.config.num_hidden_layers)]
        rows += [Row("layer", chosen.title, half, other) for other in others if other != chosen]
    for row in rows:
        with patched(model, row.method, None):
            pass
    return rows


def _method(name: str, tokens: int, options: BenchOptions, own: Mapping[str, Any]) -> Method:
    """With a budget of `tokens`, the settings of this benchmark, and those of --set over them."""
    given = options.parameters.get(name, {})
    fixed = [key for key in ("budget", "keep_rate", "counts", budget_field(name)) if key in given]
    if fixed:
        raise InvalidParameterError(f"--set {name}.{fixed[0]}: is set by the benchmark; set other parameters")
    return inside_method(name, tokens, {**own, **given})


def _fixed() -> int:
    """Tokens that methods inside may not drop: the first one and the question."""
    return 1 + _question()


@contextlib.contextmanager
def _under(model: Any, method: Method | None, inputs: Mapping[str, Tensor]) -> Iterator[Patch | None]:
    """The model as a row has it; methods inside may drop the context of these prompts."""
    with patched(model, method, None) as handle:
        if handle is None or not isinstance(method, DecoderMethod):
            yield handle
            return
        prunable = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        prunable[:, 1 : -_question()] = True
        with handle.request(prunable=prunable):
            yield handle


def _steps(trace: Trace | None) -> list[PromptStep | LayerStep]:
    return [] if trace is None else [*trace.prompt, *trace.layers]


def _kept(trace: Trace | None) -> Sequence[Sequence[int]]:
    """Columns of the prompt that went on, of each sample; () says all."""
    steps = _steps(trace)
    return steps[-1].kept if steps else ()


def _question() -> int:
    from tokred.data.needles import QUESTION

    return QUESTION


def _inputs(batch: Any) -> dict[str, Tensor]:
    prompts = batch.prompts()
    return {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}


def _answers(
    model: Any, rows: Sequence[Row], batches: Sequence[Any], options: BenchOptions, progress: Progress
) -> dict[str, Answered]:
    from tokred.zoo.needle_llm import EOS

    progress.start("recall", len(rows) * sum(len(batch.answers) for batch in batches), "answers")

    @torch.inference_mode()
    def run(model: Any, job: tuple[int, Any]) -> list[Answered]:
        number, batch = job
        inputs, done = _inputs(batch), []
        for row in rows:
            with _under(model, row.numbered(number), inputs) as handle:
                said = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            right = (said[:, 0] == batch.answers[:, 0]) & (said[:, -1] == EOS)
            done.append(Answered(right, _found(_kept(handle.trace if handle is not None else None), batch)))
            progress.advance(len(right))
        return done

    parts = side_by_side(model, run, list(enumerate(batches)), options.threads)
    return {
        row.key: Answered(*(torch.cat(values) for values in zip(*done, strict=True)))
        for row, done in zip(rows, zip(*parts, strict=True), strict=True)
    }


def _found(columns_of: Sequence[Sequence[int]], batch: Any) -> Tensor:
    """(B,) bool: whether name and value of the needle that is asked for went on."""
    from tokred.data.needles import NAME_AT, VALUE_AT

    starts = batch.answer_spans()[:, 0].tolist()
    if not columns_of:
        return torch.ones(len(starts), dtype=torch.bool)
    kept = zip(columns_of, starts, strict=True)
    return torch.tensor([{start + NAME_AT, start + VALUE_AT} <= set(columns) for columns, start in kept])


@torch.inference_mode()
def _timed(
    model: Any, rows: Sequence[Row], one: Mapping[str, Tensor], rounds: int, progress: Progress
) -> dict[str, Any]:
    """For each row what `serving` says of one prompt; the unreduced one's times are medians over all pairs."""
    unpatched, *others = rows
    by_key = {row.key: row for row in others}
    progress.start("speed, one thread", len(others) * (rounds + 1), "pairs")

    def reduced(key: str) -> Call:
        with _under(model, by_key[key].method, one):
            return time_call(model, one)

    times = pairs(list(by_key), lambda key: time_call(model, one), reduced, rounds, progress.advance)
    plain = [pair[0] for found in times.values() for pair in found]
    found = {unpatched.key: serving([(call, call) for call in plain], cache_bytes(model, one))}
    for key, row in by_key.items():
        with _under(model, row.method, one):
            found[key] = serving(times[key], cache_bytes(model, one))
    return found


# -- results -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _measured(
    rows: Sequence[Row],
    answered: Mapping[str, Answered],
    timed: Mapping[str, Any],
    model: Any,
    one: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    whole = answered[rows[0].key].right
    groups = torch.arange(len(whole)) // BATCH  # prompts that share a random choice
    controls = {(row.label, row.tokens): answered[row.key].right for row in rows if row.kind == "random"}
    measured = []
    for row in rows:
        right, found = answered[row.key]
        share = mean(right, groups if row.kind == "random" else None)
        with _under(model, row.method, one) as handle:
            model.generate(**one, max_new_tokens=1, do_sample=False)
            trace = handle.trace if handle is not None else Trace(None)
            whole_prompt = one["input_ids"].shape[1]
            left = len(_kept(trace)[0]) if _kept(trace) else whole_prompt
            sizes = {"text_tokens": whole_prompt, "prunable_tokens": whole_prompt - _fixed()}
            counted = flops(model, {**sizes, "kept_tokens": left - _fixed()} if row.inside else one)
        steps = _steps(trace)
        record: dict[str, Any] = {
            "kind": row.kind,
            "label": row.label,
            "level": row.tokens,
            "method": row.method.to_dict() if row.method is not None else None,
            "inside": row.inside,
            "layer": steps[0].layer if steps and (row.kind != "random" or row.inside) else None,
            "tokens": left,
            "recall": share.value,
            "recall_se": share.error,
            "of_whole": share.value / max(whole.double().mean().item(), 1e-9),
            "found": found.double().mean().item(),
            "gmacs": counted.total / 1e9,
            "limit": counted.unreduced / counted.total,
            **timed[row.key],
        }
        if row.method is not None:
            record["vs_unreduced"] = paired(right, whole, groups if row.kind == "random" else None).to_dict()
        if row.kind in ("method", "layer"):
            record["vs_random"] = paired(right, controls["Random", row.tokens], groups).to_dict()
        if row.kind == "method" and row.inside:
            record["vs_inside"] = paired(right, controls[RandomLayer.title, row.tokens], groups).to_dict()
        measured.append(record)
    return measured


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean, and what was kept of one prompt."""
    inside = any(row["inside"] for row in results["rows"])
    header = [
        "method",
        "tokens",
        "layer",
        "recall %",
        "vs random",
        *["vs inside"] * inside,
        "needle",
        "of whole",
        "GMACs",
        "TTFT ms",
    ]
    header += ["speed-up", "limit", "tok/s", "cache kB"]
    scenes, machine = results["scenes"], results["machine"]
    title = (
        f"{results['model']}: {scenes['count']} {scenes['split']} prompts (seed {scenes['seed']}) of "
        f"{scenes['prompt_tokens']} tokens with {scenes['needles']} needles; {machine['speed_threads']} thread for "
        f"speed, torch {machine['torch']}"
    )
    example = results["example"]
    said = ["", f"one prompt: {example['question']} ({example['answer']}); of its tokens, these were read:"]
    for kept in example["kept"]:
        said.append(f"  {kept['label']}, {kept['tokens']}: {_short(kept['words'])} -> {kept['said']}")
    rows = [{**row, "inside": row["kind"] == "layer"} for row in results["rows"]]
    legend = f"{LEGEND} {INSIDE_LEGEND}" if inside else LEGEND
    cells = functools.partial(_cells, inside=inside)
    return "\n".join([report({**results, "rows": rows}, title, header, cells, legend, ("layer",)), *said])


def _short(text: str, longest: int = 90) -> str:
    """The end of a text, which says what was asked."""
    return text if len(text) <= longest else "... " + text[-longest:].partition(" ")[2]


def _cells(row: Mapping[str, Any], kinds: Sequence[str], inside: bool) -> list[str]:
    return [
        row["label"],
        str(row["tokens"]),
        "" if row["layer"] is None else str(row["layer"]),
        percent(row["recall"], row["recall_se"]),
        signed(row.get("vs_random")),
        *[signed(row.get("vs_inside"))] * inside,
        f"{100 * row['found']:.1f}",
        f"{100 * row['of_whole']:.1f}",
        f"{row['gmacs']:.3f}",
        f"{row['ttft_ms']:.1f}",
        f"{row['speedup']:.2f}x",
        f"{row['limit']:.2f}x",
        f"{row['decode_tokens_per_s']:.0f}",
        f"{row['cache_bytes'] / 1000:.0f}",
    ]


# -- pictures ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _example(rows: Sequence[Row], model: Any, batch: Any) -> dict[str, Any]:
    """What each method let through of the first prompt at each budget, and what the model then said."""
    from tokred.data.needles import text_of

    ids = batch.prompts()[:1]
    start, stop = batch.answer_spans()[0].tolist()
    kept = []
    for row in rows:
        if row.kind == "method":
            with _under(model, row.method, {"input_ids": ids}) as handle:
                said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
                assert handle is not None
                columns = list(_kept(handle.trace)[0]) if _kept(handle.trace) else list(range(ids.shape[1]))
            record: dict[str, Any] = {"label": row.label, "tokens": row.tokens, "said": text_of(said[0, -1:])}
            kept.append({**record, "words": _apart(text_of(ids[0]).split(), columns), "columns": columns})
    return {
        "question": text_of(batch.questions[0, 0]),
        "answer": text_of(batch.answers[0]),
        "needle": [start, stop],
        "words": text_of(ids[0]).split(),
        "kept": kept,
    }


def _apart(words: Sequence[str], columns: Sequence[int]) -> str:
    """The words of these columns, with " ... " where others are missing between them."""
    parts, before = [], -1
    for column in columns:
        parts += [*["..."] * (column > before + 1), words[column]]
        before = column
    return " ".join(parts)


def _pictures(results: Mapping[str, Any], out: Path) -> dict[str, str]:
    files = {"results": out / "results.json", "plot": out / "recall_vs_tokens.png", "words": out / "words.html"}
    files["words"].write_text(_page(results["example"]), encoding="utf-8")
    full, scenes = results["rows"][0], results["scenes"]
    lines = []
    shown = [row for row in results["rows"] if row["kind"] in ("method", "random")]
    for kind, label in dict.fromkeys((row["kind"], row["label"]) for row in shown):
        own = [row for row in shown if row["label"] == label]
        points = [(row["tokens"], row["recall"], row["recall_se"]) for row in own]
        lines.append(Curve(label, points, dashed=kind == "random"))
    accuracy_plot(
        files["plot"],
        lines,
        (full["tokens"], full["recall"], full["recall_se"]),
        f"{MODEL}: recall of a needle against tokens of the prompt that are read",
        f"{scenes['count']} {scenes['split']} prompts with {NEEDLES} needles; bars and band are one standard error",
        cost="tokens of the prompt that are left",
        of="prompts",
        whole="unreduced",
        ticks=[*sorted({row["tokens"] for row in results["rows"]})],
    )
    return {name: str(path) for name, path in files.items()}


def _page(example: Mapping[str, Any]) -> str:
    """A page with the prompt once for each budget: what was read is dark, the needle underlined."""
    start, stop = example["needle"]
    sections = []
    for kept in example["kept"]:
        read, words = set(kept["columns"]), []
        for column, word in enumerate(example["words"]):
            classes = ["read"] * (column in read) + ["needle"] * (start <= column < stop)
            text = html.escape(word)
            words.append(f'<span class="{" ".join(classes)}">{text}</span>' if classes else text)
        title = f"{kept['label']}, {kept['tokens']} of {len(words)} tokens: says {kept['said']}"
        sections.append(f"<h2>{html.escape(title)}</h2>\n<p>{' '.join(words)}</p>")
    asked = html.escape(f"{example['question']} ({example['answer']})")
    style = (
        "body{max-width:60rem;margin:2rem auto;font:15px/1.7 system-ui,sans-serif;color:#c3c7cf}h1,h2{color:#1f2430}"
        "h2{font-size:1rem}.read{color:#1f2430;background:#dbeafe}.needle{border-bottom:3px solid #d97706}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{asked}</title><style>{style}</style>\n<h1>{asked}</h1>\n'
        + "\n".join(sections)
        + "\n"
    )
