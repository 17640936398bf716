"""`tokred bench --task vit`: methods and their random twins at equal cost, on the bundled digit-scene ViT.

All methods of a level have the cost of ToMe's nearest r; each is compared, scene by scene, with random dropping of the
same number of tokens in the same blocks. `--ablate zero_tprune` takes Zero-TPrune apart instead.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.core.flops import Flops, encoder_macs
from tokred.core.method import EncoderMethod
from tokred.core.patch import patch
from tokred.core.sites import EncoderInfo
from tokred.eval.bench import TASKS, BenchOptions, Progress, require
from tokred.eval.cost import MATCHED, ablation, match_cost, nearest_level, twin
from tokred.eval.report import Curve, Panel, accuracy_plot, contact_sheet, dumps, percent, signed, table, token_chain
from tokred.eval.speed import Speed, interleaved
from tokred.eval.vision import BATCH, Pass, mean, measure, paired
from tokred.vision.zero_tprune import ZeroTPrune

__all__ = ["run", "show"]

MODEL = "digit-vit"
TASK = TASKS["vit"]
#: the paper's ablation: 3.08 of 4.55 G, on more scenes because its steps are small
ABLATION_LEVELS = (0.68,)
ABLATION_SCENES = 2000
SPEED_BATCH = 16
PICTURED = 4  # scenes in kept.png


class _Row:
    """One line of the table before it is measured."""

    def __init__(self, kind: str, label: str, method: EncoderMethod | None, level: float | None, **facts: Any) -> None:
        self.kind, self.label, self.method, self.level, self.facts = kind, label, method, level, facts

    @property
    def key(self) -> str:
        return f"{self.kind} {self.label} {self.level}"


def run(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """Measure, write the pictures and results.json into `options.out`, and return the results (JSON types)."""
    require("demo", "timm", "sklearn", "skimage", "matplotlib", "tqdm", what="tokred bench")
    began = time.perf_counter()
    model, weights = _load(options.checkpoint)
    from tokred.adapters.registry import find_host

    info = find_host(model).info  # type: ignore[attr-defined]
    rows = _rows(options, info)  # settings that do not fit are refused before anything is measured
    options.out.mkdir(parents=True, exist_ok=True)
    count = options.scenes or (ABLATION_SCENES if options.ablate else TASK.scenes)
    images, labels = _scenes(options, count, progress)
    hits = _accuracy(model, rows, images, labels, options, progress)
    speeds = _speed(model, rows, images, options.rounds, progress)
    results: dict[str, Any] = {
        "task": "vit",
        "ablate": options.ablate,
        "model": MODEL,
        "weights": weights,
        "scenes": {"count": count, "split": options.split, "seed": options.seed},
        "machine": {
            "torch": torch.__version__,
            "processor": platform.machine(),
            "accuracy_threads": options.threads,
            "speed_threads": torch.get_num_threads(),
            "speed_batch": min(SPEED_BATCH, count),
            "speed_pairs": options.rounds,
        },
        "rows": _measured(rows, info, hits, speeds),
    }
    results["files"] = _pictures(results, rows, model, images, labels, options)
    results["seconds"] = round(time.perf_counter() - began, 1)
    Path(results["files"]["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return results


def _load(checkpoint: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    from tokred.zoo.digit_vit import WEIGHTS_DIR, load_weights

    path = checkpoint or WEIGHTS_DIR / "digit_vit.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        model = load_weights(path)
    except Exception as error:
        raise InvalidParameterError(f"{path} does not hold weights of {MODEL}: {str(error).splitlines()[0]}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, {"file": path.name if checkpoint is None else str(path), "sha256": digest}


def _rows(options: BenchOptions, info: EncoderInfo) -> list[_Row]:
    rows, levels = [_Row("unpatched", "unpatched", None, None)], options.shares("unpatched multiply-adds")
    if options.ablate is not None:
        if options.ablate != "zero_tprune":
            raise InvalidParameterError(f"--ablate {options.ablate}: only zero_tprune can be taken apart")
        if options.methods is not None:
            raise InvalidParameterError("--ablate and --methods exclude each other")
        others = [f"{name}.{key}" for name, given in options.parameters.items() for key in given]
        vhf = options.parameters.get("zero_tprune", {}).get("vhf", ZeroTPrune().vhf)
        if vhf is None or set(others) - {"zero_tprune.vhf"}:
            raise InvalidParameterError("--ablate takes one parameter: --set zero_tprune.vhf=LOW,HIGH")
        for level in levels or ABLATION_LEVELS:
            for label, method, paper in ablation(info, level, vhf):
                kind = "random" if label == "random drop" else "part"
                rows.append(_Row(kind, label, method, level, paper=paper, twin_of="WPR"))
        return rows
    names = list(options.methods or MATCHED)
    strangers = [name for name in options.parameters if name not in names]
    if strangers:
        raise InvalidParameterError(f"--set {strangers[0]}...: the methods here are {', '.join(names)}")
    for wanted in levels or TASK.levels:
        level = nearest_level(info, wanted)
        for name in names:
            parameters = options.parameters.get(name, {})
            method = match_cost(name, info, level, **parameters)
            rows.append(_Row("method", method.title, method, wanted))
            rows.append(_Row("random", method.title, twin(method, info, options.seed), wanted, twin_of=name))
    return rows


def _scenes(options: BenchOptions, count: int, progress: Progress) -> tuple[Tensor, Tensor]:
    from tokred.data.scenes import CHUNK, DigitScenes

    progress.start("drawing scenes", count, "scenes")
    options.check_split()
    scenes = DigitScenes(options.split, options.seed)
    parts = []
    for start in range(0, count, CHUNK):
        parts.append(scenes.batch(start, min(CHUNK, count - start)))
        progress.advance(len(parts[-1].labels))
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


def _accuracy(
    model: nn.Module, rows: Sequence[_Row], images: Tensor, labels: Tensor, options: BenchOptions, progress: Progress
) -> dict[str, Tensor]:
    from tokred.data.scenes import normalize

    progress.start("accuracy", len(rows) * len(images), "scenes")
    passes = [Pass(row.method, reseed=row.kind == "random") for row in rows]
    hits = measure(model, passes, images, labels, normalize, options.threads, options.seed, progress.advance)
    return {row.key: right for row, right in zip(rows, hits, strict=True)}


def _speed(model: nn.Module, rows: Sequence[_Row], images: Tensor, rounds: int, progress: Progress) -> dict[str, Speed]:
    from tokred.data.scenes import normalize

    methods = {row.key: row.method for row in rows if row.method is not None}
    progress.start("speed, one thread", len(methods) * (rounds + 1), "pairs")
    return interleaved(model, methods, normalize(images[:SPEED_BATCH]), rounds, progress.advance)


# -- results -----------------------------------------------------------------------------------------------------------


def _measured(
    rows: Sequence[_Row], info: EncoderInfo, hits: Mapping[str, Tensor], speeds: Mapping[str, Speed]
) -> list[dict[str, Any]]:
    groups = torch.arange(len(hits[rows[0].key])) // BATCH  # scenes that share a random subset
    unpatched = hits[rows[0].key]
    random = {(row.level, row.facts["twin_of"]): hits[row.key] for row in rows if row.kind == "random"}
    full = encoder_macs(info)
    medians = sorted(speed.unpatched_images_per_s for speed in speeds.values())
    measured = []
    above: Tensor | None = None
    for row in rows:
        right = hits[row.key]
        accuracy = mean(right, groups if row.kind == "random" else None)
        record: dict[str, Any] = {
            "kind": row.kind,
            "label": row.label,
            "level": row.level,
            "method": row.method.to_dict() if row.method is not None else None,
            "setting": _setting(row.method) if row.method is not None else "",
            "accuracy": accuracy.value,
            "accuracy_se": accuracy.error,
        }
        if row.method is None:
            record |= _cost(full, [info.tokens] * info.depth)
            record |= {"images_per_s": medians[len(medians) // 2], "speedup": 1.0, "speedup_quartiles": [1.0, 1.0]}
            record |= {"limit": 1.0, "share_of_limit": 1.0}
        else:
            cost, speed = encoder_macs(info, row.method), speeds[row.key]
            limit = cost.unreduced / cost.total
            record |= _cost(cost, row.method.plan(info))
            record |= {"images_per_s": speed.images_per_s, "speedup": speed.speedup}
            record |= {"speedup_quartiles": [speed.low, speed.high], "limit": limit}
            record |= {"share_of_limit": speed.speedup / limit}
            record["vs_unpatched"] = paired(right, unpatched, groups).to_dict()
        if row.kind in ("method", "part"):
            name = "WPR" if row.kind == "part" else row.method.name  # type: ignore[union-attr]
            record["vs_random"] = paired(right, random[row.level, name], groups).to_dict()
        if row.kind == "part":
            record["vs_row_above"] = paired(right, above, groups).to_dict() if above is not None else None
        above = right
        record |= row.facts
        measured.append(record)
    return measured


def _cost(cost: Flops, tokens: Sequence[int]) -> dict[str, Any]:
    return {"tokens": list(tokens), "gmacs": cost.total / 1e9, "gmacs_fraction": cost.total / cost.unreduced}


def _setting(method: EncoderMethod) -> str:
    """The parameter that sets the cost, and those that differ from their defaults."""
    if method.name == "random_tokens":
        return "same counts"
    driver = MATCHED[method.name][0] if method.name in MATCHED else None
    given = {field.name: (getattr(method, field.name), field.default) for field in fields(method)}  # type: ignore[arg-type]
    return " ".join(
        f"{name}={_compact(value)}"
        for name, (value, default) in given.items()
        if value != default or (name == driver and value is not None)
    )


def _compact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_compact(item) for item in value) + ")"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_compact(item)}" for key, item in value.items()) + "}"
    return str(value)


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean."""
    rows = results["rows"]
    ablated = results["ablate"] is not None
    header = ["method", "setting", "tokens", "GMACs", "accuracy %", "vs random"]
    header += ["vs row above", "paper %"] if ablated else []
    header += ["img/s", "speed-up", "limit", "share"]
    groups: list[list[list[str]]] = []
    level: object = ""
    for row in rows:
        if row["level"] != level:
            groups.append([])
            level = row["level"]
        groups[-1].append(_cells(row, rows[0], ablated))
    scenes = results["scenes"]
    lines = [
        f"{results['model']}: {scenes['count']} {scenes['split']} scenes (seed {scenes['seed']}), "
        f"{results['machine']['speed_threads']} thread for speed, torch {results['machine']['torch']}",
        "",
        table(header, groups, left=3),
        "",
        "accuracy ± standard error. vs random: paired on the same scenes with random dropping of as many tokens in the",
        f"same blocks (a new subset every {BATCH} scenes); * better, ! worse by more than 2 standard errors.",
        "tokens: patches that leave the blocks. speed-up: median of interleaved pairs; limit: ratio of GMACs (scoring",
        "included); share: speed-up / limit.",
    ]
    if ablated:
        lines += ["paper %: DeiT-S on ImageNet at 3.08 of 4.55 G, as the authors' project page reports it."]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], unpatched: Mapping[str, Any], ablated: bool) -> list[str]:
    label = "  random twin" if row["kind"] == "random" and not ablated else row["label"]
    cells = [
        label,
        _part_setting(row) if ablated else row["setting"],
        token_chain(unpatched["tokens"][0], row["tokens"]),
        f"{row['gmacs']:.3f} ({row['gmacs_fraction']:.0%})",
        percent(row["accuracy"], row["accuracy_se"]),
        signed(row.get("vs_random")),
    ]
    if ablated:
        cells += [signed(row.get("vs_row_above")), f"{row['paper']:.1f}" if row.get("paper") else ""]
    speed = [f"{row['images_per_s']:.0f}", f"{row['speedup']:.2f}x", f"{row['limit']:.2f}x"]
    return [*cells, *speed, f"{row['share_of_limit']:.0%}" if row["level"] is not None else ""]


