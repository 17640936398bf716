"""LookupViT models for timm: `lookup_vit_{tiny,small,base,large}`, registered on import, and grids chosen at run time.

The blocks, and what is known of the paper, are in `lookup_block.py`; timm's own models become LookupViTs by
`lookup_convert.py`. No trained weights exist.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError
from tokred.vision.backbones.lookup_block import (
    RESIZE,
    check_compresses,
    check_grid,
    lookup_blocks,
    lookup_blocks_macs,
    resize_tokens,
)

__all__ = ["LookupForward", "LookupViT", "MultiResSampler", "lookup_vit_macs"]

POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")


class LookupForward:
    """What a timm `VisionTransformer` does differently once its blocks are `LookupBlock`s.

    Mixed in before a `VisionTransformer` class, whose embedding, norms, pooling and head stay as they are.

    Attributes:
        compressed_grid: (h_p, w_p); change it with `set_compressed_grid`.
        compressed_init, antialias: how the grid is made of the lookup tokens: see `resize_tokens`.
        compressed_pos_embed: (1, M0, D), a table of its own for the compressed grid `compressed_pos_grid`;
            absent where positions are resized.
        pool_lookup: whether the mean lookup token is added to what is pooled.
    """

    compressed_grid: tuple[int, int]
    compressed_init: str = "bilinear"
    antialias: bool = True
    compressed_pos_embed: Any
    compressed_pos_grid: tuple[int, int]
    pool_lookup: bool = False
    blocks: Any
    patch_embed: Any
    norm: Any
    norm_pre: Any
    patch_drop: Any
    pos_drop: Any
    global_pool: str
    num_prefix_tokens: int
    grad_checkpointing: bool
    _pos_embed: Any
    forward_head: Any
    attn_pool: Any
    head: Any

    def set_compressed_grid(self, grid: int | tuple[int, int], allow_larger: bool = False) -> None:
        """Choose the compressed grid, (h, w) or m for (m, m); no parameter changes. A compiled model compiles again.

        Args:
            allow_larger: take a grid of more tokens than the lookup grid has, which costs more than the plain ViT.

        Raises:
            InvalidParameterError: a side is no integer >= 1, or the grid has more tokens than the lookup grid.
        """
        height, width = check_grid("compressed_grid", grid)
        if not allow_larger:
            check_compresses("compressed_grid", (height, width), self.patch_embed.num_patches)
        self.compressed_grid = (height, width)

    def init_new_weights(self, init: str = "zero") -> None:
        """Start what a plain ViT checkpoint does not hold, in every block: see `LookupBlock.init_new_weights`."""
        for block in self.blocks:
            block.init_new_weights(init)
        if self._table() is not None:
            with torch.no_grad():
                nn.init.zeros_(self.compressed_pos_embed)

    def _table(self) -> Any:
        return getattr(self, "compressed_pos_embed", None)

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lookup_mask: Tensor | None = None,
    ) -> Tensor:
        """Compressed tokens behind the last norm, (B, P + M, D), of images (B, C, H, W).

        `lookup_mask`: (B, N) or (B, h, w), True for lookup tokens that exist; the others have no influence.

        Raises:
            InvalidParameterError: an image size that the patching cannot take; a mask of another shape; attn_mask or
                is_causal, which have no meaning for two streams.
        """
        zp, zl, mask, _ = self._two_streams(x, attn_mask, is_causal, lookup_mask)
        for block in self.blocks:
            zp, zl = self._run_block(block, zp, zl, mask)
        return self._finish(zp, zl, mask)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lookup_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W); arguments and errors as in `forward_features`."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal, lookup_mask))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lookup_mask: Tensor | None = None,
        stream: str = "lookup",
    ) -> Any:
        """What leaves the chosen blocks, and the final features, as timm's method of this name.

        Maps are (B, D, h, w) of the lookup grid, or with stream="compressed" of the compressed one; "NLC" gives tokens
        (B, N, D). Prefix tokens are those of the compressed stream. A last block without infusion leaves the lookup
        map of the block before it: build with final_infusion=True where that map is wanted.

        Raises:
            InvalidParameterError: another stream or format; as in `forward_features`.
        """
        check_choice("stream", stream, ("lookup", "compressed"))
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        zp, zl, mask, grid = self._two_streams(x, attn_mask, is_causal, lookup_mask)
        maps, prefixes, prefix = [], [], self.num_prefix_tokens
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            zp, zl = self._run_block(block, zp, zl, mask)
            if i in take:
                y = self.norm(zp) if norm else zp
                prefixes.append(y[:, :prefix])
                lookup = stream == "lookup"
                y = (self.norm(zl) if norm else zl) if lookup else y[:, prefix:]
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).unflatten(2, grid if lookup else self.compressed_grid).contiguous()
                maps.append(y)
        with_prefix = return_prefix_tokens and prefix > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self._finish(zp, zl, mask)
            return result
        found = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
        return found if intermediates_only else (self._finish(zp, zl, mask), found)

    def _two_streams(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, lookup_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
        """z_p, z_l, the mask (B, N) of z_l, and the lookup grid; also where patch dropout leaves no grid of z_l."""
        if attn_mask is not None or is_causal:
            raise InvalidParameterError(
                "attn_mask and is_causal have no meaning for two streams of tokens; lookup_mask hides lookup tokens"
            )
        grid = self._lookup_grid(x)
        mask = _check_mask(lookup_mask, x.shape[0], grid)
        embedded = self.patch_embed(x)
        tokens = self.norm_pre(self._pos_embed(embedded))
        prefix, zl = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        small = self.compressed_grid
        positions = self._table()
        if positions is None:
            cells = resize_tokens(zl, grid, small, self.compressed_init, self.antialias, mask)
        else:
            content = embedded.flatten(1, -2)
            cells = resize_tokens(content, grid, small, self.compressed_init, self.antialias, mask)
            table = resample_abs_pos_embed(positions, list(small), list(self.compressed_pos_grid), 0)
            cells = self.norm_pre(self.pos_drop(cells + table))
        if mask is not None:  # the mask goes through patch dropout as one more channel
            tokens = torch.cat([tokens, nn.functional.pad(mask, (prefix.shape[1], 0))[..., None].to(tokens.dtype)], -1)
        kept = self.patch_drop(tokens)[:, self.num_prefix_tokens :]
        zl = kept if mask is None else kept[..., :-1]
        return torch.cat([prefix, cells], dim=1), zl, None if mask is None else kept[..., -1] > 0, grid

    def _lookup_grid(self, x: Tensor) -> tuple[int, int]:
        if x.ndim != 4:
            raise InvalidParameterError(f"input of shape {tuple(x.shape)}: expected images (B, C, H, W)")
        embed, height, width = self.patch_embed, x.shape[-2], x.shape[-1]
        if getattr(embed, "strict_img_size", True):
            if embed.img_size is not None and (height, width) != tuple(embed.img_size):
                raise InvalidParameterError(
                    f"images of {height} x {width}: this model takes {embed.img_size[0]} x {embed.img_size[1]}; build "
                    "it with another img_size, call set_input_size, or build it with dynamic_img_size=True"
                )
        elif not getattr(embed, "dynamic_img_pad", False):
            patch = embed.feat_ratio(as_scalar=False)
            if height % patch[0] or width % patch[1]:
                raise InvalidParameterError(
                    f"images of {height} x {width}: patches of {patch[0]} x {patch[1]} do not divide them; resize or "
                    "pad the images, or build the model with dynamic_img_pad=True"
                )
        rows, columns = embed.dynamic_feat_size((height, width))
        return rows, columns

    def _run_block(self, block: nn.Module, zp: Tensor, zl: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, zp, zl, mask)
        return block(zp, zl, mask)

    def _finish(self, zp: Tensor, zl: Tensor, mask: Tensor | None) -> Tensor:
        """The last norm; with `pool_lookup` the mean lookup token is added to all, and so to whatever they pool to."""
        y = self.norm(zp)
        if not self.pool_lookup or not self.global_pool:
            return y
        lookup = self.norm(zl)
        if mask is None:
            return y + lookup.mean(dim=1, keepdim=True)
        count = mask.sum(dim=1).clamp(min=1)[:, None, None]
        return y + lookup.masked_fill(~mask[..., None], 0).sum(dim=1, keepdim=True) / count.to(y.dtype)


def _check_mask(mask: Tensor | None, batch: int, grid: tuple[int, int]) -> Tensor | None:
    if mask is None:
        return None
    shapes = [(batch, grid[0] * grid[1]), (batch, *grid)]
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        raise InvalidParameterError(
            f"lookup_mask of shape {tuple(mask.shape)} and {mask.dtype}: expected booleans, True for lookup tokens "
            f"that exist, of shape {shapes[0]} or {shapes[1]}"
        )
    return mask.flatten(1)


class LookupViT(LookupForward, VisionTransformer):
    """A vision transformer on two streams of tokens (Koner et al., ECCV 2024, arXiv 2407.12753).

    Input (B, in_chans, H, W), output (B, num_classes). Weights of a timm `VisionTransformer` load by name (then
    `load_state_dict(..., strict=False)` and `init_new_weights`).

    Args:
        img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio: of the host; `vit` takes whatever else timm's
            `VisionTransformer` does (num_classes, in_chans, reg_tokens, init_values, drop_path_rate, ...).
        compressed_grid: (h_p, w_p), or m for (m, m); None is (5, 5), on smaller lookup grids their own sides.
        lookup_mlp_div: q, the hidden width of the lookup MLP being int(D / q).
        reuse, infuse_prefix, query_scale: see `LookupBlock`. qk_norm: of the gathering; attn_qk_norm: of the
            host's attention.
        init, antialias: how the compressed grid starts from the lookup tokens: see `resize_tokens`.
        compressed_pos: "resize" gives it the lookup tokens' positions, resized with them; "learned" a table of its
            own for the grid given here, resized when the grid changes (both unverified).
        final_infusion: the last block refreshes the lookup tokens, too; a classifier does not read them, and its
            parameters for it would get no gradient. timm's features_only sets it.
        pool_lookup: the mean lookup token, behind the same norm, is added to the pooled compressed tokens.
        global_pool: as in timm; "token" reads the class token, "avg" the M grid tokens.

    Raises:
        InvalidParameterError: heads that do not divide the channels, an image size that the patches do not divide (but
            see timm's dynamic_img_pad), or another option outside its range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        compressed_grid: int | tuple[int, int] | None = None,
        lookup_mlp_div: float = 2.0,
        reuse: str = "transpose",
        init: str = "bilinear",
        antialias: bool = True,
        compressed_pos: str = "resize",
        qk_norm: bool = False,
        query_scale: str = "fixed",
        infuse_prefix: bool = True,
        final_infusion: bool = False,
        pool_lookup: bool = False,
        attn_qk_norm: bool = False,
        global_pool: str = "token",
        weight_init: str = "",
        **vit: Any,
    ) -> None:
        check_choice("global_pool", global_pool, POOLS)
        check_choice("init", init, RESIZE)
        check_choice("compressed_pos", compressed_pos, ("resize", "learned"))
        _check_sizes(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, vit.get("dynamic_img_pad", False))
        if compressed_grid is None:
            sides = zip(check_grid("img_size", img_size), check_grid("patch_size", patch_size), strict=True)
            compressed_grid = tuple(min(5, side // patch) for side, patch in sides)  # type: ignore[assignment]
        small = check_grid("compressed_grid", compressed_grid)
        if global_pool == "token" and not vit.get("class_token", True):
            raise InvalidParameterError("global_pool='token' without a class token: expected global_pool='avg'")
        if pool_lookup and global_pool not in ("token", "avg", "avgmax", "max"):
            raise InvalidParameterError(
                f"pool_lookup with global_pool={global_pool!r}: expected 'token', 'avg', 'avgmax' or 'max'"
            )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qk_norm=attn_qk_norm,
            global_pool=global_pool,
            weight_init="skip",
            **vit,
        )
        new_blocks = lookup_blocks(
            self.blocks,
            final_infusion,
            lookup_mlp_div=lookup_mlp_div,
            reuse=reuse,
            infuse_prefix=infuse_prefix,
            prefix=self.num_prefix_tokens,
            qk_norm=qk_norm,
            query_scale=query_scale,
            attn_drop=vit.get("attn_drop_rate", 0.0),
            proj_drop=vit.get("proj_drop_rate", 0.0),
        )
        for block in new_blocks:
            del block.__dict__["host"]  # of no use here: there is no model to go back to
        self.blocks = nn.Sequential(*new_blocks)
        self.compressed_init, self.antialias, self.pool_lookup = init, antialias, pool_lookup
        if compressed_pos == "learned":
            like = self.patch_embed.proj.weight
            self.compressed_pos_grid = (small[0], small[1])
            table = torch.empty(1, small[0] * small[1], embed_dim, device=like.device, dtype=like.dtype)
            self.compressed_pos_embed = nn.Parameter(table)
        self.set_compressed_grid((small[0], small[1]))
        if weight_init != "skip":
            self.weight_init_mode = weight_init
            self.init_weights(weight_init)
        else:
            self.weight_init_mode = "reset"

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation of everything, the new modules included."""
        super().init_weights(mode, *([] if needs_reset else [False]))  # timm up to 1.0.21 takes the mode alone
        if self._table() is not None:
            trunc_normal_(self.compressed_pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        own = {"compressed_pos_embed"} if self._table() is not None else set()
        return super().no_weight_decay() | own


def _check_sizes(
    img_size: int | tuple[int, int],
    patch_size: int | tuple[int, int],
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    padded: bool,
) -> None:
    check_count("depth", depth, 1)
    check_count("num_heads", num_heads, 1)
    if check_count("embed_dim", embed_dim, 1) % num_heads:
        raise InvalidParameterError(f"num_heads={num_heads}: expected a divisor of embed_dim={embed_dim}")
    if int(embed_dim * mlp_ratio) < 1:
        raise InvalidParameterError(f"mlp_ratio={mlp_ratio!r}: expected a number > 0")
    image, patch = check_grid("img_size", img_size), check_grid("patch_size", patch_size)
    if not padded and (image[0] % patch[0] or image[1] % patch[1]):
        raise InvalidParameterError(
            f"img_size={img_size!r}: patches of {patch[0]} x {patch[1]} do not divide it; choose multiples of them"
        )


# -- training at several grids ---------------------------------------------------------------------------------------


class MultiResSampler:
    """The compressed grid of each training step, drawn uniformly from `grids` for the whole batch.

    The draw depends on `seed` and the step alone, so every process of a distributed run draws the same grid. The
    paper's own schedule was not obtained; the default grids are unverified.

        sampler = MultiResSampler(seed=0)
        for step, (images, labels) in enumerate(loader):
            sampler.apply(model, step)
            loss = criterion(model(images), labels)

    Raises:
        InvalidParameterError: no grid at all, or one that is none.
    """

    def __init__(
        self, grids: Iterable[int | tuple[int, ...]] = ((3, 3), (5, 5), (7, 7), (10, 10)), seed: int = 0
    ) -> None:
        given = list(grids)
        if not given:
            raise InvalidParameterError("grids=(): expected at least one compressed grid")
        axes = {len(grid) for grid in given if not isinstance(grid, int)} or {2}
        self.grids = tuple(check_grid("grids", grid, min(axes)) for grid in given)
        self.seed = seed

    def __call__(self, step: int) -> tuple[int, ...]:
        """The grid of a step >= 0."""
        check_count("step", step)
        return random.Random(f"{self.seed}/{step}").choice(self.grids)

    def apply(self, model: Any, step: int) -> tuple[int, ...]:
        """Set the grid of a step on a model, wrapped (distributed, compiled, features_only) or not, and return it."""
        grid = self(step)
        while not hasattr(type(model), "set_compressed_grid"):
            inner = next((getattr(model, n) for n in ("module", "_orig_mod", "model") if hasattr(model, n)), None)
            if inner is None:
                raise InvalidParameterError(f"a {type(model).__name__} has no compressed grid: expected a LookupViT")
            model = inner
        model.set_compressed_grid(grid)
        return grid


def lookup_vit_macs(model: Any, img_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-adds of one image at the model's present grid, exact: patch embedding, blocks and linear head.

    `img_size`: the model's own if not given.

    Raises:
        InvalidParameterError: the model is no LookupViT, or has attention pooling or an unusual MLP or patch embedding.
    """
    if not isinstance(model, LookupForward):
        raise InvalidParameterError(f"a {type(model).__name__}: expected a LookupViT or a model made by to_lookup_vit")
    if model.attn_pool is not None or type(model.patch_embed) is not PatchEmbed:
        raise InvalidParameterError("multiply-adds are counted for plain patch embedding and without attention pooling")
    size = model.patch_embed.img_size if img_size is None else check_grid("img_size", img_size)
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(size))
    lookup, cells = rows * columns, model.compressed_grid[0] * model.compressed_grid[1]
    total = lookup * model.patch_embed.proj.weight.numel()
    total += lookup_blocks_macs(model.blocks, lookup, model.num_prefix_tokens + cells)
    return total + (model.head.weight.numel() if isinstance(model.head, nn.Linear) else 0)


