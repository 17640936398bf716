"""Measure a trained digit VLM and write its card.

    python -m tokred.zoo.evaluate_digit_vlm             # prints the bundled model's validation scores
    python -m tokred.zoo.train_digit_vlm --evaluate     # writes the card of a trained one

Every choice is made on validation scenes; the test scenes are read once for the weights that ship.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokred.data.banks import DIGITS_SOURCE, PHOTO_LICENCES, PHOTOS, SPLITS, digit_indices
from tokred.data.clips import ClipStyle, DigitClips, uniform_frames
from tokred.data.coloured import ColourStyle
from tokred.data.questions import KINDS, QuestionBatch, QuestionScenes
from tokred.zoo.digit_vlm import (
    FOLDER,
    FRAME_TOKENS,
    GRID,
    LLAMA_CONFIG,
    TOWER_CONFIG,
    answer_text,
    digit_video_vlm,
    digit_vlm,
    question_prompt,
)
from tokred.zoo.train_digit_vlm_language import Visual, answer_logits, pack
from tokred.zoo.train_digit_vlm_tower import read_features

VAL_SEED, TEST_SEED = 1, 777
KEEP_RATES = (1.0, 0.5, 0.25, 0.11, 0.05)
#: Frames shown, and the clips measured with them.
FRAME_COUNTS = {8: 240, 16: 100, 32: 60}
CHECKED_SCENES = 32


def share_row(hits: Sequence[bool]) -> dict[str, float | int]:
    """Share of hits, its standard error over independent questions, and their number."""
    share = sum(hits) / len(hits)
    error = (share * (1 - share) / len(hits)) ** 0.5
    return {"accuracy": round(share, 4), "standard_error": round(error, 4), "questions": len(hits)}


def by_kind(kinds: Sequence[str], hits: Sequence[bool]) -> dict[str, Any]:
    """``share_row`` of each kind, and their mean with its standard error."""
    rows: dict[str, list[bool]] = defaultdict(list)
    for kind, hit in zip(kinds, hits, strict=True):
        rows[kind].append(hit)
    table: dict[str, Any] = {kind: share_row(row) for kind, row in rows.items()}
    errors = sum(row["standard_error"] ** 2 for row in table.values()) ** 0.5 / len(table)
    mean = sum(row["accuracy"] for row in table.values()) / len(table)
    return {**table, "mean": {"accuracy": round(mean, 4), "standard_error": round(errors, 4)}}


@torch.inference_mode()
def generate_answers(model: Any, processor: Any, batch: QuestionBatch) -> list[str]:
    """What ``generate`` answers to each question of ``batch``."""
    prompts = [question_prompt(question) for question in batch.questions]
    images = [image.permute(1, 2, 0).numpy() for image in batch.images]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    words = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [answer_text(text) for text in words]


def question_accuracy(model: Any, processor: Any, scenes: QuestionScenes, count: int, batch: int = 32) -> dict:
    """Exact match of the first ``count`` questions by kind, nothing reduced."""
    kinds: list[str] = []
    hits: list[bool] = []
    for start in tqdm(range(0, count, batch), desc=f"questions, {scenes.split}", mininterval=5):
        part = scenes.batch(start, min(batch, count - start))
        answers = generate_answers(model, processor, part)
        kinds += part.kinds
        hits += [answer == right for answer, right in zip(answers, part.answers, strict=True)]
    return by_kind(kinds, hits)


@torch.inference_mode()
def video_accuracy(model: Any, processor: Any, clips: DigitClips, count: int, frames: int) -> dict[str, Any]:
    """Answers of the first ``count`` clips from uniformly chosen frames; apart where none of them is relevant."""
    chosen = uniform_frames(clips.frames, frames)
    kinds: list[str] = []
    hits: list[bool] = []
    missed: list[bool] = []
    for index in tqdm(range(count), desc=f"clips, {clips.split}, {frames} frames", mininterval=5):
        clip = clips.clip(index, chosen)
        prompt = question_prompt(clip.question, "video")
        inputs = processor(text=prompt, videos=clip.frames.numpy(), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        right = answer_text(processor.decode(output[0, inputs["input_ids"].shape[1] :])) == clip.answer
        if clip.relevant[clip.indices].any():
            kinds.append(clip.kind)
            hits.append(right)
        else:
            missed.append(right)
    row: dict[str, Any] = {"tokens": frames * FRAME_TOKENS, "clips": count}
    if hits:
        row["relevant_frame_shown"] = by_kind(kinds, hits)
    if missed:
        row["none_shown"] = share_row(missed)
    return row


def cls_attention(tower: Any, images: Tensor) -> Tensor:
    """Attention of the class token to the patches in the layer that LLaVA reads, mean over heads: (B, 144)."""
    layer = tower.encoder.layers[-2]
    states = tower(images, output_hidden_states=True).hidden_states[-3]
    x = layer.layer_norm1(states)
    heads = tower.config.num_attention_heads
    q, k = (
        proj(x).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return ((q[:, :, :1] @ k.mT) * layer.self_attn.scale).softmax(-1)[:, :, 0, 1:].mean(1)


@torch.inference_mode()
def keep_curve(model: Any, scenes: QuestionScenes, count: int, batch: int = 32) -> dict[str, Any]:
    """Mean accuracy over kinds when a share of the visual tokens is chosen before the decoder, positions kept.

    ``cls_attention`` keeps what the tower's class token looks at, ``lowest_cls_attention`` the opposite, ``random``
    any, ``mask`` the patches that show most of a digit (it knows the answer's place).
    """
    from tokred.data.scenes import normalize, patch_coverage

    generator = torch.Generator().manual_seed(0)
    hits: dict[tuple[str, float], list[bool]] = defaultdict(list)
    kinds: list[str] = []
    tower = model.model.vision_tower
    for start in tqdm(range(0, count, batch), desc="curve", mininterval=5):
        part = scenes.batch(start, min(batch, count - start))
        features, attention = read_features(tower, part.images), cls_attention(tower, normalize(part.images))
        packed = pack([[pair] for pair in zip(part.questions, part.answers, strict=True)])
        kinds += part.kinds
        scores = {
            "random": torch.rand(attention.shape, generator=generator),
            "cls_attention": attention,
            "mask": patch_coverage(part.masks),
            "lowest_cls_attention": -attention,
        }
        for name, score in scores.items():
            order = score.argsort(dim=1, descending=True, stable=True)
            for rate in KEEP_RATES:
                kept = order[:, : max(1, round(rate * GRID**2))].sort(1).values
                some = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
                visual = Visual(some, kept + 1, torch.zeros_like(kept, dtype=torch.bool), GRID**2 + 1)
                logits, answers = answer_logits(model, visual, packed)
                hits[name, rate] += (logits.argmax(-1) == answers).all(-1)[:, 0].tolist()
    table = {key: by_kind(kinds, row) for key, row in hits.items()}
    names = dict.fromkeys(name for name, _ in table)
    return {name: {str(rate): table[name, rate]["mean"]["accuracy"] for rate in KEEP_RATES} for name in names} | {
        "by_kind_at_0.25": {name: {kind: table[name, 0.25][kind]["accuracy"] for kind in KINDS} for name in names}
    }


def scene_checksum(batch: QuestionBatch) -> dict[str, Any]:
    """Numbers and words that identify scenes and questions, rounded as in ``tokred.data.checksum``."""
    pixels = batch.images.double()
    return {
        "channel_mean": [round(v, 2) for v in pixels.mean((0, 2, 3)).tolist()],
        "scene_mean": [round(v, 2) for v in pixels.mean((1, 2, 3))[:8].tolist()],
        "mask_area": [round(v, 1) for v in batch.masks.double().sum((1, 2))[:8].tolist()],
        "questions": batch.questions[:10],
        "answers": batch.answers[:10],
    }


def data_card() -> dict[str, Any]:
    """Where digits and photographs come from, and how scenes and clips are drawn."""
    return {
        "digits": DIGITS_SOURCE,
        "digits_per_split": {split: len(digit_indices(split)) for split in SPLITS},
        "digit_split": "by sample; the source does not say who wrote a digit",
        "photographs": {split: {name: PHOTO_LICENCES[name] for name in PHOTOS[split]} for split in SPLITS},
        "photograph_note": "files inside the scikit-image and scikit-learn wheels; read for training, none is bundled",
        "scenes": asdict(ColourStyle()),
        "clips": asdict(ClipStyle()),
    }


def weights_card(weights: Path) -> dict[str, Any]:
    """Name, size and digest of a weights file."""
    return {
        "file": weights.name,
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dtype": "float16",
    }


def _scores(folder: Path, split: str, questions: int, most_clips: int) -> dict[str, Any]:
    seed = TEST_SEED if split == "test" else VAL_SEED
    image = question_accuracy(*digit_vlm(folder), QuestionScenes(split, seed), questions)
    video_model, processor = digit_video_vlm(folder)
    clips = DigitClips(split, seed)
    counts = {frames: min(count, most_clips) for frames, count in FRAME_COUNTS.items()}
    video = {str(n): video_accuracy(video_model, processor, clips, count, n) for n, count in counts.items()}
    return {"seed": seed, "image": image, "video": video}


def _test_scores(folder: Path, *counts: int) -> dict[str, Any]:
    """Scores of the test split. They are stored beside the weights and read back: the split is looked at once."""
    stored = folder / "test_scores.json"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if stored.exists():
        result: dict[str, Any] = json.loads(stored.read_text())
        if (result["sha256"], result["counts"]) == (digest, list(counts)):
            return result["scores"]
    scores = _scores(folder, "test", *counts)
    stored.write_text(json.dumps({"sha256": digest, "counts": counts, "scores": scores}, indent=1))
    return scores


def evaluate(folder: Path, bundle: bool = False, smoke: bool = False) -> dict[str, Any]:
    """Measure the model in ``folder`` and write ``card.json`` there; ``bundle`` also copies it into the package."""
    counts, curve_count = ((10, 2), 10) if smoke else ((1000, 1000), 400)
    if not (folder / "log.json").exists():
        raise FileNotFoundError(f"no log.json in {folder}; train it first: --seed N --out {folder.parent}")
    record = json.loads((folder / "log.json").read_text())
    model, _ = digit_vlm(folder)
    seconds = {key: record[key] for key in ("cpu_seconds", "wall_seconds")}
    card: dict[str, Any] = {
        "name": "digit-vlm",
        "task": "answer in one word a question about 2-4 coloured digits on a photograph, or in frames of a clip",
        "architecture": {"class": type(model).__name__, "tower": TOWER_CONFIG, "decoder": LLAMA_CONFIG},
        "weights": {
            **weights_card(folder / "model.safetensors"),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "training": {
            "command": f"python -m tokred.zoo.train_digit_vlm --seed {record['seed']} --out DIR",
            "hardware": f"one CPU thread, {platform.machine()}",
            **seconds,
            "recipe": record["recipe"],
        },
        "accuracy": {"val": _scores(folder, "val", *counts), "test": _test_scores(folder, *counts)},
        "curve": {
            "split": "val",
            "questions": curve_count,
            "pruned": "once, before the decoder, positions kept; mean accuracy over kinds",
            **keep_curve(model, QuestionScenes("val", VAL_SEED), curve_count),
        },
        "note": "standard errors are over questions; a split repeats its few digits, so other digits would vary more. "
        "One training seed",
        "data": data_card(),
        "checksum": {
            "split": "test",
            "seed": TEST_SEED,
            "scenes": CHECKED_SCENES,
            **scene_checksum(QuestionScenes("test", TEST_SEED).batch(0, CHECKED_SCENES)),
        },
        "versions": {n: version(n) for n in ("torch", "transformers", "tokenizers", "scikit-learn", "scikit-image")},
        "date": datetime.date.today().isoformat(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1))
    if bundle:
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(folder, FOLDER, ignore=shutil.ignore_patterns("test_scores.json"))
    print(json.dumps({key: card[key] for key in ("accuracy", "curve")}, indent=1))
    return card


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="a trained model; the bundled one by default")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(_scores(args.folder, "val", args.questions, args.clips), indent=1))


if __name__ == "__main__":
    main()
