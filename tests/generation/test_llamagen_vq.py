"""The tokenizer of a grid of codes: its surface, lookup by the slow definition, LlamaGen's names and files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from diffusers import VQModel

from tests.conftest import ROOT
from tokred.core.errors import InvalidParameterError, UnsafeCheckpointError
from tokred.generation.llamagen_vq import (
    VQTokenizer,
    config_of_official,
    from_official_key,
    official_state_dict,
    to_official_key,
    vq_state_dict,
)
from tokred.generation.tokenizer import ImageTokenizer

COMPANION = ROOT.parent / "shared" / "specs" / "token_shuffle_llamagen_vq16_state_dict.json"
K, E = 24, 8


def model(**options: Any) -> VQModel:
    """The release's layout, tiny: two blocks, attention inside, 32 groups."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "latent_channels": 32,
        "num_vq_embeddings": K,
        "vq_embed_dim": E,
        "norm_num_groups": 32,
        "scaling_factor": 1.0,
        "sample_size": 8,
        "lookup_from_codebook": True,
    }
    made = VQModel(**{**sizes, **options}).eval()
    with torch.no_grad():
        rows = made.quantize.embedding.weight.normal_()
        rows /= rows.norm(dim=1, keepdim=True)
    return made


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


# -- pictures to codes and back --------------------------------------------------------------------------------------


def test_surface(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(model())
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.image_size, tokenizer.factor) == (16, K, 8, 2)
    assert tokenizer.prefixes is False
    images = pictures(3, 3, 8, 8)
    ids, grid = tokenizer.encode(images), tokenizer.encode_grid(images)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, grid.flatten(1))
    assert grid.shape == (3, 4, 4)
    back = tokenizer.decode(ids)
    assert back.shape == images.shape
    assert back.dtype == torch.float32
    assert back.abs().max() <= 1
    assert torch.equal(tokenizer.decode(grid), back)
    assert torch.equal(torch.cat([tokenizer.encode(one[None]) for one in images]), ids)
    raw = tokenizer.vqvae(images).sample  # diffusers' own way through the quantiser
    torch.testing.assert_close(tokenizer.decode_codes(grid), raw, atol=1e-5, rtol=1e-4)
    tokenizer.save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.decode(again.encode(images)), back)
    photograph = Image.new("RGB", (20, 13), "teal")
    assert tokenizer.encode(photograph).shape == (1, 16)


def test_other_shapes_keep_their_grid() -> None:
    tokenizer = VQTokenizer(model())
    grid = tokenizer.encode_grid(pictures(2, 3, 6, 10))
    assert grid.shape == (2, 3, 5)
    assert tokenizer.decode(grid).shape == (2, 3, 6, 10)
    for call, images, says in (
        (tokenizer.encode, pictures(1, 3, 6, 10), "6 x 10 pixels given, expected squares; encode_grid"),
        (tokenizer.encode, pictures(1, 3, 7, 7), "multiples of 2"),
        (tokenizer.encode_grid, pictures(1, 3, 7, 8), "multiples of 2"),
    ):
        with pytest.raises(InvalidParameterError, match=says):
            call(images)
    for tokens, says in (
        (torch.zeros(1, 15, dtype=torch.int64), "15 codes a picture given, no square"),
        (torch.full((1, 16), K), f"from {K} to {K} given, expected 0 to {K - 1}"),
        (torch.full((1, 16), -1), "from -1"),
        (torch.zeros(1, 16), "dtype torch.float32"),
        (torch.zeros(16, dtype=torch.int64), r"\(16,\) given"),
        ([1, 2], "list given"),
    ):
        with pytest.raises(InvalidParameterError, match=says):
            tokenizer.decode(tokens)
    with pytest.raises(InvalidParameterError, match="lookup_from_codebook"):
        VQTokenizer(model(lookup_from_codebook=False))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.floats(0.01, 100), st.booleans())
@settings(max_examples=15)
@torch.no_grad()
def test_lookup_is_the_nearest_row(batch: int, height: int, width: int, scale: float, unit: bool) -> None:
    tokenizer = TOKENIZER
    table = tokenizer.vqvae.quantize.embedding.weight
    rows = torch.randn(K, E, generator=torch.Generator().manual_seed(batch))
    table.copy_(rows / rows.norm(dim=1, keepdim=True) if unit else rows)
    latents = scale * torch.randn(batch, E, height, width, generator=torch.Generator().manual_seed(height + 7 * width))
    found = tokenizer.lookup(latents)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                distances = (latents[b, :, y, x].double() - table.double()).square().sum(dim=1)
                assert distances[found[b, y, x]] <= distances.min() * (1 + 1e-5)
    if unit:  # by direction alone
        assert torch.equal(tokenizer.lookup(latents / scale), found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.lookup(latents), found)


