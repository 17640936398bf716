"""Scenes of a few coloured digits among grey strokes on a calm photograph.

Drawing has two halves: ``plan_scenes`` draws every number that decides a scene, ``paint`` turns plans into pixels. A
plan can be moved (``Plan.moved``) before it is painted, which is how a clip pans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.data.banks import Banks, load_banks
from tokred.data.canvas import Dice, Range, blend_stamps, crop_photos, local_stamps, rotation, to_uint8

#: Pastel: every colour is brighter than the background, so that shape is learnt before colour.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.42, 0.42),
    "green": (0.42, 1.0, 0.42),
    "blue": (0.5, 0.5, 1.0),
    "yellow": (1.0, 1.0, 0.4),
    "cyan": (0.4, 1.0, 1.0),
    "magenta": (1.0, 0.45, 1.0),
}
COLOUR_NAMES = tuple(COLOURS)
SLOTS = 4  #: most digits of a scene
ABSENT = -1  #: class and colour of an empty slot
_CANDIDATES = 60  # layouts tried


@dataclass(frozen=True)
class ColourStyle:
    """How a scene is drawn; a pair is the range of a uniform draw. Lengths in pixels, angles in radians."""

    size: int = 96
    contrast: Range = (0.075, 0.25)  #: of the photograph
    strokes: int = 4
    stroke_level: Range = (0.2, 0.6)
    stroke_opacity: Range = (0.3, 0.8)
    stroke_side: Range = (12.0, 26.0)
    digits: tuple[int, ...] = (2, 3, 4)  #: number of digits, each as likely as its share of this tuple
    digit_scale: Range = (2.2, 3.2)  #: pixels per pixel of the 8x8 digit
    digit_rotation: float = 0.2
    digit_opacity: Range = (0.85, 1.0)
    gap: float = 22.0  #: wished between the centres of two digits (Chebyshev)
    axis_gap: float = 5.0  #: wished along each axis, so that "left-most" is never in doubt
    margin: float = 0.0  #: kept free at the border besides half a digit
    aspect: float = 0.0  #: a digit's width and height change by up to this share (augmentation)
    shear: float = 0.0  #: up to this horizontal shift for each unit of height (augmentation)
    noise: float = 0.02


STYLE = ColourStyle()


class Plan(NamedTuple):
    """Everything that decides ``n`` scenes but the pixel noise; every field has ``n`` rows."""

    photo: Tensor  #: (n,) rows of the photographs
    zoom: Tensor  #: (n,)
    offset: Tensor  #: (n, 2)
    flip: Tensor  #: (n,)
    contrast: Tensor  #: (n, 3)
    base: Tensor  #: (n,)
    stroke: Tensor  #: (n, K) rows of the stroke bank
    stroke_centre: Tensor  #: (n, K, 2)
    stroke_matrix: Tensor  #: (n, K, 2, 2)
    stroke_level: Tensor  #: (n, K)
    stroke_opacity: Tensor  #: (n, K)
    digit: Tensor  #: (n, 4) rows of the digits
    classes: Tensor  #: (n, 4) 0..9, -1 where the slot is empty
    colours: Tensor  #: (n, 4) index of ``COLOUR_NAMES``, -1 where the slot is empty
    centre: Tensor  #: (n, 4, 2)
    matrix: Tensor  #: (n, 4, 2, 2)
    rgb: Tensor  #: (n, 4, 3)
    opacity: Tensor  #: (n, 4)

    def rows(self, index: Tensor) -> Plan:
        """The scenes ``index`` (m,)."""
        return Plan(*(field[index] for field in self))

    def moved(self, shift: Tensor, size: int) -> Plan:
        """The same scenes, everything in them moved by ``shift`` (n, 2) pixels."""
        turn = torch.stack([self.zoom * self.flip, self.zoom], -1)
        return self._replace(
            offset=self.offset - turn * shift * 2 / size,
            stroke_centre=self.stroke_centre + shift[:, None],
            centre=self.centre + shift[:, None],
        )


class ColourScenes(NamedTuple):
    """Painted scenes and what is in them."""

    images: Tensor  #: (n, 3, S, S) uint8
    masks: Tensor  #: (n, 4, S, S) float32 in [0, 1], how much of a pixel is that slot's digit
    classes: Tensor  #: (n, 4) int64
    colours: Tensor  #: (n, 4) int64
    centres: Tensor  #: (n, 4, 2) (x, y) in pixels


@lru_cache(maxsize=4)
def _rows_of_classes(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the digits sorted by class, and where each class starts and how many it has, (10,) each."""
    labels = load_banks(split).labels
    counts = torch.bincount(labels, minlength=10)
    return labels.argsort(stable=True), counts.cumsum(0) - counts, counts


