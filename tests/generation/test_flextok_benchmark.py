"""The FlexTok benchmark runs on sizes that say nothing about speed; its multiply-adds are those that torch counts."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "flextok.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    pytest.importorskip("timm")
    spec = importlib.util.spec_from_file_location("benchmark_flextok", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    with mock.patch.dict(sys.modules, {"benchmark_flextok": module}):
        spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("options", [["--json"], ["--vae"]])
def test_it_reports_every_number(benchmark: ModuleType, options: list[str], capsys: pytest.CaptureFixture) -> None:
    command = [str(SCRIPT), "--dry-run", "--device", "cpu", *options]
    with mock.patch.object(sys, "argv", command), mock.patch("torch.set_num_threads"):
        benchmark.main()
    out = capsys.readouterr().out
    if "--json" not in options:
        assert "with VAE" in out
        assert "guided step, k=8" in out
        return
    rows = json.loads(out)["rows"]
    assert [row["row"] for row in rows] == ["guided step, k=1", "guided step, k=8", "encode, k=1", "encode, k=8"]
    for row in rows:
        assert row["limit"] > 1
        assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
        assert row["share"] == pytest.approx(row["speedup"] / row["limit"])
        assert min(row["images_per_s"], row["all_registers_images_per_s"], row["matmul_images_per_s"]) > 0
        assert (row["target"] == 1.7) == row["row"].startswith("guided")
        if row["target"]:
            assert row["difference"] <= 1e-5


@pytest.mark.parametrize("registers", [1, 9, 16])
@torch.no_grad()
def test_multiply_adds_are_those_that_torch_counts(benchmark: ModuleType, registers: int) -> None:
    model = benchmark.build("d12_d12", dry=True)
    condition = model.condition(torch.zeros(1, 16, dtype=torch.long), max(registers - 1, 1))
    if registers == 1:
        condition = model.condition(drop=True)
    assert condition.tokens.shape[1] == (registers if registers < 16 else 16)
    x = torch.zeros(1, 16, 8, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.velocity(x, torch.ones(1), condition)
    assert benchmark.decoder_macs(model, registers) == counter.get_total_flops() / 2
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        z = model.encoder(x, registers)
    head = z.shape[1] * 64 * 6
    assert benchmark.encoder_macs(model, registers) == counter.get_total_flops() / 2 - head