TOKENIZER = VQTokenizer(model())


def test_half_precision() -> None:
    tokenizer = VQTokenizer(model().bfloat16())
    back = tokenizer.decode(tokenizer.encode(pictures(1, 3, 8, 8)))
    assert back.dtype == torch.float32
    assert back.isfinite().all()


# -- the release -----------------------------------------------------------------------------------------------------


def official() -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, with rows of any length and the counter that the release has."""
    state = {name: value.clone() for name, value in official_state_dict(model()).items()}
    state["quantize.embedding.weight"] *= torch.arange(1, K + 1)[:, None]
    return {**state, "quantize.codebook_used": torch.zeros(7)}


@pytest.mark.skipif(not COMPANION.is_file(), reason="the specification's list of tensors is not here")
def test_names_and_sizes_of_the_released_tokenizer() -> None:
    stated = json.loads(COMPANION.read_text())
    shapes = {name: row["shape"] for name, row in stated["tensors"].items()}
    renamed = {name: row["diffusers"] for name, row in stated["tensors"].items() if row["diffusers"]}
    assert {name: from_official_key(name) for name in renamed} == renamed
    assert {to_official_key(ours): ours for ours in renamed.values()} == renamed
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        config = config_of_official(tensors)
        assert {name: config[name] for name in stated["diffusers_VQModel_config"]} == stated["diffusers_VQModel_config"]
        built = VQModel(**config).state_dict()
    converted = vq_state_dict(tensors)
    assert {name: value.shape for name, value in converted.items()} == {name: v.shape for name, v in built.items()}
    assert sum(value.numel() for value in built.values()) == stated["n_parameters"]


@pytest.mark.parametrize("form", ["model", "ema", "bare", "namespace", "safetensors"])
def test_a_checkpoint_is_read_strictly(tmp_path: Path, form: str) -> None:
    state = official()
    path = tmp_path / ("vq.safetensors" if form == "safetensors" else "vq.pt")
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif form == "namespace":
        torch.save({"model": state, "args": argparse.Namespace(codebook_size=K), "steps": 3}, path)
    else:
        torch.save(state if form == "bare" else {form: state}, path)
    tokenizer = VQTokenizer.from_official(path, image_size=8)
    assert not tokenizer.vqvae.training
    images = pictures(2, 3, 8, 8)
    wanted = VQTokenizer(model())
    assert torch.equal(tokenizer.encode(images), wanted.encode(images))
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(images)), wanted.decode(wanted.encode(images)))
    again = official_state_dict(tokenizer.vqvae)
    rows = state.pop("quantize.embedding.weight")
    torch.testing.assert_close(again.pop("quantize.embedding.weight"), rows / rows.norm(dim=1, keepdim=True))
    del state["quantize.codebook_used"]
    assert set(again) == set(state)
    assert all(torch.equal(again[name], value) for name, value in state.items())


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official()
    less = {name: value for name, value in state.items() if name != "decoder.conv_in.bias"}
    wrong = {**state, "post_quant_conv.weight": torch.zeros(32, 4, 1, 1)}
    more = {**state, "discriminator.main.0.weight": torch.zeros(1)}
    for name, content, error, says in (
        ("less", less, InvalidParameterError, "1 tensors are missing.*decoder.conv_in.bias"),
        ("wrong", wrong, InvalidParameterError, "post_quant_conv.weight"),
        ("more", more, InvalidParameterError, "'discriminator.main.0.weight' is no tensor"),
        ("other", {"w": torch.zeros(1)}, InvalidParameterError, "'w' is no tensor"),
        ("empty", {"model": 3}, InvalidParameterError, "no tensors under model"),
        ("unsafe", {"model": Payload()}, UnsafeCheckpointError, "print"),
    ):
        torch.save({"model": content} if name in ("less", "wrong", "more", "other") else content, tmp_path / name)
        with pytest.raises(error, match=says):
            VQTokenizer.from_official(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises((InvalidParameterError, UnsafeCheckpointError)):
        VQTokenizer.from_official(tmp_path / "text.pt")
    with pytest.raises(InvalidParameterError, match="neither a file nor a hub id"):
        VQTokenizer.from_official(tmp_path / "none.pt")
    for key in ("encoder.conv_blocks.0.res.0.scale", "encoder.mid.3.norm1.weight", "quantize.embedding.bin"):
        with pytest.raises(InvalidParameterError, match="is no tensor of LlamaGen"):
            from_official_key(key)
    with pytest.raises(InvalidParameterError, match="is no tensor of a VQModel"):
        to_official_key("decoder.conv_norm_out.norm_layer.weight")
