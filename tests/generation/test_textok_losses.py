"""Losses of TexTok and its generator, each against its definition."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.generation.textok_models import TEXT_DIM, features, make_dit, make_model, pictures
from tokred.core.errors import InvalidParameterError
from tokred.generation.textok_dit import TexTokDiT1D, make_scheduler
from tokred.generation.textok_losses import (
    LeCAM,
    PatchDiscriminator,
    TexTokLoss,
    TexTokLossWeights,
    adversarial_loss,
    discriminator_loss,
    dit_loss,
    perceptual_loss,
    r1_penalty,
    variational_bound,
)
from tokred.generation.textok_model import TokenGaussian

LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=5)

# -- adversarial -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(real=LOGITS, fake=LOGITS)
def test_adversarial_losses_are_log_likelihoods(real: list[float], fake: list[float]) -> None:
    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    got = adversarial_loss(torch.tensor(fake, dtype=torch.float64))
    assert got.item() == pytest.approx(-sum(map(log_sigmoid, fake)) / len(fake))
    want = -sum(map(log_sigmoid, real)) / len(real) - sum(log_sigmoid(-x) for x in fake) / len(fake)
    both = (torch.tensor(values, dtype=torch.float64) for values in (real, fake))
    assert discriminator_loss(*both).item() == pytest.approx(want)


def test_lecam_keeps_running_means_and_is_not_the_difference_of_means() -> None:
    lecam, ema = LeCAM(decay=0.9), None
    for _ in range(5):
        real, fake = torch.randn(6) + 1, torch.randn(6) - 1
        lecam.update(real, fake)
        means = (real.mean().item(), fake.mean().item())
        ema = means if ema is None else tuple(0.9 * old + 0.1 * new for old, new in zip(ema, means, strict=True))
        assert (lecam.ema_real.item(), lecam.ema_fake.item()) == pytest.approx(ema)
        want = sum(max(0.0, r - ema[1]) ** 2 for r in real.tolist()) / 6
        want += sum(max(0.0, ema[0] - f) ** 2 for f in fake.tolist()) / 6
        assert lecam(real, fake).item() == pytest.approx(want, rel=1e-5)
    again = LeCAM(decay=0.9)
    again.load_state_dict(lecam.state_dict())
    assert torch.equal(again(real, fake), lecam(real, fake))
    # real logits far below and fake ones far above the running means cost nothing
    assert lecam(torch.full((3,), -50.0), torch.full((3,), 50.0)) == 0
    with pytest.raises(InvalidParameterError, match="decay"):
        LeCAM(decay=1.0)


def test_lecam_pulls_the_logits_and_not_its_means() -> None:
    lecam, real = LeCAM(), torch.ones(4, requires_grad=True)
    lecam.update(real, -real)
    lecam(real, -real).backward()
    assert real.grad is not None
    assert not lecam.ema_real.requires_grad


def test_r1_is_half_the_squared_gradient_norm() -> None:
    weights = torch.randn(3, 4, 4, requires_grad=True)

    def quadratic(images: Tensor) -> Tensor:
        return (images.square() * weights).sum(dim=(1, 2, 3), keepdim=True)

    images = torch.randn(2, 3, 4, 4)
    want = 0.5 * (2 * images * weights).square().sum(dim=(1, 2, 3)).mean()
    got = r1_penalty(quadratic, images)
    torch.testing.assert_close(got, want)
    got.backward()
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, (4 * images.square() * weights).mean(dim=0))
    with torch.no_grad():
        torch.testing.assert_close(r1_penalty(quadratic, images), want)


def test_the_discriminator_judges_each_picture_alone() -> None:
    discriminator = PatchDiscriminator(channels=8, layers=2)
    images = pictures(3, 40)
    logits = discriminator(images)
    assert logits.shape == (3, 1, 8, 8)
    torch.testing.assert_close(discriminator(images[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)
    logits.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in discriminator.parameters())
    assert PatchDiscriminator(8, layers=3)(pictures(1, 32)).shape == (1, 1, 2, 2)


@pytest.mark.parametrize("fields", [{"channels": 12}, {"channels": 0}, {"layers": 0}])
def test_bad_discriminators(fields: dict[str, int]) -> None:
    with pytest.raises(InvalidParameterError, match="expected"):
        PatchDiscriminator(**fields)


# -- the tokenizer's losses ------------------------------------------------------------------------------------------


class Distance(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().flatten(1).mean(dim=1)


def test_the_sum_is_weighted_as_said() -> None:
    weights = TexTokLossWeights(perceptual=0.3, adversarial=0.2, lecam=0.5, r1=2.0, kl=0.01, start=10)
    loss = TexTokLoss(weights, Distance(), PatchDiscriminator(8, 2))
    images, made = pictures(2), pictures(2).requires_grad_()
    dist = TokenGaussian(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert not loss.adversarial_at(9)
    early = loss(images, made, dist, step=9)
    assert set(early) == {"loss", "l2", "perceptual", "kl"}
    late = loss(images, made, dist, step=10)
    torch.testing.assert_close(late["l2"], ((images - made) ** 2).mean())
    torch.testing.assert_close(late["kl"], dist.kl().mean())
    want = late["l2"] + 0.3 * late["perceptual"] + 0.01 * late["kl"]
    torch.testing.assert_close(early["loss"], want)
    torch.testing.assert_close(late["loss"], want + 0.2 * late["adversarial"])

    judged = loss.discriminator_terms(images, made, step=10)
    want = judged["adversarial"] + 0.5 * judged["lecam"] + 2.0 * judged["r1"]
    torch.testing.assert_close(judged["loss"], want)
    judged["loss"].backward()
    assert made.grad is None  # the discriminator's loss does not train the tokenizer
    assert "r1" not in loss.discriminator_terms(images, made, step=10, r1=False)
    with pytest.raises(InvalidParameterError, match="step=9"):
        loss.discriminator_terms(images, made, step=9)


def test_terms_without_their_part_or_weight_are_left_out() -> None:
    images, made = pictures(2), pictures(2)
    bare = TexTokLoss()(images, made)
    assert set(bare) == {"loss", "l2"}
    assert bare["loss"] == bare["l2"]
    nothing = TexTokLossWeights(perceptual=0, adversarial=0, lecam=0, r1=0)
    loss = TexTokLoss(nothing, Distance(), PatchDiscriminator(8, 2))
    assert set(loss(images, made)) == {"loss", "l2"}
    assert not loss.adversarial_at(0)
    weights = TexTokLossWeights(lecam=0, r1=0)
    assert set(TexTokLoss(weights, None, PatchDiscriminator(8, 2)).discriminator_terms(images, made)) == {
        "loss",
        "adversarial",
    }


def test_one_step_of_both_trains_both() -> None:
    model = make_model(latent_type="kl").train()
    loss = TexTokLoss(discriminator=PatchDiscriminator(8, 2))
    images, embeds = pictures(2), features(2)
    dist = model.encode(images, embeds).latent_dist
    made = model.decode(dist.sample(), embeds).sample
    loss(images, made, dist)["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())
    before = [weight.grad.clone() for weight in model.parameters()]
    loss.zero_grad()
    loss.discriminator_terms(images, made)["loss"].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in loss.discriminator.parameters())
    assert all(torch.equal(weight.grad, old) for weight, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("fields", [{"perceptual": -0.1}, {"kl": math.nan}, {"start": -1}])
def test_bad_weights(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match=next(iter(fields))):
        TexTokLossWeights(**fields)


def test_a_missing_perceptual_loss_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="lpips"):
        assert perceptual_loss() is None


def test_the_perceptual_loss_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: its weights would have to be downloaded."""

    class LPIPS(nn.Linear):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__(2, 2)
            self.net = net

    module = types.ModuleType("lpips")
    module.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    loss = perceptual_loss("alex")
    assert loss is not None
    assert loss.net == "alex"
    assert not loss.training
    assert not any(weight.requires_grad for weight in loss.parameters())


