"""Prefill of a multimodal model whose visual tokens HiRED reduces, as a share of what its multiply-adds allow.

    OMP_NUM_THREADS=1 python benchmarks/vlm.py [--pairs 12] [--budgets 0.4,0.2] [--tiny] [--json] [--save]
                                                    [--clock wall|cpu]
    python benchmarks/vlm.py --size 7b --device cuda --dtype bfloat16 [--model llava|llava_next]

By default a LLaVA-NeXT whose language model is 1,024 wide and 8 layers deep reads an image of 5 tiles of 576 cells
(2,880, and 48 row ends) and 60 text tokens; its vision tower is tiny, so that what is timed is the prefill and the
selection. ``--size 7b`` takes the shapes of LLaVA-1.5-7B and LLaVA-NeXT-7B, and times the first token of `generate`.
Weights are random: speed does not depend on them.

A round runs the model unpatched and at each budget, moments apart, in an order that turns around from round to round; a
line is the median of the paired ratios with its 95 % interval (order statistics). The limit is the ratio of
multiply-adds, scoring not counted: of the language model by default, of the whole model for 7b. Both halves of a pair
use the same attention kernel (sdpa). It is causal and skips half of the products that are counted; an unreduced prompt
has more of them, so the true limit is lower.

By default the time is that of the language model's layers and, in a reduced run, of what was "added": what it takes
outside these layers more than the unpatched run beside it (scores of the tower, selection, gathering, restoring the
length). For 7b it is the whole call. ``--clock cpu`` counts processor time of the one thread, which holds where other
jobs share the core; the wall's ratio, of whole calls, is printed beside it.

Targets: 95 % of the limit (met when the interval reaches it), added time below 2 % of the reduced prefill.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from vit import machine, median_interval

import tokred

IMAGE, TEXT_TOKENS = 63, 60
TARGET_SHARE, TARGET_ADDED = 0.95, 0.02
RESULTS = Path(__file__).parent / "results"
#: seconds to the first token, LLaVA-NeXT-7B, batch 1, Tesla P40 (HiRED, table 4)
PAPER_TTFT = {("llava_next", 1.0): 19.49, ("llava_next", 0.4): 6.91, ("llava_next", 0.2): 4.21}


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA: vision tower (dim, layers, heads), image and patch side, language model."""

    tower: tuple[int, int, int]
    image: int
    patch: int
    dim: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int = 64

    @property
    def cells(self) -> int:
        return (self.image // self.patch) ** 2

    def config(self, model: str) -> Any:
        width, depth, heads = self.tower
        vision = transformers.CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=self.image,
            patch_size=self.patch,
        )
        text = transformers.LlamaConfig(
            hidden_size=self.dim,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
        )
        if model == "llava":
            return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
        side = 2 * self.image
        return transformers.LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, image_grid_pinpoints=[[side, side]]
        )


SMALL = Shape(tower=(16, 2, 1), image=336, patch=14, dim=1024, layers=8, heads=16, mlp=2816)
SEVEN_B = Shape(
    tower=(1024, 24, 16), image=336, patch=14, dim=4096, layers=32, heads=32, mlp=11008, vocabulary=32064
)  # fmt: skip
TINY = Shape(tower=(16, 2, 1), image=56, patch=14, dim=64, layers=2, heads=4, mlp=128)


