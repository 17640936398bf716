"""`tokred.eval.classifiers`: open_clip's zero-shot classifier against a loop, and names of weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tokred.core.errors import InvalidParameterError
from tokred.eval.classifiers import Choice, load_classifier
from tokred.eval.records import digest

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Any]:
    """A tiny architecture that open_clip knows by name, with random weights in a file: (choice, model, tokenizer)."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip import factory

    (tmp_path / "tokred-tiny.json").write_text(json.dumps(TINY))
    before = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    open_clip.add_model_config(tmp_path / "tokred-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tokred-tiny").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    yield f"openclip:tokred-tiny/{tmp_path / 'weights.pt'}", model, open_clip.get_tokenizer("tokred-tiny")
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(before[0])
    factory._MODEL_CONFIG_PATHS[:] = before[1]


@torch.no_grad()
def slow_text(model: Any, tokenizer: Any, name: str, templates: Any) -> torch.Tensor:
    """The direction of one class: of the mean of the directions of its wordings."""
    directions = []
    for template in templates:
        text = model.encode_text(tokenizer([template(name)]))[0]
        directions.append(text / text.norm())
    middle = torch.stack(directions).mean(0)
    return middle / middle.norm()


@pytest.mark.parametrize(("wordings", "every"), [("simple", 1), ("full", 15), (None, 100)])
def test_zero_shot_is_the_loop_over_names_and_wordings(
    tiny: Any, tmp_path: Path, wordings: str | None, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On open_clip's own wordings and names, of which every so many'th."""
    import open_clip

    name, model, tokenizer = tiny
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES if wordings == "simple" else open_clip.OPENAI_IMAGENET_TEMPLATES
    assert len(templates) == (7 if wordings == "simple" else 80)
    assert len(open_clip.IMAGENET_CLASSNAMES) == 1000
    names = open_clip.IMAGENET_CLASSNAMES[::every]
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", names)
    found = load_classifier(Choice(name, templates=wordings), cache=tmp_path / "texts")
    assert (found.classes, found.class_names, found.weights) == (len(names), tuple(names), "pretrained")
    some = range(0, len(names), 7 if len(names) < 100 else 100)
    expected = torch.stack([slow_text(model, tokenizer, names[i], templates) for i in some], 1)
    torch.testing.assert_close(found.model.texts[:, list(some)], expected)

    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    images = found.transform(picture)[None]
    assert images.shape == (1, 3, 16, 16)
    with torch.no_grad():
        image = model.encode_image(images)[0]
        torch.testing.assert_close(found.model(images)[0, list(some)], image / image.norm() @ expected)

    kept = list((tmp_path / "texts").iterdir())
    assert [path.suffix for path in kept] == [".safetensors"]
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", None)  # not called again
    again = load_classifier(Choice(name, templates=wordings), cache=tmp_path / "texts")
    assert torch.equal(again.model.texts, found.model.texts)


def test_a_file_that_holds_no_weights(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("none")
    with pytest.raises(InvalidParameterError, match="expected weights of tokred-tiny"):
        load_classifier(Choice(tiny[0]))


def test_weights_have_one_name_each() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.BatchNorm1d(70)).half()
    name = digest(model)
    assert digest(copy.deepcopy(model)) == name
    assert digest(copy.deepcopy(model).float()) != name
    for place in (1, 17, 4899):  # between those that are read one by one, too
        other = copy.deepcopy(model)
        other[0].weight.data.view(-1)[place] += 0.001
        assert digest(other) != name
    swapped = copy.deepcopy(model)
    swapped[0].weight.data = swapped[0].weight.data.flip(0)
    assert digest(swapped) != name
