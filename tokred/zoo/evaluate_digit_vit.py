"""Measure trained digit-scene ViTs and write the card (``python -m tokred.zoo.train_digit_vit --evaluate``).

Every choice is made on validation scenes; the test scenes are read once for each seed, here, and the bundled seed is 0
whatever the others score.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokred.data.banks import DIGITS_SOURCE, PHOTO_LICENCES, PHOTOS, SPLITS, digit_indices
from tokred.data.scenes import DigitScenes, SceneStyle, checksum, normalize, patch_coverage
from tokred.zoo.digit_vit import ARCHITECTURE, DATA_CONFIG, WEIGHTS_DIR, load_weights
from tokred.zoo.train_digit_vit import VAL_SEED

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TEST_SEED = 777
KEEP_RATES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
PRUNED_BLOCK = 3
CHECKED_SCENES = 32
#: Fewer and fainter strokes, smaller digits: shows how much of the error is the clutter's.
EASIER = SceneStyle(strokes=(2, 5), stroke_opacity=(0.3, 0.7), digit_scale=(2.2, 3.2))


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` independent scenes."""
    return (share * (1 - share) / count) ** 0.5


@torch.inference_mode()
def hits(model: torch.nn.Module, scenes: DigitScenes, count: int, label: str, batch: int = 64) -> Tensor:
    """Whether each of the first ``count`` scenes is named right: (count,) bool."""
    parts = []
    for start in tqdm(range(0, count, batch), desc=label, mininterval=2):
        images, labels, _ = scenes.batch(start, min(batch, count - start))
        parts.append(model(normalize(images)).argmax(1) == labels)
    return torch.cat(parts)


def _cls_attention(block: Any, x: Tensor) -> Tensor:
    """Attention of the class token to the patches, mean over heads: (B, N)."""
    batch, tokens, _ = x.shape
    q, k, _ = block.attn.qkv(block.norm1(x)).view(batch, tokens, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return ((q[:, :, :1] * block.attn.scale) @ k.mT).softmax(-1)[:, :, 0, 1:].mean(1)


@torch.inference_mode()
def keep_curve(
    model: VisionTransformer, scenes: DigitScenes, count: int, batch: int = 64
) -> dict[str, dict[str, float]]:
    """Accuracy when only a share of the patches goes on, chosen once after the attention of block 3 (0-based).

    ``cls_attention`` keeps what the class token looks at in that block, ``lowest_cls_attention`` the opposite (a sanity
    check), ``random`` a random subset, ``mask`` the patches that hold most of the digit (it knows the answer's place).
    """
    generator = torch.Generator().manual_seed(0)
    right = {name: dict.fromkeys(KEEP_RATES, 0) for name in ("random", "cls_attention", "mask", "lowest_cls_attention")}
    block = model.blocks[PRUNED_BLOCK]
    for start in tqdm(range(0, count, batch), desc="curve", mininterval=2):
        images, labels, masks = scenes.batch(start, min(batch, count - start))
        x = model._pos_embed(model.patch_embed(normalize(images)))
        x = model.blocks[:PRUNED_BLOCK](x)
        attention = _cls_attention(block, x)
        x = x + block.attn(block.norm1(x))
        ranks = {
            "random": torch.rand(attention.shape, generator=generator),
            "cls_attention": attention,
            "mask": patch_coverage(masks),
            "lowest_cls_attention": -attention,
        }
        for name, scores in ranks.items():
            order = 1 + scores.argsort(dim=1, descending=True, stable=True)  # 0 is the class token
            for rate in KEEP_RATES:
                kept = order[:, : max(1, round(rate * order.shape[1]))].sort(1).values
                kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], 1)
                y = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
                y = y + block.mlp(block.norm2(y))
                y = model.norm(model.blocks[PRUNED_BLOCK + 1 :](y))
                right[name][rate] += int((model.forward_head(y).argmax(1) == labels).sum())
    return {name: {str(rate): n / count for rate, n in row.items()} for name, row in right.items()}


def _data_card() -> dict[str, Any]:
    return {
        "digits": DIGITS_SOURCE,
        "digits_per_split": {split: len(digit_indices(split)) for split in SPLITS},
        "digit_split": "by sample; the source does not say who wrote a digit",
        "photographs": {split: {name: PHOTO_LICENCES[name] for name in PHOTOS[split]} for split in SPLITS},
        "photograph_note": "files inside the scikit-image and scikit-learn wheels; read for training, none is bundled",
        "scenes": asdict(SceneStyle()),
        "easier_scenes": asdict(EASIER),
    }


