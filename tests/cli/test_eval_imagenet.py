"""`tokred eval imagenet`: its numbers, what a kill and several processes change of them (nothing), how it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokred
from tests.cli.evaluations import kill_midway, lines, two_processes
from tests.conftest import ROOT
from tokred import cli

pytest.importorskip("timm")
pytest.importorskip("torchvision")

SPEED = {"images_per_s", "speedup"}
ROW = {
    "row", "method", "top1", "top1_se", "top5", "top5_se", "agreement", "agreement_se", "gmacs", "gmacs_fraction",
    "tokens", "paper_top1", "paper_top5", "paper_gmacs", "paper_source", *SPEED,
}  # fmt: skip
TINY = ["--model", "vit_tiny_patch16_224", "--random-weights", "--image-size", "32", "--workers", "0"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `tokred eval imagenet`."""
    try:
        code = cli.main(["eval", "imagenet", *argv])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def evaluated(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    line = err.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: " in line
    return line


def numbers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows without their speeds."""
    return [{key: value for key, value in row.items() if key not in SPEED} for row in results["rows"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures in two of ImageNet's classes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(10):
        path = root / ("n01440764", "n03450230")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    return root


# -- what it measures --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="the scenes need scikit-image")
def test_scenes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The bundled ViT on bundled scenes: the numbers of a plain loop."""
    from tokred.data.scenes import DigitScenes, normalize

    argv = ["--count", "24", "--batch", "8", "--method", "tome r=13|0", "--method", "random_tokens keep_rate=0.5"]
    results = evaluated(capsys, *argv, "--out", str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [row["row"] for row in results["rows"]] == [
        "unpatched", "tome r=13", "tome r=0", "random_tokens keep_rate=0.5"
    ]  # fmt: skip
    assert all(set(row) == ROW for row in results["rows"])
    scenes = DigitScenes("test", 777).render(24)
    model = tokred.zoo.load("digit-vit")
    plain = None
    for row, method in zip(results["rows"], (None, tokred.ToMe(r=13), None), strict=False):
        handle = None if method is None else tokred.patch(model, method)
        with torch.inference_mode():
            logits = torch.cat([model(normalize(images)) for images in scenes.images.split(8)])
        if handle is not None:
            handle.remove()
        guess = logits.argmax(1)
        plain = guess if plain is None else plain
        hits = (guess == scenes.labels).double()
        assert row["top1"] == pytest.approx(hits.mean().item())
        assert row["top1_se"] == pytest.approx(hits.std().item() / 24**0.5)
        ranks = (logits > logits.gather(1, scenes.labels[:, None])).sum(1)
        assert row["top5"] == pytest.approx((ranks < 5).double().mean().item())
        assert row["agreement"] == pytest.approx((guess == plain).double().mean().item())
        cost = tokred.flops(model, None, method) if method else tokred.flops(model)
        assert row["gmacs"] == pytest.approx(cost.total / 1e9)
        assert row["images_per_s"] > 0
    whole, merged, same, random = results["rows"]
    assert whole["speedup"] == whole["agreement"] == same["agreement"] == 1
    assert merged["tokens"][0] == 145
    assert merged["tokens"][-1] < 145
    assert random["agreement"] < 1
    assert (results["images"], results["classes"], results["unreadable"]) == (24, 10, [])
    spent = results["time"]
    assert spent["model"] > spent["outside"] >= 0
    code, out, err = run(capsys, *argv, "--out", str(tmp_path))  # all is recorded: nothing is measured again
    assert code == 0, err
    assert json.loads((tmp_path / "results.json").read_text())["time"]["model"] == 0
    assert max(map(len, out.splitlines())) <= 140
    for word in ("top-1 %", "top-5 %", "agreement %", "GMACs", "img/s", "tome r=13", "24 images of scenes"):
        assert word in out


def test_folder_and_skipping(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    """Unreadable images stop a run that names them; or they are left out, named, and the others are the same."""
    import shutil

    broken = tmp_path / "images"
    shutil.copytree(folder, broken)
    argv = ["--data", str(broken), *TINY, "--method", "topk keep_rate=0.5", "--batch", "4"]
    whole = evaluated(capsys, *argv, "--out", str(tmp_path / "whole"))
    assert whole["images"] == 10
    assert whole["classes"] == 1000
    assert [row["row"] for row in whole["rows"]] == ["unpatched", "topk keep_rate=0.5"]
    assert whole["rows"][0]["paper_top1"] is None  # random weights
    lost = next(path for path in sorted(broken.rglob("*.jpg")) if path.name == "4.jpg")
    lost.write_bytes(lost.read_bytes()[:100])
    line = refused(capsys, *argv, "--out", str(tmp_path / "parts"))
    assert "n01440764/4.jpg cannot be read as a picture" in line
    assert "--skip-unreadable" in line
    results = evaluated(capsys, *argv, "--skip-unreadable", "--out", str(tmp_path / "parts"))
    assert results["images"] == 9
    assert [entry.partition(":")[0] for entry in results["unreadable"]] == ["n01440764/4.jpg"]
    code, out, _ = run(capsys, *argv, "--skip-unreadable", "--out", str(tmp_path / "parts"))
    assert code == 0
    assert "unreadable and left out: n01440764/4.jpg" in out
    argv[argv.index("--batch") + 1] = "5"
    assert "differs in batch (there 4, now 5)" in refused(capsys, *argv, "--out", str(tmp_path / "whole"))


def test_what_was_left_out_once_is_looked_at_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    """Leaving it out is asked for by each command; mended, it is among the others."""
    import shutil

    broken, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(folder, broken)
    argv = ["--data", str(broken), *TINY, "--method", "topk keep_rate=0.5", "--batch", "4"]
    whole = evaluated(capsys, *argv, "--out", str(tmp_path / "whole"))
    lost = broken / "n01440764" / "4.jpg"
    data = lost.read_bytes()
    lost.write_bytes(data[:100])
    first = evaluated(capsys, *argv, "--skip-unreadable", "--out", str(out))
    assert first["images"] == 9
    written = lines(out)
    assert "4.jpg cannot be read as a picture" in refused(capsys, *argv, "--out", str(out))
    again = evaluated(capsys, *argv, "--skip-unreadable", "--out", str(out))
    assert numbers(again) == numbers(first)
    assert again["time"]["model"] == 0  # the readable ones of its batch are not run again
    assert lines(out) == written + 2
    lost.write_bytes(data)
    mended = evaluated(capsys, *argv, "--out", str(out))
    assert (mended["images"], mended["unreadable"]) == (10, [])
    assert numbers(mended) == numbers(whole)
    lost.write_bytes(data[:100])  # a row more cannot see what the others saw: none counts it
    more = evaluated(capsys, *argv, "--method", "tome r=1", "--skip-unreadable", "--out", str(out))
    assert (more["images"], len(more["rows"])) == (9, 3)
    assert numbers(more)[:2] == numbers(first)


def test_other_versions_do_not_go_on_with_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what makes the model, or decodes and transforms pictures."""
    import importlib.metadata

    real = importlib.metadata.version
    argv = ["--data", str(folder), *TINY, "--count", "2", "--out", str(tmp_path)]
    evaluated(capsys, *argv)
    for package in ("timm", "torchvision", "pillow"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, p=package: "0" if name == p else real(name))
        assert "differs in versions (there " in refused(capsys, *argv)


@pytest.mark.parametrize(("name", "package"), [("digit-clip", "open_clip_torch"), ("hf:a/b", "transformers")])
def test_packages_of_a_model(name: str, package: str) -> None:
    from tokred.eval.imagenet import _packages

    assert _packages(name) == (package, "torchvision", "pillow")


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")
@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="the scenes need scikit-image")
def test_zero_shot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--model", "digit-clip", "--count", "48", "--method", "topk keep_rate=0.9", "--out", str(tmp_path)]
    plain, reduced = evaluated(capsys, *argv)["rows"]
    assert plain["top1"] > 0.4  # chance is 0.1
    assert reduced["gmacs"] < plain["gmacs"]
    assert reduced["agreement"] > 0.5


def test_a_folder_of_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = {0: "goldfish", 1: "tench", 2: "grille"}
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    root = tmp_path / "named"
    for name, source in (("tench", "n01440764"), ("grille", "n03450230")):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(folder / source)
    argv = [
        "--model",
        f"hf:{tmp_path / 'model'}",
        "--workers",
        "0",
        "--method",
        "tome r=2",
        "--out",
        str(tmp_path / "out"),
    ]
    results = evaluated(capsys, "--data", str(root), *argv)
    assert (results["images"], results["classes"]) == (10, 3)
    assert results["rows"][1]["tokens"] == [17, 15, 13]
    model = transformers.ViTModel(config)
    model.save_pretrained(tmp_path / "bare")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "bare")
    code, _, err = run(capsys, "--data", str(root), "--model", f"hf:{tmp_path / 'bare'}")
    assert code == 2
    assert "it is no classifier" in err


def test_what_papers_say() -> None:
    from tokred.eval.imagenet_reported import REPORTED, paper_runs, reported

    small = "deit_small_patch16_224"
    assert reported(small, "fb_in1k", None).top1 == 79.8
    assert reported(small, None, tokred.ToMe(r=8)).top1 == 79.4
    found = reported(small, "fb_in1k", tokred.ZeroTPrune(preset="deit_s_2.50g"))
    assert (found.top1, found.gmacs) == (79.1, 2.50)
    assert reported(small, "fb_in1k", tokred.ToMe(r=9)) is None
    assert reported(small, "other", None) is None
    assert reported(None, None, None) is None
    assert reported("strip_mlp_small", "in1k", None).top5 == 96.6
    assert ("tome", {"r": 13}) in paper_runs("vit_base_patch16_224", "augreg_in21k_ft_in1k")
    import timm

    importlib.import_module("tokred.vision")  # registers the backbones
    assert all(timm.is_model(row.architecture) and row.source for row in REPORTED)


def test_paper_rows_and_columns() -> None:
    """A row that a paper reports shows it, beside what was measured."""
    from tokred.eval.imagenet import show

    row = {
        "row": "tome r=8", "tokens": [197, 189, 181], "gmacs": 3.43, "gmacs_fraction": 0.745, "paper_gmacs": 3.4,
        "top1": 0.79, "top1_se": 0.01, "paper_top1": 79.4, "top5": 0.95, "top5_se": 0.01, "paper_top5": None,
        "agreement": 0.98, "agreement_se": 0.01, "images_per_s": 100.0, "speedup": 1.3, "paper_source": "a plot",
    }  # fmt: skip
    results = {
        "model": "deit", "weights": "pretrained", "images": 100, "data": {"data": "val"}, "rows": [row, row],
        "machine": {"device": "cpu", "dtype": "float32", "batch": 32, "processes": 2, "torch": "2"},
        "time": {"loader": 1.0, "model": 3.0, "outside_share": 0.01}, "unreadable": [],
    }  # fmt: skip
    out = show(results)
    assert "79.4" in out
    assert "paper: a plot." in out
    assert out.count("paper") == 3  # of GMACs and top-1; no column for top-5, which none reports
    assert "2 processes" in out


# -- kills and processes -----------------------------------------------------------------------------------------------


METHODS = ["--method", "tome r=1", "--method", "random_tokens keep_rate=0.5"]


def test_a_killed_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    argv = ["--data", str(folder), *TINY, "--batch", "1", *METHODS]
    whole = evaluated(capsys, *argv, "--out", str(tmp_path / "whole"))
    parts = tmp_path / "parts"
    command = ["eval", "imagenet", *argv, "--out", str(parts)]
    assert 7 <= kill_midway(command, parts, "tokred.eval.imagenet:_one", 7) < 30
    file = next((parts / "records").glob("tome*"))
    file.write_bytes(file.read_bytes() + b'{"key":9,"la')  # a kill in the middle of a line
    again = evaluated(capsys, *argv, "--out", str(parts))
    assert lines(parts) == 30
    assert numbers(again) == numbers(whole)
    more = evaluated(capsys, *argv, "--method", "tome r=0", "--out", str(parts))  # a row is added to what there is
    assert numbers(more)[:3] == numbers(whole)
    assert len(more["rows"]) == 4


def test_two_processes_find_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("accelerate")
    argv = ["--data", str(folder), *TINY, "--batch", "3", *METHODS]
    alone = evaluated(capsys, *argv, "--out", str(tmp_path / "one"))
    together = two_processes(["eval", "imagenet", *argv, "--device", "cpu", "--out", str(tmp_path / "two")], tmp_path)
    _same(together, alone, tmp_path / "two")
    again = evaluated(capsys, *argv, "--out", str(tmp_path / "two"))  # one process reads what two wrote
    assert numbers(again) == numbers(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_documented_launchers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, launcher: list[str]
) -> None:
    """`accelerate launch` and torchrun as docs/evaluation_imagenet.md has them, with --device cpu."""
    pytest.importorskip("accelerate")
    argv = ["--data", str(folder), *TINY, "--batch", "3", *METHODS, "--device", "cpu"]
    alone = evaluated(capsys, *argv, "--out", str(tmp_path / "one"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *launcher, "-m", "tokred.cli", "eval", "imagenet", *argv, "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("{"), done.stdout[:500]
    _same(json.loads(done.stdout), alone, tmp_path / "two")  # printed once
    page = (ROOT / "docs" / "evaluation_imagenet.md").read_text()
    name = {"accelerate.commands.launch": "accelerate launch", "torch.distributed.run": "torchrun"}[launcher[0]]
    assert " ".join([name, *launcher[1:], "-m tokred.cli eval imagenet"]) in page


def _same(together: dict[str, Any], alone: dict[str, Any], out: Path) -> None:
    assert together["machine"]["processes"] == 2
    assert numbers(together) == numbers(alone)
    ranks = {path.name.split(".")[-2] for path in (out / "records").iterdir() if path.stat().st_size}
    assert ranks == {"0", "1"}


# -- how it refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "tomee r=8"], "did you mean 'tome'"),
        (["--method", "tome rr=8"], "no parameter 'rr', did you mean 'r'"),
        (["--method", "tome r"], "expected METHOD KEY=VALUE"),
        (["--method", "tome exit=away"], "exit='away'"),
        (["--methods", "tome"], "unrecognized arguments: --methods tome"),
        (["--batch", "many"], "--batch: invalid int value: 'many'"),
        (["--method", "tome r=-1"], "r=-1"),
        (["--method", "tome r=8", "--data", "nowhere"], "no data at 'nowhere'; expected a folder"),
        (["--labels", "nowhere.txt"], "no --labels at nowhere.txt"),
        (["--count", "0"], "--count 0"),
        (["--batch", "0"], "--batch 0"),
        (["--workers", "-1"], "--workers -1"),
        (["--dtype", "float8"], "--dtype float8"),
        (["--device", "gpu"], "--device gpu"),
        (["--model", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["--model", "vit_tiny_patch16_224"], "hub cannot be reached"),
        (["--model", "hf:nobody/nothing"], "hub cannot be reached"),
        (["--model", "openclip:ViT-B-33/laion2b"], "open_clip has no model 'ViT-B-33', did you mean 'ViT-B-32'"),
        (["--model", "openclip:ViT-B-32/laion2b_s34b_b79"], "did you mean 'laion2b_s34b_b79k'"),
        (["--model", "openclip:ViT-B-32/laion2b_s34b_b79k"], "hub cannot be reached"),
        (["--model", "openclip:ViT-B-32/openai", "--templates", "all"], "--templates all"),
        (["--templates", "simple"], "--templates is for openclip models"),
        (["--model", "foo:bar"], "no model 'foo:bar'"),
        (["--image-column", "image"], "--image-column image is of a data set"),
        (["--data", "hf:nobody/nothing"], "hub cannot be reached"),
        (["--model", "digit-vit", "--random-weights"], "is bundled with its weights"),
        (["--model", "hf:x", "--image-size", "32"], "--image-size is for timm models"),
        ([*TINY, "--data", "scenes"], "the scenes have 10 classes"),
        (["--split", "train"], "scenes have test and val"),
        (["--method", "hired budget=0.2"], "acts at VisualFeatures"),
        (["--method", "topk layers=(30,)"], "30"),
        (["--paper"], "no paper that we know of"),
        (["--model", "digit-strip-mlp", "--method", "tome r=2"], "no host serves"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], says: str) -> None:
    if any(one.startswith("openclip:") for one in argv):
        pytest.importorskip("open_clip")
    if any(one.startswith("hf:") for one in argv):
        pytest.importorskip("transformers")
    assert says in refused(capsys, *argv, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()  # refused before anything was written


def test_another_number_of_classes(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    line = refused(capsys, "--data", str(folder))
    assert "has 2 classes (n01440764, n03450230) and the model 10" in line
    assert "--class-map" in line


def test_a_broken_label_in_a_worker_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [1, 12]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "set" / "validation.parquet")
    argv = ["--data", f"hf:{tmp_path / 'set'}", "--workers", "1", "--out", str(tmp_path / "out")]
    line = refused(capsys, *argv)
    assert "row 1 of shard 0 is of class 12, and the model has 0 to 9" in line
    assert "worker" not in line


@pytest.mark.slow
def test_overhead_benchmark() -> None:
    """It runs on all evaluations, and its parts add up, by either way of measuring."""
    for package in ("transformers", "sklearn", "skimage"):
        pytest.importorskip(package)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "eval_overhead.py"), "--dry-run", "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["target"] == 0.03
    assert [one["task"] for one in result["tasks"]] == ["imagenet", "vqa", "needle"]
    for one in result["tasks"]:
        assert one["rows"][0] == "unpatched"
        assert len(one["rows"]) == 2
        for way in ("timers", "profiler"):
            part = one[way]
            assert min(part["loader"], part["model"], part["outside"]) > 0
            total = part["outside"] + part["loader"] + part["model"]
            assert part["outside_share"] == pytest.approx(part["outside"] / total)
        assert one["profiler"]["total"] == pytest.approx(total)
        assert one["profiler"]["model"] == pytest.approx(one["timers"]["model"], rel=0.5)
        assert one["met"] == (max(one[way]["outside_share"] for way in ("timers", "profiler")) < 0.03)
