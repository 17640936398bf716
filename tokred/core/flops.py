"""Multiply-adds by part, of a model or of a config without weights, reduced or not.

Counted are matrix products (projections, q k^T, attention times v, MLP, patch embedding, heads) and the scoring of a
method; norms, softmax, activations and sorting are not. This is the convention of the token reduction papers up to
about 1 %: DeiT-S is 4.60 G. The products of attention count T^2 pairs of tokens in language models, too, whose masks
leave half of them (``causal=True`` counts that half, as some papers do). Layers that attend in a sliding window are
counted, in prefill, cache and decoding, as if they saw everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tokred.core.budget import check_count
from tokred.core.carried import CarriedTokens
from tokred.core.decoder import DecoderMethod, PromptMethod
from tokred.core.errors import ConflictError, InvalidParameterError, UnsupportedModelError
from tokred.core.method import EncoderMethod, Method, VisualMethod, resolve
from tokred.core.sites import DecoderInfo, EncoderInfo, MediaLayout, PromptInfo

__all__ = ["Flops", "encoder_info", "encoder_macs", "flops", "prompt_macs", "text_macs"]


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of one image, or of the prefill of one prompt and of the token that follows it.

    Attributes:
        vision: encoder with embedding and head (and projector). llm: the prefill of the language model without its
            head, a first pass that only chooses (GemFilter) included. scoring: what the methods add.
        blocks: the part of `vision` that its blocks take (Zero-TPrune's paper counts blocks and scoring only).
        unreduced: vision and llm without any reduction.
        tokens: tokens per block that enter attention and MLP, prefix included, [(attention, mlp), ...].
        prompt: tokens that enter the language model, and how many it would be without reduction.
        llm_tokens: tokens that enter each layer of the language model. cache_tokens: those that each layer's cache
            holds when decoding begins.
        decode: multiply-adds of the first new token: weights of all layers (of sparse MLPs the part in use) and
            attention to what each cache holds and to itself, without the head. unreduced_decode: without any reduction.
    """

    vision: int
    llm: int = 0
    scoring: int = 0
    blocks: int = 0
    unreduced: int = 0
    tokens: tuple[tuple[int, int], ...] = ()
    prompt: tuple[int, int] | None = None
    llm_tokens: tuple[int, ...] = ()
    cache_tokens: tuple[int, ...] = ()
    decode: int = 0
    unreduced_decode: int = 0

    @property
    def total(self) -> int:
        """Without `decode`."""
        return self.vision + self.llm + self.scoring

    @property
    def reduction(self) -> float:
        """Share of the unreduced multiply-adds that is saved."""
        return 1 - self.total / self.unreduced if self.unreduced else 0.0

    def __str__(self) -> str:
        parts = [f"vision {self.vision / 1e9:.4g} G"] if self.vision or not self.llm else []
        parts += [f"llm {self.llm / 1e9:.4g} G"] if self.llm else []
        parts += [f"scoring {self.scoring / 1e9:.4g} G"] if self.scoring else []
        text = f"{self.total / 1e9:.4g} G multiply-adds ({', '.join(parts)}; {-self.reduction:+.1%})"
        return f"{text}, {self.decode / 1e9:.4g} G for the next token" if self.decode else text

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "reduction": self.reduction}


