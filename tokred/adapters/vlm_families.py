"""What differs between the multimodal families of transformers: where parts are, how tokens lie, how masks are made.

A family describes one inner model (`LlavaModel`, `Qwen3VLModel`, ...): its language model, vision tower and projector,
and, for each image or video of a call, the `MediaLayout` of its placeholders. No family forward is copied; the packing
of LLaVA-NeXT is run by its own function, on cell numbers instead of features.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred.adapters.towers import PlainTower, QwenTower, Seen, Tower
from tokred.core.errors import UnsupportedModelError
from tokred.core.sites import MediaLayout

__all__ = ["FAMILIES", "Family", "family_of"]


class Family(ABC):
    """One inner multimodal model.

    Class attributes:
        language, tower, projector: names of its parts. medias: what its placeholders stand for.
        mrope: whether positions have axes for time, height and width. position_base: position of the first token.
        pools_behind_projector: whether every cell of a frame is projected and pooled afterwards.
        fixed: notes for the hosts page, option -> reason.
    """

    language: ClassVar[str] = "language_model"
    tower_name: ClassVar[str] = "vision_tower"
    projector: ClassVar[str | None] = "multi_modal_projector"
    medias: ClassVar[tuple[str, ...]] = ("image",)
    mrope: ClassVar[bool] = False
    position_base: ClassVar[int] = 0
    pools_behind_projector: ClassVar[bool] = False
    #: cells of the tower along each side of one token
    merge: int = 1

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.config = inner.config
        patch = getattr(self.config.vision_config, "patch_size", 1)
        self.patch = int(patch[0] if isinstance(patch, (list, tuple)) else patch)

    @property
    def language_model(self) -> nn.Module:
        return getattr(self.inner, self.language)

    @property
    def tower_module(self) -> nn.Module:
        return getattr(self.inner, self.tower_name)

    def make_tower(self) -> Tower:
        return PlainTower(self.tower_module, self.feature_layer(), projects=False)

    def feature_layer(self) -> int | None:
        """0-based, the last tower layer that contributes to the features; None is the last of all."""
        return None

    def placeholder(self, media: str) -> int:
        """Token id of a media's placeholder."""
        value = getattr(self.config, f"{media}_token_id", None)
        return value if value is not None else getattr(self.config, f"{media}_token_index")

    def embed_placeholder(self, media: str, like: Tensor) -> Tensor:
        """(D,) embedding of a placeholder, as the library writes it into `inputs_embeds`."""
        token = torch.full((), self.placeholder(media), dtype=torch.long, device=like.device)
        return self.inner.get_input_embeddings()(token)

    @abstractmethod
    def layouts(self, seen: Seen) -> list[MediaLayout]:
        """The layout of each image (or video) of one call, in order."""

    def tiles(self, seen: Seen) -> list[int]:
        """How many tower outputs belong to each item."""
        return [layout.partitions for layout in self.layouts(seen)]

    def tower_features(self, seen: Seen) -> Tensor:
        """(tiles, N, C): the tower tokens that the projector reads, class token included where there is one."""
        return seen.output.last_hidden_state

    def project(self, x: Tensor) -> Tensor:
        assert self.projector is not None
        return getattr(self.inner, self.projector)(x)

    def newline(self) -> Tensor | None:
        value = getattr(self.inner, "image_newline", None)
        return None if value is None else value.detach()

    def dense_hook(self, collect: Callable[[Tensor], None]) -> list[Any]:
        """Catch frame features before they are pooled; nothing where the host does not pool."""
        return []

    def finish(self, x: Tensor) -> Tensor:
        """Language model features of resampled dense features."""
        return x

    def rebuild_mask(self, types: Tensor | None, mask: Tensor, embeds: Tensor, cache: Any) -> Any:
        """What the language model takes as attention mask, given the (B, keys) mask of real tokens."""
        return mask

    def layer_mask(self, types: Tensor | None, mask: Tensor, hidden: Tensor, cache: Any, layer: int) -> Any:
        """The mask of one layer, where the family's is not simply causal (else None); {kind of layer: mask} if several.

        Args:
            types: (B, T) token types of a prompt, None behind it. mask: (B, keys). hidden: (B, q, D).
        """
        return None

    def mask_arguments(self, mask: Tensor, embeds: Tensor, cache: Any) -> dict[str, Any]:
        """What the mask functions of the library are given."""
        return {
            "config": self.config.get_text_config(),
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "past_key_values": cache,
            "position_ids": None,
        }

    @property
    def library(self) -> Any:
        """The library's module of this family; a subclass of a user lies elsewhere."""
        own = next(cls for cls in type(self.inner).__mro__ if cls.__name__ in FAMILIES)
        return sys.modules[own.__module__]

    def pixels(self, seen: Seen) -> Tensor:
        """The pixel tensor of a call."""
        value = seen.arguments.get("pixel_values_videos")
        return seen.arguments["pixel_values"] if value is None else value

    def pictures(self, seen: Seen, item: int, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """(T, H, W, 3) uint8: frames of one item; `scale` undoes the processor's normalisation of (T, 3, H, W)."""
        pixels = self.pixels(seen)
        count = self.tiles(seen)
        if seen.kind == "video":
            pixels = pixels[item]
        elif pixels.dim() == 5:  # tiles of each image, padded to the most
            pixels = pixels[item, : count[item]]
        else:
            pixels = pixels[sum(count[:item]) : sum(count[: item + 1])]
        return scale(pixels).permute(0, 2, 3, 1).cpu()


class Llava(Family):
    """LLaVA-1.5: one tile, one token a patch."""

    def make_tower(self) -> Tower:
        return PlainTower(self.tower_module, self.feature_layer(), projects=True)

    def feature_layer(self) -> int:
        depth = self.config.vision_config.num_hidden_layers
        chosen = self.config.vision_feature_layer
        layers = [chosen] if isinstance(chosen, int) else list(chosen)
        return max(depth + layer if layer < 0 else layer - 1 for layer in layers)

    def selected(self, seen: Seen, name: str) -> Any:
        value = seen.arguments.get(name)
        return getattr(self.config, name) if value is None else value

    @property
    def side(self) -> tuple[int, int]:
        vision = self.config.vision_config
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        return size // self.patch, size // self.patch

    def tower_features(self, seen: Seen) -> Tensor:
        layers = self.selected(seen, "vision_feature_layer")
        hidden = seen.output.hidden_states
        return hidden[layers] if isinstance(layers, int) else torch.cat([hidden[layer] for layer in layers], dim=-1)

    def has_class_slot(self, seen: Seen) -> bool:
        """Whether a class token is fed to the language model ("full" features of a tower that has one)."""
        classes = hasattr(getattr(self.tower_module, "vision_model", self.tower_module).embeddings, "class_embedding")
        return classes and self.selected(seen, "vision_feature_select_strategy") == "full"

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        pixels = self.pixels(seen)
        grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        layout = single(grid, class_token=self.has_class_slot(seen))
        return [layout] * pixels.shape[0]


class LlavaNext(Llava):
    """LLaVA-NeXT: overview and tiles (anyres), padding cut off, a newline behind each row of the mosaic."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.remembered: dict[tuple[Any, ...], MediaLayout] = {}

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        sizes = [tuple(int(side) for side in size) for size in seen.arguments["image_sizes"]]
        return [self.known(size) for size in sizes]

    def known(self, *key: Any) -> MediaLayout:
        """`layout_of`, remembered: a pass asks for it several times."""
        if len(self.remembered) > 256:
            self.remembered.clear()
        if key not in self.remembered:
            self.remembered[key] = self.layout_of(*key)
        return self.remembered[key]

    def layout_of(self, size: tuple[int, ...], *packing: Any) -> MediaLayout:
        """Run the library's own packing on cell numbers."""
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        rows, columns = self.side
        tiles = int(self.library.image_size_to_num_patches(image_size=size, grid_pinpoints=pinpoints, patch_size=side))
        mosaic = tuple(int(n) for n in self.library.get_anyres_image_grid_shape(size, pinpoints, side))
        cells = torch.arange(tiles * rows * columns, dtype=torch.float32).reshape(tiles, rows * columns, 1)
        slots, uniform = self.pack(cells, size, *packing)
        return MediaLayout(
            kind="image",
            partitions=tiles,
            grid=(rows, columns),
            slots=slots,
            mosaic=mosaic if tiles > 1 else None,  # type: ignore[arg-type]
            overview=0 if tiles > 1 else None,
            size=(size[0], size[1]),
            uniform=uniform,
        )

    def pack(self, cells: Tensor, size: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """Slots of one image, given the numbers of its cells (tiles, N, 1), and whether each is a cell as it was."""
        newline = torch.tensor([float(MediaLayout.NEWLINE)])
        packed, _ = self.inner.pack_image_features(
            [cells], [torch.tensor(size)], vision_feature_select_strategy="full", image_newline=newline
        )
        return tuple(int(slot) for slot in packed[0][:, 0].tolist()), True


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT; frames pooled before the projector."""

    medias: ClassVar[tuple[str, ...]] = ("image", "video")

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        if seen.kind == "image":
            return super().layouts(seen)
        videos, frames = seen.arguments["pixel_values_videos"].shape[:2]
        return [video(frames, self.pooled)] * videos

    @property
    def pooled(self) -> tuple[int, int]:
        stride = self.config.spatial_pool_stride
        return self.side[0] // stride, self.side[1] // stride

    def dense_hook(self, collect: Callable[[Tensor], None]) -> list[Any]:
        return [self.inner.vision_resampler.register_forward_pre_hook(Collect(collect))]

    def finish(self, x: Tensor) -> Tensor:
        return self.project(x)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: the mosaic may be resampled; frames pooled behind the projector, a newline behind a video."""

    medias: ClassVar[tuple[str, ...]] = ("image", "video")
    pools_behind_projector = True

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        if seen.kind == "video":
            videos, frames = seen.arguments["pixel_values_videos"].shape[:2]
            grid = (-(-self.side[0] // 2), -(-self.side[1] // 2))
            return [video(frames, grid, end=1)] * videos
        sizes = [tuple(int(side) for side in size) for size in seen.arguments["image_sizes"]]
        counts = seen.arguments.get("batch_num_images")
        single_image = [True] * len(sizes) if counts is None else [int(n) == 1 for n in counts for _ in range(int(n))]
        aspect = self.selected(seen, "vision_aspect_ratio")
        tiled = zip(sizes, single_image, strict=True)
        return [self.known(size, aspect) if alone else self._plain() for size, alone in tiled]

    def _plain(self) -> MediaLayout:
        """One image of several: no tiles; the library puts a newline behind it."""
        grid = self.side
        slots = (*range(grid[0] * grid[1]), MediaLayout.NEWLINE)
        return MediaLayout(kind="image", partitions=1, grid=grid, slots=slots)

    def pack(  # type: ignore[override]
        self, cells: Tensor, size: tuple[int, ...], aspect: str | None = None
    ) -> tuple[tuple[int, ...], bool]:
        newline = torch.tensor([float("inf")])
        aspect = aspect or self.config.vision_aspect_ratio
        packed, _ = self.inner.pack_image_features([cells], [torch.tensor(size)], newline, aspect)
        values = packed[0][:, 0]
        exact = values[values.isfinite()]
        uniform = bool((exact == exact.round()).all()) and exact.unique().numel() == exact.numel()
        if not uniform:  # resampled: number its tokens on, behind the overview's
            overview = cells.shape[1]
            numbers = torch.cat([values[:overview], torch.arange(exact.numel() - overview) + overview])
            values = values.clone()
            values[values.isfinite()] = numbers
        slots = tuple(MediaLayout.NEWLINE if value == float("inf") else int(value) for value in values.tolist())
        return slots, uniform

    def dense_hook(self, collect: Callable[[Tensor], None]) -> list[Any]:
        return [self.inner.multi_modal_projector.register_forward_hook(Collect(collect))]


class InternVL(Family):
    """InternVL: each tile (and each frame of a video) is an image of its own; 2 x 2 cells make a token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.merge = round(1 / self.config.downsample_ratio)

    def make_tower(self) -> Tower:
        return PlainTower(self.tower_module, self.feature_layer(), projects=False)

    def feature_layer(self) -> int:
        depth, layer = self.config.vision_config.num_hidden_layers, self.config.vision_feature_layer
        return depth + layer if layer < 0 else layer - 1

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        pixels = seen.arguments["pixel_values"]
        step = self.patch * self.merge
        return [single((pixels.shape[-2] // step, pixels.shape[-1] // step), merge=self.merge)] * pixels.shape[0]


class Idefics3(Family):
    """Idefics3 and SmolVLM: each tile is an image of its own, with text between them; scale x scale cells a token."""

    language = "text_model"
    tower_name = "vision_model"
    projector = "connector"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.merge = int(self.config.scale_factor)

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        pixels = seen.arguments["pixel_values"]
        if seen.output is None:  # asked before any call: the library tells padding images by zeros
            tiles = int((pixels != 0).flatten(2).any(dim=2).sum())
        else:
            tiles = seen.output.last_hidden_state.shape[0]
        step = self.patch * self.merge
        return [single((pixels.shape[-2] // step, pixels.shape[-1] // step), merge=self.merge)] * tiles

    def pictures(self, seen: Seen, item: int, scale: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = seen.arguments["pixel_values"].flatten(0, 1)
        real = (pixels != 0).flatten(1).any(dim=1)  # the library tells padding images by zeros
        return scale(pixels[real][item : item + 1]).permute(0, 2, 3, 1).cpu()


class PaliGemma(Family):
    """PaliGemma: one token a patch; the prompt is read in both directions, positions count from 1."""

    position_base = 1

    def make_tower(self) -> Tower:
        return PlainTower(self.tower_module, None, projects=True)

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        pixels = seen.arguments["pixel_values"]
        return [single((pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch))] * pixels.shape[0]

    def rebuild_mask(self, types: Tensor | None, mask: Tensor, embeds: Tensor, cache: Any) -> Any:
        module, arguments = self.library, self.mask_arguments(mask, embeds, cache)
        if types is not None and (cache is None or not cache.is_initialized):  # in both directions inside the prefix
            arguments["block_sequence_ids"] = torch.where(types == 0, 0, -1)
        full = module.create_causal_mask(**arguments)
        if getattr(self.config.text_config, "sliding_window", None) is None:
            return full
        return {"full_attention": full, "sliding_attention": module.create_sliding_window_causal_mask(**arguments)}

    def layer_mask(self, types: Tensor | None, mask: Tensor, hidden: Tensor, cache: Any, layer: int) -> Any:
        module, arguments = self.library, self.mask_arguments(mask, hidden, cache)
        blocks = None if types is None else torch.where(types == 0, 0, -1)
        full = module.create_causal_mask(
            **arguments, layer_idx=layer, block_sequence_ids=blocks, allow_is_causal_skip=False
        )
        if getattr(self.config.text_config, "sliding_window", None) is None:
            return full
        sliding = module.create_sliding_window_causal_mask(
            **arguments, layer_idx=layer, block_sequence_ids=blocks, allow_is_causal_skip=False
        )
        return {"full_attention": full, "sliding_attention": sliding}


class Gemma3(Family):
    """Gemma 3: patches pooled to a fixed grid; the tokens of an image see each other in both directions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.merge = int(inner.multi_modal_projector.kernel_size)  # type: ignore[union-attr,arg-type]

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        side = int(self.inner.multi_modal_projector.tokens_per_side)
        return [single((side, side), merge=self.merge)] * seen.arguments["pixel_values"].shape[0]

    def rebuild_mask(self, types: Tensor | None, mask: Tensor, embeds: Tensor, cache: Any) -> Any:
        module, arguments = self.library, self.mask_arguments(mask, embeds, cache)
        if types is None:
            return module.create_masks_for_generate(**arguments)
        blocks = module.get_block_sequence_ids_for_mask(types, device=embeds.device)
        return module.create_masks_for_vision_model(block_sequence_ids=blocks, **arguments)

    def layer_mask(self, types: Tensor | None, mask: Tensor, hidden: Tensor, cache: Any, layer: int) -> Any:
        if types is None:
            return None
        module, arguments = self.library, self.mask_arguments(mask, hidden, cache)
        arguments["layer_idx"] = layer
        blocks = module.get_block_sequence_ids_for_mask(types, device=hidden.device)
        keys = hidden.shape[1] if cache is None else sum(cache.get_mask_sizes(hidden.shape[1], layer))
        padded = torch.nn.functional.pad(blocks, (0, max(0, keys - blocks.shape[1])), value=-1)
        same_image = module.blockwise_overlay(padded)
        window = module.sliding_window_overlay(arguments["config"].sliding_window)
        return {
            "full_attention": module.create_causal_mask(**arguments, or_mask_function=same_image),
            "sliding_attention": module.create_causal_mask(
                **arguments, or_mask_function=same_image, and_mask_function=window
            ),
        }


class Qwen(Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any size, merge x merge cells a token, positions in time and space."""

    tower_name = "visual"
    projector = None
    medias: ClassVar[tuple[str, ...]] = ("image", "video")
    mrope = True

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.merge = int(inner.visual.spatial_merge_size)  # type: ignore[union-attr,arg-type]

    def make_tower(self) -> Tower:
        return QwenTower(self.tower_module)

    def layouts(self, seen: Seen) -> list[MediaLayout]:
        grids = seen.arguments[f"{seen.kind}_grid_thw"].tolist()
        made = []
        for frames, rows, columns in grids:
            grid = (rows // self.merge, columns // self.merge)
            if seen.kind == "image":
                made.append(single(grid, merge=self.merge, frames=frames))
            else:
                made.append(video(frames, grid, merge=self.merge))
        return made

    def pictures(self, seen: Seen, item: int, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """Undo the patch order: patches of one token lie together, each (C, frames of the patch, p, p)."""
        grids = seen.arguments[f"{seen.kind}_grid_thw"].tolist()
        starts = [t * h * w for t, h, w in grids]
        t, h, w = grids[item]
        first = sum(starts[:item])
        m, p = self.merge, self.patch
        step = int(self.config.vision_config.temporal_patch_size)
        x = self.pixels(seen)[first : first + t * h * w].reshape(t, h // m, w // m, m, m, 3, step, p, p)
        x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * step, 3, h * p, w * p)
        return scale(x).permute(0, 2, 3, 1).cpu()


FAMILIES: dict[str, type[Family]] = {
    "LlavaModel": Llava,
    "LlavaNextModel": LlavaNext,
    "LlavaNextVideoModel": LlavaNextVideo,
    "LlavaOnevisionModel": LlavaOnevision,
    "Qwen2VLModel": Qwen,
    "Qwen2_5_VLModel": Qwen,
    "Qwen3VLModel": Qwen,
    "InternVLModel": InternVL,
    "Idefics3Model": Idefics3,
    "SmolVLMModel": Idefics3,
    "PaliGemmaModel": PaliGemma,
    "Gemma3Model": Gemma3,
}


def family_of(inner: nn.Module) -> type[Family] | None:
    """The family of an inner multimodal model, by the names of its classes."""
    return next((FAMILIES[cls.__name__] for cls in type(inner).__mro__ if cls.__name__ in FAMILIES), None)


def check_tower(family: Family) -> None:
    """Refuse a tower whose tokens the family cannot place (Pixtral packs images of many sizes into one sequence)."""
    name = type(family.tower_module).__name__
    if name.startswith(("Pixtral", "Timm")):
        raise UnsupportedModelError(
            f"{type(family.inner).__name__} with a {name} tower is not served: its images have no grid of their own; "
            "towers that are: CLIP, SigLIP, and those of Qwen-VL, InternVL and Idefics3"
        )


@functools.lru_cache(maxsize=64)
def single(grid: tuple[int, int], merge: int = 1, class_token: bool = False, frames: int = 1) -> MediaLayout:
    """An image of one tile, row by row."""
    slots = tuple(range(frames * grid[0] * grid[1]))
    if class_token:
        slots = (MediaLayout.CLASS, *slots)
    return MediaLayout(kind="image", partitions=frames, grid=grid, slots=slots, merge=merge)


@functools.lru_cache(maxsize=64)
def video(frames: int, grid: tuple[int, int], end: int = 0, merge: int = 1) -> MediaLayout:
    """Frames one after another, row by row."""
    slots = (*range(frames * grid[0] * grid[1]), *[MediaLayout.END] * end)
    return MediaLayout(kind="video", partitions=frames, grid=grid, slots=slots, merge=merge)


class Collect:
    """Hook (before or behind a module) that hands on what goes through."""

    def __init__(self, collect: Callable[[Tensor], None]) -> None:
        self.collect = collect

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> None:
        self.collect(args[0] if output is None else output)


def sizes_of(layouts: Sequence[MediaLayout]) -> list[int]:
    """Placeholders of each item."""
    return [len(layout.slots) for layout in layouts]
