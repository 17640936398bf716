"""Experiments of `tokred bench --task tokenize` on tokenizers of many codes: TokenFlow, and a grid under Token-Shuffle.

What is measured is in `tokred.eval.reconstruction`, `tokred.eval.tokenflow_questions` and `tokred.eval.shuffle_table`;
here it is joined to the bundled models and the cards of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from tokred.data.pictures import PictureBatch
from tokred.eval import shuffle_table, tokenflow_questions
from tokred.eval.reconstruction import cells, scale_ways, sheet
from tokred.eval.report import percent

if TYPE_CHECKING:
    from tokred.eval.bench_tokenize import Given

__all__ = ["EXPERIMENTS", "LEGEND", "RUN", "TABLES"]

#: As `tokred.eval.bench_tokenize.EXPERIMENTS`.
EXPERIMENTS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "scales": (("tiny-tokenflow",), {"guidance_scale": 3.0, "top_k": 100, "top_p": 0.95}),
    "questions": (
        ("tiny-tokenflow-qa-both", "tiny-tokenflow-qa-semantic", "tiny-tokenflow-qa-pixel"),
        {},
    ),
    "windows": (
        ("tiny-vq", "tiny-shuffle-1", "tiny-shuffle-2", "tiny-shuffle-4"),
        {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0},
    ),
}
LEGEND = {
    "scales": "PSNR and SSIM ± standard error over cards, from the codes up to a scale. bytes: of these codes. reads "
    "the digit: how often the bundled digit ViT names it. drawn: the same of pictures that the generator drew scale by "
    "scale, as many of each digit, and the digit that was asked for.",
    "questions": "Right answers in % about held-out cards, ± standard error over cards, of small language models that "
    "were trained alike but for what they read of each code; vs both: paired difference over all questions; * better, "
    "! worse by more than 2 standard errors.",
    "windows": shuffle_table.LEGEND,
}


def _scales(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    pipeline = given.parts.get("tiny-tokenflow")
    net = pipeline.tokenizer
    found, rows = given.given_back(scale_ways(net), "TokenFlow, giving back")
    given.progress.start("TokenFlow, drawing", len(given.asked), "pictures")
    drawn: list[list[torch.Tensor]] = [[] for _ in net.scales]
    for number, labels in enumerate(given.asked.split(given.batch)):
        generator = torch.Generator().manual_seed(given.options.seed * 1_000_003 + number)
        options = {**settings, "top_k": int(settings["top_k"])}
        codes = pipeline(class_labels=labels, generator=generator, output_type="pt", **options).tokens
        for parts, pictures in zip(drawn, net.progressive(codes), strict=True):
            parts.append(pictures)
        given.progress.advance(len(labels))
    for row, parts in zip(rows, drawn, strict=True):
        right = given.agreement(given.reader(torch.cat(parts)) == given.asked)
        row |= {f"drawn_{name}": value for name, value in right.items()}
    return {"rows": rows, "cards": given.original()}, sheet(given.batches[0].images[:8], found)


def _scales_table(found: Mapping[str, Any]) -> Any:
    rows = [
        [
            *cells(row),
            percent(row["agreement"], row["agreement_se"]),
            percent(row["drawn_agreement"], row["drawn_agreement_se"]),
        ]
        for row in found["rows"]
    ]
    last = ["the cards", "", "", "", percent(found["cards"]["agreement"], found["cards"]["agreement_se"]), ""]
    return ["TokenFlow", "bytes", "PSNR dB", "SSIM", "reads the digit %", "drawn %"], [rows, [last]]


def _questions(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    names = {"both halves": "both", "semantic half": "semantic", "pixel half": "pixel"}
    models = {label: given.parts.get(f"tiny-tokenflow-qa-{name}") for label, name in names.items()}
    count = len(given.cards.images)
    given.progress.start("questions about codes", 1, "tables")
    found = tokenflow_questions.compare(models, count, given.options.seed, 100, given.options.split)
    given.progress.advance(1)
    return found, None


def _questions_table(found: Mapping[str, Any]) -> Any:
    def cell(scores: Mapping[str, float]) -> str:
        return percent(scores["accuracy"], scores["accuracy_se"])

    rows: list[list[str]] = []
    for row in found["rows"]:
        less = row["difference"]
        mark = "" if not less["significant"] else (" *" if less["difference"] > 0 else " !")
        against = f"{100 * less['difference']:+.1f} ±{100 * less['se']:.1f}{mark}" if rows else ""
        kinds = [cell(row["kinds"][kind]) for kind in tokenflow_questions.QUESTIONS]
        rows.append([row["label"], *kinds, cell(row), against])
    return ["it reads the", *tokenflow_questions.QUESTIONS, "all", "vs both"], [rows]


def _windows(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    models = [given.parts.get(f"tiny-shuffle-{size}") for size in (1, 2, 4)]
    cards = PictureBatch(given.cards.images.float() / 127.5 - 1, given.cards.labels, given.cards.captions)
    given.progress.start("Token-Shuffle, drawing", len(models) * len(given.asked), "pictures")
    found, drawn = shuffle_table.compare(
        models,
        given.parts.get("tiny-vq"),
        cards,
        given.reader,
        rounds=given.options.rounds,
        seed=given.options.seed,
        done=given.progress.advance,
        **{**settings, "top_k": int(settings["top_k"])},
    )
    titles = [f"{row['steps']} steps" for row in found["rows"]]
    return found, given.by_digit([pictures[:10] for pictures in drawn.values()], titles)


RUN: dict[str, Callable[[Given, Mapping[str, Any]], tuple[dict[str, Any], Any]]] = {
    "scales": _scales,
    "questions": _questions,
    "windows": _windows,
}
TABLES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "scales": _scales_table,
    "questions": _questions_table,
    "windows": shuffle_table.cells_of,
}
