"""Language models of transformers without pictures: their layers read a part of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokred.adapters.decoder_parts import Decoder, decoder_info
from tokred.adapters.decoder_session import DecoderSession
from tokred.adapters.hf_vlm import Pipeline
from tokred.adapters.prompt_session import REFUSALS, PromptSession
from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError
from tokred.core.host import Attachment, Host
from tokred.core.method import Method
from tokred.core.sites import DecoderInfo
from tokred.core.trace import Trace

__all__ = ["HFLLMHost"]

#: served families, by the name of the model without its head
_FAMILIES = ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Starcoder2")
_INNER = tuple(f"{name}Model" for name in _FAMILIES)
_OUTER = tuple(f"{name.removesuffix('Text')}ForCausalLM" for name in _FAMILIES)
#: sizes of a prompt
_SIZES = ("text_tokens", "prunable_tokens", "kept_tokens")


class TextParts:
    """What a `PromptSession` asks of a family, for a plain causal language model."""

    mrope = False
    position_base = 0

    def rebuild_mask(self, types: Tensor | None, mask: Tensor, embeds: Tensor | None, cache: Any) -> Tensor:
        return mask


class TextFront(PromptSession):
    """Keeps the books around a text model. Nothing is shown here; the methods' own steps are in their session."""

    @property
    def trace(self) -> Trace:
        return Trace(None)


class HFLLMHost(Host):
    """Causal language models of transformers.

    Attributes:
        outer: the model with the language head, None where the model without it was given. inner: without it.
    """

    family = "transformers text"
    classes = _OUTER
    sites = ("Prompt", "PrefillLayer", "FeedForward", "CacheAfterPrefill")
    refusals: ClassVar[dict[str, str]] = {
        **REFUSALS,
        "quantized, offloaded or paged cache": "methods between and behind layers take entries out of it",
        "right padding in generate": "the next token would be predicted from padding, patched or not",
        "Mixtral": "its MLPs are mixtures of experts",
        "Mamba": "it has no attention whose tokens could be told apart",
    }

    def __init__(self, model: Any) -> None:
        self.outer: Any = None if _is_inner(model) else model
        self.inner: Any = model if self.outer is None else model.model

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        if not isinstance(model, PreTrainedModel):
            return False
        return _is_inner(model) or (_is_outer(model) and _is_inner(getattr(model, "model", model)))

    def describe_decoder(self) -> DecoderInfo:
        """The model in numbers."""
        return decoder_info(self.inner)

    def describe_tokens(self, given: object) -> tuple[int, int]:
        """(prunable, other) tokens of one prompt: from its length, its ids, sizes, or what a tokenizer returned."""
        if isinstance(given, Tensor) or (isinstance(given, Sequence) and not isinstance(given, str)):
            given = {"input_ids": given}
        sizes: Mapping[str, Any] = given if isinstance(given, Mapping) else {"text_tokens": given}
        if sizes.get("input_ids") is not None:
            total = _length(sizes)
        else:
            unknown = [key for key in sizes if key not in _SIZES]
            if unknown:
                raise InvalidParameterError(
                    f"sizes have the key {unknown[0]!r}; expected {', '.join(_SIZES)}, or input_ids"
                )
            if sizes.get("text_tokens") is None:
                raise InvalidParameterError(
                    f'give the length of the prompt, say {{"text_tokens": 1024}}, or its ids, not {given!r}'
                )
            total = check_count("text_tokens", sizes["text_tokens"], minimum=1)
        prunable = check_count("prunable_tokens", sizes.get("prunable_tokens", 0))
        if prunable > total:
            raise InvalidParameterError(f"prunable_tokens={prunable}: the prompt has {total} tokens, these included")
        return prunable, total - prunable

    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Attachment:
        front = TextFront(self.outer, self.inner, TextParts(), options)
        front.asks_prunable = True
        session = DecoderSession(front, Decoder(self.inner), methods)
        try:
            front.install()
            session.install()
        except BaseException:
            session.remove()
            front.remove()
            raise
        return Pipeline([front, session])


def _length(given: Mapping[str, Any]) -> int:
    """Real tokens of the one prompt that a tokenizer returned."""
    ids = torch.as_tensor(given["input_ids"])
    if ids.dim() == 2 and ids.shape[0] != 1:
        raise InvalidParameterError(f"inputs have {ids.shape[0]} prompts; multiply-adds are counted for one")
    mask = given.get("attention_mask")
    return int(ids.shape[-1]) if mask is None else int((torch.as_tensor(mask) != 0).sum())


def _is_inner(model: object) -> bool:
    return any(cls.__name__ in _INNER for cls in type(model).__mro__)


def _is_outer(model: object) -> bool:
    return any(cls.__name__ in _OUTER for cls in type(model).__mro__)
