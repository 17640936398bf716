"""Multiply-adds by part, of a model or of a config without weights, reduced or not.

Counted are matrix products (projections, q k^T, attention times v, MLP, patch embedding, heads) and the scoring of a
method; norms, softmax, activations and sorting are not. This is the convention of the token reduction papers up to
about 1 %: DeiT-S is 4.60 G.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, UnsupportedModelError
from tokred.core.method import EncoderMethod, Method, VisualMethod, resolve
from tokred.core.sites import EncoderInfo, MediaLayout, PromptInfo

__all__ = ["Flops", "encoder_info", "encoder_macs", "flops", "prompt_macs"]


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of one image, or of the prefill of one prompt.

    Attributes:
        vision: encoder with embedding and head (and projector). llm: language model, without its head. scoring: what
            the methods add.
        blocks: the part of `vision` that its blocks take (Zero-TPrune's paper counts blocks and scoring only).
        unreduced: vision and llm without any reduction.
        tokens: tokens per block that enter attention and MLP, prefix included, [(attention, mlp), ...].
        prompt: tokens that enter the language model, and how many it would be without reduction.
    """

    vision: int
    llm: int = 0
    scoring: int = 0
    blocks: int = 0
    unreduced: int = 0
    tokens: tuple[tuple[int, int], ...] = ()
    prompt: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        return self.vision + self.llm + self.scoring

    @property
    def reduction(self) -> float:
        """Share of the unreduced multiply-adds that is saved."""
        return 1 - self.total / self.unreduced if self.unreduced else 0.0

    def __str__(self) -> str:
        parts = [f"vision {self.vision / 1e9:.4g} G"]
        parts += [f"llm {self.llm / 1e9:.4g} G"] if self.llm else []
        parts += [f"scoring {self.scoring / 1e9:.4g} G"] if self.scoring else []
        return f"{self.total / 1e9:.4g} G multiply-adds ({', '.join(parts)}; {-self.reduction:+.1%})"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "reduction": self.reduction}


def flops(model_or_config: object, inputs_or_sizes: object = None, method: object = None) -> Flops:
    """Count the multiply-adds of one image.

    Args:
        model_or_config: a model (patched or not, also on the meta device), a transformers config, or the name of a
            timm architecture. No weights are needed.
        inputs_or_sizes: what the model is run on: a batch (B, 3, H, W), an image size (H, W) or side H; None is the
            model's own size. For a multimodal model also a dict of sizes, ``{"image_size": (H, W) or a list of them,
            "video": (frames, H, W), "text_tokens": 60}`` (each may be left out; 60 is the default), or what its
            processor returned for one prompt.
        method: count as if reduced by this (anything that `tokred.patch` takes). None counts the model as it is: with
            the methods of its patch, if it is patched.

    Raises:
        UnsupportedModelError: no host can describe the model.
    """
    model = _as_model(model_or_config)
    methods: Sequence[Method] = resolve(method, {}) if method is not None else ()
    if method is None:
        record = next((m.__dict__["_tokred"] for m in model.modules() if "_tokred" in m.__dict__), None)
        methods = record.methods if record is not None else ()
    from tokred.adapters.registry import find_host

    host = find_host(model)
    if hasattr(host, "describe_prompt"):
        return prompt_macs(host.describe_prompt(inputs_or_sizes), host.sites, *methods)
    return encoder_macs(encoder_info(model, inputs_or_sizes), *methods)


def prompt_macs(info: PromptInfo, sites: Sequence[str], *methods: Method) -> Flops:
    """Multiply-adds of the prefill of one prompt of a multimodal model under `methods`."""
    visual = [m for m in methods if isinstance(m, VisualMethod) and "VisualFeatures" in m.acts_at(sites)]
    inside = [m for m in methods if m not in visual]
    tiles = sum(layout.partitions for layout in info.layouts)
    slots = sum(len(layout.slots) for layout in info.layouts)
    vision, scoring, blocks = info.vision_macs, 0, 0
    if inside and info.encoder is not None:
        plain, tile = encoder_macs(info.encoder), encoder_macs(info.encoder, *inside)
        vision -= tiles * (plain.vision - tile.vision)
        scoring, blocks = tiles * tile.scoring, tiles * tile.blocks
    kept = slots
    for method in visual:
        method.needs(info.tower)  # refuses a tower that cannot give what it needs
        images = [layout for layout in info.layouts if layout.kind == "image"]
        joined = MediaLayout.as_video(images) if method.joins_images and images else None
        layouts = info.layouts if joined is None else (joined, *(x for x in info.layouts if x.kind != "image"))
        kept = sum(_leaving(method, layout) for layout in layouts)
        scoring += sum(method.scoring_macs(info.tower, layout, info.decoder.dim) for layout in layouts)
    return Flops(
        vision=vision,
        llm=info.decoder.macs(info.text + kept),
        scoring=scoring,
        blocks=blocks,
        unreduced=info.vision_macs + info.decoder.macs(info.text + slots),
        prompt=(info.text + kept, info.text + slots),
    )


def _leaving(method: VisualMethod, layout: MediaLayout) -> int:
    """Tokens of one image or video that enter the language model, row ends and class tokens included."""
    if method.bypasses(layout):
        return len(layout.slots)
    stay = {MediaLayout.CLASS, MediaLayout.END} | ({MediaLayout.NEWLINE} if method.keep_newline else set())
    return method.kept(layout) + sum(slot in stay for slot in layout.slots)


def encoder_info(model: nn.Module, inputs_or_sizes: object = None) -> EncoderInfo:
    """Describe the vision encoder of a model, for images of the given size (as `flops` takes it)."""
    from tokred.adapters.registry import find_host

    host = find_host(model)
    if not hasattr(host, "info_for"):
        raise UnsupportedModelError(f"{host.family} models have no vision encoder that can be described")
    return host.info_for(_image_size(inputs_or_sizes))


def encoder_macs(info: EncoderInfo, *methods: Method) -> Flops:
    """Multiply-adds of one image through a vision encoder under `methods`."""
    rules: dict[int, tuple[EncoderMethod, Any]] = {}
    for method in methods:
        if isinstance(method, EncoderMethod):
            rules.update({layer: (method, rule) for layer, rule in method.bind(info).items()})
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
