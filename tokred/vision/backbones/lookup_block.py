"""The LookupViT block: few compressed tokens in full transformer blocks, many lookup tokens beside them at low cost.

"LookupViT: Compressing visual information to a limited number of tokens" (Koner et al., ECCV 2024, arXiv 2407.12753).
There is no released code and no released weight; the equations here are those of our specification, whose reading of
the paper is in parts unverified. Every such point is an option: see `LookupBlock`.

Names of the shapes: B samples, N lookup tokens, P prefix tokens (class token, registers), M tokens of the compressed
grid, M' = P + M compressed tokens, D channels, h heads of d channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_, use_fused_attn
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from tokred.core.budget import check_choice
from tokred.core.errors import InvalidParameterError, UnsupportedModelError

__all__ = [
    "LookupBlock",
    "LookupGather",
    "LookupInfusion",
    "check_compresses",
    "check_grid",
    "gather_weights",
    "infusion_weights",
    "lookup_block_macs",
    "lookup_blocks",
    "lookup_blocks_macs",
    "lookup_scores",
    "resize_tokens",
]

REUSE = ("transpose", "resoftmax")
RESIZE = ("bilinear", "avgpool")
WEIGHT_INIT = ("zero", "copy", "random")


def check_grid(field: str, grid: object, axes: int = 2) -> tuple[int, ...]:
    """A grid of `axes` sides; one integer m means (m, m) for images.

    Raises:
        InvalidParameterError: a side is no integer >= 1, or there are not `axes` of them.
    """
    sides = (grid,) * axes if isinstance(grid, int) else grid
    fits = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == axes
    if not fits or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):  # type: ignore[attr-defined]
        raise InvalidParameterError(f"{field}={grid!r}: expected {axes} integers >= 1, or one that stands for all")
    return tuple(sides)  # type: ignore[arg-type]


def check_compresses(field: str, grid: Sequence[int], tokens: int) -> None:
    """A compressed grid has no more cells than there are lookup tokens.

    Raises:
        InvalidParameterError: it has more.
    """
    if math.prod(grid) > tokens:
        sides = " x ".join(map(str, grid))
        raise InvalidParameterError(
            f"{field}={tuple(grid)}: a grid of {sides} has more tokens than the {tokens} of the lookup grid, so "
            "nothing is compressed and the model costs more than a plain ViT; give a smaller grid"
        )


def resize_tokens(
    tokens: Tensor,
    grid: Sequence[int],
    new_grid: Sequence[int],
    init: str = "bilinear",
    antialias: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Tokens of a grid on another grid: (B, h * w, D) to (B, h' * w', D), computed in float32 at least.

    Args:
        tokens: row after row. Equal grids return them unchanged.
        init: "bilinear" (align_corners False) or "avgpool" (adaptive average pooling).
        antialias: of the bilinear resize. JAX's resize, which the authors probably use, has it on; both unofficial
            implementations have it off.
        mask: (B, h * w), True for tokens that exist. The others get no weight; where none exists the result is 0.
    """
    if mask is not None:
        exists = mask[..., None].to(torch.float32)
        if tuple(grid) == tuple(new_grid):
            return tokens * exists.to(tokens.dtype)
        weight = resize_tokens(exists, grid, new_grid, init, antialias)
        content = resize_tokens(tokens.masked_fill(~mask[..., None], 0), grid, new_grid, init, antialias)
        covered = weight > 1e-6
        return torch.where(covered, content / weight.clamp(min=1e-6), 0).to(tokens.dtype)
    if tuple(grid) == tuple(new_grid):
        return tokens
    wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    image = wide.transpose(1, 2).unflatten(2, tuple(grid))
    if init == "avgpool":
        image = F.adaptive_avg_pool2d(image, (new_grid[0], new_grid[1]))
    else:
        image = F.interpolate(image, tuple(new_grid), mode="bilinear", align_corners=False, antialias=antialias)
    return image.flatten(2).transpose(1, 2).to(tokens.dtype)


# -- the one attention matrix and its two uses -----------------------------------------------------------------------


def lookup_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """S = q k^T * scale, (B, h, M', N), of q (B, h, M', d) and k (B, h, N, d)."""
    return (q * scale) @ k.transpose(-2, -1)


