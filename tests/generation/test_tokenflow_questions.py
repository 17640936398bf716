"""Questions about cards from TokenFlow's codes: what is asked, how it is scored, and the recipe's stages that train."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
yaml = pytest.importorskip("yaml")

from transformers import LlamaConfig, LlavaForConditionalGeneration  # noqa: E402

from tokred.core.errors import InvalidParameterError  # noqa: E402
from tokred.data.cards import DigitCards, caption  # noqa: E402
from tokred.eval import tokenflow_questions as questions  # noqa: E402
from tokred.generation.tokenflow import TokenFlow  # noqa: E402
from tokred.generation.tokenflow_ar import TokenFlowARConfig, TokenFlowARModel  # noqa: E402
from tokred.generation.tokenflow_generate import TokenFlowPipeline  # noqa: E402
from tokred.generation.tokenflow_llava import build_llava  # noqa: E402

RECIPE = ROOT / "tokenizers" / "tokenflow"
PIXELS = {"block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}


def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    encoder = {"type": "clip", "patch_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return TokenFlow(
        image_size=32, scales=[1, 2, 4], codebook_size=24, semantic_dim=4, pixel_dim=4,
        semantic_encoder_config={**encoder, "num_attention_heads": 1},
        semantic_decoder_config={"dim": 8, "depth": 1, "heads": 1, "out_dim": 8},
        pixel_encoder_config=PIXELS, pixel_decoder_config=PIXELS,
    ).eval()  # fmt: skip


def words(ids: Tensor) -> str:
    return " ".join(questions.WORDS[i] for i in ids.tolist())


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_answers_of_every_kind_of_card() -> None:
    for label, colour, background, place in ((7, 0, 2, 0), (0, 5, 4, 1), (3, 2, 5, 2)):
        text = caption(label, colour, background, place)
        found = questions.answers_of(text)
        assert text == f"a {found['colour']} {found['digit']} on {found['background']} , {found['place']}"
        for answer in found.values():
            assert set(answer.split()) <= set(questions.WORDS)
    for text in ("a cat", "a red seven on black", "red seven on black , left"):
        with pytest.raises(InvalidParameterError, match="no caption of a card"):
            questions.answers_of(text)


def test_conversations_hold_each_question_once_and_learn_answers_alone() -> None:
    captions = DigitCards("val", 1).render(5).captions
    inputs = questions.conversations(captions, 9, random.Random(0))
    orders = set()
    for row, text in enumerate(captions):
        count = int(inputs["attention_mask"][row].sum())
        ids, labels = inputs["input_ids"][row], inputs["labels"][row]
        assert (ids[count:] == questions.PAD).all()
        assert (labels[count:] == -100).all()
        assert words(ids[:10]) == "<s>" + " <image>" * 9
        answers = questions.answers_of(text)
        turns = words(ids[10:count]).split(" </s>")
        assert turns.pop() == ""
        asked = [next(kind for kind, q in questions.QUESTIONS.items() if turn.strip().startswith(q)) for turn in turns]
        assert sorted(asked) == sorted(questions.QUESTIONS)
        orders.add(tuple(asked))
        said = [turn.strip().removeprefix(questions.QUESTIONS[kind]) for turn, kind in zip(turns, asked, strict=True)]
        assert said == [f" {answers[kind]}" for kind in asked]
        learnt = words(labels[labels != -100])
        assert learnt == " ".join(f"{answers[kind]} </s>" for kind in asked)
        assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert len(orders) > 1


def test_the_tokenizer_knows_the_words() -> None:
    for question in questions.QUESTIONS.values():
        ids = questions.question_tokenizer()(f"<image> {question}").input_ids
        assert ids == [questions.BOS, questions.IMAGE, *questions._ids(question)]


# -- how it is scored ------------------------------------------------------------------------------------------------


def model(**options: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**{"vocab_size": len(questions.WORDS), "pad_token_id": 0, **sizes, **options})
    return build_llava(tokenizer(), config, questions.IMAGE)


def test_accuracy_counts_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that knows digits, says red of every colour, and is wrong otherwise."""
    net = model()
    cards = DigitCards(questions.SPLIT, 5).render(30)
    codes = net.model.vision_tower.tokenizer.encode(cards.images)
    place = iter(range(0, 30, 8))
    at: dict[str, int] = {}

    def told(_: Any, some: Tensor, kind: str) -> list[str]:
        at["start"] = next(place) if kind == "digit" else at["start"]
        rows = slice(at["start"], at["start"] + len(some))
        assert torch.equal(some, codes[rows])
        right = [questions.answers_of(text)["digit"] for text in cards.captions[rows]]
        return {"digit": right, "colour": ["red"] * len(some)}.get(kind, [""] * len(some))

    monkeypatch.setattr(questions, "answer", told)
    found = questions.question_accuracy(net, count=30, seed=5, batch=8)
    red = sum(text.startswith("a red ") for text in cards.captions) / 30
    accuracies = {kind: scores["accuracy"] for kind, scores in found["kinds"].items()}
    assert accuracies == pytest.approx({"digit": 1.0, "colour": red, "background": 0.0, "place": 0.0})
    assert found["accuracy"] == pytest.approx((1 + red) / 4)
    assert found["kinds"]["colour"]["accuracy_se"] == pytest.approx((red * (1 - red) / 29) ** 0.5)
    assert found["accuracy_se"] == pytest.approx((red * (1 - red) / 29) ** 0.5 / 4)  # a card is one observation


