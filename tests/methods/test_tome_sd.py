"""ToMe for diffusion and ToDo: the maths, against loops that say the same slowly; parameters and what they refuse."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tokred import ops
from tokred.core.diffusion import BlockInfo, DenoiserInfo, DiffusionBlock
from tokred.core.errors import InvalidParameterError, LayerError, UnknownParameterError
from tokred.vision.todo import nearest_cells
from tokred.vision.tome_sd import match_windows

UNET = DenoiserInfo(
    tuple(
        BlockInfo(layer, f"b{layer}", level, 8, ("attention", "cross_attention", "mlp"), (16 // level, 16 // level))
        for layer, level in enumerate((1, 2, 4, 4, 2, 1))
    )
)
SDXL = DenoiserInfo(tuple(BlockInfo(i, f"b{i}", level, 8, ("attention",), None) for i, level in enumerate((2, 4, 2))))


def slow_groups(
    metric: Tensor, grid: tuple[int, int], window: tuple[int, int], r: int, cells: list[int]
) -> list[set[int]]:
    """The groups into which the tokens (n, d) of one sample merge, by the words of the paper."""
    (rows, columns), (height, width) = grid, window
    receivers = []
    for i in range(rows // height):
        for j in range(columns // width):
            cell = cells[len(receivers)]
            receivers.append((i * height + cell // width) * columns + j * width + cell % width)
    unit = [row / row.norm().clamp_min(1e-12) for row in metric.double()]
    best = {}
    for token in range(rows * columns):
        if token not in receivers:
            likes = [(float(unit[token] @ unit[receiver]), -receiver) for receiver in receivers]
            value, receiver = max(likes)
            best[token] = (value, -receiver)
    ranked = sorted(best, key=lambda token: (-best[token][0], token))
    groups = {receiver: {receiver} for receiver in receivers}
    for token in ranked[:r]:
        groups[best[token][1]].add(token)
    return [*groups.values(), *({token} for token in ranked[r:])]


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(2, 7)), draw(st.integers(2, 7))
    height, width = draw(st.integers(1, min(rows, 3))), draw(st.integers(1, min(columns, 3)))
    receivers = (rows // height) * (columns // width)
    r = draw(st.integers(0, rows * columns - receivers))
    return (rows, columns), (height, width), receivers, r, draw(st.integers(1, 3)), draw(st.integers(0, 10**6))


@settings(max_examples=60)
@given(problems())
def test_matching_is_its_slow_definition(problem) -> None:
    grid, window, receivers, r, batch, seed = problem
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, grid[0] * grid[1], 5, generator=generator, dtype=torch.float64)
    cells = torch.randint(window[0] * window[1], (batch, receivers), generator=generator)
    for chosen in (cells, None):
        change = match_windows(metric, grid, window, r, chosen)
        assert change.slots == metric.shape[1] - r
        for b in range(batch):
            own = [0] * receivers if chosen is None else cells[b].tolist()
            wanted = slow_groups(metric[b], grid, window, r, own)
            found: dict[int, set[int]] = {}
            for token, slot in enumerate(change.assignment[b].tolist()):
                found.setdefault(slot, set()).add(token)
            assert sorted(map(sorted, found.values())) == sorted(map(sorted, wanted))
            assert all(change.representative[b, slot].item() in group for slot, group in found.items())
        x = torch.randn(metric.shape, generator=generator, dtype=torch.float64)
        merged, sizes = ops.merge_tokens(x, change.assignment, change.slots)
        back = ops.unmerge_tokens(merged, change.assignment)
        assert torch.allclose((merged * sizes[..., None]).sum(1), x.sum(1))
        for b in range(batch):
            for slot in range(change.slots):
                members = (change.assignment[b] == slot).nonzero()[:, 0]
                assert torch.allclose(back[b, members], x[b, members].mean(0).expand(len(members), -1))


def test_a_receiver_stands_for_its_own_group() -> None:
    change = match_windows(torch.randn(1, 36, 4), (6, 6), (2, 2), 20)
    corners = [row * 6 + column for row in (0, 2, 4) for column in (0, 2, 4)]
    assert change.representative[0, -9:].tolist() == corners
    assert change.assignment[0, corners].tolist() == list(range(7, 16))


def test_equal_tokens_merge_first_and_ties_go_to_the_lower_token() -> None:
    metric = torch.ones(1, 16, 3)
    change = match_windows(metric, (4, 4), (2, 2), 3)
    assert change.assignment[0, [1, 3, 4]].tolist() == [9, 9, 9]  # the first three others, all to the first receiver
    metric[0, 5] = torch.tensor([5.0, -2.0, 0.5])
    assert match_windows(metric, (4, 4), (2, 2), 11).assignment[0, 5] == 0  # the only one left single


# -- randomness --------------------------------------------------------------------------------------------------------


def view(tokens: Tensor, grid: tuple[int, int], timestep: Tensor | None, layer: int = 0) -> DiffusionBlock:
    return DiffusionBlock(BlockInfo(layer, "b", 1, tokens.shape[2], ("attention",)), grid, tokens, timestep)


def receivers(method: tokred.ToMeSD, timestep: Tensor | None, grid: tuple[int, int] = (8, 8), layer: int = 0) -> Tensor:
    batch = 2 if timestep is None else len(timestep)
    change = method.reduce(view(torch.randn(batch, grid[0] * grid[1], 4), grid, timestep, layer), method.ratio)
    count = (grid[0] // method.sy) * (grid[1] // method.sx)
    return change.representative[:, change.slots - count :].sort(dim=1).values


def slow_cells(windows: int, choices: int, seed: int, layer: int, timestep: float) -> list[int]:
    def mix(x: int) -> int:
        for multiplier in (0x45D9F3B, 0x45D9F3B, 0x2545F491):
            x = (x ^ x >> 16) * multiplier % 2**32
        return x ^ x >> 16

    (bits,) = struct.unpack("<I", struct.pack("<f", timestep))
    start = 0x9E3779B9 * (seed * 1009 + layer + 1) % 2**32
    return [mix(mix(start + window) ^ mix(bits)) % choices for window in range(windows)]


@given(st.integers(0, 2**40), st.integers(0, 40), st.floats(0, 1000, width=32))
@settings(max_examples=30)
def test_receivers_are_drawn_by_seed_block_and_timestep(seed: int, layer: int, timestep: float) -> None:
    method = tokred.ToMeSD(seed=seed)
    found = receivers(method, torch.tensor([timestep]), layer=layer)
    cells = slow_cells(16, 4, seed, layer, timestep)
    wanted = [(w // 4 * 2 + cell // 2) * 8 + w % 4 * 2 + cell % 2 for w, cell in enumerate(cells)]
    assert found.tolist() == [sorted(wanted)]


def test_halves_of_a_guided_batch_draw_alike_and_steps_do_not() -> None:
    method = tokred.ToMeSD()
    time = torch.tensor([981.0, 981.0, 961.0])
    drawn = receivers(method, time)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(receivers(method, time), drawn)  # whatever ran before
    assert torch.equal(receivers(method, time[2:]), drawn[2:])  # alone as in a batch
    assert not torch.equal(receivers(method.replace(seed=1), time), drawn)
    assert not torch.equal(receivers(method, time, layer=1), drawn)
    fixed = receivers(method.replace(use_rand=False), time)
    assert (fixed == fixed[0]).all()
    assert torch.equal(receivers(method.replace(use_rand=False), None), fixed[:2])


def test_every_cell_of_a_window_is_drawn_as_often() -> None:
    cells = torch.tensor([cell for step in range(40) for cell in slow_cells(64, 4, 0, 3, 25.0 * step)])
    counts = torch.bincount(cells, minlength=4).double()
    expected = len(cells) / 4
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared of 3 degrees of freedom, p = 0.001


# -- ToDo --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_downsampling_is_nearest_exact(rows: int, columns: int, factor: int) -> None:
    if min(rows, columns) < factor:
        with pytest.raises(InvalidParameterError, match=f"factor={factor}: a grid of {rows} x {columns}"):
            tokred.ToDo(factor).count((rows, columns), factor)
        return
    x = torch.randn(2, rows * columns, 3)
    kept = tokred.ToDo(factor).reduce(view(x, (rows, columns), None), factor).indices
    assert kept.shape[1] == tokred.ToDo(factor).count((rows, columns), factor)
    picture = x.transpose(1, 2).unflatten(2, (rows, columns))
    wanted = F.interpolate(picture, size=(rows // factor, columns // factor), mode="nearest-exact")
    assert torch.equal(ops.gather_tokens(x, kept), wanted.flatten(2).transpose(1, 2))
    slow = [
        math.floor((i + 0.5) * rows / (rows // factor)) * columns
        + math.floor((j + 0.5) * columns / (columns // factor))
        for i in range(rows // factor)
        for j in range(columns // factor)
    ]
    assert nearest_cells((rows, columns), (rows // factor, columns // factor)).tolist() == slow
    assert sorted(set(slow)) == slow


# -- where they act ----------------------------------------------------------------------------------------------------


def test_levels() -> None:
    assert tokred.ToMeSD().bind(UNET) == {0: 0.5, 5: 0.5}
    assert list(tokred.ToMeSD(max_downsample=2).bind(UNET)) == [0, 1, 4, 5]
    assert list(tokred.ToMeSD(max_downsample=8).bind(UNET)) == [0, 1, 2, 3, 4, 5]
    assert tokred.ToDo().bind(UNET) == {0: 2, 5: 2}
    assert tokred.ToDo((4, 2)).bind(UNET) == {0: 4, 1: 2, 4: 2, 5: 4}
    assert tokred.ToDo((1, 1, 2)).bind(UNET) == {2: 2, 3: 2}
    assert tokred.ToMeSD(max_downsample=2).bind(SDXL) == {0: 0.5, 2: 0.5}
    assert tokred.ToDo((1, 2)).bind(SDXL) == {0: 2, 2: 2}


@pytest.mark.parametrize("info", [UNET, SDXL])
def test_settings_that_keep_everything_have_no_rule(info: DenoiserInfo) -> None:
    for method in (tokred.ToMeSD(ratio=0), tokred.ToDo(1), tokred.ToDo((1, 1))):
        assert method.is_identity(info)
    assert not tokred.ToMeSD(max_downsample=2).is_identity(info)


def test_a_model_whose_finest_grid_has_no_attention_is_no_silent_identity() -> None:
    with pytest.raises(LayerError, match="2 times coarser than its finest; pass max_downsample=2"):
        tokred.ToMeSD().bind(SDXL)
    with pytest.raises(LayerError, match=r"pass factor=\(1, 2\)"):
        tokred.ToDo().bind(SDXL)


def test_counts() -> None:
    method = tokred.ToMeSD()
    assert method.count((64, 64), 0.5) == 2048
    assert method.count((64, 64), 0.9) == 1024  # one of each window stays
    assert method.count((7, 9), 0.5) == 63 - 31
    assert method.count((7, 9), 0.99) == 12
    assert method.cost(UNET.blocks[0], (64, 64), 0.5) == 3072 * 1024 * 8
    assert tokred.ToMeSD(sx=4, sy=4).count((64, 64), 0.9) == 4096 - 3686
    assert tokred.ToDo().count((9, 7), 2) == 12
    with pytest.raises(InvalidParameterError, match="no window of 2 x 4 fits a grid of 8 x 3 tokens"):
        tokred.ToMeSD(sx=4).count((8, 3), 0.5)
    small = DenoiserInfo((BlockInfo(0, "b", 1, 8, ("attention",), (2, 2)),))
    with pytest.raises(InvalidParameterError, match="no window of 3 x 3 fits a grid of 2 x 2"):
        tokred.ToMeSD(sx=3, sy=3).bind(small)
    with pytest.raises(InvalidParameterError, match="factor=3: a grid of 2 x 2"):
        tokred.ToDo(3).bind(small)


def test_a_part_that_no_block_has_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="no block of this model has cross_attention"):
        tokred.ToMeSD(max_downsample=2, merge_crossattn=True).bind(SDXL)
    assert tokred.ToMeSD(merge_mlp=True, merge_crossattn=True).parts == ("attention", "cross_attention", "mlp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1.0: expected a share in \[0, 1\)"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": "half"}, "ratio='half'"),
        ({"ratio": True}, "ratio=True"),
        ({"sx": 0}, "sx=0: expected an integer >= 1"),
        ({"sy": 2.0}, "sy=2.0"),
        ({"sx": 1, "sy": 1}, "a window of one token"),
        ({"max_downsample": 3}, "max_downsample=3: expected one of 1, 2, 4, 8"),
        ({"merge_attn": False}, "all off"),
        ({"use_rand": None}, "use_rand=None"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_parameters_of_tome_sd(options: dict, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        tokred.ToMeSD(**options)


@pytest.mark.parametrize("factor", [0, -2, 1.5, "2", True, (), (2, 0), (1, 1, 1, 1, 2), None])
def test_bad_factors(factor: object) -> None:
    with pytest.raises(InvalidParameterError, match="factor="):
        tokred.ToDo(factor)


def test_unknown_parameters_name_the_nearest() -> None:
    with pytest.raises(UnknownParameterError, match="did you mean 'ratio'"):
        tokred.ToMeSD(ration=0.5)


@pytest.mark.parametrize(
    "method",
    [
        tokred.ToMeSD(),
        tokred.ToMeSD(ratio=0.3, sx=4, max_downsample=2, use_rand=False, merge_mlp=True, seed=7),
        tokred.ToDo(),
        tokred.ToDo(3),
        tokred.ToDo([4, 2]),
    ],
    ids=repr,
)
def test_json_round_trip(method: tokred.Method) -> None:
    again = tokred.from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert hash(again) == hash(method)
    assert eval(repr(method), {"ToMeSD": tokred.ToMeSD, "ToDo": tokred.ToDo}) == method
