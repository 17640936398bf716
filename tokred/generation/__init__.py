"""Image tokenizers, and what generates their tokens.

Names load on first use: the tokenizers need diffusers, TexTok timm too, their generators transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "FlexTok": "tokred.generation.flextok",
    "FlexTokModel": "tokred.generation.flextok",
    "FlexTokARConfig": "tokred.generation.flextok_ar",
    "FlexTokARModel": "tokred.generation.flextok_ar",
    "FlexTokGenerationPipeline": "tokred.generation.flextok_generate",
    "TexTok": "tokred.generation.textok",
    "TexTokDiT1D": "tokred.generation.textok_dit",
    "TexTokModel": "tokred.generation.textok_model",
    "ImageTokenizer": "tokred.generation.tokenizer",
    "TokenFile": "tokred.generation.packing",
    "TokenFlow": "tokred.generation.tokenflow",
    "TokenFlowARConfig": "tokred.generation.tokenflow_ar",
    "TokenFlowARModel": "tokred.generation.tokenflow_ar",
    "TokenFlowPipeline": "tokred.generation.tokenflow_generate",
    "TokenShuffle": "tokred.generation.token_shuffle",
    "TokenShuffleConfig": "tokred.generation.token_shuffle_config",
    "VQTokenizer": "tokred.generation.llamagen_vq",
    "load_caption_bank": "tokred.generation.textok",
    "load_tokens": "tokred.generation.packing",
    "save_tokens": "tokred.generation.packing",
}

__all__ = list(_NAMES)

if TYPE_CHECKING:
    from tokred.generation.flextok import FlexTok as FlexTok
    from tokred.generation.flextok import FlexTokModel as FlexTokModel
    from tokred.generation.flextok_ar import FlexTokARConfig as FlexTokARConfig
    from tokred.generation.flextok_ar import FlexTokARModel as FlexTokARModel
    from tokred.generation.flextok_generate import FlexTokGenerationPipeline as FlexTokGenerationPipeline
    from tokred.generation.llamagen_vq import VQTokenizer as VQTokenizer
    from tokred.generation.packing import TokenFile as TokenFile
    from tokred.generation.packing import load_tokens as load_tokens
    from tokred.generation.packing import save_tokens as save_tokens
    from tokred.generation.textok import TexTok as TexTok
    from tokred.generation.textok import load_caption_bank as load_caption_bank
    from tokred.generation.textok_dit import TexTokDiT1D as TexTokDiT1D
    from tokred.generation.textok_model import TexTokModel as TexTokModel
    from tokred.generation.token_shuffle import TokenShuffle as TokenShuffle
    from tokred.generation.token_shuffle_config import TokenShuffleConfig as TokenShuffleConfig
    from tokred.generation.tokenflow import TokenFlow as TokenFlow
    from tokred.generation.tokenflow_ar import TokenFlowARConfig as TokenFlowARConfig
    from tokred.generation.tokenflow_ar import TokenFlowARModel as TokenFlowARModel
    from tokred.generation.tokenflow_generate import TokenFlowPipeline as TokenFlowPipeline
    from tokred.generation.tokenizer import ImageTokenizer as ImageTokenizer


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'tokred.generation' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
