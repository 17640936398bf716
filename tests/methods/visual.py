"""Made-up views of the `VisualFeatures` site: layouts by plain loops, and a source that hands out given tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokred.core.sites import MediaLayout, TowerInfo, VisualFeatures

TOWER = TowerInfo(depth=6, heads=3, has_class=True, feature_layer=4, projects=True, dim=12)
NO_CLASS = dataclasses.replace(TOWER, has_class=False)
NEWLINE, END = MediaLayout.NEWLINE, MediaLayout.END


def single(rows: int = 4, columns: int = 4) -> MediaLayout:
    """One tile, as LLaVA-1.5."""
    return MediaLayout("image", 1, (rows, columns), tuple(range(rows * columns)))


def video(frames: int = 3, rows: int = 3, columns: int = 4) -> MediaLayout:
    return MediaLayout("video", frames, (rows, columns), (*range(frames * rows * columns), END))


def mosaic(
    tiles: tuple[int, int],
    grid: tuple[int, int] = (4, 4),
    size: tuple[int, int] | None = None,
    cut_rows: int = 0,
    cut_columns: int = 0,
    overview: int = 0,
) -> MediaLayout:
    """An overview and tiles, stitched, cut by so many rows (columns) at each side, rows ended by newlines."""
    (big_rows, big_columns), (rows, columns) = tiles, grid
    n = rows * columns
    others = [p for p in range(big_rows * big_columns + 1) if p != overview]
    slots = list(range(overview * n, overview * n + n))
    for y in range(cut_rows, big_rows * rows - cut_rows):
        for x in range(cut_columns, big_columns * columns - cut_columns):
            tile = (y // rows) * big_columns + x // columns
            slots.append(others[tile] * n + y % rows * columns + x % columns)
        slots.append(NEWLINE)
    return MediaLayout("image", big_rows * big_columns + 1, grid, tuple(slots), tiles, overview, size)


@dataclass
class Source:
    """A `VisualSource` of given tensors; what was not given must not be asked for."""

    layout: MediaLayout
    attention: dict[int, Tensor] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)
    key: dict[int, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    classes: Tensor | None = None
    weight: Tensor | None = None
    questions: Sequence[Tensor] = ()
    probe: Tensor | None = None

    def class_attention(self, layer: int) -> Tensor:
        return self.attention[layer]

    def attention_mass(self, layer: int) -> Tensor:
        return self.mass[layer]

    def keys(self, layer: int) -> Tensor:
        return self.key[layer]

    def probe_attention(self) -> Tensor:
        assert self.probe is not None
        return self.probe

    def hidden(self) -> Tensor:
        assert self.tokens is not None
        return self.tokens

    def class_hidden(self) -> Tensor:
        assert self.classes is not None
        return self.classes

    def project(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return torch.tanh(x @ self.weight.to(x.dtype))

    def question_features(self, item: int) -> Tensor:
        return self.questions[item]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nothing here should ask for {name}")


def view_of(
    layout: MediaLayout,
    tower: TowerInfo = TOWER,
    items: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Source], None] | None = None,
) -> VisualFeatures:
    """G items of random tensors; features are the projected tower tokens, where the tower projects."""
    rng = torch.Generator().manual_seed(seed)
    parts, n, heads, dim, width = layout.partitions, layout.cells_per_partition, tower.heads, tower.dim, 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def rows() -> Tensor:
        with_class = (2 * normal(items, parts, heads, n + 1)).softmax(dim=-1)
        return with_class[..., 1:].to(dtype)

    source = Source(
        layout,
        attention={layer: rows() for layer in range(tower.depth)} if tower.has_class else {},
        mass={layer: rows() * n for layer in range(tower.depth)},
        key={tower.feature_layer: normal(items, parts, heads, n, 5).to(dtype)},
        tokens=normal(items, parts, n, dim).to(dtype),
        classes=normal(items, parts, dim).to(dtype),
        weight=normal(dim, width).to(dtype),
        questions=[normal(3 + item, width).to(dtype) for item in range(items)],
        probe=rows() if tower.has_probe else None,
    )
    if change is not None:
        change(source)
    cells = torch.tensor(layout.cells, dtype=torch.long)
    assert source.tokens is not None
    every = source.project(source.tokens) if tower.projects else normal(items, parts, n, width).to(dtype)
    return VisualFeatures(layout, tower, every.flatten(1, 2)[:, cells], cells, source)


def item_of(view: VisualFeatures, item: int) -> VisualFeatures:
    """A view of one item alone."""
    one = slice(item, item + 1)
    given = view.source
    assert isinstance(given, Source)
    source = Source(
        given.layout,
        **{name: {layer: value[one] for layer, value in getattr(given, name).items()} for name in _BY_LAYER},
        **{name: value if (value := getattr(given, name)) is None else value[one] for name in _BY_ITEM},
        weight=given.weight,
    )
    return dataclasses.replace(view, features=view.features[one], source=source)


_BY_LAYER = ("attention", "mass", "key")
_BY_ITEM = ("tokens", "classes", "questions", "probe")
