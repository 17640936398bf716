"""Labelled images for `tokred eval imagenet`: a folder, a tar, a data set of the hub, the bundled scenes.

Batches are fixed by the data alone: batch b holds the same images whatever number of processes and workers shares the
batches out, and however often a run was killed. A batch is the unit of work, so numbers never depend on any of them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from tokred.core.errors import InvalidParameterError, nearest
from tokred.eval.bench import require
from tokred.eval.data_sets import load_data_set
from tokred.eval.hub import brief, unreachable, what_to_do

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Batch", "ImageData", "Source", "Transform", "open_images"]

Transform = Callable[["Image"], Tensor]
SCENES = 1000  # of --data scenes, where --count does not say
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class Batch(NamedTuple):
    """Images that go through the models together.

    Attributes:
        number: of the batch. keys: of its images. labels: class of each. images: (B, 3, H, W) as the model takes them.
        unreadable: (key, label, name, reason) of what could not be read; it is not among the others.
    """

    number: int
    keys: list[int]
    labels: list[int]
    images: Tensor
    unreadable: list[tuple[int, int, str, str]]


class _Item(NamedTuple):
    key: int
    label: int
    image: Tensor | None
    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Where images come from, as the command line says it.

    Attributes:
        data: "scenes", a folder, a tar, or ``hf:`` and the id or folder of a data set.
        labels: of a tar or of a folder without class folders. class_map: which class a name is.
        split, config, image_column, label_column: of a data set; `split` of the scenes, too ("test" or "val").
        count: take so many only, evenly spaced (of a data set: the first of each shard). seed: of the scenes.
    """

    data: str = "scenes"
    labels: Path | None = None
    class_map: Path | None = None
    split: str | None = None
    config: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    count: int | None = None
    seed: int = 777

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise InvalidParameterError(f"--count {self.count}: expected at least 1")
        if self.seed < 0:
            raise InvalidParameterError(f"--seed {self.seed}: expected at least 0")

    def check(self) -> None:
        """Say at once that there is nothing, before a model is loaded.

        Raises:
            FileNotFoundError: with what could be given instead. InvalidParameterError: options that do not belong here.
        """
        for path, option in ((self.labels, "--labels"), (self.class_map, "--class-map")):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"no {option} at {path}")
        if self.class_map is not None and not self.class_map.is_file():
            raise InvalidParameterError(f"--class-map {self.class_map} is a folder; expected a file")
        streamed = self.data.startswith("hf:")
        for option, given, fits in (
            ("--config", self.config, streamed),
            ("--image-column", self.image_column, streamed),
            ("--label-column", self.label_column, streamed),
            ("--split", self.split, streamed or self.data == "scenes"),
        ):
            if given is not None and not fits:
                raise InvalidParameterError(f"{option} {given} is of a data set, hf:<id or folder>; leave it away")
        if self.data != "scenes" and not self.data.startswith("hf:") and not Path(self.data).exists():
            raise FileNotFoundError(
                f"no data at {self.data!r}; expected a folder of images, a tar such as ILSVRC2012_img_val.tar, hf:<id "
                "or folder> of a data set, or the word: scenes"
            )


class ImageData(ABC):
    """Images with classes.

    Attributes:
        facts: what identifies them, JSON types. total: how many, None where that is not known beforehand.
    """

    facts: dict[str, Any]
    total: int | None

    @abstractmethod
    def batches(
        self, transform: Transform, size: int, workers: int, rank: int, count: int, done: Collection[int], pin: bool
    ) -> DataLoader:
        """A loader of the `Batch`es of one process of `count`, without those whose images are all `done`."""


def open_images(source: Source, classes: int, class_names: Sequence[str] | None) -> ImageData:
    """Open the images for a classifier of so many classes, of these names if it knows them.

    Raises:
        FileNotFoundError: nothing there. InvalidParameterError: no images, no labels, or classes that do not fit.
    """
    source.check()
    into = _Classes(classes, class_names, source.class_map)
    if source.data == "scenes":
        return _scenes(source, into)
    if source.data.startswith("hf:"):
        return _Streamed(source, into)
    path = Path(source.data)
    if path.is_dir():
        return _folder(path, source, into)
    return _tar(path, source, into)


# -- names of classes --------------------------------------------------------------------------------------------------