def gather_weights(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """A = softmax over the lookup tokens, (B, h, M', N), in float32 at least.

    With a `mask` (B, N), True for tokens that exist, the others get weight 0, and a sample without any gets only 0.
    """
    if mask is not None:
        absent = ~mask[:, None, None, :]
        return _softmax(scores.masked_fill(absent, torch.finfo(scores.dtype).min)).masked_fill(absent, 0)
    return _softmax(scores)


def infusion_weights(shared: Tensor, reuse: str = "transpose") -> Tensor:
    """R (B, h, N, M'): of A its transpose, or of S the softmax over the compressed tokens of it ("resoftmax")."""
    turned = shared.transpose(-2, -1)
    return turned if reuse == "transpose" else _softmax(turned)


def _softmax(scores: Tensor) -> Tensor:
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return wide.softmax(dim=-1).to(scores.dtype)


class LookupGather(nn.Module):
    """Information gathering: every compressed token attends to all lookup tokens (step 1 of the block).

    Args:
        norm: a norm of D channels; `norm_p` and `norm_l` start as copies of it.
        dim, num_heads: D and h.
        qkv_bias, proj_bias: biases of q, k, v and of the output projection.
        qk_norm: LayerNorm over d on q and k (unverified: seen in one unofficial implementation).
        query_scale: "per_dim" multiplies q by softplus(s) / softplus(0) with a learned s (d,), 0 at the start
            (unverified); "fixed" does not.
        reuse: what `forward` hands to the infusion: see `LookupBlock`.
        attn_drop: of the gathering weights only; the infusion uses the undropped ones.
    """

    def __init__(
        self,
        norm: nn.Module,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        query_scale: str = "fixed",
        reuse: str = "transpose",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads, self.scale, self.reuse = num_heads, head_dim**-0.5, reuse
        self.fused_attn = use_fused_attn()
        self.norm_p, self.norm_l = copy.deepcopy(norm), copy.deepcopy(norm)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **made)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **made)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6, **made) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6, **made) if qk_norm else nn.Identity()
        self.query_scale = nn.Parameter(torch.zeros(head_dim, **made)) if query_scale == "per_dim" else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """The query scale at its start; the layers inside have their own."""
        if self.query_scale is not None:
            nn.init.zeros_(self.query_scale)

    def project(self, zp: Tensor, zl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, h, M', d), k and v (B, h, N, d)."""
        q = self.q(self.norm_p(zp)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_l(zl)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.query_scale is not None:
            one = F.softplus(torch.zeros_like(self.query_scale))
            q = q * (F.softplus(self.query_scale) / one).to(q.dtype)
        return q, k, v

    def forward(self, zp: Tensor, zl: Tensor, mask: Tensor | None = None, infuse: bool = True) -> tuple[Tensor, Any]:
        """The update of `zp` (B, M', D) from `zl` (B, N, D), and what the infusion reuses.

        The second is A for "transpose"; S, or q and k where the fused kernel made S, for "resoftmax"; None without
        `infuse`. `mask`: (B, N), True for lookup tokens that exist.
        """
        q, k, v = self.project(zp, zl)
        shared: Any = None
        if self.fused_attn and mask is None and not (infuse and self.reuse == "transpose"):
            dropped = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, scale=self.scale)
            shared = (q, k) if infuse else None
        else:
            scores = lookup_scores(q, k, self.scale)
            weights = gather_weights(scores, mask)
            x = self.attn_drop(weights) @ v
            if infuse:
                shared = weights if self.reuse == "transpose" else scores
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2))), shared


