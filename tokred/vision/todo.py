"""ToDo: token downsampling for high-resolution image generation (Smith, Saxena & Saha, IJCAI 2024, 2402.13573)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.budget import check_count
from tokred.core.diffusion import DenoiserInfo, DiffusionBlock, DiffusionMethod
from tokred.core.errors import InvalidParameterError, LayerError
from tokred.core.tokens import Keep

__all__ = ["ToDo", "nearest_cells"]


@dataclass(frozen=True, repr=False)
class ToDo(DiffusionMethod):
    """Every token asks, a grid made smaller by the nearest neighbour answers: ``softmax(Q D(K)^T / sqrt d) D(V)``.

    Nothing is compared and nothing unmerged. The smaller grid has ``rows // factor`` x ``columns // factor`` cells,
    each the token at its centre (``floor((i + 1/2) rows / rows')``, the "nearest-exact" of the released code).

    Attributes:
        factor: by which the sides of the keys' grid shrink, on the finest grid; a sequence goes on with the next
            coarser grids, (4, 2) is 4 on the finest and 2 on the one below. 1 leaves a grid alone.
    """

    factor: int | Sequence[int] = 2

    name: ClassVar[str] = "todo"
    title: ClassVar[str] = "ToDo"
    paper: ClassVar[str] = (
        "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images (IJCAI 2024, arXiv 2402.13573)"
    )
    target: ClassVar[Literal["tokens", "keys"]] = "keys"

    def __post_init__(self) -> None:
        if isinstance(self.factor, Sequence) and not isinstance(self.factor, str):
            factors = tuple(check_count("factor", factor, minimum=1) for factor in self.factor)
            if not 1 <= len(factors) <= 4:
                raise InvalidParameterError(f"factor={self.factor!r}: expected one factor for each of 1 to 4 grids")
            object.__setattr__(self, "factor", factors)
        else:
            object.__setattr__(self, "factor", check_count("factor", self.factor, minimum=1))

    def bind(self, info: DenoiserInfo) -> dict[int, int]:
        factors = (self.factor,) if isinstance(self.factor, int) else self.factor
        of_level = {2**depth: factor for depth, factor in enumerate(factors) if factor > 1}
        rules = {block.layer: of_level[block.level] for block in info.blocks if block.level in of_level}
        if of_level and not rules:
            levels = sorted({block.level for block in info.blocks})
            first = (1,) * (levels[0].bit_length() - 1)
            raise LayerError(
                f"ToDo: attention of this model is on grids {' and '.join(map(str, levels))} times coarser than its "
                f"finest; pass factor={(*first, 2)!r} to shrink the first of them"
            )
        for block in info.blocks:
            if block.layer in rules and block.grid is not None:
                self.count(block.grid, rules[block.layer])
        return rules

    def count(self, grid: tuple[int, int], rule: int) -> int:
        rows, columns = grid
        if min(grid) < rule:
            raise InvalidParameterError(
                f"factor={rule}: a grid of {rows} x {columns} tokens cannot shrink by that much"
            )
        return (rows // rule) * (columns // rule)

    def reduce(self, view: DiffusionBlock, rule: int) -> Keep:
        rows, columns = view.grid
        cells = nearest_cells(view.grid, (rows // rule, columns // rule), view.tokens.device)
        return Keep(cells.expand(view.tokens.shape[0], -1))


def nearest_cells(grid: tuple[int, int], smaller: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(rows' * columns',) int64: the cell of a grid (rows, columns) under the centre of each cell of a smaller one."""
    down, across = (
        torch.arange(few, device=device).mul(2).add(1).mul(many).div(2 * few, rounding_mode="floor")
        for many, few in zip(grid, smaller, strict=True)
    )
    return (down[:, None] * grid[1] + across[None]).flatten()
