"""Saving a `TokenShuffle` without its language model: the operators, and the embeddings that they work on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation.token_shuffle_config import TokenShuffleConfig

__all__ = ["load_operators", "read_operators", "save_operators"]

WEIGHTS = "token_shuffle.safetensors"
ROWS = ("embed_rows", "head_rows", "head_bias")


def save_operators(model: Any, folder: Path) -> None:
    """Write `token_shuffle.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    rows, head = _rows(model.config), model.get_output_embeddings()
    state["embed_rows"] = model.get_input_embeddings().weight[rows]
    state["head_rows"] = head.weight[rows]
    if getattr(head, "bias", None) is not None:
        state["head_bias"] = head.bias[rows]
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, folder / WEIGHTS)
    model.config.save_pretrained(folder)


def read_operators(folder: Path, base: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options of `TokenShuffle.wrap`, and the tensors.

    Raises:
        InvalidParameterError: no such files, or for a language model of another width than `base`.
    """
    path = folder / WEIGHTS
    if not path.is_file() or not (folder / "config.json").is_file():
        raise InvalidParameterError(f"{folder} holds no {WEIGHTS}: it was not written by save_operators")
    values, state = json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(path)
    width = base.get_input_embeddings().weight.shape[1]
    if state["embed_rows"].shape[1] != width:
        raise InvalidParameterError(
            f"{path} is of a language model of width {state['embed_rows'].shape[1]}, this one has {width}"
        )
    return {name: values[name] for name in TokenShuffleConfig.options() if name in values}, state


@torch.no_grad()
def load_operators(model: Any, state: dict[str, Tensor]) -> None:
    """Put the tensors where they belong.

    Raises:
        InvalidParameterError: others than the model has.
    """
    rows = {name: state[name] for name in ROWS if name in state}
    own = {name for name in model.state_dict() if not name.startswith("base.")}
    wrong = own ^ (set(state) - set(rows))
    if wrong:
        raise InvalidParameterError(f"other tensors than this model's: {', '.join(sorted(wrong))}")
    model.load_state_dict({name: state[name] for name in own}, strict=False)
    index, embeddings, head = _rows(model.config), model.get_input_embeddings(), model.get_output_embeddings()
    embeddings.weight[index] = rows["embed_rows"].to(embeddings.weight)
    head.weight[index] = rows["head_rows"].to(head.weight)
    if "head_bias" in rows:
        head.bias[index] = rows["head_bias"].to(head.bias)


def _rows(config: TokenShuffleConfig) -> Tensor:
    assert config.soi_token_id is not None
    assert config.eoi_token_id is not None
    codes = range(config.image_rows.start, config.image_rows.stop)
    return torch.tensor([*codes, config.soi_token_id, config.eoi_token_id])
