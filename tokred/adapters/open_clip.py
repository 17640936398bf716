"""open_clip's own vision towers: `VisionTransformer`, alone or inside CLIP, CustomTextCLIP and CoCa.

Towers that open_clip borrows from timm (`TimmModel`: SigLIP, PE, EVA) are served by the timm host, through `trunk`.

`nn.MultiheadAttention` keeps q, k and v to itself. In the blocks that are scored, or that weigh keys by size, its class
is swapped for one that projects them once, for output and score: computing k a second time costs 8 % of a block, q as
much again. Every other block calls it as it is. open_clip's own `Attention` hands them out behind `ln_q` and `ln_k`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from open_clip.utils import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from tokred.adapters.encoder import EncoderHost, ForwardState, Session, scoped_entries, slice_mask
from tokred.core.errors import InvalidParameterError, UnsupportedModelError
from tokred.core.sites import AttentionTap, EncoderInfo

__all__ = ["OpenClipHost"]

_PREFIX = 1  # the class token, which every tower of this class has
_ENTRIES = ("forward", "forward_intermediates", "_pool", "_global_pool")


def extend_encoder(base: type) -> dict[str, Any]:
    return scoped_entries(base, _ENTRIES)


def extend_attention(base: type) -> dict[str, Any]:
    """An `nn.MultiheadAttention` that shows its session what it works on."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        session, layer = self._tokred_seat.session, self._tokred_seat.layer
        mask = kwargs.get("attn_mask")
        if not _acts_here(session, layer, mask):
            return base.forward(self, query, *args, **kwargs)  # type: ignore[attr-defined]
        # open_clip asks for no weights, but a hook that somebody draws attention maps with does
        y, matrix = attend(session, layer, self, query, mask, kwargs.get("need_weights", True))
        return y, matrix.mean(dim=1) if matrix is not None and kwargs.get("average_attn_weights", True) else matrix

    return {"forward": forward}


