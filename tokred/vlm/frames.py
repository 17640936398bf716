"""Which frames of a video are looked at, and what the prompt says about them (QuoTA, arXiv 2503.08689).

The number of frames grows with the duration; their token counts (`tokred.vlm.allocate`) then share one fixed budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError

__all__ = ["Sampled", "Video", "read_video", "sample_frames", "video_sentence"]


class Sampled(NamedTuple):
    """The sampled frames of a video.

    indices: of the T frames, ascending; they repeat where the video has fewer. times: their seconds. duration: seconds.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    duration: float

    @property
    def timestamps(self) -> str:
        """The times as the released code prints them: ``"0.00s,1.40s,2.83s"``."""
        return ",".join(f"{time:.2f}s" for time in self.times)


class Video(NamedTuple):
    """Decoded frames, (T, H, W, 3) uint8 RGB, and which ones they are."""

    frames: np.ndarray
    sampled: Sampled


def sample_frames(
    total: int,
    fps: float,
    base_frames: int = 96,
    extra_frames: int = 64,
    clamp: bool = False,
    force_uniform: bool = True,
) -> Sampled:
    """Spread ``T = base_frames + int(hours * extra_frames)`` frames evenly over a video.

    Args:
        total: frames in the video. fps: its average frame rate.
        base_frames: T_base. extra_frames: alpha, frames added for each hour.
        clamp: stop adding after the first hour. The paper calls alpha the maximum number of additional frames, which
            says so; the released code goes on, and is the default.
        force_uniform: False takes one frame a second where those are no more than T (the released code's other branch,
            which its pipeline never takes).

    Raises:
        InvalidParameterError: a value outside its range, in particular an empty video.
    """
    if check_count("total", total) == 0:
        raise InvalidParameterError("total=0: the video has no frames, expected at least 1")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not (float(fps) > 0 and math.isfinite(fps)):
        raise InvalidParameterError(f"fps={fps!r}: expected a frame rate > 0")
    check_count("base_frames", base_frames, minimum=1)
    check_count("extra_frames", extra_frames)
    duration = total / float(fps)
    hours = duration / 3600
    count = base_frames + int((min(hours, 1.0) if clamp else hours) * extra_frames)
    indices = np.linspace(0, total - 1, count, dtype=int).tolist()
    if not force_uniform:
        stride = max(1, round(float(fps)))  # 0 below half a frame a second, where the released code fails
        each_second = list(range(0, total, stride))
        indices = each_second if len(each_second) <= count else indices
    return Sampled(tuple(indices), tuple(index / float(fps) for index in indices), duration)


def read_video(
    path: str | PathLike[str],
    base_frames: int = 96,
    extra_frames: int = 64,
    clamp: bool = False,
    force_uniform: bool = True,
) -> Video:
    """Decode the frames that `sample_frames` picks, and keep no others in memory.

    The video is decoded from its start: counting is the only way to find a frame by its index in every container.

    Raises:
        ImportError: PyAV is not installed. InvalidParameterError: no video stream, no frames, or no frame rate.
    """
    av = _import_av()
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate
        declared = stream.frames
    if not rate:
        raise InvalidParameterError(f"{path}: the video states no frame rate")
    total = declared or _count_packets(av, path)
    while True:
        sampled = sample_frames(total, float(rate), base_frames, extra_frames, clamp, force_uniform)
        frames, decoded = _decode(av, path, sampled.indices)
        if frames is not None:
            return Video(frames, sampled)
        total = decoded  # fewer frames than the container says: sample again from those that there are


def video_sentence(
    sampled: Sampled, kept: Sequence[int] | None = None, timestamps: Literal["all", "kept"] = "all"
) -> str:
    """One sentence for the prompt: duration, number of sampled frames and when they were taken.

    The released code always prints 1 for the number (it measures the list that wraps the frames); this is the true one.

    Args:
        kept: which of the sampled frames have tokens, for ``timestamps="kept"``: only their times are listed.
    """
    check_choice("timestamps", timestamps, ("all", "kept"))
    start = f"The video is {sampled.duration:.2f} seconds long and {len(sampled.indices)} of its frames were sampled"
    if timestamps == "all":
        return f"{start}, at {sampled.timestamps}."
    if kept is None:
        raise InvalidParameterError("timestamps='kept' needs kept=, the sampled frames that have tokens; got None")
    times = sampled._replace(times=tuple(sampled.times[frame] for frame in kept)).timestamps
    return f"{start}; you see those at {times}."


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('read_video needs PyAV, which is not installed; run: pip install "tokred[video]"') from error
    return av


def _video_stream(container: Any, path: object) -> Any:
    if not container.streams.video:
        raise InvalidParameterError(f"{path}: expected a video, the file has no video stream")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _count_packets(av: Any, path: object) -> int:
    """Frames of a container that does not say (Matroska, WebM), without decoding: a packet holds one."""
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(_video_stream(container, path)))


def _decode(av: Any, path: object, indices: Sequence[int]) -> tuple[np.ndarray | None, int]:
    """The frames at ascending `indices` (T, H, W, 3), or None if the video ends before; and the frames decoded."""
    frames: np.ndarray | None = None
    filled = decoded = 0
    with av.open(str(path)) as container:
        for frame in container.decode(_video_stream(container, path)):
            decoded += 1
            if decoded - 1 < indices[filled]:
                continue
            if frames is None:
                frames = np.empty((len(indices), frame.height, frame.width, 3), dtype=np.uint8)
            height, width = frames.shape[1:3]  # of the first frame: a stream may change its size
            picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
            while filled < len(indices) and indices[filled] == decoded - 1:
                frames[filled] = picture
                filled += 1
            if filled == len(indices):
                return frames, decoded
    return None, decoded
