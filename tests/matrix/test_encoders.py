"""Every method on every encoder host that it claims, on tiny random models.

Identity and undo run for all pairs; the other checks run for one host a method in turn, and for all with --all. A new
method needs a row in SETTINGS, a new host one in MODELS: the first test fails until it has one.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.conftest import full_matrix
from tokred.core.catalog import compatibility, hosts
from tokred.core.decoder import DecoderMethod
from tokred.core.flops import encoder_info
from tokred.core.method import from_dict, registered

DEPTH, SIDE, PATCH = 4, 32, 4
WIDTH = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = {**WIDTH, "image_size": SIDE, "patch_size": PATCH}


def timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=5)


def timm_eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=5, num_reg_tokens=2)


def open_clip_tower() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, width=32, layers=DEPTH, heads=2, mlp_ratio=2.0, output_dim=6)


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, num_labels=5))


def hf_dinov3() -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=2))


#: {host family: {model: builder}}
MODELS = {
    "timm": {"vit": timm_vit, "eva": timm_eva},
    "open_clip": {"tower": open_clip_tower},
    "transformers vision": {"vit": hf_vit, "dinov3": hf_dinov3},
}
#: {method: (settings that reduce, settings that keep everything)}
SETTINGS = {
    "tome": (tokred.ToMe(r=[6, 0, 5]), tokred.ToMe(r=0)),
    "topk": (tokred.TopK(keep_rate=0.6, layers=(1, 2)), tokred.TopK(keep_rate=1.0)),
    "zero_tprune": (tokred.ZeroTPrune(schedule={0: (5, 0.9), 2: (0, 0.7)}), tokred.ZeroTPrune(keep_rate=1.0)),
    "random_tokens": (tokred.RandomTokens(keep_rate=0.6, layers=(1, 2)), tokred.RandomTokens(keep_rate=1.0)),
}
PAIRS = [(family, model, name) for family, models in MODELS.items() for model in models for name in SETTINGS]


def build(family: str, model: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[family][model]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return made


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else output["pooler_output"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        chosen = PAIRS if full_matrix(metafunc.config) else PAIRS[:: len(SETTINGS) + 1]
        metafunc.parametrize("pair", chosen, ids="-".join)
    if "any_pair" in metafunc.fixturenames:
        metafunc.parametrize("any_pair", PAIRS, ids="-".join)


def test_every_method_and_every_host_has_a_row():
    ours = {name: cls for name, cls in registered().items() if cls.__module__.startswith("tokred.")}
    inside = {name for name, cls in ours.items() if issubclass(cls, DecoderMethod)}  # of the matrix of language models
    assert {name for name, cls in ours.items() if "EncoderBlock" in cls.sites} - inside == set(SETTINGS)
    # multimodal models hand such methods to the host of their tower; tests/matrix/test_vlm.py has them
    own = [record for record in hosts() if "EncoderBlock" in record.sites and "VisualFeatures" not in record.sites]
    assert {record.family for record in own} == set(MODELS)
    claims = compatibility()
    assert all(claims[name][family] for family, _, name in PAIRS)


def test_the_sample_meets_every_method_and_every_host():
    sample = PAIRS[:: len(SETTINGS) + 1]
    assert {name for _, _, name in sample} == set(SETTINGS)
    assert {family for family, _, _ in sample} == set(MODELS)


def test_identity_and_undo(any_pair):
    family, name, method = any_pair
    model, x = build(family, name), images()
    keys, expected = list(model.state_dict()), run(model, x)
    reduce, keep = SETTINGS[method]
    with tokred.patch(model, keep):
        assert torch.equal(run(model, x), expected)
    with tokred.patch(model, reduce) as patch:
        assert not torch.allclose(run(model, x), expected)
        counts = dict(enumerate(reduce.plan(encoder_info(model))))
        assert patch.trace.counts == [(layer, n) for layer, n in counts.items() if n < counts.get(layer - 1, 64)]
        assert list(model.state_dict()) == keys
    assert torch.equal(run(model, x), expected)
    assert not any(key.startswith("_tokred") for module in model.modules() for key in vars(module))


def test_batch_equals_per_sample(pair):
    family, name, method = pair
    model, x = build(family, name), images(3)
    with tokred.patch(model, SETTINGS[method][0]):
        torch.testing.assert_close(run(model, x), torch.cat([run(model, i[None]) for i in x]), atol=3e-5, rtol=1e-4)


def test_copy_and_compile(pair):
    family, name, method = pair
    model, x = build(family, name), images()
    patch = tokred.patch(model, SETTINGS[method][0])
    expected = run(model, x)
    twin = copy.deepcopy(model)
    patch.remove()
    assert torch.equal(run(twin, x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), expected, atol=1e-5, rtol=1e-5)


def test_patch_after_the_first_compiled_call_is_honoured(pair):
    family, name, method = pair
    model, x = build(family, name), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain = run(compiled, x)
    with tokred.patch(model, SETTINGS[method][0]):
        reduced = run(model, x)
        assert not torch.allclose(reduced, plain)
        torch.testing.assert_close(run(compiled, x), reduced, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(compiled, x), plain)


def test_gradients_reach_every_parameter_that_they_reached_unpatched(pair):
    family, name, method = pair
    model, x = build(family, name), images()

    def reached() -> set[str]:
        model.zero_grad()
        output = model(x)
        output = output if isinstance(output, Tensor) else next(iter(output.values()))
        output.float().square().mean().backward()
        return {key for key, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}

    plain = reached()
    with tokred.patch(model, SETTINGS[method][0]):
        assert reached() == plain


@pytest.mark.parametrize("name", SETTINGS)
def test_json_round_trip(name):
    for method in SETTINGS[name]:
        again = from_dict(json.loads(json.dumps(method.to_dict())))
        assert again == method
        assert hash(again) == hash(method)
        assert eval(repr(method), vars(tokred)) == method
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.anything = 1
