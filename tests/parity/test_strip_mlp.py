"""Strip-MLP against the released code: whole networks with their gradients, and the detector's windows.

A folder has two manifests: `manifest.json` (the classifier) and `manifest_windowed.json` (entries `block` and `net`, of
MLP-DINO, whose groups always have patch 2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import ROOT, golden_dirs
from tests.parity._golden import Case, Golden, collect, read_manifest
from tokred.vision.backbones.strip_mlp import StripMixing, StripMLP, axis_windows, strip_groups

METHOD = "strip_mlp"
DEFAULT = (1e-4, 1e-4)  # the specification's tolerance, absolute and relative


def read_windowed(path: Path) -> list[Case]:
    """`manifest_windowed.json`: every entry that names a file is a case."""
    manifest = json.loads(path.read_text())
    entries = {name: entry for name, entry in manifest.items() if isinstance(entry, Mapping) and "file" in entry}
    return [Case(name, entry, manifest, path.parent) for name, entry in entries.items()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "windowed" not in metafunc.fixturenames:
        return
    found: list[Any] = []
    for folder in golden_dirs(metafunc.config):
        path = folder / METHOD / "manifest_windowed.json"
        if path.is_file():
            label = str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.parent.name
            cases = read_windowed(path)
            assert cases, f"{path} lists no case"
            found += [pytest.param(Golden(case), id=f"{label}/{case.name}") for case in cases]
    if not found:  # a folder of the caller's own may have no windows; `golden` has said if it has nothing at all
        assert collect(metafunc.config, METHOD)
        found = [pytest.param(None, id="none", marks=pytest.mark.skip(reason="no manifest_windowed.json"))]
    metafunc.parametrize("windowed", found)


def test_case(golden: Golden) -> None:
    check_network(golden)
    golden.finish()


def test_windowed(windowed: Golden) -> None:
    check = {"block": check_windowed_block, "net": check_windowed_net}
    kind = "block" if "cases" in windowed.entry else "net"
    check[kind](windowed)
    windowed.finish()


# -- the classifier --------------------------------------------------------------------------------------------------

INTERMEDIATES = {
    "dwsc": "token_mixing.dwsc",
    "smlp_block.mlp": "token_mixing.smlp_block.mlp",
    "proj_h_raw": "token_mixing.smlp_block.proj_h",
    "fuse_h": "token_mixing.smlp_block.fuse_h",
    "proj_w_raw": "token_mixing.smlp_block.proj_w",
    "cgsmm": "token_mixing.smlp_block.fuse_w",
    "lsmm_fc_h": "token_mixing.smlp_block.fc_h",
    "lsmm_fc_w": "token_mixing.smlp_block.fc_w",
    "lsmm_reweight_logits": "token_mixing.smlp_block.reweight",
    "smlp_block": "token_mixing.smlp_block",
    "grn": "channel_mixing.grn",
    "channel_mixing": "channel_mixing",
}


def check_network(golden: Golden) -> None:
    golden.known(("config", "batch", "num_params", "dims", "cgsmm_patch_rule"))
    state_tolerances(golden)
    case = golden.entry
    model = StripMLP(**case["config"]).eval()
    image = golden["in.image"].clone().requires_grad_()
    assert sum(p.numel() for p in model.parameters()) == case.get("num_params", number_of_parameters(model))
    dims = [info["num_chs"] for info in model.feature_info]
    assert dims == case.get("dims", dims)
    assert len(image) == case.get("batch", len(image))
    patch = case["config"].get("cgsmm_patch", "auto")
    for rule in case.get("cgsmm_patch_rule", ()):
        assert strip_groups(rule["channels"], patch) == (rule["C1"], rule["group_C"])
        assert strip_groups(rule["channels"], rule["patch"]) == (rule["C1"], rule["group_C"])
    if "cut" in case:  # the small copy: what it lacks feeds no tensor that it has
        assert not model.load_state_dict(golden.state_dict(), strict=False).unexpected_keys
    else:
        model.load_state_dict(golden.state_dict())

    seen = outputs(model)
    logits = model(image)
    golden.check("out.patch_embed", seen["patch_embed"], "forward")
    for stage in range(1, 5):
        golden.check(f"out.stage{stage}.input", seen[f"blocks{stage}.0.input"], "forward")
        golden.check(f"out.stage{stage}.output", seen[f"blocks{stage}"], "forward")
        for block in range(len(getattr(model, f"blocks{stage}"))):
            for name, module in INTERMEDIATES.items():
                golden.check(f"out.blocks{stage}.{block}.{name}", seen[f"blocks{stage}.{block}.{module}"], "forward")
    golden.check("out.final_norm_map", lambda: model.forward_features(image), "forward")
    golden.check("out.pooled", lambda: model.forward_head(model.forward_features(image), pre_logits=True), "forward")
    golden.check("out.logits", logits, "forward")

    (logits * torch.arange(1, logits.shape[1] + 1)).sum().backward()
    first = model.blocks1[0].token_mixing.smlp_block
    check_gradient(golden, "out.grad_input", image.grad)
    check_gradient(golden, "out.grad_proj_h", first.proj_h.weight.grad)
    check_gradient(golden, "out.grad_relpos_h", first.relate_pos_h.embeddings_table.grad)


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """Filled by the next forward: what leaves each module, and enters each block."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output
            seen.update({f"{name}.input": x for x in given})

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    return seen


