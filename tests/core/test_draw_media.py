"""Pictures of images and videos that were reduced before a language model: the right pixels, counts and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tokred
from tests.matrix.vlm_models import FAMILIES
from tests.methods.visual import mosaic, single, video
from tokred.core.draw_media import _Canvas, _grid_of
from tokred.core.errors import InvalidParameterError
from tokred.core.sites import MediaLayout
from tokred.core.tokens import Keep, TokenTable
from tokred.core.trace import MediaStep, Trace

RAMP = np.stack(np.meshgrid(np.arange(240), np.arange(160)), -1).astype(np.uint8)
PICTURE = np.concatenate([RAMP, np.full((160, 240, 1), 128, np.uint8)], axis=-1)  # red counts columns, green rows


def trace(layout: MediaLayout, tokens, sample: int = 0) -> Trace:
    return Trace(None, media=[MediaStep.of("chosen", sample, layout, torch.tensor(tokens))])


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# -- one tile ----------------------------------------------------------------------------------------------------------


def test_one_tile_keeps_the_picture_where_tokens_are_kept():
    drawn = array(trace(single(4, 6), [0, 9, 23]).draw(Image.fromarray(PICTURE)))
    assert drawn.shape == PICTURE.shape
    for row in range(4):
        for column in range(6):
            cell = (slice(40 * row, 40 * row + 40), slice(40 * column, 40 * column + 40))
            kept = row * 6 + column in (0, 9, 23)
            assert np.array_equal(drawn[cell], PICTURE[cell]) == kept


def test_what_a_patched_model_kept():
    tiny = FAMILIES["llava"]
    model, prompt = tiny.make(), tiny.inputs([[3, "image", 2], ["image", 4, "image"]])
    with torch.no_grad(), tokred.patch(model, tokred.HiRED(budget=0.25)) as patch:
        model(**prompt.inputs)
    kept = [step.mask.sum().item() for step in patch.trace.media]
    assert kept == [4, 4, 4]
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pictures = [array(patch.trace.draw(noise, sample=row, item=item)) for row, item in ((0, 0), (1, 0), (1, 1))]
    for picture, step in zip(pictures, patch.trace.media, strict=True):
        unchanged = (picture == noise).all(-1).reshape(4, 8, 4, 8).all((1, 3)).ravel()
        assert unchanged.tolist() == step.mask[0].tolist()
    assert not np.array_equal(pictures[0], pictures[2])


# -- tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(512, 512), (200, 512), (512, 180), (300, 700)])
def test_the_canvas_is_what_the_processor_cuts_into_tiles(height, width):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    rows, columns = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    picture = torch.stack([rows, columns, (rows + columns) / 2], -1).byte().numpy()
    processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 96},
        crop_size={"height": 96, "width": 96},
        image_grid_pinpoints=[[96, 192], [192, 96], [192, 192], [96, 288]],
        do_normalize=False,
    )
    given = processor(images=Image.fromarray(picture), return_tensors="pt")
    tiles = given["pixel_values"][0].permute(0, 2, 3, 1).numpy()
    across = {2: [(1, 2), (2, 1)][height > width], 3: (1, 3), 4: (2, 2)}[len(tiles) - 1]
    layout = mosaic(across, (12, 12), (height, width))
    canvas = _Canvas.of(layout, picture / 255.0)
    whole = np.zeros((canvas.height, canvas.width, 3))
    whole[canvas.top :][: len(canvas.picture), canvas.left :][:, : canvas.picture.shape[1]] = canvas.picture
    for tile, (left, top, right, bottom) in canvas._tiles():
        seen = Image.fromarray((whole[top:bottom, left:right] * 255).astype(np.uint8)).resize((96, 96))
        difference = np.abs(np.asarray(seen) / 255.0 - tiles[tile]).max(-1)
        assert np.quantile(difference, 0.9) < 0.02  # but for the edge of the padding


def test_mosaic_shows_the_right_pixels_and_counts():
    layout = mosaic((2, 2), (4, 4), (160, 240), cut_rows=1)  # 160 x 240 in a square: rows are cut
    own = [i for i, cell in enumerate(layout.cells) if cell in (0, 16 + 6, 64 + 9)]  # overview, first and last tile
    drawn = array(trace(layout, own).draw(PICTURE))
    canvas = _Canvas.of(layout, PICTURE / 255.0)
    assert drawn.shape[1] == 2 * canvas.width + 30  # side by side
    assert canvas.height == canvas.width
    assert canvas.top > 0
    assert canvas.left == 0
    panel = drawn[10 : 10 + canvas.height, 20 + canvas.width :][:, : canvas.width]
    cell = canvas.width // 8
    for row, column, kept in ((1, 2, True), (6, 5, True), (3, 3, False), (6, 2, False)):
        y, x = row * cell + cell // 2, column * cell + cell // 2
        expected = PICTURE[int((y - canvas.top) / canvas.width * 240), int(x / canvas.width * 240)]
        assert (np.abs(panel[y, x] - expected).max() <= 4) == kept
    assert (panel[canvas.top // 2, canvas.width // 2 + 20] == 255).all()  # padding stays white
    overview = drawn[10 + canvas.top :, 10:][: canvas.height - 2 * canvas.top, : canvas.width]
    assert np.abs(overview[10, 10] - PICTURE[2, 4]).max() <= 6
    assert np.abs(overview[10, canvas.width // 2] - PICTURE[2, 120]).max() > 20


def test_wide_images_are_stacked_and_small_ones_enlarged():
    layout = mosaic((1, 3), (4, 4), (80, 240))
    drawn = trace(layout, [0, 20]).draw(PICTURE[:80])
    canvas = _Canvas.of(layout, PICTURE[:80] / 255.0)
    assert canvas.width >= 480
    assert drawn.width == canvas.width + 20
    assert drawn.height > 2 * canvas.height


def test_a_mosaic_whose_tokens_were_resampled():
    tiny = FAMILIES["llava_onevision"]
    config = tiny.config()
    config.vision_aspect_ratio = "anyres_max_1"
    model, prompt = tiny.make(config=config), tiny.inputs([[3, "image"]])
    inner = tokred.adapters.vlm_families.LlavaOnevision(model.model)
    layout = inner.layout_of((30, 30))
    assert not layout.uniform
    tokens = [0, 5, len(layout.cells) - 1]
    drawn = trace(layout, tokens).draw(np.full((30, 30, 3), 200, np.uint8))
    assert drawn.width > drawn.height
    plain = trace(layout, list(range(len(layout.cells)))).draw(np.full((30, 30, 3), 200, np.uint8))
    assert (array(plain)[12:500, 12:500] == 200).all()
    assert not (array(drawn)[12:500, 12:500] == 200).all()
    del prompt


def test_of_a_mosaic_the_whole_image_is_asked_for():
    made = trace(mosaic((2, 2), (4, 4), (160, 240)), [0, 20])
    made.draw(Image.fromarray(PICTURE).resize((121, 80)))  # a resized copy
    with pytest.raises(InvalidParameterError, match=r"image is 160 x 160 .* the traced one was 240 x 160"):
        made.draw(PICTURE[:, :160])
    with pytest.raises(InvalidParameterError, match="this item is one image"):
        made.draw([PICTURE])


# -- frames ------------------------------------------------------------------------------------------------------------


def frames(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (count, 60, 90, 3), dtype=np.uint8)


def test_frames_without_tokens_fade_and_each_has_its_bar():
    layout = video(3, 3, 4)
    drawn = array(trace(layout, [*range(12), 14, 20]).draw(frames(3)))
    assert drawn.shape[1] == 3 * (168 + 10) + 10
    full, some, none = (drawn[28 : 28 + 112, 10 + 178 * i :][:, :168] for i in range(3))
    assert none.std() < some.std() < full.std()
    bars = drawn[28 + 112 + 18 + 3]
    blue = (bars == [0x25, 0x63, 0xEB]).all(-1)
    assert [int(blue[10 + 178 * i :][:168].sum()) for i in range(3)] == [168, 28, 0]


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_long_videos_wrap(count):
    drawn = trace(video(count, 2, 2), [0]).draw(list(frames(count)))
    rows = {1: 1, 8: 1, 9: 2, 40: 4}[count]
    assert drawn.height == rows * (112 + 18 + 8 + 10) + 18 + 20


def test_resized_frames_show_at_the_resolution_of_their_tokens():
    layout = video(3, 4, 4)
    coarse = [5, 7, 13, 15]  # the cells under the centres of a 2 x 2 grid
    finer = [row * 4 + column for row in (0, 0, 1, 2, 2, 3) for column in (0, 1, 2, 3)]
    assert _grid_of(np.array(coarse), (4, 4)) == (2, 2)
    assert _grid_of(np.array(range(16)), (4, 4)) == (4, 4)
    assert _grid_of(np.array([0, 1, 2, 3]), (4, 4)) is None
    assert _grid_of(np.array([]), (4, 4)) is None
    step = [*coarse, *[16 + cell for cell in (0, 1, 2, 3)], *[32 + cell for cell in range(16)]]
    drawn = array(trace(layout, step).draw(frames(3)))
    first, second, third = (drawn[28 : 28 + 112, 10 + 178 * i :][:, :168] for i in range(3))
    assert len(np.unique(first.reshape(-1, 3), axis=0)) == 4
    assert len(np.unique(second.reshape(-1, 3), axis=0)) > 50
    assert third.std() > second.std()
    assert _grid_of(np.array(finer), (4, 4)) in (None, (6, 4))


def test_quota_on_a_video_model():
    tiny = FAMILIES["llava_next_video"]
    model, prompt = tiny.make(), tiny.inputs([[2, "video"], [4, "video", 1]])
    scores = torch.tensor([0.0, 0.2, 1.0, 0.4])
    with torch.no_grad(), tokred.patch(model, tokred.QuoTA(budget=20, scorer=scores)) as patch:
        model(**prompt.inputs)
    assert patch.trace.media[1].per_partition[0] == 0
    first, second = (array(patch.trace.draw(frames(4), sample=row)) for row in (0, 1))
    assert np.array_equal(first, second)
    faded = first[28 : 28 + 112, 10 : 10 + 168]
    assert faded.std() < first[28 : 28 + 112, 10 + 2 * 178 :][:, :168].std() / 2


def test_models_that_join_frames_show_the_first_of_each():
    made = trace(video(3, 2, 2), [0, 5])
    five = frames(5)
    assert np.array_equal(array(made.draw(five))[28:140], array(made.draw(five[::2]))[28:140])
    with pytest.raises(InvalidParameterError, match="image has 9 frames; the traced video has 4"):
        trace(video(4, 2, 2), [0]).draw(frames(9))
    with pytest.raises(InvalidParameterError, match="image has 2 frames; the traced video has 3"):
        made.draw(frames(2))


def test_channels_may_come_first_and_frames_may_be_tensors():
    made = trace(video(2, 2, 2), [0, 1, 5])
    plain = array(made.draw(frames(2)))
    tensor = torch.from_numpy(frames(2)).permute(0, 3, 1, 2)
    assert np.array_equal(array(made.draw(tensor)), plain)
    assert np.array_equal(array(made.draw([Image.fromarray(frame) for frame in frames(2)])), plain)


# -- which -------------------------------------------------------------------------------------------------------------


def test_steps_samples_and_items():
    table = TokenTable(2, 4, grid=(2, 2)).apply(1, "chosen", Keep(torch.tensor([[0, 1], [2, 3]])))
    media = [
        MediaStep.of("chosen", 0, single(2, 2), torch.tensor([3])),
        MediaStep.of("chosen", 2, single(2, 2), torch.tensor([0])),
        MediaStep.of("chosen", 2, single(2, 2), torch.tensor([1])),
    ]
    both = Trace(table, media=media)

    def kept(**which) -> list[int]:
        white = np.full((4, 4, 3), 255, np.uint8)
        return np.flatnonzero((array(both.draw(white, **which))[::2, ::2] == 255).all(-1)).tolist()

    assert kept() == kept(step=1) == [3]
    assert kept(step=0, sample=1) == kept(step=-2, sample=1) == [2, 3]
    assert kept(sample=2) == [0]
    assert kept(sample=2, item=1) == [1]
    for which, message in (
        ({"step": 2}, "step=2: there are 2 to draw, 0 to 1"),
        ({"sample": 1}, r"sample=1: rows with an image or video are \[0, 2\]"),
        ({"item": 1}, "item=1: row 0 has 1, numbered from 0"),
        ({"sample": 2, "item": -1}, "item=-1"),
        ({"step": 0, "sample": 2}, "sample=2: the batch has 2 images"),
    ):
        with pytest.raises(InvalidParameterError, match=message):
            both.draw(np.zeros((4, 4, 3), np.uint8), **which)
    with pytest.raises(InvalidParameterError, match="no forward pass removed a token"):
        Trace(None).draw(PICTURE)


def test_a_picture_where_frames_are_expected():
    with pytest.raises(InvalidParameterError, match=r"image is of shape \(160, 240, 3\); this item is a video"):
        trace(video(3, 2, 2), [0]).draw(PICTURE)
    with pytest.raises(InvalidParameterError, match="image is a Image; this item is a video"):
        trace(video(3, 2, 2), [0]).draw(Image.fromarray(PICTURE))


def test_a_media_step_reads_like_a_step_of_an_encoder():
    layout = MediaLayout(kind="image", partitions=1, grid=(2, 3), slots=tuple(range(6)))
    step = MediaStep.of("probe", 1, layout, torch.tensor([4, -1, 0]))
    assert (step.layer, step.tokens_in, step.tokens_out, step.valid) == (None, 6, 3, None)
    assert step.origins.tolist() == step.kept.tolist() == [[4, -1, 0]]
    assert step.group.tolist() == [[2, -1, -1, -1, 0, -1]]
    trace = Trace(None, media=[step])
    assert trace.steps == [step]
    assert trace[0] is step
    assert len(trace) == 1
    assert trace.encoder == []
