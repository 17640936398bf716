"""Autoregressive models over the ids of an image tokenizer, conditioned on a class or on a text.

The generators of FlexTok (arXiv 2502.13967; structure of the released classes): a causal transformer reads
[SOS, id 1, id 2, ...] and gives the logits of the next id. `generate` is that of transformers: its search,
sampling, caches and stopping act unchanged. Because the ids are ordered from coarse to fine, stopping after n of them
gives an image of n tokens.

Guidance (l_u + s (l_c - l_u)) is part of the model, not a processor of logits: both branches run as one
batch of 2 B rows inside, and each layer's cache holds them as twice the heads of B rows. So whatever transformers does
to the cache of a row (reorder it for beams, repeat it, cut it) it does to both branches.

Without class, nothing is added to SOS. The released code means the same, but writes class 0 over "no class" in place
while it makes the first token, so its later tokens are guided away from class 0. `official=True` follows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokred.core.errors import InvalidParameterError
from tokred.generation.patches import sincos_1d

__all__ = ["FlexTokARConfig", "FlexTokARModel"]

IGNORED = -100  # labels that do not count, as everywhere in transformers
UNCONDITIONAL = -1  # the class label of "no class"
NORMS = ("layernorm", "rmsnorm")


class FlexTokARConfig(PreTrainedConfig):
    """Sizes and options of a `FlexTokARModel`.

    The defaults are the paper's smaller class-conditional model: width 64 * depth, FSQ codebook of 64000, 256 tokens.

    Args:
        codebook_size: different ids V; also `vocab_size`. SOS is id V, which is read but never predicted.
        num_tokens: most tokens of an image, and rows of the position table.
        num_classes: class labels; None for a model without.
        text_dim: width of the text features that its cross-attention reads (flan-t5-xl: 2048); None for a model without
            text. One of `num_classes` and `text_dim` must be given.
        text_projection: features go through fc1 (text_dim -> text_dim), GELU (tanh), fc2 (-> hidden_size) first.
        hidden_size, num_hidden_layers, num_attention_heads: width, depth, heads of a block.
        intermediate_size: hidden width of SwiGLU; None is that of the released code, 2/3 of 4 * hidden_size, rounded up
            to a multiple of 256.
        norm_type: "layernorm" or "rmsnorm". norm_bias: whether layer norms have one; RMS norms never do.
        norm_eps: epsilon of all norms.
        qk_norm: norms of queries and keys over a head. final_norm: a norm between the last block and the head.
        qkv_bias, use_bias: biases of the query, key and value maps; of the other linear maps of a block.
        initializer_range: standard deviation of random weights.

    The options from `norm_type` on are not published for the released weights (UNVERIFIED); `from_official` reads them.

    Raises:
        InvalidParameterError: a size below 1, heads that do not divide the width, a width that is no multiple of 4, no
            condition, an unknown norm.
    """

    model_type = "flextok_ar"
    attribute_map = {"vocab_size": "codebook_size", "max_position_embeddings": "num_tokens"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    codebook_size: int = 64000
    num_tokens: int = 256
    num_classes: int | None = 1000
    text_dim: int | None = None
    text_projection: bool = True
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    norm_type: str = "layernorm"
    norm_bias: bool = True
    norm_eps: float = 1e-6
    qk_norm: bool = False
    final_norm: bool = True
    qkv_bias: bool = False
    use_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(int(2 * int(4 * self.hidden_size) / 3) / 256)
        super().__post_init__(**kwargs)
        sizes = ("codebook_size", "num_tokens", "num_classes", "text_dim", "hidden_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameterError(f"{name}={value!r}: expected at least 1")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise InvalidParameterError(
                f"hidden_size={self.hidden_size}: expected a multiple of 4 and of num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if self.num_classes is None and self.text_dim is None:
            raise InvalidParameterError("num_classes=None and text_dim=None: give at least one, the model's condition")
        if self.norm_type == "rmsnorm":
            self.norm_bias = False
        elif self.norm_type not in NORMS:
            raise InvalidParameterError(f"norm_type={self.norm_type!r}: expected one of {', '.join(NORMS)}")

    @property
    def guidance_scale(self) -> float:
        """The released code's default: 3.0 with a text, 1.5 with a class."""
        return 1.5 if self.text_dim is None else 3.0


