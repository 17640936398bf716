"""Drawing primitives of the procedural scenes: seeded draws, crops of photographs, stamps of 8x8 shapes.

Batched torch on the CPU; a position is (x, y) in pixels of the scene, an angle is in radians.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.data.banks import SPLITS

#: Scenes are drawn this many at a time, each chunk with a generator of its own.
CHUNK = 64

Range = tuple[float, float]


class Dice:
    """Uniform draws from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, bounds: Range, *shape: int) -> Tensor:
        low, high = bounds
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def around(self, spread: float, *shape: int) -> Tensor:
        return self.uniform((-spread, spread), *shape)

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def seeded(seed: int, split: str, *keys: int) -> torch.Generator:
    """A generator that belongs to (seed, split, keys) alone."""
    entropy = np.random.SeedSequence([seed, SPLITS.index(split), *keys])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint32)[0]))


def crop_photos(photos: Tensor, index: Tensor, zoom: Tensor, offset: Tensor, flip: Tensor, size: int) -> Tensor:
    """Bilinear crops (n, 3, S, S) of the photographs ``index`` (n,) of ``photos`` (P, 3, H, H), mirrored at the border.

    ``zoom`` (n,) is the side of the crop as a share of the photograph's, ``offset`` (n, 2) its centre in [-1, 1],
    ``flip`` (n,) is 1 or -1.
    """
    theta = torch.zeros(len(index), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * flip, zoom, offset
    grid = F.affine_grid(theta, [len(index), 3, size, size], align_corners=False)
    crops = torch.empty(len(index), 3, size, size)
    for photo in index.unique().tolist():  # photos[index] would copy a photograph for each crop
        rows = index == photo
        source = photos[photo].expand(int(rows.sum()), -1, -1, -1)
        crops[rows] = F.grid_sample(source, grid[rows], mode="bilinear", padding_mode="reflection", align_corners=False)
    return crops


def stamp(sources: Tensor, centre: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Draw 8x8 ``sources`` (M, 8, 8) on an empty canvas: masks (M, S, S).

    ``matrix`` (M, 2, 2) maps an offset from ``centre`` (M, 2), both in pixels, to the source's [-1, 1] square.
    """
    # affine_grid speaks in [-1, 1] on both sides: pixel = (x + 1) * size / 2
    shift = matrix @ (size / 2 - centre).unsqueeze(-1)
    theta = torch.cat([matrix * (size / 2), shift], -1)
    grid = F.affine_grid(theta, [len(sources), 1, size, size], align_corners=False)
    values = F.grid_sample(sources[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (1.25 * values[:, 0]).clamp_(0, 1)


def rotation(angle: Tensor) -> Tensor:
    """Rotation matrices (..., 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)


def blend(image: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    """Lay ``colour`` (n, 3) over ``image`` (n, 3, S, S) where ``alpha`` (n, S, S) says so."""
    alpha = alpha[:, None]
    return image * (1 - alpha) + alpha * colour[:, :, None, None]


class Stamps(NamedTuple):
    """Shapes drawn on small windows of a canvas: K for each of n scenes, W * W pixels each."""

    masks: Tensor  #: (n, K, W * W) in [0, 1]
    cells: Tensor  #: (n, K, W * W) int64, the pixels of the canvas that they cover, row by row

    def rows(self, first: int) -> Stamps:
        """The stamps from the ``first`` of each scene on."""
        return Stamps(self.masks[:, first:], self.cells[:, first:])

    def on_canvas(self, size: int) -> Tensor:
        """Masks of the full canvas: (n, K, S, S)."""
        full = self.masks.new_zeros(*self.masks.shape[:2], size * size)
        return full.scatter_(2, self.cells, self.masks).unflatten(2, (size, size))


def local_stamps(sources: Tensor, centre: Tensor, matrix: Tensor, size: int, window: int = 44) -> Stamps:
    """What ``stamp`` draws, on windows just large enough: ``sources`` (n, K, 8, 8), ``centre`` (n, K, 2), ...

    A window near the border is pushed inside the canvas, where it still holds all that is visible of its shape.
    """
    n, width = len(sources), min(window, size)
    corner = (centre - width / 2).round().clamp_(0, size - width)
    masks = stamp(sources.flatten(0, 1), (centre - corner).flatten(0, 1), matrix.flatten(0, 1), width)
    line = torch.arange(width)
    start = (corner[..., 1] * size + corner[..., 0]).long()
    return Stamps(masks.view(n, -1, width * width), start[..., None] + (line[:, None] * size + line).flatten())


def blend_stamps(image: Tensor, stamps: Stamps, opacity: Tensor, colours: Tensor) -> Tensor:
    """Lay ``colours`` (n, K, 3) over ``image`` (n, 3, S, S) one stamp after the other; ``opacity`` (n, K)."""
    flat = image.flatten(2).clone()
    alpha = stamps.masks * opacity[..., None]
    for i in range(alpha.shape[1]):
        cells = stamps.cells[:, i, None].expand(-1, 3, -1)
        flat.scatter_(2, cells, flat.gather(2, cells).lerp_(colours[:, i, :, None], alpha[:, i, None]))
    return flat.view_as(image)


def to_uint8(image: Tensor) -> Tensor:
    """Values in [0, 1] -> uint8, rounded and clamped."""
    return (255 * image).round_().clamp_(0, 255).to(torch.uint8)