class _Classes:
    """Which output of a classifier a class is."""

    def __init__(self, count: int, names: Sequence[str] | None, path: Path | None) -> None:
        self.count, self.names = count, tuple(names) if names else None
        self.map = None if path is None else _class_map(path, count)

    def of(self, names: Sequence[str], what: str) -> dict[str, int]:
        """{name: class} of all names that the data have, in their order.

        By --class-map; or they are ImageNet's ids (n01440764), the classifier's own names, or numbers; or there are as
        many as classes, and the order counts.
        """
        if self.map is not None:
            missing = [name for name in names if name not in self.map]
            if missing:
                raise InvalidParameterError(f"--class-map has no class {missing[0]!r}, which {what} has")
            return {name: self.map[name] for name in names}
        ids = _imagenet_ids() if self.count == 1000 else {}
        if ids and all(name in ids for name in names):
            return {name: ids[name] for name in names}
        if self.names is not None and set(names) <= set(self.names):
            return {name: self.names.index(name) for name in names}
        if all(name.isdecimal() for name in names) and max(map(int, names)) < self.count:
            return {name: int(name) for name in names}
        if len(names) == self.count:
            return {name: number for number, name in enumerate(names)}
        hint = _first_names(names)
        raise InvalidParameterError(
            f"{what} has {len(names)} classes ({hint}) and the model {self.count}; take a model of these classes, or "
            "say which is which: --class-map FILE with lines of a class's name and its number"
        )

    def check(self, label: object, name: str) -> int:
        """A number that a list gives for a class."""
        if not isinstance(label, int) or not 0 <= label < self.count:
            hidden = " (-1: this split hides its labels)" if label == -1 else ""
            raise InvalidParameterError(
                f"{name} is of class {label!r}{hidden}, and the model has 0 to {self.count - 1}"
            )
        return label


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"{option} {path} is no text: {brief(error)}") from error


def _class_map(path: Path, count: int) -> dict[str, int]:
    """JSON {name: number}, or lines "name number", or one name a line whose number is the line's."""
    text = _text(path, "--class-map")
    try:
        if path.suffix == ".json":
            found = {str(name): int(number) for name, number in json.loads(text).items()}
        else:
            lines = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
            numbered = bool(lines) and all(len(line) == 2 and line[1].isdigit() for line in lines)
            whole = [line.strip() for line in text.splitlines() if line.strip()]
            found = {a: int(b) for a, b in lines} if numbered else {name: n for n, name in enumerate(whole)}
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidParameterError(
            f"--class-map {path} cannot be read: {brief(error)}; expected lines of a name and a number, or JSON "
            "{name: number}"
        ) from error
    if not found or min(found.values()) < 0 or max(found.values()) >= count:
        raise InvalidParameterError(
            f"--class-map {path} names {len(found)} classes up to {max(found.values(), default=-1)}, and the model has "
            f"0 to {count - 1}"
        )
    return found


