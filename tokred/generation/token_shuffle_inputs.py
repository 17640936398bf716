"""What enters a `TokenShuffle`: pictures as windows of codes, their places in the sequence, batches of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.generation.token_shuffle_config import TokenShuffleConfig
from tokred.generation.token_shuffle_ops import EMPTY, check_codes, window

__all__ = ["Pictures", "code_positions", "pack", "places_of", "read_pictures"]


@dataclass(frozen=True, eq=False)
class Pictures:
    """The N pictures of a batch: windows (M, s^2), one picture behind the other."""

    windows: Tensor
    counts: list[int]  #: windows of each
    columns: list[int]  #: windows that stand in a row


def code_positions(config: TokenShuffleConfig, ids: Tensor) -> Tensor:
    """Which ids (...) are those of codes, bool."""
    rows = config.image_rows
    return (ids >= rows.start) & (ids < rows.stop)


def read_pictures(
    config: TokenShuffleConfig, codes: Tensor | Sequence[Tensor] | None, ids: Tensor, here: Tensor
) -> Pictures:
    """The codes as windows, checked against the positions (B, L) that are there for them.

    Raises:
        InvalidParameterError: no codes, codes outside the codebook, a grid that the window does not divide, other
            positions than these codes need.
    """
    size = config.window
    if codes is None:
        raise InvalidParameterError(
            f"input_ids holds ids of codes, but window={size} reads them from image_codes: give them"
        )
    listed = list(codes)
    for one in listed:
        if not isinstance(one, Tensor) or one.ndim != 2:
            what = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise InvalidParameterError(f"image_codes: {what} given, expected (N, H, W) or a list of (H, W)")
    if isinstance(codes, Tensor) and listed:
        windows, counts = window(codes, size).flatten(0, 1), [listed[0].numel() // size**2] * len(listed)
    else:
        parts = [window(one, size) for one in listed]
        windows = torch.cat(parts) if parts else ids.new_zeros(0, size**2)
        counts = [len(part) for part in parts]
    check_codes(windows, config.codebook_size)
    soi: Any = config.soi_token_id
    before = F.pad(here, (1, 0))[:, :-1]
    starts, total = (here & ~before).flatten().nonzero().flatten(), here.flatten().cumsum(0)
    marked = F.pad(ids.eq(soi).long(), (1, 0))[:, :-1].flatten()[starts].bool().all()
    edges = torch.cat([total[starts] - 1, total[-1:]]).tolist()
    found = [after - one for one, after in pairwise(edges)]
    if found != counts or not marked:
        raise InvalidParameterError(
            f"input_ids has runs of {found} positions for windows, image_codes has pictures of {counts} windows; "
            "expected the same, each run right behind an SOI: see TokenShuffle.pack"
        )
    return Pictures(windows.to(ids.device), counts, [one.shape[1] // size for one in listed])


def places_of(
    config: TokenShuffleConfig, pictures: Pictures, here: Tensor, position_ids: Tensor | None, past: int
) -> Tensor | None:
    """Row and column (B, L, 2) of each window, counted from where its picture begins, and -1 elsewhere.

    None where positions have one dimension.
    """
    if config.position_mode == "1d":
        return None
    if position_ids is None:
        position_ids = torch.arange(past, past + here.shape[1], device=here.device)
    number = torch.cat([torch.arange(count) for count in pictures.counts]).to(here.device)
    width = torch.tensor(pictures.columns).repeat_interleave(torch.tensor(pictures.counts)).to(here.device)
    first = position_ids.expand(here.shape)[here] - number
    places = torch.full((*here.shape, 2), -1, device=here.device)
    places[here] = torch.stack([first + number // width, first + number % width], dim=-1)
    return places


def pack(
    config: TokenShuffleConfig,
    prompts: Sequence[Sequence[int] | Tensor],
    images: Sequence[Tensor | Sequence[Tensor]] | Tensor,
    device: torch.device,
) -> dict[str, Any]:
    """See `TokenShuffle.pack`."""
    if len(prompts) != len(images):
        raise InvalidParameterError(f"{len(prompts)} prompts and {len(images)} images given, expected as many")
    flat, rows = [], []
    for prompt, given in zip(prompts, images, strict=True):
        own = [given] if isinstance(given, Tensor) else list(given)
        row = torch.as_tensor(prompt).long().flatten().tolist()
        for codes in own:
            count = window(codes, config.window).shape[-2]
            row += [config.soi_token_id, *[config.image_token_start] * count, config.eoi_token_id]
        flat += own
        rows.append(torch.tensor(row))
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EMPTY).to(device)
    mask = labels != EMPTY
    one_size = len({tuple(codes.shape) for codes in flat}) == 1
    return {
        "input_ids": labels.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": labels,
        "image_codes": torch.stack(flat).to(device) if one_size else [codes.to(device) for codes in flat],
    }