# -- timm registry ---------------------------------------------------------------------------------------------------


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2407.12753",
        "paper_name": "LookupViT: Compressing visual information to a limited number of tokens",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"lookup_vit_{size}": _cfg() for size in ("tiny", "small", "base", "large")})


def _create(variant: str, pretrained: bool, sizes: dict[str, int], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("features_only"):
        kwargs.setdefault("final_infusion", True)  # or the last map would be that of the block before
    return build_model_with_cfg(
        LookupViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, **sizes, **kwargs},
    )


@register_model
def lookup_vit_tiny(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT on ViT-Ti/16: 192 channels, 12 blocks, 3 heads; 8.74 M parameters, 570 M multiply-adds at 5 x 5."""
    return _create("lookup_vit_tiny", pretrained, {"embed_dim": 192, "depth": 12, "num_heads": 3}, kwargs)


@register_model
def lookup_vit_small(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT on ViT-S/16: 384 channels, 12 blocks, 6 heads; 34.1 M parameters, 2.15 G multiply-adds at 5 x 5."""
    return _create("lookup_vit_small", pretrained, {"embed_dim": 384, "depth": 12, "num_heads": 6}, kwargs)


@register_model
def lookup_vit_base(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT on ViT-B/16: 768 channels, 12 blocks, 12 heads; 134 M parameters, 8.33 G multiply-adds at 5 x 5."""
    return _create("lookup_vit_base", pretrained, {"embed_dim": 768, "depth": 12, "num_heads": 12}, kwargs)


@register_model
def lookup_vit_large(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT on ViT-L/16: 1024 channels, 24 blocks, 16 heads; 478 M parameters, 29.7 G multiply-adds at 5 x 5."""
    return _create("lookup_vit_large", pretrained, {"embed_dim": 1024, "depth": 24, "num_heads": 16}, kwargs)
