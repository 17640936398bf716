"""Raw material of the digit scenes: handwritten digits, photographs, stroke fragments.

Nothing is downloaded: the digits come from ``sklearn.datasets.load_digits`` and the photographs are files that lie
inside the scikit-image and scikit-learn wheels, read directly (scikit-image's own loaders may fetch a file from the
network). Both packages are needed to *make* scenes, not to use a bundled model: they are imported inside the functions.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "val", "test")

#: Share of the 1,797 digits that ends each split (train 70 %, val 10 %, test 20 %), after one fixed permutation.
_DIGIT_BOUNDS = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}

#: Photographs of each split; ``sklearn:`` marks files of scikit-learn, the rest are scikit-image's.
PHOTOS: dict[str, tuple[str, ...]] = {
    "train": (
        "coffee.png",
        "astronaut.png",
        "chelsea.png",
        "brick.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "page.png",
        "camera.png",
        "motorcycle_right.png",
        "sklearn:china.jpg",
    ),
    "val": ("rocket.jpg", "clock_motion.png", "cell.png", "microaneurysms.png"),
    "test": ("grass.png", "coins.png", "text.png", "ihc.png", "retina.jpg", "sklearn:flower.jpg"),
}

#: What the packages say about each file (docstrings of ``skimage.data``, README beside scikit-learn's images).
PHOTO_LICENCES: dict[str, str] = {
    "coffee.png": "CC0, Rachel Michetti",
    "astronaut.png": "public domain, NASA",
    "chelsea.png": "CC0, Stefan van der Walt",
    "brick.png": "CC0, CC0Textures",
    "gravel.png": "CC0, CC0Textures",
    "hubble_deep_field.jpg": "public domain, NASA",
    "page.png": "no licence stated by scikit-image",
    "camera.png": "CC0, Lav Varshney",
    "motorcycle_right.png": "Middlebury stereo benchmark 2014, no licence stated by scikit-image",
    "sklearn:china.jpg": "CC BY 2.0, danielbuechele (Flickr)",
    "rocket.jpg": "public domain, SpaceX",
    "clock_motion.png": "public domain, Stefan van der Walt",
    "cell.png": "CC0, Paul Mueller et al.",
    "microaneurysms.png": "CC0, Andreas Maier",
    "grass.png": "CC0",
    "coins.png": "no known copyright restrictions",
    "text.png": "public domain",
    "ihc.png": "no known copyright restrictions",
    "retina.jpg": "CC0",
    "sklearn:flower.jpg": "CC BY 2.0, vultilion (Flickr)",
}

DIGITS_SOURCE = "sklearn.datasets.load_digits: UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak"

PHOTO_SIDE = 256
_STROKES = 1500
#: Seeds of the stroke banks; a bank is never shared between splits.
_STROKE_SEEDS = {"train": 1, "test": 2, "val": 3}


class Banks(NamedTuple):
    """Material of one split, all float32 in [0, 1]."""

    digits: Tensor  #: (D, 8, 8)
    labels: Tensor  #: (D,) int64
    photos: Tensor  #: (P, 3, 256, 256)
    strokes: Tensor  #: (1500, 8, 8)


def _need(package: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'making digit scenes needs {package!r}, which is not installed; run: pip install "tokred[train]"'
        ) from error


def digit_indices(split: str) -> np.ndarray:
    """Rows of ``load_digits`` that belong to ``split``; by sample, as the file does not say who wrote a digit."""
    order = np.random.RandomState(0).permutation(1797)
    first, last = (int(len(order) * share) for share in _DIGIT_BOUNDS[split])
    return order[first:last]


def _load_digits(split: str) -> tuple[Tensor, Tensor]:
    images, labels = _need("sklearn.datasets").load_digits(return_X_y=True)
    rows = digit_indices(split)
    digits = torch.as_tensor(images[rows] / 16.0, dtype=torch.float32).view(-1, 8, 8)
    return digits, torch.as_tensor(labels[rows], dtype=torch.int64)


def _photo_path(name: str) -> Path:
    if name.startswith("sklearn:"):
        root = Path(str(_need("sklearn.datasets").__file__)).parent / "images"
        return root / name.removeprefix("sklearn:")
    return Path(str(_need("skimage.data").__file__)).parent / name


def _load_photo(name: str) -> Tensor:
    """Centre square crop, resized by area averaging: (3, 256, 256) in [0, 1]."""
    from PIL import Image  # a dependency of scikit-image

    with Image.open(_photo_path(name)) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB")))
    photo = pixels.permute(2, 0, 1).float() / 255
    height, width = photo.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    photo = photo[:, top : top + side, left : left + side]
    return F.interpolate(photo[None], size=(PHOTO_SIDE, PHOTO_SIDE), mode="area")[0]


def stroke_bank(seed: int, count: int = _STROKES) -> Tensor:
    """Random quadratic Bezier curves drawn on the digits' 8x8 grid: (count, 8, 8). They look like digit fragments."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (7 * torch.rand(count, 1, 2, generator=generator) for _ in range(3))
    t = torch.linspace(0, 1, 12).view(1, -1, 1)
    points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(1, -1, 1, 2)
    squared = (grid - points[:, None]).square().sum(-1)
    return torch.exp(-squared.amin(-1)).view(count, 8, 8)


@lru_cache(maxsize=len(SPLITS))
def load_banks(split: str) -> Banks:
    """Digits, photographs and strokes of ``split``; every item belongs to one split only.

    Raises ``ValueError`` for an unknown split and ``ImportError`` without scikit-learn or scikit-image.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    digits, labels = _load_digits(split)
    photos = torch.stack([_load_photo(name) for name in PHOTOS[split]])
    return Banks(digits, labels, photos, stroke_bank(_STROKE_SEEDS[split]))