def _part_setting(row: Mapping[str, Any]) -> str:
    method = row["method"] or {}
    if row["kind"] == "part" and method.get("vhf"):
        return "vhf=" + _compact(tuple(method["vhf"]))
    return ""


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(
    results: Mapping[str, Any],
    rows: Sequence[_Row],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: BenchOptions,
) -> dict[str, str]:
    name = f"results-{options.ablate}.json" if options.ablate else "results.json"
    files = {"results": str(options.out / name)}
    if options.ablate is not None:
        return files
    levels = sorted({row.level for row in rows if row.level is not None}, reverse=True)
    middle = levels[len(levels) // 2]
    shown = [row for row in rows if row.kind == "method" and row.level == middle]
    sheet = _kept(shown, results, model, images[:PICTURED], labels[:PICTURED])
    sheet.save(options.out / "kept.png")
    curves = []
    for label in dict.fromkeys(row["label"] for row in results["rows"] if row["kind"] == "method"):
        mine = [row for row in results["rows"] if row["label"] == label]
        points, floor = (
            [(row["gmacs"], row["accuracy"], row["accuracy_se"]) for row in mine if row["kind"] == kind]
            for kind in ("method", "random")
        )
        curves.append(Curve(label, points, floor))
    full, scenes = results["rows"][0], results["scenes"]
    accuracy_plot(
        options.out / "accuracy_vs_gmacs.png",
        curves,
        (full["gmacs"], full["accuracy"], full["accuracy_se"]),
        f"{results['model']}: accuracy against cost, no training",
        f"{scenes['count']} {scenes['split']} scenes; bars and band are one standard error; "
        "a random twin drops as many tokens in the same blocks",
    )
    return files | {"kept": str(options.out / "kept.png"), "plot": str(options.out / "accuracy_vs_gmacs.png")}


@torch.inference_mode()
def _kept(
    shown: Sequence[_Row],
    results: Mapping[str, Any],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
) -> Any:
    """Scenes by rows; the original, then for each method what is left after a quarter, half and three quarters."""
    from PIL import Image

    from tokred.data.scenes import normalize

    side = 144
    big = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.LANCZOS)
        for image in images
    ]
    whole = model(normalize(images)).argmax(1)
    sheet = [
        [Panel(picture, f"digit {int(label)}, reads {int(guess)}", bool(guess == label))]
        for picture, label, guess in zip(big, labels, whole, strict=True)
    ]
    titles = [(1, "original", f"{results['rows'][0]['gmacs']:.3f} GMACs")]
    for row in shown:
        assert row.method is not None
        with patch(model, row.method) as handle:
            guesses = model(normalize(images)).argmax(1)
            trace = handle.trace
            depth = len(results["rows"][0]["tokens"])
            marks = [round(depth * quarter / 4) for quarter in (1, 2, 3)]
            steps = list(dict.fromkeys(_last_step(trace.counts, mark) for mark in marks))
            for sample, panels in enumerate(sheet):
                for step in steps:
                    layer, left = trace.counts[step]
                    caption, good = f"block {layer}: {left} tokens", None
                    if step == steps[-1]:
                        good = bool(guesses[sample] == labels[sample])
                        caption = f"block {layer}: {left}, reads {int(guesses[sample])}"
                    panels.append(Panel(trace.draw(big[sample], step=step, sample=sample), caption, good))
        record = next(r for r in results["rows"] if r["label"] == row.label and r["level"] == row.level)
        titles.append((len(steps), row.label, f"{record['setting']}, {record['gmacs']:.3f} GMACs"))
    return contact_sheet(sheet, side, titles)


def _last_step(counts: Sequence[tuple[int, int]], layer: int) -> int:
    """The last reduction at or before `layer`, else the first."""
    return max((step for step, (at, _) in enumerate(counts) if at <= layer), default=0)
