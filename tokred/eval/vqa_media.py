"""Pictures and videos of benchmarks: found before anything is measured, opened when a question needs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.core.errors import InvalidParameterError, TokredError
from tokred.eval.hub import brief

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = ["MediaError", "Picture", "Video", "find_picture", "find_video", "path_of", "read_frames", "size_of"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class MediaError(TokredError, OSError):
    """A picture or a video is not there, or cannot be read."""


@dataclass(frozen=True)
class Picture:
    """A picture that is not open yet. `name` is one for all questions about it; `load` may raise anything.

    `path`: of a picture that is a file.
    """

    name: str
    load: Callable[[], Any]
    path: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> Picture:
        def load() -> Any:
            from PIL import Image

            return Image.open(path)

        return cls(str(path), load, path)

    def open(self) -> Image:
        """RGB. `MediaError` names what cannot be read."""
        try:
            return self.load().convert("RGB")
        except Exception as error:
            raise MediaError(
                f"{self.name} cannot be read as a picture ({brief(error)}); put a whole copy there and run again: "
                "answers so far are kept"
            ) from error


@dataclass(frozen=True)
class Video:
    """A video that is not open yet: a file, a folder of frames, or a function from a number of frames."""

    name: str
    source: Path | Callable[[int], np.ndarray]

    def frames(self, count: int) -> np.ndarray:
        """(T, H, W, 3) uint8: the middle frames of `count` equal parts; a shorter video repeats some."""
        try:
            if isinstance(self.source, Path):
                return read_frames(self.source, count)
            return self.source(count)
        except (MediaError, ImportError):
            raise
        except Exception as error:
            raise MediaError(
                f"{self.name} cannot be read as a video ({brief(error)}); put a whole copy there, or a folder of its "
                "frames, and run again: answers so far are kept"
            ) from error


def path_of(media: Picture | Video | None) -> Path | None:
    """The file or folder; None of what is drawn or lies in a row."""
    if isinstance(media, Video):
        return media.source if isinstance(media.source, Path) else None
    return None if media is None else media.path


def size_of(path: Path) -> int:
    """Bytes of a file, or of all frames of a folder."""
    if path.is_dir():
        return sum(one.stat().st_size for one in path.iterdir() if one.suffix.lower() in PICTURES)
    return path.stat().st_size


def _middles(total: int, count: int) -> list[int]:
    return [int((i + 0.5) * total / count) for i in range(count)]


# -- places ------------------------------------------------------------------------------------------------------------


def find_picture(folder: Path | None, names: Sequence[str], where: str) -> Picture:
    """The first of `names` (paths below `folder`, perhaps without an ending) that is there."""
    found = _find(folder, names, PICTURES, where, "picture", "--images DIR")
    return Picture.of_file(found)


def find_video(folder: Path | None, names: Sequence[str], where: str) -> Video:
    """The first of `names` that is there: a video, or a folder of frames."""
    found = _find(folder, names, VIDEOS, where, "video", "--videos DIR")
    return Video(str(found), found)


def _find(
    folder: Path | None, names: Sequence[str], endings: Sequence[str], where: str, what: str, option: str
) -> Path:
    if folder is None:
        raise InvalidParameterError(f"{where} asks about the {what} {names[0]}: say where it is with {option}")
    for name in names:
        path = folder / name
        if path.exists():
            return path
        for ending in endings:
            longer = path.with_name(path.name + ending)
            if longer.exists():
                return longer
    tried = ", ".join(names)
    raise MediaError(f"{where} asks about a {what} that is not in {folder} (tried {tried}); see {option}")


# -- frames ------------------------------------------------------------------------------------------------------------


def read_frames(path: Path, count: int) -> np.ndarray:
    """(T, H, W, 3) uint8 of a video file or a folder of frames: the middle frames of `count` equal parts."""
    if path.is_dir():
        return _folder_frames(path, count)
    for package, reader in (("decord", _decord_frames), ("av", _av_frames)):
        if importlib.util.find_spec(package) is not None:
            return reader(path, count)
    raise ImportError(f'{path} is a video, which needs PyAV or decord to be read; run: pip install "tokred[video]"')


def _folder_frames(path: Path, count: int) -> np.ndarray:
    import numpy as np

    files = sorted((one for one in path.iterdir() if one.suffix.lower() in PICTURES), key=_numbered)
    if not files:
        raise MediaError(f"the folder {path} has no frames in it ({', '.join(PICTURES)})")
    return np.stack([np.asarray(Picture.of_file(files[i]).open()) for i in _middles(len(files), count)])


def _numbered(path: Path) -> tuple[int, str]:
    """frame_2 comes before frame_10."""
    digits = "".join(letter if letter.isdigit() else " " for letter in path.stem).split()
    return (int(digits[-1]) if digits else 0, path.name)


def _decord_frames(path: Path, count: int) -> np.ndarray:
    import decord  # type: ignore[import-not-found, unused-ignore]

    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(_middles(len(reader), count)).asnumpy()


def _av_frames(path: Path, count: int) -> np.ndarray:
    import av
    import numpy as np

    with av.open(str(path)) as opened:
        if not opened.streams.video:
            raise MediaError(f"{path} has no pictures in it, only {', '.join(s.type for s in opened.streams)}")
        stream = opened.streams.video[0]
        stream.thread_type = "AUTO"
        times = sorted(packet.pts for packet in opened.demux(stream) if packet.pts is not None)
        if not times:
            raise MediaError(f"{path} has no frames")
        wanted = [times[i] for i in _middles(len(times), count)]
        taken = [frame.to_ndarray(format="rgb24") for frame in _at(opened, stream, wanted)]
    return np.stack(taken)


def _at(opened: Any, stream: Any, wanted: Iterable[int]) -> Iterator[Any]:
    """The frame shown at each of the ascending times; more than a second ahead by the key frame before it."""
    times = list(wanted)
    frames: Iterator[Any] = iter(())
    last: Any = None
    for place, time in enumerate(times):
        if place == 0 or (time - times[place - 1]) * stream.time_base > 1:
            opened.seek(time, stream=stream, backward=True)
            frames = opened.decode(stream)
            last = None
        while last is None or last.pts < time:
            following = next(frames, None)
            if following is None:
                break
            last = following
        if last is None:
            raise MediaError(f"{opened.name} ends before its frame at {time}")
        yield last
