"""The Monte-Carlo search of Zero-TPrune schedules: budget, seed, score, and the model left as it was."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.methods.models import images, tiny
from tokred.core.errors import InvalidParameterError
from tokred.core.flops import flops
from tokred.vision.zero_tprune import ZeroTPrune
from tokred.vision.zero_tprune_search import search


@pytest.mark.parametrize("target", [0.6, 0.75])
def test_every_trial_meets_the_budget_and_the_best_scores_highest(target: float) -> None:
    model = tiny(depth=8, img_size=96)
    x = images(6, 96)
    found = search(model, x, target, trials=4, seed=1)
    full = flops(model, x).total
    assert len(found.trials) == 4
    for trial in found.trials:
        assert trial.macs == pytest.approx(target * full, rel=0.01)
        assert flops(model, x, ZeroTPrune(schedule=trial.schedule)).total == trial.macs
    assert found.score == max(trial.score for trial in found.trials)
    assert found.best.schedule == next(t.schedule for t in found.trials if t.score == found.score)


def test_score_is_agreement_or_accuracy() -> None:
    model, x = tiny(depth=8, img_size=96), images(6, 96)
    with torch.no_grad():
        plain = model(x).argmax(1)
    agreeing = search(model, x, 0.7, trials=2, seed=3)
    labelled = search(model, x, 0.7, trials=2, seed=3, labels=plain)
    assert labelled == agreeing
    wrong = search(model, x, 0.7, trials=2, seed=3, labels=torch.full_like(plain, -1))
    assert [trial.score for trial in wrong.trials] == [0.0, 0.0]
    with torch.no_grad(), tokred.patch(model, agreeing.best):
        assert float((model(x).argmax(1) == plain).float().mean()) == pytest.approx(agreeing.score)


def test_the_seed_decides_and_batches_do_not() -> None:
    model, x = tiny(depth=8, img_size=96), images(5, 96)
    first = search(model, x, 0.7, trials=3, seed=0, batch_size=2)
    assert search(model, x, 0.7, trials=3, seed=0) == first
    other = search(model, x, 0.7, trials=3, seed=1)
    assert [t.schedule for t in other.trials] != [t.schedule for t in first.trials]


def test_options_of_the_method_are_kept_and_the_model_is_left_alone() -> None:
    model, x = tiny(depth=8, img_size=96), images(4, 96)
    with torch.no_grad():
        expected = model(x)
    seen: list[int] = []
    found = search(model, x, 0.7, trials=2, method=ZeroTPrune(order="IS", eir=False), progress=seen.append)
    assert (found.best.order, found.best.eir) == ("IS", False)
    assert seen == [1, 1]
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_bad_input() -> None:
    model = tiny(depth=8, img_size=96)
    with pytest.raises(InvalidParameterError, match="turned up"):
        search(model, images(2, 96), 0.1, trials=1)
    with pytest.raises(InvalidParameterError, match="images is empty"):
        search(model, images(2, 96)[:0], 0.7)
    with pytest.raises(InvalidParameterError, match="trials=0"):
        search(model, images(2, 96), 0.7, trials=0)
