"""The TokenFlow tokenizer: its parts, prefixes of scales, features for language models, saving, and wrong input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from tokred.core.errors import InvalidParameterError, UnknownParameterError
from tokred.generation import tokenflow_parts as parts
from tokred.generation.images import to_pil
from tokred.generation.tokenflow import FEATURE_MODES, TokenFlow
from tokred.generation.tokenizer import ImageTokenizer

PIXELS = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 8}
CLIP = {
    "type": "clip", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "patch_size": 2, "hidden_act": "quick_gelu",
}  # fmt: skip
SIGLIP = {key: value for key, value in CLIP.items() if key != "hidden_act"} | {"type": "siglip", "input_norm": "clamp"}
TIMM = {
    "type": "timm", "model_name": "vit_tiny_patch16_224", "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2,
    "input_norm": "clip",
}  # fmt: skip
ENCODERS = {"clip": CLIP, "siglip": SIGLIP, "timm": TIMM}
SMALL: dict[str, Any] = {
    "image_size": 12, "scales": [1, 2, 4, 6], "codebook_size": 32, "semantic_dim": 6, "pixel_dim": 4,
    "semantic_encoder_config": CLIP,
    "semantic_decoder_config": {"dim": 16, "depth": 1, "heads": 2, "out_dim": 10},
    "pixel_encoder_config": PIXELS, "pixel_decoder_config": PIXELS,
}  # fmt: skip


def small(seed: int = 0, **changes: Any) -> TokenFlow:
    torch.manual_seed(seed)
    return TokenFlow(**{**SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def model() -> TokenFlow:
    return small()


def pictures(count: int = 2, size: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_what_it_is(model: TokenFlow) -> None:
    assert isinstance(model, ImageTokenizer)
    assert (model.num_tokens, model.codebook_size, model.image_size, model.prefixes) == (57, 32, 12, True)
    assert model.scales == (1, 2, 4, 6)
    codes = model.encode(pictures())
    assert codes.shape == (2, 57)
    assert codes.dtype == torch.int64
    for found in (model.decode(codes), *model.progressive(codes)):
        assert found.shape == (2, 3, 12, 12)
        assert found.dtype == torch.float32
        assert found.abs().max() <= 1
    assert model.decode_semantic(codes).shape == (2, 36, 10)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_decoding_codes_is_decoding_latents(kind: str) -> None:
    made, x = small(semantic_encoder_config=ENCODERS[kind]), pictures()
    found = made.encode_full(x)
    assert torch.equal(made.encode(x), found.codes)
    assert torch.equal(made.features(found.codes), found.latents)
    torch.testing.assert_close(made.decode(found.codes), made.decode_latents(found.latents).clamp(-1, 1))
    torch.testing.assert_close(made.decode_semantic(found.codes), made.semantic_features(found.latents))
    z = torch.cat([found.semantic.mT.unflatten(2, (6, 6)), found.pixel], dim=1)
    torch.testing.assert_close(found.latents + found.residual, z, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_a_batch_is_its_pictures_one_by_one(kind: str) -> None:
    made, x = small(semantic_encoder_config=ENCODERS[kind]), pictures(3)
    codes = made.encode(x)
    assert torch.equal(codes, torch.cat([made.encode(one) for one in x]))
    torch.testing.assert_close(made.decode(codes), torch.cat([made.decode(one[None]) for one in codes]))


def test_prefixes_of_whole_scales(model: TokenFlow) -> None:
    codes = model.encode(pictures())
    steps = model.progressive(codes)
    for count, step in zip((1, 5, 21, 57), steps, strict=True):
        assert torch.equal(model.encode(pictures(), num_tokens=count), codes[:, :count])
        torch.testing.assert_close(model.decode(codes, num_tokens=count), step)
        torch.testing.assert_close(model.decode(codes[:, :count]), step)
    assert torch.equal(model.decode_semantic(codes, 57), model.decode_semantic(codes))
    assert torch.equal(model.features(codes, 4), model.features(codes))
    for wrong in (0, 2, 56, 58):
        with pytest.raises(InvalidParameterError, match="whole scales, 1, 5, 21, 57"):
            model.decode(torch.zeros(1, wrong, dtype=torch.int64))
        with pytest.raises(InvalidParameterError, match="whole scales"):
            model.encode(pictures(), num_tokens=wrong)
    with pytest.raises(InvalidParameterError, match="only 5 codes"):
        model.decode(codes[:, :5], num_tokens=21)


@pytest.mark.parametrize("size", [10, 14, 18])
def test_sizes_without_a_power_of_two(size: int) -> None:
    """A semantic grid of 5, 7, 9 with a pixel encoder of another factor: pictures are scaled for it, as for SigLIP."""
    grid = size // 2
    three = {**PIXELS, "block_out_channels": [8, 8, 8]}
    shape = {"image_size": size, "scales": [1, grid], "pixel_size": 4 * grid}
    made = small(pixel_encoder_config=three, pixel_decoder_config=three, **shape)
    x = pictures(size=size)
    wide = torch.nn.functional.interpolate(x, (4 * grid,) * 2, mode="bicubic")
    torch.testing.assert_close(made.pixel_map(x), made.quant_conv(made.pixel_encoder(wide)))
    assert made.decode(made.encode(x)).shape == (2, 3, size, size)


def test_inputs_of_the_semantic_encoders() -> None:
    x = 3 * pictures()
    for kind, config in ENCODERS.items():
        made = small(semantic_encoder_config=config)
        same = torch.allclose(made.semantic_map(x), made.semantic_map(x.clamp(-1, 1)), atol=1e-6)
        assert same == (kind != "clip"), kind
        assert not torch.allclose(made.pixel_map(x), made.pixel_map(x.clamp(-1, 1)), atol=1e-3)
    mean, std = torch.tensor(parts.CLIP_MEAN), torch.tensor(parts.CLIP_STD)
    wanted = (((pictures() + 1) / 2) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    encoder = parts.semantic_encoder(TIMM, 12)
    got = parts.semantic_tokens(encoder, TIMM, pictures())
    torch.testing.assert_close(got, parts.semantic_tokens(encoder, {**TIMM, "input_norm": "none"}, wanted))


def test_siglip_is_read_before_its_last_layer_but_not_after_its_norm() -> None:
    """The encoder without its last layer gives what `hidden_states[-2]` is of the whole."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    fields = {key: value for key, value in SIGLIP.items() if key not in ("type", "input_norm", "num_hidden_layers")}
    whole = SiglipVisionModel(SiglipVisionConfig(image_size=12, num_hidden_layers=3, **fields)).eval()
    short = parts.semantic_encoder({**SIGLIP, "num_hidden_layers": 2}, 12).eval()
    short.load_state_dict({key: value for key, value in whole.state_dict().items() if key in short.state_dict()})
    wanted = whole(pictures(), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(parts.semantic_tokens(short, SIGLIP, pictures()), wanted)


# -- features for language models --------------------------------------------------------------------------------------


def test_features_for_language_models(model: TokenFlow) -> None:
    x = pictures()
    codes = model.encode(x)
    quant = model.features(codes)
    for mode in FEATURE_MODES:
        found = model.llm_features(x, mode)
        assert torch.equal(found, model.llm_features(codes, mode))
        assert found.dtype == torch.float32
    last = model.llm_features(codes)
    assert torch.equal(last, quant.flatten(2).mT)
    assert torch.equal(
        last, torch.cat([model.llm_features(codes, f"last_{half}") for half in ("semantic", "pixel")], 2)
    )
    assert torch.equal(model.llm_features(codes, "full_residual"), model.lookup(codes))
    full = model.llm_features(codes, "full")
    assert full.shape == (2, 57, 10)
    assert torch.equal(full[:, -36:], last)
    torch.testing.assert_close(full[:, 0], model.features(codes, 1).mean((2, 3)))
    start = 0
    for m, (side, count) in enumerate(zip(model.scales, model.quantizer.lengths, strict=True), 1):
        prefix = model.llm_features(codes, "prefix", m)
        assert prefix.shape == (2, side * side, 10)
        assert torch.equal(prefix, full[:, start:count])
        assert torch.equal(prefix, model.llm_features(codes[:, :count], "prefix"))
        assert torch.equal(model.llm_features(codes, "full", m), full[:, :count])
        assert torch.equal(model.llm_features(codes, "full_residual", m), model.lookup(codes[:, :count]))
        assert torch.equal(model.llm_features(codes, "last", m), model.features(codes, m).flatten(2).mT)
        start = count
    assert torch.equal(model.llm_features(codes, "prefix"), last)
    with pytest.raises(InvalidParameterError, match="last_semantic"):
        model.llm_features(codes, "first")
    with pytest.raises(InvalidParameterError, match="from 1 to 4"):
        model.llm_features(codes, "prefix", 5)
    with pytest.raises(InvalidParameterError, match="from 1 to 2"):
        model.llm_features(codes[:, :5], "prefix", 3)


# -- precision, gradients, saving --------------------------------------------------------------------------------------


def test_autocast_and_half_precision(model: TokenFlow) -> None:
    x = pictures()
    codes = model.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(x), codes)
        assert torch.equal(model.features(codes), model.features(codes).float())
        pictures_ = model.decode(codes)
    assert torch.equal(pictures_, model.decode(codes))
    near = model.decode(codes, dtype=torch.bfloat16)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, pictures_, atol=0.1, rtol=0)
    assert model.encode(x, dtype=torch.bfloat16).shape == codes.shape
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = half.encode_full(x)
    assert found.latents.dtype == torch.float32
    assert half.decode(codes).dtype == torch.float32
    torch.testing.assert_close(half.decode(codes), pictures_, atol=0.2, rtol=0)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_gradients_reach_every_parameter(kind: str) -> None:
    made, x = small(semantic_encoder_config=ENCODERS[kind]).train(), pictures(4)
    torch.manual_seed(0)
    found = made(x)
    teacher = torch.randn(4, 36, 10)
    loss = (found.sample - x).square().mean() + parts.semantic_loss(found.features, teacher)
    (loss + found.encoder.vq_loss + 0.25 * found.encoder.commitment_loss).backward()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    frozen = [name for name, parameter in made.named_parameters() if not parameter.requires_grad]
    assert all(name.startswith("semantic_encoder.post_layernorm.") for name in frozen)
    assert bool(frozen) == (kind == "siglip")


