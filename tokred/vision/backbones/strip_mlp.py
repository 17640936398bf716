"""Strip-MLP: an MLP backbone that mixes tokens along strips of rows and columns (arXiv 2307.11458), as timm models.

Importing this module registers ``strip_mlp_tiny_light``, ``strip_mlp_tiny``, ``strip_mlp_small`` and
``strip_mlp_base`` with timm. Names of modules are those of the released code, so its files load as they are; where the
paper and that code could differ, the code is followed. Maps have the shape NCHW throughout;
on the CPU they lie channels last in memory.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, trunc_normal_
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from tokred.core.errors import InvalidParameterError, MissingWeightsError

__all__ = [
    "StripMLP",
    "axis_windows",
    "checkpoint_filter_fn",
    "resize_state_dict",
]

README = "https://github.com/Med-Process/Strip_MLP#readme"
REDUCTION = 32  # of the last stage; each stage's side must be whole
POOLS = ("", "avg", "max", "avgmax")


def _channels_last(x: Tensor) -> bool:
    """Whether maps are kept channels last: on the CPU, where that is faster; elsewhere as they come."""
    return x.device.type == "cpu"


# -- token mixing ----------------------------------------------------------------------------------------------------


def strip_groups(channels: int, patch: int | str = "auto") -> tuple[int, int]:
    """How CGSMM splits its ``channels // 2`` channels: (groups G, channels Cg in each).

    ``patch="auto"`` is the released rule: 2 where `channels` is a multiple of 80, else 4.

    Raises:
        InvalidParameterError: the groups do not cover the channels exactly.
    """
    half = channels // 2
    if patch == "auto":
        patch = 2 if channels % 80 == 0 else 4
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
        raise InvalidParameterError(f"cgsmm_patch={patch!r}: expected 'auto' or a whole number of at least 1")
    size = int(channels * 0.5 / patch)
    if channels % 2 or size < 1 or half % size:
        raise InvalidParameterError(
            f"a stage of {channels} channels cannot be mixed with cgsmm_patch={patch}: its half, {half} channels, must "
            f"split evenly into groups of int({half} / {patch}) = {size}; choose another embed_dim or cgsmm_patch"
        )
    return half // size, size


class RelativePosition(nn.Module):
    """A learned value for each channel and each offset between two positions of a strip."""

    def __init__(self, channels: int, side: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.side = side
        self.embeddings_table = nn.Parameter(torch.empty(2 * side + 1, channels, device=device, dtype=dtype))
        trunc_normal_(self.embeddings_table, std=0.02)

    def forward(self) -> Tensor:
        """(channels, R, R): entry (i, j) is row ``j - i + R`` of the table; its first and last row are never read."""
        # Row i reads R neighbouring table rows, from R - i on: views of the table, and no index tensor to keep.
        rows = self.embeddings_table.unfold(0, self.side, 1)[1 : self.side + 1]  # (start, channels, j)
        if _channels_last(rows):  # as the maps that this is added to
            return rows.transpose(1, 2).flip(0).permute(2, 0, 1)
        return rows.flip(0).transpose(0, 1)


class StripMixing(nn.Module):
    """Half of the channels through strips (CGSMM), the other half through local convolutions (LSMM); (B, C, H, W).

    Weights of the strips have the side R = `side`. A map of another size needs ``windowed=True``: overlapping windows
    of that side, blended where they overlap, as the authors' detector does it (MLP-DINO).
    """

    def __init__(
        self,
        channels: int,
        side: int,
        cgsmm_patch: int | str = "auto",
        windowed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.side, self.windowed = side, windowed
        self.groups, self.group_size = strip_groups(channels, cgsmm_patch)
        half, strips = channels // 2, self.group_size * side
        strip = {"kernel_size": (1, 3), "padding": (0, 1), "groups": self.group_size, **at}
        self.BN = nn.BatchNorm2d(half, **at)
        self.proj_h = nn.Conv2d(strips, strips, **strip)
        self.proj_w = nn.Conv2d(strips, strips, **strip)
        self.fuse_h = nn.Conv2d(channels, half, 1, bias=False, **at)
        self.fuse_w = nn.Conv2d(channels, half, 1, bias=False, **at)
        self.mlp = nn.Sequential(nn.Conv2d(channels, channels, 1, **at), nn.BatchNorm2d(channels, **at), nn.GELU())
        self.fc_h = nn.Conv2d(half, half, (3, 7), padding=(1, 3), groups=half, bias=False, **at)
        self.fc_w = nn.Conv2d(half, half, (7, 3), padding=(3, 1), groups=half, bias=False, **at)
        self.reweight = Mlp(half, half // 2, 3 * half, use_conv=True).to(**at)  # timm up to 1.0.20 takes no device
        self.fuse = nn.Conv2d(channels, channels, 1, bias=False, **at)
        self.relate_pos_h = RelativePosition(half, side, **at)
        self.relate_pos_w = RelativePosition(half, side, **at)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_proh_w(state_dict, f"{prefix}proh_w.")  # the detector's spelling; files of both exist
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.mlp(x).chunk(2, dim=1)
        return self.fuse(torch.cat([self.cascade(x1), self.local(x2)], dim=1))

    def cascade(self, x: Tensor) -> Tensor:
        """CGSMM on (B, C/2, H, W): rows, then columns."""
        strips = self.windows(x) if self.windowed else self.strips(x)
        return self.fuse_w(torch.cat([x, strips], dim=1))

    def strips(self, x: Tensor) -> Tensor:
        """Both strip steps on a map (B, C/2, R, R), up to the column projection."""
        sides = (self.group_size, self.side)
        # Channel p * Cg + c holds weights of c alone. Input channels of the convolution are (c, position in the
        # strip); its rows are the groups p, and its columns the neighbouring strips, three of which are mixed.
        v = self.laid_out(self.grouped(x + self.relate_pos_h()).permute(0, 4, 2, 3, 1))
        y = self.laid_back(self.proj_h(v).unflatten(1, sides).permute(0, 4, 2, 3, 1))
        z = F.gelu(self.BN(self.fuse_h(torch.cat([y, x], dim=1)))) + self.relate_pos_w()
        v = self.laid_out(self.grouped(z).permute(0, 4, 1, 3, 2))
        return self.laid_back(self.proj_w(v).unflatten(1, sides).permute(0, 2, 4, 3, 1))

    def grouped(self, x: Tensor) -> Tensor:
        """A map (B, C/2, H, W) as (B, H, W, G, Cg)."""
        return x.permute(0, 2, 3, 1).unflatten(3, (self.groups, self.group_size))

    def laid_out(self, strips: Tensor) -> Tensor:
        """(B, Cg, position in the strip, G, strip) as the input (B, Cg * R, G, R) of a convolution."""
        if _channels_last(strips):
            return strips.permute(0, 3, 4, 1, 2).flatten(3).permute(0, 3, 1, 2)
        return strips.flatten(1, 2)

    def laid_back(self, x: Tensor) -> Tensor:
        """(B, H, W, G, Cg) as a map (B, C/2, H, W)."""
        if _channels_last(x):
            return x.flatten(3).permute(0, 3, 1, 2)
        return x.permute(0, 3, 4, 1, 2).flatten(1, 2)

    def windows(self, x: Tensor) -> Tensor:
        """`strips` on a map of any size (B, C/2, H, W), window by window."""
        height, width = x.shape[-2:]
        side = self.side
        tops, lefts = axis_windows(height, side), axis_windows(width, side)
        if tops == lefts == (0,) and height == width == side:
            return self.strips(x)
        padded = F.pad(x, (0, max(0, side - width), 0, max(0, side - height)))
        views = [padded[..., top : top + side, left : left + side] for top in tops for left in lefts]
        mixed = self.strips(torch.cat(views)).unflatten(0, (len(views), x.shape[0])).unbind()
        rows = [_stitch(mixed[r * len(lefts) : (r + 1) * len(lefts)], lefts, dim=3) for r in range(len(tops))]
        return _stitch(rows, tops, dim=2)[..., :height, :width]

    def local(self, x: Tensor) -> Tensor:
        """LSMM on (B, C/2, H, W): three branches, weighted for each channel by what the whole map looks like."""
        xw, xh = self.fc_h(x), self.fc_w(x)
        ph, pw, px = (branch.mean(dim=(2, 3), keepdim=True) for branch in (xh, xw, x))
        a = self.reweight(ph + pw + px).unflatten(1, (-1, 3)).softmax(dim=2)  # (B, C/2, 3, 1, 1)
        ah, aw, ax = a.transpose(1, 2).contiguous().unbind(1)
        return torch.addcmul(torch.addcmul(x * ax, xw, aw), xh, ah)


def axis_windows(length: int, side: int) -> tuple[int, ...]:
    """Where windows of `side` start on an axis of `length` (a shorter axis is padded to one window); MLP-DINO's rule.

    The number of windows and their overlap are rounded half to even, so there may be more than ``ceil(length / side)``.
    Two neighbours overlap by ``starts[i] + side - starts[i + 1]``.
    """
    if length <= side:
        return (0,)
    count = round(length / side + 0.5)
    overlap = round((count * side - length) / (count - 1) - 0.5)
    return tuple(min(i * (side - overlap), length - side) for i in range(count))


def _stitch(parts: Sequence[Tensor], starts: Sequence[int], dim: int) -> Tensor:
    """Windows one after another: half of what is there and half of the new one where they overlap."""
    side = parts[0].shape[dim]
    canvas = parts[0]
    for part, start in zip(parts[1:], starts[1:], strict=True):
        end = canvas.shape[dim]
        shared = end - start
        blend = 0.5 * canvas.narrow(dim, start, shared) + 0.5 * part.narrow(dim, 0, shared)
        canvas = torch.cat([canvas.narrow(dim, 0, start), blend, part.narrow(dim, shared, side - shared)], dim=dim)
    return canvas


class TokenMixing(nn.Module):
    """A depthwise 3x3 convolution, then the strips."""

    def __init__(self, channels: int, side: int, device: Any = None, dtype: Any = None, **strips: Any) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.smlp_block = StripMixing(channels, side, **strips, **at)
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False, **at)
        merge = OrderedDict(BN=nn.BatchNorm2d(channels, **at), act=nn.GELU(), Conv=conv)
        self.dwsc = nn.Sequential(OrderedDict(conv_merge=nn.Sequential(merge)))

    def forward(self, x: Tensor) -> Tensor:
        return self.smlp_block(self.dwsc(x))


# -- channel mixing --------------------------------------------------------------------------------------------------


class GRN(nn.Module):
    """Global response normalisation of (B, H, W, C); timm's has other shapes of weights than the released files."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        # gamma * (x * response) + beta + x, reading the widest map of the block once instead of four times
        return torch.addcmul(self.beta, x, 1 + self.gamma * response)


