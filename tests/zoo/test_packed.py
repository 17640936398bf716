"""Weights stored as int8 rows come back within half a step, whatever their shape, and folders load as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokred.zoo.packed import expanded, pack, packed_state, plain_state


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step_of_the_row(shape: list[int], scale: float, seed: int) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    value[0] = 0
    again = plain_state(packed_state({"w": value}))["w"]
    step = value.flatten(1).abs().amax(dim=1) / 127
    assert again.dtype == torch.float32
    assert again.shape == value.shape
    assert ((again - value).flatten(1).abs() <= 0.5001 * step[:, None]).all()
    assert (again[0] == 0).all()
    twice = plain_state(packed_state({"w": again}))["w"]
    torch.testing.assert_close(twice, again, rtol=1e-6, atol=0)


def test_vectors_are_halves_and_other_types_stay() -> None:
    state = {
        "bias": torch.tensor([0.1, -2.0]),
        "count": torch.arange(3),
        "flag": torch.tensor([True]),
        "x": torch.eye(2),
    }
    packed = packed_state(state)
    assert [packed[k].dtype for k in state] == [torch.float16, torch.int64, torch.bool, torch.int8]
    again = plain_state(packed)
    assert list(again) == list(state)
    assert torch.equal(again["count"], state["count"])
    assert torch.equal(again["bias"], state["bias"].half().float())


def test_folder_expands_to_what_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    weights = {"w": torch.randn(8, 8), "b": torch.ones(3)}
    save_file(weights, folder / "part" / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    with expanded(folder) as same:
        assert same == folder  # nothing is packed yet
    assert pack(folder / "part" / "model.safetensors").name == "model.int8.safetensors"
    with expanded(folder) as plain:
        files = sorted(path.relative_to(plain).as_posix() for path in plain.rglob("*") if path.is_file())
        assert files == ["config.json", "part/model.safetensors"]
        assert load_file(plain / "part" / "model.safetensors")["w"].sub(weights["w"]).abs().max() < 0.02
        with safe_open(plain / "part" / "model.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert not plain.exists()
    with pytest.raises(ZeroDivisionError), expanded(folder) as plain:
        _ = 1 / 0
    assert not plain.exists()
