"""transformers vision encoders: ViT, DeiT, CLIP, SigLIP (1 and 2), DINOv2 (with registers) and DINOv3, at any wrapper.

q and k are captured behind `q_proj` / `k_proj` of the layers that a method scores, and rotated by the model's own
function where it has one. The attention implementation is neither changed nor looked into: whichever the user chooses,
before or after patching, produces the output, and nothing of ours can reach a config. Copied from transformers are the
two residual lines of a layer, nothing else (`tests/hosts/test_hf_vision.py` fails when they change).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokred.adapters.encoder import EncoderHost, Session, gather_positions, scoped_entries, slice_mask
from tokred.core.errors import InvalidParameterError, UnsupportedModelError
from tokred.core.method import Method
from tokred.core.sites import AttentionTap, EncoderInfo
from tokred.core.tokens import TokenTable

__all__ = ["HFVisionHost"]

#: encoders, by the class that owns embeddings and layers
_ENCODERS = frozenset({
    "ViTModel", "ViTMSNModel", "IJepaModel", "DeiTModel",
    "CLIPVisionModel", "MetaClip2VisionModel", "AltCLIPVisionModel", "ChineseCLIPVisionModel",
    "SiglipVisionModel", "Siglip2VisionModel",
    "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel",
})  # fmt: skip
#: encoders that hand out feature maps of several layers on the grid
_BACKBONES = frozenset({"Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone"})
#: models around an encoder that average its patch tokens, and those that lay them out on the grid
_AVERAGING = frozenset({
    "CLIPForImageClassification", "MetaClip2ForImageClassification", "IJepaForImageClassification",
    "SiglipForImageClassification", "Siglip2ForImageClassification",
    "Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification",
})  # fmt: skip
_RECONSTRUCTING = frozenset({"ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"})
_READING_CLASS = frozenset({
    "ViTForImageClassification", "ViTMSNForImageClassification", "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
})  # fmt: skip
_WRAPPERS = _AVERAGING | _RECONSTRUCTING | _READING_CLASS

#: the parts of a layer under the names that transformers gives them
_FIRST_NORM = ("layernorm_before", "layer_norm1", "norm1")
_SECOND_NORM = ("layernorm_after", "layer_norm2", "norm2")
_ATTENTION = ("attention", "self_attn")


def extend_encoder(base: type) -> dict[str, Any]:
    return scoped_entries(base, ("forward",))


def extend_wrapper(base: type) -> dict[str, Any]:
    """A wrapper whose forward opens the scope, so that the encoder knows how its tokens will be pooled."""
    inherited = base.forward  # type: ignore[attr-defined]

    @functools.wraps(inherited)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._tokred_seat.session.run_entry("wrapper", functools.partial(inherited, self), args, kwargs)

    return {"forward": forward}


class HFVisionHost(EncoderHost):
    """Plain vision transformers of transformers.

    Attributes:
        wrapper: the model around the encoder, where it pools patch tokens or reads them as a grid; else None.
        stack: the module that owns the list of layers.
    """

    family = "transformers vision"
    classes = tuple(sorted(_ENCODERS | _BACKBONES))
    refusals: ClassVar[dict[str, str]] = {
        "Swin": "windowed attention: tokens cannot leave a window",
        "Hiera": "attention in mask units and pooling between stages: tokens cannot leave a unit",
        "VitDet": "windowed attention: tokens cannot leave a window",
        "SamModel": "windowed attention with decomposed relative positions of the full grid",
        "SamVision": "windowed attention with decomposed relative positions of the full grid",
        "Beit": "its attention adds a relative position bias indexed by the full grid",
        "Data2VecVision": "its attention adds a relative position bias indexed by the full grid",
        "Cvt": "convolutional projections inside attention need the full grid",
        "Levit": "its attention adds a bias indexed by the full grid, and it shrinks the grid between stages",
        "Pvt": "spatial reduction inside attention needs the full grid",
        "Segformer": "spatial reduction inside attention needs the full grid",
        "MobileViT": "convolutions between its attention blocks need the full grid",
        "ConvNext": "a convolutional network has no tokens",
        "DINOv3ConvNext": "a convolutional network has no tokens",
        "ResNet": "a convolutional network has no tokens",
        "ViTMAE": "its embedding masks and shuffles patches at random, so tokens are no longer cells of the grid",
        "Yolos": "detection tokens stand behind the patches, and positions are added between the layers",
    }
    extend_encoder = staticmethod(extend_encoder)

    def __init__(self, model: nn.Module) -> None:
        inside = None if _is_encoder(model) else _wrapped(model)
        self.wrapper = model if inside is not None else None
        self.encoder = inside if inside is not None else model
        self.stack: Any = _stack(self.encoder)
        for layer, block in enumerate(self.blocks):
            _check_layer(layer, block)
        self.averages = _named(model, _AVERAGING)
        self.on_grid = _named(model, _RECONSTRUCTING | _BACKBONES)
        self.feeds_decoder = False
        self.weighs_keys = False
        config: Any = self.encoder.config
        self.patch_size = _pair(config.patch_size)
        self.names = {
            "forward": _parameters(self.encoder),
            "wrapper": _parameters(model),
            "layer": _parameters(self.blocks[0]),
            "attention": _parameters(_part(self.blocks[0], _ATTENTION)),
        }
        self.info = _describe(self)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _is_encoder(model) or _wrapped(model) is not None

    def place(self, root: nn.Module) -> None:
        """A model with image placeholders in its prompt expects as many features as it reserved."""
        config = getattr(root, "config", None)
        self.feeds_decoder = any(
            getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index")
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.stack.layers if hasattr(self.stack, "layers") else self.stack.layer

    @property
    def implementation(self) -> str:
        """Name of the attention implementation at this moment."""
        return getattr(self.encoder.config, "_attn_implementation", None) or "eager"

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]  # a remainder is not embedded

    def default_exit(self) -> str:
        return "restore" if self.on_grid or self.feeds_decoder else "reduced"

    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Session:
        if self.on_grid and options.get("exit") == "reduced":
            raise InvalidParameterError(
                f"exit='reduced': {type(self.wrapper or self.encoder).__name__} lays its tokens out on the grid; "
                "leave exit='restore', or patch the encoder itself"
            )
        self.weighs_keys = any(getattr(method, "proportional_attention", False) for method in methods)
        if self.weighs_keys:
            self._require_bias()
        session = super().attach(methods, options)
        try:
            if session.rules:
                self._attach_outside_layers(session)
        except BaseException:
            session.remove()
            raise
        return session

    def _attach_outside_layers(self, session: Session) -> None:
        """Whatever reads the tokens behind the last layer: attention pooling, feature maps, a mean, a grid."""
        head = getattr(self.encoder, "head", None)
        pool = getattr(head, "attention", None)
        add = session.handles.append
        if isinstance(head, nn.Module) and isinstance(pool, nn.MultiheadAttention):
            add(head.register_forward_pre_hook(BeforePool(session), with_kwargs=True))
            add(pool.register_forward_pre_hook(PoolBias(session), with_kwargs=True))
        if _named(self.encoder, _BACKBONES):
            add(self.stack.register_forward_hook(RestoreStack(session)))
        if self.wrapper is not None and self.averages:
            session.seat(self.wrapper, -1, extend_wrapper)

    # -- layers ------------------------------------------------------------------------------------------------------

    def attention_half(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = self._given("layer", args, kwargs)
        x = given.pop("hidden_states")
        y = _part(block, _ATTENTION)(_part(block, _FIRST_NORM)(x), **given)
        return _branch(block, y[0] if isinstance(y, tuple) else y, "layer_scale1") + x

    def mlp_half(self, block: Any, x: Tensor) -> Tensor:
        return _branch(block, block.mlp(_part(block, _SECOND_NORM)(x)), "layer_scale2") + x

    def slice_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Callable[[], Tensor], bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self._given("layer", args, kwargs)
        x = given["hidden_states"]
        if self._packs():
            given["attention_mask"] = self._packed_mask(given.get("attention_mask"), positions, bias)
        else:
            given["attention_mask"] = slice_mask(given.get("attention_mask"), positions, bias, x.dtype)
        rotary = given.get("position_embeddings")
        if rotary is not None:  # cos and sin, each (n, d): of the patch tokens only
            patches = positions()[:, self.info.prefix :] - self.info.prefix
            given["position_embeddings"] = tuple(gather_positions(table[None, None], patches, -2) for table in rotary)
        # the tokens stay positional: reentrant checkpointing and the capture of hidden states find them there
        return (given.pop("hidden_states"),), given

    def _given(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**dict(zip(self.names[what], args, strict=False)), **kwargs}

    def _packs(self) -> bool:
        """Whether attention takes no additive mask: flash attention wants (B, N), flex attention a mask of blocks."""
        return "flash" in self.implementation or "flex" in self.implementation

    def _require_bias(self) -> None:
        if self._packs():
            raise UnsupportedModelError(
                f"attention implementation {self.implementation!r} takes no bias on its logits, which proportional "
                "attention (+ log size) needs; use model.set_attn_implementation('sdpa'), or ToMe(prop_attn=False)"
            )

    def _packed_mask(self, mask: Any, positions: Callable[[], Tensor], bias: Tensor | None) -> Tensor | None:
        """(B, N') mask of real tokens, 1 or True, for implementations without an additive mask."""
        if self.weighs_keys:
            self._require_bias()
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or "flex" in self.implementation):
            raise UnsupportedModelError(
                f"a mask of attention implementation {self.implementation!r} cannot be cut to the remaining tokens; "
                "use model.set_attn_implementation('sdpa')"
            )
        if mask is not None:
            mask = mask.gather(1, positions())
        if bias is None:
            return mask
        present = bias > float("-inf")
        if "flex" in self.implementation:
            raise UnsupportedModelError("padded images under flex attention; use model.set_attn_implementation('sdpa')")
        return present if mask is None else (mask.bool() & present).to(mask.dtype)

    # -- scores ------------------------------------------------------------------------------------------------------

    def add_taps(self, session: Session, layer: int, wants: frozenset[str]) -> None:
        attention: Any = _part(self.blocks[layer], _ATTENTION)
        add = session.handles.append
        if wants & {"qk", "v"}:
            add(attention.register_forward_pre_hook(CaptureContext(session, layer), with_kwargs=True))
        for name in ("q", "k", "v"):
            if ("v" if name == "v" else "qk") in wants:
                projection = getattr(attention, f"{name}_proj")
                add(projection.register_forward_hook(Capture(session, layer, name, attention)))

    def read_tap(self, session: Session, layer: int, captured: dict[str, Any]) -> AttentionTap:
        attention: Any = _part(self.blocks[layer], _ATTENTION)
        if "q" not in captured or "k" not in captured:
            raise UnsupportedModelError(
                f"layer {layer}: attention ran without the q_proj and k_proj that it had when the model was patched "
                "(replaced or fused since then), so there are no scores; change the model first, then patch it"
            )
        if captured["is_causal"]:
            raise UnsupportedModelError("token scores are not defined under causal attention (is_causal=True)")
        q, k = self._heads(captured["q"]), self._heads(captured["k"])
        if captured["rotary"] is not None:
            rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
            q, k = rotate(q, k, *captured["rotary"])
        v = captured.get("v")
        mask = captured["mask"]
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()[:, None, None]
        scale = attention.scaling if hasattr(attention, "scaling") else attention.scale
        block_input = captured.get("input")
        return AttentionTap(q, k, scale, mask, None if v is None else self._heads(v), block_input=block_input)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.info.head_dim)).transpose(1, 2)

    # -- entry points ------------------------------------------------------------------------------------------------

    def observe(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self._given(name, args, kwargs)
        pixels, shapes = given.get("pixel_values"), given.get("spatial_shapes")
        facts: dict[str, Any] = {"averages": name == "wrapper" and self.averages}
        if isinstance(pixels, Tensor) and pixels.dim() == 4:
            facts["grid"] = self.grid_for((pixels.shape[-2], pixels.shape[-1]))
        elif shapes is not None and not torch.compiler.is_compiling():
            sizes = {tuple(shape) for shape in shapes.tolist()}
            facts["grid"] = sizes.pop() if len(sizes) == 1 else None
        mask = given.get("pixel_attention_mask")
        facts["pool_mask"] = mask
        if mask is None and isinstance(given.get("attention_mask"), Tensor) and given["attention_mask"].dim() == 2:
            mask = given["attention_mask"][:, self.info.prefix :]
        if mask is not None and (torch.compiler.is_compiling() or not bool(mask.all())):
            facts["valid"] = mask.bool()
        return facts

    def run_entry(
        self, session: Session, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name == "wrapper" or _named(self.encoder, _BACKBONES):
            return call(*args, **kwargs)
        wanted = kwargs.get("return_dict")
        if wanted is None:
            wanted = getattr(self.encoder.config, "return_dict", True)
        output = self._leave(session, call(*args, **{**kwargs, "return_dict": True}))
        return output if wanted else output.to_tuple()

    def _leave(self, session: Session, output: Any) -> Any:
        """Restore the grid if asked, or prepare the tokens for the mean that the wrapper takes of them."""
        scope = session.call.scope
        state = scope.state if scope is not None else None
        if scope is None or state is None or not state.table.steps:
            return output
        if scope.facts["averages"]:
            output["last_hidden_state"] = self._for_mean(
                session, output["last_hidden_state"], state.table, scope.facts["pool_mask"]
            )
        elif session.exit == "restore":
            output["last_hidden_state"] = self.restore(session, output["last_hidden_state"], state.table)
        if session.exit == "restore":
            self._restore_hidden_states(session, output, state)
        return output

    def _restore_hidden_states(self, session: Session, output: Any, state: Any) -> None:
        """hidden_states[i] entered layer i, hence left layer i - 1; entries that nobody asked for are None."""
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                x if x is None else self.restore(session, x, state.after(i - 1))
                for i, x in enumerate(output["hidden_states"])
            )

    def _for_mean(self, session: Session, x: Tensor, table: TokenTable, pool_mask: Tensor | None) -> Tensor:
        """Scale the patch tokens so that the wrapper's plain mean weighs them by size and leaves padding out.

        Where the wrapper averages under `pool_mask` (B, total), the tokens are laid out at their original positions.
        """
        prefix, n = self.info.prefix, table.count
        sizes = table.sizes if session.pool_by_size else None
        if sizes is None and table.valid is None and pool_mask is None:
            return x
        weight = x.new_ones(x.shape[0], n, dtype=torch.float32) if sizes is None else sizes
        if table.valid is not None:
            weight = weight * table.valid
        divisor = n if pool_mask is None else pool_mask.sum(dim=1, keepdim=True)
        weight = weight * (divisor / weight.sum(dim=1, keepdim=True))
        patches = (x[:, prefix:].float() * weight[..., None]).to(x.dtype)
        if pool_mask is not None:
            origins = table.origins
            assert origins is not None
            full = patches.new_zeros(x.shape[0], table.total, x.shape[2])
            patches = full.scatter(1, origins[..., None].expand_as(patches), patches)
        return torch.cat([x[:, :prefix], patches], dim=1)

    def pool_bias(self, session: Session) -> Tensor | None:
        """(B, n) float32 added to the logits of an attention pool: log size, -inf for padding; None without either."""
        table = _table(session)
        if table is None:
            return None
        bias = table.sizes.log() if session.pool_by_size and table.sizes is not None else None
        if table.valid is not None:
            bias = torch.zeros(table.valid.shape, device=table.valid.device) if bias is None else bias
            bias = bias.masked_fill(~table.valid, float("-inf"))
        return bias


class Capture:
    """Forward hook of a projection: keep its output as part of the layer's tap, while the attention still uses it."""

    def __init__(self, session: Session, layer: int, name: str, attention: nn.Module) -> None:
        self.session, self.layer, self.name, self.attention = session, layer, name, attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if getattr(self.attention, f"{self.name}_proj") is module:
            _capture(self.session, self.layer, {self.name: output})


class CaptureContext:
    """Forward pre-hook of an attention module: keep its mask and rotary tables."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session, self.layer = session, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.session.host._given("attention", args, kwargs)  # type: ignore[attr-defined]
        _capture(
            self.session,
            self.layer,
            {
                "mask": given.get("attention_mask"),
                "rotary": given.get("position_embeddings"),
                "is_causal": bool(given.get("is_causal")),
            },
        )


class BeforePool:
    """Forward pre-hook of an attention pool: its mask covers tokens that are gone; `PoolBias` says what is padding."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _table(self.session) is None:
            return None
        return args[:1], {key: value for key, value in kwargs.items() if key != "attention_mask"}


class PoolBias:
    """Forward pre-hook of the `nn.MultiheadAttention` of a pool: weigh merged tokens, leave padding out."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = self.session.host.pool_bias(self.session)  # type: ignore[attr-defined]
        if bias is None:
            return None
        rows = bias.to(args[0].dtype)[:, None, None].expand(-1, module.num_heads, args[0].shape[1], -1)
        return args, {**kwargs, "attn_mask": rows.flatten(0, 1)}


class RestoreStack:
    """Forward hook of a backbone's layers: feature maps are cut out of hidden states on the full grid."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        host: Any = self.session.host
        scope = self.session.call.scope
        if scope is not None and scope.state is not None and scope.state.table.steps:
            output["last_hidden_state"] = host.restore(self.session, output["last_hidden_state"], scope.state.table)
            host._restore_hidden_states(self.session, output, scope.state)
        return output


def _capture(session: Session, layer: int, values: dict[str, Any]) -> None:
    """Add to the layer's tap; a recomputation that runs beside the hooks of its layer has none, and needs none."""
    tap = session.call.taps.get(layer)
    if tap is not None:
        tap.update(values)


def _table(session: Session) -> TokenTable | None:
    """The table of the running call, once tokens were removed."""
    scope = session.call.scope
    if scope is None or scope.state is None or not scope.state.table.steps:
        return None
    return scope.state.table


def _named(model: nn.Module, names: frozenset[str]) -> bool:
    """Whether the class of `model`, or one that it derives from, bears one of the names."""
    return any(cls.__name__ in names for cls in type(model).__mro__)


def _is_encoder(model: nn.Module) -> bool:
    served = isinstance(model, PreTrainedModel) and _named(model, _ENCODERS | _BACKBONES)
    return served and hasattr(model, "embeddings") and _stack(model) is not None


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that reads its tokens in a way that has to be known."""
    if not isinstance(model, PreTrainedModel) or not _named(model, _WRAPPERS):
        return None
    return next((child for child in model.children() if _is_encoder(child)), None)


def _stack(encoder: nn.Module) -> nn.Module | None:
    for owner in (encoder, getattr(encoder, "encoder", None), getattr(encoder, "model", None)):
        if any(isinstance(getattr(owner, name, None), nn.ModuleList) for name in ("layers", "layer")):
            return owner
    return None


def _part(block: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(block, name) for name in names if hasattr(block, name)), None)


def _branch(block: Any, y: Tensor, scale: str) -> Tensor:
    """What a layer does to the output of attention or MLP before it adds the residual."""
    for name in (scale, "drop_path", "dropout"):
        if hasattr(block, name):
            y = getattr(block, name)(y)
    return y


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _check_layer(layer: int, block: nn.Module) -> None:
    attention = _part(block, _ATTENTION)
    parts = [_part(block, names) for names in (_FIRST_NORM, _SECOND_NORM, ("mlp",))]
    plain = all(isinstance(getattr(attention, f"{name}_proj", None), nn.Module) for name in "qkv")
    if None in parts or not plain or hasattr(attention, "q_norm"):
        raise UnsupportedModelError(
            f"layer {layer} is a {type(block).__name__} with {type(attention).__name__}, which is not laid out as "
            "norm, attention with q_proj, k_proj and v_proj, norm, mlp"
        )


def _describe(host: HFVisionHost) -> EncoderInfo:
    encoder: Any = host.encoder
    block: Any = host.blocks[0]
    config, embeddings = encoder.config, encoder.embeddings
    attention = _part(block, _ATTENTION)
    output = _part(attention, ("o_proj", "out_proj"))
    head_dim = attention.head_dim
    classes = sum(_tokens(embeddings, name) for name in ("cls_token", "class_embedding", "distillation_token"))
    fixed = hasattr(config, "image_size")  # else the input decides (NaFlex), and num_patches is the usual number
    grid = host.grid_for(_pair(config.image_size)) if fixed else None
    info = EncoderInfo(
        depth=len(host.blocks),
        dim=config.hidden_size,
        heads=_width(attention.q_proj) // head_dim,
        kv_heads=_width(attention.k_proj) // head_dim,
        head_dim=head_dim,
        prefix=classes + _tokens(embeddings, "register_tokens"),
        class_tokens=classes,
        tokens=grid[0] * grid[1] if grid else int(config.num_patches),
        grid=grid,
        attention_macs=sum(p.weight.numel() for p in (attention.q_proj, attention.k_proj, attention.v_proj, output)),
        mlp_macs=_linear_macs(block.mlp),
        embed_macs=sum(m.weight.numel() for m in embeddings.modules() if isinstance(m, (nn.Conv2d, nn.Linear))),
    )
    pool = getattr(getattr(encoder, "head", None), "attention", None)
    pooled = 2 * info.dim**2 + 2 * info.dim if isinstance(pool, nn.MultiheadAttention) else 0
    return replace(info, head_macs=_head_macs(host, info), pool_macs=pooled)


def _tokens(embeddings: nn.Module, name: str) -> int:
    """How many tokens a parameter (C,) or (1, K, C) puts in front of the patches."""
    parameter = getattr(embeddings, name, None)
    return 0 if parameter is None else 1 if parameter.dim() == 1 else parameter.shape[1]


def _width(projection: nn.Module) -> int:
    return projection.weight.shape[0]  # type: ignore[union-attr,return-value,index]


def _linear_macs(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _head_macs(host: HFVisionHost, info: EncoderInfo) -> int:
    """Multiply-adds behind the last layer: pooler, attention pool (without what each token costs there), classifier."""
    encoder: Any = host.encoder
    pooler: Any = getattr(encoder, "pooler", None)
    macs = 0 if pooler is None else _linear_macs(pooler)
    head: Any = getattr(encoder, "head", None)
    pool = getattr(head, "attention", None)
    if isinstance(pool, nn.MultiheadAttention):
        macs += 2 * info.dim**2 + _linear_macs(head.mlp)  # type: ignore[union-attr]
    if host.wrapper is not None:
        macs += _linear_macs(host.wrapper) - _linear_macs(encoder)
        decoder = [m for m in host.wrapper.modules() if isinstance(m, nn.Conv2d)]
        inside = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
        macs += info.tokens * (sum(m.weight.numel() for m in decoder) - sum(m.weight.numel() for m in inside))
    return macs