def flops(
    model_or_config: object, inputs_or_sizes: object = None, method: object = None, *, causal: bool = False
) -> Flops:
    """Count the multiply-adds of one image or one prompt.

    Args:
        model_or_config: a model (patched or not, also on the meta device), a transformers config, or the name of a
            timm architecture. No weights are needed.
        inputs_or_sizes: what the model is run on: a batch (B, 3, H, W), an image size (H, W) or side H; None is the
            model's own size. For a multimodal model also a dict of sizes, ``{"image_size": (H, W) or a list of them,
            "video": (frames, H, W), "text_tokens": 60}`` (each may be left out; 60 is the default), or what its
            processor returned for one prompt. For a text model the length of the prompt, its ids, what a tokenizer
            returned, or ``{"text_tokens": 640, "prunable_tokens": 576}``: of 640 tokens, 576 may be dropped.
            With either, ``"kept_tokens": 64`` says how many visual (prunable) tokens are left at the end, for methods
            whose counts depend on the data (MustDrop, CoreMatching); others do not look at it.
        method: count as if reduced by this (anything that `tokred.patch` takes). None counts the model as it is: with
            the methods of its patch, if it is patched.
        causal: count half of the products of attention in a language model's prefill, ``T^2 d`` a layer instead of
            ``2 T^2 d``: what a causal mask leaves. Too few where visual tokens see each other both ways (Gemma 3).

    What only the data decides is counted as if nothing went: windows that MustDrop's encoder stage merges by
    threshold (`retained_tokens` fixes how many).

    Raises:
        UnsupportedModelError: no host can describe the model.
        MissingSiteError, ConflictError: the methods do not fit the model, or each other.
        InvalidParameterError: sizes that are not understood, or `kept_tokens` is missing.
    """
    model = _as_model(model_or_config)
    methods: Sequence[Method] = resolve(method, {}) if method is not None else ()
    record = None
    if method is None:
        record = next((m.__dict__["_tokred"] for m in model.modules() if "_tokred" in m.__dict__), None)
        methods = record.methods if record is not None else ()
    from tokred.adapters.registry import find_host
    from tokred.core.patch import check_fit

    host: Any = find_host(model)
    check_fit(host, methods)
    if not hasattr(host, "describe_prompt") and not hasattr(host, "describe_tokens"):
        return encoder_macs(encoder_info(model, inputs_or_sizes), *methods)
    from tokred.adapters.vlm_describe import filter_layer_of

    kept = inputs_or_sizes.get("kept_tokens") if isinstance(inputs_or_sizes, Mapping) else None
    options: dict[str, Any] = {
        "kept": None if kept is None else check_count("kept_tokens", kept),
        "filter_layer": None if record is None else filter_layer_of(record),
        "causal": causal,
    }
    if hasattr(host, "describe_tokens"):
        return text_macs(host.describe_decoder(), *host.describe_tokens(inputs_or_sizes), *methods, **options)
    if record is not None and record._options.get("exit") == "carry":
        methods = (*methods, CarriedTokens())
    return prompt_macs(host.describe_prompt(inputs_or_sizes), host.sites, *methods, **options)


def prompt_macs(
    info: PromptInfo,
    sites: Sequence[str],
    *methods: Method,
    kept: int | None = None,
    filter_layer: int | None = None,
    causal: bool = False,
) -> Flops:
    """Multiply-adds of one prompt of a multimodal model under `methods`.

    Args:
        kept: visual tokens that are left at the end, for methods whose counts depend on the data.
        filter_layer: the layer that a method of the `Prompt` site asks, where it is known; None lets the method say.
        causal: see `flops`.
    """
    visual, inside = _outside_language(methods, sites)
    tiles = sum(layout.partitions for layout in info.layouts)
    slots = sum(len(layout.slots) for layout in info.layouts)
    vision, scoring, blocks = info.vision_macs, 0, 0
    if inside and info.encoder is not None:
        plain, tile = encoder_macs(info.encoder), encoder_macs(info.encoder, *inside)
        vision -= tiles * (plain.vision - tile.vision)
        scoring, blocks = tiles * tile.scoring, tiles * tile.blocks
    entering = [len(layout.slots) for layout in info.layouts]
    if visual is not None:
        visual.needs(info.tower)  # refuses a tower that cannot give what it needs
        images = [layout for layout in info.layouts if layout.kind == "image"]
        joined = MediaLayout.as_video(images) if visual.joins_images and images else None
        layouts = info.layouts if joined is None else (joined, *(x for x in info.layouts if x.kind != "image"))
        entering = [_leaving(visual, layout, info, inside) for layout in layouts]
        scoring += sum(visual.scoring_macs(info.tower, layout, info.decoder.dim) for layout in layouts)
    language = _language(info.decoder, entering, info.text, methods, kept, filter_layer, causal)
    plain_language = _language(info.decoder, [], info.text + slots, (), None, None, causal)
    return Flops(
        vision=vision,
        llm=language.prefill,
        scoring=scoring + language.scoring,
        blocks=blocks,
        unreduced=info.vision_macs + plain_language.prefill,
        prompt=(language.entering[0], info.text + slots),
        llm_tokens=language.entering,
        cache_tokens=language.cached,
        decode=language.decode,
        unreduced_decode=plain_language.decode,
    )


