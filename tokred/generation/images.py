"""Pictures in and out of the image tokenizers: PIL images, arrays, tensors, and (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokred.core.errors import InvalidParameterError

__all__ = ["ImageInput", "to_pil", "to_pixels"]

#: one picture, or several of one size: see `to_pixels`
ImageInput: TypeAlias = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]

SLACK = 1e-3  # rounding by which a float picture may leave [-1, 1]


def to_pixels(images: ImageInput, size: int | None = None) -> Tensor:
    """Pictures as a float32 tensor (B, 3, H, W) in [-1, 1].

    Args:
        images: a PIL image (any mode; transparency is laid on white), an array (H, W, 3) uint8, or a tensor
            (3, H, W) or (B, 3, H, W), uint8 or floats in [-1, 1]; or a sequence of these, which must have one size.
        size: PIL images and arrays are scaled (bilinear) until their shorter side has this many pixels, then cut to a
            square around the centre. Tensors are never scaled. None scales nothing.

    Raises:
        InvalidParameterError: another type, shape or dtype, values outside the range or not finite, different sizes, or
            no image.
    """
    if isinstance(images, Tensor):
        batch = images if images.ndim == 4 else images[None]
        return _checked(batch)
    if isinstance(images, (Image.Image, np.ndarray)):
        return _from_array(images, size)
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise InvalidParameterError(
            f"images: {type(images).__name__} given, expected a PIL image, a uint8 array (H, W, 3), a tensor "
            "(B, 3, H, W), or a list of these; open a file with PIL.Image.open"
        )
    if not images:
        raise InvalidParameterError("images=[]: expected at least one image")
    parts = [to_pixels(image, size) for image in images]
    sizes = {tuple(part.shape[-2:]) for part in parts}
    if len(sizes) > 1:
        raise InvalidParameterError(
            f"images of different sizes {sorted(sizes)} cannot be one batch: group them by size, or give PIL images"
        )
    return torch.cat([part.to(parts[0].device) for part in parts])


def _from_array(image: Image.Image | np.ndarray, size: int | None) -> Tensor:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InvalidParameterError(
                f"images: an array {image.shape} of {image.dtype} given, expected (H, W, 3) of uint8"
            )
        image = Image.fromarray(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None:
        image = _square(image, size)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    return _checked(pixels)


def _square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, then the square around the centre."""
    width, height = image.size
    scale = size / min(width, height)
    scaled = (max(size, round(width * scale)), max(size, round(height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _checked(pixels: Tensor) -> Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise InvalidParameterError(f"images: shape {tuple(pixels.shape)} given, expected (B, 3, H, W) with B >= 1")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 127.5 - 1
    if not pixels.is_floating_point():
        raise InvalidParameterError(f"images: dtype {pixels.dtype} given, expected uint8 or floats in [-1, 1]")
    pixels = pixels.float()
    low, high = (float(value.detach()) for value in pixels.aminmax())
    if not (low >= -1 - SLACK and high <= 1 + SLACK):
        raise InvalidParameterError(
            f"images: floats from {low:.4g} to {high:.4g} given, expected finite values in [-1, 1] "
            "(divide 0..255 by 127.5 and subtract 1)"
        )
    return pixels


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) as PIL images; values outside [-1, 1] are cut."""
    array = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in array.permute(0, 2, 3, 1).cpu().numpy()]
