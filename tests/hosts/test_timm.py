"""Every kind of timm transformer: identity, exact scores, the masked-key oracle, merging, grids, heads."""

from __future__ import annotations

import functools
import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokred
from tokred.adapters.timm_vit import TimmHost
from tokred.core.errors import NoClassTokenError, RaggedInputError, UnsupportedModelError
from tokred.core.sites import EncoderBlock

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 7}


def vit(**kwargs):
    return VisionTransformer(**{**SMALL, **kwargs})


def deit_distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**SMALL)


def eva(**kwargs):
    defaults = {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": True,
        "swiglu_mlp": True,
        "init_values": 0.5,
        "mlp_ratio": 2,
    }
    return Eva(**{**SMALL, **defaults, **kwargs})


def dinov3():
    return eva(num_reg_tokens=4, rope_type="dinov3", use_abs_pos_emb=False)


def naflex(**kwargs):
    cfg = {"patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3, "reg_tokens": 0, "img_size": None}
    cfg = {**cfg, "pos_embed_grid_size": (6, 6), **kwargs}
    cfg.pop("img_size")
    return NaFlexVit(NaFlexVitCfg(**cfg), num_classes=7)


MODELS = {
    "vit": vit,
    "vit-no-embed-class-registers": functools.partial(vit, reg_tokens=4, no_embed_class=True, dynamic_img_size=True),
    "deit-distilled": deit_distilled,
    "layer-scale-qk-norm": functools.partial(vit, init_values=0.3, qk_norm=True),
    "norms-and-gates": functools.partial(vit, scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True),
    "avg-pool-no-cls": functools.partial(vit, class_token=False, global_pool="avg", fc_norm=True),
    "avg-pool-with-cls": functools.partial(vit, global_pool="avg", fc_norm=True),
    "avgmax": functools.partial(vit, global_pool="avgmax"),
    "map-pool": functools.partial(vit, class_token=False, global_pool="map"),
    "eva02": eva,
    "eva-post-norm": functools.partial(eva, use_post_norm=True, init_values=None),
    "eva-fused-qk-norm": functools.partial(eva, qkv_fused=True, qk_norm=True, swiglu_mlp=False),
    "dinov3": dinov3,
    "rope-mixed": functools.partial(eva, rope_type="mixed"),
    "naflex-cls": functools.partial(naflex, class_token=True, global_pool="token"),
    "naflex-rope-map": functools.partial(naflex, rope_type="axial", global_pool="map", class_token=False),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def images(batch: int = 2, side: int = 48) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def score_for(model: nn.Module) -> str:
    return "cls" if TimmHost(model).info.class_tokens else "mass"


def methods_for(model: nn.Module) -> list:
    return [
        tokred.ToMe(r=[4, 0, 3]),
        tokred.TopK(keep_rate=0.6, layers=(1, 3), score=score_for(model)),
        tokred.ZeroTPrune(schedule={0: (3, 0.9), 2: (2, 0.7)}),
        tokred.RandomTokens(keep_rate=0.6, layers=(1, 3)),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_identity_and_undo(name):
    model, x = build(name), images()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(model(x), expected)
        for method in (tokred.ToMe(r=0), tokred.TopK(keep_rate=1.0, score=score_for(model)),
                       tokred.ZeroTPrune(keep_rate=1.0), tokred.RandomTokens(keep_rate=1.0)):  # fmt: skip
            with tokred.patch(model, method):
                assert torch.equal(model(x), expected)
        for method in methods_for(model):
            with tokred.patch(model, method) as patch:
                assert (model(x) - expected).abs().max() > 1e-4
                assert len(patch.trace) == 2
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_captured_scores_are_the_attention_of_the_model(name):
    """softmax(q k^T) of the tap equals the matrix that the unfused attention of the same layer forms."""
    model, x = build(name), images()
    seen: dict[int, Tensor] = {}
    for layer in (1, 3):
        attention = model.blocks[layer].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(lambda m, args, layer=layer: seen.__setitem__(layer, args[0]))
    with torch.no_grad():
        model(x)
    captured: dict[int, Tensor] = {}

    class Probe(tokred.RandomTokens):
        name = "probe_for_test"
        taps = frozenset({"qk", "v"})

        def reduce(self, view: EncoderBlock, rule):
            captured[view.layer] = view.attention_matrix()
            assert view.values().shape == view.keys().shape
            torch.testing.assert_close(view.attention_mass(), captured[view.layer].sum(2)[..., view.prefix :])

    from tokred.core import method as registry

    del registry._REGISTRY["probe_for_test"]
    for layer in (1, 3):
        model.blocks[layer].attn.fused_attn = True
    with torch.no_grad(), tokred.patch(model, Probe(keep_rate=0.5, layers=(1, 3)), score_backend="recompute"):
        model(x)
    for layer in (1, 3):
        torch.testing.assert_close(captured[layer], seen[layer], atol=2e-5, rtol=1e-5)


def add_key_mask(model: nn.Module, dropped: dict[int, Tensor], prefix: int):
    """Hooks that hide the dropped tokens as keys in the attention of each block: the definition of a drop."""

    def hook(layer, module, args, kwargs):
        hidden = dropped[layer]
        bias = torch.zeros(hidden.shape[0], 1, 1, hidden.shape[1] + prefix)
        bias[:, 0, 0, prefix:] = torch.where(hidden, -torch.inf, 0.0)
        mask = kwargs.get("attn_mask")
        return args, {**kwargs, "attn_mask": bias if mask is None else mask + bias}

    return [
        model.blocks[layer].attn.register_forward_pre_hook(functools.partial(hook, layer), with_kwargs=True)
        for layer in dropped
    ]


@pytest.mark.parametrize("name", MODELS)
def test_drop_after_a_block_equals_hiding_the_keys_from_then_on(name):
    model, x = build(name), images()
    prefix = TimmHost(model).info.prefix
    method = tokred.ZeroTPrune(schedule={0: (3, 0.9), 2: (2, 0.7)})
    with torch.no_grad():
        with tokred.patch(model, method) as patch:
            actual = model.forward_features(x)
            trace = patch.trace
        alive = {step.layer: step.group >= 0 for step in trace}
        hidden = {layer: ~alive[0] if layer <= 2 else ~alive[2] for layer in range(1, 5)}
        for handle in add_key_mask(model, hidden, prefix):
            assert handle is not None
        full = model.forward_features(x)
    kept = trace[-1].origins + prefix
    everyone = torch.cat([torch.arange(prefix).expand(2, -1), kept], dim=1)
    expected = full.gather(1, everyone[..., None].expand(-1, -1, full.shape[-1]))
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_per_sample(name):
    model, x = build(name), images(3)
    with torch.no_grad():
        for method in methods_for(model):
            with tokred.patch(model, method):
                torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["vit", "layer-scale-qk-norm", "avg-pool-no-cls", "map-pool", "avgmax", "eva02", "dinov3"]
)
def test_merging_exact_copies_changes_nothing(name):
    """Neighbouring patches that are equal, without positions: size bias and size pooling make their merge exact."""
    model = build(name)
    columns = torch.randn(2, 3, 48, 3, 8, generator=torch.Generator().manual_seed(5))
    x = columns[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1).reshape(2, 3, 48, 48)
    model.rope = None
    if model.pos_embed is not None:
        model.pos_embed.data.zero_()
    with torch.no_grad():
        expected = model(x)
        for method in (tokred.ToMe(r=[10]), tokred.ToMe(r=[0, 0, 12])):
            with tokred.patch(model, method) as patch:
                torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-4)
                assert len(patch.trace) == 1
            with tokred.patch(model, method.replace(prop_attn=False)):
                assert (model(x) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["avg-pool-no-cls", "map-pool", "avgmax", "avg-pool-with-cls"])
def test_weighted_pool_can_be_turned_off(name):
    model, x = build(name), images()
    with torch.no_grad():
        with tokred.patch(model, tokred.ToMe(r=[10])):
            weighted = model(x)
            features = model.forward_features(x)
        with tokred.patch(model, tokred.ToMe(r=[10], weighted_pool=False)):
            assert (model(x) - weighted).abs().max() > 1e-4
            plain = model(x)
        torch.testing.assert_close(model.forward_head(features), plain)


@pytest.mark.parametrize("name", ["vit", "vit-no-embed-class-registers", "eva02", "dinov3", "naflex-cls"])
@pytest.mark.parametrize("fill", ["nearest", "zeros"])
def test_feature_maps_come_back_on_the_full_grid(name, fill):
    model, x = build(name), images()
    method = tokred.ZeroTPrune(schedule={1: (3, 0.9), 3: (0, 0.6)})
    with torch.no_grad():
        plain = model.forward_intermediates(x, indices=[0, 2, 4], intermediates_only=True)
        with tokred.patch(model, method, fill=fill) as patch:
            final, maps = model.forward_intermediates(x, indices=[0, 2, 4])
            group = patch.trace[-1].group
            lists = model.forward_intermediates(x, indices=[0, 2, 4], output_fmt="NLC", intermediates_only=True)
    assert [m.shape for m in maps] == [m.shape for m in plain]
    assert [t.shape[1] for t in lists] == [36, 29, 17]
    assert torch.equal(maps[0], plain[0])  # before any reduction
    assert final.shape[1] == 17 + TimmHost(model).info.prefix
    flat = maps[2].flatten(2).transpose(1, 2)
    for image in range(2):
        for cell in range(36):
            slot = group[image, cell]
            if slot >= 0:
                assert torch.equal(flat[image, cell], lists[2][image, slot])
            elif fill == "zeros":
                assert (flat[image, cell] == 0).all()
            else:
                assert (flat[image, cell] == lists[2][image]).all(-1).any()


def test_feature_maps_come_in_the_order_of_the_blocks_however_they_are_asked_for():
    model, x = build("vit"), images()
    with torch.no_grad(), tokred.patch(model, tokred.ZeroTPrune(schedule={2: (3, 0.9)})):
        expected = model.forward_intermediates(x, indices=[0, 4], intermediates_only=True)
        for indices in ([4, 0], [0, 4, 4]):
            maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
            assert len(maps) == 2
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        early = model.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
        assert early[0].shape == (2, 48, 6, 6)
        pairs = model.forward_intermediates(x, indices=[4], intermediates_only=True, return_prefix_tokens=True)
        assert torch.equal(pairs[0][0], expected[1])
        assert pairs[0][1].shape == (2, 1, 48)
        both = model.forward_intermediates(x, indices=[0, 4], output_dict=True)
        assert torch.equal(both["image_intermediates"][1], expected[1])


def test_exit_restore_returns_every_position():
    model, x = build("vit"), images()
    with torch.no_grad(), tokred.patch(model, tokred.ToMe(r=6), exit="restore") as patch:
        features = model.forward_features(x)
        assert features.shape == (2, 37, 48)
        group = patch.trace[-1].group
        for image in range(2):
            for cell in range(36):
                same = group[image] == group[image, cell]
                assert (features[image, 1:][same] == features[image, 1 + cell]).all()
        assert model(x).shape == (2, 7)
    with torch.no_grad(), tokred.patch(model, tokred.ToMe(r=6)) as patch:
        reduced = model.forward_features(x)
        assert torch.equal(patch.unmerge(reduced), features)
        assert torch.equal(patch.unmerge(reduced[:, 1:]), features[:, 1:])
        with pytest.raises(ValueError, match="length 5"):
            patch.unmerge(reduced[:, :5])


def test_features_only_wrapper_gives_full_maps():
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, out_indices=(2, 11)).eval()
    with torch.no_grad(), tokred.patch(model, tokred.ToMe(r=2)) as patch:
        maps = model(images(2, 64))
        assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 4)] * 2
        assert patch.trace.counts[-1][1] < 16