def test_scales_are_dropped_in_training_alone() -> None:
    made, x = small(scale_drop=1.0), pictures()
    assert made(x).encoder.codes.shape == (2, 57)
    made.train()
    assert {57 - made(x).encoder.codes.shape[1] for _ in range(12)} <= {4, 16, 36}
    with pytest.raises(InvalidParameterError, match="scale_drop"):
        small(scale_drop=1.5)


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        made = small(scale_drop=0.0).train()
        if checkpointing:
            made.enable_gradient_checkpointing()
            assert made.pixel_encoder.gradient_checkpointing
        out = made(pictures())
        (out.sample.square().sum() + out.features.square().sum()).backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    made = small(semantic_encoder_config=ENCODERS[kind])
    made.save_pretrained(tmp_path)
    loaded = TokenFlow.from_pretrained(tmp_path)
    codes = made.encode(pictures())
    assert loaded.scales == made.scales
    assert torch.equal(loaded.encode(pictures()), codes)
    assert torch.equal(loaded.decode(codes), made.decode(codes))
    assert torch.equal(loaded.decode_semantic(codes), made.decode_semantic(codes))
    for dtype in (torch.float16, torch.bfloat16):
        half = TokenFlow.from_pretrained(tmp_path, torch_dtype=dtype)
        assert half.pixel_encoder.conv_in.weight.dtype == dtype
        assert torch.equal(half.quantizer.semantic_codebook, made.quantizer.semantic_codebook)


