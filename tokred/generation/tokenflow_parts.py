"""What TokenFlow is built of: semantic encoder and decoder, pixel encoder and decoder (arXiv 2412.03069).

All of them are those of transformers, timm and diffusers; here is how they are sized and called.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tokred.core.errors import InvalidParameterError, UnknownParameterError, nearest
from tokred.generation.images import to_pil, to_pixels

__all__ = [
    "SEMANTIC_ENCODERS",
    "crop_square",
    "pad_square",
    "pixel_decoder",
    "pixel_encoder",
    "resize_positions",
    "semantic_decoder",
    "semantic_encoder",
    "semantic_loss",
    "semantic_tokens",
    "task_layer",
]

SEMANTIC_ENCODERS = ("clip", "siglip", "timm")
INPUT_NORMS = ("none", "clamp", "clip")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXEL_FIELDS = ("block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels", "attention")
DECODER_FIELDS = ("dim", "depth", "heads", "mlp_ratio", "out_dim")


def _checked(name: str, given: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    for key in given:
        if key not in known:
            raise UnknownParameterError(f"{name}: {key!r} is no field of it{nearest(key, known)}")
    return dict(given)


# -- semantic encoder ------------------------------------------------------------------------------------------------


def semantic_encoder(config: Mapping[str, Any], image_size: int) -> nn.Module:
    """The encoder that `config` names, with random weights; call it by `semantic_tokens`.

    Args:
        config: "type", and the fields of `CLIPVisionConfig` for "clip" (released: quick_gelu), of
            `SiglipVisionConfig` for "siglip", arguments of `timm.create_model`, "model_name" among them, for "timm".
            "input_norm" is read by `semantic_tokens`.
        image_size: side of the pictures in pixels.

    Raises:
        InvalidParameterError: another type or input_norm, or a timm model without a name.
    """
    fields = dict(config)
    kind, norm = fields.pop("type", None), fields.pop("input_norm", "none")
    if kind not in SEMANTIC_ENCODERS:
        raise InvalidParameterError(f"semantic_encoder type={kind!r}: expected one of {', '.join(SEMANTIC_ENCODERS)}")
    if norm not in INPUT_NORMS:
        raise InvalidParameterError(f"semantic_encoder input_norm={norm!r}: expected one of {', '.join(INPUT_NORMS)}")
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(image_size=image_size, **fields))
    if kind == "siglip":
        # The released tokenizer reads what leaves the last layer but one; here the last is simply not built.
        siglip = SiglipVisionModel(SiglipVisionConfig(image_size=image_size, vision_use_head=False, **fields))
        siglip.post_layernorm.requires_grad_(False)  # not called either
        return siglip
    name = fields.pop("model_name", None)
    if not isinstance(name, str) or not timm.is_model(name):
        raise InvalidParameterError(f"semantic_encoder model_name={name!r}: timm has no such model")
    model = timm.create_model(name, **{"img_size": image_size, "num_classes": 0, **fields, "pretrained": False})
    for head in ("fc_norm", "head", "attn_pool"):
        if getattr(model, head, None) is not None:
            setattr(model, head, nn.Identity())  # never called: its weights would only be carried about
    return model


def semantic_tokens(model: nn.Module, config: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """Patch tokens (B, g * g, C) of pixels (B, 3, H, W) in [-1, 1].

    CLIP: post-norm of all tokens, without the class token and without projection. SigLIP: before the post-norm. timm:
    `forward_features` without prefix tokens.

    `input_norm` in `config` says what the pixels go through first: "none"; "clamp" to [-1, 1]; "clip" to [0, 1] and
    CLIP's mean and deviation.
    """
    any_model: Any = model
    x = _normalized(pixels, config.get("input_norm", "none"))
    if config["type"] == "timm":
        return any_model.forward_features(x)[:, any_model.num_prefix_tokens :]
    hidden = any_model.embeddings(x)
    if config["type"] == "siglip":
        return any_model.encoder(inputs_embeds=hidden).last_hidden_state
    hidden = any_model.encoder(inputs_embeds=any_model.pre_layrnorm(hidden)).last_hidden_state
    return any_model.post_layernorm(hidden)[:, 1:]


def _normalized(pixels: Tensor, norm: str) -> Tensor:
    if norm == "none":
        return pixels
    if norm == "clamp":
        return pixels.clamp(-1, 1)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (((pixels + 1) / 2).clamp(0, 1) - mean) / std


def semantic_width(model: nn.Module, config: Mapping[str, Any]) -> int:
    """Channels of the encoder's tokens."""
    any_model: Any = model
    return any_model.num_features if config["type"] == "timm" else any_model.config.hidden_size


# -- pixels ----------------------------------------------------------------------------------------------------------


