"""The bundled digit VLM: loads offline, answers through ``generate`` as an image and as a video model."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokred import zoo
from tokred.zoo.digit_vlm import FOLDER, FRAME_TOKENS, GRID

pytest.importorskip("transformers")
WEIGHTS = FOLDER / "model.safetensors"
KINDS = ("digit_of_colour", "colour_of_digit", "exists", "count", "side")


@pytest.fixture(scope="module")
def image_model() -> tuple[Any, Any]:
    return zoo.load("digit-vlm")


@pytest.mark.usefixtures("no_sockets")
def test_loads_without_a_network() -> None:
    for name, kind in (("digit-vlm", "Llava"), ("digit-video-vlm", "LlavaNextVideo")):
        model, processor = zoo.load(name)
        assert type(model).__name__ == f"{kind}ForConditionalGeneration"
        assert type(processor).__name__ == f"{kind}Processor"
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.config._attn_implementation == "sdpa"


def test_files_are_small_and_the_cards() -> None:
    stored = zoo.card("digit-vlm")["weights"]
    assert WEIGHTS.stat().st_size == stored["bytes"] <= 5.9e6
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == stored["sha256"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6e6


def test_both_forms_share_their_weights(image_model: tuple[Any, Any]) -> None:
    video, _ = zoo.load("digit-video-vlm")
    state = video.state_dict()
    assert float(state.pop("model.image_newline").abs().sum()) == 0
    for name, value in image_model[0].state_dict().items():
        assert torch.equal(state[name], value), name


def test_prompt_and_answer() -> None:
    assert zoo.question_prompt("which digit is red ?") == "<image> USER : which digit is red ? ASSISTANT :"
    assert zoo.question_prompt("is there a 7 ?", "video").startswith("<video> USER")
    assert zoo.answer_text("<s> <image> USER : is there a 7 ? ASSISTANT : yes </s> <pad>") == "yes"
    assert zoo.answer_text(" 7 </s>") == "7"
    with pytest.raises(ValueError, match="media"):
        zoo.question_prompt("?", "sound")


def test_answers_questions(image_model: tuple[Any, Any]) -> None:
    """100 test questions: standard error of the mean about .03, so three of them below the card."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from tokred.data import QuestionScenes
    from tokred.zoo.evaluate_digit_vlm import question_accuracy

    stored = zoo.card("digit-vlm")["accuracy"]["test"]
    table = question_accuracy(*image_model, QuestionScenes("test", stored["seed"]), 100, batch=50)
    assert set(table) == {*KINDS, "mean"}
    assert table["mean"]["accuracy"] >= stored["image"]["mean"]["accuracy"] - 0.09
    assert table["mean"]["accuracy"] >= 0.75


def test_one_image_by_hand(image_model: tuple[Any, Any]) -> None:
    pytest.importorskip("sklearn")
    from PIL import Image

    from tokred.data import QuestionScenes

    model, processor = image_model
    batch = QuestionScenes("test", 777, kinds=("colour_of_digit",)).batch(0, 6)
    right = 0
    for i in range(6):
        picture = Image.fromarray(batch.images[i].permute(1, 2, 0).numpy())
        prompt = zoo.question_prompt(batch.questions[i])
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == GRID**2
        assert int(inputs["input_ids"][0, 0]) == processor.tokenizer.bos_token_id
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        right += zoo.answer_text(processor.decode(output[0])) == batch.answers[i]
    assert right >= 5


def test_answers_about_clips() -> None:
    pytest.importorskip("sklearn")
    from tokred.data import DigitClips
    from tokred.zoo.evaluate_digit_vlm import video_accuracy

    model, processor = zoo.load("digit-video-vlm")
    row = video_accuracy(model, processor, DigitClips("test", 777), 24, frames=8)
    assert row["tokens"] == 8 * FRAME_TOKENS
    assert row["relevant_frame_shown"]["mean"]["accuracy"] >= 0.6