# -- pictures in -------------------------------------------------------------------------------------------------------


def test_pil_images_are_cut_or_padded(model: TokenFlow) -> None:
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    for fit in ("crop", "pad", "squeeze"):
        codes = model.encode([wide, np.asarray(wide)], fit=fit)
        assert torch.equal(codes[0], codes[1])
        assert torch.equal(model.encode(wide, fit=fit), codes[:1])
    cut = parts.crop_square(wide, 12)  # 30 >= 2 * 12: halved once
    halved = wide.resize((25, 15), Image.Resampling.BOX).resize((20, 12), Image.Resampling.BICUBIC)
    assert cut.tobytes() == halved.crop((4, 0, 16, 12)).tobytes()
    padded = np.asarray(parts.pad_square(Image.new("RGB", (40, 20), "white"), 40))
    assert (padded[:10] == 127).all()
    assert (padded[10:30] == 255).all()
    assert (padded[30:] == 127).all()
    assert (np.asarray(parts.pad_square(Image.new("L", (40, 20), 255), 12, pad=False)) == 255).all()
    same = to_pil(pictures())[0]
    assert parts.crop_square(same, 12).tobytes() == parts.pad_square(same, 12).tobytes() == same.tobytes()


@pytest.mark.parametrize("shape", [(2, 3, 10, 10), (2, 3, 12, 14), (2, 3, 24, 24)])
def test_other_sizes_are_errors(model: TokenFlow, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidParameterError, match=r"expected \(B, 3, 12, 12\)"):
        model.encode(torch.zeros(shape))


