"""Clips in which a few frames hold the answer: a task for choosing frames and for pooling what is not needed.

A clip is a row of short takes, each panning slowly over a photograph with grey strokes. One take of 4-6 frames shows
what the question asks for; the others show nothing, or digits of other classes and colours. A (split, seed, index)
always names the same clip, whichever of its frames are drawn::

    clips = DigitClips("test", seed=7)
    clip = clips.clip(3, frame_indices=uniform_frames(64, 8))
    clip.frames, clip.question, clip.answer        # uint8 (8, 3, 96, 96), "what colour is the 4 ?", "cyan"
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.data.banks import SPLITS, load_banks
from tokred.data.canvas import Dice, seeded
from tokred.data.coloured import ABSENT, COLOUR_NAMES, ColourStyle, Plan, paint, plan_scenes

CLIP_KINDS = ("digit_of_colour", "colour_of_digit")
_TAG, _NOISE_TAG = 3, 4  # keep the draws apart from those of other scenes

SCENE_STYLE = ColourStyle(digits=(1, 2, 3), margin=4.0)


@dataclass(frozen=True)
class ClipStyle:
    """How a clip is put together; pairs of whole numbers include both ends."""

    relevant: tuple[int, int] = (4, 6)  #: frames of the take with the answer
    take: tuple[int, int] = (5, 9)  #: frames of another take
    distractors: float = 0.5  #: share of the other takes that show digits
    drift: float = 1.0  #: most pixels a frame, along each axis
    scene: ColourStyle = SCENE_STYLE


STYLE = ClipStyle()


class Clip(NamedTuple):
    """A question and the drawn frames of its clip."""

    frames: Tensor  #: (n, 3, 96, 96) uint8, the frames ``indices``
    question: str
    answer: str
    kind: str
    relevant: Tensor  #: (T,) bool, of all frames of the clip
    indices: Tensor  #: (n,) int64, which frames were drawn


class _Script(NamedTuple):
    """What decides a clip: its takes and the question."""

    plan: Plan  #: one scene a take
    velocity: Tensor  #: (takes, 2) pixels a frame
    take: Tensor  #: (T,) the take of each frame
    middle: Tensor  #: (takes,) frame at which nothing is moved
    relevant: Tensor  #: (T,) bool
    digit: int
    colour: int


def uniform_frames(frames: int, count: int) -> list[int]:
    """The middle frames of ``count`` equal parts of a clip of ``frames`` frames."""
    if not 1 <= count <= frames:
        raise ValueError(f"count must be from 1 to {frames}, got {count}")
    return [int((i + 0.5) * frames / count) for i in range(count)]


def _take_lengths(total: int, bounds: tuple[int, int], rng: random.Random) -> list[int]:
    """Lengths that fill ``total``; the last take may be shorter."""
    lengths: list[int] = []
    while total > 0:
        lengths.append(min(total, rng.randint(*bounds)))
        total -= lengths[-1]
    return lengths


class DigitClips:
    """An endless, indexable sequence of clips of one split; kinds of questions take turns by index.

    Digits, photographs and strokes of different splits are disjoint. Needs scikit-learn and scikit-image
    (``pip install "tokred[train]"``).
    """

    def __init__(self, split: str = "test", seed: int = 0, frames: int = 64, style: ClipStyle = STYLE) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if frames < style.relevant[1]:
            raise ValueError(f"frames must be >= {style.relevant[1]}, got {frames}")
        self.split, self.seed, self.frames, self.style = split, seed, frames, style
        self._last: tuple[int, _Script] | None = None

    def __repr__(self) -> str:
        return f"DigitClips(split={self.split!r}, seed={self.seed}, frames={self.frames}, style={self.style})"

    def _write(self, index: int) -> _Script:
        rng, style = random.Random(f"clip {self.seed} {self.split} {index}"), self.style
        length = rng.randint(*style.relevant)
        start = rng.randrange(self.frames - length + 1)
        before = _take_lengths(start, style.take, rng)
        after = _take_lengths(self.frames - start - length, style.take, rng)
        lengths = torch.tensor([*before, length, *after])
        takes, answer = len(lengths), len(before)
        empty = torch.tensor([i != answer and rng.random() >= style.distractors for i in range(takes)])
        digit, colour = rng.randrange(10), rng.randrange(len(COLOUR_NAMES))
        class_bias, colour_bias = torch.zeros(takes, 10), torch.zeros(takes, len(COLOUR_NAMES))
        class_bias[:, digit], colour_bias[:, colour] = 2, 2  # never in another take
        class_bias[answer, digit], colour_bias[answer, colour] = -1, -1
        generator = seeded(self.seed, self.split, index, _TAG)
        plan = plan_scenes(self.split, takes, generator, style.scene, class_bias, colour_bias)
        plan = plan._replace(
            classes=plan.classes.masked_fill(empty[:, None], ABSENT),
            colours=plan.colours.masked_fill(empty[:, None], ABSENT),
            opacity=plan.opacity.masked_fill(empty[:, None], 0.0),
        )
        take = torch.arange(takes).repeat_interleave(lengths)
        middle = lengths.cumsum(0) - (lengths + 1) / 2
        velocity = Dice(generator).around(style.drift, takes, 2)
        return _Script(plan, velocity, take, middle, take == answer, digit, colour)

    def _script(self, index: int) -> _Script:
        if self._last is None or self._last[0] != index:
            self._last = index, self._write(index)
        return self._last[1]

    def _noise(self, index: int, frames: list[int]) -> Tensor:
        size = self.style.scene.size
        generators = [seeded(self.seed, self.split, index, frame, _NOISE_TAG) for frame in frames]
        noise = torch.stack([torch.randn(3, size, size, generator=generator) for generator in generators])
        return self.style.scene.noise * noise

    def clip(self, index: int, frame_indices: Sequence[int] | None = None) -> Clip:
        """Clip ``index``; only the frames ``frame_indices`` (in that order; all by default) are drawn."""
        if index < 0:
            raise ValueError(f"index must be >= 0, got {index}")
        chosen = list(range(self.frames)) if frame_indices is None else [int(i) for i in frame_indices]
        if not chosen or min(chosen) < 0 or max(chosen) >= self.frames:
            raise ValueError(f"frame_indices must be some of 0..{self.frames - 1}, got {chosen}")
        script, size = self._script(index), self.style.scene.size
        indices = torch.tensor(chosen)
        take = script.take[indices]
        shift = script.velocity[take] * (indices - script.middle[take])[:, None]
        plan = script.plan.rows(take).moved(shift, size)
        frames = paint(plan, load_banks(self.split), self._noise(index, chosen), size).images
        kind, colour = CLIP_KINDS[index % len(CLIP_KINDS)], COLOUR_NAMES[script.colour]
        question, answer = f"which digit is {colour} ?", str(script.digit)
        if kind == "colour_of_digit":
            question, answer = f"what colour is the {script.digit} ?", colour
        return Clip(frames, question, answer, kind, script.relevant, indices)
