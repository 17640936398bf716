"""Rows of a prompt while their visual tokens are exchanged: where each image and video lies, and the new sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.adapters.towers import Seen
from tokred.adapters.vlm_families import sizes_of
from tokred.core.errors import RequestError
from tokred.core.sites import MediaLayout
from tokred.core.tokens import Keep, Resample

__all__ = ["Built", "Item", "Row", "join_images", "place_items"]


@dataclass
class Item:
    """One image or video in a pass.

    Attributes:
        media: what its placeholders are called. index: which of those that were encoded (beams repeat them).
        span: how many of those it takes up: a video made of images has several. row: of the batch.
        columns: (slots,) int64. seen: the call that encoded it.
    """

    media: str
    index: int
    row: int
    layout: MediaLayout
    columns: Tensor
    seen: Seen
    span: int = 1

    @property
    def cell_columns(self) -> Tensor:
        """(n,) columns of the prunable tokens."""
        slots = torch.tensor(self.layout.slots)
        return self.columns[(slots >= 0).to(self.columns.device)]

    @property
    def tokens(self) -> Tensor:
        """(slots,) int64, which prunable token each column holds, -1 for none."""
        cells = torch.tensor(self.layout.slots) >= 0
        return torch.where(cells, cells.long().cumsum(0) - 1, -1)

    def fixed_columns(self, row_ends: bool, end: bool) -> Tensor:
        """Columns that stay on request: the end of the media, and row ends."""
        return self.slot_columns(*[MediaLayout.END] * end, *[MediaLayout.NEWLINE] * row_ends)

    def slot_columns(self, *kinds: int) -> Tensor:
        """Columns of the placeholders of these kinds."""
        found = torch.tensor([slot in kinds for slot in self.layout.slots], dtype=torch.bool)
        return self.columns[found.to(self.columns.device)]


@dataclass
class Built:
    """The new sequence of one row.

    Attributes:
        keys: (L,) int64, the original column at whose place each token stands, ascending.
        columns: (L,) int64, the original column whose position it takes. embeds: (L, D).
        owner: (L,) int64, the item of each token, -1 for text. tokens: (L,) int64, which prunable token of its item
            each is, or takes the place of; -1 for none.
        items: the items with the tokens that were taken of each, (m,) positions in the view (-1: of none).
        further: makes deepstack rows (those of the whole batch, numbered by `numbers`) of the visual tokens, in order.
    """

    keys: Tensor
    columns: Tensor
    embeds: Tensor
    owner: Tensor
    tokens: Tensor
    items: list[tuple[Item, Tensor]]
    further: Callable[[Tensor, Tensor], Tensor]


class Row:
    """One row of the batch while it is rebuilt."""

    def __init__(self, text: Tensor, embeds: Tensor) -> None:
        self.old = embeds
        self.keys = [text]
        self.columns = [text]
        self.embeds = [embeds[text]]
        self.owner = [torch.full_like(text, -1)]
        self.tokens = [torch.full_like(text, -1)]
        self.items: list[tuple[Item, Tensor]] = []
        self.transfers: list[Callable[[Tensor, Tensor], Tensor]] = []

    def add(self, item: Item, answer: Keep | Resample | None, row_ends: bool) -> None:
        device = self.old.device
        cells = item.cell_columns.to(device)
        if answer is None:
            self.items.append((item, torch.arange(cells.shape[0], device=device)))
            self._plain(item.columns.to(device), item.tokens.to(device))
            return
        taken = answer.indices[0] if isinstance(answer, Keep) else answer.sources
        self.items.append((item, taken.to(device)))
        # first, for new tokens stand where the media begins, and of two at one place the earlier comes first
        self._plain(item.slot_columns(MediaLayout.CLASS).to(device))
        if isinstance(answer, Keep):
            self._plain(cells[taken.to(device)], taken.to(device))
        else:
            self._new(item, answer, cells)
        end = answer.keep_end if isinstance(answer, Resample) else True
        self._plain(item.fixed_columns(row_ends, end).to(device))

    def _plain(self, columns: Tensor, tokens: Tensor | None = None) -> None:
        self._append(columns, columns, self.old[columns], torch.full_like(columns, -1) if tokens is None else tokens)
        self.transfers.append(lambda rows, numbers: rows[numbers[columns]])

    def _new(self, item: Item, answer: Resample, cells: Tensor) -> None:
        """New tokens stand, in the order given, at the place of their source, or as far on as the one before them."""
        sources = answer.sources.to(cells.device)
        columns = cells[sources.clamp_min(0)]
        # a token of no source stands with the one before it (a newline), at first with the first cell (a class token)
        place = torch.where(sources >= 0, columns, item.columns[0].to(cells.device))
        place = place.cummax(0).values if place.numel() else place
        self._append(place, columns, answer.features.to(self.old), sources)
        transfer = answer.transfer

        def further(rows: Tensor, numbers: Tensor) -> Tensor:
            old = rows[numbers[cells]]
            return transfer(old) if transfer is not None else old[sources.clamp_min(0)]

        self.transfers.append(further)

    def _append(self, keys: Tensor, columns: Tensor, embeds: Tensor, tokens: Tensor) -> None:
        self.keys.append(keys)
        self.columns.append(columns)
        self.embeds.append(embeds)
        self.owner.append(torch.full_like(keys, len(self.items) - 1))
        self.tokens.append(tokens)

    def build(self) -> Built:
        keys, order = torch.cat(self.keys).sort(stable=True)
        owner = torch.cat(self.owner)[order]
        text = self.keys[0].shape[0]
        transfers = list(self.transfers)

        def further(rows: Tensor, numbers: Tensor) -> Tensor:
            parts = [transfer(rows, numbers) for transfer in transfers]
            joined = torch.cat(parts) if parts else rows[:0]
            return joined[order[owner >= 0].to(rows.device) - text]

        columns, embeds, tokens = (torch.cat(part)[order] for part in (self.columns, self.embeds, self.tokens))
        return Built(keys, columns, embeds, owner, tokens, self.items, further)


def place_items(media: str, seen: Seen, layouts: list[MediaLayout], columns: Tensor) -> list[Item]:
    """Find each item's row and columns; rows that generate repeated share the items."""
    sizes, total, batch = sizes_of(layouts), int(columns.sum()), columns.shape[0]
    own = sum(sizes)
    repeats = total // own if own else 0
    if own == 0 or repeats * own != total or batch % max(repeats, 1):
        raise RequestError(
            f"the prompt has {total} {media} placeholders, but the encoder made {own} features "
            f"for {len(sizes)} {media}s; both must come from one call of the processor"
        )
    items, index, place = [], 0, 0
    counts = columns.sum(1).tolist()
    for group in range(batch // repeats):
        rows = range(group * repeats, (group + 1) * repeats)
        where = [columns[row].nonzero()[:, 0] for row in rows]
        place = 0
        while place < counts[rows[0]]:
            end = place + sizes[index]
            if end > counts[rows[0]]:
                raise RequestError(
                    f"row {rows[0]} of the batch has {counts[rows[0]]} {media} placeholders, which the sizes of its "
                    f"{media}s ({sizes[: index + 1]}) do not add up to"
                )
            for row, found in zip(rows, where, strict=True):
                items.append(Item(media, index, row, layouts[index], found[place:end], seen))
            place, index = end, index + 1
    return items


def join_images(items: list[Item]) -> list[Item]:
    """The images of each row as the frames of one video, where they are of one grid; other items stay."""
    frames: dict[int, list[Item]] = {}
    for item in items:
        if item.media == "image":
            frames.setdefault(item.row, []).append(item)
    joined = {row: _as_video(own) for row, own in frames.items()}
    left = [item for item in items if item.media != "image" or joined[item.row] is None]
    return left + [item for item in joined.values() if item is not None]


def _as_video(images: list[Item]) -> Item | None:
    layout = MediaLayout.as_video([image.layout for image in images])
    if layout is None:
        return None
    columns = torch.cat([image.columns for image in images])
    first = images[0]
    return Item("image", first.index, first.row, layout, columns, first.seen, span=len(images))
