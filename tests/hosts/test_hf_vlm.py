"""The multimodal host: tower scores, layouts, requests, refusals, undo, composition, threads (tiny random models)."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import tokred
from tests.matrix.test_vlm import fingerprint, forward, greedy, rows_of
from tests.matrix.vlm_models import (
    FAMILIES,
    IMAGE_ID,
    NEWLINE,
    SIZES,
    LlavaOnevision,
    Tiny,
    anyres_slots,
    language_of,
    tower_of,
)
from tests.matrix.vlm_probes import Blend, Evenly, Reference, Spy, Uneven
from tokred.adapters.logical_cache import reduced_state
from tokred.adapters.registry import find_host
from tokred.core.errors import (
    ConflictError,
    InvalidParameterError,
    LayerError,
    MissingSiteError,
    NoClassTokenError,
    PaddingError,
    PreEncodedError,
    RequestError,
    StaleCacheError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from tokred.core.sites import MediaLayout, TowerInfo
from tokred.core.tokens import Keep

LLAVA = FAMILIES["llava"]


@pytest.fixture
def llava() -> nn.Module:
    return LLAVA.make()


def one_image(tiny: Tiny = LLAVA) -> dict[str, Tensor]:
    return tiny.inputs([[2, "image", 3]]).inputs


# -- scores of the tower -----------------------------------------------------------------------------------------------

RECORDED: list[tuple[nn.Module, Tensor, Tensor]] = []


def spy_attention(module, q, k, v, attention_mask=None, scaling=None, **kwargs):
    """Eager attention in float64 that keeps its matrix and its keys."""
    mask = attention_mask
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    logits = q.double() @ k.double().transpose(2, 3) * scale
    if mask is not None:
        logits = logits + mask.double()
    weights = logits.softmax(dim=-1)
    RECORDED.append((module, weights, k))
    return (weights @ v.double()).to(q.dtype).transpose(1, 2).contiguous(), weights


@pytest.fixture
def spied():
    AttentionInterface.register("tokred_spy", spy_attention)
    AttentionMaskInterface.register("tokred_spy", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    RECORDED.clear()
    yield
    for register in (AttentionInterface, AttentionMaskInterface):
        register._global_mapping.pop("tokred_spy", None)


def true_scores(tiny: Tiny, inputs: dict[str, Tensor], layers: tuple[int, ...]) -> dict[tuple[str, int], Tensor]:
    """{(kind, layer): of the tower's own tokens}, from the matrices of a tower that runs the spy."""
    model = tiny.make()
    tower = tower_of(model)
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "tokred_spy"
    RECORDED.clear()
    forward(model, inputs)
    found: dict[tuple[str, int], Tensor] = {}
    blocks = tower.blocks if hasattr(tower, "blocks") else layers_of(tower)
    for layer in layers:
        inside = set(blocks[layer].modules())
        own = [(weights, keys) for module, weights, keys in RECORDED if module in inside]
        assert own
        if tiny.mrope:
            found["mass", layer] = torch.cat([weights[0].sum(1) for weights, _ in own], dim=1).float()  # (H, L)
            found["keys", layer] = torch.cat([keys[0] for _, keys in own], dim=1)
            continue
        weights, keys = own[0]
        prefix = int(tiny.has_class)
        found["rows", layer] = weights[:, :, 0, prefix:].float()
        real = weights.sum(2) > 0  # keys that nobody may see are padding, and padding asks for nothing
        asks = real.any(1)[:, None, :, None].double()
        found["mass", layer] = (weights * asks).sum(2)[:, :, prefix:].float()
        found["keys", layer] = keys[:, :, prefix:]
    return found


def layers_of(tower: nn.Module) -> nn.ModuleList:
    return next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def pooled(values: Tensor, own: tuple[int, int], merge: int, total: bool) -> Tensor:
    """(..., rows * columns) -> over merge x merge cells, the sum or the mean."""
    rows, columns = own[0] // merge, own[1] // merge
    cut = values.reshape(*values.shape[:-1], rows, merge, columns, merge)
    out = cut.sum((-3, -1)) if total else cut.mean((-3, -1))
    return out.flatten(-2)


PLAIN = {
    # family: (rows, side of the tower's grid, merge)
    "llava": ([[2, "image", 3], [4, "image", 2]], 4, 1),
    "llava_siglip": ([[2, "image", 3]], 4, 1),
    "llava_next": ([[2, "image:wide", 3], [1, "image:tall", 2]], 4, 1),
    "internvl": ([[2, "image:tiles", 3]], 8, 2),
    "idefics3": ([[2, "image", 3], [1, "image:padded", 4]], 8, 2),
    "smolvlm": ([[2, "image:tiles", 3]], 8, 2),
    "paligemma": ([[2, "image", 3]], 4, 1),
    "gemma3": ([[2, "image", 3], [2, "image", 5]], 8, 2),
}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PLAIN)
def test_scores_of_plain_towers(family, kernel, spied):
    tiny = FAMILIES[family]
    rows, side, merge = PLAIN[family]
    inputs = tiny.inputs(rows).inputs
    model = tiny.make(kernel)
    kinds = ("rows", "mass", "keys") if tiny.has_class else ("mass", "keys")
    method = Spy(layers=(0, 1), kinds=kinds)
    with tokred.patch(model, method):
        forward(model, inputs)
    true = true_scores(tiny, inputs, (0, 1))
    for key in [(kind, layer) for kind in kinds for layer in (0, 1)]:
        got = torch.cat([found[key].flatten(0, 1) for _, found in method.seen])  # all tiles
        assert got.dtype == torch.float32
        if key[0] == "keys":
            wanted = pooled(true[key].transpose(2, 3), (side, side), merge, total=False).transpose(2, 3)
        else:
            wanted = pooled(true[key], (side, side), merge, total=True)
        order = [int((got - tile).flatten(1).abs().sum(1).argmin()) for tile in wanted]
        assert sorted(order) == list(range(len(got)))
        torch.testing.assert_close(got[order], wanted, atol=2e-6, rtol=1e-4)


