"""The Token-Shuffle benchmark runs on sizes that say nothing about speed; its multiply-adds are those torch counts."""

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

SCRIPT = ROOT / "benchmarks" / "token_shuffle.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("benchmark_token_shuffle", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    with mock.patch.dict(sys.modules, {"benchmark_token_shuffle": module}):
        spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("options", [["--json"], ["--guidance", "1"]])
def test_it_reports_every_number(benchmark: ModuleType, options: list[str], capsys: pytest.CaptureFixture) -> None:
    command = [str(SCRIPT), "--dry-run", "--device", "cpu", *options]
    with mock.patch.object(sys, "argv", command), mock.patch("torch.set_num_threads"):
        benchmark.main()
    out = capsys.readouterr().out
    if "--json" not in options:
        assert "guidance 1," in out
        return
    rows = json.loads(out)["rows"]
    assert [(row["window"], row["steps"]) for row in rows] == [(1, 16), (2, 4), (4, 1)]
    for row in rows:
        assert min(row["seconds"], row["matmul_seconds"], row["gmacs"]) > 0
    for row in rows[1:]:
        assert row["limit"] > 1
        assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
        assert row["share"] == pytest.approx(row["speedup"] / row["limit"])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4])
@torch.no_grad()
def test_multiply_adds_are_those_that_torch_counts(benchmark: ModuleType, window: int, guided: bool) -> None:
    model = benchmark.build("tiny", window, 8, dry=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate_codes([benchmark.PROMPT], 8, do_sample=False, guidance_scale=2.0 if guided else 1)
    counted = counter.get_total_flops() / 2
    assert benchmark.image_macs(model, len(benchmark.PROMPT) + 1, 8, guided) == counted
