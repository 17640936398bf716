"""TokenFlow's tokenizer against the released code: whole tokenizers through the loader of releases, and its quantizer.

The cases of the next-scale generator, which the same manifest lists, are those of another module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity._golden import Case, Golden, collect
from tokred.generation.pyramid import PyramidQuantizer
from tokred.generation.tokenflow import TokenFlow
from tokred.generation.tokenflow_parts import semantic_loss

FOLDER = "tokenflow"
ENTRY = ("config", "files", "batch", "image")
WEIGHTS = ("weights_encoder", "weights_decoder", "weights_rest")
#: what the runner knows of a tokenizer's configuration, and of the quantizer's
CONFIG = ("teacher", "sem", "scales", "K", "dsem", "dpix", "enc", "dec", "dvit", "out_dim", "out_size")
CONFIG += ("z_channels", "w_dis", "beta", "name")
QUANTIZER = ("K", "d_sem", "d_pix", "B", "h", "w", "beta", "w_dis", "entropy_loss_ratio")
TEACHERS = {"clipb_224": "clip", "siglip_384": "siglip", "vitamin_xlarge_256": "timm"}
#: the manifest's names of tolerances by ours
TOLERANCES = ("quant", "sem_rec", "pix_rec", "quantizer_losses", "quantizer_grads")


@dataclasses.dataclass(frozen=True)
class Files(Case):
    """A case whose entry names its files."""

    def path(self, name: str) -> Path:
        return self.folder / self.entry["files"][name]["file"]

    def load(self) -> dict[str, Tensor]:
        names = [name for name in self.entry["files"] if name not in WEIGHTS]
        return {key: value for name in names for key, value in load_file(self.path(name)).items()}

    def weights(self) -> dict[str, Tensor]:
        return {key: value for name in WEIGHTS for key, value in load_file(self.path(name)).items()}

    @property
    def kind(self) -> str:
        files = set(self.entry["files"])
        for kind, mark in (("tokenizer", WEIGHTS[0]), ("generator", "weights_llm"), ("quantizer", "all")):
            if mark in files:
                return kind
        pytest.fail(f"{self.name}: a case of the files {sorted(files)} is none that this runner knows")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    found = []
    for parameter in collect(metafunc.config, FOLDER):
        (case,) = parameter.values
        if isinstance(case, Case):
            case = Files(case.name, case.entry, case.manifest, case.folder)
            if case.kind == "generator":
                continue
        found.append(pytest.param(case, id=parameter.id, marks=parameter.marks))
    metafunc.parametrize("case", found)


def test_case(case: Files, tmp_path: Path) -> None:
    if isinstance(case, str):
        pytest.fail(case, pytrace=False)
    run_case(case, tmp_path)


def run_case(case: Files, folder: Path) -> None:
    golden = Golden(case)
    stated = case.manifest.get("tolerance", {})
    golden._tolerances |= {name: (float(stated[name]), 0.0) for name in TOLERANCES if name in stated}
    if case.kind == "quantizer":
        check_quantizer(golden)
    else:
        model = build(golden, case, folder)
        check_tokenizer(golden, model)
    golden.finish()


# -- whole tokenizers ------------------------------------------------------------------------------------------------


def known(golden: Golden, names: tuple[str, ...]) -> Mapping[str, Any]:
    golden.known(ENTRY)
    config = golden.entry["config"]
    unknown = [key for key in config if key not in names]
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know {unknown}; it knows {sorted(names)}")
    return config


def build(golden: Golden, case: Files, folder: Path) -> TokenFlow:
    """Written as a released file is, and loaded as one; what cannot be read off the weights comes from `config`."""
    config = known(golden, CONFIG)
    if config["teacher"] not in TEACHERS:
        pytest.fail(f"{case.name}: unknown teacher {config['teacher']!r}")
    torch.save({"model": case.weights()}, folder / "tokenizer.pt")
    model = TokenFlow.from_official(
        folder / "tokenizer.pt",
        image_size=golden.entry["image"],
        scales=config["scales"],
        distance_weight=config.get("w_dis", 1.0),
        semantic_encoder_config={"num_attention_heads": config["sem"][-1]},
        semantic_decoder_config={"heads": config["dvit"][2]},
    )
    check_config(model, config)
    return model


def check_config(model: TokenFlow, config: Mapping[str, Any]) -> None:
    """What the case says of itself is what was read off its weights."""
    found = model.config
    assert found.semantic_encoder_config["type"] == TEACHERS[config["teacher"]]
    assert (found.codebook_size, found.semantic_dim, found.pixel_dim) == tuple(config[k] for k in ("K", "dsem", "dpix"))
    for ours, theirs in ((found.pixel_encoder_config, config["enc"]), (found.pixel_decoder_config, config["dec"])):
        assert list(ours["block_out_channels"]) == [theirs["ch"] * m for m in theirs["ch_mult"]]
        assert ours["layers_per_block"] == theirs["num_res_blocks"]
        assert ours["latent_channels"] == theirs["z_channels"]
    _, dim, heads, depth = config["dvit"]
    decoder = found.semantic_decoder_config
    assert (decoder["dim"], decoder["heads"], decoder["depth"], decoder["out_dim"]) == (
        *(dim, heads, depth),
        config["out_dim"],
    )
    semantic = found.semantic_encoder_config
    if semantic["type"] == "clip":
        _, patch, width, layers, _ = config["sem"]
    else:  # the last layer is not built
        _, patch, width, mlp, layers, _ = config["sem"]
        layers -= 1
        assert semantic["intermediate_size"] == mlp
    assert (semantic["patch_size"], semantic["hidden_size"], semantic["num_hidden_layers"]) == (patch, width, layers)
    if "out_size" in config:
        assert config["out_size"] == [model.image_size] * 2


@torch.no_grad()
def check_tokenizer(golden: Golden, model: TokenFlow) -> None:
    x = golden["x"]
    assert len(x) == golden.entry.get("batch", len(x))
    stages: list[Tensor] = []
    hook = model.quantizer._nearest
    model.quantizer._nearest = lambda unit, table: stages.append(unit) or hook(unit, table)  # type: ignore[method-assign]
    found = model.encode_full(x)
    del model.quantizer._nearest
    golden.check("sem_tokens", found.semantic)
    golden.check("pix_map", found.pixel)
    golden.check("codes", found.codes)
    golden.check("quant", found.latents, "quant")
    rows = model.quantizer.split(found.codes)
    for k, (side, ids) in enumerate(zip(model.scales, rows, strict=True)):
        golden.check(f"stage{k}.idx", ids)
        golden.check(f"stage{k}.z_q", model.lookup(ids).unflatten(1, (side, side)).movedim(-1, 1), "quant")
        check_residual(golden, model, k, stages[k])
    golden.check("sem_rec", model.semantic_features(found.latents), "sem_rec")
    golden.check("pix_rec", model.decode_latents(found.latents), "pix_rec")
    codes = golden["codes"]
    golden.check("code.quant", model.features(codes), "quant")
    golden.check("llm_tokens", model.llm_features(codes), "quant")
    prefix = codes[:, : model.quantizer.lengths[-2]]
    for name, some in (("code", codes), ("prefix", prefix)):
        golden.check(f"{name}.sem_rec", model.decode_semantic(some), "sem_rec")
        golden.check(f"{name}.pix_rec", model.decode_latents(model.features(some)), "pix_rec")
        assert torch.equal(model.decode(some), model.decode_latents(model.features(some)).clamp(-1, 1))
    for name in [name for name in golden._tensors if name.startswith("codebook_entry_")]:
        first, last = map(int, name.split("_")[2:])
        golden.check(name, model.lookup(torch.arange(first, last)), "quant")


def check_residual(golden: Golden, model: TokenFlow, k: int, unit: Tensor) -> None:
    """The golden is not normalised, what the quantizer compares is: the golden through our own normalisation."""
    want = golden.get(f"stage{k}.residual")
    if want is not None:
        from tokred.generation.pyramid import unit_halves

        normal = unit_halves(want.movedim(1, -1), model.quantizer.semantic_dim).flatten(0, 2)
        torch.testing.assert_close(unit, normal, atol=1e-3, rtol=0)


# -- the quantizer ---------------------------------------------------------------------------------------------------


def check_quantizer(golden: Golden) -> None:
    """One scale: losses, and gradients that pass straight through."""
    config = known(golden, QUANTIZER)
    assert config.get("entropy_loss_ratio", 0.0) == 0.0, "the entropy term is not rebuilt: its weight is 0"
    assert config["h"] == config["w"]
    sizes = (config["K"], config["d_sem"], config["d_pix"])
    quantizer = PyramidQuantizer(*sizes, (config["h"],), config.get("w_dis", 1.0))
    with torch.no_grad():
        quantizer.semantic_codebook.copy_(golden["emb_sem"])
        quantizer.pixel_codebook.copy_(golden["emb_pix"])
    z = golden["z"].requires_grad_()
    found = quantizer(z)
    commitment = config["beta"] * found.commitment_loss
    golden.check("idx", found.codes.unflatten(1, (config["h"], config["w"])))
    golden.check("z_q", found.quant, "quant")
    golden.check("vq_loss", found.vq_loss, "quantizer_losses")
    golden.check("commit_loss", commitment, "quantizer_losses")

    def gradient(value: Tensor, of: Tensor) -> Tensor:
        return torch.autograd.grad(value, of, retain_graph=True)[0]

    through = gradient((found.quant * golden["W"]).sum(), z)
    golden.check("grad_z_straight_through", through, "quantizer_grads")
    golden.check("grad_z_commit", gradient(commitment, z), "quantizer_grads")
    golden.check("grad_emb_sem", gradient(found.vq_loss, quantizer.semantic_codebook), "quantizer_grads")
    golden.check("grad_emb_pix", gradient(found.vq_loss, quantizer.pixel_codebook), "quantizer_grads")
    if "sem_rec" in golden:
        golden.check("sem_loss", semantic_loss(golden["sem_rec"], golden["sem_target"]), "quantizer_losses")
    for name in ("entropy_loss", "usage", "sem_d_norm", "pix_d_norm"):  # the release's logging, which is not ours
        golden.get(name)


# -- the runner itself -----------------------------------------------------------------------------------------------


def small(folder: Path, **entry: Any) -> Files:
    save_file({"z": torch.zeros(1, 3, 1, 1)}, folder / "q.safetensors")
    files = {"all": {"file": "q.safetensors"}}
    return Files("q", {"files": files, "config": {}, **entry}, {}, folder)


def test_an_unknown_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="new"):
        run_case(small(tmp_path, config={"new": 1}), tmp_path)
    with pytest.raises(pytest.fail.Exception, match="other"):
        run_case(small(tmp_path, other=1), tmp_path)
    with pytest.raises(pytest.fail.Exception, match="none that this runner knows"):
        run_case(small(tmp_path, files={"x": {"file": "q.safetensors"}}), tmp_path)
