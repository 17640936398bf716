"""HiRED's own rule (which no released code implements) against slow definitions, and its invariants."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tests.methods.visual import NO_CLASS, TOWER, Source, item_of, mosaic, single, video, view_of
from tokred.core.errors import LayoutError
from tokred.core.sites import MediaLayout, VisualFeatures
from tokred.core.tokens import Keep, Resample
from tokred.vlm.hired import content_scores, hired_mask, official_order, regions_of_cells, tile_budgets

LAYOUTS = {
    "2x2": mosaic((2, 2)),
    "2x2, unpadded": mosaic((2, 2), cut_rows=2),
    "1x2": mosaic((1, 2), grid=(5, 5)),
    "3x1": mosaic((3, 1), grid=(3, 3), cut_columns=1),
    "3x3, odd": mosaic((3, 3), grid=(5, 7)),
    "overview last": mosaic((2, 3), grid=(4, 4), overview=6),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


def kept_cells(answer: Any, view: VisualFeatures) -> list[list[int]]:
    """The cells that each item keeps, in order."""
    if isinstance(answer, Keep):
        valid = torch.ones_like(answer.indices).bool() if answer.valid is None else answer.valid
        return [view.cells[row[ok]].tolist() for row, ok in zip(answer.indices, valid, strict=True)]
    return [view.cells[one.sources].tolist() for one in answer]


def slow_hired(view: VisualFeatures, item: int, rate: float, alpha: float) -> list[int]:
    """The paper's algorithm with loops, in Python floats."""
    layout = view.layout
    n, parts = layout.cells_per_partition, layout.partitions
    total = int((parts * n) * rate)
    attention = {layer: view.class_attention(layer)[item].double().sum(dim=1).tolist() for layer in (0, 4)}
    budgets = {0: 0}
    if layout.mosaic is None or layout.overview is None:
        budgets = {p: int(n * rate) for p in range(parts)}
    else:
        rows, columns = layout.grid
        tiles = [p for p in range(parts) if p != layout.overview]
        content = [0.0] * len(tiles)
        for y in range(rows):
            for x in range(columns):
                region = (y * layout.mosaic[0] // rows) * layout.mosaic[1] + x * layout.mosaic[1] // columns
                content[region] += attention[0][layout.overview][y * columns + x]
        first = min(int(alpha * total), n)
        pool = min(total - first, len(tiles) * n)
        budgets = {p: min(int(pool * c / sum(content)), n) for p, c in zip(tiles, content, strict=True)}
        budgets[layout.overview] = first
    kept = set()
    for p, budget in budgets.items():
        kept |= {p * n + j for j in sorted(range(n), key=lambda j: (-attention[4][p][j], j))[:budget]}
    return [cell for cell in layout.cells if cell in kept]


@each_layout
@pytest.mark.parametrize(("rate", "alpha"), [(0.2, 0.5), (0.4, 0.3), (0.7, 1.0), (0.55, 0.0), (0.01, 0.5)])
def test_it_equals_its_slow_definition(layout: MediaLayout, rate: float, alpha: float) -> None:
    view = view_of(layout, items=3)
    method = tokred.HiRED(rate, alpha)
    answer = method.select(view)
    cells = kept_cells(answer, view)
    for item in range(3):
        assert cells[item] == slow_hired(view, item, rate, alpha)
        assert len(cells[item]) <= method.kept(layout) <= int(layout.total_cells * rate)
        assert kept_cells(method.select(item_of(view, item)), view) == [cells[item]]
    assert isinstance(answer, Keep)
    assert (answer.indices.diff(dim=1) > 0).all()


@pytest.mark.parametrize("layout", [single(), single(5, 7), video()], ids=["1 tile", "odd", "video"])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.99, 0.01])
def test_partitions_without_an_overview_keep_their_own_share(layout: MediaLayout, rate: float) -> None:
    view = view_of(layout)
    method = tokred.HiRED(rate, alpha=0.9)
    cells = kept_cells(method.select(view), view)
    n = layout.cells_per_partition
    for item in range(2):
        assert cells[item] == slow_hired(view, item, rate, 0.9)
        assert len(cells[item]) == method.kept(layout) == layout.partitions * int(n * rate)