@functools.cache
def _imagenet_ids() -> dict[str, int]:
    """The 1000 ids of ImageNet-1k (n01440764) in the order of every classifier; {} without timm."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return {}
    return {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


# -- lists of images: folder, tar, scenes ------------------------------------------------------------------------------


class _Listed(ImageData, Dataset):
    """Images that can be had in any order.

    Args:
        names, labels: of each. reader: opens number i of them as a picture; it travels to worker processes.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        names: list[str],
        labels: list[int],
        reader: Callable[[int], Image],
        count: int | None = None,
    ) -> None:
        if not names:
            raise InvalidParameterError(f"{facts['data']} holds no images")
        taken = list(range(len(names)))
        if count is not None and count < len(names):
            taken = [number * len(names) // count for number in range(count)]
        self.names, self.labels, self.reader = [names[i] for i in taken], [labels[i] for i in taken], reader
        self.places = taken
        self.total = len(taken)
        digest = hashlib.sha256("\n".join(f"{n} {c}" for n, c in zip(self.names, self.labels, strict=True)).encode())
        self.facts = {**facts, "images": self.total, "list": digest.hexdigest()[:16]}
        self.transform: Transform | None = None

    def __getitem__(self, key: int) -> _Item:
        assert self.transform is not None
        label, name = self.labels[key], self.names[key]
        try:
            return _Item(key, label, self.transform(self.reader(self.places[key])), name, "")
        except Exception as error:
            return _Item(key, label, None, name, _reason(error))

    def batches(
        self, transform: Transform, size: int, workers: int, rank: int, count: int, done: Collection[int], pin: bool
    ) -> DataLoader:
        self.transform = transform
        assert self.total is not None
        blocks = [list(range(start, min(start + size, self.total))) for start in range(0, self.total, size)]
        mine = [block for block in blocks[rank::count] if not all(key in done for key in block)]
        return DataLoader(
            self,
            batch_sampler=mine,
            num_workers=min(workers, len(mine)),
            collate_fn=_Collate(size),
            pin_memory=pin,
        )


@dataclass(frozen=True)
class _Collate:
    size: int

    def __call__(self, items: Sequence[_Item]) -> Batch:
        return _batch(items[0].key // self.size, items)


def _batch(number: int, items: Sequence[_Item]) -> Batch:
    good = [item for item in items if item.image is not None]
    images = torch.stack([item.image for item in good if item.image is not None]) if good else torch.empty(0)
    bad = [(item.key, item.label, item.name, item.reason) for item in items if item.image is None]
    return Batch(number, [item.key for item in good], [item.label for item in good], images, bad)


def _reason(error: Exception) -> str:
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "its bytes", brief(error))


def _picture(data: bytes) -> Image:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as file:
        return file.convert("RGB")


@dataclass(frozen=True)
class _FromFiles:
    paths: list[Path]

    def __call__(self, number: int) -> Image:
        return _picture(self.paths[number].read_bytes())


@dataclass(frozen=True)
class _FromTar:
    """Reads members where they lie: nothing is unpacked, and workers share no file position."""

    path: Path
    spans: list[tuple[int, int]]

    def __call__(self, number: int) -> Image:
        start, size = self.spans[number]
        with self.path.open("rb") as file:
            file.seek(start)
            return _picture(file.read(size))


@dataclass(frozen=True, eq=False)
class _FromScenes:
    images: Tensor  #: (N, 3, S, S) uint8

    def __call__(self, number: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.images[number].permute(1, 2, 0).numpy())


def _scenes(source: Source, into: _Classes) -> ImageData:
    require("demo", "sklearn", "skimage", what="--data scenes")
    from tokred.data.scenes import DigitScenes

    split = source.split or "test"
    if split not in ("test", "val"):
        raise InvalidParameterError(f"--split {split}: scenes have test and val")
    for given, option in ((source.labels, "--labels"), (source.class_map, "--class-map")):
        if given is not None:
            raise InvalidParameterError(f"{option} is for images of yours; scenes bring their labels")
    if into.count != 10:
        raise InvalidParameterError(
            f"the scenes have 10 classes, the digits, and the model {into.count}; give --data a folder, a tar, hf:<id>"
        )
    scenes = DigitScenes(split, source.seed).render(source.count or SCENES)
    names = [f"scene {number}" for number in range(len(scenes.labels))]
    facts = {"data": "scenes", "split": split, "seed": source.seed}
    return _Listed(facts, names, scenes.labels.tolist(), _FromScenes(scenes.images))


def _folder(root: Path, source: Source, into: _Classes) -> ImageData:
    found = sorted(
        Path(folder, name).relative_to(root)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
    if not found:
        raise InvalidParameterError(f"{root} holds no images ({', '.join(SUFFIXES)}){_instead(root)}")
    folders = sorted({path.parts[0] for path in found if len(path.parts) > 1})
    if {"train", "val"} <= set(folders) and len(folders) <= 3:
        raise InvalidParameterError(f"{root} holds the splits {', '.join(folders)}; give one: --data {root / 'val'}")
    names = [path.as_posix() for path in found]
    labels = _labels(names, 0, str(root), source, into)
    facts = {"data": str(root.resolve())}
    return _Listed(facts, names, labels, _FromFiles([root / path for path in found]), source.count)


def _instead(root: Path) -> str:
    for path in sorted(root.rglob("*"))[:10_000]:
        if path.suffix == ".tar":
            return f"; a tar is given by itself: --data {path}"
        if path.suffix == ".parquet":
            return f"; parquet files are read as a data set: --data hf:{root}"
    return ""


def _tar(path: Path, source: Source, into: _Classes) -> ImageData:
    try:
        with tarfile.open(path, "r:") as file:  # an uncompressed one: members can be read where they lie
            members = [member for member in file if member.isfile()]
    except tarfile.ReadError as error:
        packed = _is_compressed(path)
        raise InvalidParameterError(
            f"{path} is compressed; unpack it to a plain tar or a folder, so that it can be read in any order"
            if packed
            else f"{path} is no whole tar ({error}); expected a folder, a tar, hf:<id>, or the word: scenes"
        ) from error
    images = sorted((m.name, m.offset_data, m.size) for m in members if m.name.lower().endswith(SUFFIXES))
    if not images:
        inner = next((member.name for member in members if member.name.endswith(".tar")), None)
        hint = (
            f"; it holds tars such as {inner}, as the training archive does: take the validation archive"
            if inner
            else ""
        )
        raise InvalidParameterError(f"{path} holds no images ({', '.join(SUFFIXES)}){hint}")
    names = [name.removeprefix("./") for name, _, _ in images]
    labels = _labels(names, -2, str(path), source, into)
    spans = [(start, size) for _, start, size in images]
    return _Listed({"data": str(path.resolve())}, names, labels, _FromTar(path, spans), source.count)


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK"))


# -- labels of a list --------------------------------------------------------------------------------------------------


def _labels(names: Sequence[str], level: int, what: str, source: Source, into: _Classes) -> list[int]:
    """The class of each image, from --labels or from the folder it lies in, which is at `level` of its path."""
    if source.labels is None:
        folders = [name.split("/")[level] if "/" in name else "" for name in names]
        if len(set(folders)) < 2 and (into.map is None or "" in folders):
            raise InvalidParameterError(
                f"{what} has no class folders, so its labels are missing: give --labels, the devkit "
                "(ILSVRC2012_devkit_t12.tar.gz), or a text file with lines of an image's name and its class"
            )
        if "" in folders:
            raise InvalidParameterError(f"{what}: {names[folders.index('')]} lies beside the class folders, in none")
        index = into.of(sorted(set(folders)), what)
        return [index[folder] for folder in folders]
    given = _read_labels(source.labels)
    if isinstance(given, list):  # in the order of the images
        if len(given) != len(names):
            raise InvalidParameterError(f"{source.labels} has {len(given)} labels, and {what} {len(names)} images")
        values: list[str | int] = given
    else:
        stems = [Path(name).name.split(".")[0] for name in names]
        missing = next((name for name, stem in zip(names, stems, strict=True) if stem not in given), None)
        if missing is not None:
            raise InvalidParameterError(f"{source.labels} has no label of {missing}")
        values = [given[stem] for stem in stems]
    ids = {value for value in values if isinstance(value, str)}
    index = into.of(sorted(ids), str(source.labels)) if ids else {}
    return [
        index[value] if isinstance(value, str) else into.check(value, name)
        for value, name in zip(values, names, strict=True)
    ]


def _read_labels(path: Path) -> list[str | int] | dict[str, str | int]:
    """ImageNet's ids or numbers of classes: of all images in order, or {name without ending: class}.

    Read are the devkit (archive or folder; its numbers are its own, and meta.mat says which ids they are), one id a
    line, lines of a name and a class, and Kaggle's LOC_val_solution.csv.
    """
    if path.is_dir() or ".tar" in path.name or path.suffix == ".tgz":
        return _devkit(path)
    lines = [line.replace(",", " ").split() for line in _text(path, "--labels").splitlines() if line.strip()]
    if lines and lines[0][0] == "ImageId":
        lines = lines[1:]
    if not lines:
        raise InvalidParameterError(f"--labels {path} is empty")
    if all(len(line) == 1 for line in lines):
        words = [line[0] for line in lines]
        if not all(word.isdigit() for word in words):
            return list(words)
        if (path.parent / "meta.mat").is_file():
            return _in_ids([int(word) for word in words], (path.parent / "meta.mat").read_bytes(), path)
        raise InvalidParameterError(
            f"--labels {path}: the label map is missing. The devkit's ground truth has numbers of its own, which its "
            "meta.mat turns into classes: give the devkit (ILSVRC2012_devkit_t12.tar.gz), or put meta.mat beside it"
        )
    if any(len(line) < 2 for line in lines):
        raise InvalidParameterError(f"--labels {path}: expected a name and a class in each line")
    return {Path(line[0]).name.split(".")[0]: int(line[1]) if line[1].isdigit() else line[1] for line in lines}


def _devkit(path: Path) -> list[str | int]:
    truth, meta = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
    found: dict[str, bytes] = {}
    if path.is_dir():
        for name in (truth, meta):
            places = sorted(path.rglob(name))
            if places:
                found[name] = places[0].read_bytes()
    else:
        try:
            with tarfile.open(path, "r:*") as file:
                for member in file:
                    name = Path(member.name).name
                    data = file.extractfile(member) if name in (truth, meta) else None
                    if data is not None:
                        found[name] = data.read()
        except (tarfile.ReadError, EOFError, zlib.error) as error:
            raise InvalidParameterError(f"--labels {path} is no devkit: {error}") from error
    for name in (truth, meta):
        if name not in found:
            raise InvalidParameterError(f"--labels {path} is no devkit of ImageNet: it holds no {name}")
    try:
        numbers = [int(word) for word in found[truth].split()]
    except ValueError as error:
        raise InvalidParameterError(f"--labels {path}: {truth} does not hold numbers") from error
    return _in_ids(numbers, found[meta], path)


def _in_ids(numbers: Sequence[int], meta: bytes, path: Path) -> list[str | int]:
    """The devkit's numbers (ILSVRC2012_ID, from 1) as ids."""
    require("eval", "scipy", what="the devkit's meta.mat")
    from scipy.io import loadmat

    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
        return [ids[number] for number in numbers]
    except Exception as error:
        raise InvalidParameterError(f"--labels {path}: meta.mat does not name every class: {_reason(error)}") from error


# -- a data set that streams -------------------------------------------------------------------------------------------


class _Streamed(ImageData):
    """A data set of `datasets`, read as a stream: from the hub, or from a folder of parquet files or images.

    Row p of shard s has the key ``p * shards + s``; a batch is made of neighbours in one shard.
    """

    def __init__(self, source: Source, into: _Classes) -> None:
        require("eval", "datasets", what=f"--data {source.data}")
        if source.labels is not None:
            raise InvalidParameterError("--labels is for a tar or a folder; a data set has a column: --label-column")
        self.source, self.into = source, into
        self.stream, self.split = _load(source)
        self.image, self.label = self._columns()
        self.index = self._classes()
        first = next(iter(self.stream.select_columns([self.label])), None)
        if first is None:
            raise InvalidParameterError(f"{source.data} holds no rows in the split {self.split}")
        self.class_of(first[self.label], "the first row")
        self.shards = int(self.stream.num_shards)
        known = (self.stream.info.splits or {}).get(self.split)
        self.total = getattr(known, "num_examples", None) or None
        if source.count is not None:
            self.total = min(source.count, self.total or source.count)
        self.facts = {
            "data": source.data,
            "config": source.config,
            "split": self.split,
            "shards": self.shards,
            "columns": [self.image, self.label],
            "count": source.count,
        }

    def _columns(self) -> tuple[str, str]:
        import datasets

        features = self.stream.features
        if features is None:
            row = next(iter(self.stream), None)
            features = dict.fromkeys(row or ())
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        pictures += [name for name in ("image", "img", "jpg", "jpeg", "png", "webp") if name in features]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        labels += [name for name in ("label", "labels", "cls", "fine_label") if name in features]
        chosen = []
        for option, given, found in (
            ("--image-column", self.source.image_column, pictures),
            ("--label-column", self.source.label_column, labels),
        ):
            if given is not None and given not in features:
                raise InvalidParameterError(
                    f"{option} {given}: the columns are {', '.join(features)}{nearest(given, features)}"
                )
            if given is None and not found:
                raise InvalidParameterError(
                    f"{self.source.data} has no column that is plainly that of {option[2:].split('-')[0]}s; the "
                    f"columns are {', '.join(features)}: give {option}"
                )
            chosen.append(given or found[0])
        return chosen[0], chosen[1]

    def _classes(self) -> dict[Any, int] | None:
        """{value of the column: class}; None where values are the classes, or names to be looked up."""
        import datasets

        kind = (self.stream.features or {}).get(self.label)
        if not isinstance(kind, datasets.ClassLabel):
            return None
        names = list(kind.names) if kind.names else [str(number) for number in range(kind.num_classes)]
        named = self.into.of(names, self.source.data)
        return {number: named[name] for number, name in enumerate(names)}

    def class_of(self, value: Any, name: str) -> int:
        if isinstance(value, str):
            return self.into.of([value], f"{name} of {self.source.data}")[value]
        if self.index is None:
            return self.into.check(value, name)
        if value not in self.index:
            return self.into.check(value if value == -1 else None, name)
        return self.index[value]

    def batches(
        self, transform: Transform, size: int, workers: int, rank: int, count: int, done: Collection[int], pin: bool
    ) -> DataLoader:
        part = _Part(self, transform, size, rank, count, frozenset(done))
        return DataLoader(part, batch_size=None, num_workers=workers, pin_memory=pin)


@dataclass(frozen=True, eq=False)
class _Part(IterableDataset):
    """What one process reads of a stream; its workers share it out among them."""

    data: _Streamed
    transform: Transform
    size: int
    rank: int
    count: int
    done: frozenset[int]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        here, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        readers, reader = self.count * workers, self.rank * workers + here
        shards = self.data.shards
        for shard in range(shards):
            sharing = [r for r in range(readers) if r % shards == shard] or [shard % readers]
            if reader in sharing:
                yield from self._shard(shard, sharing.index(reader), len(sharing))

    def _shard(self, shard: int, turn: int, sharing: int) -> Iterator[Batch]:
        import datasets

        data, last = self.data, self.data.source.count
        stream = data.stream
        if data.shards > 1:
            stream = stream.shard(num_shards=data.shards, index=shard)
        if isinstance((stream.features or {}).get(data.image), datasets.Image):
            stream = stream.cast_column(data.image, datasets.Image(decode=False))
        # `iter`, not a for: that would share rows out among workers once more
        for number, rows in enumerate(stream.iter(batch_size=self.size)):
            keys = [(number * self.size + place) * data.shards + shard for place in range(len(rows[data.label]))]
            if last is not None:
                keys = [key for key in keys if key < last]
            if not keys:
                return
            if number % sharing == turn and not all(key in self.done for key in keys):
                items = [
                    self._item(key, image, label)
                    for key, image, label in zip(keys, rows[data.image], rows[data.label], strict=False)
                ]
                yield _batch(number * data.shards + shard, items)

    def _item(self, key: int, image: Any, value: Any) -> _Item:
        row = f"row {key // self.data.shards} of shard {key % self.data.shards}"
        name = image.get("path") if isinstance(image, Mapping) else None
        name = f"{Path(name).name} ({row})" if name else row
        label = self.data.class_of(value, name)
        try:
            return _Item(key, label, self.transform(_opened(image)), name, "")
        except Exception as error:
            return _Item(key, label, None, name, _reason(error))


def _opened(image: Any) -> Image:
    if isinstance(image, Mapping):
        return _picture(image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes())
    if isinstance(image, bytes):
        return _picture(image)
    return image.convert("RGB")


def _load(source: Source) -> tuple[Any, str]:
    """The stream and its split."""
    import datasets

    name = source.data.removeprefix("hf:")
    where = Path(name)
    if where.is_dir() and (where / "state.json").is_file():
        found = datasets.load_from_disk(name)
        return found.to_iterable_dataset(), source.split or str(found.split or "all")
    if where.is_dir() and (where / "dataset_dict.json").is_file():
        parts = datasets.load_from_disk(name)
        split = source.split or "validation"
        if split not in parts:
            raise InvalidParameterError(_no_split(name, split, parts))
        return parts[split].to_iterable_dataset(), split
    try:
        parts = load_data_set(name, source.config, streaming=True)
    except Exception as error:
        if not where.exists() and unreachable(error):
            raise InvalidParameterError(
                what_to_do(f"the data set {name!r}", "give a folder, a tar, or hf:<folder> with parquet files")
            ) from error
        raise InvalidParameterError(
            f"datasets cannot open {name!r}: {_reason(error)}; expected hf: and the id of a data set, or a folder of "
            "parquet files"
        ) from error
    split = source.split or "validation"
    if split not in parts:
        raise InvalidParameterError(_no_split(name, split, parts))
    return parts[split], split


def _no_split(name: str, split: str, parts: Mapping[str, Any]) -> str:
    return f"{name} has no split {split!r}{nearest(split, parts)}; there are: {', '.join(parts)}; give --split"
