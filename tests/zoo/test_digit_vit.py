"""The bundled digit-scene ViT: loads offline, strictly, and scores what its card says."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tokred import zoo
from tokred.zoo.digit_vit import ARCHITECTURE, WEIGHTS_DIR
from tokred.zoo.tokenizers import TOKENIZERS

timm = pytest.importorskip("timm")
WEIGHTS = WEIGHTS_DIR / "digit_vit.safetensors"


@pytest.mark.usefixtures("no_sockets")
def test_loads_without_a_network() -> None:
    model = zoo.load("digit-vit")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.blocks) == ARCHITECTURE["depth"] == 12
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 10)


def test_normalisation_reaches_timm() -> None:
    config = timm.data.resolve_data_config(model=zoo.load("digit-vit"))
    assert config["mean"] == zoo.DIGIT_VIT_DATA_CONFIG["mean"] == (0.5, 0.5, 0.5)
    assert config["std"] == (0.25, 0.25, 0.25)
    assert config["input_size"] == (3, 96, 96)


def test_file_is_small_and_the_cards() -> None:
    stored = zoo.card("digit-vit")["weights"]
    assert WEIGHTS.stat().st_size == stored["bytes"] <= 6e6
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == stored["sha256"]


def test_card_keeps_its_promises() -> None:
    card = zoo.card("digit-vit")
    accuracy, curve = card["accuracy"], card["curve"]["accuracy_by_keep_rate"]
    assert [row["seed"] for row in accuracy["seeds"]] == [0, 1, 2]
    for row in accuracy["seeds"]:
        assert abs(row["val"] - row["val_float32"]) <= 0.002
        assert row["test"] >= 0.9
    random, cls = list(curve["random"].values()), curve["cls_attention"]
    assert random == sorted(random, reverse=True)
    assert cls["0.2"] - curve["random"]["0.2"] >= 0.15
    assert cls["0.3"] >= cls["1.0"] - 0.02


def test_scores_what_the_card_says() -> None:
    """200 test scenes: standard error about .017, so three of them either side."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from tokred.data import DigitScenes
    from tokred.zoo.train_digit_vit import accuracy

    stored = zoo.card("digit-vit")["accuracy"]
    scenes = DigitScenes("test", stored["test_seed"])
    assert abs(accuracy(zoo.load("digit-vit"), scenes, 200) - stored["seeds"][0]["test"]) < 0.05


def test_unknown_name() -> None:
    backbones = {"digit-dualtoken-vit", "digit-lookup-vit", "digit-strip-mlp"}
    others = {"digit-clip", "digit-video-vlm", "digit-vit", "digit-vlm", "needle-llm"}
    assert zoo.names() == sorted(backbones | others | TOKENIZERS.keys())
    for ask in (zoo.load, zoo.card):
        with pytest.raises(ValueError, match="digit-vit"):
            ask("resnet")


def test_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ImportError, match=r"pip install \"tokred\[timm\]\""):
        zoo.load("digit-vit")


def test_training_command_runs(tmp_path: Path) -> None:
    """Every phase, the saved files, and the card, on a few tiny batches."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pytest.importorskip("tqdm")
    from tokred.zoo.train_digit_vit import main

    threads, bundled = torch.get_num_threads(), WEIGHTS.read_bytes()
    try:
        main(["--smoke", "--seed", "0", "--out", str(tmp_path)])
        main(["--smoke", "--evaluate", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    card = json.loads((tmp_path / "digit_vit.json").read_text())
    assert card["training"]["recipe"]["phases"][0]["kind"] == "window"
    assert card["accuracy"]["seeds"][0]["seed"] == 0
    assert WEIGHTS.read_bytes() == bundled, "without --bundle the package stays as it is"
