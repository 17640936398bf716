"""QuoTA on the hosts that take videos: budgets, identity, dropped frames, scorers, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokred
from tests.matrix.vlm_models import (
    Gemma3,
    Idefics3,
    InternVL,
    Llava,
    LlavaNextVideo,
    LlavaOnevision,
    PaliGemma,
    Qwen2,
    Qwen3,
    Qwen25,
)
from tokred.core.errors import InvalidParameterError, RequestError, ScorerError
from tokred.core.scoring import Decoupled
from tokred.vlm.allocate import allocate, grid_shape
from tokred.vlm.shrink import SHRINK_MODES

HOSTS = [LlavaOnevision, LlavaNextVideo, Qwen2, Qwen25, Qwen3]
#: shrinkers that are the host's own pooling when every frame gets as many tokens as the host gives it
OWN_POOLING = {
    "llava_onevision": "bilinear",
    "llava_next_video": "adaptive_pool",
    "qwen2_vl": "bilinear",
    "qwen2_5_vl": "tome",
    "qwen3_vl": "linspace",
}


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request):
    return request.param()


def frames_of(host: Any, prompt: Any) -> int:
    grids = prompt.inputs.get("video_grid_thw")
    return int(grids[0, 0]) if grids is not None else prompt.inputs["pixel_values_videos"].shape[1]


def greedy(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def baseline(host: Any, model: Any, inputs: dict[str, Any]) -> int:
    """Visual tokens that the host makes of the first video, its trailing newline apart."""
    with tokred.patch(model, tokred.RandomTokens(budget=1)) as patch:
        logits(model, inputs)
        return patch.trace.media[0].tokens_in


def test_equal_scores_at_the_hosts_own_budget_change_nothing(host):
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    total, frames = baseline(host, model, prompt.inputs), frames_of(host, prompt)
    before = logits(model, prompt.inputs), greedy(model, prompt.inputs)
    method = tokred.QuoTA(total, scorer=torch.full((frames,), 0.37), shrink=OWN_POOLING[host.name])
    with tokred.patch(model, method) as patch:
        assert torch.equal(logits(model, prompt.inputs), before[0])
        assert torch.equal(greedy(model, prompt.inputs), before[1])
        assert patch.trace.media[0].tokens_out == total


@pytest.mark.parametrize("shrink", SHRINK_MODES)
def test_frames_get_the_tokens_of_their_share(host, shrink):
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    scores = torch.tensor([0.9, 0.2, 0.5, 0.05])[: frames_of(host, prompt)]
    method = tokred.QuoTA(budget=14, scorer=scores, shrink=shrink, min_tokens_per_frame=1)
    with tokred.patch(model, method) as patch:
        first = greedy(model, prompt.inputs)
        step = patch.trace.media[0]
        assert torch.equal(first, greedy(model, prompt.inputs, use_cache=False))
        assert torch.equal(first, greedy(model, prompt.inputs, cache_implementation="static"))
    assert sum(step.per_partition) == step.tokens_out <= 14
    assert step.per_partition == sorted(step.per_partition, key=lambda n: -n) or scores[1] < scores[2]
    if shrink == "bilinear":
        counts = allocate(scores, 14, min_tokens=1).tolist()
        rows, columns = dense_grid(host, step)
        assert step.per_partition == [math.prod(grid_shape(n, rows, columns)) for n in counts]


def dense_grid(host: Any, step: Any) -> tuple[int, int]:
    """Grid of a frame before the host pools it."""
    scale = 2 if host.name.startswith("llava") else 1
    return step.layout.grid[0] * scale, step.layout.grid[1] * scale


def test_enlarged_frames_need_more_room_than_the_prompt_has(host):
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    frames = frames_of(host, prompt)
    scores = torch.zeros(frames)
    scores[1] = 1.0
    with tokred.patch(model, tokred.QuoTA(budget=90, scorer=scores)) as patch:
        first = greedy(model, prompt.inputs)
        assert patch.trace.media[0].per_partition[1] > patch.trace.media[0].layout.cells_per_partition
        assert torch.equal(first, greedy(model, prompt.inputs, cache_implementation="static"))
        assert torch.equal(first, greedy(model, prompt.inputs, use_cache=False))
        beams = greedy(model, prompt.inputs, num_beams=2)
        assert torch.equal(beams, greedy(model, prompt.inputs, num_beams=2, use_cache=False))


def test_a_batch_is_its_samples(host):
    model, prompt = host.make(), host.inputs([[3, "video", 4], [7, "video", 5]])
    frames = frames_of(host, prompt)
    scores = [torch.rand(frames, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with tokred.patch(model, tokred.QuoTA(budget=13)) as patch:
        with patch.request(frame_scores=scores):
            both = greedy(model, prompt.inputs)
            cells = [step.cells.tolist() for step in patch.trace.media]
        for row in range(2):
            single = host.inputs([prompt.rows[row]], first_row=row)
            with patch.request(frame_scores=scores[row]):
                assert torch.equal(greedy(model, single.inputs), both[row : row + 1])
                assert patch.trace.media[0].cells.tolist() == cells[row]


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
def test_a_dropped_frame_is_not_seen(name):
    host = LlavaOnevision() if name == "llava_onevision" else LlavaNextVideo()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    scores = torch.tensor([1.0, 0.0, 0.5, 0.0])[: frames_of(host, prompt)]
    with tokred.patch(model, tokred.QuoTA(budget=12, scorer=scores)) as patch:
        before = logits(model, prompt.inputs)
        assert patch.trace.media[0].per_partition[1] == 0
        changed = prompt.inputs["pixel_values_videos"].clone()
        changed[:, 1::2] += 1.0
        after = logits(model, {**prompt.inputs, "pixel_values_videos": changed})
    assert torch.equal(before, after)


def test_images_beside_a_video_stay_whole(host):
    model, prompt = host.make(), host.inputs([[3, "image", 2, "video", 4]])
    scores = torch.rand(frames_of(host, prompt), generator=torch.Generator().manual_seed(0))
    with tokred.patch(model, tokred.QuoTA(budget=9, scorer=scores)) as patch:
        logits(model, prompt.inputs)
        image = next(step for step in patch.trace.media if step.layout.kind == "image")
        video = next(step for step in patch.trace.media if step.layout.kind == "video")
    assert image.tokens_in == image.tokens_out
    assert video.tokens_out <= 9


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_scores_of_joined_frames(reduce):
    host = Qwen25()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    single = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.3])  # two frames a temporal patch, the last one alone
    joined = torch.tensor([0.9, 0.4, 0.3]) if reduce == "max" else torch.tensor([0.5, 0.3, 0.3])
    with tokred.patch(model, tokred.QuoTA(budget=12, reduce=reduce)) as patch:
        with patch.request(frame_scores=single):
            logits(model, prompt.inputs)
        assert patch.trace.media[0].per_partition == [
            math.prod(grid_shape(n, 2, 3)) for n in allocate(joined, 12).tolist() if n
        ] + [0] * int((allocate(joined, 12) == 0).sum())


def test_grid_newlines_of_llava_video():
    host = LlavaOnevision()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    scores = torch.tensor([0.9, 0.1, 0.5])
    encoded = tokred.vlm.encode(model, prompt.inputs, tokred.QuoTA(budget=20, scorer=scores, newline="grid"))
    step, newline = encoded.trace.media[0], model.model.image_newline.detach()
    rows = [grid_shape(n, 4, 4) for n in allocate(scores, 20).tolist() if n]
    expected = [cell for h, w in rows for _ in range(h) for cell in [*[True] * w, False]]
    assert (step.cells >= 0).tolist() == expected
    assert torch.equal(encoded.videos[0][~torch.tensor(expected)], newline.expand(expected.count(False), -1))


# -- scorers -----------------------------------------------------------------------------------------------------------


class StubProcessor:
    """As much of a processor as a host looks at."""

    class tokenizer:
        @staticmethod
        def decode(ids, skip_special_tokens):
            return " ".join(f"w{i}" for i in ids)

    class video_processor:
        image_mean, image_std = [0.5, 0.4, 0.3], [0.25, 0.3, 0.2]
        do_normalize = do_rescale = True
        rescale_factor = 1 / 255


def test_the_scorer_gets_frames_question_and_objects(host):
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    calls = []

    def scorer(frames, query, objects=()):
        calls.append((len(frames), frames[0].dtype, tuple(frames[0].shape), query, objects))
        return torch.linspace(0, 1, len(frames))

    method = tokred.QuoTA(budget=9, scorer=scorer, decoupler=lambda query: Decoupled(f"short {query}", ("cup",)))
    with tokred.patch(model, method, processor=StubProcessor()) as patch:
        greedy(model, prompt.inputs, num_beams=2)
        assert len(calls) == 1  # once a request, whatever the beams
        with patch.request(query="what is it ?"):
            logits(model, prompt.inputs)
    (count, dtype, shape, query, objects), (_, _, _, asked, _) = calls
    assert count == frames_of(host, prompt) * (2 if host.mrope else 1)
    assert dtype == torch.uint8
    assert shape[-1] == 3
    assert query.startswith("short w")
    assert asked == "short what is it ?"
    assert objects == ("cup",)


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        (torch.rand(7), ScorerError),
        (torch.rand(1), ScorerError),
        (torch.tensor([0.1, math.nan, 0.2]), ScorerError),
        (torch.rand(3, 1), ScorerError),
    ],
    ids=["too many", "too few", "nan", "two-dimensional"],
)
def test_bad_scores_leave_the_model_as_it_was(scores, error):
    host = LlavaOnevision()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    before = logits(model, prompt.inputs)
    with tokred.patch(model, tokred.QuoTA(budget=9, scorer=scores)), pytest.raises(error):
        logits(model, prompt.inputs)
    assert torch.equal(logits(model, prompt.inputs), before)


def test_missing_scores_name_the_ways_to_give_them():
    host = LlavaOnevision()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    with tokred.patch(model, tokred.QuoTA(budget=9)) as patch:
        with pytest.raises(RequestError, match=r"processor=.*scorer="):
            logits(model, prompt.inputs)
        with pytest.raises(RequestError, match="2 entries for 1 video"), patch.request(frame_scores=[[0.5] * 3] * 2):
            logits(model, prompt.inputs)


def test_an_unreachable_scorer_is_named(monkeypatch):
    import tokred.adapters.scorers as scorers

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(scorers, "OpenClipScorer", unreachable)
    host = LlavaOnevision()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    with (
        tokred.patch(model, tokred.QuoTA(budget=9), processor=StubProcessor()),
        pytest.raises(ScorerError, match="scorer="),
    ):
        logits(model, prompt.inputs)


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        {"budget": 0},
        {"budget": -3},
        {"budget": 1.5},
        {"budget": 8, "power": 9},
        {"budget": 8, "shrink": "nearest"},
        {"budget": 8, "cap_mode": "none"},
        {"budget": 8, "reduce": "min"},
        {"budget": 8, "newline": "row"},
        {"budget": 8, "max_tokens_per_frame": 0},
        {"budget": 8, "min_tokens_per_frame": -1},
        {"budget": 8, "scorer": "clip"},
        {"budget": 8, "decoupler": 3},
        {"budget": 8, "positions": "gapped"},
    ],
    ids=str,
)
def test_parameters_out_of_range(parameters):
    with pytest.raises(InvalidParameterError, match=list(parameters)[-1]):
        tokred.QuoTA(**parameters)


def test_round_trip():
    method = tokred.QuoTA(budget=0.5, power=1.0, shrink="tome", max_tokens_per_frame=9, cap_mode="waterfill")
    assert tokred.from_dict(method.to_dict()) == method
    with pytest.raises(InvalidParameterError, match="scorer"):
        tokred.QuoTA(budget=8, scorer=torch.rand(3)).to_dict()
    assert "budget=8" in repr(tokred.QuoTA(budget=8, scorer=torch.rand(3)))


def test_newlines_need_a_newline():
    host = Qwen25()
    model, prompt = host.make(), host.inputs([[3, "video", 4]])
    with (
        tokred.patch(model, tokred.QuoTA(budget=9, scorer=torch.rand(3), newline="grid")),
        pytest.raises(InvalidParameterError, match="newline"),
    ):
        logits(model, prompt.inputs)


# -- images as frames --------------------------------------------------------------------------------------------------

AS_FRAMES = [Llava, InternVL, Idefics3, PaliGemma, Gemma3]


@pytest.mark.parametrize("family", AS_FRAMES, ids=lambda host: host.name)
def test_images_as_the_frames_of_a_video(family):
    host = family()
    model, prompt = host.make(), host.inputs([[3, "image", 1, "image", 2, "image", 4], [5, "image", 2, "image", 9]])
    lengths = frames_a_row(host, model, prompt)
    scores = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    with tokred.patch(model, tokred.QuoTA(budget=7, frames="images")) as patch, patch.request(frame_scores=scores):
        both = greedy(model, prompt.inputs)
        videos = {step.sample: step for step in patch.trace.media}
        assert torch.equal(both, greedy(model, prompt.inputs, cache_implementation="static"))
        beams = greedy(model, prompt.inputs, num_beams=2)
        assert beams.shape == both.shape
    for row, step in videos.items():
        assert step.layout.kind == "video"
        assert step.layout.partitions == lengths[row]
        expected = [math.prod(grid_shape(n, *step.layout.grid)) if n else 0 for n in shares(scores[row])]
        assert step.per_partition == expected
        single = host.inputs([prompt.rows[row]], first_row=row)
        with tokred.patch(model, tokred.QuoTA(budget=7, frames="images", scorer=scores[row])):
            assert torch.equal(greedy(model, single.inputs), both[row : row + 1])


def shares(scores: torch.Tensor) -> list[int]:
    return allocate(scores, 7, min_tokens=min(1, 7 // len(scores))).tolist()  # text stands between the frames


def frames_a_row(host: Any, model: Any, prompt: Any) -> list[int]:
    with tokred.patch(model, tokred.RandomTokens(budget=1)) as patch:
        logits(model, prompt.inputs)
        rows = [step.sample for step in patch.trace.media]
    return [rows.count(row) for row in sorted(set(rows))]


def test_one_image_alone_is_no_video():
    host = Llava()
    model, prompt = host.make(), host.inputs([[3, "image", 4]])
    before = logits(model, prompt.inputs)
    with tokred.patch(model, tokred.QuoTA(budget=7, frames="images", scorer=torch.rand(1))):
        assert torch.equal(logits(model, prompt.inputs), before)
