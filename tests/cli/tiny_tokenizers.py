"""Tiny random tokenizers and generators of 32x32 pictures, saved in folders laid out as those of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, VQModel
from transformers import LlamaConfig

from tests.generation.shuffle_models import shuffled
from tests.generation.textok_models import make_dit, make_model, make_pipeline, roughen
from tokred.data.cards import DIGIT_WORDS
from tokred.eval import tokenflow_questions as questions
from tokred.generation.flextok import FlexTok, FlexTokModel
from tokred.generation.flextok_ar import FlexTokARConfig, FlexTokARModel
from tokred.generation.llamagen_vq import VQTokenizer
from tokred.generation.textok import TexTok
from tokred.generation.tokenflow import TokenFlow
from tokred.generation.tokenflow_ar import TokenFlowARConfig, TokenFlowARModel
from tokred.generation.tokenflow_generate import TokenFlowPipeline
from tokred.generation.tokenflow_llava import build_llava
from tokred.zoo.words import word_tokenizer

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


def make_tokenflow() -> TokenFlow:
    """21 codes of 24 in three scales."""
    torch.manual_seed(0)
    encoder = {"type": "clip", "patch_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    pixels = {"block_out_channels": [4] * 4, "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    return TokenFlow(
        image_size=32,
        scales=[1, 2, 4],
        codebook_size=24,
        semantic_dim=4,
        pixel_dim=4,
        semantic_encoder_config={**encoder, "num_attention_heads": 1},
        semantic_decoder_config={"dim": 8, "depth": 1, "heads": 1, "out_dim": 8},
        pixel_encoder_config=pixels,
        pixel_decoder_config=pixels,
    ).eval()


def make_tokenflow_pipeline(net: TokenFlow) -> TokenFlowPipeline:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<img>", *DIGIT_WORDS]
    config = TokenFlowARConfig(
        vocab_size=len(words) + 24,
        image_token_start=len(words),
        codebook_size=24,
        code_dim=8,
        scales=[1, 2, 4],
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    text = word_tokenizer({word: i for i, word in enumerate(words)}, 32)
    return TokenFlowPipeline(TokenFlowARModel(config).eval(), net, text, text_length=6, class_names=DIGIT_WORDS)


def make_qa(net: TokenFlow, mode: str) -> Any:
    config = LlamaConfig(
        vocab_size=len(questions.WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=questions.PAD,
        bos_token_id=questions.BOS,
        eos_token_id=questions.EOS,
    )
    return build_llava(net, config, questions.IMAGE, mode)


def make_vq() -> VQTokenizer:
    """16 codes of 12."""
    return VQTokenizer(
        VQModel(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[4] * 4,
            norm_num_groups=2,
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=12,
            sample_size=32,
            lookup_from_codebook=True,
            mid_block_add_attention=False,
        ).eval()
    )


def save_zoo(root: Path) -> Path:
    """All models below `root`."""
    make_flextok().save_pretrained(root / "tiny_flextok")
    make_ar().save_pretrained(root / "tiny_flextok_ar")
    make_textok().save_pretrained(root / "tiny_textok")
    twin = TexTok(make_model(text_in_encoder=False, text_in_decoder=False))
    twin.save_pretrained(root / "tiny_textok_no_text")
    make_dit(num_tokens=16, latent_dim=192, num_classes=CLASSES, objective="flow").save_pretrained(
        root / "tiny_textok_grid"
    )
    net = make_tokenflow()
    make_tokenflow_pipeline(net).save_pretrained(root / "tiny_tokenflow")
    for name, mode in {"both": "last", "semantic": "last_semantic", "pixel": "last_pixel"}.items():
        make_qa(net, mode).save_pretrained(root / f"tiny_tokenflow_qa_{name}")
    make_vq().save_pretrained(root / "tiny_vq")
    for window in (1, 2, 4):
        shuffled(window=window).save_pretrained(root / f"tiny_shuffle_{window}")
    return root
