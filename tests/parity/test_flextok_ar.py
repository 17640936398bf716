"""FlexTok's generators against the released code, through the converter of the released names.

Recorded there: embeddings, teacher-forced logits, greedy ids with and without guidance, and the filters of sampling.
The texts are stored as projected features; the last row is the empty prompt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import ROOT
from tests.parity._golden import Case, Golden, read_manifest
from tokred.generation.flextok_ar import FlexTokARModel
from tokred.generation.flextok_ar_official import from_official, load_official, to_official

METHOD = "flextok_ar"
FLOATS = "logits/embeddings/probs"  # the manifest's name of their tolerance
KINDS = ("c2i", "t2i")
SIZES = ("dim", "heads", "depth", "codebook", "num_tokens", "num_classes", "batch", "cfg", "text_len", "valid")


def test_case(golden: Golden, tmp_path: Path) -> None:
    golden.known(("kind", "config", "state_dict"))
    assert golden.kind({kind: kind for kind in KINDS}) in KINDS
    unknown = sorted(set(golden.entry["config"]) - set(SIZES))
    assert not unknown, f"this runner does not know {unknown} of config"

    model = build(golden, tmp_path)
    condition, negative = conditions(golden)
    check_teacher_forcing(golden, model, condition)
    for cached in (True, False):
        check_greedy(golden, model, condition, negative, cached)
    check_filters(golden, model, condition)
    golden.finish()


def build(golden: Golden, folder: Path) -> FlexTokARModel:
    """The model as `from_official` reads it from a released folder."""
    config = golden.entry["config"]
    weights = {name: golden[name] for name in golden._tensors if name.startswith("models.")}
    shapes = golden.entry.get("state_dict")
    if shapes is not None:
        assert {name: list(value.shape) for name, value in weights.items()} == shapes
    save_file(weights, folder / "model.safetensors")
    (folder / "config.yaml").write_text(f"models: {{ar_image_model: {{trunk: {{num_heads: {config['heads']}}}}}}}\n")
    model = load_official(folder)

    ours = from_official(weights)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(to_official(ours)[name], value) for name, value in weights.items())
    got = model.config
    sizes = {"dim": got.hidden_size, "heads": got.num_attention_heads, "depth": got.num_hidden_layers}
    sizes |= {"codebook": got.codebook_size, "num_tokens": got.num_tokens, "num_classes": got.num_classes}
    assert sizes == {name: config.get(name) for name in sizes}
    assert model.training is False
    fresh = FlexTokARModel(got).positions  # the table is a formula; the stored one need not be
    torch.testing.assert_close(fresh, model.positions, atol=1e-6, rtol=0)
    return model


def conditions(golden: Golden) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What conditions the model, and what guidance needs besides."""
    if "class_ids" in golden:
        return {"class_labels": golden["class_ids"]}, {}
    embeds, mask = golden["text_emb"], golden["text_mask"]
    if "valid" in golden.entry["config"]:
        assert mask.sum(dim=1).tolist() == golden.entry["config"]["valid"]
    given = {"text_embeds": embeds[:-1], "text_mask": mask[:-1]}
    return given, {"negative_text_embeds": embeds[-1:], "negative_text_mask": mask[-1:]}


@torch.no_grad()
def check_teacher_forcing(golden: Golden, model: FlexTokARModel, condition: dict[str, Tensor]) -> None:
    tokens = golden["tokens"]
    start = torch.full((len(tokens), 1), model.config.codebook_size)
    inputs = torch.cat([start, tokens[:, :-1]], dim=1)
    golden.check("input_embeddings", lambda: model.embed(inputs, condition.get("class_labels")), FLOATS)
    golden.check("logits_teacher_forced", model(labels=tokens, **condition).logits, FLOATS)
    golden.check("logits_teacher_forced", model(inputs, **condition).logits, FLOATS)


