"""Strip-MLP: exact sizes and costs, the equations beside the fast path, windows, and what timm expects of a model."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT
from tokred.core.errors import InvalidParameterError, MissingWeightsError
from tokred.vision.backbones import strip_mlp
from tokred.vision.backbones.strip_mlp import (
    GRN,
    RelativePosition,
    StripMixing,
    StripMLP,
    StripMLPBlock,
    axis_windows,
    resize_state_dict,
    strip_groups,
)

#: name: embed_dim, layers, parameters, numbers in buffers, multiply-adds of convolutions and linear layers at 224
VARIANTS = {
    "strip_mlp_tiny_light": (80, (2, 2, 6, 2), 18_243_920, 19_717, 2_518_593_280),
    "strip_mlp_tiny": (80, (2, 2, 12, 2), 24_903_920, 29_335, 3_648_236_800),
    "strip_mlp_small": (96, (2, 2, 18, 2), 42_568_600, 46_729, 6_803_134_464),
    "strip_mlp_base": (112, (2, 2, 18, 2), 57_216_480, 54_505, 9_184_947_968),
}
SPECS = ROOT.parent / "shared" / "specs"
SMALL: dict[str, Any] = {"embed_dim": 16, "layers": (1, 1, 2, 1), "img_size": 64, "num_classes": 10}


def small(**options: Any) -> StripMLP:
    """A tiny network whose statistics and zero-initialised weights are random."""
    model = StripMLP(**{**SMALL, **options})
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "gamma", "beta", "embeddings_table")):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# -- sizes and costs -------------------------------------------------------------------------------------------------


def macs(model: nn.Module, img_size: int) -> int:
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, img_size, img_size, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_buffers_and_multiply_adds(name):
    embed_dim, layers, parameters, buffers, multiply_adds = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for b in model.buffers()) == buffers
    assert macs(model, 224) == multiply_adds
    assert formula(embed_dim, layers, 224, 1000) == (parameters, multiply_adds)
    assert [info["num_chs"] for info in model.feature_info] == [embed_dim * 2**i for i in range(4)]


def formula(width: int, layers: tuple[int, ...], img_size: int, classes: int) -> tuple[int, int]:
    """Parameters and multiply-adds by the cost model of the specification."""
    params, cost = 0.0, 0.0
    for i, depth in enumerate(layers):
        c, r = width * 2**i, img_size // (4 * 2**i)
        size, n = strip_groups(c)[1], r * r
        # The hidden layer of the reweighting has C // 4 channels: C^2 / 2 counts whole quarters only.
        odd = c / 4 - c // 4
        params += depth * (9.5 * c**2 + (99.75 + 2 * r) * c + 6 * size * r**2 + 2 * size * r - odd * (2 * c + 1))
        cost += depth * (n * c * (79 + 3 * r) + 9 * n * c**2 + c**2 / 2 - odd * 2 * c)
        if i < 3:
            params += 8 * c**2
            cost += 8 * c**2 * (r // 2) ** 2
    first, third, fourth = (img_size // side for side in (4, 16, 32))
    params += 48 * width + 16 * width + 64 * width + 8 * width * classes + classes + 16 * width
    cost += 48 * width * first**2 + 16 * width * third**2 + 64 * width * fourth**2 + 8 * width * classes
    return int(params), int(cost)


@settings(max_examples=8)
@given(
    width=st.sampled_from([8, 10, 16, 20, 32, 40, 80]),
    layers=st.tuples(*[st.integers(1, 3)] * 4),
    cells=st.integers(1, 5),
    classes=st.integers(1, 20),
)
def test_cost_model(width, layers, cells, classes):
    options = {"embed_dim": width, "layers": layers, "img_size": 32 * cells, "num_classes": classes}
    model = StripMLP(**options, device="meta")
    expected = formula(width, layers, 32 * cells, classes)
    assert (sum(p.numel() for p in model.parameters()), macs(model, 32 * cells)) == expected


def expected_keys(width: int, layers: tuple[int, ...], img_size: int, classes: int) -> dict[str, tuple[int, ...]]:
    """The released names, written down once more."""

    def norm(name: str, c: int) -> dict[str, tuple[int, ...]]:
        sizes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (c,))
        return {f"{name}.{leaf}": size for leaf, size in {**sizes, "num_batches_tracked": ()}.items()}

    keys: dict[str, tuple[int, ...]] = {"patch_embed.weight": (width, 3, 4, 4), **norm("norm", 8 * width)}
    keys |= {"head.weight": (classes, 8 * width), "head.bias": (classes,)}
    keys |= {f"merging{i}.weight": (width * 2**i, width * 2 ** (i - 1), 2, 2) for i in (1, 2, 3)}
    keys |= {"conv_s1_28.weight": (4 * width, 1, 2, 2)}
    keys |= {f"conv_s{i}_14.weight": (8 * width, 1, 2, 2) for i in (1, 2)}
    for i, depth in enumerate(layers):
        c, r = width * 2**i, img_size // (4 * 2**i)
        h, strips = c // 2, strip_groups(c)[1] * r
        for j in range(depth):
            tokens, channels = f"blocks{i + 1}.{j}.token_mixing.", f"blocks{i + 1}.{j}.channel_mixing."
            s = f"{tokens}smlp_block."
            keys |= norm(f"{s}BN", h) | norm(f"{s}mlp.1", c) | norm(f"{tokens}dwsc.conv_merge.BN", c)
            for axis in "hw":
                keys |= {f"{s}proj_{axis}.weight": (strips, r, 1, 3), f"{s}proj_{axis}.bias": (strips,)}
                keys |= {f"{s}fuse_{axis}.weight": (h, c, 1, 1)}
                keys |= {f"{s}relate_pos_{axis}.embeddings_table": (2 * r + 1, h)}
            keys |= {f"{s}mlp.0.weight": (c, c, 1, 1), f"{s}mlp.0.bias": (c,), f"{s}fuse.weight": (c, c, 1, 1)}
            keys |= {f"{s}fc_h.weight": (h, 1, 3, 7), f"{s}fc_w.weight": (h, 1, 7, 3)}
            keys |= {f"{s}reweight.fc1.weight": (h // 2, h, 1, 1), f"{s}reweight.fc1.bias": (h // 2,)}
            keys |= {f"{s}reweight.fc2.weight": (3 * h, h // 2, 1, 1), f"{s}reweight.fc2.bias": (3 * h,)}
            keys |= {f"{tokens}dwsc.conv_merge.Conv.weight": (c, 1, 3, 3)}
            keys |= {f"{channels}conv_77.weight": (c, 1, 7, 7)}
            keys |= {f"{channels}layer_norm.{leaf}": (c,) for leaf in ("weight", "bias")}
            keys |= {f"{channels}fc1.weight": (3 * c, c), f"{channels}fc1.bias": (3 * c,)}
            keys |= {f"{channels}fc2.weight": (c, 3 * c), f"{channels}fc2.bias": (c,)}
            keys |= {f"{channels}grn.{leaf}": (1, 1, 1, 3 * c) for leaf in ("gamma", "beta")}
    return keys


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_of_the_released_files(name):
    model = timm.create_model(name, device="meta")
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_keys(*VARIANTS[name][:2], 224, 1000)
    path = SPECS / f"strip_mlp_state_dict_{name.removeprefix('strip_mlp_')}.json"
    if path.is_file():
        parameters = {key for key, _ in model.named_parameters()}
        ours = {
            (key, tuple(v.shape), str(v.dtype), "param" if key in parameters else "buffer") for key, v in state.items()
        }
        listed = json.loads(path.read_text())["entries"]
        assert ours == {(e["name"], tuple(e["shape"]), f"torch.{e['dtype']}", e["kind"]) for e in listed}


# -- the equations ---------------------------------------------------------------------------------------------------


def position(table: Tensor, side: int) -> Tensor:
    offsets = torch.arange(side)[None, :] - torch.arange(side)[:, None]
    return table[offsets.clip(-side, side) + side].permute(2, 0, 1)


def slow_strips(m: StripMixing, x: Tensor) -> Tensor:
    """CGSMM up to the column projection, entry by entry."""
    (half, side), size = x.shape[1:3], m.group_size

    def strip(conv: nn.Conv2d, v: Tensor) -> Tensor:
        """Along the last axis, with the three neighbouring strips of the axis before it."""
        padded = F.pad(v, (0, 0, 1, 1))
        out = torch.zeros_like(v)
        for p in range(half // size):
            for c in range(size):
                for i in range(side):
                    for w in range(side):
                        window = padded[:, p * size + c, i : i + 3]  # (B, k, position in the strip)
                        out[:, p * size + c, i, w] = conv.bias[c * side + w] + sum(
                            (window[:, k] * conv.weight[c * side + w, :, 0, k]).sum(-1) for k in range(3)
                        )
        return out

    y = strip(m.proj_h, x + position(m.relate_pos_h.embeddings_table, side))
    z = F.gelu(m.BN(m.fuse_h(torch.cat([y, x], 1)))) + position(m.relate_pos_w.embeddings_table, side)
    return strip(m.proj_w, z.transpose(2, 3)).transpose(2, 3)


@pytest.mark.parametrize(("channels", "side"), [(16, 8), (20, 4), (40, 2), (160, 3), (10, 1), (24, 5)])
def test_strips_are_the_triple_loop(channels, side):
    m = StripMixing(channels, side).double().eval()
    randomise(m)
    x = torch.randn(2, channels // 2, side, side, dtype=torch.float64)
    with torch.no_grad():
        close(m.strips(x), slow_strips(m, x), 1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_strips_are_those_of_the_triple_loop(training):
    m = StripMixing(8, 3).double().train(training)
    randomise(m)
    x, y = (torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    weights = [m.proj_h.weight, m.proj_h.bias, m.proj_w.weight, m.fuse_h.weight, m.relate_pos_h.embeddings_table]
    direction = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    fast = torch.autograd.grad((m.strips(x) * direction).sum(), [x, *weights])
    slow = torch.autograd.grad((slow_strips(m, y) * direction).sum(), [y, *weights])
    for a, b in zip(fast, slow, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_position_table(side):
    m = RelativePosition(3, side)
    assert torch.equal(m(), position(m.embeddings_table, side))
    m().sum().backward()
    assert not m.embeddings_table.grad[[0, -1]].any()
    assert m.embeddings_table.grad[1:-1].all()


def row_step(m: StripMixing, x: Tensor) -> Tensor:
    seen = []
    handle = m.fuse_h.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    m.strips(x)
    handle.remove()
    return seen[0][:, : x.shape[1]]


@pytest.mark.parametrize("row", [0, 3, 7])
def test_three_rows_are_mixed(row):
    m = StripMixing(16, 8).eval()
    x = torch.randn(1, 8, 8, 8)
    changed = x.clone()
    changed[:, :, row] += 1
    with torch.no_grad():
        rows = (row_step(m, x) != row_step(m, changed)).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
        assert rows == [r for r in (row - 1, row, row + 1) if 0 <= r < 8]
        m.proj_h.weight[..., [0, 2]] = 0
        rows = (row_step(m, x) != row_step(m, changed)).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
        assert rows == [row]


def test_groups_share_their_weights():
    m = StripMixing(16, 8).eval()
    nn.init.zeros_(m.relate_pos_h.embeddings_table)
    x = torch.randn(2, 8, 8, 8)
    order = torch.tensor([2, 0, 3, 1])
    channels = (order[:, None] * m.group_size + torch.arange(m.group_size)).flatten()
    with torch.no_grad():
        close(row_step(m, x[:, channels]), row_step(m, x)[:, channels])


@pytest.mark.parametrize(
    ("channels", "patch", "expected"),
    [(80, "auto", (2, 20)), (96, "auto", (4, 12)), (10, "auto", (5, 1)), (40, "auto", (4, 5)), (40, 2, (2, 10))],
)
def test_groups(channels, patch, expected):
    assert strip_groups(channels, patch) == expected


@pytest.mark.parametrize(("channels", "patch"), [(28, "auto"), (6, "auto"), (15, 1), (16, 0), (16, "two"), (16, True)])
def test_groups_that_cannot_be(channels, patch):
    with pytest.raises(InvalidParameterError, match="cgsmm_patch"):
        strip_groups(channels, patch)


def test_local_mixing():
    m = StripMixing(16, 8).eval()
    randomise(m)
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        xw, xh = m.fc_h(x), m.fc_w(x)
        logits = m.reweight((xw + xh + x).mean((2, 3), keepdim=True)).reshape(2, 8, 3)
        a = logits.softmax(-1)
        close(a.sum(-1), torch.ones(2, 8))
        parts = torch.stack([xh, xw, x], -1)
        close(m.local(x), (parts * a[:, :, None, None]).sum(-1))
        for value in m.reweight.parameters():
            value.zero_()
        close(m.local(x), (xw + xh + x) / 3)


def test_grn():
    x = torch.randn(2, 5, 4, 6)
    m = GRN(6)
    assert torch.equal(m(x), x)
    nn.init.normal_(m.gamma)
    nn.init.normal_(m.beta)
    norm = x.square().sum((1, 2), keepdim=True).sqrt()
    close(m(x), m.gamma * x * norm / (norm.mean(-1, keepdim=True) + 1e-6) + m.beta + x)


def test_block_without_its_last_layers_is_identity():
    block = StripMLPBlock(16, 4, 3, 0.1).eval()
    for value in (block.token_mixing.smlp_block.fuse.weight, *block.channel_mixing.fc2.parameters()):
        nn.init.zeros_(value)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x)


def test_skips_read_one_channel_each():
    """conv_s1_28: output channels 2g and 2g + 1 read input channel g."""
    conv = small().conv_s1_28
    x = torch.zeros(1, 32, 2, 2)
    x[:, 5] = 1
    assert conv(x).flatten().nonzero().flatten().tolist() == [10, 11]


# -- windows ---------------------------------------------------------------------------------------------------------


def literal_windows(n: int, u: int) -> tuple[list[int], int, int]:
    """The specification's steps 1 to 3: starts, overlap, overlap of a clipped last window."""
    n = max(n, u)
    if n == u:
        k, overlap = 1, 0
    else:
        k = round(n / u + 0.5)
        overlap = round((k * u - n) / (k - 1) - 0.5)
    starts, last = [], 0
    for i in range(k):
        start = i * u - i * overlap
        if start + u > n:
            start = n - u
            last = starts[-1] + u - start
        starts.append(start)
    return starts, overlap, last


