"""open_clip's own vision towers: identity, exact scores, masked-key and merge oracles, pools, grids, wrappers."""

from __future__ import annotations

import copy
import functools
import io
import threading

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNormFp32, QuickGELU, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import tokred
from tokred.adapters.open_clip import OpenClipHost
from tokred.adapters.registry import find_host
from tokred.core.errors import InvalidParameterError, UnsupportedModelError

HEIGHT, WIDTH, N = 24, 16, 24  # 6 x 4 patches: an exchange of rows and columns shows
SMALL = {"image_size": (HEIGHT, WIDTH), "patch_size": 4, "width": 48, "layers": 5, "heads": 4, "mlp_ratio": 2.0}
VISION = {"image_size": (HEIGHT, WIDTH), "patch_size": 4, "width": 48, "layers": 5, "head_width": 12, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


def tower(**kwargs):
    return VisionTransformer(**{**SMALL, "output_dim": 20, **kwargs})


def tokens_first():
    """The layout of open_clip 2: (N, B, C) inside the transformer."""
    model = tower(ls_init_value=0.7)
    model.transformer = Transformer(48, 5, 4, 2.0, ls_init_value=0.7, batch_first=False)
    return model


def pooled(kind, **kwargs):
    return tower(attentional_pool=kind, attn_pooler_queries=7, attn_pooler_heads=2, output_tokens=True, **kwargs)


TOWERS = {
    "plain": tower,
    "layer-scale-quick-gelu": functools.partial(tower, ls_init_value=0.7, act_layer=QuickGELU),
    "tokens-first": tokens_first,
    "qk-norm": functools.partial(tower, qk_norm=True, norm_layer=LayerNormFp32),
    "all-custom": functools.partial(
        tower, qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True, ls_init_value=0.7
    ),
    "avg": functools.partial(tower, pool_type="avg", no_ln_pre=True),
    "avg-ln-after": functools.partial(tower, pool_type="avg", final_ln_after_pool=True, output_tokens=True),
    "none": functools.partial(tower, pool_type="none"),
    "attention-pool": functools.partial(pooled, True),
    "attention-pool-avg": functools.partial(pooled, True, pool_type="avg"),
    # these two run only where the widths before and behind the pool are equal (open_clip calls them untested)
    "parallel-pool": functools.partial(pooled, "parallel", output_dim=48),
    "cascade-pool": functools.partial(pooled, "cascade", output_dim=48),
}

METHODS = {
    "tome": tokred.ToMe(r=3),
    "tome-once": tokred.ToMe(r=[8, 0, 0, 3]),
    "topk": tokred.TopK(keep_rate=0.6, layers=(1, 3)),
    "topk-fuse": tokred.TopK(keep_rate=0.6, layers=(1,), fuse=True),
    "topk-mass": tokred.TopK(keep_rate=0.6, layers=(0, 2), score="mass"),
    "zero-tprune": tokred.ZeroTPrune(schedule={0: (3, 0.9), 2: (2, 0.7)}),
    "random": tokred.RandomTokens(keep_rate=0.6, layers=(1, 3)),
}


def sharpen(module: nn.Module) -> nn.Module:
    """Random weights whose attention is far from uniform, and no bias or scale at its neutral value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and "scale" not in name:
                parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return module.eval()


def build(name: str) -> VisionTransformer:
    torch.manual_seed(0)
    return sharpen(TOWERS[name]())


def clip() -> CLIP:
    torch.manual_seed(0)
    return sharpen(CLIP(20, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT)))


def coca() -> CoCa:
    torch.manual_seed(0)
    pool = {"attentional_pool": True, "attn_pooler_queries": 7, "attn_pooler_heads": 2, "output_tokens": True}
    decoder = {**TEXT, "width": 20}
    text = {**TEXT, "embed_cls": True, "output_tokens": True, "width": 20, "context_length": 7}
    return sharpen(CoCa(20, decoder, CLIPTextCfg(**text), CLIPVisionCfg(**VISION, **pool)))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    return torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(2))


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def close(actual: object, expected: object, atol: float = 3e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def fingerprint(model: nn.Module) -> dict:
    """Everything that a patch could leave behind."""
    return {
        path: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for path, m in model.named_modules()
    }


# -- identity, undo, wrappers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_identity_and_undo(name):
    model, x = build(name), images()
    with torch.no_grad():
        expected, before, keys = model(x), fingerprint(model), list(model.state_dict())
        for method in (tokred.ToMe(r=0), tokred.TopK(keep_rate=1.0), tokred.TopK(keep_rate=0.99),
                       tokred.ZeroTPrune(keep_rate=1.0), tokred.RandomTokens(keep_rate=1.0)):  # fmt: skip
            with tokred.patch(model, method):
                equal(model(x), expected)
        for method in METHODS.values():
            with tokred.patch(model, method) as patch:
                assert (first(model(x))[:, :1] - first(expected)[:, :1]).abs().max() > 1e-4
                planned = {*method.plan(OpenClipHost(model).info)} - {N}
                assert [count for _, count in patch.trace.counts] == sorted(planned, reverse=True)
                assert list(model.state_dict()) == keys
                assert fingerprint(model) != before
            assert fingerprint(model) == before
            equal(model(x), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_inside_clip_the_tower_is_reduced_and_the_text_is_not(method):
    model, x, text = clip(), images(), words()
    with torch.no_grad():
        image, sentence, logits = model.encode_image(x), model.encode_text(text), model.get_logits(x, text)[0]
        around = {path: state for path, state in fingerprint(model).items() if path and not path.startswith("visual")}
        with tokred.patch(model, method) as patch:
            now = fingerprint(model)
            assert {path: now[path] for path in around} == around
            assert torch.equal(model.encode_text(text), sentence)
            reduced = model.encode_image(x)
            assert (reduced - image).abs().max() > 1e-4
            assert patch.trace.total == N
            close(model.get_logits(x, text)[0], model.logit_scale.exp() * F.normalize(reduced, dim=-1)
                  @ F.normalize(sentence, dim=-1).T)  # fmt: skip
            close(model.encode_image(x, normalize=True), F.normalize(reduced, dim=-1))
        assert torch.equal(model.get_logits(x, text)[0], logits)
        with tokred.patch(model.visual, method):
            assert torch.equal(model.encode_image(x), reduced)


def test_towers_are_found_in_their_wrappers():
    for model in (clip(), coca(), sharpen(CustomTextCLIP(20, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT)))):
        host = find_host(model)
        assert isinstance(host, OpenClipHost)
        assert host.encoder is model.visual


def test_timm_towers_go_to_the_timm_host():
    cfg = CLIPVisionCfg(image_size=160, timm_model_name="test_vit3", timm_pool="map", timm_proj="none")
    model, x = CustomTextCLIP(96, cfg, CLIPTextCfg(**TEXT)).eval(), torch.randn(2, 3, 160, 160)
    sharpen(model.visual)
    with torch.no_grad():
        expected, sentence = model.encode_image(x), model.encode_text(words())
        with tokred.patch(model, tokred.ToMe(r=8)) as patch:
            assert (model.encode_image(x) - expected).abs().max() > 1e-4
            assert patch.trace.counts[-1] == (8, 100 - 9 * 8)
            assert torch.equal(model.encode_text(words()), sentence)
            grids = model.forward_intermediates(image=x, image_indices=[2, 8])["image_intermediates"]
            assert [grid.shape for grid in grids] == [(2, 96, 10, 10)] * 2
        assert find_host(model).encoder is model.visual.trunk
        assert torch.equal(model.encode_image(x), expected)


def test_coca_captions_from_reduced_images():
    model, x, text = coca(), images(), words()[:, :7]  # the text tower appends its class token
    with torch.no_grad():
        expected = model(x, text)
        with tokred.patch(model, tokred.ToMe(r=3)):
            actual = model(x, text)
        assert (actual["logits"] - expected["logits"]).abs().max() > 1e-4
        assert torch.equal(actual["text_features"], expected["text_features"])
        assert torch.equal(model(x, text)["logits"], expected["logits"])


# -- scores ------------------------------------------------------------------------------------------------------------


SEEN: dict[int, dict[str, Tensor]] = {}


class Probe(tokred.RandomTokens):
    """Records what the view of a block shows, then drops at random."""

    taps = frozenset({"qk", "v", "matrix", "input"})

    def reduce(self, view, rule):
        SEEN[view.layer] = {
            "matrix": view.attention_matrix(),
            "mass": view.attention_mass(),
            "class": view.class_attention(),
            "q": view.queries(),
            "k": view.keys(),
            "v": view.values(),
            "input": view.block_input(),
        }
        return super().reduce(view, rule)


def block_input(model: VisionTransformer, x: Tensor, layer: int) -> Tensor:
    """(B, N, C) as it enters a block of the unpatched tower."""
    x = model._embeds(x)
    x = x if model.transformer.batch_first else x.transpose(0, 1)
    for block in model.transformer.resblocks[:layer]:
        x = block(x)
    return x if model.transformer.batch_first else x.transpose(0, 1)


def own_weights(model: VisionTransformer, block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """q, k, v and attention weights of a block for x (B, N, C); the weights from nn.MultiheadAttention itself."""
    attention, y = block.attn, block.ln_1(x)
    parts = F.linear(y, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (part.reshape(*part.shape[:2], 4, 12).transpose(1, 2) for part in parts)
    if isinstance(attention, nn.MultiheadAttention):
        y = y if attention.batch_first else y.transpose(0, 1)
        matrix = attention(y, y, y, need_weights=True, average_attn_weights=False)[1]
    else:
        q, k = attention.ln_q(q), attention.ln_k(k)
        matrix = (q @ k.transpose(2, 3) / 12**0.5).softmax(-1)
    return {"q": q, "k": k, "v": v, "matrix": matrix}


@pytest.mark.parametrize("where", ["attn", "block"])
@pytest.mark.parametrize("backend", ["recompute", "auto"])
@pytest.mark.parametrize("name", ["plain", "tokens-first", "qk-norm", "all-custom"])
def test_captured_scores_are_the_attention_of_the_model(name, backend, where):
    model, x = build(name), images()
    with torch.no_grad():
        entering = block_input(model, x, 2)
        expected = own_weights(model, model.transformer.resblocks[2], entering)
        with tokred.patch(model, Probe(keep_rate=0.5, layers=(2,), where=where), score_backend=backend) as patch:
            model(x)
            formed = patch._attachment.formed
    seen = SEEN.pop(2)
    assert formed == ([2] if backend == "auto" and name in ("plain", "tokens-first") else [])
    assert expected["matrix"].amax(-1).mean() > 2 / (N + 1)  # attention that ranks tokens
    for key, value in expected.items():
        close(seen[key], value, atol=1e-6)
    close(seen["class"], expected["matrix"][:, :, 0, 1:], atol=1e-6)
    close(seen["mass"], expected["matrix"].sum(2)[:, :, 1:], atol=1e-5)
    close(seen["input"], entering, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "tokens-first", "all-custom"])
def test_topk_keeps_what_the_class_token_attends_to(name):
    model, x = build(name), images(4)
    with torch.no_grad():
        block = model.transformer.resblocks[1]
        matrix = own_weights(model, block, block_input(model, x, 1))["matrix"].mean(dim=1)
        for score, ranking in (("cls", matrix[:, 0, 1:]), ("mass", matrix.sum(dim=1)[:, 1:])):
            with tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(1,), score=score)) as patch:
                model(x)
                kept = patch.trace[0].kept
            assert torch.equal(kept, ranking.topk(12).indices.sort().values)


# -- dropping ----------------------------------------------------------------------------------------------------------


KEEPS = {
    **{key: METHODS[key] for key in ("topk", "topk-mass", "zero-tprune", "random")},
    "random-after-block": tokred.RandomTokens(keep_rate=0.6, layers=(1, 3), where="block"),
    "zero-tprune-attn": tokred.ZeroTPrune(schedule={0: (3, 0.9), 2: (2, 0.7)}, hook="attn"),
}


def run_with_hidden_keys(model: VisionTransformer, x: Tensor, alive: dict[int, Tensor]) -> Tensor:
    """(B, 1 + N, C) behind the blocks of the whole tower, whose attention is masked: the definition of a drop.

    alive: {block: (B, N) bool}, the tokens that are left behind this block.
    """
    x, hidden = model._embeds(x), None
    batch_first = model.transformer.batch_first
    for layer, block in enumerate(model.transformer.resblocks):
        mask = None
        if hidden is not None:
            mask = torch.where(hidden, float("-inf"), 0.0)[:, None, None].expand(-1, 4, N + 1, -1).flatten(0, 1)
        x = x if batch_first else x.transpose(0, 1)
        x = block(x, attn_mask=mask)
        x = x if batch_first else x.transpose(0, 1)
        if layer in alive:
            hidden = torch.cat([torch.zeros(x.shape[0], 1, dtype=torch.bool), ~alive[layer]], dim=1)
    return x


@pytest.mark.parametrize("method", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("name", ["plain", "layer-scale-quick-gelu", "tokens-first", "qk-norm", "all-custom"])
def test_a_drop_equals_hiding_the_keys_from_then_on(name, method):
    model, x = build(name), images()
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = model.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
        with tokred.patch(model, method) as patch:
            output, trace = model(x), patch.trace
        handle.remove()
        full = run_with_hidden_keys(model, x, {step.layer: step.group >= 0 for step in trace})
        assert len(trace) == 2
        kept = torch.cat([torch.zeros(2, 1, dtype=torch.long), trace[-1].origins + 1], dim=1)
        close(seen[0], full.gather(1, kept[..., None].expand(-1, -1, 48)))
        close(output, model._pool(full)[0] @ model.proj)


# -- merging -----------------------------------------------------------------------------------------------------------


class Slow:
    """ToMe in one image by its definition: a token of size s stands as s copies in attention and in every pool."""

    def __init__(self, model: VisionTransformer, image: Tensor, removals: list[int]) -> None:
        self.model = model
        x = model._embeds(image[None])[0]
        groups: list[list[int]] = [[i] for i in range(len(x))]
        for block, r in zip(model.transformer.resblocks, removals, strict=True):
            sizes = [len(group) for group in groups]
            copies = torch.cat([token.expand(size, -1) for token, size in zip(x, sizes, strict=True)])
            at = [sum(sizes[:i]) for i in range(len(sizes))]
            keys = own_weights(model, block, x[None])["k"][0].mean(dim=0)
            x = x + block.ls_1(self.attention(block, block.ln_1(copies))[at])
            x, groups = self.merge(x, groups, keys, r)
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        self.tokens = x
        self.groups = groups
        self.copies = torch.cat([token.expand(len(group), -1) for token, group in zip(x, groups, strict=True)])

    def attention(self, block: nn.Module, y: Tensor) -> Tensor:
        if not isinstance(block.attn, nn.MultiheadAttention):
            return block.ln_attn(block.attn(y[None]))[0]
        y = y[None] if self.model.transformer.batch_first else y[:, None]
        return block.attn(y, y, y, need_weights=False)[0].flatten(0, 1)

    def merge(self, x: Tensor, groups: list, keys: Tensor, r: int) -> tuple[Tensor, list]:
        r = min(r, (len(x) - 1) // 2)
        if r == 0:
            return x, groups
        keys = keys / keys.norm(dim=-1, keepdim=True)
        best = {a: max(range(1, len(x), 2), key=lambda b: float(keys[a] @ keys[b])) for a in range(2, len(x), 2)}
        sources = sorted(best, key=lambda a: -float(keys[a] @ keys[best[a]]))[:r]
        order = [a for a in range(0, len(x), 2) if a not in sources] + list(range(1, len(x), 2))
        tokens, merged = [], []
        for target in order:
            members = [target] + [a for a in sources if best[a] == target]
            sizes = torch.tensor([float(len(groups[i])) for i in members])
            tokens.append((x[members] * sizes[:, None]).sum(0) / sizes.sum())
            merged.append([cell for i in members for cell in groups[i]])
        return torch.stack(tokens), merged


REMOVALS = {"constant": (3, [3] * 5), "list": ([8, 0, 0, 3], [8, 0, 0, 3, 0]), "capped": (14, [14] * 5)}


@pytest.mark.parametrize("removals", REMOVALS.values(), ids=REMOVALS)
@pytest.mark.parametrize("name", TOWERS)
def test_tome_equals_copies(name, removals):
    model, x = build(name), images()
    given, per_layer = removals
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = model.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
        with tokred.patch(model, tokred.ToMe(r=given)) as patch:
            output, group = model(x), patch.trace[-1].group
        handle.remove()
        for b, image in enumerate(x):
            slow = Slow(model, image, per_layer)
            assert max(len(g) for g in slow.groups) > 1
            slots = {cell - 1: slot - 1 for slot, cells in enumerate(slow.groups) for cell in cells}
            assert group[b].tolist() == [slots[cell] for cell in range(N)]
            close(seen[0][b], slow.tokens)
            if name == "none":
                close(output[b], model._pool(slow.tokens[None])[0][0] @ model.proj)
                continue
            if name == "avg-ln-after":
                close(output[1][b], slow.tokens[1:])
            if "pool" in name:  # the tokens are the pool's queries
                close(output[1][b], model._pool(slow.copies[None])[1][0])
            close(first(output)[b], (model._pool(slow.copies[None])[0] @ model.proj)[0])


@pytest.mark.parametrize("name", ["avg", "attention-pool"])
def test_unweighted_pool_is_a_choice(name):
    model, x = build(name), images()
    with torch.no_grad():
        weighted, plain = (tokred.ToMe(r=3, weighted_pool=weigh) for weigh in (True, False))
        with tokred.patch(model, weighted) as patch:
            expected = first(model(x))
            patch.replace(plain)
            seen: list[Tensor] = []
            handle = model.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
            actual = first(model(x))
            handle.remove()
        close(actual, model._pool(seen[0])[0] @ model.proj, atol=1e-6)
        assert (actual - expected).abs().max() > 1e-4


def test_without_proportional_attention_sizes_do_not_act():
    """prop_attn=False leaves nn.MultiheadAttention of unscored blocks alone; the tokens see each other once each."""
    model, x = build("plain"), images()
    with torch.no_grad():
        with tokred.patch(model, tokred.ToMe(r=[8], prop_attn=False)):
            swapped = [type(block.attn) is not nn.MultiheadAttention for block in model.transformer.resblocks]
            actual = model(x)
        with tokred.patch(model, tokred.ToMe(r=[8])):
            assert all(type(block.attn) is not nn.MultiheadAttention for block in model.transformer.resblocks)
            assert (model(x) - actual).abs().max() > 1e-4
    assert swapped == [True, False, False, False, False]


def test_score_in_a_block_with_sizes_counts_copies():
    """Attention of a later layer to merged tokens is the attention to all their copies."""
    model, x = build("plain"), images(1)
    with torch.no_grad():
        methods = [tokred.ToMe(r=[8]), Probe(keep_rate=0.5, layers=(1,))]
        for backend in ("auto", "recompute"):
            with tokred.patch(model, methods, score_backend=backend):
                model(x)
            seen = SEEN.pop(1)
            slow = Slow(_shortened(model, 1), x[0], [8])
            matrix = own_weights(model, model.transformer.resblocks[1], slow.copies[None])["matrix"][0]
            ends = torch.tensor([len(group) for group in slow.groups]).cumsum(0)
            starts = ends - torch.tensor([len(group) for group in slow.groups])
            columns = torch.stack([matrix[:, starts, s:e].sum(-1) for s, e in zip(starts, ends, strict=True)], dim=-1)
            close(seen["matrix"][0], columns, atol=2e-6)


def _shortened(model: VisionTransformer, depth: int) -> VisionTransformer:
    short = copy.deepcopy(model)
    short.transformer.resblocks = short.transformer.resblocks[:depth]
    return short


# -- entry points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", ["plain", "tokens-first", "all-custom", "avg", "parallel-pool"])
def test_batch_equals_per_sample(name, method):
    model, x = build(name), images(3)
    with torch.no_grad(), tokred.patch(model, method):
        close(first(model(x)), torch.cat([first(model(image[None])) for image in x]), atol=2e-5)


@pytest.mark.parametrize("fill", ["nearest", "zeros"])
@pytest.mark.parametrize("method", [METHODS["tome-once"], METHODS["topk"], METHODS["topk-fuse"]], ids=repr)
@pytest.mark.parametrize("name", ["plain", "tokens-first"])
def test_feature_maps_come_back_on_the_full_grid(name, method, fill):
    model, x = build(name), images()
    options = {"indices": [4, 0, -2], "normalize_intermediates": True, "output_extra_tokens": True}
    with torch.no_grad():
        unpatched = model.forward_intermediates(x, **options)
        with tokred.patch(model, method, fill=fill) as patch:
            maps = model.forward_intermediates(x, **options)
            trace = patch.trace
            rows = model.forward_intermediates(x, **options, output_fmt="NLC")
            by_position = model.forward_intermediates(x, options["indices"], False, True, False, "NCHW", True)
            close(maps["image_features"], model(x), atol=1e-6)
    assert maps.keys() == unpatched.keys()
    equal(by_position, maps)
    equal(maps["image_intermediates_prefix"], rows["image_intermediates_prefix"])
    for layer, actual, short in zip((0, 3, 4), maps["image_intermediates"], rows["image_intermediates"], strict=True):
        assert actual.shape == (2, 48, 6, 4)
        steps = [step for step in trace if step.layer <= layer]
        assert short.shape[1] == (steps[-1].tokens_out if steps else N)
        for b in range(2):
            for cell in range(N):
                slot = int(steps[-1].group[b, cell]) if steps else cell
                if slot < 0 and fill == "nearest":
                    places = [divmod(origin, 4) for origin in steps[-1].origins[b].tolist()]
                    distance = [(cell // 4 - row) ** 2 + (cell % 4 - column) ** 2 for row, column in places]
                    slot = distance.index(min(distance))
                expected = short[b, slot] if slot >= 0 else torch.zeros(48)
                assert torch.equal(actual[b, :, cell // 4, cell % 4], expected)
    assert method.plan(OpenClipHost(model).info)[4] == short.shape[1] < N


def test_stopping_before_the_first_reduction_changes_nothing():
    model, x = build("plain"), images()
    options = {"indices": [1, 0], "stop_early": True, "intermediates_only": True}
    with torch.no_grad():
        expected = model.forward_intermediates(x, **options)
        with tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(3,))):
            equal(model.forward_intermediates(x, **options), expected)
            with pytest.raises(AssertionError, match="Output format"):
                model.forward_intermediates(x, output_fmt="NHWC")


def test_forward_intermediates_of_clip():
    model, x, text = clip(), images(), words()
    with torch.no_grad():
        expected = model.forward_intermediates(x, text)
        with tokred.patch(model, tokred.ToMe(r=3)):
            actual = model.forward_intermediates(x, text)
            image = model.encode_image(x, normalize=True)
    assert [y.shape for y in actual["image_intermediates"]] == [y.shape for y in expected["image_intermediates"]]
    close(actual["image_features"], image, atol=1e-6)
    equal(actual["text_intermediates"], expected["text_intermediates"])


def test_output_tokens_and_exit_restore():
    model, x = build("avg-ln-after"), images()
    with torch.no_grad():
        with tokred.patch(model, tokred.ToMe(r=3)) as patch:
            pooled_short, short = model(x)
            restored = patch.unmerge(short)
            assert short.shape == (2, N - 15, 48)
        with tokred.patch(model, tokred.ToMe(r=3), exit="restore"):
            pooled_long, long = model(x)
            assert long.shape == (2, N, 48)
            equal(long, restored)
            close(pooled_long, pooled_short)  # the mean over restored tokens is the mean by sizes
            rows = model.forward_intermediates(x, indices=1, output_fmt="NLC")
            assert rows["image_intermediates"][0].shape == (2, N, 48)
            close(rows["image_features"], pooled_long, atol=1e-6)
        with tokred.patch(model, tokred.TopK(keep_rate=0.5, layers=(2,)), exit="restore", fill="zeros") as patch:
            filled = model(x)[1]
            assert torch.equal(filled.abs().sum(-1) > 0, patch.trace[-1].group >= 0)


@pytest.mark.parametrize("name", ["attention-pool", "parallel-pool"])
def test_attention_pool_over_restored_tokens(name):
    model, x = build(name), images()
    with torch.no_grad(), tokred.patch(model, tokred.ToMe(r=3)) as patch:
        expected = model(x)
        patch.replace(tokred.ToMe(r=3), exit="restore")
        close(model(x), expected)


def test_pool_called_apart_from_the_blocks_weighs_by_size():
    model, x = build("avg"), images()
    with torch.no_grad(), tokred.patch(model, tokred.ToMe(r=3)):
        expected = model(x)
        close(model._pool(model.transformer(model._embeds(x)))[0] @ model.proj, expected, atol=1e-6)


def test_patch_dropout_leaves_no_grid():
    torch.manual_seed(0)
    model, x = sharpen(tower(patch_dropout=0.5)), images()
    with tokred.patch(model, tokred.ToMe(r=3)) as patch, torch.no_grad():
        model(x)
        assert patch.trace.grid == (6, 4)
        model.train()
        model(x)
        assert (patch.trace.total, patch.trace.grid) == (12, None)
        assert model.forward_intermediates(x, output_fmt="NLC")["image_intermediates"][-1].shape == (2, 1, 48)
        with pytest.raises(UnsupportedModelError, match="patch dropout"):
            model.forward_intermediates(x)


def test_attention_of_a_patched_block_still_answers_other_calls():
    for name, call in (("plain", lambda f, y: f(y, y, y)), ("all-custom", lambda f, y: f(y))):
        model, x = build(name), images()
        with torch.no_grad():
            y = block_input(model, x, 1)
            attention = model.transformer.resblocks[1].attn
            expected = call(attention, y)
            with tokred.patch(model, tokred.ToMe(r=3)):
                model(x)
                equal(call(attention, y), expected)


@pytest.mark.parametrize("average", [True, False])
def test_a_hook_that_draws_attention_maps_still_gets_them(average):
    model, x = build("plain"), images()
    maps: dict[int, Tensor] = {}
    with torch.no_grad():
        first_map = own_weights(model, model.transformer.resblocks[0], block_input(model, x, 0))["matrix"]
        with tokred.patch(model, tokred.ToMe(r=[8, 0, 3])):
            expected = model(x)
            for layer, block in enumerate(model.transformer.resblocks):
                asked = {"need_weights": True, "average_attn_weights": average}
                block.attn.register_forward_pre_hook(lambda m, args, kw, asked=asked: (args, {**kw, **asked}),
                                                     with_kwargs=True)  # fmt: skip
                block.attn.register_forward_hook(lambda m, args, out, layer=layer: maps.__setitem__(layer, out[1]))
            close(model(x), expected)
    close(maps[0], first_map.mean(dim=1) if average else first_map, atol=1e-6)
    assert [seen.shape[-1] for seen in maps.values()] == [N + 1, N - 7, N - 7, N - 10, N - 10]
    assert {seen.dim() for seen in maps.values()} == {3 if average else 4}


# -- life of a patch ---------------------------------------------------------------------------------------------------


LIFE = {key: METHODS[key] for key in ("tome-once", "topk", "zero-tprune")}


@pytest.mark.parametrize("method", LIFE.values(), ids=LIFE)
@pytest.mark.parametrize("name", ["plain", "all-custom", "parallel-pool"])
def test_copies_and_pickles(name, method):
    model, x = build(name), images()
    with torch.no_grad():
        plain = model(x)
        patch = tokred.patch(model, method)
        reduced = model(x)
        clone = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        patch.remove()
        equal(model(x), plain)
        for other in (clone, loaded):
            equal(other(x), reduced)
            tokred.unpatch(other)
            equal(other(x), plain)
            assert fingerprint(other) == fingerprint(model)


@pytest.mark.parametrize("method", LIFE.values(), ids=LIFE)
@pytest.mark.parametrize("name", ["plain", "tokens-first", "attention-pool"])
def test_checkpointing_gives_the_same_gradients(name, method):
    model, x = build(name).train(), images()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        first(model(x)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.transformer.parameters()]

    unreduced = gradients()
    with tokred.patch(model, method):
        expected = gradients()
        model.set_grad_checkpointing(True)
        actual = gradients()
        model.set_grad_checkpointing(False)
    equal(actual, expected)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(actual, unreduced, strict=True))


# of three blocks, as tracing takes its time
COMPILED = {
    "parallel-pool": tokred.ToMe(r=[8]),
    "tokens-first": tokred.ZeroTPrune(schedule={1: (3, 0.8)}),
    "all-custom": tokred.ToMe(r=[8, 0, 3]),
}


@pytest.mark.parametrize(("name", "method"), COMPILED.items(), ids=COMPILED)
def test_compiles_without_graph_breaks(name, method):
    model, x = _shortened(build(name), 3), images()
    torch._dynamo.reset()
    with tokred.patch(model, method):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            expected = model(x)
            close(compiled(x), expected, atol=1e-6)
    with torch.no_grad():
        assert (first(model(x)) - first(expected)).abs().max() > 1e-4


def test_threads_do_not_mix():
    model = build("attention-pool")
    inputs = [images(2), images(5)]
    outputs: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        with torch.no_grad():
            outputs[index] = [model(inputs[index])[0] for _ in range(15)]

    with tokred.patch(model, tokred.ToMe(r=3)):
        with torch.no_grad():
            expected = [model(x)[0] for x in inputs]
        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in (0, 1):
        assert len(outputs[index]) == 15
        for output in outputs[index]:
            close(output, expected[index], atol=1e-6)


@pytest.mark.parametrize("method", LIFE.values(), ids=LIFE)
@pytest.mark.parametrize("name", ["plain", "attention-pool"])
def test_bfloat16(name, method):
    model, x = build(name), images()
    with torch.no_grad(), tokred.patch(model, method):
        with torch.autocast("cpu", torch.bfloat16):
            output = first(model(x))
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()
        halved = first(model.bfloat16()(x.bfloat16()))
        assert halved.dtype == torch.bfloat16
        assert halved.isfinite().all()


# -- numbers and refusals ----------------------------------------------------------------------------------------------


def test_multiply_adds():
    with torch.device("meta"):
        model = VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512)
        pooling = VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512, attentional_pool=True,
                                    attn_pooler_queries=256, attn_pooler_heads=8)  # fmt: skip
    blocks = 12 * (12 * 197 * 768**2 + 2 * 197**2 * 768)
    counted = tokred.flops(model)
    assert counted.vision == blocks + 196 * 768 * 3 * 16 * 16 + 768 * 512
    assert f"{counted.vision / 1e9:.2f}" == "17.56"
    pool = 256 * 512 * 512 * 2 + 197 * 768 * 512 * 2 + 2 * 256 * 197 * 512
    assert tokred.flops(pooling).vision == counted.vision - 768 * 512 + pool + 512 * 512
    assert tokred.flops(model, method=tokred.ToMe(r=8)).vision / 1e9 == pytest.approx(13.1, abs=0.03)
    with pytest.raises(InvalidParameterError, match="position table"):
        tokred.flops(model, 256)


def test_multiply_adds_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("plain", "all-custom", "avg", "none", "attention-pool", "parallel-pool", "cascade-pool"):
        model, x = build(name).train(), images(1)
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * tokred.flops(model).vision, name


REFUSED = {
    "ModifiedResNet": lambda: ModifiedResNet([1, 1, 1, 1], 20, 4, image_size=32, width=8),
    "scaled_cosine_attn": lambda: tower(scaled_cosine_attn=True),
    "MultimodalTransformer": lambda: coca().text_decoder,
    "TextTransformer": lambda: coca().text,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    model = REFUSED[name]()
    with pytest.raises(UnsupportedModelError, match=OpenClipHost.refusals[name][:30]):
        tokred.patch(model, tokred.ToMe(r=3))


def test_refused_inside_clip():
    cfg = CLIPVisionCfg(layers=[1, 1, 1, 1], image_size=32, width=8)
    model = CLIP(20, cfg, CLIPTextCfg(**TEXT))
    with pytest.raises(UnsupportedModelError, match="ModifiedResNet is refused by the open_clip host"):
        tokred.patch(model, tokred.ToMe(r=3))


def test_scaled_cosine_attention_still_cannot_run():
    """The reason of the refusal: when open_clip mends it, this fails and the host can serve it."""
    with pytest.raises(RuntimeError, match="3D"):
        tower(scaled_cosine_attn=True)(images())


def test_foreign_attention_is_refused():
    model = build("plain")
    model.transformer.resblocks[1].attn = nn.Sequential(model.transformer.resblocks[1].attn)
    with pytest.raises(UnsupportedModelError, match="block 1 is a ResidualAttentionBlock with Sequential"):
        tokred.patch(model, tokred.ToMe(r=3))


@pytest.mark.parametrize("shape", [(N + 1, N + 1), (8, N + 1, N + 1)])
@pytest.mark.parametrize("method", [tokred.ToMe(r=3), tokred.RandomTokens(keep_rate=0.5, layers=(1,))], ids=repr)
def test_a_mask_of_the_caller_is_refused(method, shape):
    model, x = build("plain"), images()
    with torch.no_grad(), tokred.patch(model, method), pytest.raises(UnsupportedModelError, match="attention mask"):
        model.transformer(model._embeds(x), attn_mask=torch.zeros(shape))
