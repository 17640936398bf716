"""LookupViT against its goldens, which check agreement with our own specification, not with the authors.

No official code exists. `unofficial` holds runs of two third-party versions: they are held against the primitives of
the block, as their manifest describes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import golden_dirs
from tests.parity._golden import Case, Golden, collect
from tokred.vision.backbones.lookup_block import (
    LookupBlock,
    LookupGather,
    LookupInfusion,
    gather_weights,
    infusion_weights,
    lookup_scores,
    resize_tokens,
)
from tokred.vision.backbones.lookup_convert import to_lookup_vit
from tokred.vision.backbones.lookup_vit import LookupViT

METHOD = "lookup_vit"

#: option of a manifest's config -> argument of LookupViT; everything else goes by its own name
MODEL = {
    "img_size": "img_size",
    "patch": "patch_size",
    "d": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "p": "mlp_ratio",
    "q": "lookup_mlp_div",
    "pool": "global_pool",
    **{name: name for name in ("reuse", "final_infusion", "num_classes", "class_token", "antialias", "init")},
    **{name: name for name in ("compressed_pos", "compressed_grid", "qk_norm", "query_scale", "infuse_prefix")},
    **{name: name for name in ("pool_lookup", "attn_qk_norm", "in_chans", "reg_tokens", "no_embed_class")},
    **{name: name for name in ("init_values", "qkv_bias", "pre_norm", "dynamic_img_size")},
    **{name: name for name in ("patch_size", "embed_dim", "num_heads", "mlp_ratio", "lookup_mlp_div", "global_pool")},
}
#: option of a drop-in case -> argument of to_lookup_vit
CONVERT = {
    "q": "lookup_mlp_div",
    **{name: name for name in ("lookup_mlp_div", "reuse", "final_infusion", "infuse_prefix", "antialias")},
}
RUN = ("grids", "seed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases of `unofficial`, where a golden folder has it (the copy in this repository does not)."""
    if "unofficial" in metafunc.fixturenames:
        method = f"{METHOD}/unofficial"
        if any((folder / method / "manifest.json").is_file() for folder in golden_dirs(metafunc.config)):
            cases = collect(metafunc.config, method)
        else:
            cases = [pytest.param(None, id="none", marks=pytest.mark.skip(reason="no unofficial goldens here"))]
        metafunc.parametrize("unofficial", cases)


@torch.no_grad()
def test_case(golden: Golden) -> None:
    run_case(golden)
    golden.finish()


@pytest.mark.parametrize("name", ["spec_ref_resoftmax", "dropin_vit"])
def test_spoiled_outputs_and_unknown_options_fail(name: str) -> None:
    folder = Path(__file__).resolve().parents[1] / "golden" / METHOD
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(entry for entry in manifest["cases"] if entry["file"].startswith(name))
    case = Case(name, entry, manifest, folder)
    for key in [key for key in Golden(case)._tensors if key.startswith("out.")]:
        spoiled = Golden(case)
        spoiled._tensors[key] = spoiled._tensors[key] + 1e-2
        with torch.no_grad(), pytest.raises(AssertionError, match=key):
            run_case(spoiled)
    unknown = dataclasses.replace(case, entry={**entry, "config": {**entry["config"], "gating": True}})
    with torch.no_grad(), pytest.raises(pytest.fail.Exception, match="gating"):
        run_case(Golden(unknown))
    unread = Golden(case)
    unread._tensors["out.g3x3.elsewhere"] = torch.zeros(1)
    with torch.no_grad():
        run_case(unread)
    with pytest.raises(AssertionError, match="elsewhere"):
        unread.finish()


def run_case(golden: Golden) -> None:
    golden.known(("config",))
    config = golden.entry["config"]
    if "vit" in config:
        check_drop_in(golden, config)
    else:
        check_model(golden, config)


def options(golden: Golden, config: dict[str, Any], names: dict[str, str], others: tuple[str, ...]) -> dict[str, Any]:
    unknown = [key for key in config if key not in names and key not in others]
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know {unknown}; it knows {sorted({*names, *others})}")
    found = {names[key]: value for key, value in config.items() if key in names}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


# -- the model -------------------------------------------------------------------------------------------------------


