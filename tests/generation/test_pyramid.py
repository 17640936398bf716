"""The quantizer of two codebooks and a pyramid of scales: against loops in float64, and its invariants."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation import pyramid
from tokred.generation.pyramid import PyramidQuantizer, checked_scales, unit_halves

SEMANTIC, PIXEL = 5, 3


def quantizer(scales: tuple[int, ...] = (1, 2, 3, 4), rows: int = 24, weight: float = 1.0, seed: int = 0):
    torch.manual_seed(seed)
    made = PyramidQuantizer(rows, SEMANTIC, PIXEL, scales, weight)
    with torch.no_grad():  # trained rows are not of norm 1
        for table in made.parameters():
            table.mul_(torch.rand(rows, 1) * 3 + 0.1)
    return made


def maps(count: int, grid: int, seed: int = 1) -> Tensor:
    return torch.randn(count, SEMANTIC + PIXEL, grid, grid, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slow_nearest(vectors: Tensor, made: PyramidQuantizer) -> list[int]:
    """Both squared distances of every row, in float64, one after the other."""

    def unit(x: Tensor) -> Tensor:
        return x / max(float(x.norm()), 1e-12)

    found = []
    for vector in vectors.detach().double():
        a, b = unit(vector[:SEMANTIC]), unit(vector[SEMANTIC:])
        distances = [
            float((a - unit(e)).square().sum() + made.distance_weight * (b - unit(p)).square().sum())
            for e, p in zip(made.semantic_codebook.double(), made.pixel_codebook.double(), strict=True)
        ]
        found.append(min(range(len(distances)), key=distances.__getitem__))
    return found


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 16), weight=st.sampled_from([0.0, 0.5, 1.0, 3.0]), seed=st.integers(0, 1000))
def test_the_nearest_row_is_that_of_a_slow_search(rows: int, weight: float, seed: int) -> None:
    made = quantizer((1,), rows, weight, seed)
    vectors = torch.randn(6, SEMANTIC + PIXEL)
    assert made.nearest(vectors).tolist() == slow_nearest(vectors, made)


def test_scores_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made, z = quantizer(), maps(3, 4)
    whole = made(z).codes
    monkeypatch.setattr(pyramid, "SCORES", 50)  # two vectors at once
    assert torch.equal(made(z).codes, whole)


@torch.no_grad()
def slow_pyramid(z: Tensor, made: PyramidQuantizer) -> tuple[Tensor, Tensor]:
    """The specification, section 3.5, scale by scale with its own words."""
    residual, total, codes, grid = z, torch.zeros_like(z), [], made.scales[-1]
    for side in made.scales:
        u = F.adaptive_avg_pool2d(residual, side)
        ids = torch.tensor([slow_nearest(picture.flatten(1).T, made) for picture in u])
        e, p = made.semantic_codebook[ids], made.pixel_codebook[ids]
        rows = torch.cat([e / e.norm(dim=-1, keepdim=True), p / p.norm(dim=-1, keepdim=True)], dim=-1)
        rows = rows.mT.unflatten(2, (side, side))
        up = rows if side == grid else F.interpolate(rows, size=(grid, grid), mode="bicubic", align_corners=False)
        total, residual = total + up, residual - up
        codes.append(ids)
    return torch.cat(codes, dim=1), total


@pytest.mark.parametrize("scales", [(4,), (1, 4), (1, 2, 3, 4), (2, 3, 5), (1, 3, 7)])
def test_the_pyramid_is_that_of_a_slow_definition(scales: tuple[int, ...]) -> None:
    made, z = quantizer(scales), maps(2, scales[-1])
    found = made(z)
    codes, total = slow_pyramid(z, made)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.quant, total, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.quant + found.residual, z, atol=1e-5, rtol=0)
    assert torch.equal(made.features(found.codes), found.quant)


def test_one_scale_is_a_plain_vector_quantizer() -> None:
    made, z = quantizer((3,)), maps(2, 3)
    found = made(z)
    assert found.codes.flatten().tolist() == slow_nearest(z.movedim(1, -1).flatten(0, 2), made)
    assert torch.equal(found.quant, made.lookup(found.codes).mT.unflatten(2, (3, 3)))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_two_distances_are_one_in_a_stretched_table(weight: float) -> None:
    made, vectors = quantizer((1,), 40, weight), torch.randn(50, SEMANTIC + PIXEL)
    stretch = torch.tensor([1.0] * SEMANTIC + [weight**0.5] * PIXEL)
    table, units = made.table() * stretch, unit_halves(vectors, SEMANTIC) * stretch
    assert torch.equal(
        made.nearest(vectors), torch.cdist(units, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    )


def test_the_weight_decides_which_half_counts() -> None:
    vectors = torch.randn(50, SEMANTIC + PIXEL)
    semantic, pixel = quantizer((1,), 40, 0.0), quantizer((1,), 40, 1e6)
    units, table = unit_halves(vectors, SEMANTIC), semantic.table()
    assert torch.equal(semantic.nearest(vectors), (units[:, :SEMANTIC] @ table[:, :SEMANTIC].T).argmax(1))
    assert torch.equal(pixel.nearest(vectors), (units[:, SEMANTIC:] @ table[:, SEMANTIC:].T).argmax(1))


@settings(max_examples=10, deadline=None)
@given(first=st.floats(0.01, 100), second=st.floats(0.01, 100))
def test_lengths_of_halves_do_not_matter(first: float, second: float) -> None:
    made, vectors = quantizer((1,)), torch.randn(20, SEMANTIC + PIXEL)
    before = made.nearest(vectors)
    scale = torch.tensor([first] * SEMANTIC + [second] * PIXEL)
    assert torch.equal(made.nearest(vectors * scale), before)
    with torch.no_grad():
        made.semantic_codebook.mul_(second)
        made.pixel_codebook.mul_(first)
    assert torch.equal(made.nearest(vectors), before)


def test_vectors_without_direction_and_equal_rows_take_the_first() -> None:
    made = quantizer((1,), 12)
    assert made.nearest(torch.zeros(3, SEMANTIC + PIXEL)).tolist() == [0, 0, 0]
    with torch.no_grad():
        for table in made.parameters():
            table.copy_(table[:4].repeat(3, 1))
    assert made.nearest(torch.randn(200, SEMANTIC + PIXEL)).max() < 4
    with torch.no_grad():
        for table in made.parameters():
            table[1:] = 0  # a row without direction is further away than any that points the same way
    assert made.nearest(made.table()[:1]).item() == 0
    assert made.nearest(-made.table()[:1]).item() == 1


def test_a_permutation_of_both_tables_permutes_the_codes() -> None:
    made, z = quantizer(), maps(2, 4)
    before, order = made(z), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        made.semantic_codebook.copy_(made.semantic_codebook[order])
        halfway = made(z)
        made.pixel_codebook.copy_(made.pixel_codebook[order])
    after = made(z)
    assert torch.equal(order[after.codes], before.codes)
    torch.testing.assert_close(after.quant, before.quant)
    assert not torch.equal(order[halfway.codes], before.codes)
    assert not torch.allclose(halfway.quant, before.quant, atol=1e-2)


def test_pictures_do_not_see_each_other() -> None:
    made, z = quantizer((1, 2, 3, 5)), maps(4, 5)
    alone = torch.cat([made(one[None]).codes for one in z])
    assert torch.equal(made(z).codes, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_quantizer_is_float32_under_autocast(dtype: torch.dtype) -> None:
    made, z = quantizer(), maps(2, 4)
    plain, vectors = made(z), z.movedim(1, -1).flatten(0, 2)
    with torch.autocast("cpu", dtype=dtype):
        found, rows = made(z), made.lookup(plain.codes)
        ids = made.nearest(vectors)
        quant = made.features(plain.codes)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(ids, made.nearest(vectors))
    assert found.quant.dtype == rows.dtype == torch.float32
    assert torch.equal(found.quant, plain.quant)
    assert torch.equal(quant, plain.quant)
    assert torch.equal(made(z.to(dtype)).codes, made(z.to(dtype).float()).codes)


def test_prefixes_are_whole_scales() -> None:
    made, z = quantizer(), maps(2, 4)
    codes = made(z).codes
    assert made.lengths == (1, 5, 14, 30)
    sums = list(made.partial_sums(codes))
    for count, quant in zip(made.lengths, sums, strict=True):
        assert torch.equal(made.features(codes[:, :count]), quant)
        assert torch.equal(made.features(codes, made.scales_of(count)), quant)
    assert [part.shape[1] for part in made.split(codes)] == [1, 4, 9, 16]
    for a, b in pairwise(sums):
        assert not torch.allclose(a, b)
    for wrong in (0, 2, 13, 29, 31):
        with pytest.raises(InvalidParameterError, match="whole scales, 1, 5, 14, 30 codes"):
            made.features(torch.zeros(1, wrong, dtype=torch.int64))
    for upto in (0, 5, True):
        with pytest.raises(InvalidParameterError, match="upto"):
            made.features(codes, upto)
    with pytest.raises(InvalidParameterError, match="from 1 to 2"):
        made.features(codes[:, :5], 3)


def test_rows_have_unit_halves() -> None:
    made = quantizer()
    rows = made.lookup(torch.arange(24).view(2, 3, 4))
    assert rows.shape == (2, 3, 4, SEMANTIC + PIXEL)
    for half in (rows[..., :SEMANTIC], rows[..., SEMANTIC:]):
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(2, 3, 4), atol=1e-6, rtol=0)
    for codes in (torch.tensor([24]), torch.tensor([-1])):
        with pytest.raises(InvalidParameterError, match="expected 0 to 23"):
            made.lookup(codes)
    for codes in (torch.tensor([1.0]), torch.tensor([True])):
        with pytest.raises(InvalidParameterError, match="expected integers"):
            made.lookup(codes)


def test_gradients_pass_straight_through_and_the_norms() -> None:
    made = quantizer((3,))
    z = maps(2, 3).requires_grad_()
    found, weight = made(z), torch.randn(2, SEMANTIC + PIXEL, 3, 3)
    (found.quant * weight).sum().backward()
    for half in (slice(0, SEMANTIC), slice(SEMANTIC, None)):
        along = (z.grad[:, half] * z.detach()[:, half]).sum(dim=1)
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)
    own = maps(2, 3).requires_grad_()
    (unit_halves(own.movedim(1, -1), SEMANTIC).movedim(-1, 1) * weight).sum().backward()
    torch.testing.assert_close(z.grad, own.grad)
    assert all(table.grad is None for table in made.parameters())


def test_losses_are_means_over_scales_and_reach_what_they_train() -> None:
    made = quantizer((1, 2, 4))
    z = maps(3, 4).requires_grad_()
    found = made(z)
    assert torch.equal(found.vq_loss, found.commitment_loss)
    found.vq_loss.backward(retain_graph=True)
    assert z.grad is None
    used = found.codes.unique()
    for table in made.parameters():
        moved = (table.grad.norm(dim=1) > 0).nonzero().flatten()
        assert torch.equal(moved, used)
    made.zero_grad()
    found.commitment_loss.backward()
    assert z.grad.norm() > 0
    assert all(table.grad is None for table in made.parameters())
    plain = quantizer((4,))
    one = plain(z)
    units = unit_halves(z.movedim(1, -1), SEMANTIC)
    rows = plain.lookup(one.codes).view_as(units)
    torch.testing.assert_close(one.vq_loss, (rows - units).square().mean())


def test_a_dropped_scale_takes_no_part() -> None:
    made, z = quantizer((1, 2, 3, 4)), maps(2, 4)
    found, without = made(z, dropped=2), quantizer((1, 2, 4))
    want = without(z)
    assert torch.equal(found.codes, want.codes)
    assert torch.equal(found.quant, want.quant)
    assert torch.equal(found.vq_loss, want.vq_loss)
    for dropped in (0, 4, -1):
        with pytest.raises(InvalidParameterError, match="from 1 to 3"):
            made(z, dropped=dropped)
    torch.manual_seed(0)
    drawn = [made.draw_dropped(0.3) for _ in range(600)]
    share = sum(d is not None for d in drawn) / 600
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 600) ** 0.5
    assert {d for d in drawn if d is not None} == {1, 2, 3}
    assert made.draw_dropped(0.0) is None
    assert quantizer((4,)).draw_dropped(1.0) is None


def test_unused_rows_are_renewed_from_the_vectors() -> None:
    made, z = quantizer((1, 2, 4), rows=40), maps(8, 4)
    before, used = made.table(), made(z).codes.unique()
    assert 0 < len(used) < 40
    count = made.renew(z)
    after = made.table()
    assert count == 40 - len(used)
    assert torch.equal(after[used], before[used])
    assert made(z).codes.unique().numel() > len(used)
    everything = made.renew(z, unused_only=False)
    assert everything == 40
    assert made(z).vq_loss < quantizer((1, 2, 4), rows=40)(z).vq_loss
    few = quantizer((2,), rows=40)
    few.renew(maps(1, 2), unused_only=False)  # fewer vectors than rows
    assert few.table().unique(dim=0).shape[0] <= 4
    tables = []
    for _ in range(2):  # torch's generator decides everything
        again = quantizer((1, 2, 4), rows=40)
        torch.manual_seed(9)
        again.renew(z)
        tables.append(again.table())
    assert torch.equal(*tables)


@pytest.mark.parametrize("scales", [(), (0, 1), (2, 2), (3, 1), (1.0, 2), (True, 2)])
def test_scales_grow(scales: tuple[int, ...]) -> None:
    with pytest.raises(InvalidParameterError, match="scales"):
        checked_scales(scales)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"codebook_size": 0}, "codebook_size"),
        ({"semantic_dim": 1.5}, "semantic_dim"),
        ({"pixel_dim": True}, "pixel_dim"),
        ({"distance_weight": -1.0}, "distance_weight"),
        ({"distance_weight": float("nan")}, "distance_weight"),
    ],
)
def test_bad_sizes_are_errors(changes: dict[str, object], match: str) -> None:
    sizes = {"codebook_size": 4, "semantic_dim": 2, "pixel_dim": 2, "scales": (1, 2)}
    with pytest.raises(InvalidParameterError, match=match):
        PyramidQuantizer(**{**sizes, **changes})  # type: ignore[arg-type]


def test_bad_maps_are_errors() -> None:
    made = quantizer()
    for shape in ((2, 8, 4), (2, 7, 4, 4), (2, 8, 4, 5), (2, 8, 3, 3)):
        with pytest.raises(InvalidParameterError, match=r"expected \(B, 8, 4, 4\)"):
            made(torch.zeros(shape))
    with pytest.raises(InvalidParameterError, match=r"expected \(B, n\)"):
        made.split(torch.zeros(5, dtype=torch.int64))
