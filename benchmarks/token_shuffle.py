"""Speed of drawing pictures with Token-Shuffle, as a share of what its multiply-adds allow.

    OMP_NUM_THREADS=1 python benchmarks/token_shuffle.py [--model small] [--grid 16] [--windows 2 4] [--batch 1]
                              [--guidance 7.5] [--pairs 12] [--device cpu|cuda] [--dtype float32] [--dry-run] [--json]

Random weights. A pair is one picture's codes drawn code by code (window 1) and one drawn window by window, moments
apart, both through `generate` with a cache; rows take turns and the order inside a pair alternates. A line is the
median of the paired ratios with its 95 % interval (order statistics).

The limit of a speed-up is the ratio of multiply-adds of a whole picture (`image_macs`): the transformer's linear part
falls by s^2, attention by about s^4, the head not at all. A step that waits for memory or for the interpreter costs
more than its multiply-adds; seconds a picture at the rate of one large matrix product, measured in the same run, show
how far away that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vit import machine, median_interval, timed

from tokred.eval.speed import pairs
from tokred.generation.token_shuffle import TokenShuffle

#: width, depth, heads, hidden width, codes
SHAPES = {"tiny": (256, 4, 4, 688, 1024), "small": (512, 8, 8, 1376, 4096), "medium": (768, 12, 12, 2048, 16384)}
DRY = (32, 1, 2, 48, 64)
TEXT = 11
PROMPT = [10, 3]


def build(name: str, window: int, grid: int, dry: bool) -> TokenShuffle:
    width, depth, heads, hidden, codes = DRY if dry else SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TEXT,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=hidden,
        max_position_embeddings=max(2048, grid**2 + 8),
        bos_token_id=PROMPT[0],
        eos_token_id=None,
        pad_token_id=None,
    )
    return TokenShuffle.wrap(AutoModelForCausalLM.from_config(config), codebook_size=codes, window=window).eval()


def image_macs(model: TokenShuffle, prompt: int, grid: int, guided: bool) -> float:
    """Multiply-adds of one picture: a prompt of so many tokens, SOI among them, then a step a window."""
    c, s = model.config.text_config, model.config.window
    d, depth, steps = c.hidden_size, c.num_hidden_layers, (grid // s) ** 2
    head_dim = getattr(c, "head_dim", None) or d // c.num_attention_heads
    own, shared = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
    linear = depth * (2 * d * own + 2 * d * shared + 3 * d * c.intermediate_size)
    seen = prompt * prompt + sum(range(prompt + 1, prompt + steps))  # keys that queries meet
    operator = d * d + model.config.num_blocks * 2 * model.config.mlp_ratio * d * d if s > 1 else 0
    head = s * s * d * (model.config.codebook_size if s > 1 else c.vocab_size)
    row = linear * (prompt + steps - 1) + depth * 2 * own * seen + steps * (operator + head)
    return (1 + guided) * row + (steps - 1) * operator


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    models = {s: build(args.model, s, args.grid, args.dry_run).to(device, dtype) for s in (1, *args.windows)}
    size = 128 if args.dry_run else 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates: list[float] = []

    def run(window: int) -> float:
        prompts = [PROMPT] * args.batch
        options = {"do_sample": True, "guidance_scale": args.guidance, "guidance_schedule": "constant"}
        return timed(lambda: models[window].generate_codes(prompts, args.grid, **options), device)

    def product(_: int) -> None:
        rates.append(size**3 / timed(lambda: left @ right, device))

    taken = pairs([str(s) for s in args.windows], lambda _: run(1), lambda s: run(int(s)), args.pairs, product)
    rate, guided = statistics.median(rates), args.guidance != 1
    macs = {s: image_macs(model, len(PROMPT) + 1, args.grid, guided) for s, model in models.items()}
    slow = [seconds for found in taken.values() for seconds, _ in found]
    rows = [{"window": 1, "seconds": statistics.median(slow) / args.batch}]
    for s in args.windows:
        median, low, high = median_interval([plain / short for plain, short in taken[str(s)]])
        limit = macs[1] / macs[s]
        rows.append(
            {
                "window": s,
                "seconds": statistics.median(short for _, short in taken[str(s)]) / args.batch,
                "speedup": median,
                "speedup_95": [low, high],
                "limit": limit,
                "share": median / limit,
                "share_95": [low / limit, high / limit],
            }
        )
    for row in rows:
        s = int(row["window"])
        row |= {"steps": (args.grid // s) ** 2, "gmacs": macs[s] / 1e9, "matmul_seconds": macs[s] / rate}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=list(SHAPES))
    parser.add_argument("--grid", type=int, default=16, help="codes a side; 32 is 512 pixels")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=7.5, help="1 is none, and half the rows")
    parser.add_argument("--pairs", type=int, default=12, help="at least 10 for a result worth keeping")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dry-run", action="store_true", help="tiny model and two pairs: shows that the script works")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.dry_run:
        args.pairs, args.grid = 2, 4
    torch.set_num_threads(1)
    result = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "model": args.model,
        "grid": args.grid,
        "batch": args.batch,
        "guidance": args.guidance,
        "dtype": args.dtype,
        "pairs": args.pairs,
        "rows": measure(args),
    }
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} Llama, {result['grid']} x {result['grid']} codes, batch {result['batch']}, guidance "
        f"{result['guidance']:g}, {result['dtype']}, {result['pairs']} pairs; {result['machine']}; torch "
        f"{result['torch']}",
        "",
        f"{'window':>6} {'steps':>6} {'s/picture':>10} {'matmul':>9} {'GMACs':>8}  {'speed-up [95 %]':24} "
        f"{'limit':>7}  share [95 %]",
    ]
    for row in result["rows"]:
        line = f"{row['window']:6} {row['steps']:6} {row['seconds']:10.4f} {row['matmul_seconds']:9.4f}"
        line += f" {row['gmacs']:8.3f}"
        if "speedup" in row:
            speed = "{:.2f} [{:.2f}, {:.2f}]".format(row["speedup"], *row["speedup_95"])
            share = "{:.1%} [{:.1%}, {:.1%}]".format(row["share"], *row["share_95"])
            line += f"  {speed:24} {row['limit']:7.2f}  {share}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
