"""The Triton kernels where there is no GPU: their results in the interpreter, and whether they compile for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from tests.ops.cases import CHECKS
from tokred.ops import _common

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


def run(args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    # TRITON_INTERPRET is read when kernels are defined, hence a process of its own for either value.
    base = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TOKRED_TRITON")}
    env = {**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    suite = str(HERE / "interpreter_suite.py")
    result = run(["-m", "pytest", suite, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"], TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    counts = next(ET.parse(report).iter("testsuite")).attrib
    assert (int(counts["tests"]), int(counts["skipped"])) == (len(CHECKS) * 3 + 2, 0)
    assert int(counts["failures"]) == int(counts["errors"]) == 0


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    result = run([str(HERE / "compile_kernels.py"), "90"], TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    count, *names = result.stdout.split()
    kernels = ["gather", "lse", "mass", "match", "merge", "page_rank", "rows"]
    assert names == [f"_{name}_kernel" for name in kernels]
    assert int(count) >= 24


def test_a_broken_triton_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # kernels are asked for on CPU tensors
    x, index = torch.ones(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64)
    monkeypatch.setitem(sys.modules, "tokred.ops.triton", None)  # its import raises
    _common._load_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="tokred: Triton kernels are unavailable"):
            assert torch.equal(torch.ops.tokred.gather_rows(x, index), x[:, :1])
        _common._load_kernels.cache_clear()
        monkeypatch.setenv("TOKRED_TRITON", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(torch.ops.tokred.gather_rows(x, index), x[:, :1])
    finally:
        _common._load_kernels.cache_clear()