def _layout(dice: Dice, n: int, present: Tensor, side: Tensor, style: ColourStyle) -> Tensor:
    """Centres (n, 4, 2): the first best of some uniform draws by how far apart the digits lie."""
    margin = 0.45 * side[:, None, :, None] + style.margin
    centres = margin + (style.size - 2 * margin) * dice.uniform((0.0, 1.0), n, _CANDIDATES, SLOTS, 2)
    first, second = torch.triu_indices(SLOTS, SLOTS, 1)
    apart = (centres[:, :, first] - centres[:, :, second]).abs()  # (n, C, pairs, 2)
    score = torch.minimum(apart.amax(-1) / style.gap, apart.amin(-1) / style.axis_gap).clamp_max(1)
    both = present[:, first] & present[:, second]
    best = score.masked_fill(~both[:, None], 1.0).amin(-1).argmax(1)
    return centres[torch.arange(n), best]


def _draw_digits(
    split: str, n: int, dice: Dice, style: ColourStyle, class_bias: Tensor | None, colour_bias: Tensor | None
) -> dict[str, Tensor]:
    counts = torch.tensor(style.digits)[dice.index(len(style.digits), n)]
    present = torch.arange(SLOTS) < counts[:, None]
    class_keys, colour_keys = dice.uniform((0.0, 1.0), n, 10), dice.uniform((0.0, 1.0), n, len(COLOURS))
    classes = (class_keys if class_bias is None else class_keys + class_bias).argsort(1)[:, :SLOTS]
    colours = (colour_keys if colour_bias is None else colour_keys + colour_bias).argsort(1)[:, :SLOTS]
    order, start, size = _rows_of_classes(split)
    draw = (dice.uniform((0.0, 1.0), n, SLOTS) * size[classes]).long().minimum(size[classes] - 1)
    side = 8 * dice.uniform(style.digit_scale, n, SLOTS)
    stretch = 1 + dice.around(style.aspect, n, SLOTS, 2)
    shear = torch.eye(2).repeat(n, SLOTS, 1, 1)
    shear[..., 0, 1] = dice.around(style.shear, n, SLOTS)
    turned = shear @ rotation(dice.around(style.digit_rotation, n, SLOTS))
    palette = torch.tensor(list(COLOURS.values()))
    rgb = palette[colours] * dice.uniform((0.8, 1.0), n, SLOTS, 1) + dice.around(0.06, n, SLOTS, 3)
    return {
        "digit": order[start[classes] + draw],
        "classes": classes.masked_fill(~present, ABSENT),
        "colours": colours.masked_fill(~present, ABSENT),
        "centre": _layout(dice, n, present, side, style),
        "matrix": turned * (2 / (side[..., None] * stretch))[..., None],
        "rgb": rgb,
        "opacity": dice.uniform(style.digit_opacity, n, SLOTS) * present,
    }