def check_greedy(
    golden: Golden, model: FlexTokARModel, condition: dict[str, Tensor], negative: dict[str, Tensor], cached: bool
) -> None:
    options: dict[str, Any] = {"do_sample": False, "use_cache": cached, "return_dict_in_generate": True}
    scale = golden.entry["config"]["cfg"]
    guided = {**condition, **negative, "guidance_scale": scale}
    if "class_labels" in condition:
        guided["official"] = True  # the released code guides away from class 0
    runs = {"greedy_nocfg": condition, "greedy_cfg": guided, "greedy_cfg_prefix": guided}
    for name, inputs in runs.items():
        if name not in golden:
            continue
        n = golden[name].shape[1]
        output = model.generate(**inputs, max_new_tokens=n, output_logits=True, **options)
        ids = output.sequences[:, 1:]
        golden.check(name, ids)
        if name == "greedy_cfg":
            chosen = torch.stack(output.logits, dim=1).log_softmax(dim=-1).gather(2, ids[:, :, None])
            golden.check("greedy_cfg_logprob", chosen.sum(dim=1), FLOATS)


def check_filters(golden: Golden, model: FlexTokARModel, condition: dict[str, Tensor]) -> None:
    """The distribution that `generate` draws from, when the model gives the stored logits."""
    raw = golden.get("filter_logits")
    if raw is None:
        return
    rows = {name: value[:1].repeat_interleave(len(raw), dim=0) for name, value in condition.items()}
    handle = model.head.register_forward_hook(lambda *_: raw)
    for name in golden._tensors:
        if name.startswith("filter_probs"):
            options = filters(golden, name)
            output = model.generate(
                **rows,
                do_sample=True,
                max_new_tokens=1,
                **{"top_k": 0, "top_p": 1.0, **options},
                output_scores=True,
                return_dict_in_generate=True,
            )
            golden.check(name, output.scores[0].softmax(dim=-1), FLOATS)
    handle.remove()


def filters(golden: Golden, name: str) -> dict[str, Any]:
    """Options of a filtered distribution, from the manifest's words, or from its name (k9p06t07)."""
    words = golden.case.manifest.get("tensor_meaning", {}).get(name, "")
    found: dict[str, Any] = {}
    for option, kind in (("top_k", int), ("top_p", float), ("temperature", float)):
        stated = re.search(rf"{option}[ =]*([\d.]*\d)", words)
        if stated:
            found[option] = kind(stated[1])
    if not found:
        for letter, digits in re.findall(r"([kpt])(\d+)", name.removeprefix("filter_probs_")):
            option = {"k": "top_k", "p": "top_p", "t": "temperature"}[letter]
            found[option] = int(digits) if letter == "k" else float(f"{digits[0]}.{digits[1:] or 0}")
    assert found, f"no options known for {name}"
    return found


@pytest.mark.parametrize("name", ["filter_probs_k5", "filter_probs_p08", "filter_probs_k9p06t07"])
def test_names_and_words_tell_the_same_options(name: str) -> None:
    case = golden_cases()[0]
    golden = Golden(case)
    stated = filters(golden, name)
    bare = Golden(Case(case.name, case.entry, {**case.manifest, "tensor_meaning": {}}, case.folder))
    assert filters(bare, name) == stated


def golden_cases() -> list[Case]:
    folders = [ROOT / "tests" / "golden" / METHOD, ROOT.parent / "shared" / "golden" / METHOD]
    return read_manifest(next(folder for folder in folders if folder.is_dir()) / "manifest.json")


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_every_output_tensor_is_compared(case: Case, tmp_path: Path) -> None:
    """Each output spoilt in its last place makes the case fail."""
    inputs = ("class_ids", "text_emb", "text_mask", "tokens", "filter_logits")
    outputs = [name for name in case.load() if name not in inputs and not name.startswith("models.")]
    assert len(outputs) >= 8
    for name in outputs:
        golden = Golden(case)
        last = golden._tensors[name].view(-1)[-1:]
        last += 0.02 if last.is_floating_point() else 1 - 2 * last.clamp_max(1)
        with pytest.raises(AssertionError):
            test_case(golden, tmp_path)
