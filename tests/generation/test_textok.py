"""TexTok's tokenizer and pipeline: the invariants of its specification, slow definitions, and bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tests.conftest import ROOT
from tests.generation.textok_models import (
    CAPTIONS,
    TEXT_DIM,
    WORDS,
    features,
    make_model,
    make_pipeline,
    make_text,
    pictures,
    roughen,
)
from tokred.core.errors import InvalidParameterError
from tokred.generation.textok import TexTok
from tokred.generation.textok_model import PRESETS, TexTokModel, TokenGaussian, latent_statistics

COMPANION = ROOT.parent / "shared" / "specs" / "textok_state_dict_b256.json"
LAYOUT = ROOT / "tests" / "data" / "textok_b256.json"
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


def shapes(**fields: Any) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = TexTokModel(**fields)
    return {name: list(weight.shape) for name, weight in model.state_dict().items()}


def run(model: TexTokModel, images: Tensor, embeds: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
    """Latents (the mean of "kl") and pictures."""
    with torch.no_grad():
        out = model.encode(images, embeds, mask)
        z = out.latents if out.latent_dist is None else out.latent_dist.mode()
        return [z, model.decode(z, embeds, mask).sample]


def same(got: list[Tensor], want: list[Tensor], atol: float = 2e-6) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


# -- layout ----------------------------------------------------------------------------------------------------------


def expanded_layout() -> dict[str, list[int]]:
    """The compact copy: the tensors of block i of each side are those of "blocks.0"."""
    compact = json.loads(LAYOUT.read_text())["params"]
    found = {}
    for name, shape in compact.items():
        rows = range(12) if ".blocks.0." in name else [0]
        found |= {name.replace(".blocks.0.", f".blocks.{i}."): shape for i in rows}
    return found


def test_default_layout_is_the_companions() -> None:
    layout = expanded_layout()
    assert shapes() == layout
    assert len(layout) == 308
    assert sum(math.prod(shape) for shape in layout.values()) == 175_190_216
    if COMPANION.is_file():
        assert json.loads(COMPANION.read_text())["params"] == layout


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"num_tokens": 256}, {"encoder.latent_tokens", "decoder.latent_pos_embed"}),
        ({"latent_type": "kl"}, {"encoder.to_latent.weight", "encoder.to_latent.bias"}),
        ({"max_text_len": 32}, set()),
        ({"mask_padding": False}, set()),
    ],
)
def test_options_change_exactly_these_tensors(fields: dict[str, Any], changed: set[str]) -> None:
    before, after = shapes(), shapes(**fields)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    ("fields", "extra", "missing"),
    [
        ({"text_positions": True}, {"encoder.text_pos_embed", "decoder.text_pos_embed"}, set()),
        ({"type_embeddings": True}, {"encoder.type_embed", "decoder.type_embed"}, set()),
        ({"shared_text_proj": True}, set(), {"decoder.text_proj.weight", "decoder.text_proj.bias"}),
        ({"text_in_encoder": False}, set(), {"encoder.text_proj.weight", "encoder.text_proj.bias"}),
        ({"text_in_decoder": False}, set(), {"decoder.text_proj.weight", "decoder.text_proj.bias"}),
    ],
)
def test_options_add_and_remove_exactly_these_tensors(
    fields: dict[str, Any], extra: set[str], missing: set[str]
) -> None:
    before, after = shapes(), shapes(**fields)
    assert after.keys() - before.keys() == extra
    assert before.keys() - after.keys() == missing


def test_sizes_of_512_and_presets() -> None:
    big = shapes(image_size=512, patch_size=16, text_dim=4096)
    assert sum(math.prod(shape) for shape in big.values()) == pytest.approx(179.22e6, abs=5e3)
    with torch.device("meta"):
        for name, fields in PRESETS.items():
            model = TexTokModel.from_preset(name, num_tokens=64, encoder_depth=1)
            assert len(model.decoder.blocks) == fields["decoder_depth"]
            assert model.config.hidden_size == fields["hidden_size"]
            assert model.config.num_tokens == 64
    with pytest.raises(InvalidParameterError, match="textok_xl"):
        TexTokModel.from_preset("textok_xl")


# -- against slow definitions ----------------------------------------------------------------------------------------


def slow_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (spread + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def slow_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return x @ linear.weight.double().T + linear.bias.double()


def slow_block(x: Tensor, block: Any, heads: int, valid: Tensor | None) -> Tensor:
    """A block with its softmax written out, float64, one sample (L, D); `valid` (L,) tells which keys count."""
    y = slow_linear(slow_norm(x, block.norm1), block.attn.qkv)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in y.chunk(3, dim=-1))
    rows = []
    for h in range(heads):
        scores = q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])
        if valid is not None:
            scores[:, ~valid] = -math.inf
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        rows.append(weights @ v[:, h])
    x = x + slow_linear(torch.cat(rows, dim=-1), block.attn.proj)
    z = slow_linear(slow_norm(x, block.norm2), block.mlp.fc1)
    z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    return x + slow_linear(z, block.mlp.fc2)


@torch.no_grad()
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_tokenizer_and_detokenizer_follow_the_definition(sample: int) -> None:
    model = make_model()
    images, embeds = pictures(3), features(3)
    z, y = run(model, images, embeds, MASK)
    encoder, decoder, heads = model.encoder, model.decoder, model.config.num_heads
    valid = torch.cat([torch.ones(16 + 4), MASK[sample]]).bool()

    kernel = encoder.patch_embed.weight.double()
    patches = []
    for i in range(4):
        for j in range(4):
            patch = images[sample, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].double()
            patches.append((kernel * patch).sum(dim=(1, 2, 3)) + encoder.patch_embed.bias.double())
    text = slow_linear(embeds[sample].double(), encoder.text_proj)
    x = torch.cat([torch.stack(patches) + encoder.pos_embed[0], encoder.latent_tokens[0], text])
    for block in encoder.blocks:
        x = slow_block(x, block, heads, valid)
    torch.testing.assert_close(
        z[sample].double(), slow_linear(slow_norm(x[16:20], encoder.norm), encoder.to_latent), atol=1e-5, rtol=1e-4
    )

    text = slow_linear(embeds[sample].double(), decoder.text_proj)
    latents = slow_linear(z[sample].double(), decoder.latent_proj) + decoder.latent_pos_embed[0]
    x = torch.cat([decoder.patch_tokens[0].double(), latents, text])
    for block in decoder.blocks:
        x = slow_block(x, block, heads, valid)
    rows = slow_linear(slow_norm(x[:16], decoder.norm), decoder.to_pixels)
    want = torch.empty(3, 32, 32, dtype=torch.float64)
    for p in range(16):
        for r in range(8):
            for c in range(8):
                for channel in range(3):
                    want[channel, p // 4 * 8 + r, p % 4 * 8 + c] = rows[p, (r * 8 + c) * 3 + channel]
    torch.testing.assert_close(y[sample].double(), want, atol=1e-5, rtol=1e-4)


# -- text ------------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    more=st.integers(0, 4),
    garbage=st.sampled_from([1e3, math.nan, math.inf]),
)
def test_padding_changes_nothing(lengths: list[int], more: int, garbage: float) -> None:
    model, count = make_model(), len(lengths)
    images, embeds = pictures(count), features(count)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    want = run(model, images, embeds, mask)
    embeds = torch.nn.functional.pad(embeds, (0, 0, 0, more), value=garbage)
    mask = torch.nn.functional.pad(mask, (0, more))
    embeds[mask == 0] = garbage
    same(run(model, images, embeds, mask), want)


def test_no_text_is_a_mask_of_zeros() -> None:
    model, images = make_model(), pictures(3)
    same(run(model, images, features(3), torch.zeros(3, 5)), run(model, images))


def test_a_mask_of_ones_is_no_mask() -> None:
    model, images, embeds = make_model(), pictures(2), features(2)
    same(run(model, images, embeds, torch.ones(2, 5, dtype=torch.bool)), run(model, images, embeds))


@settings(max_examples=10)
@given(order=st.permutations(range(5)))
def test_the_order_of_text_tokens_means_nothing(order: list[int]) -> None:
    model, images, embeds = make_model(), pictures(3), features(3)
    same(run(model, images, embeds[:, order], MASK[:, order]), run(model, images, embeds, MASK))


def test_positions_give_the_order_a_meaning() -> None:
    model, images, embeds = make_model(text_positions=True), pictures(2), features(2)
    forwards, backwards = run(model, images, embeds), run(model, images, embeds.flip(1))
    assert (forwards[0] - backwards[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields", [{}, {"latent_type": "kl"}, {"type_embeddings": True, "text_positions": True, "shared_text_proj": True}]
)
def test_a_batch_is_its_samples(fields: dict[str, Any]) -> None:
    model, images, embeds = make_model(**fields), pictures(3), features(3)
    whole = run(model, images, embeds, MASK)
    for i, length in enumerate((5, 2, 0)):
        text = (embeds[i : i + 1, :length],) if length else ()
        same(run(model, images[i : i + 1], *text), [part[i : i + 1] for part in whole])


def test_attending_to_padding_is_an_option() -> None:
    images, embeds = pictures(3), features(3)
    masked, unmasked = make_model(), make_model(mask_padding=False)
    unmasked.load_state_dict(masked.state_dict())
    full, got = run(masked, images, embeds), run(unmasked, images, embeds, MASK)
    same([part[:2] for part in got], [part[:2] for part in full])
    same([part[2:] for part in got], [part[2:] for part in run(masked, images)])  # no caption stays no text


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_text_on_one_side_only(side: str) -> None:
    model, images, embeds = make_model(**{f"text_in_{side}": False}), pictures(2), features(2)
    z, y = run(model, images)
    with torch.no_grad():
        assert torch.equal(model.encode(images, embeds).latents, z) == (side == "encoder")
        assert torch.equal(model.decode(z, embeds).sample, y) == (side == "decoder")


def test_a_shared_projection_is_the_encoders() -> None:
    shared, own = make_model(shared_text_proj=True), make_model()
    weights = shared.state_dict()
    for part in ("weight", "bias"):
        weights[f"decoder.text_proj.{part}"] = weights[f"encoder.text_proj.{part}"]
    own.load_state_dict(weights)
    images, embeds = pictures(2), features(2)
    same(run(shared, images, embeds), run(own, images, embeds))


def test_a_model_without_text_refuses_text() -> None:
    model = make_model(text_in_encoder=False, text_in_decoder=False)
    assert not any("text" in name for name in model.state_dict())
    with pytest.raises(InvalidParameterError, match="neither"):
        model.encode(pictures(1), features(1))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"latent_type": "kl"}, {"text_positions": True, "type_embeddings": True, "max_text_len": 5}]
)
def test_gradients_reach_every_parameter_and_not_the_text_encoder(fields: dict[str, Any]) -> None:
    pipeline = make_pipeline(model=make_model(**fields).train())
    embeds, mask = pipeline.encode_text(["a red square", "the cat", "a dog on left"])
    assert not embeds.requires_grad
    out = pipeline.model.encode(pictures(3), embeds, mask)
    latents = out.latents if out.latent_dist is None else out.latent_dist.sample()
    loss = pipeline.model.decode(latents, embeds, mask).sample.square().mean()
    (loss if out.latent_dist is None else loss + out.latent_dist.kl().mean()).backward()
    for name, weight in pipeline.model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
    assert all(weight.grad is None for weight in pipeline.text_encoder.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    images, embeds = pictures(3), features(3)
    grads = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(images, embeds, MASK).sample.square().mean().backward()
        grads.append([weight.grad for weight in model.parameters()])
    same(*grads)


def fit(model: TexTokModel, images: Tensor, embeds: Tensor | None, steps: int, lr: float) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        loss = (model(images, embeds).sample - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_can_learn_eight_pictures() -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4), size=32, mode="bilinear") * 2 - 1
    fields = {"image_size": 32, "hidden_size": 64, "num_heads": 4, "encoder_depth": 2, "decoder_depth": 2}
    assert fit(TexTokModel(num_tokens=4, text_dim=TEXT_DIM, **fields), images, None, 150, 1e-3) < 0.02


def test_text_saves_what_one_number_cannot_hold() -> None:
    images, embeds, losses = pictures(8), features(8, 3), []
    for text in (embeds, None):
        torch.manual_seed(0)
        model = TexTokModel(32, 8, 1, 1, 32, 4, 1, 1, text_dim=TEXT_DIM)
        losses.append(fit(model, images, text, 40, 3e-3))
    assert losses[0] < 0.7 * losses[1]


# -- latents ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(mean=st.floats(-3, 3), logvar=st.floats(-4, 4))
def test_kl_is_the_sum_over_tokens_and_channels(mean: float, logvar: float) -> None:
    dist = TokenGaussian(torch.full((2, 3, 4), mean), torch.full((2, 3, 4), logvar))
    p = torch.distributions.Normal(dist.mean.double(), (dist.logvar.double() / 2).exp())
    q = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    want = torch.distributions.kl_divergence(p, q).sum(dim=(1, 2))
    torch.testing.assert_close(dist.kl().double(), want, atol=1e-5, rtol=1e-5)


def test_kl_is_zero_for_the_standard_normal_alone() -> None:
    zero = torch.zeros(2, 3, 4)
    assert torch.equal(TokenGaussian(zero, zero).kl(), torch.zeros(2))
    for where in ((zero + 0.1, zero), (zero, zero + 0.1), (zero, zero - 0.1)):
        assert (TokenGaussian(*where).kl() > 0).all()


def test_samples_are_reproducible_and_keep_to_the_mean_without_variance() -> None:
    mean = torch.randn(2, 3, 4)
    assert torch.allclose(TokenGaussian(mean, torch.full_like(mean, -1e4)).sample(), mean, atol=1e-5)
    dist = TokenGaussian(mean, torch.zeros_like(mean))
    first, again = (dist.sample(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    each = dist.sample([torch.Generator().manual_seed(i) for i in (5, 6)])
    alone = TokenGaussian(mean[1:], torch.zeros_like(mean[1:])).sample(torch.Generator().manual_seed(6))
    assert torch.equal(each[1:], alone)
    assert TokenGaussian(mean, mean + 100).logvar.max() == 20


def test_reconstruction_of_a_kl_model_decodes_the_mean_or_a_sample() -> None:
    model, images, embeds = make_model(latent_type="kl"), pictures(2), features(2)
    with torch.no_grad():
        assert torch.equal(model(images, embeds).sample, run(model, images, embeds)[1])
        drawn = [
            model(images, embeds, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
            for _ in range(2)
        ]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], run(model, images, embeds)[1])


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_statistics_of_batches_are_those_of_all(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    batches = [torch.randn(size, 3, 8) * 2 + 5 for size in sizes]
    shift, scale = latent_statistics(iter(batches))
    rows = torch.cat(batches).double().flatten(0, 1)
    torch.testing.assert_close(torch.tensor(shift, dtype=torch.float64), rows.mean(dim=0))
    torch.testing.assert_close(torch.tensor(scale, dtype=torch.float64), rows.std(dim=0, unbiased=False))


def test_normalised_latents_come_back(tmp_path: Path) -> None:
    model, latents = make_model(), torch.randn(4, 4, 8) * 3 + 2
    assert torch.equal(model.normalize(latents), latents)
    model.set_latent_statistics(*latent_statistics([latents]))
    z = model.normalize(latents)
    assert z.mean(dim=(0, 1)).abs().max() < 1e-5
    torch.testing.assert_close(z.std(dim=(0, 1), unbiased=False), torch.ones(8))
    torch.testing.assert_close(model.denormalize(z), latents)
    assert model.normalize(latents.bfloat16()).dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = TexTokModel.from_pretrained(tmp_path)
    assert torch.equal(again.normalize(latents), z)


@pytest.mark.parametrize("batches", [[], [torch.ones(2, 3, 8)], [torch.full((1, 2, 8), math.nan)]])
def test_statistics_of_nothing(batches: list[Tensor]) -> None:
    with pytest.raises(InvalidParameterError, match="latent_statistics"):
        latent_statistics(batches)


# -- other sizes and types -------------------------------------------------------------------------------------------


def test_other_sizes_are_an_option() -> None:
    model = make_model()
    own, embeds = pictures(2), features(2)
    with torch.no_grad():
        assert torch.equal(model.encode(own, embeds, interpolate=True).latents, model.encode(own, embeds).latents)
        z = model.encode(torch.rand(2, 3, 48, 16), embeds, interpolate=True).latents
        assert z.shape == (2, 4, 8)
        assert model.decode(z, embeds, image_size=(48, 16)).sample.shape == (2, 3, 48, 16)
        assert model.decode(z, embeds, image_size=40).sample.shape == (2, 3, 40, 40)
        assert torch.equal(model.decode(z, image_size=32).sample, model.decode(z).sample)
        # a constant table stays that constant, whatever the grid
        model.encoder.pos_embed.fill_(0.5)
        model.decoder.patch_tokens.fill_(0.5)
        flat = model.encode(torch.zeros(1, 3, 64, 32), interpolate=True).latents
        # each of the equal patches counts for as many as there are: attention to equal keys is the same mean
        picture = model.decode(flat, image_size=(16, 48)).sample
    torch.testing.assert_close(picture[:, :, :8, :8], picture[:, :, 8:, 40:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 24, "patch_size": 3, "num_tokens": 1},
        {"image_size": 8, "num_tokens": 3, "latent_dim": 1},
        {"hidden_size": 30, "num_heads": 5, "mlp_ratio": 1.5, "encoder_depth": 1, "decoder_depth": 3},
    ],
)
def test_odd_sizes(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    images = pictures(1, model.config.image_size)
    z, y = run(model, images, features(1, 1))
    assert z.shape == (1, model.config.num_tokens, model.config.latent_dim)
    assert y.shape == images.shape


def test_bfloat16_stays_near_float32() -> None:
    pipeline = make_pipeline()
    images = pictures(3)
    z = pipeline.encode(images, CAPTIONS)
    y = pipeline.decode(z, CAPTIONS)
    pipeline.to(torch.bfloat16)
    half = pipeline.encode(images, CAPTIONS)
    assert half.dtype == torch.float32
    assert (half - z).abs().max() < 0.1 * z.abs().max()
    assert (pipeline.decode(z, CAPTIONS) - y).abs().mean() < 0.05


@pytest.mark.parametrize("latent_type", ["ae", "kl"])
def test_a_model_comes_back_from_its_folder(tmp_path: Path, latent_type: str) -> None:
    model = make_model(latent_type=latent_type, text_positions=True)
    model.save_pretrained(tmp_path)
    again = TexTokModel.from_pretrained(tmp_path)
    assert all(again.config[name] == value for name, value in model.config.items() if not name.startswith("_"))
    images, embeds = pictures(3), features(3)
    for got, want in zip(run(again, images, embeds, MASK), run(model, images, embeds, MASK), strict=True):
        assert torch.equal(got, want)


# -- bad configurations and shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_size": 30}, "image_size=30 is no multiple of patch_size=8"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"latent_dim": 2.5}, "latent_dim=2.5"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"mlp_ratio": -1.0}, "mlp_ratio"),
        ({"latent_type": "vq"}, "latent_type='vq'"),
        ({"latent_shift": [0.0]}, "latent_shift"),
        ({"latent_scale": [0.0] * 8}, "latent_scale"),
        ({"latent_shift": [math.nan] * 8}, "latent_shift"),
        ({"shared_text_proj": True, "text_in_encoder": False}, "shared_text_proj"),
    ],
)
def test_bad_fields(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        make_model(**fields)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 40, 40)), "40 x 40"),
        (lambda m: m.encode(torch.zeros(1, 3, 30, 40), interpolate=True), "multiples"),
        (lambda m: m.encode(torch.zeros(1, 1, 32, 32)), "images"),
        (lambda m: m.encode(torch.zeros(3, 32, 32)), "images"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8"),
        (lambda m: m.decode(torch.zeros(1, 3, 8)), "has 4 tokens"),
        (lambda m: m.decode(torch.zeros(1, 4, 7)), "latents"),
        (lambda m: m.decode(torch.zeros(4, 8)), "latents"),
        (lambda m: m.decode(torch.zeros(1, 4, 8), image_size=30), "image_size=30"),
        (lambda m: m.decode(torch.zeros(1, 4, 8), image_size=0), "image_size=0"),
        (lambda m: m.decode(torch.zeros(1, 4, 8), features(2)), "text_embeds"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, TEXT_DIM + 1)), f"T, {TEXT_DIM}"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), features(1, 13)), "max_text_len=12"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), features(1, 0)), "max_text_len=12"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), features(1), torch.ones(1, 4)), "text_mask"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), None, torch.ones(1, 4)), "text_mask"),
        (lambda m: m.set_latent_statistics([0.0] * 7, [1.0] * 8), "latent_shift"),
    ],
)
def test_bad_shapes(call: Any, said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        call(make_model())


def test_missing_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("textok_model", "textok_dit"):
        module = importlib.import_module(f"tokred.generation.{name}")
        with monkeypatch.context() as patch:
            for part in ("timm.models.vision_transformer", "timm.layers"):
                patch.setitem(sys.modules, part, None)
            spec = importlib.util.spec_from_file_location("again", module.__file__)
            assert spec is not None
            assert spec.loader is not None
            with pytest.raises(ImportError, match="pip install"):
                spec.loader.exec_module(importlib.util.module_from_spec(spec))


# -- the pipeline ----------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_the_models_with_the_captions_features() -> None:
    pipeline, images = make_pipeline(), pictures(3)
    embeds, mask = pipeline.encode_text(CAPTIONS)
    assert mask.dtype == torch.int64
    assert mask.sum(dim=1).tolist() == [4, 8, 3]
    assert embeds.shape == (3, 8, TEXT_DIM)
    z = pipeline.encode(images, CAPTIONS)
    want = run(pipeline.model, images, embeds, mask)
    assert z.dtype == torch.float32
    same([z, pipeline.decode(z, CAPTIONS)], [want[0], want[1].clamp(-1, 1)])
    assert torch.equal(pipeline.encode(images, text_embeds=embeds, text_mask=mask), z)
    assert torch.equal(pipeline.reconstruct(images, CAPTIONS), pipeline.decode(z, CAPTIONS))
    assert torch.equal(pipeline.reconstruct(images), pipeline.decode(pipeline.encode(images)))
    assert (pipeline.decode(z, CAPTIONS[::-1]) - pipeline.decode(z, CAPTIONS)).abs().max() > 1e-3
    assert (pipeline.num_tokens, pipeline.codebook_size, pipeline.image_size, pipeline.prefixes) == (4, None, 32, False)


def test_features_of_a_caption_do_not_depend_on_its_company() -> None:
    pipeline, images = make_pipeline(), pictures(3)
    z = pipeline.encode(images, CAPTIONS)
    for i in range(3):
        same([pipeline.encode(images[i], CAPTIONS[i])], [z[i : i + 1]])


def test_none_among_captions_is_no_text_and_an_empty_one_is_a_caption() -> None:
    pipeline, images = make_pipeline(), pictures(3)
    z = pipeline.encode(images, ["a dog", None, ""])
    same(
        [z[:1], z[1:2], z[2:]],
        [pipeline.encode(images[0], "a dog"), pipeline.encode(images[1]), pipeline.encode(images[2], "")],
    )
    assert (z[2] - pipeline.encode(images[2])[0]).abs().max() > 1e-4
    assert pipeline.encode_text([None, ""])[1].tolist() == [[0], [1]]


def test_images_of_files() -> None:
    pipeline = make_pipeline()
    image = Image.effect_noise((70, 50), 60).convert("RGB")
    z = pipeline.encode([image, image.resize((32, 32))], ["a dog", "a cat"])
    assert z.shape == (2, 4, 8)


def test_kl_pipeline_samples_if_asked() -> None:
    pipeline = make_pipeline(model=make_model(latent_type="kl"))
    images = pictures(2)
    mean = pipeline.encode(images)
    drawn = [
        pipeline.encode(images, sample_posterior=True, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert torch.equal(*drawn)
    assert torch.equal(pipeline.encode(images), mean)
    assert not torch.equal(drawn[0], mean)


def test_captions_that_are_too_long() -> None:
    pipeline = make_pipeline()
    long = " ".join(WORDS)
    with pytest.warns(UserWarning, match=r"captions \[1\] have \[17\] tokens, the limit is 12"):
        mask = pipeline.encode_text(["a dog", long])[1]
    assert mask.sum(dim=1).tolist() == [3, 12]
    with pytest.raises(InvalidParameterError, match="the limit is 12"):
        pipeline.encode(pictures(1), long, truncate=False)
    with pytest.raises(InvalidParameterError, match="the limit is 4"):
        pipeline.encode_text("the small blue dog", max_length=4, truncate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipeline.encode_text("a dog", max_length=3)[0].shape[1] == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.encode(torch.zeros(1, 3, 40, 40)), "40 x 40"),
        (lambda p: p.encode(torch.full((1, 3, 32, 32), 200.0)), "200"),
        (lambda p: p.encode(torch.full((1, 3, 32, 32), math.nan)), "nan"),
        (lambda p: p.encode(pictures(2), CAPTIONS), "3 captions given for a batch of 2"),
        (lambda p: p.encode(pictures(2), "a dog"), "1 captions given for a batch of 2"),
        (lambda p: p.encode(pictures(2), ["a dog", 3]), "captions"),
        (lambda p: p.encode_text([]), "captions"),
        (lambda p: p.encode_text("a dog", max_length=13), "max_length=13"),
        (lambda p: p.encode(pictures(1), "a dog", text_embeds=features(1)), "one of them"),
        (lambda p: p.encode(pictures(1), num_tokens=2), "num_tokens"),
        (lambda p: p.decode(torch.zeros(1, 4, 8), "a dog", steps=2), "steps"),
        (lambda p: p.decode(torch.zeros(1, 2, 8)), "first tokens alone"),
        (lambda p: p.decode(torch.full((1, 4, 8), math.inf)), "finite"),
        (lambda p: p.decode(torch.zeros(1, 4, 8, dtype=torch.int64)), "int64"),
        (lambda p: p(class_labels=1), "no generator"),
    ],
)
def test_bad_input_of_the_pipeline(call: Any, said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        call(make_pipeline())


def test_components_that_do_not_fit() -> None:
    encoder, tokenizer = make_text()
    with pytest.raises(InvalidParameterError, match=f"width {TEXT_DIM}, expected text_dim=16"):
        TexTok(make_model(text_dim=16), encoder, tokenizer)
    with pytest.raises(InvalidParameterError, match="give both"):
        TexTok(make_model(), encoder)
    with pytest.raises(InvalidParameterError, match="text_encoder"):
        make_pipeline(text=False).encode(pictures(1), "a dog")


def test_a_text_encoder_that_overflows_is_told() -> None:
    pipeline = make_pipeline()
    roughen(pipeline.text_encoder, math.inf)
    with pytest.raises(InvalidParameterError, match="bfloat16"):
        pipeline.encode_text("a dog")


@pytest.mark.parametrize("text", [True, False])
def test_a_pipeline_comes_back_from_its_folder(tmp_path: Path, text: bool) -> None:
    pipeline, images, embeds = make_pipeline(text=text), pictures(3), features(3)
    pipeline.save_pretrained(tmp_path)
    again = TexTok.from_pretrained(tmp_path)
    assert (again.text_encoder is not None) == text
    given: dict[str, Any] = {"captions": CAPTIONS} if text else {"text_embeds": embeds, "text_mask": MASK}
    z = pipeline.encode(images, **given)
    assert torch.equal(again.encode(images, **given), z)
    assert torch.equal(again.decode(z, **given), pipeline.decode(z, **given))