def test_scores_belong_to_the_right_item():
    """Views group items of one layout; each gets the tiles of its own."""
    tiny = FAMILIES["llava_next"]
    prompt = tiny.inputs([[2, "image:wide", 3], [1, "image:tall", 1, "image:wide", 2]])
    model = tiny.make()
    method = Spy(kinds=("rows",), layers=(1,))
    with tokred.patch(model, method):
        forward(model, prompt.inputs)
        together = [(view.layout.size, found["rows", 1]) for view, found in method.seen]
        method.seen.clear()
        forward(model, prompt.single(0).inputs)
        forward(model, prompt.single(1).inputs)
    first, tall, second = (found["rows", 1] for _, found in sorted_by_row(method.seen))
    by_size = dict(together)
    torch.testing.assert_close(by_size[SIZES["wide"]], torch.cat([first, second]))
    torch.testing.assert_close(by_size[SIZES["tall"]], tall)


def sorted_by_row(seen: list) -> list:
    assert [view.layout.size for view, _ in seen] == [SIZES["wide"], SIZES["tall"], SIZES["wide"]]
    return seen


def window_order(grids: list[tuple[int, int, int]], side: int) -> list[int]:
    """Raster number of each unit in the order in which Qwen2.5-VL's tower holds them, from the definition."""
    order, start = [], 0
    for frames, height, width in grids:
        rows, columns = height // 2, width // 2
        for frame in range(frames):
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    for r in range(top, min(top + side, rows)):
                        for c in range(left, min(left + side, columns)):
                            order.append(start + frame * rows * columns + r * columns + c)
        start += frames * rows * columns
    return order


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_scores_of_qwen_towers(family, kernel, kind, spied):
    tiny = FAMILIES[family]
    rows = [[2, "image", 1, "image:wide", 3], [1, "image", 2]] if kind == "image" else [[2, "video", 1], [3, "video"]]
    inputs = tiny.inputs(rows).inputs
    model = tiny.make(kernel)
    method = Spy(layers=(0, 1), kinds=("mass", "keys"))
    with tokred.patch(model, method):
        forward(model, inputs)
    true = true_scores(tiny, inputs, (0, 1))
    grids = [tuple(grid) for grid in inputs[f"{kind}_grid_thw"].tolist()]
    for layer in (0, 1):
        mass = true["mass", layer].unflatten(1, (-1, 4)).sum(2)  # (H, units)
        keys = true["keys", layer].unflatten(1, (-1, 4)).mean(2)
        if family == "qwen2_5_vl":
            back = torch.argsort(torch.tensor(window_order(grids, 2)))
            mass, keys = mass[:, back], keys[:, back]
        start = 0
        found = {
            view.layout.grid: iter(zip(seen["mass", layer], seen["keys", layer], strict=True))
            for view, seen in method.seen
        }
        for frames, height, width in grids:
            count = frames * height * width // 4
            got_mass, got_keys = next(found[height // 2, width // 2])
            own = mass[:, start : start + count].unflatten(1, (frames, -1)).transpose(0, 1)
            torch.testing.assert_close(got_mass, own, atol=2e-6, rtol=1e-4)
            own_keys = keys[:, start : start + count].unflatten(1, (frames, -1)).transpose(0, 1)
            torch.testing.assert_close(got_keys, own_keys, atol=1e-5, rtol=1e-4)
            start += count


@pytest.mark.parametrize("family", ["internvl", "idefics3", "gemma3"])
def test_a_token_is_made_of_the_cells_that_the_layout_says(family):
    """A spike in one cell of the tower's output reaches the token whose score pools that cell, and no other."""
    tiny = FAMILIES[family]
    model = tiny.make()
    prefix, spike = int(tiny.has_class), {}

    def replace(module, args, output):
        hidden = torch.zeros_like(output.last_hidden_state)
        if spike:
            hidden[:, prefix + spike["cell"], 3] = 1.0
        output.last_hidden_state = hidden
        return output

    tower_of(model).register_forward_hook(replace)
    given = {k: v for k, v in one_image(tiny).items() if k.startswith("pixel")}
    with torch.no_grad():
        flat = torch.cat(list(model.model.get_image_features(**given).pooler_output)).reshape(-1, 32)
        for cell in (0, 1, 8, 19, 42, 63):
            spike["cell"] = cell
            features = torch.cat(list(model.model.get_image_features(**given).pooler_output)).reshape(-1, 32)
            changed = (features != flat).any(1).nonzero()[:, 0].tolist()
            assert changed == [(cell // 8 // 2) * 4 + cell % 8 // 2]


def test_probe_of_a_pooling_head(spied):
    tiny = FAMILIES["llava_siglip"]
    model = tiny.make()
    inputs = tiny.inputs([[2, "image", 3], [2, "image", 1]]).inputs
    method = Spy(layers=(), kinds=("probe",))
    heads: list = []
    head = tower_of(model).head
    handle = head.register_forward_pre_hook(lambda m, a: heads.append(a[0]))
    with tokred.patch(model, method):
        forward(model, inputs)
    handle.remove()
    x = heads[0]
    with torch.no_grad():
        _, weights = head.attention(head.probe.repeat(len(x), 1, 1), x, x, average_attn_weights=False)
    ((_, found),) = method.seen
    torch.testing.assert_close(found["probe"][:, 0], weights[:, :, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_full", "llava_next", "paligemma", "llava_siglip"])
def test_tower_tokens_project_to_the_features(family):
    tiny = FAMILIES[family]
    model = tiny.make()
    inputs = tiny.inputs(rows_of(tiny)[:2]).inputs
    method = Spy(layers=(), kinds=(), asks=("hidden", "class_hidden") if tiny.has_class else ("hidden",))
    with tokred.patch(model, method):
        forward(model, inputs)
        for view, found in method.seen:
            with torch.no_grad():
                projected = view.at_tokens(view.project(found["hidden"]))
            torch.testing.assert_close(projected, view.features, atol=1e-6, rtol=1e-5)
            if tiny.has_class:
                assert found["class_hidden"].shape == (view.items, view.layout.partitions, found["hidden"].shape[-1])


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video"])
def test_dense_frames_before_pooling(family):
    tiny = FAMILIES[family]
    model = tiny.make()
    inputs = tiny.inputs([[2, "video", 3], [4, "video", 1]]).inputs
    method = Spy(layers=(), kinds=(), dense=True, asks=("dense",))
    with tokred.patch(model, method):
        forward(model, inputs)
    ((view, found),) = method.seen
    tokens, grid, finish = found["dense"]
    frames = view.layout.partitions
    assert tokens.shape[:3] == (2, frames, 16)
    assert grid == (4, 4)
    maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
    if family == "llava_onevision":
        pooled_maps = nn.functional.interpolate(maps, (2, 2), mode="bilinear")
    else:
        pooled_maps = nn.functional.avg_pool2d(maps, 2)
    with torch.no_grad():
        made = finish(pooled_maps.flatten(2).transpose(1, 2)).unflatten(0, (2, frames)).flatten(1, 2)
    torch.testing.assert_close(made, view.features, atol=1e-5, rtol=1e-5)


def test_wrong_layers_and_missing_class_tokens(llava):
    before = fingerprint(llava)
    with pytest.raises(LayerError, match="0 to 2"):
        tokred.patch(llava, Spy(layers=(7,)))
    assert fingerprint(llava) == before
    for family in ("llava_siglip", "qwen3_vl"):
        model = FAMILIES[family].make()
        with pytest.raises(NoClassTokenError):
            tokred.patch(model, Spy(kinds=("rows",)))
        tokred.patch(model, Evenly(3)).remove()
    with pytest.raises(UnsupportedModelError, match="probe"):
        tokred.patch(llava, Spy(layers=(), kinds=("probe",)))
    assert fingerprint(llava) == before


# -- features that were encoded before -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "idefics3"])
def test_pre_encoded_features(family):
    tiny = FAMILIES[family]
    model = tiny.make()
    inputs = one_image(tiny)
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    media = {key: inputs[key] for key in names if key in inputs}
    rest = {key: value for key, value in inputs.items() if key not in media or key == "image_grid_thw"}
    with torch.no_grad():
        early = model.model.get_image_features(**media, return_dict=True)
    method = Spy(layers=(1,), kinds=("mass",))
    with tokred.patch(model, method) as patch:
        wanted = forward(model, inputs)
        with torch.no_grad():
            late = model.model.get_image_features(**media, return_dict=True)
        out = forward(model, {**rest, "mm_encoder_outputs": {"image": late}})
        assert torch.equal(out.logits, wanted.logits)
        tokens = greedy(model, {**rest, "mm_encoder_outputs": {"image": late}}).sequences
        assert torch.equal(tokens, greedy(model, inputs).sequences)
        with pytest.raises(PreEncodedError, match="pass pixel values"):
            forward(model, {**rest, "mm_encoder_outputs": {"image": early}})
        with pytest.raises(PreEncodedError):
            greedy(model, {**rest, "mm_encoder_outputs": {"image": early}})
        assert torch.equal(forward(model, inputs).logits, wanted.logits)
        assert len(patch.trace) == 1


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES.values(), (33, 17), (64, 64), (1, 50), (50, 1), (15, 31), (29, 13)])
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
def test_slots_of_tiled_images_by_construction(family, size):
    model = FAMILIES[family].make()
    layout = find_host(model).parts.layout_of(size)
    rows, tiles = anyres_slots(size)
    assert list(layout.slots) == [*range(16), *[slot for row in rows for slot in (*row, NEWLINE)]]
    assert layout.partitions == tiles
    assert layout.overview == 0
    assert layout.mosaic[0] * layout.mosaic[1] == tiles - 1
    assert layout.size == size
    assert layout.uniform


def test_unpadding_rounds_as_the_library_does():
    """336 x 250 in tiles of 24 x 24: the scaled side is 35.999..., which only rounding to 7 digits makes 36."""
    assert int(round(250 * (48 / 1000 * (1000 / 333.3333333333333)), 7)) == 36
    model = FAMILIES["llava_next"].make()
    for size in [(3, 7), (6, 14), (7, 3), (21, 49), (9, 21), (10, 37), (23, 64)]:
        layout = find_host(model).parts.layout_of(size)
        features = torch.randn(layout.partitions, 16, 32)
        packed, lengths = model.model.pack_image_features(
            [features], torch.tensor([size]), "default", image_newline=torch.full((32,), 7.0)
        )
        assert int(lengths[0]) == len(layout.slots)
        flat = torch.cat([features.flatten(0, 1), torch.full((1, 32), 7.0)])
        assert torch.equal(packed[0], flat[torch.tensor(layout.slots)])


class Resampled(LlavaOnevision):
    """The mosaic is shrunk to the size of one tile."""

    name = "llava_onevision_resampled"
    aspect = "anyres_max_1"

    def draw(self, kind, variant, generator):
        one = super().draw(kind, variant, generator)
        if kind == "image" and variant != "multi":
            rows, _ = anyres_slots(SIZES[variant])
            ratio = math.sqrt(len(rows) * len(rows[0]) / 16)
            if ratio > 1.1:
                height, width = int(len(rows) // ratio), int(len(rows[0]) // ratio)
                lines = [[16 + r * width + c for c in range(width)] for r in range(height)]
                one.slots = [*range(16), *[slot for line in lines for slot in (*line, NEWLINE)]]
                one.ids = [IMAGE_ID] * len(one.slots)
        return one


def test_resampled_mosaics_have_no_cells_of_the_tower():
    tiny = Resampled()
    model = tiny.make()
    prompt = tiny.inputs([[2, "image", 3], [1, "image:flat", 2]])
    method = Evenly(7, keep_newline=True)
    with tokred.patch(model, method) as patch:
        out = greedy(model, prompt.inputs)
        assert not patch.trace[0].layout.uniform
        for row, step in enumerate(patch.trace):
            assert tuple(step.layout.slots) == tuple(prompt.media[row][0][1])
    for row in range(2):
        tokens, logits = Reference(model, tiny, prompt.single(row), method).generate(4)
        assert out.sequences[row, -4:].tolist() == tokens
        torch.testing.assert_close(torch.stack(out.logits)[:, row], logits, atol=1e-5, rtol=0)


# -- requests ----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Decodes ids to words; 1 is a special token."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i < 5))


@dataclass
class PictureProcessor:
    image_mean: tuple = (0.48, 0.45, 0.4)
    image_std: tuple = (0.26, 0.25, 0.27)
    rescale_factor: float = 1 / 255
    do_rescale: bool = True
    do_normalize: bool = True

    def __call__(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 -> (T, 3, H, W)."""
        x = frames.permute(0, 3, 1, 2).float() * self.rescale_factor
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.image_mean, self.image_std))
        return (x - mean) / std


class Processor:
    tokenizer = Tokenizer()
    image_processor = PictureProcessor()
    video_processor = PictureProcessor(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.4, 0.3))


def random_frames(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator).to(torch.uint8)


def asked(model: nn.Module, inputs: dict, *names: str, **request) -> list:
    """What a spy was given for `names`, over all views."""
    method = Spy(layers=(), kinds=(), asks=names)
    processor = request.pop("processor", None)
    with tokred.patch(model, method, **({"processor": processor} if processor is not None else {})) as patch:
        if request:
            with patch.request(**request):
                forward(model, inputs)
        else:
            forward(model, inputs)
    return [found[name] for name in names for _, found in method.seen]


def test_the_question_is_decoded_or_given(llava):
    prompt = LLAVA.inputs([[2, "image", 3], [4, "image", 1]])
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
    texts = [
        " ".join(f"w{i}" for i in row[m.bool()].tolist() if 5 <= i < IMAGE_ID) for row, m in zip(ids, mask, strict=True)
    ]
    assert asked(llava, prompt.inputs, "query", processor=Processor()) == [texts]
    assert asked(llava, prompt.inputs, "query", processor=Tokenizer()) == [texts]
    assert asked(llava, prompt.inputs, "query", query="what?") == [["what?", "what?"]]
    assert asked(llava, prompt.inputs, "query", query=["a", "b"]) == [["a", "b"]]
    with pytest.raises(RequestError, match="3 entries for 2 samples"):
        asked(llava, prompt.inputs, "query", query=["a", "b", "c"])
    with pytest.raises(RequestError, match="processor=processor"):
        asked(llava, prompt.inputs, "query")
    (features,) = asked(llava, prompt.inputs, "question_features")
    text = llava.get_input_embeddings()(ids[0][mask[0].bool() & (ids[0] != IMAGE_ID)])
    assert torch.equal(features[0], text)


def test_unknown_and_empty_requests(llava):
    with tokred.patch(llava, Evenly(3)) as patch:
        with pytest.raises(RequestError, match="question="), patch.request(question="x"):
            pass
        with pytest.raises(RequestError, match="nothing"), patch.request():
            pass
    with tokred.patch(llava, tokred.ToMe(r=1)) as patch, pytest.raises(MissingSiteError):
        patch.request(query="x")


def test_frames_are_un_normalised_exactly():
    for family in ("llava_onevision", "llava_next_video"):
        tiny = FAMILIES[family]
        model = tiny.make()
        count = 3 if family == "llava_onevision" else 4
        videos = [random_frames(count, 16, 16, seed) for seed in (1, 2)]
        inputs = tiny.inputs([[2, "video", 3], [1, "video", 2]]).inputs
        inputs["pixel_values_videos"] = torch.stack([Processor.video_processor(video) for video in videos])
        (found,) = asked(model, inputs, "frames", processor=Processor())
        assert all(torch.equal(a, b) for a, b in zip(found, videos, strict=True))


def test_tiles_of_images_are_pictures_too():
    tiny = FAMILIES["llava_next"]
    model = tiny.make()
    prompt = tiny.inputs([[2, "image", 3], [1, "image:wide", 2]])  # 4 + 1 tiles, 2 + 1 and padding
    tiles = [random_frames(5, 16, 16, 1), random_frames(3, 16, 16, 2)]
    for item, own in enumerate(tiles):
        prompt.inputs["pixel_values"][item, : len(own)] = Processor.image_processor(own)
    found = asked(model, prompt.inputs, "frames", processor=Processor())
    for (got,), own in zip(found, tiles, strict=True):
        assert torch.equal(got, own)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_frames_come_back_in_place(family):
    """The patch order of the processor is undone: pictures equal those that went in."""
    tiny = FAMILIES[family]
    model = tiny.make()
    inputs = tiny.inputs([[2, "video", 3], [1, "video", 1, "image", 2]]).inputs
    t, h, w = (int(n) for n in inputs["video_grid_thw"][0])
    videos = [random_frames(2 * t, 4 * h, 4 * w, seed) for seed in (1, 2)]
    inputs["pixel_values_videos"] = torch.cat([qwen_patches(Processor.video_processor(v), t, h, w) for v in videos])
    _, gh, gw = (int(n) for n in inputs["image_grid_thw"][0])
    picture = random_frames(1, 4 * gh, 4 * gw, 3)
    inputs["pixel_values"] = qwen_patches(Processor.image_processor(picture).repeat(2, 1, 1, 1), 1, gh, gw)
    found = asked(model, inputs, "frames", processor=Processor())
    flat = [frames for view in found for frames in view]
    assert [len(frames) for frames in flat] == [2 * t, 2 * t, 2]
    assert torch.equal(flat[0], videos[0])
    assert torch.equal(flat[1], videos[1])
    assert torch.equal(flat[2][:1], picture)


def qwen_patches(pixels: Tensor, t: int, h: int, w: int, patch: int = 4) -> Tensor:
    """(2 t, 3, h patch, w patch) -> (t h w, 3 * 2 * patch^2), written out cell by cell from the processor's order."""
    rows = []
    for frame in range(t):
        for top in range(0, h, 2):
            for left in range(0, w, 2):
                for r in (top, top + 1):
                    for c in (left, left + 1):
                        piece = pixels[
                            2 * frame : 2 * frame + 2, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch
                        ]
                        rows.append(piece.transpose(0, 1).flatten())
    return torch.stack(rows)


def test_given_frames_and_scores():
    tiny = FAMILIES["llava_onevision"]
    model = tiny.make()
    inputs = tiny.inputs([[2, "video", 3], [1, "video", 2]]).inputs
    videos = [random_frames(3, 20, 20, seed) for seed in (1, 2)]
    (found,) = asked(model, inputs, "frames", frames=videos)
    assert all(torch.equal(a, b) for a, b in zip(found, videos, strict=True))
    (found,) = asked(model, inputs, "frames", frames=videos[0])
    assert all(torch.equal(a, videos[0]) for a in found)
    (found,) = asked(model, inputs, "frame_scores", frame_scores=[torch.ones(3), torch.zeros(3)])
    assert [scores.tolist() for scores in found] == [[1, 1, 1], [0, 0, 0]]
    (found,) = asked(model, inputs, "frame_scores", frame_scores=[0.1, 0.2, 0.3])
    assert [len(scores) for scores in found] == [3, 3]
    assert asked(model, inputs, "frame_scores") == [[None, None]]
    with pytest.raises(RequestError, match="3 entries for 2 videos"):
        asked(model, inputs, "frame_scores", frame_scores=[torch.ones(3)] * 3)
    with pytest.raises(RequestError, match="2 frames for a video of 3"):
        asked(model, inputs, "frames", frames=[video[:2] for video in videos])
    with pytest.raises(RequestError, match="processor=processor"):
        asked(model, inputs, "frames")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": "self"},
        {"assistant_early_exit": 1},
    ],
    ids=lambda given: next(iter(given)),
)
def test_generation_that_is_refused_by_name(llava, given):
    inputs = one_image()
    (name,) = given
    if given[name] == "self":
        given = {name: llava}
    with tokred.patch(llava, Evenly(5)):
        before = fingerprint(llava)
        with pytest.raises(UnsupportedGenerationError, match=name):
            llava.generate(**inputs, max_new_tokens=3, **given)
        if name != "assistant_model":
            config = copy.deepcopy(llava.generation_config)
            setattr(config, name, given[name])
            with pytest.raises(UnsupportedGenerationError, match=name):
                llava.generate(**inputs, generation_config=config)
        assert fingerprint(llava) == before
        llava.generate(**inputs, max_new_tokens=3)


def test_right_padding_is_refused_in_generate_and_exact_in_forward(llava):
    prompt = LLAVA.inputs([[2, "image", 3], [2, "image", 1]])
    left = prompt.inputs
    right = dict(left)
    right["input_ids"] = torch.stack([left["input_ids"][0], left["input_ids"][1].roll(-2)])
    right["attention_mask"] = torch.stack([left["attention_mask"][0], left["attention_mask"][1].roll(-2)])
    with tokred.patch(llava, Evenly(5)):
        with pytest.raises(PaddingError, match="padding_side"):
            llava.generate(**right, max_new_tokens=3)
        out = forward(llava, right)
        alone = forward(llava, prompt.single(1).inputs)
    torch.testing.assert_close(out.logits[1, :-2], alone.logits[0], atol=1e-5, rtol=0)


def test_more_placeholders_than_features(llava):
    inputs = one_image()
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[IMAGE_ID]])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plain = forward(llava, one_image()).logits
    before = fingerprint(llava)
    with tokred.patch(llava, Evenly(5)):
        wanted = forward(llava, one_image()).logits
        with pytest.raises(ValueError, match="do not match"):  # the library's own check comes first
            forward(llava, inputs)
        assert torch.equal(forward(llava, one_image()).logits, wanted)
    assert fingerprint(llava) == before
    assert torch.equal(forward(llava, one_image()).logits, plain)


def test_compact_positions_on_qwen():
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        model = FAMILIES[family].make()
        before = fingerprint(model)
        with pytest.raises(InvalidParameterError, match="positions='compact'"):
            tokred.patch(model, Evenly(5, positions="compact"))
        assert fingerprint(model) == before


def test_qwen_without_what_positions_are_made_of():
    tiny = FAMILIES["qwen3_vl"]
    model = tiny.make()
    inputs = one_image(tiny)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, **{k: inputs[k] for k in ("pixel_values", "image_grid_thw")}}
    with tokred.patch(model, Evenly(5)), pytest.raises(RequestError, match="mm_token_type_ids"):
        forward(model, given)


def test_pixtral_towers():
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config=LLAVA.config().text_config,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="Pixtral"):
        tokred.patch(model, Evenly(5))
    assert fingerprint(model) == before


