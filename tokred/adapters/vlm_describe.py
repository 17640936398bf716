"""Calls of multimodal models in numbers, from sizes alone: what `tokred.flops` counts with. Works on meta tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.decoder_parts import decoder_info
from tokred.adapters.decoder_session import DecoderSession
from tokred.adapters.hf_vlm import Pipeline
from tokred.adapters.towers import PlainTower, QwenTower, Seen
from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError, UnsupportedModelError
from tokred.core.sites import MediaLayout, PromptInfo

__all__ = ["describe_prompt", "filter_layer_of"]

TEXT_TOKENS = 60
_KEYS = ("image_size", "video", "text_tokens", "kept_tokens")


def describe_prompt(host: Any, given: object) -> PromptInfo:
    """Describe one prompt of `host` (an `HFVLMHost`), see `tokred.flops`."""
    parts = host.parts
    if isinstance(given, Mapping) and "input_ids" in given:
        calls, text = _from_inputs(parts, given)
    else:
        calls, text = _from_sizes(parts, given)
    tower = parts.make_tower()
    return PromptInfo(
        layouts=tuple(layout for _, layouts in calls for layout in layouts),
        text=text,
        tower=tower.info,
        vision_macs=sum(_vision_macs(parts, tower, seen, layouts) for seen, layouts in calls),
        decoder=decoder_info(parts.language_model),
        encoder=_encoder_info(host),
    )


def filter_layer_of(patch: Any) -> int | None:
    """The layer that a patch's method of the `Prompt` site asks; None if it has none."""
    parts = patch._attachment.parts if isinstance(patch._attachment, Pipeline) else ()
    filters = [part.filter for part in parts if isinstance(part, DecoderSession)]
    return next((one.layer for one in filters if one is not None), None)


Call = tuple[Seen, list[MediaLayout]]


def _from_sizes(parts: Any, given: object) -> tuple[list[Call], int]:
    sizes: dict[str, Any] = {} if given is None else {"image_size": given}
    if isinstance(given, Mapping):
        sizes = dict(given)
    unknown = [key for key in sizes if key not in _KEYS]
    if unknown:
        raise InvalidParameterError(f"sizes have the key {unknown[0]!r}; expected {', '.join(_KEYS)}, or input_ids")
    calls: list[Seen] = []
    images = _sizes(parts, sizes.get("image_size")) if "image_size" in sizes or "video" not in sizes else []
    if images:
        calls.append(_image_call(parts, images))
    if sizes.get("video") is not None:
        if "video" not in parts.medias:
            raise UnsupportedModelError(f"{type(parts.inner).__name__} takes no videos")
        calls.append(_video_call(parts, tuple(int(n) for n in sizes["video"])))
    return [(seen, parts.layouts(seen)) for seen in calls], check_count(
        "text_tokens", sizes.get("text_tokens", TEXT_TOKENS)
    )


def _from_inputs(parts: Any, given: Mapping[str, Any]) -> tuple[list[Call], int]:
    ids = given["input_ids"]
    if ids.shape[0] != 1:
        raise InvalidParameterError(f"inputs have {ids.shape[0]} prompts; multiply-adds are counted for one")
    calls: list[Call] = []
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for media in parts.medias:
        if given.get("pixel_values" if media == "image" else "pixel_values_videos") is not None:
            seen = Seen(media, given)
            calls.append((seen, parts.layouts(seen)))
            visual |= ids == parts.placeholder(media)
    return calls, int((~visual).sum())


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


def _vision_macs(parts: Any, tower: Any, seen: Seen, layouts: list[MediaLayout]) -> int:
    """Multiply-adds of tower and projector in one call."""
    if isinstance(tower, QwenTower):
        return sum(_qwen_macs(parts, tower, layout) for layout in layouts)
    height, width = parts.pixels(seen).shape[-2:]
    cells = (height // parts.patch) * (width // parts.patch)
    tiles = sum(layout.partitions for layout in layouts)
    projected = sum(_projected(parts, layout, cells) for layout in layouts)
    return tiles * _tile_macs(parts, tower, cells) + projected * _projector_macs(parts)


def _tile_macs(parts: Any, tower: PlainTower, cells: int) -> int:
    """Multiply-adds of one tile (or frame) of `cells` patches in a plain tower, its pooling head included."""
    tokens, dim = cells + tower.prefix, _square_width(tower.layers[0])
    macs = cells * _embed_macs(parts) + len(tower.layers) * 2 * tokens * tokens * dim
    macs += tokens * sum(_linear(block) for block in tower.layers)
    if tower.head is not None:  # a probe reads all tokens
        macs += 2 * dim * dim + 2 * tokens * dim * (dim + 1) + _linear(tower.head.mlp)
    return macs


def _projected(parts: Any, layout: MediaLayout, cells: int) -> int:
    """Tokens of one image or video that go through the projector."""
    if layout.kind == "video" and parts.pools_behind_projector:
        return layout.partitions * cells
    return layout.total_cells + layout.slots.count(MediaLayout.CLASS)


def _qwen_macs(parts: Any, tower: QwenTower, layout: MediaLayout) -> int:
    """Multiply-adds of one image or video: attention stays inside a frame, in some layers inside windows."""
    module, merge = parts.tower_module, layout.merge
    rows, columns, frames = layout.grid[0] * merge, layout.grid[1] * merge, layout.partitions
    tokens, dim = frames * rows * columns, _square_width(tower.blocks[0])
    whole, windowed = frames * (rows * columns) ** 2, 0
    full = getattr(module, "fullatt_block_indexes", range(len(tower.blocks)))
    if hasattr(module, "window_size"):
        grid = torch.tensor([[frames, rows, columns]])
        _, bounds = sys.modules[type(module).__module__].get_vision_window_index(
            grid,
            spatial_merge_size=module.spatial_merge_size,
            window_size=module.window_size,
            patch_size=module.patch_size,
            kwargs={},
        )
        windowed = int(bounds.diff().square().sum())
    macs = tokens * (_embed_macs(parts) + sum(_linear(block) for block in tower.blocks))
    macs += sum(2 * dim * (whole if layer in full else windowed) for layer in range(len(tower.blocks)))
    mergers = [module.merger, *getattr(module, "deepstack_merger_list", ())]
    return macs + layout.total_cells * sum(_linear(merger) for merger in mergers)


def _embed_macs(parts: Any) -> int:
    """Multiply-adds of one patch's embedding."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    return sum(m.weight.numel() for m in _embedding(parts.tower_module) if isinstance(m, kinds))


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
    """Multiply-adds of one token in the projector."""
    projector = getattr(parts.inner, parts.projector)
    return _linear(projector) + sum(p.numel() for p in projector.parameters(recurse=False))


def _encoder_info(host: Any) -> Any:
    """The tower for methods inside it, where a host of vision encoders serves it."""
    try:
        return host.tower_host().info
    except UnsupportedModelError:
        return None
