"""LookupViT for video: lookup tokens from tubelets, a compressed grid in space and time, the same blocks.

The paper (arXiv 2407.12753) reports Kinetics-400 and Something-Something v2; how its video model is built is not
verified. The host here attends jointly over space and time, as ViViT's first model (Arnab et al., ICCV 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError
from tokred.vision.backbones.lookup_block import check_compresses, check_grid, lookup_blocks, lookup_blocks_macs

__all__ = ["LookupViViT", "VideoLookupEmbed", "resize_video_tokens"]


def resize_video_tokens(tokens: Tensor, grid: Sequence[int], new_grid: Sequence[int], antialias: bool = True) -> Tensor:
    """Tokens of a grid (t, h, w) on another one, trilinear: (B, t h w, D) to (B, t' h' w', D), in float32 at least.

    Space and time one after the other, which is trilinear; an axis of equal length is not touched.
    """
    if tuple(grid) == tuple(new_grid):
        return tokens
    wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    time, height, width = new_grid
    frames = wide.unflatten(1, tuple(grid)).permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B t, D, h, w)
    frames = F.interpolate(frames, (height, width), mode="bilinear", align_corners=False, antialias=antialias)
    columns = frames.unflatten(0, (-1, grid[0])).transpose(1, 2).flatten(3)  # (B, D, t, h' w')
    sizes = (time, height * width)
    columns = F.interpolate(columns, sizes, mode="bilinear", align_corners=False, antialias=antialias)
    return columns.flatten(2).transpose(1, 2).to(tokens.dtype)


class VideoLookupEmbed(nn.Module):
    """Lookup tokens of a video, and the compressed tokens made from them.

    Args:
        video_size: (T, H, W) in frames and pixels. tubelet: (frames, rows, columns) of one token.
        in_chans, embed_dim: channels of the video and of the tokens.
        antialias: of the resize.

    Raises:
        InvalidParameterError: the tubelets do not divide the video.
    """

    def __init__(
        self,
        video_size: tuple[int, int, int] = (16, 224, 224),
        tubelet: tuple[int, int, int] = (2, 16, 16),
        in_chans: int = 3,
        embed_dim: int = 768,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.video_size, self.tubelet = check_grid("video_size", video_size, 3), check_grid("tubelet", tubelet, 3)
        if any(size % side for size, side in zip(self.video_size, self.tubelet, strict=True)):
            raise InvalidParameterError(f"video_size={video_size!r}: tubelets of {tubelet} do not divide it")
        self.grid = tuple(size // side for size, side in zip(self.video_size, self.tubelet, strict=True))
        self.antialias = antialias
        self.proj = nn.Conv3d(in_chans, embed_dim, self.tubelet, self.tubelet)  # type: ignore[arg-type]
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, video: Tensor) -> Tensor:
        """z_l (B, t h w, D) of a video (B, C, T, H, W)."""
        if video.ndim != 5 or tuple(video.shape[2:]) != self.video_size:
            raise InvalidParameterError(f"input of shape {tuple(video.shape)}: expected (B, C, *{self.video_size})")
        return self.proj(video).flatten(2).transpose(1, 2) + self.pos_embed

    def compress(self, zl: Tensor, grid: Sequence[int]) -> Tensor:
        """The compressed grid (B, t' h' w', D) of z_l."""
        return resize_video_tokens(zl, self.grid, grid, self.antialias)


class LookupViViT(nn.Module):
    """A joint space-time vision transformer on two streams of tokens: videos (B, C, T, H, W) to (B, num_classes).

    Args:
        video_size, tubelet, in_chans, antialias: see `VideoLookupEmbed`.
        compressed_grid: (t', h', w'); None is (t, 5, 5), the temporal length of the lookup grid, with 5 at most its
            other sides.
        embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: of timm's blocks.
        global_pool: "token" reads the class token, "avg" the mean compressed token (then without a class token).
        final_infusion: whether the last block refreshes the lookup tokens, which the head does not read.
        block: options of `LookupBlock`.

    Raises:
        InvalidParameterError: sizes that do not divide, or another option outside its range.
    """

    def __init__(
        self,
        video_size: tuple[int, int, int] = (16, 224, 224),
        tubelet: tuple[int, int, int] = (2, 16, 16),
        in_chans: int = 3,
        num_classes: int = 400,
        compressed_grid: tuple[int, int, int] | None = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        final_infusion: bool = False,
        antialias: bool = True,
        **block: Any,
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, ("token", "avg"))
        check_count("depth", depth, 1)
        if embed_dim % check_count("num_heads", num_heads, 1):
            raise InvalidParameterError(f"num_heads={num_heads}: expected a divisor of embed_dim={embed_dim}")
        self.num_classes, self.num_features, self.global_pool = num_classes, embed_dim, global_pool
        self.num_prefix_tokens = int(global_pool == "token")
        self.grad_checkpointing = False
        self.embed = VideoLookupEmbed(video_size, tubelet, in_chans, embed_dim, antialias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if self.num_prefix_tokens else None
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        norm = nn.LayerNorm(embed_dim, eps=1e-6)
        hosts = [Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates]
        new_blocks = lookup_blocks(hosts, final_infusion, prefix=self.num_prefix_tokens, **block)
        for new in new_blocks:
            del new.__dict__["host"]
        self.blocks = nn.ModuleList(new_blocks)
        self.norm = norm
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.blocks.apply(init_weights_vit_timm)
        self.head.apply(init_weights_vit_timm)
        time, height, width = self.embed.grid
        self.set_compressed_grid((time, min(5, height), min(5, width)) if compressed_grid is None else compressed_grid)

    def set_compressed_grid(self, grid: tuple[int, int, int]) -> None:
        """Choose the compressed grid (t', h', w'); no parameter changes.

        Raises:
            InvalidParameterError: a side is no integer >= 1, or the grid has more tokens than the lookup grid.
        """
        small = check_grid("compressed_grid", grid, 3)
        check_compresses("compressed_grid", small, math.prod(self.embed.grid))
        self.compressed_grid = small

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, or not."""
        self.grad_checkpointing = enable

    def forward_features(self, video: Tensor) -> Tensor:
        """Compressed tokens behind the last norm, (B, P + t' h' w', D)."""
        zl = self.embed(video)
        zp = self.embed.compress(zl, self.compressed_grid)
        if self.cls_token is not None:
            zp = torch.cat([self.cls_token.expand(len(zp), -1, -1), zp], dim=1)
        for block in self.blocks:
            zp, zl = checkpoint(block, zp, zl) if self.grad_checkpointing else block(zp, zl)
        return self.norm(zp)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes), or what the classifier reads, of the compressed tokens."""
        x = x[:, 0] if self.global_pool == "token" else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, video: Tensor) -> Tensor:
        """Logits (B, num_classes) of videos (B, C, T, H, W)."""
        return self.forward_head(self.forward_features(video))

    def macs(self) -> int:
        """Multiply-adds of one video at the present grid, exact."""
        lookup, compressed = math.prod(self.embed.grid), self.num_prefix_tokens + math.prod(self.compressed_grid)
        ends = lookup * self.embed.proj.weight.numel() + self.num_features * self.num_classes
        return ends + lookup_blocks_macs(self.blocks, lookup, compressed)
