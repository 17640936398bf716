"""`tokred flops`: multiply-adds of a model under methods, beside what the papers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokred.core.flops import Flops, flops
from tokred.core.method import Method, resolve
from tokred.eval.report import table

__all__ = ["REPORTED", "Reported", "flops_rows", "flops_table"]


@dataclass(frozen=True)
class Reported:
    """What a paper prints: GMACs, and the share saved where it prints one."""

    architecture: str
    method: tuple[str, dict[str, Any]]
    gmacs: float
    saved: float | None
    source: str


_ZERO = "Zero-TPrune, table of DeiT-S (4.55 G: blocks with norms, no embedding, no head)"
#: published costs. The settings of Zero-TP-a, -b, -c were not published: ours are of the same shape at that cost.
REPORTED = (
    Reported("deit_small_patch16_224", ("tome", {"r": 13}), 2.7, None, "ToMe, by its formula"),
    Reported("deit_small_patch16_224", ("topk", {"keep_rate": 0.7, "layers": (3, 6, 9)}), 3.0, None, "EViT README"),
    Reported("deit_small_patch16_224", ("zero_tprune", {"preset": "deit_s_3.08g"}), 3.08, None, _ZERO),
    Reported("deit_small_patch16_224", ("zero_tprune", {"preset": "deit_s_2.97g"}), 2.97, 0.347, f"{_ZERO}: -a"),
    Reported("deit_small_patch16_224", ("zero_tprune", {"preset": "deit_s_2.50g"}), 2.50, 0.451, f"{_ZERO}: -b"),
    Reported("deit_small_patch16_224", ("zero_tprune", {"preset": "deit_s_3.97g"}), 3.97, 0.127, f"{_ZERO}: -c"),
)
DEFAULT_METHODS = tuple(reported.method for reported in REPORTED)


def flops_rows(
    model: str, size: int | None = None, methods: Sequence[tuple[str, dict[str, Any]]] = DEFAULT_METHODS
) -> list[dict[str, Any]]:
    """Count a timm architecture: one row unreduced, one for each method (name, parameters).

    "gmacs" counts the whole model with scoring; "blocks_gmacs" the blocks and scoring alone, and "saved" and
    "blocks_saved" their shares of the unreduced model.
    """
    plain = flops(model, size)
    rows = [_row(model, "unreduced", None, plain, plain)]
    for name, parameters in methods:
        (method,) = resolve(name, parameters)
        rows.append(_row(model, repr(method), method, flops(model, size, method), plain))
    return rows


def _row(model: str, label: str, method: Method | None, cost: Flops, plain: Flops) -> dict[str, Any]:
    blocks = cost.blocks + cost.scoring
    paper = next((r for r in REPORTED if r.architecture == model and resolve(*r.method)[0] == method), None)
    return {
        "method": label,
        "gmacs": cost.total / 1e9,
        "saved": 1 - cost.total / plain.total,
        "blocks_gmacs": blocks / 1e9,
        "blocks_saved": 1 - blocks / plain.blocks,
        "scoring_gmacs": cost.scoring / 1e9,
        "tokens": [pair[1] for pair in cost.tokens],
        "paper_gmacs": paper.gmacs if paper else None,
        "paper_saved": paper.saved if paper else None,
        "paper_source": paper.source if paper else None,
    }


def flops_table(model: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    header = ["method", "GMACs", "saved", "blocks", "saved", "paper says", "saved", "tokens in the last MLP"]
    cells = [
        [
            row["method"],
            f"{row['gmacs']:.3f}",
            f"{row['saved']:.1%}",
            f"{row['blocks_gmacs']:.3f}",
            f"{row['blocks_saved']:.1%}",
            "" if row["paper_gmacs"] is None else f"{row['paper_gmacs']:.2f}",
            "" if row["paper_saved"] is None else f"{row['paper_saved']:.1%}",
            str(row["tokens"][-1]),
        ]
        for row in rows
    ]
    notes = (
        "GMACs: the whole model with scoring. blocks: its blocks with scoring, without embedding and head, which is\n"
        "what Zero-TPrune's paper counts. Norms, softmax and activations are in neither."
    )
    return f"{model}\n\n{table(header, [cells[:1], cells[1:]])}\n\n{notes}"