@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=6),
    st.integers(0, 60),
    st.integers(1, 12),
    st.integers(0, 4),
    st.booleans(),
)
def test_budgets_of_tiles(content: list[float], pool: int, cap: int, minimum: int, official: bool) -> None:
    k = len(content)
    caps = [max(cap - i, 0) for i in range(k)]
    pool = min(pool, sum(caps))
    both = {
        rule: tile_budgets(torch.tensor([content]), pool, caps, rule, minimum, official)[0].tolist()
        for rule in ("drop", "largest")
    }
    least = min(minimum, pool // k)
    for budgets in both.values():
        assert sum(budgets) <= pool
        assert all(min(least, cap) <= b <= cap for b, cap in zip(budgets, caps, strict=True))
    assert sum(both["largest"]) == pool
    wide = torch.tensor(content).double()
    if minimum == 0 and not official and wide.sum() > 0:
        quotas = (pool * wide / wide.sum()).tolist()
        assert both["drop"] == [min(int(q), c) for q, c in zip(quotas, caps, strict=True)]


def test_largest_remainders_by_hand() -> None:
    content = torch.tensor([[5.0, 3.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert tile_budgets(content, 7, [9, 9, 9], "drop").tolist() == [[3, 2, 1], [2, 2, 2], [2, 2, 2], [7, 0, 0]]
    assert tile_budgets(content, 7, [9, 9, 9], "largest").tolist() == [[4, 2, 1], [3, 2, 2], [3, 2, 2], [7, 0, 0]]
    # what a full tile cannot take goes to the others, in proportion
    assert tile_budgets(content, 7, [2, 9, 9], "largest").tolist() == [[2, 3, 2], [2, 3, 2], [2, 3, 2], [2, 3, 2]]
    assert tile_budgets(content, 7, [2, 9, 9], "drop").tolist()[0] == [2, 2, 1]


@pytest.mark.parametrize(("grid", "tiles"), [((6, 6), (2, 2)), ((5, 7), (3, 2)), ((4, 4), (1, 3))])
def test_regions(grid: tuple[int, int], tiles: tuple[int, int]) -> None:
    (rows, columns), (big_rows, big_columns) = grid, tiles
    got = regions_of_cells(grid, tiles).view(grid)
    for y in range(rows):
        for x in range(columns):
            assert got[y, x] == (y * big_rows // rows) * big_columns + x * big_columns // columns
    strips = regions_of_cells(grid, tiles, "strips").tolist()
    k, n = big_rows * big_columns, rows * columns
    if n % k == 0:
        assert strips == [j // (n // k) for j in range(n)]
    assert strips == sorted(strips)


@pytest.mark.parametrize("quadrant", range(4))
def test_attention_in_one_quadrant_gives_its_tile_the_pool(quadrant: int) -> None:
    layout = mosaic((2, 2), grid=(8, 8))
    first = torch.full((1, 64), 1e-9)
    y, x = 4 * (quadrant // 2), 4 * (quadrant % 2)
    first.view(8, 8)[y : y + 4, x : x + 4] = 1.0
    rows = first.expand(1, 5, 64)
    budgets = tokred.HiRED(0.2).budgets(layout, 1, rows)[0].tolist()
    pool = 64 - 32
    assert pool - budgets[1 + quadrant] <= 1
    strips = tokred.HiRED(0.2, regions="strips").budgets(layout, 1, rows)[0].tolist()
    assert [b > 0 for b in strips[1:]] == [quadrant < 2, quadrant < 2, quadrant >= 2, quadrant >= 2]


def test_alpha_divides_between_overview_and_tiles() -> None:
    layout, view = LAYOUTS["2x2"], view_of(LAYOUTS["2x2"], items=1)
    none = kept_cells(tokred.HiRED(0.2, alpha=0.0).select(view), view)[0]
    only = kept_cells(tokred.HiRED(0.2, alpha=1.0).select(view), view)[0]
    assert all(cell >= 16 for cell in none)
    assert all(cell < 16 for cell in only)
    assert len(only) == int(80 * 0.2)
    # alpha = 1 and a budget above N: the released code divides 0 by 0 here
    over = tokred.HiRED(0.5, alpha=1.0, official=True).budgets(layout, 1, torch.rand(1, 5, 16))[0].tolist()
    assert over == [16, 6, 6, 6, 6]


def test_the_released_count_by_hand() -> None:
    layout = mosaic((1, 2), grid=(2, 2))
    first = torch.tensor([[[4.0, 1.0, 3.0, 2.0]] * 3])
    method = tokred.HiRED(
        0.99, alpha=0.25, official=True
    )  # 3 marks: cells 0, 2, 3; strips {0, 1}, {2, 3}; pool min(11 - 2, 8)
    assert method.budgets(layout, 1, first).tolist() == [[2, 2, 4]]
    assert tokred.HiRED(0.5, count_m=1, score="count").budgets(layout, 1, first).tolist() == [[3, 3, 0]]
    assert content_scores(first[:, 0], torch.tensor([0, 0, 1, 1]), 2, marks=3).tolist() == [[1.0, 2.0]]
    assert content_scores(first[:, 0], torch.tensor([0, 0, 1, 1]), 2).tolist() == [[5.0, 5.0]]


@each_layout
def test_scaling_and_order_of_heads_change_nothing(layout: MediaLayout) -> None:
    def scale(source: Source) -> None:
        source.attention = {layer: 4.0 * rows.flip(2) for layer, rows in source.attention.items()}

    view, other = view_of(layout), view_of(layout, change=scale)
    for official in (False, True):
        method = tokred.HiRED(0.4, official=official)
        assert kept_cells(method.select(view), view) == kept_cells(method.select(other), other)


def test_transposing_image_and_mosaic_transposes_budgets() -> None:
    first = torch.rand(1, 6, 6)
    wide, tall = mosaic((2, 3), grid=(6, 6)), mosaic((3, 2), grid=(6, 6))
    method = tokred.HiRED(0.3)
    one = method.budgets(wide, 1, first.flatten(1)[:, None].expand(1, 7, 36))[0, 1:].view(2, 3)
    other = method.budgets(tall, 1, first.mT.flatten(1)[:, None].expand(1, 7, 36))[0, 1:].view(3, 2)
    assert torch.equal(one.T, other)


def test_ties_go_to_the_lower_cell_and_numbers_before_what_is_none() -> None:
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 0.0], [math.nan, 0.0, -1.0, math.nan, 0.0]]])
    mask = hired_mask(scores, torch.tensor([[2, 3]]))
    assert mask.int().tolist() == [[[0, 1, 1, 0, 0], [0, 1, 1, 0, 1]]]
    visible = torch.tensor([[True, False, True, True, True], [True, True, False, False, False]])
    mask = hired_mask(scores, torch.tensor([[2, 3]]), visible)
    assert mask.int().tolist() == [[[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layout = mosaic((2, 2), grid=(12, 12))
    view, low = view_of(layout), view_of(layout, dtype=dtype)
    answers = [kept_cells(tokred.HiRED(0.3).select(v), v) for v in (view, low)]
    for a, b in zip(*answers, strict=True):
        assert len(set(a) & set(b)) >= 0.97 * max(len(a), len(b))


def test_minimum_per_partition() -> None:
    layout = mosaic((2, 2))
    first = torch.zeros(1, 5, 16)
    first[:, :, 0] = 1.0  # all content in the first tile
    assert tokred.HiRED(0.5).budgets(layout, 1, first).tolist() == [[16, 16, 0, 0, 0]]
    assert tokred.HiRED(0.5, min_per_partition=3).budgets(layout, 1, first).tolist() == [[16, 15, 3, 3, 3]]
    assert tokred.HiRED(0.5, alpha=0.0, min_per_partition=3).budgets(layout, 1, first).tolist() == [[3, 16, 3, 3, 3]]
    # more than there is: an even share
    assert tokred.HiRED(13, min_per_partition=9).budgets(layout, 1, first).tolist() == [[5, 2, 2, 2, 2]]


def test_masked_padding_is_no_candidate() -> None:
    layout = mosaic((2, 2), cut_rows=2)
    view, total = view_of(layout, items=3), len(layout.cells)
    lost = tokred.HiRED(0.5, remainder="largest").select(view)
    kept = tokred.HiRED(0.5, remainder="largest", mask_padding=True).select(view)
    assert [len(cells) for cells in kept_cells(kept, view)] == [total // 2] * 3
    assert all(len(cells) < int(layout.total_cells * 0.5) for cells in kept_cells(lost, view))
    assert tokred.HiRED(total, mask_padding=True).bypasses(layout)
    with pytest.raises(ValueError, match=rf"{total + 1} tokens, but .* has {total}"):
        tokred.HiRED(total + 1, mask_padding=True).kept(layout)


def test_budgets_that_keep_everything_bypass() -> None:
    for layout in (*LAYOUTS.values(), single(), video()):
        for official in (False, True):
            assert tokred.HiRED(1.0, official=official).bypasses(layout)
            assert tokred.HiRED(layout.total_cells).bypasses(layout)
            assert not tokred.HiRED(0.99).bypasses(layout)
            assert not tokred.HiRED(layout.total_cells - 1).bypasses(layout)
        with pytest.raises(ValueError, match=rf"budget={layout.total_cells + 1} tokens.* {layout.total_cells}"):
            tokred.HiRED(layout.total_cells + 1).kept(layout)


def test_a_count_is_the_whole_of_an_image_or_video() -> None:
    view = view_of(video(frames=5))
    method = tokred.HiRED(13)
    frames = [[cell // 12 for cell in cells] for cells in kept_cells(method.select(view), view)]
    assert frames == [[0] * 2 + [1] * 3 + [2] * 2 + [3] * 3 + [4] * 3] * 2
    assert method.kept(view.layout) == 13


# -- the released packing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "size", "shape"),
    [((1, 2), (40, 80), (4, 6)), ((2, 1), (80, 40), (6, 4)), ((1, 3), (30, 90), (2, 6)), ((2, 2), (40, 56), (8, 12))],
)
def test_the_released_order_by_loops(tiles: tuple[int, int], size: tuple[int, int], shape: tuple[int, int]) -> None:
    n = 6
    order = official_order(mosaic(tiles, grid=(n, n), size=size))
    assert order[: n * n] == tuple(range(n * n))
    down, across = tiles[1], tiles[0]  # swapped
    top, left = (down * n - shape[0]) // 2, (across * n - shape[1]) // 2
    expected = []
    for y in range(top, top + shape[0]):
        for x in range(left, left + shape[1]):
            tile = (y // n) * across + x // n
            expected.append((1 + tile) * n * n + (y % n) * n + x % n)
    assert list(order[n * n :]) == expected


def test_the_swapped_grid_brings_cells_back_that_the_prompt_lacks() -> None:
    layout = mosaic((1, 2), grid=(6, 6), size=(60, 200), cut_rows=1)
    assert not set(official_order(layout)) <= set(layout.cells)
    view = view_of(layout)
    method = tokred.HiRED(0.9, official=True)
    assert method.needs(TOWER).hidden
    answers = method.select(view)
    rows = [view.class_attention(layer).sum(dim=2) for layer in (4, 0)]
    mask, every = method.mask(layout, *rows).flatten(1), view.project(view.hidden()).flatten(1, 2)
    assert isinstance(answers, list)
    for item, answer in enumerate(answers):
        assert isinstance(answer, Resample)
        cells = [cell for cell in official_order(layout) if mask[item, cell]]
        places = {cell: place for place, cell in enumerate(layout.cells)}
        assert answer.sources.tolist() == [places.get(cell, -1) for cell in cells]
        assert (answer.sources < 0).any()
        torch.testing.assert_close(answer.features, every[item, cells])


def test_square_mosaics_are_packed_as_ever() -> None:
    layout = mosaic((2, 2), grid=(6, 6), size=(40, 40))
    assert official_order(layout) == layout.cells
    assert isinstance(tokred.HiRED(0.3, official=True).select(view_of(layout)), Keep)


def test_batches_of_one_tile_take_the_first_mask_where_the_released_code_does() -> None:
    view = view_of(single(), items=3)
    released = kept_cells(tokred.HiRED(0.4, official=True).select(view), view)
    assert released == kept_cells(tokred.HiRED(0.4).select(item_of(view, 0)), view) * 3
    ours = kept_cells(tokred.HiRED(0.4).select(view), view)
    assert ours[0] == released[0]
    assert ours[1] != ours[0]


# -- towers and refusals ---------------------------------------------------------------------------------------------


def test_what_is_asked_of_the_tower() -> None:
    assert tokred.HiRED().needs(TOWER).rows == {0, 4}
    assert not tokred.HiRED().needs(TOWER).hidden
    assert tokred.HiRED(init_layer=2, final_layer=5).needs(TOWER).rows == {2, 5}
    needs = tokred.HiRED().needs(NO_CLASS)
    assert (needs.rows, needs.mass) == (frozenset(), {0, 4})
    assert tokred.HiRED(cls_source="map_head").needs(dataclasses.replace(NO_CLASS, has_probe=True)).probe


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"layer 6, .* layers 0 to 5") as layer:
        tokred.HiRED(final_layer=6).needs(TOWER)
    assert type(layer.value).__name__ == "LayerError"
    for method in (tokred.HiRED(cls_source="cls"), tokred.HiRED(official=True)):
        with pytest.raises(ValueError, match="class token") as none:
            method.needs(NO_CLASS)
        assert type(none.value).__name__ == "NoClassTokenError"
    with pytest.raises(ValueError, match="no attention pool"):
        tokred.HiRED(cls_source="map_head").needs(TOWER)
    pooled = dataclasses.replace(LAYOUTS["2x2"], uniform=False)
    for call in (tokred.HiRED().kept, lambda layout: tokred.HiRED().select(view_of(layout))):
        with pytest.raises(LayoutError, match="resampled"):
            call(pooled)
    assert issubclass(LayoutError, NotImplementedError)
    assert tokred.HiRED(1.0).bypasses(pooled)


@pytest.mark.parametrize("source", ["mean_received", "map_head"])
def test_towers_without_a_class_token(source: Any) -> None:
    tower = dataclasses.replace(NO_CLASS, has_probe=True)
    view = view_of(LAYOUTS["2x2"], tower)
    rows: Tensor = view.attention_mass(4) if source == "mean_received" else view.probe_attention()
    first = view.attention_mass(0) if source == "mean_received" else rows
    method = tokred.HiRED(0.3, cls_source=source)
    mask = method.mask(view.layout, rows.sum(dim=2), first.sum(dim=2))
    keep = method.select(view)
    assert kept_cells(keep, view) == [[c for c in view.layout.cells if m[c]] for m in mask.flatten(1)]
    if source == "mean_received":
        assert kept_cells(tokred.HiRED(0.3).select(view), view) == kept_cells(keep, view)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, "budget=0: "),
        ({"budget": 1.5}, "fraction"),
        ({"alpha": -0.1}, r"alpha=-0.1: .*\[0, 1\]"),
        ({"alpha": 1.01}, r"\[0, 1\]"),
        ({"score": "sum"}, "'mass', 'count'"),
        ({"regions": "rows"}, "'grid2d', 'strips'"),
        ({"count_m": -1}, "count_m=-1"),
        ({"init_layer": -1}, "init_layer=-1"),
        ({"final_layer": 1.5}, "final_layer=1.5"),
        ({"remainder": "keep"}, "'drop', 'largest'"),
        ({"min_per_partition": -1}, ">= 0"),
        ({"cls_source": "patch"}, "'auto', 'cls'"),
        ({"positions": "new"}, "'compact', 'original'"),
        ({"official": True, "cls_source": "mean_received"}, "class token"),
    ],
)
def test_fields_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokred.HiRED(**options)
