"""What a reduction answers (`Keep`, `Merge`) and the table that follows every token through a forward pass.

Nothing here knows a model. Positions count the *prunable* tokens of a site: class, distillation and register tokens
(the prefix) are outside, so a reduction cannot remove them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.errors import InvalidParameterError

__all__ = ["Keep", "Merge", "Resample", "Step", "TokenTable"]

Fill = Literal["zeros", "nearest"]


@dataclass(frozen=True, eq=False)
class Keep:
    """Keep some tokens, drop the others.

    Attributes:
        indices: (B, K) int64 positions of the kept tokens, ascending unless the method says otherwise.
        valid: (B, K) bool or None. False marks a slot that only pads a row which keeps fewer than K tokens.
    """

    indices: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Merge:
    """Merge N tokens into K slots by an assignment, never by an N x N matrix.

    Attributes:
        assignment: (B, N) int64, the slot of each token in [0, K); -1 drops the token.
        representative: (B, K) int64, the token that lends its position (rotary angle, mask column) to each slot.
        weights: (B, N) float or None. None weighs tokens by their sizes (ToMe section 3); otherwise these are used.
        reduce: "mean" divides by the sum of the weights, "sum" does not (EViT's fused token).
        valid: (B, K) bool or None. False marks a slot that only pads a row which has fewer than K.
    """

    assignment: Tensor
    representative: Tensor
    weights: Tensor | None = None
    reduce: Literal["mean", "sum"] = "mean"
    valid: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.representative.shape[1]


@dataclass(frozen=True, eq=False)
class Resample:
    """New visual tokens in place of those of one image or video (interpolated, merged, or chosen with changes).

    Attributes:
        sources: (m,) int64, the token (position in the view) whose place and position each new one takes, -1 for one
            that stands for no single token (a class token, a newline). Given in the order of the prompt.
        features: (m, D), what the language model reads.
        transfer: makes the like of `features` from the tokens of another tensor (n, C) -> (m, C), for hosts that feed
            further tensors along (deepstack); None gathers by `sources`.
        keep_end: whether the token that ends the media (LLaVA-OneVision's newline behind a video) stays.
    """

    sources: Tensor
    features: Tensor
    transfer: Callable[[Tensor], Tensor] | None = None
    keep_end: bool = True


@dataclass(frozen=True, eq=False)
class Step:
    """One reduction as it happened: where, by whom, from how many tokens to how many (per image, prefix excluded)."""

    layer: int
    method: str
    change: Keep | Merge
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The visual tokens of one forward pass: how many there were, what became of them, and their named marks.

    The table is immutable: a reduction returns a new one, so that a recomputation (gradient checkpointing) finds the
    table as it was. Provenance is derived from the recorded steps only when somebody asks for it.

    Attributes:
        batch, total: images, and prunable tokens per image before any reduction.
        steps: the reductions so far.
        sizes: (B, n) float32, original tokens represented by each token; None while nothing was merged (all ones).
        valid: (B, n) bool or None, False for padding.
        marks: named values, one a token, (B, n, ...): bool marks merge by "any", float marks by size-weighted mean.
        grid: (rows, columns) of the original tokens, or None where they form no grid.
    """

    batch: int
    total: int
    steps: tuple[Step, ...] = ()
    sizes: Tensor | None = None
    valid: Tensor | None = None
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """Tokens per image now, prefix excluded."""
        return self.steps[-1].tokens_out if self.steps else self.total

    def mark(self, name: str, values: Tensor) -> TokenTable:
        """Write a mark: `values` is (B, n, ...), one entry for each present token."""
        if values.shape[:2] != (self.batch, self.count):
            raise InvalidParameterError(
                f"mark {name!r} has shape {tuple(values.shape)}, expected ({self.batch}, {self.count}, ...): "
                "one value for each present token"
            )
        return replace(self, marks={**self.marks, name: values})

    def apply(self, layer: int, method: str, change: Keep | Merge, sizes: Tensor | None = None) -> TokenTable:
        """Return the table after `change`; sizes, validity and marks follow the tokens.

        Args:
            sizes: (B, K), the sizes after a merge, where the caller has them already.
        """
        if isinstance(change, Keep):
            return self._keep(layer, method, change)
        return self._merge(layer, method, change, sizes)

    def _keep(self, layer: int, method: str, change: Keep) -> TokenTable:
        index = change.indices
        valid = change.valid
        if valid is None and self.valid is not None:
            valid = self.valid.gather(1, index)
        return replace(
            self,
            steps=(*self.steps, Step(layer, method, change, self.count, index.shape[1])),
            sizes=None if self.sizes is None else self.sizes.gather(1, index),
            valid=valid,
            marks={name: ops.gather_tokens(value, index) for name, value in self.marks.items()},
        )

    def _merge(self, layer: int, method: str, change: Merge, merged: Tensor | None) -> TokenTable:
        assignment, slots = change.assignment, change.slots
        sizes = self.sizes
        if sizes is None:
            sizes = torch.ones(assignment.shape, dtype=torch.float32, device=assignment.device)
        if merged is None:
            merged = ops.merge_tokens(sizes.unsqueeze(-1), assignment, slots, reduce="sum")[0].squeeze(-1)
        return replace(
            self,
            steps=(*self.steps, Step(layer, method, change, self.count, slots)),
            sizes=merged,
            valid=self._valid_after(change),
            marks={name: _merge_mark(value, assignment, slots, sizes) for name, value in self.marks.items()},
        )

    def _valid_after(self, change: Merge) -> Tensor | None:
        if self.valid is None:
            return change.valid
        valid = self.valid.gather(1, change.representative)
        return valid if change.valid is None else valid & change.valid

    @property
    def group(self) -> Tensor | None:
        """(B, total) int64: the present slot of each original token, -1 where dropped; None if nothing changed."""
        return self._derived("_group", self._make_group)

    @property
    def origins(self) -> Tensor | None:
        """(B, n) int64: the original token that each present one is (merged: stands for); None if nothing changed."""
        return self._derived("_origins", self._make_origins)

    def _derived(self, name: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """Remember what was derived from the steps. (Not `cached_property`: its lock stops torch.compile.)"""
        if torch.compiler.is_compiling():
            return make()
        if name not in self.__dict__:
            object.__setattr__(self, name, make())
        return self.__dict__[name]

    def _make_group(self) -> Tensor | None:
        group: Tensor | None = None
        for step in self.steps:
            slot_of = _slots_after(step)
            if group is None:
                group = slot_of
            else:
                moved = slot_of.gather(1, group.clamp_min(0))
                group = torch.where(group >= 0, moved, group)
        return group

    def _make_origins(self) -> Tensor | None:
        origins: Tensor | None = None
        for step in self.steps:
            change = step.change
            chosen = change.indices if isinstance(change, Keep) else change.representative
            origins = chosen if origins is None else origins.gather(1, chosen)
        return origins

    def restore(self, tokens: Tensor, fill: Fill = "nearest") -> Tensor:
        """Scatter present tokens (B, n, C) back to all original positions (B, total, C).

        A merged token goes to every position that it represents. Dropped positions are filled with zeros
        (``"zeros"``) or with the nearest surviving token (``"nearest"``: by distance on the grid, along the sequence
        where there is no grid; ties to the lower slot).
        """
        group = self.group
        if group is None:
            return tokens
        if fill == "nearest":
            group = self._fill_nearest(group)
        elif fill != "zeros":
            raise InvalidParameterError(f"fill={fill!r}: expected 'zeros' or 'nearest'")
        return ops.unmerge_tokens(tokens, group)

    def _fill_nearest(self, group: Tensor) -> Tensor:
        origins = self.origins
        assert origins is not None
        if origins.shape[1] == 0:
            return group
        cells = torch.arange(self.total, device=group.device)
        width = self.grid[1] if self.grid else self.total
        rows, columns = cells // width, cells % width
        own_row, own_column = rows[origins], columns[origins]  # (B, n)
        distance = (rows[None, :, None] - own_row[:, None]) ** 2 + (columns[None, :, None] - own_column[:, None]) ** 2
        if self.valid is not None:
            distance = distance.masked_fill(~self.valid[:, None], torch.iinfo(distance.dtype).max)
        return torch.where(group >= 0, group, distance.argmin(dim=-1))


def _slots_after(step: Step) -> Tensor:
    """(B, tokens_in) int64: the slot that each token went to in one step, -1 if dropped."""
    change = step.change
    if isinstance(change, Merge):
        return change.assignment
    index = change.indices
    slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
    if change.valid is not None:
        slots = torch.where(change.valid, slots, -1)
    return index.new_full((index.shape[0], step.tokens_in), -1).scatter(1, index, slots)


def _merge_mark(value: Tensor, assignment: Tensor, slots: int, sizes: Tensor) -> Tensor:
    flat = value.reshape(*value.shape[:2], -1)
    if value.dtype == torch.bool:
        merged = ops.merge_tokens(flat.float(), assignment, slots, reduce="sum")[0] > 0
    else:
        merged = ops.merge_tokens(flat.float(), assignment, slots, weights=sizes)[0].to(value.dtype)
    return merged.reshape(value.shape[0], slots, *value.shape[2:])
