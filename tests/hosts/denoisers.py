"""Tiny denoisers of diffusers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DENOISERS", "call", "denoiser", "inputs", "run"]

DENOISERS = ("unet", "dit", "pixart", "sd3", "flux")
TEXT = 5


def denoiser(name: str, **changes: Any) -> nn.Module:
    """One of `DENOISERS`, in eval mode; biases and gates that a fresh model leaves at zero are random, too."""
    torch.manual_seed(0)
    model = _BUILDERS[name](**changes)
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1 and bool(parameter.any())), std=0.2)
    return model.eval()


def _unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**sizes, **changes})


def _dit(**changes: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    return DiTTransformer2DModel(
        **{**sizes, "sample_size": 16, "patch_size": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 10, **changes}
    )


def _pixart(**changes: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    more = {"cross_attention_dim": 16, "caption_channels": 12, "norm_num_groups": 4, "use_additional_conditions": False}
    return PixArtTransformer2DModel(**{**sizes, **more, "sample_size": 16, "patch_size": 2, **changes})


def _sd3(**changes: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
    more = {"pooled_projection_dim": 10, "pos_embed_max_size": 24, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return SD3Transformer2DModel(**{**sizes, **heads, **more, **changes})


def _flux(**changes: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes = {"patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    more = {
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**sizes, **more, **changes})


_BUILDERS = {"unet": _unet, "dit": _dit, "pixart": _pixart, "sd3": _sd3, "flux": _flux}


def inputs(name: str, batch: int = 2, grid: tuple[int, int] = (8, 8), timestep: float = 7.0, seed: int = 0) -> dict:
    """Inputs of a model of `denoiser(name)` whose finest grid of tokens is `grid`; later samples begin like fewer."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid

    def randn(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for _ in range(batch)])

    time = torch.full((batch,), timestep)
    if name == "unet":
        return {"sample": randn(4, rows, columns), "timestep": time, "encoder_hidden_states": randn(TEXT, 12)}
    if name == "flux":
        cells = torch.arange(rows * columns)
        return {
            "hidden_states": randn(rows * columns, 8),
            "encoder_hidden_states": randn(TEXT, 12),
            "pooled_projections": randn(10),
            "timestep": time / 10,
            "img_ids": torch.stack([cells * 0, cells // columns, cells % columns], dim=1).float(),
            "txt_ids": torch.arange(TEXT)[:, None].expand(-1, 3).float(),  # rotated, unlike the pipeline's zeros
        }
    given = {"hidden_states": randn(4, 2 * rows, 2 * columns), "timestep": time.long()}
    if name == "dit":
        return {**given, "class_labels": torch.arange(batch) % 10}
    given["encoder_hidden_states"] = randn(TEXT, 12)
    if name == "sd3":
        given["pooled_projections"] = randn(10)
        given["timestep"] = time
    return given


def call(model: nn.Module, given: dict) -> Tensor:
    """The output of a denoiser."""
    return model(**given, return_dict=False)[0]


@torch.no_grad()
def run(model: nn.Module, given: dict) -> Tensor:
    return call(model, given)
