"""Pictures in: cards, folders, and what `to_pixels` takes."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tokred.core.errors import InvalidParameterError
from tokred.generation.images import to_pil, to_pixels

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from tokred.data.cards import BACKGROUNDS, CAPTION_WORDS, DIGIT_WORDS, DigitCards, on_scene
from tokred.data.pictures import CardPictures, FolderPictures, open_pictures


def test_a_card_does_not_depend_on_what_it_is_asked_with():
    cards = DigitCards("val", 3)
    whole, part = cards.batch(0, 130), cards.batch(60, 10)
    assert all(torch.equal(a[60:70], b) for a, b in zip(whole, part, strict=True))
    assert not torch.equal(whole.images, DigitCards("val", 4).render(130).images)
    assert not torch.equal(whole.images, DigitCards("test", 3).render(130).images)


def test_captions_say_what_is_there():
    cards = DigitCards("val", 0).render(64)
    for label, background, place, text in zip(
        cards.labels.tolist(), cards.backgrounds.tolist(), cards.places.tolist(), cards.captions, strict=True
    ):
        assert set(text.split()) <= set(CAPTION_WORDS)
        assert f" {DIGIT_WORDS[label]} on {list(BACKGROUNDS)[background]} , " in text
        assert text.endswith(("left", "in the middle", "right")[place])
    # the digit is the brightest part, and lies where the caption says
    light = cards.images.float().amax(1)
    light = (light - light.mean((1, 2), keepdim=True)).clamp_min(0)
    column = (light.sum(1) * torch.arange(32)).sum(1) / light.sum((1, 2))
    means = [float(column[cards.places == place].mean()) for place in range(3)]
    assert means == sorted(means)
    assert means[2] - means[0] > 5


def test_on_scene_keeps_the_card():
    cards = DigitCards("val", 0).render(2)
    scenes = on_scene(cards.images)
    assert scenes.shape == (2, 3, 96, 96)
    assert torch.equal(scenes[:, :, 32:64, 32:64], cards.images)
    assert (scenes[0, :, 0, 0].float() - cards.images[0].float().mean((1, 2))).abs().max() <= 0.5


def test_card_batches_resume():
    pictures = open_pictures("cards", seed=5)
    assert isinstance(pictures, CardPictures)
    first = list(islice(pictures.train(4), 3))
    again = next(pictures.train(4, start=2))
    assert torch.equal(first[2].images, again.images)
    assert first[2].captions == again.captions
    assert not torch.equal(first[0].images, next(pictures.train(4, rank=1, world=2)).images)
    held = list(pictures.held_out(70, batch=64))
    assert [len(batch.images) for batch in held] == [64, 6]
    assert held[0].images.min() >= -1
    assert held[0].images.max() <= 1
    with pytest.raises(InvalidParameterError, match="size=64"):
        open_pictures("cards", 64)


def picture(path, shade, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def shades(batch):
    return (127.5 * (batch.images[:, 0, 0, 0] + 1)).round().int().tolist()


def test_folders_of_classes(tmp_path):
    for i in range(6):
        picture(tmp_path / ("cat" if i % 2 else "ant") / f"{i}.png", 10 * i)
    pictures = FolderPictures(tmp_path, 32, held_out=2)
    assert pictures.classes == ("ant", "cat")
    kept = [shade for batch in pictures.held_out(10) for shade in shades(batch)]
    assert len(kept) == 2
    epoch = list(islice(pictures.train(2), 2))
    seen = [shade for batch in epoch for shade in shades(batch)]
    assert sorted(seen + kept) == [0, 10, 20, 30, 40, 50]
    for batch in epoch:
        assert batch.images.shape == (2, 3, 32, 32)
        assert [shade // 10 % 2 for shade in shades(batch)] == batch.labels.tolist()
    # resumed, and shared between processes
    assert shades(next(pictures.train(2, start=1))) == shades(epoch[1])
    parts = [shades(next(pictures.train(2, rank=rank, world=2))) for rank in range(2)]
    assert not set(parts[0]) & set(parts[1])


def test_folders_with_captions(tmp_path):
    rows = []
    for i in range(4):
        picture(tmp_path / f"{i}.png", 10 * i)
        rows.append(json.dumps({"image": f"{i}.png", "caption": f"shade {10 * i}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows) + "\n")
    pictures = FolderPictures(tmp_path, 16)
    assert pictures.classes == ()
    batch = next(pictures.train(4))
    assert batch.labels is None
    assert batch.captions == [f"shade {shade}" for shade in shades(batch)]
    with pytest.raises(InvalidParameterError, match="none to train on"):
        next(FolderPictures(tmp_path, 16, held_out=4).train(1))
    (tmp_path / "captions.jsonl").write_text('{"image": "none.png", "caption": "a"}\n')
    with pytest.raises(InvalidParameterError, match=r"none\.png"):
        FolderPictures(tmp_path, 16)
    (tmp_path / "captions.jsonl").write_text("a cat\n")
    with pytest.raises(InvalidParameterError, match="line 1"):
        FolderPictures(tmp_path, 16)


def test_classes_and_captions_go_together(tmp_path):
    for name in ("ant", "cat"):
        picture(tmp_path / name / "0.png", 0)
    rows = [json.dumps({"image": f"{name}/0.png", "caption": f"one {name}"}) for name in ("ant", "cat")]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    batch = next(FolderPictures(tmp_path, 16).train(2))
    assert batch.captions == [f"one {('ant', 'cat')[label]}" for label in batch.labels.tolist()]


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidParameterError, match="no such folder"):
        FolderPictures(tmp_path / "none", 32)
    with pytest.raises(InvalidParameterError, match="0 pictures"):
        FolderPictures(tmp_path, 32)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InvalidParameterError, match=r"a\.png cannot be read"):
        next(FolderPictures(tmp_path, 32).train(1))


def test_pixels_of_every_kind_of_picture():
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = tensor.float()[None] / 127.5 - 1
    for given in (array, Image.fromarray(array), tensor, tensor[None], wanted, [array], [tensor]):
        assert torch.equal(to_pixels(given), wanted)
    assert np.array_equal(np.asarray(to_pil(wanted)[0]), array)
    assert to_pixels([array, tensor]).shape == (2, 3, 8, 8)
    assert to_pixels(wanted.double()).dtype == torch.float32
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.equal(to_pixels(clear), torch.ones(1, 3, 4, 4))  # white behind what is transparent
    assert to_pixels(Image.new("L", (6, 4), 255), 4).shape == (1, 3, 4, 4)


@pytest.mark.parametrize(("width", "height"), [(50, 33), (33, 50), (32, 32), (7, 90)])
def test_shorter_side_then_centre(width, height):
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3)).copy()
    found = to_pixels(Image.fromarray(ramp), 32)
    assert found.shape == (1, 3, 32, 32)
    middle = 127.5 * (float(found[0, 0, :, 15:17].mean()) + 1)
    assert middle == pytest.approx((width - 1) / 2, abs=1.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "at least one image"),
        ("a.png", "open a file with PIL"),
        (np.zeros((4, 4), np.uint8), "expected \\(H, W, 3\\)"),
        (np.zeros((4, 4, 3), np.float32), "of float32"),
        (torch.zeros(4, 4), "expected \\(B, 3, H, W\\)"),
        (torch.zeros(0, 3, 4, 4), "with B >= 1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "torch.int64"),
        (torch.full((3, 4, 4), 255.0), "divide 0..255"),
        (torch.full((3, 4, 4), float("nan")), "finite"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 8, 8)], "different sizes"),
    ],
)
def test_pictures_that_are_none(given, told):
    with pytest.raises(InvalidParameterError, match=told):
        to_pixels(given)
