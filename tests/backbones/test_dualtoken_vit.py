"""DualToken-ViT (tokred reconstruction): the exact sizes of its specification, its invariants, slow definitions of its
parts, its switches, and timm's contract."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import set_fused_attn
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokred.core.errors import InvalidParameterError, UnknownParameterError
from tokred.vision.backbones import dualtoken_vit
from tokred.vision.backbones.dualtoken_block import (
    BiDimMlp,
    DualTokenBlock,
    Merge,
    SeparableStep,
    Switches,
    TokenAttention,
)
from tokred.vision.backbones.dualtoken_vit import DualTokenViT

NAMES = ("dualtoken_vit_tiny", "dualtoken_vit_small", "dualtoken_vit_small_mlp")
TINY: dict[str, Any] = {
    "embed_dims": (8, 16, 24),
    "depths": (1, 1, 2),
    "num_heads": (2, 2, 4),
    "mlp_ratios": (2, 2, 2),
    "kernel": 3,
    "global_tokens": (2, 2),
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
#: one other value of every switch (and what it needs beside it)
OTHER: list[dict[str, Any]] = [
    {"conv_ratio": 3.0},
    {"kernel": 5},
    {"global_tokens": (2, 3)},
    {"g_mlp": "mlp"},
    {"g_mlp": "mlp", "g_ratio": 2.0},
    {"mix_order": "token_first"},
    {"alpha": 0.0},
    {"alpha": 1.0},
    {"alpha": "learned"},
    {"enrich": "sum"},
    {"enrich": "sum", "alpha": 0.0},
    {"enrich": "sum", "alpha": 1.0},
    {"enrich": "sum", "alpha": "learned"},
    {"steps": "one"},
    {"down_step": "dense"},
    {"agg_norm": "post"},
    {"agg_residual": True},
    {"agg_norm": "post", "agg_residual": True},
    {"fusion": "concat"},
    {"resize": "bicubic"},
    {"resize": "nearest"},
    {"resize": "area"},
    {"init_values": 0.1},
    {"neck_dim": 40},
    {"head_tokens": "all"},
    {"head_tokens": "all", "alpha": 0.0},
    {"head_tokens": "all", "neck_dim": 40},
    {"drop_path_on": "ffn", "drop_path_rate": 0.2},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "default"


def tiny(**options: Any) -> DualTokenViT:
    """A small model in eval mode whose layers all matter: no weight near zero, no BatchNorm at its start."""
    torch.manual_seed(1)
    model = DualTokenViT(**{**TINY, **options}).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            scale = 1.0 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            near = 1.0 if tensor.ndim == 1 and not name.endswith("bias") and "mean" not in name else 0.0
            with torch.no_grad():
                tensor.copy_(near + (0.2 if near else scale) * torch.randn_like(tensor))
                if near:
                    tensor.abs_().clamp_(min=0.2)
    return model


@contextmanager
def explicit_attention() -> Iterator[None]:
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(True)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(make: Any, size: tuple[int, int] = (224, 224)) -> int:
    with explicit_attention(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = make().eval().requires_grad_(False)
        model(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


# -- sizes (sections 5 and 10) ---------------------------------------------------------------------------------------

TARGETS = [
    ("dualtoken_vit_tiny", {}, 6_175_981, 531_277_504),
    ("dualtoken_vit_small", {}, 11_823_026, 1_010_818_432),
    ("dualtoken_vit_small_mlp", {}, 12_290_870, 1_029_465_088),
    ("dualtoken_vit_tiny", {"g_mlp": "mlp"}, 6_409_903, 540_600_832),
]


@pytest.mark.parametrize(("name", "options", "params", "expected"), TARGETS)
def test_exact_parameters_and_macs(name: str, options: dict[str, Any], params: int, expected: int) -> None:
    with torch.device("meta"):
        assert parameters(timm.create_model(name, **options)) == params
    assert macs(lambda: timm.create_model(name, **options)) == expected


def test_sizes_of_the_modules() -> None:
    with torch.device("meta"):
        model = timm.create_model("dualtoken_vit_small")
        assert parameters(model.patch_embed) == 20_608
        assert model.global_token.numel() == 3_136
        assert [parameters(stage.downsample) for stage in model.stages[1:]] == [49_792, 197_888]
        assert [parameters(stage.blocks[0]) for stage in model.stages] == [139_603, 387_219, 1_448_595]
        assert [parameters(stage.blocks[0].down) for stage in model.stages] == [9_856, 18_048, 0]
        assert (parameters(model.norm), parameters(model.head)) == (512, 257_000)
        one = timm.create_model("dualtoken_vit_small", steps="one")
        assert parameters(model) - parameters(one) == 128_000
        necked = timm.create_model("dualtoken_vit_small", neck_dim=1280)
        assert round(parameters(necked) / 1e6, 1) == 13.2


def cost(
    size: tuple[int, int],
    *,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    ratios: tuple[int, ...],
    k: int = 7,
    e: int = 2,
    t: int = 49,
    f: str = "mix",
    classes: int = 1000,
) -> int:
    """Section 10, term by term."""

    def halved(side: int, times: int) -> int:
        for _ in range(times):
            side = -(-side // 2)
        return side

    area = {level: halved(size[0], level) * halved(size[1], level) for level in range(1, 6)}
    d = dims[0] // 2
    total = 45 * d * area[1] + 9 * d * area[2] + 9 * d * dims[0] * area[3] + dims[2] * classes
    for stage, (c, depth, ratio) in enumerate(zip(dims, depths, ratios, strict=True)):
        n, m = area[3 + stage], 2 - stage
        block = n * (k * k * c + 2 * e * c * c)
        block += sum(4 ** (m - step) * t * (9 * c + c * c) for step in range(m))
        block += 4 * t * c * c + 2 * t * t * c
        block += 2 * t * c * c if f == "mlp" else t * c * c + t * t * c
        block += 2 * n * c * c + 2 * t * c * c + 2 * n * t * c
        block += n * c * c * 2 * ratio + n * c * c // 4 + c * c // 2 + n * c // 2
        total += depth * block
        if stage:
            total += n * 5 * dims[stage - 1] * c + t * dims[stage - 1] * c
    return total


def test_the_cost_formula_is_the_count() -> None:
    small = {"dims": (64, 128, 256), "depths": (2, 6, 6), "ratios": (8, 4, 4)}
    assert cost((224, 224), **small) == 1_010_818_432
    assert cost((224, 224), **small, f="mlp") == 1_029_465_088
    shallow = {**small, "depths": (1, 3, 3)}
    for size in ((320, 480), (97, 130)):
        assert macs(lambda: timm.create_model("dualtoken_vit_tiny"), size) == cost(size, **shallow)
    # Linear in the tokens of the image: the parts that do not grow cancel out.
    at = [cost((32 * n, 32), **small) for n in (4, 8, 12)]
    assert at[2] - at[1] == at[1] - at[0]


@settings(max_examples=3)
@given(
    width=st.sampled_from([8, 16]),
    depths=st.tuples(*[st.integers(1, 2)] * 3),
    ratio=st.integers(1, 3),
    k=st.sampled_from([1, 3, 5]),
    e=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    f=st.sampled_from(["mix", "mlp"]),
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
)
def test_the_cost_formula_at_other_configurations(
    width: int, depths: Any, ratio: int, k: int, e: int, grid: Any, f: str, size: Any
) -> None:
    dims, ratios = (width, 2 * width, 3 * width), (ratio, ratio, ratio)
    options = {"embed_dims": dims, "depths": depths, "num_heads": (2, 2, 2), "mlp_ratios": ratios, "kernel": k}
    options |= {"conv_ratio": e, "global_tokens": grid, "g_mlp": f, "num_classes": 7}
    expected = cost(size, dims=dims, depths=depths, ratios=ratios, k=k, e=e, t=math.prod(grid), f=f, classes=7)
    assert macs(lambda: DualTokenViT(**options), size) == expected


# -- slow definitions ------------------------------------------------------------------------------------------------


def slow_attention(layer: TokenAttention, x: Tensor, context: Tensor) -> Tensor:
    """One head and one query at a time."""
    dim = x.shape[-1]
    width = dim // layer.num_heads
    q, kv = layer.q(x), layer.kv(context)
    k, v = kv[..., :dim], kv[..., dim:]
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for head in range(layer.num_heads):
            channels = slice(head * width, (head + 1) * width)
            for i in range(x.shape[1]):
                row = torch.softmax(k[b, :, channels] @ q[b, i, channels] / math.sqrt(width), dim=0)
                assert row.sum().item() == pytest.approx(1)
                out[b, i, channels] = row @ v[b, :, channels]
    return layer.proj(out)


@pytest.mark.parametrize("fused", [True, False])
def test_attention(fused: bool) -> None:
    layer = TokenAttention(12, 3).double()
    layer.fused_attn = fused
    x, context = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    torch.testing.assert_close(layer(x, context), slow_attention(layer, x, context))
    torch.testing.assert_close(layer(x), slow_attention(layer, x, x))
    # Rows sum to 1: values that do not depend on the token come out as they are.
    with torch.no_grad():
        layer.kv.weight[12:] = 0
    torch.testing.assert_close(layer(x, context), layer.proj(layer.kv.bias[12:]).expand(2, 5, 12))


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_merge(size: tuple[int, int]) -> None:
    merge = Merge(6, 10).double()
    x, g = torch.randn(2, *size, 6).double(), torch.randn(2, 3, 6).double()
    h, w = (-(-side // 2) for side in size)
    padded = torch.zeros(2, 2 * h, 2 * w, 6).double()
    padded[:, : size[0], : size[1]] = x
    expected = torch.zeros(2, h, w, 10).double()
    for i in range(h):
        for j in range(w):
            four = [padded[:, 2 * i + di, 2 * j + dj] for di, dj in ((0, 0), (1, 0), (0, 1), (1, 1))]
            long = F.layer_norm(torch.cat(four, dim=-1), (24,), merge.norm.weight, merge.norm.bias, 1e-5)
            expected[:, i, j] = long @ merge.reduction.weight.T
            expected[:, i, j] += torch.stack(four).amax(dim=0) @ merge.res_proj.weight.T
    merged, tokens = merge(x, g)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(tokens, merge.proj(merge.norm2(g)))


def slow_bidim(mlp: BiDimMlp, x: Tensor) -> Tensor:
    y, attn = mlp.fc2(F.gelu(mlp.fc1(x))), mlp.attn
    normed, out = attn.norm(y), torch.zeros_like(y)
    for b in range(len(x)):
        whole = F.gelu(attn.global_reduce(normed[b].mean(dim=0)))
        channel = torch.sigmoid(attn.channel_select(whole))
        for i in range(x.shape[1]):
            local = F.gelu(attn.local_reduce(normed[b, i]))
            out[b, i] = y[b, i] * channel * torch.sigmoid(attn.spatial_select(torch.cat([local, whole])))
    return out


def test_bidirectional_ffn() -> None:
    mlp = BiDimMlp(8, 20)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mlp(x), slow_bidim(mlp, x))
    for layer in (mlp.attn.channel_select, mlp.attn.spatial_select):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(mlp(x), 0.25 * mlp.fc2(F.gelu(mlp.fc1(x))))


def slow_step(step: SeparableStep, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    padded, conv = F.pad(x, (1, 1, 1, 1)), torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            conv[:, :, i, j] = (padded[:, :, i : i + 3, j : j + 3] * step.dw.weight[:, 0]).sum(dim=(2, 3))

    def normal(y: Tensor, bn: torch.nn.BatchNorm2d) -> Tensor:
        view = (1, c, 1, 1)
        y = (y - bn.running_mean.view(view)) / torch.sqrt(bn.running_var.view(view) + bn.eps)
        return y * bn.weight.view(view) + bn.bias.view(view)

    y = normal(torch.einsum("oc,bchw->bohw", step.pw.weight[..., 0, 0], F.gelu(normal(conv, step.bn1))), step.bn2)
    return y.view(b, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
@pytest.mark.parametrize(
    "options",
    [{}, {"g_mlp": "mlp", "g_ratio": 2.0}, {"mix_order": "token_first"}, {"enrich": "sum", "alpha": 0.3}],
    ids=label,
)
def test_block(options: dict[str, Any], size: tuple[int, int]) -> None:
    model = tiny(**options)
    block, switches = model.stages[0].blocks[0].double(), model.switches
    x, g = torch.randn(2, *size, 8).double(), torch.randn(2, 4, 8).double()

    enc = block.conv_enc
    branch = enc.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    local = x + enc.pw2(F.gelu(enc.pw1(enc.norm(branch))))
    down = local.permute(0, 3, 1, 2)
    if size != (8, 8):
        down = F.interpolate(down, (8, 8), mode="bilinear", align_corners=False)
    for step in block.down:
        down = slow_step(step, down)
    normed = block.norm_ds(down.flatten(2).transpose(1, 2))
    x_ga = slow_attention(block.agg, normed, normed)

    def f(t: Tensor) -> Tensor:
        if switches.g_mlp == "mlp":
            return block.g_mlp.fc2(F.gelu(block.g_mlp.fc1(t)))
        mixed = torch.zeros_like(t)
        channels, tokens = block.g_mlp.fc_c, block.g_mlp.fc_t
        inner = F.gelu(channels(t)) if switches.mix_order == "channel_first" else t
        for channel in range(t.shape[-1]):
            mixed[..., channel] = tokens(inner[..., channel])
        return mixed if switches.mix_order == "channel_first" else channels(F.gelu(mixed))

    alpha = switches.alpha
    g_new = alpha * f(g) + (1 - alpha) * x_ga if switches.enrich == "tokens" else f(alpha * g + (1 - alpha) * x_ga)
    y = local.flatten(1, 2)
    y = y + slow_attention(block.bcast, block.norm_q(y), block.norm_kv(g_new))
    y = y + slow_bidim(block.mlp, block.norm2(y))
    got_x, got_g = block(x, g)
    torch.testing.assert_close(got_x, y.view_as(x))
    torch.testing.assert_close(got_g, g_new)


def test_resize_is_skipped_where_the_map_matches() -> None:
    block = tiny().stages[0].blocks[0]
    assert block.grid == (8, 8)
    x = torch.randn(1, 8, 8, 8)
    assert block.resized(x) is x
    assert block.resized(torch.randn(1, 8, 9, 8)).shape == (1, 8, 8, 8)


# -- invariants (section 13) -----------------------------------------------------------------------------------------


def test_without_broadcast_the_block_ignores_the_global_tokens() -> None:
    block = tiny().stages[0].blocks[0]
    torch.nn.init.zeros_(block.bcast.proj.weight)
    x = torch.randn(2, 8, 8, 8)
    one, _ = block(x, torch.randn(2, 4, 8))
    other, _ = block(x, torch.randn(2, 4, 8))
    assert torch.equal(one, other)


def test_alpha_one_does_not_see_the_image_and_alpha_zero_not_the_tokens() -> None:
    block, g = tiny(alpha=1).stages[0].blocks[0], torch.randn(2, 4, 8)
    assert torch.equal(block(torch.randn(2, 8, 8, 8), g)[1], block(torch.randn(2, 8, 8, 8), g)[1])
    model = tiny(alpha=0)
    block, x = model.stages[0].blocks[0], torch.randn(2, 8, 8, 8)
    assert torch.equal(block(x, g)[0], block(x, None)[0])
    assert model.global_token is None
    assert "global_token" not in model.state_dict()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("enrich", ["tokens", "sum"])
def test_the_ends_of_alpha_are_its_limits(alpha: float, enrich: str) -> None:
    """The model that leaves parts out equals the complete one with the same weights and alpha next to 0 or 1."""
    model = tiny(alpha=alpha, enrich=enrich).double()
    whole = tiny(alpha=abs(alpha - 1e-9), enrich=enrich).double()
    missing, unexpected = whole.load_state_dict(model.state_dict(), strict=False)
    assert missing
    assert not unexpected
    x = torch.randn(2, 3, 64, 64).double()
    torch.testing.assert_close(model(x), whole(x), atol=1e-6, rtol=1e-6)


def test_learned_alpha_starts_in_the_middle() -> None:
    model, fixed = tiny(alpha="learned"), tiny(alpha=0.5)
    for stage in model.stages:
        for block in stage.blocks:
            torch.nn.init.zeros_(block.alpha)
    fixed.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".alpha")})
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), fixed(x))


def test_a_shift_by_one_cell_shifts_the_downsampled_map() -> None:
    model = tiny(global_tokens=(8, 8))
    seen: list[Tensor] = []
    model.stages[0].blocks[0].down.register_forward_hook(lambda *call: seen.append(call[-1]))
    image = torch.randn(1, 3, 256, 256)
    shifted = torch.zeros_like(image)
    shifted[:, :, 32:, 32:] = image[:, :, :-32, :-32]
    model(image)
    model(shifted)
    torch.testing.assert_close(seen[1][:, :, 3:-2, 3:-2], seen[0][:, :, 2:-3, 2:-3])


@settings(max_examples=10)
@given(height=st.integers(1, 100), width=st.integers(1, 100))
def test_any_size_goes_in_and_the_grid_stays(height: int, width: int) -> None:
    model = tiny(global_tokens=(2, 3))
    seen: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda *call: seen.append(tuple(call[-1][1].shape)))
    features = model.forward_features(torch.randn(2, 3, height, width))
    assert features.shape == (2, 24, -(-height // 32), -(-width // 32))
    assert features.isfinite().all()
    assert seen == [(2, 6, 8), (2, 6, 16), (2, 6, 24)]


def test_a_batch_is_its_samples() -> None:
    model, x = tiny(), torch.randn(3, 3, 72, 104)
    torch.testing.assert_close(model(x), torch.cat([model(sample[None]) for sample in x]), atol=1e-5, rtol=1e-4)


def test_train_and_eval_differ_by_the_batch_statistics() -> None:
    model, x = tiny(), torch.randn(3, 3, 64, 64)
    assert not torch.allclose(model(x), model.train()(x))


# -- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, *OTHER], ids=label)
def test_each_switch_trains_every_parameter(options: dict[str, Any]) -> None:
    model = DualTokenViT(**{**TINY, **options}).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("options", [o for o in OTHER if "drop_path_on" not in o], ids=label)
def test_each_switch_has_an_effect(options: dict[str, Any]) -> None:
    """Same weights where the shapes allow it: the outputs differ, whichever switch is turned."""
    default, other, x = tiny(), tiny(**options), torch.randn(1, 3, 96, 64)
    own = other.state_dict()
    shared = {k: v for k, v in default.state_dict().items() if k in own and v.shape == own[k].shape}
    other.load_state_dict(shared, strict=False)
    assert not torch.allclose(default(x), other(x), atol=1e-4)


def test_drop_path_acts_on_the_chosen_branches() -> None:
    for on, count in (("all", 3), ("ffn", 1)):
        block = DualTokenViT(**{**TINY, "drop_path_rate": 0.4, "drop_path_on": on}).stages[2].blocks[1]
        rates = [module.drop_prob for module in block.modules() if type(module).__name__ == "DropPath"]
        assert sorted(rates) == pytest.approx(sorted([0.4] * count + [0.0] * (3 - count)))
    rates = [b.drop_path.drop_prob for s in DualTokenViT(**{**TINY, "drop_path_rate": 0.3}).stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_switches_are_kept_and_documented() -> None:
    model = tiny(alpha=0.25, global_tokens=[2, 2])
    assert model.switches == Switches(kernel=3, alpha=0.25, global_tokens=(2, 2))
    assert all(f"        {name}: " in (Switches.__doc__ or "") for name in Switches.__dataclass_fields__)
    assert "tokred reconstruction" in (dualtoken_vit.__doc__ or "")
    for name in NAMES:
        assert "tokred reconstruction" in (getattr(dualtoken_vit, name).__doc__ or "")
        assert not any(char + "%" in (getattr(dualtoken_vit, name).__doc__ or "") for char in "0123456789 ")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 1.5}, r"alpha=1.5: expected a weight in \[0, 1\], or 'learned'"),
    ({"alpha": "trained"}, "alpha='trained'"),
    ({"alpha": float("nan")}, "alpha=nan"),
    ({"alpha": True}, "alpha=True"),
    ({"kernel": 4}, "kernel=4: expected an odd width"),
    ({"kernel": 0}, "kernel=0"),
    ({"conv_ratio": 0}, "conv_ratio=0: expected a number above 0"),
    ({"conv_ratio": float("inf")}, "conv_ratio=inf"),
    ({"conv_ratio": 0.01}, "conv_ratio=0.01"),
    ({"g_mlp": "mlp", "g_ratio": 0.01}, "g_ratio=0.01"),
    ({"mlp_ratios": (0.01, 1, 1)}, "mlp_ratios"),
    ({"global_tokens": (0, 7)}, "global_tokens=0"),
    ({"global_tokens": 7}, "global_tokens=7: expected two integers"),
    ({"g_mlp": "mixmlp"}, "g_mlp='mixmlp': expected one of 'mix', 'mlp'"),
    ({"g_ratio": 2.0}, "g_ratio=2.0 has no effect with g_mlp='mix'"),
    ({"mix_order": "token_first", "g_mlp": "mlp"}, "mix_order='token_first' has no effect with g_mlp='mlp'"),
    ({"steps": "one", "down_step": "dense"}, "down_step='dense' has no effect with steps='one'"),
    ({"fusion": "gate"}, "fusion='gate'"),
    ({"agg_residual": 1}, "agg_residual=1"),
    ({"init_values": 0}, "init_values=0"),
    ({"num_heads": (3, 2, 4)}, "num_heads=3 does not divide embed_dims=8"),
    ({"embed_dims": (9, 16, 24), "num_heads": (3, 2, 4)}, "half as wide"),
    ({"embed_dims": (8, 16)}, "embed_dims=.*three values"),
    ({"embed_dims": (2, 16, 24)}, "embed_dims=2"),
    ({"depths": (1, 0, 1)}, "depths=0"),
    ({"mlp_ratios": 4}, "mlp_ratios=4: expected three values"),
    ({"neck_dim": -1}, "neck_dim=-1"),
    ({"drop_path_rate": 1.2}, "drop_path_rate=1.2"),
    ({"drop_rate": -0.1}, "drop_rate=-0.1"),
    ({"global_pool": "max"}, "global_pool='max'"),
    ({"head_tokens": "global"}, "head_tokens='global'"),
    ({"num_classes": -1}, "num_classes=-1"),
    ({"img_size": (224,)}, "img_size"),
    ({"img_size": 0}, "img_size=0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda o: label(o) if isinstance(o, dict) else "")
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        DualTokenViT(**{**TINY, **options})


def test_unknown_names() -> None:
    with pytest.raises(UnknownParameterError, match="'g_mpl', did you mean 'g_mlp'"):
        timm.create_model("dualtoken_vit_tiny", g_mpl="mix")
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("dualtoken_vit_huge")
    model = tiny()
    with pytest.raises(InvalidParameterError, match=r"indices=.*0 to 2"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[0, 3])
    with pytest.raises(InvalidParameterError, match="output_fmt='NLC'"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")
    with pytest.raises(InvalidParameterError, match="global_pool='max'"):
        model.reset_classifier(5, "max")


# -- timm ------------------------------------------------------------------------------------------------------------


def test_registered_with_complete_cfgs() -> None:
    assert set(timm.list_models("dualtoken_vit*")) == set(NAMES)
    assert set(timm.list_models(module="dualtoken_vit")) == set(NAMES)
    assert not timm.list_pretrained("dualtoken_vit*")
    for name in NAMES:
        with torch.device("meta"):
            model = timm.create_model(name)
        cfg = model.default_cfg
        assert cfg is model.pretrained_cfg
        assert (cfg["architecture"], cfg["num_classes"], cfg["fixed_input_size"]) == (name, 1000, False)
        state = model.state_dict()
        assert cfg["first_conv"] + ".weight" in state
        assert cfg["classifier"] + ".weight" in state
        assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
        assert cfg["pool_size"] == (7, 7)
        assert cfg["crop_pct"] == 0.875
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model(name, pretrained=True)


def test_importing_again_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(dualtoken_vit)
    assert len(timm.list_models("dualtoken_vit*")) == 3


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name: str) -> None:
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 42)
    out.mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_options_of_create_model() -> None:
    model = timm.create_model("dualtoken_vit_tiny", in_chans=1, img_size=96, num_classes=7, drop_rate=0.5).eval()
    assert model(torch.randn(1, 1, 96, 96)).shape == (1, 7)
    assert (model.in_chans, model.num_classes, model.num_features, model.head_hidden_size) == (1, 7, 256, 256)
    assert model.head_drop.p == 0.5
    assert timm.create_model("dualtoken_vit_tiny", depths=(1, 1, 1)).stages[1].blocks[0]
    half = timm.create_model("dualtoken_vit_tiny", dtype=torch.bfloat16, alpha="learned", neck_dim=32)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.reset_classifier(3)
    assert half.eval()(torch.randn(1, 3, 64, 64).bfloat16()).isfinite().all()


def test_head() -> None:
    model, x = tiny(neck_dim=40), torch.randn(2, 3, 96, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 24, 3, 2)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pre = model.forward_head(features, pre_logits=True)
    assert pre.shape == (2, model.head_hidden_size) == (2, 40)
    torch.testing.assert_close(model.head(pre), model(x))
    slow = model.neck(features.flatten(2).transpose(1, 2)).mean(dim=1)
    torch.testing.assert_close(pre, slow)
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    assert model.get_classifier() is model.head
    model.reset_classifier(9, "")
    assert model(x).shape == (2, 9, 3, 2)
    torch.testing.assert_close(model(x).mean(dim=(2, 3)), model.head(pre))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 40, 3, 2)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), pre)


def test_head_over_all_tokens() -> None:
    model, x = tiny(head_tokens="all"), torch.randn(2, 3, 96, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 3 * 2 + 4, 24)
    torch.testing.assert_close(model(x), model.head(features.mean(dim=1)))
    image = tiny()
    image.load_state_dict(model.state_dict())
    torch.testing.assert_close(features[:, :6].transpose(1, 2).view(2, 24, 3, 2), image.forward_features(x))
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, features)
    assert maps[-1].shape == (2, 24, 3, 2)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 10, 24)


@pytest.mark.parametrize("neck_dim", [0, 40])
def test_intermediates(neck_dim: int) -> None:
    model, x = tiny(neck_dim=neck_dim), torch.randn(1, 3, 100, 64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 13, 8), (1, 16, 7, 4), (1, 24, 4, 2)]
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(normed[0], final)
    early, taken = model.forward_intermediates(x, indices=[0, -2], stop_early=True)
    assert torch.equal(early, maps[1])
    assert all(torch.equal(a, b) for a, b in zip(taken, maps[:2], strict=True))
    last = model.forward_intermediates(x, indices=1, output_fmt="NHWC", intermediates_only=True)[0]
    assert torch.equal(last.permute(0, 3, 1, 2), maps[2])

    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, -2]) == [0, 1]
    assert len(pruned.stages) == 2
    assert pruned.num_features == 16
    assert torch.equal(pruned(x), maps[1])
    unpruned = copy.deepcopy(model)
    assert unpruned.prune_intermediate_layers(1, prune_norm=False, prune_head=False) == [2]
    assert torch.equal(unpruned(x), model(x))


@pytest.mark.parametrize("out_indices", [None, (0, 1, 2), (1,), (0, 2), (-2,), 2])
def test_features_only(out_indices: Any) -> None:
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    model = timm.create_model("dualtoken_vit_tiny", features_only=True, **chosen).eval()
    count = len(model.feature_info.channels())
    assert count == {None: 3, 2: 2}.get(out_indices, len(out_indices) if isinstance(out_indices, tuple) else count)
    maps = model(torch.randn(1, 3, 96, 64))
    for m, channels, stride in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert m.shape == (1, channels, 96 // stride, 64 // stride)
    if out_indices is None:
        assert model.feature_info.reduction() == [8, 16, 32]
        assert model.feature_info.channels() == [64, 128, 256]
    sum(m.mean() for m in maps).backward()
    # The last aggregation ends in image tokens, so nothing is left over.
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_checkpointing_changes_nothing(alpha: float) -> None:
    """Outputs, gradients and the running statistics of BatchNorm, with drop path."""
    plain = DualTokenViT(**{**TINY, "alpha": alpha, "drop_path_rate": 0.5}).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64)
    outputs = []
    for model in (plain, saving):
        torch.manual_seed(3)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), (_, b) in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    saving.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in saving.stages)


def test_parameter_groups() -> None:
    model = tiny(alpha="learned", neck_dim=40)
    assert model.no_weight_decay() == {"global_token"}
    names = {name for name, _ in model.named_parameters()}
    fine = group_parameters(model, model.group_matcher(coarse=False))
    assert {name for group in fine.values() for name in group} == names
    # Stem, then the blocks in their order; norm, neck and head at the end.
    assert len(fine) == 1 + 4 + 1
    assert all(name.startswith(("patch_embed", "global_token")) for name in fine[0])
    assert all(name.startswith(("norm", "neck", "head")) for name in fine[5])
    assert any(name.startswith("stages.1.downsample") for name in fine[2])
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 1 + 3 + 1
    groups = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(model.global_token) not in decayed
    assert id(model.head.weight) in decayed


def test_channels_last_and_low_precision() -> None:
    model, x = tiny(), torch.randn(2, 3, 64, 96)
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-4)
    for fused in (True, False):
        for module in model.modules():
            if isinstance(module, TokenAttention):
                module.fused_attn = fused
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - expected).abs().max() < 0.1 * expected.abs().max()
        low = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert (low.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"alpha": "learned", "head_tokens": "all", "steps": "one"}], ids=label)
def test_compiles_without_a_break(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model, x = tiny(**{"depths": (1, 1, 1), **options}), torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


def test_trains_compiled_with_checkpointing() -> None:
    torch.compiler.reset()
    stage, x, g = tiny().stages[1].train(), torch.randn(2, 8, 8, 8), torch.randn(2, 4, 8)
    saving = copy.deepcopy(stage)
    saving.grad_checkpointing = True
    for run in (stage, torch.compile(saving, backend="aot_eager")):
        y, _ = run(x, g)
        y.square().sum().backward()
    for (name, a), (_, b) in zip(stage.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3, msg=name)
    for (name, a), (_, b) in zip(stage.named_buffers(), saving.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


def test_exports() -> None:
    model, x = tiny(depths=(1, 1, 1)), torch.randn(2, 3, 64, 96)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    more = torch.randn(5, 3, 64, 96)
    torch.testing.assert_close(program.module()(more), model(more), atol=1e-5, rtol=1e-4)


def test_loads_a_file_through_timm(tmp_path: Path) -> None:
    small = {"depths": (1, 1, 1), "embed_dims": (8, 16, 32), "mlp_ratios": (1, 1, 1)}
    model, x = timm.create_model("dualtoken_vit_tiny", **small).eval(), torch.randn(1, 3, 64, 64)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    cfg = {"file": str(tmp_path / "weights.pth")}
    again = timm.create_model("dualtoken_vit_tiny", pretrained=True, pretrained_cfg_overlay=cfg, **small).eval()
    assert torch.equal(again(x), model(x))
    other = timm.create_model(
        "dualtoken_vit_tiny", pretrained=True, pretrained_cfg_overlay=cfg, num_classes=7, in_chans=1, **small
    ).eval()
    assert other(x[:, :1]).shape == (1, 7)
    assert torch.equal(other.norm.weight, model.norm.weight)
    loaded = timm.create_model("dualtoken_vit_tiny", checkpoint_path=str(tmp_path / "weights.pth"), **small).eval()
    assert torch.equal(loaded(x), model(x))


def test_state_round_trip_and_initial_weights() -> None:
    model = tiny()
    other = DualTokenViT(**TINY).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))
    fresh = timm.create_model("dualtoken_vit_tiny")
    assert fresh.global_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert fresh.stages[0].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not fresh.stages[0].blocks[0].mlp.fc1.bias.any()
    assert isinstance(fresh.stages[2].blocks[2], DualTokenBlock)
