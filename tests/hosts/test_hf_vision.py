"""transformers vision encoders under reduction: oracles, undo, copies, wrappers, refusals (tiny random models)."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import modeling_layers
from transformers.utils import output_capturing

import tokred
from tests.hosts.flash import flash_stand_in
from tokred.adapters.hf_vision import HFVisionHost
from tokred.adapters.registry import find_host
from tokred.core.errors import InvalidParameterError, NoClassTokenError, RaggedInputError, UnsupportedModelError
from tokred.core.method import EncoderMethod
from tokred.core.tokens import Keep

SIDE, PATCH, DEPTH, DIM = 48, 8, 4, 32
TOKENS = (SIDE // PATCH) ** 2
PLAIN = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DINO = {**{key: value for key, value in PLAIN.items() if key != "intermediate_size"}, "mlp_ratio": 2}
# training draws other coordinates in every pass unless these are off
FIXED = {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}
DINO3 = {**PLAIN, **FIXED, "num_register_tokens": 3}
DINO_REGISTERS = {**DINO, "num_register_tokens": 3}
NAFLEX = {**{key: value for key, value in PLAIN.items() if key != "image_size"}, "num_patches": TOKENS}

#: family: (encoder, config class, config, prefix, class tokens)
FAMILIES = {
    "vit": ("ViTModel", "ViTConfig", PLAIN, 1, 1),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", PLAIN, 1, 1),
    "ijepa": ("IJepaModel", "IJepaConfig", PLAIN, 0, 0),
    "deit": ("DeiTModel", "DeiTConfig", PLAIN, 2, 2),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", PLAIN, 1, 1),
    "metaclip2": ("MetaClip2VisionModel", "MetaClip2VisionConfig", PLAIN, 1, 1),
    "altclip": ("AltCLIPVisionModel", "AltCLIPVisionConfig", PLAIN, 1, 1),
    "chinese_clip": ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", PLAIN, 1, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", PLAIN, 0, 0),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX, 0, 0),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, 1, 1),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}, 1, 1),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO_REGISTERS, 4, 1),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", DINO3, 4, 1),
}
#: a layout each: norm names, rotary tables, padding, registers
TYPICAL = ("vit", "siglip2", "dinov2_registers", "dinov3", "clip")

METHODS = {
    "tome": tokred.ToMe(r=5),
    "topk": tokred.TopK(keep_rate=0.7, layers=(1, 2), score="mass"),
    "topk_fuse": tokred.TopK(keep_rate=0.7, layers=(1,), score="mass", fuse=True),
    "zero_tprune": tokred.ZeroTPrune(schedule={0: (4, 0.9), 2: (3, 0.8)}),
    "random": tokred.RandomTokens(keep_rate=0.7, layers=(0, 2), where="block"),
}
#: written like another family, line for line
COUSINS = ("vit_msn", "metaclip2", "altclip", "chinese_clip", "dinov2_swiglu")
every_family = pytest.mark.parametrize("family", FAMILIES)
all_families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.full] * (name in COUSINS)) for name in FAMILIES]
)
all_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
both_kernels = pytest.mark.parametrize("kernel", ["sdpa", "eager"])


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(name: str, config, kernel: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)._from_config(config, attn_implementation=kernel))


def make(family: str, kernel: str = "sdpa") -> nn.Module:
    name, config, fields, _, _ = FAMILIES[family]
    return build(name, getattr(transformers, config)(**fields), kernel)


def prefix_of(family: str) -> int:
    return FAMILIES[family][3]


def inputs(family: str, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family != "siglip2":
        return {"pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=generator)}
    side = SIDE // PATCH
    return {
        "pixel_values": torch.randn(batch, TOKENS, 3 * PATCH**2, generator=generator),
        "pixel_attention_mask": torch.ones(batch, TOKENS, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[side, side]] * batch),
    }


def ragged(shapes: list[tuple[int, int]], total: int) -> dict[str, torch.Tensor]:
    """Images of different shapes padded to `total` patches, as the SigLIP2 processor makes them."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.zeros(len(shapes), total, 3 * PATCH**2)
    mask = torch.zeros(len(shapes), total, dtype=torch.int32)
    for row, (height, width) in enumerate(shapes):
        pixels[row, : height * width] = torch.randn(height * width, 3 * PATCH**2, generator=generator)
        mask[row, : height * width] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The list of layers, found without the host."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH]
    assert len(lists) == 1
    return list(lists[0])


