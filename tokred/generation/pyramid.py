"""TokenFlow's quantizer: one index selects a row of two codebooks, over a pyramid of scales (arXiv 2412.03069, 3.1).

A vector has a semantic half and a pixel half, each normalised by itself. Its index is that of the row whose two halves
are nearest together. A map is quantized coarse to fine: each scale takes what the coarser ones left over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError

__all__ = ["PyramidOutput", "PyramidQuantizer", "checked_scales", "unit_halves"]

EPS = 1e-12  # shorter halves have no direction: they become 0, and so does their score
SCORES = 1 << 24  # scores in memory at once, 64 MiB


class PyramidOutput(NamedTuple):
    """What `PyramidQuantizer` makes of a map. Both losses are unweighted means over channels, places and scales."""

    codes: Tensor  #: (B, n) int64, coarse to fine, row by row within a scale; a dropped scale has none
    quant: Tensor  #: (B, D, g, g) float32, the sum over scales
    residual: Tensor  #: (B, D, g, g) float32, what the last scale left over: z - quant
    vq_loss: Tensor  #: (), of the codebooks towards the vectors
    commitment_loss: Tensor  #: (), of the vectors towards the codebooks


def checked_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """`scales` as a tuple, once they are whole numbers of 1 or more that grow."""
    found = tuple(scales)
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in found)
    if not found or not whole or any(b <= a for a, b in itertools.pairwise(found)):
        raise InvalidParameterError(f"scales={list(scales)!r}: expected growing whole numbers, each 1 or more")
    return found


def unit_halves(x: Tensor, semantic_dim: int) -> Tensor:
    """(..., D) -> (..., D) float32: the first `semantic_dim` numbers and the others, each divided by their norm."""
    halves = (x[..., :semantic_dim].float(), x[..., semantic_dim:].float())
    return torch.cat([F.normalize(half, dim=-1, eps=EPS) for half in halves], dim=-1)


class PyramidQuantizer(nn.Module):
    """Maps (B, D, g, g) to codes and back, D = `semantic_dim` + `pixel_dim`, g the last of `scales`.

    All arithmetic is float32, whatever the input and whether or not autocast is on: scores in half precision change
    indices, and an index that changed changes all finer scales.

    Args:
        codebook_size: rows K of both codebooks.
        semantic_dim, pixel_dim: numbers of each half.
        scales: sides of the maps, growing; one alone is a plain vector quantizer.
        distance_weight: w in |a - e|^2 + w |b - p|^2, 0 or more; the paper's and the release's is 1.

    Raises:
        InvalidParameterError: another value.
    """

    def __init__(
        self,
        codebook_size: int,
        semantic_dim: int,
        pixel_dim: int,
        scales: Sequence[int],
        distance_weight: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"codebook_size": codebook_size, "semantic_dim": semantic_dim, "pixel_dim": pixel_dim}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidParameterError(f"{name}={value!r}: expected a whole number, 1 or more")
        if not (math.isfinite(distance_weight) and distance_weight >= 0):
            raise InvalidParameterError(f"distance_weight={distance_weight!r}: expected a finite number >= 0")
        self.codebook_size, self.semantic_dim, self.pixel_dim = codebook_size, semantic_dim, pixel_dim
        self.scales, self.distance_weight = checked_scales(scales), distance_weight
        self.semantic_codebook = nn.Parameter(_rows(codebook_size, semantic_dim))
        self.pixel_codebook = nn.Parameter(_rows(codebook_size, pixel_dim))

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Numbers of a vector, D."""
        return self.semantic_dim + self.pixel_dim

    @property
    def grid(self) -> int:
        """Side of the finest map, g."""
        return self.scales[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Codes of the first 1, 2, ... M scales."""
        return tuple(itertools.accumulate(s * s for s in self.scales))

    def scales_of(self, count: int) -> int:
        """How many whole scales `count` codes are.

        Raises:
            InvalidParameterError: they are not whole scales.
        """
        if count not in self.lengths:
            raise InvalidParameterError(
                f"{count} codes of a picture: expected whole scales, {', '.join(map(str, self.lengths))} codes"
            )
        return self.lengths.index(count) + 1

    def checked_upto(self, upto: int | None, most: int | None = None) -> int:
        """A number of scales from 1 to `most` (None: all there are), which `upto=None` stands for."""
        most = len(self.scales) if most is None else most
        if upto is None:
            return most
        if isinstance(upto, bool) or not isinstance(upto, int) or not 1 <= upto <= most:
            raise InvalidParameterError(f"upto={upto!r}: expected a number of scales from 1 to {most}")
        return upto

    # -- one scale ---------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """Rows (K, D) float32 of both codebooks side by side, halves normalised."""
        return unit_halves(torch.cat([self.semantic_codebook, self.pixel_codebook], dim=1), self.semantic_dim)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Indices (n,) int64 of vectors (n, D): the row i of the least |a - e_i|^2 + w |b - p_i|^2, ties to the first.

        a, b are the vector's halves and e_i, p_i the row's, all normalised.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            return self._nearest(unit_halves(vectors, self.semantic_dim), self.table())

    def _nearest(self, unit: Tensor, table: Tensor) -> Tensor:
        unit, table, weight = unit.detach(), table.detach(), self.distance_weight
        square = table.square()
        # 1 or 0, without the rounding of norms, so that a vector of length 0 is as near to every row
        norms = (square[:, : self.semantic_dim].sum(1).round(), square[:, self.semantic_dim :].sum(1).round())
        half = (norms[0] + weight * norms[1]) / 2
        if weight != 1:  # the sum of two distances is one distance, once the second half is as much longer
            longer = table.new_full((self.dim,), math.sqrt(weight))
            longer[: self.semantic_dim] = 1
            unit, table = unit * longer, table * longer
        rows = max(1, SCORES // self.codebook_size)
        return torch.cat([torch.addmm(-half, part, table.T).argmax(dim=1) for part in unit.split(rows)])

    def lookup(self, codes: Tensor) -> Tensor:
        """Rows (..., D) float32 of codes (...), both halves of norm 1.

        Raises:
            InvalidParameterError: no integers, or codes outside the codebook.
        """
        self.check_codes(codes)
        return self._rows_of(codes.to(self.semantic_codebook.device))

    def _rows_of(self, codes: Tensor) -> Tensor:
        rows = torch.cat([F.embedding(codes, self.semantic_codebook), F.embedding(codes, self.pixel_codebook)], dim=-1)
        return unit_halves(rows, self.semantic_dim)

    def check_codes(self, codes: Tensor) -> None:
        """Raise unless `codes` are integers from 0 to K - 1."""
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise InvalidParameterError(f"codes: dtype {codes.dtype} given, expected integers")
        if not codes.numel():
            return
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise InvalidParameterError(f"codes from {low} to {high} given, expected 0 to {self.codebook_size - 1}")

    # -- the pyramid -------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor, dropped: int | None = None) -> PyramidOutput:
        """Quantize z (B, D, g, g), semantic channels first.

        Gradients pass straight through each choice of a row, and through the two norms. What is left for the next
        scale is taken as a number: a scale learns from its own error alone (ours; the specification does not say).

        Args:
            dropped: a scale, 0-based, that takes no part, as in training; never the first.

        Raises:
            InvalidParameterError: another shape, or no such scale.
        """
        if z.ndim != 4 or z.shape[1:] != (self.dim, self.grid, self.grid):
            raise InvalidParameterError(
                f"z: shape {tuple(z.shape)} given, expected (B, {self.dim}, {self.grid}, {self.grid})"
            )
        if dropped is not None and not 1 <= dropped < len(self.scales):
            raise InvalidParameterError(f"dropped={dropped!r}: expected a scale from 1 to {len(self.scales) - 1}")
        with torch.autocast(z.device.type, enabled=False):
            return self._forward(z.float(), dropped)

    def _forward(self, z: Tensor, dropped: int | None) -> PyramidOutput:
        residual, quant, table = z, torch.zeros_like(z), self.table()
        codes, vq, commitment = [], [], []
        for k, side in enumerate(self.scales):
            if k == dropped:
                continue
            pooled = residual if side == self.grid else F.interpolate(residual, (side, side), mode="area")
            unit = unit_halves(pooled.movedim(1, -1), self.semantic_dim)
            ids = self._nearest(unit.flatten(0, 2), table).view(unit.shape[:3])
            rows = F.embedding(ids, table)
            vq.append(F.mse_loss(rows, unit.detach()))
            commitment.append(F.mse_loss(unit, rows.detach()))
            straight = rows.detach() + (unit - unit.detach())  # the bracket is 0
            added = self._enlarged(straight.movedim(-1, 1))
            quant, residual = quant + added, residual - added.detach()
            codes.append(ids.flatten(1))
        return PyramidOutput(
            torch.cat(codes, dim=1), quant, residual, torch.stack(vq).mean(), torch.stack(commitment).mean()
        )

    def _enlarged(self, rows: Tensor) -> Tensor:
        """(B, D, s, s) -> (B, D, g, g)."""
        if rows.shape[-1] == self.grid:
            return rows
        return F.interpolate(rows, (self.grid, self.grid), mode="bicubic", align_corners=False)

    def split(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes (B, n) of whole scales as one (B, s * s) a scale.

        Raises:
            InvalidParameterError: another shape, or no whole scales.
        """
        if codes.ndim != 2:
            raise InvalidParameterError(f"codes: shape {tuple(codes.shape)} given, expected (B, n)")
        scales = self.scales[: self.scales_of(codes.shape[1])]
        return codes.split([s * s for s in scales], dim=1)

    def features(self, codes: Tensor, upto: int | None = None) -> Tensor:
        """The map (B, D, g, g) float32 of codes (B, n) of whole scales: the sum that `forward` calls `quant`.

        Args:
            upto: take the codes of this many scales; None is all that are given.

        Raises:
            InvalidParameterError: codes that are no whole scales or outside the codebook, or fewer scales than `upto`.
        """
        self.check_codes(codes)
        *_, last = self.partial_sums(codes, upto)
        return last

    def partial_sums(self, codes: Tensor, upto: int | None = None) -> Iterator[Tensor]:
        """The maps (B, D, g, g) of the first 1, 2, ... `upto` scales; arguments as in `features`."""
        parts = self.split(codes)
        parts = parts[: self.checked_upto(upto, len(parts))]
        device = self.semantic_codebook.device
        quant = torch.zeros(len(codes), self.dim, self.grid, self.grid, device=device)
        with torch.autocast(device.type, enabled=False):
            for side, part in zip(self.scales, parts, strict=False):
                rows = self.lookup(part).unflatten(1, (side, side)).movedim(-1, 1)
                quant = quant + self._enlarged(rows)
                yield quant

    # -- training ----------------------------------------------------------------------------------------------------

    def draw_dropped(self, probability: float) -> int | None:
        """With this probability one of the scales, never the first, else None; from torch's global generator."""
        if len(self.scales) < 2 or not float(torch.rand(())) < probability:
            return None
        return int(torch.randint(1, len(self.scales), ()))

    @torch.no_grad()
    def renew(self, z: Tensor, unused_only: bool = True) -> int:
        """Put vectors of z (B, D, g, g) in place of rows that z does not use; how many rows were replaced.

        A row that is nobody's nearest never learns; this brings it back. The new rows are drawn (by torch's global
        generator) from the vectors that the scales meet, each scale as often as it has places. In a distributed run
        every process ends with the same rows.

        Args:
            unused_only: False replaces all rows, which is how to start.
        """
        vectors, counts = [], torch.zeros(self.codebook_size, device=z.device)
        residual = z.float()
        with torch.autocast(z.device.type, enabled=False):
            table = self.table()
            for side in self.scales:
                pooled = F.interpolate(residual, (side, side), mode="area")
                unit = unit_halves(pooled.movedim(1, -1), self.semantic_dim)
                ids = self._nearest(unit.flatten(0, 2), table)
                counts += ids.bincount(minlength=self.codebook_size)
                vectors.append(unit.flatten(0, 2))
                rows = table[ids].view_as(unit).movedim(-1, 1)
                residual = residual - self._enlarged(rows)
        spread = dist.is_available() and dist.is_initialized()
        if spread:
            dist.all_reduce(counts)
        lost = (counts == 0).nonzero().flatten() if unused_only else torch.arange(len(counts), device=z.device)
        pool = torch.cat(vectors)
        drawn = torch.randint(len(pool), (len(lost),)) if len(lost) > len(pool) else torch.randperm(len(pool))
        new = pool[drawn[: len(lost)].to(pool.device)].contiguous()
        if spread:
            dist.broadcast(new, 0)
        self.semantic_codebook[lost] = new[:, : self.semantic_dim].to(self.semantic_codebook.dtype)
        self.pixel_codebook[lost] = new[:, self.semantic_dim :].to(self.pixel_codebook.dtype)
        return len(lost)


def _rows(count: int, dim: int) -> Tensor:
    """As released: uniform, then of norm 1. What is trained afterwards need not be."""
    return F.normalize(torch.empty(count, dim).uniform_(-1 / count, 1 / count), dim=1)