def test_two_visual_methods(llava):
    before = fingerprint(llava)
    with pytest.raises(ConflictError, match="Evenly and Uneven"):
        tokred.patch(llava, [Evenly(5), Uneven()])
    assert fingerprint(llava) == before


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "paligemma"])
def test_a_reduced_cache_needs_the_patch(family):
    tiny = FAMILIES[family]
    model, other = tiny.make(), tiny.make()
    inputs = tiny.inputs([[2, "image", 3], [6]]).inputs
    with tokred.patch(model, Evenly(5)):
        first = greedy(model, inputs)
        cache = first.past_key_values
        assert reduced_state(cache) is not None
        kept = copy.deepcopy(cache)
    ids = torch.cat([first.sequences, torch.full((2, 2), 9)], dim=1)
    grown = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    for stale in (model, other):
        with pytest.raises(StaleCacheError, match="not patched"):
            stale.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
        with pytest.raises(StaleCacheError):
            forward(stale, {"input_ids": ids[:, -1:]}, past_key_values=cache)
    forward(model, inputs)  # the model itself is as it was
    with tokred.patch(model, Evenly(5)):  # and goes on where the patch is back
        again = greedy(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": kept})
    assert again.sequences.shape[1] == ids.shape[1] + 4


def test_a_mask_that_fits_nothing_is_refused(llava):
    with tokred.patch(llava, Evenly(5)):
        first = greedy(llava, one_image())
        with pytest.raises(StaleCacheError, match="columns"):
            forward(
                llava,
                {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 3)},
                past_key_values=first.past_key_values,
            )


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_foreign_cache_stays_and_new_images_are_reduced(llava, positions):
    """The rule: what an unpatched model put into a cache stays as it is; images of later turns are reduced."""
    prompt = LLAVA.inputs([[2, "image", 3]])
    ids, media = prompt.inputs["input_ids"], prompt.inputs["pixel_values"]
    prefix = torch.tensor([[1, 8, 9, 10, 11]])
    cache = forward(llava, {"input_ids": prefix}, use_cache=True).past_key_values
    both = torch.cat([prefix, ids], dim=1)
    method = Evenly(5, positions=positions)
    with tokred.patch(llava, method) as patch:
        given = {"pixel_values": media, "attention_mask": torch.ones_like(both)}
        cached = greedy(llava, {"input_ids": both, "past_key_values": cache, **given})
        assert patch.trace[0].tokens_out == 5
        fresh = greedy(llava, {"input_ids": both, **given})
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(fresh.logits), atol=1e-5, rtol=0)
    assert cached.past_key_values.get_seq_length() == both.shape[1] + 3


