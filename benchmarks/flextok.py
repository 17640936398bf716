"""Speed of FlexTok where few registers are kept, as a share of what its multiply-adds allow.

    OMP_NUM_THREADS=1 python benchmarks/flextok.py [--model d12_d12] [--keep 1 8 32] [--batch 1] [--pairs 12]
                              [--steps 25] [--device cpu|cuda] [--dtype float32] [--vae] [--dry-run] [--json]

Random weights of the released shape. A pair is one run with all registers and one run of the exact short cut, moments
apart on the same input; rows take turns and the order inside a pair alternates. A line is the median of the paired
ratios with its 95 % interval (order statistics); a target is met when the interval reaches it.

- guided step: two velocities (with condition and without) at k kept registers; all 256 registers against one token that
  stands for the dropped ones. Target 1.7 for d12_d12 and k <= 32; both must agree to 1e-5 (relative to the largest
  value, float32).
- encode: the first k tokens, with k registers against all. decode: `steps` guided steps.

The limit of a speed-up is the ratio of multiply-adds. Images/s are those of the short cut, of all registers, and of the
short cut's multiply-adds at the rate of one large matrix product, measured in the same run. Without --vae the VAE is
left out of all three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vit import machine, median_interval, timed

from tokred.eval.speed import pairs
from tokred.generation.flextok import FlexTokModel
from tokred.generation.flextok_blocks import mlp_width

SHAPES = {"d12_d12": (12, 12), "d18_d18": (18, 18), "d18_d28": (18, 28)}
TARGET, TARGET_MODEL, TARGET_KEEP = 1.7, "d12_d12", 32
AGREEMENT = 1e-5


@dataclass(frozen=True)
class Row:
    """`plain` and `short` do the same; `macs` are the multiply-adds of each, for the whole batch."""

    name: str
    plain: Callable[[], Any]
    short: Callable[[], Any]
    macs: tuple[float, float]
    images_per_run: float
    target: float | None = None


def build(name: str, dry: bool) -> FlexTokModel:
    encoder, decoder = (1, 1) if dry else SHAPES[name]
    width = 64 if dry else 0
    sizes: dict[str, Any] = {"num_registers": 16, "pos_grid": 4} if dry else {}
    torch.manual_seed(0)
    model = FlexTokModel(
        encoder_depth=encoder,
        decoder_depth=decoder,
        encoder_dim=width or 64 * encoder,
        decoder_dim=width or 64 * decoder,
        **sizes,
    )
    with torch.no_grad():  # as initialised, time modulates nothing and both heads give 0
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def decoder_macs(model: FlexTokModel, registers: int) -> float:
    """Multiply-adds of one velocity of one picture."""
    c, patches = model.config, model.config.pos_grid**2
    d, tokens = c.decoder_dim, patches + registers
    block = tokens * (4 * d * d + 3 * d * mlp_width(d, c.mlp_ratio)) + 2 * tokens * tokens * d + 12 * d * d
    ends = 2 * patches * c.patch_size**2 * c.latent_channels * d + 2 * d * d + c.freq_dim * d + d * d
    return c.decoder_depth * block + ends


def encoder_macs(model: FlexTokModel, registers: int) -> float:
    """Multiply-adds of the encoder for one picture: patches see patches, registers see everything."""
    c, patches = model.config, model.config.pos_grid**2
    d, tokens = c.encoder_dim, patches + registers
    seen = patches * patches + registers * tokens
    block = tokens * (4 * d * d + 3 * d * mlp_width(d, c.mlp_ratio)) + 2 * seen * d
    return c.encoder_depth * block + patches * c.patch_size**2 * c.latent_channels * d


def rows(model: FlexTokModel, args: argparse.Namespace) -> list[Row]:
    device, batch, side, total = torch.device(args.device), args.batch, model.latent_size, model.config.num_registers
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.config.latent_channels, side, side, generator=generator).to(device)
    ids = torch.randint(model.fsq.codebook_size, (batch, total), generator=generator).to(device)
    t = torch.full((batch,), 0.5, device=device)
    found = []
    for keep in args.keep:
        conditions = {
            fast: (model.condition(ids, keep, fast_dropped=fast), model.condition(drop=True, fast_dropped=fast))
            for fast in (False, True)
        }

        def step(fast: bool, conditions: dict = conditions) -> list[torch.Tensor]:
            return [model.velocity(x, t, condition) for condition in conditions[fast]]

        macs = (
            2 * batch * decoder_macs(model, total),
            batch * (decoder_macs(model, min(keep + 1, total)) + decoder_macs(model, 1)),
        )
        target = TARGET if args.model == TARGET_MODEL and keep <= TARGET_KEEP else None
        found.append(
            Row(
                f"guided step, k={keep}",
                lambda s=step: s(False),
                lambda s=step: s(True),
                macs,
                batch / args.steps,
                target,
            )
        )
    for keep in args.keep:
        macs = (batch * encoder_macs(model, total), batch * encoder_macs(model, keep))
        found.append(
            Row(
                f"encode, k={keep}",
                lambda: model.encode_latents(x),
                lambda k=keep: model.encode_latents(x, k),
                macs,
                batch,
            )
        )
    return found


def agreement(row: Row) -> float:
    """Largest difference between both ways, relative to the largest value."""
    plain, short = row.plain(), row.short()
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, short, strict=True))


def vae_seconds(args: argparse.Namespace, device: torch.device, side: int) -> dict[str, float]:
    """Median seconds of a picture through a VAE of the released shape (float32), into latents and back."""
    channels = (8, 8, 8, 8) if args.dry_run else (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=min(channels[0], 32),
        latent_channels=16,
    )
    vae = vae.eval().to(device)
    picture, latents = (
        torch.zeros(1, 3, 8 * side, 8 * side, device=device),
        torch.zeros(1, 16, side, side, device=device),
    )
    runs: dict[str, Callable[[], Any]] = {"encode": lambda: vae.encode(picture), "decode": lambda: vae.decode(latents)}
    return {name: statistics.median(timed(run, device) for _ in range(3)) for name, run in runs.items()}


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build(args.model, args.dry_run).to(device, dtype)
    chosen = {row.name: row for row in rows(model, args)}
    size = 128 if args.dry_run else 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates: list[float] = []

    def run(name: str, short: bool) -> float:
        row = chosen[name]
        return timed(row.short if short else row.plain, device)

    def product(_: int) -> None:
        rates.append(size**3 / timed(lambda: left @ right, device))

    taken = pairs(list(chosen), lambda name: run(name, False), lambda name: run(name, True), args.pairs, product)
    rate = statistics.median(rates)
    vae = vae_seconds(args, device, model.latent_size) if args.vae else {"encode": 0.0, "decode": 0.0}
    table = []
    for name, row in chosen.items():
        median, low, high = median_interval([plain / short for plain, short in taken[name]])
        limit, guided = row.macs[0] / row.macs[1], name.startswith("guided")
        extra = args.batch * vae["decode" if guided else "encode"]
        runs = args.batch / row.images_per_run
        images = [args.batch / (runs * statistics.median(times) + extra) for times in zip(*taken[name], strict=True)]
        at_rate = args.batch / (runs * row.macs[1] / rate + extra)
        difference = agreement(row) if guided else None
        agrees = difference is None or dtype != torch.float32 or difference <= AGREEMENT
        table.append(
            {
                "model": args.model,
                "row": name,
                "speedup": median,
                "speedup_95": [low, high],
                "limit": limit,
                "share": median / limit,
                "share_95": [low / limit, high / limit],
                "images_per_s": images[1],
                "all_registers_images_per_s": images[0],
                "matmul_images_per_s": at_rate,
                "difference": difference,
                "target": row.target,
                "met": None if row.target is None else high >= row.target and agrees,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12_d12", choices=list(SHAPES))
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 8, 32], help="registers kept, 1 to 256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=12, help="at least 10 for a result worth keeping")
    parser.add_argument("--steps", type=int, default=25, help="guided steps of a decoded picture, for images/s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vae", action="store_true", help="add the VAE's seconds to images/s")
    parser.add_argument("--dry-run", action="store_true", help="tiny model and two pairs: shows that the script works")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.dry_run:
        args.pairs, args.keep = 2, [1, 8]
    torch.set_num_threads(1)
    result = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "batch": args.batch,
        "dtype": args.dtype,
        "pairs": args.pairs,
        "steps": args.steps,
        "vae": args.vae,
        "rows": measure(args),
    }
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def as_text(result: dict) -> str:
    vae = "with" if result["vae"] else "without"
    lines = [
        f"{result['rows'][0]['model']}, batch {result['batch']}, {result['dtype']}, {result['pairs']} pairs, "
        f"{vae} VAE; {result['machine']}; torch {result['torch']}",
        f"images/s of decoding are for {result['steps']} guided steps",
        "",
        f"{'':20} {'speed-up [95 %]':22} {'limit':>6}  {'share [95 %]':24} {'img/s':>8} {'all reg.':>8} "
        f"{'matmul':>8} {'diff.':>8}  target",
    ]
    for row in result["rows"]:
        speed = "{:.3f} [{:.3f}, {:.3f}]".format(row["speedup"], *row["speedup_95"])
        share = "{:.1%} [{:.1%}, {:.1%}]".format(row["share"], *row["share_95"])
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        verdict = "" if row["target"] is None else f"{row['target']} {'met' if row['met'] else 'missed'}"
        lines.append(
            f"{row['row']:20} {speed:22} {row['limit']:6.3f}  {share:24} {row['images_per_s']:8.3g} "
            f"{row['all_registers_images_per_s']:8.3g} {row['matmul_images_per_s']:8.3g} {difference:>8}  {verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
