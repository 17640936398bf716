"""What the evaluations spend outside their data loader and their model.

    OMP_NUM_THREADS=1 python benchmarks/eval_overhead.py [--task imagenet,vqa,needle] [--items 256] [--batch N]
                                                         [--model imagenet=vit_tiny_patch16_224] [--device cpu|cuda]
                                                         [--dry-run] [--json]

Each evaluation runs once under Python's profiler, from its first batch to its last record, on rows of the unpatched
model and of a method:

- imagenet: random pictures of 400 x 300 pixels in a folder, as JPEG; a timm model with random weights; ToMe;
- vqa: as many such pictures in POPE's files, a question each; the bundled VLM; HiRED;
- needle: haystacks of 512 tokens; the bundled needle LLM; GemFilter.

The bundled models are small, so that these shares are upper bounds: a large model takes longer for the same work
around it. Two ways to tell the parts apart: the evaluation's own timers (what its table prints), and the profiler's
cumulative time of the function that fetches a batch (decoding, preprocessing, making the model's inputs) and of the
one that calls the model and brings its answers back. Under the profiler everything that is Python is slower. Target:
below 3 % by either way.

Not counted: loading the model, listing images or questions, the table.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tokred.eval import imagenet, needle_eval, vqa, vqa_formats
from tokred.eval.bench import Progress
from tokred.eval.classifiers import Choice
from tokred.eval.imagenet_data import Source

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vit import machine

TARGET = 0.03


class Task(NamedTuple):
    """An evaluation: its module, the function that is its loop, and (file, function) of loader and model in it."""

    module: ModuleType
    loop: str
    loader: tuple[str, str]
    model: tuple[str, str]
    options: Callable[[Path, argparse.Namespace, int, str | None], Any]


def picture(path: Path, number: int) -> None:
    """Noise that JPEG takes as long to decode as a photograph."""
    rough = np.random.default_rng(number).integers(0, 256, (38, 50, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rough).resize((400, 300)).save(path, quality=90)


def imagenet_options(place: Path, given: argparse.Namespace, items: int, model: str | None) -> Any:
    for number in range(items):
        picture(place / "images" / ("n01440764", "n03450230")[number % 2] / f"{number}.jpg", number)
    return imagenet.ImagenetOptions(
        out=place / "out",
        source=Source(str(place / "images")),
        model=Choice(model or "vit_tiny_patch16_224", random=True, image_size=64 if given.dry_run else None),
        runs=[("tome", {"r": 8})],
        batch=4 if given.dry_run else given.batch or 32,
        workers=0,
        device=given.device,
    )


def vqa_options(place: Path, given: argparse.Namespace, items: int, model: str | None) -> Any:
    rows = []
    for number in range(items):
        picture(place / f"{number}.jpg", number)
        row = {"question_id": number, "image": f"{number}.jpg", "text": "is there a 4 ?", "label": "yes"}
        rows.append(json.dumps(row))
    (place / "coco_pope_random.json").write_text("\n".join(rows))
    return vqa.VqaOptions(
        benchmark="pope",
        out=place / "out",
        model=model or "digit-vlm",
        source=vqa_formats.Source(str(place), place),
        runs=[("hired", {"budget": 0.25})],
        batch=2 if given.dry_run else given.batch or 8,
        device=given.device,
    )


def needle_options(place: Path, given: argparse.Namespace, items: int, model: str | None) -> Any:
    return needle_eval.NeedleOptions(
        out=place / "out",
        model=model or "needle-llm",
        lengths=[64 if given.dry_run else 512],
        depths=4,
        samples=max(items // 4, 1),
        runs=[("gemfilter", {"k": 32 if given.dry_run else 64, "layer": 1})],
        batch=2 if given.dry_run else given.batch or 4,
        device=given.device,
    )


TASKS = {
    "imagenet": Task(imagenet, "_evaluate", ("imagenet", "_fetched"), ("imagenet", "_predicted"), imagenet_options),
    "vqa": Task(vqa, "_ask_all", ("vqa", "_inputs"), ("vqa_hosts", "generated"), vqa_options),
    "needle": Task(needle_eval, "_ask_all", ("needle_eval", "inputs"), ("vqa_hosts", "generated"), needle_options),
}


def profiled(task: Task, options: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The results, and seconds by the profiler."""
    profile, loop = cProfile.Profile(), getattr(task.module, task.loop)

    def watched(*args: Any) -> None:
        profile.enable()
        try:
            loop(*args)
        finally:
            profile.disable()

    setattr(task.module, task.loop, watched)
    try:
        results = task.module.run(options, Progress(quiet=True))
    finally:
        setattr(task.module, task.loop, loop)
    assert results is not None
    stats: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = {"total": max(row[3] for row in stats.values())}
    for part, where in (("loader", task.loader), ("model", task.model)):
        (found[part],) = (row[3] for (path, _, name), row in stats.items() if (Path(path).stem, name) == where)
    outside = found["total"] - found["model"] - found["loader"]
    return results, {**found, "outside": outside, "outside_share": outside / found["total"]}


def measured(name: str, given: argparse.Namespace, model: str | None) -> dict[str, Any]:
    items = 8 if given.dry_run else given.items
    with tempfile.TemporaryDirectory() as place:
        options = TASKS[name].options(Path(place), given, items, model)
        results, profiler = profiled(TASKS[name], options)
    timers = results["time"]
    return {
        "task": name,
        "model": results["model"],
        "items": items,
        "batch": options.batch,
        "device": results["machine"]["device"],
        "rows": [row.get("label", row.get("row")) for row in results["rows"]],
        "timers": timers,
        "profiler": profiler,
        "met": max(timers["outside_share"], profiler["outside_share"]) < TARGET,
    }


def as_text(found: dict[str, Any]) -> str:
    lines = [found["machine"], ""]
    for one in found["tasks"]:
        lines.append(
            f"{one['task']}: {one['model']}, {one['items']} items, batches of {one['batch']}, {one['device']}, rows "
            + ", ".join(one["rows"])
        )
        for way in ("timers", "profiler"):
            part = one[way]
            lines.append(
                f"  {way:<9} data loader {part['loader']:7.2f} s   model {part['model']:7.2f} s   "
                f"all else {part['outside']:6.3f} s = {part['outside_share']:.2%}"
            )
        lines.append(f"  target below {TARGET:.0%}: {'met' if one['met'] else 'missed'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--items", type=int, default=256, help="images, questions, prompts (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="default: those of the commands")
    parser.add_argument("--model", action="append", default=[], metavar="TASK=NAME", help="in place of the default")
    parser.add_argument("--device")
    parser.add_argument("--dry-run", action="store_true", help="8 small items of each")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    models = dict(one.split("=", 1) for one in given.model)
    names = given.task.split(",")
    for name in (*names, *models):
        if name not in TASKS:
            parser.error(f"no evaluation {name!r}; there are: {', '.join(TASKS)}")
    tasks = [measured(name, given, models.get(name)) for name in names]
    where = machine("cuda" if tasks[0]["device"].startswith("cuda") else "cpu")
    found = {"machine": f"{where}; torch {torch.__version__}", "target": TARGET, "tasks": tasks}
    print(json.dumps(found, indent=2) if given.json else as_text(found))


if __name__ == "__main__":
    main()
