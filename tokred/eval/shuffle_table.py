"""What a larger window costs and saves: generators of the same codes that draw 1, 4 or 16 of them a step.

Columns of the table (`compare`): steps and seconds of a picture, likelihood of held-out codes, and how often the digit
that was asked for is to be seen in what is drawn.
"""

from __future__ import annotations

import math
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.data.pictures import PictureBatch
from tokred.eval.report import percent, table
from tokred.eval.speed import pairs, ratio
from tokred.eval.vision import mean, paired
from tokred.generation.llamagen_vq import VQTokenizer
from tokred.generation.token_shuffle import TokenShuffle
from tokred.generation.token_shuffle_ops import window

__all__ = ["LEGEND", "cells_of", "class_prompts", "code_nll", "compare", "draw", "show"]

BATCH = 25
TIMED = 8  # pictures that are drawn at once when time is measured
LEGEND = (
    "window: s, s x s codes a step. nll: of a held-out code in nats, given the class and the windows before it, ± "
    "standard error over cards; vs 1: paired difference; ! worse by more than 2 standard errors. agreement: how often "
    "the bundled digit ViT names the digit that was asked for; in the last rows, of cards after the tokenizer alone, "
    "and of the cards. ms: of the codes of one picture, with guidance, median; speed-up: median of interleaved pairs "
    "with the first row; limit: ratio of multiply-adds."
)


def class_prompts(model: TokenShuffle, labels: Tensor) -> list[list[int]]:
    """Prompts of class-conditional models: BOS, and the class as the id of a text token."""
    bos = model.config.text_config.bos_token_id
    return [([] if bos is None else [bos]) + [label] for label in labels.tolist()]


@torch.inference_mode()
def code_nll(model: TokenShuffle, prompts: Sequence[Sequence[int]], codes: Tensor) -> Tensor:
    """Mean negative log-likelihood (B,) float64 in nats of a code of pictures (B, H, W), given their prompts."""
    inputs = model.pack(prompts, codes)
    logits = model(**{**inputs, "labels": None}, logits_to_keep=1).image_logits.float()
    targets = window(inputs["image_codes"], model.config.window)
    lost = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return lost.view(len(codes), -1).double().mean(dim=1).cpu()