@given(n=st.integers(1, 200), u=st.integers(1, 60))
def test_windows_follow_the_rule_and_cover_everything(n, u):
    starts, overlap, last = literal_windows(n, u)
    assert list(axis_windows(n, u)) == starts
    covered = {s + i for s in starts for i in range(u)}
    assert covered >= set(range(n))
    overlaps = [a + u - b for a, b in pairwise(starts)]
    assert overlaps == [overlap] * (len(overlaps) - bool(last)) + [last] * bool(last)


def slow_windows(m: StripMixing, x: Tensor) -> Tensor:
    """Window by window, blending row by row as the rule says, one image after another."""
    u, (h, w) = m.side, x.shape[-2:]
    padded = torch.zeros(*x.shape[:2], max(h, u), max(w, u), dtype=x.dtype)
    padded[..., :h, :w] = x

    def blend(canvas: Tensor, new: Tensor, dim: int, overlap: int) -> Tensor:
        if overlap == 0:
            return torch.cat([canvas, new], dim)
        a, b = canvas.transpose(dim, -1), new.transpose(dim, -1)
        middle = 0.5 * a[..., -overlap:] + 0.5 * b[..., :overlap]
        return torch.cat([a[..., :-overlap], middle, b[..., overlap:]], -1).transpose(dim, -1)

    (tops, olp_h, last_h), (lefts, olp_w, last_w) = literal_windows(h, u), literal_windows(w, u)
    whole = None
    for i, top in enumerate(tops):
        row = None
        for n, left in enumerate(lefts):
            new = m.strips(padded[..., top : top + u, left : left + u])
            clipped = last_w and n == len(lefts) - 1
            row = new if row is None else blend(row, new, 3, last_w if clipped else olp_w)
        clipped = last_h and i == len(tops) - 1
        whole = row if whole is None else blend(whole, row, 2, last_h if clipped else olp_h)
    return whole[..., :h, :w]