def test_a_static_cache_is_used_again(llava):
    """The second call starts from a clean slate: `reset` drops what was known of the first prompt."""
    one, two = LLAVA.inputs([[2, "image", 3]]).inputs, LLAVA.inputs([[6]]).inputs
    with tokred.patch(llava, Evenly(5)):
        wanted = [greedy(llava, given).sequences for given in (one, two)]
        cache = transformers.StaticCache(config=llava.config.text_config, max_cache_len=40)
        for given, tokens in zip((one, two), wanted, strict=True):
            cache.reset()
            out = greedy(llava, {**given, "past_key_values": cache})
            assert torch.equal(out.sequences, tokens)


def test_beams_of_a_patched_model_do_not_mark_unreduced_caches(llava):
    with tokred.patch(llava, Evenly(None, bypass=True)):
        out = greedy(llava, one_image(), num_beams=2)
    assert type(out.past_key_values) is DynamicCache


# -- undo, copies, errors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Failing(Evenly):
    name: ClassVar[str] = "probe_failing"

    def select(self, view):
        raise KeyError("no")


def fail_in(module: nn.Module):
    def hook(*given):
        raise KeyError("no")

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("place", ["tower", "projector", "method", "language", "head"])
def test_an_error_anywhere_leaves_a_clean_model(llava, place):
    forward(llava, one_image())
    before, plain = fingerprint(llava), forward(llava, one_image()).logits
    patch = tokred.patch(llava, Failing(5) if place == "method" else Spy())
    session = patch._attachment
    handle = None
    parts = {
        "tower": layers_of(tower_of(llava))[1],
        "projector": llava.model.multi_modal_projector,
        "language": language_of(llava).layers[1],
        "head": llava.lm_head,
    }
    if place in parts:
        handle = fail_in(parts[place])
    for call in (lambda: forward(llava, one_image()), lambda: llava.generate(**one_image(), max_new_tokens=2)):
        with pytest.raises(KeyError):
            call()
    assert session.thread.seen is None
    assert session.thread.frames == []
    if handle is not None:
        handle.remove()
        wanted = patch.model(**one_image())
        assert wanted.logits.shape == plain.shape
    patch.remove()
    assert fingerprint(llava) == before
    assert torch.equal(forward(llava, one_image()).logits, plain)