def draw(
    model: TokenShuffle,
    labels: Tensor,
    grid: int,
    generator: torch.Generator,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """Codes (B, H, W) of pictures of classes; `None` is the model's own guidance."""
    options = {"temperature": temperature, "top_k": top_k, "guidance_scale": guidance_scale}
    return model.generate_codes(class_prompts(model, labels), grid, do_sample=True, generator=generator, **options)


def compare(
    models: Sequence[TokenShuffle],
    tokenizer: VQTokenizer,
    cards: PictureBatch,
    reader: Callable[[Tensor], Tensor],
    *,
    rounds: int = 7,
    seed: int = 0,
    done: Callable[[int], object] = lambda pictures: None,
    **drawing: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The table as JSON types, and the pictures that each model drew, as "window s" and (N, 3, S, S).

    Args:
        models: class-conditional, of one codebook; they are ordered by window, the first is what others are compared
            with. cards: pictures with labels; as many are drawn, every class as often but for one.
        reader: the class (B,) that is seen in pictures (B, 3, S, S) in [-1, 1].
        rounds: timed pairs. done: called with the number of pictures after each batch, `len(models)` times all cards.
        drawing: options of `draw`.

    Raises:
        InvalidParameterError: no model, two of one window, another codebook than the tokenizer's, cards without labels.
    """
    from tokred.eval.bench_tokenize import macs  # which may import this module

    ordered = {model.config.window: model for model in sorted(models, key=lambda one: one.config.window)}
    if not models or len(ordered) < len(models):
        raise InvalidParameterError(f"windows {[m.config.window for m in models]}: expected one model of each")
    for model in models:
        if model.config.codebook_size != tokenizer.codebook_size:
            raise InvalidParameterError(
                f"a generator of {model.config.codebook_size} codes with a tokenizer of {tokenizer.codebook_size}"
            )
    labels = cards.labels
    if labels is None:
        raise InvalidParameterError("cards without labels: the generators are asked for classes")
    codes = torch.cat([tokenizer.encode_grid(part) for part in cards.images.split(BATCH)])
    asked = torch.arange(len(codes)) % (int(labels.max()) + 1)
    side = codes.shape[1]
    rows, drawn, losses = [], {}, {}
    for size, model in ordered.items():
        parts, lost = [], []
        for number, wanted in enumerate(asked.split(BATCH)):
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + number)
            parts.append(tokenizer.decode(draw(model, wanted, side, generator, **drawing)).cpu())
            here = slice(number * BATCH, number * BATCH + len(wanted))
            lost.append(code_nll(model, class_prompts(model, labels[here]), codes[here]))
            done(len(wanted))
        drawn[f"window {size}"], losses[size] = torch.cat(parts), torch.cat(lost)
        nll, right = mean(losses[size]), mean(reader(drawn[f"window {size}"]) == asked)
        one = partial(draw, model, asked[:1], side, torch.Generator(model.device).manual_seed(0), **drawing)
        rows.append(
            {
                "window": size,
                "steps": (side // size) ** 2,
                "parameters": sum(p.numel() for p in model.parameters()),
                "nll": nll.value,
                "nll_se": nll.error,
                "agreement": right.value,
                "agreement_se": right.error,
                "gmacs": macs(one) / 1e9,
            }
        )
    first = rows[0]["window"]
    for row in rows[1:]:
        row["nll_vs_first"] = paired(losses[row["window"]], losses[first]).to_dict()
    _add_times(ordered, rows, side, rounds, drawing)
    back = torch.cat([tokenizer.decode(part).cpu() for part in codes.split(BATCH)])
    given_back, seen = mean(reader(back) == labels), mean(reader(cards.images) == labels)
    used = torch.bincount(codes.flatten().cpu(), minlength=tokenizer.codebook_size).double()
    share = used[used > 0] / used.sum()
    found = {
        "rows": rows,
        "tokenizer": {
            "agreement": given_back.value,
            "agreement_se": given_back.error,
            "codes": tokenizer.codebook_size,
            "codes_used": int((used > 0).sum()),
            "unigram_entropy": float(-(share * share.log()).sum()),
            "grid": side,
        },
        "cards": {"agreement": seen.value, "agreement_se": seen.error, "count": len(codes)},
    }
    return found, drawn


def _add_times(
    models: Mapping[int, TokenShuffle], rows: list[dict[str, Any]], side: int, rounds: int, drawing: Mapping[str, Any]
) -> None:
    """Milliseconds of a picture, and the speed-up over the first row."""
    labels, first = torch.arange(TIMED) % 10, rows[0]["window"]

    def clock(size: int) -> float:
        generator = torch.Generator(models[size].device).manual_seed(0)
        start = time.perf_counter()
        draw(models[size], labels, side, generator, **drawing)
        return time.perf_counter() - start

    others = [str(row["window"]) for row in rows[1:]] or [str(first)]
    times = pairs(others, lambda _: clock(first), lambda label: clock(int(label)), rounds)
    rows[0]["ms"] = 1000 * statistics.median(slow for found in times.values() for slow, _ in found) / TIMED
    for row in rows[1:]:
        taken = times[str(row["window"])]
        middle, low, high = ratio(taken)
        row |= {"ms": 1000 * statistics.median(fast for _, fast in taken) / TIMED, "speedup": middle}
        row |= {"speedup_quartiles": [low, high], "limit": rows[0]["gmacs"] / row["gmacs"]}


def cells_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """Header and rows of the table, as `tokred.eval.report.table` takes them."""
    header = ["window", "steps", "M parameters", "nll of a code", f"vs {found['rows'][0]['window']}", "agreement %"]
    header += ["ms", "speed-up", "limit"]
    body = []
    for row in found["rows"]:
        less = row.get("nll_vs_first")
        mark = "" if less is None or not less["significant"] else (" !" if less["difference"] > 0 else " *")
        body.append(
            [
                str(row["window"]),
                str(row["steps"]),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['nll']:.3f} ±{row['nll_se']:.3f}",
                "" if less is None else f"{less['difference']:+.3f} ±{less['se']:.3f}{mark}",
                percent(row["agreement"], row["agreement_se"]),
                f"{row['ms']:.1f}",
                f"{row['speedup']:.2f}x" if "speedup" in row else "",
                f"{row['limit']:.2f}x" if "limit" in row else "",
            ]
        )
    last = [
        [name, "", "", "", "", percent(found[key]["agreement"], found[key]["agreement_se"]), "", "", ""]
        for name, key in (("tokenizer alone", "tokenizer"), ("the cards", "cards"))
    ]
    return header, [body, last]


def show(found: Mapping[str, Any]) -> str:
    """The table as text, with what its columns mean."""
    vq = found["tokenizer"]
    said = (
        f"{LEGEND} The tokenizer uses {vq['codes_used']} of {vq['codes']} codes here; by their frequency alone, a "
        f"code costs {vq['unigram_entropy']:.3f} nats, at random {math.log(vq['codes']):.3f}."
    )
    return "\n".join([table(*cells_of(found)), "", *textwrap.wrap(said, 118)])