def _pixel_config(name: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    fields = _checked(name, config, PIXEL_FIELDS)
    channels = tuple(fields.get("block_out_channels", ()))
    if not channels or "latent_channels" not in fields:
        raise InvalidParameterError(f"{name}: block_out_channels or latent_channels is missing or empty")
    fields |= {"block_out_channels": channels, "norm_num_groups": fields.get("norm_num_groups", 32)}
    if any(c % fields["norm_num_groups"] for c in channels):
        raise InvalidParameterError(
            f"{name}: norm_num_groups={fields['norm_num_groups']} does not divide block_out_channels={list(channels)}"
        )
    return fields, bool(fields.pop("attention", True))


def pixel_encoder(config: Mapping[str, Any]) -> Encoder:
    """A VQGAN encoder, (B, 3, H, W) -> (B, latent_channels, h, w); each level but the last halves the sides.

    Args:
        config: "block_out_channels", one a level, "layers_per_block", "norm_num_groups", "latent_channels", and whether
            there is "attention" at the lowest level and in the middle, as released.

    Raises:
        UnknownParameterError: another field. InvalidParameterError: no levels, or groups that do not divide them.
    """
    fields, attention = _pixel_config("pixel_encoder", config)
    levels = len(fields["block_out_channels"])
    lowest = "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"
    return Encoder(
        out_channels=fields.pop("latent_channels"),
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + (lowest,),
        double_z=False,
        mid_block_add_attention=attention,
        **fields,
    )


def pixel_decoder(config: Mapping[str, Any]) -> Decoder:
    """Its counterpart, (B, latent_channels, h, w) -> (B, 3, H, W); fields as in `pixel_encoder`."""
    fields, attention = _pixel_config("pixel_decoder", config)
    levels = len(fields["block_out_channels"])
    lowest = "AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D"
    return Decoder(
        in_channels=fields.pop("latent_channels"),
        up_block_types=(lowest,) + ("UpDecoderBlock2D",) * (levels - 1),
        mid_block_add_attention=attention,
        **fields,
    )


# -- semantic decoder ------------------------------------------------------------------------------------------------


def semantic_decoder(config: Mapping[str, Any], in_dim: int, grid: int) -> VisionTransformer:
    """A ViT on the map (B, in_dim, g, g): pre-norm, class token, learnt positions; call it by `decode_tokens`.

    Args:
        config: "dim", "depth", "heads", "mlp_ratio" (4), and "out_dim", the width of the teacher's features.

    Raises:
        UnknownParameterError: another field. InvalidParameterError: heads that do not divide the width.
    """
    fields = {"depth": 3, "heads": 12, "mlp_ratio": 4.0, **_checked("semantic_decoder", config, DECODER_FIELDS)}
    for name in ("dim", "out_dim"):
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise InvalidParameterError(f"semantic_decoder {name}={fields.get(name)!r}: expected a whole number >= 1")
    if fields["dim"] % fields["heads"]:
        raise InvalidParameterError(f"semantic_decoder: {fields['heads']} heads do not divide dim={fields['dim']}")
    return VisionTransformer(
        img_size=grid,
        patch_size=1,
        in_chans=in_dim,
        embed_dim=fields["dim"],
        depth=fields["depth"],
        num_heads=fields["heads"],
        mlp_ratio=fields["mlp_ratio"],
        qkv_bias=True,
        class_token=True,
        global_pool="avg",  # timm then has no last norm, but one (fc_norm) behind the pooling that we leave out
        num_classes=0,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )


def decode_tokens(model: nn.Module, semantic: Tensor) -> Tensor:
    """Tokens (B, g * g, dim) of the semantic half (B, in_dim, g, g)."""
    any_model: Any = model
    return any_model.fc_norm(any_model.forward_features(semantic)[:, 1:])


def task_layer(in_dim: int, out_dim: int) -> nn.Sequential:
    """W2 tanh(W1 x + b1) + b2, as wide within as at its beginning."""
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, out_dim))


def semantic_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean of 1 - cos over features (..., C): half the squared distance of unit vectors, which the paper writes."""
    return (1 - F.cosine_similarity(found.float(), wanted.float(), dim=-1)).mean()


# -- positions and pictures -------------------------------------------------------------------------------------------


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A table (1 + n * n, C) of positions, the class token's first, as (1 + grid * grid, C).

    As released, the rule of DINO: bicubic by the factor (grid + 0.1) / n, which also places the samples, so it is not
    the same as resizing to the size `grid`.

    Raises:
        InvalidParameterError: the table is of no square.
    """
    old = round((len(table) - 1) ** 0.5)
    if old * old + 1 != len(table):
        raise InvalidParameterError(f"a table of {len(table)} positions: expected 1 more than a square number")
    if old == grid:
        return table
    squares = table[1:].float().unflatten(0, (old, old)).movedim(-1, 0)[None]
    found = F.interpolate(squares, scale_factor=(grid + 0.1) / old, mode="bicubic")
    if found.shape[-1] != grid:
        raise InvalidParameterError(f"positions of {old} x {old} cannot be resized to {grid} x {grid} by this rule")
    return torch.cat([table[:1], found[0].flatten(1).mT.to(table.dtype)])


def crop_square(image: Image.Image | np.ndarray, size: int) -> Image.Image:
    """The middle of a picture, size x size, as released for reconstruction: halve (box) while both sides are at least
    twice `size`, scale the shorter side to `size` (bicubic), cut."""
    small = _rgb(image)
    while min(small.size) >= 2 * size:
        small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
    scale = size / min(small.size)
    small = small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - size) // 2, (small.height - size) // 2
    return small.crop((left, top, left + size, top + size))


def pad_square(image: Image.Image | np.ndarray, size: int, pad: bool = True) -> Image.Image:
    """A whole picture, size x size, as released for language models: padded to a square with grey 127, then scaled
    (bicubic). Without `pad` it is squeezed."""
    whole = _rgb(image)
    side = max(whole.size)
    if pad and whole.width != whole.height:
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(whole, ((side - whole.width) // 2, (side - whole.height) // 2))
        whole = square
    return whole.resize((size, size), Image.Resampling.BICUBIC)


def _rgb(image: Image.Image | np.ndarray) -> Image.Image:
    return to_pil(to_pixels(image))[0]