def outputs(model: nn.Module, given: dict, **kwargs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(model(**given, **kwargs).items())


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def flat(values: dict) -> list[torch.Tensor]:
    return [x for value in values.values() for x in (value if isinstance(value, tuple) else (value,))]


def fingerprint(model: nn.Module) -> list:
    """Everything about a model that a patch could leave behind."""
    seen = []
    for name, module in model.named_modules():
        plain = {
            key: id(value) if isinstance(value, (nn.Module, torch.Tensor)) else repr(value)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules", "config")
        }
        seen.append((name, type(module), plain, list(module._parameters), list(module._modules)))
    return seen


@dataclass(frozen=True)
class Spy(EncoderMethod):
    """Drops the last token at some blocks and keeps what it saw of them."""

    layers: tuple[int, ...] = (1,)
    where: str = "block"
    seen: dict = field(default_factory=dict, compare=False)

    name: ClassVar[str] = "spy_hf_vision"
    title: ClassVar[str] = "Spy"
    paper: ClassVar[str] = "test"
    ragged: ClassVar[bool] = True

    def __hash__(self) -> int:
        return hash((self.layers, self.where))

    @property
    def placement(self):
        return self.where

    @property
    def taps(self):
        return frozenset({"qk", "v", "input"})

    def bind(self, info):
        return dict.fromkeys(self.layers, 1)

    def count(self, tokens, rule):
        return tokens - rule

    def reduce(self, view, rule):
        self.seen[view.layer] = {
            "matrix": view.attention_matrix(),
            "rows": view.attention_rows(slice(0, 3)),
            "values": view.values(),
            "input": view.block_input(),
        }
        return Keep(torch.arange(view.count - rule).expand(view.tokens.shape[0], -1))


# -- what a patch does -------------------------------------------------------------------------------------------------


@all_families
@all_methods
def test_counts_are_the_plan(family, method):
    model, given = make(family), inputs(family)
    expected = outputs(model, given)
    plan = method.plan(find_host(model).info)
    patch = tokred.patch(model, method)
    got = outputs(model, given, output_hidden_states=True)
    left = [TOKENS, *plan]
    assert patch.trace.counts == [(layer, n) for layer, n in enumerate(plan) if n < left[layer]]
    prefix = prefix_of(family)
    assert [h.shape[1] for h in got["hidden_states"]] == [prefix + n for n in (TOKENS, *plan)]
    assert got["last_hidden_state"].shape == (2, prefix + plan[-1], DIM)
    assert all(torch.isfinite(x).all() for x in flat(got))
    if "pooler_output" in expected:
        assert not torch.equal(got["pooler_output"], expected["pooler_output"])


@every_family
@pytest.mark.parametrize(
    "method",
    [
        tokred.ToMe(r=0),
        tokred.TopK(keep_rate=1.0, score="mass"),
        tokred.ZeroTPrune(keep_rate=1.0),
        tokred.RandomTokens(keep_rate=1.0),
    ],
    ids=lambda method: method.name,
)
def test_identity_is_bit_exact(family, method):
    model, given = make(family), inputs(family)
    expected = outputs(model, given, output_hidden_states=True)
    with tokred.patch(model, method) as patch:
        assert equal(outputs(model, given, output_hidden_states=True), expected)
        assert len(patch.trace) == 0


@all_families
@all_methods
def test_remove_leaves_no_trace(family, method):
    model, given = make(family), inputs(family)
    expected = outputs(model, given, output_hidden_states=True)  # installs the library's own hooks
    before, keys, config = fingerprint(model), list(model.state_dict()), model.config.to_dict()
    with tokred.patch(model, method):
        assert not equal(outputs(model, given), {k: v for k, v in expected.items() if k != "hidden_states"})
        assert list(model.state_dict()) == keys
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == "sdpa"
    assert fingerprint(model) == before
    assert model.config.to_dict() == config
    assert equal(outputs(model, given, output_hidden_states=True), expected)


def test_a_failed_patch_leaves_no_trace():
    model = build("SiglipForImageClassification", transformers.SiglipConfig(vision_config=PLAIN))
    before = fingerprint(model)
    model.forward = model.forward  # an accelerate hook, say: the wrapper cannot be given another class
    with pytest.raises(UnsupportedModelError, match="forward"):
        tokred.patch(model, tokred.ToMe(r=2))
    del model.forward
    assert fingerprint(model) == before


# -- exact scores ------------------------------------------------------------------------------------------------------


@every_family
@both_kernels
def test_captured_attention_equals_eager_weights(family, kernel):
    given, where = inputs(family), "attn" if kernel == "sdpa" else "block"
    eager = make(family, "eager")
    weights = outputs(eager, given, output_attentions=True)["attentions"]
    hidden = outputs(eager, given, output_hidden_states=True)["hidden_states"]
    model, spy = make(family, kernel), Spy((1, 2), where)
    tokred.patch(model, spy)
    outputs(model, given)
    assert (spy.seen[1]["matrix"] - weights[1]).abs().max() <= 1e-6
    assert (spy.seen[1]["rows"] - weights[1][:, :, :3]).abs().max() <= 1e-6
    assert (spy.seen[1]["input"] - hidden[1]).abs().max() <= 1e-5
    # behind a reduction: what the same model, still reduced, reports under eager attention
    tokred.patch(eager, Spy((1, 2), where))
    reduced = outputs(eager, given, output_attentions=True)["attentions"]
    assert reduced[2].shape[-1] == weights[2].shape[-1] - 1
    assert (spy.seen[2]["matrix"] - reduced[2]).abs().max() <= 1e-6
    # values: attention times v, through the output projection, is what the attention module returns
    layer = layers_of(eager)[1]
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    returned = []
    tokred.unpatch(eager)
    attention.register_forward_hook(lambda module, args, output: returned.append(output[0]))
    outputs(eager, given)
    by_hand = projection((weights[1] @ spy.seen[1]["values"]).transpose(1, 2).flatten(2))
    assert (by_hand - returned[0]).abs().max() <= 1e-5


@both_kernels
def test_captured_attention_of_padded_images(kernel):
    given = ragged([(6, 6), (3, 5)], TOKENS)
    weights = outputs(make("siglip2", "eager"), given, output_attentions=True)["attentions"]
    assert weights[1][1, :, :, 15:].abs().max() == 0
    model, spy = make("siglip2", kernel), Spy((1,))
    tokred.patch(model, spy)
    outputs(model, given)
    assert (spy.seen[1]["matrix"] - weights[1]).abs().max() <= 1e-6


def test_merged_tokens_enter_scores_with_their_size():
    model, given = make("vit", "eager"), inputs("vit")
    spy = Spy((2,))
    tokred.patch(model, [tokred.ToMe(r=[6, 6, 0, 0]), spy])
    weights = outputs(model, given, output_attentions=True)["attentions"]
    assert (spy.seen[2]["matrix"] - weights[2]).abs().max() <= 1e-6
    tokred.unpatch(model)
    plain = Spy((2,))
    tokred.patch(model, [tokred.ToMe(r=[6, 6, 0, 0], prop_attn=False), plain])
    outputs(model, given)
    assert (plain.seen[2]["matrix"] - weights[2]).abs().max() > 1e-3


# -- oracles -----------------------------------------------------------------------------------------------------------


class MaskKeys:
    """Forward pre-hook of a layer: nobody attends to the positions that are False in `alive` (B, N)."""

    def __init__(self, alive: torch.Tensor) -> None:
        self.alive = alive

    def __call__(self, module, args, kwargs):
        mask = torch.zeros(self.alive.shape).masked_fill(~self.alive, float("-inf"))[:, None, None]
        return args[:1], {**kwargs, "attention_mask": mask.expand(-1, -1, self.alive.shape[1], -1)}


@all_families
@both_kernels
@pytest.mark.parametrize("name", ["topk", "zero_tprune", "random"])
def test_dropping_equals_masking_keys(family, kernel, name):
    given, prefix = inputs(family), prefix_of(family)
    model = make(family, kernel)
    patch = tokred.patch(model, METHODS[name])
    got = outputs(model, given)["last_hidden_state"]
    oracle = make(family, kernel)
    layers = layers_of(oracle)
    for step in patch.trace:
        alive = torch.zeros(2, prefix + TOKENS, dtype=torch.bool)
        alive[:, :prefix] = True
        alive.scatter_(1, step.kept + prefix, True)
        for layer in layers[step.layer + 1 :]:
            layer.register_forward_pre_hook(MaskKeys(alive), with_kwargs=True)
    full = outputs(oracle, given)["last_hidden_state"]
    kept = torch.cat([torch.arange(prefix).expand(2, -1), patch.trace[-1].kept + prefix], dim=1)
    assert (got - full.gather(1, kept[..., None].expand(-1, -1, DIM))).abs().max() <= 3e-5


class Expand:
    """Forward pre-hook of a layer behind a merge: every original position holds a copy of its merged token."""

    def __init__(self, tokens: torch.Tensor | None, slots: torch.Tensor, stands_for: torch.Tensor) -> None:
        self.tokens, self.slots, self.stands_for = tokens, slots, stands_for

    def __call__(self, module, args, kwargs):
        if self.tokens is not None:
            copies = self.tokens.gather(1, self.slots[..., None].expand(-1, -1, self.tokens.shape[-1]))
            args = (copies, *args[1:])
        if "position_embeddings" in kwargs:  # a copy is rotated like the token that lent its position
            rotary = tuple(table[self.stands_for][:, None] for table in kwargs["position_embeddings"])
            kwargs = {**kwargs, "position_embeddings": rotary}
        return args, kwargs


def expanded(patch, oracle: nn.Module, reduced_hidden: tuple, prefix: int, given: dict, merged_at: int = 1) -> dict:
    """Outputs of an unpatched model whose later layers see copies in place of merged tokens."""
    step = patch.trace[-1]
    assert step.layer == merged_at
    batch = step.group.shape[0]
    slots = torch.cat([torch.arange(prefix).expand(batch, -1), step.group + prefix], dim=1)
    stands_for = step.origins.gather(1, step.group)
    for number, layer in enumerate(layers_of(oracle)):
        if number > merged_at:
            tokens = reduced_hidden[number] if number == merged_at + 1 else None
            layer.register_forward_pre_hook(Expand(tokens, slots, stands_for), with_kwargs=True)
    return outputs(oracle, given)


@all_families
@both_kernels
def test_merged_tokens_weigh_as_their_copies(family, kernel):
    """Proportional attention in later layers, and attention pooling, equal a run on the copies (ToMe section 3)."""
    given, prefix = inputs(family), prefix_of(family)
    model = make(family, kernel)
    patch = tokred.patch(model, tokred.ToMe(r=[9, 13, 0, 0]), exit="restore")
    got = outputs(model, given)
    patch.replace(tokred.ToMe(r=[9, 13, 0, 0]), exit="reduced")
    hidden = outputs(model, given, output_hidden_states=True)["hidden_states"]
    want = expanded(patch, make(family, kernel), hidden, prefix, given)
    for key in want:
        assert (got[key] - want[key]).abs().max() <= 3e-5, key


WRAPPERS = {
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": PLAIN}),
    "siglip2": ("Siglip2ForImageClassification", "Siglip2Config", {"vision_config": NAFLEX}),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": PLAIN}),
    "metaclip2": ("MetaClip2ForImageClassification", "MetaClip2Config", {"vision_config": PLAIN}),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", PLAIN),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", DINO),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINO_REGISTERS),
}
HEADS = {
    "vit": ("ViTForImageClassification", "ViTConfig", PLAIN),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", PLAIN),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN),
}


