"""Tiny random tokenizers and generators of 32x32 pictures, saved in folders laid out as those of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from tests.generation.textok_models import make_dit, make_model, make_pipeline, roughen
from tokred.generation.flextok import FlexTok, FlexTokModel
from tokred.generation.flextok_ar import FlexTokARConfig, FlexTokARModel
from tokred.generation.textok import TexTok

CLASSES = 10
WORDS = ["a red square", "a dog on the left", "the big blue circle"]


def make_flextok(seed: int = 0, vae: bool = True) -> FlexTok:
    """4 tokens out of 40 ids."""
    torch.manual_seed(seed)
    model = FlexTokModel(
        encoder_depth=1,
        encoder_dim=16,
        decoder_depth=1,
        decoder_dim=16,
        head_dim=16,
        num_registers=4,
        fsq_levels=(8, 5),
        latent_channels=4 if vae else 3,
        patch_size=2 if vae else 4,
        pos_grid=8,
        freq_dim=16,
    )
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4),
    }
    coder = AutoencoderKL(**blocks, norm_num_groups=2, latent_channels=4, scaling_factor=0.7) if vae else None
    return FlexTok(roughen(model).eval(), coder, FlowMatchEulerDiscreteScheduler())


def make_ar(seed: int = 0) -> FlexTokARModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return FlexTokARModel(FlexTokARConfig(codebook_size=40, num_tokens=4, num_classes=CLASSES, **sizes)).eval()


def make_textok() -> TexTok:
    """4 tokens of 8 numbers, captions of at most 12 words."""
    dit = make_dit(num_classes=CLASSES, objective="flow")
    return make_pipeline(dit, caption_bank=dict.fromkeys(range(CLASSES), WORDS))


def save_zoo(root: Path) -> Path:
    """All five models below `root`."""
    make_flextok().save_pretrained(root / "tiny_flextok")
    make_ar().save_pretrained(root / "tiny_flextok_ar")
    make_textok().save_pretrained(root / "tiny_textok")
    twin = TexTok(make_model(text_in_encoder=False, text_in_decoder=False))
    twin.save_pretrained(root / "tiny_textok_no_text")
    make_dit(num_tokens=16, latent_dim=192, num_classes=CLASSES, objective="flow").save_pretrained(
        root / "tiny_textok_grid"
    )
    return root
