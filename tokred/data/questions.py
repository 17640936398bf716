"""Questions about scenes of coloured digits: a task in which tokens beside the answer's are of no use.

Each scene comes with one question. A (split, seed, index) always names the same scene and question::

    scenes = QuestionScenes("test", seed=7)
    batch = scenes.batch(0, 32)
    batch.images, batch.questions[0], batch.answers[0]     # uint8 (32, 3, 96, 96), "which digit is red ?", "7"
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.data.banks import SPLITS
from tokred.data.canvas import CHUNK, seeded
from tokred.data.coloured import COLOUR_NAMES, STYLE, ColourScenes, ColourStyle, boxes_of, render_coloured

#: Kinds of questions, in the order in which scenes take their turns.
KINDS = ("digit_of_colour", "colour_of_digit", "exists", "count", "side")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
#: Name of a side, and (axis, sign): the digit whose coordinate times sign is the least.
SIDES = {"left-most": (0, 1), "right-most": (0, -1), "top-most": (1, 1), "bottom-most": (1, -1)}
_TAG = 2  # keeps these scenes apart from those of DigitScenes


class Facts(NamedTuple):
    """What is in one scene: one entry for each digit."""

    classes: tuple[int, ...]
    colours: tuple[str, ...]
    centres: tuple[tuple[float, float], ...]


class QuestionBatch(NamedTuple):
    """Scenes, and one question about each."""

    images: Tensor  #: (B, 3, 96, 96) uint8
    questions: list[str]  #: words parted by spaces, such as "which digit is red ?"
    answers: list[str]  #: one word
    kinds: list[str]
    masks: Tensor  #: (B, 96, 96) float32 in [0, 1], the digits of a scene
    digit_masks: Tensor  #: (B, 4, 96, 96) float32, one for each digit
    classes: Tensor  #: (B, 4) int64, -1 for an empty slot
    colours: Tensor  #: (B, 4) int64, index of ``COLOUR_NAMES``, -1 for an empty slot
    boxes: Tensor  #: (B, 4, 4) int64: left, top, right, bottom


def facts_of(scenes: ColourScenes, index: int) -> Facts:
    """The digits of scene ``index``."""
    there = scenes.classes[index] >= 0
    colours = tuple(COLOUR_NAMES[c] for c in scenes.colours[index][there].tolist())
    centres = tuple((x, y) for x, y in scenes.centres[index][there].tolist())
    return Facts(tuple(scenes.classes[index][there].tolist()), colours, centres)


def _exists(facts: Facts, rng: random.Random) -> tuple[str, str]:
    there = rng.random() < 0.5
    choices = facts.classes if there else tuple(c for c in range(10) if c not in facts.classes)
    return f"is there a {rng.choice(choices)} ?", "yes" if there else "no"


def ask(kind: str, facts: Facts, rng: random.Random) -> tuple[str, str]:
    """A question of ``kind`` about the scene, and its answer. ``ValueError`` for an unknown kind."""
    if kind == "exists":
        return _exists(facts, rng)
    if kind == "count":
        return "how many digits are there ?", NUMBER_WORDS[len(facts.classes)]
    if kind == "side":
        side = rng.choice(tuple(SIDES))
        axis, sign = SIDES[side]
        chosen = min(range(len(facts.classes)), key=lambda i: sign * facts.centres[i][axis])
        return f"which digit is {side} ?", str(facts.classes[chosen])
    chosen = rng.randrange(len(facts.classes))
    if kind == "digit_of_colour":
        return f"which digit is {facts.colours[chosen]} ?", str(facts.classes[chosen])
    if kind == "colour_of_digit":
        return f"what colour is the {facts.classes[chosen]} ?", facts.colours[chosen]
    raise ValueError(f"no question kind is called {kind!r}; there are: {', '.join(KINDS)}")


class QuestionScenes:
    """An endless, indexable sequence of scenes with 2-4 coloured digits and one question each.

    Kinds take turns by index. Digits, photographs and strokes of different splits are disjoint. Needs scikit-learn and
    scikit-image (``pip install "tokred[train]"``).
    """

    def __init__(
        self, split: str = "test", seed: int = 0, style: ColourStyle = STYLE, kinds: Sequence[str] = KINDS
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)}")
        self.split, self.seed, self.style, self.kinds = split, seed, style, tuple(kinds)
        self._last: tuple[int, ColourScenes] | None = None  # small batches walk through one chunk

    def __repr__(self) -> str:
        return f"QuestionScenes(split={self.split!r}, seed={self.seed}, style={self.style}, kinds={self.kinds})"

    def _chunk(self, number: int) -> ColourScenes:
        if self._last is None or self._last[0] != number:
            generator = seeded(self.seed, self.split, number, _TAG)
            self._last = number, render_coloured(self.split, CHUNK, generator, self.style)
        return self._last[1]

    def batch(self, start: int, count: int) -> QuestionBatch:
        """Scenes ``start`` .. ``start + count - 1`` with their questions."""
        if start < 0 or count < 1:
            raise ValueError(f"need start >= 0 and count >= 1, got start={start}, count={count}")
        first, last = start // CHUNK, (start + count - 1) // CHUNK
        chunks = [self._chunk(number) for number in range(first, last + 1)]
        rows = slice(start - first * CHUNK, start - first * CHUNK + count)
        scenes = ColourScenes(*(torch.cat(parts)[rows] for parts in zip(*chunks, strict=True)))
        kinds = [self.kinds[i % len(self.kinds)] for i in range(start, start + count)]
        pairs = [
            ask(kind, facts_of(scenes, i), random.Random(f"{self.seed} {self.split} {start + i}"))
            for i, kind in enumerate(kinds)
        ]
        questions, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        masks = scenes.masks.amax(1)
        boxes = boxes_of(scenes.masks)
        return QuestionBatch(
            scenes.images, questions, answers, kinds, masks, scenes.masks, scenes.classes, scenes.colours, boxes
        )
