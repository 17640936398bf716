"""Tiny random multimodal models of every family, and inputs in the layout that each family's processor makes.

A prompt is written as rows of parts: a number (so many text tokens), "image" or "video" (with a variant behind a
colon: "image:wide"). `Tiny.inputs` turns rows into model inputs, left-padded, and remembers for every row which columns
are which slots of which media, worked out by hand: the oracle of `tests/matrix/test_vlm.py` knows no adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

__all__ = ["FAMILIES", "Media", "Prompt", "Tiny"]

NEWLINE, END, CLASS = -1, -2, -3
WIDTH, VOCAB, DEPTH = 32, 96, 3
IMAGE_ID, VIDEO_ID, START_ID, STOP_ID, STAMP_ID, SPLIT_ID = 90, 91, 92, 93, 94, 95
PAD_ID, FIRST_TEXT, LAST_TEXT = 0, 5, 60
#: ids that a random model must not generate: placeholders and the end of the text
SUPPRESS = [PAD_ID, 1, 2, IMAGE_ID, VIDEO_ID, START_ID, STOP_ID, STAMP_ID, SPLIT_ID]

TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
BIG_TOWER = {**SMALL_TOWER, "image_size": 32}
CLIP = {"model_type": "clip_vision_model", "projection_dim": WIDTH, **SMALL_TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **SMALL_TOWER}


@dataclass
class Media:
    """One image or video of a prompt.

    Attributes:
        kind: "image" or "video". ids: its tokens, with those around it. slots: cell (or marker) of each placeholder.
        given: tensors that its family collates.
    """

    kind: str
    ids: list[int]
    slots: list[int]
    given: dict[str, Any]


@dataclass
class Prompt:
    """Inputs of a model and what they are made of.

    Attributes:
        inputs: keyword arguments of the model. rows: the parts of each row.
        media: [row][item]: (columns of the placeholders in the padded row, slots), in the order of the prompt.
    """

    inputs: dict[str, Tensor]
    rows: list[list[Any]]
    media: list[list[tuple[list[int], list[int]]]]
    tiny: Tiny = field(repr=False)

    def single(self, row: int) -> Prompt:
        """One row alone, unpadded: its parts are drawn again, the same."""
        return self.tiny.inputs([self.rows[row]], first_row=row)


def stirred(model: Any) -> Any:
    """Random biases and norms too, and nothing that ends a text."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.suppress_tokens = SUPPRESS
    return model.eval()


