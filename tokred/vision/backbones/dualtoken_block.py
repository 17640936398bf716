"""The Dual Token Block of DualToken-ViT (tokred reconstruction), the modules of LightViT around it, and the switches.

Sources: the text of the paper (Chu et al., SDM 2024, arXiv 2309.12424), for stem, patch merging and bi-dimensional
attention LightViT (Huang et al., arXiv 2207.05557), whose modules the paper says it reuses. `dualtoken_vit.py` builds
the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, use_fused_attn
from timm.models import checkpoint
from torch import Tensor, nn

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError

__all__ = ["BiDimMlp", "DualTokenBlock", "DualTokenStage", "Merge", "Stem", "Switches"]

#: halvings from the map of a stage to the grid of global tokens: 28 -> 7, 14 -> 7, 7 (step 2 of the block)
HALVINGS = (2, 1, 0)
CHOICES = {
    "g_mlp": ("mix", "mlp"),
    "mix_order": ("channel_first", "token_first"),
    "enrich": ("tokens", "sum"),
    "steps": ("step", "one"),
    "down_step": ("separable", "dense"),
    "agg_norm": ("pre", "post"),
    "fusion": ("sum", "concat"),
    "resize": ("bilinear", "bicubic", "nearest", "area"),
    "drop_path_on": ("all", "ffn"),
}
#: a field that is read only where another one has this value
DEPENDS = {"g_ratio": ("g_mlp", "mlp"), "mix_order": ("g_mlp", "mix"), "down_step": ("steps", "step")}


@dataclass(frozen=True)
class Switches:
    """One switch for each point of the block that the paper leaves open; the defaults are the tokred reconstruction.

    Attributes:
        conv_ratio: expansion e > 0 of the conv encoder. 2 brings the small variant to the paper's 1.0 GFLOPs.
        kernel: odd width k of its depthwise convolution. 7, as in ConvNeXt.
        global_tokens: grid (t_h, t_w) of the global tokens. (7, 7) is the paper's; only the sizes of the global token
            and of the token-mixing layers depend on it.
        g_mlp: f of the enrichment: "mix" (one layer over channels, one over tokens: the paper's MixMLP, whose exact
            form is not known) or "mlp" (a channel MLP).
        g_ratio: hidden width of f over C; with g_mlp="mlp" only.
        mix_order: which of the two layers of "mix" comes first.
        alpha: the preset weight of the sum alpha f(G) + (1 - alpha) X_ga, in [0, 1], or "learned" (a sigmoid of one
            number a block). At 0 the global tokens, and at 1 the path down to X_ga, have no effect and are not built.
        enrich: f is applied to the global "tokens" before the weighted "sum", or to the sum.
        steps: "step" halves the map several times, "one" averages it down at once (the paper's ablation).
        down_step: what a step does before it halves: "separable" (3 x 3 depthwise, 1 x 1; it adds what the ablation
            reports, 0.1M and 0.03G) or "dense" (one 3 x 3 convolution).
        agg_norm: LayerNorm before ("pre") or behind ("post") the attention of the global aggregation.
        agg_residual: add its input to what that attention returns.
        fusion: "sum" of local and global branch, or "concat" and a linear layer 2C -> C.
        resize: interpolation to the grid (t_h 2^M, t_w 2^M) for maps of another size. The paper speaks of an
            interpolation, not of its rule.
        init_values: initial value of a layer scale on the conv branch and the FFN; None is none.
        drop_path_on: stochastic depth on "all" three branches (conv, global, FFN) or on the "ffn" alone.

    Raises:
        InvalidParameterError: a value outside its range, or one that has no effect beside another.
    """

    conv_ratio: float = 2.0
    kernel: int = 7
    global_tokens: tuple[int, int] = (7, 7)
    g_mlp: Literal["mix", "mlp"] = "mix"
    g_ratio: float = 1.0
    mix_order: Literal["channel_first", "token_first"] = "channel_first"
    alpha: float | Literal["learned"] = 0.5
    enrich: Literal["tokens", "sum"] = "tokens"
    steps: Literal["step", "one"] = "step"
    down_step: Literal["separable", "dense"] = "separable"
    agg_norm: Literal["pre", "post"] = "pre"
    agg_residual: bool = False
    fusion: Literal["sum", "concat"] = "sum"
    resize: Literal["bilinear", "bicubic", "nearest", "area"] = "bilinear"
    init_values: float | None = None
    drop_path_on: Literal["all", "ffn"] = "all"

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        for field in ("conv_ratio", "g_ratio"):
            check_number(field, getattr(self, field), above=0.0)
        if self.init_values is not None:
            check_number("init_values", self.init_values, above=0.0)
        if check_count("kernel", self.kernel, 1) % 2 == 0:
            raise InvalidParameterError(
                f"kernel={self.kernel!r}: expected an odd width, so that the map keeps its size"
            )
        object.__setattr__(self, "global_tokens", check_pair("global_tokens", self.global_tokens))
        if self.alpha != "learned":
            hint = "a weight in [0, 1], or 'learned'"
            object.__setattr__(self, "alpha", check_number("alpha", self.alpha, 0.0, 1.0, hint))
        if not isinstance(self.agg_residual, bool):
            raise InvalidParameterError(f"agg_residual={self.agg_residual!r}: expected True or False")
        defaults = {field.name: field.default for field in fields(self)}
        for field, (other, value) in DEPENDS.items():
            if getattr(self, field) != defaults[field] and getattr(self, other) != value:
                raise InvalidParameterError(
                    f"{field}={getattr(self, field)!r} has no effect with {other}={getattr(self, other)!r}: "
                    f"leave it out, or set {other}={value!r}"
                )

    @property
    def reads_tokens(self) -> bool:
        """Whether the global tokens that come into a block have an effect."""
        return self.alpha != 0

    @property
    def reads_image(self) -> bool:
        """Whether the image has an effect on the global tokens."""
        return self.alpha != 1


# -- checks ----------------------------------------------------------------------------------------------------------


def check_number(
    field: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    expected: str = "",
    above: float = -math.inf,
) -> float:
    """Return a finite number in [low, high] that exceeds `above`."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (low <= number <= high and above < number < math.inf):
        expected = expected or (
            f"a number above {above:g}" if above > -math.inf else f"a number in [{low:g}, {high:g}]"
        )
        raise InvalidParameterError(f"{field}={value!r}: expected {expected}")
    return number


def check_pair(field: str, value: object) -> tuple[int, int]:
    """Return (height, width), both at least 1."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        raise InvalidParameterError(f"{field}={value!r}: expected two integers >= 1, (height, width)")
    return check_count(field, value[0], 1), check_count(field, value[1], 1)


def check_stages(field: str, value: object, check: Callable[[str, Any], Any]) -> tuple[Any, Any, Any]:
    """Return one checked value for each of the three stages."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 3:
        raise InvalidParameterError(f"{field}={value!r}: expected three values, one a stage")
    first, second, third = (check(field, entry) for entry in value)
    return first, second, third


def hidden_width(field: str, dim: int, ratio: float) -> int:
    """Width of a hidden layer, at least 1."""
    if int(dim * ratio) < 1:
        raise InvalidParameterError(f"{field}={ratio!r}: a hidden layer of {dim} x {ratio:g} channels is empty")
    return int(dim * ratio)


# -- LightViT's pieces -----------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """LightViT's stem: images (B, in_chans, H, W) to a map (B, ceil(H/8), ceil(W/8), dim), normalised."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // 2
        layers: list[nn.Module] = []
        for channels, stride, groups in ((in_chans, 2, 1), (width, 1, width), (width, 1, width), (width, 2, width)):
            conv = nn.Conv2d(channels, width, 3, stride, padding=1, groups=groups, bias=False, **dd)
            layers += [conv, nn.BatchNorm2d(width, **dd), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, dim, 3, 2, padding=1, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # as all maps behind the stem lie; faster for its depthwise convolutions
            x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(self.stem(x)).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """LightViT's patch merging with its residual: map (B, H, W, dim) and global tokens (B, T, dim), or None, to
    (B, ceil(H/2), ceil(W/2), out_dim) and (B, T, out_dim). LightViT needs even sides; ours are zero-padded."""

    def __init__(
        self, dim: int, out_dim: int, global_tokens: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(4 * dim, eps=1e-5, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)
        self.res_proj = nn.Linear(dim, out_dim, bias=False, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd) if global_tokens else None
        self.proj = nn.Linear(dim, out_dim, bias=False, **dd) if global_tokens else None

    def forward(self, x: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, h, w, _ = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        strongest = torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
        x = self.reduction(self.norm(torch.cat(corners, dim=-1))) + self.res_proj(strongest)
        if g is None or self.norm2 is None or self.proj is None:
            return x, None
        return x, self.proj(self.norm2(g))


class BiDimAttention(nn.Module):
    """LightViT's bi-dimensional attention: tokens (B, N, dim) times a gate a channel and a gate a token."""

    def __init__(self, dim: int, ratio: float = 0.25, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = int(dim * ratio)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.global_reduce = nn.Linear(dim, width, **dd)
        self.local_reduce = nn.Linear(dim, width, **dd)
        self.channel_select = nn.Linear(width, dim, **dd)
        self.spatial_select = nn.Linear(2 * width, 1, **dd)

    def forward(self, y: Tensor) -> Tensor:
        normed = self.norm(y)
        whole = F.gelu(self.global_reduce(normed.mean(dim=1, keepdim=True)))
        local = F.gelu(self.local_reduce(normed))
        both = torch.cat([local, whole.expand(-1, local.shape[1], -1)], dim=-1)
        # Sigmoids in float32: half precision saturates them early.
        channel = self.channel_select(whole).float().sigmoid().to(y.dtype)
        spatial = self.spatial_select(both).float().sigmoid().to(y.dtype)
        return y * channel * spatial


class BiDimMlp(nn.Module):
    """FFN and bi-dimensional attention on image tokens (B, N, dim); in LightViT it sees the global tokens too."""

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.attn = BiDimAttention(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.fc2(F.gelu(self.fc1(x))))


# -- the Dual Token Block --------------------------------------------------------------------------------------------


class ConvEncoder(nn.Module):
    """Local branch, a ConvNeXt block with its residual: map (B, H, W, dim) to X_local of the same shape."""

    def __init__(
        self, dim: int, switches: Switches, drop_path: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = hidden_width("conv_ratio", dim, switches.conv_ratio)
        self.dw = nn.Conv2d(dim, dim, switches.kernel, padding=switches.kernel // 2, groups=dim, **dd)
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.pw1 = nn.Linear(dim, hidden, **dd)
        self.pw2 = nn.Linear(hidden, dim, **dd)
        self.gamma = layer_scale(dim, switches, **dd)
        self.drop_path = DropPath(drop_path if switches.drop_path_on == "all" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        branch = self.pw2(F.gelu(self.pw1(self.norm(branch))))
        return x + self.drop_path(branch if self.gamma is None else branch * self.gamma)


class SeparableStep(nn.Module):
    """One step down, our guess at the paper's "extract local information by convolution, halve the resolution": map
    (B, dim, H, W) with even sides to (B, dim, H/2, W/2)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(dim, **dd)
        self.pw = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.bn2(self.pw(F.gelu(self.bn1(self.dw(x))))), 2)


class DenseStep(nn.Module):
    """The other reading of a step: one 3 x 3 convolution; shapes as for `SeparableStep`."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.gelu(self.bn(self.conv(x))), 2)


class TokenAttention(nn.Module):
    """Multi-head attention of x (B, N, dim) to a context (B, T, dim), or to itself, with an output projection."""

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)  # rows of the keys, then of the values
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            rows = (q * self.scale) @ k.transpose(-2, -1)
            out = rows.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class GlobalMlp(nn.Module):
    """f = "mlp": a channel MLP on global tokens (B, T, dim)."""

    def __init__(self, dim: int, switches: Switches, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = hidden_width("g_ratio", dim, switches.g_ratio)
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, g: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(g)))


class GlobalMix(nn.Module):
    """f = "mix": one layer over the channels and one over the tokens of (B, T, dim), GELU between them."""

    def __init__(self, dim: int, switches: Switches, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        tokens = math.prod(switches.global_tokens)
        self.channel_first = switches.mix_order == "channel_first"
        self.fc_c = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.fc_t = nn.Linear(tokens, tokens, device=device, dtype=dtype)

    def forward(self, g: Tensor) -> Tensor:
        if self.channel_first:
            return self.fc_t(F.gelu(self.fc_c(g)).transpose(1, 2)).transpose(1, 2)
        return self.fc_c(F.gelu(self.fc_t(g.transpose(1, 2)).transpose(1, 2)))


class DualTokenBlock(nn.Module):
    """Dual Token Block: map X (B, H, W, dim) and global tokens G (B, T, dim) to both of the same shapes.

    Args:
        dim, num_heads, mlp_ratio: of this stage.
        halvings: M, steps from the map of this stage down to the grid of the global tokens.
        switches: what the paper leaves open.
        drop_path: probability of each branch being dropped in training, a sample at a time.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        halvings: int,
        switches: Switches,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.switches = switches
        self.grid = tuple(side << halvings for side in switches.global_tokens)
        self.conv_enc = ConvEncoder(dim, switches, drop_path, **dd)
        if switches.reads_image:
            self.down = down_path(dim, halvings, switches, **dd)
            self.norm_ds = LayerNorm(dim, eps=1e-6, **dd)
            self.agg = TokenAttention(dim, num_heads, **dd)
        if switches.reads_tokens or switches.enrich == "sum":
            self.g_mlp = (GlobalMix if switches.g_mlp == "mix" else GlobalMlp)(dim, switches, **dd)
        if switches.alpha == "learned":
            self.alpha = nn.Parameter(torch.zeros((), **dd))
        self.norm_q = LayerNorm(dim, eps=1e-6, **dd)
        self.norm_kv = LayerNorm(dim, eps=1e-6, **dd)
        self.bcast = TokenAttention(dim, num_heads, **dd)
        self.fuse = nn.Linear(2 * dim, dim, **dd) if switches.fusion == "concat" else None
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = BiDimMlp(dim, hidden_width("mlp_ratios", dim, mlp_ratio), **dd)
        self.gamma = layer_scale(dim, switches, **dd)
        self.drop_path_global = DropPath(drop_path if switches.drop_path_on == "all" else 0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        size = x.shape[1:3]
        local = self.conv_enc(x)
        g = self.enrich(g, self.aggregate(local) if self.switches.reads_image else None)
        y = local.flatten(1, 2)
        x_global = self.drop_path_global(self.bcast(self.norm_q(y), self.norm_kv(g)))
        y = y + x_global if self.fuse is None else self.fuse(torch.cat([y, x_global], dim=-1))
        branch = self.mlp(self.norm2(y))
        y = y + self.drop_path(branch if self.gamma is None else branch * self.gamma)
        return y.unflatten(1, size), g

    def aggregate(self, local: Tensor) -> Tensor:
        """Step-wise downsampling and global aggregation: X_local (B, H, W, dim) to X_ga (B, T, dim)."""
        x = self.down(self.resized(local.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
        if self.switches.agg_norm == "pre":
            out = self.agg(self.norm_ds(x))
            return x + out if self.switches.agg_residual else out
        out = self.agg(x)
        return self.norm_ds(x + out if self.switches.agg_residual else out)

    def resized(self, x: Tensor) -> Tensor:
        """The map (B, dim, H, W) on the grid that `down` takes; the same tensor if it lies on it already."""
        if x.shape[2:] == self.grid:
            return x
        mode = self.switches.resize
        return F.interpolate(x, self.grid, mode=mode, align_corners=False if mode in ("bilinear", "bicubic") else None)

    def enrich(self, g: Tensor | None, x_ga: Tensor | None) -> Tensor:
        """G_new = alpha f(G) + (1 - alpha) X_ga, or f of the sum. The part whose weight is 0 is not read: None, or, for
        G, what an earlier block left."""
        f_first = self.switches.enrich == "tokens"
        if g is None or not self.switches.reads_tokens:
            assert x_ga is not None  # alpha is not both 0 and 1
            total = x_ga
        else:
            total = self.g_mlp(g) if f_first else g
            if x_ga is not None:
                alpha = self.alpha.sigmoid() if self.switches.alpha == "learned" else self.switches.alpha
                total = alpha * total + (1 - alpha) * x_ga
        return total if f_first else self.g_mlp(total)


def down_path(dim: int, halvings: int, switches: Switches, **dd: Any) -> nn.Module:
    """From a map (B, dim, t_h 2^M, t_w 2^M) to (B, dim, t_h, t_w)."""
    if switches.steps == "one":
        return nn.AvgPool2d(2**halvings) if halvings else nn.Identity()
    step = SeparableStep if switches.down_step == "separable" else DenseStep
    return nn.Sequential(*(step(dim, **dd) for _ in range(halvings)))


def layer_scale(dim: int, switches: Switches, **dd: Any) -> nn.Parameter | None:
    """A factor a channel, or none."""
    return None if switches.init_values is None else nn.Parameter(torch.full((dim,), switches.init_values, **dd))


class DualTokenStage(nn.Module):
    """Patch merging (not in the first stage) and the blocks of one stage, on the map and on the global tokens."""

    def __init__(self, downsample: Merge | None, blocks: Sequence[DualTokenBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.downsample is not None:
            x, g = self.downsample(x, g)
        for block in self.blocks:
            x, g = checkpoint_block(block, x, g) if self.grad_checkpointing else block(x, g)
        return x, g


def checkpoint_block(block: nn.Module, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block whose activations are computed again in the backward pass; its BatchNorms count each batch once."""
    if torch.compiler.is_compiling():  # the compiler takes no context of a caller's own
        return checkpoint(block, x, g, use_reentrant=False)
    return checkpoint(
        block, x, g, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(block))
    )


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode inside: statistics of the batch as ever, running ones left as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
