"""The `DiffusionBlock` site: inside a block of a denoiser, around modules that run on fewer tokens for once.

A denoiser reads out every token, so nothing stays reduced from one block to the next. A method answers `Merge`: the
tokens merge in front of a module (self-attention; also cross-attention and MLP), and its output goes back to all
places. Or it answers `Keep`: every token asks, and the kept ones alone are keys and values of the self-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokred.core.method import Method
from tokred.core.tokens import Keep, Merge

__all__ = ["BlockInfo", "DenoiserInfo", "DiffusionBlock", "DiffusionMethod", "Part"]

Part = Literal["attention", "cross_attention", "mlp"]


@dataclass(frozen=True)
class BlockInfo:
    """One block of a denoiser in numbers.

    Attributes:
        layer: 0-based, in the order in which the blocks run. path: of the module in the model.
        level: how often the side of this block's grid goes into the side of the finest grid (1, 2, 4, ...; U-Nets).
        dim: channels of its tokens. parts: the modules that can run on merged tokens.
        grid: (rows, columns) of its image tokens at the model's own size, None where that is not known.
    """

    layer: int
    path: str
    level: int
    dim: int
    parts: tuple[Part, ...]
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class DenoiserInfo:
    """The blocks with self-attention over image tokens of a denoiser, in the order in which they run."""

    blocks: tuple[BlockInfo, ...]


@dataclass
class DiffusionBlock:
    """View of one block of a denoiser in one forward pass.

    Attributes:
        block: in numbers. grid: (rows, columns) of the image tokens in this pass.
        tokens: (B, rows * columns, C), the image tokens of the residual stream as it enters the block (no text).
        timestep: (B,) float32, the noise level of each sample as the caller gave it; None where he gave none.
    """

    block: BlockInfo
    grid: tuple[int, int]
    tokens: Tensor
    timestep: Tensor | None = None

    @property
    def count(self) -> int:
        """n, image tokens."""
        return self.tokens.shape[1]


class DiffusionMethod(Method):
    """A method of the `DiffusionBlock` site.

    `bind` turns hyper-parameters into one rule for each block; a block without a rule is left alone, so settings that
    keep everything leave the model bit-identical. `count` is the arithmetic of a rule: token counts depend on the grid
    alone, never on data, so shapes stay static.

    Class attributes:
        target: what the answers reduce, "tokens" (`Merge`) or "keys" (`Keep`).
    """

    sites: ClassVar[tuple[str, ...]] = ("DiffusionBlock",)
    target: ClassVar[Literal["tokens", "keys"]] = "tokens"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The modules that run on reduced tokens."""
        return ("attention",)

    def bind(self, info: DenoiserInfo) -> dict[int, Any]:
        """Return {block: rule} for the blocks of `info` where tokens are reduced; refuse what does not fit."""
        raise TypeError(f"{type(self).__name__} does not define bind()")

    def count(self, grid: tuple[int, int], rule: Any) -> int:
        """Tokens that remain of a grid of (rows, columns) under `rule`; refuse a grid that does not fit."""
        raise TypeError(f"{type(self).__name__} does not define count()")

    def reduce(self, view: DiffusionBlock, rule: Any) -> Merge | Keep:
        """Answer one view; asked only where `count` is less than the tokens there are."""
        raise TypeError(f"{type(self).__name__} does not define reduce()")

    def cost(self, block: BlockInfo, grid: tuple[int, int], rule: Any) -> int:
        """Multiply-adds that choosing adds to a block for one sample."""
        return 0

    def is_identity(self, info: DenoiserInfo) -> bool:
        """Whether these settings reduce nothing: the host then changes nothing at all."""
        return not self.bind(info)
