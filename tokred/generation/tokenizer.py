"""What the image tokenizers have in common: pictures in, a short sequence of tokens out, and back."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from tokred.generation.images import ImageInput

__all__ = ["ImageTokenizer"]


class ImageTokenizer(abc.ABC):
    """Pictures to tokens and back; `save_pretrained` and `from_pretrained` are those of diffusers.

    Pictures are (B, 3, H, W) float32 in [-1, 1]; `encode` also takes what `tokred.generation.images.to_pixels` takes.
    Tokens are integers (B, n) int64 where `codebook_size` is a number, else latents (B, n, D) float32.
    """

    @property
    @abc.abstractmethod
    def num_tokens(self) -> int:
        """Tokens of a whole picture, the most that `encode` gives."""

    @property
    @abc.abstractmethod
    def codebook_size(self) -> int | None:
        """Different tokens that there are; None where tokens are continuous."""

    @property
    @abc.abstractmethod
    def image_size(self) -> int:
        """Side in pixels of the pictures that it was made for."""

    @property
    @abc.abstractmethod
    def prefixes(self) -> bool:
        """Whether the first tokens alone can be decoded."""

    @abc.abstractmethod
    def encode(self, images: ImageInput, **options: Any) -> Tensor:
        """Tokens of pictures."""

    @abc.abstractmethod
    def decode(self, tokens: Tensor, **options: Any) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] of tokens."""