def test_wrong_input_is_an_error(model: TokenFlow) -> None:
    with pytest.raises(InvalidParameterError, match=r"in \[-1, 1\]"):
        model.encode(2 * torch.ones(1, 3, 12, 12))
    with pytest.raises(InvalidParameterError, match="fit"):
        model.encode(pictures(), fit="stretch")
    with pytest.raises(InvalidParameterError, match="str given"):
        model.encode("picture.png")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="expected 0 to 31"):
        model.decode(torch.full((1, 1), 32))
    with pytest.raises(InvalidParameterError, match=r"codes \(B, n\)"):
        model.decode(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InvalidParameterError, match="integers"):
        model.decode(torch.zeros(1, 5))
    for name in ("decode_latents", "semantic_features"):
        with pytest.raises(InvalidParameterError, match=r"expected \(B, 10, 6, 6\)"):
            getattr(model, name)(torch.zeros(1, 10, 6, 5))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"image_size": 12.0}, InvalidParameterError, "image_size"),
        ({"image_size": 16}, InvalidParameterError, "pixel_encoder_config: its levels make a grid of 8"),
        ({"pixel_size": 16}, InvalidParameterError, "grid of 8"),
        ({"scales": [1, 5]}, InvalidParameterError, "the last scale is 5"),
        ({"semantic_encoder_config": {**CLIP, "patch_size": 3}}, InvalidParameterError, "grid is 4 x 4"),
        ({"semantic_encoder_config": {**CLIP, "type": "dino"}}, InvalidParameterError, "clip, siglip, timm"),
        ({"semantic_encoder_config": {**CLIP, "input_norm": "imagenet"}}, InvalidParameterError, "none, clamp, clip"),
        ({"semantic_encoder_config": {**TIMM, "model_name": "no"}}, InvalidParameterError, "no such model"),
        ({"semantic_decoder_config": {"dim": 16, "heads": 3, "out_dim": 4}}, InvalidParameterError, "3 heads"),
        ({"semantic_decoder_config": {"dim": 16}}, InvalidParameterError, "out_dim"),
        ({"semantic_decoder_config": {"dims": 16}}, UnknownParameterError, "did you mean"),
        ({"pixel_encoder_config": {**PIXELS, "channel": 3}}, UnknownParameterError, "channel"),
        ({"pixel_decoder_config": {**PIXELS, "norm_num_groups": 3}}, InvalidParameterError, "norm_num_groups=3"),
    ],
)
def test_parts_that_do_not_fit_are_errors(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        small(**changes)


def test_positions_are_resized_by_the_factor() -> None:
    table = torch.randn(17, 3)
    assert parts.resize_positions(table, 4) is table
    found = parts.resize_positions(table, 6)
    assert found.shape == (37, 3)
    assert torch.equal(found[0], table[0])
    squares = table[1:].T.view(1, 3, 4, 4)
    by_size = torch.nn.functional.interpolate(squares, (6, 6), mode="bicubic")
    assert not torch.allclose(found[1:].T.view(1, 3, 6, 6), by_size, atol=1e-3)
    with pytest.raises(InvalidParameterError, match="square number"):
        parts.resize_positions(torch.zeros(16, 3), 6)


def test_the_semantic_loss_is_half_the_squared_distance_of_unit_vectors() -> None:
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (a, b)]
    torch.testing.assert_close(parts.semantic_loss(a, b), (unit[0] - unit[1]).square().sum(-1).mean() / 2)
    assert parts.semantic_loss(a, 3 * a).abs() < 1e-6