def test_failed_installation_leaves_a_clean_model(llava):
    before = fingerprint(llava)
    with pytest.raises(InvalidParameterError, match="restore_length"):
        tokred.patch(llava, Evenly(5), restore_length="yes")
    assert fingerprint(llava) == before


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "gemma3"])
def test_copies_pickles_and_saves(family, tmp_path):
    tiny = FAMILIES[family]
    model = tiny.make()
    inputs = tiny.inputs(rows_of(tiny)[:2]).inputs
    patch = tokred.patch(model, Spy(layers=(1,), record=False))
    # before the first pass: the library's own lazy hooks do not pickle, patched or not
    restored = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    wanted = forward(model, inputs).logits
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    patch.remove()
    plain = forward(model, inputs).logits
    for copied in (twin, restored, loaded):
        assert torch.equal(forward(copied, inputs).logits, wanted)
        tokred.unpatch(copied)
        assert torch.equal(forward(copied, inputs).logits, plain)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(forward(again.eval(), inputs).logits, plain)


def test_a_reduced_cache_copies_and_pickles(llava):
    with tokred.patch(llava, Evenly(5)):
        first = greedy(llava, one_image())
        ids = torch.cat([first.sequences, torch.tensor([[9, 9]])], dim=1)
        cache = first.past_key_values
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
        outs = [greedy(llava, {"input_ids": ids, "past_key_values": one}).sequences for one in copies]
    assert all(torch.equal(out, outs[0]) for out in outs)


