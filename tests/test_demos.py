"""The short scripts in demos/ run and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def test_quickstart(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    out = tmp_path / "kept.png"
    command = [sys.executable, str(ROOT / "demos" / "quickstart.py"), "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "144 -> 87 (block 3) -> 53 (block 6) -> 32 (block 9)" in done.stdout
    assert "undone bit for bit: True" in done.stdout
    assert Image.open(out).size == (384, 384)
