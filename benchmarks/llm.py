"""Methods inside a language model: time to the first token and per token after it, memory, and what theory allows.

    OMP_NUM_THREADS=1 python benchmarks/llm.py [--sections gemfilter,corematching,mustdrop,overhead] [--pairs 10]
                             [--prompts 4096,8192,16384,32768] [--clock wall|cpu] [--dry-run] [--json] [--save]
    python benchmarks/llm.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --prompts 8192,32768,131072

gemfilter     a long prompt and 32 tokens of answer; the language model has the shape of the bundled needle LLM, and the
              filter layer lies at 13/32 of its depth, as in the paper. Its peer reads the last k tokens of the prompt
              and nothing else: what a choice for nothing would take.
corematching  decoding with 0.4 of the neurons, in 4 layers as wide as Llama-7B. Its peer is a model that was built with
              so many neurons.
mustdrop      one answer of a narrow LLaVA-1.5 (24 and 32 layers, 576 cells and 60 text tokens). Its peer is FastV.
overhead      what hooks add to each token of a model of 6 layers of 128, where nothing is gained.

--shape llama-3.1-8b takes that model's shape for gemfilter, and those of Llama-7B and LLaVA-1.5-7B for the others.
Weights are random: speed does not depend on them.

A round runs the model unpatched, under the method, and the peer, moments apart, in an order that turns around from
round to round. A line is the median over rounds of the paired ratios with its 95 % interval (order statistics), and
the share of a limit: to the first token the ratio of multiply-adds (of attention the half that a causal kernel does;
scoring not counted), for a token after it the ratio of the bytes read (weights in use and cache), for a whole answer
each part at its own limit. A target is met when the interval reaches it.

``--clock cpu`` counts processor time of the one thread, which holds better where other jobs share the core.

Peak memory is, on a GPU, what was allocated at most, weights included; on a CPU what a process of its own held at most
while it read the prompt, beyond what it held before (resident set of a fork; getrusage would tell the parent's).
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import vlm
from torch import nn
from vit import machine, median_interval

import tokred
from tokred.adapters.decoder_parts import decoder_info
from tokred.adapters.logical_cache import layer_states
from tokred.core.sites import DecoderInfo
from tokred.zoo.needle_llm import CONFIG as NEEDLE

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SECTIONS = ("gemfilter", "corematching", "mustdrop", "overhead")
RESULTS = Path(__file__).parent / "results"
#: of the paper: the filter layer of a model of 32 layers, and tokens kept
FILTER_SHARE, KEPT = 13 / 32, 1024
TARGET_DECODE = 0.90
BETA = 0.4
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
#: tower, image and language model of a LLaVA-1.5 that a CPU runs in seconds: its depths, not its widths
NARROW = vlm.Shape(tower=(256, 24, 4), image=336, patch=14, dim=512, layers=32, heads=8, mlp=1376)
TINY = vlm.Shape(tower=(32, 3, 2), image=84, patch=14, dim=64, layers=4, heads=4, mlp=128)
#: GemFilter, Llama-3.1-8B, k = 1024, H100 (bar chart of the paper)
PAPER_128K = "paper says 17.0 -> 7.4 s to the first token, 2.4 -> 0.6 s for the answer, 45.5 -> 22 GB peak, on an H100"
PAPER = "paper says 2.4x, and -30 % memory against SnapKV, for 128k tokens in Llama-3.1-8B"


# -- runs --------------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """Seconds to the first token and per token after it; bytes of the cache, and at the peak (CUDA only)."""

    first: float
    token: float
    tokens: int
    cache: int
    peak: int

    @property
    def total(self) -> float:
        return self.first + (self.tokens - 1) * self.token


class Ticks(transformers.generation.streamers.BaseStreamer):
    """When each token of a `generate` came; the prompt is the first "token"."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock, self.times = device, clock, []

    def put(self, value: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(self.clock())

    def end(self) -> None:
        pass


@torch.inference_mode()
def answer(
    model: Any, inputs: Mapping[str, Any], tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[Answer, Any]:
    """Generate so many tokens; how long it took, and the cache."""
    device = model.device
    ticks = Ticks(device, clock)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    made = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, streamer=ticks, return_dict_in_generate=True
    )
    _, first, *rest = ticks.times
    assert len(rest) == tokens - 1
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in made.past_key_values.layers)
    token = (rest[-1] - first) / len(rest) if rest else 0.0
    return Answer(first - start, token, tokens, cache, peak), made.past_key_values


