"""Released TokenFlow checkpoints: names of tensors both ways, sizes read off the weights, files.

Three layouts by semantic encoder: CLIP (`tokenflow_clipb_32k_enhanced.pt`, and the same with the smaller pixel
decoder), SigLIP (`tokenflow_siglip_32k.pt`, and the tokenizer inside the released LLaVA model) and timm's ViTamin (no
released file is known).
Not carried over: a logging buffer, constants of the input's scaling, and of SigLIP the last layer and the pooling head,
which the tokenizer never reads.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, UnknownParameterError, UnsafeCheckpointError, nearest
from tokred.generation.tokenflow_parts import resize_positions

__all__ = [
    "CLIP_B",
    "PIXEL_BASE",
    "PIXEL_ENHANCED",
    "SCALES",
    "SEMANTIC_DECODER_B",
    "convert_state_dict",
    "encoder_type",
    "load_strictly",
    "official_state_dict",
    "read_checkpoint",
    "read_config",
]

CLIP_B: Final[Mapping[str, Any]] = {
    "type": "clip",
    "input_norm": "none",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SEMANTIC_DECODER_B: Final[Mapping[str, Any]] = {"dim": 768, "depth": 3, "heads": 12, "mlp_ratio": 4.0, "out_dim": 512}
PIXEL_BASE: Final[Mapping[str, Any]] = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 256,
    "attention": True,
}
PIXEL_ENHANCED: Final[Mapping[str, Any]] = {
    **PIXEL_BASE,
    "block_out_channels": (256, 256, 512, 512, 1024),
    "layers_per_block": 4,
}
#: scales of the releases by their grid; the paper's Table 11 has one more, 3, for ViTamin at 16
SCALES: Final[Mapping[int, tuple[int, ...]]] = {
    14: (1, 2, 4, 6, 8, 10, 12, 14),
    16: (1, 2, 4, 6, 8, 10, 12, 14, 16),
    27: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
}
ENHANCED_SIZE = 256  # pixels that the larger decoder was trained at, by interpolated tables
SIGLIP_SIZE = 384  # pixels for a grid of 27, a last strip of 6 is cut off
CLIP_HEAD_DIM, SIGLIP_HEADS, DECODER_HEADS = 64, 16, 12  # not to be read off the weights

# -- names of tensors ------------------------------------------------------------------------------------------------

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _vqgan(side: str, ours: str, blocks: str, resample: str) -> Iterator[tuple[str, str]]:
    yield f"{side}.conv_in.{{r}}", f"{ours}.conv_in.{{r}}"
    yield f"{side}.norm_out.{{r}}", f"{ours}.conv_norm_out.{{r}}"
    yield f"{side}.conv_out.{{r}}", f"{ours}.conv_out.{{r}}"
    places = (
        (f"{side}.conv_blocks.{{i}}.res.{{j}}", f"{ours}.{blocks}.{{i}}.resnets.{{j}}"),
        (f"{side}.mid.0", f"{ours}.mid_block.resnets.0"),
        (f"{side}.mid.2", f"{ours}.mid_block.resnets.1"),
    )
    for old, new in places:
        yield f"{old}.nin_shortcut.{{r}}", f"{new}.conv_shortcut.{{r}}"
        yield f"{old}.{{r}}", f"{new}.{{r}}"
    attentions = (
        (f"{side}.conv_blocks.{{i}}.attn.{{j}}", f"{ours}.{blocks}.{{i}}.attentions.{{j}}"),
        (f"{side}.mid.1", f"{ours}.mid_block.attentions.0"),
    )
    for old, new in attentions:
        for theirs, mine in _ATTENTION.items():
            yield f"{old}.{theirs}.{{r}}", f"{new}.{mine}.{{r}}"
    yield f"{side}.conv_blocks.{{i}}.{resample}.conv.{{r}}", f"{ours}.{blocks}.{{i}}.{resample}rs.0.conv.{{r}}"


_SHARED = (
    *_vqgan("encoder", "pixel_encoder", "down_blocks", "downsample"),
    *_vqgan("decoder", "pixel_decoder", "up_blocks", "upsample"),
    ("quant_conv.{r}", "quant_conv.{r}"),
    ("post_quant_conv.{r}", "post_quant_conv.{r}"),
    ("encode_task_layer.{r}", "semantic_in.{r}"),
    ("decode_task_layer.{r}", "semantic_out.{r}"),
    ("decoder_vqkd.{r}", "semantic_decoder.{r}"),
    ("quantize.embedding_vqkd.weight", "quantizer.semantic_codebook"),
    ("quantize.embedding_vqgan.weight", "quantizer.pixel_codebook"),
)
_CLIP_LAYER, _OUR_LAYER = "encoder_vqkd.transformer.resblocks.{i}", "semantic_encoder.encoder.layers.{i}"
#: (released name, ours) by semantic encoder; {i} and {j} stand for numbers, {r} for the rest of a name
PAIRS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "clip": (
        *_SHARED,
        ("encoder_vqkd.class_embedding", "semantic_encoder.embeddings.class_embedding"),
        ("encoder_vqkd.positional_embedding", "semantic_encoder.embeddings.position_embedding.weight"),
        ("encoder_vqkd.conv1.{r}", "semantic_encoder.embeddings.patch_embedding.{r}"),
        ("encoder_vqkd.ln_pre.{r}", "semantic_encoder.pre_layrnorm.{r}"),
        ("encoder_vqkd.ln_post.{r}", "semantic_encoder.post_layernorm.{r}"),
        (f"{_CLIP_LAYER}.attn.out_proj.{{r}}", f"{_OUR_LAYER}.self_attn.out_proj.{{r}}"),
        (f"{_CLIP_LAYER}.ln_1.{{r}}", f"{_OUR_LAYER}.layer_norm1.{{r}}"),
        (f"{_CLIP_LAYER}.ln_2.{{r}}", f"{_OUR_LAYER}.layer_norm2.{{r}}"),
        (f"{_CLIP_LAYER}.mlp.c_fc.{{r}}", f"{_OUR_LAYER}.mlp.fc1.{{r}}"),
        (f"{_CLIP_LAYER}.mlp.c_proj.{{r}}", f"{_OUR_LAYER}.mlp.fc2.{{r}}"),
    ),
    "siglip": (*_SHARED, ("encoder_vqkd.vision_model.{r}", "semantic_encoder.{r}")),
    "timm": (*_SHARED, ("encoder_vqkd.{r}", "semantic_encoder.{r}")),
}
_IN_PROJ = re.compile(r"encoder_vqkd\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_QKV = re.compile(r"semantic_encoder\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_SPLIT_BIAS = re.compile(r"(decoder_vqkd\.blocks\.\d+\.attn)\.([qv])_bias")
_MERGED_BIAS = re.compile(r"(semantic_decoder\.blocks\.\d+\.attn)\.qkv\.bias")
_POINTWISE = re.compile(r"pixel_(en|de)coder\..*\.(to_[qkv]|to_out\.0)\.weight")
_SIGLIP_LAYER = re.compile(r"encoder_vqkd\.vision_model\.encoder\.layers\.(\d+)\..*")
_DROPPED = ("quantize.codebook_used", "scaling_layer.", "encoder_vqkd.vision_model.head.")
#: what the names begin with where the tokenizer is a part of another model: the released LLaVA, the generator's files
PREFIXES = ("model.vision_tower.vision_tower.", "tokenizer.")


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(text.replace(r"\{r\}", r"(?P<r>.+)"))


_TO_OURS = {kind: [(_pattern(old), new) for old, new in pairs] for kind, pairs in PAIRS.items()}
_TO_OFFICIAL = {kind: [(_pattern(new), old) for old, new in pairs] for kind, pairs in PAIRS.items()}


def _renamed(key: str, table: Sequence[tuple[re.Pattern[str], str]], what: str) -> str:
    for pattern, template in table:
        if found := pattern.fullmatch(key):
            return template.format(**found.groupdict())
    raise InvalidParameterError(f"{key!r} is no tensor of {what}")


def encoder_type(state: Mapping[str, Tensor]) -> str:
    """ "clip", "siglip" or "timm", of a checkpoint with the released names.

    Raises:
        InvalidParameterError: none of them.
    """
    marks = {
        "clip": "encoder_vqkd.class_embedding",
        "siglip": "encoder_vqkd.vision_model.embeddings.patch_embedding.weight",
        "timm": "encoder_vqkd.patch_embed.backbone.stem.conv1.weight",
    }
    for kind, mark in marks.items():
        if mark in state:
            return kind
    some = ", ".join(list(state)[:3]) or "nothing"
    raise InvalidParameterError(
        f"the checkpoint holds no TokenFlow with CLIP, SigLIP or ViTamin: its names are {some} ...; expected one of "
        f"{', '.join(marks.values())}"
    )


def dropped_names(state: Mapping[str, Tensor]) -> list[str]:
    """Released names that have no place here: see the module."""
    layers = {key: int(found[1]) for key in state if (found := _SIGLIP_LAYER.fullmatch(key))}
    last = max(layers.values(), default=None)
    return [key for key in state if key.startswith(_DROPPED) or (key in layers and layers[key] == last)]


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint under the names of `tokred.generation.TokenFlow`; position tables as they are.

    Raises:
        InvalidParameterError: an unknown name, or half of a pair.
    """
    kind, dropped = encoder_type(state), set(dropped_names(state))
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in dropped:
            continue
        if match := _IN_PROJ.fullmatch(key):
            for name, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"semantic_encoder.encoder.layers.{match[1]}.self_attn.{name}_proj.{match[2]}"] = third
        elif match := _SPLIT_BIAS.fullmatch(key):
            halves = [state.get(f"{match[1]}.{name}_bias") for name in "qv"]
            if halves[0] is None or halves[1] is None:
                raise InvalidParameterError(f"{key} is there without its pair, {match[1]}.q_bias and .v_bias")
            merged = torch.cat([halves[0], torch.zeros_like(halves[0]), halves[1]])
            found[match[1].replace("decoder_vqkd", "semantic_decoder") + ".qkv.bias"] = merged
        else:
            name = _renamed(key, _TO_OURS[kind], "a released TokenFlow")
            found[name] = tensor[:, :, 0, 0] if _POINTWISE.fullmatch(name) and tensor.ndim == 4 else tensor
    return found


