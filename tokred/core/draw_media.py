"""Pictures of what is left of an image or video before a language model reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tokred.core.draw import draw_step, fade, spread, to_array
from tokred.core.errors import InvalidParameterError
from tokred.core.sites import MediaLayout

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokred.core.trace import MediaStep

__all__ = ["draw_media"]

_INK, _FAINT, _TRACK, _BAR = "#1f2430", "#6b7280", "#e5e7eb", "#2563eb"
_GAP, _CAPTION = 10, 18
_LONGEST, _SHORTEST = 1008, 560  # pixels of the long side of a mosaic
_FRAME = 168  # pixels of the long side of a frame


def draw_media(image: object, step: MediaStep) -> Image:
    """Draw one image or video, see `Trace.draw`."""
    layout = step.layout
    if layout.kind == "video":
        return _strip(*_frames(image, layout.partitions), step)
    if _is_video(image):
        raise InvalidParameterError(f"image is a sequence; this item is one image, expected {_ONE}")
    if layout.mosaic is not None:
        return _anyres(to_array(image), step)
    if layout.partitions > 1:
        return _strip([str(part) for part in range(layout.partitions)], [to_array(image)] * layout.partitions, step)
    return draw_step(image, _groups(step), layout.grid)


_ONE = "a PIL image, (H, W, 3) or (3, H, W)"


def _groups(step: MediaStep) -> Tensor:
    """(P N,) int64: each kept cell is a group of its own, -1 for the others."""
    kept = step.mask.flatten().long()
    return kept.cumsum(0) * kept - 1


def _prompt_cells(layout: MediaLayout) -> np.ndarray:
    """(P,) tokens of each partition before the reduction."""
    return np.bincount(np.array(layout.cells) // layout.cells_per_partition, minlength=layout.partitions)


# -- tiles -------------------------------------------------------------------------------------------------------------


def _anyres(pixels: np.ndarray, step: MediaStep) -> Image:
    """The overview, and beside it (below it, where the image is wide) the mosaic."""
    layout = step.layout
    _check_shape(pixels, layout)
    canvas = _Canvas.of(layout, pixels)
    panels = [(canvas.mosaic(step) if layout.uniform else _resampled(canvas, step), _mosaic_caption(step))]
    if layout.overview is not None:
        cells = step.mask[layout.overview].cpu().numpy().reshape(layout.grid)
        whole = fade(canvas.picture.copy(), ~spread(cells, *canvas.picture.shape[:2]))
        before = _prompt_cells(layout)[layout.overview]
        panels.insert(0, (_image(whole), f"overview: {step.per_partition[layout.overview]} of {before} tokens"))
    wide = canvas.width > 1.5 * canvas.height
    return _sheet([[panel] for panel in panels] if wide else [panels])


def _mosaic_caption(step: MediaStep) -> str:
    layout, before, after = step.layout, _prompt_cells(step.layout), np.array(step.per_partition)
    tiles = [p for p in range(layout.partitions) if p != layout.overview]
    what = f"{len(tiles)} tiles" if layout.uniform else f"mosaic, resampled from {len(tiles)} tiles"
    return f"{what}: {after[tiles].sum()} of {before[tiles].sum()} tokens"


def _check_shape(pixels: np.ndarray, layout: MediaLayout) -> None:
    if layout.size is None:
        return
    (height, width), (own_height, own_width) = layout.size, pixels.shape[:2]
    # resized copies are welcome: sides may be off by one pixel, and by 3 % on top
    slack = 1.03 + 1 / min(own_height, own_width)
    ratio = (width / height) / (own_width / own_height)
    if not 1 / slack <= ratio <= slack:
        raise InvalidParameterError(
            f"image is {own_width} x {own_height} (width x height); the traced one was {width} x {height}, "
            "give that one or a resized copy"
        )


@dataclass(frozen=True)
class _Canvas:
    """The image as a processor lays it under the tiles: resized to fit, centred, padded.

    Attributes:
        picture: (h, w, 3) the resized image. top, left: its place. height, width: of the whole, in pixels.
    """

    layout: MediaLayout
    picture: np.ndarray
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, layout: MediaLayout, pixels: np.ndarray) -> _Canvas:
        assert layout.mosaic is not None
        rows, columns = layout.mosaic[0] * layout.grid[0], layout.mosaic[1] * layout.grid[1]
        longest = min(max(*pixels.shape[:2], _SHORTEST), _LONGEST)
        cell = max(2, round(longest / max(rows, columns)))
        height, width = rows * cell, columns * cell
        scale = min(width / pixels.shape[1], height / pixels.shape[0])
        inner = min(round(pixels.shape[0] * scale), height), min(round(pixels.shape[1] * scale), width)
        picture = _resize(pixels, *inner)
        return cls(layout, picture, (height - inner[0]) // 2, (width - inner[1]) // 2, height, width)

    def mosaic(self, step: MediaStep) -> Image:
        """Tiles in place, dropped cells faded, each tile with its number of tokens; padding stays white."""
        from PIL import ImageDraw

        pixels = np.ones((self.height, self.width, 3))
        inside = (slice(self.top, self.top + len(self.picture)), slice(self.left, self.left + self.picture.shape[1]))
        pixels[inside] = self.picture
        dropped = np.zeros((self.height, self.width), dtype=bool)
        dropped[inside] = ~spread(self._stitched(step), self.height, self.width)[inside]
        made = _image(fade(pixels, dropped))
        draw = ImageDraw.Draw(made)
        for tile, (x, y, right, bottom) in self._tiles():
            draw.rectangle((x, y, right - 1, bottom - 1), outline=_INK)
            _tag(draw, (x + 4, y + 4), f"{step.per_partition[tile]} tokens")
        return made

    def _stitched(self, step: MediaStep) -> np.ndarray:
        """(R rows, C columns) bool: the cells of all tiles, as they tile the image."""
        tiles = [p for p in range(self.layout.partitions) if p != self.layout.overview]
        mask = step.mask.cpu().numpy()[tiles]
        assert self.layout.mosaic is not None
        cells = mask.reshape(*self.layout.mosaic, *self.layout.grid)
        return cells.transpose(0, 2, 1, 3).reshape(self.layout.mosaic[0] * self.layout.grid[0], -1)

    def _tiles(self) -> list[tuple[int, tuple[int, int, int, int]]]:
        """[(partition, (left, top, right, bottom)), ...]."""
        assert self.layout.mosaic is not None
        down, across = self.layout.mosaic
        height, width = self.height // down, self.width // across
        tiles = [p for p in range(self.layout.partitions) if p != self.layout.overview]
        places = [(r, c) for r in range(down) for c in range(across)]
        return [
            (tile, (c * width, r * height, (c + 1) * width, (r + 1) * height))
            for tile, (r, c) in zip(tiles, places, strict=True)
        ]


def _resampled(canvas: _Canvas, step: MediaStep) -> Image:
    """A mosaic whose tokens were resampled over the image: rows of tokens, read off the layout."""
    layout, rows, row = step.layout, [], []
    for slot in layout.slots[layout.cells_per_partition if layout.overview is not None else 0 :]:
        if slot >= 0:
            row.append(slot)
        elif row:
            rows.append(row)
            row = []
    rows += [row] if row else []
    kept = step.mask.flatten().cpu().numpy()[np.array(rows)]
    return _image(fade(canvas.picture.copy(), ~spread(kept, *canvas.picture.shape[:2])))


# -- frames ------------------------------------------------------------------------------------------------------------


def _frames(image: object, partitions: int) -> tuple[list[str], list[np.ndarray]]:
    """A name and a picture for each partition; where a model joins frames, the first of each."""
    if not _is_video(image):
        raise InvalidParameterError(
            f"image is {_shown(image)}; this item is a video, expected its frames: a list of pictures, (T, H, W, 3) or "
            "(T, 3, H, W)"
        )
    frames: Sequence[Any] = image  # type: ignore[assignment]
    count = len(frames)
    joined = math.ceil(count / partitions)
    if count < partitions or math.ceil(count / joined) != partitions:
        raise InvalidParameterError(f"image has {count} frames; the traced video has {partitions}")
    starts = range(0, count, joined)
    names = [str(start) if joined == 1 else f"{start}-{min(start + joined, count) - 1}" for start in starts]
    return names, [to_array(frames[start]) for start in starts]


def _is_video(image: object) -> bool:
    return isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4


def _shown(image: object) -> str:
    shape = getattr(image, "shape", None)
    return f"of shape {tuple(shape)}" if shape is not None else f"a {type(image).__name__}"


def _strip(names: Sequence[str], frames: Sequence[np.ndarray], step: MediaStep) -> Image:
    """Frames in rows; below each its number of tokens and a bar, as long as its share of the largest number."""
    from PIL import Image, ImageDraw

    counts = step.per_partition
    pictures = [_frame(pixels, part, step) for part, pixels in enumerate(frames)]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = min(len(pictures), 8 if len(pictures) <= 32 else 12)
    step_x, step_y = width + _GAP, height + _CAPTION + 8 + _GAP
    size = columns * step_x + _GAP, -(-len(pictures) // columns) * step_y + _CAPTION + 2 * _GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    shown = sum(count > 0 for count in counts)
    heading = f"{sum(counts)} of {step.tokens_in} tokens, in {shown} of {len(counts)} frames"
    draw.text((_GAP, _GAP - 2), heading, _INK, _font(13))
    for number, (name, picture, count) in enumerate(zip(names, pictures, counts, strict=True)):
        x, y = _GAP + number % columns * step_x, _CAPTION + _GAP + number // columns * step_y
        sheet.paste(picture, (x, y))
        _caption(draw, (x, y + height + 2), width, name, count)
        bar = y + height + _CAPTION + 1
        draw.rectangle((x, bar, x + width - 1, bar + 4), fill=_TRACK)
        if count:
            draw.rectangle((x, bar, x + max(round(width * count / max(counts)), 2) - 1, bar + 4), fill=_BAR)
    return sheet


def _caption(draw: Any, place: tuple[int, int], width: int, name: str, count: int) -> None:
    """The frame's name on the left, its tokens on the right, in words where there is room."""
    (x, y), font = place, _font(12)
    left, right = f"frame {name}", f"{count} token{'s' * (count != 1)}"
    if draw.textlength(left + right, font) + 8 > width:
        left, right = name, str(count)
    draw.text((x, y), left, _FAINT, font)
    draw.text((x + width - draw.textlength(right, font), y), right, _INK if count else _FAINT, font)


