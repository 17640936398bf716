"""`tokred generate`: what it draws is decided by the seed, is what `tokred decode` shows, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cli.test_cli import refused, run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("timm")

from tests.cli.tiny_tokenizers import make_ar, make_flextok, make_textok, save_zoo
from tokred.eval.drawing import BUNDLED, open_generator
from tokred.generation.flextok_ar import FlexTokARConfig, FlexTokARModel
from tokred.generation.flextok_generate import FlexTokGenerationPipeline
from tokred.generation.packing import load_tokens

#: of the bundled models: shape of a picture's tokens, and fewer of them
SIZES: dict[str, tuple[list[int], int | None]] = {
    "flextok": ([16], 3),
    "textok": ([2, 4], None),
    "tokenflow": ([121], 21),
    "token-shuffle": ([64], None),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_zoo(tmp_path_factory.mktemp("zoo"))


def drawn(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code, out, err = run(capsys, "generate", *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def pixels(path: Path | str) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


@pytest.mark.parametrize("model", BUNDLED)
def test_the_bundled_models(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    alone, held = tmp_path / "alone.png", tmp_path / "alone.ftk"
    argv = ["--model", model, "--steps", "3"] if model in ("flextok", "textok") else ["--model", model]
    own = drawn(capsys, "7", *argv, "--seed", "5", "-o", str(alone), "--save-tokens", str(held))
    (record,) = own["pictures"]
    shape, fewer = SIZES[model]
    assert (record["label"], record["seed"], record["tokens"], record["file"]) == (7, 5, shape, str(held))
    values = torch.tensor(record["ids" if len(shape) == 1 else "latents"])
    assert list(values.shape) == shape
    assert torch.equal(load_tokens(held).tokens, values)
    assert own["picture"] == {"width": 32, "height": 32}
    assert own["seconds"] > record["seconds"] > 0

    # the file decodes to the same picture
    again = tmp_path / "again.png"
    noise = ["--steps", "3", "--seed", "5"] if model == "flextok" else []
    code, _, err = run(capsys, "decode", str(held), "-o", str(again), *noise)
    assert code == 0, err
    assert pixels(again) == pixels(alone)

    # the same picture among others, and others beside it
    sheet = drawn(capsys, "three", "seven", *argv, "--seed", "4", "--count", "2", "-o", str(tmp_path / "sheet.png"))
    found = {(one["label"], one["seed"]): one for one in sheet["pictures"]}
    assert list(found) == [(3, 4), (3, 5), (7, 4), (7, 5)]
    key = "ids" if len(shape) == 1 else "latents"
    assert found[7, 5][key] == record[key]
    assert len({str(one[key]) for one in found.values()}) == 4
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (sheet["picture"]["width"], sheet["picture"]["height"])
        assert picture.width > 2 * 128
        assert picture.height > 2 * 128

    if fewer is None:
        assert "always draws" in refused(capsys, "generate", "7", *argv, "--num-tokens", "3", "-o", str(again))
        return
    less = drawn(capsys, "7", *argv, "--seed", "5", "--num-tokens", str(fewer), "-o", str(again))
    assert less["pictures"][0]["ids"] == record["ids"][:fewer]
    assert pixels(again) != pixels(alone)


def test_without_arguments_each_digit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "generate", "--steps", "2", "--save-tokens", "tokens/card.ftk")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split(",")[0] for line in lines[:10]] == [
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
    ]  # fmt: skip
    assert "seed 0: 16 tokens" in lines[7]
    assert lines[7].endswith("tokens/card-7.ftk")
    assert lines[10].startswith("written: outputs/generate-flextok.png")
    assert len(list(Path("tokens").iterdir())) == 10
    with Image.open("outputs/generate-flextok.png") as sheet:
        assert sheet.width > sheet.height


def test_guidance_and_windows_matter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "x.png")]
    for model, none in (("flextok", "1"), ("textok", "1"), ("tokenflow", "0"), ("token-shuffle", "1")):
        argv = ["7", "--model", model, *out]
        more, less = drawn(capsys, *argv), drawn(capsys, *argv, "--guidance", none)
        assert more["pictures"] != less["pictures"]
        assert less["settings"]["guidance"] == float(none) != more["settings"]["guidance"]
    drawer = {window: open_generator("token-shuffle", window=window).model.config.window for window in (1, 2, 4, None)}
    assert drawer == {1: 1, 2: 2, 4: 4, None: 2}


def test_saved_models(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    """Folders of random models: a pipeline, a generator with its tokenizer beside it, and models of prompts."""
    out = tmp_path / "x.png"

    def ids(*argv: str) -> Any:
        (one,) = drawn(capsys, *argv, "-o", str(out))["pictures"]
        return one.get("ids", one.get("latents"))

    flextok, ar = str(root / "tiny_flextok"), str(root / "tiny_flextok_ar")
    apart = ids("7", "--model", ar, "--tokenizer", flextok, "--steps", "2")
    FlexTokGenerationPipeline(make_ar(), make_flextok()).save_pretrained(tmp_path / "both")
    assert ids("7", "--model", str(tmp_path / "both"), "--steps", "2") == apart
    assert len(apart) == 4
    assert len(ids("nine", "--model", str(root / "tiny_tokenflow"))) == 21
    assert len(ids("3", "--model", str(root / "tiny_shuffle_2"), "--tokenizer", str(root / "tiny_vq"))) == 16
    assert len(ids("3", "--model", str(root / "tiny_textok"), "--steps", "2")) == 4

    pipeline = make_textok()  # any text encoder with its tokenizer serves
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    width = pipeline.text_encoder.config.hidden_size
    texts = FlexTokARModel(FlexTokARConfig(codebook_size=40, num_tokens=4, num_classes=None, text_dim=width, **sizes))
    of_texts = FlexTokGenerationPipeline(texts, make_flextok(), pipeline.text_encoder, pipeline.text_tokenizer)
    of_texts.save_pretrained(tmp_path / "texts")
    first = ids("a red square", "--model", str(tmp_path / "texts"), "--steps", "2")
    assert first == ids("a red square", "--model", str(tmp_path / "texts"), "--steps", "2")
    assert "prompts; give one" in refused(capsys, "generate", "--model", str(tmp_path / "texts"), "-o", str(out))


def test_what_generate_refuses(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "token_shuffle"}')
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text("no JSON")
    saved = str(root / "tiny_flextok_ar")
    cases = [
        (["sevn"], "did you mean 'seven'"),
        (["10"], "classes 0 to 9, or zero, one, two"),
        (["a red seven", "--model", "textok"], "classes 0 to 9"),
        (["7", "--model", "flextk"], "expected flextok, textok, tokenflow, token-shuffle, or the folder"),
        (["7", "--model", str(empty)], "holds no saved generator"),
        (["7", "--model", str(root / "tiny_flextok")], "a FlexTok, which draws nothing"),
        (["7", "--model", str(root / "tiny_textok_no_text")], "without a generator"),
        (["7", "--model", str(broken)], "cannot be loaded"),
        (["7", "--model", saved], "ar draws from 40 ids, the tokenizer has 1000"),
        (["12", "--model", saved, "--tokenizer", str(root / "tiny_flextok")], "classes 0 to 9"),
        (["7", "--model", str(root / "tiny_shuffle_1")], "give its --tokenizer"),
        (["7", "--model", str(root / "tiny_tokenflow"), "--tokenizer", "flextok"], "holds its own"),
        (["7", "--tokenizer", "vq"], "comes with its own"),
        (["7", "--num-tokens", "17"], "--num-tokens 17: flextok draws 1 to 16"),
        (["7", "--num-tokens", "0"], "draws 1 to 16"),
        (["7", "--num-tokens", "7", "--model", "tokenflow"], "whole scales, 1, 5, 21, 57, 121"),
        (["7", "--window", "2"], "flextok has none"),
        (["7", "--window", "3", "--model", "token-shuffle"], "one of 1, 2, 4"),
        (["7", "--steps", "3", "--model", "tokenflow"], "tokenflow has none"),
        (["7", "--steps", "0"], "at least 1"),
        (["7", "--count", "0"], "at least 1"),
        (["7", "--count", "257"], "at most 256 pictures"),
        (["7", "--seed", "-1"], "at least 0"),
        (["7", "--seed", str(2**64)], "less than 2^63"),
        (["7", "--model", str(text)], "cannot be read"),
        (["7", "--guidance", "nan"], "at least 0"),
        (["7", "-o", str(tmp_path / "new" / "x.nonsense")], "unknown file extension"),
    ]
    for argv, says in cases:
        given = argv if "-o" in argv else [*argv, "-o", str(tmp_path / "new" / "x.png")]
        assert says in refused(capsys, "generate", *given), argv
    assert not (tmp_path / "new").exists()
