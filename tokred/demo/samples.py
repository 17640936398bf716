"""Examples for the page, drawn from the held-out splits into a folder when the demo starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Samples", "write_samples", "write_video"]

SEED = 777
RATE = 8  # frames a second of an example video
PER_TAB = 6


@dataclass(frozen=True)
class Samples:
    """Files of the examples.

    Attributes:
        scenes: pictures to classify. questions: pictures with a question and the right answer. clips: videos with the
            same. cards: pictures to tokenize.
    """

    scenes: list[str]
    questions: list[tuple[str, str, str]]
    clips: list[tuple[str, str, str]]
    cards: list[str]


def write_samples(folder: Path, count: int = PER_TAB) -> Samples:
    """Draw `count` examples of each kind (half as many clips)."""
    from tokred.data.cards import DigitCards
    from tokred.data.clips import DigitClips
    from tokred.data.questions import QuestionScenes
    from tokred.data.scenes import DigitScenes

    scenes = DigitScenes("test", SEED).render(count)
    questions = QuestionScenes("test", SEED).batch(0, count)
    clips = DigitClips("test", SEED)
    found: list[tuple[str, str, str]] = []
    for number in range(count // 2):
        clip = clips.clip(number)
        path = folder / f"clip-{number + 1}.mp4"
        write_video(path, clip.frames.permute(0, 2, 3, 1).numpy())
        found.append((str(path), clip.question, clip.answer))
    return Samples(
        _pictures(folder, "scene", scenes.images),
        list(zip(_pictures(folder, "question", questions.images), questions.questions, questions.answers, strict=True)),
        found,
        _pictures(folder, "card", DigitCards("test", SEED).render(count).images),
    )


def _pictures(folder: Path, name: str, images: Tensor) -> list[str]:
    from PIL import Image

    paths = []
    for number, image in enumerate(images):
        paths.append(str(folder / f"{name}-{number + 1}.png"))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


def write_video(path: Path, frames: np.ndarray) -> None:
    """Frames (T, H, W, 3) uint8 as an MP4 that browsers play."""
    import av

    with av.open(str(path), "w") as made:
        options = {"crf": "8", "preset": "veryfast"}
        stream: Any = made.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            made.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        made.mux(stream.encode())
