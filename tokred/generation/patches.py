"""Grids as sequences: patches with channels last, and fixed position tables of sines and cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError

__all__ = ["patchify", "sincos_1d", "sincos_2d", "unpatchify"]

LAYOUTS = ("correct", "official")


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, P, patch * patch * C): patches in row order, each as (row, column, channel), channel fastest.

    Not the order of a convolution's weight, which is (channel, row, column).

    Raises:
        InvalidParameterError: another number of dimensions, or H or W is no multiple of `patch`.
    """
    if x.ndim != 4 or patch < 1 or x.shape[2] % patch or x.shape[3] % patch:
        raise InvalidParameterError(
            f"patchify: shape {tuple(x.shape)} given, expected (B, C, H, W) with H and W multiples of {patch}"
        )
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (height // patch) * (width // patch), patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, P, patch * patch * C) -> (B, C, h * patch, w * patch) for a grid of (h, w) patches: undoes `patchify`.

    Raises:
        InvalidParameterError: P is not h * w, or the last dimension is no multiple of patch * patch.
    """
    h, w = grid
    if tokens.ndim != 3 or tokens.shape[1] != h * w or tokens.shape[2] % patch**2:
        raise InvalidParameterError(
            f"unpatchify: shape {tuple(tokens.shape)} given, expected (B, {h * w}, {patch * patch} * C) "
            f"for a grid of {h} x {w} patches"
        )
    b, c = len(tokens), tokens.shape[2] // patch**2
    x = tokens.reshape(b, h, w, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h * patch, w * patch)


def sincos_1d(n: int, dim: int, base: float = 10000.0) -> Tensor:
    """(n, dim) float32: row i is [sin(i f), cos(i f)] with frequencies f_j = base^(-j / (dim / 2)).

    Raises:
        InvalidParameterError: `dim` is odd.
    """
    return _waves(torch.arange(n, dtype=torch.float64), dim, base).float()


def sincos_2d(height: int, width: int, dim: int, layout: str = "correct") -> Tensor:
    """(1, dim, height, width) float32: entry (i, j) is [sin i f, cos i f, sin j f, cos j f], f_n = 10000^(-4 n / dim).

    Args:
        height, width: patches. dim: channels, a multiple of 4.
        layout: "correct" as above. "official" is what the released FlexTok code builds: the same for squares, and for
            other grids the values of the transposed grid, read row by row into this one.

    Raises:
        InvalidParameterError: `dim` is no multiple of 4, or an unknown layout.
    """
    if dim % 4 or dim < 4:
        raise InvalidParameterError(f"dim={dim!r}: expected a positive multiple of 4")
    if layout not in LAYOUTS:
        raise InvalidParameterError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    outer, inner = (height, width) if layout == "correct" else (width, height)
    first = sincos_1d(outer, dim // 2)[:, None].expand(outer, inner, -1)
    second = sincos_1d(inner, dim // 2)[None].expand(outer, inner, -1)
    table = torch.cat([first, second], dim=-1).reshape(height, width, dim)
    return table.permute(2, 0, 1)[None].contiguous()


def _waves(positions: Tensor, dim: int, base: float) -> Tensor:
    if dim % 2 or dim < 2:
        raise InvalidParameterError(f"dim={dim!r}: expected a positive even number")
    half = dim // 2
    angles = positions[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