def test_answers_are_greedy_words_up_to_the_end() -> None:
    net = model()
    codes = net.model.vision_tower.tokenizer.encode(DigitCards("test", 5).render(3).images)
    for kind in questions.QUESTIONS:
        for row, text in enumerate(questions.answer(net, codes, kind)):
            said, ids = [], [1, *[questions.IMAGE] * 16, *questions._ids(questions.QUESTIONS[kind])]
            for _ in range(questions.LONGEST):
                with torch.no_grad():
                    logits = net(input_ids=torch.tensor([ids]), pixel_values=codes[row : row + 1]).logits[0, -1]
                ids.append(int(logits.argmax()))
                if ids[-1] == questions.EOS:
                    break
                said.append(questions.WORDS[ids[-1]])
            assert text == " ".join(said)


def test_bad_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidParameterError, match="count=0"):
        questions.question_accuracy(model(), count=0)
    with pytest.raises(InvalidParameterError, match="the model knows 99 words"):
        questions.question_accuracy(model(vocab_size=99), count=1)
    assert questions.main([f"one={tmp_path}"]) == 2
    assert "LABEL=FOLDER" in capsys.readouterr().err


# -- the recipe ------------------------------------------------------------------------------------------------------


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_tokenflow_train", RECIPE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recipe(folder: Path) -> str:
    config = yaml.safe_load((RECIPE / "tiny.yaml").read_text())
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config["generator"] |= small
    config["projector"] |= small
    for section in config:
        if section.startswith("train_"):
            config[section] |= {"batch_size": 2, "checkpoint_every": 1, "sample_every": 100, "log_every": 1}
    path = folder / "tokenflow.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_stages_that_read_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, config, folder = script(), recipe(tmp_path), tmp_path / "tokenizer"
    net = tokenizer()
    net.save_pretrained(folder)
    common = ["--config", config, "--steps", "2", "--tokenizer", str(folder)]
    train.main([*common, "--stage", "generator", "--out", str(tmp_path / "ar")])
    record = json.loads((tmp_path / "ar" / "config.json").read_text())
    assert [row["step"] for row in record["log"]] == [1, 2]
    assert record["log"][-1]["code"] == pytest.approx(torch.tensor(24.0).log().item(), abs=1.0)
    pipeline = TokenFlowPipeline.from_pretrained(tmp_path / "ar" / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=[3, 9], output_type="pt").images.shape == (2, 3, 32, 32)
    assert (tmp_path / "ar" / "samples" / "0000002.png").is_file()

    labels = []
    for features in ("last", "last_pixel"):
        out = tmp_path / features
        train.main([*common, "--stage", "projector", "--features", features, "--out", str(out)])
        told = json.loads((out / "config.json").read_text())["recipe"]
        assert told["features"] == features
        learnt = LlavaForConditionalGeneration.from_pretrained(out / "model")
        assert learnt.config.vision_config.feature_mode == features
        own = learnt.model.vision_tower.tokenizer.state_dict()
        assert all(torch.equal(own[name], value) for name, value in net.state_dict().items())
        labels.append(f"{features}={out / 'model'}")
    capsys.readouterr()
    assert questions.main([*labels, "--count", "4"]) == 0
    said = capsys.readouterr().out
    for word in ("last_pixel", "digit", "place", "±"):
        assert word in said
    assert questions.main([*labels, "--count", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["features"] for row in rows] == ["last", "last_pixel"]
    assert rows[0]["differences"]["digit"]["difference"] == 0

    with pytest.raises(SystemExit):
        train.main(["--config", config, "--stage", "generator", "--out", str(tmp_path / "none")])
    assert "--tokenizer" in capsys.readouterr().err


def test_sizes_of_the_tiny_models() -> None:
    config = yaml.safe_load((RECIPE / "tiny.yaml").read_text())
    own = config["model"]
    width = own["semantic_dim"] + own["pixel_dim"]
    with torch.device("meta"):
        ar = TokenFlowARModel(
            TokenFlowARConfig(
                vocab_size=40 + own["codebook_size"], image_token_start=40, codebook_size=own["codebook_size"],
                code_dim=width, scales=own["scales"], pad_token_id=0, **config["generator"],
            )
        )  # fmt: skip
        words = LlamaConfig(vocab_size=len(questions.WORDS), **config["projector"])
        llava = build_llava(TokenFlow(**own), words, questions.IMAGE)
    assert sum(p.numel() for p in ar.parameters()) < 6e5
    assert sum(p.numel() for p in llava.parameters() if p.requires_grad) < 4e5
