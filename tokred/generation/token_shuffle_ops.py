"""Parts of Token-Shuffle that know no language model: windows of codes, the two operators, guidance, 2-D positions.

Token-Shuffle, arXiv 2504.17789. There is no released code, and the paper's text could not be read when this was
written: what follows is what its abstract and descriptions of it say, and what they leave open (UNVERIFIED) is an
option. The operation is space-to-depth: s x s codes share one position of the transformer. Codes are not permuted
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError

__all__ = [
    "EMPTY",
    "SCHEDULES",
    "ResidualMLP",
    "Shuffle",
    "Unshuffle",
    "check_codes",
    "grid_angles",
    "guidance_at",
    "pad_codes",
    "principal_basis",
    "projection_weights",
    "redundancy",
    "unwindow",
    "window",
]

EMPTY = -100  # a cell without code: fed as zeros, never counted in a loss
SCHEDULES = ("half_linear", "linear", "constant")

# -- windows ---------------------------------------------------------------------------------------------------------


def window(codes: Tensor, size: int) -> Tensor:
    """Codes (..., H, W) as windows (..., m, s^2), both in raster order; m = H W / s^2.

    Raises:
        InvalidParameterError: the window does not divide the grid; `pad_codes` makes a grid that it divides.
    """
    if codes.ndim < 2:
        raise InvalidParameterError(f"codes: shape {tuple(codes.shape)} given, expected (..., H, W)")
    *lead, height, width = codes.shape
    if height % size or width % size or not height or not width:
        raise InvalidParameterError(
            f"codes: a grid of {height} x {width} given, expected sides that the window {size} divides; "
            "tokred.generation.token_shuffle_ops.pad_codes fills it up"
        )
    cells = codes.reshape(*lead, height // size, size, width // size, size)
    return cells.transpose(-3, -2).reshape(*lead, -1, size * size)


def unwindow(windows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Windows (..., m, s^2) as codes (..., H, W); undoes `window`."""
    (height, width), lead = grid, windows.shape[:-2]
    if height % size or width % size or tuple(windows.shape[-2:]) != (height * width // size**2, size**2):
        raise InvalidParameterError(
            f"windows: shape {tuple(windows.shape)} given, expected (..., {height * width // size**2}, {size**2}) "
            f"for a grid of {height} x {width} and the window {size}"
        )
    cells = windows.reshape(*lead, height // size, width // size, size, size)
    return cells.transpose(-3, -2).reshape(*lead, height, width)


def pad_codes(codes: Tensor, size: int) -> Tensor:
    """Codes (..., H, W) with rows below and columns on the right of `EMPTY`, until the window divides both sides."""
    height, width = codes.shape[-2:]
    return F.pad(codes, (0, -width % size, 0, -height % size), value=EMPTY)


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise unless these are integers inside the codebook, or `EMPTY`."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InvalidParameterError(f"codes: dtype {codes.dtype} given, expected integers")
    wrong = ((codes < 0) & (codes != EMPTY)) | (codes >= codebook_size)
    if wrong.any():
        raise InvalidParameterError(
            f"codes: {int(codes[wrong][0])} given, expected 0 to {codebook_size - 1}, or {EMPTY} where there is none"
        )


# -- operators -------------------------------------------------------------------------------------------------------


class ResidualMLP(nn.Module):
    """x + fc2(gelu(fc1(rms_norm(x)))); the model that owns it starts with fc2 = 0."""

    def __init__(self, dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def _projection(given: int, made: int, hidden: int, two_layer: bool) -> Any:
    if not two_layer:
        return nn.Linear(given, made, bias=False)
    return nn.Sequential(nn.Linear(given, hidden, bias=False), nn.GELU(), nn.Linear(hidden, made, bias=False))


def _blocks(dim: int, count: int, ratio: float, eps: float) -> nn.ModuleList:
    return nn.ModuleList(ResidualMLP(dim, max(1, round(ratio * dim)), eps) for _ in range(count))


class Shuffle(nn.Module):
    """s^2 embeddings of width d as one: (..., s^2, d) -> (..., d): the token-shuffle operator.

    Args:
        dim: d. window: s. num_blocks: MLP blocks after the projection. mlp_ratio: their hidden width / d.
        two_layer: the projection has a hidden layer (as wide as its narrower end) and GELU.
        compress: "pre" maps every embedding to d / s^2 and puts them side by side; "post" the other way round.
        eps: of the norms.
    """

    proj: Any  # one linear map, or two

    def __init__(
        self,
        dim: int,
        window: int,
        num_blocks: int = 2,
        mlp_ratio: float = 1.0,
        two_layer: bool = False,
        compress: str = "pre",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        narrow = dim // window**2
        self.compress = compress
        if compress == "pre":
            self.proj = _projection(dim, narrow, narrow, two_layer)
        else:
            self.proj = _projection(window**2 * dim, dim, dim, two_layer)
        self.blocks = _blocks(dim, num_blocks, mlp_ratio, eps)

    def forward(self, embeds: Tensor) -> Tensor:
        x = self.proj(embeds).flatten(-2) if self.compress == "pre" else self.proj(embeds.flatten(-2))
        for block in self.blocks:
            x = block(x)
        return x


class Unshuffle(nn.Module):
    """A hidden state of width d as s^2 of them: (..., d) -> (..., s^2, d).

    Args:
        expand: "post" cuts the channels into s^2 chunks and maps each to d; "pre" maps to s^2 d and cuts then. The
            others are those of `Shuffle`.
    """

    proj: Any  # one linear map, or two

    def __init__(
        self,
        dim: int,
        window: int,
        num_blocks: int = 2,
        mlp_ratio: float = 1.0,
        two_layer: bool = False,
        expand: str = "post",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.expand, self.slots, self.narrow = expand, window**2, dim // window**2
        self.blocks = _blocks(dim, num_blocks, mlp_ratio, eps)
        if expand == "post":
            self.proj = _projection(self.narrow, dim, self.narrow, two_layer)
        else:
            self.proj = _projection(dim, window**2 * dim, dim, two_layer)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        if self.expand == "post":
            return self.proj(hidden.unflatten(-1, (self.slots, -1)))
        return self.proj(hidden).unflatten(-1, (self.slots, -1))


# -- what can be known without training ------------------------------------------------------------------------------


def principal_basis(table: Tensor, rank: int) -> Tensor:
    """The right singular vectors (d, r) float32 of the r largest singular values of a table (K, d)."""
    return _spectrum(table)[1][:, :rank].float()


def redundancy(table: Tensor, ranks: Sequence[int] | None = None) -> dict[int, float]:
    """Relative error of a table of embeddings (K, d) at the best rank r: sqrt(sum_{i > r} sigma_i^2 / sum sigma_i^2).

    The share of visual embeddings that a shuffle of compression r loses before any training.

    Args:
        ranks: None is d/2, d/4, d/8, d/16.

    Raises:
        InvalidParameterError: no table, or a rank outside 1 .. d.
    """
    if table.ndim != 2 or not table.is_floating_point() or 0 in table.shape:
        raise InvalidParameterError(f"table: shape {tuple(table.shape)} of {table.dtype} given, expected floats (K, d)")
    width = table.shape[1]
    chosen = [max(1, width // part) for part in (2, 4, 8, 16)] if ranks is None else list(ranks)
    for rank in chosen:
        if not 1 <= rank <= width:
            raise InvalidParameterError(f"ranks: {rank} given, expected 1 to {width}, the width of the table")
    energy = _spectrum(table)[0]
    return {rank: float((energy[rank:].sum() / energy.sum()).sqrt()) for rank in chosen}


def _spectrum(table: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (d,), largest first, and right singular vectors (d, d), float64."""
    wide = table.detach().double()
    energy, vectors = torch.linalg.eigh(wide.mT @ wide)
    return energy.flip(0).clamp(min=0), vectors.flip(1)


def projection_weights(basis: Tensor, shuffle: Shuffle, unshuffle: Unshuffle) -> tuple[Tensor, Tensor]:
    """Weights of the single-layer projections that are inverse on the span of a basis (d, r): W_in = V^T, W_out = V.

    In the forms that see a whole window ("post" and "pre"), the same map stands once for each slot.
    """
    slots = torch.eye(unshuffle.slots, dtype=basis.dtype, device=basis.device)
    inward = basis.mT if shuffle.compress == "pre" else torch.kron(slots, basis.mT.contiguous())
    outward = basis if unshuffle.expand == "post" else torch.kron(slots, basis.contiguous())
    return inward, outward


# -- guidance --------------------------------------------------------------------------------------------------------


def guidance_at(step: int, steps: int, scale: float, schedule: str) -> float:
    """Guidance of the `step`-th of `steps` windows, counted from 1; 1 is none.

    "half_linear" (the paper's) grows from 1 to `scale` over the first half and stays there; "linear" grows to the last
    window; "constant" is `scale` throughout.
    """
    if schedule == "constant":
        return scale
    if schedule == "linear":
        return 1 + (scale - 1) * (step - 1) / max(steps - 1, 1)
    return 1 + (scale - 1) * min(1.0, 2 * (step - 1) / steps)


# -- positions -------------------------------------------------------------------------------------------------------

_GRID: ContextVar[Tensor | None] = ContextVar("tokred_token_shuffle_grid", default=None)


def grid_angles(places: Tensor, frequencies: Tensor) -> Tensor:
    """Angles (..., F) float32 of places (..., 2), row and column, under the F frequencies of a 1-D rotation.

    LlamaGen's rule: the first half of the channels turns by the row, the second by the column, each with every second
    frequency.
    """
    some = frequencies[::2].float()
    return torch.cat([places[..., :1] * some, places[..., 1:] * some], dim=-1)


@contextmanager
def grid_places(places: Tensor | None) -> Iterator[None]:
    """Inside, `rotate_grid` turns positions by these places (B, L, 2); a row of -1 keeps its 1-D rotation."""
    token = _GRID.set(places)
    try:
        yield
    finally:
        _GRID.reset(token)


def rotate_grid(module: Any, given: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Forward hook of a rotary embedding of transformers: its (cos, sin), 2-D where there is a picture."""
    places = _GRID.get()
    if places is None:
        return output
    angles = grid_angles(places, module.inv_freq)
    angles = torch.cat([angles, angles], dim=-1)
    scale, here = getattr(module, "attention_scaling", 1.0), (places >= 0).all(dim=-1, keepdim=True)
    cos, sin = output
    return (
        torch.where(here, (angles.cos() * scale).to(cos.dtype), cos),
        torch.where(here, (angles.sin() * scale).to(sin.dtype), sin),
    )