@dataclass(frozen=True, repr=False)
class ByQuestion(Evenly):
    """Keeps as many tokens as the length of the question says."""

    name: ClassVar[str] = "probe_by_question"

    def kept(self, layout):
        return len(layout.cells) - 1

    def select(self, view):
        rows = [list(range(1 + len(text) % 9)) for text in view.texts()]
        return Keep(torch.tensor(rows))


def test_features_encoded_once_serve_other_questions(llava):
    """A choice lasts for one call of generate, and is made anew for the next, though the features are the same."""
    inputs = one_image()
    pixels = inputs.pop("pixel_values")
    with tokred.patch(llava, ByQuestion()) as patch:
        with torch.no_grad():
            encoded = llava.model.get_image_features(pixels, return_dict=True)
        for question in ("abc", "abcdefg"):
            for call in (greedy, forward):
                with patch.request(query=question):
                    call(llava, {**inputs, "mm_encoder_outputs": {"image": encoded}})
                assert patch.trace[0].tokens_out == 1 + len(question)


def test_a_choice_does_not_follow_the_text_that_grows(llava):
    """Without a cache every pass sees the whole text; all passes of one generate use the first one's choice."""
    inputs = one_image()
    with tokred.patch(llava, ByQuestion(), processor=Tokenizer()):
        free, cached = greedy(llava, inputs, use_cache=False), greedy(llava, inputs)
    assert torch.equal(free.sequences, cached.sequences)


