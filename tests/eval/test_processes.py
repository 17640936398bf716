"""`tokred.eval.processes`: which device a process gets."""

from __future__ import annotations

import pytest

from tokred.core.errors import InvalidParameterError
from tokred.eval.processes import join


@pytest.mark.parametrize("device", ["cuda:1", "cuda:0", "cpu:0"])
def test_several_processes_share_no_device(device, monkeypatch):
    """One of several that was sent to a GPU by number would have ignored it."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidParameterError, match=f"--device {device}: each of several processes"):
        join(device)


def test_devices_that_are_not_here(monkeypatch):
    pytest.importorskip("accelerate")
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(InvalidParameterError, match=r"--device gpu: .*; expected cpu, cuda or cuda:N"):
            join("gpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu:0").device.type == "cpu"