def make_wrapper(family: str) -> nn.Module:
    name, config, fields = {**WRAPPERS, **HEADS}[family]
    config = getattr(transformers, config)(**fields)
    config.num_labels = 5
    return build(name, config)


@pytest.mark.parametrize("family", WRAPPERS)
@pytest.mark.parametrize("exit_", ["reduced", "restore"])
def test_averaging_classifiers_weigh_by_size(family, exit_):
    given, prefix = inputs(family), prefix_of(family)
    model = make_wrapper(family)
    patch = tokred.patch(model, tokred.ToMe(r=[9, 13, 0, 0]), exit=exit_, fill="zeros")
    got = outputs(model, given)["logits"]
    encoder = encoder_of(make_wrapper(family))
    tokred.patch(encoder, tokred.ToMe(r=[9, 13, 0, 0]))
    hidden = outputs(encoder, given, output_hidden_states=True)["hidden_states"]
    want = expanded(patch, make_wrapper(family), hidden, prefix, given)["logits"]
    assert (got - want).abs().max() <= 3e-5
    patch.replace(tokred.ToMe(r=[9, 13, 0, 0], weighted_pool=False))
    assert (outputs(model, given)["logits"] - want).abs().max() > 1e-3


def encoder_of(wrapper: nn.Module) -> nn.Module:
    return next(child for child in wrapper.children() if hasattr(child, "embeddings"))