def text_macs(
    info: DecoderInfo,
    prunable: int,
    other: int,
    *methods: Method,
    kept: int | None = None,
    filter_layer: int | None = None,
    causal: bool = False,
) -> Flops:
    """Multiply-adds of one prompt of a text model, of which `prunable` tokens may be dropped; see `prompt_macs`."""
    dropping = [m for m in methods if isinstance(m, DecoderMethod) and m.layers(info) and not m.sparse_layers(info)]
    if dropping and not prunable:
        raise InvalidParameterError(
            f"{type(dropping[0]).__name__} drops tokens that are marked as prunable, and a text model marks none by "
            'itself; say how many are: {"text_tokens": 640, "prunable_tokens": 576}'
        )
    language = _language(info, [prunable], other, methods, kept, filter_layer, causal)
    plain = _language(info, [], prunable + other, (), None, None, causal)
    return Flops(
        vision=0,
        llm=language.prefill,
        scoring=language.scoring,
        unreduced=plain.prefill,
        prompt=(language.entering[0], prunable + other),
        llm_tokens=language.entering,
        cache_tokens=language.cached,
        decode=language.decode,
        unreduced_decode=plain.decode,
    )


# -- language models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Language:
    """One prompt in a language model; the fields are those of `Flops`."""

    prefill: int
    scoring: int
    entering: tuple[int, ...]
    cached: tuple[int, ...]
    decode: int


def _language(
    info: DecoderInfo,
    visual: Sequence[int],
    text: int,
    methods: Sequence[Method],
    kept: int | None,
    filter_layer: int | None,
    causal: bool,
) -> _Language:
    """Count a prompt of so many visual tokens (of each image or video) and so many others."""
    prompt = next((m for m in methods if isinstance(m, PromptMethod)), None)
    inside = [m for m in methods if isinstance(m, DecoderMethod)]
    first, scoring, tokens = 0, 0, sum(visual)
    if prompt is not None and not prompt.bypasses(tokens, text):
        total = tokens + text
        layer = prompt.filter_layer(info, _no_probe) if filter_layer is None else filter_layer
        first = layer * _layer_macs(info, total, causal)
        first += total * info.dim * (info.heads + 2 * info.kv_heads) * info.head_dim  # its values come with the keys
        scoring += prompt.scoring_macs(info, total)
        left = prompt.kept(tokens, text, visual)
        if tokens and any(m.layers(info) for m in inside):
            raise InvalidParameterError(
                f"how many of the {left} tokens that {type(prompt).__name__} lets through are visual depends on the "
                f"prompt, and so does what {type(inside[0]).__name__} drops of them; count one of the two"
            )
        tokens, text = 0, left
    entering, added = _entering(info, inside, tokens, text, kept)
    cached = entering
    for method in inside:
        cached = tuple(map(min, cached, method.cached(info, entering)))
    weights = info.depth * info.layer_macs
    decode = weights - sum(weights - method.decode_macs(info) for method in inside)
    return _Language(
        prefill=first + sum(_layer_macs(info, text + n, causal) for n in entering),
        scoring=scoring + added,
        entering=tuple(text + n for n in entering),
        cached=tuple(text + n for n in cached),
        decode=decode + sum(2 * (text + n + 1) * info.width for n in cached),
    )


def _entering(
    info: DecoderInfo, methods: Sequence[DecoderMethod], visual: int, text: int, kept: int | None
) -> tuple[tuple[int, ...], int]:
    """Visual tokens that enter each layer, and the multiply-adds of choosing them."""
    dropping = [method for method in methods if method.layers(info)]
    if len(dropping) > 1:
        names = " and ".join(type(method).__name__ for method in dropping)
        raise InvalidParameterError(
            f"{names} both drop tokens between layers: what the second finds depends on the first; count one of them"
        )
    entering = (visual,) * info.depth
    if not visual:
        return entering, 0
    for method in dropping:
        entering = method.entering(info, visual, kept)
    return entering, sum(method.scoring_macs(info, entering, text) for method in methods)


def _layer_macs(info: DecoderInfo, tokens: int, causal: bool) -> int:
    return tokens * info.layer_macs + (1 if causal else 2) * tokens * tokens * info.width


def _no_probe(ids: Tensor, layers: Sequence[int]) -> NoReturn:
    """Methods that measure a layer need a model that runs."""
    raise InvalidParameterError(
        "the layer that chooses is found by running the model, and multiply-adds are counted without: give layer=, or "
        "count the patched model"
    )


# -- in front of language models ---------------------------------------------------------------------------------------


def _outside_language(methods: Sequence[Method], sites: Sequence[str]) -> tuple[VisualMethod | None, list[Method]]:
    """What acts between vision encoder and language model, and what acts inside the encoder."""
    language = [m for m in methods if isinstance(m, (DecoderMethod, PromptMethod))]
    visual = [m for m in methods if isinstance(m, VisualMethod) and "VisualFeatures" in m.acts_at(sites)]
    inside = [m for m in methods if m not in visual and m not in language]
    for method in language:
        if isinstance(method, DecoderMethod):
            visual += [part for part in [method.visual_part()] if part is not None]
            inside += [part for part in [method.encoder_part()] if part is not None]
    if len(visual) > 1:
        names = " and ".join(type(m).__name__ for m in visual)
        raise ConflictError(f"{names} both choose the visual tokens that the language model reads; give one of them")
    return (visual[0] if visual else None), inside