def check_model(golden: Golden, config: dict[str, Any]) -> None:
    made, weights = options(golden, config, MODEL, RUN), golden.state_dict()
    if made.get("qk_norm") and "blocks.0.attn.q_norm.weight" in weights:
        made["attn_qk_norm"], made["qk_norm"] = True, "blocks.0.gather.q_norm.weight" in weights
    model = LookupViT(**made)
    model.load_state_dict(weights)
    model.eval()
    for grid in config["grids"]:
        model.set_compressed_grid(tuple(grid), allow_larger=True)
        seen = record(model, golden["in.image"])
        for name, value in seen.items():
            golden.check(f"out.g{grid[0]}x{grid[1]}.{name}", value)


def record(model: LookupViT, image: Tensor) -> dict[str, Tensor]:
    """All that the manifests name, of one forward pass."""
    seen: dict[str, Tensor] = {}

    def watch(i: int, block: LookupBlock) -> Iterator[Any]:
        def before(_: nn.Module, args: Any) -> None:
            seen[f"b{i}.zp_in"], seen[f"b{i}.zl_in"] = args[:2]

        def gathered(module: Any, args: Any, out: Any) -> None:
            q, k, _ = module.project(*args[:2])
            seen[f"b{i}.attn"] = gather_weights(lookup_scores(q, k, module.scale))
            seen[f"b{i}.zp_gather"] = args[0] + out[0]

        def infused(_: nn.Module, args: Any, out: Tensor) -> None:
            seen[f"b{i}.zl_infuse"] = seen[f"b{i}.zl_in"] + out

        def after(_: nn.Module, args: Any, out: Any) -> None:
            seen[f"b{i}.zp"], seen[f"b{i}.zl"] = out

        yield block.register_forward_pre_hook(before)
        yield block.gather.register_forward_hook(gathered)
        if block.infuse is not None:
            yield block.infuse.register_forward_hook(infused)
        yield block.register_forward_hook(after)

    handles = [handle for i, block in enumerate(model.blocks) for handle in watch(i, block)]
    seen["features"] = model.forward_features(image)
    for handle in handles:
        handle.remove()
    seen["logits"] = model(image)
    seen["zp0"], seen["zl0"] = seen["b0.zp_in"], seen["b0.zl_in"]
    return seen


# -- the drop-in -----------------------------------------------------------------------------------------------------


def check_drop_in(golden: Golden, config: dict[str, Any]) -> None:
    converted = options(golden, config, CONVERT, ("vit", "init_modes", "mlp_l", *RUN))
    if config.get("mlp_l", "fc2 zero, fc1 irrelevant") != "fc2 zero, fc1 irrelevant":
        pytest.fail(f"{golden.case.name}: mlp_l={config['mlp_l']!r} is not known to this runner")
    weights = {name[4:]: golden[name] for name in golden._tensors if name.startswith("vit.")}
    image = golden["in.image"]
    for mode in config["init_modes"]:
        model: Any = timm.models.vision_transformer.VisionTransformer(**config["vit"])
        model.load_state_dict(weights)
        golden.check("out.vit_logits", model.eval()(image))
        to_lookup_vit(model, tuple(config["grids"][0]), mode, **converted)
        for grid in config["grids"]:
            model.set_compressed_grid(tuple(grid), allow_larger=True)
            golden.check(f"out.{mode}.g{grid[0]}x{grid[1]}.logits", model(image))


# -- third-party versions --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_unofficial(unofficial: Any) -> None:
    if isinstance(unofficial, str):
        pytest.fail(unofficial, pytrace=False)
    golden = Golden(unofficial)
    golden.known(("config", "reference"))
    runs = {"lokiwizard": check_lokiwizard, "lucidrains": check_lucidrains}
    names = [name for name in runs if golden.entry["reference"].startswith(name)]
    if not names:
        pytest.fail(f"{golden.case.name}: unknown reference {golden.entry['reference']!r}")
    runs[names[0]](golden)
    assert golden._compared


