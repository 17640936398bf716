"""Each command of `tokred`, its JSON, its pictures, and how it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokred
from tokred import cli

pytest.importorskip("timm")

BENCH = ["bench", "--fast", "--scenes", "30", "--split", "val"]
COLUMNS = {
    "kind", "label", "level", "method", "setting", "accuracy", "accuracy_se", "tokens", "gmacs", "gmacs_fraction",
    "images_per_s", "speedup", "speedup_quartiles", "limit", "share_of_limit",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line in which a command was refused."""
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    line = err.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: " in line
    assert "Traceback" not in err
    return line


# -- help and version --------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("list", "bench", "inspect"):
        assert command in out
        code, text, _ = run(capsys, command, "--help")
        assert code == 0
        assert "--json" in text
    for option in ("--task", "--methods", "--levels", "--scenes", "--seed", "--threads", "--ablate", "--fast", "--out"):
        assert option in run(capsys, "bench", "--help")[1]
    for option in ("--model", "--method", "--set", "--pretrained", "--checkpoint", "--size", "--out", "IMAGE"):
        assert option in run(capsys, "inspect", "--help")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"tokred {tokred.__version__}\n")


def test_importing_the_command_is_light() -> None:
    heavy = "{'timm', 'matplotlib', 'sklearn', 'skimage', 'transformers', 'tqdm', 'torch', 'PIL'}"
    code = f"import sys; from tokred import cli; cli.parser(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- list --------------------------------------------------------------------------------------------------------------


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list", "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    methods = {m["name"]: m for m in listed["methods"]}
    assert {"tome", "topk", "zero_tprune", "random_tokens"} <= set(methods)
    assert methods["tome"]["cls"] == "ToMe"
    assert methods["tome"]["parameters"]["r"] == 8
    assert {"paper", "sites"} <= set(methods["tome"])
    family = next(h for h in listed["hosts"] if h["family"] == "timm")
    assert {"classes", "sites", "refusals"} <= set(family)
    assert listed["compatibility"]["tome"]["timm"] is True


def test_list_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    assert code == 0
    for record in tokred.methods():
        assert record.name in out
        assert record.cls in out
    for host in tokred.hosts():
        assert host.family in out
    assert "refused" in out


# -- bench -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the bundled architecture: these tests hold with any weights."""
    from safetensors.torch import save_file

    from tokred.zoo.digit_vit import build_digit_vit

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(build_digit_vit().state_dict(), path)
    return path


@pytest.fixture
def bench(checkpoint: Path) -> list[str]:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    return [*BENCH, "--checkpoint", str(checkpoint)]


