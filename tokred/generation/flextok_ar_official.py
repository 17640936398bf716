"""FlexTok's released autoregressive models: `model.safetensors` and `config.yaml` to and from `FlexTokARModel`.

Names and structure are those of the class definitions (EPFL-VILAB/search-over-tokens on apple/ml-l3m). The published
`config.yaml` files could not be read when this was written (UNVERIFIED). So sizes, biases and norms of queries and keys
are taken from the weights, and only what weights cannot tell (heads, kind and epsilon of norms) from the file, wherever
in it the known option names stand; an option of the caller wins. Nothing is instantiated from the `_target_` names in
it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokred.core.errors import InvalidParameterError, UnknownParameterError
from tokred.generation.flextok_ar import FlexTokARConfig, FlexTokARModel

__all__ = ["config_of_weights", "from_official", "load_official", "read_options", "to_official"]

IGNORED = ("t5_embedder", "image_tokenizer")  # other models' weights, stored along
OPTIONS = ("num_attention_heads", "norm_type", "norm_eps")  # what weights cannot tell
DEFAULT_EPS = 1e-6  # of layer norms and of RMS norms in ml-l3m, where a file names none

IMAGE, TEXT = "models.ar_image_model.", "models.text_encoder.mlp."
#: released beginnings of names -> ours; in a block they depend on whether it has cross-attention
NAMES = [
    ("preprocessor.embedding.weight", "embed_tokens.weight"),
    ("preprocessor.sos_token_embed", "start_token"),
    ("preprocessor.positional_embedding", "positions"),
    ("preprocessor.cls_embedding.weight", "embed_class.weight"),
    ("trunk.post_trunk_norm.", "norm."),
    ("head.linear.weight", "head.weight"),
]
BLOCK_NAMES = {
    False: [("attn.", "self_attn."), ("norm_1.", "norm_self."), ("norm_2.", "norm_mlp."), ("mlp.", "mlp.")],
    True: [
        ("self_attn.", "self_attn."),
        ("cross_attn.Wq.", "cross_attn.q."),
        ("cross_attn.Wk.", "cross_attn.k."),
        ("cross_attn.Wv.", "cross_attn.v."),
        ("cross_attn.", "cross_attn."),
        ("norm_1.", "norm_self."),
        ("norm_2.", "norm_cross."),
        ("norm_3.", "norm_mlp."),
        ("mlp.", "mlp."),
    ],
}
BLOCK = re.compile(r"(?P<start>(?:trunk\.)?blocks\.)(?P<index>\d+)\.(?P<rest>.+)")


def load_official(path: str | Path, **options: Any) -> FlexTokARModel:
    """A released model, in eval mode and float32.

    Args:
        path: a folder with `model.safetensors` and, if `options` do not replace it, `config.yaml`; or a hub id such as
            "EPFL-VILAB/FlexAR-113M-T2I".
        options: `num_attention_heads`, `norm_type`, `norm_eps`, fields of `FlexTokARConfig`, instead of the file's.

    Raises:
        InvalidParameterError: a file that is missing or damaged, weights of another layout, an option that the weights
            cannot tell and that neither the file nor the caller gives, a part that this class does not have.
        UnknownParameterError: another option.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UnknownParameterError(f"from_official got {', '.join(unknown)}: it takes {', '.join(OPTIONS)}")
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or str(path).count("/") != 1:
            raise InvalidParameterError(f"{path} is neither a folder nor a hub id (owner/name)")
        folder = Path(snapshot_download(str(path), allow_patterns=["model.safetensors", "config.yaml"]))
    state = from_official(_read_weights(folder / "model.safetensors"))
    described = folder / "config.yaml"
    found = read_options(described, options) if described.is_file() else {}
    config = config_of_weights(state, **{**found, **options})
    with torch.device("meta"):  # no random weights that would be thrown away
        model = FlexTokARModel(config)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    given = {name: value.shape for name, value in state.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        raise InvalidParameterError(
            f"{folder}: weights that are missing, too many, or of another shape than those of {config.hidden_size} "
            f"wide blocks: {', '.join(odd)}"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with released names under ours, the tensors as they are; T5's and the image tokenizer's are left out.

    Raises:
        InvalidParameterError: a name outside the layout.
    """
    has_text = any(".cross_attn." in name for name in weights)
    renamed = {}
    for name, value in weights.items():
        if any(part in name for part in IGNORED):
            continue
        new = _renamed_released(name, has_text)
        if new is None:
            raise InvalidParameterError(f"{name!r} is no name of the released layout of FlexTok's generators")
        renamed[new] = value
    return renamed


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `FlexTokARModel` under the released names: undoes `from_official`."""
    has_text = any(".cross_attn." in name for name in state)
    return {_renamed_ours(name, has_text): value for name, value in state.items()}


def _renamed_released(name: str, has_text: bool) -> str | None:
    if name.startswith(TEXT):
        return "text_projection." + name[len(TEXT) :]
    if not name.startswith(IMAGE):
        return None
    name = name[len(IMAGE) :]
    block = BLOCK.fullmatch(name)
    if block is None:
        return _replaced(name, NAMES)
    rest = _replaced(block["rest"], BLOCK_NAMES[has_text])
    return None if rest is None else f"blocks.{block['index']}.{rest}"


def _renamed_ours(name: str, has_text: bool) -> str:
    if name.startswith("text_projection."):
        return TEXT + name[len("text_projection.") :]
    block = BLOCK.fullmatch(name)
    if block is None:
        new = _replaced(name, [(ours, released) for released, ours in NAMES])
    else:
        rest = _replaced(block["rest"], [(ours, released) for released, ours in BLOCK_NAMES[has_text]])
        new = None if rest is None else f"trunk.blocks.{block['index']}.{rest}"
    if new is None:
        raise InvalidParameterError(f"{name!r} is no name of a FlexTokARModel")
    return IMAGE + new


def _replaced(name: str, pairs: list[tuple[str, str]]) -> str | None:
    """`name` with the first of the beginnings that it has replaced."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def config_of_weights(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    norm_type: str | None = None,
    norm_eps: float | None = None,
) -> FlexTokARConfig:
    """The configuration that weights under our names belong to; the options are what weights may not tell.

    Raises:
        InvalidParameterError: a tensor without which there is no such model is missing, or the heads are unknown.
    """
    needed = ("embed_tokens.weight", "positions", "head.weight", "blocks.0.mlp.fc1.weight", "blocks.0.norm_self.weight")
    absent = [name for name in needed if name not in state]
    if absent:
        raise InvalidParameterError(f"weights of another model: {', '.join(absent)} missing")
    codebook, width = state["embed_tokens.weight"].shape
    head_norm = state.get("blocks.0.self_attn.q_norm.weight")
    if num_attention_heads is None:
        if head_norm is None:
            raise InvalidParameterError(
                "the number of heads is neither in the weights nor in config.yaml: give num_attention_heads"
            )
        num_attention_heads = width // len(head_norm)
    norm_bias = "blocks.0.norm_self.bias" in state
    if norm_type is None:
        norm_type = "layernorm"
        if not norm_bias:
            raise InvalidParameterError(
                'norms without bias, and no config.yaml tells their kind: give norm_type, "layernorm" or "rmsnorm"'
            )
    classes, cross = state.get("embed_class.weight"), state.get("blocks.0.cross_attn.k.weight")
    projection = state.get("text_projection.fc1.weight")
    text_dim = None if cross is None else (cross if projection is None else projection).shape[1]
    return FlexTokARConfig(
        codebook_size=codebook,
        num_tokens=len(state["positions"]),
        num_classes=None if classes is None else len(classes),
        text_dim=text_dim,
        text_projection=projection is not None or cross is None,
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_attention_heads=num_attention_heads,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        norm_type=norm_type,
        norm_bias=norm_bias,
        norm_eps=DEFAULT_EPS if norm_eps is None else norm_eps,
        qk_norm=head_norm is not None,
        final_norm="norm.weight" in state,
        qkv_bias="blocks.0.self_attn.qkv.bias" in state,
        use_bias="blocks.0.self_attn.proj.bias" in state,
    )


# -- config.yaml -----------------------------------------------------------------------------------------------------

#: class that a file may name -> kind and default epsilon
NORM_CLASSES = {
    "LayerNorm": ("layernorm", 1e-5),
    "LPLayerNorm": ("layernorm", 1e-5),
    "LayerNormFP32": ("layernorm", 1e-5),
    "LAYER_NORM": ("layernorm", 1e-6),
    "RMSNorm": ("rmsnorm", 1e-6),
}
#: options that change the computation in a way that this class has not, and the values that leave it as it is
PLAIN = {
    "qk_scale": (None,),
    "rope": (None,),
    "rope_pos_embed": (None,),
    "relative_pos_embed": (None,),
    "ffn_target": ("SwiGLUFFN",),
}


def read_options(path: str | Path, known: Container[str] = ()) -> dict[str, Any]:
    """What a released `config.yaml` says of `num_attention_heads`, `norm_type` and `norm_eps`; it may say nothing.

    Options in `known` are not read.

    References such as ``${model.heads}`` to another place of the file are followed.

    Raises:
        InvalidParameterError: no YAML, two different values, a part that `FlexTokARModel` does not have.
    """
    try:
        whole = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(whole, dict):
        raise InvalidParameterError(f"{path}: expected a mapping, found {type(whole).__name__}")
    found: dict[str, set[Any]] = {name: set() for name in OPTIONS}
    part = _find(whole, "ar_image_model")
    for key, value in _walk(whole if part is None else part, whole, path):
        if key in PLAIN and _class_of(value) not in PLAIN[key]:
            raise InvalidParameterError(f"{path}: {key}={value!r} is a part that FlexTokARModel does not have")
        if key == "num_heads":
            found["num_attention_heads"].add(value)
        elif key in ("norm_layer", "qk_norm") and value is not None:
            name = _class_of(value)
            if name not in NORM_CLASSES:
                raise InvalidParameterError(f"{path}: {key}={value!r} is a norm that FlexTokARModel does not have")
            kind, eps = NORM_CLASSES[name]
            found["norm_type"].add(kind)
            found["norm_eps"].add(float(value.get("eps", eps)) if isinstance(value, dict) else eps)
    for name, values in found.items():
        if len(values) > 1 and name not in known:
            raise InvalidParameterError(f"{path}: more than one value of {name}, {sorted(values)}: give {name}")
    return {name: values.pop() for name, values in found.items() if values and name not in known}


def _find(node: Any, name: str) -> Any:
    """The value of the first key `name`, at any depth."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return None
    if name in node:
        return node[name]
    return next((value for value in (_find(child, name) for child in node.values()) if value is not None), None)


def _walk(node: Any, whole: dict[str, Any], path: object) -> Iterator[tuple[str, Any]]:
    """Every key below a node with its value, references followed."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        value = _followed(value, whole, path)
        yield str(key), value
        yield from _walk(value, whole, path)


def _followed(value: Any, whole: dict[str, Any], path: object) -> Any:
    seen: list[str] = []
    while isinstance(value, str) and (reference := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        if value in seen:
            raise InvalidParameterError(f"{path}: {value} refers to itself")
        seen.append(value)
        place: Any = whole
        for part in reference[1].split("."):
            if not isinstance(place, dict) or part not in place:
                raise InvalidParameterError(f"{path}: {value} refers to nothing in the file")
            place = place[part]
        value = place
    return value


def _class_of(value: Any) -> str | None:
    """Last part of the name of a class: a text, or the `path` or `_target_` of a mapping."""
    if isinstance(value, dict):
        value = value.get("path", value.get("_target_"))
    return None if value is None else str(value).rsplit(".", 1)[-1]


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InvalidParameterError(f"{path} is missing: expected the released model.safetensors")
    try:
        return {name: value.to(torch.float32) for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise InvalidParameterError(f"{path} is damaged, or is no safetensors file: {error}") from error