def _frame(pixels: np.ndarray, part: int, step: MediaStep) -> Image:
    """One frame: at the resolution of its tokens where they form a coarser grid, else with dropped cells faded."""
    scale = _FRAME / max(pixels.shape[:2])
    height, width = max(round(pixels.shape[0] * scale), 1), max(round(pixels.shape[1] * scale), 1)
    own = step.layout.cells_per_partition
    cells = step.cells[(step.cells >= 0) & (step.cells // own == part)].cpu().numpy() - part * own
    grid = _grid_of(cells, step.layout.grid)
    if grid is not None:
        coarse = _resize(pixels, *grid) if len(cells) < own else pixels
        return _image(_resize(coarse, height, width, smooth=len(cells) >= own))
    mask = step.mask[part].cpu().numpy().reshape(step.layout.grid)
    return _image(fade(_resize(pixels, height, width), ~spread(mask, height, width)))


def _grid_of(cells: np.ndarray, grid: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) where `cells`, in their order, lie under the centres of an h x w grid over the frame; else None."""
    for h in range(1, len(cells) + 1):
        if len(cells) % h:
            continue
        w = len(cells) // h
        rows, columns = (np.arange(h) + 0.5) * grid[0] / h, (np.arange(w) + 0.5) * grid[1] / w
        if np.array_equal(cells, (rows.astype(int)[:, None] * grid[1] + columns.astype(int)).ravel()):
            return h, w
    return None


# -- paint -------------------------------------------------------------------------------------------------------------


def _sheet(rows: Sequence[Sequence[tuple[Image, str]]]) -> Image:
    """Panels with a caption below each, in rows, centred."""
    from PIL import Image, ImageDraw

    heights = [max(picture.height for picture, _ in row) for row in rows]
    across = max(len(row) for row in rows)
    widths = [max(row[i][0].width for row in rows if i < len(row)) for i in range(across)]
    size = sum(widths) + _GAP * (across + 1), sum(heights) + len(rows) * (_CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(sheet), _GAP
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for (picture, caption), width in zip(row, widths, strict=False):
            sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
            draw.text((x, y + height + 2), caption, _INK, _font(13))
            x += width + _GAP
        y += height + _CAPTION + _GAP
    return sheet


def _tag(draw: Any, place: tuple[int, int], text: str) -> None:
    font = _font(13)
    left, top, right, bottom = draw.textbbox(place, text, font)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill="white", outline=_INK)
    draw.text(place, text, _INK, font)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _image(pixels: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _resize(pixels: np.ndarray, height: int, width: int, smooth: bool = False) -> np.ndarray:
    """Average over what becomes smaller; enlarge with hard edges, or smoothly."""
    from PIL import Image

    smaller = height <= pixels.shape[0] and width <= pixels.shape[1]
    kind = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    if smaller and height * 3 > pixels.shape[0]:
        kind = Image.Resampling.LANCZOS
    return np.asarray(_image(pixels).resize((width, height), kind)) / 255.0