@pytest.mark.parametrize("family", WRAPPERS)
@pytest.mark.parametrize("exit_", ["reduced", "restore"])
def test_averaging_classifiers_average_the_survivors(family, exit_):
    given, prefix, model = inputs(family), prefix_of(family), make_wrapper(family)
    patch = tokred.patch(model, METHODS["topk"])
    tokens = outputs(encoder_of(model), given)["last_hidden_state"]  # the encoder alone hands out plain tokens
    mean = tokens[:, prefix:].mean(dim=1)
    features = torch.cat([tokens[:, 0], mean], dim=1) if "dinov2" in family else mean
    patch.replace(METHODS["topk"], exit=exit_, fill="zeros")
    with torch.no_grad():
        assert (outputs(model, given)["logits"] - model.classifier(features)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", HEADS)
@all_methods
def test_class_token_classifiers(family, method):
    given, model = inputs(family), make_wrapper(family)
    tokred.patch(model, method)
    got = outputs(model, given, output_hidden_states=True)
    tokens = outputs(encoder_of(model), given)["last_hidden_state"]
    with torch.no_grad():
        if family == "deit":
            want = (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2
        else:
            want = model.classifier(tokens[:, 0])
    assert (got["logits"] - want).abs().max() <= 1e-6
    assert got["hidden_states"][-1].shape[1] == tokens.shape[1] < TOKENS


# -- batches -----------------------------------------------------------------------------------------------------------


@all_families
@all_methods
def test_batch_equals_per_sample(family, method):
    model, given = make(family), inputs(family, batch=3)
    patch = tokred.patch(model, method)
    together = outputs(model, given)
    kept = patch.trace[-1].kept
    for row in range(3):
        alone = outputs(model, {key: value[row : row + 1] for key, value in given.items()})
        assert torch.equal(patch.trace[-1].kept[0], kept[row])
        for key in alone:
            assert (alone[key][0] - together[key][row]).abs().max() <= 2e-5


SHAPES = [(6, 6), (3, 5), (4, 8), (1, 7)]
RAGGED = {
    "topk": tokred.TopK(keep_rate=0.6, layers=(0, 2), score="mass"),
    "random": tokred.RandomTokens(keep_rate=0.6, layers=(0,)),
    "random_block": tokred.RandomTokens(keep_rate=0.6, layers=(1,), where="block"),
}


@both_kernels
@pytest.mark.parametrize("method", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("wrapper", [False, True])
def test_padded_equals_unpadded(kernel, method, wrapper):
    model = make_wrapper("siglip2") if wrapper else make("siglip2", kernel)
    model.set_attn_implementation(kernel)
    padded = ragged(SHAPES, TOKENS)
    patch = tokred.patch(model, method)
    key = "logits" if wrapper else "pooler_output"
    together = outputs(model, padded)
    steps = list(patch.trace)
    for row, (height, width) in enumerate(SHAPES):
        n = height * width
        alone = outputs(
            model,
            {
                "pixel_values": padded["pixel_values"][row : row + 1, :n],
                "pixel_attention_mask": padded["pixel_attention_mask"][row : row + 1, :n],
                "spatial_shapes": padded["spatial_shapes"][row : row + 1],
            },
        )
        assert (alone[key][0] - together[key][row]).abs().max() <= 1e-5
        kept = steps[-1].kept[row]
        if steps[-1].valid is not None:
            kept = kept[steps[-1].valid[row]]
        assert torch.equal(patch.trace[-1].kept[0], kept)


def test_methods_without_a_definition_of_padding_are_refused():
    model = make("siglip2")
    for method in (METHODS["tome"], METHODS["zero_tprune"]):
        with tokred.patch(model, method):
            with pytest.raises(RaggedInputError):
                outputs(model, ragged([(6, 6), (3, 5)], TOKENS))
            assert outputs(model, ragged([(4, 9), (9, 4)], TOKENS))["pooler_output"].shape == (2, DIM)


def test_the_grid_of_naflex_is_that_of_the_input():
    model = make("siglip2")
    patch = tokred.patch(model, METHODS["topk"])
    outputs(model, ragged([(4, 9), (4, 9)], TOKENS))
    assert patch.trace.grid == (4, 9)
    outputs(model, ragged([(4, 9), (9, 4)], TOKENS))
    assert patch.trace.grid is None


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@both_kernels
def test_masked_patches_are_padding(family, kernel):
    model, given = make(family, kernel), inputs(family)
    mask = torch.ones(2, 1 + TOKENS, dtype=torch.long)
    mask[1, 1 + 20 :] = 0
    patch = tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(1,), score="mass"))
    got = outputs(model, {**given, "attention_mask": mask})
    step = patch.trace[-1]
    assert step.valid.sum(dim=1).tolist() == [18, 10]
    assert step.kept[1][step.valid[1]].max() < 20
    # oracle: the whole model, with these keys masked in all layers and the dropped ones behind layer 1
    oracle = make(family, kernel)
    alive = torch.zeros(2, TOKENS, dtype=torch.bool)
    for row in range(2):
        alive[row, step.kept[row][step.valid[row]]] = True
    alive = torch.cat([torch.ones(2, 1, dtype=torch.bool), alive], dim=1)
    for number, layer in enumerate(layers_of(oracle)):
        layer.register_forward_pre_hook(MaskKeys(alive if number > 1 else mask.bool()), with_kwargs=True)
    want = outputs(oracle, given)["last_hidden_state"]
    assert (got["last_hidden_state"][:, 0] - want[:, 0]).abs().max() <= 3e-5


# -- exits -------------------------------------------------------------------------------------------------------------


@all_families
@pytest.mark.parametrize("name", ["tome", "random"])
def test_restored_hidden_states_lie_on_the_grid(family, name):
    model, given, prefix = make(family), inputs(family), prefix_of(family)
    patch = tokred.patch(model, METHODS[name])
    reduced = outputs(model, given, output_hidden_states=True)
    patch.replace(METHODS[name], exit="restore", fill="zeros")
    full = outputs(model, given, output_hidden_states=True)
    tables = {step.layer: step for step in patch.trace}
    states = [*full["hidden_states"], full["last_hidden_state"]]
    step = None
    for i, (y, x) in enumerate(zip(states, [*reduced["hidden_states"], reduced["last_hidden_state"]], strict=True)):
        step = tables.get(i - 1, step)
        assert y.shape == (2, prefix + TOKENS, DIM)
        assert torch.equal(y[:, :prefix], x[:, :prefix])
        if step is None:
            assert torch.equal(y, x)
            continue
        for row in range(2):
            for cell in range(TOKENS):
                slot = int(step.group[row, cell])
                want = x[row, prefix + slot] if slot >= 0 else torch.zeros(DIM)
                assert torch.equal(y[row, prefix + cell], want)


def test_hidden_states_do_not_depend_on_call_history():
    """The library installs its capturing hooks at the first use, before or after ours (findings 3)."""
    given, lengths = inputs("clip"), []
    for warm in (False, True):
        model = make("clip")
        if warm:
            outputs(model, given, output_hidden_states=True)
        tokred.patch(model, METHODS["random"])
        lengths.append([h.shape[1] for h in outputs(model, given, output_hidden_states=True)["hidden_states"]])
    assert lengths[0] == lengths[1] == [37, 27, 27, 20, 20]


@pytest.mark.skipif(not hasattr(output_capturing, "selected_hidden_states"), reason="transformers cannot select yet")
def test_selected_hidden_states_are_restored():
    model, given = make("clip"), inputs("clip")
    tokred.patch(model, METHODS["random"], exit="restore")
    everything = outputs(model, given, output_hidden_states=True)
    selected = outputs(model, given, output_hidden_states=[-2])["hidden_states"]
    assert [x is None for x in selected] == [True, True, True, False, True]
    assert torch.equal(selected[-2], everything["hidden_states"][-2])


def test_tuples_are_restored():
    model, given = make("clip"), inputs("clip")
    tokred.patch(model, METHODS["random"], exit="restore")
    everything = outputs(model, given, output_hidden_states=True)
    with torch.no_grad():
        last, pooled, hidden = model(**given, output_hidden_states=True, return_dict=False)
    assert torch.equal(last, everything["last_hidden_state"])
    assert torch.equal(pooled, everything["pooler_output"])
    assert torch.equal(hidden[3], everything["hidden_states"][3])


BACKBONES = {
    "dinov2": ("Dinov2Backbone", "Dinov2Config", DINO),
    "dinov2_registers": ("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", DINO_REGISTERS),
    "dinov3": ("DINOv3ViTBackbone", "DINOv3ViTConfig", DINO3),
}


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("name", ["tome", "topk"])
def test_feature_maps_of_a_backbone_lie_on_the_grid(family, name):
    backbone, config, fields = BACKBONES[family]
    model = build(backbone, getattr(transformers, config)(**fields, out_features=["stage2", "stage4"]))
    encoder, given, prefix = make(family), inputs(family), prefix_of(family)
    encoder.load_state_dict(model.state_dict())
    patch = tokred.patch(model, METHODS[name])
    maps = outputs(model, given)["feature_maps"]
    reduced = tokred.patch(encoder, METHODS[name])
    hidden = outputs(encoder, given, output_hidden_states=True)["hidden_states"]
    norm = model.layernorm if hasattr(model, "layernorm") else model.norm
    for feature, stage in zip(maps, (2, 4), strict=True):
        assert feature.shape == (2, DIM, SIDE // PATCH, SIDE // PATCH)
        step = [step for step in reduced.trace if step.layer < stage][-1]
        with torch.no_grad():
            tokens = norm(hidden[stage])[:, prefix:]
        at_kept = feature.flatten(2).transpose(1, 2).gather(1, step.kept[..., None].expand(-1, -1, DIM))
        assert (at_kept - tokens).abs().max() <= 1e-5
    assert len(patch.trace) > 0
    with pytest.raises(InvalidParameterError, match="grid"):
        patch.replace(METHODS[name], exit="reduced")
    patch.remove()
    with pytest.raises(InvalidParameterError, match="grid"):
        tokred.patch(model, METHODS[name], exit="reduced")


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_masked_image_modelling_decodes_the_whole_grid(family):
    name = {"vit": "ViTForMaskedImageModeling", "deit": "DeiTForMaskedImageModeling"}[family]
    config = getattr(transformers, FAMILIES[family][1])(**PLAIN, encoder_stride=PATCH)
    model, given = build(name, config), inputs(family)
    expected = outputs(model, given)["reconstruction"]
    patch = tokred.patch(model, tokred.TopK(keep_rate=0.25, layers=(1,), score="mass"))  # 9 of 36: a smaller square
    got = outputs(model, given)["reconstruction"]
    assert got.shape == expected.shape == (2, 3, SIDE, SIDE)
    assert patch.trace[-1].tokens_out == 9
    assert not torch.equal(got, expected)
    with pytest.raises(InvalidParameterError, match="grid"):
        patch.replace(METHODS["topk"], exit="reduced")


# -- models around the encoder -----------------------------------------------------------------------------------------

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_two_tower_models_are_reduced_in_the_vision_tower_only(family):
    vision = NAFLEX if family == "siglip2" else PLAIN
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[family]
    text = {**TEXT, "projection_size": DIM, "eos_token_id": 2} if family != "clip" else {**TEXT, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text)
    model = build(f"{name}Model", config)
    given = {**inputs(family), "input_ids": torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2]])}
    before = outputs(model, given)
    tower = fingerprint(model.text_model)
    patch = tokred.patch(model, METHODS["tome"])
    after = outputs(model, given)
    assert torch.equal(before["text_embeds"], after["text_embeds"])
    assert not torch.equal(before["image_embeds"], after["image_embeds"])
    assert fingerprint(model.text_model) == tower
    assert patch.trace.counts[-1] == (3, TOKENS - 4 * 5)