def test_bench_json(capsys: pytest.CaptureFixture[str], bench: list[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, *bench, "--json", "--out", str(tmp_path))
    assert code == 0, err
    results = json.loads(out)  # stdout is JSON and nothing else
    assert "accuracy" in err  # the progress bars
    assert results["scenes"] == {"count": 30, "split": "val", "seed": 777}
    rows: list[dict[str, Any]] = results["rows"]
    assert rows[0]["kind"] == "unpatched"
    assert rows[0]["speedup"] == rows[0]["limit"] == 1
    assert [row["kind"] for row in rows[1:]] == ["method", "random"] * 3
    for row in rows:
        assert set(row) >= COLUMNS
        assert 0 <= row["accuracy"] <= 1
        assert len(row["tokens"]) == 12
        assert row["images_per_s"] > 0
    for method, twin in zip(rows[1::2], rows[2::2], strict=True):
        assert set(method["vs_random"]) == {"difference", "se", "significant"}
        assert method["vs_random"]["difference"] == pytest.approx(method["accuracy"] - twin["accuracy"])
        assert method["tokens"] == twin["tokens"]
        assert tokred.from_dict(method["method"]).to_dict() == method["method"]
        assert method["share_of_limit"] == pytest.approx(method["speedup"] / method["limit"])
    macs = [row["gmacs"] for row in rows[1::2]]
    assert max(macs) / min(macs) < 1.02
    assert set(results["files"]) == {"results", "kept", "plot"}
    for path in results["files"].values():
        assert Path(path).parent == tmp_path
    assert json.loads(Path(results["files"]["results"]).read_text()) == results
    for name in ("kept", "plot"):
        with Image.open(results["files"][name]) as picture:
            assert picture.width > 1000


def test_bench_table(capsys: pytest.CaptureFixture[str], bench: list[str], tmp_path: Path) -> None:
    argv = [*bench, "--methods", "zero-tprune,topk", "--levels", "0.7", "--set", "zero_tprune.vhf=None"]
    code, out, err = run(capsys, *argv, "--threads", "1", "--out", str(tmp_path))
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 140
    assert sum("random twin" in line for line in lines) == 2
    assert not any(line.startswith("ToMe") for line in lines)
    for word in ("setting", "tokens", "GMACs", "accuracy", "vs random", "img/s", "speed-up", "limit", "share"):
        assert word in out
    assert str(tmp_path / "kept.png") in out
    assert "vhf=None" in out


def test_bench_ablation(capsys: pytest.CaptureFixture[str], bench: list[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, *bench, "--ablate", "zero_tprune", "--out", str(tmp_path))
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 140
    for part, paper in (("random drop", 76.8), ("WPR", 78.6), ("+ EIR", 78.8), ("+ VHF", 78.9), ("+ S-stage", 79.4)):
        assert any(line.startswith(part) and str(paper) in line for line in out.splitlines())
    results = json.loads((tmp_path / "results-zero_tprune.json").read_text())
    assert [row["kind"] for row in results["rows"]] == ["unpatched", "random", *["part"] * 4]
    assert all("vs_row_above" in row for row in results["rows"][2:])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--task", "vitt"], "did you mean 'vit'"),
        (["--methods", "tomee"], "did you mean 'tome'"),
        (["--levels", "1.5"], "--levels 1.5"),
        (["--levels", "0.05"], "out of reach"),
        (["--levels", "half"], "no list of numbers"),
        (["--scenes", "1"], "--scenes 1"),
        (["--ablate", "tome"], "only zero_tprune"),
        (["--ablate", "zero_tprune", "--set", "zero_tprune.vhf=None"], "takes one parameter"),
        (["--set", "tome"], "no key=value"),
        (["--set", "r=3"], "zero_tprune.vhf=None"),
        (["--set", "tome.r=3"], "found from the level"),
        (["--set", "topk.nonsense=3"], "no parameter 'nonsense'"),
        (["--set", "fastv.layer=3"], "the methods here are"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_bench_refuses(capsys: pytest.CaptureFixture[str], argv: list[str], says: str, bench: list[str]) -> None:
    assert says in refused(capsys, *bench, *argv)


def test_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    assert 'pip install "tokred[demo]"' in refused(capsys, "bench")
    assert 'pip install "tokred[demo]"' in refused(capsys, "inspect", "--method", "tome", "demo")


# -- inspect -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.effect_noise((120, 90), 60).convert("RGB").save(path)
    return str(path)


def test_inspect_bundled(capsys: pytest.CaptureFixture[str], picture: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "kept.png"
    argv = ["inspect", "--method", "TopK", "--set", "keep_rate=0.5", "--set", "layers=3,6", "--size", "96"]
    code, text, err = run(capsys, *argv, "--checkpoint", str(checkpoint), "--out", str(out), "--json", picture)
    assert code == 0, err
    found = json.loads(text)
    assert found["method"]["layers"] == [3, 6]
    assert [(s["layer"], s["tokens_in"], s["tokens_out"]) for s in found["steps"]] == [(3, 144, 72), (6, 72, 36)]
    assert len(found["steps"][1]["kept"]) == 36
    assert found["gmacs"] < found["gmacs_unpatched"]
    with Image.open(out) as sheet:
        assert (sheet.width, sheet.height) == (found["picture"]["width"], found["picture"]["height"])
        gap, text_height = 10, 20 + 26
        assert (sheet.width, sheet.height) == (3 * (96 + gap) + gap, 96 + text_height + 2 * gap)


def test_inspect_timm_with_many_steps(capsys: pytest.CaptureFixture[str], picture: str, tmp_path: Path) -> None:
    out = tmp_path / "tome.png"
    argv = ["inspect", "--model", "vit_tiny_patch16_224", "--image-size", "64", "--method", "tome", "--set", "r=1"]
    code, text, err = run(capsys, *argv, "--size", "64", "--out", str(out), picture)
    assert code == 0, err
    assert "random weights" in err
    assert "block 11:" in text
    assert "GMACs" in text
    assert str(out) in text
    with Image.open(out) as sheet:  # input and 12 steps: two rows of seven columns
        assert (sheet.width, sheet.height) == (7 * 74 + 10, 10 + 26 + 2 * (64 + 20 + 10))


def test_inspect_the_demo_scene(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    argv = ["inspect", "--method", "zero-tprune", "--set", "flops=0.6", "--checkpoint", str(checkpoint), "demo"]
    code, text, err = run(capsys, *argv, "--out", str(tmp_path / "demo.png"))
    assert code == 0, err
    assert "144 patches" in text


def test_inspect_keeping_everything(
    capsys: pytest.CaptureFixture[str], picture: str, checkpoint: Path, tmp_path: Path
) -> None:
    argv = ["inspect", "--method", "tome", "--set", "r=0", "--checkpoint", str(checkpoint)]
    code, text, err = run(capsys, *argv, "--out", str(tmp_path / "all.png"), picture)
    assert code == 0, err
    assert "keep every token" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "tomee"], "did you mean 'tome'"),
        (["--method", "tome", "--set", "rr=3"], "no parameter 'rr'"),
        (["--method", "tome", "--set", "r=-3"], "r=-3"),
        (["--method", "tome", "--set", "r"], "no key=value"),
        (["--method", "tome", "--model", "vit_tiny_patch16_242"], "did you mean 'vit_tiny_patch16_224'"),
        (["--method", "tome", "--model", "resnet18"], "ResNet"),
        (["--method", "tome", "--model", "hf:/no/such/folder"], "cannot load"),
        (["--method", "tome", "--checkpoint", "missing.pth"], "missing.pth"),
        (["--method", "tome", "--pretrained"], "bundled"),
        (["--method", "tome", "--size", "5"], "--size 5"),
        (["--method", "topk", "--set", "layers=99,"], "block 99"),
        (["--method", "tome", "--out", "kept.nonsense"], "unknown file extension"),
    ],
)
def test_inspect_refuses(
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    says: str,
    picture: str,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = [] if {"--model", "--checkpoint", "--pretrained"} & set(argv) else ["--checkpoint", str(checkpoint)]
    line = refused(capsys, "inspect", *argv, *weights, picture)
    assert says in line
    assert not list(tmp_path.glob("kept*"))


def test_inspect_refuses_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "cannot be read" in refused(capsys, "inspect", "--method", "tome", str(text))
    assert "no picture at" in refused(capsys, "inspect", "--method", "tome", str(tmp_path / "missing.png"))


def test_checkpoint_of_another_model(capsys: pytest.CaptureFixture[str], picture: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    line = refused(capsys, "inspect", "--method", "tome", "--checkpoint", str(path), picture)
    assert "does not fit VisionTransformer" in line


def test_debug_shows_the_traceback(picture: str) -> None:
    with pytest.raises(tokred.TokredError):
        cli.main(["inspect", "--debug", "--method", "tomee", picture])
