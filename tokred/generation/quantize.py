"""Finite scalar quantization (FSQ): a few bounded numbers, each rounded to a few levels, are one integer.

Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, arXiv 2309.15505; the bound and the order of the digits
are those of the FlexTok release.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError

__all__ = ["FSQ"]

MARGIN = 1e-3  # how much wider than the outermost levels the bound is, relative to the half range


@dataclass(frozen=True)
class FSQ:
    """Codes and ids of vectors with `len(levels)` numbers. It has no state, and no codebook in memory.

    All arithmetic is float32, whatever the input and whether or not autocast is on.

    Args:
        levels: number of levels of each dimension, 2 or more; the first dimension is the least significant digit.
    """

    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        levels = tuple(self.levels)
        if not levels or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in levels):
            raise InvalidParameterError(f"levels={self.levels!r}: expected whole numbers, each 2 or more")
        object.__setattr__(self, "levels", levels)

    @property
    def dim(self) -> int:
        """Numbers of a code."""
        return len(self.levels)

    @property
    def codebook_size(self) -> int:
        """Different ids: the product of the levels."""
        return math.prod(self.levels)

    @property
    def basis(self) -> tuple[int, ...]:
        """What one step of each digit adds to the id."""
        return tuple(math.prod(self.levels[:d]) for d in range(self.dim))

    def bound(self, z: Tensor) -> Tensor:
        """Values (..., L) float32 whose rounding is the level: tanh(z + s) h - o (2309.15505, section 3.1)."""
        self._check(z)
        levels = torch.tensor(self.levels, dtype=torch.float32, device=z.device)
        half = (levels - 1) * (1 + MARGIN) / 2
        offset = (levels % 2 == 0) * 0.5  # an even number of levels has none at 0
        return torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset

    def quantize(self, z: Tensor) -> Tensor:
        """Codes (..., L) float32 in [-1, 1], ties to the even level; the gradient passes straight through rounding."""
        bounded = self.bound(z)
        straight_through = bounded.round().detach() + (bounded - bounded.detach())  # exact: the bracket is 0
        return straight_through / self._halves(z)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids (...) int64 of codes (..., L)."""
        self._check(codes)
        halves = self._halves(codes)
        digits = (codes.detach().float() * halves + halves).round().long()
        return (digits * torch.tensor(self.basis, device=codes.device)).sum(dim=-1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Codes (..., L) float32 of integer ids (...).

        Raises:
            InvalidParameterError: ids that are no integers, or outside 0 .. codebook_size - 1.
        """
        self.check_ids(ids)
        basis = torch.tensor(self.basis, device=ids.device)
        digits = ids.long()[..., None] // basis % torch.tensor(self.levels, device=ids.device)
        halves = self._halves(ids)
        return (digits - halves) / halves

    def check_ids(self, ids: Tensor) -> None:
        """Raise unless these are integers inside the codebook."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InvalidParameterError(f"ids: dtype {ids.dtype} given, expected integers")
        if ids.numel():
            low, high = (int(value) for value in ids.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise InvalidParameterError(
                    f"ids from {low} to {high} given, expected 0 to {self.codebook_size - 1} "
                    f"(levels {', '.join(map(str, self.levels))})"
                )

    def _halves(self, like: Tensor) -> Tensor:
        return torch.tensor([n // 2 for n in self.levels], dtype=torch.float32, device=like.device)

    def _check(self, z: Tensor) -> None:
        if not z.is_floating_point() or z.ndim < 1 or z.shape[-1] != self.dim:
            raise InvalidParameterError(f"shape {tuple(z.shape)} of {z.dtype} given, expected floats (..., {self.dim})")
