"""Multiply-adds of multimodal prompts: the notes' numbers from configs alone, torch's own counter on every family."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokred
from tests.matrix.vlm_models import FAMILIES
from tokred.core.errors import InvalidParameterError, UnsupportedModelError

transformers = pytest.importorskip("transformers")

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CASES = [(name, part) for name, tiny in FAMILIES.items() for part in tiny.parts()]


def llava() -> object:
    """LLaVA-1.5-7B (LlamaConfig's defaults are Llama-2-7B: d 4096, 32 layers, m 11008)."""
    vision = transformers.CLIPVisionConfig(**CLIP_L)
    return transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig())


def llava_next() -> object:
    vision = transformers.CLIPVisionConfig(**CLIP_L)
    return transformers.LlavaNextConfig(vision_config=vision, text_config=transformers.LlamaConfig())


# -- hired.md section 8: FLOPs = 2 * multiply-adds, 60 text tokens -----------------------------------------------------


@pytest.mark.parametrize(("budget", "tokens", "teraflops"), [(1.0, 576, 8.45), (0.4, 230, 3.80), (0.2, 115, 2.28)])
def test_llava_7b(budget, tokens, teraflops):
    cost = tokred.flops(llava(), None, tokred.HiRED(budget=budget))
    assert cost.prompt == (60 + tokens, 60 + 576)
    assert 2 * cost.llm / 1e12 == pytest.approx(teraflops, abs=0.005)
    assert 2 * cost.vision / 1e12 == pytest.approx(0.38 + 0.024, abs=0.01)  # the tower and the projector stay
    assert cost.scoring < 2e-4 * cost.llm


def test_llava_next_7b():
    """Unreduced, the prompt has 2,880 cells and 48 row ends (2,928); a reduced one has none of the row ends."""
    plain = tokred.flops(llava_next(), (672, 672))
    assert plain.prompt == (60 + 2928, 60 + 2928)
    by_formula = 32 * (2988 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 2988**2 * 4096)
    assert plain.llm == by_formula
    assert 2 * plain.llm / 1e12 == pytest.approx(42.6, rel=0.02)  # the notes' 42.6 T are of 2,880
    assert 2 * plain.vision / 1e12 == pytest.approx(5 * (0.38 + 0.024), rel=0.02)
    for budget, tokens, teraflops in ((0.4, 1152, 16.5), (0.2, 576, 8.45), (0.1, 288, 4.57)):
        cost = tokred.flops(llava_next(), (672, 672), tokred.HiRED(budget=budget))
        assert cost.prompt == (60 + tokens, 2988)
        assert 2 * cost.llm / 1e12 == pytest.approx(teraflops, abs=0.05)
        assert cost.unreduced == plain.total


def test_text_tokens_and_row_ends_are_counted():
    sizes = {"image_size": (672, 672), "text_tokens": 100}
    assert tokred.flops(llava_next(), sizes).prompt == (3028, 3028)
    kept = tokred.flops(llava_next(), sizes, tokred.HiRED(budget=0.4, keep_newline=True))
    assert kept.prompt == (100 + 1152 + 48, 3028)
    two = tokred.flops(llava(), {"image_size": [(336, 336)] * 2}, tokred.HiRED(budget=0.2))
    assert two.prompt == (60 + 2 * 115, 60 + 2 * 576)


# -- torch's counter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), CASES, ids=[f"{name}-{part}" for name, part in CASES])
@pytest.mark.parametrize("method", [None, tokred.RandomTokens(budget=0.5)], ids=["plain", "half"])
def test_equals_the_counter_of_torch(name, part, method):
    """Vision tower, projector and language model without its head, counted while they run."""
    tiny = FAMILIES[name]
    model = tiny.make("eager" if name == "paligemma2" else "sdpa")
    inputs = tiny.inputs([[5, part, 4]]).inputs
    patch = tokred.patch(model, method) if method is not None else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(**inputs)
    ours = tokred.flops(model, inputs)
    assert 2 * ours.total == counter.get_total_flops()
    assert ours.prompt[1] == inputs["input_ids"].shape[1]
    if patch is None:
        assert ours.total == ours.unreduced
    else:
        assert ours.prompt[0] < ours.prompt[1]
        patch.remove()
        assert tokred.flops(model, inputs, method) == ours
        assert tokred.flops(model, inputs).total == ours.unreduced


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_several_media_of_several_sizes(name):
    tiny = FAMILIES[name]
    rows = [["image", 3, "image:wide", "video", 2]] if name == "qwen2_5_vl" else [["image", 3, "video", 2]]
    model, inputs = tiny.make(), tiny.inputs(rows).inputs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(**inputs)
    assert 2 * tokred.flops(model, inputs).total == counter.get_total_flops()


def test_a_method_inside_the_tower_lowers_its_part():
    tiny = FAMILIES["llava"]
    model, inputs = tiny.make(), tiny.inputs([[3, "image"]]).inputs
    plain = tokred.flops(model, inputs)
    assert tokred.flops(model, inputs, tokred.HiRED(budget=0.5)).vision == plain.vision
    with tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(1,))):
        ours = tokred.flops(model, inputs)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.model(**inputs)
    assert ours.vision < plain.vision
    assert ours.llm == plain.llm  # the grid is restored
    assert 2 * (ours.vision + ours.llm) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )  # scores are counted apart


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_give():
    with pytest.raises(InvalidParameterError, match="sizes have the key 'size'; expected image_size, video"):
        tokred.flops(llava(), {"size": 336})
    with pytest.raises(UnsupportedModelError, match="LlavaModel takes no videos"):
        tokred.flops(llava(), {"video": (8, 336, 336)})
    tiny = FAMILIES["llava"]
    with pytest.raises(InvalidParameterError, match="inputs have 2 prompts"):
        tokred.flops(tiny.make(), tiny.inputs([["image"], ["image"]]).inputs)
    with pytest.raises(InvalidParameterError, match="no image size of its own"):
        tokred.flops(FAMILIES["qwen2_vl"].make())
    siglip = FAMILIES["llava_siglip"].make()
    with pytest.raises(ValueError, match="class token"):
        tokred.flops(siglip, None, tokred.HiRED(budget=0.5, official=True))
