"""Speed of a reduced vision transformer, as a share of what its multiply-adds allow.

    OMP_NUM_THREADS=1 python benchmarks/vit.py [--model deit_small_patch16_224] [--batch 16] [--pairs 12]
                                              [--device cpu|cuda] [--dtype float32] [--compile] [--dry-run] [--json]

A pair is one run of the patched and one of the unpatched model on the same batch, moments apart; methods take turns
and the order inside a pair alternates. A line is the median of the paired ratios with its 95 % interval (order
statistics). The limit is the ratio of multiply-adds, scoring of the method not counted; a target is met when the
interval reaches it. Both halves of a pair use the model's own fused attention. The peer of each method in the same run
is random dropping to the same token counts: what a method without any score would reach.

Also measured: patching and replacing (target below 20 ms on ViT-L), and what `import tokred` adds to `import torch`
(target below 0.2 s).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import tokred
from tokred.core.flops import encoder_info

PAPER_SPEEDUP = {"ToMe r=13": "1.50 at 4.55/2.95", "ZeroTPrune 3.08 G": "1.37 at 4.55/3.08"}  # A100, Zero-TPrune table


@dataclass(frozen=True)
class Case:
    name: str
    method: tokred.Method
    target: float


def cases(depth: int) -> list[Case]:
    if depth < 12:  # --dry-run
        return [
            Case("ToMe r=3", tokred.ToMe(r=3), 0.95),
            Case("TopK .7", tokred.TopK(layers=(1,)), 0.97),
            Case("ZeroTPrune", tokred.ZeroTPrune(schedule={0: (2, 1.0), 1: (2, 0.7)}), 0.90),
        ]
    return [
        Case("ToMe r=13", tokred.ToMe(r=13), 0.95),
        Case("TopK .7 at 3, 6, 9", tokred.TopK(keep_rate=0.7, layers=(3, 6, 9)), 0.97),
        Case("ZeroTPrune 3.08 G", tokred.ZeroTPrune(preset="deit_s_3.08g"), 0.90),
    ]


def random_twin(model: nn.Module, method: tokred.Method) -> tokred.Method:
    """Random dropping to the same counts at the same places."""
    info = encoder_info(model)
    counts = dict(enumerate(method.plan(info)))
    changed = {layer: n for layer, n in counts.items() if n < counts.get(layer - 1, info.tokens)}
    return tokred.RandomTokens(counts=changed, where=method.placement)


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by order statistics (binomial); the extremes where there are too few values."""
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if tail > 0.025:
            break
        rank += 1
    low = max(rank - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(
    models: dict[str, nn.Module], plain: nn.Module, x: Tensor, pairs: int
) -> dict[str, list[tuple[float, float]]]:
    """{name: [(seconds of the plain model, seconds of the patched one)]}, interleaved; two warm-up rounds."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(-2, pairs):
        for name, model in models.items():
            first, second = (plain, model) if number % 2 else (model, plain)
            a, b = timed(lambda m=first: m(x), x.device), timed(lambda m=second: m(x), x.device)
            if number >= 0:
                taken[name].append((a, b) if number % 2 else (b, a))
    return taken


def speed_table(args: argparse.Namespace) -> list[dict[str, object]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3} if args.dry_run else {}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(args.model, **size).eval().to(device, dtype)

    plain = build()
    side = 32 if args.dry_run else plain.patch_embed.img_size[0]
    x = torch.randn(args.batch, 3, side, side, device=device, dtype=dtype)
    chosen = cases(len(plain.blocks))
    models: dict[str, nn.Module] = {}
    for case in chosen:
        for name, method in ((case.name, case.method), (f"random as {case.name}", random_twin(plain, case.method))):
            models[name] = build()
            tokred.patch(models[name], method)
    if args.compile:  # patched first, compiled after
        plain = torch.compile(plain)
        models = {name: torch.compile(model) for name, model in models.items()}
    taken = measure(models, plain, x, args.pairs)
    rows: list[dict[str, object]] = []
    for case in chosen:
        for name, target in ((case.name, case.target), (f"random as {case.name}", None)):
            cost = tokred.flops(models[name])
            limit = cost.unreduced / cost.vision
            median, low, high = median_interval([p / r for p, r in taken[name]])
            rows.append(
                {
                    "model": args.model,
                    "method": name,
                    "images_per_s": args.batch / statistics.median(r for _, r in taken[name]),
                    "unpatched_images_per_s": args.batch / statistics.median(p for p, _ in taken[name]),
                    "speedup": median,
                    "speedup_95": [low, high],
                    "limit": limit,
                    "share": median / limit,
                    "share_95": [low / limit, high / limit],
                    "target": target,
                    "met": None if target is None else high / limit >= target,
                    "paper_says": PAPER_SPEEDUP.get(name),
                }
            )
    return rows


def patch_times(repeat: int, name: str) -> dict[str, float]:
    """Median milliseconds of patch and of replace, on weights that need no memory."""
    with torch.device("meta"):
        model = timm.create_model(name)
    patching, replacing = [], []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        patch = tokred.patch(model, tokred.ToMe(r=8))
        patching.append(time.perf_counter() - start)
        start = time.perf_counter()
        patch.replace(tokred.ZeroTPrune(flops=0.65))
        replacing.append(time.perf_counter() - start)
        patch.remove()
    return {
        "patch_ms": 1e3 * statistics.median(patching[1:]),
        "replace_ms": 1e3 * statistics.median(replacing[1:]),
        "first_patch_ms": 1e3 * patching[0],
    }


def import_time(repeat: int) -> float:
    """Median seconds that `import tokred` takes once torch is imported, in fresh processes."""
    code = "import torch, time; t = time.perf_counter(); import tokred; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeat)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm vision transformer of 12 blocks")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=12, help="at least 10 for a result worth keeping")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile all models, patched first")
    parser.add_argument("--dry-run", action="store_true", help="tiny model and two pairs: shows that the script works")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    if args.dry_run:
        args.batch, args.pairs = 2, 2
    torch.set_num_threads(1)
    result = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "batch": args.batch,
        "dtype": args.dtype,
        "compiled": args.compile,
        "pairs": args.pairs,
        "rows": speed_table(args),
        "vit_large": patch_times(1 if args.dry_run else 10, "vit_large_patch16_224"),
        "import_s": import_time(1 if args.dry_run else 5),
    }
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def as_text(result: dict) -> str:
    compiled = ", compiled" if result["compiled"] else ""
    lines = [
        f"{result['rows'][0]['model']}, batch {result['batch']}, {result['dtype']}{compiled}, {result['pairs']} pairs; "
        f"{result['machine']}; torch {result['torch']}",
        "",
        f"{'method':30} {'img/s':>7} {'plain':>7}  {'speed-up [95 %]':22} {'limit':>6}  {'share [95 %]':26} target",
    ]
    for row in result["rows"]:
        speed = "{:.3f} [{:.3f}, {:.3f}]".format(row["speedup"], *row["speedup_95"])
        share = "{:.1%} [{:.1%}, {:.1%}]".format(row["share"], *row["share_95"])
        verdict = "" if row["target"] is None else f"{row['target']:.0%} {'met' if row['met'] else 'missed'}"
        lines.append(
            f"{row['method']:30} {row['images_per_s']:7.1f} {row['unpatched_images_per_s']:7.1f}  "
            f"{speed:22} {row['limit']:6.3f}  {share:26} {verdict}"
        )
    large = result["vit_large"]
    first = f"(first {large['first_patch_ms']:.1f})"
    lines += [
        "",
        f"ViT-L: patch {large['patch_ms']:.1f} ms {first}, replace {large['replace_ms']:.1f} ms; target 20 ms each",
        f"import tokred after torch: {result['import_s']:.3f} s; target 0.2 s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