def number_of_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_gradient(golden: Golden, name: str, got: Tensor | None) -> None:
    """Tolerances of gradients are relative to their largest entry."""
    if name not in golden:
        return
    assert got is not None
    scale = golden[name].abs().max().item()
    atol, rtol = golden._tolerances["grad"]
    golden._tolerances["scaled"] = (atol * scale, rtol)
    golden.check(name, got, "scaled")


# -- the detector's windows ------------------------------------------------------------------------------------------


def check_windowed_block(golden: Golden) -> None:
    golden.known(("channels", "unit", "batch", "cases", "cgsmm_patch"))
    state_tolerances(golden)
    case = golden.entry
    side = case["unit"]
    block = StripMixing(case["channels"], side, case.get("cgsmm_patch", 2), windowed=True).eval()
    block.load_state_dict(golden.state_dict())
    for size in case["cases"]:
        assert set(size) <= {
            "size",
            *(f"{what}_{axis}" for what in ("starts", "overlap", "last_overlap") for axis in "hw"),
        }
        for axis, length in zip("hw", size["size"], strict=True):
            starts = axis_windows(length, side)
            assert list(starts) == size.get(f"starts_{axis}", list(starts))
            overlaps = [a + side - b for a, b in pairwise(starts)]
            clipped = size.get(f"last_overlap_{axis}", 0)
            expected = [size[f"overlap_{axis}"]] * len(overlaps) if f"overlap_{axis}" in size else overlaps
            assert overlaps == ([*expected[:-1], clipped] if clipped else expected)
        name = "x".join(map(str, size["size"]))
        x = golden[f"in.{name}"]
        assert len(x) == case.get("batch", len(x))
        with torch.no_grad():
            golden.check(f"out.{name}", block(x), "forward")


def check_windowed_net(golden: Golden) -> None:
    golden.known(("config", "image_size", "batch", "cgsmm_patch"))
    state_tolerances(golden)
    case, image = golden.entry, golden["in.image"]
    assert list(image.shape[-2:]) == list(case.get("image_size", image.shape[-2:]))
    assert len(image) == case.get("batch", len(image))
    options = {"cgsmm_patch": case.get("cgsmm_patch", 2), **case["config"]}
    weights = golden.state_dict()
    if "head.weight" not in weights:  # a detector has no classifier
        options["num_classes"] = 0
    model = StripMLP(**options, window_size="train").eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        levels = model.forward_intermediates(image, [1, 2, 3], norm=True, intermediates_only=True)
        for n, level in enumerate(levels):
            golden.check(f"out.level{n}", level, "forward")
        golden.check("out.logits", lambda: model(image), "forward")


def state_tolerances(golden: Golden) -> None:
    """One text for everything is that of forward passes; what a manifest leaves open is the specification's."""
    stated = golden._tolerances
    named = {"forward": stated["floats"] if golden.case.manifest.get("tolerance") else DEFAULT, "grad": (1e-3, 1e-3)}
    golden._tolerances = {**named, **stated}


# -- the runner itself -----------------------------------------------------------------------------------------------


def copied(tmp_path: Path) -> Path:
    for path in (ROOT / "tests" / "golden" / METHOD).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def spoil(folder: Path, file: str, tensor: str, by: float = 1e-2) -> None:
    tensors = load_file(folder / file)
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor].view(-1)[0] += by
    save_file(tensors, folder / file)


@pytest.mark.parametrize(
    "tensor", ["out.stage3.output", "out.blocks1.0.cgsmm", "out.stage2.input", "sd.conv_s1_28.weight"]
)
def test_a_spoiled_network_fails(tmp_path, tensor):
    folder = copied(tmp_path)
    (case,) = read_manifest(folder / "manifest.json")
    check_network(Golden(case))
    spoil(folder, case.entry["file"], tensor, by=1e-1)
    with pytest.raises(AssertionError):
        check_network(Golden(case))


def test_a_spoiled_window_fails(tmp_path):
    folder = copied(tmp_path)
    (case,) = read_windowed(folder / "manifest_windowed.json")
    check_windowed_block(Golden(case))
    spoil(folder, case.entry["file"], "out.20x13")
    with pytest.raises(AssertionError):
        check_windowed_block(Golden(case))


def test_an_unknown_option_and_an_unread_tensor_fail(tmp_path):
    folder = copied(tmp_path)
    (case,) = read_manifest(folder / "manifest.json")
    changed = Case(case.name, {**case.entry, "surprise": 1}, case.manifest, case.folder)
    with pytest.raises(pytest.fail.Exception, match="surprise"):
        check_network(Golden(changed))
    config = {**case.entry["config"], "surprise": 1}
    with pytest.raises(TypeError, match="surprise"):
        check_network(Golden(Case(case.name, {**case.entry, "config": config}, case.manifest, case.folder)))
    tensors = load_file(folder / case.entry["file"])
    save_file({**tensors, "out.surprise": torch.zeros(1)}, folder / case.entry["file"])
    golden = Golden(case)
    check_network(golden)
    with pytest.raises(AssertionError, match="surprise"):
        golden.finish()
