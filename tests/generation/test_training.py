"""`tokred.generation.training`: a run that was killed goes on as if it had not been, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tokred.core.errors import InvalidParameterError, UnknownParameterError

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("timm")

from tokred.generation.training import Objective, Plan, fit, picture_sheet, read_config

PLAN = {"steps": 6, "batch_size": 4, "lr": 1e-2, "warmup": 1, "checkpoint_every": 2, "sample_every": 3, "log_every": 1}


class Line(Objective):
    """Learns y = 2 x from noisy draws; `stop` breaks off before that update."""

    def __init__(self, stop: int | None = None) -> None:
        torch.manual_seed(0)
        self.model, self.stop, self.seen = nn.Linear(1, 1), stop, []

    def batches(self, size, start, rank, world):
        while True:
            if start == self.stop:
                raise KeyboardInterrupt
            yield torch.rand(size, 1, generator=torch.Generator().manual_seed(100 * start + rank))
            start += 1

    def loss(self, model, batch, step, device):
        self.seen.append(float(batch[0]))
        noise = torch.randn(batch.shape)
        error = (model(batch) - 2 * batch + 0.01 * noise).square().mean()
        return error, {"first": batch[0, 0]}

    def save(self, folder):
        folder.mkdir()
        torch.save(self.model.state_dict(), folder / "weights.pt")

    def sheet(self):
        assert not self.model.training
        return [torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 4, 4)]


def weights(folder):
    return torch.load(folder / "model" / "weights.pt")


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_a_resumed_run_is_the_run(tmp_path, opt):
    plan = Plan(**PLAN, opt=opt, ema=0.9)
    whole = fit(Line(), plan, tmp_path / "whole", {"task": "line"})
    with pytest.raises(KeyboardInterrupt):
        fit(Line(stop=5), plan, tmp_path / "parts", {"task": "line"})
    assert [p.name for p in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    again = Line()
    resumed = fit(again, plan, tmp_path / "parts", {"task": "line"}, resume=True)
    assert len(again.seen) == 2
    assert resumed["log"] == whole["log"]
    assert [row["step"] for row in whole["log"]] == [1, 2, 3, 4, 5, 6]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert names == {"config.json", "model", "samples"}
    assert [p.name for p in sorted((tmp_path / "whole/samples").iterdir())] == ["0000003.png", "0000006.png"]
    assert json.loads((tmp_path / "whole/config.json").read_text()) == whole


def test_what_is_saved_is_the_average(tmp_path):
    line = Line()
    fit(line, Plan(**PLAN, ema=0.5), tmp_path / "run", {})
    last, average = line.model.state_dict(), weights(tmp_path / "run")
    assert not torch.equal(last["weight"], average["weight"])
    torch.testing.assert_close(last["weight"], average["weight"], rtol=0, atol=0.05)
    plain = Line()
    fit(plain, Plan(**PLAN, ema=0.0), tmp_path / "plain", {})
    assert torch.equal(plain.model.weight, weights(tmp_path / "plain")["weight"])
    assert torch.equal(plain.model.weight, last["weight"])  # the average has no influence on the run


class Duel(Line):
    """A second module learns against the first from update 2 on."""

    def __init__(self, stop=None):
        super().__init__(stop)
        self.adversary = nn.Linear(1, 1)

    def loss(self, model, batch, step, device):
        self.batch = batch
        error, numbers = super().loss(model, batch, step, device)
        return error - 0.1 * self.adversary(model(batch)).mean(), numbers

    def adversary_loss(self, step):
        return None if step < 2 else self.adversary(self.model(self.batch).detach()).square().mean()


def test_an_adversary_learns_in_turn(tmp_path):
    plan = Plan(**PLAN)
    duel = Duel()
    start = duel.adversary.weight.detach().clone()
    record = fit(duel, plan, tmp_path / "whole", {})
    assert not torch.equal(start, duel.adversary.weight)
    assert ["adversary" in row for row in record["log"]] == [False, False, True, True, True, True]
    with pytest.raises(KeyboardInterrupt):
        fit(Duel(stop=5), plan, tmp_path / "parts", {})
    again = Duel()
    resumed = fit(again, plan, tmp_path / "parts", {}, resume=True)
    assert resumed["log"] == record["log"]
    assert torch.equal(again.adversary.weight, duel.adversary.weight)


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from tests.generation.test_training import PLAN, Line
from tokred.generation.training import Plan, fit
line = Line()
record = fit(line, Plan(**PLAN, clip_grad=0.0), sys.argv[1], {})
torch.save(line.model.state_dict(), f"{sys.argv[1]}/rank{Accelerator().process_index}.pt")
"""


def test_processes_share_their_gradients(tmp_path):
    """Two processes see different batches, learn the same weights, and not those of one process alone."""
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = Line()
    record = fit(alone, Plan(**PLAN, clip_grad=0.0), tmp_path / "one", {})
    assert record["processes"] == 1
    assert json.loads((tmp_path / "two/config.json").read_text())["processes"] == 2
    assert not torch.equal(first["weight"], alone.model.weight)


def test_folders_are_not_mixed_up(tmp_path):
    plan = Plan(**PLAN)
    with pytest.raises(InvalidParameterError, match="no checkpoint to resume"):
        fit(Line(), plan, tmp_path / "none", {}, resume=True)
    with pytest.raises(KeyboardInterrupt):
        fit(Line(stop=3), plan, tmp_path / "run", {"task": "line"})
    with pytest.raises(InvalidParameterError, match="holds a run already"):
        fit(Line(), plan, tmp_path / "run", {"task": "line"})
    with pytest.raises(InvalidParameterError, match="differs in task"):
        fit(Line(), plan, tmp_path / "run", {"task": "curve"}, resume=True)


def test_a_loss_that_is_no_number_stops(tmp_path):
    class Broken(Line):
        def loss(self, model, batch, step, device):
            return model(batch).sum() * float("nan"), {}

    with pytest.raises(FloatingPointError, match="lower lr"):
        fit(Broken(), Plan(**PLAN, clip_grad=0.0), tmp_path / "run", {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"warmup": 6}, "warmup=6"),
        ({"opt": "adamm"}, "did you mean 'adam"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
    ],
)
def test_plans_that_cannot_be(change, said):
    with pytest.raises(InvalidParameterError, match=said):
        Plan(**{**PLAN, **change})


def test_fields_by_name():
    assert Plan.from_dict({"steps": 5, "warmup": 1, "betas": [0.8, 0.9]}).betas == (0.8, 0.9)
    with pytest.raises(UnknownParameterError, match="did you mean 'steps'"):
        Plan.from_dict({"step": 5})


def test_recipes(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {size: 32}\ntrain: {steps: 3}\n")
    assert read_config(path, ("data", "train")) == {"data": {"size": 32}, "train": {"steps": 3}}
    for text in ("data: 3\ntrain: {}\n", "data: {}\n", "- 1\n", "a: [\n"):
        path.write_text(text)
        with pytest.raises(InvalidParameterError, match=r"recipe\.yaml"):
            read_config(path, ("data", "train"))


def test_sheet_has_every_picture():
    sheet = picture_sheet([torch.full((2, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 1.0)], scale=2, gap=1)
    assert sheet.size == (2 * 9 + 1, 2 * 9 + 1)
    assert sheet.getpixel((1, 1)) == (0, 0, 0)
    assert sheet.getpixel((10, 8)) == (0, 0, 0)
    assert sheet.getpixel((1, 10)) == (255, 255, 255)
