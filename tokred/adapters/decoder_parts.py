"""The language models of transformers as the sites inside them need them: layers, masks, rotary embedding, MLPs, taps.

A `Decoder` describes one module (`LlamaModel`, the `language_model` of a VLM, ...). Masks are made by the library's own
functions, for one layer at a time, because layers may hold caches of different lengths. Queries and keys are taken from
the attention call itself: a tapped layer's attention module gets a config whose attention implementation hands them
over and then calls what the model would have called, so scores fit every family and the output stays its own.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokred import ops
from tokred.core.errors import UnsupportedModelError
from tokred.core.sites import DecoderInfo

__all__ = ["MLP", "Decoder", "Ear", "Tapped", "decoder_info", "tap_layer", "untap_layer"]

_TAP = "tokred_tap"


class Decoder:
    """One language model without its head.

    Attributes:
        module: it. layers: its layers. config: of the text model. family: of the multimodal model around it, or None.
        mrope: whether positions are places in time and space. deepstack: layers behind which visual features are added.
    """

    def __init__(self, module: Any, family: Any = None) -> None:
        self.module, self.family = module, family
        self.config = module.config
        self.layers = list(module.layers)[: self.config.num_hidden_layers]
        kinds = getattr(self.config, "layer_types", None)
        self.kinds: list[str | None] = [None] * len(self.layers) if kinds is None else list(kinds)
        self.window = getattr(self.config, "sliding_window", None)
        if kinds is None and self.window is not None and getattr(self.config, "use_sliding_window", True):
            self.kinds = ["sliding_attention"] * len(self.layers)
        rotary = inspect.signature(type(module.rotary_emb).forward).parameters
        self.rotary_by_kind = "layer_type" in rotary
        self.mrope = bool(getattr(family, "mrope", False))
        vision = None if family is None else family.config.vision_config
        self.deepstack = len(getattr(vision, "deepstack_visual_indexes", ()))

    @property
    def info(self) -> DecoderInfo:
        return decoder_info(self.module)

    def mask(
        self, layer: int, valid: Tensor | None, hidden: Tensor, cache: Any, types: Tensor | None, prompt: bool
    ) -> Any:
        """The attention mask of one layer, as its attention takes it.

        Args:
            valid: (B, keys) of real keys of this layer, those that are just computed included; None for all.
            hidden: (B, q, D), what enters the layer. types: (B, keys) token types. prompt: whether this is a prefill.
        """
        if self.family is not None:
            past = 0 if prompt or cache is None else int(cache.get_query_offset(layer))
            everything = torch.ones(hidden.shape[0], past + hidden.shape[1], device=hidden.device)
            whole = everything if valid is None else valid
            made = self.family.layer_mask(types if prompt else None, whole.long(), hidden, cache, layer)
            if made is not None:
                return made.get(self.kinds[layer] or "full_attention") if isinstance(made, Mapping) else made
        make = create_sliding_window_causal_mask if self.kinds[layer] == "sliding_attention" else create_causal_mask
        return make(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            position_ids=None,  # given, gaps would be read as the borders of packed sequences
            layer_idx=layer,
        )

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """Cosines and sines for positions (B, q)."""
        if self.rotary_by_kind:
            return self.module.rotary_emb(hidden, positions, self.kinds[layer])
        return self.module.rotary_emb(hidden, positions)

    def mlp(self, layer: int) -> MLP:
        return MLP.of(self.layers[layer].mlp)


def decoder_info(module: Any) -> DecoderInfo:
    """Describe a language model; works on meta tensors."""
    config, layer = module.config, module.layers[0]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    return DecoderInfo(
        depth=len(module.layers),
        dim=int(config.hidden_size),
        width=config.num_attention_heads * head_dim,
        layer_macs=weights,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        neurons=int(config.intermediate_size),
        mlp_macs=sum(m.weight.numel() for m in layer.mlp.modules() if isinstance(m, nn.Linear)),
        vocabulary=int(config.vocab_size),
        name=str(getattr(config, "_name_or_path", "") or ""),
        family=str(config.model_type),
    )


# -- MLPs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLP:
    """How an MLP is built: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    Attributes:
        gate, up, down: names of its linear layers; gate equals up where one layer makes both halves (Phi-3).
        act: name of its activation.
    """

    gate: str | None
    up: str
    down: str
    act: str

    @classmethod
    def of(cls, module: nn.Module) -> MLP:
        acts = [name for name in ("act_fn", "activation_fn", "act") if hasattr(module, name)]
        for gate, up, down in (
            ("gate_proj", "up_proj", "down_proj"),
            ("gate_up_proj", "gate_up_proj", "down_proj"),
            (None, "c_fc", "c_proj"),
            (None, "fc1", "fc2"),
        ):
            if acts and hasattr(module, up) and hasattr(module, down) and (gate is None or hasattr(module, gate)):
                return cls(gate, up, down, acts[0])
        raise UnsupportedModelError(
            f"{type(module).__name__} is no MLP whose neurons could be chosen (mixtures of experts are not served); "
            "expected gate_proj, up_proj and down_proj, gate_up_proj and down_proj, or two linear layers"
        )

    def slice(self, module: Any, active: Tensor) -> SparseMLP:
        """The part of `module` that the neurons `active` (B, I) take; rows may use different ones of it."""
        union = active.any(dim=0).nonzero()[:, 0]
        rows = None if bool((active[:, union]).all()) else active[:, union]
        plain = all(type(getattr(module, name)) is nn.Linear for name in {self.up, self.down, self.gate or self.up})
        if not plain:  # quantised or adapted weights have no rows to take
            return SparseMLP(module, self, None, active, active.shape[0])
        down = getattr(module, self.down)
        weights = {"down": down.weight.detach().index_select(1, union)}
        if down.bias is not None:
            weights["down_bias"] = down.bias.detach()
        parts = [(self.up, 0)] if self.gate is None else [(self.gate, 0), (self.up, 0)]
        if self.gate == self.up:
            parts[1] = (self.up, active.shape[1])
        linears = [getattr(module, name) for name, _ in parts]
        indices = [union + offset for _, offset in parts]
        inner = linears[0].weight.new_empty(len(parts), len(union), linears[0].in_features)
        for place, (linear, index) in enumerate(zip(linears, indices, strict=True)):
            torch.index_select(linear.weight.detach(), 0, index, out=inner[place])
        weights["inner"] = inner.flatten(0, 1)
        if linears[0].bias is not None:
            weights["inner_bias"] = torch.cat([x.bias.detach()[i] for x, i in zip(linears, indices, strict=True)])
        return SparseMLP(module, self, weights, rows, active.shape[0])


class SparseMLP:
    """Some neurons of one MLP, for one request.

    Attributes:
        weights: of them, "inner" (gate above up, which takes one product instead of two) and "down"; or None where the
            whole MLP is run and the others are silenced.
        rows: (B, K) bool, which of them each row uses; None for all. With `weights` None, (B, I).
    """

    def __init__(self, module: Any, kind: MLP, weights: dict[str, Tensor] | None, rows: Tensor | None, size: int):
        self.module, self.kind, self.weights, self.rows, self.size = module, kind, weights, rows, size

    def select(self, index: Tensor) -> SparseMLP:
        rows = None if self.rows is None else self.rows[index.to(self.rows.device)]
        return SparseMLP(self.module, self.kind, self.weights, rows, len(index))

    def __call__(self, x: Tensor) -> Tensor:
        """What the MLP makes of x (B, q, D) with these neurons alone."""
        linear = torch.nn.functional.linear
        act = getattr(self.module, self.kind.act)
        w = self.weights
        if w is None:
            return self._silenced(x)
        inner = linear(x, w["inner"], w.get("inner_bias"))
        if self.kind.gate is None:
            inner = act(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        if self.rows is not None:
            inner = inner * self.rows[:, None].to(inner.dtype)
        return linear(inner, w["down"], w.get("down_bias"))

    def _silenced(self, x: Tensor) -> Tensor:
        up = getattr(self.module, self.kind.up)(x)
        act = getattr(self.module, self.kind.act)
        if self.kind.gate == self.kind.up:
            gate, up = up.chunk(2, dim=-1)
            inner = act(gate) * up
        elif self.kind.gate is not None:
            inner = act(getattr(self.module, self.kind.gate)(x)) * up
        else:
            inner = act(up)
        assert self.rows is not None
        return getattr(self.module, self.kind.down)(inner * self.rows[:, None].to(inner.dtype))


# -- taps --------------------------------------------------------------------------------------------------------------


class StopForward(Exception):
    """Ends a pass whose queries and keys are all that was wanted."""


@dataclass
class Tapped:
    """What one attention call worked on, of a prompt of T tokens on an empty cache.

    Attributes:
        q: (B, H, T, d). k, v: (B, H_kv, T, d), after norm and rotary embedding.
        scale, softcap, window: of its logits. mask: as the attention got it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Any
    softcap: float | None = None
    window: int | None = None

    def rows(self, places: Tensor, valid: Tensor) -> Tensor:
        """(B, H, R, T) float32: softmax attention of the queries at `places` (B, R); `valid` (B, T) are real keys."""
        T = self.k.shape[2]
        index = places[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        q = self.q.gather(2, index)
        seen = self._seen(places, valid, T)
        if self.softcap is None:
            return ops.attention_rows(q, self.k, self.scale, mask=seen)
        k = self.k.repeat_interleave(q.shape[1] // self.k.shape[1], dim=1).float()
        logits = torch.tanh(q.float() @ k.transpose(2, 3) * (self.scale / self.softcap)) * self.softcap
        return logits.masked_fill(~seen, float("-inf")).softmax(dim=-1).nan_to_num(0.0)

    def _seen(self, places: Tensor, valid: Tensor, T: int) -> Tensor:
        """(B, 1, R, T) bool: the keys that each query sees."""
        if isinstance(self.mask, Tensor) and self.mask.dim() == 4:
            mask = self.mask[..., :T].expand(places.shape[0], -1, -1, -1)[:, :1]
            if mask.dtype != torch.bool:
                mask = mask > torch.finfo(mask.dtype).min / 2
            return mask.gather(2, places[:, None, :, None].expand(-1, 1, -1, T)) & valid[:, None, None]
        keys = torch.arange(T, device=places.device)
        seen = (keys <= places[..., None]) & valid[:, None]
        if self.window is not None:
            seen &= keys > places[..., None] - self.window
        return seen[:, None]


class Ear(threading.local):
    """Who listens to tapped layers in this thread, in place of whoever does usually."""

    listener: Callable[[int], Callable[[Tapped], None] | None] | None = None

    def hear(self, layers: Iterable[int], run: Callable[[], Any], last_query: bool = False) -> dict[int, Tapped]:
        """What the attention of some layers works on, in a pass that ends with the last of them.

        Args:
            run: begins the pass. last_query: whether only the last query of each is wanted, which saves memory.
        """
        wanted = set(layers)
        last, heard = max(wanted), {}

        def listen(index: int) -> Callable[[Tapped], None] | None:
            def note(tapped: Tapped) -> None:
                heard[index] = replace(tapped, q=tapped.q[:, :, -1:]) if last_query else tapped
                if index == last:
                    raise StopForward

            return note if index in wanted else None

        before, self.listener = self.listener, listen
        try:
            with torch.no_grad():
                run()
        except StopForward:
            return heard
        finally:
            self.listener = before
        raise AssertionError(f"layer {last} was not reached")


class Tap:
    """Where a tapped attention module finds who listens, and what it would have called."""

    def __init__(self, config: Any, listen: Callable[[int], Callable[[Tapped], None] | None], layer: int) -> None:
        self.config, self.listen, self.layer = config, listen, layer

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        hear = self.listen(self.layer)
        if hear is not None:
            T, scale = q.shape[2], kwargs.get("scaling")
            window = kwargs.get("sliding_window")
            hear(
                Tapped(
                    q.detach(),
                    k[:, :, :T].detach(),
                    v[:, :, :T].detach(),
                    q.shape[-1] ** -0.5 if scale is None else scale,
                    mask,
                    kwargs.get("softcap"),
                    window,
                )
            )
        eager = sys.modules[_defining(type(module)).__module__].eager_attention_forward
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        return interface(module, q, k, v, mask, **kwargs)


def _defining(cls: type) -> type:
    """The class whose file has the eager attention of a module."""
    return next(c for c in cls.__mro__ if hasattr(sys.modules[c.__module__], "eager_attention_forward"))


def tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of tapped modules."""
    return module._tokred_tap(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_TAP, tapped_attention)


def tap_layer(attention: Any, listen: Callable[[int], Any], layer: int) -> None:
    """Let `listen(layer)` hear what an attention module works on; `untap_layer` undoes it."""
    original = attention.config
    changed = copy.copy(original)
    changed.__dict__["_attn_implementation_internal"] = _TAP  # of this copy alone, not of configs inside it
    attention._tokred_tap = Tap(original, listen, layer)
    attention.config = changed


def untap_layer(attention: Any) -> None:
    tap = attention.__dict__.pop("_tokred_tap", None)
    if tap is not None:
        attention.config = tap.config