def test_a_tower_that_feeds_a_language_model_restores_its_grid():
    llama = transformers.LlamaConfig(**TEXT, max_position_embeddings=256)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**PLAIN), text_config=llama, image_token_id=49
    )
    model = build("LlavaForConditionalGeneration", config)
    tower = next(m for m in model.modules() if type(m).__name__ == "CLIPVisionModel")
    host = HFVisionHost(tower)
    assert host.default_exit() == "reduced"
    host.place(model)
    assert host.default_exit() == "restore"


# -- copies, threads, training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TYPICAL)
def test_deepcopy_is_independent(family):
    model, given = make(family), inputs(family)
    unreduced = outputs(model, given)
    patch = tokred.patch(model, METHODS["tome"])
    reduced = outputs(model, given)
    twin = copy.deepcopy(model)
    patch.remove()
    assert equal(outputs(model, given), unreduced)
    assert equal(outputs(twin, given), reduced)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert equal(outputs(twin, given), reduced)
    tokred.unpatch(twin)
    assert equal(outputs(twin, given), unreduced)


@pytest.mark.parametrize("family", TYPICAL)
def test_saving_a_patched_model_saves_the_model(family, tmp_path):
    model, given = make(family), inputs(family)
    expected = outputs(model, given)
    model.save_pretrained(tmp_path / "plain")
    tokred.patch(model, METHODS["tome"])
    outputs(model, given)
    model.save_pretrained(tmp_path / "patched")
    plain, patched = ((tmp_path / name / "config.json").read_text() for name in ("plain", "patched"))
    assert json.loads(plain) == json.loads(patched)
    loaded = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "patched").eval()
    assert equal(outputs(loaded, given), expected)


