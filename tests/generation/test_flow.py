"""Sampling along a flow: the scheduler, guidance, noise, and the laws of the times."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation.flow import APG, SIGMA_LAWS, _guide, draw_noise, noised, sample, sample_sigmas

SHAPE = (3, 2, 4, 5)


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) + t.view(-1, 1, 1, 1)


def null_field(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x * t.view(-1, 1, 1, 1)


def run(noise: Tensor, steps: int = 4, velocity=field, **options) -> Tensor:
    return sample(velocity, noise, scheduler=FlowMatchEulerDiscreteScheduler(), steps=steps, **options)


@pytest.mark.parametrize("steps", [1, 3, 25])
def test_the_scheduler_is_the_plain_loop(steps: int) -> None:
    x = noise = draw_noise(SHAPE, torch.Generator().manual_seed(0))
    for i in range(steps, 0, -1):
        x = x - field(x, torch.full((3,), i / steps)) / steps
    torch.testing.assert_close(run(noise, steps), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_velocity_leads_to_the_clean_sample(steps: int) -> None:
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    got = run(noise, steps, lambda x, t: noise - clean)
    torch.testing.assert_close(got, clean, atol=1e-5, rtol=0)
    half = noised(clean, noise, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(half, torch.stack([clean[0], (clean[1] + noise[1]) / 2, noise[2]]))


def test_without_guidance_there_is_one_call_a_step() -> None:
    calls = {"conditional": 0, "null": 0}

    def counted(name: str, of):
        def call(x: Tensor, t: Tensor) -> Tensor:
            calls[name] += 1
            return of(x, t)

        return call

    fields = {"velocity": counted("conditional", field), "null_velocity": counted("null", null_field)}
    run(torch.randn(SHAPE), 5, guidance_scale=1.0, **fields)
    assert calls == {"conditional": 5, "null": 0}
    seen = []
    run(torch.randn(SHAPE), 5, guidance_scale=2.0, progress=lambda r: seen.append(len(r)) or r, **fields)
    assert calls == {"conditional": 10, "null": 5}
    assert seen == [5]


def test_plain_guidance_is_a_line_and_takes_functions_of_time() -> None:
    noise = torch.randn(SHAPE)
    zero = run(noise, null_velocity=null_field, guidance_scale=0, guidance="cfg")
    torch.testing.assert_close(zero, run(noise, velocity=null_field))
    got = run(noise, 3, null_velocity=null_field, guidance_scale=lambda t: 1 + 2 * t, guidance="cfg")
    x = noise
    for i in (3, 2, 1):
        t = torch.full((3,), i / 3)
        v, null = field(x, t), null_field(x, t)
        x = x - (null + (1 + 2 * i / 3) * (v - null)) / 3
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_apg_without_its_parts_is_plain_guidance() -> None:
    v, null = torch.randn(SHAPE), torch.randn(SHAPE)
    got = _guide(APG(momentum=0.0, eta=1.0, norm_threshold=0.0))(v, null, 7.5)
    torch.testing.assert_close(got, _guide("cfg")(v, null, 7.5), atol=1e-5, rtol=1e-5)


def test_apg_is_orthogonal_bounded_and_remembers() -> None:
    guide, memory = _guide("apg"), torch.zeros(SHAPE)
    for _ in range(4):
        v, null = torch.randn(SHAPE), torch.randn(SHAPE)
        memory = (v - null) - 0.5 * memory
        got = guide(v, null, 7.5)
        for i in range(len(v)):  # slow definition, picture by picture
            d = memory[i] * min(1.0, 2.5 / memory[i].norm().item())
            d = d - (d * v[i]).sum() / v[i].pow(2).sum() * v[i]
            torch.testing.assert_close(got[i], v[i] + 6.5 * d, atol=1e-4, rtol=1e-4)
            change = got[i] - v[i]
            assert abs((change * v[i]).sum()) < 1e-3
            assert change.norm() <= 6.5 * 2.5 + 1e-4


def test_runs_do_not_remember_each_other() -> None:
    noise, scheduler = torch.randn(SHAPE), FlowMatchEulerDiscreteScheduler()
    both = [
        sample(field, noise, scheduler=scheduler, steps=n, null_velocity=null_field, guidance_scale=5.0)
        for n in (4, 2, 4)
    ]
    assert torch.equal(both[0], both[2])
    assert not torch.equal(both[0], both[1])


def test_velocities_of_half_precision_are_integrated_in_float32() -> None:
    noise = torch.randn(SHAPE)
    got = run(noise, 3, lambda x, t: field(x, t).bfloat16(), null_velocity=lambda x, t: null_field(x, t).bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, run(noise, 3), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"guidance_scale": 2.0},
        {"guidance_scale": lambda t: 1.0},
        {"guidance": "other"},
        {"guidance": 3},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(InvalidParameterError):
        run(torch.randn(SHAPE), **options)


def test_noise_is_drawn_picture_by_picture() -> None:
    many = draw_noise(SHAPE, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    one = [torch.randn(1, *SHAPE[1:], generator=generator) for _ in range(3)]
    assert torch.equal(many, torch.cat(one))
    assert torch.equal(draw_noise((1, *SHAPE[1:]), torch.Generator().manual_seed(3)), many[:1])
    seeds = [torch.Generator().manual_seed(s) for s in (5, 3, 5)]
    found = draw_noise(SHAPE, seeds)
    assert torch.equal(found[1], many[0])
    assert torch.equal(found[0], found[2])
    with pytest.raises(InvalidParameterError, match="2 generators given for 3"):
        draw_noise(SHAPE, seeds[:2])


@pytest.mark.parametrize("law", SIGMA_LAWS)
def test_times_lie_in_the_interval_and_can_be_repeated(law: str) -> None:
    first, again = (sample_sigmas(2000, law, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (2000,)
    assert 0 <= first.min() < 0.1
    assert 0.9 < first.max() <= 1
    assert abs(first.mean() - 0.5) < 0.02


def test_times_are_those_of_diffusers_and_strata_hold_one_each() -> None:
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    want = compute_density_for_timestep_sampling("mode", 9, mode_scale=0.4, generator=generators[0])
    assert torch.equal(sample_sigmas(9, "mode", 0.4, generators[1]), want)
    sigmas = sample_sigmas(64, "stratified_logit_normal", generator=generators[0])
    parts = torch.special.ndtr(torch.logit(sigmas.double())) * 64
    assert parts.floor().tolist() == list(range(64))


def test_unknown_laws_and_values() -> None:
    with pytest.raises(InvalidParameterError, match="law"):
        sample_sigmas(3, "other")
    with pytest.raises(InvalidParameterError, match="shift=0"):
        sample_sigmas(3, shift=0)
    with pytest.raises(InvalidParameterError, match="norm_threshold"):
        APG(norm_threshold=-1)


def test_shift_of_sigmas() -> None:
    plain, shifted = (
        sample_sigmas(500, "uniform", shift=shift, generator=torch.Generator().manual_seed(1)) for shift in (1.0, 4.0)
    )
    odds = 4 * plain.double() / (1 - plain.double())  # SD3, section 5.3.2: the odds of noise grow fourfold
    torch.testing.assert_close(shifted, (odds / (1 + odds)).float())
