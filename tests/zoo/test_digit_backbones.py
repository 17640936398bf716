"""The bundled backbones: what is stored, what it scores, and how a run becomes part of the package."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("timm")

from tokred import zoo
from tokred.core.errors import InvalidParameterError
from tokred.data.scenes import DigitScenes, normalize
from tokred.vision.backbones.compare import macs
from tokred.zoo.digit_backbones import BACKBONES, FOLDER, bundle, bundled_runs
from tokred.zoo.packed import load_weights


@pytest.mark.parametrize("name", list(BACKBONES))
def test_weights_are_those_of_the_card(name):
    card, path = zoo.card(name), FOLDER / BACKBONES[name] / "model.int8.safetensors"
    assert card["name"] == name
    assert card["weights"]["bytes"] == path.stat().st_size < 6e6
    assert card["weights"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {v.dtype for v in load_file(path).values()} <= {torch.int8, torch.float32, torch.float16, torch.int64}
    model = zoo.load(name)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == card["weights"]["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", list(BACKBONES))
@torch.inference_mode()
def test_they_name_the_digit(name):
    """On validation scenes, within what 128 scenes and int8 weights allow of the card; at every grid of a LookupViT."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    model, card = zoo.load(name), zoo.card(name)
    scenes = DigitScenes("val", 5).render(128)
    for row in card["accuracy"]:
        if row["setting"]:
            height, width = row["setting"].removeprefix("grid ").split("x")
            model.set_compressed_grid((int(height), int(width)))
        assert macs(model) / 1e9 == pytest.approx(row["gmacs"])
        right = (model(normalize(scenes.images)).argmax(1) == scenes.labels).float().mean().item()
        assert right > row["accuracy"] - 0.1


def test_unknown_names():
    with pytest.raises(ValueError, match="no bundled model is called 'digit-mlp'"):
        zoo.load("digit-mlp")
    with pytest.raises(InvalidParameterError, match="digit-strip-mlp"):
        zoo.digit_backbone("strip_mlp")


def test_a_run_becomes_a_part_of_the_package(tmp_path):
    """What is bundled again from the bundled folder is what was there."""
    run = bundled_runs()[1]
    record = json.loads((run / "config.json").read_text())
    row = {"folder": str(run), "model": record["run"]["model"], "setting": "grid 3x3", "gmacs": 1.0, "accuracy": 0.5}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"groups": [[{**row, "se": 0.1, "speedup": None}]], "scenes": {"count": 2}}))
    bundle([run], results, tmp_path / "zoo")
    made = tmp_path / "zoo" / run.name
    first, second = (load_weights(folder / "model.safetensors") for folder in (run, made))
    assert list(first) == list(second)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-6, atol=0)
    assert json.loads((made / "card.json").read_text())["accuracy"][0]["accuracy"] == 0.5
    results.write_text(json.dumps({"groups": [], "scenes": {}}))
    with pytest.raises(InvalidParameterError, match="no row of"):
        bundle([run], results, tmp_path / "zoo")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"run": {"model": "resnet18"}}))
    with pytest.raises(InvalidParameterError, match="resnet18 is none of"):
        bundle([other], results, tmp_path / "zoo")
