"""The Token-Shuffle recipe: its stages train, go on after a stop, carry weights over; what the table says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.generation.test_recipes import same_weights

for package in ("accelerate", "diffusers", "timm", "sklearn", "skimage", "transformers"):
    pytest.importorskip(package)
yaml = pytest.importorskip("yaml")

RECIPE = ROOT / "tokenizers" / "token_shuffle"
#: what makes the recipe of a few updates small
SMALL: dict[str, dict[str, Any]] = {
    "vq": {"block_out_channels": [4, 4, 4], "norm_num_groups": 2, "latent_channels": 4, "num_vq_embeddings": 16},
    "loss": {"refresh_every": 1, "refresh_until": 2, "refresh_batches": 2},
    "generator": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                  "intermediate_size": 16},
}  # fmt: skip


def script(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_token_shuffle_{file}", RECIPE / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recipe(folder: Path, **sections: dict[str, Any]) -> str:
    """tiny.yaml, smaller still: batches of 2, a checkpoint after each update."""
    config = yaml.safe_load((RECIPE / "tiny.yaml").read_text())
    for section, values in {**SMALL, **sections}.items():
        config[section] |= values
    for section in ("train_vq", "train_generator"):
        config[section] |= {"batch_size": 2, "checkpoint_every": 1, "sample_every": 100, "log_every": 1}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def finished(folder: Path, steps: int = 2) -> dict[str, Any]:
    record = json.loads((folder / "config.json").read_text())
    assert [row["step"] for row in record["log"]] == list(range(1, steps + 1))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model", "samples"}
    return record


def interrupted(module: ModuleType, argv: list[str]) -> None:
    """Run until the second batch of an update is asked for; one update is in the checkpoint then."""
    from tokred.data.pictures import CardPictures

    calls = []

    def stopping(self, batch, start=0, rank=0, world=1):
        calls.append(start)
        whole = train(self, batch, start, rank, world)
        if len(calls) > 1:  # not the one that feeds the updates
            yield from whole
        yield next(whole)
        raise KeyboardInterrupt

    train = CardPictures.train
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CardPictures, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            module.main(argv)


def test_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokred.generation.llamagen_vq import VQTokenizer
    from tokred.generation.token_shuffle import TokenShuffle

    train = script("train")
    common = ["--config", recipe(tmp_path), "--steps", "2"]
    vq, parts = tmp_path / "vq", tmp_path / "parts"
    train.main([*common, "--stage", "vq", "--out", str(vq)])
    assert all(row["codes"] > 1 for row in finished(vq)["log"])
    interrupted(train, [*common, "--stage", "vq", "--out", str(parts)])
    train.main([*common, "--stage", "vq", "--out", str(parts), "--resume"])
    same_weights(vq / "model", parts / "model")
    tokenizer = VQTokenizer.from_pretrained(vq / "model")
    assert (tokenizer.image_size, tokenizer.num_tokens, tokenizer.codebook_size) == (32, 64, 16)

    generator = [*common, "--stage", "generator", "--tokenizer", str(vq / "model")]
    folders = []
    for window in (1, 2):
        folders.append(tmp_path / f"window_{window}")
        train.main([*generator, "--window", str(window), "--out", str(folders[-1])])
        record = finished(folders[-1])
        assert record["recipe"]["window"] == window
        assert all(row["nll"] > 0 for row in record["log"])
    interrupted(train, [*generator, "--window", "2", "--out", str(tmp_path / "again")])
    train.main([*generator, "--window", "2", "--out", str(tmp_path / "again"), "--resume"])
    same_weights(folders[1] / "model", tmp_path / "again" / "model")
    model = TokenShuffle.from_pretrained(folders[1] / "model")
    assert model.config.text_config.vocab_size == 11 + 16 + 2
    codes = model.generate_codes([[10, 3]], 8, do_sample=True)
    assert tokenizer.decode(codes).shape == (1, 3, 32, 32)

    train.main([*generator, "--init", str(folders[0] / "model"), "--out", str(tmp_path / "next")])
    assert TokenShuffle.from_pretrained(tmp_path / "next" / "model").config.window == 2
    capsys.readouterr()
    for wrong, says in (
        (["--stage", "generator"], "--tokenizer"),
        (["--stage", "generator", "--tokenizer", str(vq / "model"), "--resolution", "64"], "the recipe has 32"),
        (["--stage", "generator", "--tokenizer", str(vq / "model"), "--window", "3"], "divide the width 16"),
    ):
        with pytest.raises(SystemExit):
            train.main([*common, *wrong, "--out", str(tmp_path / "none")])
        assert says in capsys.readouterr().err

    out = tmp_path / "evaluated"
    argv = ["--tokenizer", str(vq / "model"), "--generators", *(str(f / "model") for f in reversed(folders))]
    found = script("evaluate").main([*argv, "--count", "3", "--rounds", "1", "--out", str(out)])
    said = capsys.readouterr().out
    check_table(found, said)
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "window 1.png", "window 2.png"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))


def check_table(found: dict[str, Any], said: str) -> None:
    assert [(row["window"], row["steps"]) for row in found["rows"]] == [(1, 64), (2, 16)]
    for row in found["rows"]:
        assert row["nll"] > 0
        assert row["ms"] > 0
        assert 0 <= row["agreement"] <= 1
    assert found["rows"][1]["limit"] > 1
    assert found["rows"][1]["speedup"] > 0
    assert found["cards"]["count"] == 3
    for word in (
        "window",
        "steps",
        "nll of a code",
        "agreement",
        "speed-up",
        "limit",
        "tokenizer alone",
        "of 16 codes",
    ):
        assert word in said


def test_likelihoods_are_those_of_the_slow_definition() -> None:
    from tests.generation.shuffle_models import BOS, codes_of, shuffled
    from tokred.core.errors import InvalidParameterError
    from tokred.data.pictures import PictureBatch
    from tokred.eval.shuffle_table import class_prompts, code_nll, compare
    from tokred.generation.token_shuffle_ops import window

    model, codes = shuffled(), codes_of(3, 4, 6)
    prompts = class_prompts(model, torch.tensor([1, 0, 9]))
    assert prompts == [[BOS, 1], [BOS, 0], [BOS, 9]]
    found = code_nll(model, prompts, codes)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(**{**model.pack([prompt], codes[row : row + 1]), "labels": None}).image_logits[0].double()
        odds = logits.log_softmax(dim=-1)
        cells = window(codes[row], 2)
        wanted = [-odds[j, t, cells[j, t]] for j in range(6) for t in range(4)]
        assert float(found[row]) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)
    tokenizer: Any = SimpleNamespace(codebook_size=7)
    cards = PictureBatch(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), None)
    for models, says in (
        ([model, model], "one model of each"),
        ([], "one model of each"),
        ([model], "a tokenizer of 7"),
    ):
        with pytest.raises(InvalidParameterError, match=says):
            compare(models, tokenizer, cards, lambda pictures: pictures[:, 0, 0, 0].long())


@pytest.mark.parametrize("file", ["tiny.yaml", "config.yaml"])
def test_sizes(file: str) -> None:
    from diffusers import VQModel
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tokred.generation.token_shuffle import STAGES
    from tokred.generation.training import Plan, read_config

    train = script("train")
    for size in (32,) if file == "tiny.yaml" else STAGES:
        config = read_config(RECIPE / file, train.SECTIONS)
        args = SimpleNamespace(resolution=size, window=None)
        train.at_resolution(args, config)
        plan = Plan.from_dict(config["train_generator"])
        assert plan.warmup < plan.steps
        assert config["data"]["size"] == size
        if file == "config.yaml":
            assert {"window": args.window, "z_loss": config["shuffle"]["z_loss"]} == STAGES[size]
        args.init = None
        with torch.device("meta"):
            vq = VQModel(**config["vq"], lookup_from_codebook=True)
            text = SimpleNamespace(bos=1, size=11 if file == "tiny.yaml" else 32000)
            model = train.generator_of(args, config, vq.config.num_vq_embeddings, text)
            base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=11, **config["generator"]))
        count = sum(p.numel() for p in vq.parameters())
        blocks = sum(p.numel() for name, p in base.named_parameters() if ".layers." in name)
        if file == "config.yaml":  # `shared/specs/token_shuffle.md`, sections 6 to 8
            assert count == 71_883_403
            whole = sum(p.numel() for name, p in model.named_parameters() if name.startswith("base."))
            assert whole / 1e9 == pytest.approx(2.7, abs=0.1)
            added = sum(
                p.numel() for name, p in model.named_parameters() if not name.startswith("base.") and p.ndim == 2
            )
            assert added / 1e6 == pytest.approx(4.7 + 75.5 if size > 512 else 0, abs=0.1)
        else:
            assert count < 0.6e6
            assert blocks < 0.6e6


def test_readme_names_what_is_there() -> None:
    text = (RECIPE / "README.md").read_text()
    for word in ("tiny.yaml", "config.yaml", "train.py", "evaluate.py", "--stage", "--resume", "--window", "--init"):
        assert word in text
    assert "Paper says" in text
