"""FlexTok against the released code: a whole tokenizer through the loader of released checkpoints, and its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import golden_dirs
from tests.parity._golden import Case, Golden
from tokred.generation import flow
from tokred.generation.flextok import FlexTok, FlexTokModel
from tokred.generation.flextok_blocks import timestep_waves
from tokred.generation.patches import sincos_2d
from tokred.generation.quantize import FSQ

METHOD = "flextok"

OPTIONS = ("config", "official_config", "files", "fsq_min_rounding_margin", "info")
CASE_TOLERANCES = {"floats": (1e-5, 1e-4), "samples": (5e-5, 1e-4)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The manifest's second list, `misc`, beside its cases."""
    if "tables" in metafunc.fixturenames:
        found = [case for folder in golden_dirs(metafunc.config) for case in misc_cases(folder / METHOD)]
        reason = "no golden folder lists `misc`"
        marks = [] if found else [pytest.mark.skip(reason=reason)]
        parameters = [pytest.param(case, id=f"{case.folder.parent.name}/{case.name}") for case in found]
        metafunc.parametrize("tables", parameters or [pytest.param(None, id="none", marks=marks)])


def misc_cases(folder: Path) -> list[Case]:
    path = folder / "manifest.json"
    if not path.is_file():
        return []
    manifest = json.loads(path.read_text())
    return [Case(name, entry, manifest, folder) for name, entry in manifest.get("misc", {}).items()]


# -- whole tokenizers ------------------------------------------------------------------------------------------------


def test_case(golden: Golden, tmp_path: Path) -> None:
    golden.known(OPTIONS)
    golden._tolerances = {**golden._tolerances, **CASE_TOLERANCES, **stated(golden.case.manifest)}
    pipe = build(golden, tmp_path)
    check_encoder(golden, pipe)
    check_decoder(golden, pipe)
    check_sampling(golden, pipe)
    golden.finish()


