"""Digit scenes: the same for ever, whatever the batch size, and disjoint between splits."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tokred import zoo
from tokred.data import DigitScenes, SceneStyle, checksum, checksum_matches, normalize, patch_coverage
from tokred.data.banks import PHOTO_LICENCES, PHOTOS, SPLITS, digit_indices, load_banks

pytest.importorskip("sklearn")
pytest.importorskip("skimage")


def test_shapes_and_ranges() -> None:
    images, labels, masks = DigitScenes("val", seed=3).render(5)
    assert images.shape == (5, 3, 96, 96)
    assert images.dtype == torch.uint8
    assert labels.shape == (5,)
    assert set(labels.tolist()) <= set(range(10))
    assert masks.shape == (5, 96, 96)
    assert 0 <= masks.min() <= masks.max() <= 1
    coverage = patch_coverage(masks)
    assert coverage.shape == (5, 144)
    assert (coverage.max(1).values > 0.12).all(), "every scene shows its digit"
    torch.testing.assert_close(normalize(images), (images / 255 - 0.5) / 0.25)


def test_scene_does_not_depend_on_the_batch() -> None:
    whole = DigitScenes("test", seed=9).batch(0, 130)
    other = DigitScenes("test", seed=9)
    for start, n in ((60, 10), (129, 1), (0, 3)):
        for a, b in zip(whole, other.batch(start, n), strict=True):
            assert torch.equal(a[start : start + n], b)


def test_seed_and_split_change_the_scenes() -> None:
    first = DigitScenes("test", seed=0).render(4).images
    assert not torch.equal(first, DigitScenes("test", seed=1).render(4).images)
    assert not torch.equal(first, DigitScenes("val", seed=0).render(4).images)


def test_scenes_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    DigitScenes("val", seed=4).render(2)
    assert torch.equal(state, torch.get_rng_state())


def test_splits_share_nothing() -> None:
    rows = np.concatenate([digit_indices(split) for split in SPLITS])
    assert sorted(rows) == list(range(1797))
    photos = [name for split in SPLITS for name in PHOTOS[split]]
    assert len(set(photos)) == len(photos)
    assert set(photos) == set(PHOTO_LICENCES)
    strokes = torch.cat([load_banks(split).strokes for split in SPLITS]).flatten(1)
    assert len(strokes.unique(dim=0)) == len(strokes)


def test_the_mask_marks_the_digit() -> None:
    """Without clutter, contrast and noise the bright pixels are the mask's."""
    style = SceneStyle(contrast=(0, 0), strokes=(0, 1), stroke_opacity=(0, 0), noise=0)
    images, _, masks = DigitScenes("val", seed=0, style=style).render(16)
    gain = images.float().mean(1) - images.float().mean(1).amin((1, 2), keepdim=True)
    inside = (gain * (masks > 0.5)).sum((1, 2)) / gain.sum((1, 2))
    assert inside.min() > 0.6
    assert (gain[masks == 0]).max() <= 1


def test_checksum_is_the_cards() -> None:
    stored = zoo.card("digit-vit")["checksum"]
    made = checksum(DigitScenes(stored["split"], stored["seed"]).render(stored["scenes"]))
    assert checksum_matches(made, {key: stored[key] for key in made})
    other = checksum(DigitScenes(stored["split"], stored["seed"] + 1).render(stored["scenes"]))
    assert not checksum_matches(made, other)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_banks.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"tokred\[train\]\""):
        DigitScenes("val")


@pytest.mark.parametrize(("split", "seed"), [("validation", 0), ("test", -1)])
def test_bad_arguments(split: str, seed: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        DigitScenes(split, seed)
