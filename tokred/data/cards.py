"""Small captioned pictures: one coloured handwritten digit on a tinted photograph, 32x32.

What the bundled image tokenizers are trained on and measured with. All that a caption says is to be seen, and the rest
is not said: the handwriting, the slant, the photograph. A (split, seed, index) always names the same card::

    cards = DigitCards(split="test", seed=777).render(64)
    cards.images       # uint8 (64, 3, 32, 32)
    cards.captions[0]  # 'a red seven on dark blue , left'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.data.banks import Banks, load_banks
from tokred.data.canvas import CHUNK, Dice, Range, blend, crop_photos, rotation, seeded, stamp, to_uint8
from tokred.data.coloured import COLOURS

__all__ = [
    "BACKGROUNDS",
    "CAPTION_WORDS",
    "DIGIT_WORDS",
    "CardStyle",
    "Cards",
    "DigitCards",
    "caption",
    "on_scene",
    "render_cards",
]

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Dark tints, so that every digit is brighter than what it lies on.
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "dark red": (0.36, 0.06, 0.08),
    "dark green": (0.05, 0.28, 0.08),
    "dark blue": (0.08, 0.10, 0.40),
    "brown": (0.32, 0.20, 0.06),
    "grey": (0.25, 0.25, 0.26),
    "black": (0.03, 0.03, 0.04),
}
PLACES = ("left", "in the middle", "right")
#: Every word of a caption.
CAPTION_WORDS = tuple(dict.fromkeys(" ".join(["a", *COLOURS, *DIGIT_WORDS, "on", *BACKGROUNDS, ",", *PLACES]).split()))


@dataclass(frozen=True)
class CardStyle:
    """How a card is drawn; a pair is the range of a uniform draw. Lengths in pixels, angles in radians."""

    size: int = 32
    contrast: Range = (0.05, 0.3)  #: of the photograph
    digit_scale: Range = (2.2, 3.2)  #: pixels per pixel of the 8x8 digit
    digit_rotation: float = 0.25
    digit_opacity: Range = (0.9, 1.0)
    side: float = 5.0  #: how far the centre lies left or right
    jitter: float = 1.5  #: of the centre
    noise: float = 0.01


class Cards(NamedTuple):
    """Cards and what is on them."""

    images: Tensor  #: (n, 3, S, S) uint8
    labels: Tensor  #: (n,) int64, the digit 0..9
    colours: Tensor  #: (n,) int64, index of `COLOURS`
    backgrounds: Tensor  #: (n,) int64, index of `BACKGROUNDS`
    places: Tensor  #: (n,) int64, index of `PLACES`

    @property
    def captions(self) -> list[str]:
        columns = (self.labels, self.colours, self.backgrounds, self.places)
        return [caption(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def caption(label: int, colour: int, background: int, place: int) -> str:
    """Such as ``a red seven on dark blue , left``; every word stands alone."""
    return f"a {list(COLOURS)[colour]} {DIGIT_WORDS[label]} on {list(BACKGROUNDS)[background]} , {PLACES[place]}"


def render_cards(banks: Banks, n: int, generator: torch.Generator, style: CardStyle = CardStyle()) -> Cards:
    """Draw `n` cards. The generator's state decides everything; cards of one call share its stream."""
    dice, size = Dice(generator), style.size
    zoom = dice.uniform((size / 256, 0.6), n)
    offset = dice.uniform((-1.0, 1.0), n, 2) * (1 - zoom)[:, None]
    flip = torch.where(dice.uniform((0.0, 1.0), n) < 0.5, -1.0, 1.0)
    photo = crop_photos(banks.photos, dice.index(len(banks.photos), n), zoom, offset, flip, size)
    photo = photo.mean(1, keepdim=True)  # grey: the tint is the background's alone
    photo = (photo - photo.mean((2, 3), keepdim=True)) * dice.uniform(style.contrast, n, 1, 1, 1)
    backgrounds = dice.index(len(BACKGROUNDS), n)
    tint = torch.tensor(list(BACKGROUNDS.values()))[backgrounds] + dice.around(0.03, n, 3)
    image = (tint[:, :, None, None] + photo).clamp_(0, 1)
    chosen = dice.index(len(banks.digits), n)
    colours, places = dice.index(len(COLOURS), n), dice.index(len(PLACES), n)
    centre = size / 2 + dice.around(style.jitter, n, 2)
    centre[:, 0] += style.side * (places - 1)
    turned = (
        rotation(dice.around(style.digit_rotation, n)) * (2 / (8 * dice.uniform(style.digit_scale, n)))[:, None, None]
    )
    mask = stamp(banks.digits[chosen], centre, turned, size)
    colour = torch.tensor(list(COLOURS.values()))[colours] * dice.uniform((0.85, 1.0), n, 1)
    image = blend(image, mask * dice.uniform(style.digit_opacity, n)[:, None, None], colour)
    image = image + style.noise * torch.randn(image.shape, generator=generator)
    return Cards(to_uint8(image), banks.labels[chosen], colours, backgrounds, places)


class DigitCards:
    """An endless, indexable sequence of cards of one split; digits and photographs of different splits are disjoint.

    Needs scikit-learn and scikit-image (``pip install "tokred[train]"``).
    """

    def __init__(self, split: str = "test", seed: int = 0, style: CardStyle = CardStyle()) -> None:
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.split, self.seed, self.style = split, seed, style
        self.banks = load_banks(split)

    def batch(self, start: int, n: int) -> Cards:
        """Cards ``start`` .. ``start + n - 1``."""
        if start < 0 or n < 1:
            raise ValueError(f"need start >= 0 and n >= 1, got start={start}, n={n}")
        first, last = start // CHUNK, (start + n - 1) // CHUNK
        chunks = [
            render_cards(self.banks, CHUNK, seeded(self.seed, self.split, 1, number), self.style)
            for number in range(first, last + 1)
        ]
        rows = slice(start - first * CHUNK, start - first * CHUNK + n)
        return Cards(*(torch.cat(parts)[rows] for parts in zip(*chunks, strict=True)))

    def render(self, n: int) -> Cards:
        """The first `n` cards."""
        return self.batch(0, n)


def on_scene(images: Tensor, size: int = 96) -> Tensor:
    """Cards (n, 3, S, S) uint8 in the middle of pictures (n, 3, size, size) of their mean colour.

    That is how the bundled digit ViT can classify them.
    """
    start, side = (size - images.shape[-1]) // 2, images.shape[-1]
    scene = images.float().mean((2, 3), keepdim=True).round().to(torch.uint8).repeat(1, 1, size, size)
    scene[..., start : start + side, start : start + side] = images
    return scene