@settings(max_examples=25)
@given(h=st.integers(1, 19), w=st.integers(1, 19), side=st.integers(2, 6))
def test_windows_are_the_slow_ones(h, w, side):
    m = StripMixing(8, side, windowed=True).eval()
    x = torch.randn(2, 4, h, w)
    with torch.no_grad():
        close(m.windows(x), slow_windows(m, x))


def test_windowed_network_at_its_own_size_is_the_fixed_one():
    fixed, windowed = small(), small(window_size="train")
    windowed.load_state_dict(fixed.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(fixed(x), windowed(x))
    assert timm.create_model("strip_mlp_tiny", dynamic_img_size=True, device="meta").window_size == "train"


@pytest.mark.parametrize("size", [(96, 80), (32, 200), (65, 71), (128, 64)])
def test_windowed_network_takes_any_size(size):
    model = small(window_size="train")
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[-2:] for m in maps] == [(size[0] // 2**i, size[1] // 2**i) for i in (2, 3, 4, 5)]
        close(model(x)[1:], model(x[1:]))


# -- what timm expects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_registered(name):
    cfg = timm.get_pretrained_cfg(name)
    model = timm.create_model(name, device="meta")
    state = model.state_dict()
    assert timm.is_model(name)
    assert timm.models.is_model_in_modules(name, {"strip_mlp"})
    assert name not in timm.list_models(pretrained=True)
    assert cfg.tag == "in1k"
    assert model.pretrained_cfg is model.default_cfg
    assert f"{cfg.first_conv}.weight" in state
    assert f"{cfg.classifier}.weight" in state
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    out = model.forward_features(torch.empty(1, 3, 224, 224, device="meta"))
    assert out.shape == (1, model.num_features, *cfg.pool_size)
    assert len(timm.list_models("strip_mlp_*")) == len(VARIANTS)


def make(**options: Any) -> Any:
    model = timm.create_model("strip_mlp_tiny", **{**SMALL, **options})
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_forward_and_head(in_chans):
    model = make(in_chans=in_chans, num_classes=7)
    x = torch.randn(2, in_chans, 64, 64)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()
        assert torch.equal(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        close(pooled, features.mean((2, 3)))
        assert pooled.shape == (2, model.head_hidden_size)
        for n in range(2):
            close(model(x[n : n + 1]), logits[n : n + 1])


def test_every_parameter_gets_a_gradient():
    model = make(num_classes=42).train()
    model(torch.randn(3, 3, 64, 64)).mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    tables = {name: p.grad for name, p in model.named_parameters() if "table" in name}
    assert all(not grad[[0, -1]].any() and grad[1:-1].any() for grad in tables.values())
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert not still


def test_intermediates():
    model = make()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x, norm=True)
        assert torch.equal(final, features)
        assert torch.equal(maps[-1], features)
        assert [m.shape[1:] for m in maps] == [(16 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
        raw = model.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(raw[:3], maps[:3], strict=True))
        assert torch.equal(model.norm(raw[3]), features)
        early, some = model.forward_intermediates(x, [0, -3], stop_early=True)
        assert torch.equal(early, some[-1])
        assert torch.equal(some[1], maps[1])
    with pytest.raises(InvalidParameterError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("indices", [(0,), (0, 1), (1, 2), (1, 2, 3), (-1,), (0, 1, 2, 3)])
def test_features_only_and_pruning(indices):
    torch.manual_seed(3)
    whole = make()
    torch.manual_seed(3)
    net = timm.create_model("strip_mlp_tiny", features_only=True, out_indices=indices, **SMALL)
    randomise(net)
    net.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in net.model.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, expected = net.eval()(x), whole.forward_intermediates(x, list(indices), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert net.feature_info.channels() == [m.shape[1] for m in maps]
    assert net.feature_info.reduction() == [64 // m.shape[-1] for m in maps]
    last = [i % 4 for i in indices][-1]
    assert not [k for k in net.state_dict() if f"blocks{last + 2}" in k or "head" in k or "model.norm." in k]

    pruned = copy.deepcopy(whole)
    assert pruned.prune_intermediate_layers(list(indices)) == [i % 4 for i in indices]
    with torch.no_grad():
        assert pruned.forward_features(x).shape == maps[-1].shape
        assert pruned(x).shape[1] == pruned.num_features == maps[-1].shape[1]


def test_pruning_keeps_what_it_is_told_to_keep():
    model = make()
    model.prune_intermediate_layers(1, prune_norm=False, prune_head=False)
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_classifier():
    model = make()
    x = torch.randn(2, 3, 64, 64)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 128, 2, 2)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "max")
    close(model(x), model.forward_features(x).amax((2, 3)))
    model.double().reset_classifier(3, "avg")
    assert model(x.double()).dtype == torch.float64
    assert make(num_classes=0)(x).shape == (2, 128)
    assert make(num_classes=0, global_pool="")(x).shape == (2, 128, 2, 2)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_nothing(training):
    plain = make(drop_path_rate=0.0).train(training)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    assert saving.grad_checkpointing
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert torch.equal(plain(x), saving(x)) or training


def test_parameter_groups():
    model = make()
    names = {name for name, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert {name for group in groups.values() for name in group} == names
        order = [name for _, group in sorted(groups.items()) for name in group]
        assert order[0].startswith("patch_embed")
        assert order[-1].startswith("head")
        assert order.index("merging1.weight") < order.index("blocks2.0.channel_mixing.fc1.weight")
        assert order.index("conv_s2_14.weight") < order.index("blocks3.0.channel_mixing.fc1.weight")
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_drop_path_is_the_same_everywhere():
    rates = [block.drop_path.drop_prob for i in range(1, 5) for block in getattr(make(), f"blocks{i}")]
    assert rates == [0.1] * 5
    model = make(drop_path_rate=0.3, drop_rate=0.2)
    assert model.blocks4[0].drop_path.drop_prob == 0.3
    assert model.head_drop.p == 0.2


@pytest.mark.parametrize("options", [{}, {"window_size": "train"}], ids=["fixed", "windowed"])
def test_layout_of_other_devices_is_the_same_network(monkeypatch, options):
    """On the CPU maps lie channels last; elsewhere they keep the layout that they come in."""
    found, model = [], small(**options).double()
    x = torch.randn(2, 3, 96 if options else 64, 64, dtype=torch.float64)
    for last in (True, False):
        monkeypatch.setattr(strip_mlp, "_channels_last", lambda _, last=last: last)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        found.append([y, *(p.grad.clone() for p in model.parameters())])
    for cpu, other in zip(*found, strict=True):
        torch.testing.assert_close(cpu, other, rtol=1e-9, atol=1e-10)


def test_memory_format_and_dtype():
    model = make()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
        close(model(x.contiguous(memory_format=torch.channels_last)), logits)
        turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
        close(turned(x.contiguous(memory_format=torch.channels_last)), logits)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        close(half.float(), logits, 0.15)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x).float(), logits, 0.15)
    assert make(dtype=torch.float64)(x.double()).dtype == torch.float64


@pytest.mark.parametrize("img_size", [32, 96, (64, 64)])
def test_other_image_sizes(img_size):
    model = make(img_size=img_size)
    side = img_size if isinstance(img_size, int) else img_size[0]
    assert model(torch.randn(1, 3, side, side)).shape == (1, 10)
    assert model.img_size == (side, side)


def test_batch_norm_needs_more_than_one_number_in_training():
    with pytest.raises(ValueError, match="more than 1 value"):
        make(img_size=32).train()(torch.randn(1, 3, 32, 32))


def network() -> tuple[nn.Module, Tensor]:
    return make(layers=(1, 1, 1, 1)), torch.randn(2, 3, 64, 64)


def windowed_strips() -> tuple[nn.Module, Tensor]:
    return StripMixing(8, 4, windowed=True).eval(), torch.randn(2, 8, 6, 9)


@pytest.mark.parametrize("case", [network, windowed_strips])
def test_compiles_in_one_graph(case):
    model, x = case()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(x), model(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize("case", [network, windowed_strips])
def test_exports(case):
    model, x = case()
    exported = torch.export.export(model, (x,), strict=False, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        close(exported.module()(x), model(x))
        five = torch.cat([x, x, x[:1]])
        close(exported.module()(five), model(five))


def test_meta_weights_can_be_filled_later():
    model = make()
    empty = make(device="meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), empty(x))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"img_size": 100}, "multiple of 32"),
        ({"img_size": (64, 96)}, "square"),
        ({"img_size": 0}, "multiple of 32"),
        ({"embed_dim": 15}, "embed_dim=15"),
        ({"embed_dim": 28}, "28 channels"),
        ({"layers": (1, 1, 1)}, "four"),
        ({"layers": (1, 0, 1, 1)}, "at least 1"),
        ({"alpha": 0}, "alpha=0"),
        ({"window_size": 7}, "window_size=7"),
        ({"cgsmm_patch": "all"}, "cgsmm_patch='all'"),
        ({"global_pool": "token"}, "global_pool='token'"),
        ({"global_pool": ""}, "needs pooling"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"in_chans": 0}, "in_chans=0"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(InvalidParameterError, match=told):
        StripMLP(**{**SMALL, **options, "device": "meta"})


def test_unknown_option_and_variant():
    with pytest.raises(TypeError, match="surprise"):
        make(surprise=1)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("strip_mlp_huge")


def test_image_of_another_size():
    with pytest.raises(InvalidParameterError, match=r"image of 96x64: .* window_size='train'"):
        make()(torch.randn(1, 3, 96, 64))
    with pytest.raises(InvalidParameterError, match="at least 32"):
        make(window_size="train")(torch.randn(1, 3, 31, 64))


@pytest.mark.parametrize("name", VARIANTS)
def test_pretrained_names_the_readme(name):
    with pytest.raises(MissingWeightsError, match=r"README, https://github.com/Med-Process/Strip_MLP"):
        timm.create_model(name, pretrained=True)


# -- weights of another image size (ours) ----------------------------------------------------------------------------


def test_resizing():
    model = small(img_size=64)
    weights = model.state_dict()
    same = resize_state_dict(weights, 64)
    assert same.keys() == weights.keys()
    assert all(same[k] is weights[k] for k in weights)
    for size in (32, 96, 128):
        other = small(img_size=size)
        resized = resize_state_dict(weights, size)
        other.load_state_dict(resized)
        untouched = [k for k in weights if "proj_" not in k and "relate_pos" not in k]
        assert all(resized[k] is weights[k] for k in untouched)


def test_resizing_keeps_sums_over_strips_and_offsets():
    name = "blocks1.0.token_mixing.smlp_block."
    weights = small(img_size=64).state_dict()
    weights[f"{name}proj_h.weight"] = torch.ones_like(weights[f"{name}proj_h.weight"])
    weights[f"{name}proj_h.bias"] = torch.full_like(weights[f"{name}proj_h.bias"], 0.25)
    table = torch.arange(-16.0, 17.0)[:, None].expand(33, 8).clone()
    table[[0, -1]] = 1e6  # offsets that never occur, so weights that nobody trained
    weights[f"{name}relate_pos_h.embeddings_table"] = table
    resized = resize_state_dict(weights, 128)
    close(resized[f"{name}proj_h.weight"].sum(1), torch.full((64, 1, 3), 16.0))
    close(resized[f"{name}proj_h.bias"], torch.full((64,), 0.25))
    close(resized[f"{name}relate_pos_h.embeddings_table"][2:-2, 0], torch.arange(-30.0, 31.0) / 2)
