"""The benchmark scripts run, on sizes that say nothing about speed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import NAMES

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_vit_benchmark_reports_every_promised_number():
    pytest.importorskip("timm")
    result = json.loads(run("vit.py", "--json", "--device", "cpu"))
    assert [row["target"] for row in result["rows"]] == [0.95, None, 0.97, None, 0.90, None]
    for row in result["rows"]:
        assert row["limit"] > 1
        assert row["speedup"] > 0
        assert row["share"] == pytest.approx(row["speedup"] / row["limit"])
        assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
    assert result["vit_large"]["patch_ms"] > 0
    assert result["vit_large"]["replace_ms"] > 0
    assert result["import_s"] > 0


def test_ops_benchmark_runs_every_group():
    lines = [json.loads(line) for line in run("ops.py", "--json", "--device", "cpu").splitlines()]
    assert len({line["case"] for line in lines}) >= 6


@pytest.mark.parametrize("options", [(), ("--size", "7b", "--dtype", "bfloat16")], ids=["small", "7b"])
def test_vlm_benchmark_reports_every_promised_number(options):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    result = json.loads(run("vlm.py", "--json", *options))
    names = ["llava", "llava_next"] if options else ["llava_next"]
    rows = result["rows"]
    assert [(row["model"], row["budget"]) for row in rows] == [(name, b) for name in names for b in (1.0, 0.4, 0.2)]
    assert result["tiny"]
    for row in rows:
        plain = next(other for other in rows if other["model"] == row["model"])
        assert row["prompt"][1] == plain["prompt"][0]
        assert row["seconds"] > row["layers_s"] > 0
        assert row["share"] == pytest.approx(row["speedup"] / row["limit"])
        if row["budget"] == 1:
            assert row["speedup"] == row["limit"] == 1
            continue
        assert row["prompt"][0] < row["prompt"][1]
        assert row["cache_mib"] < plain["cache_mib"]
        assert row["limit"] > 1
        assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
        assert row["added_share_95"][0] <= row["added_share"] <= row["added_share_95"][1]
        assert isinstance(row["added_met"], bool)
        assert (row["met"] is None) == bool(options)


def test_vlm_benchmark_prints_a_table():
    pytest.importorskip("transformers")
    table = run("vlm.py")
    assert "a dry run on tiny sizes" in table
    assert "targets: share 95% of the limit" in table


def test_llm_benchmark_reports_every_promised_number(monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    result = json.loads(run("llm.py", "--json"))
    rows = result["rows"]
    found = {}
    for row in rows:
        assert row["seconds"] > 0
        assert row["cache_mib"] > 0
        found.setdefault((row["section"], row["prompt"], row["measure"]), []).append(row)
    measures = {(section, measure) for section, _, measure in found}
    assert measures == {
        *((section, "first token") for section in ("gemfilter", "corematching", "mustdrop", "overhead")),
        *((section, "next tokens") for section in ("gemfilter", "corematching", "overhead")),
        ("mustdrop", "answer"),
    }
    for (section, _, _), (plain, *others) in found.items():
        assert plain["method"] == "unreduced"
        assert len(others) >= 2
        for row in others:
            assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
            if section == "overhead":
                assert "added_ms" in row
                continue
            assert row["share"] == pytest.approx(row["speedup"] / row["limit"])
            if section != "corematching":
                assert row["limit"] > 1
                assert row["cache_mib"] < plain["cache_mib"]

    gem = [row for row in rows if row["section"] == "gemfilter" and row["method"].startswith("GemFilter")]
    assert sorted({row["prompt"] for row in gem}) == [48, 96]
    assert all("paper says 2.4x" in row["notes"][0] for row in gem)
    if sys.platform == "linux":
        assert all(row["peak_mib"] > 0 for row in gem)
    core = next(row for row in rows if row["target"] == 0.9)
    assert core["measure"] == "next tokens"
    assert core["limit"] == pytest.approx(1.5, abs=0.2)
    assert isinstance(core["met"], bool)
    must = next(row for row in rows if row["method"] == "MustDrop")
    assert must["notes"][0].startswith("tower 36 -> 20 tokens; of 96 in the language model 80 from layer 0, ")

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("llm").as_text(result)
    for name in ("llm", "vlm", "vit"):
        sys.modules.pop(name, None)
    assert "a dry run on tiny sizes" in table
    assert "target: 90% of the limit for the next tokens" in table
    assert all(row["method"] in table for row in rows)


def test_backbone_benchmark_reports_every_promised_number():
    pytest.importorskip("timm")
    result = json.loads(run("backbones.py", "--json", "--device", "cpu"))
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["strip_mlp_tiny", "lookup_vit_tiny 2x2", "dualtoken_vit_tiny", "resnet50", "mobilevit_s"]
    assert result["matmul_gmacs_per_s"] > 0
    for row in rows.values():
        assert row["images_per_s_95"][0] <= row["images_per_s"] <= row["images_per_s_95"][1]
        assert row["ratio_95"][0] <= row["ratio"] <= row["ratio_95"][1]
        assert row["gmacs_per_s"] == pytest.approx(row["images_per_s"] * row["gmacs"])
        assert row["of_matmul"] > 0
        shares = [found["share"] for found in row["costliest"]]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) < 1
    assert rows["resnet50"]["ratio"] == 1
    lookup = 16 * 768 * 48 + 48 * 1000  # patches and head; M' = 5 compressed tokens with the class token
    lookup += (3 * 16 * 5 + 2 * 25) * 48 + (4 * 16 + 15 * 5) * 48**2  # first block
    lookup += (2 * 16 * 5 + 2 * 25) * 48 + (2 * 16 + 14 * 5) * 48**2  # last block, without infusion
    assert rows["lookup_vit_tiny 2x2"]["gmacs"] * 1e9 == pytest.approx(lookup)


def test_backbone_benchmark_prints_tables_of_chosen_models():
    pytest.importorskip("timm")
    table = run("backbones.py", "--device", "cpu", "--channels-last", "--models", "dualtoken_vit_tiny")
    assert "a dry run on tiny sizes" in table
    assert "float32, channels last, 2 rounds" in table
    assert table.count("dualtoken_vit_tiny ") == table.count("resnet50 ") == 2
    assert "depthwise convolution 3x3" in table


def test_median_interval():
    spec = importlib.util.spec_from_file_location("benchmark_vit", ROOT / "benchmarks" / "vit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    # 12 values: the 3rd and the 10th order statistics hold the median with 96.1 %
    values = [float(v) for v in (5, 1, 12, 3, 2, 11, 4, 10, 6, 9, 7, 8)]
    assert module.median_interval(values) == (6.5, 3.0, 10.0)
    assert module.median_interval([1.0, 2.0]) == (1.5, 1.0, 2.0)


@pytest.mark.browser
@pytest.mark.slow
def test_demo_benchmark_clicks_every_tab(tmp_path):
    for package in ("gradio", "timm", "transformers", "open_clip", "diffusers", "sklearn", "av", "playwright"):
        pytest.importorskip(package)
    if not any(map(shutil.which, NAMES)):
        pytest.skip(f"needs one of {', '.join(NAMES)} on the PATH")
    result = json.loads(run("demo.py", "--json", "--pictures", str(tmp_path)))
    assert result["start"] > 0
    assert result["paint"]["desktop"] > 0
    tabs = {"classify", "ask, picture", "ask, video", "long text", "tokenize", "compare classifiers", "compare answers"}
    assert {name for name in result["clicks"] if ":" not in name} == tabs
    assert {"tokenize: VQ", "compare answers: all methods"} < set(result["clicks"])
    assert all(len(times["desktop"]) == 1 and times["desktop"][0] > 0 for times in result["clicks"].values())
    assert len(list(tmp_path.glob("desktop-*.png"))) == len(tabs)
