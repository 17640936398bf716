"""Rates, optimisers and averages that the trainers share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokred.zoo.training import Average, Optimiser, Rates


def test_rates_rise_hold_and_fall() -> None:
    rates = Rates(warmup=10, hold=0.5, last=0.1)
    factors = [rates.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[100] == pytest.approx(0.1)
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_optimiser_moves_every_parameter_and_clears_gradients() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    frozen = module[1].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = Optimiser(module, [module[0].weight], Rates(warmup=1), steps=2)
    optimiser.step(module(torch.randn(3, 4)).square().sum() * 0.5 + module[0].bias.sum())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias", "1.weight"}
    assert all(p.grad is None for p in module.parameters())
    assert not any(p is frozen for p in optimiser.params)
    assert optimiser.done == 1


def test_average_lags_behind_and_is_written_back() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = Average(module, decay=0.5)
    with torch.no_grad():
        module.weight.fill_(1.0)
    average.update()  # early steps forget faster: decay min(.5, 1 / 10)
    average.copy_to(module)
    assert module.weight.item() == pytest.approx(0.9)
