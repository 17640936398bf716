"""LookupViT: costs of the specification's tables, its invariants, timm's contract, the drop-in, the video variant."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokred
from tokred.core.errors import (
    AlreadyPatchedError,
    CompiledModelError,
    InvalidParameterError,
    TokredError,
    UnsupportedModelError,
)
from tokred.vision.backbones.lookup_block import (
    LookupBlock,
    check_grid,
    gather_weights,
    infusion_weights,
    lookup_block_macs,
    lookup_scores,
    resize_tokens,
)
from tokred.vision.backbones.lookup_convert import remove_lookup_vit, to_lookup_vit
from tokred.vision.backbones.lookup_video import LookupViViT, VideoLookupEmbed, resize_video_tokens
from tokred.vision.backbones.lookup_vit import LookupForward, LookupViT, MultiResSampler, lookup_vit_macs

NAMES = [f"lookup_vit_{size}" for size in ("tiny", "small", "base", "large")]
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 6}

#: a registered model made small
SMALL: dict[str, Any] = {"img_size": 64, "depth": 4, "compressed_grid": 2}


def tiny(**options: Any) -> Any:
    return LookupViT(**{"compressed_grid": 3, **TINY, **options}).eval()


def tiny_vit(**options: Any) -> Any:
    model: Any = VisionTransformer(**{**TINY, **options})
    for parameter in model.parameters():  # nothing at a start that hides an error, such as LayerScale at 1e-5
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 32, 32)))


def unfused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds that run, attention written out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unfused(model.requires_grad_(False))(*inputs)
    return counter.get_total_flops() // 2


# -- cost ------------------------------------------------------------------------------------------------------------

#: parameters with and without a final infusion, multiply-adds of grids 3, 5, 7, 10 (specification, section 6)
TABLE = {
    "lookup_vit_tiny": (8_737_672, 8_849_704, (441_077_760, 570_384_384, 768_768_000, 1_207_958_784)),
    "lookup_vit_small": (34_063_144, 34_508_392, (1_678_860_288, 2_148_630_528, 2_862_133_248, 4_413_577_728)),
    "lookup_vit_base": (134_480_488, 136_255_720, (6_544_539_648, 8_328_708_096, 11_022_655_488, 16_817_796_096)),
    "lookup_vit_large": (
        477_714_920,
        480_868_328,
        (23_385_931_776, 29_665_263_616, 39_131_447_296, 59_435_094_016),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_of_the_registered_models(name):
    plain, final, macs = TABLE[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        infused = timm.create_model(name, final_infusion=True)
        x = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == plain
    assert sum(p.numel() for p in infused.parameters()) == final
    assert model.compressed_grid == (5, 5)
    for grid, expected in zip((3, 5, 7, 10), macs, strict=True):
        model.set_compressed_grid(grid)
        assert lookup_vit_macs(model) == expected
        if name == "lookup_vit_tiny" or grid == 10:
            assert counted(model, x) == expected


def test_macs_with_final_infusion_and_of_the_plain_vit():
    with torch.device("meta"):
        model = timm.create_model("lookup_vit_base", final_infusion=True)
        vit, x = timm.create_model("vit_base_patch16_224"), torch.empty(1, 3, 224, 224)
    found = []
    for grid in (3, 5, 7, 10):
        model.set_compressed_grid(grid)
        found.append(lookup_vit_macs(model))
    assert found == [6_783_154_176, 8_579_168_256, 11_290_884_096, 17_123_782_656]
    assert counted(vit, x) == 17_563_828_224


@settings(max_examples=25)
@given(
    heads=st.integers(1, 3),
    width=st.integers(2, 9),
    lookup=st.integers(1, 40),
    compressed=st.integers(1, 20),
    p=st.sampled_from([0.5, 2, 3, 4]),
    q=st.sampled_from([1, 1.5, 2, 3, 0.5]),
    reuse=st.sampled_from(["transpose", "resoftmax"]),
    infuse=st.booleans(),
)
def test_block_macs_are_those_that_run(heads, width, lookup, compressed, p, q, reuse, infuse):
    dim = heads * width * 2
    with torch.device("meta"):
        block = LookupBlock(Block(dim, heads, p, qkv_bias=True), lookup_mlp_div=q, reuse=reuse, infuse=infuse)
        zp, zl = torch.empty(2, compressed, dim), torch.empty(2, lookup, dim)
    expected = lookup_block_macs(lookup, compressed, dim, mlp_ratio=p, lookup_mlp_div=q, infuse=infuse)
    assert counted(block, zp, zl) == 2 * expected
    if (p, q, infuse) == (4, 2, True):
        n, m, d = lookup, compressed, dim
        assert expected == (3 * n * m + 2 * m * m) * d + (4 * n + 15 * m) * d * d


def test_macs_grow_with_the_grid_and_with_nothing_else():
    model = tiny()
    cost = {}
    for grid in [(1, 1), (3, 5), (5, 3), (4, 4), (8, 8)]:
        model.set_compressed_grid(grid)
        cost[grid] = lookup_vit_macs(model)
    assert cost[1, 1] < cost[3, 5] == cost[5, 3] < cost[4, 4] < cost[8, 8]
    assert counted(model, image(3, 3, 32, 32)) == 3 * counted(model, image(1, 3, 32, 32))
    for options in ({"infuse_prefix": False}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}):
        model = tiny(final_infusion=True, **options)
        assert counted(model, image(1, 3, 32, 32)) == lookup_vit_macs(model)
    assert lookup_vit_macs(tiny(dynamic_img_size=True), (48, 24)) == lookup_vit_macs(tiny(img_size=(48, 24)))
    with pytest.raises(InvalidParameterError, match="attention pooling"):
        lookup_vit_macs(tiny(global_pool="map"))
    with pytest.raises(InvalidParameterError, match="expected a LookupViT"):
        lookup_vit_macs(tiny_vit())


def test_a_resoftmax_that_is_fused_gives_what_the_written_out_one_gives():
    model = tiny(reuse="resoftmax", final_infusion=True)
    x = image()
    fused = model.forward_intermediates(x, norm=True)
    plain = unfused(copy.deepcopy(model)).forward_intermediates(x, norm=True)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


# -- the block against its slow definition ---------------------------------------------------------------------------


def slow_block(block: Any, zp: Tensor, zl: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The equations of the specification's section 3, one sample, head, and token at a time."""
    heads, gather = block.attn.num_heads, block.gather
    batch, dim = zp.shape[0], zp.shape[2]
    d = dim // heads
    zp, zl = zp.clone(), zl.clone()
    for b in range(batch):
        q = gather.q(gather.norm_p(zp[b]))
        k, v = gather.kv(gather.norm_l(zl[b])).chunk(2, dim=-1)
        scores, gathered = [], torch.zeros_like(zp[b])
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            qh, kh = gather.q_norm(q[:, part]), gather.k_norm(k[:, part])
            if gather.query_scale is not None:
                qh = qh * torch.nn.functional.softplus(gather.query_scale) / torch.tensor(2.0).log()
            s = torch.stack([torch.stack([(qi * kj).sum() / d**0.5 for kj in kh]) for qi in qh])
            scores.append(s)
            for i in range(len(qh)):
                exp = (s[i] - s[i].max()).exp() * (1 if mask is None else mask[b])
                gathered[i, part] = (exp[:, None] * v[:, part]).sum(0) / exp.sum().clamp(min=1e-30)
        zp[b] = zp[b] + gather.proj(gathered)
        zp[b] = zp[b] + block.ls1(block.attn(block.norm1(zp[b : b + 1]))[0])
        zp[b] = zp[b] + block.ls2(block.mlp(block.norm2(zp[b])))
        if block.infuse is None:
            continue
        skipped = block.infuse.prefix
        infused, values = torch.zeros_like(zl[b]), block.infuse.v(block.infuse.norm(zp[b]))
        for h, s in enumerate(scores):
            part = slice(h * d, (h + 1) * d)
            for n in range(zl.shape[1]):
                if block.infuse.reuse == "transpose":
                    exp = (s - s.max(dim=1, keepdim=True).values).exp() * (1 if mask is None else mask[b])
                    row = (exp / exp.sum(dim=1, keepdim=True).clamp(min=1e-30))[skipped:, n]
                else:
                    row = s[skipped:, n].softmax(0)
                infused[n, part] = (row[:, None] * values[skipped:, part]).sum(0)
        zl[b] = zl[b] + block.infuse.proj(infused)
        zl[b] = zl[b] + block.mlp_l(block.norm_l(zl[b]))
    return zp, zl


