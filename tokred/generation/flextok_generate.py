"""From a class or a prompt to pictures: an autoregressive model draws ids, a tokenizer decodes them.

FlexTok, arXiv 2502.13967, and its released generators. The tokenizer may be any whose prefixes can be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from tokred.core.errors import InvalidParameterError
from tokred.generation.flextok_ar import FlexTokARModel
from tokred.generation.images import to_pil
from tokred.generation.tokenizer import ImageTokenizer

__all__ = ["FlexTokGenerationOutput", "FlexTokGenerationPipeline"]

CLASS_TOKENS = 32  # enough for a class label, by the paper; a text takes all
OUTPUTS = ("pil", "pt")
PARTS = ("ar", "tokenizer", "text_encoder", "text_tokenizer")  # folders of a saved pipeline


@dataclass(frozen=True)
class FlexTokGenerationOutput:
    """`images`: PIL images, or (B, 3, H, W) float32 in [-1, 1]; `tokens`: the ids (B, n) int64 that they show."""

    images: list[Image.Image] | Tensor
    tokens: Tensor


class FlexTokGenerationPipeline:
    """Draws pictures of classes or of prompts.

    Args:
        ar: draws ids. tokenizer: decodes them, `FlexTok` as released.
        text_encoder: gives the features of prompts, `T5EncoderModel` (flan-t5-xl for the released models); with
            `text_tokenizer`, its tokenizer. Both None for models of classes.

    Raises:
        InvalidParameterError: parts that do not fit each other.
    """

    def __init__(
        self,
        ar: FlexTokARModel,
        tokenizer: ImageTokenizer,
        text_encoder: PreTrainedModel | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        config = ar.config
        if tokenizer.codebook_size != config.codebook_size:
            raise InvalidParameterError(
                f"ar draws from {config.codebook_size} ids, the tokenizer has {tokenizer.codebook_size}"
            )
        if not tokenizer.prefixes or tokenizer.num_tokens < config.num_tokens:
            raise InvalidParameterError(
                f"ar draws up to {config.num_tokens} ids, expected a tokenizer of prefixes up to that length, found "
                f"{tokenizer.num_tokens} ids, prefixes={tokenizer.prefixes}"
            )
        if (text_encoder is None) != (text_tokenizer is None):
            raise InvalidParameterError("text_encoder and text_tokenizer: give both or neither")
        if text_encoder is not None and text_encoder.config.hidden_size != config.text_dim:
            raise InvalidParameterError(
                f"text_encoder has features of width {text_encoder.config.hidden_size}, ar reads those of "
                f"text_dim={config.text_dim}"
            )
        self.ar, self.tokenizer = ar, tokenizer
        self.text_encoder, self.text_tokenizer = text_encoder, text_tokenizer

    def to(self, *args: Any, **kwargs: Any) -> FlexTokGenerationPipeline:
        """Move every part; arguments as of `torch.nn.Module.to`."""
        parts: tuple[Any, ...] = (self.ar, self.tokenizer, self.text_encoder)
        for part in parts:
            if hasattr(part, "to"):
                part.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, T, D_t) of prompts and their mask (B, T) int64, 1 where there is text.

        Raises:
            InvalidParameterError: no text encoder, no prompt, or one longer than the encoder reads.
        """
        if self.text_encoder is None or self.text_tokenizer is None:
            raise InvalidParameterError("prompt given, but the pipeline has no text_encoder")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InvalidParameterError(f"prompt={prompt!r}: expected a text or a list of texts")
        batch = self.text_tokenizer(prompts, padding="longest", truncation=False, return_tensors="pt")
        ids, mask = batch.input_ids, batch.attention_mask
        longest, limit = int(mask.sum(dim=1).max()), self.text_tokenizer.model_max_length
        if longest > limit:
            text = prompts[int(mask.sum(dim=1).argmax())]
            raise InvalidParameterError(
                f"prompt {text[:40]!r}...: {longest} text tokens, the encoder reads {limit}: shorten it"
            )
        ids, mask = ids.to(self.text_encoder.device), mask.to(self.text_encoder.device)
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        *,
        num_tokens: int | None = None,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        official: bool = False,
        generator: torch.Generator | None = None,
        callback_on_prefix: Callable[[Tensor], object] | None = None,
        decode_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
    ) -> FlexTokGenerationOutput:
        """Draw one picture a prompt or class label.

        Args:
            prompt: texts, or class_labels: labels; what `ar` was made for.
            num_tokens: ids a picture; None is all for a prompt, and 32 at most for a class (the paper's finding).
            guidance_scale, temperature, top_k, top_p, official, callback_on_prefix: see
                `FlexTokARModel.generate_tokens`. Ids of a callback can be decoded for a preview.
            generator: source of randomness of the ids and then of the decoder.
            decode_options: arguments of the tokenizer's `decode`, such as `num_inference_steps`.
            output_type: "pil" or "pt".

        Raises:
            InvalidParameterError: a condition that the model does not take, or an option outside its range.
        """
        if output_type not in OUTPUTS:
            raise InvalidParameterError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUTS)}")
        if (prompt is None) == (class_labels is None):
            raise InvalidParameterError("give either prompt or class_labels")
        if num_tokens is None:
            most = self.ar.config.num_tokens
            num_tokens = min(CLASS_TOKENS, most) if prompt is None else most
        condition: dict[str, Any] = {"class_labels": class_labels}
        if prompt is not None:
            embeds, mask = self.encode_prompt(prompt)
            condition = {"text_embeds": embeds, "text_mask": mask}
            if guidance_scale != 1:
                negative, negative_mask = self.encode_prompt("")
                condition |= {"negative_text_embeds": negative, "negative_text_mask": negative_mask}
        tokens = self.ar.generate_tokens(
            **condition,
            num_tokens=num_tokens,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            official=official,
            generator=generator,
            callback_on_prefix=callback_on_prefix,
        )
        drawn = {} if generator is None else {"generator": generator}
        pixels = self.tokenizer.decode(tokens, **{**drawn, **(decode_options or {})})
        return FlexTokGenerationOutput(to_pil(pixels) if output_type == "pil" else pixels, tokens)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write each part into a folder below `path`: `ar`, `tokenizer`, `text_encoder`, `text_tokenizer`."""
        for name in PARTS:
            part: Any = getattr(self, name)
            if part is not None:
                part.save_pretrained(Path(path) / name)

    @classmethod
    def from_pretrained(cls, path: str | Path, tokenizer: ImageTokenizer | None = None) -> FlexTokGenerationPipeline:
        """What `save_pretrained` wrote, from a folder or a hub id, in eval mode.

        `tokenizer` is used instead of the one that is saved there; that one is read as a `FlexTok`.

        Raises:
            InvalidParameterError: no saved pipeline.
        """
        folder = Path(path)
        if not folder.is_dir():
            if folder.exists() or str(path).count("/") != 1:
                raise InvalidParameterError(f"{path} is neither a folder nor a hub id (owner/name)")
            folder = Path(snapshot_download(str(path)))
        needed = ("ar",) if tokenizer is not None else ("ar", "tokenizer")
        missing = [name for name in needed if not (folder / name).is_dir()]
        if missing:
            raise InvalidParameterError(f"{folder} has no folder {', '.join(missing)}: it is no saved pipeline")
        if tokenizer is None:
            from tokred.generation.flextok import FlexTok

            tokenizer = FlexTok.from_pretrained(folder / "tokenizer")
        text: dict[str, Any] = {}
        if (folder / "text_encoder").is_dir():
            text["text_encoder"] = T5EncoderModel.from_pretrained(folder / "text_encoder")
            text["text_tokenizer"] = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
        return cls(FlexTokARModel.from_pretrained(folder / "ar"), tokenizer, **text)
