"""What a forward pass kept: step by step, in terms of the original tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.core.tokens import TokenTable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Trace", "TraceStep"]


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One reduction.

    Attributes:
        layer: 0-based block where it happened. method: by name.
        tokens_in, tokens_out: per image, prefix tokens excluded.
        origins: (B, tokens_out) int64, the original token that each token is, or stands for after a merge.
        group: (B, total) int64, the present token of each original one, -1 where it was dropped.
        valid: (B, tokens_out) bool or None; False marks padding.
    """

    layer: int
    method: str
    tokens_in: int
    tokens_out: int
    origins: Tensor
    group: Tensor
    valid: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Alias of `origins`: the kept original indices."""
        return self.origins


class Trace:
    """The reductions of one forward pass.

    `len(trace)`, iteration and indexing give `TraceStep`s; a model that was not run yet, or from which nothing was
    removed, has none.
    """

    def __init__(self, table: TokenTable | None, prefix: int = 0) -> None:
        self.prefix = prefix
        self.total = table.total if table is not None else None
        self.grid = table.grid if table is not None else None
        self._table = table
        self._steps: list[TraceStep] | None = None

    @property
    def steps(self) -> list[TraceStep]:
        if self._steps is None:
            self._steps = list(_steps(self._table)) if self._table is not None else []
        return self._steps

    def __len__(self) -> int:
        return len(self._table.steps) if self._table is not None else 0

    def __getitem__(self, index: int) -> TraceStep:
        return self.steps[index]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """[(layer, tokens that leave it)], prefix excluded."""
        return [(step.layer, step.tokens_out) for step in self._table.steps] if self._table is not None else []

    def __repr__(self) -> str:
        if not len(self):
            return "Trace(nothing removed)"
        chain = " -> ".join([str(self.total), *(f"{count} (block {layer})" for layer, count in self.counts)])
        return f"Trace(tokens per image: {chain})"

    def restore(self, tokens: Tensor, fill: str = "nearest") -> Tensor:
        """Scatter reduced tokens back to every original position.

        Args:
            tokens: (B, n, C), or (B, prefix + n, C) with the prefix tokens in front (they stay in front).
            fill: "nearest" surviving token or "zeros" at positions whose token was dropped.

        Returns:
            (B, total, C), or (B, prefix + total, C).
        """
        if self._table is None:
            return tokens
        present = tokens.shape[1] - self._table.count
        if present not in (0, self.prefix):
            raise InvalidParameterError(
                f"tokens have length {tokens.shape[1]}, expected {self._table.count} "
                f"or {self._table.count + self.prefix} with the {self.prefix} prefix tokens"
            )
        body = self._table.restore(tokens[:, present:], fill)  # type: ignore[arg-type]
        return torch.cat([tokens[:, :present], body], dim=1) if present else body

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: totals, grid, and each step with its kept original indices and groups."""
        return {
            "total": self.total,
            "grid": list(self.grid) if self.grid else None,
            "prefix": self.prefix,
            "steps": [
                {
                    "layer": step.layer,
                    "method": step.method,
                    "tokens_in": step.tokens_in,
                    "tokens_out": step.tokens_out,
                    "kept": step.origins.tolist(),
                    "group": step.group.tolist(),
                }
                for step in self.steps
            ],
        }

    def draw(self, image: object, step: int = -1, sample: int = 0) -> Image:
        """Draw what was kept of an image: dropped patches fade out, merged patches share their mean colour.

        Args:
            image: PIL image, or an array or tensor (3, H, W) or (H, W, 3), uint8 or float in [0, 1].
            step: which reduction; -1 is the last. sample: which image of the batch.

        Returns:
            A PIL image of the same size.
        """
        from tokred.core.draw import draw_step

        if not len(self):
            raise InvalidParameterError("nothing to draw: no forward pass removed a token yet")
        if self.grid is None:
            raise InvalidParameterError("nothing to draw: the tokens of this model form no grid")
        return draw_step(image, self.steps[step].group[sample], self.grid)


def _steps(table: TokenTable) -> Sequence[TraceStep]:
    steps = []
    for end, step in enumerate(table.steps, start=1):
        partial = TokenTable(table.batch, table.total, table.steps[:end], grid=table.grid)
        origins, group = partial.origins, partial.group
        assert origins is not None
        assert group is not None
        valid = getattr(step.change, "valid", None)
        steps.append(TraceStep(step.layer, step.method, step.tokens_in, step.tokens_out, origins, group, valid))
    return steps
