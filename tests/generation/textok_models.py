"""Tiny TexTok parts with random weights: model, text encoder, tokenizer of words, pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokred.generation.textok import TexTok
from tokred.generation.textok_dit import TexTokDiT1D
from tokred.generation.textok_model import TexTokModel

WORDS = ("a", "the", "red", "blue", "green", "small", "big", "square", "circle", "cat", "dog", "on", "at", "of")
WORDS += ("left", "right")
TEXT_DIM = 24
CAPTIONS = ["a red square", "the small blue circle on the left", "a dog"]


def make_model(**fields: Any) -> TexTokModel:
    """32 x 32 pictures, 16 patches, 4 tokens of 8 numbers, width 32."""
    torch.manual_seed(fields.pop("seed", 1))
    tiny: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_tokens": 4, "latent_dim": 8, "hidden_size": 32}
    tiny |= {"num_heads": 4, "encoder_depth": 2, "decoder_depth": 2, "text_dim": TEXT_DIM, "max_text_len": 12}
    model = TexTokModel(**{**tiny, **fields}).eval()
    return roughen(model)


def make_dit(**fields: Any) -> TexTokDiT1D:
    """Depth 2, width 32; nothing is zero any more, so that every part has a say."""
    torch.manual_seed(fields.pop("seed", 2))
    rough = fields.pop("rough", True)
    tiny: dict[str, Any] = {"num_tokens": 4, "latent_dim": 8, "depth": 2, "hidden_size": 32, "num_heads": 4}
    dit = TexTokDiT1D(**{**tiny, **fields}).eval()
    return roughen(dit) if rough else dit


def roughen(module: Any, scale: float = 0.1) -> Any:
    """Noise on every weight: biases and modulations leave zero, norms leave one."""
    with torch.no_grad():
        for weight in module.parameters():
            weight += scale * torch.randn_like(weight)
    return module


def make_text() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 encoder of one layer, and a tokenizer that knows WORDS and ends each text with </s>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    torch.manual_seed(3)
    config = T5Config(vocab_size=len(vocabulary), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
    return T5EncoderModel(config).eval(), tokenizer


def make_pipeline(dit: TexTokDiT1D | None = None, model: TexTokModel | None = None, **parts: Any) -> TexTok:
    """All of it; `text=False` leaves the text encoder out."""
    encoder, tokenizer = make_text() if parts.pop("text", True) else (None, None)
    pipeline = TexTok(model or make_model(), encoder, tokenizer, dit, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count: int, side: int = 32) -> Tensor:
    """Smooth random pictures (count, 3, side, side) in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear", align_corners=False)


def features(count: int, tokens: int = 5) -> Tensor:
    return torch.randn(count, tokens, TEXT_DIM)
