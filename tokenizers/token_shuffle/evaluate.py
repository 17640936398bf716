"""Steps, seconds, likelihood and agreement of generators with different windows, on held-out cards.

python tokenizers/token_shuffle/evaluate.py --tokenizer runs/vq/model --generators runs/shuffle_{1,2,4}/model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokred.core.errors import TokredError
from tokred.data.cards import DigitCards
from tokred.data.pictures import PictureBatch
from tokred.eval.bench_tokenize import Reader
from tokred.eval.shuffle_table import compare, show
from tokred.generation.llamagen_vq import VQTokenizer
from tokred.generation.token_shuffle import TokenShuffle


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; what `compare` found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder of the trained VQ")
    parser.add_argument("--generators", required=True, nargs="+", type=Path, help="folders of trained generators")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--count", type=int, default=500, help="cards, and pictures that are drawn")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of timed runs")
    parser.add_argument("--guidance-scale", type=float, help="instead of the models' own")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 is all codes")
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for results.json and the pictures that were drawn")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        cards = DigitCards(args.split, args.seed).render(args.count)
        vq = VQTokenizer.from_pretrained(args.tokenizer)
        vq.set_progress_bar_config(disable=True)
        found, drawn = compare(
            [TokenShuffle.from_pretrained(folder).eval() for folder in args.generators],
            vq,
            PictureBatch(cards.images.float() / 127.5 - 1, cards.labels, cards.captions),
            Reader(),
            rounds=args.rounds,
            seed=args.seed,
            guidance_scale=args.guidance_scale,
            temperature=args.temperature,
            top_k=args.top_k,
        )
    except TokredError as error:
        parser.error(str(error))
    if args.out is not None:
        from tokred.generation.training import picture_sheet

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, pictures in drawn.items():
            picture_sheet(list(pictures[:40].split(10))).save(args.out / f"{name}.png")
    print(json.dumps(found, indent=1) if args.json else show(found))
    return found


if __name__ == "__main__":
    main()
