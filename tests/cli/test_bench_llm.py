"""`tokred bench` of methods inside a language model, with random weights: their rows in `vqa`, and `needle`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokred
from tests.cli.conftest import saved
from tests.cli.test_cli import refused, run
from tokred.core.errors import InvalidParameterError
from tokred.core.trace import LayerStep, PromptStep, Trace
from tokred.eval import bench_needle, bench_vqa, inside
from tokred.eval.bench import TASKS, BenchOptions

for package in ("transformers", "torchvision", "sklearn", "skimage", "matplotlib"):
    pytest.importorskip(package)

INSIDE = "fastv,pyramiddrop,dart,sparsevlm,mustdrop,corematching,gemfilter"
#: bytes of one token in a layer's cache of the VLM: keys and values, 160 float32
LAYER_CACHED = 2 * 160 * 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokred.zoo.needle_llm import build_needle_llm, build_needle_tokenizer

    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("llm"), build_needle_llm(), build_needle_tokenizer())


def _results(task: str, weights: Path, out: Path, *further: str) -> dict[str, Any]:
    """Run the command; its JSON, which is also what it wrote."""
    from tokred import cli

    argv = ["bench", "--task", task, "--fast", "--split", "val", "--checkpoint", str(weights), "--out", str(out)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main([*argv, *further, "--json"]) == 0
    results: dict[str, Any] = json.loads(said.getvalue())
    assert json.loads((out / "results.json").read_text()) == results
    return results


# -- vqa ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqa(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _results("vqa", vlm_folder, tmp_path_factory.mktemp("vqa"), "--scenes", "26", "--methods", INSIDE)


def test_rows_inside(vqa: dict[str, Any]) -> None:
    labels = [row["label"] for row in vqa["rows"]]
    assert labels == ["unreduced", "Random", "Random inside", *inside.SETTINGS]
    for row in vqa["rows"][2:]:
        assert row["inside"]
        assert row["gmacs"] == pytest.approx(sum(row["gmacs_parts"].values()))
        assert row["decode_gmacs"] > 0
        assert row["cache_bytes"] % LAYER_CACHED == 0
        assert ("vs_inside" in row) == (row["kind"] == "method")
        assert "vs_random" in row
        if not row["label"].startswith("MustDrop"):
            assert (row["entered_tokens"], row["visual_tokens"]) == (144, 36)


def test_what_layers_read(vqa: dict[str, Any]) -> None:
    rows = {row["label"]: row for row in vqa["rows"]}
    two_whole = (2 * 144 + 4 * 36) / 6
    for label in ("Random inside", "DART"):
        assert rows[label]["read_tokens"] == two_whole
        assert rows[label]["gmacs_parts"]["llm"] == rows["DART"]["gmacs_parts"]["llm"]
    assert rows["FastV"]["read_tokens"] == (3 * 144 + 3 * 36) / 6
    assert rows["PyramidDrop"]["read_tokens"] == (3 * 144 + 72 + 2 * 36) / 6
    layer = rows["GemFilter"]["method"]["layer"]
    assert rows["GemFilter"]["read_tokens"] == layer * 144 / 6 + 36  # its first pass is no gift
    assert rows["GemFilter"]["cache_bytes"] == rows["Random"]["cache_bytes"] < rows["FastV"]["cache_bytes"]
    assert rows["MustDrop"]["read_tokens"] <= rows["MustDrop"]["entered_tokens"] < 144
    assert rows["MustDrop, unmerged"]["entered_tokens"] == 144
    sparse = rows["CoreMatching, MLP"]
    assert sparse["decode_gmacs"] < rows["CoreMatching"]["decode_gmacs"]


def test_table_and_pictures_inside(vqa: dict[str, Any]) -> None:
    lines = bench_vqa.show(vqa).splitlines()
    assert max(map(len, lines)) <= 150
    for word in ("mean", "vs random", "vs inside"):
        assert word in lines[2]
    text = " ".join(lines)
    assert "PyramidDrop: stages=(2, 3, 4)" in text
    assert "global_threshold=" in text  # fitted, so it is told
    assert "keep_tokens" not in text  # the budget is a column
    assert set(vqa["files"]) == {"results", "kept", "plot", "kept_llm", "plot_llm"}
    with Image.open(vqa["files"]["kept_llm"]) as sheet:
        assert sheet.width > 11 * 180


def test_a_threshold_that_is_given_is_not_fitted(vlm_folder: Path, tmp_path: Path) -> None:
    argv = ["--scenes", "2", "--methods", "mustdrop", "--set", "mustdrop.global_threshold=0.5"]
    found = _results("vqa", vlm_folder, tmp_path, *argv)["rows"][-1]["method"]
    assert (found["global_threshold"], found["individual_threshold"]) == (0.5, None)


def test_fit_threshold() -> None:
    assert inside.fit_threshold(lambda threshold: 100 * (1 - threshold), 90, steps=20) == 0.1
    assert inside.fit_threshold(lambda threshold: 0, 90) < 2e-5  # too few in any case: the least
    assert inside.fit_threshold(lambda threshold: 200, 90) > 0.5


def test_tokens_read() -> None:
    visual = torch.tensor([[False, True, True, True, False], [False, False, True, True, True]])
    assert inside.tokens_read(None, visual, 2).mean == [3, 3]
    at_one = LayerStep(1, "a", (5, 5), ((0, 2, 4), (0, 1, 2, 3)))
    behind = LayerStep(2, "a", (3, 4), ((0, 4), (0, 1, 2)))
    found = inside.tokens_read(Trace(None, language=[at_one, behind]), visual, 2)
    assert found == ([3, 3], [0, 1], [2.0, 2.5])
    first = PromptStep("b", 1, (5, 5), ((1, 4), (2, 3)), None, 5)
    assert inside.tokens_read(Trace(None, language=[first]), visual, 2) == ([3, 3], [1, 2], [2.5, 3.5])


# -- needle ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needle(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a small run: 18 prompts, so that there are two batches."""
    argv = ["--scenes", "18", "--levels", "16,40", "--context", "240"]
    return _results("needle", llm, tmp_path_factory.mktemp("needle"), *argv)


