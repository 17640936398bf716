"""Losses of TexTok and of its generator, and the discriminator that stands in for the paper's.

The paper trains with l2, perceptual and adversarial losses and LeCAM. Weights and the form of the regularisers come
from unofficial code or are ours; the paper's StyleGAN discriminator (about 24 M parameters) is not rebuilt: any module
that maps pictures to logits serves, `PatchDiscriminator` is the default.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.generation.flow import noised, sample_sigmas
from tokred.generation.textok_dit import TexTokDiT1D
from tokred.generation.textok_model import TokenGaussian

__all__ = [
    "LeCAM",
    "PatchDiscriminator",
    "TexTokLoss",
    "TexTokLossWeights",
    "adversarial_loss",
    "discriminator_loss",
    "dit_loss",
    "perceptual_loss",
    "r1_penalty",
]


# -- adversarial -----------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """Logits for overlapping patches (Isola et al. 2017): strided 4 x 4 convolutions, group norms, leaky ReLU.

    Samples do not see each other (no batch norm). (B, 3, H, W) -> (B, 1, h, w).

    Args:
        channels: of the first layer, doubled by each further one up to eightfold.
        layers: how many layers halve the picture; H and W must be at least 2^(layers + 2).
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < 8 or channels % 8 or layers < 1:
            raise InvalidParameterError(
                f"channels={channels}, layers={layers}: expected a positive multiple of 8, and at least one layer"
            )
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            before, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            stages += [nn.Conv2d(before, width, 4, stride, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*stages, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def adversarial_loss(fake: Tensor) -> Tensor:
    """Non-saturating loss of the generator: mean softplus(-D(fake))."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Its counterpart: mean softplus(-D(real)) + mean softplus(D(fake))."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): half the squared gradient norm of D at real pictures, mean over the batch."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = discriminator(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(dim=1).mean()


class LeCAM(nn.Module):
    """LeCAM regulariser (Tseng et al. 2021): E relu(D(real) - ema_fake)^2 + E relu(ema_real - D(fake))^2.

    The two running means of the logits are buffers, so they are saved with the training state.

    Args:
        decay: of the running means.
    """

    ema_real: Tensor
    ema_fake: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InvalidParameterError(f"decay={decay!r}: expected a number in [0, 1)")
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the running means towards the mean logits of this batch; the first batch sets them."""
        decay = torch.where(self.started, self.decay, 0.0)
        for mean, logits in ((self.ema_real, real), (self.ema_fake, fake)):
            mean.copy_(decay * mean + (1 - decay) * logits.float().mean())
        self.started.fill_(True)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty; call `update` first. A scalar."""
        return F.relu(real - self.ema_fake).square().mean() + F.relu(self.ema_real - fake).square().mean()


# -- the tokenizer's losses --------------------------------------------------------------------------------------------


def perceptual_loss(net: str = "vgg") -> nn.Module | None:
    """LPIPS of the package `lpips` (it downloads its weights), frozen; None, with a warning, where that is missing."""
    if importlib.util.find_spec("lpips") is None:
        warnings.warn(
            "no perceptual loss: the package lpips is not installed (pip install lpips)", UserWarning, stacklevel=2
        )
        return None
    lpips: Any = importlib.import_module("lpips")
    return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)


@dataclass(frozen=True)
class TexTokLossWeights:
    """Weights beside the l2 loss, which has weight 1.

    Attributes:
        perceptual, adversarial, lecam, r1: unofficial code's, not known from the paper.
        kl: of the KL divergence summed over a picture's latents, mean over pictures ("kl" models only); ours.
        start: training step from which the discriminator takes part; ours.
    """

    perceptual: float = 0.1
    adversarial: float = 0.1
    lecam: float = 1e-4
    r1: float = 10.0
    kl: float = 1e-6
    start: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise InvalidParameterError(f"{name}={value!r}: expected a finite number >= 0")


class TexTokLoss(nn.Module):
    """The sum that the tokenizer is trained with, and the one of its discriminator.

    Args:
        weights: see `TexTokLossWeights`; a weight of 0 leaves its term out.
        perceptual: (B, 3, H, W) twice -> distances; None leaves the term out. See `perceptual_loss`.
        discriminator: (B, 3, H, W) -> logits; None leaves out all adversarial terms.
        lecam_decay: of the running means of LeCAM.
    """

    def __init__(
        self,
        weights: TexTokLossWeights | None = None,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        lecam_decay: float = 0.999,
    ) -> None:
        super().__init__()
        self.weights = weights or TexTokLossWeights()
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.lecam = LeCAM(lecam_decay)

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminator takes part at this step."""
        return self.discriminator is not None and self.weights.adversarial > 0 and step >= self.weights.start

    def forward(
        self, images: Tensor, reconstructions: Tensor, latent_dist: TokenGaussian | None = None, step: int = 0
    ) -> dict[str, Tensor]:
        """Losses of the tokenizer: "loss", the weighted sum, and its terms by name, unweighted."""
        weights = self.weights
        terms = {"l2": F.mse_loss(reconstructions, images)}
        total = terms["l2"]
        if self.perceptual is not None and weights.perceptual > 0:
            terms["perceptual"] = self.perceptual(reconstructions, images).mean()
            total = total + weights.perceptual * terms["perceptual"]
        if self.discriminator is not None and self.adversarial_at(step):
            terms["adversarial"] = adversarial_loss(self.discriminator(reconstructions))
            total = total + weights.adversarial * terms["adversarial"]
        if latent_dist is not None:
            terms["kl"] = latent_dist.kl().mean()
            total = total + weights.kl * terms["kl"]
        return {"loss": total, **terms}

    def discriminator_terms(
        self, images: Tensor, reconstructions: Tensor, step: int = 0, r1: bool = True
    ) -> dict[str, Tensor]:
        """Losses of the discriminator, as in `forward`; the running means of LeCAM move.

        `r1`: whether this step pays for R1 (trainers often do it every 16 steps, with 16 times the weight).

        Raises:
            InvalidParameterError: no discriminator takes part at this step.
        """
        if self.discriminator is None or not self.adversarial_at(step):
            raise InvalidParameterError(
                f"step={step}: no discriminator takes part (weights {self.weights}); ask adversarial_at(step) first"
            )
        real, fake = self.discriminator(images), self.discriminator(reconstructions.detach())
        terms = {"adversarial": discriminator_loss(real, fake)}
        total = terms["adversarial"]
        if self.weights.lecam > 0:
            self.lecam.update(real, fake)
            terms["lecam"] = self.lecam(real, fake)
            total = total + self.weights.lecam * terms["lecam"]
        if r1 and self.weights.r1 > 0:
            terms["r1"] = r1_penalty(self.discriminator, images)
            total = total + self.weights.r1 * terms["r1"]
        return {"loss": total, **terms}


# -- the generator's loss ----------------------------------------------------------------------------------------------


def dit_loss(
    dit: TexTokDiT1D,
    latents: Tensor,
    scheduler: Any,
    class_labels: Tensor | None = None,
    text_embeds: Tensor | None = None,
    text_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One training loss of the generator, with its conditions dropped as its config says: "loss" and its terms.

    "ddpm": mean squared error of the noise at uniform timesteps; with learned variances the variational bound is added
    (Nichol & Dhariwal 2021), its mean part detached. "flow": that of the velocity noise - latents at sigma = sigmoid of
    a normal number.

    Args:
        latents: (B, N, d), normalised (`TexTokModel.normalize`).
        scheduler: of `make_scheduler`; "ddpm" takes its noise schedule, "flow" does not look at it.
        generator: lives on the CPU; noise, times and dropped conditions come from it.
    """
    if text_embeds is not None and text_mask is None:
        text_mask = torch.ones(text_embeds.shape[:2], dtype=torch.int64, device=text_embeds.device)
    class_labels, text_mask = dit.drop_condition(class_labels, text_mask, generator)
    condition = {"class_labels": class_labels, "text_embeds": text_embeds, "text_mask": text_mask}
    x0, batch, device = latents.float(), len(latents), latents.device
    noise = torch.randn(tuple(x0.shape), generator=generator).to(device)
    if dit.config.objective == "flow":
        sigma = sample_sigmas(batch, "logit_normal", generator=generator).to(device)
        mse = F.mse_loss(dit(noised(x0, noise, sigma), 1000 * sigma, **condition).sample.float(), noise - x0)
        return {"loss": mse, "mse": mse}
    steps = scheduler.config.num_train_timesteps
    t = torch.randint(steps, (batch,), generator=generator).to(device)
    noisy = scheduler.add_noise(x0, noise, t)
    output = dit(noisy, t, **condition).sample.float()
    mse = F.mse_loss(output[..., : x0.shape[-1]], noise)
    if not dit.config.learn_sigma:
        return {"loss": mse, "mse": mse}
    # lambda = 1/1000 times the sum over the steps, which one random step estimates by `steps` times itself
    bound = variational_bound(scheduler, x0, noisy, t, output) * (steps / 1000)
    return {"loss": mse + bound, "mse": mse, "bound": bound}


def variational_bound(scheduler: Any, x0: Tensor, noisy: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """Term t of the bound in bits a number, mean over the batch, that trains the variances alone; a scalar.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1), a density, for t = 0. The
    log-variance lies between those of the posterior and of the step, as diffusers' "learned_range" reads the second
    half of `output`.
    """
    noise, fraction = output.chunk(2, dim=-1)
    noise = noise.detach()
    alphas = scheduler.alphas_cumprod.to(x0.device, torch.float64)
    now, before = alphas, torch.cat([alphas.new_ones(1), alphas[:-1]])
    beta = 1 - now / before
    variance = (1 - before) / (1 - now) * beta

    def pick(table: Tensor) -> Tensor:
        return table[t].float()[:, None, None]

    data, current = pick(before.sqrt() * beta / (1 - now)), pick((now / before).sqrt() * (1 - before) / (1 - now))
    guess = (noisy - pick((1 - now).sqrt()) * noise) / pick(now.sqrt())
    mean, true_mean = data * guess + current * noisy, data * x0 + current * noisy
    # the posterior of t = 0 has variance 0: the next one's instead, as Nichol & Dhariwal do
    low = pick(torch.cat([variance[1:2], variance[1:]]).log())
    logvar = low + (fraction + 1) / 2 * (pick(beta.log()) - low)
    square = (true_mean - mean).square()
    kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + square * (-logvar).exp())
    likelihood = 0.5 * (math.log(2 * math.pi) + logvar + (x0 - mean).square() * (-logvar).exp())
    return torch.where(t[:, None, None] == 0, likelihood, kl).mean() / math.log(2)