@dataclass
class Tiny(ABC):
    """A family: how to make its model and its inputs."""

    name: ClassVar[str]
    outer: ClassVar[str]
    medias: ClassVar[tuple[str, ...]] = ("image",)
    mrope: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-5
    has_class: ClassVar[bool] = False
    kernels: ClassVar[tuple[str, ...]] = ("sdpa", "eager")
    static_cache: ClassVar[bool] = True

    @abstractmethod
    def config(self) -> Any:
        """Of the model."""

    def make(self, kernel: str = "sdpa", config: Any = None) -> Any:
        torch.manual_seed(0)
        cls = getattr(transformers, self.outer)
        model = cls._from_config(self.config() if config is None else config, attn_implementation=kernel)
        return stirred(model)

    # -- prompts -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def draw(self, kind: str, variant: str, generator: torch.Generator) -> Media:
        """One image or video."""

    def collate(self, media: list[Media], per_row: list[int]) -> dict[str, Tensor]:
        """Tensors of all media of a batch; `per_row` counts images in each row."""
        images = [m.given["pixels"] for m in media if m.kind == "image"]
        videos = [m.given["pixels"] for m in media if m.kind == "video"]
        made = {}
        if images:
            made["pixel_values"] = torch.cat(images)
        if videos:
            made["pixel_values_videos"] = torch.stack(videos)
        return made

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """Token types, where the family has them."""
        return {}

    def inputs(self, rows: list[list[Any]], first_row: int = 0) -> Prompt:
        drawn = [self._row(row, first_row + number) for number, row in enumerate(rows)]
        length = max(len(ids) for ids, _, _ in drawn)
        ids = torch.full((len(rows), length), PAD_ID)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        places: list[list[tuple[list[int], list[int]]]] = []
        media: list[Media] = []
        for number, (tokens, found, own) in enumerate(drawn):
            start = length - len(tokens)
            ids[number, start:] = torch.tensor(tokens)
            mask[number, start:] = 1
            places.append([([start + column for column in columns], slots) for columns, slots in found])
            media += own
        per_row = [sum(m.kind == "image" for m in own) for _, _, own in drawn]
        inputs = {"input_ids": ids, "attention_mask": mask, **self.types(ids), **self.collate(media, per_row)}
        return Prompt(inputs, rows, places, self)

    def _row(self, row: list[Any], number: int) -> tuple[list[int], list[tuple[list[int], list[int]]], list[Media]]:
        generator = torch.Generator().manual_seed(100 + number)
        ids, places, media = [1], [], []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(FIRST_TEXT, LAST_TEXT, (part,), generator=generator).tolist()
                continue
            kind, _, variant = part.partition(":")
            one = self.draw(kind, variant, generator)
            marker = self.marker(kind)
            columns = [len(ids) + place for place, token in enumerate(one.ids) if token == marker]
            assert len(columns) == len(one.slots), (self.name, part)
            for start, end in self.split(one):
                places.append(
                    (
                        columns[start:end],
                        [slot - one.slots[start] for slot in one.slots[start:end]]
                        if (start, end) != (0, len(columns))
                        else one.slots,
                    )
                )
            ids += one.ids
            media.append(one)
        return ids, places, media

    def split(self, media: Media) -> list[tuple[int, int]]:
        """Where one picture of the user is several items of the host (tiles with text between them)."""
        return [(0, len(media.slots))]

    def marker(self, kind: str) -> int:
        return IMAGE_ID if kind == "image" else VIDEO_ID

    def parts(self) -> list[str]:
        """Media of this family worth a test."""
        return list(self.medias)


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


class Llava(Tiny):
    name = "llava"
    outer = "LlavaForConditionalGeneration"
    has_class = True
    strategy = "default"

    def config(self) -> Any:
        return transformers.LlavaConfig(
            vision_config=CLIP,
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE_ID,
            vision_feature_select_strategy=self.strategy,
        )

    def draw(self, kind, variant, generator):
        slots = list(range(16))
        return Media(kind, [IMAGE_ID] * 16, slots, {"pixels": noise(generator, 1, 3, 16, 16)})


class LlavaFull(Llava):
    """With the class token fed to the language model, and features of two layers."""

    name = "llava_full"
    strategy = "full"

    def config(self):
        config = super().config()
        config.vision_feature_layer = [-3, -2]
        return config

    def draw(self, kind, variant, generator):
        return Media(kind, [IMAGE_ID] * 17, [CLASS, *range(16)], {"pixels": noise(generator, 1, 3, 16, 16)})


class LlavaSiglip(Llava):
    """A SigLIP tower with its pooling head."""

    name = "llava_siglip"
    has_class = False

    def config(self):
        return transformers.LlavaConfig(
            vision_config={**SIGLIP, "vision_use_head": True},
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE_ID,
            vision_feature_select_strategy="full",
        )


