"""DualToken-ViT against LightViT's released modules (components) and our own specification's reference (spec_ref_*).

No official DualToken-ViT exists: the models here check agreement with our reading of the paper, not with the authors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ROOT
from tests.parity._golden import Case, Golden, read_manifest
from tokred.vision.backbones.dualtoken_block import BiDimMlp, DualTokenBlock, Merge, Stem
from tokred.vision.backbones.dualtoken_vit import DualTokenViT

METHOD = "dualtoken_vit"

#: options of the manifest -> arguments of DualTokenViT, where the names differ
RENAMED = {"dims": "embed_dims", "heads": "num_heads", "t": "global_tokens", "g_type": "g_mlp", "neck": "neck_dim"}
MODEL_OPTIONS = (
    *("embed_dims", "depths", "num_heads", "mlp_ratios", "img_size", "in_chans", "num_classes", "neck_dim"),
    *(
        "conv_ratio",
        "kernel",
        "global_tokens",
        "g_mlp",
        "g_ratio",
        "mix_order",
        "alpha",
        "enrich",
        "steps",
        "down_step",
    ),
    *("agg_norm", "agg_residual", "fusion", "resize", "init_values", "head_tokens", "drop_rate", "drop_path_rate"),
)
COMPONENT_OPTIONS = ("dim", "out_dim", "merge_hw", "image", "num_tokens", "mlp_ratio", "mlp_len", "in_chans", "seed")
#: weights that a model with this alpha does not build, because they cannot have an effect
NOT_BUILT = {0: r"global_token$|.*\.downsample\.(norm2|proj)\.|.*\.g_mlp\.", 1: r".*\.(down\.|norm_ds|agg)"}


def test_case(golden: Golden) -> None:
    golden.known(("status", "reference", "config", "kind"))
    with torch.no_grad():
        (check_model if "in.image" in golden else check_components)(golden)
    golden.finish()


def refuse_unknown(golden: Golden, options: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know the options {unknown}; it knows {sorted(known)}")


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


# -- LightViT's modules ----------------------------------------------------------------------------------------------


def check_components(golden: Golden) -> None:
    config, weights = golden.entry["config"], golden.state_dict()
    refuse_unknown(golden, config, COMPONENT_OPTIONS)
    dim = config["dim"]
    if "in.stem" in golden:
        images = golden["in.stem"]
        assert list(images.shape[2:]) == config.get("image", list(images.shape[2:]))
        stem = loaded(Stem(config.get("in_chans", images.shape[1]), dim), part(weights, "stem."))
        golden.check("out.stem", stem(images))
    if "in.merge_x" in golden:
        x, g = golden["in.merge_x"], golden.get("in.merge_g")
        assert list(x.shape[1:3]) == config.get("merge_hw", list(x.shape[1:3]))
        merge = loaded(Merge(dim, config["out_dim"], g is not None), part(weights, "merge."))
        merged, tokens = merge(x, g)
        golden.check("out.merge_x", merged)
        if g is not None:
            assert g.shape[1] == config.get("num_tokens", g.shape[1])
            golden.check("out.merge_g", tokens)
    if "in.mlp" in golden:
        x = golden["in.mlp"]
        assert x.shape[1] == config.get("mlp_len", x.shape[1])
        mlp = loaded(BiDimMlp(dim, int(dim * config["mlp_ratio"])), part(weights, "mlp."))
        golden.check("out.mlp", mlp(x))


def loaded(module: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    module.load_state_dict(weights)
    return module.eval()


# -- models ----------------------------------------------------------------------------------------------------------


def check_model(golden: Golden) -> None:
    options = model_options(golden)
    model, images = build(golden, options), golden["in.image"]
    assert list(images.shape[2:]) == list(options.get("img_size", images.shape[2:]))
    seen: dict[str, Tensor] = {}
    for s, stage in enumerate(model.stages):
        keep(stage, lambda out, s=s: seen.update({f"stage{s}": out[0], f"g{s}": out[1]}))
        for b, block in enumerate(stage.blocks):
            watch(block, f"s{s}b{b}", seen)
    keep(model.patch_embed, lambda out: seen.update(stem=out))
    logits = model(images)
    for name, value in seen.items():
        golden.check(f"out.{name}", value)
    if "out.norm" in golden:
        features = model.forward_features(images)
        golden.check("out.norm", features.permute(0, 2, 3, 1) if features.ndim == 4 else features)
    golden.check("out.logits", logits)
    unused = [name for name in golden._tensors if re.match(r"out\.s\d+b\d+\.x_(ds|ga)$", name) and name[4:] not in seen]
    if unused and options.get("alpha") == 1:  # stored by a reference that computes what then has no effect
        check_unused(golden, {**options, "alpha": 0.5}, unused, seen)


def model_options(golden: Golden) -> dict[str, Any]:
    """The case's config as arguments of DualTokenViT."""
    options = {RENAMED.get(key, key): value for key, value in golden.entry["config"].items() if key != "seed"}
    refuse_unknown(golden, options, MODEL_OPTIONS)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if options.get("g_mlp", "mix") == "mix":
        options.pop("g_ratio", None)  # the specification reads it for "mlp" only
    return options


