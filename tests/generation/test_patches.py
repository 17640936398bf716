"""Patches and position tables against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.generation.patches import patchify, sincos_1d, sincos_2d, unpatchify

sizes = st.integers(1, 4)


@settings(max_examples=20, deadline=None)
@given(b=sizes, c=sizes, h=sizes, w=sizes, p=st.integers(1, 3))
def test_patchify_is_a_triple_loop_and_can_be_undone(b: int, c: int, h: int, w: int, p: int) -> None:
    x = torch.randn(b, c, h * p, w * p)
    got = patchify(x, p)
    assert got.shape == (b, h * w, p * p * c)
    for i in range(h):
        for j in range(w):
            patch = [x[:, k, i * p + row, j * p + col] for row in range(p) for col in range(p) for k in range(c)]
            assert torch.equal(got[:, i * w + j], torch.stack(patch, dim=1))
    assert torch.equal(unpatchify(got, p, (h, w)), x)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), half=st.integers(1, 5), base=st.sampled_from([10000.0, 256.0]))
def test_sincos_1d_is_a_loop(n: int, half: int, base: float) -> None:
    table = sincos_1d(n, 2 * half, base)
    want = [[f(i * base ** (-j / half)) for f in (math.sin, math.cos) for j in range(half)] for i in range(n)]
    torch.testing.assert_close(table, torch.tensor(want))


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), quarter=st.integers(1, 3))
def test_sincos_2d_is_a_loop(h: int, w: int, quarter: int) -> None:
    table = sincos_2d(h, w, 4 * quarter)
    assert table.shape == (1, 4 * quarter, h, w)
    rows, cols = sincos_1d(h, 2 * quarter), sincos_1d(w, 2 * quarter)
    for i in range(h):
        for j in range(w):
            assert torch.equal(table[0, :, i, j], torch.cat([rows[i], cols[j]]))


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5))
def test_the_official_layout_lists_the_transposed_grid(h: int, w: int) -> None:
    official, right = sincos_2d(h, w, 8, "official"), sincos_2d(w, h, 8)
    assert torch.equal(official.flatten(2), right.flatten(2))
    assert torch.equal(sincos_2d(h, h, 8, "official"), sincos_2d(h, h, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: patchify(torch.zeros(3, 4, 4), 2),
        lambda: patchify(torch.zeros(1, 3, 4, 5), 2),
        lambda: unpatchify(torch.zeros(1, 5, 4), 2, (2, 2)),
        lambda: unpatchify(torch.zeros(1, 4, 6), 2, (2, 2)),
        lambda: sincos_1d(3, 5),
        lambda: sincos_2d(2, 2, 6),
        lambda: sincos_2d(2, 2, 8, "other"),
    ],
)
def test_bad_input(call) -> None:
    with pytest.raises(InvalidParameterError):
        call()
