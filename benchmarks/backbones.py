"""Speed of the ViT blocks beside timm's ResNet-50, MobileViT, Mixer and a plain ViT, in one run.

    OMP_NUM_THREADS=1 python benchmarks/backbones.py [--device cpu|cuda] [--dtype float32] [--compile] [--channels-last]
                                                     [--models strip_mlp_tiny resnet50 ...] [--batch 4] [--rounds 12]
                                                     [--size full] [--dry-run] [--json]

A round runs every model once on its own batch and multiplies two square matrices; the order of the models turns from
round to round, so that what else the machine does falls on all alike. A line has

* images/s: the median over the rounds with its 95 % interval (order statistics);
* GMACs of one image, counted by torch's FlopCounterMode in the model as it runs;
* GMAC/s = images/s x GMACs: the speed for the work there is, and its ratio to ResNet-50's of the same round (median and
  95 % interval);
* of matmul: GMAC/s as a share of what the multiplication of the two matrices reached in the same round.

Image sizes are 224, but 256 for mobilevit_s, whose own size that is. Weights are random. Below the table stand the
three costliest operations of each model by torch.profiler: convolutions by kernel and grouping, other operations by
name, each with its share of the time spent in operators and its costliest shape.

On the CPU with glibc, maps above 32 MiB are given back to the system and cleared again at each operation. To see the
operations without that: a smaller --batch, or GLIBC_TUNABLES=glibc.malloc.mmap_threshold=2147483648:\
glibc.malloc.trim_threshold=8589934592 in the environment (of all rows alike).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import tokred.vision  # noqa: F401  registers the models

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vit import machine, median_interval, timed

PEER = "resnet50"
GRIDS = (3, 5, 7, 10)
TIMM = (PEER, "mobilevit_s", "mixer_b16_224", "deit_small_patch16_224")
SMALL = (
    "strip_mlp_tiny_light",
    "strip_mlp_tiny",
    *(f"lookup_vit_small {grid}x{grid}" for grid in GRIDS),
    "dualtoken_vit_tiny",
    "dualtoken_vit_small",
    *TIMM,
)
FULL = (
    *(f"strip_mlp_{size}" for size in ("tiny_light", "tiny", "small", "base")),
    *(f"lookup_vit_{size} {grid}x{grid}" for size in ("tiny", "small", "base") for grid in GRIDS),
    *(f"dualtoken_vit_{size}" for size in ("tiny", "small", "small_mlp")),
    *TIMM,
)
DRY = {
    "strip_mlp_tiny": {"img_size": 32, "embed_dim": 8, "layers": (1, 1, 1, 1)},
    "lookup_vit_tiny 2x2": {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "dualtoken_vit_tiny": {"img_size": 32, "depths": (1, 1, 1), "embed_dims": (16, 32, 64)},
    PEER: {"layers": (1, 1, 1, 1)},
    "mobilevit_s": {},
}


def image_size(name: str) -> int:
    return 256 if name.startswith("mobilevit") else 224


def build(name: str, dry: bool) -> tuple[nn.Module, int]:
    """A model of random weights and the side of its images; "lookup_vit_small 7x7" names a compressed grid."""
    base, _, grid = name.partition(" ")
    sizes: dict[str, Any] = dict(DRY.get(name, {})) if dry else {}
    if grid:
        rows, columns = grid.split("x")
        sizes["compressed_grid"] = (int(rows), int(columns))
    torch.manual_seed(0)
    return timm.create_model(base, **sizes).eval(), sizes.get("img_size", 64 if dry else image_size(name))


def gmacs(model: nn.Module, x: Tensor) -> float:
    """Multiply-adds of one image in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    return counter.get_total_flops() / 2e9


def kind(event: Any) -> str:
    """What an operator of the profile is: convolutions by kernel and grouping, products of matrices as one."""
    name, shapes = event.key.removeprefix("aten::"), event.input_shapes
    if "conv" in name and len(shapes) > 1 and len(shapes[0]) == len(shapes[1]) == 4:
        _, inputs, height, width = shapes[1]
        grouping = "" if inputs == shapes[0][1] else "depthwise " if inputs == 1 else "grouped "
        return f"{grouping}convolution {height}x{width}"
    if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
        return "fused attention"
    return {"addmm": "matrix product", "mm": "matrix product", "bmm": "batched matrix product", "copy_": "copy"}.get(
        name, name.removeprefix("_")
    )