def build(golden: Golden, options: Mapping[str, Any]) -> DualTokenViT:
    """The case's model in eval mode. Weights of a part that is cut off may lack, those without effect may be there."""
    model = DualTokenViT(**options)
    missing, unexpected = model.load_state_dict(golden.state_dict(), strict=False)
    pattern = NOT_BUILT.get(options.get("alpha", 0.5), r"$.")
    foreign = [name for name in unexpected if not re.match(pattern, name)]
    assert not foreign, f"{golden.case.name}: weights that the model has not: {foreign}"
    if "cut" in golden.entry:
        parts = {name.split(".blocks.")[0].split(".downsample.")[0] for name in missing}
        stored = [name for name in golden.state_dict() if name.startswith(tuple(f"{part}." for part in parts))]
        assert not stored, f"{golden.case.name}: {sorted(parts)} are cut off, but for {stored}"
    else:
        assert not missing, f"{golden.case.name}: weights that the case lacks: {missing}"
    return model.eval()


def keep(module: nn.Module, store: Callable[[Any], Any]) -> None:
    module.register_forward_hook(lambda _module, _args, out: store(out) and None)


def watch(block: DualTokenBlock, name: str, seen: dict[str, Tensor]) -> None:
    """Record the inside of one block."""
    keep(block.conv_enc, lambda out: seen.update({f"{name}.x_local": out}))
    keep(block.bcast, lambda out: seen.update({f"{name}.x_global": out}))
    keep(block, lambda out: seen.update({f"{name}.g_new": out[1]}))
    if not block.switches.reads_image:
        return
    keep(block.down, lambda out: seen.update({f"{name}.x_ds": out.flatten(2).transpose(1, 2)}))
    aggregate = block.aggregate

    def spy(local: Tensor) -> Tensor:
        seen[f"{name}.x_ga"] = aggregate(local)
        return seen[f"{name}.x_ga"]

    block.aggregate = spy  # type: ignore[method-assign]


def check_unused(golden: Golden, options: Mapping[str, Any], names: list[str], seen: Mapping[str, Tensor]) -> None:
    model = build(golden, options)
    for name in names:
        _, place, what = name.split(".")
        s, b = map(int, re.findall(r"\d+", place))
        block, inside = model.stages[s].blocks[b], dict[str, Tensor]()
        watch(block, place, inside)
        block.aggregate(seen[f"{place}.x_local"])
        golden.check(name, inside[f"{place}.{what}"])


# -- the runner itself -----------------------------------------------------------------------------------------------

SMALL = read_manifest(ROOT / "tests" / "golden" / METHOD / "manifest.json")


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_every_output_tensor_is_compared(case: Case) -> None:
    """With the copy that ships: each output, spoilt in its last place, makes the case fail."""
    outputs = [name for name in case.load() if name.startswith("out.")]
    assert outputs
    for name in outputs:
        golden = Golden(case)
        golden._tensors[name].view(-1)[-1:] += 1e-2
        with pytest.raises(AssertionError):
            test_case(golden)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_unknown_options_fail(case: Case) -> None:
    inside = replace(case, entry={**case.entry, "config": {**case.entry["config"], "window": 7}})
    with pytest.raises(pytest.fail.Exception, match="window"):
        test_case(Golden(inside))
    with pytest.raises(pytest.fail.Exception, match="precision"):
        test_case(Golden(replace(case, entry={**case.entry, "precision": "half"})))


@pytest.mark.parametrize("case", [case for case in SMALL if "in.image" in case.load()], ids=lambda c: c.name)
def test_a_missing_or_foreign_weight_fails(case: Case) -> None:
    golden = Golden(case)
    golden._tensors["sd.stages.0.blocks.0.window.weight"] = torch.zeros(2)
    with pytest.raises(AssertionError, match=r"window\.weight"):
        test_case(golden)
    golden = Golden(case)
    del golden._tensors["sd.stages.0.blocks.0.norm2.weight"]
    with pytest.raises(AssertionError, match="stages"):
        test_case(golden)


@pytest.mark.parametrize("alpha", [0, 1])
@pytest.mark.parametrize("case", [case for case in SMALL if "in.image" in case.load()], ids=lambda c: c.name)
def test_a_reference_that_builds_everything_at_the_ends_of_alpha(case: Case, alpha: int) -> None:
    """What comes before the weighted sum of the first block is the same at every alpha."""
    golden = Golden(replace(case, entry={**case.entry, "config": {**case.entry["config"], "alpha": alpha}}))
    same = ("out.stem", *(f"out.s0b0.{name}" for name in ("x_local", "x_ds", "x_ga")))
    golden._tensors = {k: v for k, v in golden._tensors.items() if not k.startswith("out.") or k in same}
    if alpha == 0:
        golden._tensors["out.s0b0.g_new"] = golden._tensors["out.s0b0.x_ga"]
    test_case(golden)
    golden = Golden(golden.case)  # the rest of the recorded outputs must not pass
    with pytest.raises(AssertionError):
        test_case(golden)