@pytest.mark.parametrize("family", TYPICAL)
def test_two_threads_do_not_mix(family):
    model = make(family)
    patch = tokred.patch(model, METHODS["topk"])
    many = [inputs(family, batch=b, seed=s) for s, b in enumerate((1, 3))]
    expected = [outputs(model, given) for given in many]
    failures, start = [], threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        for _ in range(15):
            if not equal(outputs(model, many[index]), expected[index]):
                failures.append(index)
            if patch.trace[-1].kept.shape[0] != many[index]["pixel_values"].shape[0]:
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def gradients(model: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**given).last_hidden_state.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@all_families
@pytest.mark.parametrize("name", ["tome", "zero_tprune", "random"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(family, name, reentrant):
    model, given = make(family).train(), inputs(family)
    patch = tokred.patch(model, METHODS[name])
    expected = gradients(model, given)
    kept = patch.trace[-1].kept
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients(model, given)
    assert got.keys() == expected.keys()
    assert len(got) > DEPTH
    for key in got:
        assert torch.allclose(got[key], expected[key], rtol=1e-4, atol=1e-5 * expected[key].abs().max()), key
    assert torch.equal(patch.trace[-1].kept, kept)
    if "__init_subclass__" in vars(modeling_layers.GradientCheckpointingLayer):  # later than 5.19: hooks stay outside
        assert not patch._attachment.call.taps


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_checkpointing_with_frozen_lower_layers(frozen):
    """The input of a recomputed layer then needs no gradient; its state must be found all the same."""
    model, given = make("siglip").train(), inputs("siglip")
    model.embeddings.requires_grad_(False)
    for layer in layers_of(model)[:frozen]:
        layer.requires_grad_(False)
    tokred.patch(model, METHODS["tome"])
    expected = gradients(model, given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, given)
    assert got.keys() == expected.keys()
    for key in got:
        assert torch.allclose(got[key], expected[key], rtol=1e-4, atol=1e-5 * expected[key].abs().max()), key


# -- attention implementations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TYPICAL)
@pytest.mark.parametrize("name", ["tome", "topk"])
def test_the_attention_implementation_may_change_while_patched(family, name):
    model, given = make(family), inputs(family)
    patch = tokred.patch(model, METHODS[name])
    fused = outputs(model, given)
    kept = patch.trace[-1].kept
    model.set_attn_implementation("eager")
    eager = outputs(model, given, output_attentions=True)
    assert len(eager.pop("attentions")) == DEPTH
    assert torch.equal(patch.trace[-1].kept, kept)
    for key in fused:
        assert (fused[key] - eager[key]).abs().max() <= 2e-5
    tokred.unpatch(model)
    assert model.config._attn_implementation == "eager"


def flash_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Flash attention's contract, computed by sdpa: the mask is (B, N) or None, nothing else."""
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        assert attention_mask.shape == (key.shape[0], key.shape[2])
        attention_mask = attention_mask.bool()[:, None, None]
    out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    with flash_stand_in(flash_like) as name:
        yield name


def test_flash_attention_serves_what_needs_no_bias(flash):
    model = make("siglip2")
    padded = ragged(SHAPES, TOKENS)
    for method in (RAGGED["topk"], RAGGED["random_block"]):
        with tokred.patch(model, method):
            expected = [outputs(model, given) for given in (inputs("siglip2"), padded)]
            model.config._attn_implementation = flash
            # the pooling head builds its own mask by the same implementation: dense only
            got = outputs(model, {**inputs("siglip2"), "pixel_attention_mask": None})
            assert (got["pooler_output"] - expected[0]["pooler_output"]).abs().max() <= 1e-5
            got = outputs(model, padded)
            assert (got["pooler_output"] - expected[1]["pooler_output"]).abs().max() <= 1e-5
            model.config._attn_implementation = "sdpa"


def test_flash_attention_refuses_proportional_attention(flash):
    model, given = make("vit"), inputs("vit")
    before = fingerprint(model)
    model.config._attn_implementation = flash
    with pytest.raises(UnsupportedModelError, match="proportional"):
        tokred.patch(model, METHODS["tome"])
    assert fingerprint(model) == before
    model.config._attn_implementation = "sdpa"
    patch = tokred.patch(model, METHODS["tome"])
    model.config._attn_implementation = flash  # switched behind our back
    with pytest.raises(UnsupportedModelError, match="flash_like"):
        outputs(model, given)
    patch.replace(tokred.ToMe(r=5, prop_attn=False))
    got = outputs(model, given)["pooler_output"]
    model.config._attn_implementation = "sdpa"
    assert (got - outputs(model, given)["pooler_output"]).abs().max() <= 1e-5


def test_a_replaced_projection_is_an_error_and_never_a_stale_score():
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    model, given = make("vit"), inputs("vit")
    tokred.patch(model, METHODS["topk"])
    attention = layers_of(model)[1].attention
    attention.q_proj = Wrapped(attention.q_proj)
    with pytest.raises(UnsupportedModelError, match="replaced"):
        outputs(model, given)
    tokred.unpatch(model)
    tokred.patch(model, METHODS["topk"])
    assert outputs(model, given)["last_hidden_state"].shape[1] < TOKENS


# -- what the host says of a model -------------------------------------------------------------------------------------


@every_family
def test_info(family):
    _, _, _, prefix, class_tokens = FAMILIES[family]
    host = find_host(make(family))
    info = host.info
    assert (info.depth, info.dim, info.heads, info.head_dim) == (DEPTH, DIM, 4, 8)
    assert (info.prefix, info.class_tokens, info.tokens) == (prefix, class_tokens, TOKENS)
    assert host.patch_size == (PATCH, PATCH)
    assert info.grid == (None if family == "siglip2" else (6, 6))
    assert host.info_for((64, 33)).tokens == 8 * 4  # a remainder is not embedded


@pytest.mark.parametrize("family", ["siglip", "siglip2", "ijepa"])
def test_class_scores_need_a_class_token(family):
    model = make(family)
    with pytest.raises(NoClassTokenError):
        tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(1,), score="cls"))
    tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(1,), score="mass"))
    assert outputs(model, inputs(family))["last_hidden_state"].shape[1] == TOKENS // 2


