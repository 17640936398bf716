"""TexTok against its goldens, which check agreement with our own specification: no official code exists."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.parity._golden import Case, Golden, collect
from tokred.generation.textok_model import TexTokModel, TokenGaussian

METHOD = "textok"

#: what a config says of the run, not of the model
RUN = ("toy_text_len", "valid_text", "batch")
MODEL = tuple(TexTokModel._get_init_keys(TexTokModel) - {"self"})
WEIGHTS = ("encoder.", "decoder.")
INPUTS = ("images", "text_emb", "text_mask", "eps")
#: what a case without images is decoded from
STARTS = ("latents", "mean")


@torch.no_grad()
def test_case(golden: Golden) -> None:
    run_case(golden)
    golden.finish()


def run_case(golden: Golden) -> None:
    golden.known(("config", "model", "io", "kind"))
    model = build(golden)
    config = golden.entry["config"]
    embeds, mask = golden.get("text_emb"), golden.get("text_mask")
    if mask is not None and "valid_text" in config:
        assert mask.sum(dim=1).tolist() == config["valid_text"]
    if "images" not in golden:
        start = next(name for name in STARTS if name in golden)
        latents = golden[start]
        if "latents_no_text" in golden:
            check_no_text_decoder(golden, model, golden["latents_no_text"])
    else:
        images = golden["images"]
        assert images.shape == (config.get("batch", len(images)), 3, model.config.image_size, model.config.image_size)
        latents = check_encoder(golden, model, images, embeds, mask)
        check_no_text(golden, model, images)
    golden.check("recon", model.decode(latents, embeds, mask).sample)


def build(golden: Golden) -> TexTokModel:
    """The case's model, its weights loaded strictly."""
    config = dict(golden.entry["config"])
    unknown = [key for key in config if key not in MODEL and key not in RUN]
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know {unknown}; it knows {sorted((*MODEL, *RUN))}")
    model = TexTokModel(**{key: value for key, value in config.items() if key in MODEL})
    names = [name for name in golden._tensors if name.startswith(WEIGHTS)]
    model.load_state_dict({name: golden[name] for name in names}, strict=True)
    return model.eval()


def check_encoder(golden: Golden, model: TexTokModel, images: Any, embeds: Any, mask: Any) -> torch.Tensor:
    """Latents, or the distribution and all that follows of it; gives what the case decodes."""
    out = model.encode(images, embeds, mask)
    if out.latent_dist is None:
        golden.check("latents", out.latents)
        return out.latents
    dist = out.latent_dist
    golden.check("mean", dist.mode())
    golden.check("logvar", dist.logvar)
    golden.check("kl", dist.kl())
    if "eps" in golden:
        golden.check("sample", dist.mean + (dist.logvar / 2).exp() * golden["eps"])
    return dist.mode()


def check_no_text(golden: Golden, model: TexTokModel, images: Any) -> None:
    if "latents_no_text" not in golden:
        return
    raw: list[torch.Tensor] = []
    handle = model.encoder.to_latent.register_forward_hook(lambda *call: raw.append(call[-1]))
    model.encode(images)
    handle.remove()
    golden.check("latents_no_text", raw[0])
    check_no_text_decoder(golden, model, raw[0])


def check_no_text_decoder(golden: Golden, model: TexTokModel, raw: torch.Tensor) -> None:
    golden.check("recon_no_text", lambda: model.decode(raw[..., : model.config.latent_dim]).sample)


# -- the runner itself -----------------------------------------------------------------------------------------------


def public_cases(config: pytest.Config) -> list[Any]:
    return [param for param in collect(config, METHOD) if isinstance(param.values[0], Case)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", public_cases(metafunc.config))


@torch.no_grad()
def test_spoilt_outputs_and_unknown_options_fail(case: Case) -> None:
    names = Golden(case)._tensors
    outputs = [name for name in names if not name.startswith(WEIGHTS) and name not in INPUTS]
    if "images" not in names:
        outputs = [name for name in outputs if name.startswith("recon")]
    assert len(outputs) >= 1
    for key in outputs:
        spoilt = Golden(case)
        spoilt._tensors[key] = spoilt._tensors[key] + 1e-2
        with pytest.raises(AssertionError, match=key):
            run_case(spoilt)
    entry = {**case.entry, "config": {**case.entry["config"], "tanh": True}}
    with pytest.raises(pytest.fail.Exception, match="tanh"):
        run_case(Golden(dataclasses.replace(case, entry=entry)))
    unread = Golden(case)
    unread._tensors["elsewhere"] = torch.zeros(1)
    run_case(unread)
    with pytest.raises(AssertionError, match="elsewhere"):
        unread.finish()


def test_the_distribution_samples_as_the_goldens_say() -> None:
    """`sample` is mean + exp(logvar / 2) eps, which the cases check with their own eps."""
    dist = TokenGaussian(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    want = dist.mean + (dist.logvar / 2).exp() * eps
    assert torch.equal(dist.sample(torch.Generator().manual_seed(3)), want)
