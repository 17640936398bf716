"""The tokens that are present at a layer of a language model, and the index arithmetic of dropping some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokred import ops
from tokred.adapters.decoder_parts import Decoder
from tokred.adapters.prompt_session import Columns
from tokred.core.decoder import DecoderMethod, PromptMethod
from tokred.core.errors import InvalidParameterError
from tokred.core.trace import LayerStep, MediaStep

__all__ = [
    "Present",
    "following_position",
    "gather_rows",
    "layer_step",
    "media_steps",
    "pack",
    "places_of",
    "positions_of",
    "renumbered",
]


@dataclass(frozen=True)
class Present:
    """The tokens that are present at a layer, T of them.

    Attributes:
        columns: (B, T) int64, of the pass, that each is. valid, visual: (B, T) bool. media: (B, T) int64.
        positions: (B, T) int64, None where positions are places in space and time.
        marks: (B, T, ...). types: (B, T) token types, where the family has them.
    """

    columns: Tensor
    valid: Tensor
    visual: Tensor
    media: Tensor
    positions: Tensor | None
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    types: Tensor | None = None

    def take(self, index: Tensor, real: Tensor) -> Present:
        """Those at `index` (B, K); `real` (B, K) is False where one only pads its row."""
        return Present(
            columns=self.columns.gather(1, index),
            valid=real,
            visual=self.visual.gather(1, index) & real,
            media=self.media.gather(1, index).masked_fill(~real, -1),
            positions=None if self.positions is None else self.positions.gather(1, index),
            marks={name: ops.gather_tokens(value, index) for name, value in self.marks.items()},
            types=None if self.types is None else self.types.gather(1, index),
        )

    def present(self, full: int) -> Tensor:
        """(B, full) bool: which columns are here."""
        there = torch.zeros(self.columns.shape[0], full + 1, dtype=torch.bool, device=self.columns.device)
        return there.scatter(1, self.columns.masked_fill(~self.valid, full), True)[:, :full]


def positions_of(method: DecoderMethod | PromptMethod, decoder: Decoder) -> str:
    """ "compact" or "original": how a method numbers what it leaves of a prompt of this model."""
    if method.positions == "compact" and decoder.mrope:
        raise InvalidParameterError(
            "positions='compact': positions of Qwen-VL models are places in time and space, which a token keeps; "
            "use positions='original' or None"
        )
    return "original" if decoder.mrope else method.positions or method.own_positions


def pack(stay: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the tokens that stay go: rows with fewer of them are padded on the left, so that all end together.

    Args:
        stay: (B, T) bool. order: (B, T), by which those that stay are sorted (stable); None keeps their order.

    Returns:
        (B, K) int64 and (B, K) bool, False where an index only pads its row.
    """
    width = max(1, int(stay.sum(dim=1).max()))
    places = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    sorted_places = places if order is None else order.argsort(dim=1, stable=True)
    staying = stay.gather(1, sorted_places)
    index = sorted_places.gather(1, staying.long().argsort(dim=1, stable=True))[:, -width:]
    return index, stay.gather(1, index)


def places_of(columns: Tensor, valid: Tensor, full: int) -> Tensor:
    """(B, full) int64: for each column of a prompt, the place of the nearest survivor at or before it.

    Args:
        columns: (B, K) int64, the column of each survivor. valid: (B, K) bool.
    """
    places = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    place = columns.new_full((columns.shape[0], full + 1), -1)
    place = place.scatter(1, columns.masked_fill(~valid, full), places)[:, :full]
    every = torch.arange(full, device=columns.device)
    nearest = torch.where(place >= 0, every, -1).cummax(dim=1).values
    first = valid.long().argmax(dim=1, keepdim=True)
    return torch.where(nearest >= 0, place.gather(1, nearest.clamp_min(0)), first)


def following_position(positions: Tensor, valid: Tensor) -> Tensor:
    """(B, 1) int64: the position behind the largest one of each row."""
    return positions.masked_fill(~valid, torch.iinfo(torch.long).min // 2).amax(dim=1, keepdim=True) + 1


def renumbered(before: Present, real: Tensor) -> Tensor:
    """(B, K) int64: positions of survivors counted on from the first of their row; padding takes the first."""
    assert before.positions is not None
    first = before.positions.masked_fill(~before.valid, torch.iinfo(torch.long).max).amin(dim=1, keepdim=True)
    return torch.where(real, first + real.long().cumsum(dim=1) - 1, first)


def gather_rows(table: Tensor, columns: Tensor) -> Tensor:
    """Rows (B, K, d) of a rotary table (1 or B, T, d)."""
    table = table.expand(columns.shape[0], -1, -1)
    return table.gather(1, columns[..., None].expand(-1, -1, table.shape[2]))


def layer_step(layer: int, method: str, before: Present, after: Present, new: Columns | None) -> LayerStep:
    """What `method` kept before `layer`, in columns of the caller's prompt and cells of its images."""
    rows = range(after.columns.shape[0])
    origin = after.columns if new is None else new.origin.gather(1, after.columns)
    kept = tuple(tuple(origin[row][after.valid[row]].tolist()) for row in rows)
    entered = tuple(int(n) for n in before.valid.sum(dim=1))
    there = [present.columns.masked_fill(~present.valid, -1) for present in (before, after)]
    media = () if new is None else media_steps(layer, method, there[0], there[1], new)
    return LayerStep(layer, method, entered, kept, media)


def media_steps(layer: int, method: str, before: Tensor, after: Tensor, new: Columns) -> tuple[MediaStep, ...]:
    """What is left of each image and video; `before` and `after` (B, T) are columns of `new`, -1 for padding."""
    steps = []
    for (row, number), layout in new.layouts.items():
        tokens = []
        for columns in (before[row], after[row]):
            columns = columns[columns >= 0]
            own = new.tokens[row][columns[new.media[row][columns] == number]]
            tokens.append(own[own >= 0])
        steps.append(MediaStep.of(method, row, layout, tokens[1], layer=layer, tokens_in=tokens[0].shape[0]))
    return tuple(steps)
