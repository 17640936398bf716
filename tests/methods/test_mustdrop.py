"""MustDrop's three stages, and the tokens handed on between them, against slow definitions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tests.methods.models import images, tiny
from tests.methods.visual import TOWER, Source, mosaic, single, video, view_of
from tokred import ops
from tokred.core.carried import CarriedTokens
from tokred.core.decoder import CacheAfterPrefill, LayerNeeds, PrefillLayer
from tokred.core.errors import InvalidParameterError, LayerError, LayoutError
from tokred.core.sites import AttentionTap, DecoderInfo, EncoderBlock, EncoderInfo, MediaLayout, VisualFeatures
from tokred.core.tokens import Merge, TokenTable
from tokred.vlm import mustdrop
from tokred.vlm.mustdrop import KEY_MARK, MustDrop, WindowMerge, filter_tokens, text_attention, window_similarity

DECODER = DecoderInfo(depth=20, dim=32, width=24, layer_macs=1, heads=3, kv_heads=3, head_dim=8)
ENCODER = EncoderInfo(6, 16, 2, 2, 8, 1, 1, 36, (6, 6), 1, 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- stage 1: windows ------------------------------------------------------------------------------------------------


def block(x: Tensor, grid: tuple[int, int] | None, seed: int = 0, **table: Any) -> EncoderBlock:
    """A view of tokens (B, 1 + N, C), a class token in front, with random queries and keys."""
    batch, n = x.shape[0], x.shape[1]
    info = dataclasses.replace(ENCODER, dim=x.shape[2], tokens=n - 1, grid=grid)
    tap = AttentionTap(2 * normal(batch, 2, n, 8, seed=seed), 2 * normal(batch, 2, n, 8, seed=seed + 1), 8**-0.5)
    if table.get("valid") is not None:
        mask = torch.cat([torch.ones(batch, 1, dtype=torch.bool), table["valid"]], dim=1)
        tap.mask = torch.where(mask, 0.0, -math.inf)[:, None, None]
    return EncoderBlock(0, info, x, TokenTable(batch, n - 1, grid=grid, **table), lambda: tap)


def alike(batch: int, grid: tuple[int, int], window: tuple[int, int], seed: int = 0) -> Tensor:
    """(B, 1 + N, C): windows whose tokens are one vector and more or less noise."""
    (rows, columns), (height, width) = grid, window
    common = normal(batch, rows // height, 1, columns // width, 1, 5, seed=seed)
    noise = normal(batch, rows // height, height, columns // width, width, 5, seed=seed + 1)
    level = torch.rand((*common.shape[:-1], 1), generator=torch.Generator().manual_seed(seed))
    x = (common + 1.5 * level * noise).reshape(batch, rows * columns, 5)
    return torch.cat([normal(batch, 1, 5, seed=seed + 2), x], dim=1)


def windows_of(grid: tuple[int, int], window: tuple[int, int]) -> list[list[int]]:
    (rows, columns), (height, width) = grid, window
    found = []
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            found.append([y * columns + x for y in range(top, top + height) for x in range(left, left + width)])
    return found


def slow_similarity(x: Tensor, members: list[int]) -> float:
    rows = [[float(value) for value in x[a].tolist()] for a in members]
    lengths = [max(math.sqrt(math.fsum(value * value for value in row)), 1e-8) for row in rows]
    total = 0.0
    for a, first in enumerate(rows):
        for b, second in enumerate(rows):
            if a != b:
                total += math.fsum(p * q for p, q in zip(first, second, strict=True)) / (lengths[a] * lengths[b])
    return total / (len(members) * (len(members) - 1))


def slow_merge(
    x: Tensor, grid: tuple[int, int], window: tuple[int, int], count: int, order: str = "official"
) -> list[list[int]]:
    """The tokens that each slot is the mean of, of one image (N, C)."""
    windows = windows_of(grid, window)
    similarity = [slow_similarity(x, members) for members in windows]
    chosen = sorted(range(len(windows)), key=lambda i: -similarity[i])[:count]
    merged = [windows[i] for i in chosen]
    left = [[i] for i in range(grid[0] * grid[1]) if not any(i in members for members in merged)]
    slots = merged + left
    return slots if order == "official" else sorted(slots)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3)).filter(lambda pair: pair[0] * pair[1] > 1)


@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sizes,
    st.floats(-1.2, 1.0),
    st.booleans(),
    st.sampled_from(["official", "raster"]),
    st.integers(0, 99),
)
@settings(max_examples=40)
def test_windows_merge_as_defined(
    batch: int,
    many: tuple[int, int],
    window: tuple[int, int],
    threshold: float,
    official: bool,
    order: str,
    seed: int,
) -> None:
    grid = (many[0] * window[0], many[1] * window[1])
    x = alike(batch, grid, window, seed)
    windows = windows_of(grid, window)
    slow = torch.tensor([[slow_similarity(row, members) for members in windows] for row in x[:, 1:]])
    torch.testing.assert_close(window_similarity(x[:, 1:], grid, window), slow, atol=1e-5, rtol=0)
    if (slow - threshold).abs().min() < 1e-4:
        return
    counts = (slow >= threshold).sum(dim=1)
    if official:
        counts = counts.min().expand(batch)
    part = WindowMerge(window=window, spatial_threshold=threshold, order=order, common=official)
    answer = part.reduce(block(x, grid), "merge")
    if not counts.any():
        assert answer is None
        return
    assert isinstance(answer, Merge)
    assert (answer.valid is None) == (len(set(counts.tolist())) == 1)
    merged, totals = ops.merge_tokens(x[:, 1:], answer.assignment, answer.slots)
    area = window[0] * window[1]
    assert answer.slots == grid[0] * grid[1] - int(counts.min()) * (area - 1)
    for b in range(batch):
        want = slow_merge(x[b, 1:], grid, window, int(counts[b]), order)
        torch.testing.assert_close(merged[b, : len(want)], torch.stack([x[b, 1:][one].mean(dim=0) for one in want]))
        assert totals[b].tolist() == [len(one) for one in want] + [0] * (answer.slots - len(want))
        assert answer.representative[b, : len(want)].tolist() == [one[0] for one in want]
        if answer.valid is not None:
            assert answer.valid[b].tolist() == [i < len(want) for i in range(answer.slots)]
    mass = (merged * totals[..., None]).sum(dim=1)
    torch.testing.assert_close(mass, x[:, 1:].sum(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_what_a_batch_merges_of_an_image_is_what_it_merges_alone(seed: int) -> None:
    x, part = alike(4, (6, 9), (3, 3), seed), WindowMerge(spatial_threshold=0.4)
    together = part.reduce(block(x, (6, 9)), "merge")
    assert together is not None
    assert together.valid is not None
    for b in range(4):
        real = int(together.valid[b].sum())
        alone = part.reduce(block(x[b : b + 1], (6, 9)), "merge")
        if alone is None:
            assert together.assignment[b].tolist() == list(range(54))
            continue
        assert alone.slots == real
        assert torch.equal(alone.assignment[0], together.assignment[b])
        assert torch.equal(alone.representative[0], together.representative[b, :real])


def test_equal_windows_merge_from_the_lower_on() -> None:
    """Sixteen windows of one value: all are equally similar."""
    x = normal(1, 1, 5).expand(1, 65, 5).contiguous()
    answer = WindowMerge(window=(2, 2), retained_tokens=50).reduce(block(x, (8, 8)), "merge")
    assert answer is not None
    assert answer.slots == 64 - 5 * 3
    assert answer.representative[0, :5].tolist() == [0, 2, 4, 6, 16]
    merged, _ = ops.merge_tokens(x[:, 1:], answer.assignment, answer.slots)
    torch.testing.assert_close(merged, x[:, : answer.slots])
    assert window_similarity(x[:, 1:], (8, 8), (2, 2)).sub(1).abs().max() < 1e-6


def test_zero_and_broken_tokens_merge_with_nothing() -> None:
    x = alike(1, (4, 4), (2, 2))
    x[0, 1:] = 1.0
    x[0, 1] = 0.0
    x[0, 16] = math.nan
    similarity = window_similarity(x[:, 1:], (4, 4), (2, 2))
    assert similarity[0, 0] == pytest.approx(0.5)
    assert similarity[0, 3].isnan()
    answer = WindowMerge(window=(2, 2), spatial_threshold=-1.0).reduce(block(x, (4, 4)), "merge")
    assert answer is not None
    assert answer.slots == 7  # three windows and the four tokens of the broken one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_similarity_in_other_dtypes(dtype: torch.dtype) -> None:
    x = alike(2, (4, 6), (2, 3))[:, 1:].to(dtype)
    got = window_similarity(x, (4, 6), (2, 3))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    slow = [[slow_similarity(row, members) for members in windows_of((4, 6), (2, 3))] for row in x]
    torch.testing.assert_close(got, torch.tensor(slow).to(got), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tokens", "left"), [(192, 192), (128, 128), (64, 64), (576, 576), (999, 576), (1, 64)])
def test_retained_tokens(tokens: int, left: int) -> None:
    part = WindowMerge(retained_tokens=tokens)
    assert part.count(576, "merge") == left
    answer = part.reduce(block(alike(2, (24, 24), (3, 3)), (24, 24)), "merge")
    assert (576 if answer is None else answer.slots) == left


def test_rules_by_block() -> None:
    assert WindowMerge().bind(ENCODER) == {0: "merge", 5: "key"}
    assert WindowMerge(merge_layer=3, spatial_threshold=1.0).bind(ENCODER) == {3: "merge", 5: "key"}
    assert WindowMerge(spatial_threshold=1.1).bind(ENCODER) == {5: "key"}
    assert WindowMerge(spatial_threshold=1.1, retained_tokens=9).bind(ENCODER) == {0: "merge", 5: "key"}
    assert WindowMerge(key_rate=0.0, merge_layer=5).bind(ENCODER) == {5: "merge"}
    assert WindowMerge(key_rate=0.0, spatial_threshold=2.0).is_identity(ENCODER)
    with pytest.raises(LayerError, match=r"merge_layer names block 6, but this model has 6"):
        WindowMerge(merge_layer=6).bind(ENCODER)
    with pytest.raises(LayerError, match=r"merge_layer=5 is the last block"):
        WindowMerge(merge_layer=5).bind(ENCODER)
    assert WindowMerge().plan(ENCODER) == [36] * 6
    assert WindowMerge(retained_tokens=20).plan(ENCODER) == [20] * 6
    assert WindowMerge().cost(ENCODER, 36, "merge") == 2 * 36 * 16
    assert WindowMerge().cost(ENCODER, 20, "key") == 21 * 16


def test_grids_that_windows_do_not_fit() -> None:
    part = WindowMerge()
    with pytest.raises(InvalidParameterError, match=r"window=\(3, 3\): the grid of 6 x 4 patch tokens"):
        part.reduce(block(alike(1, (6, 4), (2, 2)), (6, 4)), "merge")
    with pytest.raises(LayoutError, match=r"windows of 3 x 3 .* the 36 tokens after block 0 form none"):
        part.reduce(block(alike(1, (6, 6), (3, 3)), None), "merge")
    view = block(alike(1, (6, 6), (3, 3)), (6, 6))
    view.table = view.table.apply(0, "other", tokred.core.tokens.Keep(torch.arange(30)[None]))
    with pytest.raises(LayoutError, match="no longer form one"):
        part.reduce(view, "merge")


# -- stage 1: key tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("rate", [0.08, 0.5, 1.0])
def test_key_tokens(classes: int, rate: float) -> None:
    """Three images with 20, 17 and 5 real tokens."""
    valid = torch.arange(20) < torch.tensor([20, 17, 5])[:, None]
    view = block(normal(3, 21, 16), None, valid=valid)
    view.info = dataclasses.replace(view.info, class_tokens=classes)
    assert WindowMerge(key_rate=rate).reduce(view, "key") is None
    marked = view.written[KEY_MARK]
    assert marked.shape == (3, 20)
    for b, n in enumerate((20, 17, 5)):
        q, k = view.queries()[b].double(), view.keys()[b, :, : n + 1].double()
        weights = (q @ k.transpose(1, 2) * 8**-0.5).softmax(dim=-1)  # (H, 21, n + 1)
        scores = weights[:, 0, 1:].mean(dim=0) if classes else weights[:, : n + 1, 1:].sum(dim=1).mean(dim=0)
        best = sorted(range(n), key=lambda i: -scores[i].item())[: math.ceil(rate * n)]
        assert marked[b].nonzero()[:, 0].tolist() == sorted(best)


def test_merging_and_marking_in_a_model() -> None:
    """Real blocks: a padded batch gives each image what it gives alone, and marks follow the tokens."""
    model, x = tiny(img_size=48), images(3, 48)
    x[1] = 0.3  # one plain picture
    part = WindowMerge(window=(2, 2), spatial_threshold=0.85, key_rate=0.2)
    with tokred.patch(model, part) as patch, torch.no_grad():
        together = model(x)
        step = patch.trace[0]
        assert step.valid is not None
        counts = step.valid.sum(dim=1).tolist()
        assert len(set(counts)) > 1
        for b in range(3):
            torch.testing.assert_close(model(x[b : b + 1])[0], together[b], atol=1e-5, rtol=1e-4)
            table = patch.trace._table
            assert table is not None
            assert table.marks[KEY_MARK].shape == (1, counts[b])
            assert table.marks[KEY_MARK].sum() == math.ceil(0.2 * counts[b])


# -- between encoder and language model ------------------------------------------------------------------------------


class Tower(Source):
    """A source that knows which cells the tower carried on."""

    cells: Sequence[Tensor]

    def carried(self, item: int) -> Tensor:
        return self.cells[item]


def carried_view(layout: MediaLayout, cells: Sequence[Sequence[int]], **changes: Any) -> VisualFeatures:
    view = view_of(layout, dataclasses.replace(TOWER, **changes), items=len(cells))
    assert isinstance(view.source, Source)
    view.source.__class__ = Tower
    view.source.cells = [torch.tensor(one, dtype=torch.long) for one in cells]  # type: ignore[attr-defined]
    return view


def test_tokens_go_on_in_the_order_of_the_tower() -> None:
    layout, orders = single(4, 4), [[5, 0, 9, 2], [3], list(range(16)), []]
    view = carried_view(layout, orders)
    method = CarriedTokens()
    answers = method.select(view)
    assert answers is not None
    for item, (answer, order) in enumerate(zip(answers, orders, strict=True)):
        assert answer.sources.tolist() == order
        assert answer.transfer is None
        assert torch.equal(answer.features, view.features[item, order])
    assert method.select(carried_view(layout, [range(16)] * 2)) is None
    assert method.kept(layout) == 16
    assert not method.bypasses(layout)
    assert method.bypasses(MediaLayout("image", 1, (0, 0), ()))
    assert method.keep_newline
    assert not method.needs(TOWER).hidden


@pytest.mark.parametrize("tiles", [(2, 2), (1, 2)])
def test_stitched_tiles_stay_stitched(tiles: tuple[int, int]) -> None:
    layout = mosaic(tiles, cut_rows=1)
    in_order = carried_view(layout, [range(layout.total_cells)])
    assert CarriedTokens().select(in_order) is None
    half = list(range(0, layout.total_cells, 3))[::-1]
    answers = CarriedTokens().select(carried_view(layout, [half]))
    assert answers is not None
    assert answers[0].sources.tolist() == [i for i, cell in enumerate(layout.cells) if cell in half]


@pytest.mark.parametrize("cut", [0, 1])
def test_flat_tiles(cut: int) -> None:
    layout, method = mosaic((2, 2), cut_rows=cut), CarriedTokens(flat=True)
    cells = [60, 3, 2, *range(20, 40), 79, 64]
    for order in (list(range(layout.total_cells)), cells):
        view = carried_view(layout, [order])
        answers = method.select(view)
        assert answers is not None
        want = view.project(view.hidden()[0].flatten(0, 1)[order])
        torch.testing.assert_close(answers[0].features, want)
        at = {cell: i for i, cell in enumerate(layout.cells)}
        assert answers[0].sources.tolist() == [at.get(cell, -1) for cell in order]
    assert method.kept(layout) == layout.total_cells == 80
    assert not method.keep_newline
    assert method.needs(TOWER).hidden
    assert method.select(carried_view(single(), [range(16)])) is None


def test_hosts_whose_tokens_are_no_tower_tokens_get_all() -> None:
    layout = single()
    for change in ({"merge": 2}, {"uniform": False}):
        view = carried_view(dataclasses.replace(layout, **change), [[3, 1]])
        assert CarriedTokens().select(view) is None
        assert CarriedTokens(flat=True).select(view) is None
    assert CarriedTokens().select(carried_view(layout, [[3, 1]], projects=False)) is None
    frames = CarriedTokens().select(carried_view(video(), [[30, 2]]))
    assert frames is not None
    assert frames[0].sources.tolist() == [30, 2]
    assert frames[0].keep_end


# -- stage 2: the filter ---------------------------------------------------------------------------------------------


@dataclass
class Attention:
    """A `LayerSource` of a given attention matrix (B, H, T, T)."""

    matrix: Tensor

    def attention_rows(self, own: bool, rows: Tensor) -> Tensor:
        assert not own
        return self.matrix.gather(2, rows[:, None, :, None].expand(-1, self.matrix.shape[1], -1, self.matrix.shape[3]))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nothing here should ask for {name}")


def prompt(rows: Sequence[str], seed: int = 0, keys: float | None = 0.2) -> PrefillLayer:
    """Prompts such as "..tt00n0011t": padding, text, the visual tokens of images 0 and 1, "n" a row end of image 0."""
    batch, length, rng = len(rows), len(rows[0]), torch.Generator().manual_seed(seed)
    visual = torch.tensor([[c.isdigit() for c in row] for row in rows])
    text = torch.tensor([[c in "tn" for c in row] for row in rows])
    media = torch.tensor([[int(c) if c.isdigit() else 0 if c == "n" else -1 for c in row] for row in rows])
    allowed = (torch.arange(length)[:, None] >= torch.arange(length)) & (visual | text)[:, None, None]
    logits = (2 * normal(batch, DECODER.heads, length, length, seed=seed)).masked_fill(~allowed, -math.inf)
    marks = {}
    if keys is not None:
        marks[KEY_MARK] = visual & (torch.rand(batch, length, generator=rng) < keys)
    source = Attention(logits.softmax(dim=-1))  # rows of padding are not numbers, as in a host they may be
    columns = torch.arange(length).expand(batch, -1)
    return PrefillLayer(
        3, DECODER, normal(batch, length, 4), visual, text, columns, media, visual.sum(1), marks, source
    )


def slow_filter(view: PrefillLayer, b: int, row: str, gamma: float, alpha: float, official: bool = False) -> list[bool]:
    """Loops over the tokens of one prompt."""
    attention = view.source.matrix[b].double().mean(dim=0)  # type: ignore[attr-defined]
    images = [i for i, c in enumerate(row) if c.isdigit()]
    if not images:
        return [True] * len(row)
    prunable, asked = images, [t for t in range(images[0], len(row)) if row[t] == "t"]
    if official:
        prunable = [i for i in images if row[i] == row[images[0]]]
        asked = [t for t in range(images[0], len(row)) if row[t] not in (row[images[0]], "n")]
    received = {j: [attention[t, j].item() for t in asked] for j in prunable}
    total = math.fsum(math.fsum(values) for values in received.values())
    key = view.marks[KEY_MARK][b].tolist() if KEY_MARK in view.marks else [False] * len(row)
    keep = [True] * len(row)
    for j, values in received.items():
        if values and math.fsum(values) < gamma * total and max(values) < alpha and not key[j]:
            keep[j] = False
    return keep


PROMPTS = (
    ["tt0000000000ttt", "..t000000ttt00t", ".....0000tttttt"],
    ["tt0000ttt11111t", "....0000n0000tt", "ttttttttttttttt"],
    ["tttt0000n0000n1", "ttttttttt000000", "......0tttttttt"],
    ["0" * 15, "t" * 8 + "0" * 7],
)


@pytest.mark.parametrize("rows", PROMPTS, ids=range(len(PROMPTS)))
@pytest.mark.parametrize("official", [False, True])
@given(st.floats(0.02, 0.5), st.floats(0.01, 0.9), st.integers(0, 9), st.sampled_from([None, 0.2]))
@settings(max_examples=12)
def test_the_filter(rows: list[str], official: bool, gamma: float, alpha: float, seed: int, keys: float | None) -> None:
    method = MustDrop(None, global_threshold=gamma, individual_threshold=alpha, official=official)
    view = prompt(rows, seed, keys)
    answer = method.prune(view)
    keep = torch.ones_like(view.visual) if answer is None else answer.keep
    want = torch.tensor([slow_filter(view, b, row, gamma, alpha, official) for b, row in enumerate(rows)])
    assert torch.equal(keep | ~view.visual, want | ~view.visual)
    assert keep[~view.visual].all()
    for key in view.marks.values():
        assert keep[key].all()


@pytest.mark.parametrize("entries", [1, 500, 1000])
def test_queries_in_parts_give_the_same(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    view, method = prompt(PROMPTS[0]), MustDrop(None, global_threshold=0.1, individual_threshold=0.2)
    whole = method.prune(view)
    monkeypatch.setattr(mustdrop, "_ENTRIES", entries)
    parts = method.prune(view)
    assert whole is not None
    assert parts is not None
    assert torch.equal(whole.keep, parts.keep)
    assert not whole.keep.all()


@pytest.mark.parametrize("seed", range(4))
def test_higher_thresholds_keep_no_more(seed: int) -> None:
    view = prompt(PROMPTS[0], seed)
    steps = [0.0, 0.03, 0.1, 0.3, 1.5]
    kept = {}
    for gamma, alpha in itertools.product(steps, steps):
        answer = MustDrop(None, global_threshold=gamma, individual_threshold=alpha).prune(view)
        assert answer is not None
        kept[gamma, alpha] = answer.keep
        below = [value for (a, b), value in kept.items() if a <= gamma and b <= alpha]
        assert not (answer.keep & ~torch.stack(below).all(dim=0)).any()
        if min(gamma, alpha) == 0:
            assert answer.keep.all()
    assert torch.equal(kept[1.5, 1.5] & view.visual, view.marks[KEY_MARK])


def test_equal_scores_are_not_below_their_share() -> None:
    attention = torch.full((1, 2, 3, 4), 0.25)
    g, u = text_attention(attention)
    every = torch.ones(1, 4, dtype=torch.bool)
    assert filter_tokens(g, u, every, 0.25, 1.0).all()  # strict: the share is exactly gamma
    assert not filter_tokens(g, u, every, 0.26, 1.0).any()
    assert filter_tokens(g, u, every, 0.26, 0.25).all()
    key = torch.tensor([[True, False, False, False]])
    assert torch.equal(filter_tokens(g, u, every, 0.26, 0.26, key), key)


def test_layers_of_the_filter() -> None:
    before = LayerNeeds(previous=True)
    assert MustDrop().layers(DECODER) == dict.fromkeys((3, 7, 11, 15), before)
    shallow = dataclasses.replace(DECODER, depth=7)
    assert MustDrop().layers(shallow) == {3: before, 7: before}
    assert MustDrop(pruning_layers=[4]).layers(shallow) == {5: before}
    with pytest.raises(LayerError, match=r"pruning_layers names block 9, but this model has 7"):
        MustDrop(pruning_layers=(2, 9)).layers(shallow)
    with pytest.raises(LayerError, match="pass pruning_layers="):
        MustDrop().layers(dataclasses.replace(DECODER, depth=2))
    assert MustDrop(None).layers(DECODER) == {}
    assert MustDrop(stages=("encoder", "decode")).layers(DECODER) == {}


# -- stage 3: the cache ----------------------------------------------------------------------------------------------


def passed(rows: Sequence[str], layers: Sequence[int], depth: int, seed: int) -> tuple[CacheAfterPrefill, list[Any]]:
    """Prompts whose visual tokens are dropped at random after `layers`; and the survivor lists of each row."""
    rng = torch.Generator().manual_seed(seed)
    current = [[i for i, c in enumerate(row) if c != "."] for row in rows]
    lists: list[list[list[int]]] = []  # one a stage: for each row the places that survive
    columns, valid, visual = [], [], []
    for layer in range(depth):
        width = max(map(len, current))
        columns.append(torch.tensor([[0] * (width - len(c)) + c for c in current]))
        valid.append(torch.tensor([[False] * (width - len(c)) + [True] * len(c) for c in current]))
        seen = [[rows[b][i].isdigit() for i in c] for b, c in enumerate(current)]
        visual.append(torch.tensor([[False] * (width - len(c)) + c for c in seen]))
        if layer in layers:
            stays = [
                [p for p, i in enumerate(c) if not rows[b][i].isdigit() or torch.rand(1, generator=rng) < 0.6]
                for b, c in enumerate(current)
            ]
            lists.append(stays)
            current = [[c[p] for p in stay] for c, stay in zip(current, stays, strict=True)]
    return CacheAfterPrefill(dataclasses.replace(DECODER, depth=depth), columns, valid, visual, {}), lists


@given(st.integers(0, 60), st.sampled_from([(0, 2, 3), (1,), (1, 2, 4), (2, 4)]))
def test_the_cache_keeps_the_composed_survivors(seed: int, layers: tuple[int, ...]) -> None:
    rows, depth = ["tt0000000t11111t", "...t00000ttttttt"], 6
    view, lists = passed(rows, layers, depth, seed)
    cut = MustDrop(64, pruning_layers=layers).cut_cache(view)
    # survivors of later stages, backwards: places in the sequence that enters each pruning layer
    final = [list(stage) for stage in lists]
    for stage in range(len(layers) - 2, -1, -1):
        final[stage] = [[f[p] for p in g] for f, g in zip(lists[stage], final[stage + 1], strict=True)]
    kept = {} if cut is None else cut.keep
    for layer in range(depth):
        width = view.columns[layer].shape[1]
        for b in range(len(rows)):
            length = int(view.valid[layer][b].sum())
            want = set(range(length))
            if layers[0] <= layer <= layers[-1]:
                want = set(final[next(s for s, at in enumerate(layers) if at >= layer)][b])
            got = kept[layer][b] if layer in kept else view.valid[layer][b]
            assert set((got[width - length :]).nonzero()[:, 0].tolist()) == want
            assert not got[: width - length].any()
    assert all(layer >= layers[0] for layer in kept)
    alike = MustDrop(stages=("decode",)).cut_cache(view)
    assert (alike is None) == (cut is None)
    if cut is not None and alike is not None and layers[0] in cut.keep:
        assert cut.keep.keys() >= alike.keep.keys()
        assert all(torch.equal(cut.keep[layer], alike.keep[layer]) for layer in alike.keep)


def test_a_cache_that_lost_nothing_stays() -> None:
    view, _ = passed(["tt000t"], (), 5, 0)
    for method in (MustDrop(64, pruning_layers=(2,)), MustDrop(stages=("decode",)), MustDrop(None)):
        assert method.cuts_cache(DECODER)
        assert method.cut_cache(view) is None
    assert not MustDrop(stages=("encoder", "prefill")).cuts_cache(DECODER)


def test_columns_need_not_be_dense() -> None:
    """Of a prompt that was reduced before, columns 3 and 40 are left of 2, 3, 17, 40."""
    true = torch.ones(1, 4, dtype=torch.bool)
    columns = [torch.tensor([[2, 3, 17, 40]]), torch.tensor([[2, 3, 17, 40]]), torch.tensor([[2, 40]])]
    view = CacheAfterPrefill(
        dataclasses.replace(DECODER, depth=3),
        columns,
        [true, true, true[:, :2]],
        [torch.tensor([[False, True, True, True]])] * 2 + [torch.tensor([[False, True]])],
        {},
    )
    cut = MustDrop(64, pruning_layers=(1,)).cut_cache(view)
    assert cut is not None
    assert {layer: keep.tolist() for layer, keep in cut.keep.items()} == {1: [[True, False, False, True]]}


# -- the method ------------------------------------------------------------------------------------------------------


def test_presets_and_parts() -> None:
    assert [MustDrop(preset).thresholds() for preset in (192, 128, 64, None)] == [
        (0.001, 0.001),
        (0.0012, 0.001),
        (0.011, 0.01),
        (1.0, 0.0),
    ]
    assert MustDrop(64, global_threshold=0.005).thresholds() == (0.005, 0.01)
    assert MustDrop().replace(preset=64).thresholds() == (0.011, 0.01)
    part = MustDrop(official=True, window=(2, 2), key_rate=0.1, order="raster").encoder_part()
    assert part == WindowMerge(window=(2, 2), key_rate=0.1, order="raster", common=True)
    assert MustDrop(None).encoder_part() == WindowMerge(key_rate=0.0)  # no filter that keys could be spared by
    assert MustDrop().own_decode_position == "logical"
    assert MustDrop(official=True).own_decode_position == "cache_length"
    assert MustDrop(official=True).visual_part() == CarriedTokens(flat=True)
    assert MustDrop(stages=["prefill"]).encoder_part() is None
    assert MustDrop(stages=["prefill"]).visual_part() is None


def test_sites_by_stage() -> None:
    every = ("EncoderBlock", "VisualFeatures", "PrefillLayer", "CacheAfterPrefill")
    assert MustDrop().acts_at(every) == every
    assert MustDrop(stages=["encoder"]).acts_at(every) == every[:2]
    assert MustDrop(stages=["decode", "prefill"]).acts_at(every) == every[2:]


def test_json_and_repr() -> None:
    methods = [
        MustDrop(),
        MustDrop(64, True, 0.1, 0.2, [3, 5], [2, 4], 0.7, 1, 0.2, "raster", 30, "logical", ["decode"], "original"),
        MustDrop(None, stages=["decode", "encoder"]),
    ]
    for method in methods:
        again = tokred.from_dict(json.loads(json.dumps(method.to_dict())))
        assert again == method
        assert hash(again) == hash(method)
    assert repr(MustDrop()) == "MustDrop()"
    assert repr(MustDrop(64, official=True)) == "MustDrop(preset=64, official=True)"
    assert methods[2].stages == ("encoder", "decode")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", 100),
        ("global_threshold", -0.1),
        ("individual_threshold", math.nan),
        ("global_threshold", True),
        ("pruning_layers", (3, 2)),
        ("pruning_layers", ()),
        ("window", (1, 1)),
        ("window", 3),
        ("window", (0, 3)),
        ("spatial_threshold", math.inf),
        ("spatial_threshold", "0.8"),
        ("merge_layer", -1),
        ("key_rate", 1.1),
        ("order", "descending"),
        ("retained_tokens", 0),
        ("decode_position", "official"),
        ("stages", ()),
        ("stages", "prefill"),
        ("stages", ("prefill", "prefill")),
        ("stages", ("vision",)),
        ("positions", "renumbered"),
    ],
)
def test_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(InvalidParameterError, match=field):
        MustDrop(**{field: value})


def test_tokens_and_work_by_layer() -> None:
    method = MustDrop(64)
    counts = method.entering(DECODER, 300, kept=40)
    assert counts == (300,) * 3 + (40,) * 17
    with pytest.raises(InvalidParameterError, match="give kept="):
        method.entering(DECODER, 300)
    assert MustDrop(stages=["encoder"]).entering(DECODER, 300) == (300,) * 20
    pairs = [30 * (tokens + 30) for tokens in (300, 40, 40, 40)]
    assert method.scoring_macs(DECODER, counts, text=30) == 24 * sum(pairs)
