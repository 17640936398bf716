"""The bundled tiny language model: a Llama that answers which value a context of some 1,000 words gives to a name.

It reads whole words and answers with one, then ``</s>``. Layer 1 (from 0) finds what the last word asks for, which is
what methods that shorten a prompt build on; no other layer does. Made and measured by
``python -m tokred.zoo.train_needle_llm``::

    model, tokenizer = needle_llm()
    batch = tokred.data.NeedleContexts("test", tokens=512, needles=16).batch(0, 8)
    output = model.generate(batch.prompts(), max_new_tokens=2, do_sample=False)
    tokenizer.decode(output[0, -2:])               # "tulip </s>"
    tokenizer("key of alice is tulip . key of alice is", return_tensors="pt").input_ids    # text works as well
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.data.needles import NEEDLE_WORDS
from tokred.zoo.words import word_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "weights" / "needle_llm"
WORD_IDS = {word: i for i, word in enumerate(NEEDLE_WORDS)}
PAD, BOS, EOS = (WORD_IDS[word] for word in ("<pad>", "<s>", "</s>"))

CONFIG: dict[str, Any] = {
    "vocab_size": len(NEEDLE_WORDS),
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attention_bias": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.03,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def _need_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('the needle LLM needs transformers; run: pip install "tokred[transformers]"') from error
    return transformers


def build_needle_llm() -> LlamaForCausalLM:
    """The architecture with random weights."""
    transformers = _need_transformers()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()


def build_needle_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of ``NEEDLE_WORDS``; ``<s>`` is put first, padding goes to the left."""
    return word_tokenizer(WORD_IDS, CONFIG["max_position_embeddings"])


def needle_llm(folder: Path = FOLDER) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled model (eval, float32, sdpa, on the CPU) and its tokenizer; no network."""
    transformers = _need_transformers()
    options = {"local_files_only": True}
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="sdpa", **options
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **options)


def needle_llm_card() -> dict[str, Any]:
    """How the bundled weights were made, and their measured numbers."""
    card: dict[str, Any] = json.loads((FOLDER / "card.json").read_text())
    return card
