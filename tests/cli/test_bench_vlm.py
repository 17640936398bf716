"""`tokred bench --task vqa` and `--task video` on random weights: what they write, print and refuse.

Methods inside the language model are in `test_bench_llm`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokred
from tests.cli.test_cli import refused, run
from tokred.core.errors import InvalidParameterError
from tokred.eval import bench_video, bench_vqa, vlm
from tokred.eval.bench import TASKS

for package in ("transformers", "torchvision", "sklearn", "skimage", "matplotlib"):
    pytest.importorskip(package)

BEFORE = "hired,visionzip,divprune,cdpruner,vispruner"
COLUMNS = {
    "kind", "label", "level", "method", "visual_tokens", "accuracy", "accuracy_se", "kinds", "gmacs", "gmacs_parts",
    "ttft_ms", "speedup", "speedup_quartiles", "decode_tokens_per_s", "cache_bytes",
}  # fmt: skip
#: bytes of one token in the cache: 6 layers, keys and values, 160 float32
CACHED = 6 * 2 * 160 * 4


@pytest.fixture(scope="module")
def weights(vlm_folder: Path) -> Path:
    return vlm_folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    from tokred.zoo.digit_clip import build_digit_clip

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("scorer")
    save_file(build_digit_clip().state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vqa(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a small run: 27 questions, so that there are two batches."""
    out = tmp_path_factory.mktemp("vqa")
    results = _results("vqa", weights, out, "--scenes", "27", "--levels", "0.25,0.11", "--methods", BEFORE)
    assert json.loads((out / "results.json").read_text()) == results
    return results


@pytest.fixture(scope="module")
def video(weights: Path, scorer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("video")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module("tokred.zoo.digit_clip"), "FOLDER", scorer)
        return _results("video", weights, out, "--scenes", "10", "--set", "quota.power=4")


