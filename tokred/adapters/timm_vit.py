"""timm vision transformers: `VisionTransformer` (also DeiT, registers, DINOv2), `Eva` (rotary, DINOv3) and `NaFlexVit`.

q and k are captured behind `attn.q_norm` / `attn.k_norm`, which every attention class of these models calls; the
models' own (fused) attention produces the output. Copied from timm are the two residual lines of a block, nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import apply_rot_embed_cat
from timm.models import eva, naflexvit, vision_transformer
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokred.adapters.encoder import (
    EncoderHost,
    ForwardState,
    Session,
    gather_positions,
    scoped_entries,
    slice_mask,
)
from tokred.core.errors import UnsupportedModelError
from tokred.core.sites import AttentionTap, EncoderInfo
from tokred.core.tokens import TokenTable

__all__ = ["TimmHost"]

_MODELS = (vision_transformer.VisionTransformer, eva.Eva, naflexvit.NaFlexVit)
_BLOCKS = (vision_transformer.Block, eva.EvaBlock, eva.EvaBlockPostNorm)
_ENTRIES = ("forward", "forward_features", "forward_intermediates", "forward_head", "pool", "_pool")


def extend_encoder(base: type) -> dict[str, Any]:
    return scoped_entries(base, _ENTRIES)


class TimmHost(EncoderHost):
    """timm's plain vision transformers."""

    family = "timm"
    classes = ("VisionTransformer", "VisionTransformerDistilled", "Eva", "NaFlexVit")
    refusals: ClassVar[dict[str, str]] = {
        "SwinTransformer": "windowed attention: tokens cannot leave a window",
        "ConvNeXt": "a convolutional network has no tokens",
        "Beit": "its attention adds a relative position bias indexed by the full grid",
        "Cait": "talking-heads attention with class attention blocks",
        "Xcit": "cross-covariance attention mixes channels, not tokens",
        "ParallelScalingBlock": "attention and MLP run in parallel: there is no point between them",
        "DiffAttention": "differential attention has two maps per head",
        "RelPosAttention": "its attention adds a relative position bias indexed by the full grid",
    }
    extend_encoder = staticmethod(extend_encoder)
    forms_matrix = True

    def __init__(self, model: nn.Module) -> None:
        self.encoder = model
        for layer, block in enumerate(self.blocks):
            _check_block(layer, block)
        self.info = _describe(model)
        embed: Any = getattr(model, "patch_embed", None) or model.embeds
        self.patch_size = tuple(embed.patch_size)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, _MODELS)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.blocks  # type: ignore[return-value]

    def tokens_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["x"]

    def attention_half(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = self.tokens_in(args, kwargs)
        rest = {key: value for key, value in kwargs.items() if key != "x"}
        if isinstance(block, eva.EvaBlockPostNorm):
            return x + block.drop_path1(block.norm1(block.attn(x, *args[1:], **rest)))
        y = block.attn(block.norm1(x), *args[1:], **rest)
        if isinstance(block, eva.EvaBlock):
            return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)
        return x + block.drop_path1(block.ls1(y))

    def mlp_half(self, block: Any, x: Tensor) -> Tensor:
        if isinstance(block, eva.EvaBlockPostNorm):
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        y = block.mlp(block.norm2(x))
        if isinstance(block, eva.EvaBlock):
            return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)
        return x + block.drop_path2(block.ls2(y))

    def slice_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Callable[[], Tensor], bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        x = self.tokens_in(args, kwargs)
        mask = slice_mask(kwargs.get("attn_mask"), positions, bias, x.dtype)
        if mask is not None or "attn_mask" in kwargs:
            kwargs["attn_mask"] = mask
        if kwargs.get("rope") is not None:
            rope = kwargs["rope"]  # (n, d), (H, n, d) mixed, or with a batch axis: (B, 1 | H, n, d)
            while rope.dim() < 4:
                rope = rope.unsqueeze(0)
            prefix = self.info.prefix
            kwargs["rope"] = gather_positions(rope, positions()[:, prefix:] - prefix, -2)
        return args, kwargs

    # -- scores ------------------------------------------------------------------------------------------------------

    def add_taps(self, session: Session, layer: int, wants: frozenset[str]) -> None:
        attention: Any = self.blocks[layer].attn
        capture = functools.partial(Capture, session, layer)
        add = session.handles.append
        add(attention.register_forward_pre_hook(CaptureInputs(session, layer), with_kwargs=True))
        add(attention.q_norm.register_forward_hook(capture("q")))
        add(attention.k_norm.register_forward_hook(capture("k")))
        if layer in session.formed:
            add(attention.attn_drop.register_forward_pre_hook(CaptureFirst(session, layer, "probabilities")))
        if "v" in wants:
            projection = attention.qkv if getattr(attention, "qkv", None) is not None else attention.v_proj
            add(projection.register_forward_hook(capture("v")))

    def read_tap(self, session: Session, layer: int, captured: dict[str, Any]) -> AttentionTap:
        attention: Any = self.blocks[layer].attn
        q, k = captured["q"], captured["k"]
        rope = captured["rope"]
        if rope is not None:
            q, k = self._rotate(attention, q, rope), self._rotate(attention, k, rope)
        v = captured.get("v")
        if v is None and "input_attn" in captured and "v" in session.rules[layer][0].taps:
            v = _values(attention, captured["input_attn"])
        elif v is not None:
            v = v[..., -k.shape[1] * self.info.head_dim :].unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        return AttentionTap(
            q, k, attention.scale, captured["mask"], v, captured.get("probabilities"), captured.get("input")
        )

    def _rotate(self, attention: Any, x: Tensor, rope: Tensor) -> Tensor:
        prefix = attention.num_prefix_tokens
        half = getattr(attention, "rotate_half", False)
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2).to(x.dtype)

    def prepare(self, session: Session) -> None:
        pool = getattr(self.encoder, "attn_pool", None)
        if isinstance(pool, nn.Module) and session.pool_by_size:
            session.handles.append(pool.register_forward_pre_hook(PoolBySize(session), with_kwargs=True))

    def form_matrix(self, layer: int, on: bool) -> None:
        attention: Any = self.blocks[layer].attn
        if on:
            attention.__dict__["_tokred_fused"] = attention.fused_attn
            attention.fused_attn = False
        else:
            attention.fused_attn = attention.__dict__.pop("_tokred_fused")

    # -- entry points ------------------------------------------------------------------------------------------------

    def observe(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        x = args[0] if args else kwargs.get("x", kwargs.get("patches"))
        valid = kwargs.get("patch_valid")
        if isinstance(x, dict):
            valid = x.get("patch_valid", valid)
        facts: dict[str, Any] = {}
        if valid is not None:
            facts["valid"] = valid.bool()
        embed = getattr(self.encoder, "patch_embed", None) or getattr(self.encoder, "embeds", None)
        if isinstance(x, Tensor) and x.dim() == 4 and name in ("forward", "forward_features", "forward_intermediates"):
            facts["grid"] = tuple(embed.dynamic_feat_size(tuple(x.shape[-2:])))  # type: ignore[union-attr]
        return facts

    def run_entry(
        self, session: Session, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name == "forward_intermediates":
            return self._intermediates(session, call, args, kwargs)
        if name in ("pool", "_pool"):
            return self._pool(session, call, args, kwargs)
        output = call(*args, **kwargs)
        if name == "forward_features":
            output = self._leave_features(session, output)
        return output

    def _leave_features(self, session: Session, output: Any) -> Any:
        """Restore the grid if asked; else tell a NaFlex head which of the kept patches are real."""
        scope = session.call.scope
        state = scope.state if scope is not None else None
        if state is None or not state.table.steps:
            return output
        table = state.table
        if isinstance(output, dict):
            if session.exit == "restore":
                return {**output, "patches": self.restore(session, output["patches"], table)}
            return {**output, "patch_valid": table.valid}
        return self.restore(session, output, table) if session.exit == "restore" else output

    def _pool(self, session: Session, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pool merged tokens by their sizes: the mean over tokens becomes the mean over what they represent."""
        scope = session.call.scope
        state = scope.state if scope is not None else None
        x, args = args[0], args[1:]
        sizes = state.table.sizes if state is not None and session.pool_by_size else None
        model: Any = self.encoder
        prefix = self.info.prefix
        if sizes is None or x.shape[1] != sizes.shape[1] + prefix:
            return call(x, *args, **kwargs)
        if model.attn_pool is not None:
            return call(x, *args, **kwargs)  # `PoolBySize` weighs its logits
        pool_type = args[0] if args else kwargs.get("pool_type") or model.global_pool
        others = {key: value for key, value in kwargs.items() if key != "pool_type"}
        if pool_type not in ("avg", "avgmax"):
            return call(x, *args, **kwargs)
        include = getattr(model, "pool_include_prefix", False)
        weight = torch.cat([sizes.new_ones(sizes.shape[0], prefix), sizes], dim=1)
        counted = weight if include else sizes
        weight = weight * (counted.shape[1] / counted.sum(dim=1, keepdim=True))
        mean = call((x.float() * weight[..., None]).to(x.dtype), "avg", **others)
        return mean if pool_type == "avg" else 0.5 * (call(x, "max", **others) + mean)

    def _intermediates(
        self, session: Session, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Intermediates on the full grid: a reduced sequence would be reshaped into wrong channels silently."""
        wanted = kwargs.get("output_fmt", args[5] if len(args) > 5 else "NCHW")
        restore = wanted == "NCHW" or session.exit == "restore"
        if len(args) > 5:
            args = (*args[:5], "NLC", *args[6:])
        else:
            kwargs = {**kwargs, "output_fmt": "NLC"}
        output = call(*args, **kwargs)
        if not restore:
            return output
        scope = session.call.scope
        state = scope.state if scope is not None else None
        if state is None:  # stopped before the first block that reduces
            grid = scope.facts.get("grid") if scope is not None else None
            state = ForwardState(TokenTable(0, 0, grid=grid or self.info.grid))
        indices = kwargs.get("indices", args[1] if len(args) > 1 else None)
        layers = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))  # in the order of the blocks
        reshape = functools.partial(self._intermediate, session, state, wanted)
        if isinstance(output, dict):
            features = [reshape(layer, y) for layer, y in zip(layers, output["image_intermediates"], strict=True)]
            output = {**output, "image_intermediates": features}
            if "image_features" in output and session.exit == "restore":
                output["image_features"] = self.restore(session, output["image_features"], state.table)
            return output
        final, features = (None, output) if isinstance(output, list) else output
        features = [reshape(layer, y) for layer, y in zip(layers, features, strict=True)]
        if final is None:
            return features
        if session.exit == "restore":
            final = self.restore(session, final, state.table)
        return final, features

    def _intermediate(self, session: Session, state: Any, wanted: str, layer: int, y: Any) -> Any:
        tokens, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        table = state.after(layer)
        tokens = table.restore(tokens, session.fill)
        if wanted == "NCHW":
            if table.grid is None:
                raise UnsupportedModelError("the tokens of this input form no grid; ask for output_fmt='NLC'")
            tokens = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *table.grid).contiguous()
        return tokens if rest is None else (tokens, *rest)