def stated(manifest: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The manifest's tolerances by our names; its keys are sentences that begin with a word of their own."""
    found = {}
    for text, value in manifest.get("tolerance", {}).items():
        words = str(value).replace(",", " ").split()
        numbers = {word: float(words[i + 1]) for i, word in enumerate(words[:-1]) if word in ("atol", "rtol")}
        name = {"activations": "floats", "samples": "samples", "misc": "tables"}.get(text.split()[0])
        if name and numbers:
            found[name] = (numbers.get("atol", 0.0), numbers.get("rtol", 0.0))
    return found


def build(golden: Golden, folder: Path) -> FlexTok:
    """Written as a checkpoint of the Hub is, and loaded as one.

    `official_config` alone says what the model is, and its reader refuses what it does not know; `config` adds what it
    lacks of the toy VAE, and how to sample.
    """
    config = golden.entry["config"]
    weights: dict[str, Tensor] = {}
    for name in golden.entry["files"]:
        if name != f"{golden.case.name}_io.safetensors":
            weights |= load_file(golden.case.folder / name)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": golden.entry["official_config"]}))
    options = {} if "vae_groups" not in config else {"norm_num_groups": config["vae_groups"]}
    model, vae = FlexTokModel.from_official(folder, config.get("scaling_factor"), options)
    if vae is None:  # a case of latents: any VAE will do, it is not called
        width = model.config.latent_channels
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=width, scaling_factor=1.0)
    pipe = FlexTok(model, vae, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    check_config(pipe, config)
    return pipe


NAMES = {"enc_depth": "encoder_depth", "dec_depth": "decoder_depth", "enc_dim": "encoder_dim", "dec_dim": "decoder_dim"}
NAMES |= {"n_registers": "num_registers", "patch": "patch_size", "levels": "fsq_levels"}


def check_config(pipe: FlexTok, config: Mapping[str, Any]) -> None:
    """What the case says of itself in words of its own, where it does."""
    for name, value in config.items():
        ours = pipe.model.config.get(NAMES.get(name, name), value)
        assert ours == value or list(ours) == list(value), name


@torch.no_grad()
def check_encoder(golden: Golden, pipe: FlexTok) -> None:
    model = pipe.model
    if "images" in golden:
        latents = pipe.encode_latents(golden["images"])
        golden.check("vae_latents_scaled_mode", latents)
        if "tokens" in golden and "latents_in" not in golden:
            assert torch.equal(pipe.encode(golden["images"]), golden["tokens"])
    given = golden.get("latents_in")
    latents = given if given is not None else golden["vae_latents_scaled_mode"]
    h, w = model.encoder.shape(latents)
    streams: list[Tensor] = []
    hook = model.encoder.blocks[-1].register_forward_hook(lambda *call: streams.append(call[-1]))
    found = model.encode_latents(latents)
    hook.remove()
    golden.check("enc_patch_tokens", lambda: model.encoder.embed(latents, h, w).unflatten(1, (h, w)))
    golden.check("enc_patches_out", lambda: streams[0][:, : h * w])
    golden.check("enc_registers_out", lambda: streams[0][:, h * w :])
    golden.check("enc_latents", found.pre_quant)
    golden.check("fsq_bounded", model.fsq.bound(found.pre_quant))
    golden.check("quant", found.codes)
    golden.check("tokens", found.ids)
    for n in (1, model.config.num_registers // 2):
        assert torch.equal(model.encode_latents(latents, max(n, 1)).ids, found.ids[:, : max(n, 1)])


@torch.no_grad()
def check_decoder(golden: Golden, pipe: FlexTok) -> None:
    model, x_t, t, ids, keep = pipe.model, golden["x_t"], golden["t"], golden["tokens"], golden["keep_k"]
    total = model.config.num_registers
    for fast in (True, False):
        velocity = [
            model.decode_velocity(x_t, t, ids, keep_k, drop, fast_dropped=fast)
            for keep_k, drop in ((None, None), (keep, None), (keep, True))
        ]
        for name, value in zip(("full", "keep_k", "uncond"), velocity, strict=True):
            golden.check(f"velocity_{name}", value)
        layer = golden.entry["config"].get("repa_layer")
        if "repa_hidden_full" in golden:
            golden.check(
                "repa_hidden_full", model.decode_velocity(x_t, t, ids, return_hidden=layer, fast_dropped=fast)[1]
            )
    tokens = model.condition(ids, keep, fast_dropped=False).tokens
    assert tokens.shape[1] == total
    golden.check("dec_cond_keep_k", tokens)
    waves = timestep_waves(t, model.config.freq_dim, model.config.max_timestep)
    golden.check("dec_time_emb", lambda: model.decoder.time_embed(waves))


@torch.no_grad()
def check_sampling(golden: Golden, pipe: FlexTok) -> None:
    config, noise, keep = golden.entry["config"], golden["noise"], golden["keep_k"].tolist()
    ids, steps = golden["tokens"], config["steps"]
    prefixes = [row[:k] for row, k in zip(ids, keep, strict=True)]

    def run(scale: Any, guidance: str = "apg", tokens: Any = prefixes) -> Tensor:
        return pipe.sample_latents(tokens, noise, None, steps, scale, guidance)

    golden.check("sample_nocfg", lambda: run(1.0), "samples")
    golden.check("sample_cfg", lambda: run(config["cfg"], "cfg"), "samples")
    golden.check("sample_full_apg", lambda: run(config["apg"], tokens=ids), "samples")
    golden.check("sample_callable", lambda: run(lambda t: 1 + 2 * t, "cfg"), "samples")
    golden.check("sample_apg", lambda: run(config["apg"]), "samples")
    for name in ("image_apg", "image_detokenize"):
        golden.check(name, lambda: pipe.decode_latents(run(config["apg"])), "samples")
        if name in golden:
            pictures = pipe.decode(prefixes, None, steps, config["apg"], latents=noise)
            golden.check(name, lambda name=name, pictures=pictures: inside(pictures, golden[name]), "samples")


def inside(pictures: Tensor, want: Tensor) -> Tensor:
    """`decode` cuts to [-1, 1], the release does not: the golden's own value where that is outside."""
    assert pictures.abs().max() <= 1
    return torch.where(want.abs() > 1, torch.where(pictures == want.sign(), want, pictures), pictures)


# -- tables ----------------------------------------------------------------------------------------------------------


def test_tables(tables: Case) -> None:
    golden = Golden(tables)
    golden.known(OPTIONS)
    golden._tolerances = {**golden._tolerances, "floats": stated(tables.manifest).get("tables", (1e-6, 0.0))}
    names, info = set(golden._tensors), golden.entry["info"]
    for name, options in info.items():
        if name.startswith("fsq"):
            check_fsq(golden, name, options)
        elif name.startswith("sincos"):
            golden.check(name, sincos_2d(options["h"], options["w"], options["dim"], "official"))
        elif name == "apg":
            check_guidance(golden, options)
        else:
            assert name == "sigma", f"this runner does not know {name}"
    for name in sorted(n for n in names if n.startswith("temb_sinusoid_max")):
        most = float(name.removeprefix("temb_sinusoid_max"))
        golden.check(name, timestep_waves(golden["temb_t"], golden[name].shape[-1], most))
    check_sigmas(golden)
    golden.finish()


def check_fsq(golden: Golden, name: str, options: Mapping[str, Any]) -> None:
    fsq = FSQ(tuple(options["levels"]))
    assert fsq.codebook_size == options["codebook_size"]
    golden.check(f"{name}_quant", lambda: fsq.quantize(golden[f"{name}_z"]))
    golden.check(f"{name}_tokens", lambda: fsq.codes_to_ids(fsq.quantize(golden[f"{name}_z"])))
    golden.check(f"{name}_ids_codes", lambda: fsq.ids_to_codes(golden[f"{name}_ids"]))


def check_guidance(golden: Golden, options: Mapping[str, Any]) -> None:
    """A sequence of velocities through one run's guidance; `cfg_out` is the first of them with plain guidance."""
    conditional, null = golden["apg_cond"], golden["apg_uncond"]
    assert len(conditional) == options["steps"]
    guide = flow._guide(flow.APG(options["momentum"], options["eta"], options["norm_threshold"]))
    steps = zip(conditional, null, strict=True)
    golden.check("apg_out", torch.stack([guide(v, n, options["guidance_scale"]) for v, n in steps]))
    if "cfg_out" in golden:
        scale = float(options["cfg_out"].split("scale")[1].split(",")[0])
        golden.check("cfg_out", flow._guide("cfg")(conditional[0], null[0], scale))


def check_sigmas(golden: Golden) -> None:
    """Laws of the times, from the golden's random numbers in place of the generator's."""

    def run(law: str) -> Tensor:
        with (
            mock.patch("torch.rand", return_value=golden["sigma_u"]),
            mock.patch("torch.normal", return_value=golden["sigma_randn"]),
        ):
            return flow.sample_sigmas(len(golden["sigma_u"]), law)

    golden.check("sigma_mode025", lambda: run("mode"))
    golden.check("sigma_uniform", lambda: run("uniform"))
    golden.check("sigma_lognorm", lambda: run("logit_normal"))
    golden.check("noised_mode025", lambda: flow.noised(golden["clean"], golden["noise"], golden["sigma_mode025"]))


# -- the runner itself -----------------------------------------------------------------------------------------------


def test_an_unknown_option_of_a_case_is_an_error() -> None:
    case = Case("base", {"config": {}, "new": 1}, {}, Path())
    with mock.patch.object(Case, "load", return_value={}), pytest.raises(pytest.fail.Exception, match="new"):
        test_case(Golden(case), Path())


def test_images_outside_the_range_are_compared_where_they_are_cut() -> None:
    want = torch.tensor([-1.7, 0.4, 1.2, 1.3])
    assert torch.equal(inside(want.clamp(-1, 1), want), want)
    assert not torch.allclose(inside(torch.tensor([-1.0, 0.4, 1.0, 0.9]), want), want)
