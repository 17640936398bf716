"""Rectified flow: noise and targets for training, and sampling with guidance by diffusers' scheduler.

At time t in [0, 1] a sample is x_t = t noise + (1 - t) x_0 and its velocity is noise - x_0; sampling goes from t = 1
(noise) to t = 0. Nothing here knows a model: velocities are functions of (x, t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tokred.core.errors import InvalidParameterError

__all__ = ["APG", "SIGMA_LAWS", "Generators", "Velocity", "draw_noise", "noised", "sample", "sample_sigmas"]

#: the velocity (B, ...) at samples x (B, ...) and times t (B,)
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
#: one generator for all pictures, or one for each
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None

SIGMA_LAWS = ("mode", "uniform", "logit_normal", "stratified_logit_normal")


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416), with the FlexTok release's values.

    Args:
        momentum: beta, share of the running difference that is added to the next one; negative pushes away from it.
        eta: share kept of the part parallel to the conditional velocity.
        norm_threshold: r, largest norm of the difference of one picture; 0 sets no limit.
    """

    momentum: float = -0.5
    eta: float = 0.0
    norm_threshold: float = 2.5

    def __post_init__(self) -> None:
        if not self.norm_threshold >= 0:
            raise InvalidParameterError(f"norm_threshold={self.norm_threshold!r}: expected 0 (no limit) or more")


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    *,
    scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    null_velocity: Velocity | None = None,
    guidance_scale: float | Callable[[float], float] = 1.0,
    guidance: str | APG = "apg",
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """Samples (B, ...) float32 from noise (B, ...) by `steps` equal Euler steps from t = 1 to t = 0.

    Args:
        velocity: of the condition. Its result is taken as float32: guidance and steps are float32 in every case.
        noise: the samples at t = 1.
        scheduler: what it holds from an earlier run is overwritten. Its `shift` moves the times; 1.0 leaves them equal.
        null_velocity: without condition; not called, and not needed, where `guidance_scale` is 1.
        guidance_scale: g, or a function of t. 0 is the null velocity alone (plain guidance).
        guidance: "cfg" (v_null + g (v - v_null)), "apg", or `APG` with its own values.
        progress: wraps the range of steps, for example `DiffusionPipeline.progress_bar`.

    Raises:
        InvalidParameterError: fewer than one step, an unknown guidance, or guidance without `null_velocity`.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidParameterError(f"number of steps {steps!r}: expected a whole number, 1 or more")
    guided = callable(guidance_scale) or guidance_scale != 1.0
    guide = _guide(guidance)
    if guided and null_velocity is None:
        raise InvalidParameterError(
            f"guidance_scale={guidance_scale!r} needs the velocity without condition; 1.0 does not"
        )
    # the scheduler's own spacing would end at 0.001 instead of 1 / steps
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), device=noise.device)
    scheduler.set_begin_index(0)
    x = noise.float()
    for step in progress(range(steps)):
        t = scheduler.sigmas[step].to(x.device, torch.float32)
        times = t.expand(len(x))
        v = velocity(x, times).float()
        if guided:
            assert null_velocity is not None
            scale = guidance_scale(float(t)) if callable(guidance_scale) else guidance_scale
            v = guide(v, null_velocity(x, times).float(), float(scale))
        x = scheduler.step(v, scheduler.timesteps[step], x, return_dict=False)[0]
    return x


def _guide(guidance: str | APG) -> Callable[[Tensor, Tensor, float], Tensor]:
    """(conditional, null, scale) -> velocity; what it remembers lasts one run."""
    if guidance == "cfg":
        return lambda v, null, scale: null + scale * (v - null)
    apg = APG() if guidance == "apg" else guidance
    if not isinstance(apg, APG):
        raise InvalidParameterError(f'guidance={guidance!r}: expected "apg", "cfg" or APG(...)')
    memory = MomentumBuffer(apg.momentum)

    def guide(v: Tensor, null: Tensor, scale: float) -> Tensor:
        # the "original formulation" adds to the conditional velocity, hence scale - 1
        options: dict[str, Any] = {"eta": apg.eta, "norm_threshold": apg.norm_threshold}
        return normalized_guidance(v, null, scale - 1, memory, use_original_formulation=True, **options)

    return guide


def draw_noise(shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None) -> Tensor:
    """Normal noise (B, ...) float32, one draw a picture: from each picture's generator, or in turn from the one given.

    So the first picture's noise does not depend on how many follow.

    Raises:
        InvalidParameterError: another number of generators than pictures.
    """
    count = shape[0]
    generators = [generator] * count if generator is None or isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != count:
        raise InvalidParameterError(
            f"{len(generators)} generators given for {count} pictures: give one, or one for each"
        )
    target = torch.device(device or "cpu")
    draws = [randn_tensor((1, *shape[1:]), generator=one, device=target, dtype=torch.float32) for one in generators]
    return torch.cat(draws)


def sample_sigmas(
    count: int,
    law: str = "mode",
    mode_scale: float = 0.25,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    shift: float = 1.0,
) -> Tensor:
    """Training times (count,) float32 in [0, 1].

    Args:
        law: "mode" (Esser et al., arXiv 2403.03206, section 3.1; FlexTok's, with `mode_scale` s = 0.25), "uniform",
            "logit_normal" (mean 0, deviation 1), or "stratified_logit_normal": one time from each of `count` parts of
            equal probability.
        shift: a of t -> a t / (1 + (a - 1) t), section 5.3.2 of the same: above 1 more of the times are noisy ones,
            where nothing but the condition says what the picture is.

    Raises:
        InvalidParameterError: an unknown law, or a shift that is not above 0.
    """
    if law not in SIGMA_LAWS:
        raise InvalidParameterError(f"law={law!r}: expected one of {', '.join(SIGMA_LAWS)}")
    if not 0 < shift < math.inf:
        raise InvalidParameterError(f"shift={shift!r}: expected a number above 0")
    times = _times(count, law, mode_scale, generator, device)
    return shift * times / (1 + (shift - 1) * times)


def _times(
    count: int, law: str, mode_scale: float, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    if law == "stratified_logit_normal":
        u = torch.rand(count, generator=generator, device=device)
        return torch.special.ndtri((torch.arange(count, device=device) + u) / count).sigmoid()
    from diffusers.training_utils import compute_density_for_timestep_sampling  # slow to import, for training alone

    return compute_density_for_timestep_sampling(
        law, count, logit_mean=0.0, logit_std=1.0, mode_scale=mode_scale, device=device, generator=generator
    )


def noised(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_t = t noise + (1 - t) clean for times (B,); the velocity to learn is noise - clean."""
    t = sigmas.view(-1, *[1] * (clean.ndim - 1))
    return t * noise + (1 - t) * clean
