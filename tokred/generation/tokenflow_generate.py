"""From a prompt or a class to pictures: TokenFlow's generator draws codes scale by scale, its tokenizer decodes them.

TokenFlow, arXiv 2412.03069, section 4.4 (sampling), and the released code, which is followed where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokred.core.errors import InvalidParameterError
from tokred.generation.images import to_pil
from tokred.generation.tokenflow import TokenFlow
from tokred.generation.tokenflow_ar import TokenFlowARModel

__all__ = ["TokenFlowPipeline", "TokenFlowPipelineOutput"]

OUTPUTS = ("pil", "pt")


@dataclass
class TokenFlowPipelineOutput(BaseOutput):
    """`images`: PIL images, or (B, 3, H, W) float32 in [-1, 1]; `tokens`: the codes (B, N) int64 that they show."""

    images: list[Image.Image] | Tensor
    tokens: Tensor


class TokenFlowPipeline(DiffusionPipeline):
    """Draws pictures of prompts or of classes. `save_pretrained` and `from_pretrained` are those of diffusers.

    Args:
        ar: draws codes. tokenizer: decodes them. text_tokenizer: makes ids of prompts.
        begin: text that is put behind every prompt as plain words, where the picture begins.
        text_length: most ids of a prompt with `begin`; the released model was trained with 128.
        class_names: prompts of the class labels 0, 1, ...; None for a model of texts.
        guidance_scale: the default of calls.

    Raises:
        InvalidParameterError: parts that do not fit each other.
    """

    model_cpu_offload_seq = "ar->tokenizer"

    def __init__(
        self,
        ar: TokenFlowARModel,
        tokenizer: TokenFlow,
        text_tokenizer: PreTrainedTokenizerBase,
        begin: str = "<img>",
        text_length: int = 128,
        class_names: Sequence[str] | None = None,
        guidance_scale: float = 7.5,
    ) -> None:
        super().__init__()
        given, known = list(tokenizer.config.scales), list(ar.config.scales)
        if given != known:
            raise InvalidParameterError(f"ar draws scales of sides {known}, the tokenizer has {given}")
        if tokenizer.codebook_size != ar.config.codebook_size:
            raise InvalidParameterError(
                f"ar draws from {ar.config.codebook_size} codes, the tokenizer has {tokenizer.codebook_size}"
            )
        if tokenizer.quantizer.dim != ar.config.code_dim:
            raise InvalidParameterError(
                f"ar reads codes of width {ar.config.code_dim}, the tokenizer's have {tokenizer.quantizer.dim}"
            )
        if len(text_tokenizer) > ar.config.image_token_start:
            raise InvalidParameterError(
                f"the text tokenizer has {len(text_tokenizer)} ids, but codes start at id "
                f"{ar.config.image_token_start}: give the tokenizer without codes among its words"
            )
        self.register_modules(ar=ar, tokenizer=tokenizer, text_tokenizer=text_tokenizer)
        names = None if class_names is None else list(class_names)
        self.register_to_config(begin=begin, text_length=text_length, class_names=names, guidance_scale=guidance_scale)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) int64 of prompts, padded on the left, and their mask (B, T), 0 where there is padding.

        Each is the text with the tokenizer's own first id, then `begin`. Left out against the released code: padding to
        128 (positions are relative, nothing changes), and cutting of longer prompts, which are an error.

        Raises:
            InvalidParameterError: no prompt, or one that is too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InvalidParameterError(f"prompt={prompt!r}: expected a text or a list of texts")
        begin = self.text_tokenizer(self.config.begin, add_special_tokens=False).input_ids
        rows = [[*self.text_tokenizer(text).input_ids, *begin] for text in prompts]
        length = max(map(len, rows))
        if length > self.config.text_length:
            text = prompts[[len(row) for row in rows].index(length)]
            raise InvalidParameterError(
                f"prompt {text[:40]!r}...: {length} text tokens, the generator reads {self.config.text_length}: "
                "shorten it"
            )
        padding = self.ar.config.pad_token_id or 0
        ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.ar.device), mask.to(self.ar.device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float | None = None,
        guidance: str = "linear",
        top_k: int | Sequence[int] = (1200, 100, 1),
        top_p: float | Sequence[float] = (0.8, 0.8, 0.0),
        temperature: float = 1.0,
        num_scales: int | None = None,
        generator: torch.Generator | None = None,
        callback_on_prefix: Callable[[Tensor], object] | None = None,
        output_type: str = "pil",
    ) -> TokenFlowPipelineOutput:
        """Draw one picture a prompt or class label; a progress bar counts passes of the model.

        Args:
            prompt: texts, or class_labels: labels, of which `class_names` are the prompts.
            negative_prompt: what guidance leads away from: one text, or one a prompt.
            guidance_scale: None is that of the pipeline; 0 is none.
            guidance, top_k, top_p, temperature, num_scales, generator, callback_on_prefix: see
                `TokenFlowARModel.generate`. Codes of a callback can be decoded for a preview.
            output_type: "pil" or "pt".

        Raises:
            InvalidParameterError: a condition that the pipeline does not take, or an option outside its range.
        """
        if output_type not in OUTPUTS:
            raise InvalidParameterError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUTS)}")
        if (prompt is None) == (class_labels is None):
            raise InvalidParameterError("give either prompt or class_labels")
        ids, mask = self.encode_prompt(self._names(class_labels) if prompt is None else prompt)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        negative: dict[str, Tensor] = {}
        if scale:
            negative_ids, negative_mask = self.encode_prompt(negative_prompt)
            negative = {"negative_input_ids": negative_ids, "negative_attention_mask": negative_mask}
        scales = len(self.ar.config.scales) if num_scales is None else num_scales
        passes = 1 if isinstance(top_k, int) else len(top_k)
        with self.progress_bar(total=1 + (scales - 1) * passes) as bar:

            def step(codes: Tensor) -> object:
                bar.update()
                return callback_on_prefix is not None and callback_on_prefix(codes)

            tokens = self.ar.generate(
                ids,
                mask,
                lookup=self.tokenizer.lookup,
                **negative,
                guidance_scale=scale,
                guidance=guidance,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                num_scales=num_scales,
                generator=generator,
                callback_on_prefix=step,
            )
        pixels = self.tokenizer.decode(tokens)
        return TokenFlowPipelineOutput(images=to_pil(pixels) if output_type == "pil" else pixels, tokens=tokens)

    def _names(self, labels: int | Sequence[int] | Tensor | None) -> list[str]:
        """Prompts of class labels."""
        names = self.config.class_names
        if names is None:
            raise InvalidParameterError("class_labels given, but the pipeline knows no classes (class_names=None)")
        given = torch.as_tensor(labels).reshape(-1).tolist()
        if not given or not all(isinstance(label, int) and 0 <= label < len(names) for label in given):
            raise InvalidParameterError(f"class_labels={given}: expected integers from 0 to {len(names) - 1}")
        return [names[label] for label in given]
