"""The short scripts in demos/ run and say what they promise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "demos" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_quickstart(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    out = tmp_path / "kept.png"
    said = run("quickstart.py", "--out", str(out))
    assert "144 -> 87 (block 3) -> 53 (block 6) -> 32 (block 9)" in said
    assert "undone bit for bit: True" in said
    assert Image.open(out).size == (384, 384)


@pytest.mark.parametrize("options", [(), ("--random", "--budget", "0.5")], ids=["bundled", "random"])
def test_serve_reduced(tmp_path, options):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    from safetensors.torch import load_file

    said = run("serve_reduced.py", "--out", str(tmp_path), *options)
    kept = 72 if options else 36
    assert "144 visual tokens" in said
    assert f"{kept}: " in said
    assert "equals the patched generate: True" in said
    assert ("random weights" in said) == bool(options)
    tensors = load_file(tmp_path / "embeds.safetensors")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, kept, 160)}
    assert Image.open(tmp_path / "kept.png").size == (384, 384)
    names = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.embeddings") for name in names)
    if importlib.util.find_spec("vllm") is None:
        assert "enable_mm_embeds=True" in said
        assert f"(1, {kept}, 160)" in said
