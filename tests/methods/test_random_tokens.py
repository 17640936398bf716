"""RandomTokens: repeatable, the same for every image of a batch, and spread over all positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.methods.models import images, tiny


def run(model: Any, method: Any, x: Tensor) -> tuple[Tensor, tokred.Trace]:
    with tokred.patch(model, method) as patch, torch.no_grad():
        return model(x), patch.trace


def kept(method: Any, batch: int = 2, side: int = 40) -> list[list[int]]:
    _, trace = run(tiny(img_size=side), method, images(batch, side))
    assert len(trace) == 1
    return trace[0].origins.tolist()


def test_the_choice_repeats_whatever_the_global_generator_and_the_batch() -> None:
    method = tokred.RandomTokens(keep_rate=0.5, layers=(1,))
    first = kept(method)
    torch.manual_seed(1234)
    assert kept(method, batch=4)[:2] == first
    model, x = tiny(), images()
    before = torch.get_rng_state()
    run(model, method, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0] == first[1] == sorted(first[0])
    assert len(first[0]) == 13


def test_seeds_and_layers_choose_differently() -> None:
    chosen = {tuple(kept(tokred.RandomTokens(keep_rate=0.5, layers=(1,), seed=seed))[0]) for seed in range(20)}
    assert len(chosen) == 20
    layers = {tuple(kept(tokred.RandomTokens(keep_rate=0.5, layers=(layer,)))[0]) for layer in range(4)}
    assert len(layers) == 4
    large = tokred.RandomTokens(keep_rate=0.5, layers=(1,), seed=2**62)
    assert len(kept(large)[0]) == 13


def test_every_position_is_kept_about_equally_often() -> None:
    model, x, counts = tiny(img_size=80, depth=1), images(1, 80), torch.zeros(100)
    with tokred.patch(model, tokred.RandomTokens(keep_rate=0.5, layers=(0,))) as patch, torch.no_grad():
        for seed in range(150):
            patch.replace(tokred.RandomTokens(keep_rate=0.5, layers=(0,), seed=seed))
            model(x)
            counts[patch.trace[0].origins[0]] += 1
    assert counts.sum() == 150 * 50
    assert counts.min() > 45  # 75 expected, standard deviation 6.1
    assert counts.max() < 105


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(3, 18)]),
        ({"keep_rate": 0.7, "layers": (0, 2)}, [(0, 18), (2, 13)]),
        ({"keep_rate": 0.5, "layers": (0,)}, [(0, 13)]),
        ({"budget": 0.5, "layers": (1, 2)}, [(1, 12)]),
        ({"budget": 7, "layers": (1,)}, [(1, 7)]),
        ({"budget": 1, "layers": (1,)}, [(1, 1)]),
        ({"budget": 1.0, "layers": (1,)}, []),
        ({"keep_rate": 1.0}, []),
        ({"counts": {0: 20, 2: 9}}, [(0, 20), (2, 9)]),
        ({"counts": {0: 20, 2: 90}}, [(0, 20)]),
        ({"budget": 0.001, "layers": (1,)}, [(1, 1)]),
    ],
)
def test_counts(options: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    _, trace = run(tiny(), tokred.RandomTokens(**options), images())
    assert trace.counts == expected


def test_it_can_be_the_twin_of_another_method() -> None:
    model, x = tiny(), images()
    _, trace = run(model, tokred.ZeroTPrune(schedule={1: (4, 0.8), 2: (0, 0.6)}), x)
    twin = tokred.RandomTokens(counts=dict(trace.counts), where="block")
    _, own = run(model, twin, x)
    assert own.counts == trace.counts
    assert (
        tokred.flops(model, None, twin).vision
        == tokred.flops(model, None, tokred.ZeroTPrune(schedule={1: (4, 0.8), 2: (0, 0.6)})).vision
    )
