"""Patch the bundled vision transformer, see what it keeps and what that costs, and undo it.

python demos/quickstart.py [--out quickstart.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tokred
from tokred.data.scenes import DigitScenes, normalize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="the picture (default: %(default)s)")
    out = parser.parse_args().out

    model = tokred.zoo.load("digit-vit")
    scenes = DigitScenes("test", seed=777).render(16)
    images = normalize(scenes.images)
    with torch.inference_mode():
        before = model(images)
        with tokred.patch(model, tokred.TopK(keep_rate=0.6)) as patch:
            after = model(images)
            cost = tokred.flops(model)
        undone = model(images)

    same = (before.argmax(1) == after.argmax(1)).sum()
    print(patch.trace)
    print(cost)
    print(f"{same} of {len(images)} predictions unchanged; undone bit for bit: {torch.equal(before, undone)}")
    patch.trace.draw(scenes.images[0]).resize((384, 384), 0).save(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
