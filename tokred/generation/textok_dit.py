"""TexTokDiT1D: a diffusion transformer over the N x d latents of a TexTok (adaLN-Zero blocks, Peebles & Xie 2023).

The paper trains DiTs on TexTok's tokens and says no more; the layout here is ours. Noise schedules and samplers are
those of diffusers: `make_scheduler` gives the one that goes with an objective.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.generation.patches import sincos_1d

try:
    from timm.layers import Mlp
    from timm.models.vision_transformer import Attention
except ImportError as error:
    raise ImportError(
        "TexTokDiT1D uses timm's attention, and timm is not installed: pip install 'tokred[timm]'"
    ) from error

__all__ = ["PRESETS", "TexTokDiT1D", "TexTokDiTOutput", "make_scheduler"]

OBJECTIVES = ("ddpm", "flow")
#: the DiT paper's sizes
PRESETS: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


@dataclass
class TexTokDiTOutput(BaseOutput):
    """`sample` (B, N, d), or (B, N, 2d) with learned variances: noise ("ddpm") or velocity ("flow")."""

    sample: Tensor


class DiTBlock(nn.Module):
    """adaLN-Zero block, with attention to text between self-attention and MLP if asked."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, cross_attention: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if cross_attention else None
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True) if cross_attention else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        gelu = functools.partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=gelu)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h: Tensor, c: Tensor, text: Tensor | None, visible: Tensor | None) -> Tensor:
        """h (B, N, D), c (B, D) after SiLU, text (B, T, D) with visible (B, T) bool -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = h + gate1 * self.attn(self.norm1(h) * (1 + scale1) + shift1)
        if self.cross_attn is not None and self.norm_cross is not None and text is not None and visible is not None:
            # a row without any text gets no contribution; its softmax must still have something to look at
            some = visible.any(dim=1)
            hidden = ~visible & some[:, None]
            y, _ = self.cross_attn(self.norm_cross(h), text, text, key_padding_mask=hidden, need_weights=False)
            h = h + y * some[:, None, None]
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class TexTokDiT1D(ModelMixin, ConfigMixin):
    """Predicts the noise, or the velocity, of N noisy normalised latents, given a class, a text, or both.

    Everything that starts at zero in DiT does here: an untrained model predicts 0.

    Args:
        num_tokens, latent_dim: N and d of the tokenizer.
        depth, hidden_size, num_heads, mlp_ratio: of the blocks; see `from_preset`.
        num_classes: class-conditional; id `num_classes` is the null class. None: no classes.
        text_dim: text-conditional, on features of this width: their mean is added to the conditioning vector. None: no
            text. The paper's class-conditional generators see no text; a model with both sees both.
        cross_attention: each block also attends to the text tokens (only where there is text).
        objective: "ddpm" predicts noise (linear betas, 1000 steps), "flow" the velocity noise - data.
        learn_sigma: 2d outputs, the second half for the variance ("ddpm" only).
        condition_dropout: probability with which `drop_condition` drops class and text, for guidance.

    Raises:
        InvalidParameterError: a field outside its range, or neither classes nor text.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _gradient_checkpointing_func: Any

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 32,
        latent_dim: int = 8,
        depth: int = 12,
        hidden_size: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        text_dim: int | None = None,
        cross_attention: bool = True,
        objective: str = "ddpm",
        learn_sigma: bool = False,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check_config(dict(self.config))
        self.gradient_checkpointing = False
        width = hidden_size
        self.proj_in = nn.Linear(latent_dim, width)
        self.register_buffer("pos_embed", sincos_1d(num_tokens, width)[None], persistent=False)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, width)
        self.class_embed = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.text_proj = nn.Linear(text_dim, width) if text_dim is not None else None
        cross = cross_attention and text_dim is not None
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio, cross) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, latent_dim * (2 if learn_sigma else 1))
        self._init_weights()

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> TexTokDiT1D:
        """A new model of size "S", "B", "L" or "XL"; `fields` as in the constructor.

        Raises:
            InvalidParameterError: an unknown name, or a field outside its range.
        """
        if name not in PRESETS:
            raise InvalidParameterError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **fields})

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [self.time_embed.linear_1, self.time_embed.linear_2]
        for module in embeddings if self.class_embed is None else [*embeddings, self.class_embed]:
            nn.init.normal_(module.weight, std=0.02)
        zero: list[Any] = [self.modulation_out, self.proj_out]
        blocks: list[Any] = list(self.blocks)
        for block in blocks:
            zero += [block.modulation, *([] if block.cross_attn is None else [block.cross_attn.out_proj])]
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> TexTokDiTOutput:
        """One prediction.

        Args:
            latents: (B, N, d), noisy and normalised.
            timestep: (B,) or one number: 0 to 999 for "ddpm", 1000 sigma for "flow".
            class_labels: (B,) int64 below num_classes, num_classes for no class. None: no class for all.
            text_embeds: (B, T, text_dim). None: no text for all.
            text_mask: (B, T), 1 at text; a row of zeros has no text. None is all 1.

        Raises:
            InvalidParameterError: shapes that do not fit, or a condition that this model does not take.
        """
        self._check(latents, class_labels, text_embeds, text_mask)
        batch, dtype = len(latents), self.dtype
        h = self.proj_in(latents.to(dtype)) + self.pos_embed.to(dtype)
        t = torch.as_tensor(timestep, device=h.device).expand(batch)
        c = self.time_embed(self.time_proj(t).to(dtype))
        if self.class_embed is not None:
            null = torch.full((batch,), self.config.num_classes, device=h.device)
            c = c + self.class_embed(null if class_labels is None else class_labels.to(h.device))
        text = visible = None
        if text_embeds is not None and self.text_proj is not None:
            visible = text_embeds.new_ones(text_embeds.shape[:2]) if text_mask is None else text_mask
            visible = visible.to(device=h.device, dtype=torch.bool)
            text = self.text_proj(text_embeds.to(dtype)).masked_fill(~visible[..., None], 0)
            c = c + text.sum(dim=1) / visible.sum(dim=1, keepdim=True).clamp_min(1)
        c = nn.functional.silu(c)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, c, text, visible)
            else:
                h = block(h, c, text, visible)
        shift, scale = self.modulation_out(c)[:, None].chunk(2, dim=-1)
        return TexTokDiTOutput(self.proj_out(self.norm_out(h) * (1 + scale) + shift))

    def drop_condition(
        self,
        class_labels: Tensor | None = None,
        text_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Training for guidance: with probability `condition_dropout` a sample's class turns null and its text mask 0.

        Class and text of a sample are dropped together. `generator` lives on the CPU. The inputs are not changed.
        """
        given = class_labels if class_labels is not None else text_mask
        if given is None:
            return None, None
        drop = (torch.rand(len(given), generator=generator) < self.config.condition_dropout).to(given.device)
        if class_labels is not None:
            class_labels = class_labels.masked_fill(drop, self.config.num_classes)
        if text_mask is not None:
            text_mask = text_mask.masked_fill(drop[:, None], 0)
        return class_labels, text_mask

    def _check(
        self, latents: Tensor, class_labels: Tensor | None, text_embeds: Tensor | None, text_mask: Tensor | None
    ) -> None:
        n, d = self.config.num_tokens, self.config.latent_dim
        if latents.ndim != 3 or tuple(latents.shape[1:]) != (n, d):
            raise InvalidParameterError(f"latents: shape {tuple(latents.shape)} given, expected (B, {n}, {d})")
        batch = len(latents)
        if class_labels is not None:
            if self.config.num_classes is None:
                raise InvalidParameterError(
                    "class_labels given, but this generator takes no classes (num_classes=None)"
                )
            if tuple(class_labels.shape) != (batch,) or class_labels.dtype not in (torch.int32, torch.int64):
                raise InvalidParameterError(
                    f"class_labels: {tuple(class_labels.shape)} {class_labels.dtype} given, expected ({batch},) int64"
                )
        if text_embeds is None:
            if text_mask is not None:
                raise InvalidParameterError("text_mask given without text_embeds: give both, or neither")
            return
        width = self.config.text_dim
        if width is None:
            raise InvalidParameterError("text_embeds given, but this generator takes no text (text_dim=None)")
        if text_embeds.ndim != 3 or len(text_embeds) != batch or text_embeds.shape[2] != width:
            raise InvalidParameterError(
                f"text_embeds: shape {tuple(text_embeds.shape)} given, expected ({batch}, T, {width})"
            )
        if text_mask is not None and text_mask.shape != text_embeds.shape[:2]:
            raise InvalidParameterError(
                f"text_mask: shape {tuple(text_mask.shape)} given, expected {tuple(text_embeds.shape[:2])}"
            )


def make_scheduler(objective: str = "ddpm", learn_sigma: bool = False) -> Any:
    """The diffusers scheduler of an objective, for training noise and for sampling; nothing is clipped.

    "ddpm": 1000 steps, linear betas, noise prediction; `DDIMScheduler` and `DPMSolverMultistepScheduler` are made of
    its config by `from_config`. "flow": `FlowMatchEulerDiscreteScheduler`.
    """
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    if objective != "ddpm":
        raise InvalidParameterError(f"objective={objective!r}: expected one of {', '.join(OBJECTIVES)}")
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        variance_type="learned_range" if learn_sigma else "fixed_small",
        prediction_type="epsilon",
        clip_sample=False,
    )


def _check_config(config: dict[str, Any]) -> None:
    for name in ("num_tokens", "latent_dim", "depth", "hidden_size", "num_heads", "num_classes", "text_dim"):
        value = config[name]
        if value is None and name in ("num_classes", "text_dim"):
            continue
        if not isinstance(value, int) or value < 1:
            raise InvalidParameterError(f"{name}={value!r}: expected a positive integer")
    if config["hidden_size"] % config["num_heads"] or config["hidden_size"] % 2:
        raise InvalidParameterError(
            f"hidden_size={config['hidden_size']}: expected an even multiple of num_heads={config['num_heads']}"
        )
    if not config["mlp_ratio"] > 0:
        raise InvalidParameterError(f"mlp_ratio={config['mlp_ratio']!r}: expected a positive number")
    if config["num_classes"] is None and config["text_dim"] is None:
        raise InvalidParameterError("num_classes=None and text_dim=None: expected at least one of them")
    if config["objective"] not in OBJECTIVES:
        raise InvalidParameterError(f"objective={config['objective']!r}: expected one of {', '.join(OBJECTIVES)}")
    if config["learn_sigma"] and config["objective"] != "ddpm":
        raise InvalidParameterError("learn_sigma=True: only objective='ddpm' has variances to learn")
    if not 0 <= config["condition_dropout"] < 1:
        raise InvalidParameterError(f"condition_dropout={config['condition_dropout']!r}: expected a number in [0, 1)")
