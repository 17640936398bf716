"""What the codes of a TokenFlow hold: pictures back from the first scales, and what linear probes read in the codes.

python tokenizers/tokenflow/evaluate.py --model runs/tokenflow/model
python tokenizers/tokenflow/evaluate.py --model DIR --data PICTURES --count 50000 --features INCEPTION --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.errors import TokredError
from tokred.data.coloured import COLOURS
from tokred.data.pictures import CardPictures, PictureBatch, Pictures, open_pictures
from tokred.eval.reconstruction import SHOWN, Features, cells, frechet_distance, measure, scale_ways, sheet
from tokred.eval.report import dumps, table
from tokred.generation.tokenflow import TokenFlow

PROBED = {"semantic codes": "last_semantic", "pixel codes": "last_pixel", "both": "last"}
RIDGE = 1e-2  # of the probes, times the number of pictures they learn from
PAPER = (
    "Paper says (ImageNet, 50,000 pictures; not measured by us): 256 pixels, 9 scales: rFID 1.37, PSNR 21.41, SSIM "
    "0.687; 384 pixels, 15 scales: rFID 0.63, PSNR 22.77, SSIM 0.731. The released script takes SSIM with a range of 2 "
    "on pictures in [0, 1], which comes out higher than the SSIM here."
)


def targets(batch: PictureBatch, cards: bool) -> dict[str, Tensor]:
    """What a probe is asked of pictures: classes, and of cards the digit and its colour."""
    if batch.labels is None:
        return {}
    if not cards or batch.captions is None:
        return {"class": batch.labels}
    names = list(COLOURS)
    return {"digit": batch.labels, "colour": torch.tensor([names.index(c.split()[1]) for c in batch.captions])}


def probes(tokenizer: TokenFlow, learn: Iterable[PictureBatch], test: Iterable[PictureBatch], cards: bool) -> Any:
    """Share of the pictures of `test` of which a ridge regression on the visual tokens names the target right.

    {target: {which codes: (share, its standard error)}}; the regressions see all tokens of a picture, flattened.
    """

    def seen(batches: Iterable[PictureBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs: dict[str, list[Tensor]] = {}
        wanted: dict[str, list[Tensor]] = {}
        for batch in batches:
            codes = tokenizer.encode(batch.images)
            for name, mode in PROBED.items():
                inputs.setdefault(name, []).append(tokenizer.llm_features(codes, mode).flatten(1).double())
            for name, values in targets(batch, cards).items():
                wanted.setdefault(name, []).append(values)
        return {k: torch.cat(v) for k, v in inputs.items()}, {k: torch.cat(v) for k, v in wanted.items()}

    (given, known), (asked, truth) = seen(learn), seen(test)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for target, values in known.items():
        answers = F.one_hot(values).double()
        for name, x in given.items():
            middle = x.mean(0)
            centred = x - middle
            gram = centred.T @ centred + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
            weights = torch.linalg.solve(gram, centred.T @ (answers - answers.mean(0)))
            said = ((asked[name] - middle) @ weights + answers.mean(0)).argmax(1)
            share = (said == truth[target]).double().mean().item()
            found.setdefault(target, {})[name] = (share, (share * (1 - share) / len(said)) ** 0.5)
    return found


def first(batches: Iterator[PictureBatch], count: int) -> Iterator[PictureBatch]:
    """Batches of `count` pictures in all, or a few more."""
    while count > 0:
        batch = next(batches)
        count -= len(batch.images)
        yield batch


def open_data(data: str, tokenizer: TokenFlow, count: int) -> Pictures:
    """Cards of the test split, or the last `count` pictures of a folder; see `tokred.data.pictures`."""
    if data == "cards":
        return CardPictures(split="test", held_out_seed=777)
    return open_pictures(data, tokenizer.image_size, held_out=count)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure; results of JSON types."""
    tokenizer = TokenFlow.from_pretrained(given.model).eval()
    pictures, cards = open_data(given.data, tokenizer, given.count), given.data == "cards"
    sees = None if given.features is None else Features(given.features)
    found, real = measure(pictures.held_out(given.count, given.batch), scale_ways(tokenizer), sees)
    rows = [mine.row(label) for label, mine in found.items()]
    if sees is not None:
        for row, mine in zip(rows, found.values(), strict=True):
            row["rfid"] = frechet_distance(real, mine.moments)
    probed: Any = {}
    if given.probe and (cards or pictures.classes):
        learn = first(pictures.train(given.batch), given.probe)
        probed = probes(tokenizer, learn, pictures.held_out(given.count, given.batch), cards)
    used = torch.cat([tokenizer.encode(batch.images).flatten() for batch in pictures.held_out(given.count)]).unique()
    given.out.mkdir(parents=True, exist_ok=True)
    files = {"results": str(given.out / "results.json"), "pictures": str(given.out / "pictures.png")}
    sheet(next(pictures.held_out(SHOWN, SHOWN)).images, found).save(files["pictures"])
    results = {
        "model": str(given.model),
        "data": {"pictures": given.data, "count": len(next(iter(found.values())).psnr)},
        "rows": rows,
        "probes": probed,
        "codes_used": len(used) / tokenizer.codebook_size,
        "files": files,
    }
    Path(files["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return json.loads(dumps(results))


def show(results: dict[str, Any]) -> str:
    """The tables of `run`."""
    rfid = ["rFID"] if "rfid" in results["rows"][0] else []
    lines = [
        f"TokenFlow {results['model']} on {results['data']['count']} held-out pictures of "
        f"{results['data']['pictures']}; {results['codes_used']:.0%} of the codebook in use",
        "",
        table(["", "bytes", "PSNR dB", "SSIM", *rfid], [[cells(row) for row in results["rows"]]]),
        "",
    ]
    if results["probes"]:
        rows = [
            [
                name,
                *(
                    f"{100 * share:.1f} ± {100 * se:.1f}"
                    for share, se in (by[name] for by in results["probes"].values())
                ),
            ]
            for name in PROBED
        ]
        lines += [table(["a probe reads", *(f"{name}, %" for name in results["probes"])], [rows]), ""]
    return "\n".join([*lines, PAPER])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="folder of a saved TokenFlow")
    parser.add_argument("--data", default="cards", help="cards, or a folder of pictures (default: %(default)s)")
    parser.add_argument("--count", type=int, default=256, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: %(default)s)")
    parser.add_argument(
        "--probe",
        type=int,
        default=2048,
        help="pictures that the probes learn from; 0 is no probe (default: %(default)s)",
    )
    parser.add_argument("--features", type=Path, help="rFID: folder of a timm model, such as a saved inception_v3")
    parser.add_argument("--out", type=Path, default=Path("outputs/eval-tokenflow"), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(argv)
    try:
        results = run(given)
    except (TokredError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=1) if given.json else show(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