BLOCKS = {
    "default": {},
    "resoftmax": {"reuse": "resoftmax"},
    "resoftmax without prefix": {"reuse": "resoftmax", "infuse_prefix": False, "prefix": 2},
    "without prefix": {"infuse_prefix": False, "prefix": 1},
    "norms and scale": {"qk_norm": True, "query_scale": "per_dim"},
    "last": {"infuse": False},
    "q=4": {"lookup_mlp_div": 4},
}


def random_block(**options: Any) -> LookupBlock:
    block = LookupBlock(Block(12, 3, qkv_bias=True, init_values=0.5), **options).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_block_is_its_slow_definition(options, masked):
    block, zp, zl = random_block(**options).double(), torch.randn(2, 4, 12).double(), torch.randn(2, 7, 12).double()
    mask = torch.rand(2, 7) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False  # a sample without any lookup token
    got, expected = block(zp, zl, mask), slow_block(block, zp, zl, mask)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)
    assert all(t.isfinite().all() for t in got)
    if not masked:
        torch.testing.assert_close(unfused(block)(zp, zl), expected, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_gradients_of_the_fused_and_the_written_out_block_agree():
    block, zp, zl = random_block(reuse="resoftmax"), torch.randn(1, 4, 12), torch.randn(1, 7, 12)
    found = []
    for model in (block, unfused(copy.deepcopy(block))):
        with torch.enable_grad():
            sum(t.square().sum() for t in model(zp, zl)).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_rows_of_the_attention_and_totals_of_its_reuse():
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4)
    scores = lookup_scores(q, k, 0.5)
    weights = gather_weights(scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    transposed, normalised = infusion_weights(weights), infusion_weights(scores, "resoftmax")
    assert transposed.shape == normalised.shape == (2, 3, 9, 5)
    torch.testing.assert_close(transposed.sum((-2, -1)), torch.full((2, 3), 5.0))
    torch.testing.assert_close(normalised.sum(-1), torch.ones(2, 3, 9))
    values = torch.randn(2, 3, 5, 4)
    expected = F.scaled_dot_product_attention(k, q, values, scale=0.5)
    torch.testing.assert_close(normalised @ values, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_streams_that_are_cut_off_do_not_change():
    block, zp, zl = random_block(), torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    block.infuse.proj.apply(zero)
    block.mlp_l.fc2.apply(zero)
    assert torch.equal(block(zp, zl)[1], zl)
    block.gather.proj.apply(zero)
    assert torch.equal(block(zp, zl)[0], block(zp, torch.randn(2, 7, 12))[0])


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


@pytest.mark.parametrize("reuse", ["transpose", "resoftmax"])
@torch.no_grad()
def test_lookup_tokens_are_a_set_and_masked_ones_as_good_as_deleted(reuse):
    block, zp, zl = random_block(reuse=reuse), torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    order = torch.randperm(7)
    first, second = block(zp, zl), block(zp, zl[:, order])
    torch.testing.assert_close(first[0], second[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[1][:, order], second[1], atol=1e-5, rtol=1e-5)
    keep = torch.tensor([True, False, True, True, False, True, False])
    masked, deleted = block(zp, zl, keep.expand(2, -1)), block(zp, zl[:, keep])
    torch.testing.assert_close(masked[0], deleted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked[1][:, keep], deleted[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_drop_path_drops_each_residual_and_attention_dropout_leaves_the_infusion_alone():
    block = LookupBlock(Block(12, 3, qkv_bias=True, drop_path=0.999999)).train()
    zp, zl = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(block(zp, zl), (zp, zl), strict=True))
    block = LookupBlock(Block(12, 3, qkv_bias=True), attn_drop=0.999999).train()
    update, shared = block.gather(zp, zl)
    torch.testing.assert_close(update, block.gather.proj.bias.expand_as(update))
    torch.testing.assert_close(shared.sum(-1), torch.ones(2, 3, 4))


@torch.no_grad()
def test_half_precision_softmax_runs_in_float32():
    scores = (torch.randn(1, 1, 3, 200) * 4).bfloat16()
    weights = gather_weights(scores)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, scores.float().softmax(-1).bfloat16())
    model, x = tiny(final_infusion=True), image()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.05
    out = model.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.1


# -- the compressed grid ---------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    small=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    antialias=st.booleans(),
    init=st.sampled_from(["bilinear", "avgpool"]),
)
def test_resize_keeps_constants_and_masked_content_out(grid, small, antialias, init):
    n = grid[0] * grid[1]
    constant = torch.randn(1, 1, 5).expand(2, n, 5)
    out = resize_tokens(constant, grid, small, init, antialias)
    torch.testing.assert_close(out, constant[:, :1].expand_as(out), atol=1e-5, rtol=1e-5)
    tokens, mask = torch.randn(2, n, 5), torch.rand(2, n) < 0.7
    first = resize_tokens(tokens, grid, small, init, antialias, mask)
    second = resize_tokens(tokens.masked_fill(~mask[..., None], torch.nan), grid, small, init, antialias, mask)
    if grid != small:
        torch.testing.assert_close(first, second, atol=0, rtol=0)
    whole = resize_tokens(tokens, grid, small, init, antialias, torch.ones_like(mask))
    torch.testing.assert_close(whole, resize_tokens(tokens, grid, small, init, antialias), atol=1e-5, rtol=1e-5)
    assert not resize_tokens(tokens, grid, small, init, antialias, torch.zeros_like(mask)).any()


def test_resize_is_linear_so_positions_may_be_resized_apart():
    content, position = torch.randn(2, 64, 5), torch.randn(1, 64, 5)
    whole = resize_tokens(content + position, (8, 8), (3, 5))
    apart = resize_tokens(content, (8, 8), (3, 5)) + resize_tokens(position, (8, 8), (3, 5))
    torch.testing.assert_close(whole, apart, atol=1e-5, rtol=1e-5)
    assert resize_tokens(content, (8, 8), (8, 8)) is content
    half = content.bfloat16()
    assert torch.equal(resize_tokens(half, (8, 8), (3, 3)), resize_tokens(half.float(), (8, 8), (3, 3)).bfloat16())
    pooled = resize_tokens(content, (8, 8), (4, 2), "avgpool")
    torch.testing.assert_close(pooled[:, 0], content.unflatten(1, (8, 8))[:, :2, :4].mean((1, 2)))


@torch.no_grad()
def test_the_grid_changes_no_parameter_and_any_grid_runs():
    model, x = tiny(), image()
    weights = copy.deepcopy(model.state_dict())
    other = tiny(compressed_grid=(7, 2))
    other.load_state_dict(weights)
    for grid in [(1, 1), (7, 2), 4, (8, 8), (3, 3)]:
        model.set_compressed_grid(grid)
        height, width = check_grid("grid", grid)
        assert model.forward_features(x).shape == (2, 1 + height * width, 32)
    model.set_compressed_grid((7, 2))
    assert torch.equal(model(x), other(x))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with pytest.raises(InvalidParameterError, match="more tokens than the 64"):
        model.set_compressed_grid((9, 8))
    assert model.compressed_grid == (7, 2)
    model.set_compressed_grid((9, 8), allow_larger=True)
    assert model(x).shape == (2, 6)


def test_sampler_draws_every_grid_alike_in_every_process():
    sampler = MultiResSampler(seed=3)
    drawn = [sampler(step) for step in range(400)]
    assert drawn == [MultiResSampler(seed=3)(step) for step in range(400)]
    assert drawn != [MultiResSampler(seed=4)(step) for step in range(400)]
    counts = {grid: drawn.count(grid) for grid in sampler.grids}
    assert set(counts) == {(3, 3), (5, 5), (7, 7), (10, 10)}
    assert min(counts.values()) > 70
    assert MultiResSampler([(2, 3, 3), (2, 5, 5)])(0) in [(2, 3, 3), (2, 5, 5)]
    model = tiny()
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert MultiResSampler([2, (4, 3)]).apply(wrapped, 5) == model.compressed_grid
    features = timm.create_model(
        "lookup_vit_tiny", features_only=True, out_indices=(0,), img_size=32, compressed_grid=1
    )
    assert MultiResSampler([2]).apply(features, 0) == features.model.compressed_grid == (2, 2)
    with pytest.raises(InvalidParameterError, match="Linear has no compressed grid"):
        sampler.apply(nn.Linear(1, 1), 0)
    for wrong in ([], [(0, 3)], ["5x5"], [(3, 3), (2, 3, 3)]):
        with pytest.raises(InvalidParameterError, match="grids"):
            MultiResSampler(wrong)


def test_training_at_random_grids_lowers_the_loss_at_every_grid():
    model, x, y = tiny(depth=2).train(), image(8, 3, 32, 32), torch.arange(8) % 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sampler = MultiResSampler([2, 3, (4, 6)])

    def losses() -> list[float]:
        found = []
        for grid in sampler.grids:
            model.set_compressed_grid(grid)
            found.append(F.cross_entropy(model(x), y).item())
        return found

    before = losses()
    for step in range(25):
        sampler.apply(model, step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(b < 0.5 * a for a, b in zip(before, losses(), strict=True))


# -- options of the model --------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "resoftmax": {"reuse": "resoftmax"},
    "avg without class token": {"class_token": False, "global_pool": "avg"},
    "map": {"global_pool": "map", "class_token": False},
    "registers, LayerScale": {"reg_tokens": 3, "init_values": 0.3, "no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "learned": {"compressed_pos": "learned"},
    "learned, pre_norm": {"compressed_pos": "learned", "pre_norm": True},
    "norms": {"qk_norm": True, "attn_qk_norm": True, "query_scale": "per_dim"},
    "no prefix": {"infuse_prefix": False},
    "avgpool": {"init": "avgpool"},
    "no antialias, q=4": {"antialias": False, "lookup_mlp_div": 4},
    "pool_lookup": {"pool_lookup": True},
    "pool_lookup avg": {"pool_lookup": True, "global_pool": "avg"},
    "dropout": {"drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1},
    "patch dropout": {"patch_drop_rate": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_runs_trains_and_treats_samples_alone(options):
    model = tiny(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = image(3, 3, 32, 32)
    with torch.no_grad():
        out = model(x)
        assert out.isfinite().all()
        single = torch.cat([model(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(out, single, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(out, model.forward_head(model.forward_features(x)), atol=1e-6, rtol=1e-6)
    model.train()
    loss = sum(model(x).square().mean() for _ in range(4))  # drop-path may silence a residual once
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_every_parameter_gets_a_gradient_with_final_infusion_and_lookup_pooling():
    model = tiny(final_infusion=True, pool_lookup=True).train()
    model(image()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model = tiny(final_infusion=True)
    model(image()).sum().backward()
    missing = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None}
    assert missing == {"infuse", "norm_l", "mlp_l"}  # as documented: the head does not read them


@torch.no_grad()
def test_pool_lookup_adds_the_mean_lookup_token():
    model, x = tiny(pool_lookup=True, final_infusion=True), image()
    maps = model.forward_intermediates(x, [2], norm=True, intermediates_only=True)[0]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.pool_lookup = False
    plain = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, plain + maps.mean((2, 3)), atol=1e-5, rtol=1e-5)
    model.pool_lookup = True
    model.reset_classifier(0, "")
    unpooled = model(x)
    model.pool_lookup = False
    assert torch.equal(unpooled, model(x))


@torch.no_grad()
def test_learned_positions_replace_the_resized_ones_and_follow_the_grid():
    model, x = tiny(compressed_pos="learned", compressed_grid=(3, 2)), image()
    assert model.compressed_pos_embed.shape == (1, 6, 32)
    assert "compressed_pos_embed" in model.no_weight_decay()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    content = resize_tokens(model.patch_embed(x), (8, 8), (3, 2))
    torch.testing.assert_close(seen[0][:, 1:], content + model.compressed_pos_embed)
    model.set_compressed_grid(4)
    assert model(x).isfinite().all()


@torch.no_grad()
def test_constant_image_without_positions_gives_uniform_attention():
    model = tiny(final_infusion=True)
    nn.init.zeros_(model.pos_embed)
    x = torch.ones(1, 3, 32, 32)
    zp, zl, _, _ = model._two_streams(x, None, False, None)
    torch.testing.assert_close(zl, zl[:, :1].expand_as(zl))
    torch.testing.assert_close(zp[:, 1:], zl[:, :9])
    _, weights = model.blocks[0].gather(zp, zl)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 64))


@pytest.mark.parametrize(
    "options",
    [{}, {"reuse": "resoftmax"}, {"pool_lookup": True, "final_infusion": True}, {"init": "avgpool"},
     {"compressed_pos": "learned"}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_masked_lookup_tokens_have_no_influence(options):
    model, x = tiny(**options), image()
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :, 6:] = False
    shown = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    out = model(x, lookup_mask=mask)
    noisy = torch.where(shown, x, torch.randn_like(x) * 10)
    assert torch.equal(out, model(noisy, lookup_mask=mask.flatten(1)))
    assert not torch.allclose(out, model(x))
    torch.testing.assert_close(model(x, lookup_mask=torch.ones_like(mask)), model(x), atol=1e-5, rtol=1e-5)
    mask[1] = False
    assert model(x, lookup_mask=mask).isfinite().all()
    maps = model.forward_intermediates(x, lookup_mask=mask, intermediates_only=True)
    assert all(m.isfinite().all() for m in maps)


def test_mask_and_patch_dropout_go_together():
    model, x = tiny(patch_drop_rate=0.5).train(), image()
    mask = torch.rand(2, 64) < 0.5
    seen: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    assert model(x, lookup_mask=mask).isfinite().all()
    zp, zl, kept = seen[0]
    assert zp.shape == (2, 10, 32)
    assert zl.shape == (2, 32, 32)
    whole = model.patch_embed(x) + model.pos_embed[:, 1:]
    for b in range(2):
        where = (zl[b][:, None] - whole[b]).abs().sum(-1).argmin(1)
        assert torch.equal(mask[b][where], kept[b])


# -- timm ------------------------------------------------------------------------------------------------------------


def test_registered_in_timm_and_importing_twice_says_nothing():
    assert set(NAMES) <= set(timm.list_models("lookup_vit*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = importlib.import_module("tokred.vision.backbones.lookup_vit")
    assert again.LookupViT is LookupViT
    assert set(NAMES) <= set(again.__all__)


@pytest.mark.parametrize("name", NAMES[:2])
def test_timm_contract(name):
    small: dict[str, Any] = {"img_size": 64, "depth": 3, "compressed_grid": 2}
    model = timm.create_model(name, num_classes=42, **small).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.default_cfg["classifier"] == "head"
    keys = model.state_dict()
    assert all(f"{model.default_cfg[k]}.weight" in keys for k in ("classifier", "first_conv"))
    assert model.get_classifier() is model.head
    assert model.num_features == model.head_hidden_size == model.embed_dim
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(vit)
    out = model(x)
    assert out.shape == (2, 42)
    model.train()
    model(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 5, model.num_features)
        last, maps = model.forward_intermediates(x)
        torch.testing.assert_close(last, features)
        assert [tuple(m.shape) for m in maps] == [(2, model.num_features, 4, 4)] * 3
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        model.set_grad_checkpointing()
        torch.testing.assert_close(model.forward_features(x), features)
        channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(channels_last, out, atol=1e-5, rtol=1e-5)
        model.reset_classifier(7, "avg")
        assert model(x).shape == (2, 7)
        assert torch.equal(model.forward_features(x), features)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    one = timm.create_model(name, in_chans=1, drop_path_rate=0.2, num_classes=0, **small)
    assert one(torch.randn(2, 1, 64, 64)).shape == (2, one.num_features)
    assert isinstance(timm.create_model(name, pretrained=False, global_pool="avg", **small).fc_norm, nn.LayerNorm)


def test_checkpointing_gives_the_same_gradients():
    model, x = tiny().train(), image()
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_features_only():
    net = timm.create_model("lookup_vit_tiny", features_only=True, **SMALL)
    assert net.feature_info.channels() == [192] * 3
    assert net.feature_info.reduction() == [16] * 3
    maps = net(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 4)] * 3
    maps[-1].square().sum().backward()
    assert all(p.grad is not None for p in net.model.blocks.parameters())  # the last block infuses
    assert not torch.equal(maps[-1], maps[-2])
    pruned = timm.create_model(
        "lookup_vit_tiny", features_only=True, out_indices=(0, 1), img_size=64, depth=4, compressed_grid=2
    )
    assert len(pruned.model.blocks) == 2
    plain = timm.create_model("lookup_vit_tiny", **SMALL)
    assert plain.prune_intermediate_layers([-3], prune_norm=True) == [1]


@torch.no_grad()
def test_intermediates_of_both_streams():
    model, x = tiny(compressed_grid=(3, 5), reg_tokens=1), image()
    features, maps = model.forward_intermediates(x, 2, stream="compressed", norm=True, return_prefix_tokens=True)
    (first, _), (last, prefix) = maps
    assert first.shape == last.shape == (2, 32, 3, 5)
    torch.testing.assert_close(torch.cat([prefix, last.flatten(2).transpose(1, 2)], 1), features)
    as_dict = model.forward_intermediates(x, [0], output_dict=True, return_prefix_tokens=True, output_fmt="NLC")
    assert as_dict["image_intermediates"][0].shape == (2, 64, 32)
    assert as_dict["image_intermediates_prefix"][0].shape == (2, 2, 32)
    assert torch.equal(as_dict["image_features"], model.forward_features(x))
    early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0].flatten(2).transpose(1, 2), as_dict["image_intermediates"][0])
    assert model.get_intermediate_layers(x, n=1, reshape=True)[0].shape == (2, 32, 8, 8)
    for wrong in ({"stream": "both"}, {"output_fmt": "NHWC"}):
        with pytest.raises(InvalidParameterError, match="expected one of"):
            model.forward_intermediates(x, **wrong)


@torch.no_grad()
def test_other_image_sizes():
    model = tiny(dynamic_img_size=True, final_infusion=True)
    x = image(2, 3, 40, 24)
    assert model(x).shape == (2, 6)
    assert model.forward_intermediates(x, 1, intermediates_only=True)[0].shape == (2, 32, 10, 6)
    padded = tiny(dynamic_img_size=True, dynamic_img_pad=True)
    assert padded.forward_intermediates(image(1, 3, 33, 30), 1, intermediates_only=True)[0].shape == (1, 32, 9, 8)
    model = tiny()
    model.set_input_size((48, 24))
    assert model(image(1, 3, 48, 24)).shape == (1, 6)


def test_checkpoint_file_of_the_model_and_a_plain_vit_checkpoint(tmp_path):
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2}
    build = functools.partial(timm.create_model, "lookup_vit_tiny", compressed_grid=3, **sizes)
    model = build().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = timm.create_model(
        "lookup_vit_tiny", checkpoint_path=str(tmp_path / "weights.pth"), compressed_grid=3, **sizes
    ).eval()
    x = image()
    assert torch.equal(loaded(x), model(x))
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    report = model.load_state_dict(vit.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert {key.split(".")[2] for key in report.missing_keys} == {"gather", "infuse", "norm_l", "mlp_l"}
    model.init_new_weights("zero")
    model.set_compressed_grid((4, 4))
    torch.testing.assert_close(model(x), vit(x), atol=2e-5, rtol=0)
    assert set(vit.state_dict()) < set(model.state_dict())


@torch.no_grad()
def test_compiles_into_one_graph():
    model, x = tiny(depth=2), image()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for grid in (3, (4, 2)):
        model.set_compressed_grid(grid)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exports_with_any_batch():
    model, x = tiny(depth=2, reuse="resoftmax", final_infusion=True), image()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    y = image(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(y), model(y), atol=1e-5, rtol=1e-5)


def test_meta_device_and_init_modes():
    with torch.device("meta"):
        model = tiny(query_scale="per_dim", compressed_pos="learned")
    model = model.to_empty(device="cpu")
    model.init_weights()
    assert not model.blocks[0].gather.query_scale.any()
    assert model(image()).isfinite().all()
    for mode in ("skip", "reset", "jax", "jax_nlhb", "moco"):
        model = tiny(weight_init=mode)
        if mode == "skip":
            model.init_weights()
        assert model(image()).isfinite().all()
    model = tiny()
    assert model.blocks[0].gather.kv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.blocks[0].gather.kv.bias.any()


# -- the drop-in -----------------------------------------------------------------------------------------------------

HOSTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers, LayerScale, no_embed_class": {"reg_tokens": 2, "init_values": 1e-1, "no_embed_class": True},
    "qk_norm, avg, no class token": {"qk_norm": True, "global_pool": "avg", "class_token": False},
    "pre_norm": {"pre_norm": True},
    "map": {"global_pool": "map", "class_token": False},
    "avg": {"global_pool": "avg"},
    "drop-path, no qkv bias": {"drop_path_rate": 0.3, "qkv_bias": False},
    "no positions": {"pos_embed": "none"},
    "swiglu": {"mlp_layer": timm.layers.SwiGLUPacked},
}


def hand_vit(model: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The plain ViT, run by hand on prefix tokens and the resized grid."""
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    prefix, cells = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
    rows, columns = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    small = F.interpolate(
        cells.transpose(1, 2).reshape(len(x), -1, rows, columns), grid, mode="bilinear", antialias=True
    )
    z = torch.cat([prefix, small.flatten(2).transpose(1, 2)], 1)
    return model.forward_head(model.norm(model.blocks(z)))


@pytest.mark.parametrize("options", HOSTS.values(), ids=HOSTS)
@torch.no_grad()
def test_drop_in_is_the_vit_on_the_resized_grid(options):
    model, x = tiny_vit(**options), image()
    before, weights, cls = model(x), copy.deepcopy(model.state_dict()), type(model)
    by_hand = {grid: hand_vit(model, x, grid) for grid in [(3, 3), (5, 2)]}
    owned = dict(model.named_parameters())
    count = sum(p.numel() for p in model.parameters())
    assert to_lookup_vit(model, grid=(8, 8)) is model
    assert (model(x) - before).abs().max() < 2e-5
    d, depth = 32, 3
    if options.get("qkv_bias", True):
        added = sum(p.numel() for p in model.parameters()) - count
        assert added == depth * (7 * d * d + 15.5 * d) - (3 * d * d + 7.5 * d)
    for grid, expected in by_hand.items():
        model.set_compressed_grid(grid)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    now = dict(model.named_parameters())
    assert all(now[key] is p for key, p in owned.items())
    assert type(model).__name__ == cls.__name__
    assert type(model).__module__ == cls.__module__
    assert isinstance(model, cls)
    with pytest.raises(AlreadyPatchedError, match="LookupViT already"):
        to_lookup_vit(model)
    assert remove_lookup_vit(model) is model
    assert type(model) is cls
    assert list(model.state_dict()) == list(weights)
    assert torch.equal(model(x), before)
    assert not [name for name in vars(model) if "compressed" in name or name == "antialias"]


@torch.no_grad()
def test_drop_in_on_other_image_sizes_and_the_released_vit():
    model, x = tiny_vit(dynamic_img_size=True), image(2, 3, 40, 24)
    before = model(x)
    to_lookup_vit(model, (10, 6))
    assert (model(x) - before).abs().max() < 2e-5
    vit = timm.create_model("vit_small_patch16_224", depth=2).eval()
    x = image(1, 3, 224, 224)
    before = vit(x)
    to_lookup_vit(vit, (14, 14))
    assert (vit(x) - before).abs().max() < 2e-5
    vit.set_compressed_grid(5)
    assert counted(vit, x) == lookup_vit_macs(vit)


@pytest.mark.parametrize("mode", ["zero", "copy", "random"])
def test_drop_in_trains_and_its_weights_load_into_another(mode):
    options = {"lookup_mlp_div": 4, "reuse": "resoftmax", "final_infusion": mode == "copy"}
    model = to_lookup_vit(tiny_vit(), 3, mode, **options)
    x = image()
    model.train()
    model(x).sum().backward()
    unused = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None}
    assert unused == ({"infuse", "norm_l", "mlp_l"} if mode == "copy" else set())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    model.eval()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = to_lookup_vit(tiny_vit(), 3, mode, **options)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(model(x), other(x))
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    remove_lookup_vit(model)  # fine-tuned weights stay
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_copy_and_zero_starts_are_the_specified_ones():
    model = to_lookup_vit(tiny_vit(), 3, "copy")
    block = model.blocks[0]
    qkv, proj = block.attn.qkv, block.attn.proj
    for ours, theirs in [
        (block.gather.q, (qkv.weight[:32], qkv.bias[:32])),
        (block.gather.kv, (qkv.weight[32:], qkv.bias[32:])),
        (block.infuse.v, (qkv.weight[64:], qkv.bias[64:])),
        (block.gather.proj, (proj.weight, proj.bias)),
        (block.infuse.proj, (proj.weight, proj.bias)),
        (block.gather.norm_p, (block.norm1.weight, block.norm1.bias)),
        (block.gather.norm_l, (block.norm1.weight, block.norm1.bias)),
        (block.infuse.norm, (block.norm1.weight, block.norm1.bias)),
        (block.norm_l, (block.norm2.weight, block.norm2.bias)),
    ]:
        assert torch.equal(ours.weight, theirs[0])
        assert torch.equal(ours.bias, theirs[1])
    assert not block.mlp_l.fc2.weight.any()
    assert block.mlp_l.fc1.weight.any()
    model.init_new_weights("zero")
    assert not block.gather.proj.weight.any()
    assert not block.infuse.proj.bias.any()
    with pytest.raises(InvalidParameterError, match="init="):
        model.init_new_weights("ones")


def test_drop_in_of_a_frozen_half_precision_model_and_gradient_checkpointing():
    model = tiny_vit().requires_grad_(False).bfloat16()
    to_lookup_vit(model, 3, "copy")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if name.split(".")[2] not in ("gather", "infuse", "norm_l", "mlp_l")]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = to_lookup_vit(tiny_vit(), 3, "copy")
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(torch.ones(1, 3, 32, 32)).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_copies_and_pickles_of_a_converted_model():
    model, x = tiny_vit(), image()
    before = model(x)
    to_lookup_vit(model, 3, "copy")
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert type(made) is type(model)
        assert torch.equal(made(x), expected)
        assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in model.parameters()}
        made.set_compressed_grid(2)
        assert torch.equal(remove_lookup_vit(made)(x), before)
        assert torch.equal(model(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    model.prune_intermediate_layers([0])
    remove_lookup_vit(model)
    assert [type(block) for block in model.blocks] == [Block]


@torch.no_grad()
def test_drop_in_keeps_subclasses_that_only_change_ends():
    model = timm.models.deit.VisionTransformerDistilled(**TINY).eval()
    x = image()
    before = model(x)
    to_lookup_vit(model, 8)
    assert (model(x) - before).abs().max() < 2e-5


@torch.no_grad()
def test_patch_dropout_leaves_the_compressed_tokens_whole():
    model = to_lookup_vit(tiny_vit(patch_drop_rate=0.75, pre_norm=True), (3, 3)).train()
    seen: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    x = image()
    model(x)
    model.eval()(x)
    assert seen[0][1].shape == (2, 16, 32)
    torch.testing.assert_close(seen[0][0], seen[1][0])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressed_grid": 0}, "compressed_grid=0"),
        ({"compressed_grid": (3, 3, 3)}, "compressed_grid"),
        ({"compressed_grid": (2.5, 3)}, "compressed_grid"),
        ({"compressed_grid": True}, "compressed_grid"),
        ({"compressed_grid": "33"}, "compressed_grid"),
        ({"num_heads": 5}, "divisor of embed_dim=32"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"depth": 0}, "depth=0"),
        ({"img_size": 30}, "patches of 4 x 4 do not divide"),
        ({"img_size": (32, 2)}, "do not divide"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"lookup_mlp_div": 0}, "lookup_mlp_div=0"),
        ({"lookup_mlp_div": 33}, "lookup_mlp_div=33"),
        ({"reuse": "softmax"}, "'transpose', 'resoftmax'"),
        ({"init": "nearest"}, "'bilinear', 'avgpool'"),
        ({"compressed_pos": "none"}, "'resize', 'learned'"),
        ({"query_scale": "one"}, "'fixed', 'per_dim'"),
        ({"global_pool": "sum"}, "global_pool='sum'"),
        ({"class_token": False}, "without a class token"),
        ({"pool_lookup": True, "global_pool": "map"}, "pool_lookup"),
        ({"pool_lookup": True, "global_pool": ""}, "pool_lookup"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(InvalidParameterError, match=message):
        tiny(**options)


def test_wrong_inputs_and_unknown_options():
    model = tiny()
    for shape in [(2, 3, 33, 32), (2, 3, 16, 16), (3, 32, 32)]:
        with pytest.raises(InvalidParameterError, match=r"\d"):
            model(image(*shape))
    with pytest.raises(InvalidParameterError, match="patches of 4 x 4 do not divide"):
        tiny(dynamic_img_size=True)(image(1, 3, 34, 32))
    for arguments in ({"attn_mask": torch.ones(10, 10)}, {"is_causal": True}):
        with pytest.raises(InvalidParameterError, match="two streams"):
            model(image(), **arguments)
    for mask in (torch.ones(2, 63, dtype=torch.bool), torch.ones(2, 64), torch.ones(64, dtype=torch.bool)):
        with pytest.raises(InvalidParameterError, match="lookup_mask of shape"):
            model(image(), lookup_mask=mask)
    with pytest.raises(InvalidParameterError, match="compressed_grid"):
        model.set_compressed_grid((3, -1))
    with pytest.raises(TypeError, match="grids"):
        tiny(grids=3)
    with pytest.raises(UnsupportedModelError, match="ParallelScalingBlock"):
        tiny(block_fn=ParallelScalingBlock)


class OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward_features(x, **kwargs) * 2


def test_models_that_cannot_be_converted_stay_as_they_are():
    def refused(model: Any, error: type[TokredError], message: str) -> None:
        blocks, cls, keys = (
            list(model.blocks) if hasattr(model, "blocks") else [],
            type(model),
            list(model.state_dict()),
        )
        with pytest.raises(error, match=message):
            to_lookup_vit(model)
        assert type(model) is cls
        assert list(model.state_dict()) == keys
        assert blocks == list(getattr(model, "blocks", []))

    refused(nn.Linear(1, 1), UnsupportedModelError, "Linear: expected a VisionTransformer")
    refused(timm.create_model("resnet10t"), UnsupportedModelError, "expected a VisionTransformer")
    refused(tiny(), AlreadyPatchedError, "LookupViT already")
    refused(tiny_vit(block_fn=ParallelScalingBlock), UnsupportedModelError, "ParallelScalingBlock")
    refused(tiny_vit(attn_layer="diff", embed_dim=64), UnsupportedModelError, "DiffAttention")
    refused(OwnFeatures(**TINY), UnsupportedModelError, "its own forward_features")
    mixed = tiny_vit()
    mixed.blocks[1] = ParallelScalingBlock(32, 4)
    refused(mixed, UnsupportedModelError, "ParallelScalingBlock")
    hooked = tiny_vit()
    hooked.blocks[2].register_forward_hook(lambda *call: None)
    refused(hooked, UnsupportedModelError, "hooks")
    wrapped = tiny_vit()
    wrapped.forward = wrapped.forward
    refused(wrapped, UnsupportedModelError, "its own forward")
    compiled = tiny_vit()
    compiled.compile(backend="eager")
    refused(compiled, CompiledModelError, "convert it first")
    patched = tiny_vit()
    with tokred.patch(patched, tokred.ToMe(r=2)), pytest.raises(UnsupportedModelError, match="undo a patch"):
        to_lookup_vit(patched)
    with pytest.raises(UnsupportedModelError, match="expected a model made by"):
        remove_lookup_vit(tiny())
    for options in ({"grid": 0}, {"init": "ones"}, {"reuse": "no"}, {"compressed_init": "no"}, {"lookup_mlp_div": -1}):
        model = tiny_vit()
        with pytest.raises(InvalidParameterError):
            to_lookup_vit(model, **options)
        assert not isinstance(model, LookupForward)
        assert all(type(block) is Block for block in model.blocks)


@pytest.mark.parametrize("model", [lambda: tiny(), lambda: to_lookup_vit(tiny_vit(), 3)], ids=["model", "drop-in"])
def test_methods_for_plain_vits_refuse_two_streams(model):
    with pytest.raises(UnsupportedModelError, match="LookupBlock"):
        tokred.patch(model(), tokred.ToMe(r=2))


# -- video -----------------------------------------------------------------------------------------------------------

VIDEO: dict[str, Any] = {"video_size": (8, 32, 32), "tubelet": (2, 8, 8), "embed_dim": 24, "depth": 2, "num_heads": 3}


@torch.no_grad()
def test_video_resize_is_trilinear_and_leaves_equal_lengths_alone():
    tokens = torch.randn(2, 4 * 6 * 5, 7)
    out = resize_video_tokens(tokens, (4, 6, 5), (3, 2, 4), antialias=False)
    cube = tokens.transpose(1, 2).reshape(2, 7, 4, 6, 5)
    expected = F.interpolate(cube, (3, 2, 4), mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert resize_video_tokens(tokens, (4, 6, 5), (4, 6, 5)) is tokens
    frames = resize_video_tokens(tokens, (4, 6, 5), (4, 3, 3)).unflatten(1, (4, 9))
    for t in range(4):
        alone = resize_tokens(tokens.unflatten(1, (4, 30))[:, t], (6, 5), (3, 3))
        torch.testing.assert_close(frames[:, t], alone, atol=1e-5, rtol=1e-5)


def test_video_model():
    model = LookupViViT(**VIDEO, num_classes=5, compressed_grid=(4, 2, 2), drop_path_rate=0.1)
    x = torch.randn(2, 3, 8, 32, 32)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 17, 24)
        assert torch.equal(model(x), model.forward_head(features))
        assert model.forward_head(features, pre_logits=True).shape == (2, 24)
        model.set_grad_checkpointing()
        assert torch.equal(model.forward_features(x), features)
        model.set_compressed_grid((2, 3, 1))
        assert model.forward_features(x).shape == (2, 7, 24)
        assert counted(model, x) == 2 * model.macs()
        zl, zp = model.embed(x), model.embed.compress(model.embed(x), (2, 3, 1))
        zp = torch.cat([model.cls_token.expand(2, -1, -1), zp], 1)
        for block in model.blocks:
            zp, zl = block(zp, zl)
        assert torch.equal(model.forward_features(x), model.norm(zp))
    MultiResSampler([(4, 2, 2)]).apply(model, 0)
    assert model.compressed_grid == (4, 2, 2)
    avg = LookupViViT(**VIDEO, num_classes=0, global_pool="avg", reuse="resoftmax", final_infusion=True)
    assert avg.compressed_grid == (4, 4, 4)
    assert avg(x).shape == (2, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_size": (7, 32, 32)}, "do not divide"),
        ({"num_heads": 5}, "divisor of embed_dim=24"),
        ({"compressed_grid": (2, 2)}, "compressed_grid"),
        ({"global_pool": "map"}, "global_pool"),
        ({"reuse": "no"}, "reuse"),
        ({"depth": 0}, "depth"),
    ],
    ids=str,
)
def test_wrong_video_options(options, message):
    with pytest.raises(InvalidParameterError, match=message):
        LookupViViT(**{**VIDEO, **options})
    with pytest.raises(InvalidParameterError, match="expected"):
        VideoLookupEmbed((8, 32, 32), (2, 8, 8))(torch.randn(1, 3, 8, 16, 32))