# -- the generator's loss --------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Stands in for a generator: remembers its inputs, answers with what `answer` makes of them."""

    def __init__(self, dit: TexTokDiT1D, answer: Any) -> None:
        super().__init__()
        self.config, self.answer, self.dit = dit.config, answer, dit

    def drop_condition(self, *args: Any) -> Any:
        return self.dit.drop_condition(*args)

    def forward(self, noisy: Tensor, t: Tensor, **condition: Any) -> Any:
        self.noisy, self.t, self.condition = noisy, t, condition
        return types.SimpleNamespace(sample=self.answer(noisy, t))


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_noise_is_the_target(objective: str) -> None:
    """One that knows the data answers exactly, and its loss is zero; one that says 0 pays the target's power."""
    x0, scheduler = torch.randn(64, 4, 8), make_scheduler(objective)
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)

    def oracle(noisy: Tensor, t: Tensor) -> Tensor:
        if objective == "flow":
            sigma = (t / 1000)[:, None, None]
            return (noisy - x0) / sigma  # = noise - x0
        a = alphas[t][:, None, None]
        return (noisy - a.sqrt() * x0) / (1 - a).sqrt()

    dit: Any = Recorder(make_dit(num_classes=3, objective=objective), oracle)
    labels = torch.zeros(64, dtype=torch.int64)
    losses = dit_loss(dit, x0, scheduler, labels, generator=torch.Generator().manual_seed(1))
    assert losses["loss"] < 1e-4
    assert 0 < (dit.condition["class_labels"] == 3).sum() < 20
    if objective == "flow":
        sigma = dit.t / 1000
        assert 0 < sigma.min() < 0.3 < 0.7 < sigma.max() < 1
        assert (sigma.logit().mean().abs() < 0.4) & (0.7 < sigma.logit().std() < 1.3)
    else:
        assert dit.t.dtype == torch.int64
        assert 0 <= dit.t.min() < 100 < 900 < dit.t.max() < 1000
    dit.answer = lambda noisy, t: torch.zeros_like(noisy)
    again = dit_loss(dit, x0, scheduler, labels, generator=torch.Generator().manual_seed(1))["loss"]
    assert again.item() == pytest.approx(1.0 if objective == "ddpm" else 2.0, rel=0.15)


