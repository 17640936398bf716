"""TexTokDiT1D and generation: the definition written out, guidance, schedulers, captions, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.generation.textok_models import CAPTIONS, TEXT_DIM, features, make_dit, make_model, make_pipeline
from tokred.core.errors import InvalidParameterError
from tokred.generation.textok import TexTok, load_caption_bank
from tokred.generation.textok_dit import PRESETS, TexTokDiT1D, TexTokDiTOutput, make_scheduler

CLASSES = {"num_classes": 3}
TEXT = {"text_dim": TEXT_DIM}
KINDS: list[dict[str, Any]] = [CLASSES, TEXT, {**TEXT, "cross_attention": False}, {**CLASSES, **TEXT}]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
BANK = {0: ["a cat", "the cat", "a big cat", "a small cat", "the red cat"], 1: ["a dog"], 2: ["a square", "a circle"]}


def conditions(dit: TexTokDiT1D, count: int = 3) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if dit.config.num_classes is not None:
        found["class_labels"] = torch.tensor([0, 2, 3])[:count]
    if dit.config.text_dim is not None:
        found |= {"text_embeds": features(count), "text_mask": MASK[:count]}
    return found


def predict(dit: TexTokDiT1D, *args: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return dit(*args, **given).sample


def generate(pipeline: TexTok, *args: Any, seed: int = 0, **given: Any) -> Tensor:
    options = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipeline(*args, **{**options, **given}).images


# -- one prediction --------------------------------------------------------------------------------------------------


def slow_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return x @ linear.weight.double().T + linear.bias.double()


def slow_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def slow_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    rows = []
    for h in range(heads):
        part = slice(h * q.shape[1] // heads, (h + 1) * q.shape[1] // heads)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(q.shape[1] // heads)).exp()
        rows.append(weights / weights.sum(dim=-1, keepdim=True) @ v[:, part])
    return torch.cat(rows, dim=-1)


def slow_dit(dit: TexTokDiT1D, x: Tensor, t: float, label: int | None, text: Tensor) -> Tensor:
    """Section 5.1 of the specification for one sample, float64; `text` (T, D_t) holds valid tokens alone."""
    n, width, heads = dit.config.num_tokens, dit.config.hidden_size, dit.config.num_heads
    h = slow_linear(x.double(), dit.proj_in)
    for i in range(n):
        for j in range(width // 2):
            omega = 10000 ** (-j / (width / 2))
            h[i, j] += math.sin(i * omega)
            h[i, width // 2 + j] += math.cos(i * omega)
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    e = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    c = slow_linear(nn.functional.silu(slow_linear(e, dit.time_embed.linear_1)), dit.time_embed.linear_2)
    if dit.class_embed is not None:
        c = c + dit.class_embed.weight[dit.config.num_classes if label is None else label]
    if dit.text_proj is not None and len(text):
        text = slow_linear(text.double(), dit.text_proj)
        c = c + text.mean(dim=0)
    c = c / (1 + (-c).exp())
    for block in dit.blocks:
        b1, g1, a1, b2, g2, a2 = slow_linear(c, block.modulation).chunk(6)
        q, k, v = slow_linear(slow_norm(h) * (1 + g1) + b1, block.attn.qkv).chunk(3, dim=-1)
        h = h + a1 * slow_linear(slow_attention(q, k, v, heads), block.attn.proj)
        if block.cross_attn is not None and len(text):
            weights, biases = block.cross_attn.in_proj_weight.double(), block.cross_attn.in_proj_bias.double()
            norm = block.norm_cross
            sides = (slow_norm(h, norm.weight.double(), norm.bias.double()), text, text)
            parts = zip(sides, weights.chunk(3), biases.chunk(3), strict=True)
            q, k, v = (side @ weight.T + bias for side, weight, bias in parts)
            h = h + slow_linear(slow_attention(q, k, v, heads), block.cross_attn.out_proj)
        z = slow_linear(slow_norm(h) * (1 + g2) + b2, block.mlp.fc1)
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        h = h + a2 * slow_linear(z, block.mlp.fc2)
    b, g = slow_linear(c, dit.modulation_out).chunk(2)
    return slow_linear(slow_norm(h) * (1 + g) + b, dit.proj_out)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_follows_the_definition(kind: dict[str, Any]) -> None:
    dit = make_dit(learn_sigma=True, **kind)
    x, t, given = torch.randn(3, 4, 8), torch.tensor([0, 17, 999]), conditions(dit)
    got = dit(x, t, **given).sample
    assert got.shape == (3, 4, 16)
    for i in range(3):
        label = int(given["class_labels"][i]) if "class_labels" in given else None
        text = given["text_embeds"][i, MASK[i].bool()] if "text_embeds" in given else torch.zeros(0, TEXT_DIM)
        want = slow_dit(dit, x[i], float(t[i]), label, text)
        torch.testing.assert_close(got[i].double(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_an_untrained_model_predicts_zero(kind: dict[str, Any], learn_sigma: bool) -> None:
    dit = make_dit(rough=False, learn_sigma=learn_sigma, **kind)
    out = predict(dit, torch.randn(3, 4, 8), 500, **conditions(dit))
    assert torch.equal(out, torch.zeros(3, 4, 16 if learn_sigma else 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_samples(kind: dict[str, Any]) -> None:
    dit, x, t = make_dit(**kind), torch.randn(3, 4, 8), torch.tensor([5, 50, 500])
    given = conditions(dit)
    whole = predict(dit, x, t, **given)
    for i in range(3):
        one = predict(dit, x[i : i + 1], float(t[i]), **{name: value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(one, whole[i : i + 1], atol=2e-6, rtol=1e-5)


@settings(max_examples=10)
@given(more=st.integers(0, 4), garbage=st.sampled_from([1e3, math.nan]))
def test_padding_of_text_changes_nothing(more: int, garbage: float) -> None:
    dit, x = make_dit(**TEXT), torch.randn(3, 4, 8)
    given = conditions(dit)
    want = predict(dit, x, 3, **given)
    embeds = nn.functional.pad(given["text_embeds"], (0, 0, 0, more))
    mask = nn.functional.pad(MASK, (0, more))
    embeds[mask == 0] = garbage
    torch.testing.assert_close(predict(dit, x, 3, text_embeds=embeds, text_mask=mask), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_condition_is_the_null_class_and_a_mask_of_zeros(kind: dict[str, Any]) -> None:
    dit, x = make_dit(**kind), torch.randn(3, 4, 8)
    given = conditions(dit)
    if "class_labels" in given:
        given["class_labels"] = torch.full((3,), 3)
    if "text_mask" in given:
        given["text_mask"] = torch.zeros_like(MASK)
    torch.testing.assert_close(predict(dit, x, 3, **given), predict(dit, x, 3), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: dict[str, Any]) -> None:
    grads = []
    for checkpointing in (False, True):
        dit = make_dit(**kind).train()
        if checkpointing:
            dit.enable_gradient_checkpointing()
        torch.manual_seed(0)
        dit(torch.randn(3, 4, 8), 3, **conditions(dit)).sample.square().mean().backward()
        for name, weight in dit.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.abs().sum() > 0, name
        grads.append([weight.grad for weight in dit.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_dropped_conditions() -> None:
    dit = make_dit(**CLASSES, **TEXT, condition_dropout=0.25)
    labels, mask = torch.zeros(4000, dtype=torch.int64), torch.ones(4000, 5, dtype=torch.int64)
    first, again = (dit.drop_condition(labels, mask, torch.Generator().manual_seed(1)) for _ in range(2))
    dropped = first[0] == 3
    assert 0.22 < dropped.float().mean() < 0.28
    assert torch.equal(first[1].sum(dim=1) == 0, dropped)
    assert torch.equal(first[0], again[0])
    assert labels.sum() == 0
    assert mask.all()
    assert make_dit(**CLASSES).drop_condition() == (None, None)
    assert torch.equal(make_dit(**CLASSES, condition_dropout=0.0).drop_condition(labels)[0], labels)


def test_bfloat16_stays_near_float32() -> None:
    dit, x = make_dit(**CLASSES, **TEXT), torch.randn(3, 4, 8)
    given = conditions(dit)
    want = predict(dit, x, 500, **given)
    got = predict(dit.bfloat16(), x, 500, **given)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_sizes() -> None:
    with torch.device("meta"):
        dit = TexTokDiT1D.from_preset("XL", num_classes=1000)
        assert len(dit.blocks) == 28
        # "DiT-XL 675 M": the difference is that of the patch embedding and its counterpart
        assert sum(weight.numel() for weight in dit.parameters()) == pytest.approx(675e6, rel=2e-3)
        assert {name: TexTokDiT1D.from_preset(name, num_classes=2, depth=1).config.hidden_size for name in PRESETS} == {
            name: fields["hidden_size"] for name, fields in PRESETS.items()
        }
    with pytest.raises(InvalidParameterError, match="XXL"):
        TexTokDiT1D.from_preset("XXL", num_classes=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_comes_back_from_its_folder(tmp_path: Path, kind: dict[str, Any]) -> None:
    dit, x = make_dit(**kind), torch.randn(3, 4, 8)
    dit.save_pretrained(tmp_path)
    given = conditions(dit)
    assert torch.equal(predict(TexTokDiT1D.from_pretrained(tmp_path), x, 3, **given), predict(dit, x, 3, **given))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "at least one of them"),
        ({"num_classes": 0}, "num_classes=0"),
        ({**CLASSES, "hidden_size": 33, "num_heads": 3}, "hidden_size=33"),
        ({**CLASSES, "hidden_size": 34, "num_heads": 4}, "hidden_size=34"),
        ({**CLASSES, "mlp_ratio": 0.0}, "mlp_ratio"),
        ({**CLASSES, "objective": "edm"}, "objective='edm'"),
        ({**CLASSES, "objective": "flow", "learn_sigma": True}, "learn_sigma"),
        ({**CLASSES, "condition_dropout": 1.0}, "condition_dropout"),
    ],
)
def test_bad_fields(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        make_dit(**fields)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (CLASSES, {"latents": torch.zeros(1, 3, 8)}, r"\(B, 4, 8\)"),
        (CLASSES, {"latents": torch.zeros(1, 4, 7)}, r"\(B, 4, 8\)"),
        (CLASSES, {"class_labels": torch.tensor([1, 2])}, "class_labels"),
        (CLASSES, {"class_labels": torch.tensor([1.0])}, "class_labels"),
        (CLASSES, {"text_embeds": torch.zeros(1, 5, TEXT_DIM)}, "takes no text"),
        (TEXT, {"class_labels": torch.tensor([1])}, "no classes"),
        (TEXT, {"text_embeds": torch.zeros(1, 5, 7)}, "text_embeds"),
        (TEXT, {"text_mask": torch.zeros(1, 5)}, "text_mask"),
        (TEXT, {"text_embeds": torch.zeros(1, 5, TEXT_DIM), "text_mask": torch.zeros(1, 4)}, "text_mask"),
    ],
)
def test_bad_shapes(kind: dict[str, Any], given: dict[str, Tensor], said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        make_dit(**kind)(**{"latents": torch.zeros(1, 4, 8), "timestep": 3, **given})


# -- generation ------------------------------------------------------------------------------------------------------


def test_ddpm_steps_are_those_of_the_definition() -> None:
    """DDIM without noise, written out: x0 and noise from the guided prediction, step after step."""
    dit = make_dit(**CLASSES)
    scheduler = DDIMScheduler.from_config(make_scheduler().config)
    pipeline = make_pipeline(dit, scheduler=scheduler, caption_bank=BANK)
    start, labels, null = torch.randn(2, 4, 8), torch.tensor([0, 1]), torch.tensor([3, 3])
    got = generate(pipeline, class_labels=[0, 1], latents=start, guidance_scale=2.5, num_inference_steps=4)
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    x = start
    for t in (750, 500, 250, 0):
        c, u = predict(dit, x, t, class_labels=labels), predict(dit, x, t, class_labels=null)
        noise = u + 2.5 * (c - u)
        x0 = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        before = alphas[t - 250] if t >= 250 else torch.ones(())
        x = before.sqrt() * x0 + (1 - before).sqrt() * noise
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-3)


def test_flow_steps_are_those_of_the_definition() -> None:
    dit = make_dit(**CLASSES, objective="flow")
    pipeline = make_pipeline(dit, caption_bank=BANK)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    start = torch.randn(2, 4, 8)
    got = generate(pipeline, class_labels=[0, 1], latents=start, guidance_scale=2.0, num_inference_steps=4)
    x = start
    for sigma in (1.0, 0.75, 0.5, 0.25):
        c, u = (predict(dit, x, 1000 * sigma, class_labels=torch.tensor(labels)) for labels in ([0, 1], [3, 3]))
        x = x - 0.25 * (u + 2 * (c - u))
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-4)


def test_scale_one_is_the_conditional_prediction_in_one_call() -> None:
    dit = make_dit(**CLASSES)
    pipeline = make_pipeline(dit, caption_bank=BANK)
    sizes: list[int] = []
    dit.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    plain = generate(pipeline, class_labels=[0, 1])
    nearly = generate(pipeline, class_labels=[0, 1], guidance_scale=1 + 1e-7)
    assert sizes == [2, 2, 2, 4, 4, 4]
    torch.testing.assert_close(nearly, plain, atol=1e-4, rtol=1e-4)
    null = generate(pipeline, class_labels=[0, 1], guidance_scale=0.0)
    assert (null - plain).abs().max() > 1e-3


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler], ids=lambda kind: kind.__name__
)
def test_schedulers_are_exchangeable(scheduler: Any, learn_sigma: bool) -> None:
    dit = make_dit(**CLASSES, learn_sigma=learn_sigma)
    config = make_scheduler("ddpm", learn_sigma=learn_sigma and scheduler is DDPMScheduler).config
    pipeline = make_pipeline(dit, scheduler=scheduler.from_config(config), caption_bank=BANK)
    first, again = (generate(pipeline, class_labels=[0, 1], guidance_scale=2.0) for _ in range(2))
    assert first.shape == (2, 4, 8)
    assert first.isfinite().all()
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("objective", "scheduler"),
    [
        ("ddpm", DDPMScheduler),
        ("ddpm", DDIMScheduler),
        ("ddpm", DPMSolverMultistepScheduler),
        ("flow", FlowMatchEulerDiscreteScheduler),
    ],
)
def test_a_generator_that_knows_the_data_arrives_there(
    objective: str, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dit, x0 = make_dit(**CLASSES, objective=objective), torch.randn(3, 4, 8)
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)

    def oracle(x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        data = x0[class_labels]
        if objective == "flow":
            return TexTokDiTOutput((x - data) / (t / 1000))
        return TexTokDiTOutput((x - alphas[int(t)].sqrt() * data) / (1 - alphas[int(t)]).sqrt())

    monkeypatch.setattr(dit, "forward", oracle)
    made = scheduler.from_config(make_scheduler(objective).config)
    pipeline = make_pipeline(dit, scheduler=made, caption_bank=BANK)
    got = generate(pipeline, class_labels=[2, 0, 0], num_inference_steps=10)
    torch.testing.assert_close(got, x0[[2, 0, 0]], atol=2e-3, rtol=1e-3)


def test_learned_variances_reach_the_scheduler() -> None:
    dit = make_dit(**CLASSES, learn_sigma=True)
    pipeline = make_pipeline(dit, caption_bank=BANK)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    before = generate(pipeline, class_labels=[0, 1])
    with torch.no_grad():
        dit.proj_out.bias[8:] += 1
    assert (generate(pipeline, class_labels=[0, 1]) - before).abs().max() > 1e-3


def test_latents_are_denormalised_and_decoded_with_the_captions() -> None:
    model = make_model()
    model.set_latent_statistics([0.5] * 8, [2.0] * 8)
    pipeline = make_pipeline(make_dit(**CLASSES), model, caption_bank=BANK)
    plain = make_pipeline(make_dit(**CLASSES), caption_bank=BANK)
    z = generate(pipeline, class_labels=[1, 2], captions=CAPTIONS[:2])
    torch.testing.assert_close(z, generate(plain, class_labels=[1, 2], captions=CAPTIONS[:2]) * 2 + 0.5)
    pixels = generate(pipeline, class_labels=[1, 2], captions=CAPTIONS[:2], output_type="pt")
    assert torch.equal(pixels, pipeline.decode(z, CAPTIONS[:2]))
    images = generate(pipeline, class_labels=[1, 2], captions=CAPTIONS[:2], output_type="pil")
    assert [image.size for image in images] == [(32, 32)] * 2


def test_a_generator_each_makes_a_batch_its_samples() -> None:
    pipeline = make_pipeline(make_dit(**CLASSES), caption_bank=BANK)
    each = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    whole = generate(pipeline, class_labels=[0, 0, 1], generator=each, output_type="pt", guidance_scale=2.0)
    for i, (label, seed) in enumerate(((0, 4), (0, 5), (1, 6))):
        one = generate(pipeline, class_labels=label, seed=seed, output_type="pt", guidance_scale=2.0)
        torch.testing.assert_close(one, whole[i : i + 1], atol=1e-4, rtol=1e-4)


# -- captions --------------------------------------------------------------------------------------------------------


def read_captions(pipeline: TexTok, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Any]:
    seen: list[Any] = []
    encode = pipeline.encode_text

    def spy(captions: Any, **options: Any) -> Any:
        seen.append(list(captions))
        return encode(captions, **options)

    monkeypatch.setattr(pipeline, "encode_text", spy)
    generate(pipeline, num_inference_steps=1, **given)
    return seen


def test_captions_are_drawn_from_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline(make_dit(**CLASSES), caption_bank=BANK)
    labels = [0] * 30 + [1]
    (drawn,) = read_captions(pipeline, monkeypatch, class_labels=labels, seed=1)
    assert set(drawn[:30]) == set(BANK[0])
    assert drawn[30] == "a dog"
    assert read_captions(pipeline, monkeypatch, class_labels=labels, seed=1)[0] == drawn
    assert read_captions(pipeline, monkeypatch, class_labels=labels, seed=2)[0] != drawn
    (fixed,) = read_captions(pipeline, monkeypatch, class_labels=[0, 2], caption_policy="fixed")
    assert fixed == ["a cat", "a square"]


def test_class_names_are_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline(make_dit(**CLASSES), class_names=["cat", "dog", "square"])
    with pytest.warns(UserWarning, match="class names"):
        assert read_captions(pipeline, monkeypatch, class_labels=torch.tensor([2, 0])) == [["square", "cat"]]


def test_prompts_go_to_generator_and_detokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline(make_dit(**TEXT))
    assert read_captions(pipeline, monkeypatch, prompt=CAPTIONS) == [CAPTIONS]
    monkeypatch.undo()
    z = generate(pipeline, CAPTIONS)
    embeds, mask = pipeline.encode_text(CAPTIONS)
    assert torch.equal(generate(pipeline, text_embeds=embeds, text_mask=mask), z)
    # other captions for the detokenizer leave the latents alone
    other = ["a dog", "a cat", "the cat"]
    assert torch.equal(generate(pipeline, CAPTIONS, captions=other), z)
    assert torch.equal(generate(pipeline, CAPTIONS, captions=other, output_type="pt"), pipeline.decode(z, other))


def test_negative_prompts_act_on_the_guided_branch_alone() -> None:
    pipeline = make_pipeline(make_dit(**TEXT))
    plain = generate(pipeline, "a dog", guidance_scale=2.0)
    longer = generate(pipeline, "a dog", guidance_scale=2.0, negative_prompt="the small red cat on the left")
    assert (longer - plain).abs().max() > 1e-3
    assert torch.equal(generate(pipeline, "a dog", negative_prompt="the cat"), generate(pipeline, "a dog"))
    same = generate(pipeline, "a dog", guidance_scale=3.0, negative_prompt="a dog")
    torch.testing.assert_close(same, generate(pipeline, "a dog"), atol=1e-4, rtol=1e-4)


def test_a_generator_of_classes_and_text_reads_the_drawn_caption() -> None:
    pipeline = make_pipeline(make_dit(**CLASSES, **TEXT), caption_bank={0: ["a cat"], 1: ["a dog"]})
    z = generate(pipeline, class_labels=[1], guidance_scale=2.0, caption_policy="fixed")
    assert torch.equal(generate(pipeline, "a dog", class_labels=[1], guidance_scale=2.0), z)
    assert (generate(pipeline, "a cat", class_labels=[1], guidance_scale=2.0) - z).abs().max() > 1e-4


def test_a_tokenizer_without_text_needs_no_caption() -> None:
    model = make_model(text_in_encoder=False, text_in_decoder=False)
    images = generate(make_pipeline(make_dit(**CLASSES), model, text=False), class_labels=1, output_type="pt")
    assert images.shape == (1, 3, 32, 32)
    images = generate(make_pipeline(make_dit(**TEXT), model), "a dog", output_type="pt")
    assert images.shape == (1, 3, 32, 32)


def test_a_caption_bank_comes_from_a_file_and_back(tmp_path: Path) -> None:
    file = tmp_path / "bank.json"
    file.write_text(json.dumps({str(key): captions for key, captions in BANK.items()}))
    assert load_caption_bank(file) == BANK
    pipeline = make_pipeline(make_dit(**CLASSES), caption_bank=load_caption_bank(file))
    pipeline.save_pretrained(tmp_path / "saved")
    again = TexTok.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    options = {"class_labels": [0, 0, 2], "output_type": "pt", "guidance_scale": 2.0}
    assert torch.equal(generate(again, **options), generate(pipeline, **options))


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"0": []}', '{"0": "a cat"}', '{"cat": ["a"]}', '{"0": [1]}'])
def test_bad_caption_banks(tmp_path: Path, text: str) -> None:
    (tmp_path / "bank.json").write_text(text)
    with pytest.raises(InvalidParameterError, match="caption"):
        load_caption_bank(tmp_path / "bank.json")


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (CLASSES, {}, "class_labels below 3"),
        (CLASSES, {"class_labels": 3}, "from 0 to 2"),
        (CLASSES, {"class_labels": [-1]}, "from 0 to 2"),
        (CLASSES, {"class_labels": [0.5]}, "from 0 to 2"),
        (CLASSES, {"class_labels": []}, "from 0 to 2"),
        (CLASSES, {"class_labels": 1, "prompt": "a dog"}, "classes alone"),
        (CLASSES, {"class_labels": 1, "negative_prompt": "a dog"}, "negative_prompt"),
        (CLASSES, {"class_labels": 2}, "no captions of classes"),
        (CLASSES, {"class_labels": [0, 1], "captions": CAPTIONS}, "3 captions given for a batch of 2"),
        (CLASSES, {"class_labels": 0, "captions": "a dog", "text_embeds": torch.zeros(1, 5, TEXT_DIM)}, "one of them"),
        (CLASSES, {"class_labels": 0, "output_type": "np"}, "output_type='np'"),
        (CLASSES, {"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps=0"),
        (CLASSES, {"class_labels": 0, "guidance_scale": math.nan}, "guidance_scale"),
        (CLASSES, {"class_labels": 0, "caption_policy": "best"}, "caption_policy='best'"),
        (CLASSES, {"class_labels": 0, "latents": torch.zeros(2, 4, 8)}, "latents"),
        (CLASSES, {"class_labels": 0, "latents": torch.zeros(1, 3, 8)}, "latents"),
        (CLASSES, {"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators given for 2"),
        (TEXT, {}, "give a prompt"),
        (TEXT, {"prompt": "a dog", "class_labels": 1}, "no class_labels"),
        (TEXT, {"prompt": "a dog", "text_embeds": torch.zeros(1, 5, TEXT_DIM)}, "one of them"),
        (TEXT, {"prompt": ["a dog", "a cat"], "negative_prompt": CAPTIONS}, "3 captions given for a batch of 2"),
    ],
)
def test_bad_input(kind: dict[str, Any], given: dict[str, Any], said: str) -> None:
    pipeline = make_pipeline(make_dit(**kind), caption_bank={0: ["a cat"], 1: ["a dog"]})
    with pytest.raises(InvalidParameterError, match=said):
        generate(pipeline, **given)


def test_no_caption_at_all() -> None:
    with pytest.raises(InvalidParameterError, match="neither captions"):
        generate(make_pipeline(make_dit(**CLASSES)), class_labels=1)


@pytest.mark.parametrize(
    ("fields", "scheduler", "said"),
    [
        ({}, FlowMatchEulerDiscreteScheduler(), "objective='ddpm'"),
        ({"objective": "flow"}, make_scheduler(), "objective='flow'"),
        ({}, DDPMScheduler(clip_sample=False, prediction_type="v_prediction"), "v_prediction"),
        ({}, DDIMScheduler(), "clips samples"),
        ({}, make_scheduler("ddpm", learn_sigma=True), "learned variances"),
        (
            {"learn_sigma": True},
            DPMSolverMultistepScheduler.from_config(make_scheduler("ddpm", learn_sigma=True).config),
            "learned variances",
        ),
    ],
)
def test_schedulers_that_do_not_fit(fields: dict[str, Any], scheduler: Any, said: str) -> None:
    pipeline = make_pipeline(make_dit(**CLASSES, **fields), scheduler=scheduler, caption_bank=BANK)
    with pytest.raises(InvalidParameterError, match=said):
        generate(pipeline, class_labels=1)


@pytest.mark.parametrize(
    ("fields", "parts", "said"),
    [
        ({"num_tokens": 5}, {}, "num_tokens=5 given, expected 4"),
        ({"latent_dim": 4}, {}, "latent_dim=4 given, expected 8"),
        ({"text_dim": 16}, {}, "text_dim=16 given"),
        ({}, {"class_names": ["cat"]}, "1 class_names given"),
        ({}, {"caption_bank": {3: ["a cat"]}}, "ids below 3"),
    ],
)
def test_components_that_do_not_fit(fields: dict[str, Any], parts: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        make_pipeline(make_dit(**{**CLASSES, **fields}), **parts)


def test_unknown_objective_has_no_scheduler() -> None:
    with pytest.raises(InvalidParameterError, match="edm"):
        make_scheduler("edm")
