"""Calls of multimodal models in numbers, from sizes alone: what `tokred.flops` counts with. Works on meta tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.towers import PlainTower, Seen
from tokred.core.errors import InvalidParameterError, UnsupportedModelError
from tokred.core.sites import DecoderInfo, MediaLayout, PromptInfo

__all__ = ["describe_prompt"]

TEXT_TOKENS = 60
_KEYS = ("image_size", "video", "text_tokens")


def describe_prompt(host: Any, given: object) -> PromptInfo:
    """Describe one prompt of `host` (an `HFVLMHost`), see `tokred.flops`."""
    parts = host.parts
    if isinstance(given, Mapping) and "input_ids" in given:
        layouts, text = _from_inputs(parts, given)
    else:
        layouts, text = _from_sizes(parts, given)
    tower = parts.make_tower()
    cells = max((parts.tower_cells(layout) for layout in layouts), default=0)
    return PromptInfo(
        layouts=tuple(layouts),
        text=text,
        tower=tower.info,
        tower_macs=_tower_macs(parts, tower, cells),
        projector_macs=_projector_macs(parts),
        decoder=_decoder(parts.language_model),
        encoder=_encoder_info(host),
    )


def _from_sizes(parts: Any, given: object) -> tuple[list[MediaLayout], int]:
    sizes: dict[str, Any] = {} if given is None else {"image_size": given}
    if isinstance(given, Mapping):
        sizes = dict(given)
    unknown = [key for key in sizes if key not in _KEYS]
    if unknown:
        raise InvalidParameterError(f"sizes have the key {unknown[0]!r}; expected {', '.join(_KEYS)}, or input_ids")
    layouts: list[MediaLayout] = []
    images = _sizes(parts, sizes.get("image_size")) if "image_size" in sizes or "video" not in sizes else []
    if images:
        layouts += parts.layouts(_image_call(parts, images))
    if sizes.get("video") is not None:
        if "video" not in parts.medias:
            raise UnsupportedModelError(f"{type(parts.inner).__name__} takes no videos")
        layouts += parts.layouts(_video_call(parts, tuple(int(n) for n in sizes["video"])))
    return layouts, int(sizes.get("text_tokens", TEXT_TOKENS))


def _from_inputs(parts: Any, given: Mapping[str, Any]) -> tuple[list[MediaLayout], int]:
    ids = given["input_ids"]
    if ids.shape[0] != 1:
        raise InvalidParameterError(f"inputs have {ids.shape[0]} prompts; multiply-adds are counted for one")
    layouts: list[MediaLayout] = []
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for media in parts.medias:
        if given.get("pixel_values" if media == "image" else "pixel_values_videos") is not None:
            layouts += parts.layouts(Seen(media, given))
            visual |= ids == parts.placeholder(media)
    return layouts, int((~visual).sum())


def _sizes(parts: Any, given: Any) -> list[tuple[int, int]]:
    if given is None:
        side = getattr(parts.config.vision_config, "image_size", None)
        if side is None:
            raise InvalidParameterError('this model has no image size of its own; give {"image_size": (H, W)}')
        given = side
    if isinstance(given, Tensor):
        given = (int(given.shape[-2]), int(given.shape[-1]))
    if isinstance(given, int):
        given = (given, given)
    if isinstance(given, Sequence) and given and isinstance(given[0], int):
        given = [given]
    return [(int(height), int(width)) for height, width in given]


def _image_call(parts: Any, sizes: list[tuple[int, int]]) -> Seen:
    if parts.mrope:
        grids = torch.tensor([[1, h // parts.patch, w // parts.patch] for h, w in sizes])
        return Seen("image", {"image_grid_thw": grids})
    side = getattr(parts.config.vision_config, "image_size", 0)
    height, width = (side, side) if isinstance(side, int) else side
    seen = Seen(
        "image", {"pixel_values": torch.empty(len(sizes), 3, height, width, device="meta"), "image_sizes": sizes}
    )
    tokens = torch.empty(len(sizes), 0, 0, device="meta")
    seen.output = _Output(tokens)
    return seen


def _video_call(parts: Any, size: tuple[int, ...]) -> Seen:
    frames, height, width = size
    if parts.mrope:
        step = int(parts.config.vision_config.temporal_patch_size)
        grid = torch.tensor([[-(-frames // step), height // parts.patch, width // parts.patch]])
        return Seen("video", {"video_grid_thw": grid})
    return Seen("video", {"pixel_values_videos": torch.empty(1, frames, 3, height, width, device="meta")})


class _Output:
    """As much of a tower's output as layouts look at."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state


def _tower_macs(parts: Any, tower: Any, cells: int) -> int:
    """Multiply-adds of one tile (or frame) of `cells` patches."""
    blocks = tower.layers if isinstance(tower, PlainTower) else tower.blocks
    tokens = cells + (tower.prefix if isinstance(tower, PlainTower) else 0)
    dim = _square_width(blocks[0])
    windows = getattr(parts.tower_module, "fullatt_block_indexes", None)
    macs = 0
    for index, block in enumerate(blocks):
        reach = tokens
        if windows is not None and index not in windows:
            reach = min(tokens, (parts.tower_module.window_size // parts.patch) ** 2)
        macs += tokens * _linear(block) + 2 * tokens * reach * dim
    embed = sum(
        m.weight.numel() for m in _embedding(parts.tower_module) if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))
    )
    return macs + cells * embed


def _embedding(tower: Any) -> list[nn.Module]:
    inner = getattr(tower, "vision_model", tower)
    embeddings = getattr(inner, "embeddings", None) or getattr(inner, "patch_embed", None)
    return list(embeddings.modules()) if embeddings is not None else []


def _square_width(block: nn.Module) -> int:
    """Width of all attention heads together."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("q_proj"):
            return module.out_features
        if isinstance(module, nn.Linear) and name.endswith("qkv"):
            return module.out_features // 3
    raise UnsupportedModelError(f"{type(block).__name__} has no q_proj or qkv to read its width from")


def _linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _projector_macs(parts: Any) -> int:
    if parts.projector is not None:
        projector = getattr(parts.inner, parts.projector)
        return _linear(projector) + sum(p.numel() for p in projector.parameters(recurse=False))
    return _linear(parts.tower_module.merger)


def _decoder(language: Any) -> DecoderInfo:
    layer = language.layers[0]
    dim = int(language.config.hidden_size)
    return DecoderInfo(len(language.layers), dim, _square_width(layer), _linear(layer))


def _encoder_info(host: Any) -> Any:
    """The tower for methods inside it, where a host of vision encoders serves it."""
    try:
        return host.tower_host().info
    except UnsupportedModelError:
        return None
