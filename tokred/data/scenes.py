"""Procedural digit scenes: one real handwritten digit among stroke fragments on a photograph, 96x96.

The task behind the bundled digit-scene model: a few of the 144 patches carry the answer, the others hold clutter that
looks a little like it. A seeded generator draws them: a (split, seed, index) always names the same scene::

    scenes = DigitScenes(split="test", seed=777)
    images, labels, masks = scenes.batch(0, 32)      # uint8 (32, 3, 96, 96), int64 (32,), float (32, 96, 96)
    model(normalize(images))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.data.banks import Banks, load_banks
from tokred.data.canvas import CHUNK, Dice, Range, blend, crop_photos, rotation, seeded, stamp, to_uint8

__all__ = [
    "CHUNK",
    "DigitScenes",
    "SceneBatch",
    "SceneStyle",
    "checksum",
    "checksum_matches",
    "normalize",
    "patch_coverage",
    "render",
]


@dataclass(frozen=True)
class SceneStyle:
    """How a scene is drawn; a pair is the range of a uniform draw. Lengths in pixels, angles in radians."""

    size: int = 96
    contrast: Range = (0.14, 0.42)  #: of the photograph
    strokes: tuple[int, int] = (3, 6)  #: number of stroke fragments, both ends included
    stroke_side: Range = (12.0, 30.0)
    stroke_opacity: Range = (0.4, 0.8)
    stroke_gain: Range = (0.35, 0.6)  #: above the mean luminance of the image
    digit_scale: Range = (2.2, 3.8)  #: pixels per pixel of the 8x8 digit
    digit_rotation: float = 0.2
    digit_opacity: Range = (0.8, 1.0)
    digit_gain: Range = (0.416, 0.6)  #: above the luminance under the digit's own mask
    aspect: float = 0.0  #: the digit's width and height change by up to this share (augmentation)
    shear: float = 0.0  #: up to this horizontal shift for each unit of height (augmentation)
    noise: float = 0.02

    def eased(self, difficulty: float) -> SceneStyle:
        """The same scenes with calmer photographs and fainter strokes; 1 changes nothing, 0 leaves the digit alone."""
        return replace(
            self,
            contrast=(self.contrast[0] * difficulty, self.contrast[1] * difficulty),
            stroke_opacity=(self.stroke_opacity[0] * difficulty, self.stroke_opacity[1] * difficulty),
        )


class SceneBatch(NamedTuple):
    """A batch of scenes; a tuple ``(images, labels, masks)``."""

    images: Tensor  #: (B, 3, S, S) uint8
    labels: Tensor  #: (B,) int64, the digit 0..9
    masks: Tensor  #: (B, S, S) float32 in [0, 1], how much of a pixel is digit


def _background(photos: Tensor, n: int, style: SceneStyle, dice: Dice) -> Tensor:
    """Random crops of the photographs with their contrast, colour and brightness redrawn: (n, 3, S, S)."""
    zoom = dice.uniform((style.size / 512, 1.0), n)
    offset = dice.uniform((-1.0, 1.0), n, 2) * (1 - zoom)[:, None]
    flip = torch.where(dice.uniform((0.0, 1.0), n) < 0.5, -1.0, 1.0)
    crop = crop_photos(photos, dice.index(len(photos), n), zoom, offset, flip, style.size)
    contrast = dice.uniform(style.contrast, n, 1, 1, 1) * dice.uniform((0.7, 1.2), n, 3, 1, 1)
    base = 0.8 * dice.uniform((0.25, 0.75), n, 1, 1, 1) - 0.1
    return ((crop - crop.mean((1, 2, 3), keepdim=True)) * contrast + base).clamp_(0, 1)


def _add_strokes(image: Tensor, bank: Tensor, style: SceneStyle, dice: Dice) -> Tensor:
    n, (fewest, most) = len(image), style.strokes
    sources = bank[dice.index(len(bank), n, most)]
    side = dice.uniform(style.stroke_side, n, most)
    centre = dice.uniform((0.0, float(style.size)), n, most, 2)
    matrix = rotation(dice.around(torch.pi, n, most)) * (2 / side)[..., None, None]
    masks = stamp(sources.flatten(0, 1), centre.flatten(0, 1), matrix.flatten(0, 1), style.size)
    count = fewest + dice.index(most - fewest + 1, n)
    drawn = (torch.arange(most) < count[:, None]).float()
    opacity = dice.uniform(style.stroke_opacity, n, most) * drawn
    alpha = masks.view(n, most, style.size, style.size) * opacity[..., None, None]
    luminance = image.mean((1, 2, 3))[:, None] + dice.uniform(style.stroke_gain, n, most)
    colour = luminance[..., None] + dice.around(0.125, n, most, 3)
    for i in range(most):
        image = blend(image, alpha[:, i], colour[:, i])
    return image


def _add_digit(image: Tensor, digits: Tensor, style: SceneStyle, dice: Dice) -> tuple[Tensor, Tensor]:
    """The image with its digit, and the digit's mask (n, S, S)."""
    n = len(image)
    side = 8 * dice.uniform(style.digit_scale, n)
    margin = 0.45 * side[:, None]
    centre = margin + (style.size - 2 * margin) * dice.uniform((0.0, 1.0), n, 2)
    stretch = 1 + dice.around(style.aspect, n, 2)
    shear = torch.eye(2).repeat(n, 1, 1)
    shear[:, 0, 1] = dice.around(style.shear, n)
    matrix = shear @ rotation(dice.around(style.digit_rotation, n)) * (2 / (side[:, None] * stretch))[..., None]
    mask = stamp(digits, centre, matrix, style.size)
    # measured under the digit itself: against the image's mean, some digits would be invisible
    under = (image.mean(1) * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1e-6)
    colour = (under + dice.uniform(style.digit_gain, n))[:, None] + dice.around(0.125, n, 3)
    return blend(image, mask * dice.uniform(style.digit_opacity, n)[:, None, None], colour), mask


