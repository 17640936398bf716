"""QuoTA's maths and its video reader against the slow definitions of `quota_oracles.py`, and their invariants."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.methods import quota_oracles as slow
from tokred.core.errors import InvalidParameterError, ScorerError
from tokred.core.scoring import Decoupled, Decoupler, FrameScorer, score_frames, validate_scores
from tokred.vlm.allocate import allocate, cap_weights, frame_weights, grid_shape
from tokred.vlm.decouple import parse_event, parse_objects
from tokred.vlm.frames import read_video, sample_frames, video_sentence
from tokred.vlm.shrink import SHRINK_MODES, Shrunk, grid_sources, pack, shrink, shrink_plan, video_plan

GRID_MODES = ("bilinear", "adaptive_pool", "tome_separable")

score = st.floats(0, 1).map(lambda p: p if p > 1e-6 else 0.0)
some_scores = st.lists(score, min_size=1, max_size=40).filter(any)
budgets = st.integers(1, 20_000)


# -- weights and counts ----------------------------------------------------------------------------------------------


@given(some_scores, st.sampled_from([0.5, 1.0, 2.0, 3.7, 8.0]), budgets)
def test_counts_agree_with_the_definition(scores, power, budget):
    want = slow.weights(scores, power)
    assert frame_weights(torch.tensor(scores), power).dtype == torch.float64
    np.testing.assert_allclose(frame_weights(scores, power).tolist(), want, rtol=1e-12, atol=1e-300)
    assume(all(abs((budget * w) % 1 - 1 + 1e-6) > 1e-9 for w in want))  # not on the very edge of the guard
    counts = allocate(scores, budget, power)
    assert counts.dtype == torch.int64
    assert counts.tolist() == slow.counts(want, budget) or not any(slow.counts(want, budget))


@given(some_scores, budgets, st.one_of(st.none(), st.integers(1, 500)), st.sampled_from(["official", "waterfill"]))
def test_counts_stay_within_budget_and_cap(scores, budget, most, mode):
    counts = allocate(scores, budget, max_tokens=most, cap_mode=mode)
    assert counts.sum() <= budget
    assert counts.min() >= 0
    assert counts.any()
    if most is not None:
        assert counts.max() <= most
    if most is None or mode == "waterfill":  # the official cap depends on the order of the frames
        ranked = counts[torch.tensor(scores).double().argsort(stable=True)].tolist()
        alone = sum(ranked) == 1  # nothing but the one token of the best frame
        assert alone or all(a <= b for a, b in pairwise(ranked))


@given(some_scores, budgets, st.floats(1e-3, 1e3), st.randoms(use_true_random=False), st.sampled_from([None, 7, 100]))
def test_scale_and_order_of_scores_do_not_matter(scores, budget, factor, random, most):
    counts = allocate(scores, budget, max_tokens=most, cap_mode="waterfill")
    order = list(range(len(scores)))
    random.shuffle(order)
    shuffled = allocate([scores[i] for i in order], budget, max_tokens=most, cap_mode="waterfill")
    if counts.sum() > 1:  # (a single token goes to the first of the best)
        assert shuffled.tolist() == counts[order].tolist()
    scaled = frame_weights([p * factor for p in scores])
    torch.testing.assert_close(scaled, frame_weights(scores), rtol=1e-12, atol=0)
    if budget * 1e-12 < 1e-7:
        edge = (budget * scaled + 1e-6) % 1
        assume(bool(((edge > 1e-9) & (edge < 1 - 1e-9)).all()))
        assert allocate([p * factor for p in scores], budget).tolist() == allocate(scores, budget).tolist()


@given(st.floats(1e-6, 1), st.integers(1, 100), st.integers(1, 28))
def test_equal_scores_give_every_frame_a_square(p, frames, side):
    """The plain product would give some frames one token less, for every fourth score or so."""
    counts = allocate([p] * frames, frames * side**2)
    assert counts.tolist() == [side**2] * frames
    assert grid_shape(int(counts[0]), 27, 27) == (side, side)
    uneven = [p / (i + 1) for i in range(frames)]
    assert allocate(uneven, frames * side**2, power=0).tolist() == [side**2] * frames


def test_the_rounding_trap_is_real():
    p = torch.rand(1000, dtype=torch.float64).tolist()
    raised = [(100 * np.full(64, x)) ** 2 for x in p]
    plain = [int(12544 * (r / r.sum())[0]) for r in raised]
    assert 100 < plain.count(195) < 400
    assert all(allocate([x] * 64, 12544).tolist() == [196] * 64 for x in p[:50])


@given(some_scores, st.floats(0.01, 2))
def test_caps_agree_with_the_definition(scores, limit):
    weights = frame_weights(scores)
    want = slow.official_cap(weights.tolist(), limit)
    np.testing.assert_allclose(cap_weights(weights, limit).tolist(), want, rtol=1e-9, atol=1e-300)


@given(some_scores, st.floats(0.01, 2))
def test_waterfill_conserves_what_fits(scores, limit):
    weights = frame_weights(scores)
    filled = cap_weights(weights, limit, "waterfill")
    assert filled.max() <= limit
    positive = int((weights > 0).sum())
    assert math.isclose(filled.sum().item(), min(1.0, positive * limit), rel_tol=1e-9)
    below = filled < limit
    if below.any():  # one common factor where the limit does not bind, and more than there was where it does
        factors = filled[below] / weights[below].clamp_min(1e-300)
        factors = factors[weights[below] > 1e-200]
        if len(factors):
            assert factors.max() - factors.min() <= 1e-9 * factors.max()
            assert (weights[~below] * factors.max() >= limit * (1 - 1e-9)).all()


def test_the_official_cap_is_neither_conserving_nor_symmetric():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    assert cap_weights(weights, 0.3).sum() < 0.99
    there = cap_weights(weights, 0.17)
    back = cap_weights(weights.flip(0), 0.17).flip(0)
    assert not torch.allclose(there, back)
    assert cap_weights(weights, 0.3, "waterfill").sum() == pytest.approx(1)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [0.2, float("nan"), 0.3], [0.1, float("inf"), 0.2]])
def test_degenerate_scores_are_uniform_with_one_warning(scores):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = allocate(torch.tensor(scores), 30)
    assert counts.tolist() == [10, 10, 10]
    assert [w.category for w in caught] == [UserWarning]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocate([0.0, 0.0], 6, power=0).tolist() == [3, 3]


def test_fewer_tokens_than_frames_and_one_frame():
    assert allocate([0.5, 0.6, 0.6, 0.5], 1).tolist() == [0, 1, 0, 0]
    assert allocate([0.5, 0.5, 0.5], 2).tolist() == [1, 0, 0]
    assert allocate([0.001], 77).tolist() == [77]
    assert allocate([0.9], 77, max_tokens=10, cap_mode="waterfill").tolist() == [10]
    assert allocate([0.0, 1.0, 0.0], 64).tolist() == [0, 64, 0]


@given(some_scores, st.integers(0, 5), st.integers(0, 3000), st.sampled_from(["official", "waterfill"]))
def test_minimum_comes_off_the_top(scores, least, more, mode):
    budget = max(1, least * len(scores) + more)
    for most in (None, least + 9):
        counts = allocate(scores, budget, max_tokens=most, min_tokens=least, cap_mode=mode)
        assert counts.min() >= least
        assert counts.sum() <= budget
        assert most is None or counts.max() <= most
    if least and more:
        free = allocate(scores, more)
        extra = allocate(scores, budget, min_tokens=least) - least
        assert extra.tolist() == free.tolist() or free.sum() == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: allocate([0.5], 0), r"budget=0.*>= 1"),
        (lambda: allocate([0.5], 10, power=9), r"power=9.*\[0, 8\]"),
        (lambda: allocate([0.5], 10, power=-1), r"power=-1.*\[0, 8\]"),
        (lambda: allocate([0.5], 10, power=float("nan")), r"power=nan"),
        (lambda: allocate([0.5], 10, max_tokens=0), r"max_tokens=0.*>= 1"),
        (lambda: allocate([0.5], 10, min_tokens=4, max_tokens=3), r"max_tokens=3.*>= 4"),
        (lambda: allocate([0.5, 0.5], 7, min_tokens=4), r"min_tokens=4.*2 frames need 8.*budget=7"),
        (lambda: allocate([0.5], 10, max_tokens=3, cap_mode="soft"), r"cap_mode='soft'.*waterfill"),
        (lambda: allocate([], 10), r"scores.*T >= 1"),
        (lambda: allocate([[0.5]], 10), r"scores.*\(1, 1\)"),
        (lambda: allocate([0.5, -0.25], 10), r"scores.*>= 0.*-0.25.*frame 1"),
        (lambda: cap_weights([0.5], 0), r"limit=0.*> 0"),
        (lambda: grid_shape(0, 4, 4), r"n=0.*>= 1"),
        (lambda: grid_shape(3, 0, 4), r"rows=0.*>= 1"),
        (lambda: shrink(torch.zeros(9, 2), 3, 4, 2), r"\(1, 9, 2\).*3 \* 4 = 12"),
        (lambda: shrink(torch.zeros(1, 9, 2), 3, 3, 2), r"\(1, 9, 2\).*one frame"),
        (lambda: shrink(torch.zeros(9, 2), 3, 3, 2, "median"), r"mode='median'.*bilinear"),
        (lambda: shrink(torch.zeros(9, 2).long(), 3, 3, 2), r"int64.*floating"),
        (lambda: shrink(torch.zeros(9, 2), 3, 3, 0), r"n=0"),
        (lambda: video_plan(torch.zeros(2, 9, 2), 3, 3, [1]), r"counts has 1 entries for 2 frames"),
        (lambda: pack([], None, "none"), r"frames is empty"),
        (lambda: sample_frames(0, 25.0), r"total=0.*no frames"),
        (lambda: sample_frames(10, 0.0), r"fps=0.0.*> 0"),
        (lambda: sample_frames(10, 25.0, base_frames=0), r"base_frames=0.*>= 1"),
        (lambda: sample_frames(10, 25.0, extra_frames=-1), r"extra_frames=-1.*>= 0"),
    ],
)
def test_errors_name_field_value_and_range(call, words):
    with pytest.raises(InvalidParameterError, match=words):
        call()


# -- grids -----------------------------------------------------------------------------------------------------------


def test_square_grids_are_the_released_rule():
    for n in range(1, 2000):
        h, w = grid_shape(n, 27, 27)
        assert (h, w) == slow.grid(n)
        assert h * w <= n < h * w + h + 1
        assert h - w in (0, 1)


@given(st.integers(1, 5000), st.integers(1, 80), st.integers(1, 80))
def test_rectangular_grids_fit(n, rows, cols):
    h, w = grid_shape(n, rows, cols)
    assert 1 <= h * w <= n
    assert min(h, w) >= 1
    assert grid_shape(rows * cols, rows, cols) == (rows, cols)
    if n <= rows * cols:
        assert h <= rows
        assert w <= cols


def test_rectangular_examples():
    assert [grid_shape(n, 18, 32) for n in (1, 2, 144, 576)] == [(1, 1), (1, 2), (9, 16), (18, 32)]
    assert [grid_shape(n, 100, 4) for n in (1, 2, 400)] == [(1, 1), (2, 1), (100, 4)]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_source_cells(h, w, rows, cols):
    cells = grid_sources((h, w), rows, cols).view(h, w)
    for k in range(h):
        for c in range(w):
            assert cells[k, c] == math.floor((k + 0.5) * rows / h + 1e-9) * cols + math.floor(
                (c + 0.5) * cols / w + 1e-9
            )
    if (h, w) == (rows, cols):
        assert torch.equal(cells.flatten(), torch.arange(rows * cols))


# -- shrinking -------------------------------------------------------------------------------------------------------

SIZES = [(5, 5, 7), (7, 7, 1), (6, 4, 9), (3, 8, 23), (1, 6, 3), (9, 9, 80), (4, 4, 16)]


def features(rows, cols, width=6, frames=1):
    return torch.randn(frames, rows * cols, width, generator=torch.Generator().manual_seed(rows * 100 + cols))


def oracle(x, rows, cols, n, mode, pool=1):
    """x (rows cols, D); the slow definition in float64."""
    image = x.double().view(rows, cols, -1)
    if mode == "linspace":
        return slow.linspace(image.flatten(0, 1), min(n, rows * cols))
    if mode == "tome":
        if pool > 1:
            image = slow.bilinear(image, math.ceil(rows / pool), math.ceil(cols / pool))
        return torch.stack(slow.tome(list(image.flatten(0, 1)), n)[0])
    grid = grid_shape(n if mode == "bilinear" else min(n, rows * cols), rows, cols)
    fn = {"bilinear": slow.bilinear, "adaptive_pool": slow.adaptive_pool, "tome_separable": slow.tome_separable}[mode]
    return fn(image, *grid).flatten(0, 1)


@pytest.mark.parametrize("mode", SHRINK_MODES)
@pytest.mark.parametrize(("rows", "cols", "n"), SIZES)
def test_shrink_agrees_with_the_definition(rows, cols, n, mode):
    x = features(rows, cols)[0]
    for pool in (1, 2) if mode == "tome" else (1,):
        got = shrink(x, rows, cols, n, mode, pool)
        want = oracle(x, rows, cols, n, mode, pool)
        torch.testing.assert_close(got.tokens.double(), want, atol=2e-6, rtol=1e-5)
        assert got.sources.shape == (len(want),)
        if got.grid is not None:
            assert got.grid[0] * got.grid[1] == len(want)
        cells = math.ceil(rows / pool) * math.ceil(cols / pool)
        if mode in ("tome", "linspace"):
            assert len(got.tokens) == min(n, cells)
        ordered = mode in GRID_MODES or (mode == "tome" and n >= cells)
        assert (got.grid is not None) == ordered


@pytest.mark.parametrize("mode", GRID_MODES)
def test_the_full_grid_is_the_identity(mode):
    x = features(5, 7)[0]
    got = shrink(x, 5, 7, 35, mode)
    assert torch.equal(got.tokens, x)
    assert got.sources.tolist() == list(range(35))
    assert got.grid == (5, 7)


@pytest.mark.parametrize("mode", SHRINK_MODES)
def test_constant_features_stay_constant(mode):
    x = torch.tensor([0.3, -1.7, 2.0]).expand(48, 3)
    for n in (1, 5, 13, 48, 100):
        tokens = shrink(x, 8, 6, n, mode).tokens
        torch.testing.assert_close(tokens, x[:1].expand(len(tokens), -1))


def test_bilinear_may_enlarge_and_the_others_may_not():
    x = features(3, 4)[0]
    big = shrink(x, 3, 4, 300)
    assert big.grid == (15, 20)
    torch.testing.assert_close(big.tokens.double(), oracle(x, 3, 4, 300, "bilinear"), atol=2e-6, rtol=1e-5)
    cells = big.sources.view(15, 20)
    assert torch.equal(cells[:, 0], cells[:, 1])  # cells repeat, row by row
    for mode in SHRINK_MODES[1:]:
        assert torch.equal(shrink(x, 3, 4, 300, mode).tokens, x), mode


def test_linspace_keeps_both_ends():
    for n in range(2, 82):
        sources = shrink(features(9, 9)[0], 9, 9, n, "linspace").sources.tolist()
        assert sources[0] == 0
        assert sources[-1] == 80
        assert len(sources) == n
        assert sources == sorted(set(sources))


def test_tome_groups_sources_and_counts():
    """Every cell goes to one token; the token takes the place of a member; counts are exact."""
    x = features(6, 7, frames=2)
    for n in range(1, 43):
        plan = shrink_plan(x, 6, 7, n, "tome")
        assert plan.sources.shape == (2, n)
        for frame in range(2):
            _, members = slow.tome(list(x[frame].double()), n)
            sources = plan.sources[frame].tolist()
            assert len(set(sources)) == n
            assert all(source in group for source, group in zip(sources, members, strict=True))
            total = torch.eye(42)[None].expand(2, -1, -1)  # each cell marked by itself
            shares = plan.apply(total)[frame]
            assert [set(row.nonzero().flatten().tolist()) for row in shares] == [set(group) for group in members]
            torch.testing.assert_close(shares.sum(dim=1), torch.ones(n))


def test_tome_source_cells_of_pooled_features():
    x = features(5, 7)[0]
    got = shrink(x, 5, 7, 12, "tome", pool=2)
    assert got.grid == (3, 4)
    assert got.sources.tolist() == grid_sources((3, 4), 5, 7).tolist()
    fewer = shrink(x, 5, 7, 6, "tome", pool=2)
    assert fewer.grid is None
    assert set(fewer.sources.tolist()) <= set(got.sources.tolist())


@pytest.mark.parametrize("mode", ["tome", "tome_separable"])
def test_ties_go_to_the_lower_index(mode):
    x = torch.ones(1, 24, 4)
    x[0, ::3] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    first = shrink_plan(x, 4, 6, 9, mode)
    for frames in (1, 3):
        again = shrink_plan(x.expand(frames, -1, -1), 4, 6, 9, mode)
        assert torch.equal(again.sources[-1], first.sources[0])
        assert torch.equal(again.apply(x.expand(frames, -1, -1))[-1], first.apply(x)[0])
    same = shrink_plan(torch.ones(1, 8, 2), 2, 4, 5, "tome")
    assert same.sources.tolist() == [[6, 1, 3, 5, 7]]  # tokens 0, 2, 4 are merged first, all of them into token 1
    zeros = shrink(torch.zeros(8, 2), 2, 4, 3, "tome").tokens
    assert torch.equal(zeros, torch.zeros(3, 2))


@pytest.mark.parametrize("mode", SHRINK_MODES)
def test_a_plan_serves_other_features(mode):
    """Deepstack features follow the assignment of the main ones."""
    x, y = features(6, 6, frames=3), torch.randn(3, 36, 11)
    plan = shrink_plan(x, 6, 6, 13, mode)
    both = shrink_plan(torch.cat([x, 0 * y], dim=2), 6, 6, 13, mode).apply(torch.cat([x, y], dim=2))
    torch.testing.assert_close(plan.apply(x), both[..., :6], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(plan.apply(y), both[..., 6:], atol=1e-6, rtol=1e-5)
    with pytest.raises(InvalidParameterError, match=r"2 frames.*3"):
        plan.apply(y[:2])


@pytest.mark.parametrize("mode", SHRINK_MODES)
def test_a_video_is_its_frames(mode):
    x = features(5, 6, frames=9)
    counts = torch.tensor([4, 0, 30, 4, 11, 5, 0, 30, 1])
    plan = video_plan(x, 5, 6, counts, mode)
    assert plan.kept == (0, 2, 3, 4, 5, 7, 8)
    assert len(plan.groups) < len(plan.kept)
    for frame, got in zip(plan.kept, plan.apply(x), strict=True):
        want = shrink(x[frame], 5, 6, int(counts[frame]), mode)
        torch.testing.assert_close(got.tokens, want.tokens)
        assert torch.equal(got.sources, want.sources)
        assert got.grid == want.grid
    changed = x.clone()
    changed[1] = 99.0
    for a, b in zip(plan.apply(x), video_plan(changed, 5, 6, counts, mode).apply(changed), strict=True):
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("mode", SHRINK_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_is_computed_in_float32(mode, dtype):
    x = features(6, 5)[0].to(dtype)
    got = shrink(x, 6, 5, 8, mode).tokens
    assert got.dtype == dtype
    exact = shrink(x.float() if dtype != torch.float64 else x, 6, 5, 8, mode).tokens
    assert torch.equal(got, exact.to(dtype))
    if dtype == torch.float64:
        torch.testing.assert_close(got, oracle(x, 6, 5, 8, mode), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mode", SHRINK_MODES)
def test_gradients_flow(mode):
    x = features(4, 5, width=3)[0].double().requires_grad_()
    y = torch.randn(20, 3, dtype=torch.float64)
    shrink(x, 4, 5, 7, mode).tokens.square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(dim=1) > 0).sum() == (7 if mode == "linspace" else 20)
    plan = shrink_plan(x[None], 4, 5, 7, mode)  # for a fixed plan shrinking is linear
    assert torch.autograd.gradcheck(lambda z: plan.apply(z[None]), (y.requires_grad_(),))


# -- packing ---------------------------------------------------------------------------------------------------------


def test_packing():
    newline = torch.full((2,), -1.0)
    frames = [shrink(features(4, 4, 2)[0], 4, 4, n) for n in (6, 1)]
    assert [frame.grid for frame in frames] == [(3, 2), (1, 1)]
    a, b = (frame.tokens for frame in frames)
    rows = [a[:2], newline[None], a[2:4], newline[None], a[4:], newline[None], b, newline[None]]
    assert torch.equal(pack(frames, newline, "grid"), torch.cat(rows))
    assert torch.equal(pack(frames, newline, "one_token"), torch.cat([a, b, newline[None]]))
    assert torch.equal(pack(frames, None, "none"), torch.cat([a, b]))
    places = [frame._replace(tokens=frame.sources[:, None]) for frame in frames]
    packed = pack(places, torch.tensor([-1]), "grid").flatten().tolist()
    cells = frames[0].sources.tolist()
    assert packed == [*cells[:2], -1, *cells[2:4], -1, *cells[4:], -1, frames[1].sources.item(), -1]
    flat = Shrunk(a, frames[0].sources, None)
    assert torch.equal(pack([flat], newline, "grid"), a)
    assert torch.equal(pack([flat], newline, "one_token"), torch.cat([a, newline[None]]))
    assert pack([frames[0]._replace(tokens=a.bfloat16())], newline, "grid").dtype == torch.bfloat16
    with pytest.raises(InvalidParameterError, match=r"newline mode 'grid'.*None"):
        pack(frames, None, "grid")
    with pytest.raises(InvalidParameterError, match="newline mode='rows'"):
        pack(frames, newline, "rows")


def test_packing_carries_gradients():
    x, newline = features(3, 3, 2)[0].requires_grad_(), torch.zeros(2, requires_grad=True)
    pack([shrink(x, 3, 3, 4)], newline, "grid").sum().backward()
    assert newline.grad is not None
    assert newline.grad.tolist() == [2.0, 2.0]


# -- sampling --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500_000), st.floats(0.1, 240), st.integers(1, 200), st.integers(0, 100), st.booleans())
def test_sampler(total, fps, base, extra, clamp):
    sampled = sample_frames(total, fps, base, extra, clamp)
    hours = total / fps / 3600
    count = base + int((min(hours, 1) if clamp else hours) * extra)
    indices = list(sampled.indices)
    assert len(indices) == len(sampled.times) == count
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert count == 1 or indices[-1] == total - 1
    assert sampled.duration == total / fps
    assert sampled.timestamps.count("s") == count


def test_sampler_adds_frames_by_the_hour():
    hour = 3600 * 30
    assert [len(sample_frames(h * hour, 30, 96, 64).indices) for h in (1, 2, 3)] == [160, 224, 288]
    assert [len(sample_frames(h * hour, 30, 96, 64, clamp=True).indices) for h in (1, 2)] == [160, 160]


def test_sampler_by_seconds():
    assert sample_frames(100, 25, force_uniform=False).indices == (0, 25, 50, 75)
    assert sample_frames(10_000, 25, force_uniform=False) == sample_frames(10_000, 25)  # too many seconds
    assert sample_frames(5, 0.2, force_uniform=False).indices == (0, 1, 2, 3, 4)


def test_sentence():
    sampled = sample_frames(300, 30.0, 4, 0)
    assert sampled.timestamps == "0.00s,3.30s,6.63s,9.97s"
    everything = video_sentence(sampled)
    assert "10.00 seconds" in everything
    assert " 4 " in everything
    assert sampled.timestamps in everything
    some = video_sentence(sampled, kept=[1, 3], timestamps="kept")
    assert "3.30s,9.97s" in some
    assert "6.63s" not in some
    assert " 4 " in some
    with pytest.raises(InvalidParameterError, match="kept="):
        video_sentence(sampled, timestamps="kept")
    with pytest.raises(InvalidParameterError, match="timestamps='none'"):
        video_sentence(sampled, timestamps="none")


def write_video(path: Path, frames: int, fps: int = 8, codec: str = "mpeg4") -> np.ndarray:
    """A grey video whose frame t has the value 2 t, half of it darker on the left."""
    av = pytest.importorskip("av", reason="reading videos needs PyAV")
    pictures = np.zeros((frames, 32, 48, 3), dtype=np.uint8)
    for t in range(frames):
        pictures[t] = 40 + 4 * t
        pictures[t, :, :24] = 20
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.bit_rate = 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return pictures


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_read_video_gives_exactly_the_sampled_frames(ending, tmp_path):
    pictures = write_video(tmp_path / f"clip.{ending}", 40)
    frames, sampled = read_video(tmp_path / f"clip.{ending}", base_frames=7)
    assert sampled == sample_frames(40, 8.0, 7)
    assert frames.shape == (7, 32, 48, 3)
    assert frames.dtype == np.uint8
    for index, frame in zip(sampled.indices, frames, strict=True):
        # compressed: within 2 levels, where neighbouring frames are 4 apart
        assert abs(frame[:, 30:].astype(int) - pictures[index][:, 30:]).mean() < 2, index
        assert abs(frame[:, :18].astype(int) - 20).mean() < 4


def test_read_video_repeats_frames_of_a_short_video_and_takes_seconds(tmp_path):
    write_video(tmp_path / "clip.mp4", 3)
    frames, sampled = read_video(str(tmp_path / "clip.mp4"), base_frames=8)
    assert sampled.indices == (0, 0, 0, 0, 1, 1, 1, 2)
    assert np.array_equal(frames[0], frames[3])
    assert not np.array_equal(frames[3], frames[4])
    write_video(tmp_path / "long.mp4", 20)
    assert read_video(tmp_path / "long.mp4", force_uniform=False).sampled.indices == (0, 8, 16)


def test_read_video_believes_the_frames_more_than_the_header(tmp_path, monkeypatch):
    from tokred.vlm import frames as module

    write_video(tmp_path / "clip.mkv", 12)  # a container that does not say how many there are
    monkeypatch.setattr(module, "_count_packets", lambda av, path: 500)
    frames, sampled = read_video(tmp_path / "clip.mkv", base_frames=5)
    assert sampled == sample_frames(12, 8.0, 5)
    assert len(frames) == 5


def test_read_video_errors(tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="reading videos needs PyAV")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InvalidParameterError, match=r"sound\.wav.*no video stream"):
        read_video(tmp_path / "sound.wav")
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "nowhere.mp4")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"tokred\[video\]"):
        read_video(tmp_path / "sound.wav")


# -- decoupling, and the scores themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ('Step 1: Yes\nStep 2: ["A"]\nStep 3: ["Red Cup", "dog"]', ["red cup", "dog"]),
        ("step 1:yes\nstep 3:['cup']", ["cup"]),
        ("step 1:   yes\nstep 3:   []", []),
        ("step 1: no\nstep 3: ['cup']", []),
        ("step 1: no\nstep 1: yes\nstep 3: ['cup']", []),
        ("step 1: yes\nstep 3: null", []),
        ("step 1: yes\nstep 3: [cup]", []),
        ("step 1: yes\nstep 3: ['cup', 3]", []),
        ("step 1: yes\nstep 3: ['cup'", []),
        ("step 1: yes\nstep 3: [__import__('os').system('true')]", []),
        ("step 1: yes\nstep 3: ['a' * 3]", []),
        ("step 1: yes\nstep 3: ['a', ['b']]", []),
        ("step 1: yes\nstep 3: " + "[" * 500 + "]", []),
        ("", []),
    ],
)
def test_parse_objects(text, objects):
    assert parse_objects(text) == objects


@given(st.text())
def test_parse_objects_never_fails(text):
    assert isinstance(parse_objects(f"step 1: yes step 3: [{text}]"), list)
    assert parse_event(text) == parse_event(text).strip()


def test_scores_are_validated():
    good = validate_scores(np.array([0.1, 0.9]), 2)
    assert good.dtype == torch.float64
    assert good.tolist() == [0.1, 0.9]
    assert not validate_scores(torch.ones(1, requires_grad=True), 1).requires_grad
    with pytest.warns(UserWarning, match=r"-0\.5 to 1\.5.*clamped"):
        assert validate_scores([-0.5, 1.5, 0.5], 3).tolist() == [0.0, 1.0, 0.5]
    for scores, words in (
        ([0.5], r"shape \(1,\): expected \(2,\)"),
        ([[0.5, 0.5]], r"shape \(1, 2\)"),
        ([0.5, float("nan")], r"got nan at frame 1"),
        ([float("inf"), 0.5], r"got inf at frame 0"),
        ("ab", "got str"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ScorerError, match=words):
            validate_scores(scores, 2)
    assert issubclass(ScorerError, ValueError)


def test_any_callable_or_tensor_is_a_scorer():
    def third(frames, query, objects=()):
        return [i / 3 for i in range(len(frames))]

    assert isinstance(third, FrameScorer)
    assert isinstance(lambda query: Decoupled(query), Decoupler)
    frames = [np.zeros((2, 2, 3), dtype=np.uint8)] * 3
    assert score_frames(third, frames, "what?").tolist() == [0, 1 / 3, 2 / 3]
    assert score_frames(torch.tensor([0.5, 0.25, 1.0]), frames, "what?").tolist() == [0.5, 0.25, 1.0]
    with pytest.raises(ScorerError, match=r"scorer='clip'.*callable"):
        score_frames("clip", frames, "what?")
    with pytest.raises(ScorerError, match=r"\(3,\): expected \(2,\)"):
        score_frames(torch.ones(3), frames[:2], "what?")
