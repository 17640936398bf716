"""TokenFlow as LLaVA's vision tower: what the language model reads, `generate`, files, and the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, LlamaConfig, LlavaForConditionalGeneration, Qwen2Config

from tests.conftest import ROOT
from tokred.core.errors import InvalidParameterError
from tokred.generation import tokenflow_llava
from tokred.generation.tokenflow import TokenFlow
from tokred.generation.tokenflow_llava import (
    TokenFlowVisionConfig,
    TokenFlowVisionModel,
    build_llava,
    build_processor,
    llava_from_official,
)
from tokred.zoo.words import word_tokenizer

WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *"abcde"])}
IMAGE = WORDS["<image>"]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"block_out_channels": [4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {"type": "clip", "patch_size": 4, **SMALL},
    "siglip": {"type": "siglip", "input_norm": "clamp", "patch_size": 4, **SMALL},
    "timm": {
        "type": "timm", "model_name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 1,
        "num_heads": 2, "global_pool": "",
    },
}  # fmt: skip
SEMANTIC, PIXEL = 6, 4
MODES: dict[str, tuple[dict[str, Any], int, int]] = {
    "last": ({}, 16, 10),
    "last of 2": ({"upto": 2}, 16, 10),
    "last_semantic": ({}, 16, SEMANTIC),
    "last_pixel": ({}, 16, PIXEL),
    "full_residual": ({}, 21, 10),
    "full": ({}, 21, 10),
    "full of 2": ({"upto": 2}, 5, 10),
    "prefix": ({"upto": 2}, 4, 10),
    "prefix of all": ({}, 16, 10),
}


def tokenizer(kind: str = "timm", seed: int = 0) -> TokenFlow:
    torch.manual_seed(seed)
    return TokenFlow(
        image_size=16, scales=(1, 2, 4), codebook_size=40, semantic_dim=SEMANTIC, pixel_dim=PIXEL,
        semantic_encoder_config=ENCODERS[kind],
        semantic_decoder_config={"dim": 12, "depth": 1, "heads": 12, "out_dim": 8},
        pixel_encoder_config=PIXELS, pixel_decoder_config=PIXELS,
    ).eval()  # fmt: skip


def language(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "initializer_range": 0.3, **options,
        }
    )  # fmt: skip


def make(mode: str = "last", kind: str = "timm", **options: Any) -> tuple[LlavaForConditionalGeneration, TokenFlow]:
    vision = tokenizer(kind)
    return build_llava(vision, language(), IMAGE, mode.split(" ")[0], **options), vision


def pictures(count: int = 2, seed: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def question(model: LlavaForConditionalGeneration, batch: int = 2) -> dict[str, Tensor]:
    count = model.config.vision_config.num_image_tokens
    row = [1, *[IMAGE] * count, *(WORDS[word] for word in "abc")]
    ids = torch.tensor([row]).expand(batch, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_language_model_reads_the_tokenizers_features(mode: str) -> None:
    options, count, width = MODES[mode]
    model, vision = make(mode, **options)
    told = model.config.vision_config
    assert (told.num_image_tokens, told.hidden_size) == (count, width)
    assert model.config.image_seq_length == count
    want = vision.llm_features(pictures(), mode.split(" ")[0], options.get("upto"))
    tower = model.model.vision_tower(pictures())
    assert torch.equal(tower.last_hidden_state, want)
    projected = torch.cat([one[None] for one in model.get_image_features(pictures()).pooler_output])
    p = model.model.multi_modal_projector
    by_hand = torch.nn.functional.gelu(want @ p.linear_1.weight.T + p.linear_1.bias) @ p.linear_2.weight.T
    torch.testing.assert_close(projected, by_hand + p.linear_2.bias, atol=1e-5, rtol=1e-5)
    inputs = question(model)
    words = model.get_input_embeddings()(inputs["input_ids"])
    words[:, 1 : 1 + count] = projected
    got = model(**inputs, pixel_values=pictures()).logits
    torch.testing.assert_close(got, model(inputs_embeds=words).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_codes_in_place_of_pictures() -> None:
    model, vision = make()
    codes = vision.encode(pictures())
    inputs = question(model)
    want = model(**inputs, pixel_values=pictures()).logits
    assert torch.equal(model(**inputs, pixel_values=codes).logits, want)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, pixel_values=codes, **greedy),
        model.generate(**inputs, pixel_values=pictures(), **greedy),
    )


def test_generate_is_recomputation_and_rows_are_alone() -> None:
    model, _ = make()
    inputs, images = question(model), pictures()
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = model.generate(**inputs, pixel_values=images, **options)
    ids = inputs["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=images).logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(got, ids)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(model.generate(**alone, pixel_values=images[row : row + 1], **options), got[row : row + 1])


def test_gradients_reach_projector_and_language_model_alone() -> None:
    model, _ = make()
    model.train()
    assert model.model.vision_tower.tokenizer.training is False
    inputs = question(model)
    model(**inputs, pixel_values=pictures(), labels=inputs["input_ids"]).loss.backward()
    for name, value in model.named_parameters():
        frozen = name.startswith("model.vision_tower")
        assert value.requires_grad is not frozen
        assert frozen or (value.grad is not None and value.grad.any()), name


@torch.no_grad()
def test_half_precision_keeps_the_codes(tmp_path: Path) -> None:
    model, vision = make()
    model.save_pretrained(tmp_path)
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantizer = half.model.vision_tower.tokenizer.quantizer
    assert {value.dtype for value in quantizer.parameters()} == {torch.float32}
    assert half.model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16
    codes = vision.encode(pictures())
    read = half.model.vision_tower(codes).last_hidden_state
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, vision.llm_features(codes).bfloat16())
    inputs = question(model)
    logits = half(**inputs, pixel_values=codes).logits.float()
    want = model(**inputs, pixel_values=codes).logits
    assert (logits - want).abs().max() < 0.05 * want.abs().max()
    assert half(**inputs, pixel_values=pictures().bfloat16()).logits.isfinite().all()


# -- processor and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["last", "full", "prefix"])
def test_processor_makes_as_many_places_as_there_are_features(mode: str, tmp_path: Path) -> None:
    options, count, _ = MODES[mode]
    model, vision = make(mode, **options)
    build_processor(model.config, word_tokenizer(WORDS, 100, ("<image>",))).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 30, 3), dtype=np.uint8))
    inputs = processor(text=["<image> a b c"], images=[wide], return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == count
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    padded = vision._pixels(wide, "pad")  # the release's: grey borders, bicubic
    assert (inputs["pixel_values"] - padded).abs().max() < 0.03
    grey = inputs["pixel_values"][0, :, 0]
    torch.testing.assert_close(grey, torch.full_like(grey, 127 / 127.5 - 1), atol=1e-2, rtol=0)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("kind", ENCODERS)
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model, vision = make(kind=kind)
    codes = vision.encode(pictures())
    assert torch.equal(model.model.vision_tower.tokenizer.encode(pictures()), codes)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.model.vision_tower.tokenizer.encode(pictures()), codes)
    assert {**again.config.vision_config.to_dict(), "dtype": None} == model.config.vision_config.to_dict()
    assert again.training is False
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = again(**question(model), pixel_values=pictures()).logits
        assert torch.equal(logits, model(**question(model), pixel_values=pictures()).logits)


def test_the_tower_alone(tmp_path: Path) -> None:
    vision = tokenizer()
    tower = TokenFlowVisionModel(TokenFlowVisionConfig(tokenizer=dict(vision.config)))
    tower.tokenizer.load_state_dict(vision.state_dict())
    tower.save_pretrained(tmp_path)
    again = TokenFlowVisionModel.from_pretrained(tmp_path)
    assert torch.equal(again(pictures()).last_hidden_state, vision.llm_features(pictures()))


# -- the released layout ---------------------------------------------------------------------------------------------

QWEN = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
}  # fmt: skip
SIGLIP_CHANGES: dict[str, Any] = {
    "semantic_encoder_config": {"num_attention_heads": 2},
    "pixel_encoder_config": {"norm_num_groups": 2},
    "pixel_decoder_config": {"norm_num_groups": 2},
}


def released(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """A small model in the released layout, the last layer and the head of SigLIP among its tensors."""
    model = build_llava(tokenizer("siglip"), Qwen2Config(**QWEN), IMAGE).to(dtype)
    weights = tokenflow_llava.to_official(model.state_dict())
    tower = "model.vision_tower.vision_tower.encoder_vqkd.vision_model."
    further = {
        name.replace("layers.0.", "layers.1."): v
        for name, v in weights.items()
        if "layers.0." in name and tower in name
    }
    further |= {f"{tower}head.probe": torch.zeros(1, 1, 16, dtype=dtype)}
    weights = {name: value.contiguous().clone() for name, value in {**weights, **further}.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**QWEN, "model_type": "llava_qwen2", "mm_hidden_size": 10}))
    return model, {name: value for name, value in weights.items() if name not in further}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_released_layout_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model, weights = released(tmp_path, dtype)
    again = llava_from_official(tmp_path, image_token_id=IMAGE, scales=(1, 2, 4), **SIGLIP_CHANGES)
    assert again.training is False
    text = again.config.text_config
    assert (text.num_key_value_heads, text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (1, 1e-5, 1e6)
    assert again.model.language_model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert again.model.vision_tower.tokenizer.quantizer.semantic_codebook.dtype == torch.float32
    back = tokenflow_llava.to_official(again.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name].to(dtype), value) for name, value in weights.items())
    if dtype == torch.float32:
        inputs = {**question(model), "pixel_values": pictures()}
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_names_of_the_released_14b() -> None:
    path = ROOT.parent / "shared" / "specs" / "tokenflow_state_dict_llava_qwen2.5_14b.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    shapes = {name: tuple(told["shape"]) for name, told in json.loads(path.read_text())["tensors"].items()}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    own = {n.removeprefix(tokenflow_llava.RELEASED_TOWER): v for n, v in weights.items() if "vision_tower" in n}
    sizes = tokenflow_llava.tokenflow_official.read_config(own, None, None, {})
    text = Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8,
    )  # fmt: skip
    config = tokenflow_llava.llava_config(sizes, text, tokenflow_llava.IMAGE_PAD)
    assert config.vision_config.num_image_tokens == 729
    with torch.device("meta"):
        wanted = {n: v.shape for n, v in LlavaForConditionalGeneration(config).state_dict().items()}
    assert {n: v.shape for n, v in tokenflow_llava.from_official(weights).items()} == wanted


# -- what is refused -------------------------------------------------------------------------------------------------


def test_bad_options() -> None:
    vision = tokenizer()
    for options, match in (
        ({"feature_mode": "first"}, "feature_mode='first'"),
        ({"upto": 4}, "from 1 to 3"),
        ({"upto": 0}, "from 1 to 3"),
        ({"image_token_id": len(WORDS)}, "image_token_id=10"),
    ):
        with pytest.raises(InvalidParameterError, match=match):
            build_llava(vision, language(), **{"image_token_id": IMAGE, **options})
    model, _ = make()
    words = word_tokenizer(WORDS, 100, ("<image>",))
    with pytest.raises(InvalidParameterError, match="the model expects 4"):
        build_processor(model.config, words, "d")
    model.config.vision_config = LlamaConfig()
    with pytest.raises(InvalidParameterError, match="expected TokenFlowVisionConfig"):
        build_processor(model.config, words)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w | {"model.odd": torch.zeros(1)}, "model.odd"),
        (lambda w: {n: v for n, v in w.items() if n != "model.norm.weight"}, "language_model.norm"),
        (lambda w: w | {"lm_head.weight": torch.zeros(3, 16)}, "lm_head.weight"),
        (lambda w: {n: v for n, v in w.items() if "vision_tower" not in n}, "holds no TokenFlow"),
    ],
)
def test_bad_files(change: Any, match: str, tmp_path: Path) -> None:
    released(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(InvalidParameterError, match=match):
        llava_from_official(tmp_path, image_token_id=IMAGE, scales=(1, 2, 4), **SIGLIP_CHANGES)


def test_no_configuration(tmp_path: Path) -> None:
    released(tmp_path)
    (tmp_path / "config.json").unlink()
    options: dict[str, Any] = {"image_token_id": IMAGE, "scales": (1, 2, 4), **SIGLIP_CHANGES}
    with pytest.raises(InvalidParameterError, match="give text_config"):
        llava_from_official(tmp_path, **options)
    assert llava_from_official(tmp_path, Qwen2Config(**QWEN), **options).config.text_config.vocab_size == 12
    with pytest.raises(InvalidParameterError, match="no such folder"):
        llava_from_official(tmp_path / "no")