@dataclass
class Case:
    """One model to run: the unreduced one, a method, or a peer.

    Attributes:
        run: generates once. macs: multiply-adds to the first token, one number or a function that is asked after a run.
        weights: bytes of the weights that one token after it reads. target: share of the limit of those tokens.
        notes: printed beside it; strings, or functions that are asked after the last run.
    """

    name: str
    run: Callable[[], Answer]
    macs: int | Callable[[], int]
    weights: int
    target: float | None = None
    notes: tuple[str | Callable[[], str], ...] = ()


def rounds(cases: list[Case], pairs: int, warm: int = 1) -> list[list[Answer]]:
    """For each case its runs: a round visits all, in an order that turns around; `warm` rounds are not counted."""
    taken: list[list[Answer]] = [[] for _ in cases]
    for number in range(-warm, pairs):
        order = range(len(cases)) if number % 2 else reversed(range(len(cases)))
        for index in order:
            run = cases[index].run()
            if number >= 0:
                taken[index].append(run)
    return taken


# -- rows --------------------------------------------------------------------------------------------------------------


def rows_of(
    section: str, prompt: int, cases: list[Case], taken: list[list[Answer]], measures: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One row for each case and measure; the first case is the unreduced model."""
    macs = [case.macs() if callable(case.macs) else case.macs for case in cases]
    reads = [case.weights + runs[0].cache for case, runs in zip(cases, taken, strict=True)]
    plain = taken[0]
    rows = []
    for index, (case, runs) in enumerate(zip(cases, taken, strict=True)):
        first, token = macs[0] / macs[index], reads[0] / reads[index]
        whole = statistics.median(p.total / (p.first / first + (p.tokens - 1) * p.token / token) for p in plain)
        limits = {"first token": first, "next tokens": token, "answer": whole}
        for measure in measures:
            row = {
                "section": section,
                "prompt": prompt,
                "method": case.name,
                "measure": measure,
                "seconds": statistics.median(seconds(run, measure) for run in runs),
                "cache_mib": runs[0].cache / 2**20,
                "peak_mib": max(run.peak for run in runs) / 2**20 or None,
                "notes": [note() if callable(note) else note for note in case.notes],
                "target": case.target if measure == "next tokens" else None,
                "met": None,
            }
            if index:
                row |= compared(plain, runs, measure, limits[measure])
                row["added_ms"] = 1e3 * statistics.median(
                    seconds(r, measure) - seconds(p, measure) for p, r in zip(plain, runs, strict=True)
                )
                row["met"] = None if row["target"] is None else row["share_95"][1] >= row["target"]
            rows.append(row)
    return rows


def compared(plain: list[Answer], runs: list[Answer], measure: str, limit: float) -> dict[str, Any]:
    ratios = [seconds(p, measure) / seconds(r, measure) for p, r in zip(plain, runs, strict=True)]
    middle, low, high = median_interval(ratios)
    return {
        "speedup": middle,
        "speedup_95": [low, high],
        "limit": limit,
        "share": middle / limit,
        "share_95": [low / limit, high / limit],
    }


def seconds(run: Answer, measure: str) -> float:
    return {"first token": run.first, "next tokens": run.token, "answer": run.total}[measure]


# -- models ------------------------------------------------------------------------------------------------------------


def language_model(given: argparse.Namespace, **config: Any) -> Any:
    """A Llama with random weights that never ends its answer."""
    settings = {"vocab_size": 256, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0, **config}
    torch.manual_seed(0)
    with torch.device(given.device):
        made = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**settings), attn_implementation="sdpa", dtype=getattr(torch, given.dtype)
        )
    return made.to(given.device).eval()


def twin(model: nn.Module) -> Any:
    """A model that shares the weights of another one, to be patched by itself."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def text(given: argparse.Namespace, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    ids = torch.randint(8, vocabulary, (1, length)).to(given.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def weight_bytes(model: Any, info: DecoderInfo, layer_macs: int | None = None) -> int:
    """Bytes of the weights that one token reads: of all layers, and of the head."""
    layers = info.depth * info.layer_macs if layer_macs is None else layer_macs
    head = model.get_output_embeddings().weight
    return (layers + head.numel()) * head.element_size()


# -- GemFilter ---------------------------------------------------------------------------------------------------------


def gemfilter_model(given: argparse.Namespace) -> tuple[Any, tokred.Method]:
    """The model and the method. The paper's layer of Llama-3.1-8B is found by its shape."""
    if given.shape == "llama-3.1-8b" and not given.dry_run:
        return language_model(given, **LLAMA_8B, max_position_embeddings=131072 + 64), tokred.GemFilter(k=KEPT)
    shape = {key: value for key, value in NEEDLE.items() if not key.endswith("_token_id")}
    model = language_model(given, **{**shape, "max_position_embeddings": max(given.prompts) + 64})
    layer = round(FILTER_SHARE * model.config.num_hidden_layers)
    return model, tokred.GemFilter(k=16 if given.dry_run else KEPT, layer=layer)


def gemfilter(given: argparse.Namespace) -> list[dict[str, Any]]:
    model, method = gemfilter_model(given)
    patched = twin(model)
    tokred.patch(patched, method)
    info, new = decoder_info(model.model), 4 if given.dry_run else 32
    name = f"GemFilter k={method.k}"
    peaks: dict[tuple[str, int], float] = {}
    if given.device == "cpu":  # before this process has run anything, and kept memory of it
        for length in given.prompts:
            for called, one in (("unreduced", model), (name, patched)):
                peaks[called, length] = peak_memory(one, text(given, length, info.vocabulary))
    weights, rows = weight_bytes(model, info), []
    for number, length in enumerate(given.prompts):
        inputs = text(given, length, info.vocabulary)
        ends = {name: value[:, -method.k :] for name, value in inputs.items()}
        cost = tokred.flops(patched, length, causal=True)
        paper = PAPER_128K if given.shape == "llama-3.1-8b" and length == 131072 else PAPER
        cases = [
            Case("unreduced", lambda i=inputs: answer(model, i, new, given.clock)[0], cost.unreduced, weights),
            Case(
                name,
                lambda i=inputs: answer(patched, i, new, given.clock)[0],
                cost.total - cost.scoring,
                weights,
                notes=(paper,),
            ),
            Case(
                f"last {method.k} tokens",
                lambda i=ends: answer(model, i, new, given.clock)[0],
                tokred.flops(model, method.k, causal=True).total,
                weights,
            ),
        ]
        taken = rounds(cases, given.pairs, warm=int(number == 0))
        made = rows_of("gemfilter", length, cases, taken, ("first token", "next tokens"))
        for row in made:
            row["peak_mib"] = row["peak_mib"] or peaks.get((row["method"], length))
        rows += made
    return rows


def peak_memory(model: Any, inputs: Mapping[str, Any]) -> float:
    """MiB that reading a prompt takes at most beyond the loaded model: of a fork of this process, Linux only."""
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    child = context.Process(target=lambda: found.put(_peak(model, inputs)))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError("the process whose memory was measured failed; its error is above")
    return float(found.get())


def _peak(model: Any, inputs: Mapping[str, Any]) -> float:
    before = resident("VmRSS")
    answer(model, inputs, 2)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process that are in memory (VmRSS), or were at most (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


# -- CoreMatching ------------------------------------------------------------------------------------------------------


def corematching(given: argparse.Namespace) -> list[dict[str, Any]]:
    shape = {**LLAMA_7B, "num_hidden_layers": 32 if given.shape == "llama-3.1-8b" else 4}
    new, length = 16, 64
    if given.dry_run:
        shape = {**LLAMA_7B, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        new = 4
    if given.device == "cpu" and not given.dry_run:
        given = argparse.Namespace(**{**vars(given), "dtype": "bfloat16"})  # half the bytes, so twice as fast
    model = language_model(given, **shape)
    method = tokred.CoreMatching(beta=BETA, keep_tokens=1.0)
    patched, info = twin(model), decoder_info(model.model)
    tokred.patch(patched, method)
    narrow = narrower(model, int(BETA * info.neurons))
    inputs = text(given, length, info.vocabulary)
    cost = tokred.flops(model, length, causal=True)
    held: dict[str, float] = {}

    def sparse() -> Answer:
        run, cache = answer(patched, inputs, new, given.clock)
        parts = layer_states(cache).sparse.values()
        held["slices"] = sum(weight.nbytes for part in parts for weight in part.weights.values()) / 2**20
        held["core"] = statistics.mean(part.weights["down"].shape[1] for part in parts)
        return run

    core_weights = weight_bytes(model, info, method.decode_macs(info))
    cases = [
        Case("unreduced", lambda: answer(model, inputs, new, given.clock)[0], cost.total, weight_bytes(model, info)),
        Case(
            f"CoreMatching beta={BETA}",
            sparse,
            cost.total,
            core_weights,
            TARGET_DECODE,
            notes=(
                lambda: f"{held['core']:.0f} of {info.neurons} neurons; their copies take {held['slices']:.0f} MiB",
            ),
        ),
        Case(
            "built with so many neurons",
            lambda: answer(narrow, inputs, new, given.clock)[0],
            tokred.flops(narrow, length, causal=True).total,
            core_weights,
        ),
    ]
    return rows_of(
        "corematching", length, cases, rounds(cases, given.pairs), ("first token", "next tokens")
    )  # fmt: skip


def narrower(model: nn.Module, neurons: int) -> Any:
    """A twin whose MLPs have fewer neurons."""
    made = twin(model)
    made.config.intermediate_size = neurons
    for layer in made.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(layer.mlp, name).weight.detach()
            weight = weight[:, :neurons] if name == "down_proj" else weight[:neurons]
            linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
            setattr(layer.mlp, name, linear)
    return made


# -- MustDrop ----------------------------------------------------------------------------------------------------------


def mustdrop(given: argparse.Namespace) -> list[dict[str, Any]]:
    shape = TINY if given.dry_run else vlm.SEVEN_B if given.shape == "llama-3.1-8b" else NARROW
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    model = vlm.build(shape, "llava", device, dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = vlm.prompt(shape, "llava", device, dtype)
    pixels = inputs["pixel_values"]
    pixels[..., pixels.shape[-1] // 2 :] = 0.5  # half of the picture is plain, so that windows there are alike
    left = shape.cells * 5 // 9  # 9 cells of each plain window become one
    # published thresholds are for trained weights; here what gets less attention than the mean of all goes, or so
    method = tokred.MustDrop(preset=None, global_threshold=1.03 / left, individual_threshold=1.0)
    peer = tokred.FastV(layer=min(3, shape.layers - 1), budget=0.25)
    info, new = decoder_info(model.model.language_model), 4 if given.dry_run else 16
    cost = tokred.flops(model, inputs, causal=True)
    fastv = tokred.flops(model, inputs, peer, causal=True)
    traces: dict[str, tokred.Trace] = {}

    def run(with_: tokred.Method) -> Answer:
        with tokred.patch(model, with_) as patch:
            run, _ = answer(model, inputs, new, given.clock)
            traces[with_.name] = patch.trace
        return run

    weights, length = weight_bytes(model, info), int(inputs["input_ids"].shape[1])
    cases = [
        Case("unreduced", lambda: answer(model, inputs, new, given.clock)[0], cost.unreduced, weights),
        Case(
            "MustDrop",
            lambda: run(method),
            lambda: mustdrop_macs(model, inputs, info, traces["mustdrop"]),
            weights,
            notes=(lambda: described(traces["mustdrop"], info, length),),
        ),
        Case(
            f"FastV {peer.budget} from layer {peer.layer}",
            lambda: run(peer),
            fastv.total - fastv.scoring,
            weights,
        ),
    ]
    return rows_of("mustdrop", length, cases, rounds(cases, given.pairs), ("first token", "answer"))


def layer_tokens(trace: tokred.Trace, info: DecoderInfo, length: int) -> list[int]:
    """Tokens of the first prompt that enter each layer."""
    tokens = length - sum(step.tokens_in - step.tokens_out for step in trace.media)
    drops = {step.layer: step.tokens_out[0] for step in trace.layers}
    entering = []
    for layer in range(info.depth):
        tokens = drops.get(layer, tokens)
        entering.append(tokens)
    return entering


def mustdrop_macs(model: Any, inputs: Mapping[str, Any], info: DecoderInfo, trace: tokred.Trace) -> int:
    """Multiply-adds to the first token for what really went; the tower's by the windows that were merged."""
    left = trace.counts[-1][1] if trace.counts else trace.total
    vision = tokred.flops(model, inputs, tokred.MustDrop(preset=None, retained_tokens=left)).vision
    entering = layer_tokens(trace, info, inputs["input_ids"].shape[1])
    return vision + sum(t * info.layer_macs + t * t * info.width for t in entering)


def described(trace: tokred.Trace, info: DecoderInfo, length: int) -> str:
    entering = layer_tokens(trace, info, length)
    first = [layer for layer in range(info.depth) if not layer or entering[layer] != entering[layer - 1]]
    tower = f"{trace.total} -> {trace.counts[-1][1]}" if trace.counts else f"{trace.total}"
    language = ", ".join(f"{entering[layer]} from layer {layer}" for layer in first)
    return f"tower {tower} tokens; of {length} in the language model {language}"


# -- overhead ----------------------------------------------------------------------------------------------------------


def overhead(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Decoding where hooks are all that a method costs."""
    shape = {key: value for key, value in NEEDLE.items() if not key.endswith("_token_id")}
    given = argparse.Namespace(**{**vars(given), "dtype": "float32"})
    model = language_model(given, **shape)
    info, new, length = decoder_info(model.model), 4 if given.dry_run else 64, 128
    inputs = text(given, length, info.vocabulary)
    prunable = torch.zeros(1, length, dtype=torch.bool, device=given.device)
    prunable[:, 8:-8] = True
    weights = weight_bytes(model, info)

    def case(method: tokred.Method) -> Case:
        patched = twin(model)
        patch = tokred.patch(patched, method)

        def run() -> Answer:
            with patch.request(prunable=prunable):
                return answer(patched, inputs, new, given.clock)[0]

        return Case(type(method).__name__, run, 1, weights)

    cases = [
        Case("unreduced", lambda: answer(model, inputs, new, given.clock)[0], 1, weights),
        case(tokred.FastV()),
        case(tokred.PyramidDrop(stages=(2, 4), keep_rates=(0.5, 0.25))),
        case(tokred.CoreMatching(keep_tokens=0.5)),
        case(tokred.GemFilter(k=64, layer=2)),
    ]
    rows = rows_of("overhead", length, cases, rounds(cases, given.pairs), ("first token", "next tokens"))
    for row in rows:  # nothing to gain: no limit
        for name in ("limit", "share", "share_95"):
            row.pop(name, None)
    return rows


# -- output ------------------------------------------------------------------------------------------------------------


TITLES = {
    "gemfilter": "GemFilter, {gemfilter}, {dtype}, 32 tokens of answer",
    "corematching": "CoreMatching, decoding in {corematching} layers as wide as Llama-7B, batch 1",
    "mustdrop": "MustDrop, an answer of 16 tokens about an image, {mustdrop}, {dtype}",
    "overhead": "hooks, 6 layers of 128, 64 tokens of answer, float32",
}


def as_text(result: Mapping[str, Any]) -> str:
    dry = ", a dry run on tiny sizes" if result["dry_run"] else ""
    full = result["shape"] == "llama-3.1-8b"
    names = {
        "gemfilter": "shape of Llama-3.1-8B" if full else "shape of the needle LLM",
        "corematching": 32 if full else 4,
        "mustdrop": "shape of LLaVA-1.5-7B" if full else "24 and 32 narrow layers",
        "dtype": result["dtype"],
    }
    lines = [
        f"{result['pairs']} pairs, {result['clock']} clock{dry}; {result['machine']}; torch {result['torch']}, "
        f"transformers {result['transformers']}; load average before and after: {result['load']}"
    ]
    for section in dict.fromkeys(row["section"] for row in result["rows"]):
        lines += ["", TITLES[section].format(**names), "", HEADER]
        notes = []
        before = ("", "")
        for row in result["rows"]:
            if row["section"] != section:
                continue
            name = (str(row["prompt"]), row["method"])
            lines.append(_line(row, name if name != before else ("", "")))
            notes += [f"{row['method']}: {note}" for note in row["notes"] if name != before]
            before = name
        lines += [*dict.fromkeys(notes)]
        if section == "corematching":
            lines.append(f"target: {TARGET_DECODE:.0%} of the limit for the next tokens")
    return "\n".join(line.rstrip() for line in lines)


HEADER = (
    f"{'prompt':>6} {'method':26} {'':11} {'time':>11}  {'speed-up [95 %]':22} {'added':>9} {'limit':>6}  "
    f"{'share [95 %]':24} {'cache MiB':>9} {'peak MiB':>9}"
)


def _line(row: Mapping[str, Any], name: tuple[str, str]) -> str:
    length = f"{row['seconds']:9.3f} s" if row["measure"] != "next tokens" else f"{1e3 * row['seconds']:8.2f} ms"
    start = f"{name[0]:>6} {name[1]:26} {row['measure']:11} {length:>11}  "
    peak = f"{row['peak_mib']:9.0f}" if row["peak_mib"] else f"{'':9}"
    end = f"{row['cache_mib']:9.2f} {peak}" if row["measure"] == "first token" else f"{'':19}"
    if "speedup" not in row:
        return f"{start}{'':22} {'':9} {'':6}  {'':24} {end}"
    speed = "{:.3f} [{:.3f}, {:.3f}]".format(row["speedup"], *row["speedup_95"])
    added = f"{row['added_ms']:6.1f} ms" if abs(row["added_ms"]) < 1e4 else f"{row['added_ms'] / 1e3:7.1f} s"
    limit, share = f"{'':6}", ""
    if "limit" in row:
        limit = f"{row['limit']:6.2f}"
        share = "{:.1%} [{:.1%}, {:.1%}]".format(row["share"], *row["share_95"])
    met = "" if row["met"] is None else f"  {row['target']:.0%} {'met' if row['met'] else 'missed'}"
    return f"{start}{speed:22} {added:>9} {limit}  {share:24} {end}{met}"


def result_file(shape: str, device: str, name: str) -> Path:
    """benchmarks/results/llm-<shape>-<device>-<machine>.txt."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.split(",")[0].lower()).strip("-")
    return RESULTS / f"llm-{'8b-' if shape == 'llama-3.1-8b' else ''}{device.partition(':')[0]}-{slug}.txt"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--shape", default="needle", choices=["needle", "llama-3.1-8b"], help="default: %(default)s")
    parser.add_argument("--prompts", default="4096,8192,16384,32768", help="of gemfilter (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="at least 10 for a result worth keeping")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, two pairs: does the script work?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--save", action="store_true", help="also write the tables to benchmarks/results/")
    given = parser.parse_args()
    given.sections = given.sections.split(",")
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: {unknown[0]!r} is none of {', '.join(SECTIONS)}")
    if given.clock == "cpu" and given.device != "cpu":
        parser.error("--clock cpu: a device's time is not the processor's; use the wall's clock")
    given.clock_name, given.clock = given.clock, CLOCKS[given.clock]
    given.prompts = [int(length) for length in given.prompts.split(",")]
    if given.dry_run:
        given.pairs = min(given.pairs, 2)
        given.prompts = [48, 96]
    return given


def load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def sections(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    made = {"gemfilter": gemfilter, "corematching": corematching, "mustdrop": mustdrop, "overhead": overhead}
    for name in given.sections:
        yield from made[name](given)
        if given.device != "cpu":
            torch.cuda.empty_cache()


def main() -> None:
    given = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    before = load()
    rows = list(sections(given))
    result = {
        "machine": machine(given.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": given.shape,
        "dry_run": given.dry_run,
        "dtype": given.dtype,
        "pairs": given.pairs,
        "clock": given.clock_name,
        "load": f"{before}; {load()}",
        "rows": rows,
    }
    print(json.dumps(result, indent=1) if given.json else as_text(result))
    if given.save:
        command = "$ OMP_NUM_THREADS=1 python benchmarks/llm.py " + " ".join(a for a in sys.argv[1:] if a != "--save")
        date = time.strftime("%Y-%m-%d", time.gmtime())
        result_file(given.shape, given.device, result["machine"]).write_text(
            f"{command.rstrip()}     ({date})\n\n{as_text(result)}\n"
        )


if __name__ == "__main__":
    main()
