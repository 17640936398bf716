"""Sections of the leaderboard: what `tokred bench --all` shows of the results of each task.

A section is a dictionary of JSON types. Its rows hold the numbers, and under ``cells`` the text of the table: rows of
one group (one budget) are compared with each other. Its plot holds the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokred.core.method import registered
from tokred.eval import bench_vqa
from tokred.eval.report import percent, signed
from tokred.eval.vlm import changed_settings

__all__ = ["Section", "backbones", "diffusion", "mark_best", "needle", "tokenize", "video", "vit", "vqa"]

Section = dict[str, Any]
Record = Mapping[str, Any]

#: Columns of the tables: key -> (title, text of a row).
COLUMNS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "label": ("method", lambda row: row["label"]),
    "setting": ("setting", lambda row: row["setting"]),
    "frames": ("frames", lambda row: f"{row['frames']}"),
    "tokens": ("tokens", lambda row: f"{row['tokens']:.0f}"),
    "left": ("left", lambda row: f"{row['left']:.0f}"),
    "gmacs": ("GMACs", lambda row: f"{row['gmacs']:.3f}"),
    "share": ("share", lambda row: f"{row['share']:.0%}"),
    "accuracy": ("accuracy %", lambda row: _accuracy(row)),
    "difference": ("vs random", lambda row: _difference(row["difference"])),
    "inside": ("vs inside", lambda row: _difference(row["vs_inside"])),
    "speedup": ("speed-up", lambda row: "" if row["speedup"] is None else f"{row['speedup']:.2f}x"),
    "quartiles": ("quartiles", lambda row: _quartiles(row["speedup_quartiles"]) if row["kind"] != "whole" else ""),
    "limit": ("limit", lambda row: f"{row['limit']:.2f}x"),
    "ms": ("ms", lambda row: f"{row['ms']:.0f}"),
}
#: What is said of columns in every section.
COMMON = (
    "GMACs: 10⁹ multiply-adds of one example, scoring included; share: of the unreduced model's. accuracy ± standard "
    "error; {against}; * better, ! worse by more than 2 standard errors. speed-up: median and quartiles of interleaved "
    "pairs with {pair}, one thread."
)
#: Under a plot whose points would hide each other.
SIDE_BY_SIDE = "Points of one cost stand side by side."
MORE = "More examples, more columns"
COMPARED = ("method", "model")  # kinds of rows of which the best are marked


def _accuracy(row: Record) -> str:
    """Of one observation, or one batch with one random choice, there is no standard error."""
    value, error = row["accuracy"], row["accuracy_se"]
    return percent(value, error) if math.isfinite(error) else f"{100 * value:.1f}"


def _quartiles(found: Sequence[float] | None) -> str:
    return "" if found is None else f"{found[0]:.2f}–{found[1]:.2f}"


def _difference(found: Record | None) -> str:
    if found is None:
        return ""
    return signed(found).strip() if math.isfinite(found["se"]) else f"{100 * found['difference']:+.1f}"


def _section(
    name: str,
    title: str,
    about: str,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    legend: str,
    titles: Mapping[str, str] | None = None,
    **further: Any,
) -> Section:
    """Rows with their cells; groups in the order in which they come."""
    header = [{**{key: COLUMNS[key][0] for key in columns}, **(titles or {})}[key] for key in columns]
    for row in rows:
        row["cells"] = [COLUMNS[key][1](row) for key in columns]
    mark_best(rows)
    return {
        "name": name,
        "title": title,
        "about": about,
        "header": header,
        "rows": list(rows),
        "legend": legend,
        "command": f"tokred bench --task {name.partition('-')[0]}",
        "more": MORE,
        "plot": None,
        "headline": _headline(rows),
        "pictures": [],
        **further,
    }


def mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """Write into each row whether it is among the best of its group: within one standard error of the best of the
    methods (backbones), that of the best one."""
    for group in dict.fromkeys(row["group"] for row in rows):
        rivals = [row for row in rows if row["group"] == group and row["kind"] in COMPARED]
        best = max(rivals, key=lambda row: row["accuracy"], default=None)
        for row in (row for row in rows if row["group"] == group):
            row["best"] = row in rivals and best is not None and row["accuracy"] >= best["accuracy"] - _error(best)


def _error(row: Record) -> float:
    error: float = row["accuracy_se"]
    return error if math.isfinite(error) else 0.0


def _headline(rows: Sequence[Record]) -> str:
    """The best of the last group, and what they are compared with there."""
    group = rows[-1]["group"]
    best = sorted((row for row in rows if row["group"] == group and row["best"]), key=lambda row: -row["accuracy"])
    if not best:
        return ""
    floor = [row for row in rows if row["group"] == group and row["kind"] in ("random", "uniform")]
    text = ", ".join(map(_told, best))
    if len(best) > 4:
        rivals = sum(row["group"] == group and row["kind"] in COMPARED for row in rows)
        text = f"{len(best)} of {rivals} alike, {_told(best[0])}"
    return f"Best at {group}: {text}" + (f"; {', '.join(map(_told, floor))}" if floor and len(floor) <= 2 else "")


def _told(row: Record) -> str:
    return f"{row['label']} {_accuracy(row)} %"


def _row(found: Record, group: str, kind: str | None = None, **facts: Any) -> dict[str, Any]:
    """What all rows have in common, of a row of a task."""
    record = found.get("method")
    name = record["method"] if record is not None else None
    row: dict[str, Any] = {
        "label": found["label"],
        "method": name if name in registered() else None,
        "parameters": record,
        "kind": kind or found["kind"],
        "group": group,
        "setting": "",
        "gmacs": found["gmacs"],
        "accuracy": found.get("accuracy"),
        "accuracy_se": found.get("accuracy_se"),
        "difference": None,
        "speedup": found["speedup"],
        "speedup_quartiles": found["speedup_quartiles"],
    }
    return row | facts


def _lines(rows: Sequence[Record], x: str) -> list[dict[str, Any]]:
    """The points of each label, in the order of the rows; random ones and those of even frames are dashed."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "whole":
            continue
        name, dashed = row.get("curve") or row["method"], row["kind"] in ("random", "uniform")
        line = lines.setdefault(row["label"], {"label": row["label"], "name": name, "dashed": dashed, "points": []})
        line["points"].append(_point(row, x))
    return list(lines.values())


