"""Weights as bytes: a matrix is stored as int8 with one scale a row, half of what float16 takes.

A folder of a saved model keeps its layout; each ``NAME.safetensors`` becomes ``NAME.int8.safetensors``. `expanded`
gives a folder that `from_pretrained` reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["expanded", "load_weights", "pack", "packed_path", "packed_state", "plain_state"]

PACKED, PLAIN = ".int8.safetensors", ".safetensors"
SCALE = "//scale"  # behind the name of a tensor; no module is called so


def packed_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (at least 2 axes) as int8, with float32 scales under NAME//scale; other floats as float16.

    A row r is round(r / a) for a = max |r| / 127, so the error of a number is at most a / 2; rows of zeros stay zeros.
    """
    packed = {}
    for name, value in state.items():
        if not value.is_floating_point():
            packed[name] = value
        elif value.dim() < 2:
            packed[name] = value.half()
        else:
            rows = value.float().flatten(1)
            scale = rows.abs().amax(dim=1, keepdim=True) / 127
            packed[name] = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
            packed[name] = packed[name].view(value.shape)
            packed[name + SCALE] = scale.flatten()
    return packed


def plain_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 again."""
    plain = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in packed:
            scale = packed[name + SCALE].view(-1, *[1] * (value.dim() - 1))
            value = value.float() * scale
        plain[name] = value.float() if value.is_floating_point() else value
    return plain


def packed_path(path: Path) -> Path:
    """Where the packed form of a safetensors file lies."""
    return path.with_name(path.name.removesuffix(PLAIN) + PACKED)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or float32 of its packed form where that is there instead."""
    return load_file(path) if path.is_file() else plain_state(load_file(packed_path(path)))


def pack(path: Path) -> Path:
    """Replace a safetensors file by its packed form, and keep its notes."""
    with safe_open(path, "pt") as opened:
        notes = opened.metadata()
    target = packed_path(path)
    save_file({name: value.contiguous() for name, value in packed_state(load_file(path)).items()}, target, notes)
    path.unlink()
    return target


@contextmanager
def expanded(folder: Path) -> Iterator[Path]:
    """`folder`, or a temporary folder of the same files whose packed weights are float32."""
    files = sorted(folder.rglob("*" + PACKED))
    if not files:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / folder.name
        for path in sorted(folder.rglob("*")):
            target = made / path.relative_to(folder)
            if path.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in files:
                with safe_open(path, "pt") as opened:
                    notes = opened.metadata()
                target = target.with_name(path.name.removesuffix(PACKED) + PLAIN)
                save_file(plain_state(load_file(path)), target, notes)
            else:
                target.write_bytes(path.read_bytes())
        yield made
