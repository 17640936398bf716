"""Speed of token merging in a denoiser, as a share of what its multiply-adds allow, beside `tomesd`.

    OMP_NUM_THREADS=1 python benchmarks/diffusion.py [--pairs 10] [--latent 64] [--batch 2] [--ratio 0.5]
                                                    [--device cpu|cuda] [--dtype float32] [--compile]
                                                    [--only TEXT] [--dry-run] [--json]

The model has the shape of Stable Diffusion 1.5's U-Net and random weights; a run is one denoising step of `batch`
latents (2: one picture with guidance). A pair is one run of the unpatched and one of the patched model, moments apart;
methods take turns and the order inside a pair alternates. A line is the median of the paired ratios with its 95 %
interval (order statistics). All use the model's own fused attention.

Two limits stand beside each method. "limit" is the ratio of multiply-adds, counted on the model without memory
(`torch.utils.flop_counter`), the method's own choosing left out. "ceiling" is measured: as many tokens, taken every so
many from the grid and put back by copying, with nothing compared - what a method reaches whose choice costs nothing. On
CPUs the ceiling lies above the limit, as attention over many tokens takes more time than its multiply-adds suggest.

The peer is `tomesd` from the package index (pip install tomesd), on a model of its own in the same run; where it is not
installed, a line says so. With the random choice of both turned off, outputs are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vit import machine, median_interval, timed

import tokred
from tokred.adapters.registry import find_host
from tokred.core.diffusion import DenoiserInfo, DiffusionBlock, DiffusionMethod
from tokred.core.tokens import Merge
from tokred.eval.leaderboard_diffusion import UNET

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY = {"sample_size": 16, **UNET}
TARGET = 0.90  # of the limit by multiply-adds
WORDS = 77


@dataclass(frozen=True, repr=False)
class EverySecond(DiffusionMethod):
    """The ceiling: keeps evenly spaced tokens of the finest grid, and gives each place the one before it."""

    ratio: float = 0.5

    name: ClassVar[str] = "every_second"
    title: ClassVar[str] = "evenly spaced tokens"
    paper: ClassVar[str] = "control"
    listed: ClassVar[bool] = False

    def bind(self, info: DenoiserInfo) -> dict[int, float]:
        return {block.layer: self.ratio for block in info.blocks if block.level == 1}

    def count(self, grid: tuple[int, int], rule: float) -> int:
        tokens = grid[0] * grid[1]
        return tokens - int(tokens * rule)

    def reduce(self, view: DiffusionBlock, rule: float) -> Merge:
        batch, n = view.tokens.shape[:2]
        kept = self.count(view.grid, rule)
        slot = torch.arange(n, device=view.tokens.device) * kept // n
        first = torch.searchsorted(slot, torch.arange(kept, device=slot.device))
        return Merge(slot.expand(batch, -1), first.expand(batch, -1))


def unet(dry_run: bool, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        model = UNet2DConditionModel(**(TINY if dry_run else SD15)).eval()
    return model if dtype == torch.float32 else model.to(dtype)


def inputs(
    model: nn.Module, batch: int, latent: int, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and text of one step; `tomesd` reads the first from the positional arguments."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch // 2 or 1, 4, latent, latent, generator=generator).repeat(2 if batch > 1 else 1, 1, 1, 1)
    text = torch.randn(batch, WORDS, config.cross_attention_dim, generator=generator)
    return x.to(device, dtype), torch.tensor(501, device=device), text.to(device, dtype)


def multiply_adds(model: nn.Module, given: tuple[Tensor, ...]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*given)
    return counter.get_total_flops() // 2


def scoring(model: nn.Module, method: DiffusionMethod, latent: int, batch: int) -> int:
    """Multiply-adds of a method's choosing."""
    info = find_host(model).info
    rules = method.bind(info)
    sides = {block.layer: -(-latent // block.level) for block in info.blocks}
    return batch * sum(
        method.cost(info.blocks[layer], (sides[layer], sides[layer]), rule) for layer, rule in rules.items()
    )


def peer(model: nn.Module, **options: Any) -> None:
    import tomesd

    tomesd.apply_patch(model, **options)


def measure(
    makers: dict[str, Callable[[nn.Module], Callable[[], object]]],
    model: nn.Module,
    given: tuple[Tensor, ...],
    pairs: int,
    compiled: bool,
) -> dict[str, list[tuple[float, float]]]:
    """{name: [(seconds unpatched, seconds patched)]}, interleaved; one warm-up round. Patching is not timed.

    One model is patched and unpatched in turn, unless it is compiled: then each method has a model of its own.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    device = given[0].device
    if compiled:
        import copy

        plain, patched = torch.compile(copy.deepcopy(model)), {}
        for name, make in makers.items():
            own = copy.deepcopy(model)
            make(own)
            patched[name] = torch.compile(own)

    def run(name: str | None) -> float:
        if compiled:
            chosen = plain if name is None else patched[name]
            return timed(lambda: chosen(*given), device)
        undo = makers[name](model) if name is not None else None
        try:
            return timed(lambda: model(*given), device)
        finally:
            if undo is not None:
                undo()

    with torch.no_grad():
        for number in range(-1, pairs):
            for name in makers:
                order = (None, name) if number % 2 else (name, None)
                times = {which: run(which) for which in order}
                if number >= 0:
                    taken[name].append((times[None], times[name]))
    return taken


def has_peer() -> bool:
    try:
        import tomesd  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def speed_table(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    methods: dict[str, DiffusionMethod] = {
        f"ToMeSD ratio {args.ratio}": tokred.ToMeSD(ratio=args.ratio),
        "ToDo factor 2": tokred.ToDo(factor=2),
        f"ceiling at ratio {args.ratio}": EverySecond(args.ratio),
    }
    ceiling = list(methods)[-1]

    def maker(method: DiffusionMethod) -> Callable[[nn.Module], Callable[[], None]]:
        return lambda model: tokred.patch(model, method).remove

    def peer_maker(model: nn.Module) -> Callable[[], object]:
        import tomesd

        peer(model, ratio=args.ratio)
        return lambda: tomesd.remove_patch(model)

    makers: dict[str, Any] = {name: maker(method) for name, method in methods.items()}
    if has_peer():
        makers[f"tomesd ratio {args.ratio}"] = peer_maker
    if args.only:
        makers = {name: make for name, make in makers.items() if args.only in name or name == ceiling}

    model = unet(args.dry_run, device, dtype)
    given = inputs(model, args.batch, args.latent, device, dtype)
    taken = measure(makers, model, given, args.pairs, args.compile)
    distance = compare(model, given, args.ratio) if has_peer() else None

    empty = unet(args.dry_run, "meta", dtype)
    shapes = tuple(t.to("meta") for t in inputs(empty, args.batch, args.latent, "cpu", dtype))
    plain = multiply_adds(empty, shapes)
    top = median_interval([a / b for a, b in taken[ceiling]])[0]
    rows = []
    for name, times in taken.items():
        method = methods.get(name, methods[f"ToMeSD ratio {args.ratio}"])  # the peer reduces as much
        with tokred.patch(empty, method):
            counted = multiply_adds(empty, shapes)
        added = scoring(empty, method, args.latent, args.batch)
        limit = plain / (counted - added)
        median, low, high = median_interval([a / b for a, b in times])
        ours = name.startswith(("ToMeSD", "ToDo"))
        rows.append(
            {
                "method": name,
                "seconds": statistics.median(b for _, b in times),
                "unpatched_seconds": statistics.median(a for a, _ in times),
                "speedup": median,
                "speedup_95": [low, high],
                "limit": limit,
                "share": median / limit,
                "share_95": [low / limit, high / limit],
                "share_of_ceiling": median / top,
                "scoring_share": added / (counted - added),
                "target": TARGET if ours else None,
                "met": high / limit >= TARGET if ours else None,
            }
        )
    return {"multiply_adds": plain // args.batch, "rows": rows, "peer_installed": has_peer(), "peer_distance": distance}


@torch.no_grad()
def compare(model: nn.Module, given: tuple[Tensor, ...], ratio: float) -> dict[str, float]:
    """Largest difference from `tomesd` with its receivers fixed, beside what merging itself changes."""
    import tomesd

    plain = model(*given).sample
    peer(model, ratio=ratio, use_rand=False)
    theirs = model(*given).sample
    tomesd.remove_patch(model)
    with tokred.patch(model, tokred.ToMeSD(ratio=ratio, use_rand=False)):
        ours = model(*given).sample
    return {"from_peer": float((ours - theirs).abs().max()), "from_plain": float((ours - plain).abs().max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="at least 10 for a result worth keeping")
    parser.add_argument("--latent", type=int, default=64, help="side of the latents: 64 is a picture of 512 x 512")
    parser.add_argument("--batch", type=int, default=2, help="2 is one picture with guidance")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--only", help="methods whose name has this text (and the ceiling)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile all models, patched first")
    parser.add_argument("--dry-run", action="store_true", help="tiny model and two pairs: shows that the script works")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.dry_run:
        args.pairs, args.latent = 2, 16
    if args.device == "cpu":
        torch.set_num_threads(1)
    result = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "dry_run": args.dry_run,
        "latent": args.latent,
        "batch": args.batch,
        "dtype": args.dtype,
        "compiled": args.compile,
        "pairs": args.pairs,
        **speed_table(args),
    }
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def as_text(result: dict[str, Any]) -> str:
    shape = "a dry run on a tiny U-Net" if result["dry_run"] else "U-Net of Stable Diffusion 1.5's shape"
    kind = result["dtype"] + (", compiled" if result["compiled"] else "")
    lines = [
        f"{shape}, latents {result['latent']} x {result['latent']}, batch {result['batch']}, {kind}, "
        f"{result['pairs']} pairs; {result['machine']}; torch {result['torch']}",
        f"{result['multiply_adds'] / 1e9:.4g} G multiply-adds a sample and step",
        "",
        f"{'method':22} {'s':>7} {'plain':>7}  {'speed-up [95 %]':22} {'limit':>6}  {'share [95 %]':26} "
        f"{'of ceiling':>10} {'choosing':>9} target",
    ]
    for row in result["rows"]:
        speed = "{:.3f} [{:.3f}, {:.3f}]".format(row["speedup"], *row["speedup_95"])
        share = "{:.1%} [{:.1%}, {:.1%}]".format(row["share"], *row["share_95"])
        verdict = "" if row["target"] is None else f"{row['target']:.0%} {'met' if row['met'] else 'missed'}"
        lines.append(
            f"{row['method']:22} {row['seconds']:7.3f} {row['unpatched_seconds']:7.3f}  {speed:22} {row['limit']:6.3f}"
            f"  {share:26} {row['share_of_ceiling']:10.1%} {row['scoring_share']:9.2%} {verdict}"
        )
    lines += ["", "choosing: multiply-adds of comparing tokens, over those of the reduced model"]
    if not result["peer_installed"]:
        lines.append("tomesd is not installed (pip install tomesd): no line for it")
    else:
        lines.append(
            "largest difference from tomesd, receivers fixed: {from_peer:.1e}; from the unpatched model: "
            "{from_plain:.1e}".format(**result["peer_distance"])
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