def make_norm(config: FlexTokARConfig, dim: int) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return nn.RMSNorm(dim, eps=config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.norm_bias)


def position_table(num_tokens: int, dim: int) -> Tensor:
    """(n, D) float32: zeros for SOS, then [0, 1, sin(i f), cos(i f)] for i = 0, 1, ..., each a quarter of the width.

    The released table is one of a grid of one column: its first half encodes the column, which is always 0.
    """
    waves = sincos_1d(num_tokens - 1, dim // 2)
    constant = torch.tensor([0.0, 1.0]).repeat_interleave(dim // 4).expand(num_tokens - 1, -1)
    return torch.cat([torch.zeros(1, dim), torch.cat([constant, waves], dim=1)])


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + mask) v, in the form in which transformers calls it: (B, H, L, d) -> (B, L, H, d)."""
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SelfAttention(nn.Module):
    """Causal attention of each branch within itself."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: FlexTokARConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, branches: int, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(G B, L, D) -> (G B, L, D) for G branches; the cache holds their G H heads in B rows."""
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows // branches, branches, length, 3, self.heads, self.head_dim)
        # (B, G, L, 3, H, d) -> 3 x (B, G H, L, d)
        q, k, v = (part.flatten(1, 2) for part in qkv.permute(3, 0, 1, 4, 2, 5).unbind(0))
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out = attend(self, q, k, v, mask, dropout=0.0, scaling=self.head_dim**-0.5)[0]
        out = out.reshape(rows // branches, length, branches, width).transpose(1, 2)  # (B, L, G H, d) -> (B, G, L, D)
        return self.proj(out.reshape(rows, length, width))


class CrossAttention(nn.Module):
    """Attention to the text of each branch; its keys and values are made once and cached."""

    def __init__(self, config: FlexTokARConfig, layer: int, text_dim: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        head_dim = config.hidden_size // self.heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k = nn.Linear(text_dim, config.hidden_size, bias=config.qkv_bias)
        self.v = nn.Linear(text_dim, config.hidden_size, bias=config.qkv_bias)
        self.q_norm = make_norm(config, head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self, x: Tensor, branches: int, text: Tensor | None, mask: Tensor, cache: EncoderDecoderCache | None
    ) -> Tensor:
        """x (G B, L, D), text (G B, T, D_t) or None where the cache knows it, mask (G B, 1, 1, T) -> (G B, L, D)."""
        q = self.q_norm(self._heads(self.q(x)))
        if text is not None:
            k, v = self.k_norm(self._heads(self.k(text))), self._heads(self.v(text))
            if cache is not None:
                rows = len(x) // branches
                cached = (part.reshape(rows, -1, *part.shape[2:]) for part in (k, v))  # (B, G H, T, d)
                cache.cross_attention_cache.update(*cached, self.layer)
                cache.is_updated[self.layer] = True
        else:
            assert cache is not None
            known = cache.cross_attention_cache.layers[self.layer]
            k, v = (part.reshape(len(x), self.heads, *part.shape[2:]) for part in (known.keys, known.values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x)."""

    def __init__(self, config: FlexTokARConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None  # __post_init__ of the configuration has set it
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.fc3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class TextProjection(nn.Module):
    """fc2(gelu_tanh(fc1 e)) of text features, without biases: (B, T, D_t) -> (B, T, D)."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_dim, text_dim, bias=False)
        self.fc2 = nn.Linear(text_dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class FlexTokARBlock(GradientCheckpointingLayer):
    """Pre-norm block: causal self-attention, attention to the text where there is one, SwiGLU."""

    def __init__(self, config: FlexTokARConfig, layer: int) -> None:
        super().__init__()
        self.norm_self = make_norm(config, config.hidden_size)
        self.self_attn = SelfAttention(config, layer)
        if config.text_dim is not None:
            self.norm_cross = make_norm(config, config.hidden_size)
            text_dim = config.hidden_size if config.text_projection else config.text_dim
            self.cross_attn = CrossAttention(config, layer, text_dim)
        self.norm_mlp = make_norm(config, config.hidden_size)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        branches: int,
        mask: Tensor | None,
        text_mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        cross = past_key_values if isinstance(past_key_values, EncoderDecoderCache) else None
        own = past_key_values if cross is None else cross.self_attention_cache
        x = x + self.self_attn(self.norm_self(x), branches, mask, own)
        if text_mask is not None:
            x = x + self.cross_attn(self.norm_cross(x), branches, text, text_mask, cross)
        return x + self.mlp(self.norm_mlp(x))


class FlexTokARModel(PreTrainedModel, GenerationMixin):
    """A generator of image tokens (FlexTok, arXiv 2502.13967; structure of the released classes).

    `generate(class_labels=..., max_new_tokens=n, guidance_scale=s, ...)` gives (B, 1 + n) ids, the first of which is
    SOS; `generate_tokens` is the short way to the ids alone. `from_official` reads the released layout.
    """

    config: FlexTokARConfig
    config_class = FlexTokARConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlexTokARBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FlexTokARConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.codebook_size, config.hidden_size)
        self.start_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_buffer("positions", position_table(config.num_tokens, config.hidden_size))
        if config.num_classes is not None:
            self.embed_class = nn.Embedding(config.num_classes, config.hidden_size)
        if config.text_dim is not None and config.text_projection:
            self.text_projection = TextProjection(config.text_dim, config.hidden_size)
        self.blocks = nn.ModuleList(FlexTokARBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.generation_config.bos_token_id = config.codebook_size
        self.post_init()

    @classmethod
    def from_official(cls, path: str, **options: Any) -> FlexTokARModel:
        """A model from the released layout: `tokred.generation.flextok_ar_official.load_official`."""
        from tokred.generation.flextok_ar_official import load_official

        return load_official(path, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexTokARModel):
            init.normal_(module.start_token, std=self.config.initializer_range)
            init.copy_(module.positions, position_table(self.config.num_tokens, self.config.hidden_size))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    # -- one pass ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        class_labels: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
        guidance_scale: float | None = None,
        official: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits (B, L, V) of the token after each input.

        Args:
            input_ids: (B, L) int64, SOS (`config.codebook_size`) first, then ids. Not needed beside `labels`.
            labels: (B, L) ids to predict, -100 where they do not count (only at the end of a row). They are not
                shifted: the inputs are SOS and the labels before each.
            class_labels: (B,) in [0, num_classes), or -1 for no class. None is -1 for all.
            text_embeds: (B, T, D_t) features. text_mask: (B, T), 1 where there is text; None is all.
            negative_text_embeds: (B or 1, T', D_t) features of the unconditional branch, those of an empty prompt; with
                a mask of their own. Only guidance with a text needs them.
            guidance_scale: s of l_u + s (l_c - l_u), where l_u is without class and with the negative text; the logits
                are then float32. None or 1 is one branch alone.
            official: with guidance by class, l_u after the first token is that of class 0, as in the released code.
            attention_mask: (B, S) with 0 where a prompt is padded on the left; None is no padding.
            past_key_values, use_cache, position_ids, logits_to_keep, return_dict: as in transformers.

        Raises:
            InvalidParameterError: an input that the model has no use for or lacks, ids or labels outside their range,
                more tokens than positions, a text without any token.
        """
        if labels is not None and guidance_scale is not None:
            raise InvalidParameterError("labels with guidance_scale: a loss is of one branch; leave guidance_scale out")
        if input_ids is None:
            input_ids = self._shifted(labels)
        if guidance_scale == 1:
            guidance_scale = None
        self._check_given(class_labels, text_embeds, text_mask, guidance_scale, negative_text_embeds, official)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past == 0:  # the values are the same in later passes, and looking at them waits for the device
            self._check_ids(input_ids, "input_ids", self.config.codebook_size)
            self._check_classes(len(input_ids), class_labels)
            self._check_text("text", text_embeds, text_mask, (len(input_ids),))
            self._check_text("negative_text", negative_text_embeds, negative_text_mask, (len(input_ids), 1))
        if past + input_ids.shape[1] > self.config.num_tokens:
            raise InvalidParameterError(
                f"{past + input_ids.shape[1]} inputs given, but the model has positions for {self.config.num_tokens}, "
                "SOS among them"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        own = past_key_values
        if text_embeds is not None and past_key_values is not None:
            if not isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
            own = past_key_values.self_attention_cache

        x = self._embedded(input_ids, past, position_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=own
        )
        branches = 1 if guidance_scale is None else 2
        given = x + self._class_of_start(input_ids, class_labels)
        if branches == 2:
            zeros = input_ids.new_zeros(len(input_ids)) if official else None
            free = x + self._class_of_start(input_ids, zeros)
        x = given if branches == 1 else torch.stack([given, free], dim=1).flatten(0, 1)  # (G B, L, D)
        text = allowed = None
        if text_embeds is not None:
            text, allowed = self._text(branches, text_embeds, text_mask, negative_text_embeds, negative_text_mask)
            known = past_key_values is not None and past_key_values.is_updated.get(0, False)
            text = None if known else self._projected(text)
        for block in self.blocks:
            x = block(x, text, branches, mask, allowed, past_key_values=past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm(x[:, kept]))
        if guidance_scale is not None:
            given, free = logits.float().unflatten(0, (-1, 2)).unbind(dim=1)
            if official and past == 0:
                at_start = (input_ids == self.config.codebook_size)[:, kept, None]
                start = input_ids.new_full((1, 1), self.config.codebook_size)
                free = torch.where(at_start, self(start).logits.float(), free)
            logits = free + guidance_scale * (given - free)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()

    def embed(self, input_ids: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What enters the first block, (B, L, D): tokens, positions, and the class on SOS. Ids as in `forward`."""
        return self._embedded(input_ids, 0, None) + self._class_of_start(input_ids, class_labels)

    def _embedded(self, ids: Tensor, past: int, position_ids: Tensor | None) -> Tensor:
        """Tokens and positions (B, L, D)."""
        start = ids == self.config.codebook_size
        x = torch.where(start[:, :, None], self.start_token, self.embed_tokens(ids.masked_fill(start, 0)))
        if position_ids is None:
            position_ids = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        return x + self.positions[position_ids].to(x.dtype)

    def _class_of_start(self, ids: Tensor, class_labels: Tensor | None) -> Tensor | int:
        """What the class adds to SOS: (B, L, D), or 0 for no class."""
        if class_labels is None:
            return 0
        wanted = (ids == self.config.codebook_size) & (class_labels >= 0)[:, None]
        return self.embed_class(class_labels.clamp(min=0))[:, None] * wanted[:, :, None]

    def _text(
        self, branches: int, embeds: Tensor, mask: Tensor | None, negative: Tensor | None, negative_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Features (G B, T, D_t) and mask (G B, 1, 1, T) bool; with two branches, rows of both in turn."""
        features, masks = [embeds], [_as_mask(embeds, mask)]
        if branches == 2:
            assert negative is not None
            features.append(negative.to(embeds.dtype).expand(len(embeds), -1, -1))
            masks.append(_as_mask(negative, negative_mask).expand(len(embeds), -1))
        length = max(part.shape[1] for part in features)
        both = [F.pad(part, (0, 0, 0, length - part.shape[1])) for part in features]
        allowed = [F.pad(part, (0, length - part.shape[1])) for part in masks]
        return torch.stack(both, dim=1).flatten(0, 1), torch.stack(allowed, dim=1).flatten(0, 1)[:, None, None]

    def _projected(self, text: Tensor) -> Tensor:
        text = text.to(self.head.weight.dtype)
        return self.text_projection(text) if self.config.text_projection else text

    def _shifted(self, labels: Tensor | None) -> Tensor:
        """(B, L): SOS, then all labels but the last."""
        if labels is None:
            raise InvalidParameterError("input_ids=None: give input_ids, SOS first, or labels")
        self._check_ids(labels.masked_fill(labels == IGNORED, 0), "labels", self.config.codebook_size - 1)
        before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, 0)  # only ignored labels come after one
        return F.pad(before, (1, 0), value=self.config.codebook_size)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_given(
        self,
        class_labels: Tensor | None,
        text_embeds: Tensor | None,
        text_mask: Tensor | None,
        guidance_scale: float | None,
        negative: Tensor | None,
        official: bool,
    ) -> None:
        width = self.config.text_dim
        if class_labels is not None and self.config.num_classes is None:
            raise InvalidParameterError("class_labels given, but the model knows no classes (num_classes=None)")
        if official and (self.config.num_classes is None or width is not None):
            raise InvalidParameterError("official=True: only models conditioned on a class alone differ in it")
        if text_embeds is None and (width is not None or text_mask is not None):
            raise InvalidParameterError(
                f"text_embeds missing: a model with text (text_dim={width}) needs features in every pass; for no text "
                "give those of an empty prompt"
            )
        if text_embeds is not None and width is None:
            raise InvalidParameterError("text_embeds given, but the model reads no text (text_dim=None)")
        if text_embeds is not None and guidance_scale is not None and negative is None:
            raise InvalidParameterError(
                f"guidance_scale={guidance_scale} without negative_text_embeds: give the features of an empty prompt, "
                "or guidance_scale=1"
            )

    def _check_ids(self, ids: Tensor, name: str, last: int) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise InvalidParameterError(f"{name}: {ids.dtype} {tuple(ids.shape)} given, expected int64 (B, L)")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > last:
            raise InvalidParameterError(f"{name}: ids from {low} to {high} given, expected 0 to {last}")

    def _check_classes(self, batch: int, labels: Tensor | None) -> None:
        classes = self.config.num_classes
        if labels is None or classes is None:
            return
        if labels.shape != (batch,) or labels.dtype != torch.int64:
            raise InvalidParameterError(
                f"class_labels: {labels.dtype} {tuple(labels.shape)} given, expected int64 ({batch},)"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < UNCONDITIONAL or high >= classes:
            raise InvalidParameterError(
                f"class_labels from {low} to {high} given, expected 0 to {classes - 1}, or {UNCONDITIONAL} for none"
            )

    def _check_text(self, name: str, embeds: Tensor | None, mask: Tensor | None, batches: tuple[int, ...]) -> None:
        if embeds is None:
            return
        width = self.config.text_dim
        if embeds.ndim != 3 or len(embeds) not in batches or embeds.shape[1] < 1 or embeds.shape[2] != width:
            raise InvalidParameterError(
                f"{name}_embeds: shape {tuple(embeds.shape)} given, expected ({batches[0]}, T, {width})"
            )
        if mask is None:
            return
        if mask.shape != embeds.shape[:2]:
            raise InvalidParameterError(
                f"{name}_mask: shape {tuple(mask.shape)} given, expected {tuple(embeds.shape[:2])}"
            )
        if not bool(mask.bool().any(dim=1).all()):
            raise InvalidParameterError(f"{name}_mask: a row without any 1; an empty prompt has its end-of-text token")

    # -- generate ----------------------------------------------------------------------------------------------------

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Guidance goes to `forward` (see the module), not to a processor of transformers that runs a second pass."""
        generation_config, inputs = super()._prepare_generation_config(generation_config, **kwargs)
        scale, generation_config.guidance_scale = generation_config.guidance_scale, None
        if scale is not None and scale != 1:
            inputs["guidance_scale"] = scale
        embeds = inputs.get("text_embeds")
        for name in ("negative_text_embeds", "negative_text_mask"):
            negative = inputs.get(name)
            if negative is not None and embeds is not None and len(negative) == 1:  # beams repeat rows of each input
                inputs[name] = negative.expand(len(embeds), *negative.shape[1:])
        return generation_config, inputs

    def _prepare_generated_length(self, generation_config: Any, has_default_max_length: bool, **kwargs: Any) -> Any:
        """By default as many tokens as there are positions; more are an error before the first step."""
        given = kwargs["input_ids_length"]
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = self.config.num_tokens + 1 - given
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )
        if generation_config.max_length > self.config.num_tokens + 1:
            raise InvalidParameterError(
                f"{generation_config.max_length - 1} tokens asked for, but the model was made for at most "
                f"{self.config.num_tokens}"
            )
        return generation_config

    @torch.no_grad()
    def generate_tokens(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        *,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
        num_tokens: int | None = None,
        guidance_scale: float | None = None,
        official: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        callback_on_prefix: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Draw the ids (B, n) int64 of images.

        Args:
            class_labels: a label or B of them; -1 is no class. text_embeds and the others: as in `forward`.
            num_tokens: n, from 1 to `config.num_tokens`; None is all.
            guidance_scale: None is the released code's, 3.0 with a text and 1.5 with a class; 1 is none. `official` as
                in `forward`.
            temperature: logits are divided by it, then `top_k` keeps the k largest (0: all), then `top_p` the smallest
                set of at least that probability (0 or 1: all). Temperature 0 takes the largest logit.
            generator: source of randomness; None is torch's own.
            callback_on_prefix: called with the ids so far (B, i) after each token; a true answer stops there.

        Raises:
            InvalidParameterError: an option outside its range, or as in `forward`.
        """
        n = self.config.num_tokens if num_tokens is None else num_tokens
        if not isinstance(n, int) or not 1 <= n <= self.config.num_tokens:
            raise InvalidParameterError(f"num_tokens={n!r}: expected an integer from 1 to {self.config.num_tokens}")
        if not 0 <= temperature < math.inf or not isinstance(top_k, int) or top_k < 0 or not 0 <= top_p <= 1:
            raise InvalidParameterError(
                f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a temperature of at least 0, an "
                "integer top_k of at least 0, top_p from 0 to 1"
            )
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=self.device).reshape(-1)
        condition = {
            "class_labels": class_labels,
            "text_embeds": text_embeds,
            "text_mask": text_mask,
            "negative_text_embeds": negative_text_embeds,
            "negative_text_mask": negative_text_mask,
        }
        known = {name: value.to(self.device) for name, value in condition.items() if value is not None}
        if "class_labels" not in known and "text_embeds" not in known:
            raise InvalidParameterError("no condition: give class_labels (-1 for none) or text_embeds")
        stops = [] if callback_on_prefix is None else [_PrefixCallback(callback_on_prefix)]
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p or 1.0} if temperature else {}
        with _seeded(generator, self.device):
            ids = self.generate(
                **known,
                max_new_tokens=n,
                guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
                official=official,
                do_sample=bool(drawn),
                **drawn,
                stopping_criteria=StoppingCriteriaList(stops),
            )
        return ids[:, 1:]


class _PrefixCallback(StoppingCriteria):
    """Shows each prefix to a function, without SOS, until it asks to stop."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        self.function, self.stopped = function, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.stopped = self.stopped or bool(self.function(input_ids[:, 1:]))
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)


@contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's own random numbers from a seed that `generator` draws: `generate` of transformers knows no other."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    other = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(other, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


def _as_mask(embeds: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return mask.bool()