def test_dynamic_image_size():
    model = build("vit-no-embed-class-registers")
    with torch.no_grad(), tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(1,))) as patch:
        for height, width in ((48, 48), (64, 32), (24, 80)):
            model(torch.randn(1, 3, height, width))
            assert patch.trace.grid == (height // 8, width // 8)
            assert patch.trace[0].tokens_out == -(-(height // 8) * (width // 8) // 2)


def naflex_batch(model, sides):
    """A padded batch of images with sides (rows, columns) in patches, and each of them alone."""
    generator = torch.Generator().manual_seed(7)
    length = max(h * w for h, w in sides)
    batch = {
        "patches": torch.zeros(len(sides), length, 8 * 8 * 3),
        "patch_coord": torch.zeros(len(sides), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(sides), length, dtype=torch.bool),
    }
    alone = []
    for row, (h, w) in enumerate(sides):
        n = h * w
        patches = torch.randn(n, 8 * 8 * 3, generator=generator)
        coord = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(n, 2)
        batch["patches"][row, :n], batch["patch_coord"][row, :n], batch["patch_valid"][row, :n] = patches, coord, True
        alone.append({"patches": patches[None], "patch_coord": coord[None], "patch_valid": torch.ones(1, n).bool()})
    return batch, alone


@pytest.mark.parametrize("name", ["naflex-cls", "naflex-rope-map"])
@pytest.mark.parametrize("method", [
    tokred.TopK(keep_rate=0.6, layers=(1, 3), score="mass"), tokred.RandomTokens(keep_rate=0.6, layers=(1, 3))
], ids=["topk", "random"])  # fmt: skip
def test_padded_naflex_batch_equals_each_image_alone(name, method):
    model = build(name)
    batch, alone = naflex_batch(model, [(4, 5), (3, 3), (5, 5)])
    with torch.no_grad(), tokred.patch(model, method) as patch:
        together = model(batch)
        kept = [int(v) for v in patch.trace[1].valid.sum(1)]
        for row, single in enumerate(alone):
            torch.testing.assert_close(together[row : row + 1], model(single), atol=3e-5, rtol=1e-4)
    assert kept == [math.ceil(0.6 * math.ceil(0.6 * n)) for n in (20, 9, 25)]


def test_methods_without_a_ragged_definition_refuse_padding():
    model = build("naflex-cls")
    batch, _ = naflex_batch(model, [(4, 5), (3, 3)])
    for method in (tokred.ToMe(r=2), tokred.ZeroTPrune(schedule={1: (0, 0.5)}), tokred.TopK(layers=(1,), fuse=True)):
        with torch.no_grad(), tokred.patch(model, method), pytest.raises(RaggedInputError, match="padded"):
            model(batch)


def test_class_scores_without_class_token_are_refused():
    with pytest.raises(NoClassTokenError, match="mass"):
        tokred.patch(build("avg-pool-no-cls"), tokred.TopK(layers=(1,)))


def test_causal_attention_is_refused():
    model = build("vit")
    with tokred.patch(model, tokred.TopK(layers=(1,))), pytest.raises(UnsupportedModelError, match="causal"):
        model(images(), is_causal=True)


def test_user_mask_is_kept_and_sliced():
    model, x = build("vit"), images()
    hide = torch.zeros(1, 1, 1, 37)
    hide[..., 20:] = -torch.inf
    with torch.no_grad(), tokred.patch(model, tokred.TopK(keep_rate=0.4, layers=(1,))) as patch:
        model(x, attn_mask=hide)
        assert (patch.trace[0].origins < 19).all()  # hidden tokens receive no attention, so none is kept


@pytest.mark.parametrize("backend", ["recompute", "matrix"])
@pytest.mark.parametrize("method", [
    tokred.TopK(layers=(1, 3), score="mass"), tokred.TopK(layers=(1, 3)), tokred.ZeroTPrune(schedule={1: (4, 0.8)})
], ids=["mass", "cls", "zero"])  # fmt: skip
def test_score_backends_agree(method, backend):
    model, x = build("vit"), images()
    with torch.no_grad():
        with tokred.patch(model, method) as patch:
            expected, kept = model(x), patch.trace[-1].origins
        with tokred.patch(model, method, score_backend=backend) as patch:
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(patch.trace[-1].origins, kept)


def test_classes_that_are_refused_by_block():
    for name in ("vit_base_patch16_224", "vit_small_patch16_224"):
        model = timm.create_model(name, img_size=32, depth=2, num_heads=2, embed_dim=32)
        model.blocks[1] = nn.Identity()
        with pytest.raises(UnsupportedModelError, match="block 1 is a Identity"):
            tokred.patch(model, tokred.ToMe(r=1))
    with torch.device("meta"):
        parallel = timm.create_model("vit_small_patch16_36x1_224", depth=2)
        parallel.blocks[0] = timm.models.vision_transformer.ParallelScalingBlock(384, 6)
    with pytest.raises(UnsupportedModelError, match="parallel"):
        tokred.patch(parallel, tokred.ToMe(r=1))