def _results(task: str, weights: Path, out: Path, *further: str) -> dict[str, Any]:
    """Run the command; its JSON."""
    import contextlib
    import io

    from tokred import cli

    argv = ["bench", "--task", task, "--fast", "--split", "val", "--checkpoint", str(weights), "--out", str(out)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main([*argv, *further, "--json"]) == 0
    results: dict[str, Any] = json.loads(said.getvalue())  # stdout is JSON and nothing else
    return results


def _check_row(row: dict[str, Any]) -> None:
    assert set(row) >= COLUMNS
    assert 0 <= row["accuracy"] <= 1
    assert sum(kind["questions"] for kind in row["kinds"].values()) in (27, 10)
    assert row["gmacs"] == pytest.approx(sum(row["gmacs_parts"].values()))
    assert row["ttft_ms"] > 0
    assert row["decode_tokens_per_s"] > 0
    if row["method"] is not None:
        assert tokred.from_dict(row["method"]).to_dict() == row["method"]


# -- vqa ---------------------------------------------------------------------------------------------------------------


def test_vqa_rows(vqa: dict[str, Any]) -> None:
    methods = ["HiRED", "VisionZip", "DivPrune", "CDPruner", "VisPruner"]
    assert [row["label"] for row in vqa["rows"]] == ["unreduced", *["Random", *methods] * 2]
    assert vqa["scenes"] == {"count": 27, "split": "val", "seed": 777}
    assert len(vqa["weights"]["sha256"]) == 64
    text = vqa["rows"][0]["cache_bytes"] / CACHED - 144
    for row in vqa["rows"]:
        _check_row(row)
        tokens = row["level"] or 144
        assert row["visual_tokens"] == tokens  # what was read, not what was asked for
        assert row["read_tokens"] == row["entered_tokens"] == tokens
        assert not row["inside"]
        assert row["cache_bytes"] == (text + tokens) * CACHED
        assert set(row["kinds"]) == set(bench_vqa.COLUMNS)
        assert ("vs_random" in row) == (row["kind"] == "method")
        assert row["limit"] >= 1
    assert [row["level"] for row in vqa["rows"][1::6]] == [36, 16]
    for part in ("vision", "llm"):
        assert vqa["rows"][0]["gmacs_parts"][part] == pytest.approx({"vision": 0.1559, "llm": 0.332}[part], rel=0.01)


def test_vqa_pictures(vqa: dict[str, Any]) -> None:
    assert set(vqa["files"]) == {"results", "kept", "plot"}
    with Image.open(vqa["files"]["kept"]) as sheet:
        assert sheet.width > 7 * 180
        assert sheet.height > 5 * 180


def test_vqa_table(vqa: dict[str, Any]) -> None:
    lines = bench_vqa.show(vqa).splitlines()
    assert max(map(len, lines)) <= 150
    assert lines[0].startswith("digit-vlm: 27 val questions (seed 777)")
    for word in ("tokens", "mean", "accuracy %", "vs random", *bench_vqa.COLUMNS.values(), "GMACs", "limit", "kB"):
        assert word in lines[2]
    assert sum(line.startswith("Random") for line in lines) == 2
    assert "settings" not in lines[-1]


def test_vqa_command(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    argv = ["--scenes", "3", "--methods", "hired", "--set", "hired.alpha=0.3", "--threads", "1", "--out", str(tmp_path)]
    code, out, err = run(capsys, "bench", "--task", "vqa", "--fast", "--checkpoint", str(weights), *argv)
    assert code == 0, err
    assert "settings: HiRED: alpha=0.3" in out
    assert "DivPrune" not in out
    assert str(tmp_path / "kept.png") in out


# -- video -------------------------------------------------------------------------------------------------------------


def test_video_rows(video: dict[str, Any]) -> None:
    labels = ["all 16 frames", "even frames", "Random", "EVS", "QuoTA, equal", "QuoTA, CLIP"]
    assert [row["label"] for row in video["rows"]] == labels
    assert [row["frames"] for row in video["rows"]] == [16, 2, 16, 16, 16, 16]
    whole, even, *reduced = video["rows"]
    for row in video["rows"]:
        _check_row(row)
        assert set(row["kinds"]) == set(bench_video.COLUMNS)
        assert row["cache_bytes"] % CACHED == 0
        assert ("vs_uniform" in row) == (row in reduced)
    assert (whole["visual_tokens"], even["visual_tokens"]) == (576, 72)
    assert [row["visual_tokens"] for row in reduced[:3]] == [72, 72, 64]  # 16 frames of 2 x 2 tokens
    assert reduced[3]["visual_tokens"] <= 72
    assert whole["gmacs_parts"]["vision"] == pytest.approx(8 * even["gmacs_parts"]["vision"])
    assert even["gmacs_parts"]["vision"] == pytest.approx(0.302, rel=0.02)
    assert [row["gmacs_parts"]["scoring"] > 1 for row in reduced] == [False, False, False, True]
    assert reduced[3]["frame_scores"] == "clip"
    assert reduced[3]["method"]["power"] == 4
    assert video["weights"]["scorer"]["sha256"] != video["weights"]["sha256"]


@pytest.fixture(scope="module")
def every(weights: Path, scorer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that the task knows, EVS and QuoTA apart."""
    names = [name for name, _ in bench_video.INSIDE.values()]
    argv = ["--scenes", "2", "--methods", ",".join([BEFORE, *dict.fromkeys(names)])]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module("tokred.zoo.digit_clip"), "FOLDER", scorer)
        return _results("video", weights, tmp_path_factory.mktemp("every"), *argv)


def test_video_rows_of_methods_for_images_and_inside(every: dict[str, Any]) -> None:
    before = ["HiRED", "VisionZip", "DivPrune", "CDPruner", "VisPruner"]
    labels = [row["label"] for row in every["rows"]]
    assert labels == ["all 16 frames", "even frames", "Random", *before, "Random inside", *bench_video.INSIDE]
    whole, _, random, *reduced = every["rows"]
    for row in reduced:
        assert row["visual_tokens"] == 72
        assert row["frames"] == 16
        assert "vs_uniform" in row
        assert row["gmacs"] == pytest.approx(sum(row["gmacs_parts"].values()))
        assert row["inside"] == (row["label"] not in before)
        llm = row["gmacs_parts"]["llm"]
        assert random["gmacs_parts"]["llm"] <= llm < whole["gmacs_parts"]["llm"]
        assert (llm == random["gmacs_parts"]["llm"]) == (not row["inside"])
    by_label = {row["label"]: row for row in reduced}
    assert by_label["DART"]["gmacs_parts"]["llm"] == by_label["Random inside"]["gmacs_parts"]["llm"]
    assert by_label["FastV"]["method"]["layer"] == 3
    with Image.open(every["files"]["frames"]) as sheet:
        assert sheet.height > 6 * 2 * 168


def test_further_methods_stand_at_the_middle_budget(weights: Path, scorer: Path) -> None:
    from tokred.eval.bench import BenchOptions

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module("tokred.zoo.digit_clip"), "FOLDER", scorer)
        setup, _ = bench_video._load(weights)
    options = BenchOptions(out=Path("x"), levels=[144, 72, 36], methods=["evs"])
    one = bench_video._prepared(setup, options, [0], bench_video._frame_counts(options))
    rows = bench_video._rows(options, setup, one, ["hired", "fastv", "evs"])
    found = [(row.label, row.tokens) for row in rows if row.kind == "method"]
    assert found == [("EVS", 144), ("EVS", 72), ("HiRED", 72), ("FastV", 72), ("EVS", 36)]


def test_video_pictures(video: dict[str, Any]) -> None:
    assert set(video["files"]) == {"results", "frames", "plot"}
    with Image.open(video["files"]["frames"]) as sheet:
        assert sheet.width > 8 * 168
        assert sheet.height > 4 * 2 * 168


def test_video_table(video: dict[str, Any]) -> None:
    lines = bench_video.show(video).splitlines()
    assert max(map(len, lines)) <= 140
    for word in ("frames", "tokens", "vs even frames", "LLM G", "vision G", "scorer G", "TTFT ms", "cache kB"):
        assert word in lines[2]
    assert lines[-1] == "settings: QuoTA: power=4"


def test_a_remembered_tower_runs_once() -> None:
    calls: list[int] = []

    class Tower(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            calls.append(len(pixel_values))
            return pixel_values * 2

    tower, frames = Tower(), torch.arange(6.0).view(2, 3)
    memory: dict[Any, Any] = {}
    with vlm.remembered(tower, memory):
        assert torch.equal(tower(frames), frames * 2)
        assert torch.equal(tower(frames.clone()), frames * 2)
        assert torch.equal(tower(frames[:1]), frames[:1] * 2)
    with vlm.remembered(tower, memory):
        tower(frames)
        assert torch.equal(tower(frames + 1), frames * 2 + 2)
    assert calls == [2, 1, 2]
    assert "forward" not in vars(tower)


def test_scores_by_kind() -> None:
    found = vlm.scores(torch.tensor([True, True, False, True]), ["a", "b", "a", "b"], None)
    assert (found["accuracy"], found["accuracy_se"]) == (0.75, 0.25)
    assert found["kinds"]["a"] == {"accuracy": 0.5, "accuracy_se": 0.5, "questions": 2}
    assert found["kinds"]["b"]["accuracy"] == 1


# -- refusals and help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "argv", "says"),
    [
        ("vqa", ["--ablate", "hired"], "--ablate: the task vqa"),
        ("vqa", ["--levels", "36"], "shares of the visual tokens"),
        ("vqa", ["--methods", "hierd"], "did you mean 'hired'"),
        ("vqa", ["--methods", "evs"], "there are: hired"),
        ("vqa", ["--methods", "tome"], "there are: hired"),
        ("vqa", ["--set", "evs.budget=3"], "the methods here are"),
        ("vqa", ["--set", "hired.budget=3"], "is set by the benchmark"),
        ("vqa", ["--set", "hired.alpha=3"], "alpha"),
        ("vqa", ["--set", "hired.nonsense=3"], "no parameter 'nonsense'"),
        ("vqa", ["--set", "hired.final_layer=9"], "layer 9"),
        ("vqa", ["--checkpoint", "missing"], "no weights of such a model in missing"),
        ("video", ["--ablate", "hired"], "--ablate: the task video"),
        ("video", ["--levels", "100"], "whole frames of 36"),
        ("video", ["--levels", "576"], "below 576"),
        ("video", ["--methods", "evz"], "did you mean 'evs'"),
        ("video", ["--methods", "mustdrop"], "there are: hired"),
        ("video", ["--methods", "fastv", "--set", "fastv.budget=3"], "is set by the benchmark"),
        ("video", ["--methods", "fastv", "--set", "fastv.layer=9"], "9"),
        ("video", ["--set", "quota.scorer=3"], "is set by the benchmark"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    argv: list[str],
    says: str,
    weights: Path,
    scorer: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(importlib.import_module("tokred.zoo.digit_clip"), "FOLDER", scorer)
    given = [] if "--checkpoint" in argv else ["--checkpoint", str(weights)]
    line = refused(capsys, "bench", "--task", task, "--fast", *given, *argv, "--out", str(tmp_path / "out"))
    assert says in line
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], weights: Path, scorer: Path, tmp_path: Path
) -> None:
    argv = ["bench", "--task", "vqa", "--fast", "--checkpoint"]
    assert "config.json is missing" in refused(capsys, *argv, str(scorer))
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in refused(capsys, *argv, str(tmp_path))


def test_unknown_split_and_share() -> None:
    from tokred.eval.bench import BenchOptions

    with pytest.raises(InvalidParameterError, match="test or val"):
        BenchOptions(out=Path("x"), split="train").check_split()
    with pytest.raises(InvalidParameterError, match="--levels 2"):
        BenchOptions(out=Path("x"), levels=[2]).shares("tokens")


def test_help_tells_the_defaults_of_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "bench", "--help")[1].split())
    for name, task in TASKS.items():
        assert f"{name}: {task.methods}" in text
        assert f"{name}: {task.level} (default: {','.join(f'{level:g}' for level in task.levels)})" in text
        assert f"{name}: {task.scenes}" in text
