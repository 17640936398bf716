"""LlamaGen's image tokenizer through diffusers' VQModel, its 2-D positions, and its sampling filter.

Token-Shuffle itself has no released code to compare with: its oracles are in tests/generation/test_token_shuffle*.py.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file
from torch import Tensor
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from tests.parity._golden import Case, Golden, collect
from tokred.core.errors import InvalidParameterError
from tokred.generation.llamagen_vq import VQTokenizer, official_state_dict, vq_state_dict
from tokred.generation.token_shuffle_ops import grid_angles

METHOD = "token_shuffle"

WEIGHTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
CONFIG = ("codebook_size", "codebook_embed_dim", "ch", "ch_mult", "num_res_blocks", "z_channels")
RUN = ("batch", "height", "width", "rope_base")
#: manifest's word for a tolerance, where it is not the tensor's name
KINDS = {"rec_from_codes": "rec", "rope2d.freqs": "rope2d", "rope2d.y": "rope2d"}


class SplitCase(Case):
    """A case whose entry names the files that it consists of."""

    def load(self) -> dict[str, Tensor]:
        paths = [self.folder / part["file"] for part in self.entry["files"].values()]
        return {key: value for path in paths for key, value in load_file(path).items()}


def golden_of(case: Case) -> Golden:
    golden = Golden(SplitCase(case.name, case.entry, case.manifest, case.folder))
    stated = {**case.manifest.get("tolerance", {}), **case.entry.get("tolerance", {})}
    golden._tolerances |= {name: (float(v), 0.0) for name, v in stated.items() if isinstance(v, (int, float))}
    return golden


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    if isinstance(request.param, str):
        pytest.fail(request.param, pytrace=False)
    return golden_of(request.param)


@torch.no_grad()
def test_case(golden: Golden, tmp_path: Path) -> None:
    run_case(golden, tmp_path)
    golden.finish()


def run_case(golden: Golden, folder: Path) -> None:
    golden.known(("config", "files"))
    config = golden.entry["config"]
    unknown = [key for key in config if key not in CONFIG and key not in RUN]
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know {unknown}; it knows {sorted((*CONFIG, *RUN))}")
    weights = {name: golden[name] for name in golden._tensors if name.startswith(WEIGHTS)}
    tokenizer = whole(weights, folder) if "encoder.conv_in.weight" in weights else quantiser(weights)
    check_config(tokenizer, config)
    check_codes(golden, tokenizer)
    check_filters(golden)
    check_positions(golden)


def whole(weights: dict[str, Tensor], folder: Path) -> VQTokenizer:
    """Written as the release is, and loaded as one: strictly, and the same when written again."""
    torch.save({"model": weights}, folder / "vq.pt")
    tokenizer = VQTokenizer.from_official(folder / "vq.pt")
    again = official_state_dict(tokenizer.vqvae)
    assert set(again) == set(weights)
    rows = "quantize.embedding.weight"
    assert all(torch.equal(again[name], weights[name]) for name in weights if name != rows)
    torch.testing.assert_close(again[rows].norm(dim=1), torch.ones(len(again[rows])))
    torch.save({"model": dict(list(weights.items())[1:])}, folder / "less.pt")
    with pytest.raises(InvalidParameterError, match=r"missing|no tensors"):
        VQTokenizer.from_official(folder / "less.pt")
    return tokenizer


def quantiser(weights: dict[str, Tensor]) -> VQTokenizer:
    """A case of latents: any network will do, it is not called."""
    (codes, width), state = weights["quantize.embedding.weight"].shape, vq_state_dict(weights)
    model = VQModel(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=4,
        num_vq_embeddings=codes,
        vq_embed_dim=width,
        lookup_from_codebook=True,
    )
    model.load_state_dict(state, strict=False)
    return VQTokenizer(model)


def check_config(tokenizer: VQTokenizer, config: dict[str, Any]) -> None:
    ours = tokenizer.vqvae.config
    wanted = {
        "codebook_size": ours.num_vq_embeddings,
        "codebook_embed_dim": ours.vq_embed_dim,
        "num_res_blocks": ours.layers_per_block,
        "z_channels": ours.latent_channels,
        "ch": ours.block_out_channels[0],
        "ch_mult": [channels // ours.block_out_channels[0] for channels in ours.block_out_channels],
    }
    for name in CONFIG:
        if name in config and name != "ch":
            assert wanted[name] == config[name], name
    if "ch" in config:  # ch_mult may begin above 1
        assert list(ours.block_out_channels) == [config["ch"] * factor for factor in config["ch_mult"]]


def check_codes(golden: Golden, tokenizer: VQTokenizer) -> None:
    x, config = golden.get("x"), golden.entry["config"]
    if x is not None:
        assert list(x.shape) == [config.get("batch", len(x)), 3, config.get("height", 32), config.get("width", 32)]
        latents = tokenizer.vqvae.encode(x).latents
        golden.check("latent", latents, "latent")
        golden.check("codes", tokenizer.encode_grid(x))
    latents, codes = golden["latent"], golden["codes"]
    golden.check("codes", tokenizer.lookup(latents))
    for scale in (0.01, 100.0):  # the release compares directions
        golden.check("codes", tokenizer.lookup(scale * latents))
    _, _, (_, _, nearest) = tokenizer.vqvae.quantize(latents)
    golden.check("codes", nearest.view(codes.shape))
    shape = (*codes.shape, tokenizer.vqvae.config.vq_embed_dim)
    golden.check("quant", tokenizer.vqvae.quantize.get_codebook_entry(codes, shape), "quant")
    if x is not None:
        golden.check("rec", tokenizer.decode_codes(tokenizer.encode_grid(x)), "rec")
        golden.check("rec_from_codes", tokenizer.decode_codes(codes), "rec")


def check_filters(golden: Golden) -> None:
    logits = golden.get("filter_logits")
    for name in golden._tensors:
        options = re.fullmatch(r"filter\.k(\d+)\.p([\d.]+)", name)
        if options is None or logits is None:
            continue
        k, p, scores = int(options[1]), float(options[2]), logits
        if k:
            scores = TopKLogitsWarper(k)(torch.empty(0), scores)  # type: ignore[arg-type]
        if p < 1:
            scores = TopPLogitsWarper(p)(torch.empty(0), scores)  # type: ignore[arg-type]
        golden.check(name, scores > -torch.inf)


def check_positions(golden: Golden) -> None:
    """Our angles in the release's table; and, halves apart as transformers pairs channels, its rotation."""
    table = golden.get("rope2d.freqs")
    if table is None:
        return
    prefix = int((table == 0).flatten(1).all(dim=1).sum())
    side, pairs = round((len(table) - prefix) ** 0.5), table.shape[1]
    base = golden.entry["config"].get("rope_base", 10000)
    frequencies = base ** (-torch.arange(0, 2 * pairs, 2) / (2 * pairs))
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    angles = grid_angles(places, frequencies)
    found = torch.cat([torch.zeros(prefix, pairs, 2), torch.stack([angles.cos(), angles.sin()], dim=-1)])
    golden.check("rope2d.freqs", found, "rope2d")
    x = golden["rope2d.x"]
    halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    turned = torch.cat([-halves[..., pairs:], halves[..., :pairs]], dim=-1)
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in found.unbind(dim=-1))
    y = halves * cos + turned * sin
    golden.check("rope2d.y", torch.stack([y[..., :pairs], y[..., pairs:]], dim=-1).flatten(-2), "rope2d")