class Capture:
    """Forward hook: keep the output of a module as part of the layer's tap."""

    def __init__(self, session: Session, layer: int, name: str) -> None:
        self.session, self.layer, self.name = session, layer, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.session.call.taps[self.layer][self.name] = output


class CaptureFirst:
    """Forward pre-hook: keep the first positional input of a module as part of the layer's tap."""

    def __init__(self, session: Session, layer: int, name: str) -> None:
        self.session, self.layer, self.name = session, layer, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.session.call.taps[self.layer][self.name] = args[0]


class CaptureInputs:
    """Forward pre-hook of an attention module: keep its input, rotary table and mask."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session, self.layer = session, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("is_causal"):
            raise UnsupportedModelError("token scores are not defined under causal attention (is_causal=True)")
        tap = self.session.call.taps[self.layer]
        tap["input_attn"] = args[0]
        tap["rope"] = kwargs.get("rope")
        tap["mask"] = kwargs.get("attn_mask")


class PoolBySize:
    """Forward pre-hook of an attention pool: log size on the logits of each token."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scope, x = self.session.call.scope, args[0]
        sizes = scope.state.table.sizes if scope is not None and scope.state is not None else None
        if sizes is None or x.shape[1] < sizes.shape[1]:
            return None
        ones = sizes.new_ones(sizes.shape[0], x.shape[1] - sizes.shape[1])  # prefix tokens, where the pool reads them
        bias = torch.cat([ones, sizes], dim=1).log()[:, None, None].to(x.dtype)
        mask = kwargs.get("attn_mask")
        return args, {**kwargs, "attn_mask": bias if mask is None else mask + bias}


