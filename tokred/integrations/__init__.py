"""tokred inside other tools. A module here imports its tool, and is imported by that tool alone."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["NAME", "lmms_eval_manifests"]

#: the model of lmms-eval that runs under a method: ``--model tokred_hf``
NAME = "tokred_hf"


def lmms_eval_manifests() -> list[Any]:
    """What lmms-eval's registry takes: the entry point of the group ``lmms_eval.models``, called by lmms-eval."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return [registry.ModelManifest(model_id=NAME, chat_class_path="tokred.integrations.lmms_eval.TokredHF")]
