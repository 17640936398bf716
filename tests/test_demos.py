"""The short scripts in demos/ run and say what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokred

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "demos" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_quickstart(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    out = tmp_path / "kept.png"
    said = run("quickstart.py", "--out", str(out))
    assert "144 -> 87 (block 3) -> 53 (block 6) -> 32 (block 9)" in said
    assert "undone bit for bit: True" in said
    assert Image.open(out).size == (384, 384)


@pytest.mark.parametrize("options", [(), ("--random", "--budget", "0.5")], ids=["bundled", "random"])
def test_serve_reduced(tmp_path, options):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    from safetensors.torch import load_file

    said = run("serve_reduced.py", "--out", str(tmp_path), *options)
    kept = 72 if options else 36
    assert "144 visual tokens" in said
    assert f"{kept}: " in said
    assert "equals the patched generate: True" in said
    assert ("random weights" in said) == bool(options)
    tensors = load_file(tmp_path / "embeds.safetensors")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, kept, 160)}
    assert Image.open(tmp_path / "kept.png").size == (384, 384)
    names = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.embeddings") for name in names)
    if importlib.util.find_spec("vllm") is None:
        assert "enable_mm_embeds=True" in said
        assert f"(1, {kept}, 160)" in said


# -- scripts for models of a hub, run on tiny random ones --------------------------------------------------------------

SCRIPTS = {
    "llava": ("transformers", "torchvision"),
    "qwen2_5_vl": ("transformers", "torchvision"),
    "clip": ("open_clip",),
    "deit": ("timm",),
    "llama": ("transformers",),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> folder of a tiny checkpoint of that kind, saved once."""
    from tests import demo_models

    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def of(name: str) -> str:
        if name not in made:
            getattr(demo_models, f"save_{name}")(folder / name)
            made[name] = str(folder / name)
        return made[name]

    return of


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are patched from here on."""
    models: list[Any] = []
    original = tokred.patch

    def spy(model: Any, *args: Any, **options: Any) -> Any:
        models.append(model)
        return original(model, *args, **options)

    monkeypatch.setattr(tokred, "patch", spy)
    return models


def script(name: str) -> Any:
    for package in (*SCRIPTS[name], "skimage"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"demo_{name}", ROOT / "demos" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(capsys: pytest.CaptureFixture[str], patched: list[Any], name: str, *options: str) -> str:
    """What a script prints; the model is as it was when it ends."""
    module = script(name)
    capsys.readouterr()
    module.main(list(options))
    assert patched
    for model in patched:
        for part in model.modules():
            assert "_tokred" not in part.__dict__
            assert type(part).__module__.partition(".")[0] != "tokred"
            for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
                assert "tokred" not in getattr(hook, "__module__", type(hook).__module__)
    return capsys.readouterr().out


def counted(text: str) -> list[tuple[int, float, str]]:
    """(tokens, GMACs, answer) of the lines of both calls."""
    lines = re.findall(r"^  (\d+) (?:visual )?tokens, ([\d.,]+) GMACs, [\d.]+ s: '(.*)'$", text, re.MULTILINE)
    return [(int(tokens), float(cost), answer) for tokens, cost, answer in lines]


@pytest.mark.parametrize(
    ("name", "model", "options", "tokens"),
    [
        ("llava", "llava", (), (64, 12)),
        ("llava", "llava", ("--method", "divprune", "--budget", "0.5", "--dtype", "float32"), (64, 32)),
        ("llava", "llava_next", (), None),
        ("qwen2_5_vl", "qwen", (), (54, 10)),
        ("qwen2_5_vl", "qwen", ("--video", "--frames", "8"), (256, 64)),  # EVS keeps the first frames whole
    ],
)
def test_a_picture_or_video_is_asked_about(
    capsys: pytest.CaptureFixture[str],
    patched: list[Any],
    tiny: Any,
    tmp_path: Path,
    name: str,
    model: str,
    options: tuple[str, ...],
    tokens: tuple[int, int] | None,
) -> None:
    for package in SCRIPTS[name]:
        pytest.importorskip(package)
    out = tmp_path / "kept.png"
    text = said(capsys, patched, name, "--model", tiny(model), "--tokens", "3", "--out", str(out), *options)
    (before, cost, first), (after, less, second) = counted(text)
    assert after < before
    assert less < cost
    assert (before, after) == (tokens or (before, after))
    assert len(first.split()) == len(second.split()) == 3
    assert "the first answer again: True" in text
    assert ("pair of frames" in text) == ("--video" in options)
    with Image.open(out) as picture:
        assert picture.width >= 32


def test_a_video_file_is_asked_about(
    capsys: pytest.CaptureFixture[str], patched: list[Any], tiny: Any, tmp_path: Path
) -> None:
    av = pytest.importorskip("av")
    pytest.importorskip("torchvision")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for shade in range(0, 200, 20):
            stream_frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (shade, 80, 80)))
            file.mux(stream.encode(stream_frame))
        file.mux(stream.encode())
    options = ["--video", str(path), "--frames", "4", "--tokens", "2", "--method", "divprune"]
    text = said(capsys, patched, "qwen2_5_vl", "--model", tiny("qwen"), *options, "--out", str(tmp_path / "kept.png"))
    (before, _, _), (after, _, _) = counted(text)
    assert (before, after) == (2 * 64, 26)


def test_a_long_text_is_asked_about(capsys: pytest.CaptureFixture[str], patched: list[Any], tiny: Any) -> None:
    pytest.importorskip("transformers")
    options = ["--words", "600", "--k", "64", "--layer", "1", "--tokens", "3"]
    text = said(capsys, patched, "llama", "--model", tiny("llama"), *options)
    (before, cost, first), (after, less, second) = counted(text)
    assert before > 500
    assert after == 64
    assert less < cost / 2
    assert len(first.split()) == len(second.split()) == 3
    assert "what it read: " in text
    assert "the first answer again: True" in text


@pytest.mark.parametrize(
    ("name", "model", "options", "methods"),
    [
        ("clip", "open_clip", ("--r", "5", "--keep-rate", "0.6"), ["ToMe(r=5)", "TopK(keep_rate=0.6)"]),
        ("deit", "timm", (), ["ToMe(r=13)", "TopK()", "ZeroTPrune(flops=0.65)"]),
    ],
)
def test_a_picture_is_named(
    capsys: pytest.CaptureFixture[str],
    patched: list[Any],
    tiny: Any,
    tmp_path: Path,
    name: str,
    model: str,
    options: tuple[str, ...],
    methods: list[str],
) -> None:
    pytest.importorskip(SCRIPTS[name][0])
    text = said(capsys, patched, name, "--model", tiny(model), "--out", str(tmp_path / "kept.png"), *options)
    found = re.findall(r"^  (\S.*?): (.+) \(([\d.]+)%\); ([\d.]+) GMACs, \d+ ms$", text, re.MULTILINE)
    assert [row[0] for row in found] == ["as it is", *methods]
    costs = [float(row[3]) for row in found]
    assert max(costs[1:]) < costs[0]
    assert all(0 < float(row[2]) <= 100 for row in found)
    assert "bit for bit: True" in text
    assert list(tmp_path.glob("kept*.png"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_in_one_line_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    main = script(name).main
    with pytest.raises(SystemExit) as stop:
        main(
            ["--model", {"clip": "hf-hub:nobody/nothing", "deit": "hf-hub:nobody/nothing"}.get(name, "nobody/nothing")]
        )
    assert "hub cannot be reached" in str(stop.value)
    assert "give --model a folder" in str(stop.value)
    missing = "--text" if name == "llama" else "--image"
    with pytest.raises(SystemExit, match=r"none\.file"):
        main([missing, "none.file"])
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "python demos/" in capsys.readouterr().out


def test_a_script_says_that_nothing_was_dropped(tiny: Any, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "kept.png"), "--tokens", "1"]
    with pytest.raises(SystemExit, match="keeps every token"):
        script("llava").main(["--model", tiny("llava"), "--budget", "1.0", *out])
    with pytest.raises(SystemExit, match="keeps every token"):
        script("qwen2_5_vl").main(["--model", tiny("qwen"), "--method", "evs", *out])
    with pytest.raises(SystemExit, match="smaller --k"):
        script("llama").main(["--model", tiny("llama"), "--words", "60", "--k", "500", "--layer", "1", "--tokens", "1"])