def test_video_processor_keeps_every_frame() -> None:
    model, processor = zoo.load("digit-video-vlm")
    for frames in (torch.zeros(3, 3, 96, 96, dtype=torch.uint8), torch.zeros(3, 96, 96, 3, dtype=torch.uint8)):
        inputs = processor(
            text=zoo.question_prompt("is there a 7 ?", "video"), videos=frames.numpy(), return_tensors="pt"
        )
        assert inputs["pixel_values_videos"].shape == (1, 3, 3, 96, 96)
        torch.testing.assert_close(inputs["pixel_values_videos"], torch.full((1, 3, 3, 96, 96), -2.0))
        assert int((inputs["input_ids"] == model.config.video_token_index).sum()) == 3 * FRAME_TOKENS


def test_card_keeps_its_promises() -> None:
    card = zoo.card("digit-vlm")
    assert card == zoo.card("digit-video-vlm")
    for split in ("val", "test"):
        scores = card["accuracy"][split]
        assert scores["image"]["mean"]["accuracy"] >= 0.85
        for row in scores["video"].values():
            assert row["relevant_frame_shown"]["mean"]["accuracy"] >= 0.8
    curve = card["curve"]
    random = list(curve["random"].values())
    assert random == sorted(random, reverse=True)
    assert curve["cls_attention"]["0.25"] - curve["random"]["0.25"] >= 0.03
    assert curve["cls_attention"]["0.11"] - curve["random"]["0.11"] >= 0.12
    assert curve["cls_attention"]["0.25"] >= curve["cls_attention"]["1.0"] - 0.02
    assert curve["cls_attention"]["0.25"] - curve["lowest_cls_attention"]["0.25"] >= 0.3


def test_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"tokred\[transformers\]\""):
        zoo.load("digit-vlm")


def test_training_command_runs(tmp_path: Path) -> None:
    """Both stages, the saved files and the card, on a few tiny batches."""
    for package in ("sklearn", "skimage", "tqdm"):
        pytest.importorskip(package)
    from tokred.zoo.train_digit_vlm import main

    threads, bundled = torch.get_num_threads(), WEIGHTS.read_bytes()
    try:
        main(["--smoke", "--seed", "3", "--out", str(tmp_path)])
        main(["--smoke", "--evaluate", "--seed", "3", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    card = json.loads((tmp_path / "seed3" / "card.json").read_text())
    assert card["training"]["recipe"]["tower"]["phases"][0]["kind"] == "window"
    assert set(card["accuracy"]["val"]["image"]) == {*KINDS, "mean"}
    assert WEIGHTS.read_bytes() == bundled, "without --bundle the package stays as it is"


def test_training_is_deterministic() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from dataclasses import replace

    from tokred.zoo.train_digit_vlm import VlmRecipe, train

    recipe = VlmRecipe().smoke()
    recipe = replace(recipe, language=replace(recipe.language, phases=recipe.language.phases[:1]))
    first, second = (train(recipe, seed=4)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_questions_of_a_pack_do_not_see_each_other(image_model: tuple[Any, Any]) -> None:
    """A packed question has the logits that it has alone."""
    from tokred.zoo.train_digit_vlm_language import Visual, answer_logits, pack

    features = torch.randn(1, 20, 128, generator=torch.Generator().manual_seed(0))
    visual = Visual(features, torch.arange(1, 21)[None], torch.zeros(1, 20, dtype=torch.bool), 21)
    pairs = [("which digit is red ?", "7"), ("how many digits are there ?", "two"), ("is there a 3 ?", "no")]
    with torch.inference_mode():
        together, _ = answer_logits(image_model[0], visual, pack([pairs]))
        for i, pair in enumerate(pairs):
            alone, answers = answer_logits(image_model[0], visual, pack([[pair]]))
            torch.testing.assert_close(together[:, i], alone[:, 0], rtol=1e-4, atol=1e-4)
            assert answers.shape == (1, 1, 2)
