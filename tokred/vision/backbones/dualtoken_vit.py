"""DualToken-ViT (tokred reconstruction): image tokens and a 7 x 7 grid of position-aware global tokens (Chu et al., SDM
2024, arXiv 2309.12424).

No code and no weights were released. This file follows the text of the paper; stem, patch merging and bi-dimensional
attention follow LightViT, whose modules the paper says it reuses. What the paper leaves open is a field of `Switches`,
each with its reason, and the sizes of the variants are a reconstruction too: no accuracy of the paper is claimed for
these models.

Importing this module registers `dualtoken_vit_tiny`, `dualtoken_vit_small` and `dualtoken_vit_small_mlp` with timm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, model_entrypoint, register_model
from torch import Tensor, nn

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError, UnknownParameterError, nearest
from tokred.vision.backbones.dualtoken_block import (
    HALVINGS,
    DualTokenBlock,
    DualTokenStage,
    Merge,
    Stem,
    Switches,
    check_number,
    check_pair,
    check_stages,
)

__all__ = ["DualTokenViT", "Switches"]

# -- the model -------------------------------------------------------------------------------------------------------


class DualTokenViT(nn.Module):
    """DualToken-ViT (tokred reconstruction) with timm's surface: three stages at strides 8, 16 and 32.

    Images (B, in_chans, H, W) of any size >= 1 go in; sizes may differ from call to call. `forward` returns
    (B, num_classes), `forward_features` (B, C3, ceil(H/32), ceil(W/32)).

    Args:
        img_size: int or (H, W), for callers that always give one; no parameter depends on it.
        in_chans: channels of the images.
        num_classes: width of the classifier; 0 is none.
        global_pool: "avg", or "" for the unpooled map.
        embed_dims: channels a stage, multiples of `num_heads`; the first is even, none below 4.
        depths: blocks a stage.
        num_heads: heads a stage, of aggregation and broadcast.
        mlp_ratios: hidden width of the FFN over the channels, a stage.
        neck_dim: width of a neck (linear, LayerNorm, GELU on every token) before pooling; 0 is none. LightViT has one
            of 1280; without it the size is nearer to the paper's.
        head_tokens: the head pools the "image" tokens, or "all": then `forward_features` returns normalised tokens
            (B, HW + T, C3), image tokens first.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        device, dtype: of the parameters.
        **switches: fields of `Switches`, for example `alpha="learned"`, `g_mlp="mlp"`, `global_tokens=(7, 7)`.

    Raises:
        InvalidParameterError: a value outside its range, or channels that the heads do not divide.
        UnknownParameterError: a name that neither this class nor `Switches` has.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 6, 6),
        num_heads: Sequence[int] = (2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 4, 4),
        neck_dim: int = 0,
        head_tokens: Literal["image", "all"] = "image",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: Any = None,
        dtype: Any = None,
        **switches: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.switches = make_switches(switches)
        check_pair("img_size", (img_size, img_size) if isinstance(img_size, int) else img_size)
        dims = check_stages("embed_dims", embed_dims, lambda field, value: check_count(field, value, 4))
        depths = check_stages("depths", depths, lambda field, value: check_count(field, value, 1))
        heads = check_stages("num_heads", num_heads, lambda field, value: check_count(field, value, 1))
        ratios = check_stages("mlp_ratios", mlp_ratios, lambda field, value: check_number(field, value, above=0.0))
        for dim, count in zip(dims, heads, strict=True):
            if dim % count:
                raise InvalidParameterError(f"num_heads={count} does not divide embed_dims={dim}: give a divisor")
        if dims[0] % 2:
            raise InvalidParameterError(f"embed_dims={dims!r}: the stem is half as wide as stage 1, which must be even")
        check_choice("global_pool", global_pool, ("avg", ""))
        check_choice("head_tokens", head_tokens, ("image", "all"))
        self.in_chans = check_count("in_chans", in_chans, 1)
        self.num_classes = check_count("num_classes", num_classes)
        self.global_pool = global_pool
        self.head_tokens = head_tokens
        self.drop_rate = check_number("drop_rate", drop_rate, 0.0, 1.0)
        self.num_features = dims[-1]
        self.head_hidden_size = check_count("neck_dim", neck_dim) or dims[-1]
        self.dims = dims
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": 8 << stage, "module": f"stages.{stage}"} for stage, dim in enumerate(dims)
        ]

        self.patch_embed = Stem(self.in_chans, dims[0], **dd)
        tokens = math.prod(self.switches.global_tokens)
        self.global_token = nn.Parameter(torch.zeros(1, tokens, dims[0], **dd)) if self.switches.reads_tokens else None
        most = check_number("drop_path_rate", drop_path_rate, 0.0, 1.0)
        rates = iter(torch.linspace(0, most, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for stage, (dim, halvings) in enumerate(zip(dims, HALVINGS, strict=True)):
            blocks = [
                DualTokenBlock(dim, heads[stage], ratios[stage], halvings, self.switches, next(rates), **dd)
                for _ in range(depths[stage])
            ]
            merge = Merge(dims[stage - 1], dim, self.switches.reads_tokens, **dd) if stage else None
            self.stages.append(DualTokenStage(merge, blocks))
        self.norm: nn.Module = LayerNorm(dims[-1], eps=1e-6, **dd)
        self.neck: nn.Module = nn.Identity()
        if neck_dim:
            self.neck = nn.Sequential(
                nn.Linear(dims[-1], neck_dim, **dd), LayerNorm(neck_dim, eps=1e-5, **dd), nn.GELU()
            )
        self.head_drop = nn.Dropout(self.drop_rate)
        self.head = classifier(self.head_hidden_size, self.num_classes, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal of width 0.02 for weights and global tokens, 0 for biases (LightViT's; ours for convolutions)."""
        self.apply(init_module)
        if self.global_token is not None:
            trunc_normal_(self.global_token, std=0.02)

    # -- timm's surface ----------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters to leave without weight decay, beside those of one dimension."""
        return {"global_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates: stem, then stages (coarse) or blocks."""
        if coarse:
            blocks: Any = r"^stages\.(\d+)"
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {
            "stem": r"^patch_embed|^global_token",
            "blocks": [*blocks, (r"^norm", (99999,))] if not coarse else blocks,
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of every block again in the backward pass instead of storing them."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer; an Identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier of `num_classes` (0 is none), and another pooling ("avg", "")."""
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        self.num_classes = check_count("num_classes", num_classes)
        like = self.patch_embed.proj.weight
        self.head = classifier(self.head_hidden_size, self.num_classes, device=like.device, dtype=like.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the image tokens behind the stages.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to return: all (None), the last n (int), or a sequence, negative from the end.
            norm: apply the final norm to the map of the last stage.
            stop_early: leave out the stages behind the last one asked for; then the features are its map, unnormalised.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: return the list alone.

        Returns:
            A list of (B, C, H, W) or (B, H, W, C); or the features, as of `forward_features`, and that list.

        Raises:
            InvalidParameterError: a stage that the model has not, or an unknown format.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        wanted = self._take(indices)
        stages = self.stages[: max(wanted) + 1] if stop_early else self.stages
        intermediates: list[Tensor] = []
        x, g = self._embed(x)
        for index, stage in enumerate(stages):
            x, g = stage(x, g)
            if index in wanted:
                taken = self.norm(x) if norm and index == len(self.dims) - 1 else x
                intermediates.append(taken.permute(0, 3, 1, 2) if output_fmt == "NCHW" else taken)
        if intermediates_only:
            return intermediates
        features = self._features(x, g) if len(stages) == len(self.stages) else x.permute(0, 3, 1, 2)
        return features, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off what the intermediates named by `indices` do not need; returns those indices, from the front."""
        wanted = self._take(indices)
        shorter = max(wanted) < len(self.stages) - 1
        self.stages = self.stages[: max(wanted) + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.neck = nn.Identity()
            self.num_features = self.head_hidden_size = self.dims[max(wanted)]
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the normalised map (B, C3, ceil(H/32), ceil(W/32)), not pooled."""
        x, g = self._embed(x)
        for stage in self.stages:
            x, g = stage(x, g)
        return self._features(x, g)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to (B, num_classes); `pre_logits` stops before the classifier; unpooled features keep their shape
        but for the channels."""
        is_map = self.head_tokens == "image"
        x = self.neck(x.permute(0, 2, 3, 1) if is_map else x)
        if self.global_pool:
            x = x.mean(dim=(1, 2) if is_map else 1)
        x = self.head_drop(x)
        x = x if pre_logits else self.head(x)
        return x.permute(0, 3, 1, 2) if is_map and not self.global_pool else x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # -- parts -------------------------------------------------------------------------------------------------------

    def _take(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        """Stages named by timm's `indices`, counted from the front."""
        count = len(self.stages)
        if indices is None or (isinstance(indices, int) and 1 <= indices <= count):
            return list(range(count - (indices or count), count))
        if isinstance(indices, int) or not indices or not all(-count <= index < count for index in indices):
            raise InvalidParameterError(
                f"indices={indices!r}: expected the last 1 to {count} stages, or some of 0 to {count - 1} (or negative)"
            )
        return [index % count for index in indices]

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patch_embed(x)
        return x, None if self.global_token is None else self.global_token.expand(x.shape[0], -1, -1)

    def _features(self, x: Tensor, g: Tensor | None) -> Tensor:
        if self.head_tokens == "all" and g is not None:
            return self.norm(torch.cat([x.flatten(1, 2), g], dim=1))
        return self.norm(x).permute(0, 3, 1, 2)


def make_switches(given: dict[str, Any]) -> Switches:
    """`Switches` from keywords; an unknown one is named with its nearest neighbour."""
    known = [field.name for field in fields(Switches)]
    for name in given:
        if name not in known:
            raise UnknownParameterError(
                f"DualTokenViT has no parameter {name!r}{nearest(name, known)}; its switches are {', '.join(known)}"
            )
    return Switches(**given)


def classifier(width: int, num_classes: int, device: Any = None, dtype: Any = None) -> nn.Module:
    """A linear layer, or an Identity for no classes."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(width, num_classes, device=device, dtype=dtype)
    init_module(head)
    return head


def init_module(module: nn.Module) -> None:
    """Initial weights of one layer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# -- registration ----------------------------------------------------------------------------------------------------


def _cfg(**overrides: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.stem.0",
        "classifier": "head",
        "license": "apache-2.0",
        "description": "tokred reconstruction of DualToken-ViT; the authors released neither code nor weights",
        "paper_name": "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
        "paper_ids": "arXiv:2309.12424",
        **overrides,
    }


default_cfgs = generate_default_cfgs(
    {f"dualtoken_vit_{variant}.untrained": _cfg() for variant in ("tiny", "small", "small_mlp")}
)


def _register(entrypoint: Callable[..., DualTokenViT]) -> Callable[..., DualTokenViT]:
    """timm's `register_model`, without its warning where this module registered the name before (a reload)."""
    name = entrypoint.__name__
    again = is_model(name) and model_entrypoint(name).__module__ == __name__
    with warnings.catch_warnings():
        if again:
            warnings.filterwarnings("ignore", message=f"Overwriting {name} ")
        return register_model(entrypoint)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DualTokenViT:
    feature_cfg = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    return build_model_with_cfg(DualTokenViT, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@_register
def dualtoken_vit_tiny(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-T (mix), tokred reconstruction: 6.2M parameters, 0.53 GMACs at 224 x 224."""
    return _create("dualtoken_vit_tiny", pretrained, **{"depths": (1, 3, 3), **kwargs})


@_register
def dualtoken_vit_small(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-S (mix), tokred reconstruction: 11.8M parameters, 1.01 GMACs at 224 x 224."""
    return _create("dualtoken_vit_small", pretrained, **{"depths": (2, 6, 6), **kwargs})


@_register
def dualtoken_vit_small_mlp(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-S with a channel MLP on the global tokens, tokred reconstruction: 12.3M parameters, 1.03 GMACs."""
    return _create("dualtoken_vit_small_mlp", pretrained, **{"depths": (2, 6, 6), "g_mlp": "mlp", **kwargs})
