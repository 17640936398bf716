"""Small random vision transformers of every kind that the timm host serves by one class, for tests of methods."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ["KINDS", "images", "tiny"]

#: keyword arguments that make a kind of model; prefix tokens in the comment
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},  # 1
    "no class token": {"class_token": False, "global_pool": "avg"},  # 0
    "class token, average": {"global_pool": "avg"},  # 1
    "distilled": {},  # 2
    "registers": {"reg_tokens": 2},  # 3
    "layer scale, q/k norm": {"init_values": 0.7, "qk_norm": True, "reg_tokens": 4, "pre_norm": True},  # 5
}


def tiny(kind: str = "class token", seed: int = 0, **changes: Any) -> Any:
    """A model of 25 patches (5 x 5), width 32, 2 heads, 4 blocks; weights large enough for attention to be uneven."""
    cls = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    size = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
    model = cls(**{**size, **KINDS[kind], **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1 and "token" not in name and "embed" not in name.split(".")[0]:
                p.copy_(noise * 1.6 / math.sqrt(p[0].numel()))
            elif p.dim() == 1:
                p.copy_(0.1 * noise + (1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0))
                if name.endswith("gamma"):
                    p.add_(0.7)
            else:
                p.copy_(0.6 * noise)
    return model.eval()


def images(batch: int = 2, side: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))