class OpenClipHost(EncoderHost):
    """open_clip's native vision transformers."""

    family = "open_clip"
    classes = ("VisionTransformer",)
    refusals: ClassVar[dict[str, str]] = {
        "ModifiedResNet": "a convolutional network has no tokens until its attention pool",
        "TextTransformer": "a text tower; its tokens are words under a causal mask",
        "MultimodalTransformer": "a text decoder; it reads image tokens that the vision tower has pooled already",
        "scaled_cosine_attn": "open_clip's scaled cosine attention multiplies 4-D tensors by torch.bmm: it cannot run",
    }
    extend_encoder = staticmethod(extend_encoder)

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, ModifiedResNet):
            raise _refused("ModifiedResNet")
        self.encoder = model
        for layer, block in enumerate(self.blocks):
            _check_block(layer, block)
        self.info = _describe(model)
        self.patch_size = tuple(model.patch_size)  # type: ignore[arg-type, assignment]

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, (VisionTransformer, ModifiedResNet))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.transformer.resblocks  # type: ignore[union-attr, return-value]

    @property
    def forms_matrix(self) -> bool:  # type: ignore[override]
        return isinstance(self.blocks[0].attn, nn.MultiheadAttention)

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        own: Any = self.encoder.image_size
        if tuple(size) != tuple(own):
            raise InvalidParameterError(
                f"image size {tuple(size)}: the position table of this tower is for {tuple(own)}"
            )
        return super().grid_for(size)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _turn(self, x: Tensor) -> Tensor:
        """Between a block's layout and (B, N, C); the same step both ways."""
        return x if self.encoder.transformer.batch_first else x.transpose(0, 1)  # type: ignore[union-attr]

    def tokens_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._turn(_input(args, kwargs))

    def tokens_out(self, output: Any) -> Tensor:
        return self._turn(output)

    def with_tokens(self, output: Any, x: Tensor) -> Any:
        return self._turn(x)

    def attention_half(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, mask = _input(args, kwargs), _mask(block, args, kwargs)
        if isinstance(block, CustomResidualAttentionBlock):
            return self._turn(x + block.ls_1(block.ln_attn(block.attn(block.ln_1(x), attn_mask=mask))))
        return self._turn(x + block.ls_1(block.attention(q_x=block.ln_1(x), attn_mask=mask)))

    def mlp_half(self, block: Any, x: Tensor) -> Tensor:
        return self._turn(x + block.ls_2(block.mlp(block.ln_2(x))))

    def slice_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Callable[[], Tensor], bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        at = _mask_position(self.blocks[0])
        if _mask(self.blocks[0], args, kwargs) is not None:
            raise _mask_of_the_caller()
        if bias is None:
            return args, kwargs
        x = _input(args, kwargs)
        return args[:at], {**kwargs, "attn_mask": slice_mask(None, positions, bias, x.dtype)}

    # -- scores ------------------------------------------------------------------------------------------------------

    def prepare(self, session: Session) -> None:
        if session.size_bias:
            for layer in range(min(session.rules), self.info.depth):
                if layer not in session.rules:
                    self._open(session, layer)
        encoder: Any = self.encoder
        if encoder.attn_pool is not None and session.pool_by_size:
            pools = [encoder.attn_pool]
            if getattr(encoder, "attn_pool_type", "") == "parallel":  # "cascade" pools the queries of the first pool
                pools.append(encoder.attn_pool_contrastive)
            for pool in pools:
                handle = pool.attn.register_forward_pre_hook(PoolBySize(session), with_kwargs=True)
                session.handles.append(handle)

    def _open(self, session: Session, layer: int) -> None:
        """Let the attention of a layer show q, k and v and take a bias by key; open_clip's own does as it is."""
        attention: Any = self.blocks[layer].attn
        if isinstance(attention, nn.MultiheadAttention):
            session.seat(attention, layer, extend_attention)

    def add_taps(self, session: Session, layer: int, wants: frozenset[str]) -> None:
        if not wants and not session.size_bias:
            return
        self._open(session, layer)
        attention: Any = self.blocks[layer].attn
        if isinstance(attention, Attention):
            add = session.handles.append
            add(attention.register_forward_pre_hook(CaptureInputs(session, layer), with_kwargs=True))
            add(attention.ln_q.register_forward_hook(Capture(session, layer, "q")))
            add(attention.ln_k.register_forward_hook(Capture(session, layer, "k")))

    def read_tap(self, session: Session, layer: int, captured: dict[str, Any]) -> AttentionTap:
        attention: Any = self.blocks[layer].attn
        q, k, v = captured["q"], captured["k"], captured.get("v")
        if v is None and "v" in session.rules[layer][0].taps:
            v = _project(attention, captured["input_attn"], parts=slice(2, 3))[0]
        probabilities, x = captured.get("probabilities"), captured.get("input")
        return AttentionTap(q, k, self.info.head_dim**-0.5, captured["mask"], v, probabilities, x)

    # -- entry points ------------------------------------------------------------------------------------------------

    def run_entry(
        self, session: Session, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name == "forward_intermediates":
            return self._intermediates(session, call, args, kwargs)
        state = _state(session)
        if name == "_pool" and session.exit == "restore" and state is not None:
            return call(self.restore(session, args[0], state.table), *args[1:], **kwargs)
        if name == "_global_pool":
            return self._global_pool(session, call, *args, **kwargs)
        return call(*args, **kwargs)

    def _global_pool(self, session: Session, call: Callable[..., Any], x: Tensor) -> Any:
        """Average merged tokens by their sizes: the mean over tokens becomes the mean over what they represent."""
        pooled, tokens = call(x)
        encoder: Any = self.encoder
        sizes = _sizes(session, x)
        if encoder.pool_type == "avg" and encoder.attn_pool is None and sizes is not None:
            weights = sizes / sizes.sum(dim=1, keepdim=True)
            pooled = (x[:, _PREFIX:].float() * weights[..., None]).sum(dim=1).to(x.dtype)
        return pooled, tokens

    def _intermediates(
        self, session: Session, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Intermediates on the full grid: a reduced sequence would be reshaped into wrong channels silently."""
        wanted = args[5] if len(args) > 5 else kwargs.get("output_fmt", "NCHW")
        if wanted not in ("NCHW", "NLC"):
            return call(*args, **kwargs)  # which says what is wrong
        if len(args) > 5:
            args = (*args[:5], "NLC", *args[6:])
        else:
            kwargs = {**kwargs, "output_fmt": "NLC"}
        output = call(*args, **kwargs)
        if wanted == "NLC" and session.exit == "reduced":
            return output
        indices = args[1] if len(args) > 1 else kwargs.get("indices")
        layers = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))  # in the order of the blocks
        features = zip(layers, output["image_intermediates"], strict=True)
        reshape = functools.partial(self._intermediate, session, wanted)
        return {**output, "image_intermediates": [reshape(layer, y) for layer, y in features]}

    def _intermediate(self, session: Session, wanted: str, layer: int, y: Tensor) -> Tensor:
        state = _state(session)  # None where the tower stopped before the first reduction
        grid = self.info.grid
        if state is not None:
            table = state.after(layer)
            y, grid = table.restore(y, session.fill), table.grid
        if wanted == "NLC":
            return y
        if grid is None or grid[0] * grid[1] != y.shape[1]:
            raise UnsupportedModelError("these tokens form no grid (patch dropout); ask for output_fmt='NLC'")
        return y.transpose(1, 2).reshape(y.shape[0], -1, *grid).contiguous()


def _acts_here(session: Session, layer: int, mask: Tensor | None) -> bool:
    """Whether this call comes from a block of a pass that weighs its keys or removes tokens there."""
    state = session.call.running.get(layer)
    if state is None:
        return False
    method, rule = session.rules.get(layer, (None, None))
    return mask is not None or (method is not None and method.acts(state.entry[layer].count, rule))


def attend(
    session: Session, layer: int, attention: Any, x: Tensor, mask: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Self-attention by the parameters of an `nn.MultiheadAttention`, in its layout; fills the layer's tap.

    Args:
        x: (B, N, C), or (N, B, C) where it is not `batch_first`.
        mask: None or additive, broadcastable to (B, H, N, N); `nn.MultiheadAttention` itself takes no (B, 1, 1, N).

    Returns:
        The output, in the layout of x, and where it was formed the attention matrix (B, H, N, N).
    """
    if mask is not None and mask.dim() != 4:
        raise _mask_of_the_caller()
    if not attention.batch_first:
        x = x.transpose(0, 1)
    q, k, v = _project(attention, x)
    dropout = attention.dropout if attention.training else 0.0
    matrix = None
    if need_weights or layer in session.formed:
        logits = (q * attention.head_dim**-0.5) @ k.transpose(-2, -1)
        matrix = (logits if mask is None else logits + mask).softmax(dim=-1, dtype=torch.float32)
        y = F.dropout(matrix.to(v.dtype), dropout) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if layer in session.rules:
        session.call.taps[layer].update(q=q, k=k, v=v, mask=mask, probabilities=matrix)
    y = F.linear(y.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)
    return y if attention.batch_first else y.transpose(0, 1), matrix


class Capture:
    """Forward hook: keep the output of a module as part of the layer's tap."""

    def __init__(self, session: Session, layer: int, name: str) -> None:
        self.session, self.layer, self.name = session, layer, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.layer in self.session.call.running:
            self.session.call.taps[self.layer][self.name] = output


class CaptureInputs:
    """Forward pre-hook of open_clip's own attention: keep its input and mask."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session, self.layer = session, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.layer in self.session.call.running:
            self.session.call.taps[self.layer].update(input_attn=args[0], mask=kwargs.get("attn_mask"))


class PoolBySize:
    """Forward pre-hook of an attention pool's `nn.MultiheadAttention`: log size on the logits of each token."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = args[1]
        sizes = _sizes(self.session, tokens)
        if sizes is None:
            return None
        bias = torch.cat([sizes.new_ones(sizes.shape[0], _PREFIX), sizes], dim=1).log()
        # a float mask of this name is a bias by key, and broadcasts over heads and queries
        return args, {**kwargs, "key_padding_mask": bias.to(tokens.dtype)}


def _state(session: Session) -> ForwardState | None:
    scope = session.call.scope
    return scope.state if scope is not None else None


def _sizes(session: Session, x: Tensor) -> Tensor | None:
    """(B, n) sizes of the tokens x (B, 1 + n, C) that a pool should weigh, or None."""
    state = _state(session)
    sizes = state.table.sizes if state is not None and session.pool_by_size else None
    return sizes if sizes is not None and x.shape[1] == _PREFIX + sizes.shape[1] else None


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if args:
        return args[0]
    return kwargs["q_x"] if "q_x" in kwargs else kwargs["x"]


def _mask_position(block: nn.Module) -> int:
    """Where `attn_mask` stands in the forward of a block: behind k_x and v_x, if it has them."""
    return 1 if isinstance(block, CustomResidualAttentionBlock) else 3


def _mask(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    at = _mask_position(block)
    return args[at] if len(args) > at else kwargs.get("attn_mask")


def _project(attention: Any, x: Tensor, parts: slice = slice(0, 3)) -> Sequence[Tensor]:
    """(parts, B, H, N, d): q, k and v of tokens (B, N, C), or a part of them."""
    weight = attention.in_proj_weight.unflatten(0, (3, -1))[parts]
    bias = attention.in_proj_bias
    bias = None if bias is None else bias.unflatten(0, (3, -1))[parts].flatten()
    y = F.linear(x, weight.flatten(0, 1), bias)
    return y.unflatten(-1, (weight.shape[0], attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _mask_of_the_caller() -> UnsupportedModelError:
    return UnsupportedModelError("an attention mask given to the blocks of a vision tower is not followed")


def _refused(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} is refused by the open_clip host: {OpenClipHost.refusals[name]}")


def _check_block(layer: int, block: nn.Module) -> None:
    attention: Any = getattr(block, "attn", None)
    served = isinstance(block, (ResidualAttentionBlock, CustomResidualAttentionBlock))
    if isinstance(attention, Attention):
        if attention.logit_scale is not None:
            raise _refused("scaled_cosine_attn")
    elif not isinstance(attention, nn.MultiheadAttention):
        served = False  # say, a LoRA wrapper, which applies weights of its own
    elif attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        served = False
    if not served or hasattr(block, "ln_1_kv"):
        raise UnsupportedModelError(
            f"block {layer} is a {type(block).__name__} with {type(attention).__name__}, which tokred does not serve; "
            "served are ResidualAttentionBlock and CustomResidualAttentionBlock with attention as open_clip makes it"
        )


def _describe(model: Any) -> EncoderInfo:
    block = model.transformer.resblocks[0]
    attention = block.attn
    rows, columns = model.grid_size
    linears = [module for module in block.mlp.modules() if isinstance(module, nn.Linear)]
    head_macs, pool_macs = _head_macs(model)
    return EncoderInfo(
        depth=len(model.transformer.resblocks),
        dim=model.transformer.width,
        heads=attention.num_heads,
        kv_heads=attention.num_heads,
        head_dim=attention.head_dim,
        prefix=_PREFIX,
        class_tokens=1,
        tokens=rows * columns,
        grid=(rows, columns),
        attention_macs=attention.in_proj_weight.numel() + attention.out_proj.weight.numel(),
        mlp_macs=sum(linear.weight.numel() for linear in linears),
        embed_macs=model.conv1.weight.numel(),
        head_macs=head_macs,
        pool_macs=pool_macs,
    )


def _head_macs(model: Any) -> tuple[int, int]:
    """Multiply-adds of pooling and projection: (per image, per patch token that reaches them)."""
    fixed = each = 0
    projected = 1
    if model.attn_pool is not None:
        queries = model.attn_pool.query.shape[0]
        pools = [(model.attn_pool, True)]
        if model.attn_pool_contrastive is not None:
            pools.append((model.attn_pool_contrastive, model.attn_pool_type == "parallel"))
        elif model.pool_type == "none":
            projected = queries
        for pool, reads_tokens in pools:
            once, per_key = _pooler_macs(pool)
            fixed += once + per_key * (_PREFIX if reads_tokens else queries)
            each += per_key * reads_tokens
    projection = model.proj.numel() if model.proj is not None else 0
    if model.pool_type == "none" and model.attn_pool is None:
        return fixed + _PREFIX * projection, each + projection
    return fixed + projected * projection, each


def _pooler_macs(pooler: Any) -> tuple[int, int]:
    """Multiply-adds of an attention pool: (once, for each key)."""
    queries, dim = pooler.query.shape
    return 2 * queries * dim**2, 2 * pooler.attn.kdim * dim + 2 * queries * dim
