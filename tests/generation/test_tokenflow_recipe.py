"""The TokenFlow recipe: it trains, goes on after a stop, evaluates; both teachers teach; the paper's sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from tests.generation.test_recipes import RECIPES, finished, interrupted, parameters, same_weights, script
from tests.generation.test_tokenflow import CLIP, small

yaml = pytest.importorskip("yaml")

#: what makes the recipe of a few updates small
TINY: dict[str, Any] = {
    "scales": [1, 2, 8],
    "codebook_size": 16,
    "semantic_encoder_config": {
        "type": "timm", "model_name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 1,
        "num_heads": 1, "global_pool": "",
    },
    "semantic_decoder_config": {"dim": 16, "depth": 1, "heads": 1, "out_dim": 192},
    **{
        f"pixel_{side}_config": {
            "block_out_channels": [4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4,
            "attention": False,
        }
        for side in ("encoder", "decoder")
    },
}  # fmt: skip


def recipe(folder: Path, **loss: Any) -> str:
    config = yaml.safe_load((RECIPES / "tokenflow" / "tiny.yaml").read_text())
    config["model"] |= TINY
    config["loss"] |= loss
    for section in config:
        if section.startswith("train_"):
            config[section] |= {"batch_size": 2, "checkpoint_every": 1, "sample_every": 100, "log_every": 1}
    path = folder / "tokenflow.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokred.generation.tokenflow import TokenFlow

    train = script("tokenflow", "train")
    common = ["--config", recipe(tmp_path, renew_every=1, renew_until=1.0), "--steps", "3", "--stage", "tokenizer"]
    whole, pieces = tmp_path / "whole", tmp_path / "parts"
    record = train.main([*common, "--out", str(whole)])
    finished(whole, 3)
    for row in record["log"]:
        assert {"l2", "semantic", "vq", "codes"} <= set(row)
        assert 0 < row["codes"] <= 1
        assert 0 < row["semantic"] < 2
    interrupted(train, [*common, "--out", str(pieces)])
    train.main([*common, "--out", str(pieces), "--resume"])
    finished(pieces, 3)
    same_weights(whole / "model", pieces / "model")
    tokenizer = TokenFlow.from_pretrained(whole / "model")
    assert (tokenizer.image_size, tokenizer.num_tokens) == (32, 69)
    evaluate, out = script("tokenflow", "evaluate"), ["--out", str(tmp_path / "evaluated")]
    argv = ["--model", str(whole / "model"), "--count", "6", "--batch", "3", "--probe", "12", *out]
    assert evaluate.main(argv) == 0
    said = capsys.readouterr().out
    for words in ("up to 1 x 1", "up to 8 x 8", "PSNR dB", "semantic codes", "pixel codes", "colour, %", "Paper says"):
        assert words in said
    assert (tmp_path / "evaluated" / "pictures.png").is_file()
    assert evaluate.main(["--model", str(tmp_path / "none"), *out]) == 2
    assert "error" in capsys.readouterr().err


def test_wrong_recipes_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = script("tokenflow", "train")
    for loss, said in (({"beta": 1.0}, "'beta' is no field"), ({"vq": -1.0}, "vq=-1.0")):
        argv = ["--config", recipe(tmp_path, **loss), "--stage", "tokenizer", "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit):
            train.main([*argv, "--steps", "2"])
        assert said in capsys.readouterr().err


def test_the_digit_teacher_sees_what_the_whole_scene_shows() -> None:
    """Its features, from a card's patches alone, are near those of the whole scene, and know digits and colours."""
    from tokred import zoo
    from tokred.data.cards import on_scene
    from tokred.data.pictures import CardPictures

    teacher = script("tokenflow", "train").DigitTeacher(4)
    batch = next(CardPictures().held_out(16, 16))
    found = teacher(batch.images)
    assert found.shape == (16, 16, teacher.width)
    scenes = on_scene(((batch.images + 1) * 127.5).round().to(torch.uint8)).float() / 255
    with torch.no_grad():
        tokens = zoo.load("digit-vit").forward_features((scenes - 0.5) / 0.25)[:, 1:].unflatten(1, (12, 12))
    wanted = tokens[:, 4:8, 4:8].flatten(1, 2)
    near = torch.cosine_similarity(found[..., 96:], wanted, dim=-1)
    assert near.mean() > 0.97
    assert script("tokenflow", "train").DigitTeacher(8)(batch.images).shape == (16, 64, teacher.width)
    centred = script("tokenflow", "train").DigitTeacher(4, batch.images)(batch.images)
    torch.testing.assert_close(centred[..., :96].norm(dim=-1), torch.ones(16, 16))
    assert centred.flatten(0, 1).mean(0).norm() < 0.5 * found.flatten(0, 1).mean(0).norm()


def test_a_clip_teaches_and_starts_the_encoder(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from tokred.data.pictures import CardPictures

    train = script("tokenflow", "train")
    fields = {key: value for key, value in CLIP.items() if key != "type"}
    torch.manual_seed(0)
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=12, projection_dim=10, **fields)).eval()
    clip.save_pretrained(tmp_path)
    net = small(seed=3)
    teacher = train.teacher_of({"model": str(tmp_path)}, net, CardPictures())
    teacher.init(net)
    vision = getattr(clip.vision_model, "vision_model", clip.vision_model).state_dict()
    own = net.semantic_encoder.state_dict()
    assert all(torch.equal(own[key], vision[key]) for key in own)
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    found = teacher(images)
    assert found.shape == (2, 36, 10)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (train.CLIP_MEAN, train.CLIP_STD))
    with torch.no_grad():
        hidden = clip.vision_model(((images + 1) / 2 - mean) / std).last_hidden_state
        wanted = clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 1:]))
    torch.testing.assert_close(found, wanted)
    other = small(semantic_decoder_config={"dim": 16, "depth": 1, "heads": 2, "out_dim": 7})
    with pytest.raises(ValueError, match="out_dim=7"):
        train.teacher_of({"model": str(tmp_path)}, other, CardPictures())


@pytest.mark.parametrize("file", ["tiny.yaml", "config.yaml"])
def test_sizes(file: str) -> None:
    from tokred.generation.tokenflow import TokenFlow
    from tokred.generation.training import Plan, checked_fields, read_config

    train = script("tokenflow", "train")
    config = read_config(RECIPES / "tokenflow" / file, train.SECTIONS)
    plan = Plan.from_dict(config["train_tokenizer"])
    train.Loss(**checked_fields(train.Loss, config["loss"], "loss"))
    with torch.device("meta"):
        model = TokenFlow(**config["model"])
    assert model.image_size == config["data"]["size"]
    assert plan.warmup < plan.steps
    if file == "config.yaml":  # `shared/specs/tokenflow_state_dict_clipb_32k_base.json`, without the logging buffer
        assert parameters(model) / 1e6 == pytest.approx(181.9, abs=0.1)
        assert model.num_tokens == 561
    else:
        assert parameters(model) < 1e6


def test_the_readme_names_what_is_there() -> None:
    text = (RECIPES / "tokenflow" / "README.md").read_text()
    for word in ("tiny.yaml", "config.yaml", "train.py", "evaluate.py", "aper says", "--stage", "--resume", "--data"):
        assert word in text
