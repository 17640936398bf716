"""Tiny Token-Shuffle models of several families, for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen3Config

from tokred.generation.token_shuffle import TokenShuffle

WIDTH, TEXT, CODES = 32, 11, 12
BOS = 10
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 8, "num_key_value_heads": 2}),
    "gpt2": (GPT2Config, {"n_inner": 48, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
}
FAMILIES = list(_CONFIGS)


def language_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A causal language model of a vocabulary of 11, in eval mode, large enough weights for sharp logits."""
    cls, own = _CONFIGS[family]
    sizes = {
        "vocab_size": TEXT,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    sizes.update(own, **options)
    if family == "gpt2":
        for name in ("intermediate_size",):
            sizes.pop(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(cls(**sizes)).eval()


def shuffled(family: str = "llama", window: int = 2, base: Any = None, **options: Any) -> TokenShuffle:
    """The model around it, whose blocks do something: what starts as zeros is random."""
    base = language_model(family) if base is None else base
    torch.manual_seed(1)
    model = TokenShuffle.wrap(base, codebook_size=CODES, window=window, **options)
    randomise(model)
    return model.eval()


def randomise(model: TokenShuffle) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("base.") and not parameter.any():
                parameter.normal_(std=0.2)


def codes_of(*shape: int, seed: int = 0, size: int = CODES) -> torch.Tensor:
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))
