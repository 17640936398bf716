"""Measure a trained digit CLIP and write its card.

python -m tokred.zoo.evaluate_digit_clip            # prints the bundled model's validation scores
python -m tokred.zoo.train_digit_clip --evaluate    # writes the card of a trained one
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokred.data.clips import DigitClips
from tokred.data.scenes import normalize
from tokred.zoo.digit_clip import CONFIG, FOLDER, WORDS, digit_clip
from tokred.zoo.evaluate_digit_vlm import TEST_SEED, VAL_SEED, data_card, weights_card


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher; ties count half."""
    above = scores[positive][:, None] - scores[~positive]
    return ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()


@torch.inference_mode()
def clip_aucs(folder: Path, clips: DigitClips, count: int) -> dict[str, Any]:
    """ROC-AUC of relevant against other frames, by cosine with the question: mean over clips, by kind."""
    model, _, tokenizer = digit_clip(folder)
    rows: dict[str, list[float]] = defaultdict(list)
    top: list[bool] = []
    for index in tqdm(range(count), desc=f"clips, {clips.split}", mininterval=5):
        clip = clips.clip(index)
        image = model.encode_image(normalize(clip.frames), normalize=True)
        scores = (image @ model.encode_text(tokenizer([clip.question]), normalize=True).T)[:, 0]
        rows[clip.kind].append(roc_auc(scores, clip.relevant))
        top.append(bool(clip.relevant[scores.argmax()]))
    rows["all"] = [value for row in list(rows.values()) for value in row]
    table: dict[str, Any] = {}
    for kind, row in rows.items():
        values = torch.tensor(row)
        error = values.std().item() / len(row) ** 0.5
        table[kind] = {"auc": round(values.mean().item(), 4), "standard_error": round(error, 4), "clips": len(row)}
    return {**table, "best_frame_is_relevant": round(sum(top) / count, 4)}


def _test_scores(folder: Path, count: int) -> dict[str, Any]:
    """Scores of the test split. They are stored beside the weights and read back: the split is looked at once."""
    stored, digest = folder / "test_scores.json", weights_card(folder / "model.safetensors")["sha256"]
    if stored.exists():
        result: dict[str, Any] = json.loads(stored.read_text())
        if (result["sha256"], result["count"]) == (digest, count):
            return result["scores"]
    scores = clip_aucs(folder, DigitClips("test", TEST_SEED), count)
    stored.write_text(json.dumps({"sha256": digest, "count": count, "scores": scores}, indent=1))
    return scores


def evaluate(folder: Path, bundle: bool = False, smoke: bool = False) -> dict[str, Any]:
    """Measure the model in ``folder`` and write ``card.json`` there; ``bundle`` also copies it into the package."""
    count = 4 if smoke else 80
    record = json.loads((folder / "log.json").read_text())
    parameters = sum(p.numel() for p in digit_clip(folder)[0].parameters())
    card: dict[str, Any] = {
        "name": "digit-clip",
        "task": "cosine of a frame and a text that asks for a digit, a colour or a coloured digit",
        "architecture": {"class": "open_clip.model.CLIP", **CONFIG, "words": WORDS},
        "weights": {**weights_card(folder / "model.safetensors"), "parameters": parameters},
        "training": {
            "command": f"python -m tokred.zoo.train_digit_clip --seed {record['seed']} --out DIR",
            "starts_from": "the tower of digit-vlm",
            "hardware": f"one CPU thread, {platform.machine()}",
            **{key: record[key] for key in ("cpu_seconds", "wall_seconds", "recipe")},
        },
        "frame_auc": {
            "val": {"seed": VAL_SEED, **clip_aucs(folder, DigitClips("val", VAL_SEED), count)},
            "test": {"seed": TEST_SEED, **_test_scores(folder, count)},
            "note": "relevant against other frames of a 64-frame clip, by cosine with the question",
        },
        "data": data_card(),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "scikit-learn", "scikit-image")},
        "date": datetime.date.today().isoformat(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1))
    if bundle:
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(folder, FOLDER, ignore=shutil.ignore_patterns("test_scores.json"))
    print(json.dumps(card["frame_auc"], indent=1))
    return card


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="a trained model; the bundled one by default")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(clip_aucs(args.folder, DigitClips("val", VAL_SEED), args.clips), indent=1))


if __name__ == "__main__":
    main()
