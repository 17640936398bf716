"""Reduced prompts as embeddings: for `generate(inputs_embeds=...)` and for serving engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred.core.trace import Trace

__all__ = ["Encoded"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a reduced prompt is for a language model.

    Attributes:
        inputs_embeds: (B, L, D), text and visual tokens merged, padded on the left.
        attention_mask: (B, L) int64.
        position_ids: (B, L) or (3 or 4, B, L), where positions are not 0, 1, ... by the mask; else None.
        token_type_ids: (B, L), for models that read them (Gemma 3, PaliGemma).
        media: {"image" or "video": one (K, D) for each item, in the order of the prompt}: the visual tokens alone, as
            a serving engine takes them. A token that ends a row or the media is among them if it was kept.
        trace: what was kept.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    media: Mapping[str, Sequence[Tensor]]
    trace: Trace

    @property
    def images(self) -> list[Tensor]:
        """(K, D) for each image."""
        return list(self.media.get("image", ()))

    @property
    def videos(self) -> list[Tensor]:
        """(K, D) for each video."""
        return list(self.media.get("video", ()))

    def keys(self) -> list[str]:
        """With `__getitem__`, lets ``model.generate(**encoded)`` take what `inputs` gives."""
        return list(self.inputs())

    def __getitem__(self, name: str) -> Any:
        return self.inputs()[name]

    def inputs(self) -> dict[str, Any]:
        """Arguments for ``model.generate(**encoded.inputs())`` on the model without a patch; it returns new tokens.

        `generate` of transformers refuses embeddings for PaliGemma and Gemma 3; ``model(**encoded.inputs())`` works.
        """
        names = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
