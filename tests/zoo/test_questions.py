"""Question scenes and clips: the same for ever, answers that are true, nothing shared between splits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tokred import zoo
from tokred.data import DigitClips, QuestionScenes, uniform_frames
from tokred.data.banks import SPLITS, load_banks
from tokred.data.canvas import local_stamps, rotation, stamp
from tokred.data.coloured import COLOUR_NAMES, ColourStyle, boxes_of, plan_scenes, render_coloured
from tokred.data.questions import KINDS, NUMBER_WORDS

pytest.importorskip("sklearn")
pytest.importorskip("skimage")


def test_shapes_and_kinds() -> None:
    batch = QuestionScenes("val", seed=3).batch(0, 20)
    assert batch.images.shape == (20, 3, 96, 96)
    assert batch.images.dtype == torch.uint8
    assert batch.masks.shape == (20, 96, 96)
    assert batch.digit_masks.shape == (20, 4, 96, 96)
    assert torch.equal(batch.masks, batch.digit_masks.amax(1))
    assert Counter(batch.kinds) == dict.fromkeys(KINDS, 4)


def test_answers_are_true() -> None:
    batch = QuestionScenes("test", seed=5).batch(0, 100)
    said = Counter()
    for i, (kind, question, answer) in enumerate(zip(batch.kinds, batch.questions, batch.answers, strict=True)):
        there = batch.classes[i] >= 0
        digits = dict(zip(batch.colours[i][there].tolist(), batch.classes[i][there].tolist(), strict=True))
        words = question.split()
        if kind == "digit_of_colour":
            assert digits[COLOUR_NAMES.index(words[3])] == int(answer)
        elif kind == "colour_of_digit":
            assert digits[COLOUR_NAMES.index(answer)] == int(words[4])
        elif kind == "count":
            assert answer == NUMBER_WORDS[int(there.sum())]
        elif kind == "exists":
            said[answer] += 1
            assert (int(words[3]) in digits.values()) == (answer == "yes")
        else:
            box = batch.boxes[i][batch.classes[i] == int(answer)][0].float()
            centres = (batch.boxes[i][there][:, :2] + batch.boxes[i][there][:, 2:]).float() / 2
            axis = 0 if words[3] in ("left-most", "right-most") else 1
            centre = (box[:2] + box[2:]) / 2
            ends = {"left-most": centres.amin(0), "top-most": centres.amin(0)}
            assert (centre[axis] - ends.get(words[3], centres.amax(0))[axis]).abs() < 5
    assert 5 <= said["yes"] <= 15


def test_scene_does_not_depend_on_the_batch() -> None:
    whole = QuestionScenes("test", seed=9).batch(0, 130)
    other = QuestionScenes("test", seed=9)
    for start, n in ((60, 10), (129, 1), (0, 3)):
        part = other.batch(start, n)
        assert torch.equal(part.images, whole.images[start : start + n])
        assert part.questions == whole.questions[start : start + n]
        assert part.answers == whole.answers[start : start + n]
    assert not torch.equal(whole.images[:4], QuestionScenes("test", seed=8).batch(0, 4).images)
    assert not torch.equal(whole.images[:4], QuestionScenes("val", seed=9).batch(0, 4).images)


def test_digits_come_from_their_split() -> None:
    for split in SPLITS:
        generator = torch.Generator().manual_seed(0)
        plan = plan_scenes(split, 40, generator)
        banks = load_banks(split)
        there = plan.classes >= 0
        assert torch.equal(banks.labels[plan.digit][there], plan.classes[there])
        assert int(plan.photo.max()) < len(banks.photos)
        for row in plan.classes, plan.colours:
            assert all(len(set(r[r >= 0].tolist())) == int((r >= 0).sum()) for r in row)


def test_checksum_is_the_cards() -> None:
    from tokred.zoo.evaluate_digit_vlm import scene_checksum

    stored = zoo.card("digit-vlm")["checksum"]
    made = scene_checksum(QuestionScenes(stored["split"], stored["seed"]).batch(0, stored["scenes"]))
    assert made["questions"] == stored["questions"]
    assert made["answers"] == stored["answers"]
    for key in ("channel_mean", "scene_mean", "mask_area"):
        assert made[key] == pytest.approx(stored[key], abs=0.11)


def test_local_stamps_draw_what_stamp_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = torch.rand(5, 3, 8, 8, generator=generator)
    centre = 100 * torch.rand(5, 3, 2, generator=generator) - 2
    matrix = rotation(6 * torch.rand(5, 3, generator=generator)) * (2 / 26)
    whole = stamp(sources.flatten(0, 1), centre.flatten(0, 1), matrix.flatten(0, 1), 96).view(5, 3, 96, 96)
    torch.testing.assert_close(local_stamps(sources, centre, matrix, 96).on_canvas(96), whole, rtol=0, atol=1e-4)


def test_boxes() -> None:
    masks = torch.zeros(2, 8, 8)
    masks[0, 2:5, 1:7] = 1
    assert boxes_of(masks).tolist() == [[1, 2, 7, 5], [0, 0, 0, 0]]


def test_clip_frames_are_the_same_however_they_are_drawn() -> None:
    clips = DigitClips("val", seed=2)
    whole = clips.clip(7)
    assert whole.frames.shape == (64, 3, 96, 96)
    some = DigitClips("val", seed=2).clip(7, frame_indices=[40, 3, 3, 63])
    assert torch.equal(some.frames, whole.frames[[40, 3, 3, 63]])
    assert some.indices.tolist() == [40, 3, 3, 63]
    assert torch.equal(some.relevant, whole.relevant)
    assert not torch.equal(DigitClips("test", seed=2).clip(7, [0]).frames, whole.frames[:1])
    assert not torch.equal(DigitClips("val", seed=3).clip(7, [0]).frames, whole.frames[:1])
    assert not torch.equal(whole.frames[0], whole.frames[1]), "the picture moves"


def test_only_the_relevant_take_shows_what_is_asked() -> None:
    clips = DigitClips("test", seed=0)
    kinds = Counter()
    for index in range(40):
        clip, script = clips.clip(index, [0]), clips._script(index)
        kinds[clip.kind] += 1
        places = clip.relevant.nonzero()[:, 0]
        assert 4 <= len(places) <= 6
        assert int(places[-1] - places[0]) == len(places) - 1, "one take"
        shown = (script.plan.classes == script.digit) & (script.plan.colours == script.colour)
        assert shown.any(1).nonzero()[:, 0].tolist() == [int(script.take[places[0]])]
        others = torch.arange(len(shown)) != script.take[places[0]]
        assert not (script.plan.classes[others] == script.digit).any()
        assert not (script.plan.colours[others] == script.colour).any()
        word = {"digit_of_colour": COLOUR_NAMES[script.colour], "colour_of_digit": str(script.digit)}[clip.kind]
        assert word in clip.question.split()
    assert kinds == {"digit_of_colour": 20, "colour_of_digit": 20}


def test_uniform_frames() -> None:
    assert uniform_frames(64, 8) == [4, 12, 20, 28, 36, 44, 52, 60]
    assert uniform_frames(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="count must be"):
        uniform_frames(4, 5)


def test_plain_scenes_have_no_digit() -> None:
    scenes = render_coloured("val", 4, torch.Generator().manual_seed(0), ColourStyle(digits=(0,)))
    assert (scenes.classes < 0).all()
    assert float(scenes.masks.sum()) == 0


@pytest.mark.parametrize("call", [
    lambda: QuestionScenes("validation"),
    lambda: QuestionScenes("val", seed=-1),
    lambda: QuestionScenes("val", kinds=("colour",)),
    lambda: QuestionScenes("val").batch(-1, 2),
    lambda: DigitClips("validation"),
    lambda: DigitClips("val", seed=-1),
    lambda: DigitClips("val", frames=3),
    lambda: DigitClips("val").clip(0, [64]),
    lambda: DigitClips("val").clip(-1),
])  # fmt: skip
def test_bad_arguments(call) -> None:
    with pytest.raises(ValueError, match=r"must be|need"):
        call()