def counted(model: nn.Module, given: dict) -> int:
    """Multiply-adds of one image by torch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given)
    return counter.get_total_flops() // 2 // given["pixel_values"].shape[0]


@every_family
@pytest.mark.parametrize("reduced", [False, True])
def test_flops_are_those_that_torch_counts(family, reduced):
    model, given = make(family, "eager"), inputs(family)
    if reduced:
        tokred.patch(model, METHODS["random"])
    measured, said = counted(model, given), tokred.flops(model)
    assert said.total == measured


@pytest.mark.parametrize("family", [*WRAPPERS, *HEADS])
def test_flops_count_the_classifier(family):
    model, given = make_wrapper(family), inputs(family)
    model.set_attn_implementation("eager")
    assert tokred.flops(model).total == counted(model, given)


def test_flops_of_published_models_from_configs():
    vit = transformers.ViTConfig(architectures=["ViTForImageClassification"], num_labels=1000)
    assert tokred.flops(vit).total == pytest.approx(17.56e9, rel=2e-3)
    assert tokred.flops(vit, (384, 384)).total == pytest.approx(55.5e9, rel=5e-3)
    deit = transformers.DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    assert tokred.flops(deit).total == pytest.approx(4.63e9, rel=5e-3)
    clip = transformers.CLIPConfig()
    assert tokred.flops(clip).total == tokred.flops(clip.vision_config).total
    assert tokred.flops(transformers.Siglip2Config()).vision > 10e9
    assert tokred.flops(transformers.DINOv3ViTConfig(), 224).total > 0
    reduced = tokred.flops(vit, method=tokred.ToMe(r=13))
    assert 0.3 < reduced.reduction < 0.6


@every_family
def test_the_two_halves_are_the_layer(family):
    """The residual lines that the host copies: fails when transformers changes a layer."""
    model = make(family)
    host = find_host(model)
    calls = []
    layer = layers_of(model)[2]
    layer.register_forward_hook(lambda m, args, kwargs, y: calls.append((args, kwargs, y)), with_kwargs=True)
    outputs(model, inputs(family))
    args, kwargs, y = calls[0]
    with torch.no_grad():
        assert torch.equal(host.mlp_half(layer, host.attention_half(layer, args, kwargs)), y)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_the_two_halves_drop_out_as_the_layer_does(family):
    drop = {"hidden_dropout_prob": 0.5} if family == "vit" else {"drop_path_rate": 0.5}
    name, config, fields, _, _ = FAMILIES[family]
    model = build(name, getattr(transformers, config)(**fields, **drop))
    host, layer = find_host(model), layers_of(model)[2].train()
    x = torch.randn(8, 5, DIM)
    with torch.no_grad():
        torch.manual_seed(7)
        want = layer(x)
        torch.manual_seed(7)
        got = host.mlp_half(layer, host.attention_half(layer, (x,), {}))
    assert torch.equal(got, want)
    assert not torch.equal(layer.eval()(x), want)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "SwinModel": (transformers.SwinConfig, {"embed_dim": 8, "depths": [1], "num_heads": [1]}, "window"),
    "BeitModel": (transformers.BeitConfig, PLAIN, "relative position"),
    "Data2VecVisionModel": (transformers.Data2VecVisionConfig, PLAIN, "relative position"),
    "ConvNextModel": (transformers.ConvNextConfig, {}, "convolution"),
    "ViTMAEModel": (transformers.ViTMAEConfig, PLAIN, "shuffles"),
    "VitDetModel": (transformers.VitDetConfig, PLAIN, "window"),
    "YolosModel": (transformers.YolosConfig, {**PLAIN, "image_size": [SIDE, SIDE]}, "detection"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    config, fields, reason = REFUSED[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(config(**fields))
    with pytest.raises(UnsupportedModelError, match=reason):
        tokred.patch(model, METHODS["tome"])


def test_refusals_name_classes_that_exist():
    names = [name for name in dir(transformers) if isinstance(name, str)]
    for refused in HFVisionHost.refusals:
        assert any(name.startswith(refused) for name in names), refused
    for served in HFVisionHost.classes:
        assert served in names
        assert not any(served.startswith(refused) for refused in HFVisionHost.refusals)


def test_language_models_are_not_mistaken_for_encoders():
    for name in ("CLIPTextModel", "SiglipTextModel"):
        model = getattr(transformers, name)(getattr(transformers, name.replace("Model", "Config"))(**TEXT))
        with pytest.raises(UnsupportedModelError, match="no host serves"):
            tokred.patch(model, METHODS["tome"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "siglip", "dinov2_registers", "dinov3"])
@pytest.mark.parametrize("name", ["tome", "topk"])
def test_compiles_without_a_graph_break(family, name):
    torch._dynamo.reset()
    model, given = make(family), inputs(family)
    tokred.patch(model, METHODS[name])
    expected = outputs(model, given)["last_hidden_state"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (outputs(compiled, given)["last_hidden_state"] - expected).abs().max() <= 2e-5
