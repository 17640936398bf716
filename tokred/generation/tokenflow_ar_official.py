"""TokenFlow's released text-to-image model: its weight shards to and from `TokenFlowARModel`.

Names are those of the class definitions (ByteVisionLab/TokenFlow). The released files themselves could not be opened
when this was written (UNVERIFIED). Sizes are taken from the weights, the epsilon of norms, the base of the rotary
embedding and the padding id from `config.json`; what neither tells (the sides of the scales) is an option. The
tokenizer is not among these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.exaone4.modeling_exaone4 import Exaone4RotaryEmbedding

from tokred.core.errors import InvalidParameterError, UnknownParameterError
from tokred.generation.tokenflow_ar import TokenFlowARConfig, TokenFlowARModel

__all__ = ["config_of_weights", "from_official", "load_official", "read_config", "read_weights", "to_official"]

OPTIONS = ("scales", "image_token_start", "dtype")
COUNTERS = ("image_token_start", "image_token_end")  # buffers: ids of the first and (UNVERIFIED) of the last code
#: released names -> ours, whole or as beginnings; the norms of a block stand behind its branches
NAMES = [
    ("model.pos_1LC", "positions"),
    ("model.mm_projector.", "projector."),
    ("model.lvl_embed.", "level_embed."),
    ("model.embed_tokens.", "model.embed_tokens."),
    ("model.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
]
BLOCK_NAMES = [
    ("self_attn.qknorm.query_norm.", "self_attn.q_norm."),
    ("self_attn.qknorm.key_norm.", "self_attn.k_norm."),
    ("self_attn.", "self_attn."),
    ("mlp.", "mlp."),
    ("post_attention_layernorm.", "post_feedforward_layernorm."),
    ("input_layernorm.", "post_attention_layernorm."),
]
BLOCK = re.compile(r"(?P<start>model\.layers\.\d+\.)(?P<rest>.+)")
#: fields of `config.json` that weights cannot tell
READ = ("rms_norm_eps", "rope_theta", "hidden_act", "pad_token_id", "bos_token_id", "eos_token_id")


def load_official(path: str | Path, **options: Any) -> TokenFlowARModel:
    """A released model, in eval mode.

    Args:
        path: a folder with the safetensors files and, if there is one, `config.json`; or a hub id such as
            "ByteVisionLab/TokenFlow-t2i".
        options: `scales`, the tokenizer's sides, where they are not the nine of the release; `image_token_start`, the
            id of code 0, where the weights do not hold it; `dtype` of the weights (None: as stored, bfloat16).

    Raises:
        InvalidParameterError: a file that is missing or damaged, weights of another layout or of another variant.
        UnknownParameterError: another option.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UnknownParameterError(f"from_official got {', '.join(unknown)}: it takes {', '.join(OPTIONS)}")
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or str(path).count("/") != 1:
            raise InvalidParameterError(f"{path} is neither a folder nor a hub id (owner/name)")
        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    weights = read_weights(folder, options.pop("dtype", None))
    described = folder / "config.json"
    config = config_of_weights(weights, read_config(described) if described.is_file() else {}, **options)
    state = from_official(weights)
    with torch.device("meta"):  # no random weights that would be thrown away
        model = TokenFlowARModel(config)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    given = {name: value.shape for name, value in state.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        raise InvalidParameterError(
            f"{folder}: weights that are missing, too many, or of another shape than those of {config.hidden_size} "
            f"wide blocks: {', '.join(odd[:8])}" + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
        )
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = Exaone4RotaryEmbedding(config)  # a table that is not among the weights
    return model.eval()


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with released names under ours, the tensors as they are; the two buffers of ids are left out.

    Raises:
        InvalidParameterError: a name outside the layout.
    """
    renamed = {}
    for name, value in weights.items():
        if name in COUNTERS:
            continue
        new = _renamed(name, NAMES, BLOCK_NAMES)
        if new is None:
            raise InvalidParameterError(f"{name!r} is no name of the released layout of TokenFlow's generator")
        renamed[new] = value
    return renamed


def to_official(state: Mapping[str, Tensor], config: TokenFlowARConfig) -> dict[str, Tensor]:
    """Weights of a `TokenFlowARModel` under the released names, with the two buffers: undoes `from_official`."""
    names, blocks = ([(ours, released) for released, ours in pairs] for pairs in (NAMES, BLOCK_NAMES))
    found = {}
    for name, value in state.items():
        new = _renamed(name, names, blocks)
        if new is None:
            raise InvalidParameterError(f"{name!r} is no name of a TokenFlowARModel")
        found[new] = value
    first = config.image_token_start
    ends = (first, first + config.codebook_size - 1)
    return {**{name: torch.tensor(value) for name, value in zip(COUNTERS, ends, strict=True)}, **found}


def _renamed(name: str, names: list[tuple[str, str]], blocks: list[tuple[str, str]]) -> str | None:
    block = BLOCK.fullmatch(name)
    start, rest, pairs = ("", name, names) if block is None else (block["start"], block["rest"], blocks)
    for old, new in pairs:
        if rest.startswith(old):
            return start + new + rest[len(old) :]
    return None


def config_of_weights(
    weights: Mapping[str, Tensor],
    described: Mapping[str, Any] | None = None,
    scales: list[int] | tuple[int, ...] | None = None,
    image_token_start: int | None = None,
) -> TokenFlowARConfig:
    """The configuration that released weights belong to.

    Args:
        weights: under the released names. described: what `config.json` says. scales, image_token_start: as in
            `load_official`.

    Raises:
        InvalidParameterError: a tensor without which there is no such model is missing; scales that do not have as many
            places as the weights; the id of code 0 is unknown.
    """
    block = "model.layers.0."
    needed = ["model.embed_tokens.weight", "model.pos_1LC", "model.lvl_embed.weight", "model.mm_projector.0.weight"]
    needed += [f"{block}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "qknorm.query_norm")]
    needed += [f"{block}mlp.gate_proj.weight"]
    absent = [name for name in needed if name not in weights]
    if absent:
        raise InvalidParameterError(
            f"weights of another model: {', '.join(absent)} missing; expected TokenFlow's text-to-image model"
        )
    vocabulary, width = weights["model.embed_tokens.weight"].shape
    sides = list(TokenFlowARConfig.scales if scales is None else scales)
    places, levels = len(weights["model.pos_1LC"]), len(weights["model.lvl_embed.weight"]) - 1
    if sum(side * side for side in sides) != places or len(sides) != levels:
        raise InvalidParameterError(
            f"scales={sides}: the weights have {places} places in {levels} scales; give the tokenizer's scales"
        )
    first = weights.get("image_token_start")
    if image_token_start is None and first is None:
        raise InvalidParameterError("image_token_start is not among the weights: give it, the id of code 0")
    start = int(first) if image_token_start is None and first is not None else image_token_start
    assert start is not None
    head = len(weights[f"{block}self_attn.qknorm.query_norm.weight"])
    known = {name: value for name, value in (described or {}).items() if name in READ and value is not None}
    rope = {"rope_type": "default", "rope_theta": float(known.pop("rope_theta", 10000.0))}
    return TokenFlowARConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(weights[f"{block}mlp.gate_proj.weight"]),
        num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("model.layers.")}),
        num_attention_heads=len(weights[f"{block}self_attn.q_proj.weight"]) // head,
        num_key_value_heads=len(weights[f"{block}self_attn.k_proj.weight"]) // head,
        head_dim=head,
        scales=sides,
        codebook_size=vocabulary - start,
        code_dim=weights["model.mm_projector.0.weight"].shape[1],
        image_token_start=start,
        rope_parameters=rope,
        **{"rms_norm_eps": 1e-5, "pad_token_id": None, **known},
    )


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        InvalidParameterError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidParameterError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found


def read_weights(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, floats in `dtype` (None: as stored).

    Raises:
        InvalidParameterError: no such file, one that the index names and that is missing, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidParameterError(f"{folder} holds no safetensors file: expected the released weights")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted({folder / str(file) for file in read_config(index).get("weight_map", {}).values()})
        missing = [path.name for path in named if not path.is_file()]
        if missing:
            raise InvalidParameterError(f"{folder}: {index.name} names {', '.join(missing)}, which are missing")
        files = named or files
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            some = load_file(path)
        except SafetensorError as error:
            raise InvalidParameterError(f"{path} is damaged, or is no safetensors file: {error}") from error
        found.update(some)
    if dtype is not None:
        found = {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}
    return found
