"""Records of methods and hosts."""

from __future__ import annotations

import dataclasses
import json

import tokred
from tokred.core.catalog import compatibility
from tokred.core.method import registered


def test_a_record_lists_the_parameters_and_nothing_else():
    for record in tokred.methods():
        cls = registered()[record.name]
        assert list(record.parameters) == [field.name for field in dataclasses.fields(cls)]
        if "required" not in record.parameters.values():
            assert cls(**record.parameters) == cls()  # the defaults
        assert "name" not in record.parameters
        json.dumps(record.to_dict())


def test_every_encoder_method_fits_every_encoder_host():
    families = {record.family for record in tokred.hosts()}
    assert families >= {"timm", "open_clip", "transformers vision"}
    for name in ("tome", "topk", "zero_tprune", "random_tokens"):
        assert all(compatibility()[name][family] for family in families - {"transformers text", "diffusers"})
        assert not compatibility()[name]["transformers text"]
        assert not compatibility()[name].get("diffusers")
    for name in ("tome_sd", "todo"):
        assert {family for family in families if compatibility()[name][family]} == {"diffusers"} & families
    for name in ("gemfilter", "fastv", "corematching"):
        fitting = {family for family in families if compatibility()[name][family]}
        assert fitting == {"transformers text", "transformers multimodal"}
    for record in tokred.hosts():
        assert record.classes
        assert all(reason for reason in record.refusals.values())
        json.dumps(record.to_dict())