def official_state_dict(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Undoes `convert_state_dict`, but for what that drops.

    The semantic decoder's attention has no bias of keys there. It changes no softmax, so ours is left out.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if kind == "clip" and (match := _QKV.fullmatch(key)):
            if match[2] == "q":
                thirds = [state[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"]
                found[f"encoder_vqkd.transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(thirds)
        elif match := _MERGED_BIAS.fullmatch(key):
            q, _, v = tensor.chunk(3)
            place = match[1].replace("semantic_decoder", "decoder_vqkd")
            found |= {f"{place}.q_bias": q, f"{place}.v_bias": v}
        else:
            name = _renamed(key, _TO_OFFICIAL[kind], "our TokenFlow")
            found[name] = tensor[:, :, None, None] if _POINTWISE.fullmatch(key) else tensor
    return found


# -- sizes -----------------------------------------------------------------------------------------------------------

_PARTS = tuple(f"{part}_config" for part in ("semantic_encoder", "semantic_decoder", "pixel_encoder", "pixel_decoder"))
_CHANGEABLE = ("distance_weight", *_PARTS, "scale_drop")


def read_config(
    state: Mapping[str, Tensor], image_size: int | None, scales: Sequence[int] | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `TokenFlow` for these weights (released names); see `TokenFlow.from_official`."""
    for name in changes:
        if name not in _CHANGEABLE:
            raise UnknownParameterError(f"{name!r} cannot be changed{nearest(name, _CHANGEABLE)}")
    kind = encoder_type(state)
    read = _Reader(state)
    encoder, decoder = read.vqgan("encoder"), read.vqgan("decoder")
    semantic = {"clip": read.clip, "siglip": read.siglip, "timm": read.vitamin}[kind]()
    patch = semantic.get("patch_size", 16)  # ViTamin's stages make 16
    trained = round((len(read["decoder_vqkd.pos_embed"][0]) - 1) ** 0.5)
    if image_size is None:
        enhanced = decoder["block_out_channels"][0] > encoder["block_out_channels"][0]
        image_size = ENHANCED_SIZE if kind == "clip" and enhanced else trained * patch
        if kind == "siglip" and image_size == SIGLIP_SIZE // patch * patch:
            image_size = SIGLIP_SIZE
    whole = isinstance(image_size, int) and not isinstance(image_size, bool) and image_size >= patch
    if not whole or (kind != "siglip" and image_size % patch):
        raise InvalidParameterError(f"image_size={image_size!r}: expected a multiple of {patch}, the patch in pixels")
    grid = image_size // patch
    if scales is None:
        if grid not in SCALES:
            raise InvalidParameterError(
                f"the release has no scales for a grid of {grid}, only for {', '.join(map(str, SCALES))}: give scales"
            )
        scales = SCALES[grid]
    pixel_size = grid * 2 ** (len(encoder["block_out_channels"]) - 1)
    found: dict[str, Any] = {
        "image_size": image_size,
        "scales": tuple(scales),
        "codebook_size": len(read["quantize.embedding_vqkd.weight"]),
        "semantic_dim": read["quantize.embedding_vqkd.weight"].shape[1],
        "pixel_dim": read["quantize.embedding_vqgan.weight"].shape[1],
        "semantic_encoder_config": semantic,
        "semantic_decoder_config": read.semantic_decoder(),
        "pixel_encoder_config": encoder,
        "pixel_decoder_config": decoder,
        "pixel_size": None if pixel_size == image_size else pixel_size,
    }
    for name, value in changes.items():
        found[name] = {**found[name], **value} if isinstance(value, Mapping) else value
    return found


class _Reader:
    """Sizes of the parts from the shapes of their tensors."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.state:
            raise InvalidParameterError(f"the checkpoint lacks {name}")
        return self.state[name]

    def count(self, template: str) -> int:
        """How many there are of a name with a number in it, from 0 on."""
        return next(n for n in range(len(self.state) + 1) if template.format(n) not in self.state)

    def vqgan(self, side: str) -> dict[str, Any]:
        levels = self.count(side + ".conv_blocks.{}.res.0.conv1.weight")
        if not levels:
            raise InvalidParameterError(f"the checkpoint lacks {side}.conv_blocks.0.res.0.conv1.weight")
        widths = [len(self[f"{side}.conv_blocks.{i}.res.0.conv1.weight"]) for i in range(levels)]
        layers = self.count(side + ".conv_blocks.0.res.{}.conv1.weight")
        first = self[f"{side}.conv_in.weight"], self[f"{side}.conv_out.weight"]
        return {
            "block_out_channels": tuple(widths if side == "encoder" else reversed(widths)),
            "layers_per_block": layers if side == "encoder" else layers - 1,
            "norm_num_groups": 32,
            "latent_channels": first[1].shape[0] if side == "encoder" else first[0].shape[1],
            "attention": True,
        }

    def clip(self) -> dict[str, Any]:
        width, _, patch, _ = self["encoder_vqkd.conv1.weight"].shape
        return {
            **CLIP_B,
            "hidden_size": width,
            "intermediate_size": len(self["encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": self.count("encoder_vqkd.transformer.resblocks.{}.ln_1.weight"),
            "num_attention_heads": max(1, width // CLIP_HEAD_DIM),
            "patch_size": patch,
        }

    def siglip(self) -> dict[str, Any]:
        model = "encoder_vqkd.vision_model."
        width, _, patch, _ = self[f"{model}embeddings.patch_embedding.weight"].shape
        return {
            "type": "siglip",
            "input_norm": "clamp",
            "hidden_size": width,
            "intermediate_size": len(self[f"{model}encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": self.count(model + "encoder.layers.{}.layer_norm1.weight") - 1,
            "num_attention_heads": SIGLIP_HEADS,
            "patch_size": patch,
        }

    def vitamin(self) -> dict[str, Any]:
        return {"type": "timm", "input_norm": "clip", "model_name": "vitamin_xlarge_256"}

    def semantic_decoder(self) -> dict[str, Any]:
        dim = len(self["decoder_vqkd.patch_embed.proj.weight"])
        return {
            "dim": dim,
            "depth": self.count("decoder_vqkd.blocks.{}.norm1.weight"),
            "heads": DECODER_HEADS,
            "mlp_ratio": len(self["decoder_vqkd.blocks.0.mlp.fc1.weight"]) / dim,
            "out_dim": len(self["decode_task_layer.2.weight"]),
        }


_TABLES = ("semantic_encoder.embeddings.position_embedding.weight", "semantic_decoder.pos_embed")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model`, a `TokenFlow` perhaps without memory, tensors of `convert_state_dict`.

    The position tables of CLIP and of the semantic decoder are resized to the model's grid first.

    Raises:
        InvalidParameterError: a tensor is missing, unknown, or of another shape; named as in the release.
    """
    any_model: Any = model
    kind, grid, state = any_model.config.semantic_encoder_config["type"], any_model.quantizer.grid, dict(state)
    for name in _TABLES if kind == "clip" else ():
        if (table := state.get(name)) is not None:
            state[name] = resize_positions(table.reshape(-1, table.shape[-1]), grid).view(
                *table.shape[:-2], -1, table.shape[-1]
            )
    own = model.state_dict()
    problems = [f"lacks {_named(key, kind)}" for key in own if key not in state]
    problems += [f"has the unknown {_named(key, kind)}" for key in state if key not in own]
    problems += [
        f"has {_named(key, kind)} of shape {tuple(state[key].shape)}, where {tuple(tensor.shape)} is expected"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} problems more" if len(problems) > 3 else ""
        raise InvalidParameterError(f"the checkpoint {'; '.join(problems[:3])}{more}")
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name.endswith(".position_ids"):  # transformers' own, which no file holds
            module = model.get_submodule(name.rpartition(".")[0])
            numbers = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.register_buffer("position_ids", numbers, persistent=False)
    model.load_state_dict({key: tensor.contiguous() for key, tensor in state.items()}, strict=True, assign=True)


def _named(key: str, kind: str) -> str:
    if kind == "clip" and (match := _QKV.fullmatch(key)):
        return f"encoder_vqkd.transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
    if match := _MERGED_BIAS.fullmatch(key):
        return match[1].replace("semantic_decoder", "decoder_vqkd") + ".q_bias"
    return _renamed(key, _TO_OFFICIAL[kind], "our TokenFlow")


# -- files -----------------------------------------------------------------------------------------------------------

FILES = ("tokenflow_clipb_32k_enhanced.pt", "tokenflow_siglip_32k.pt")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PAYLOAD = ("ema", "model", "state_dict")


def read_checkpoint(source: str | Path, filename: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint under the released names, without what other models put before them.

    Of the files of a LLaVA model only the shards that hold the tokenizer are read, and of those only its tensors.

    Raises:
        InvalidParameterError: no such file, several to choose from, or none that can be read.
        UnsafeCheckpointError: see `TokenFlow.from_official`.
    """
    path = Path(source)
    if path.is_file():
        state = _read_file(path)
    elif path.is_dir():
        state = _read_folder(path, filename)
    elif isinstance(source, str) and _HUB_ID.fullmatch(source):
        state = _read_hub(source, filename)
    else:
        raise InvalidParameterError(f"{source}: no such folder or file, and no name on the Hub (owner/name)")
    return _own(state)


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return dict(state)


def _read_folder(folder: Path, filename: str | None) -> dict[str, Tensor]:
    if filename is not None:
        if not (folder / filename).is_file():
            raise InvalidParameterError(f"{folder / filename}: no such file")
        return _read_file(folder / filename)
    if (folder / INDEX).is_file():
        return _read_shards(folder / INDEX, lambda name: folder / name)
    there = [name for name in (*FILES, WHOLE) if (folder / name).is_file()]
    if len(there) != 1:
        what = (
            f"{', '.join(there)} are in {folder}" if there else f"none of {', '.join((*FILES, WHOLE))} is in {folder}"
        )
        raise InvalidParameterError(f"{what}: give filename")
    return _read_file(folder / there[0])


def _read_shards(index: Path, locate: Any) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidParameterError(f"{index} is no index of shards: {error!r}") from None
    shards = sorted({shard for key, shard in places.items() if key.startswith(PREFIXES)} or set(places.values()))
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise InvalidParameterError(f"{index} names {shard!r}, which is outside its folder")
        state |= _read_safetensors(Path(locate(shard)))
    return state


def _read_hub(name: str, filename: str | None) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if filename is not None:
        return _read_file(Path(hf_hub_download(name, filename)))
    try:
        index = Path(hf_hub_download(name, INDEX))
    except EntryNotFoundError:
        raise InvalidParameterError(f"{name}: give filename, such as {' or '.join(FILES)}") from None
    return _read_shards(index, lambda shard: hf_hub_download(name, shard))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    import pickle

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise UnsafeCheckpointError(
                f"{path} asks for more than tensors and plain values; nothing of it was executed, and nothing was "
                f"loaded: {str(error).splitlines()[0]}"
            ) from None
        raise InvalidParameterError(f"{path} is damaged, or is no checkpoint: {error!r}") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise InvalidParameterError(f"{path} is damaged, or is no checkpoint: {error!r}") from None
    for key in _PAYLOAD:
        if isinstance(payload, Mapping) and isinstance(payload.get(key), Mapping):
            payload = payload[key]
            break
    if not isinstance(payload, Mapping) or not all(isinstance(value, Tensor) for value in payload.values()):
        raise InvalidParameterError(f"{path} holds no state dict, neither at its top nor under {' or '.join(_PAYLOAD)}")
    return {str(key): value for key, value in payload.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            own = [key for key in keys if key.startswith(PREFIXES)] or keys
            return {key: file.get_tensor(key) for key in own}
    except (SafetensorError, OSError) as error:
        raise InvalidParameterError(f"{path} is damaged, or is no safetensors file: {error}") from None