def test_tower_outputs_are_not_held_after_a_pass(llava):
    with tokred.patch(llava, Spy(record=False)) as patch:
        forward(llava, one_image())
        thread = patch._attachment.thread
        assert thread.made == {}
        assert thread.frames == []
        assert thread.seen is None


def test_replace_and_inner_models(llava):
    inputs = one_image()
    with tokred.patch(llava, Evenly(5)) as patch:
        forward(llava, inputs)
        assert patch.trace[0].tokens_out == 5
        patch.replace(Evenly(3))
        forward(llava, inputs)
        assert patch.trace[0].tokens_out == 3
        wanted = forward(llava, inputs).logits
    with tokred.patch(llava.model, Evenly(3)):
        hidden = forward(llava.model, inputs).last_hidden_state
        torch.testing.assert_close(llava.lm_head(hidden), wanted)
        assert torch.equal(forward(llava, inputs).logits, wanted)


def test_without_restored_length(llava):
    with tokred.patch(llava, Evenly(5), restore_length=False):
        out = forward(llava, one_image())
        assert out.logits.shape[1] == one_image()["input_ids"].shape[1] - 11
        torch.testing.assert_close(greedy(llava, one_image()).logits[0], out.logits[:, -1], atol=1e-5, rtol=0)


def test_a_streamer_sees_prompt_and_tokens(llava):
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    inputs = one_image()
    with tokred.patch(llava, Evenly(5)):
        out = llava.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat([part.flatten() for part in streamer.parts]), out[0])


def test_an_accelerate_hook_stays(llava):
    accelerate = pytest.importorskip("accelerate")
    plain = forward(llava, one_image()).logits
    with tokred.patch(llava, Evenly(5)):
        wanted = forward(llava, one_image()).logits
    accelerate.hooks.add_hook_to_module(llava, accelerate.hooks.ModelHook())
    accelerate.hooks.add_hook_to_module(llava.model, accelerate.hooks.ModelHook())
    with tokred.patch(llava, Evenly(5)):
        assert torch.equal(forward(llava, one_image()).logits, wanted)
        llava.generate(**one_image(), max_new_tokens=2)
    assert torch.equal(forward(llava, one_image()).logits, plain)


# -- traps -------------------------------------------------------------------------------------------------------------


def test_gapped_positions_without_mask_or_cache(llava):
    """Trap 1: gaps in 1-D positions with no mask and no cache are read as packed sequences."""
    inputs = {key: value for key, value in one_image().items() if key != "attention_mask"}
    with tokred.patch(llava, Evenly(5, positions="original")):
        free, cached = forward(llava, inputs, use_cache=False), forward(llava, inputs, use_cache=True)
        torch.testing.assert_close(free.logits, cached.logits, atol=1e-6, rtol=0)
        masks: list = []
        handle = language_of(llava).register_forward_pre_hook(
            lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
        )
        forward(llava, inputs, use_cache=False)
        handle.remove()
    assert masks[0] is not None


def test_qwen_gets_explicit_positions():
    """Trap 2: the language model of a reduced call sees (3 | 4, B, S) positions of its own length."""
    tiny = FAMILIES["qwen2_5_vl"]
    model = tiny.make()
    shapes: list = []
    language_of(model).register_forward_pre_hook(
        lambda m, a, k: shapes.append((tuple(k["position_ids"].shape), k["inputs_embeds"].shape[1])), with_kwargs=True
    )
    with tokred.patch(model, Evenly(5)):
        forward(model, one_image(tiny))
        model.generate(**one_image(tiny), max_new_tokens=2)
    assert [len(shape) for shape, _ in shapes] == [3, 3, 3]
    assert all(shape[0] in (3, 4) and shape[-1] == length for shape, length in shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_stay(family):
    """Trap 3: `generate` reads the signature of get_image_features."""
    import inspect

    model = FAMILIES[family].make(FAMILIES[family].kernels[0])
    names = ("get_image_features", "get_video_features", "forward")
    outer_names = ("generate", "prepare_inputs_for_generation", "forward")

    def signatures() -> list:
        return [
            *[inspect.signature(getattr(model.model, n)) for n in names if hasattr(model.model, n)],
            *[inspect.signature(getattr(model, n)) for n in outer_names],
        ]

    plain, name = signatures(), type(model).__name__
    with tokred.patch(model, Evenly(5)):
        assert signatures() == plain
        assert type(model).__name__ == name
        assert type(model).__module__.startswith("transformers.")


def test_several_videos_under_beams_keep_their_rows():
    """Trap 5: OneVision's videos under beams with B > 1."""
    tiny = FAMILIES["llava_onevision"]
    model = tiny.make()
    prompt = tiny.inputs([[2, "video", 3], [4, "video", 1], [1, "video", 1, "video", 2]])
    with tokred.patch(model, Evenly(5)):
        out = model.generate(**prompt.inputs, num_beams=3, max_new_tokens=4, do_sample=False)
        for row in range(3):
            alone = model.generate(**prompt.single(row).inputs, num_beams=3, max_new_tokens=4, do_sample=False)
            assert torch.equal(out[row, -4:], alone[0, -4:])


def test_scores_under_fused_attention_need_no_attentions_output():
    """Trap 7: output_attentions=True is empty under sdpa; scores are there all the same, and nobody asks for it."""
    tiny = FAMILIES["llava"]
    found = []
    for kernel in ("sdpa", "eager"):
        model = tiny.make(kernel)
        method = Spy(kinds=("rows", "mass"))
        with tokred.patch(model, method):
            forward(model, one_image(), output_attentions=False)
        assert model.config.vision_config._attn_implementation == kernel
        found.append(method.seen[0][1])
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], atol=1e-5, rtol=1e-4)


# -- composition -------------------------------------------------------------------------------------------------------


