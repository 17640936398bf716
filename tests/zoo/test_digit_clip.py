"""The bundled digit CLIP: loads offline, and finds the frames that a question is about."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tokred import zoo
from tokred.zoo.digit_clip import FOLDER, WORDS, WordTokenizer

pytest.importorskip("open_clip")
WEIGHTS = FOLDER / "model.safetensors"


@pytest.mark.usefixtures("no_sockets")
def test_loads_without_a_network() -> None:
    from PIL import Image

    model, preprocess, tokenizer = zoo.load("digit-clip")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pixels = preprocess(Image.new("RGB", (96, 96), (255, 255, 255)))
    torch.testing.assert_close(pixels, torch.full((3, 96, 96), 2.0))
    with torch.inference_mode():
        assert model.encode_image(pixels[None]).shape == (1, 64)
        assert model.encode_text(tokenizer(["a blue 3", "red digit"])).shape == (2, 64)


def test_file_is_small_and_the_cards() -> None:
    stored = zoo.card("digit-clip")["weights"]
    assert WEIGHTS.stat().st_size == stored["bytes"] <= 2e6
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == stored["sha256"]


def test_tokenizer() -> None:
    tokenizer = WordTokenizer()
    spaced, joined = tokenizer(["which digit is red ?", "Which digit is RED?"])
    assert torch.equal(spaced, joined)
    assert WORDS[int(spaced.max())] == "<end>"
    assert tokenizer("a zebra").tolist()[0][2] == WORDS.index("<unk>")
    assert tokenizer(["a " * 30]).shape == (1, 12)


def test_finds_relevant_frames() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from tokred.data import DigitClips
    from tokred.zoo.evaluate_digit_clip import clip_aucs

    table = clip_aucs(FOLDER, DigitClips("test", 777), 8)
    assert table["all"]["auc"] >= 0.9
    for split in ("val", "test"):
        assert zoo.card("digit-clip")["frame_auc"][split]["all"]["auc"] >= 0.95


def test_roc_auc_is_its_definition() -> None:
    from tokred.zoo.evaluate_digit_clip import roc_auc

    scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert roc_auc(scores, torch.tensor([True, False, True, False])) == pytest.approx(3.5 / 4)


def test_starts_from_the_towers_sight() -> None:
    """The copied blocks compute what the VLM's tower computes."""
    from tokred.zoo.digit_clip import build_digit_clip
    from tokred.zoo.train_digit_clip import copy_tower

    tower = zoo.load("digit-vlm")[0].model.vision_tower
    model = build_digit_clip()
    copy_tower(model, tower)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = tower(images, output_hidden_states=True).hidden_states[4]
        ours = model.visual.forward_intermediates(images, indices=[3], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(ours["image_intermediates"][0], states[:, 1:], rtol=1e-3, atol=1e-2)


def test_missing_open_clip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(ImportError, match=r"pip install \"tokred\[openclip\]\""):
        zoo.load("digit-clip")


def test_training_command_runs(tmp_path: Path) -> None:
    for package in ("sklearn", "skimage", "tqdm"):
        pytest.importorskip(package)
    from tokred.zoo.train_digit_clip import main

    threads, bundled = torch.get_num_threads(), WEIGHTS.read_bytes()
    try:
        main(["--smoke", "--seed", "3", "--out", str(tmp_path)])
        main(["--smoke", "--evaluate", "--seed", "3", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    card = json.loads((tmp_path / "seed3" / "card.json").read_text())
    assert card["frame_auc"]["val"]["all"]["clips"] == 4
    assert WEIGHTS.read_bytes() == bundled, "without --bundle the package stays as it is"