def _point(row: Record, x: str) -> list[float]:
    return [row[x], row["accuracy"], row["accuracy_se"]]


def _examples(found: Record, what: str) -> Section:
    return {"examples": found["count"], "what": what, "split": found["split"], "seed": found["seed"]}


def _picture(results: Record, file: str, caption: str) -> list[dict[str, str]]:
    """A picture of the task's, as long as it drew one."""
    return [{"file": results["files"][file], "caption": caption}] if file in results["files"] else []


# -- vision transformer ------------------------------------------------------------------------------------------------


def vit(results: Record) -> list[Section]:
    rows = []
    for found in results["rows"]:
        level = found["level"]
        kind = "whole" if level is None else found["kind"]
        group = "" if level is None else f"{level:.0%} of the GMACs"
        label = f"Random, as {found['label']}" if kind == "random" else found["label"]
        tokens = sum(found["tokens"]) / len(found["tokens"])
        facts = {"label": label, "setting": found["setting"], "tokens": tokens, "share": found["gmacs_fraction"]}
        facts |= {"difference": found.get("vs_random"), "limit": found["limit"], "curve": found.get("twin_of")}
        rows.append(_row(found, group, kind, **facts))
    return [
        _section(
            "vit",
            "Vision transformer",
            "Name the digit of a scene: a small ViT without any training for fewer tokens, every method at the same "
            "cost.",
            rows,
            ("label", "accuracy", "difference", "tokens", "gmacs", "share", "speedup", "quartiles", "limit", "setting"),
            "tokens: patches that leave a block, on average. "
            + COMMON.format(
                against="vs random: paired, scene by scene, with random dropping of as many tokens in the same blocks",
                pair="the unpatched model",
            )
            + " limit: ratio of GMACs.",
            plot={
                "x": "GMACs of an image, scoring included",
                "y": "accuracy on held-out scenes, %",
                "whole": {"label": "unpatched", "point": _point(rows[0], "gmacs")},
                "lines": _lines(rows, "gmacs"),
                "ticks": [],
                "note": SIDE_BY_SIDE,
            },
            pictures=_picture(
                results,
                "kept",
                "What each method leaves of four scenes after a quarter, half and three quarters of the blocks, at the "
                "middle cost. Dropped patches fade, merged patches share their mean colour.",
            ),
            **_examples(results["scenes"], "scenes"),
        )
    ]


# -- questions about images --------------------------------------------------------------------------------------------