def plan_scenes(
    split: str,
    n: int,
    generator: torch.Generator,
    style: ColourStyle = STYLE,
    class_bias: Tensor | None = None,
    colour_bias: Tensor | None = None,
) -> Plan:
    """Draw ``n`` scenes of the split's banks; classes and colours of a scene are distinct.

    ``class_bias`` (n, 10) and ``colour_bias`` (n, 6) are added to the random keys in [0, 1) by which classes and
    colours are sorted into the slots: -1 puts one into the first slot, 2 keeps one out.
    """
    banks, dice, strokes = load_banks(split), Dice(generator), style.strokes
    zoom = dice.uniform((style.size / 512, 1.0), n)
    side = dice.uniform(style.stroke_side, n, strokes)
    background = {
        "photo": dice.index(len(banks.photos), n),
        "zoom": zoom,
        "offset": dice.uniform((-1.0, 1.0), n, 2) * (1 - zoom)[:, None],
        "flip": torch.where(dice.uniform((0.0, 1.0), n) < 0.5, -1.0, 1.0),
        "contrast": dice.uniform(style.contrast, n, 1) * dice.uniform((0.7, 1.2), n, 3),
        "base": 0.4 * dice.uniform((0.25, 0.75), n) - 0.02,
        "stroke": dice.index(len(banks.strokes), n, strokes),
        "stroke_centre": dice.uniform((0.0, float(style.size)), n, strokes, 2),
        "stroke_matrix": rotation(dice.around(torch.pi, n, strokes)) * (2 / side)[..., None, None],
        "stroke_level": dice.uniform(style.stroke_level, n, strokes),
        "stroke_opacity": dice.uniform(style.stroke_opacity, n, strokes),
    }
    return Plan(**background, **_draw_digits(split, n, dice, style, class_bias, colour_bias))


def paint(plan: Plan, banks: Banks, noise: Tensor, size: int = 96) -> ColourScenes:
    """Pixels of ``plan``; ``noise`` (n, 3, S, S) is added to values in [0, 1]."""
    crop = crop_photos(banks.photos, plan.photo, plan.zoom, plan.offset, plan.flip, size)
    crop = (crop - crop.mean((1, 2, 3), keepdim=True)) * plan.contrast[:, :, None, None]
    image = (crop + plan.base[:, None, None, None]).clamp_(0, 1)
    sources = torch.cat([banks.strokes[plan.stroke], banks.digits[plan.digit]], 1)
    centres, matrices = torch.cat([plan.stroke_centre, plan.centre], 1), torch.cat([plan.stroke_matrix, plan.matrix], 1)
    stamps = local_stamps(sources, centres, matrices, size)
    grey = plan.stroke_level[..., None].expand(-1, -1, 3)
    colours, opacity = torch.cat([grey, plan.rgb], 1), torch.cat([plan.stroke_opacity, plan.opacity], 1)
    image = blend_stamps(image, stamps, opacity, colours)
    masks = stamps.rows(plan.stroke.shape[1]).on_canvas(size) * (plan.classes >= 0)[..., None, None]
    return ColourScenes(to_uint8(image + noise), masks, plan.classes, plan.colours, plan.centre)


def render_coloured(split: str, n: int, generator: torch.Generator, style: ColourStyle = STYLE) -> ColourScenes:
    """Draw and paint ``n`` scenes. The generator's state decides everything."""
    plan = plan_scenes(split, n, generator, style)
    noise = style.noise * torch.randn(n, 3, style.size, style.size, generator=generator)
    return paint(plan, load_banks(split), noise, style.size)


def boxes_of(masks: Tensor, threshold: float = 0.1) -> Tensor:
    """Bounding boxes (..., 4) int64 of masks (..., S, S): left, top, right, bottom, the last two exclusive.

    An empty mask has the box (0, 0, 0, 0).
    """
    inside, size = masks > threshold, masks.shape[-1]

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        some = line.any(-1).long()
        return line.long().argmax(-1) * some, (size - line.flip(-1).long().argmax(-1)) * some

    (left, right), (top, bottom) = ends(inside.any(-2)), ends(inside.any(-1))
    return torch.stack([left, top, right, bottom], -1)