class LookupInfusion(nn.Module):
    """Global context infusion: lookup tokens read the refined compressed ones through the gathering's attention.

    No new queries and keys (step 3). `prefix`: leading compressed tokens that stay out of it.
    """

    def __init__(
        self,
        norm: nn.Module,
        dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        proj_bias: bool = True,
        reuse: str = "transpose",
        prefix: int = 0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.reuse, self.prefix = num_heads, reuse, prefix
        self.scale = (dim // num_heads) ** -0.5
        self.norm = copy.deepcopy(norm)
        self.v = nn.Linear(dim, dim, bias=bias, **made)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, zp: Tensor, shared: Any) -> Tensor:
        """The update (B, N, D) of the lookup tokens from refined `zp` (B, M', D); `shared` is `LookupGather`'s."""
        v = self.v(self.norm(zp[:, self.prefix :])).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if isinstance(shared, tuple):
            q, k = shared
            x = F.scaled_dot_product_attention(k, q[:, :, self.prefix :], v, scale=self.scale)
        else:
            x = infusion_weights(shared[:, :, self.prefix :], self.reuse) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class LookupBlock(nn.Module):
    """A ViT block for two streams of tokens: (z_p, z_l) -> (z_p, z_l), pre-norm residuals all through.

    1. z_p += gather(z_p, z_l);  2. z_p = the host block, unchanged;  3. z_l += infuse(z_p) by the attention of step 1;
    4. z_l += mlp_l(z_l), of hidden width D / q. The host's drop-path is on each residual, drawn for each anew.

    The modules of `block` become this block's own, under their names and uncopied: its weights, and its keys in a state
    dict, stay as they are. The new ones start from it by `init_new_weights`.

    Args:
        block: timm's `Block` with its `Attention`.
        infuse: False leaves out steps 3 and 4, and their parameters: the last block of a classifier.
        lookup_mlp_div: q; the hidden width of `mlp_l` is int(D / q).
        reuse: "transpose" infuses with A^T, not renormalised; "resoftmax" with the softmax over compressed tokens of
            the transposed logits (each is what one unofficial implementation does).
        infuse_prefix: False keeps the `prefix` leading compressed tokens out of step 3.
        qk_norm, query_scale: see `LookupGather`.
        attn_drop, proj_drop: dropout of the gathering weights, and behind the new projections.
        act_layer: of `mlp_l`.

    Raises:
        UnsupportedModelError: another block or attention class.
        InvalidParameterError: an option outside its range.
    """

    norm1: Any
    attn: Any
    norm2: Any
    drop_path1: Any
    gather: Any
    infuse: Any
    norm_l: Any
    mlp_l: Any

    def __init__(
        self,
        block: Any,
        *,
        infuse: bool = True,
        lookup_mlp_div: float = 2.0,
        reuse: str = "transpose",
        infuse_prefix: bool = True,
        prefix: int = 0,
        qk_norm: bool = False,
        query_scale: str = "fixed",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        act_layer: Any = nn.GELU,
    ) -> None:
        super().__init__()
        check_choice("reuse", reuse, REUSE)
        check_choice("query_scale", query_scale, ("fixed", "per_dim"))
        qkv, dim = _check_block(block)
        number = isinstance(lookup_mlp_div, int | float) and not isinstance(lookup_mlp_div, bool)
        if not number or lookup_mlp_div <= 0 or int(dim / lookup_mlp_div) < 1:
            raise InvalidParameterError(
                f"lookup_mlp_div={lookup_mlp_div!r}: expected a number in (0, {dim}], the hidden width being {dim} / it"
            )
        # The block itself stays reachable for `restored`, but is no submodule: its keys must not appear twice.
        self.__dict__["host"] = block
        for name, child in block.named_children():
            self.add_module(name, child)
        attention: Any = block.attn
        made: dict[str, Any] = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
        shared = {"reuse": reuse, "proj_bias": attention.proj.bias is not None, "proj_drop": proj_drop, **made}
        norm1, norm2 = _fresh(block.norm1), _fresh(block.norm2)
        self.gather = LookupGather(
            norm1,
            dim,
            attention.num_heads,
            qkv_bias=qkv.bias is not None,
            qk_norm=qk_norm,
            query_scale=query_scale,
            attn_drop=attn_drop,
            **shared,
        )
        self.infuse = self.norm_l = self.mlp_l = None
        if infuse:
            skipped = 0 if infuse_prefix else prefix
            bias = qkv.bias is not None
            self.infuse = LookupInfusion(norm1, dim, attention.num_heads, bias=bias, prefix=skipped, **shared)
            self.norm_l = norm2
            self.mlp_l = Mlp(dim, int(dim / lookup_mlp_div), act_layer=act_layer, drop=proj_drop).to(**made)
        self.train(block.training)

    def forward(self, zp: Tensor, zl: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z_p (B, M', D) and z_l (B, N, D), both updated; `mask` (B, N) is True for lookup tokens that exist."""
        update, shared = self.gather(zp, zl, mask, self.infuse is not None)
        zp = zp + self.drop_path1(update)
        zp = Block.forward(self, zp)
        if self.infuse is None:
            return zp, zl
        zl = zl + self.drop_path1(self.infuse(zp, shared))
        zl = zl + self.drop_path1(self.mlp_l(self.norm_l(zl)))
        return zp, zl

    @torch.no_grad()
    def init_new_weights(self, init: str = "zero") -> None:
        """Start the new modules.

        "zero": copies of the host's norms and q, k, v; output projections 0, so that z_p is what the host alone makes
        of it. "copy": as "zero", with the host's output projection in both places. "random": truncated normal 0.02
        and zero biases, fresh norms, as a new timm ViT.

        Raises:
            InvalidParameterError: another `init`.
        """
        check_choice("init", init, WEIGHT_INIT)
        attention, gather, infuse = self.attn, self.gather, self.infuse
        new = [m for m in (gather, infuse, self.norm_l, self.mlp_l) if m is not None]
        for module in [m for top in new for m in top.modules()]:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if init == "random":
            return
        norm1, norm2 = self.norm1.state_dict(), self.norm2.state_dict()
        qkv, proj, dim = attention.qkv, attention.proj, gather.q.in_features
        for norm in (gather.norm_p, gather.norm_l, *([infuse.norm] if infuse is not None else [])):
            norm.load_state_dict(norm1)
        if self.norm_l is not None:
            self.norm_l.load_state_dict(norm2)
        _copy(gather.q, qkv, slice(0, dim))
        _copy(gather.kv, qkv, slice(dim, None))
        if infuse is not None:
            _copy(infuse.v, qkv, slice(2 * dim, None))
        for projection in (gather.proj, *([infuse.proj] if infuse is not None else [])):
            if init == "copy":
                _copy(projection, proj, slice(None))
            else:
                _zero(projection)
        if self.mlp_l is not None:
            _zero(self.mlp_l.fc2)

    def restored(self) -> nn.Module:
        """The host block, with its modules as they now are."""
        host = self.__dict__["host"]
        for name in list(host._modules):
            host._modules[name] = self._modules[name]
        return host.train(self.training)


def lookup_blocks(
    blocks: Sequence[nn.Module] | nn.Sequential, final_infusion: bool, **options: Any
) -> list[LookupBlock]:
    """A `LookupBlock` for each host block; the last one infuses only with `final_infusion`."""
    last = len(blocks) - 1
    return [LookupBlock(block, infuse=final_infusion or i < last, **options) for i, block in enumerate(blocks)]


def _check_block(block: Any) -> tuple[nn.Linear, int]:
    """The host's qkv projection and D; an error for what is not timm's plain block."""
    attention: Any = getattr(block, "attn", None)
    if type(block) is not Block or type(attention) is not Attention:
        raise UnsupportedModelError(
            f"a block of class {type(block).__name__} with {type(attention).__name__}: LookupViT needs timm's plain "
            "Block with Attention (norm, attention, norm, MLP in sequence)"
        )
    qkv, dim = attention.qkv, attention.proj.out_features
    if not isinstance(qkv, nn.Linear) or qkv.weight.shape != (3 * dim, dim):
        raise UnsupportedModelError(
            f"attention with qkv {qkv}: LookupViT needs one linear layer from {dim} to {3 * dim} channels, "
            "before it is quantised or given adapters"
        )
    if block._forward_hooks or block._forward_pre_hooks or "forward" in block.__dict__:
        raise UnsupportedModelError("the block has hooks or a forward of its own: remove them, and add them anew later")
    return qkv, dim


def _fresh(norm: nn.Module) -> nn.Module:
    """A copy that trains, also where the host is frozen."""
    return copy.deepcopy(norm).requires_grad_(True)


def _copy(target: nn.Linear, source: nn.Linear, rows: slice) -> None:
    target.weight.copy_(source.weight[rows])
    if target.bias is not None:
        target.bias.copy_(source.bias[rows])


def _zero(linear: nn.Linear) -> None:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)


def lookup_block_macs(
    lookup: int,
    compressed: int,
    dim: int,
    *,
    mlp_ratio: float = 4.0,
    lookup_mlp_div: float = 2.0,
    infuse: bool = True,
    infused: int | None = None,
) -> int:
    """Multiply-adds of a `LookupBlock` for one sample: N = `lookup`, M' = `compressed`, D = `dim`; exact.

    For p = 4, q = 2 that is (3 N M' + 2 M'^2) D + (4 N + 15 M') D^2. `infused`: compressed tokens that take part in the
    infusion, if not all.
    """
    n, m, d = lookup, compressed, dim
    gather = 2 * m * d * d + 2 * n * d * d + 2 * n * m * d
    refine = 4 * m * d * d + 2 * m * m * d + 2 * m * d * int(d * mlp_ratio + 1e-6)
    if not infuse:
        return gather + refine
    m = m if infused is None else infused
    return gather + refine + m * d * d + n * m * d + n * d * d + 2 * n * d * int(d / lookup_mlp_div + 1e-6)


def lookup_blocks_macs(blocks: Iterable[Any], lookup: int, compressed: int) -> int:
    """Multiply-adds of `LookupBlock`s for one sample of N = `lookup` and M' = `compressed` tokens; exact.

    Raises:
        InvalidParameterError: a block whose MLP is not timm's `Mlp`.
    """
    total = 0
    for block in blocks:
        if type(block.mlp) is not Mlp:
            raise InvalidParameterError(f"an MLP of class {type(block.mlp).__name__}: expected timm's Mlp")
        infuse, dim = block.infuse is not None, block.attn.proj.out_features
        total += lookup_block_macs(
            lookup,
            compressed,
            dim,
            mlp_ratio=block.mlp.fc1.out_features / dim,
            lookup_mlp_div=dim / block.mlp_l.fc1.out_features if infuse else 1.0,
            infuse=infuse,
            infused=compressed - block.infuse.prefix if infuse else None,
        )
    return total