def test_a_method_inside_the_tower_and_one_behind_it(spied):
    """ToMe merges inside the tower, whose grid is restored; scores of reduced layers are scattered to the cells."""
    tiny = FAMILIES["llava"]
    model = tiny.make()
    inputs = tiny.inputs([[2, "image", 3], [1, "image", 4]]).inputs
    plain = forward(model, inputs).logits
    method = Spy(kinds=("rows", "mass", "keys"), layers=(0, 1), asks=("hidden",))
    with tokred.patch(model, [tokred.ToMe(r=2), method]) as patch:
        reduced = forward(model, inputs).logits
        group = patch.trace.steps[0].group  # after block 0: what layer 1 sees
        assert [step.tokens_out for step in patch.trace.steps][:2] == [14, 12]
        assert [step.tokens_out for step in patch.trace.media] == [5, 5]
        out = greedy(model, inputs)
        assert out.sequences.shape[0] == 2
    assert torch.equal(forward(model, inputs).logits, plain)
    assert not torch.allclose(reduced, plain)
    ((view, found),) = method.seen[:1]
    assert view.features.shape == (2, 16, 32)
    assert found["hidden"].shape[2] == 16
    exact = true_scores(tiny, inputs, (0,))
    torch.testing.assert_close(found["rows", 0][:, 0], exact["rows", 0], atol=2e-6, rtol=1e-4)
    for kind in ("rows", "mass", "keys"):
        value = found[kind, 1][:, 0]
        assert value.shape[2] == 16
        for image in range(2):
            for slot in group[image].unique():
                members = (group[image] == slot).nonzero()[:, 0]
                own = value[image][:, members]
                assert torch.equal(own, own[:, :1].expand_as(own))
    rows = found["rows", 1][:, 0]
    for image in range(2):
        first = [int((group[image] == slot).nonzero()[0, 0]) for slot in group[image].unique()]
        assert (rows[image][:, first].sum(-1) < 1).all()  # with the class token's own share, 1


def test_dropped_cells_score_zero():
    tiny = FAMILIES["llava"]
    model = tiny.make()
    inputs = one_image()
    method = Spy(kinds=("rows", "mass"), layers=(1,))
    with tokred.patch(model, [tokred.RandomTokens(keep_rate=0.5, layers=(0,)), method]) as patch:
        forward(model, inputs)
        gone = patch.trace.steps[0].group[0] < 0
    assert gone.sum() == 8
    for kind in ("rows", "mass"):
        value = method.seen[0][1][kind, 1][0, 0]
        assert (value[:, gone] == 0).all()
        assert (value[:, ~gone] > 0).all()


def test_a_method_inside_the_tower_alone(llava):
    plain = forward(llava, one_image()).logits
    with tokred.patch(llava, tokred.ToMe(r=2)) as patch:
        out = forward(llava, one_image())
        assert out.logits.shape == plain.shape
        assert not torch.allclose(out.logits, plain)
        assert len(patch.trace.media) == 0
    assert torch.equal(forward(llava, one_image()).logits, plain)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "idefics3"])
def test_towers_that_no_host_serves_are_refused(family):
    model = FAMILIES[family].make()
    before = fingerprint(model)
    for methods in (tokred.ToMe(r=2), [tokred.ToMe(r=2), Evenly(5)]):
        with pytest.raises(UnsupportedModelError):
            tokred.patch(model, methods)
        assert fingerprint(model) == before


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_threads_do_not_mix(family):
    tiny = FAMILIES[family]
    model = tiny.make()
    shapes = (("image", 1), ("image", 3), (tiny.parts()[-1], 2))
    prompts = [tiny.inputs([[2, part, 3]] * count).inputs for part, count in shapes]

    def run(given: dict) -> Tensor:
        if tiny.mrope:  # the library keeps rope_deltas on the module, which threads share: plain forwards only
            return forward(model, given).logits
        return greedy(model, given).sequences

    with tokred.patch(model, Spy(layers=(0,), kinds=("mass",))) as patch:
        wanted = [run(given) for given in prompts]
        problems: list = []

        def work(number: int) -> None:
            try:
                for _ in range(4):
                    assert torch.equal(run(prompts[number]), wanted[number])
                    assert len(patch.trace) == prompts[number]["input_ids"].shape[0]
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems, problems


def test_gradient_checkpointing_chooses_the_same(llava):
    llava.train()
    llava.gradient_checkpointing_disable()
    inputs = one_image()

    def gradients() -> list[Tensor]:
        llava.zero_grad()
        llava(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)).loss.backward()
        return [p.grad.clone() for p in llava.parameters() if p.grad is not None]

    with tokred.patch(llava, Spy(kinds=("rows",))):
        wanted = gradients()
        for reentrant in (False, True):
            llava.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                llava.enable_input_require_grads()
            for a, b in zip(gradients(), wanted, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_merged_tokens_may_outnumber_a_static_cache(llava):
    """A plan with more tokens than placeholders gets its room in a static cache."""
    prompt = LLAVA.inputs([[2, "image", 3]])
    with tokred.patch(llava, Blend(3.0)):
        static = greedy(llava, prompt.inputs, cache_implementation="static")
        dynamic = greedy(llava, prompt.inputs)
    assert torch.equal(static.sequences, dynamic.sequences)
    tokens, _ = Reference(llava, LLAVA, prompt, Blend(3.0)).generate(4)
    assert tokens == dynamic.sequences[0, -4:].tolist()


def test_layout_numbers():
    layout = MediaLayout("image", 2, (2, 2), (0, 1, NEWLINE, 4, 7, NEWLINE))
    assert layout.cells == (0, 1, 4, 7)
    assert layout.total_cells == 8
    info = TowerInfo(3, 4, True, 1)
    assert not info.projects


def test_generate_batch_is_refused_by_name():
    tiny = FAMILIES["llava"]
    model = tiny.make()
    with (
        tokred.patch(model, tokred.RandomTokens(budget=0.5)),
        pytest.raises(NotImplementedError, match="generate_batch"),
    ):
        model.generate_batch([[1, 2, 3]])
    assert "generate_batch" not in vars(type(model))
