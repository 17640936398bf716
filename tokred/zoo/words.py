"""Tokenizers of the bundled language models: one token a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["word_tokenizer"]


def word_tokenizer(ids: Mapping[str, int], longest: int, further: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token for each word of `ids`; ``<s>`` is put first, padding goes to the left.

    Args:
        ids: with ``<s>``, ``</s>``, ``<unk>`` and ``<pad>`` among the words. longest: tokens of a prompt.
        further: more special words.
    """
    import transformers

    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        **({"additional_special_tokens": list(further)} if further else {}),
        padding_side="left",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