def build(shape: Shape, model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made on its device."""
    classes = {
        "llava": transformers.LlavaForConditionalGeneration,
        "llava_next": transformers.LlavaNextForConditionalGeneration,
    }
    torch.manual_seed(0)
    with device:
        made = classes[model]._from_config(shape.config(model), attn_implementation="sdpa", dtype=dtype)
    return made.to(device).eval()


def prompt(shape: Shape, model: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One image and 60 text tokens, as the processor lays them out."""
    tiles = 1 if model == "llava" else 5
    row_ends = 0 if model == "llava" else 2 * shape.image // shape.patch
    visual = [IMAGE] * (tiles * shape.cells + row_ends)
    ids = torch.tensor([[1, *visual, *[5] * (TEXT_TOKENS - 1)]], device=device)
    pixels = torch.randn(1, tiles, 3, shape.image, shape.image, device=device, dtype=dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model == "llava":
        return {**inputs, "pixel_values": pixels[0]}
    return {**inputs, "pixel_values": pixels, "image_sizes": torch.tensor([[2 * shape.image] * 2])}


# -- timing ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Seconds of a run in all, by the wall, in the layers of the language model; peak memory in bytes (CUDA only)."""

    total: float
    wall: float
    layers: float
    peak: int

    @property
    def outside(self) -> float:
        """Seconds outside the layers of the language model."""
        return self.total - self.layers


@dataclass
class Stopwatch:
    """Seconds from the first layer of a language model to the end of its forward."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    started: float = 0.0
    spent: float = 0.0
    handles: list[Any] = field(default_factory=list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    @contextmanager
    def on(self, language: Any) -> Iterator[None]:
        def start(*_: Any) -> None:
            self.started = self.now()

        def stop(*_: Any) -> None:
            self.spent = self.now() - self.started

        hooks = [language.layers[0].register_forward_pre_hook(start), language.register_forward_hook(stop)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def run_once(model: Any, call: Callable[[], object], budget: float, watch: Stopwatch) -> Run:
    """One run at one budget; patching is not timed."""
    device = watch.device
    patched = tokred.patch(model, tokred.HiRED(budget=budget)) if budget < 1 else nullcontext()
    with patched, watch.on(model.model.language_model):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wall, start = time.perf_counter(), watch.now()
        call()
        total, wall = watch.now() - start, time.perf_counter() - wall
    return Run(total, wall, watch.spent, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)


@torch.inference_mode()
def measure(
    model: Any, call: Callable[[], object], budgets: list[float], pairs: int, watch: Stopwatch
) -> dict[float, list[Run]]:
    """{budget: runs}, 1.0 for the model as it is, which stands in the middle of every round; one round to warm up."""
    half = len(budgets) // 2
    order = [*budgets[:half], 1.0, *budgets[half:]]
    taken: dict[float, list[Run]] = {budget: [] for budget in order}
    for number in range(-1, pairs):
        for budget in order if number % 2 else reversed(order):
            run = run_once(model, call, budget, watch)
            if number >= 0:
                taken[budget].append(run)
    return taken


def row(
    model: Any, name: str, inputs: Any, budget: float, taken: dict[float, list[Run]], whole: bool
) -> dict[str, Any]:
    """One line: everything about one budget."""
    plain, own = taken[1.0], taken[budget]
    cost = tokred.flops(model, inputs, tokred.HiRED(budget=budget) if budget < 1 else None)
    before = tokred.flops(model, inputs)
    limit = (before.total / (cost.total - cost.scoring)) if whole else before.llm / cost.llm
    speedup, low, high = median_interval(
        [p.total / r.total if whole else p.layers / (r.total - p.outside) for p, r in zip(plain, own, strict=True)]
    )
    added = [r.outside - p.outside for p, r in zip(plain, own, strict=True)]
    added_s = statistics.median(added)
    share = median_interval([a / r.layers for a, r in zip(added, own, strict=True)])
    return {
        "model": name,
        "budget": budget,
        "prompt": list(cost.prompt),
        "gmacs": {"vision": cost.vision / 1e9, "llm": cost.llm / 1e9, "scoring": cost.scoring / 1e9},
        "seconds": statistics.median(r.total for r in own),
        "layers_s": statistics.median(r.layers for r in own),
        "speedup": speedup,
        "speedup_95": [low, high],
        "wall_speedup": statistics.median(p.wall / r.wall for p, r in zip(plain, own, strict=True)),
        "limit": limit,
        "share": speedup / limit,
        "share_95": [low / limit, high / limit],
        "met": None if budget == 1 or whole else high / limit >= TARGET_SHARE,
        "added_ms": None if budget == 1 else 1e3 * added_s,
        "added_share": None if budget == 1 else share[0],
        "added_share_95": None if budget == 1 else list(share[1:]),
        "added_met": None if budget == 1 else share[1] <= TARGET_ADDED,
        "peak_gib": max(r.peak for r in own) / 2**30 or None,
        "runs": [run._asdict() for run in own],
        "cache_mib": cost.prompt[0] * cache_bytes(model) / 2**20,
        "paper_ttft_s": PAPER_TTFT.get((name, budget)) if model.config.text_config.hidden_size == SEVEN_B.dim else None,
    }


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values that one token leaves in the cache."""
    config = model.config.text_config
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def rows(given: argparse.Namespace) -> list[dict]:
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    whole = given.size == "7b"
    shape = TINY if given.tiny else SEVEN_B if whole else SMALL
    names = [given.model] if given.model else ["llava", "llava_next"] if whole else ["llava_next"]
    made: list[dict] = []
    for name in names:
        model, inputs = build(shape, name, device, dtype), prompt(shape, name, device, dtype)

        def call(model: Any = model, inputs: Any = inputs) -> object:
            if whole:  # time to the first token
                return model.generate(**inputs, max_new_tokens=1, do_sample=False)
            return model(**inputs, use_cache=True, logits_to_keep=1)

        watch = Stopwatch(device, time.process_time if given.clock == "cpu" else time.perf_counter)
        taken = measure(model, call, given.budgets, given.pairs, watch)
        made += [row(model, name, inputs, budget, taken, whole) for budget in [1.0, *given.budgets]]
        del model, call
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return made


# -- output ------------------------------------------------------------------------------------------------------------


def as_text(result: dict) -> str:
    what = "generate to the first token" if result["size"] == "7b" else "prefill"
    tiny = ", a dry run on tiny sizes" if result["tiny"] else ""
    lines = [
        f"{what}, {result['dtype']}, {result['pairs']} pairs, {result['clock']} clock{tiny}; {result['machine']}; "
        f"torch {result['torch']}, transformers {result['transformers']}",
        "",
        f"{'model':10} {'budget':>6} {'prompt':>6} {'s':>8}  {'speed-up [95 %]':22} {'limit':>6}  "
        f"{'share [95 %]':26} {'added':>8} {'share of prefill [95 %]':24} {'peak GiB':>8} {'cache MiB':>9}  notes",
    ]
    for one in result["rows"]:
        lines.append(_line(one))
    lines += ["", f"targets: share {TARGET_SHARE:.0%} of the limit, added below {TARGET_ADDED:.0%} of the prefill"]
    return "\n".join(line.rstrip() for line in lines)


def _line(one: dict) -> str:
    start = f"{one['model']:10} {one['budget']:6g} {one['prompt'][0]:6} {one['seconds']:8.3f}  "
    peak = f"{one['peak_gib']:8.2f}" if one["peak_gib"] else f"{'':8}"
    end = f"{peak} {one['cache_mib']:9.1f}  "
    paper = f"paper says {one['paper_ttft_s']} s on a P40" if one["paper_ttft_s"] else ""
    if one["budget"] == 1:
        return f"{start}{'':22} {'':6}  {'':26} {'':8} {'':24} {end}{paper}"
    speed = "{:.3f} [{:.3f}, {:.3f}]".format(one["speedup"], *one["speedup_95"])
    share = "{:.1%} [{:.1%}, {:.1%}]".format(one["share"], *one["share_95"])
    added = "{:.2%} [{:.2%}, {:.2%}]".format(one["added_share"], *one["added_share_95"])
    paper = ", ".join([f"wall {one['wall_speedup']:.2f}x", *([paper] if paper else [])])
    notes = [] if one["met"] is None else ["share met" if one["met"] else "share missed"]
    notes += ["added met" if one["added_met"] else "added missed", paper]
    middle = f"{speed:22} {one['limit']:6.3f}  {share:26} {one['added_ms']:5.1f} ms {added:24} "
    return f"{start}{middle}{end}{', '.join(notes)}"


def result_file(size: str, device: str, name: str) -> Path:
    """benchmarks/results/vlm-<size>-<device>-<machine>.txt."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.split(",")[0].lower()).strip("-")
    return RESULTS / f"vlm-{'7b-' if size == '7b' else ''}{device.partition(':')[0]}-{slug}.txt"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=["small", "7b"])
    parser.add_argument("--model", choices=["llava", "llava_next"], help="default: llava_next; both for --size 7b")
    parser.add_argument("--budgets", default="0.4,0.2", help="budgets of HiRED (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=12, help="at least 10 for a result worth keeping")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--tiny", "--dry-run", action="store_true", help="tiny sizes, two pairs: does the script work?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="also write the table to benchmarks/results/")
    given = parser.parse_args()
    given.budgets = [float(budget) for budget in given.budgets.split(",")]
    if not all(0 < budget < 1 for budget in given.budgets):
        parser.error("--budgets: expected fractions between 0 and 1; 1 is measured in any case")
    if given.clock == "cpu" and given.device != "cpu":
        parser.error("--clock cpu: a device's time is not the processor's; use the wall's clock")
    given.pairs = min(given.pairs, 2) if given.tiny else given.pairs
    return given


def main() -> None:
    given = parse()
    torch.set_num_threads(1)
    result = {
        "machine": machine(given.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": given.size,
        "tiny": given.tiny,
        "dtype": given.dtype,
        "pairs": given.pairs,
        "clock": given.clock,
        "rows": rows(given),
    }
    print(json.dumps(result, indent=1) if given.json else as_text(result))
    if given.save:
        command = f"$ OMP_NUM_THREADS=1 python benchmarks/vlm.py --size {given.size} --clock {given.clock}"
        date = time.strftime("%Y-%m-%d", time.gmtime())
        result_file(given.size, given.device, result["machine"]).write_text(
            f"{command} --pairs {given.pairs}     ({date})\n\n{as_text(result)}\n"
        )


if __name__ == "__main__":
    main()
