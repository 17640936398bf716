"""Multiply-adds against torch's own counter, without weights, and against what the papers print."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokred
from tokred.core.errors import InvalidParameterError, UnsupportedModelError
from tokred.eval.flops_table import REPORTED, flops_rows, flops_table


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_base_patch16_siglip_224",
    ],
)
@pytest.mark.parametrize("method", [None, tokred.ToMe(r=8), tokred.RandomTokens(keep_rate=0.6)], ids=repr)
def test_equals_the_counter_of_torch(name, method):
    """Counted while the model runs; fused attention is counted by its two products, as here."""
    with torch.device("meta"):
        model = timm.create_model(name).eval().requires_grad_(False)
        x = torch.empty(1, 3, *model.patch_embed.img_size)
    patch = tokred.patch(model, method) if method is not None else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    ours = tokred.flops(model)
    matching = 0 if method is None or method.name != "tome" else ours.scoring
    assert 2 * (ours.vision + matching) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    if patch is None:
        assert ours.scoring == 0
        assert ours.total == ours.unreduced


def test_a_patched_model_a_meta_model_a_name_and_a_config_agree():
    from transformers import ViTConfig

    method = tokred.TopK()
    by_name = tokred.flops("vit_base_patch16_224", method=method)
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert tokred.flops(model, method=method) == by_name
    with tokred.patch(model, method):
        assert tokred.flops(model) == by_name
        assert tokred.flops(torch.nn.Sequential(model)) == by_name
    config = tokred.flops(ViTConfig(), method=method)
    assert config.blocks == by_name.blocks
    assert json.loads(json.dumps(by_name.to_dict()))["total"] == by_name.total
    assert "G multiply-adds" in str(by_name)


def test_image_sizes():
    square = tokred.flops("vit_tiny_patch16_224", 448)
    assert (
        square
        == tokred.flops("vit_tiny_patch16_224", (448, 448))
        == tokred.flops("vit_tiny_patch16_224", torch.empty(2, 3, 448, 448))
    )
    assert square.tokens[0] == (785, 785)


def test_bad_input():
    with pytest.raises(InvalidParameterError, match="did you mean 'vit_tiny_patch16_224'"):
        tokred.flops("vit_tiny_patch16_22")
    with pytest.raises(InvalidParameterError, match="multiple of the patch size"):
        tokred.flops("vit_tiny_patch16_224", 225)
    with pytest.raises(InvalidParameterError, match="expected a model"):
        tokred.flops(3)
    with pytest.raises(InvalidParameterError, match="inputs_or_sizes"):
        tokred.flops("vit_tiny_patch16_224", (1, 2, 3))
    with pytest.raises(UnsupportedModelError, match="no host serves"):
        tokred.flops(torch.nn.Linear(2, 2))


def test_within_one_percent_of_the_papers():
    rows = flops_rows("deit_small_patch16_224")
    assert rows[0]["gmacs"] == pytest.approx(4.6, rel=0.01)
    assert len(rows) == len(REPORTED) + 1
    for row in rows[1:]:
        # Zero-TPrune counts blocks and scoring, the others the whole model
        ours = row["blocks_gmacs"] if "ZeroTPrune" in row["method"] else row["gmacs"]
        assert ours == pytest.approx(row["paper_gmacs"], rel=0.01)
        if row["paper_saved"] is not None:
            assert row["blocks_saved"] == pytest.approx(row["paper_saved"], abs=0.01)
    text = flops_table("deit_small_patch16_224", rows)
    assert "34.7%" in text
    assert "paper says" in text
