"""Backbones that `tokred.vision.backbones.train` has trained, read back from the folder of their run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from tokred.core.budget import check_choice
from tokred.core.errors import InvalidParameterError, TokredError, UnknownParameterError
from tokred.vision.backbones.lookup_block import check_grid
from tokred.zoo.packed import load_weights, packed_path

__all__ = ["create", "grid_name", "load_trained", "parse_grids"]


def create(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model that timm knows.

    Raises:
        UnknownParameterError: it does not take these arguments.
    """
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except TypeError as error:
        if isinstance(error, TokredError):
            raise
        raise UnknownParameterError(f"{name} does not take these arguments: {error}") from error


def grid_name(grid: Sequence[int]) -> str:
    """("3", "5") as "3x5"."""
    return "x".join(map(str, grid))


def load_trained(folder: str | Path, weights: str = "model") -> tuple[nn.Module, dict[str, Any]]:
    """A trained model in eval mode on the CPU, and what its `config.json` holds.

    Args:
        weights: "model", the averaged ones, or "last".

    Raises:
        InvalidParameterError: the folder holds no finished run, or its weights do not fit.
    """
    check_choice("weights", weights, ("model", "last"))
    folder = Path(folder)
    path = folder / f"{weights}.safetensors"
    if not (folder / "config.json").is_file() or not (path.is_file() or packed_path(path).is_file()):
        raise InvalidParameterError(f"{folder} holds no finished run: expected config.json and {path.name} in it")
    record: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = create(record["run"]["model"], record["num_classes"], record["kwargs"])
    try:
        state = load_weights(path)
    except SafetensorError as error:
        raise InvalidParameterError(f"{path} cannot be read: {error}") from error
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InvalidParameterError(f"{path} does not fit {record['run']['model']}: {error}") from error
    return model.eval(), record


def parse_grids(text: str) -> tuple[tuple[int, int], ...]:
    """ "3,5,7x4" as ((3, 3), (5, 5), (7, 4)).

    Raises:
        InvalidParameterError: not of this form, or a side is no integer >= 1.
    """
    try:
        sides = [tuple(map(int, part.split("x"))) for part in text.split(",") if part]
    except ValueError as error:
        raise InvalidParameterError(f"grids={text!r}: expected sides such as 3,5,7 or 3x5,7x7") from error
    grids = [check_grid("grids", side[0] if len(side) == 1 else side) for side in sides]
    return tuple((grid[0], grid[1]) for grid in grids)
