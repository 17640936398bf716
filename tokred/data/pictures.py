"""Pictures with classes or captions, as the tokenizers' training and evaluation read them.

Two sources: the bundled cards, and a folder. A folder holds pictures, in one folder a class or not, and may hold
``captions.jsonl``: lines ``{"image": path from the folder, "caption": text}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokred.core.errors import InvalidParameterError
from tokred.data.banks import load_banks
from tokred.data.canvas import seeded
from tokred.data.cards import DIGIT_WORDS, CardStyle, DigitCards, render_cards

__all__ = ["CardPictures", "FolderPictures", "PictureBatch", "Pictures", "open_pictures"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class PictureBatch:
    """Pictures and what is known of them."""

    images: Tensor  #: (B, 3, S, S) float32 in [-1, 1]
    labels: Tensor | None  #: (B,) int64
    captions: list[str] | None  #: B texts


class Pictures(Protocol):
    """Where pictures come from.

    Attributes:
        size: side in pixels. classes: their names, in order; () where there are none.
    """

    size: int
    classes: tuple[str, ...]

    def train(self, batch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[PictureBatch]:
        """Endless batches of one process, from the `start`-th on; the same for the same seed."""
        ...

    def held_out(self, count: int, batch: int = 64) -> Iterator[PictureBatch]:
        """The first `count` pictures that training never sees, or all where there are fewer."""
        ...


class CardPictures:
    """The bundled cards, drawn anew for each (seed, step, process)."""

    classes: tuple[str, ...] = DIGIT_WORDS

    def __init__(
        self, seed: int = 0, split: str = "val", held_out_seed: int = 1, style: CardStyle | None = None
    ) -> None:
        self.seed, self.split, self.held_out_seed = seed, split, held_out_seed
        self.style = CardStyle() if style is None else style
        self.size = self.style.size

    def train(self, batch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[PictureBatch]:
        banks, step = load_banks("train"), start
        while True:
            cards = render_cards(banks, batch, seeded(self.seed, "train", 2, step, rank), self.style)
            yield PictureBatch(cards.images.float() / 127.5 - 1, cards.labels, cards.captions)
            step += 1

    def held_out(self, count: int, batch: int = 64) -> Iterator[PictureBatch]:
        cards = DigitCards(self.split, self.held_out_seed, self.style)
        for start in range(0, count, batch):
            some = cards.batch(start, min(batch, count - start))
            yield PictureBatch(some.images.float() / 127.5 - 1, some.labels, some.captions)


class FolderPictures:
    """The pictures of a folder, scaled and cut to a square; `held_out` of them, the last of a fixed shuffle, are kept.

    Raises:
        InvalidParameterError: no such folder, no picture in it, a caption file that cannot be read or names files that
            are not there; while reading, a file that is no picture.
    """

    def __init__(self, root: str | Path, size: int, seed: int = 0, held_out: int = 0, workers: int = 0) -> None:
        self.root, self.size, self.seed, self.workers = Path(root), size, seed, workers
        if not self.root.is_dir():
            raise InvalidParameterError(f"data={str(root)!r}: no such folder; expected one that holds pictures")
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        captions = _captions(self.root)
        if captions is not None:
            files = [self.root / name for name in captions]
            missing = [str(p) for p in files if not p.is_file()]
            if missing:
                raise InvalidParameterError(f"captions.jsonl names {len(missing)} missing files, such as {missing[0]}")
        if not files or not 0 <= held_out <= len(files):
            raise InvalidParameterError(
                f"{len(files)} pictures ({', '.join(SUFFIXES)}) in {root}, of which {held_out} are to be held out: "
                "expected as many at least, and one"
            )
        folders = {p.parent for p in files}
        classed = len(folders) > 1 and self.root not in folders
        self.classes = tuple(sorted({p.parent.name for p in files})) if classed else ()
        order = np.random.default_rng(0).permutation(len(files)).tolist()
        rows = [
            (
                files[i],
                self.classes.index(files[i].parent.name) if classed else None,
                None if captions is None else captions[str(files[i].relative_to(self.root))],
            )
            for i in order
        ]
        self._train, self._held_out = rows[: len(rows) - held_out], rows[len(rows) - held_out :]

    def train(self, batch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[PictureBatch]:
        count = len(self._train)
        if not count:
            raise InvalidParameterError(
                f"all {len(self._held_out)} pictures in {self.root} are held out: none to train on"
            )
        steps = max(1, count // (batch * world))  # of an epoch
        epoch, skip = divmod(start, steps)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            order = np.resize(order, steps * batch * world).reshape(steps, world, batch)
            yield from self._read(self._train, [row.tolist() for row in order[skip:, rank]])
            epoch, skip = epoch + 1, 0

    def held_out(self, count: int, batch: int = 64) -> Iterator[PictureBatch]:
        rows = list(range(min(count, len(self._held_out))))
        yield from self._read(self._held_out, [rows[i : i + batch] for i in range(0, len(rows), batch)])

    def _read(self, rows: Sequence[_Row], batches: list[list[int]]) -> Iterator[PictureBatch]:
        dataset = _Files(rows, self.size)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=self.workers, collate_fn=_collate)
        yield from loader


_Row = tuple[Path, "int | None", "str | None"]


class _Files(Dataset[tuple[Tensor, "int | None", "str | None"]]):
    def __init__(self, rows: Sequence[_Row], size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None, str | None]:
        from tokred.generation.images import to_pixels

        path, label, text = self.rows[index]
        try:
            with Image.open(path) as image:
                return to_pixels(image, self.size)[0], label, text
        except (UnidentifiedImageError, OSError) as error:
            raise InvalidParameterError(f"{path} cannot be read as a picture: {error}") from error


def _collate(items: list[tuple[Tensor, int | None, str | None]]) -> PictureBatch:
    images, labels, texts = zip(*items, strict=True)
    return PictureBatch(
        torch.stack(images),
        None if labels[0] is None else torch.tensor(labels),
        None if texts[0] is None else list(texts),
    )


def _captions(root: Path) -> dict[str, str] | None:
    path = root / "captions.jsonl"
    if not path.is_file():
        return None
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[str(Path(row["image"]))] = str(row["caption"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidParameterError(
                f'{path}, line {number}: expected {{"image": path, "caption": text}}, got {line[:80]!r}'
            ) from error
    return found


def open_pictures(data: str, size: int = 32, seed: int = 0, held_out: int = 0, workers: int = 0) -> Pictures:
    """``"cards"``, or the path of a folder.

    Raises:
        InvalidParameterError: see `FolderPictures`; cards of another size than 32.
    """
    if data == "cards":
        if size != CardStyle().size:
            raise InvalidParameterError(f"size={size}: cards are {CardStyle().size} pixels wide")
        return CardPictures(seed)
    return FolderPictures(data, size, seed, held_out, workers)
