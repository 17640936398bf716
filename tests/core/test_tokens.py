"""The token table against a slow definition that follows every original token by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.core.tokens import Keep, Merge, TokenTable
from tokred.core.trace import Trace


def random_change(n: int, generator: torch.Generator, merge: bool, drop: bool) -> Keep | Merge:
    k = int(torch.randint(1, n + 1, (1,), generator=generator))
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(2)])
    if not merge:
        return Keep(order[:, :k].sort(1).values)
    assignment = torch.randint(-1 if drop else 0, k, (2, n), generator=generator)
    representative = order[:, :k]
    return Merge(assignment.scatter(1, representative, torch.arange(k).expand(2, -1)), representative)


class Slow:
    """Sets of original tokens, one for each present token of each image."""

    def __init__(self, total: int) -> None:
        self.members = [[{t} for t in range(total)] for _ in range(2)]
        self.origin = [list(range(total)) for _ in range(2)]
        self.flag = [[t % 3 == 0 for t in range(total)] for _ in range(2)]
        self.level = [[float(t) for t in range(total)] for _ in range(2)]

    def apply(self, change: Keep | Merge) -> None:
        for b in range(2):
            old, flag, level = self.members[b], self.flag[b], self.level[b]
            if isinstance(change, Keep):
                chosen = change.indices[b].tolist()
                self.members[b] = [old[i] for i in chosen]
                self.flag[b], self.level[b] = [flag[i] for i in chosen], [level[i] for i in chosen]
                self.origin[b] = [self.origin[b][i] for i in chosen]
                continue
            groups = [
                [i for i, s in enumerate(change.assignment[b].tolist()) if s == slot] for slot in range(change.slots)
            ]
            sizes = [len(members) for members in old]
            self.flag[b] = [any(flag[i] for i in g) for g in groups]
            self.level[b] = [sum(level[i] * sizes[i] for i in g) / sum(sizes[i] for i in g) for g in groups]
            self.members[b] = [set().union(*(old[i] for i in g)) for g in groups]
            self.origin[b] = [self.origin[b][i] for i in change.representative[b].tolist()]


@settings(max_examples=60)
@given(
    st.integers(2, 14), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4), st.integers(0, 999)
)
def test_table_follows_every_token(total, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    table = TokenTable(2, total)
    table = table.mark("key", torch.arange(total).expand(2, -1) % 3 == 0)
    table = table.mark("level", torch.arange(total).expand(2, -1).float())
    slow = Slow(total)
    assert table.group is None
    assert table.origins is None
    for layer, (merge, drop) in enumerate(kinds):
        change = random_change(table.count, generator, merge, drop)
        before = table
        table = table.apply(layer, "some", change)
        slow.apply(change)
        assert len(before.steps) == layer  # the old table is as it was
    for b in range(2):
        assert table.count == len(slow.members[b])
        group = table.group[b].tolist()
        for slot, members in enumerate(slow.members[b]):
            assert {t for t in range(total) if group[t] == slot} == members
        assert table.origins[b].tolist() == slow.origin[b]
        assert table.marks["key"][b].tolist() == slow.flag[b]
        torch.testing.assert_close(table.marks["level"][b], torch.tensor(slow.level[b]))
        if table.sizes is not None:
            assert table.sizes[b].tolist() == [len(members) for members in slow.members[b]]
        tokens = torch.randn(2, table.count, 3, generator=generator)
        full = table.restore(tokens, "zeros")
        for t in range(total):
            expected = tokens[b, group[t]] if group[t] >= 0 else torch.zeros(3)
            assert torch.equal(full[b, t], expected)


def test_nearest_fill_is_nearest_on_the_grid():
    table = TokenTable(1, 12, grid=(3, 4)).apply(0, "some", Keep(torch.tensor([[0, 7, 8]])))
    tokens = torch.tensor([[[10.0], [20.0], [30.0]]])
    # kept: (0,0)=10, (1,3)=20, (2,0)=30; ties go to the lower slot
    expected = [10, 10, 20, 20, 10, 10, 20, 20, 30, 30, 20, 20]
    assert table.restore(tokens, "nearest").flatten().tolist() == expected
    line = TokenTable(1, 5).apply(0, "some", Keep(torch.tensor([[1, 4]])))
    assert line.restore(torch.tensor([[[1.0], [2.0]]]), "nearest").flatten().tolist() == [1, 1, 1, 2, 2]


def test_padding_never_fills():
    table = TokenTable(1, 4, grid=(1, 4))
    table = table.apply(0, "some", Keep(torch.tensor([[0, 3]]), torch.tensor([[True, False]])))
    assert table.group.tolist() == [[0, -1, -1, -1]]
    assert table.restore(torch.tensor([[[1.0], [2.0]]]), "nearest").flatten().tolist() == [1, 1, 1, 1]


def test_bad_input():
    table = TokenTable(2, 4)
    with pytest.raises(InvalidParameterError, match=r"mark 'key' has shape \(2, 3\)"):
        table.mark("key", torch.zeros(2, 3))
    with pytest.raises(InvalidParameterError, match="fill='most'"):
        table.apply(0, "some", Keep(torch.tensor([[0], [1]]))).restore(torch.zeros(2, 1, 1), "most")


def test_trace_to_dict_is_json():
    import json

    table = TokenTable(2, 4, grid=(2, 2)).apply(1, "some", Keep(torch.tensor([[0, 2], [1, 3]])))
    data = json.loads(json.dumps(Trace(table, prefix=1).to_dict()))
    assert data["steps"] == [
        {
            "layer": 1,
            "method": "some",
            "tokens_in": 4,
            "tokens_out": 2,
            "kept": [[0, 2], [1, 3]],
            "group": [[0, -1, 1, -1], [-1, 0, -1, 1]],
        }
    ]
    assert (data["total"], data["grid"], data["prefix"]) == (4, [2, 2], 1)
    assert len(Trace(None)) == 0
    assert Trace(None).to_dict()["steps"] == []
    assert repr(Trace(table)) == "Trace(tokens per image: 4 -> 2 (block 1))"


def test_draw():
    import numpy as np
    from PIL import Image

    table = TokenTable(1, 4, grid=(2, 2)).apply(0, "some", Keep(torch.tensor([[0, 3]])))
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4, :4] = (200, 0, 0)
    kept = np.asarray(Trace(table).draw(Image.fromarray(pixels)))
    assert (kept[:4, :4] == (200, 0, 0)).all()
    assert (kept[4:, 4:] == 0).all()
    assert (kept[:4, 4:] > 100).all()  # dropped: hidden behind the fade
    merged = TokenTable(1, 4, grid=(2, 2)).apply(
        0, "some", Merge(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 2, 3]]))
    )
    for image in (torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(pixels / 255).permute(2, 0, 1), pixels):
        picture = np.asarray(Trace(merged).draw(image))
        assert picture.shape == (8, 8, 3)
        assert abs(int(picture[1, 1, 0]) - 100) <= 1  # the mean of the pair
        assert abs(int(picture[1, 5, 0]) - 100) <= 1
    with pytest.raises(InvalidParameterError, match="no forward pass"):
        Trace(None).draw(pixels)
    with pytest.raises(InvalidParameterError, match="no grid"):
        Trace(TokenTable(1, 3).apply(0, "some", Keep(torch.tensor([[0]])))).draw(pixels)
    with pytest.raises(InvalidParameterError, match="shape"):
        Trace(table).draw(np.zeros((2, 3, 4, 5)))