def test_needle_rows(needle: dict[str, Any]) -> None:
    rows = needle["rows"]
    assert [row["kind"] for row in rows] == ["unpatched", *["random", "method"] * 2, *["layer"] * 5]
    assert [row["tokens"] for row in rows] == [244, 16, 16, 40, 40, *[40] * 5]
    assert [row["layer"] for row in rows] == [None, None, 1, None, 1, 0, 2, 3, 4, 5]
    assert needle["scenes"] == {
        "count": 18, "split": "val", "seed": 777, "tokens": 240, "prompt_tokens": 244, "needles": 16
    }  # fmt: skip
    for row in rows:
        assert 0 <= row["recall"] <= row["found"] <= 1 or row["recall"] <= 0.2  # weights are random, guesses are rare
        assert row["cache_bytes"] == row["tokens"] * 6 * 2 * 64 * 4
        assert row["limit"] >= 0.9
        assert row["ttft_ms"] > 0
        assert ("vs_random" in row) == (row["kind"] in ("method", "layer"))
    assert rows[0]["found"] == 1
    by_layer = sorted((row["layer"], row["gmacs"]) for row in rows[4:])
    assert by_layer == sorted(by_layer, key=lambda pair: pair[1])  # each layer of the first pass costs


@pytest.fixture(scope="module")
def needle_inside(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = ",".join(bench_needle.INSIDE)
    argv = ["--scenes", "18", "--levels", "30", "--context", "240", "--methods", names]
    return _results("needle", llm, tmp_path_factory.mktemp("inside"), *argv)


def test_needle_rows_inside(needle_inside: dict[str, Any]) -> None:
    rows = needle_inside["rows"]
    labels = ["FastV", "PyramidDrop", "DART", "SparseVLM", "CoreMatching"]
    assert [row["label"] for row in rows] == ["unreduced", "Random", "Random inside", *labels, "Random inside, later"]
    assert [row["tokens"] for row in rows] == [244, *[30] * 8]
    assert [row["layer"] for row in rows] == [None, None, *[1] * 6, 2]
    by_label = {row["label"]: row for row in rows}
    for row in rows[2:]:
        assert row["inside"]
        assert row["recall"] <= row["found"] or row["recall"] <= 0.2
        assert ("vs_inside" in row) == ("vs_random" in row) == (row["kind"] == "method")
        assert rows[1]["gmacs"] < row["gmacs"] < rows[0]["gmacs"]
        assert row["limit"] == pytest.approx(rows[0]["gmacs"] / row["gmacs"])
    layer = 2 * 64 * 4  # bytes of a token in a layer's cache: the first layer's holds all, unless the method empties it
    assert by_label["FastV"]["cache_bytes"] == by_label["Random inside"]["cache_bytes"] == (244 + 5 * 30) * layer
    assert by_label["Random inside, later"]["cache_bytes"] == (2 * 244 + 4 * 30) * layer
    assert by_label["Random inside"]["gmacs"] < by_label["PyramidDrop"]["gmacs"]


def test_needle_inside_keeps_the_question_and_drops_the_context(needle_inside: dict[str, Any]) -> None:
    for kept in needle_inside["example"]["kept"]:
        assert len(kept["columns"]) == 30
        assert kept["columns"][0] == 0
        assert kept["columns"][-4:] == [240, 241, 242, 243]
        assert kept["words"].endswith(needle_inside["example"]["question"])
    lines = bench_needle.show(needle_inside).splitlines()
    assert max(map(len, lines)) <= 150
    assert "vs inside" in lines[2]
    assert "PyramidDrop: stages=(1, 2, 3)" in " ".join(lines)


def test_needle_knows_every_method_inside_that_fits_a_text_model() -> None:
    from tokred.core.catalog import compatibility
    from tokred.core.method import registered

    fits = {name for name, hosts in compatibility().items() if hosts["transformers text"]}
    ours = {name for name in fits if registered()[name].__module__.startswith("tokred.")}
    assert ours == {"gemfilter", *bench_needle.INSIDE}


def test_further_methods_stand_at_the_middle_budget() -> None:
    from tokred.zoo.needle_llm import build_needle_llm

    options = BenchOptions(out=Path("x"), levels=[64.0, 32.0, 16.0])
    rows = bench_needle._rows(options, build_needle_llm(), 130, ["dart", "gemfilter"])
    found = [(row.label, row.tokens) for row in rows if row.kind == "method"]
    assert found == [("GemFilter", 64), ("GemFilter", 32), ("DART", 32), ("GemFilter", 16)]
    assert len({row.key for row in rows}) == len(rows)


def test_needle_files(needle: dict[str, Any]) -> None:
    assert set(needle["files"]) == {"results", "plot", "words"}
    page = Path(needle["files"]["words"]).read_text()
    kept = needle["example"]["kept"]
    assert [one["tokens"] for one in kept] == [16, 40]
    assert all(len(one["columns"]) == one["tokens"] for one in kept)
    assert page.count('class="read') == 16 + 40
    assert page.count("needle") >= 2 * 6
    start, stop = needle["example"]["needle"]
    name = needle["example"]["question"].split()[2]
    assert needle["example"]["words"][start : stop - 1] == ["key", "of", name, "is", needle["example"]["answer"]]


def test_needle_table(needle: dict[str, Any]) -> None:
    text = bench_needle.show(needle)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 140
    assert lines[0].startswith("needle-llm: 18 val prompts (seed 777) of 244 tokens with 16 needles")
    for word in ("recall %", "layer", "of whole", "needle", "TTFT ms", "cache kB"):
        assert word in lines[2]
    assert "settings" not in text  # the layer is a column
    assert "one prompt: key of" in text


def test_needle_settings(capsys: pytest.CaptureFixture[str], llm: Path, tmp_path: Path) -> None:
    argv = ["--scenes", "3", "--set", "gemfilter.layer=2", "--set", "gemfilter.kernel_size=1", "--out", str(tmp_path)]
    code, out, err = run(capsys, "bench", "--task", "needle", "--fast", "--checkpoint", str(llm), *argv)
    assert code == 0, err
    assert "settings: GemFilter: kernel_size=1" in out
    assert str(tmp_path / "words.html") in out


def test_answers_do_not_depend_on_threads(tmp_path: Path) -> None:
    from tokred.data import NeedleContexts
    from tokred.eval.bench import Progress
    from tokred.zoo.needle_llm import build_needle_llm

    torch.manual_seed(0)
    model, contexts = build_needle_llm(), NeedleContexts("val", 1, 130, bench_needle.NEEDLES)
    batches = [contexts.batch(0, 4), contexts.batch(4, 4), contexts.batch(8, 3)]
    found = []
    for threads in (1, 2):
        options = BenchOptions(out=tmp_path, levels=[24.0], threads=threads)
        rows = bench_needle._rows(options, model, 130)[:4]
        found.append(bench_needle._answers(model, rows, batches, options, Progress(quiet=True)))
    for key, one in found[0].items():
        assert len(one.right) == 11
        assert all(map(torch.equal, one, found[1][key]))


def test_random_prompt_keeps_the_question() -> None:
    from transformers import LlamaForCausalLM

    from tokred.zoo.needle_llm import build_needle_llm

    model: LlamaForCausalLM = build_needle_llm()
    ids = torch.randint(8, 200, (2, 60))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    method = inside.RandomPrompt(k=12, keep_last=4, seed=3)
    with tokred.patch(model, method) as handle:
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        first, second = handle.trace.prompt[0].kept
    assert len(first) == len(second) == 12
    assert first[-4:] == second[-4:] == (56, 57, 58, 59)
    assert min(second) >= 20


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "argv", "says"),
    [
        ("vqa", ["--methods", "fastvv"], "did you mean 'fastv'"),
        ("vqa", ["--methods", "fastv", "--set", "fastv.layer=9"], "9"),
        ("vqa", ["--methods", "gemfilter", "--set", "gemfilter.k=9"], "--set gemfilter.k: is set by the benchmark"),
        ("vqa", ["--methods", "corematching", "--set", "corematching.keep_tokens=9"], "is set by the benchmark"),
        ("vqa", ["--methods", "mustdrop", "--set", "mustdrop.nonsense=1"], "no parameter 'nonsense'"),
        ("vqa", ["--context", "512"], "--context: the task vqa does not take it"),
        ("video", ["--context", "512"], "--context: the task video does not take it"),
        ("vit", ["--context", "512"], "--context: the task vit does not take it"),
        ("needle", ["--context", "100"], "--context 100: expected 128 to 2040"),
        ("needle", ["--context", "4096"], "--context 4096"),
        ("needle", ["--ablate", "gemfilter"], "--ablate: the task needle"),
        ("needle", ["--methods", "topk"], "there are: gemfilter, fastv, pyramiddrop"),
        ("needle", ["--methods", "mustdrop"], "there are: gemfilter"),
        ("needle", ["--methods", "fastv", "--levels", "5"], "--levels 5: methods inside keep 5 tokens in any case"),
        ("needle", ["--methods", "fastv", "--set", "fastv.budget=5"], "--set fastv.budget: is set by the benchmark"),
        ("needle", ["--methods", "fastv", "--set", "fastv.layer=9"], "9"),
        ("needle", ["--levels", "0.5"], "--levels 0.5: expected numbers of tokens"),
        ("needle", ["--levels", "600"], "--levels 600: expected numbers of tokens up to 512"),
        ("needle", ["--set", "gemfilter.k=3"], "--set gemfilter.k: is set by the benchmark"),
        ("needle", ["--set", "gemfilter.layer=6"], "layer=6"),
        ("needle", ["--set", "topk.keep_rate=0.2"], "the methods here are gemfilter"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str],
    task: str,
    argv: list[str],
    says: str,
    vlm_folder: Path,
    llm: Path,
    tmp_path: Path,
) -> None:
    weights = {"vqa": ["--checkpoint", str(vlm_folder)], "needle": ["--checkpoint", str(llm)]}.get(task, [])
    line = refused(capsys, "bench", "--task", task, "--fast", *weights, *argv, "--out", str(tmp_path / "out"))
    assert says in line
    assert not (tmp_path / "out").exists()


def test_help_names_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "bench", "--help")[1].split())
    assert f"tokens of a context (defaults: needle: {TASKS['needle'].context})" in text


def test_counts() -> None:
    assert BenchOptions(out=Path("x"), levels=[4.0, 8.0]).counts("tokens") == (4, 8)
    assert BenchOptions(out=Path("x")).counts("tokens") == ()
    with pytest.raises(InvalidParameterError, match=r"--levels 0: expected numbers of tokens"):
        BenchOptions(out=Path("x"), levels=[0.0]).counts("tokens")
