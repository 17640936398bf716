"""What `tokred eval imagenet` spends outside its data loader and its models.

    OMP_NUM_THREADS=1 python benchmarks/eval_overhead.py [--model vit_tiny_patch16_224] [--images 256] [--batch 32]
                                                         [--device cpu|cuda] [--workers 0] [--dry-run] [--json]

Random pictures of 400 x 300 pixels lie in a folder as JPEG; the model has random weights; rows are the unpatched model
and ToMe. The whole evaluation runs once under Python's profiler, from the first image to the last record. Two ways to
tell the parts apart: the evaluation's own timers (what its table prints), and the profiler's cumulative time of the
loader's `__next__` and of the models' calls with what brings batches there and predictions back. Under the profiler
everything that is Python is slower, so that its share is an upper bound. Target: below 3 % by either.

Not counted: loading the model, patching, listing the images, the table.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokred.eval import imagenet
from tokred.eval.bench import Progress
from tokred.eval.classifiers import Choice
from tokred.eval.imagenet_data import Source

TARGET = 0.03


def pictures(root: Path, count: int) -> None:
    """Noise that JPEG takes as long to decode as a photograph, in two of ImageNet's classes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        folder = root / ("n01440764", "n03450230")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        rough = draw.integers(0, 256, (38, 50, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((400, 300)).save(folder / f"{number}.jpg", quality=90)


def profiled(options: imagenet.ImagenetOptions) -> tuple[dict[str, Any], dict[str, float]]:
    """The results, and seconds by the profiler."""
    profile, loop, parts = cProfile.Profile(), imagenet._evaluate, {}

    def watched(*args: Any) -> None:
        profile.enable()
        try:
            loop(*args)
        finally:
            profile.disable()

    imagenet._evaluate = watched
    try:
        results = imagenet.run(options, Progress(quiet=True))
    finally:
        imagenet._evaluate = loop
    assert results is not None
    stats: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    parts["total"] = max(row[3] for row in stats.values())
    for part, name in (("model", "_predicted"), ("loader", "_fetched")):
        parts[part] = sum(row[3] for (file, _, called), row in stats.items() if called == name and "imagenet" in file)
    outside = parts["total"] - parts["model"] - parts["loader"]
    return results, {**parts, "outside": outside, "outside_share": outside / parts["total"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dry-run", action="store_true", help="16 images of 64 pixels")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    images = 16 if given.dry_run else given.images
    with tempfile.TemporaryDirectory() as place:
        pictures(Path(place) / "images", images)
        options = imagenet.ImagenetOptions(
            out=Path(place) / "out",
            source=Source(str(Path(place) / "images")),
            model=Choice(given.model, random=True, image_size=64 if given.dry_run else None),
            runs=[("tome", {"r": 8})],
            batch=4 if given.dry_run else given.batch,
            workers=given.workers,
            device=given.device,
        )
        results, profiler = profiled(options)
    found = {
        "model": given.model,
        "images": images,
        "machine": results["machine"],
        "timers": results["time"],
        "profiler": profiler,
        "target": TARGET,
        "met": max(results["time"]["outside_share"], profiler["outside_share"]) < TARGET,
    }
    if given.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{given.model}, {images} images, batches of {options.batch}, {results['machine']['device']}")
    for way in ("timers", "profiler"):
        part = found[way]
        print(
            f"{way:<9} loader {part['loader']:7.2f} s   models {part['model']:7.2f} s   "
            f"all else {part['outside']:6.3f} s = {part['outside_share']:.2%}"
        )
    print(f"target below {TARGET:.0%}: {'met' if found['met'] else 'missed'}", file=sys.stderr)


if __name__ == "__main__":
    main()
