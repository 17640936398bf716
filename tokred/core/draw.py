"""Pictures of what was kept. Pillow and NumPy are imported here only, when somebody asks for a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tokred.core.errors import InvalidParameterError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_step", "fade", "spread", "to_array"]

_FADE = 0.16  # share of a dropped patch's colour that stays, so that its place can still be read
_GROUND = (0.72, 0.80, 0.93)  # what it fades to: a tint, so that white parts of a picture do not look dropped


def to_array(image: object) -> np.ndarray:
    """Return (H, W, 3) float64 in [0, 1] from a PIL image, array or tensor."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().float().numpy() if image.is_floating_point() else image.cpu().numpy()
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise InvalidParameterError(f"image has shape {array.shape}, expected (H, W, 3), (3, H, W) or a PIL image")
    array = array[..., :3] if array.shape[2] != 1 else array.repeat(3, axis=2)
    scaled = array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)
    return np.clip(scaled, 0.0, 1.0)


def draw_step(image: object, group: Tensor, grid: tuple[int, int]) -> Image:
    """Draw one reduction: `group` (total,) is the present token of each original patch, -1 where it was dropped.

    Dropped patches fade to the background, merged patches take the mean colour of their group and are outlined where
    two groups meet (darker, on dark ground lighter).
    """
    from PIL import Image

    pixels = to_array(image).copy()
    height, width = pixels.shape[:2]
    cells = group.detach().cpu().reshape(grid).numpy()
    label = spread(cells, height, width)
    merged = np.bincount(cells[cells >= 0].ravel(), minlength=1) > 1
    for slot in np.flatnonzero(merged):
        member = label == slot
        pixels[member] = pixels[member].mean(axis=0)
    fade(pixels, label < 0)
    if merged.any():
        edge = _borders(label, merged)
        bright = pixels[edge].mean(axis=-1, keepdims=True) > 0.25
        pixels[edge] = np.where(bright, pixels[edge] * 0.55, pixels[edge] * 0.7 + 0.3)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def spread(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """(rows, columns) values of cells -> (height, width) values of the pixels that they cover."""
    rows, columns = cells.shape
    return cells[np.arange(height) * rows // height][:, np.arange(width) * columns // width]


def fade(pixels: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Fade, in place, the `dropped` (H, W) pixels of (H, W, 3) to the background; return them all."""
    pixels[dropped] = pixels[dropped] * _FADE + (1 - _FADE) * np.array(_GROUND)
    return pixels


def _borders(label: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a merged group whose right or lower neighbour belongs to another group."""
    edge = np.zeros(label.shape, dtype=bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    return edge & (label >= 0) & merged[np.clip(label, 0, len(merged) - 1)]
