"""Classify a picture with a DeiT of timm, as it is and under three methods of about the same cost.

python demos/deit.py [--image cat.jpg] [--model deit_small_patch16_224.fb_in1k]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import tokred
from tokred.eval.scripts import default_device, failing_in_one_line, gmacs, photograph, timed

METHODS = (tokred.ToMe(r=13), tokred.TopK(keep_rate=0.7), tokred.ZeroTPrune(flops=0.65))


@torch.inference_mode()
def run(given: argparse.Namespace) -> None:
    picture = photograph(given.image)
    name = f"local-dir:{given.model}" if Path(given.model).is_dir() else given.model
    model = timm.create_model(name, pretrained=True).eval().to(given.device)
    config = resolve_model_data_config(model)
    images = create_transform(**config, is_training=False)(picture)[None].to(given.device)
    names = ImageNetInfo()

    def predict() -> torch.Tensor:
        return model(images)[0].softmax(dim=-1)

    def told(shares: torch.Tensor) -> str:
        best = int(shares.argmax())
        return f"{names.index_to_description(best)} ({shares[best]:.1%})"

    plain, seconds = timed(predict, repeats=5)
    cost = gmacs(model)
    print(f"{given.model} (a call before the five of which the median time is given)")
    print(f"  as it is: {told(plain)}; {cost}, {1000 * seconds:.0f} ms")

    for method in METHODS:
        with tokred.patch(model, method) as patch:
            reduced, seconds = timed(predict, repeats=5)
            cost = gmacs(model)
        print(f"  {method}: {told(reduced)}; {cost}, {1000 * seconds:.0f} ms")
        print(f"    {patch.trace}")
        out = f"{given.out}_{method.name}.png"
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        patch.trace.draw((images[0].cpu() * std + mean).clamp(0, 1)).save(out)
        print(f"    written: {out}")
    print(f"  undone, bit for bit: {torch.equal(predict(), plain)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="deit_small_patch16_224.fb_in1k",
        help="an ImageNet classifier of timm, hf-hub:ID, or a folder (default: %(default)s)",
    )
    parser.add_argument("--image", metavar="FILE", help="default: a photograph of a cat")
    parser.add_argument("--device", default=default_device(), help="default here: %(default)s")
    parser.add_argument("--out", default="deit", help="start of the pictures' names (default: %(default)s)")
    given = parser.parse_args(argv)
    with failing_in_one_line(given.model):
        run(given)


if __name__ == "__main__":
    main()