def test_the_bound_is_the_divergence_of_the_two_steps() -> None:
    """Against torch.distributions, and the variances against diffusers' own reading of the same outputs."""
    scheduler = make_scheduler("ddpm", learn_sigma=True)
    t = torch.tensor([0, 1, 2, 300, 999])
    x0, noise, output = torch.randn(5, 4, 8), torch.randn(5, 4, 8), torch.randn(5, 4, 16)
    noisy = scheduler.add_noise(x0, noise, t)
    terms = []
    for i, step in enumerate(t.tolist()):
        mean, fraction = output[i : i + 1].chunk(2, dim=-1)
        scheduler.set_timesteps(1000)
        logvar = scheduler._get_variance(step, predicted_variance=fraction)
        if step == 0:  # the posterior's variance is 0 there; ours is that of step 1
            low = scheduler._get_variance(1, variance_type="fixed_small").log()
            logvar = low + (fraction + 1) / 2 * (scheduler.betas[0].log() - low)
        bare = make_scheduler("ddpm")
        bare.set_timesteps(1000)
        bare._get_variance = lambda *args, **options: torch.zeros(())
        model_mean = bare.step(mean, step, noisy[i : i + 1]).prev_sample.double()
        true_mean = bare.step(noise[i : i + 1], step, noisy[i : i + 1]).prev_sample.double()
        p = torch.distributions.Normal(model_mean, (logvar.double() / 2).exp())
        if step == 0:
            nats = -p.log_prob(x0[i : i + 1].double())
        else:
            variance = scheduler._get_variance(step, variance_type="fixed_small").double()
            nats = torch.distributions.kl_divergence(torch.distributions.Normal(true_mean, variance.sqrt()), p)
        terms.append(nats.mean() / math.log(2))
        one = slice(i, i + 1)
        got = variational_bound(scheduler, x0[one], noisy[one], t[one], output[one])
        torch.testing.assert_close(got.double(), terms[-1], atol=1e-4, rtol=2e-3)
    whole = variational_bound(scheduler, x0, noisy, t, output)
    torch.testing.assert_close(whole.double(), torch.stack(terms).mean(), atol=1e-4, rtol=2e-3)


def test_the_bound_trains_the_variances_alone() -> None:
    scheduler, output = make_scheduler("ddpm", learn_sigma=True), torch.randn(2, 4, 16, requires_grad=True)
    x0, t = torch.randn(2, 4, 8), torch.tensor([0, 500])
    noisy = scheduler.add_noise(x0, torch.randn_like(x0), t)
    variational_bound(scheduler, x0, noisy, t, output).backward()
    assert output.grad is not None
    assert not output.grad[..., :8].any()
    assert output.grad[..., 8:].all()


def test_learned_variances_are_part_of_the_loss() -> None:
    dit = make_dit(num_classes=3, learn_sigma=True)
    scheduler, labels = make_scheduler("ddpm", learn_sigma=True), torch.tensor([0, 1])
    losses = dit_loss(dit, torch.randn(2, 4, 8), scheduler, labels)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["bound"])
    losses["loss"].backward()
    assert all(weight.grad is not None for weight in dit.parameters())
    assert dit.proj_out.weight.grad[8:].abs().sum() > 0


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_generator_learns_two_classes(objective: str) -> None:
    dit = make_dit(rough=False, num_classes=2, objective=objective, condition_dropout=0.0).train()
    scheduler, means = make_scheduler(objective), torch.tensor([-1.5, 1.5])
    optimizer = torch.optim.AdamW(dit.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        labels = torch.randint(2, (32,), generator=generator)
        loss = dit_loss(dit, means[labels][:, None, None].expand(32, 4, 8), scheduler, labels, generator=generator)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(loss["loss"].item())
    # not knowing the class would cost the flow the variance of the means as well: 1 + 2.25, here 3.2 and 0.9
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_text_is_dropped_and_the_callers_mask_left_alone() -> None:
    dit: Any = Recorder(make_dit(text_dim=TEXT_DIM, condition_dropout=0.5), lambda noisy, t: noisy)
    embeds = features(40)
    dit_loss(dit, torch.randn(40, 4, 8), make_scheduler(), text_embeds=embeds)
    rows = dit.condition["text_mask"].sum(dim=1)
    assert set(rows.tolist()) == {0, 5}
    mask = torch.ones(40, 5, dtype=torch.int64)
    losses = [
        dit_loss(dit, torch.zeros(40, 4, 8), make_scheduler(), None, embeds, mask, torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert mask.all()
    assert F.l1_loss(losses[0]["loss"], losses[1]["loss"]) == 0
