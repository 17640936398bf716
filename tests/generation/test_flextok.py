"""FlexTok: prefixes, causality, the collapsed registers, sampling, saving, and bad input. Tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation.flextok import NESTED_DROPOUT_LAWS, FlexTok, FlexTokModel, sample_keep_k
from tokred.generation.flextok_blocks import timestep_waves
from tokred.generation.tokenizer import ImageTokenizer

K, L = 8, 3
SIZES = {
    "encoder_depth": 2,
    "encoder_dim": 32,
    "decoder_depth": 2,
    "decoder_dim": 48,
    "head_dim": 16,
    "num_registers": K,
    "fsq_levels": (8, 5, 5),
    "latent_channels": 4,
    "patch_size": 2,
    "pos_grid": 4,
    "freq_dim": 16,
}


def build(seed: int = 0, **changes) -> FlexTokModel:
    """A model whose every parameter matters: as initialised, both heads give 0."""
    torch.manual_seed(seed)
    model = FlexTokModel(**{**SIZES, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("encoder.pos_embed", "decoder.pos_embed") or parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else 0.2))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> FlexTokModel:
    return build()


@pytest.fixture(scope="module")
def pipe(model: FlexTokModel) -> FlexTok:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.7,
    )
    pipe = FlexTok(model, vae.eval(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(batch: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))


def pictures(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def some_ids(batch: int, n: int = K, seed: int = 0) -> Tensor:
    return torch.randint(200, (batch, n), generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([0.1, 0.5, 1.0])


# -- encoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, K + 1))
@torch.no_grad()
def test_fewer_tokens_are_the_first_of_all(model: FlexTokModel, n: int) -> None:
    full, short = model.encode_latents(latents()), model.encode_latents(latents(), n)
    assert torch.equal(short.ids, full.ids[:, :n])
    assert torch.equal(short.codes, full.codes[:, :n])
    torch.testing.assert_close(short.pre_quant, full.pre_quant[:, :n], atol=1e-5, rtol=0)
    assert full.ids.dtype == torch.int64
    assert torch.equal(model.ids_to_codes(full.ids), full.codes)
    assert torch.equal(model.codes_to_ids(full.codes), full.ids)


@torch.no_grad()
def test_registers_see_only_those_before_and_patches_see_none(model: FlexTokModel) -> None:
    streams: list[Tensor] = []
    hook = model.encoder.blocks[-1].register_forward_hook(lambda *call: streams.append(call[-1]))
    other = build()
    before = model.encode_latents(latents()).pre_quant
    hook.remove()
    hook = other.encoder.blocks[-1].register_forward_hook(lambda *call: streams.append(call[-1]))
    other.encoder.registers[3] += torch.randn(32)
    after = other.encode_latents(latents()).pre_quant
    hook.remove()
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-6, rtol=0)
    assert ((before - after)[:, 3:].abs().amax(dim=(0, 2)) > 1e-4).all()
    assert torch.equal(streams[0][:, :16], streams[1][:, :16])


@torch.no_grad()
def test_the_mask_of_the_encoder_is_the_slow_one(model: FlexTokModel) -> None:
    """One attention over everything with an explicit causal-last mask, against the two calls of the encoder."""
    encoder, x = model.encoder, latents()
    seen = torch.tensor([[j < 16 or j <= i for j in range(16 + K)] for i in range(16 + K)])
    tokens = torch.cat([encoder.embed(x, 4, 4), encoder.registers.expand(3, -1, -1)], dim=1)
    for block in encoder.blocks:
        norm = torch.nn.functional.layer_norm(tokens, (32,))
        tokens = tokens + block.attn(norm, seen)
        tokens = tokens + block.mlp(torch.nn.functional.layer_norm(tokens, (32,)))
    z = encoder.to_latents(torch.nn.functional.layer_norm(tokens[:, 16:], (32,)))
    torch.testing.assert_close(encoder(x, K), z, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_of_a_smaller_picture_are_cut_from_the_table() -> None:
    for kind in ("sincos", "learnable_sum"):
        model = build(encoder_pos_type=kind, decoder_pos_type=kind)
        for grid in (model.encoder, model.decoder):
            x = torch.randn(1, 4, 4, 6)
            large = torch.zeros(1, 4, 8, 8)
            large[:, :, :4, :6] = x
            want = grid.embed(large, 4, 4).unflatten(1, (4, 4))[:, :2, :3]
            assert torch.equal(grid.embed(x, 2, 3).unflatten(1, (2, 3)), want)
        assert model.encode_latents(torch.randn(1, 4, 4, 6)).ids.shape == (1, K)


# -- decoder ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    keep=st.lists(st.integers(1, K), min_size=3, max_size=3),
    drop=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
@torch.no_grad()
def test_one_token_stands_for_all_that_are_dropped(keep: list[int], drop: list[bool], seed: int) -> None:
    model, x, ids = build(), latents(seed=seed), some_ids(3, seed=seed)
    slow, fast = (model.decode_velocity(x, TIMES, ids, keep, drop, fast_dropped=f) for f in (False, True))
    torch.testing.assert_close(slow, fast, atol=1e-5, rtol=1e-4)
    condition = model.condition(ids, keep, drop)
    kept = [0 if out else k for k, out in zip(keep, drop, strict=True)]
    assert condition.tokens.shape[1] == min(max(kept) + 1, K)
    for i in range(3):  # each picture alone
        alone = model.decode_velocity(x[i : i + 1], TIMES[i : i + 1], ids[i : i + 1], keep[i], drop[i])
        torch.testing.assert_close(alone[0], fast[i], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_all_kept_needs_no_extra_token_and_no_bias(model: FlexTokModel) -> None:
    condition = model.condition(some_ids(2))
    assert condition.tokens.shape[1] == K
    assert condition.bias is None
    assert model.condition(some_ids(2), K - 1).bias is None  # one dropped register is one token
    assert model.condition(some_ids(2), 3).tokens.shape[1] == 4
    assert model.condition(drop=True).tokens.shape[1] == 1
    assert model.condition(drop=True, fast_dropped=False).tokens.shape == (1, K, 48)


@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_what_is_dropped_does_not_matter(model: FlexTokModel, fast: bool) -> None:
    x, ids = latents(), some_ids(3)
    other = torch.cat([ids[:, :3], some_ids(3, K - 3, seed=9)], dim=1)
    assert not torch.equal(ids, other)
    velocity = [model.decode_velocity(x, TIMES, one, 3, fast_dropped=fast) for one in (ids, other, ids[:, :3])]
    assert torch.equal(velocity[0], velocity[1])
    assert torch.equal(velocity[0], velocity[2])
    null = [model.decode_velocity(x, TIMES, one, keep, True, fast_dropped=fast) for one, keep in ((ids, 3), (other, K))]
    assert torch.equal(null[0], null[1])
    torch.testing.assert_close(model.decode_velocity(x, TIMES, None, drop=True, fast_dropped=fast), null[0])
    assert not torch.allclose(null[0], velocity[0], atol=1e-3)


def test_waves_of_time() -> None:
    waves = timestep_waves(torch.tensor([0.0, 0.5]), 6, 10.0)
    assert waves[0].tolist() == [1, 1, 1, 0, 0, 0]
    angles = torch.tensor([0.5 * 100 * 256 ** (-n / 3) for n in range(3)])
    torch.testing.assert_close(waves[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_codes_and_ids_are_the_same_condition(model: FlexTokModel) -> None:
    ids = some_ids(3)
    a, b = (model.decode_velocity(latents(), TIMES, one, 4) for one in (ids, model.ids_to_codes(ids)))
    assert torch.equal(a, b)


@torch.no_grad()
def test_hidden_states_are_those_of_the_block(model: FlexTokModel) -> None:
    states: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *call: states.append(call[-1])) for b in model.decoder.blocks]
    plain = model.decode_velocity(latents(), TIMES, some_ids(3))
    for layer in range(2):
        states.clear()
        velocity, hidden = model.decode_velocity(latents(), TIMES, some_ids(3), return_hidden=layer)
        assert torch.equal(hidden, states[layer])
        assert torch.equal(velocity, plain)
    for hook in hooks:
        hook.remove()
    with pytest.raises(InvalidParameterError, match="return_hidden=2"):
        model.decode_velocity(latents(), TIMES, some_ids(3), return_hidden=2)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sincos", "learnable_sum"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(kind: str, checkpointing: bool) -> None:
    model = build(encoder_pos_type=kind, decoder_pos_type=kind).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    drop = torch.tensor([False, True, False])
    out = model(latents(), latents(seed=1), TIMES, torch.tensor([3, K, K]), drop, return_hidden=0)
    (out.velocity.pow(2).mean() + out.hidden.mean()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"encoder.pos_embed", "decoder.pos_embed"} if kind == "sincos" else set())


def test_the_training_pass_and_its_gradients_are_those_of_all_registers() -> None:
    keep, drop = torch.tensor([2, 4, 1]), torch.tensor([False, False, True])
    grads = []
    for fast in (True, False):
        model = build().train()
        if fast:
            out = model(latents(), latents(seed=1), TIMES, keep, drop)
            assert out.encoder.ids.shape == (3, 4)
            velocity = out.velocity
        else:
            codes = model.encode_latents(latents()).codes
            velocity = model.decode_velocity(latents(seed=1), TIMES, codes, keep, drop, fast_dropped=False)
        velocity.pow(2).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[1].items():
        small = 2e-4 * float(grad.abs().max())
        torch.testing.assert_close(grads[0][name], grad, atol=1e-5 + small, rtol=1e-3, msg=name)


def test_a_new_model_gives_zeros_and_learns() -> None:
    torch.manual_seed(0)
    model = FlexTokModel(**SIZES)
    x, noise, t = latents(8), latents(8, seed=1), torch.rand(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        out = model(x, t.view(-1, 1, 1, 1) * noise + (1 - t.view(-1, 1, 1, 1)) * x, t, sample_keep_k(8, K))
        if not losses:
            assert not out.velocity.any()
            assert not out.encoder.codes.any()
        loss = (out.velocity - (noise - x)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert model.encode_latents(x).codes.any()


@pytest.mark.parametrize("law", NESTED_DROPOUT_LAWS)
def test_laws_of_nested_dropout(law: str) -> None:
    kept = sample_keep_k(4000, 16, law, torch.Generator().manual_seed(0))
    values, counts = kept.unique(return_counts=True)
    shares = dict(zip(values.tolist(), (counts / 4000).tolist(), strict=True))
    want = {"uniform": dict.fromkeys(range(1, 17), 1 / 16), "pow2": dict.fromkeys((1, 2, 4, 8, 16), 0.2)}
    want["uniform_pow2"] = {1: 1 / 16, 2: 1 / 16, 4: 2 / 16, 8: 4 / 16, 16: 8 / 16}
    assert shares == pytest.approx(want[law], abs=0.03)
    assert sample_keep_k(500, 12, "uniform_pow2").max() == 12
    for count, other in ((12, "pow2"), (16, "other")):
        with pytest.raises(InvalidParameterError):
            sample_keep_k(3, count, other)


# -- pictures --------------------------------------------------------------------------------------------------------


def test_it_is_an_image_tokenizer(pipe: FlexTok) -> None:
    assert isinstance(pipe, ImageTokenizer)
    assert (pipe.num_tokens, pipe.codebook_size, pipe.image_size, pipe.prefixes) == (K, 200, 16, True)
    ids = pipe.encode(pictures())
    assert ids.shape == (2, K)
    assert ids.dtype == torch.int64
    got = pipe.decode(ids, num_inference_steps=2)
    assert got.shape == (2, 3, 16, 16)
    assert got.dtype == torch.float32
    assert got.abs().max() <= 1


def test_encode_takes_pictures_of_every_kind(pipe: FlexTok) -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    want = pipe.encode(tensor, 3)
    for image in (Image.fromarray(array), array, [array], tensor[None].float() / 127.5 - 1):
        assert torch.equal(pipe.encode(image, 3), want)
    large = Image.new("RGB", (50, 31), "red")
    assert pipe.encode(large).shape == (1, K)
    both = pipe.encode([large, Image.fromarray(array)])
    assert torch.equal(both[1, :3], want[0])


def test_the_mode_is_repeatable_and_the_posterior_follows_its_generator(pipe: FlexTok) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (1, 1)]
    mode = pipe.encode_latents(pictures())
    assert torch.equal(mode, pipe.encode_latents(pictures()))
    drawn = [pipe.encode_latents(pictures(), True, g) for g in generators]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], mode)
    posterior = pipe.vae.encode(pictures()).latent_dist
    torch.testing.assert_close(mode, posterior.mode().detach() * 0.7)
    ids = pipe.encode(pictures(), sample_posterior=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ids, pipe.model.encode_latents(drawn[0]).ids)


def test_the_same_noise_gives_the_same_picture(pipe: FlexTok) -> None:
    ids, options = some_ids(2), {"num_inference_steps": 3}
    first, again, other = (pipe.decode(ids, generator=torch.Generator().manual_seed(s), **options) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    pair = pipe.decode(ids, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **options)
    for i, seed in enumerate((1, 2)):
        alone = pipe.decode(ids[i : i + 1], generator=torch.Generator().manual_seed(seed), **options)
        torch.testing.assert_close(pair[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_prefixes_of_different_lengths_in_one_batch(pipe: FlexTok, scale: float) -> None:
    ids, noise = some_ids(3), latents()
    options = {"num_inference_steps": 2, "guidance_scale": scale}
    together = pipe.decode([ids[0, :1], ids[1].tolist(), ids[2, :5]], latents=noise, **options)
    for i, n in enumerate((1, K, 5)):
        alone = pipe.decode(ids[i : i + 1, :n], latents=noise[i : i + 1], **options)
        cut = pipe.decode(ids[i : i + 1], n, latents=noise[i : i + 1], **options)
        slow = pipe.decode(ids[i : i + 1], n, latents=noise[i : i + 1], fast_dropped=False, **options)
        assert torch.equal(alone, cut)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(slow, alone, atol=1e-4, rtol=0)


def test_no_guidance_is_one_pass_a_step(pipe: FlexTok) -> None:
    for scale, calls in ((1.0, 3), (2.0, 6), (0.0, 6)):
        with mock.patch.object(pipe.model, "velocity", wraps=pipe.model.velocity) as velocity:
            pipe.decode(some_ids(1), num_inference_steps=3, guidance_scale=scale, guidance="cfg")
        assert velocity.call_count == calls


def test_progressive_uses_one_noise(pipe: FlexTok) -> None:
    ids = some_ids(2, 6)
    found = pipe.progressive(ids, generator=torch.Generator().manual_seed(4), num_inference_steps=2)
    assert found.shape == (4, 2, 3, 16, 16)  # 1, 2, 4, 6
    for row, n in zip(found, (1, 2, 4, 6), strict=True):
        want = pipe.decode(ids, n, num_inference_steps=2, generator=torch.Generator().manual_seed(4))
        assert torch.equal(row, want)
    assert pipe.progressive(ids, [3], num_inference_steps=1).shape == (1, 2, 3, 16, 16)
    for lengths in ([], [0], [7]):
        with pytest.raises(InvalidParameterError, match="lengths"):
            pipe.progressive(ids, lengths)


def test_reconstruction_of_sizes_that_were_not_trained(pipe: FlexTok, caplog: pytest.LogCaptureFixture) -> None:
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    whole = pipe(pictures(), 4, output_type="pt", num_inference_steps=2, generator=seeds[0]).images
    want = pipe.decode(pipe.encode(pictures(), 4), num_inference_steps=2, generator=seeds[1])
    assert torch.equal(whole, want)
    assert not caplog.records
    pil = pipe(pictures(1, 8, 12), num_inference_steps=1, guidance_scale=1.0).images
    assert [image.size for image in pil] == [(12, 8)]
    assert "8 x 12" in caplog.text
    with pytest.raises(InvalidParameterError, match="output_type"):
        pipe(pictures(), output_type="jpeg")


def test_without_vae_it_works_on_pixels(tmp_path: Path) -> None:
    pipe = FlexTok(build(latent_channels=3), None, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.image_size == 8
    got = pipe(pictures(2, 8, 8), 2, output_type="pt", num_inference_steps=1).images
    assert got.shape == (2, 3, 8, 8)
    pipe.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert again.vae is None
    assert torch.equal(again.encode(pictures(2, 8, 8)), pipe.encode(pictures(2, 8, 8)))
    with pytest.raises(InvalidParameterError, match="channels"):
        FlexTok(build(), None, FlowMatchEulerDiscreteScheduler())


# -- precision -------------------------------------------------------------------------------------------------------


def test_bfloat16_is_near_and_the_vae_stays_float32(pipe: FlexTok) -> None:
    ids, noise = some_ids(2), latents(2)
    want = pipe.sample_latents(ids, noise, 3, 4, 1.0)
    got = pipe.sample_latents(ids, noise, 3, 4, 1.0, dtype=torch.bfloat16)
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float32 is asked for, and an outer autocast does not change it
        assert torch.equal(pipe.encode(pictures()), pipe.encode(pictures()))
        assert torch.equal(pipe.sample_latents(ids, noise, 3, 4, 1.0), want)
        assert pipe.decode_latents(noise).dtype == torch.float32
    half = build().to(torch.bfloat16)
    out = half.decode_velocity(latents(), TIMES, some_ids(3), 3)
    full = build().decode_velocity(latents(), TIMES, some_ids(3), 3)
    assert out.dtype == torch.float32
    assert (out - full).abs().max() < 0.1 * full.abs().max()
    assert half.encode_latents(latents()).codes.dtype == torch.float32


# -- saving ----------------------------------------------------------------------------------------------------------


def test_models_come_back(model: FlexTokModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = FlexTokModel.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in SIZES} == {**SIZES, "fsq_levels": [8, 5, 5]}
    assert again.fsq == model.fsq
    assert torch.equal(again.encode_latents(latents()).ids, model.encode_latents(latents()).ids)
    args = (latents(), TIMES, some_ids(3), 4)
    assert torch.equal(again.decode_velocity(*args), model.decode_velocity(*args))
    assert not again.encoder.pos_embed.requires_grad


def test_pipelines_come_back_in_a_new_process(pipe: FlexTok, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["model"] == ["tokred.generation.flextok", "FlexTokModel"]
    torch.save({"x": pictures(), "noise": latents(2)}, tmp_path / "in.pt")
    code = (
        "import sys, torch; from tokred.generation.flextok import FlexTok\n"
        "pipe = FlexTok.from_pretrained(sys.argv[1] + '/pipe'); given = torch.load(sys.argv[1] + '/in.pt')\n"
        "ids = pipe.encode(given['x'])\n"
        "out = pipe.decode(ids, 3, num_inference_steps=2, latents=given['noise'])\n"
        "torch.save({'ids': ids, 'out': out}, sys.argv[1] + '/out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    found = torch.load(tmp_path / "out.pt")
    ids = pipe.encode(pictures())
    assert torch.equal(found["ids"], ids)
    torch.testing.assert_close(found["out"], pipe.decode(ids, 3, num_inference_steps=2, latents=latents(2)))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, K + 1, -1, 2.0, True, "3"])
def test_token_counts_outside_the_model(pipe: FlexTok, count) -> None:
    calls = [
        lambda: pipe.encode(pictures(), count),
        lambda: pipe.decode(some_ids(1), count),
        lambda: pipe.model.encode_latents(latents(), count),
        lambda: pipe.model.decode_velocity(latents(), TIMES, some_ids(3), count),
    ]
    for call in calls:
        with pytest.raises(InvalidParameterError):
            call()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 200]]), "200"),
        (torch.tensor([[-1]]), "-1"),
        (torch.tensor([[0.5]]), "integers"),
        (torch.zeros(1, K + 1, dtype=torch.long), "1 to 8"),
        (torch.zeros(3, dtype=torch.long), "shape"),
        (torch.zeros(2, 0, dtype=torch.long), "1 id or more"),
        ([], "prefixes"),
        ([[1, 2], []], "1 id or more"),
    ],
)
def test_bad_ids(pipe: FlexTok, tokens, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        pipe.decode(tokens)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(1, 16, 14), "multiples of 4"),
        (pictures(1, 20, 16), "at most 16 x 16"),
        (pictures() * 3, "-1, 1"),
        (torch.zeros(1, 1, 16, 16), "expected"),
        ("cat.png", "PIL.Image.open"),
    ],
)
def test_bad_pictures(pipe: FlexTok, images, message: str) -> None:
    for call in (pipe.encode, pipe):
        with pytest.raises(InvalidParameterError, match=message):
            call(images)


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 0},
        {"guidance": "other"},
        {"height": 10},
        {"width": 32},
        {"latents": torch.zeros(2, 4, 8, 8)},
        {"latents": torch.zeros(1, 3, 8, 8)},
        {"latents": torch.zeros(1, 4, 8, 8), "height": 8},
        {"latents": torch.zeros(1, 4, 8, 8), "generator": torch.Generator()},
        {"generator": [torch.Generator()] * 2},
    ],
)
def test_bad_options_of_decode(pipe: FlexTok, options: dict) -> None:
    with pytest.raises(InvalidParameterError):
        pipe.decode(some_ids(1), **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.encode_latents(torch.zeros(1, 3, 8, 8)),
        lambda m: m.encode_latents(torch.zeros(1, 4, 8, 7)),
        lambda m: m.encode_latents(torch.zeros(1, 4, 10, 8)),
        lambda m: m.condition(),
        lambda m: m.condition(drop=[True, False]),
        lambda m: m.condition(some_ids(2), [1, 2, 3]),
        lambda m: m.condition(some_ids(2, 3), 4),
        lambda m: m.condition(torch.zeros(1, K, 5)),
        lambda m: m.velocity(latents(), TIMES[:2], m.condition(some_ids(3))),
        lambda m: m.velocity(latents(), TIMES, m.condition(some_ids(2))),
    ],
)
def test_bad_input_of_the_model(model: FlexTokModel, call) -> None:
    with pytest.raises(InvalidParameterError):
        call(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 20},
        {"num_registers": 0},
        {"fsq_levels": (1, 8)},
        {"decoder_pos_type": "rope"},
        {"max_timestep": 0.0},
        {"freq_dim": 7},
        {"encoder_dim": 18, "head_dim": 6},
        {"patch_size": 1.5},
    ],
)
def test_bad_sizes_of_a_model(changes: dict) -> None:
    with pytest.raises(InvalidParameterError):
        FlexTokModel(**{**SIZES, **changes})


@pytest.mark.parametrize("factor", [None, 0.0, -1.0])
def test_a_vae_without_scaling_factor(model: FlexTokModel, factor) -> None:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, scaling_factor=factor)
    with pytest.raises(InvalidParameterError, match="scaling_factor"):
        FlexTok(model, vae, FlowMatchEulerDiscreteScheduler())
