"""`tokred.vision.backbones.train` and `.compare`: two updates of each family, and what a run promises."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from tokred.core.errors import InvalidParameterError, UnknownParameterError

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from tokred.core.flops import flops
from tokred.vision.backbones import compare as compare_backbones
from tokred.vision.backbones import train as train_backbone
from tokred.vision.backbones.lookup_vit import MultiResSampler
from tokred.vision.backbones.train import IMAGENET, SMALL, Recipe, Run, Scenes, default_recipe, train
from tokred.vision.backbones.trained import load_trained
from tokred.zoo.digit_vit import build_digit_vit

#: Models that take milliseconds: depth of one block, few channels.
TINY = {
    "strip_mlp_tiny": {"embed_dim": 16, "layers": (1, 1, 1, 1)},
    "dualtoken_vit_tiny": {"embed_dims": (16, 16, 16), "depths": (1, 1, 1), "num_heads": (2, 2, 2)},
    "lookup_vit_tiny": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "vit_tiny_patch16_224": {"embed_dim": 16, "depth": 1, "num_heads": 2},
}


def tiny(model: str = "dualtoken_vit_tiny", **changes) -> Run:
    """Two epochs of one update, a window first."""
    own = ("seed", "accumulate", "windows", "steps_per_epoch", "val_scenes")
    run = {"steps_per_epoch": 1, "val_scenes": 4, **{k: changes.pop(k) for k in own if k in changes}}
    grids = ((2, 2), (3, 4)) if model.startswith("lookup") else ()
    short = {"epochs": 2, "warmup_epochs": 1, "batch_size": 4, "grids": grids, **changes}
    return Run(model, model_kwargs=TINY[model], recipe=replace(default_recipe(model, "scenes"), **short), **run)


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model", list(TINY))
def test_two_updates_and_back(model, tmp_path):
    record = train(tiny(model), tmp_path / "run")
    assert [row["update"] for row in record["log"]] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in record["log"])
    assert set(record["val"]) == ({"2x2", "3x4"} if model.startswith("lookup") else {"accuracy"})
    loaded, there = load_trained(tmp_path / "run")
    assert there == json.loads((tmp_path / "run/config.json").read_text()) == record
    assert not loaded.training
    assert loaded(torch.zeros(2, 3, 96, 96)).shape == (2, 10)
    assert same(loaded.state_dict(), weights(tmp_path / "run"))
    initial = timm.create_model(model, num_classes=10, **there["kwargs"]).state_dict()
    last = weights(tmp_path / "run", "last")
    assert initial.keys() == last.keys()
    assert not same(initial, last)


@pytest.mark.parametrize("model", ["lookup_vit_tiny", "dualtoken_vit_tiny"])
def test_a_resumed_run_is_the_run(model, tmp_path, monkeypatch):
    """Drop path, mixup and random erasing draw the same numbers; optimizer, average and BatchNorm go on."""
    run = tiny(model, epochs=3, drop_path=0.2, mixup=0.5, cutmix=0.5, reprob=0.5, accumulate=2)
    whole = train(run, tmp_path / "whole")
    stopped = train_backbone.Trainer.epoch

    def stop(self):
        if self.progress.epoch == 2:
            raise KeyboardInterrupt
        return stopped(self)

    monkeypatch.setattr(train_backbone.Trainer, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "parts")
    monkeypatch.undo()
    with pytest.raises(InvalidParameterError, match="no finished run"):
        load_trained(tmp_path / "parts")
    assert [p.name for p in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = train(run, tmp_path / "parts", resume=True)
    for name in ("model", "last"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    assert resumed["log"] == whole["log"]
    assert [row["update"] for row in whole["log"]] == [1, 2, 3]


def test_seeds_decide(tmp_path):
    for before, (name, seed) in enumerate((("a", 0), ("b", 0), ("c", 1))):
        torch.manual_seed(before)  # whatever was drawn before has no influence
        train(tiny(seed=seed), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_average_is_timms(tmp_path):
    train(tiny("vit_tiny_patch16_224", epochs=2, ema=0.5), tmp_path / "average")
    train(tiny("vit_tiny_patch16_224", epochs=2, ema=0.0), tmp_path / "none")
    last = weights(tmp_path / "average", "last")
    assert same(last, weights(tmp_path / "none", "last"))
    assert same(last, weights(tmp_path / "none"))
    # after the first update it is the weights; after the second decay = min(0.5, 1 - 2 ** (-2 / 3))
    first = tmp_path / "first"
    stop = tiny("vit_tiny_patch16_224", epochs=2, ema=0.0)
    trainer = train_backbone.Trainer(stop, first)
    trainer.epoch()
    decay = 1 - 2 ** (-2 / 3)
    early = trainer.averaged.state_dict()
    for name, value in weights(tmp_path / "average").items():
        torch.testing.assert_close(value, decay * early[name] + (1 - decay) * last[name], rtol=1e-5, atol=1e-7)


def test_a_grid_is_drawn_for_each_update():
    """The same for the batches of one update, in every process, and after a resumption: seed and update decide."""
    trainer = train_backbone.Trainer(tiny("lookup_vit_tiny", seed=3, accumulate=2, steps_per_epoch=6), Path("unused"))
    model, seen = trainer.accelerator.unwrap_model(trainer.model), []
    model.register_forward_pre_hook(lambda module, args: seen.append(module.compressed_grid))
    trainer.epoch()
    draw = MultiResSampler(((2, 2), (3, 4)), seed=3)
    assert seen == [draw(update) for update in range(6) for _ in range(2)]
    assert len(set(seen)) == 2


def test_accumulated_batches_are_one_update():
    trainer = train_backbone.Trainer(tiny("vit_tiny_patch16_224", accumulate=3, steps_per_epoch=2), Path("unused"))
    assert trainer.source.steps == 6
    assert trainer.epoch()["update"] == 2


def test_the_rate_warms_up_and_falls():
    trainer = train_backbone.Trainer(
        tiny("vit_tiny_patch16_224", epochs=4, steps_per_epoch=2, lr=1e-3, warmup_lr=1e-5, min_lr=1e-4), Path("unused")
    )
    rates = []
    for update in range(9):
        trainer.scheduler.step_update(update)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-5)
    assert rates[1] == pytest.approx((1e-5 + 1e-3) / 2)
    expected = [1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * t / 8)) for t in range(2, 8)]
    assert rates[2:8] == pytest.approx(expected)
    assert rates[8] == pytest.approx(1e-4)


def test_no_decay_where_the_model_says_so():
    trainer = train_backbone.Trainer(tiny(weight_decay=0.05), Path("unused"))
    free = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    model = trainer.accelerator.unwrap_model(trainer.model)
    wanted = {id(p) for n, p in model.named_parameters() if p.ndim <= 1 or n in model.no_weight_decay()}
    assert free == wanted
    assert id(model.global_token) in free


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_windows_come_first_and_processes_see_other_scenes():
    run = tiny(epochs=2, windows=0.5)
    free, fixed = Scenes(run, True), Scenes(run, False)
    assert [next(free.train(epoch))[0].shape[-1] for epoch in (0, 1)] == [32, 96]
    (windows, labels), (canvas, again) = next(free.train(0)), next(fixed.train(0))
    assert canvas.shape == (4, 3, 96, 96)
    assert torch.equal(labels, again)
    for window, image in zip(windows, canvas, strict=True):  # somewhere in it, unchanged
        places = image.unfold(1, 32, 1).unfold(2, 32, 1)
        assert (places == window[:, None, None]).all(dim=(0, 3, 4)).sum() >= 1
    other = Scenes(run, True, rank=1, world=2)
    assert not torch.equal(next(other.train(0))[0], windows)


def test_every_held_out_scene_is_seen_once():
    run = tiny(val_scenes=150)
    alone = torch.cat([images for images, _ in Scenes(run, True).val()])
    parts = [list(Scenes(run, True, rank, 2).val()) for rank in range(2)]
    assert len(alone) == 150
    assert [sum(len(x) for x, _ in part) for part in parts] == [86, 64]
    assert torch.equal(alone[64:128], parts[1][0][0])
    assert torch.equal(alone[128:], parts[0][1][0])


@pytest.mark.parametrize("model", list(SMALL))
def test_small_variants_are_small_and_cost_alike(model):
    with torch.device("meta"):
        net = timm.create_model(model, num_classes=10, **SMALL[model])
    assert sum(p.numel() for p in net.parameters()) <= 1.5e6
    assert 0.09e9 < compare_backbones.macs(net) < 0.25e9


def test_the_counter_agrees_with_the_bundled_vits_count():
    vit = build_digit_vit()
    assert compare_backbones.macs(vit) == flops(vit).total
    with torch.device("meta"):
        twin = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SMALL["vit_tiny_patch16_224"])
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in vit.named_parameters()}


# -- folders of images -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                colour = (200, 30 * i, 0) if label == "cat" else (0, 30 * i, 200)
                Image.new("RGB", (40, 36), colour).save(tmp_path / "data" / split / label / f"{i}.png")
    return tmp_path / "data"


def test_image_folder_from_the_command_line(folder, tmp_path):
    argv = ["--model", "strip_mlp_tiny", "--data", "imagefolder", str(folder), "--out", str(tmp_path / "run")]
    argv += ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4"]
    record = train_backbone.main([*argv, "--model-kwargs", "img_size=64", "embed_dim=16", "layers=(1,1,1,1)"])
    assert record["num_classes"] == 2
    assert record["log"][-1]["update"] == 4
    assert record["run"]["recipe"]["lr"] == IMAGENET["strip_mlp"].lr
    assert record["run"]["recipe"]["epochs"] == 2
    assert record["val"]["accuracy"] * 6 == pytest.approx(round(record["val"]["accuracy"] * 6), abs=1e-3)
    model, _ = load_trained(tmp_path / "run")
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_image_folders_that_do_not_serve(folder, tmp_path):
    def run(**changes):
        recipe = Recipe(epochs=1, warmup_epochs=0, **changes)
        kwargs = {"img_size": 64, "embed_dim": 16, "layers": (1, 1, 1, 1)}
        return Run("strip_mlp_tiny", data="imagefolder", path=str(folder), model_kwargs=kwargs, recipe=recipe)

    with pytest.raises(InvalidParameterError, match="make 0 batches of 64"):
        train(run(), tmp_path / "run")
    (folder / "val" / "dog").rename(folder / "val" / "cow")
    with pytest.raises(InvalidParameterError, match="other classes"):
        train(run(batch_size=4), tmp_path / "run")
    (folder / "train").rename(folder / "training")
    with pytest.raises(InvalidParameterError, match="expected a folder that holds train/CLASS"):
        train(run(batch_size=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"warmup_epochs": 300}, "fewer than the 300 epochs"),
        ({"opt": "adamwww"}, "no such optimizer, did you mean 'adamw'"),
        ({"sched": "plateau"}, "sched"),
        ({"lr": 0.0}, "lr=0.0: expected a number > 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"reprob": 1.5}, "reprob=1.5"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"batch_size": 3}, "give an even number"),
    ],
)
def test_recipe_errors(changes, message):
    with pytest.raises(InvalidParameterError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "strip_mlp_tinny"}, "no such model, did you mean 'strip_mlp_tiny'"),
        ({"data": "cifar"}, "data='cifar'"),
        ({"data": "imagefolder"}, "an image folder needs a path"),
        ({"path": "x"}, "scenes have none"),
        ({"seed": -1}, "seed"),
        ({"windows": 2.0}, "windows=2.0"),
        ({"accumulate": 0}, "accumulate"),
        ({"recipe": Recipe()}, "auto_augment=.*scenes are drawn anew"),
        ({"recipe": replace(default_recipe("", "scenes"), grids=((3, 3),))}, "no compressed grid"),
    ],
)
def test_run_errors(changes, message):
    with pytest.raises(InvalidParameterError, match=message):
        Run(**{"model": "strip_mlp_tiny", **changes})


def test_folders_of_runs_are_not_mixed_up(tmp_path):
    run, out = tiny("vit_tiny_patch16_224"), tmp_path / "run"
    with pytest.raises(InvalidParameterError, match="no checkpoint to resume from"):
        train(run, out, resume=True)
    train(run, out)
    with pytest.raises(InvalidParameterError, match="holds a run already"):
        train(run, out)
    with pytest.raises(InvalidParameterError, match=r"another run: seed=0 there, 1 given; lr=0\.005 there, 0\.1 given"):
        train(tiny("vit_tiny_patch16_224", seed=1, lr=0.1), out, resume=True)
    (out / "model.safetensors").write_bytes((out / "last.safetensors").read_bytes()[:100])
    with pytest.raises(InvalidParameterError, match=r"model\.safetensors cannot be read"):
        load_trained(out)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(tiny("vit_tiny_patch16_224", epochs=3, steps_per_epoch=3, lr=1e30, clip_grad=0.0), tmp_path)


def test_arguments_that_the_model_does_not_take(tmp_path):
    with pytest.raises(UnknownParameterError, match="alhpa"):
        train(Run("dualtoken_vit_tiny", model_kwargs={"alhpa": 1}), tmp_path)
    with pytest.raises(UnknownParameterError, match="vit_tiny_patch16_224 does not take"):
        train(Run("vit_tiny_patch16_224", model_kwargs={"widht": 1}), tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "imagefolder"], "needs a path"),
        (["--data", "scenes", "--grids", "3,a"], "expected sides such as"),
        (["--data", "scenes", "--grids", "0"], "grids"),
        (["--data", "a", "b", "c"], "expected scenes, or imagefolder PATH"),
    ],
)
def test_the_command_line_says_what_is_wrong(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_backbone.main(["--model", "lookup_vit_tiny", "--out", str(tmp_path), *argv])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# -- comparison --------------------------------------------------------------------------------------------------------


def test_comparison(tmp_path, capsys):
    """One row a grid, the ViT's patched forms at the row's cost, and the same numbers in the table and the file."""
    kwargs = {**TINY["lookup_vit_tiny"], "embed_dim": 96, "num_heads": 3, "depth": 8}
    run = replace(tiny("lookup_vit_tiny"), model_kwargs=kwargs)
    train(replace(run, recipe=replace(run.how, grids=((9, 9), (2, 2)))), tmp_path / "run")
    argv = [str(tmp_path / "run"), "--scenes", "8", "--batch", "2", "--rounds", "1", "--out", str(tmp_path / "t.json")]
    results = compare_backbones.main([*argv, "--methods", "tome,topk"])
    assert json.loads((tmp_path / "t.json").read_text()) == results
    alone, wide, narrow = results["groups"]
    assert len(alone) == 1
    assert alone[0]["gmacs"] == pytest.approx(0.243526848)
    assert alone[0]["speedup"] is None
    assert [group[0]["setting"] for group in (wide, narrow)] == ["grid 9x9", "grid 2x2"]
    assert [row["setting"][:4] for row in wide[1:]] == ["ToMe", "TopK"]
    for row in wide[1:]:
        assert abs(row["gmacs"] - wide[0]["gmacs"]) <= 0.05 * alone[0]["gmacs"]
    for row in (row for group in results["groups"] for row in group):
        assert 0 <= row["accuracy"] <= 1
        assert row["se"] >= 0
        assert row["images_per_s"] > 0
    printed = capsys.readouterr().out
    assert "grid 9x9" in printed
    assert "standard error" in printed
    assert wide[0]["gmacs"] > narrow[0]["gmacs"]
    model, _ = load_trained(tmp_path / "run")
    from tokred.vision.backbones.lookup_vit import lookup_vit_macs

    model.set_compressed_grid((9, 9))
    assert wide[0]["gmacs"] * 1e9 == pytest.approx(lookup_vit_macs(model))


def test_comparison_errors(tmp_path):
    with pytest.raises(InvalidParameterError, match="no finished run"):
        compare_backbones.compare([tmp_path])
    with pytest.raises(InvalidParameterError, match="at least one folder"):
        compare_backbones.compare([])
    with pytest.raises(InvalidParameterError, match="methods"):
        compare_backbones.compare([tmp_path], methods=["evs"])
    with pytest.raises(InvalidParameterError, match="scenes"):
        compare_backbones.compare([tmp_path], scenes=1)