def vqa(results: Record) -> list[Section]:
    whole = results["rows"][0]
    sections = []
    for inside in (False, True):
        rows = []
        for found in results["rows"]:
            level = found["level"]
            control = inside and found["label"] == "Random"  # both sections show it
            if level is not None and found["inside"] != inside and not control:
                continue
            group = "" if level is None else f"{level} of {whole['visual_tokens']:.0f} visual tokens"
            facts = {
                # MustDrop's two thresholds are one here
                "setting": changed_settings(found["method"], ("individual_threshold",)) if found["inside"] else "",
                "tokens": found["read_tokens"],
                "left": found["visual_tokens"],
                "share": found["gmacs"] / whole["gmacs"],
                "difference": found.get("vs_random"),
                "vs_inside": found.get("vs_inside"),
            }
            rows.append(_row(found, group, "whole" if level is None else None, **facts))
        if len(rows) > 1:
            sections.append(_questions(results, rows, inside))
    return sections


def _questions(results: Record, rows: Sequence[dict[str, Any]], inside: bool) -> Section:
    where = "inside the language model" if inside else "before the language model"
    columns = ["label", "accuracy", "difference", *(["inside", "left"] if inside else [])]
    columns += ["tokens", "gmacs", "share", "speedup", "quartiles", *(["setting"] if inside else [])]
    legend = (
        "left: visual tokens behind the last layer; tokens: that a layer reads, on average over the layers. "
        if inside
        else "tokens: visual tokens that the language model reads. "
    )
    legend += COMMON.format(
        against="vs random: paired, question by question, with a random choice of as many tokens before the language "
        "model" + ("; vs inside: with random tokens dropped before its layer 2" if inside else ""),
        pair="the unreduced model up to the first word of the answer",
    )
    if inside:
        legend += (
            " MustDrop drops by a threshold, here one for both of its kinds, fitted to the budget on up to "
            f"{bench_vqa.FITTED} validation questions; settings that are not defaults were chosen on validation "
            "questions, too."
        )
    ticks = sorted({round(row["tokens"]) for row in rows if row["label"] == "Random" or row["kind"] == "whole"})
    end = "_llm" if inside else ""
    return _section(
        "vqa-inside" if inside else "vqa",
        f"Questions about images: tokens dropped {where}",
        "Answer a question about a scene with a small LLaVA that has not been trained for fewer visual tokens; "
        "answers of greedy generate must match exactly.",
        rows,
        columns,
        legend,
        plot={
            "x": "visual tokens that a layer of the language model reads, on average",
            "y": "accuracy on held-out questions, %",
            "whole": {"label": "unreduced", "point": _point(rows[0], "tokens")},
            "lines": _lines(rows, "tokens"),
            "ticks": ticks,
            "note": "" if inside else SIDE_BY_SIDE,
        },
        pictures=_picture(results, f"kept{end}", "What each method keeps of five scenes, and what the model answers."),
        **_examples(results["scenes"], "questions"),
    )


# -- video, long text --------------------------------------------------------------------------------------------------


def video(results: Record) -> list[Section]:
    rows, whole = [], results["rows"][0]
    for found in results["rows"]:
        level = found["level"]
        facts = {
            "frames": found["frames"],
            "tokens": found["visual_tokens"],
            "share": found["gmacs"] / whole["gmacs"],
            "difference": found.get("vs_uniform"),
            "setting": changed_settings(found["method"], ("scorer",)) if found["inside"] else "",
            "inside": found["inside"],
        }
        group = "" if level is None else f"{level} visual tokens"
        rows.append(_row(found, group, "whole" if level is None else None, **facts))
    columns = ["label", "accuracy", "difference", "frames", "tokens"]
    columns += ["gmacs", "share", "speedup", "quartiles", "setting"]
    return [
        _section(
            "video",
            "Questions about clips",
            f"Answer a question about a clip of {results['scenes']['frames']} frames for as many visual tokens: few "
            "frames in full, or more frames of which tokens are dropped.",
            rows,
            columns,
            "tokens: visual tokens that are left behind the last layer of the language model (QuoTA rounds down); "
            "frames: that are encoded. Methods for images, and those inside the language model (from Random inside "
            "on), whose first layers read all tokens of all frames, stand at the middle budget alone. "
            + COMMON.format(
                against="vs even frames: paired, clip by clip, with as many tokens of evenly spaced frames",
                pair="even frames up to the first word of the answer",
            )
            + " In a model this small the vision tower outweighs the language model: more frames cost more time than "
            "their dropped tokens save.",
            {"difference": "vs even frames"},
            plot={
                "x": "visual tokens that the language model reads",
                "y": "accuracy on held-out clips, %",
                "whole": {"label": whole["label"], "point": _point(rows[0], "tokens")},
                "lines": _lines([row for row in rows if not row["inside"]], "tokens"),
                "ticks": sorted({round(row["tokens"]) for row in rows if row["kind"] in ("uniform", "whole")}),
                "note": f"{SIDE_BY_SIDE} Methods inside the language model are in the table alone.",
            },
            command=_measuring("video", rows),
            pictures=_picture(
                results, "frames", "One clip as each method before the language model leaves it, at the middle budget."
            ),
            **_examples(results["scenes"], "clips"),
        )
    ]