#: variant: (height, width), chosen so that unpadding cuts something off, or nothing
SIZES = {"": (30, 30), "wide": (10, 37), "tall": (40, 13), "exact": (16, 32), "flat": (9, 64)}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def anyres_slots(size: tuple[int, int], side: int = 16, cells: int = 4) -> tuple[list[list[int]], int]:
    """Rows of cell numbers of the unpadded mosaic, from the definitions, and how many tiles there are."""
    height, width = size
    best, best_fit = None, (-1, 0)
    for h, w in PINPOINTS:  # the resolution that shows most of the image, the smallest of these
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        if (effective, -(h * w - effective)) > best_fit or best is None:
            best, best_fit = (h, w), (effective, -(h * w - effective))
    tile_rows, tile_columns = best[0] // side, best[1] // side
    grid = [
        [
            (1 + (r // cells) * tile_columns + c // cells) * cells**2 + (r % cells) * cells + c % cells
            for c in range(tile_columns * cells)
        ]
        for r in range(tile_rows * cells)
    ]
    rows, columns = len(grid), len(grid[0])
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        grid = grid[cut : rows - cut]
    else:
        cut = (columns - int(round(width * (rows / height), 7))) // 2
        grid = [row[cut : columns - cut] for row in grid]
    return grid, 1 + tile_rows * tile_columns


class LlavaNext(Tiny):
    name = "llava_next"
    outer = "LlavaNextForConditionalGeneration"
    has_class = True

    def config(self):
        return transformers.LlavaNextConfig(
            vision_config=CLIP,
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            image_token_id=IMAGE_ID,
            image_grid_pinpoints=PINPOINTS,
        )

    def draw(self, kind, variant, generator):
        size = SIZES[variant]
        rows, tiles = anyres_slots(size)
        slots = [*range(16), *[slot for row in rows for slot in (*row, NEWLINE)]]
        return Media(kind, [IMAGE_ID] * len(slots), slots, {"pixels": noise(generator, tiles, 3, 16, 16), "size": size})

    def collate(self, media, per_row):
        made = {}
        images = [m for m in media if m.kind == "image"]
        if images:
            most = max(m.given["pixels"].shape[0] for m in images)
            padded = [
                torch.cat([m.given["pixels"], torch.zeros(most - m.given["pixels"].shape[0], 3, 16, 16)])
                for m in images
            ]
            made["pixel_values"] = torch.stack(padded)
            made["image_sizes"] = torch.tensor([m.given["size"] for m in images])
        videos = [m.given["pixels"] for m in media if m.kind == "video"]
        if videos:
            made["pixel_values_videos"] = torch.stack(videos)
        return made

    def parts(self):
        return ["image", "image:wide", "image:tall"]


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"
    outer = "LlavaNextVideoForConditionalGeneration"
    medias = ("image", "video")

    def config(self):
        return transformers.LlavaNextVideoConfig(
            vision_config=CLIP,
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            image_grid_pinpoints=PINPOINTS,
            spatial_pool_stride=2,
        )

    def draw(self, kind, variant, generator):
        if kind == "image":
            return super().draw(kind, variant, generator)
        slots = list(range(4 * 4))
        return Media(kind, [VIDEO_ID] * len(slots), slots, {"pixels": noise(generator, 4, 3, 16, 16)})

    def parts(self):
        return ["image:wide", "video"]


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"
    outer = "LlavaOnevisionForConditionalGeneration"
    medias = ("image", "video")
    has_class = False
    aspect = "anyres_max_9"

    def config(self):
        return transformers.LlavaOnevisionConfig(
            vision_config={**SIGLIP, "vision_use_head": True},
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=self.aspect,
        )

    def draw(self, kind, variant, generator):
        if kind == "image" and variant == "multi":  # one of several images: no tiles
            pixels = noise(generator, 5, 3, 16, 16)
            pixels[1:] = 0
            given = {"pixels": pixels, "size": SIZES[""]}
            return Media(kind, [IMAGE_ID] * 17, [*range(16), NEWLINE], given)
        if kind == "image":
            return super().draw(kind, variant, generator)
        slots = [*range(3 * 4), END]
        return Media(kind, [VIDEO_ID] * len(slots), slots, {"pixels": noise(generator, 3, 3, 16, 16)})

    def collate(self, media, per_row):
        made = super().collate(media, per_row)
        if "pixel_values" in made:
            made["batch_num_images"] = torch.tensor([n for n in per_row if n])
        return made

    def parts(self):
        return ["image", "image:wide", "video"]


class Qwen2(Tiny):
    name = "qwen2_vl"
    outer = "Qwen2VLForConditionalGeneration"
    medias = ("image", "video")
    mrope = True
    patch = 4
    vision: ClassVar[dict[str, Any]] = {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    sections: ClassVar[list[int]] = [2, 1, 1]
    #: variant: patches (t, h, w)
    grids: ClassVar[dict[str, tuple[int, int, int]]] = {"": (1, 6, 8), "wide": (1, 4, 10), "video": (3, 4, 6)}

    def config(self):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": self.sections}
        return self.config_class()(
            vision_config=self.vision,
            text_config={**TEXT, "rope_parameters": rope},
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=START_ID,
            vision_end_token_id=STOP_ID,
            tie_word_embeddings=False,
        )

    def config_class(self):
        return transformers.Qwen2VLConfig

    def draw(self, kind, variant, generator):
        t, h, w = self.grids["video" if kind == "video" else variant]
        slots = list(range(t * h * w // 4))
        ids = self.wrap(kind, t, h * w // 4)
        pixels = noise(generator, t * h * w, 3 * 2 * self.patch**2)
        return Media(kind, ids, slots, {"pixels": pixels, "grid": (t, h, w)})

    def wrap(self, kind: str, frames: int, tokens: int) -> list[int]:
        return [START_ID, *[self.marker(kind)] * (frames * tokens), STOP_ID]

    def types(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE_ID).long() + 2 * (ids == VIDEO_ID).long()}

    def collate(self, media, per_row):
        made = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [m for m in media if m.kind == kind]
            if own:
                made[name] = torch.cat([m.given["pixels"] for m in own])
                made[f"{kind}_grid_thw"] = torch.tensor([m.given["grid"] for m in own])
        return made

    def parts(self):
        return ["image", "image:wide", "video"]


class Qwen25(Qwen2):
    name = "qwen2_5_vl"
    outer = "Qwen2_5_VLForConditionalGeneration"
    vision: ClassVar[dict[str, Any]] = {
        "depth": DEPTH,
        "hidden_size": WIDTH,
        "out_hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }

    def config_class(self):
        return transformers.Qwen2_5_VLConfig


class Qwen3(Qwen2):
    name = "qwen3_vl"
    outer = "Qwen3VLForConditionalGeneration"
    vision: ClassVar[dict[str, Any]] = {
        "depth": DEPTH,
        "hidden_size": WIDTH,
        "out_hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }

    def config(self):
        config = super().config()
        config.text_config.head_dim = 8
        return config

    def config_class(self):
        return transformers.Qwen3VLConfig

    def wrap(self, kind, frames, tokens):
        if kind == "image":
            return super().wrap(kind, frames, tokens)
        one = [STAMP_ID, 7, START_ID, *[VIDEO_ID] * tokens, STOP_ID]
        return one * frames


class InternVL(Tiny):
    name = "internvl"
    outer = "InternVLForConditionalGeneration"
    has_class = True

    def config(self):
        vision = {**BIG_TOWER, "image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": True}
        return transformers.InternVLConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE_ID,
            image_seq_length=16,
            downsample_ratio=0.5,
        )

    def draw(self, kind, variant, generator):
        tiles = 3 if variant == "tiles" else 1
        slots = list(range(16)) * tiles
        ids = [START_ID, *[IMAGE_ID] * (16 * tiles), STOP_ID]
        return Media(kind, ids, slots, {"pixels": noise(generator, tiles, 3, 32, 32)})

    def split(self, media):
        return [(start, start + 16) for start in range(0, len(media.slots), 16)]

    def parts(self):
        return ["image", "image:tiles"]


class Idefics3(Tiny):
    name = "idefics3"
    outer = "Idefics3ForConditionalGeneration"

    def config(self):
        return transformers.Idefics3Config(
            vision_config=BIG_TOWER,
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE_ID,
            scale_factor=2,
        )

    def draw(self, kind, variant, generator):
        tiles = 3 if variant == "tiles" else 1
        one = [START_ID, SPLIT_ID, *[IMAGE_ID] * 16]
        pixels = noise(generator, tiles, 3, 32, 32)
        mask = torch.ones(tiles, 32, 32, dtype=torch.long)
        if variant == "padded":
            pixels[:, :, 20:], mask[:, 20:] = 0, 0
        return Media(kind, [*one * tiles, START_ID], list(range(16)) * tiles, {"pixels": pixels, "mask": mask})

    def split(self, media):
        return [(start, start + 16) for start in range(0, len(media.slots), 16)]

    def collate(self, media, per_row):
        if not media:
            return {}
        rows, taken = [], iter(media)
        for count in per_row:
            own = [next(taken) for _ in range(count)]
            rows.append(own)
        most = max(sum(m.given["pixels"].shape[0] for m in row) for row in rows)
        pixels = torch.zeros(len(rows), most, 3, 32, 32)
        mask = torch.zeros(len(rows), most, 32, 32, dtype=torch.long)
        for b, row in enumerate(rows):
            if row:
                stacked = torch.cat([m.given["pixels"] for m in row])
                pixels[b, : len(stacked)] = stacked
                mask[b, : len(stacked)] = torch.cat([m.given["mask"] for m in row])
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    def parts(self):
        return ["image", "image:tiles", "image:padded"]


class SmolVLM(Idefics3):
    name = "smolvlm"
    outer = "SmolVLMForConditionalGeneration"

    def config(self):
        return transformers.SmolVLMConfig(
            vision_config=BIG_TOWER,
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE_ID,
            scale_factor=2,
        )


class PaliGemma(Tiny):
    name = "paligemma"
    outer = "PaliGemmaForConditionalGeneration"
    text: ClassVar[dict[str, Any]] = {"model_type": "gemma", "head_dim": 8}

    def config(self):
        return transformers.PaliGemmaConfig(
            vision_config=SIGLIP,
            text_config={**TEXT, **self.text},
            image_token_id=IMAGE_ID,
            projection_dim=WIDTH,
        )

    def draw(self, kind, variant, generator):
        return Media(kind, [IMAGE_ID] * 16, list(range(16)), {"pixels": noise(generator, 1, 3, 16, 16)})

    def types(self, ids):
        return {"token_type_ids": torch.zeros_like(ids)}


class PaliGemma2(PaliGemma):
    name = "paligemma2"
    kernels = ("eager",)  # Gemma 2 softcaps its attention logits
    static_cache = False  # the library passes a dict of masks to a function that wants a tensor
    text: ClassVar[dict[str, Any]] = {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 512,
        "query_pre_attn_scalar": 8,
    }


class Gemma3(Tiny):
    name = "gemma3"
    outer = "Gemma3ForConditionalGeneration"
    tolerance = 3e-5
    window = 12

    def config(self):
        text = {
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": self.window,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        return transformers.Gemma3Config(
            vision_config={**SIGLIP, **BIG_TOWER},
            text_config=text,
            image_token_id=IMAGE_ID,
            mm_tokens_per_image=16,
        )

    def draw(self, kind, variant, generator):
        ids = [START_ID, *[IMAGE_ID] * 16, STOP_ID]
        return Media(kind, ids, list(range(16)), {"pixels": noise(generator, 1, 3, 32, 32)})

    def types(self, ids):
        return {"token_type_ids": (ids == IMAGE_ID).long()}


class Gemma3Wide(Gemma3):
    """The window is longer than the prompt."""

    name = "gemma3_wide"
    window = 512


FAMILIES: dict[str, Tiny] = {
    cls.name: cls()
    for cls in (
        Llava, LlavaFull, LlavaSiglip, LlavaNext, LlavaNextVideo, LlavaOnevision, Qwen2, Qwen25, Qwen3, InternVL,
        Idefics3, SmolVLM, PaliGemma, PaliGemma2, Gemma3, Gemma3Wide,
    )
}  # fmt: skip


def language_of(model: nn.Module) -> Any:
    """The language model inside."""
    inner: Any = model.model
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model


def tower_of(model: nn.Module) -> Any:
    inner: Any = model.model
    return next(getattr(inner, n) for n in ("vision_tower", "visual", "vision_model") if hasattr(inner, n))
