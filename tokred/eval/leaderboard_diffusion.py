"""What merging costs and saves in a diffusion model, for `tokred bench --all`.

No trained diffusion model that `ToMeSD` and `ToDo` fit is bundled, so there is no accuracy: the model is a small U-Net
of diffusers with random weights, whose finest self-attention has as many tokens as that of Stable Diffusion 1.5.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from tokred.core.method import Method, registered
from tokred.core.patch import patch
from tokred.eval.bench import BenchOptions, Progress
from tokred.eval.bench_tokenize import macs
from tokred.eval.speed import pairs, ratio

__all__ = ["SETTINGS", "UNET", "run"]

UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SIDE = 64  # of the latents of Stable Diffusion 1.5
WORDS = 16
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tome_sd", {"ratio": 0.25}),
    ("tome_sd", {"ratio": 0.5}),
    ("tome_sd", {"ratio": 0.75}),
    ("todo", {"factor": 2}),
)


@torch.inference_mode()
def run(options: BenchOptions, progress: Progress, side: int = SIDE) -> dict[str, Any]:
    """One denoising step of latents of `side` x `side` cells; JSON types.

    `tokens` of a row are those of its first reduction behind it, `gmacs` multiply-adds in matrix products and
    convolutions as torch counts them, `limit` their ratio; the choosing of receivers is among them.
    """
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(options.seed)
        model: Any = UNet2DConditionModel(sample_size=side, **UNET).eval()
        given = (torch.randn(1, 4, side, side), 501, torch.randn(1, WORDS, UNET["cross_attention_dim"]))
    methods: dict[str, Method] = {}
    for name, parameters in SETTINGS:
        method = registered()[name](**parameters)  # type: ignore[call-arg]
        methods[f"{name} {parameters}"] = method
    progress.start("speed, one thread", len(methods) * (options.rounds + 1), "pairs")

    def seconds(method: Method | None) -> float:
        handle = patch(model, method) if method is not None else None
        try:
            start = time.perf_counter()
            model(*given)
            return time.perf_counter() - start
        finally:
            if handle is not None:
                handle.remove()

    def reduced(key: str) -> float:
        return seconds(methods[key])

    times = pairs(list(methods), lambda _: seconds(None), reduced, options.rounds, progress.advance)
    whole = macs(partial(model, *given)) / 1e9
    plain = statistics.median(first for found in times.values() for first, _ in found)
    rows: list[dict[str, Any]] = [
        {"label": "unpatched", "method": None, "setting": "", "tokens": side * side, "gmacs": whole, "ms": 1000 * plain}
    ]
    for (_, parameters), (key, method) in zip(SETTINGS, methods.items(), strict=True):
        rows.append(_row(model, given, method, parameters, whole, times[key]))
    return {"seed": options.seed, "side": side, "rows": rows}


def _row(
    model: nn.Module,
    given: tuple[Any, ...],
    method: Method,
    parameters: dict[str, Any],
    whole: float,
    times: list[tuple[float, float]],
) -> dict[str, Any]:
    with patch(model, method) as handle:
        gmacs = macs(partial(model, *given)) / 1e9
        step = handle.trace.denoiser[0]
    speedup, low, high = ratio(times)
    return {
        "label": method.title,
        "method": method.to_dict(),
        "setting": ", ".join(f"{key}={value}" for key, value in parameters.items()),
        "tokens": step.tokens_out,
        "gmacs": gmacs,
        "limit": whole / gmacs,
        "ms": 1000 * statistics.median(mine for _, mine in times),
        "speedup": speedup,
        "speedup_quartiles": [low, high],
    }
