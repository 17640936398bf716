"""The recipes in tokenizers/: each stage trains, goes on after a stop, and evaluates; the paper's sizes are models.

The scripts are loaded by their paths: tokenizers/ is no package.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
yaml = pytest.importorskip("yaml")

RECIPES = ROOT / "tokenizers"
#: what makes the recipes of a few updates small
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "flextok": {
        "vae": {"block_out_channels": [4, 4, 4], "norm_num_groups": 2},
        "model": {
            "encoder_depth": 1, "encoder_dim": 16, "decoder_depth": 1, "decoder_dim": 16, "head_dim": 16,
            "num_registers": 4, "fsq_levels": [8, 5],
        },
        "generator": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    },
    "textok": {
        "model": {"hidden_size": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "text_dim": 8},
        "generator": {"depth": 1, "hidden_size": 16, "num_heads": 2},
    },
}  # fmt: skip


def script(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}_{file}", RECIPES / name / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recipe(name: str, folder: Path) -> str:
    """tiny.yaml, smaller still: batches of 2, a checkpoint after each update."""
    config = yaml.safe_load((RECIPES / name / "tiny.yaml").read_text())
    for section, values in TINY[name].items():
        config[section] |= values
    for section in config:
        if section.startswith("train_"):
            config[section] |= {"batch_size": 2, "checkpoint_every": 1, "sample_every": 100, "log_every": 1}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def finished(folder: Path, steps: int = 2) -> None:
    record = json.loads((folder / "config.json").read_text())
    assert [row["step"] for row in record["log"]] == list(range(1, steps + 1))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model", "samples"}


def interrupted(module: ModuleType, argv: list[str]) -> None:
    """Run until the second batch is asked for; one update is in the checkpoint then."""
    from tokred.data.pictures import CardPictures

    def stopping(self, batch, start=0, rank=0, world=1):
        yield next(train(self, batch, start, rank, world))
        raise KeyboardInterrupt

    train = CardPictures.train
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CardPictures, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            module.main(argv)


def same_weights(first: Path, second: Path) -> None:
    from safetensors.torch import load_file

    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files
    for file in files:
        one, two = load_file(first / file), load_file(second / file)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_flextok_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, config = script("flextok", "train"), recipe("flextok", tmp_path)
    common = ["--config", config, "--steps", "2"]
    vae, whole, parts, ar = (tmp_path / name for name in ("vae", "flextok", "parts", "ar"))
    train.main([*common, "--stage", "vae", "--out", str(vae)])
    finished(vae)
    tokenizer = [*common, "--stage", "tokenizer", "--vae", str(vae / "model")]
    train.main([*tokenizer, "--out", str(whole)])
    finished(whole)
    interrupted(train, [*tokenizer, "--out", str(parts)])
    assert (parts / "checkpoint.json").is_file()
    train.main([*tokenizer, "--out", str(parts), "--resume"])
    finished(parts)
    same_weights(whole / "model", parts / "model")
    train.main([*common, "--stage", "generator", "--tokenizer", str(whole / "model"), "--out", str(ar)])
    finished(ar)

    from tokred.generation import FlexTok, FlexTokARModel

    flextok, generator = FlexTok.from_pretrained(whole / "model"), FlexTokARModel.from_pretrained(ar / "model")
    assert flextok.image_size == 32
    assert flextok.vae.config.scaling_factor != 0.18215  # of the latents that it was trained on
    ids = generator.generate_tokens([3], num_tokens=2)
    assert flextok.decode(ids, num_inference_steps=1).shape == (1, 3, 32, 32)
    with pytest.raises(SystemExit):
        train.main([*common, "--stage", "generator", "--out", str(tmp_path / "none")])
    assert "--tokenizer" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "evaluated")]
    argv = ["--model", str(whole / "model"), "--count", "2", "--num-tokens", "1,4", "--steps", "1", *out]
    assert script("flextok", "evaluate").main(argv) == 0
    said = capsys.readouterr().out
    assert "4 tokens" in said
    assert "Paper says" in said


def test_textok_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokred.generation import TexTok, TexTokDiT1D

    train, config = script("textok", "train"), recipe("textok", tmp_path)
    common = ["--config", config, "--steps", "2"]
    whole, twin, dit, parts = (tmp_path / name for name in ("textok", "twin", "dit", "parts"))
    train.main([*common, "--stage", "tokenizer", "--num-tokens", "2", "--out", str(whole)])
    finished(whole)
    train.main([*common, "--stage", "tokenizer", "--num-tokens", "2", "--no-text", "--out", str(twin)])
    finished(twin)
    grid = tmp_path / "grid"
    train.main([*common, "--stage", "generator", "--grid", "--out", str(grid)])
    patches = TexTokDiT1D.from_pretrained(grid / "model").config
    assert (patches.num_tokens, patches.latent_dim) == (64, 48)
    generator = [*common, "--stage", "generator", "--tokenizer", str(whole / "model")]
    train.main([*generator, "--out", str(dit)])
    finished(dit)
    interrupted(train, [*generator, "--out", str(parts)])
    train.main([*generator, "--out", str(parts), "--resume"])
    same_weights(dit / "model", parts / "model")

    textok = TexTok.from_pretrained(dit / "model")
    textok.set_progress_bar_config(disable=True)
    assert (textok.num_tokens, textok.generator.config.num_classes) == (2, 10)
    assert sorted(map(int, textok.config.caption_bank)) == list(range(10))
    assert textok(class_labels=[1], num_inference_steps=1, output_type="pt").images.shape == (1, 3, 32, 32)
    assert TexTok.from_pretrained(twin / "model").text_encoder is None
    capsys.readouterr()
    evaluate = script("textok", "evaluate")
    argv = ["--count", "3", "--batch", "2", "--out", str(tmp_path / "evaluated")]
    assert evaluate.main(["--model", str(dit / "model"), *argv]) == 0
    said = capsys.readouterr().out
    for way in ("right caption", "wrong caption", "wrong in decoder", "no caption", "Paper says"):
        assert way in said
    assert evaluate.main(["--model", str(dit / "model"), *argv, "--num-tokens", "1"]) == 2
    assert "always takes 2" in capsys.readouterr().err


def sized(name: str, file: str) -> dict[str, Any]:
    from tokred.generation.training import Plan, checked_fields, read_config

    module = script(name, "train")
    config: dict[str, Any] = read_config(RECIPES / name / file, module.SECTIONS)
    for stage in module.STAGES:
        plan = Plan.from_dict(config[f"train_{stage}"])
        assert plan.warmup < plan.steps
    if name == "flextok":
        loss = module.Loss(**checked_fields(module.Loss, config["loss"], "loss"))
        assert (loss.repa is None) == (file == "tiny.yaml")
    return config


def parameters(module: torch.nn.Module) -> int:
    assert all(p.is_meta for p in module.parameters())
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("file", ["tiny.yaml", "config.yaml"])
def test_sizes_of_flextok(file: str) -> None:
    from diffusers import AutoencoderKL

    from tokred.generation import FlexTokARConfig, FlexTokARModel, FlexTokModel

    config = sized("flextok", file)
    with torch.device("meta"):
        vae, model = AutoencoderKL(**config["vae"]), FlexTokModel(**config["model"])
        ar = FlexTokARModel(
            FlexTokARConfig(codebook_size=model.fsq.codebook_size, num_tokens=16, **config["generator"])
        )
    assert vae.config.latent_channels == model.config.latent_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert model.latent_size * factor == config["data"]["size"]
    if file == "config.yaml":  # the released sizes, `shared/specs/flextok.md` section 1
        assert parameters(vae) / 1e6 == pytest.approx(83.8, abs=0.05)
        assert parameters(model) / 1e6 == pytest.approx(287.3 + 2169.7, abs=0.1)
        blocks = sum(p.numel() for p in ar.blocks.parameters() if p.ndim == 2)
        assert blocks == pytest.approx(12 * 30 * 1920**2, rel=0.02)  # the published 1.33 B count these alone
    else:
        assert parameters(model) < 6e6
        assert parameters(ar) < 6e6


def test_sizes_of_textok() -> None:
    from tokred.generation import TexTokDiT1D, TexTokModel

    for file in ("tiny.yaml", "config.yaml"):
        config = sized("textok", file)
        with torch.device("meta"):
            model = TexTokModel(**config["model"])
            sizes = {"num_tokens": model.config.num_tokens, "latent_dim": model.config.latent_dim}
            dit = TexTokDiT1D(**sizes, **config["generator"])
        assert model.config.image_size == config["data"]["size"]
        if file == "config.yaml":
            assert parameters(model) / 1e6 == pytest.approx(175.19, abs=0.01)
            assert parameters(dit) / 1e6 == pytest.approx(675, rel=0.02)
        else:
            assert parameters(model) < 3e6


def test_readmes_name_what_is_there() -> None:
    for name in ("flextok", "textok"):
        text = (RECIPES / name / "README.md").read_text()
        for word in (
            "tiny.yaml",
            "config.yaml",
            "train.py",
            "evaluate.py",
            "tokred bench --task tokenize",
            "aper says",
        ):
            assert word in text
        for option in ("--stage", "--resume", "--data"):
            assert option in text