# -- the runner itself -----------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = [param for param in collect(metafunc.config, METHOD) if isinstance(param.values[0], Case)]
        metafunc.parametrize("case", found)


@torch.no_grad()
def test_spoilt_outputs_and_unknown_options_fail(case: Case, tmp_path: Path) -> None:
    whole = golden_of(case)
    inputs = ("x", "filter_logits", "rope2d.x")
    outputs = [name for name in whole._tensors if name not in inputs and not name.startswith(WEIGHTS)]
    outputs = [name for name in outputs if name != "latent" or "x" in whole]  # else it is an input
    assert len(outputs) >= 3
    for name in outputs:
        spoilt = golden_of(case)
        value = spoilt._tensors[name].clone()
        last = value.view(-1)[-1]
        value.view(-1)[-1] = last + 0.02 if value.is_floating_point() else 1 - last.long().clamp_max(1)
        spoilt._tensors[name] = value
        with pytest.raises(AssertionError):
            run_case(spoilt, tmp_path)
    entry = {**case.entry, "config": {**case.entry["config"], "l2": False}}
    with pytest.raises(pytest.fail.Exception, match="l2"):
        run_case(golden_of(dataclasses.replace(case, entry=entry)), tmp_path)
    unread = golden_of(case)
    unread._tensors["elsewhere"] = torch.zeros(1)
    run_case(unread, tmp_path)
    with pytest.raises(AssertionError, match="elsewhere"):
        unread.finish()