def costliest(run: Callable[[], object], device: torch.device, count: int = 3) -> list[dict[str, Any]]:
    """The operations that take most time in one run: kind, share of the time in operators, costliest shape."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as found:
        timed(run, device)
    taken = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    time: Counter[str] = Counter()
    worst: dict[str, Any] = {}
    for event in found.key_averages(group_by_input_shape=True):
        # device kernels appear once more beneath the operators that start them
        if getattr(event, taken) <= 0 or not event.key.startswith("aten::"):
            continue
        label = kind(event)
        time[label] += getattr(event, taken)
        if label not in worst or getattr(event, taken) > getattr(worst[label], taken):
            worst[label] = event
    total = sum(time.values())
    return [
        {
            "operation": label,
            "share": spent / total,
            "shape": " ".join("x".join(map(str, shape)) for shape in worst[label].input_shapes if len(shape) > 1),
        }
        for label, spent in time.most_common(count)
    ]


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    names = list(args.models)
    if PEER not in names:
        names.append(PEER)  # every ratio is to it
    runs: dict[str, Callable[[], object]] = {}
    work: dict[str, float] = {}
    sides: dict[str, int] = {}
    for name in names:
        model, side = build(name, args.dry_run)
        model = model.to(device, dtype, memory_format=layout)
        x = torch.randn(args.batch, 3, side, side, device=device, dtype=dtype).contiguous(memory_format=layout)
        work[name], sides[name] = gmacs(model, x), side
        if args.compile:
            model.compile()
        runs[name] = lambda model=model, x=x: model(x)
    n = 64 if args.dry_run else 8192 if args.device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    limit: list[float] = []
    for number in range(-2, args.rounds):  # two rounds of warming up
        start = number % len(names)
        matmul = n**3 / 1e9 / min(timed(lambda: a @ b, device) for _ in range(3))
        spent = {name: timed(runs[name], device) for name in names[start:] + names[:start]}
        if number >= 0:
            limit.append(matmul)
            for name in names:
                seconds[name].append(spent[name])
    rows = []
    for name in names:
        rate = [args.batch * work[name] / s for s in seconds[name]]
        peer = [args.batch * work[PEER] / s for s in seconds[PEER]]
        speed, low, high = median_interval([args.batch / s for s in seconds[name]])
        ratio = median_interval([own / other for own, other in zip(rate, peer, strict=True)])
        rows.append(
            {
                "model": name,
                "image": sides[name],
                "images_per_s": speed,
                "images_per_s_95": [low, high],
                "gmacs": work[name],
                "gmacs_per_s": statistics.median(rate),
                "ratio": ratio[0],
                "ratio_95": list(ratio[1:]),
                "of_matmul": statistics.median(own / most for own, most in zip(rate, limit, strict=True)),
                "costliest": costliest(runs[name], device),
            }
        )
    return {"matmul_gmacs_per_s": statistics.median(limit), "matmul_side": n, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help='timm names; "lookup_vit_small 7x7" names a compressed grid')
    parser.add_argument("--size", default="small", choices=["small", "full"], help="which models, without --models")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12, help="at least 10 for a result worth keeping")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--channels-last", action="store_true", help="weights and images of all models channels last")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny models and two rounds: shows that the script works"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    if args.dry_run:
        args.batch, args.rounds = 2, 2
    args.models = args.models or list(DRY if args.dry_run else FULL if args.size == "full" else SMALL)
    torch.set_num_threads(1)
    result = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "batch": args.batch,
        "dtype": args.dtype,
        "compiled": args.compile,
        "channels_last": args.channels_last,
        "rounds": args.rounds,
        "dry_run": args.dry_run,
        **measure(args),
    }
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def as_text(result: dict[str, Any]) -> str:
    marks = [
        result["dtype"],
        *(m for m, on in (("compiled", "compiled"), ("channels last", "channels_last")) if result[on]),
    ]
    lines = [
        f"batch {result['batch']}, {', '.join(marks)}, {result['rounds']} rounds; {result['machine']}; "
        f"torch {result['torch']}" + ("; a dry run on tiny sizes" if result["dry_run"] else ""),
        f"product of two {result['matmul_side']} x {result['matmul_side']} matrices: "
        f"{result['matmul_gmacs_per_s']:.1f} GMAC/s",
        "",
        f"{'model':24} {'image':>5} {'images/s [95 %]':24} {'GMACs':>7} {'GMAC/s':>8}  "
        f"{'to ResNet-50 [95 %]':22} of matmul",
    ]
    for row in result["rows"]:
        speed = "{:.2f} [{:.2f}, {:.2f}]".format(row["images_per_s"], *row["images_per_s_95"])
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["ratio_95"])
        lines.append(
            f"{row['model']:24} {row['image']:5} {speed:24} {row['gmacs']:7.3f} {row['gmacs_per_s']:8.2f}  "
            f"{ratio:22} {row['of_matmul']:.1%}"
        )
    lines += ["", f"{'model':24} {'costliest operations':34} {'share':>6}  costliest shape"]
    for row in result["rows"]:
        for number, found in enumerate(row["costliest"]):
            name = "" if number else row["model"]
            lines.append(f"{name:24} {found['operation']:34} {found['share']:6.1%}  {found['shape']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