def _seed_scores(name: str, folder: Path, count: int) -> dict[str, Any]:
    """Scores of one seed. They are stored beside the weights and read back: a test split is looked at once."""
    weights, stored = folder / f"{name}.safetensors", folder / f"{name}_scores.json"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if stored.exists():
        result: dict[str, Any] = json.loads(stored.read_text())
        if (result["sha256"], result["scenes"]) == (digest, count):
            return result
    record = json.loads((folder / f"{name}.json").read_text())
    half, single = load_weights(weights), load_weights(folder / f"{name}_fp32.safetensors")
    val, test = DigitScenes("val", VAL_SEED), DigitScenes("test", TEST_SEED)
    scores = {
        "val": hits(half, val, count, f"{name} val"),
        "val_float32": hits(single, val, count, f"{name} val, float32"),
        "test": hits(half, test, count, f"{name} test"),
        "test_easier": hits(half, DigitScenes("test", TEST_SEED, EASIER), count, f"{name} test, easier"),
    }
    result = {key: record[key] for key in ("seed", "wall_seconds", "cpu_seconds")}
    result |= {"scenes": count, "sha256": digest}
    for key, row in scores.items():
        share = row.float().mean().item()
        result[key] = round(share, 4)
        result[f"{key}_standard_error"] = round(standard_error(share, count), 4)
    stored.write_text(json.dumps(result, indent=1))
    return result


def _weights_card(weights: Path) -> dict[str, Any]:
    return {
        "file": "digit_vit.safetensors",
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dtype": "float16",
        "parameters": sum(p.numel() for p in load_weights(weights).parameters()),
    }


def _accuracy_card(folder: Path, count: int) -> dict[str, Any]:
    names = sorted(path.stem for path in folder.glob("seed*.safetensors") if "_fp32" not in path.stem)
    seeds = [_seed_scores(name, folder, count) for name in names]
    tests = torch.tensor([row["test"] for row in seeds])
    return {
        "val_seed": VAL_SEED,
        "test_seed": TEST_SEED,
        "bundled_seed": 0,
        "seeds": seeds,
        "test_mean": round(tests.mean().item(), 4),
        "test_standard_deviation_of_seeds": round(tests.std().item(), 4) if len(seeds) > 1 else None,
        "note": "standard errors are over scenes; a split repeats its few digits, so other digits would vary more. "
        "wall_seconds include the wait for other jobs of the machine, cpu_seconds do not",
    }


def evaluate(folder: Path, bundle: bool = False, smoke: bool = False) -> dict[str, Any]:
    """Measure each ``seed<n>`` of ``folder`` and write ``digit_vit.json`` there; ``bundle`` also installs seed 0.

    Raises ``FileNotFoundError`` without seed 0, which is the one that ships.
    """
    count, curve_count = (16, 16) if smoke else (5000, 1000)
    weights, log = folder / "seed0.safetensors", folder / "seed0.json"
    if not weights.exists():
        raise FileNotFoundError(f"no seed0.safetensors in {folder}; train it first: --seed 0 --out {folder}")
    card: dict[str, Any] = {
        "name": "digit-vit",
        "task": "name the one handwritten digit of a 96x96 scene among stroke fragments on a photograph",
        "architecture": {"class": "timm.models.vision_transformer.VisionTransformer", **ARCHITECTURE},
        "data_config": DATA_CONFIG,
        "weights": _weights_card(weights),
        "training": {
            "command": "python -m tokred.zoo.train_digit_vit --seed 0 --out DIR",
            "hardware": f"one CPU thread, {platform.machine()}",
            "recipe": json.loads(log.read_text())["recipe"],
        },
        "accuracy": _accuracy_card(folder, count),
        "curve": {
            "split": "val",
            "scenes": curve_count,
            "pruned": f"once, after the attention of block {PRUNED_BLOCK} (0-based)",
            "accuracy_by_keep_rate": keep_curve(load_weights(weights), DigitScenes("val", VAL_SEED), curve_count),
        },
        "data": _data_card(),
        "checksum": {
            "split": "test",
            "seed": TEST_SEED,
            "scenes": CHECKED_SCENES,
            **checksum(DigitScenes("test", TEST_SEED).render(CHECKED_SCENES)),
        },
        "versions": {name: version(name) for name in ("torch", "timm", "scikit-learn", "scikit-image", "safetensors")},
        "date": datetime.date.today().isoformat(),
    }
    (folder / "digit_vit.json").write_text(json.dumps(card, indent=1))
    if bundle:
        WEIGHTS_DIR.mkdir(exist_ok=True)
        shutil.copyfile(weights, WEIGHTS_DIR / "digit_vit.safetensors")
        shutil.copyfile(folder / "digit_vit.json", WEIGHTS_DIR / "digit_vit.json")
        shutil.copyfile(log, WEIGHTS_DIR / "digit_vit_log.json")
    print(json.dumps({key: card[key] for key in ("accuracy", "curve")}, indent=1))
    return card