class ChannelMixing(nn.Module):
    """A depthwise 7x7 convolution, then an MLP over channels, `alpha` times as wide, with GRN inside."""

    def __init__(self, channels: int, alpha: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_77 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False, **at)
        self.layer_norm = nn.LayerNorm(channels, **at)
        self.fc1 = nn.Linear(channels, alpha * channels, **at)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(alpha * channels, channels, **at)
        self.grn = GRN(alpha * channels, **at)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(self.conv_77(x).permute(0, 2, 3, 1))
        return self.fc2(self.grn(self.act(self.fc1(x)))).permute(0, 3, 1, 2)


class StripMLPBlock(nn.Module):
    """Token mixing and channel mixing, each with a residual path and stochastic depth; (B, C, H, W)."""

    def __init__(self, channels: int, side: int, alpha: int, drop_path: float, **options: Any) -> None:
        super().__init__()
        at = {name: options.get(name) for name in ("device", "dtype")}
        self.token_mixing = TokenMixing(channels, side, **options)
        self.channel_mixing = ChannelMixing(channels, alpha, **at)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))


# -- the network -----------------------------------------------------------------------------------------------------


class StripMLP(nn.Module):
    """Strip-MLP (arXiv 2307.11458). Input (B, in_chans, H, W), logits (B, num_classes).

    Weights depend on the image size. With ``window_size=None`` images must be `img_size`; with ``"train"`` `img_size`
    says what the weights were trained at, and images of any size from 32 pixels on are mixed in overlapping windows of
    the trained side (the scheme of the authors' detector, MLP-DINO, made for evaluation; in training, batch
    normalisation inside the strips sees overlapping pixels twice). ``dynamic_img_size=True`` is timm's way to say
    ``window_size="train"``.

    Gradient checkpointing runs blocks twice, so in training batch-norm statistics are updated twice a step; outputs and
    gradients are the same.

    Args:
        img_size: side of the square image, or (side, side); a multiple of 32.
        embed_dim: channels E of stage 1, even; stages have E, 2E, 4E, 8E.
        layers: blocks of the four stages.
        alpha: width of the channel MLP over its channels (3 in every released file).
        cgsmm_patch: how channels of the strips are grouped: "auto" is the released rule; MLP-DINO uses 2.
        window_size: None or "train".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, the same in every block (the released code fixes 0.1).
        global_pool: "avg", "max", "avgmax" or "" (unpooled; needs num_classes=0).

    Raises:
        InvalidParameterError: an argument is out of range, or (in `forward`) the image size does not fit.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        layers: Sequence[int] = (2, 2, 6, 2),
        alpha: int = 3,
        global_pool: str = "avg",
        cgsmm_patch: int | str = "auto",
        window_size: str | None = None,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        side = _check_side(img_size)
        _check_sizes(embed_dim, layers, alpha, window_size)
        for name, value, least in (("in_chans", in_chans, 1), ("num_classes", num_classes, 0)):
            if not isinstance(value, int) or value < least:
                raise InvalidParameterError(f"{name}={value!r}: expected a whole number of at least {least}")
        self.img_size = (side, side)
        self.window_size = "train" if dynamic_img_size else window_size
        self.num_classes, self.in_chans = num_classes, in_chans
        widths = [embed_dim * 2**i for i in range(4)]
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"blocks{i + 1}"} for i, width in enumerate(widths)
        ]
        self.grad_checkpointing = False
        options = {"cgsmm_patch": cgsmm_patch, "windowed": self.window_size is not None, **at}

        def stage(i: int) -> nn.Sequential:
            sides = side // (4 * 2**i)
            return nn.Sequential(
                *(StripMLPBlock(widths[i], sides, alpha, drop_path_rate, **options) for _ in range(layers[i]))
            )

        def halve(i: int, o: int, groups: int = 1) -> nn.Conv2d:
            return nn.Conv2d(widths[i], widths[o], 2, stride=2, groups=groups, bias=False, **at)

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, 4, stride=4, bias=False, **at)
        self.blocks1, self.merging1 = stage(0), halve(0, 1)
        self.blocks2, self.merging2 = stage(1), halve(1, 2)
        self.blocks3, self.merging3 = stage(2), halve(2, 3)
        self.blocks4 = stage(3)
        self.conv_s1_28, self.conv_s1_14 = halve(1, 2, widths[1]), halve(2, 3, widths[2])
        self.conv_s2_14 = halve(2, 3, widths[2])
        self.norm: nn.Module = nn.BatchNorm2d(widths[-1], **at)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool, **at)

    # -- timm's surface ----------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond timm's own rule (biases and 1-D weights): the released recipe decays tables and GRN."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups, front to back; skips and merging go with the stage that they read."""
        after = r"^(?:merging|conv_s)(\d)"
        fine = [(r"^blocks(\d)\.(\d+)", None), (after, (99999,)), (r"^norm", (99999, 0))]
        return {"stem": r"^patch_embed", "blocks": r"^(?:blocks|merging|conv_s)(\d)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        """A new classifier; none with ``num_classes=0``, and unpooled maps (B, C, H, W) with ``global_pool=""`` too."""
        pool: str = self.global_pool.pool_type if global_pool is None else global_pool
        if pool not in POOLS:
            raise InvalidParameterError(f"global_pool={pool!r}: expected one of {', '.join(map(repr, POOLS))}")
        if num_classes and not pool:
            raise InvalidParameterError(f"global_pool='' with num_classes={num_classes}: the classifier needs pooling")
        old = getattr(self, "head", None)
        if isinstance(old, nn.Linear):
            device, dtype = device or old.weight.device, dtype or old.weight.dtype
        elif hasattr(self, "head"):
            first = self.patch_embed.weight
            device, dtype = device or first.device, dtype or first.dtype
        self.num_classes = num_classes
        self.global_pool: Any = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
        linear = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else None
        self.head = nn.Identity() if linear is None else linear

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after the four stages (strides 4, 8, 16, 32): a list, or (`forward_features`, that list).

        Args:
            indices: the last n if a number, all if None, else these.
            norm: the last stage's map after the final norm.
            stop_early: leave out stages behind the last one asked for (the first result is then its map).
            output_fmt: "NCHW".
            intermediates_only: the list alone.
        """
        if output_fmt != "NCHW":
            raise InvalidParameterError(f"output_fmt={output_fmt!r}: a Strip-MLP has maps, in 'NCHW' only")
        take, last = feature_take_indices(len(self.feature_info), indices)
        depth = len(self.feature_info)
        maps = self._stages(x, last + 1 if stop_early else depth)
        final = maps[-1]
        if len(maps) == depth and not (intermediates_only and (not norm or depth - 1 not in take)):
            final = self.norm(final)
        found = [final if norm and i == depth - 1 else maps[i] for i in range(len(maps)) if i in take]
        return found if intermediates_only else (final, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `indices` of `forward_intermediates` do not need; returns them counted from the front."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        pruned = last < len(self.feature_info) - 1
        unused = {0: ("merging1",), 1: ("merging2", "conv_s1_28"), 2: ("merging3", "conv_s1_14", "conv_s2_14")}
        for stage in range(last, len(self.feature_info) - 1):
            for name in (*unused[stage], f"blocks{stage + 2}"):
                setattr(self, name, nn.Identity())
        if prune_norm or pruned:
            self.norm = nn.Identity()
        self.feature_info = self.feature_info[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take

    # -- forward -----------------------------------------------------------------------------------------------------

    def _stages(self, x: Tensor, count: int) -> list[Tensor]:
        """Maps after the first `count` stages."""
        self._check_image(x)
        if _channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        maps = [self._blocks(self.blocks1, self.patch_embed(x))]
        if count > 1:
            m1 = self.merging1(maps[0])
            maps.append(self._blocks(self.blocks2, m1))
        if count > 2:
            m2, skip1 = self.merging2(maps[1]), self.conv_s1_28(m1)
            maps.append(self._blocks(self.blocks3, m2 + skip1))
        if count > 3:
            # conv_s2_14 reads m2 before the skip is added to it
            skips = self.conv_s1_14(skip1) + self.conv_s2_14(m2)
            maps.append(self._blocks(self.blocks4, self.merging3(maps[2]) + skips))
        return maps

    def _blocks(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(blocks, x)
        return blocks(x)

    def _check_image(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if self.window_size is None and (height, width) != self.img_size:
            raise InvalidParameterError(
                f"image of {height}x{width}: this Strip-MLP was built for {self.img_size[0]}x{self.img_size[1]}; "
                "build it with img_size=..., or with window_size='train' to run trained weights at other sizes"
            )
        if min(height, width) < REDUCTION:
            raise InvalidParameterError(f"image of {height}x{width}: at least {REDUCTION} pixels a side are needed")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W): the last stage's map after the final norm."""
        return self.norm(self._stages(x, len(self.feature_info))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, C) with `pre_logits`, else logits (B, num_classes)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a released ``.pth`` (nothing in it is executed) or a ``.safetensors`` file.

        Weights of another image size are resampled, those of another number of input channels adapted as timm does it,
        and a classifier with another number of classes is left out.

        Raises:
            InvalidParameterError: the file is of another variant, or is no Strip-MLP.
        """
        from tokred.vision.backbones.strip_mlp_checkpoint import load_strip_mlp_checkpoint

        weights = load_strip_mlp_checkpoint(checkpoint_path)
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        weights = checkpoint_filter_fn(weights, self)
        own = self.state_dict()
        stem = weights.get("patch_embed.weight")
        if stem is not None and stem.ndim == 4 and stem.shape[1] == 3 != self.in_chans:
            weights["patch_embed.weight"] = adapt_input_conv(self.in_chans, stem)
        head = {name for name in own.keys() | weights.keys() if name.startswith("head.")}
        if any(name not in own or name not in weights or own[name].shape != weights[name].shape for name in head):
            weights = {name: value for name, value in weights.items() if name not in head}
        else:
            head = set()
        missing = sorted(own.keys() - weights.keys() - head)
        foreign = sorted(weights.keys() - own.keys())
        shapes = [k for k in own if k in weights and own[k].shape != weights[k].shape]
        if missing or foreign or shapes:
            told = [("lacks", missing), ("has besides", foreign), ("has other shapes of", shapes)]
            raise InvalidParameterError(
                f"{checkpoint_path} does not fit this Strip-MLP ({self._described()}): it "
                + "; ".join(f"{how} {len(names)} names such as {names[0]}" for how, names in told if names)
                + ". Build the variant that the file was made for"
            )
        self.load_state_dict(weights, strict=False)

    def _described(self) -> str:
        layers = [len(getattr(self, info["module"])) for info in self.feature_info]
        return f"embed_dim={self.feature_info[0]['num_chs']}, layers={layers}"


def _check_side(img_size: int | Sequence[int]) -> int:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] < REDUCTION or sides[0] % REDUCTION:
        raise InvalidParameterError(
            f"img_size={img_size!r}: weights of a Strip-MLP belong to a square image whose side is a multiple of "
            f"{REDUCTION}; for other images give the size it is trained at, and window_size='train'"
        )
    return sides[0]


def _check_sizes(embed_dim: int, layers: Sequence[int], alpha: int, window_size: str | None) -> None:
    if not isinstance(embed_dim, int) or embed_dim < 4 or embed_dim % 2:
        raise InvalidParameterError(f"embed_dim={embed_dim!r}: expected an even number of at least 4")
    if len(layers) != 4 or any(not isinstance(count, int) or count < 1 for count in layers):
        raise InvalidParameterError(f"layers={layers!r}: expected four numbers of blocks, each at least 1")
    if not isinstance(alpha, int) or alpha < 1:
        raise InvalidParameterError(f"alpha={alpha!r}: expected a whole number of at least 1")
    if window_size not in (None, "train"):
        raise InvalidParameterError(
            f"window_size={window_size!r}: expected None (one image size) or 'train' (windows of the trained side)"
        )


# -- weights ---------------------------------------------------------------------------------------------------------


def _rename_proh_w(state_dict: dict[str, Any], start: str) -> None:
    for name in [name for name in state_dict if name.startswith(start)]:
        state_dict[f"{start.removesuffix('proh_w.')}proj_w.{name.removeprefix(start)}"] = state_dict.pop(name)


def resize_state_dict(weights: Mapping[str, Tensor], img_size: int) -> dict[str, Tensor]:
    """Weights of one image size for another. Ours: neither the paper nor the released code does this.

    The R x R matrices of the strips (Cg * R, R, 1, 3) are resampled bilinearly and scaled by R / R', so that sums over
    a strip keep their size; their biases, and the position tables (2R + 1, C/2), linearly. All else is kept as it is.
    """
    resized = dict(weights)
    for name, table in weights.items():
        found = re.match(r"blocks([1-4])\.\d+\.token_mixing\.smlp_block\.relate_pos_([hw])\.embeddings_table$", name)
        if not found:
            continue
        old, new = (table.shape[0] - 1) // 2, img_size // (2 * 2 ** int(found[1]))
        if old == new:
            continue
        strip = name.split("relate_pos")[0] + f"proj_{found[2]}."
        resized[name] = _resize_table(table, new)
        resized[f"{strip}weight"] = _resize_matrices(weights[f"{strip}weight"], old, new)
        resized[f"{strip}bias"] = _resize_bias(weights[f"{strip}bias"], old, new)
    return resized


def _resize_table(table: Tensor, new: int) -> Tensor:
    # The outermost rows belong to offsets that do not occur: they were never trained, so they must not leak inwards.
    inner = F.pad(table[1:-1].float().t()[None], (1, 1), mode="replicate")
    # Offset d of the new strip lies at d * R / R' of the old one: end rows on end rows.
    return F.interpolate(inner, 2 * new + 1, mode="linear", align_corners=True)[0].t().to(table.dtype).contiguous()


def _resize_matrices(weight: Tensor, old: int, new: int) -> Tensor:
    groups = weight.shape[0] // old
    taps = weight.float().reshape(groups, old, old, 3).permute(0, 3, 1, 2)
    taps = F.interpolate(taps, (new, new), mode="bilinear", align_corners=False) * (old / new)
    return taps.permute(0, 2, 3, 1).reshape(groups * new, new, 1, 3).to(weight.dtype)


def _resize_bias(bias: Tensor, old: int, new: int) -> Tensor:
    rows = F.interpolate(bias.float().reshape(1, -1, old), new, mode="linear", align_corners=False)
    return rows.reshape(-1).to(bias.dtype)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: StripMLP) -> dict[str, Tensor]:
    """What timm applies to pretrained weights: the released wrapper off, our names, and the model's image size."""
    from tokred.vision.backbones.strip_mlp_checkpoint import clean_state_dict

    weights = state_dict["model"] if isinstance(state_dict.get("model"), Mapping) else state_dict
    return resize_state_dict(clean_state_dict(weights), model.img_size[0])


# -- registration ----------------------------------------------------------------------------------------------------


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "num_classes": 1000,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/Med-Process/Strip_MLP",
        "paper_ids": "arXiv:2307.11458",
        "paper_name": "Strip-MLP: Efficient Token Interaction for Vision MLP",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "strip_mlp_tiny_light.in1k": _cfg(),
        "strip_mlp_tiny.in1k": _cfg(),
        "strip_mlp_small.in1k": _cfg(),
        "strip_mlp_base.in1k": _cfg(),
    }
)


def _create_strip_mlp(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    if pretrained:
        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        if not (source.has_weights or source.state_dict):
            raise MissingWeightsError(
                f"{variant}: pretrained=True cannot fetch weights. The authors share them through a page that needs a "
                f"browser; the links are in their README, {README}. Download the .pth and give it as "
                "pretrained_cfg_overlay=dict(file='FILE.pth'), or rewrite it with `python -m "
                "tokred.vision.backbones.strip_mlp_checkpoint FILE.pth OUT.safetensors` for checkpoint_path="
            )
        if source.file:
            # Released files hold a configuration object, which timm's own reader refuses: `load_pretrained` reads them.
            kwargs["pretrained_cfg_overlay"] = {**overlay, "file": source.file, "custom_load": True}
    return build_model_with_cfg(
        StripMLP,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def strip_mlp_tiny_light(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-T*: 18.2 M parameters, 2.52 G multiply-adds at 224."""
    sizes = {"embed_dim": 80, "layers": (2, 2, 6, 2)}
    return _create_strip_mlp("strip_mlp_tiny_light", pretrained, **{**sizes, **kwargs})


@register_model
def strip_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-T: 24.9 M parameters, 3.65 G multiply-adds at 224."""
    sizes = {"embed_dim": 80, "layers": (2, 2, 12, 2)}
    return _create_strip_mlp("strip_mlp_tiny", pretrained, **{**sizes, **kwargs})


@register_model
def strip_mlp_small(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-S: 42.6 M parameters, 6.80 G multiply-adds at 224."""
    sizes = {"embed_dim": 96, "layers": (2, 2, 18, 2)}
    return _create_strip_mlp("strip_mlp_small", pretrained, **{**sizes, **kwargs})


@register_model
def strip_mlp_base(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-B: 57.2 M parameters, 9.18 G multiply-adds at 224."""
    sizes = {"embed_dim": 112, "layers": (2, 2, 18, 2)}
    return _create_strip_mlp("strip_mlp_base", pretrained, **{**sizes, **kwargs})
