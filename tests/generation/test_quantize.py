"""FSQ against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.generation.quantize import FSQ

levels = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)
RELEASED = (8, 8, 8, 5, 5, 5)


def test_all_ids_of_the_release_come_back() -> None:
    fsq = FSQ(RELEASED)
    assert fsq.codebook_size == 64000
    assert fsq.basis == (1, 8, 64, 512, 2560, 12800)
    ids = torch.arange(64000)
    codes = fsq.ids_to_codes(ids)
    assert codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_ids(codes), ids)
    assert len(torch.unique(codes, dim=0)) == 64000


@settings(max_examples=30, deadline=None)
@given(levels=levels)
def test_ids_count_the_digits(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    digits = [code[::-1] for code in itertools.product(*(range(n) for n in reversed(levels)))]  # the first runs fastest
    halves = torch.tensor([n // 2 for n in levels])
    codes = (torch.tensor(digits) - halves) / halves
    assert torch.equal(fsq.codes_to_ids(codes), torch.arange(fsq.codebook_size))
    torch.testing.assert_close(fsq.ids_to_codes(torch.arange(fsq.codebook_size)), codes)


@settings(max_examples=30, deadline=None)
@given(levels=levels, seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 100.0]))
def test_codes_are_the_nearest_levels(levels: tuple[int, ...], seed: int, scale: float) -> None:
    fsq = FSQ(levels)
    z = torch.randn(50, len(levels), generator=torch.Generator().manual_seed(seed)) * scale
    codes, bounded = fsq.quantize(z), fsq.bound(z)
    for d, n in enumerate(levels):
        grid = torch.arange(n) - n // 2  # all levels there are
        nearest = grid[(bounded[:, d, None] - grid).abs().argmin(dim=1)]
        assert torch.equal(codes[:, d], nearest / (n // 2))
    assert torch.equal(fsq.ids_to_codes(fsq.codes_to_ids(codes)), codes)
    assert torch.equal(fsq.quantize(torch.zeros(1, len(levels))), torch.zeros(1, len(levels)))


def test_the_gradient_is_that_of_the_bound() -> None:
    fsq, z = FSQ(RELEASED), torch.randn(7, 6, requires_grad=True)
    weight = torch.randn(7, 6)
    (fsq.quantize(z) * weight).sum().backward()
    other = z.detach().requires_grad_()
    (fsq.bound(other) / torch.tensor([4.0, 4, 4, 2, 2, 2]) * weight).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)
    assert z.grad.abs().min() > 0


def test_it_is_float32_under_autocast_and_for_half_precision() -> None:
    fsq, z = FSQ(RELEASED), torch.randn(500, 6)
    want = fsq.quantize(z.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fsq.quantize(z.bfloat16())
        assert torch.equal(fsq.codes_to_ids(got), fsq.codes_to_ids(want))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("levels", [(), (8, 1), (8, 2.0), (True, 3), (-2,)])
def test_bad_levels(levels: tuple) -> None:
    with pytest.raises(InvalidParameterError, match="levels"):
        FSQ(levels)


@pytest.mark.parametrize("ids", [[-1], [64000], [0.5], [True]])
def test_bad_ids(ids: list) -> None:
    with pytest.raises(InvalidParameterError, match="ids"):
        FSQ(RELEASED).ids_to_codes(torch.tensor(ids))


@pytest.mark.parametrize("z", [torch.zeros(2, 5), torch.zeros(2, 6).long(), torch.tensor(0.0)])
def test_bad_vectors(z: torch.Tensor) -> None:
    with pytest.raises(InvalidParameterError, match="6"):
        FSQ(RELEASED).quantize(z)
