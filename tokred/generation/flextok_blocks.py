"""The two transformers of FlexTok: latents to ordered registers, and noised latents with registers to a velocity.

All LayerNorms are without weight and bias, epsilon 1e-5, computed in float32. Names of parameters follow the release
where it matters for loading (`flextok_official`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokred.core.errors import InvalidParameterError
from tokred.generation.patches import patchify, sincos_2d, unpatchify

__all__ = ["POSITION_TYPES", "FlexTokDecoder", "FlexTokEncoder", "timestep_waves"]

POSITION_TYPES = ("sincos", "learnable_sum")


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def mlp_width(dim: int, ratio: float) -> int:
    """Hidden width of the gated MLP: two thirds of the plain one, rounded as released."""
    return int(2 * int(ratio * dim) / 3)


def timestep_waves(t: Tensor, dim: int = 256, max_timestep: float = 1000.0) -> Tensor:
    """(B, dim) float32: [cos a, sin a] with a = t f, f_n = (1000 / max_timestep) 256^(-n / (dim / 2))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    # in the release's order of operations: angles reach 1000, where float32 rounds at 6e-5
    f = torch.exp(-math.log(256) * steps / half) * (1000.0 / max_timestep)
    angles = t.float()[:, None] * f
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys and the scale 8 / head_dim."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor | None = None, patches: int | None = None) -> Tensor:
        """Args:
        x: (B, N, D). bias: added to the scores (broadcast over (B, H, N, N)), or a mask that is True where seen.
        patches: so many first tokens see each other and nothing else; `bias` is then that of the others' rows.
        """
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k = (normed(linear(x).view(shape)).transpose(1, 2) for linear in (self.wq, self.wk))
        v = self.wv(x).view(shape).transpose(1, 2)
        if patches is None:
            out = self._attend(q, k, v, bias)
        else:
            first = self._attend(q[:, :, :patches], k[:, :, :patches], v[:, :, :patches])
            out = torch.cat([first, self._attend(q[:, :, patches:], k, v, bias)], dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=8.0 / self.head_dim)


class GatedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(dim, head_dim)
        self.mlp = GatedMLP(dim, hidden)

    def forward(self, x: Tensor, mask: Tensor, patches: int) -> Tensor:
        x = x + self.attn(normed(x), mask, patches)
        return x + self.mlp(normed(x))


class DecoderBlock(nn.Module):
    """Block whose norms and gates depend on time, with values of their own for patches and for registers."""

    def __init__(self, dim: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(dim, head_dim)
        self.mlp = GatedMLP(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * 6 * dim))  # name as released

    def forward(self, x: Tensor, temb: Tensor, bias: Tensor | None, patches: int) -> Tensor:
        values = self.adaLN_modulation(temb).view(len(temb), 2, 6, -1)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = values.unbind(2)  # not DiT's order
        x = x + _gated(self.attn(_modulated(normed(x), shift_attn, scale_attn, patches), bias), gate_attn, patches)
        return x + _gated(self.mlp(_modulated(normed(x), shift_mlp, scale_mlp, patches)), gate_mlp, patches)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, patches: int) -> Tensor:
    """x (1 + scale) + shift; rows of shift and scale (B, 2, D): for the first `patches` tokens, for the others."""
    first = torch.addcmul(shift[:, :1], x[:, :patches], 1 + scale[:, :1])
    return torch.cat([first, torch.addcmul(shift[:, 1:], x[:, patches:], 1 + scale[:, 1:])], dim=1)


def _gated(x: Tensor, gate: Tensor, patches: int) -> Tensor:
    return torch.cat([x[:, :patches] * gate[:, :1], x[:, patches:] * gate[:, 1:]], dim=1)


