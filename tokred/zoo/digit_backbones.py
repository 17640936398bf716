"""The bundled Strip-MLP, LookupViT and DualToken-ViT: small variants, trained on the digit scenes by one recipe.

How they are made, and put into the package::

    python -m tokred.vision.backbones.train --model lookup_vit_tiny --data scenes --out runs/lookup_vit
    python -m tokred.vision.backbones.compare runs/* --out runs/backbones.json
    python -m tokred.zoo.digit_backbones runs/* --results runs/backbones.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.core.budget import check_choice
from tokred.core.errors import InvalidParameterError

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path(__file__).parent / "weights" / "digit_backbones"
#: Name in the zoo -> folder.
BACKBONES = {
    "digit-dualtoken-vit": "dualtoken_vit",
    "digit-lookup-vit": "lookup_vit",
    "digit-strip-mlp": "strip_mlp",
}


def bundled_runs() -> list[Path]:
    """The folders of the bundled backbones, as `tokred.vision.backbones.trained.load_trained` reads them."""
    return [FOLDER / folder for folder in BACKBONES.values()]


def digit_backbone(name: str) -> nn.Module:
    """A bundled backbone: eval mode, float32, on the CPU. Input (B, 3, 96, 96) normalised, output (B, 10) logits.

    Of the LookupViT, `set_compressed_grid` chooses the cost; it was trained at grids of 3, 4, 6 and 9.

    Raises:
        InvalidParameterError: unknown name.
    """
    check_choice("name", name, tuple(BACKBONES))
    from tokred.vision.backbones.trained import load_trained

    return load_trained(FOLDER / BACKBONES[name])[0]


def digit_backbone_card(name: str) -> dict[str, Any]:
    """How the bundled weights were made, and their measured numbers."""
    check_choice("name", name, tuple(BACKBONES))
    card: dict[str, Any] = json.loads((FOLDER / BACKBONES[name] / "card.json").read_text())
    return card


def bundle(runs: Sequence[Path], results: Path, into: Path = FOLDER) -> None:
    """Copy finished runs with packed weights, and what `compare` measured of them.

    Raises:
        InvalidParameterError: a run is of no family that is bundled, or not among the results.
    """
    from safetensors.torch import save_file

    from tokred.zoo.packed import load_weights, pack

    measured = json.loads(results.read_text())
    for run in runs:
        record = json.loads((run / "config.json").read_text())
        family = next((f for f in BACKBONES.values() if record["run"]["model"].startswith(f)), None)
        if family is None:
            raise InvalidParameterError(f"{run}: {record['run']['model']} is none of {', '.join(BACKBONES.values())}")
        rows = [row for group in measured["groups"] for row in group if row["folder"] == str(run)]
        if not rows:
            raise InvalidParameterError(f"{results} has no row of {run}: give it to compare under that name")
        folder = into / family
        folder.mkdir(parents=True, exist_ok=True)
        save_file(load_weights(run / "model.safetensors"), folder / "model.safetensors")
        path = pack(folder / "model.safetensors")
        path.chmod(0o644)
        (folder / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        weights = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "dtype": "int8 by rows (tokred.zoo.packed)",
            "parameters": record["parameters"],
        }
        chosen = ("model", "setting", "gmacs", "accuracy", "se")
        card = {
            "name": next(name for name, f in BACKBONES.items() if f == family),
            "task": "name the one handwritten digit of a 96x96 scene among stroke fragments on a photograph",
            "weights": weights,
            "training": {"command": "python -m tokred.vision.backbones.train", "config": "config.json"},
            "scenes": measured["scenes"],
            "accuracy": [{key: row[key] for key in chosen} for row in rows],
        }
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tokred.zoo.digit_backbones", description="Put finished training runs into the package."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, required=True, help="the JSON of tokred.vision.backbones.compare")
    args = parser.parse_args(argv)
    bundle(args.runs, args.results)


if __name__ == "__main__":
    main()