def check_lokiwizard(golden: Golden) -> None:
    """Post-softmax weights of the gathering reused transposed, bilinear resize without antialias."""
    config, heads = golden.entry["config"], golden.entry["config"]["heads"]
    sd = golden.state_dict()
    side, small = config["image_size"] // config["lookup_patch_size"], config["num_compressed_patches"]
    zp, zl = golden["out.b0.in_compressed"], golden["out.b0.in_lookup"]

    # tokens: unfolded patches are resized as channels, then both streams share one linear layer
    patches = F.unfold(golden["in.image"], config["lookup_patch_size"], stride=config["lookup_patch_size"])
    by_pixel = patches.unflatten(1, (config["in_channels"], -1)).transpose(1, 2).flatten(1, 2).transpose(1, 2)
    small_patches = resize_tokens(by_pixel, (side, side), (small, small), antialias=False)
    golden.check("out.b0.in_lookup", F.linear(by_pixel, sd["fc.weight"], sd["fc.bias"]) + sd["pos_embedding"])
    compressed = F.linear(small_patches, sd["fc.weight"], sd["fc.bias"]) + sd["pos_embedding_compress"]
    golden.check("out.b0.in_compressed", compressed)

    def part(name: str) -> tuple[Tensor, Tensor]:
        return sd[f"transformer.0.{name}.weight"], sd[f"transformer.0.{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *part("norm"))

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """torch's multi-head attention, which projects once more, on our scores and weights."""
        packed, bias = sd[f"transformer.0.{name}.in_proj_weight"].chunk(3), sd[f"transformer.0.{name}.in_proj_bias"]
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, w, b in zip((q, k, v), packed, bias.chunk(3), strict=True)
        )
        weights = gather_weights(lookup_scores(q, k, q.shape[-1] ** -0.5))
        return F.linear((weights @ v).transpose(1, 2).flatten(2), *part(f"{name}.out_proj")), weights

    q, k = norm(F.linear(zp, *part("q_linear"))), norm(F.linear(zl, *part("k_linear")))
    gathered, weights = attend("cross_attention", q, k, F.linear(zl, *part("v_linear")))
    golden.check("out.b0.attn_headmean", weights.mean(dim=1))
    golden.check("out.b0.gather", gathered)
    refined = zp + gathered
    refined = refined + attend("self_attention", *([refined] * 3))[0]
    refined = F.linear(norm(refined), *part("fc"))
    lookup = zl + infusion_weights(weights.mean(dim=1), "transpose") @ refined

    def ffn(x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, *part("ffn.0"))), *part("ffn.2"))

    golden.check("out.b0.lookup", ffn(norm(lookup)))
    golden.check("out.b0.compressed", ffn(refined))


def check_lucidrains(golden: Golden) -> None:
    """Logits of the gathering, transposed and normalised anew; our modules with its weights."""
    config, sd = golden.entry["config"], golden.state_dict()
    dim, heads = config["dim"], config["cross_attn_heads"]
    if config["cross_attn_dim_head"] * heads != dim:
        pytest.fail(f"{golden.case.name}: heads of another width than {dim} / {heads} have no counterpart here")
    plain = nn.LayerNorm(dim)
    gather = LookupGather(plain, dim, heads, qkv_bias=False, proj_bias=False, reuse="resoftmax")
    gather.fused_attn = False
    infuse = LookupInfusion(plain, dim, heads, bias=False, proj_bias=False, reuse="resoftmax")
    for ours, theirs in [
        (gather.norm_p.weight, 1 + sd["layers.0.2.norm.gamma"]),
        (gather.norm_l.weight, 1 + sd["layers.0.2.norm_context.gamma"]),
        (gather.q.weight, sd["layers.0.2.to_q.weight"]),
        (gather.kv.weight, torch.cat([sd["layers.0.2.to_k.weight"], sd["layers.0.2.to_v.weight"]])),
        (gather.proj.weight, sd["layers.0.2.to_out.1.weight"]),
        (infuse.norm.weight, 1 + sd["layers.0.3.norm_context.gamma"]),
        (infuse.v.weight, sd["layers.0.3.to_v.weight"]),
        (infuse.proj.weight, sd["layers.0.3.to_out.1.weight"]),
    ]:
        ours.copy_(theirs)
    side, small = (config["image_size"] // config[name] for name in ("highres_patch_size", "patch_size"))
    zl = golden["out.b0.in_lookup"]
    golden.check("out.b0.in_compressed", resize_tokens(zl, (side, side), (small, small), antialias=False))
    update, scores = gather(golden["out.b0.in_compressed"], zl)
    golden.check("out.b0.gather", update)
    golden.check("out.b0.qk_sim", scores)
    golden.check("out.b0.infusion", infuse(golden["out.b0.in_refined_compressed"], scores))