def _leaving(method: VisualMethod, layout: MediaLayout, info: PromptInfo, inside: Sequence[Method]) -> int:
    """Tokens of one image or video that enter the language model, row ends and class tokens included."""
    carried = isinstance(method, CarriedTokens) and info.encoder is not None
    if method.bypasses(layout) and not carried:
        return len(layout.slots)
    stay = {MediaLayout.CLASS, MediaLayout.END} | ({MediaLayout.NEWLINE} if method.keep_newline else set())
    kept = method.kept(layout)
    if carried:
        if layout.merge > 1 or not layout.uniform or not info.tower.projects:
            return len(layout.slots)
        assert info.encoder is not None
        left = _after_layer(info.encoder, info.tower.feature_layer, inside)
        kept = round(kept * left / info.encoder.tokens)  # exact unless unpadding cut cells of the tiles
    return kept + sum(slot in stay for slot in layout.slots)


def _after_layer(info: EncoderInfo, layer: int, methods: Sequence[Method]) -> int:
    """Patch tokens of one image behind a block of the encoder."""
    rules, tokens = _rules(info, methods), info.tokens
    for block in sorted(rules):
        method, rule = rules[block]
        if block <= layer and method.acts(tokens, rule):
            tokens = method.count(tokens, rule)
    return tokens


def _rules(info: EncoderInfo, methods: Sequence[Method]) -> dict[int, tuple[EncoderMethod, Any]]:
    rules: dict[int, tuple[EncoderMethod, Any]] = {}
    for method in methods:
        if isinstance(method, EncoderMethod):
            rules.update({layer: (method, rule) for layer, rule in method.bind(info).items()})
    return rules


# -- vision encoders ---------------------------------------------------------------------------------------------------


def encoder_info(model: nn.Module, inputs_or_sizes: object = None) -> EncoderInfo:
    """Describe the vision encoder of a model, for images of the given size (as `flops` takes it)."""
    from tokred.adapters.registry import find_host

    host = find_host(model)
    if not hasattr(host, "info_for"):
        raise UnsupportedModelError(f"{host.family} models have no vision encoder that can be described")
    return host.info_for(_image_size(inputs_or_sizes))


def encoder_macs(info: EncoderInfo, *methods: Method) -> Flops:
    """Multiply-adds of one image through a vision encoder under `methods`."""
    rules = _rules(info, methods)
    fixed = info.tokens * info.embed_macs + info.head_macs
    full = info.tokens + info.prefix
    tokens, blocks, scoring, seen = info.tokens, 0, 0, []
    for layer in range(info.depth):
        before = tokens
        if layer in rules:
            method, rule = rules[layer]
            if method.acts(tokens, rule):
                scoring += method.cost(info, tokens, rule)
                tokens = method.count(tokens, rule)
            entering = tokens if method.placement == "attn" else before
        else:
            entering = before
        seen.append((before + info.prefix, entering + info.prefix))
        blocks += info.block_macs(*seen[-1])
    return Flops(
        vision=fixed + tokens * info.pool_macs + blocks,
        scoring=scoring,
        blocks=blocks,
        unreduced=fixed + info.tokens * info.pool_macs + info.depth * info.block_macs(full, full),
        tokens=tuple(seen),
    )


def _as_model(source: object) -> nn.Module:
    if isinstance(source, nn.Module):
        from tokred.core.patch import unwrap

        return unwrap(source)
    if isinstance(source, str) or hasattr(source, "model_type"):
        from tokred.adapters.configs import model_from_config, model_from_name

        with torch.device("meta"):
            return model_from_name(source) if isinstance(source, str) else model_from_config(source)
    raise InvalidParameterError(
        f"expected a model, a transformers config or the name of a timm architecture, got {type(source).__name__}"
    )


def _image_size(given: object) -> tuple[int, int] | None:
    if given is None:
        return None
    if isinstance(given, Tensor):
        return int(given.shape[-2]), int(given.shape[-1])
    if isinstance(given, Mapping):
        return _image_size(given.get("pixel_values", given.get("x")))
    if isinstance(given, int):
        return given, given
    if isinstance(given, Sequence) and len(given) == 2:
        return int(given[0]), int(given[1])
    raise InvalidParameterError(f"inputs_or_sizes={given!r}: expected a batch of images, (height, width) or a side")
