"""The bundled digit-scene ViT: a timm ``VisionTransformer`` of DeiT's proportions for 96x96 digit scenes.

Twelve blocks and a class token, so that the pruning places of the papers (blocks 1, 3, 6, 9 or 3, 6, 9) exist and the
share of work after them is DeiT's. Made and measured by ``python -m tokred.zoo.train_digit_vit``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

WEIGHTS_DIR = Path(__file__).parent / "weights"

#: Arguments of ``timm.models.vision_transformer.VisionTransformer``: 144 patches and a class token.
ARCHITECTURE: dict[str, Any] = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 4,
    "num_classes": 10,
    "class_token": True,
}

#: What the model expects, in timm's words: ``(x / 255 - mean) / std`` of an RGB image, no resizing.
DATA_CONFIG: dict[str, Any] = {"input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.25,) * 3}


def build_digit_vit() -> VisionTransformer:
    """The architecture with random weights; ``pretrained_cfg`` carries the normalisation that timm's helpers read."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError('the digit-scene ViT needs timm; run: pip install "tokred[timm]"') from error
    model = VisionTransformer(**ARCHITECTURE)
    model.pretrained_cfg = dict(DATA_CONFIG, num_classes=ARCHITECTURE["num_classes"])
    return model


def load_weights(path: Path) -> VisionTransformer:
    """The model in eval mode and float32 with the weights of a safetensors file (float16 or float32), strictly."""
    from safetensors.torch import load_file

    model = build_digit_vit()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=True)
    return model.eval()


def digit_vit() -> VisionTransformer:
    """The bundled model: eval mode, float32, on the CPU. Input (B, 3, 96, 96) normalised, output (B, 10) logits."""
    return load_weights(WEIGHTS_DIR / "digit_vit.safetensors")


def digit_vit_card() -> dict[str, Any]:
    """How the bundled weights were made, and their measured numbers."""
    card: dict[str, Any] = json.loads((WEIGHTS_DIR / "digit_vit.json").read_text())
    return card