def _values(attention: Any, x: Tensor) -> Tensor:
    """(B, H, N, d): v of EVA's fused projection, which is applied without its module (bias in three parts)."""
    width = attention.num_heads * attention.head_dim
    v = nn.functional.linear(x, attention.qkv.weight[2 * width :], attention.v_bias)
    return v.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _check_block(layer: int, block: nn.Module) -> None:
    attention = getattr(block, "attn", None)
    name = type(attention).__name__
    served = isinstance(block, _BLOCKS) and all(hasattr(attention, part) for part in ("q_norm", "k_norm", "attn_drop"))
    if not served or name in ("RelPosAttention", "DiffAttention"):
        reason = TimmHost.refusals.get(type(block).__name__) or TimmHost.refusals.get(name)
        raise UnsupportedModelError(
            f"block {layer} is a {type(block).__name__} with {name}, which tokred does not serve"
            + (f": {reason}" if reason else "; served are Block, EvaBlock and EvaBlockPostNorm with q/k taps")
        )


def _describe(model: Any) -> EncoderInfo:
    block = model.blocks[0]
    attention = block.attn
    dim, heads, head_dim = model.embed_dim, attention.num_heads, attention.head_dim
    kv_heads = getattr(attention, "num_kv_heads", heads)
    embed = getattr(model, "patch_embed", None) or model.embeds
    grid = tuple(getattr(embed, "grid_size", None) or ()) or None
    tokens = grid[0] * grid[1] if grid else 0
    projection = embed.proj
    gate = attention.gate.weight.numel() if getattr(attention, "gate", None) is not None else 0
    names = ("qkv", "q_proj", "k_proj", "v_proj", "proj")
    projections = [getattr(attention, part, None) for part in names]
    head = sum(m.weight.numel() for m in (model.head, getattr(model, "head_dist", None)) if isinstance(m, nn.Linear))
    return EncoderInfo(
        depth=len(model.blocks),
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        prefix=model.num_prefix_tokens,
        class_tokens=_class_tokens(model),
        tokens=tokens,
        grid=grid,  # type: ignore[arg-type]
        attention_macs=sum(p.weight.numel() for p in projections if p is not None) + gate,
        mlp_macs=sum(m.weight.numel() for m in block.mlp.modules() if isinstance(m, nn.Linear)),
        embed_macs=projection.weight.numel(),
        head_macs=head + _pool_macs(model, each_token=False),
        pool_macs=_pool_macs(model, each_token=True),
    )


def _class_tokens(model: Any) -> int:
    if getattr(model, "dist_token", None) is not None:
        return 2
    embeds = getattr(model, "embeds", model)
    return int(getattr(embeds, "cls_token", None) is not None)


def _pool_macs(model: Any, each_token: bool) -> int:
    """Multiply-adds of an attention pool: per token (keys, values, two products) or once (the rest)."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0
    linears = {name: m.weight.numel() for name, m in pool.named_modules() if isinstance(m, nn.Linear)}
    per_token = linears.pop("kv", 0) + 2 * model.embed_dim
    return per_token if each_token else sum(linears.values())