def render(banks: Banks, n: int, generator: torch.Generator, style: SceneStyle = SceneStyle()) -> SceneBatch:
    """Draw ``n`` scenes. The generator's state decides everything; scenes of one call share its stream."""
    dice = Dice(generator)
    image = _background(banks.photos, n, style, dice)
    image = _add_strokes(image, banks.strokes, style, dice)
    chosen = dice.index(len(banks.digits), n)
    image, mask = _add_digit(image, banks.digits[chosen], style, dice)
    image = image + style.noise * torch.randn(image.shape, generator=generator)
    return SceneBatch(to_uint8(image), banks.labels[chosen], mask)


class DigitScenes:
    """An endless, indexable sequence of scenes of one split.

    Scene ``i`` of a (split, seed, style) is the same whatever is asked together with it. Digits, photographs and
    strokes of different splits are disjoint. Needs scikit-learn and scikit-image (``pip install "tokred[train]"``).
    """

    def __init__(self, split: str = "test", seed: int = 0, style: SceneStyle = SceneStyle()) -> None:
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.split, self.seed, self.style = split, seed, style
        self.banks = load_banks(split)
        self._last: tuple[int, SceneBatch] | None = None  # small batches walk through one chunk

    def __repr__(self) -> str:
        return f"DigitScenes(split={self.split!r}, seed={self.seed}, style={self.style})"

    def _chunk(self, number: int) -> SceneBatch:
        if self._last is None or self._last[0] != number:
            self._last = number, render(self.banks, CHUNK, seeded(self.seed, self.split, number), self.style)
        return self._last[1]

    def batch(self, start: int, n: int) -> SceneBatch:
        """Scenes ``start`` .. ``start + n - 1``: images (n, 3, S, S) uint8, labels (n,), masks (n, S, S)."""
        if start < 0 or n < 1:
            raise ValueError(f"need start >= 0 and n >= 1, got start={start}, n={n}")
        first, last = start // CHUNK, (start + n - 1) // CHUNK
        chunks = [self._chunk(number) for number in range(first, last + 1)]
        rows = slice(start - first * CHUNK, start - first * CHUNK + n)
        images, labels, masks = (torch.cat(parts)[rows] for parts in zip(*chunks, strict=True))
        return SceneBatch(images, labels, masks)

    def render(self, n: int) -> SceneBatch:
        """The first ``n`` scenes."""
        return self.batch(0, n)


def normalize(images: Tensor) -> Tensor:
    """uint8 images -> float32 as the model takes them: ``(x / 255 - .5) / .25``."""
    return (images.float() / 255 - 0.5) / 0.25


def patch_coverage(masks: Tensor, patch: int = 8) -> Tensor:
    """Mean of the mask in each patch, row by row: (B, S, S) -> (B, (S / patch) ** 2)."""
    return F.avg_pool2d(masks[:, None], patch).flatten(1)


def checksum(scenes: SceneBatch) -> dict[str, list[float]]:
    """Numbers that identify the scenes, rounded so that another torch version's last bits do not change them.

    Compare with ``checksum_matches``: a mean that lies at a rounding border may still fall on either side.
    """
    pixels = scenes.images.double()
    return {
        "channel_mean": [round(v, 2) for v in pixels.mean((0, 2, 3)).tolist()],
        "channel_std": [round(v, 2) for v in pixels.std((0, 2, 3)).tolist()],
        "scene_mean": [round(v, 2) for v in pixels.mean((1, 2, 3))[:8].tolist()],
        "mask_area": [round(v, 1) for v in scenes.masks.double().sum((1, 2))[:8].tolist()],
        "labels": [float(v) for v in scenes.labels[:16].tolist()],
    }


def checksum_matches(first: dict[str, list[float]], second: dict[str, list[float]], tolerance: float = 0.11) -> bool:
    """Whether two checksums name the same scenes; ``tolerance`` in grey levels of 255 and pixels of mask."""
    return first.keys() == second.keys() and all(
        len(first[key]) == len(second[key]) and np.allclose(first[key], second[key], rtol=0, atol=tolerance)
        for key in first
    )
