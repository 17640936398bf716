"""Name what is in a picture by the words for it (zero-shot), with a CLIP as it is and with fewer tokens in its tower.

python demos/clip.py [--image cat.jpg] [--labels "cat,dog,car"]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

import tokred
from tokred.eval.scripts import default_device, failing_in_one_line, gmacs, photograph, timed

LABELS = "cat,dog,bird,car,boat,flower,cup of coffee,person"


@torch.inference_mode()
def run(given: argparse.Namespace) -> None:
    methods = tokred.ToMe(r=given.r), tokred.TopK(keep_rate=given.keep_rate)
    picture = photograph(given.image)
    labels = [label.strip() for label in given.labels.split(",")]
    name = f"local-dir:{given.model}" if Path(given.model).is_dir() else given.model
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=given.pretrained, device=given.device)
    model.eval()
    texts = open_clip.build_zero_shot_classifier(  # (D, labels): the mean of "a photo of a ...", "a drawing of ..."
        model, open_clip.get_tokenizer(name), labels, open_clip.SIMPLE_IMAGENET_TEMPLATES, device=given.device
    )
    images = preprocess(picture)[None].to(given.device)

    def predict() -> torch.Tensor:
        features = F.normalize(model.encode_image(images), dim=-1)
        return (100 * features @ texts).softmax(dim=-1)[0]

    plain, seconds = timed(predict, repeats=5)
    cost = gmacs(model)
    print(f"{given.model} (a call before the five of which the median time is given)")
    print(f"  as it is: {told(plain, labels)}; {cost}, {1000 * seconds:.0f} ms")

    for method in methods:
        with tokred.patch(model, method) as patch:
            reduced, seconds = timed(predict, repeats=5)
            cost = gmacs(model)
        layers = patch.trace.counts
        print(f"  {method}: {told(reduced, labels)}; {cost}, {1000 * seconds:.0f} ms")
        print(f"    {patch.trace.total} tokens, {layers[-1][1]} behind block {layers[-1][0]}")

    mean, std = (torch.tensor(values)[:, None, None] for values in (model.visual.image_mean, model.visual.image_std))
    patch.trace.draw((images[0].cpu() * std + mean).clamp(0, 1)).save(given.out)
    print(f"  undone, bit for bit: {torch.equal(predict(), plain)}")
    print(f"written: {given.out}, what {method.name} keeps")


def told(shares: torch.Tensor, labels: Sequence[str]) -> str:
    best = shares.argmax()
    return f"{labels[best]} ({shares[best]:.1%})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        help="hf-hub:ID, an architecture of open_clip, or a folder (default: %(default)s)",
    )
    parser.add_argument("--pretrained", metavar="TAG", help="weights of the architecture, a tag of open_clip or a file")
    parser.add_argument("--image", metavar="FILE", help="default: a photograph of a cat")
    parser.add_argument("--labels", default=LABELS, help="words, parted by commas (default: %(default)s)")
    parser.add_argument("--r", type=int, default=13, help="tokens that ToMe merges a block (default: %(default)s)")
    parser.add_argument("--keep-rate", type=float, default=0.7, help="of TopK, three times (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="default here: %(default)s")
    parser.add_argument("--out", default="clip.png", metavar="FILE", help="the picture (default: %(default)s)")
    given = parser.parse_args(argv)
    with failing_in_one_line(given.model):
        run(given)


if __name__ == "__main__":
    main()