def _measuring(task: str, rows: Sequence[Record]) -> str:
    """The command that measures all methods of these rows."""
    names = dict.fromkeys(row["method"] for row in rows if row["kind"] == "method" and row["method"])
    return f"tokred bench --task {task} --methods {','.join(names)}"


def needle(results: Record) -> list[Section]:
    rows, whole = [], results["rows"][0]
    for found in results["rows"]:
        level = found["level"]
        layer = f"layer={found['layer']}" if found["layer"] is not None else ""
        told = changed_settings(found["method"]) if found["inside"] and found["kind"] == "method" else layer
        facts = {
            "accuracy": found["recall"],
            "accuracy_se": found["recall_se"],
            "setting": told or layer,
            "tokens": found["tokens"],
            "share": found["gmacs"] / whole["gmacs"],
            "difference": found.get("vs_random"),
            "vs_inside": found.get("vs_inside"),
            "limit": found["limit"],
        }
        if found["kind"] == "layer":
            facts["label"] = f"{found['label']}, other layer"
        group = "" if level is None else f"{level} tokens of the prompt"
        kind = {"unpatched": "whole", "layer": "other"}.get(found["kind"])
        rows.append(_row(found, group, kind, **facts))
    rows.sort(key=lambda row: -row["tokens"])  # other layers stand last in the task's own table
    scenes, example = results["scenes"], results["example"]
    first = [kept for kept in example["kept"] if kept["label"] == example["kept"][0]["label"]]  # at each budget
    kept = first[len(first) // 2]
    columns = ["label", "accuracy", "difference", "inside", "tokens"]
    columns += ["gmacs", "share", "speedup", "quartiles", "limit", "setting"]
    return [
        _section(
            "needle",
            "Needle in a long text",
            f"Find the one value that is asked for among {scenes['needles']} in a prompt of {scenes['prompt_tokens']} "
            "tokens, of which a small language model reads a part.",
            rows,
            columns,
            "tokens: of the prompt that are left behind the last layer (GemFilter: that all layers read, and layer is "
            "the one that chose them). "
            + COMMON.format(
                against="vs random: paired, prompt by prompt, with random tokens of the context and the whole question",
                pair="the unreduced model up to the first token of the answer",
            )
            + " limit: ratio of GMACs. vs inside: with random tokens of the context dropped before layer 1. "
            "GemFilter's layer was chosen on validation prompts; the other layers stand beside it at the middle "
            "budget, as do methods inside the model. These begin to drop tokens before layer 1, the one that finds the "
            "value; behind it the last word holds the value, and random tokens do as well (Random inside, later).",
            {"accuracy": "recall %"},
            plot={
                "x": "tokens of the prompt that are left",
                "y": "recall on held-out prompts, %",
                "whole": {"label": "unreduced", "point": _point(rows[0], "tokens")},
                "lines": _lines([row for row in rows if row["kind"] != "other"], "tokens"),
                "ticks": sorted({row["tokens"] for row in rows}),
                "note": SIDE_BY_SIDE,
            },
            command=_measuring("needle", rows),
            words={
                "title": f"{kept['label']}, {kept['tokens']} of {len(example['words'])} tokens: asked "
                f"“{example['question']}” it says “{kept['said']}” (right: {example['answer']})",
                "words": example["words"],
                "read": kept["columns"],
                "needle": example["needle"],
            },
            **_examples(scenes, "prompts"),
        )
    ]


# -- backbones ---------------------------------------------------------------------------------------------------------


def backbones(results: Record) -> list[Section]:
    rows = []
    whole = results["groups"][0][0]["gmacs"]
    first, *others = results["groups"]
    others = sorted(others, key=lambda group: -group[0]["gmacs"])
    for number, found_group in enumerate([first, *others]):
        group = "" if not number else f"{found_group[0]['gmacs']:.3f} GMACs"
        for place, found in enumerate(found_group):
            kind = "whole" if not number else ("model" if not place else "method")
            record = found["method"]
            cls = registered()[record["method"]] if record is not None else None
            speed = found["speedup"] or {"median": 1.0, "quartiles": [1.0, 1.0]}
            facts = {
                "label": f"{found['model']}, {cls.title}" if cls is not None else found["model"],
                "setting": found["setting"].partition("(")[2].rstrip(")") if cls is not None else found["setting"],
                "share": found["gmacs"] / whole,
                "accuracy": found["accuracy"],
                "accuracy_se": found["se"],
                "difference": found["against_unpatched"],
                "curve": None if place else found["model"].split()[0],
            }
            flat = {**found, "label": "", "speedup": speed["median"], "speedup_quartiles": speed["quartiles"]}
            rows.append(_row(flat, group, kind, **facts))
    left_out = f" Out of reach of the patched ViT: {'; '.join(results['left_out'])}." if results["left_out"] else ""
    lines = [
        {**line, "points": sorted(map(list, {tuple(p) for p in line["points"]}))} for line in _lines(rows, "gmacs")
    ]
    return [
        _section(
            "backbones",
            "Trained backbones beside the patched ViT",
            "Name the digit of a scene: backbones trained with fewer tokens, and the bundled ViT at nearly their cost, "
            "patched without any training.",
            rows,
            ("label", "accuracy", "difference", "gmacs", "share", "speedup", "quartiles", "setting"),
            COMMON.format(
                against="vs digit-vit: paired, scene by scene, with the unpatched ViT", pair="the unpatched ViT"
            )
            + " One seed of training each: the standard errors are those over scenes alone."
            + left_out,
            {"difference": "vs digit-vit"},
            command="python -m tokred.vision.backbones.compare",
            headline=", ".join(
                f"{row['label']} {row['setting']} {_accuracy(row)} %".replace("  ", " ")
                for row in rows
                if row["kind"] != "method"
            ),
            plot={
                "x": "GMACs of an image",
                "y": "accuracy on held-out scenes, %",
                "whole": {"label": "digit-vit", "point": _point(rows[0], "gmacs")},
                "lines": lines,
                "ticks": [],
                "note": "",
            },
            **_examples(results["scenes"], "scenes"),
        )
    ]


# -- tokenizers --------------------------------------------------------------------------------------------------------

#: Experiment of `tokred bench --task tokenize` -> (title, what is measured, caption of its picture).
EXPERIMENTS = {
    "reconstruct": (
        "FlexTok: cards given back",
        "Give a card back from the first of its ordered tokens.",
        "Cards, and what the first tokens of each give back.",
    ),
    "generate": (
        "FlexTok: cards drawn",
        "Draw the digit that was asked for, in so many tokens.",
        "Drawn from the same ids, decoded from 1 token and more; green where the digit is read right.",
    ),
    "captions": (
        "TexTok: what a caption is worth",
        "Give a card back from its tokens beside its caption, a wrong one, or none.",
        "Cards, and what is given back with each caption.",
    ),
    "grid": (
        "TexTok: tokens beside patches",
        "Draw the digit that was asked for with the same diffusion transformer on few tokens or on all patches.",
        "Drawn on tokens and on patches.",
    ),
    "scales": (
        "TokenFlow: scale by scale",
        "Give a card back, and draw one, from the codes up to a scale.",
        "Cards, and what the codes up to each scale give back.",
    ),
    "questions": (
        "TokenFlow: what each half knows",
        "Answer questions about a card from both halves of its codes, or from one.",
        "",
    ),
    "windows": (
        "Token-Shuffle: codes a step",
        "Draw the digit that was asked for with windows of 1, 2 x 2 and 4 x 4 codes a step.",
        "Drawn in so many steps.",
    ),
}


def tokenize(results: Record) -> list[Section]:
    from tokred.eval import bench_tokenize  # needs diffusers, and what is missing is said first

    sections = []
    for name, (header, groups, legend) in bench_tokenize.tables(results).items():
        title, about, caption = EXPERIMENTS[name]
        raw = results["experiments"][name]
        shown = [cells for group in groups for cells in group]
        rows = []
        for number, cells in enumerate(shown):  # the last ones, of the cards themselves, have no record
            record = raw["rows"][number] if number < len(raw["rows"]) else {}
            rows.append({**record, "group": "", "best": False, "cells": [cell.strip() for cell in cells]})
        used = ", ".join(f"{key}={value:g}" for key, value in raw["settings"].items())
        sections.append(
            {
                "name": f"tokenize-{name}",
                "title": title,
                "about": about,
                "header": header,
                "rows": rows,
                "legend": legend + (f" Settings: {used}." if used else ""),
                "command": f"tokred bench --task tokenize --methods {name}",
                "more": MORE,
                "plot": None,
                "headline": "",
                "pictures": _picture(results, name, caption),
                "reference": {key: raw[key] for key in ("cards", "tokenizer") if key in raw},
                **_examples(results["cards"], "cards"),
            }
        )
    first = next((s for s in sections if s["name"] == "tokenize-reconstruct"), None)
    if first is not None:
        first["plot"] = _reading(results["experiments"])
    return sections


def _reading(experiments: Record) -> dict[str, Any] | None:
    """How often the digit is read in pictures of so many tokens."""
    ways = (
        ("reconstruct", "FlexTok, given back", "flextok", "agreement", False),
        ("generate", "FlexTok, drawn", "flextok", "agreement", True),
        ("scales", "TokenFlow, given back", "tokenflow", "agreement", False),
        ("scales", "TokenFlow, drawn", "tokenflow", "drawn_agreement", True),
    )
    lines: list[dict[str, Any]] = []
    for name, label, model, key, dashed in ways:
        rows = [row for row in experiments.get(name, {"rows": ()})["rows"] if row["tokens"]]
        points = [[row["tokens"], row[key], row[f"{key}_se"]] for row in rows]
        if points:
            lines.append({"label": label, "name": model, "dashed": dashed, "points": points})
    captions = [row for row in experiments.get("captions", {"rows": ()})["rows"] if row["label"] == "right caption"]
    for row in captions:
        point = [row["tokens"], row["agreement"], row["agreement_se"]]
        lines.append({"label": "TexTok with its caption", "name": "textok", "dashed": False, "points": [point]})
    ticks = sorted({point[0] for line in lines for point in line["points"]})
    y = "cards whose digit is read right, %"
    note = "FlexTok, TokenFlow, TexTok: how often the bundled digit ViT names the digit of a card given back or drawn."
    return {"x": "tokens of a card", "y": y, "whole": None, "lines": lines, "ticks": ticks, "note": note}


# -- diffusion ---------------------------------------------------------------------------------------------------------


def diffusion(results: Record) -> list[Section]:
    whole, rows = results["rows"][0], []
    for number, found in enumerate(results["rows"]):
        record = found["method"]
        rows.append(
            {
                **found,
                "method": record["method"] if record is not None else None,
                "parameters": record,
                "kind": "method" if number else "whole",
                "group": "",
                "best": False,
                "share": found["gmacs"] / whole["gmacs"],
                "limit": found.get("limit", 1.0),
                "speedup": found.get("speedup", 1.0),
                "speedup_quartiles": found.get("speedup_quartiles"),
            }
        )
    columns = ("label", "tokens", "gmacs", "share", "ms", "speedup", "quartiles", "limit", "setting")
    for row in rows:
        row["cells"] = [COLUMNS[key][1](row) for key in columns]
    return [
        {
            "name": "diffusion",
            "title": "Merging in a diffusion model: cost and speed alone",
            "about": "One denoising step of a small U-Net with random weights on latents of "
            f"{results['side']} x {results['side']}. There is no accuracy here: no trained diffusion model that these "
            "methods fit is bundled.",
            "header": [COLUMNS[key][0] for key in columns],
            "rows": rows,
            "legend": "tokens: in the self-attention of the finest grid (ToDo: keys alone). GMACs: multiply-adds of a "
            "step, choosing included; share: of the unpatched model's. ms: of a step, median; speed-up: median and "
            "quartiles of interleaved pairs with the unpatched model, one thread; limit: ratio of GMACs. Attention "
            "over many tokens takes longer than its multiply-adds suggest, so the speed-up may pass the limit.",
            "command": "python benchmarks/diffusion.py",
            "more": "At the shape of Stable Diffusion 1.5, from a clone of the repository",
            "plot": None,
            "headline": "",
            "pictures": [],
            "examples": 0,
            "what": "pictures",
            "split": None,
            "seed": results["seed"],
        }
    ]