class PatchGrid(nn.Module):
    """What both transformers share: patches of a latent picture, projected, with positions."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, dim: int, channels: int, patch: int, grid: int, position_type: str) -> None:
        super().__init__()
        self.patch, self.grid, self.position_type, self.channels = patch, grid, position_type, channels
        self.patch_embed = nn.Linear(patch * patch * channels, dim)
        if position_type == "sincos":
            self.pos_embed = nn.Parameter(sincos_2d(grid, grid, dim), requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(torch.empty(2, 1, dim, grid))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def shape(self, latents: Tensor) -> tuple[int, int]:
        """Patches (h, w) of latents (B, C, H, W); raises where they do not fit."""
        shape, patch = tuple(latents.shape), self.patch
        if len(shape) != 4 or shape[1] != self.channels or shape[2] % patch or shape[3] % patch or 0 in shape:
            raise InvalidParameterError(
                f"latents: shape {shape} given, expected (B, {self.channels}, H, W) with H and W multiples of {patch}"
            )
        h, w = shape[2] // patch, shape[3] // patch
        if max(h, w) > self.grid:
            raise InvalidParameterError(
                f"latents of {h} x {w} patches given, the model has positions for {self.grid} x {self.grid} at most: "
                "scale the picture down or cut it"
            )
        return h, w

    def embed(self, latents: Tensor, h: int, w: int) -> Tensor:
        """(B, h * w, D); a smaller grid takes the upper left part of the table ("absolute" scaling)."""
        if self.position_type == "sincos":
            table = self.pos_embed[0, :, :h, :w]
        else:
            table = self.pos_embed[0, 0, :, :h, None] + self.pos_embed[1, 0, :, None, :w]
        weight = self.patch_embed.weight
        return self.patch_embed(patchify(latents, self.patch).to(weight.dtype)) + table.flatten(1).t()

    def run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


class FlexTokEncoder(PatchGrid):
    """Latents (B, C, H, W) to registers (B, n, L), before quantization."""

    def __init__(
        self,
        depth: int,
        dim: int,
        head_dim: int,
        mlp_ratio: float,
        registers: int,
        code_dim: int,
        channels: int,
        patch: int,
        grid: int,
        position_type: str,
    ) -> None:
        super().__init__(dim, channels, patch, grid, position_type)
        self.registers = nn.Parameter(torch.empty(registers, dim))
        self.blocks = nn.ModuleList(EncoderBlock(dim, head_dim, mlp_width(dim, mlp_ratio)) for _ in range(depth))
        self.to_latents = nn.Linear(dim, code_dim)
        nn.init.trunc_normal_(self.registers, std=0.02)

    def forward(self, latents: Tensor, count: int) -> Tensor:
        """The first `count` registers: patches see patches, a register sees all patches and registers up to itself."""
        h, w = self.shape(latents)
        patches = h * w
        x = self.embed(latents, h, w)
        x = torch.cat([x, self.registers[:count].to(x.dtype).expand(len(x), -1, -1)], dim=1)
        mask = torch.ones(count, patches + count, dtype=torch.bool, device=x.device).tril(patches)
        for block in self.blocks:
            x = self.run(block, x, mask, patches)
        return self.to_latents(normed(x[:, patches:]))


class FlexTokDecoder(PatchGrid):
    """Velocity of noised latents under registers."""

    def __init__(
        self,
        depth: int,
        dim: int,
        head_dim: int,
        mlp_ratio: float,
        registers: int,
        code_dim: int,
        channels: int,
        patch: int,
        grid: int,
        position_type: str,
        freq_dim: int,
        max_timestep: float,
    ) -> None:
        super().__init__(dim, channels, patch, grid, position_type)
        self.freq_dim, self.max_timestep = freq_dim, max_timestep
        self.from_latents = nn.Linear(code_dim, dim)
        self.register_pos_embed = nn.Parameter(torch.empty(1, 1, dim, registers))
        self.mask_token, self.null_token = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.time_embed = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(DecoderBlock(dim, head_dim, mlp_width(dim, mlp_ratio)) for _ in range(depth))
        self.head_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch * patch * channels)
        for tokens in (self.register_pos_embed, self.mask_token, self.null_token):
            nn.init.trunc_normal_(tokens, std=0.02)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, n, L) as tokens (B, n, D), with their positions."""
        weight = self.from_latents.weight
        return self.from_latents(codes.to(weight.dtype)) + self.register_pos_embed[0, 0, :, : codes.shape[1]].t()

    def forward(
        self, x_t: Tensor, t: Tensor, tokens: Tensor, bias: Tensor | None, hidden_layer: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Args:
            x_t: (B, C, H, W). t: (B,) in [0, 1]. tokens: (B, n, D), the registers.
            bias: (B, n), added to every score of these keys.
            hidden_layer: give what leaves this block, 0-based, as well.

        Returns:
            Velocity (B, C, H, W) float32, and the tokens (B, P + n, D) after `hidden_layer`, patches first, or None.
        """
        h, w = self.shape(x_t)
        patches = h * w
        u = self.embed(x_t, h, w)
        x = torch.cat([u, tokens.to(u.dtype)], dim=1)
        waves = timestep_waves(t, self.freq_dim, self.max_timestep)
        temb = self.time_embed(waves.to(self.from_latents.weight.dtype))
        scores = None if bias is None else F.pad(bias, (patches, 0))[:, None, None]
        hidden = None
        for number, block in enumerate(self.blocks):
            x = self.run(block, x, temb, scores, patches)
            hidden = x if number == hidden_layer else hidden
        shift, scale = self.head_modulation(F.silu(temb))[:, None].chunk(2, dim=-1)
        out = self.head(torch.addcmul(shift, normed(x[:, :patches]), 1 + scale))
        return unpatchify(out.float(), self.patch, (h, w)), hidden
