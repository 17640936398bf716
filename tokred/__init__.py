"""tokred: token reduction for vision and multimodal models.

    import tokred
    patch = tokred.patch(model, tokred.ToMe(r=8))   # any use of the model from here on is reduced
    model(x)
    patch.trace                                     # what the last forward kept
    patch.remove()

Public names load on first use: ``import tokred`` loads torch and no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: methods that ship with tokred: class name -> module (a new method adds one line here)
_METHODS = {
    "ToMe": "tokred.vision.tome",
    "TopK": "tokred.vision.topk",
    "ZeroTPrune": "tokred.vision.zero_tprune",
    "RandomTokens": "tokred.vision.random_tokens",
    "ToMeSD": "tokred.vision.tome_sd",
    "ToDo": "tokred.vision.todo",
    "HiRED": "tokred.vlm.hired",
    "VisionZip": "tokred.vlm.visionzip",
    "DivPrune": "tokred.vlm.divprune",
    "CDPruner": "tokred.vlm.cdpruner",
    "VisPruner": "tokred.vlm.vispruner",
    "EVS": "tokred.vlm.evs",
    "QuoTA": "tokred.vlm.quota",
    "MustDrop": "tokred.vlm.mustdrop",
    "CoreMatching": "tokred.vlm.corematching",
    "GemFilter": "tokred.vlm.gemfilter",
    "FastV": "tokred.vlm.fastv",
    "PyramidDrop": "tokred.vlm.pyramiddrop",
    "DART": "tokred.vlm.dart",
    "SparseVLM": "tokred.vlm.sparsevlm",
}

_NAMES = {
    **_METHODS,
    "ClipRelevance": "tokred.adapters.scorers",
    "HFClipScorer": "tokred.adapters.scorers",
    "LVLMScorer": "tokred.adapters.scorers",
    "OpenClipScorer": "tokred.adapters.scorers",
    "LVLMDecoupler": "tokred.vlm.decouple",
    "Keep": "tokred.core.tokens",
    "Merge": "tokred.core.tokens",
    "Method": "tokred.core.method",
    "Patch": "tokred.core.patch",
    "Trace": "tokred.core.trace",
    "TokredError": "tokred.core.errors",
    "flops": "tokred.core.flops",
    "from_dict": "tokred.core.method",
    "hosts": "tokred.core.catalog",
    "methods": "tokred.core.catalog",
    "patch": "tokred.core.patch",
    "unpatch": "tokred.core.patch",
}

_MODULES = ("ops", "vision", "vlm", "generation", "zoo", "data")

__all__ = [*_NAMES, "__version__", *_MODULES]

if TYPE_CHECKING:
    from tokred import data as data
    from tokred import generation as generation
    from tokred import ops as ops
    from tokred import vision as vision
    from tokred import vlm as vlm
    from tokred import zoo as zoo
    from tokred.adapters.scorers import ClipRelevance as ClipRelevance
    from tokred.adapters.scorers import HFClipScorer as HFClipScorer
    from tokred.adapters.scorers import LVLMScorer as LVLMScorer
    from tokred.adapters.scorers import OpenClipScorer as OpenClipScorer
    from tokred.core.catalog import hosts as hosts
    from tokred.core.catalog import methods as methods
    from tokred.core.errors import TokredError as TokredError
    from tokred.core.flops import flops as flops
    from tokred.core.method import Method as Method
    from tokred.core.method import from_dict as from_dict
    from tokred.core.patch import Patch as Patch
    from tokred.core.patch import patch as patch
    from tokred.core.patch import unpatch as unpatch
    from tokred.core.tokens import Keep as Keep
    from tokred.core.tokens import Merge as Merge
    from tokred.core.trace import Trace as Trace
    from tokred.vision.random_tokens import RandomTokens as RandomTokens
    from tokred.vision.todo import ToDo as ToDo
    from tokred.vision.tome import ToMe as ToMe
    from tokred.vision.tome_sd import ToMeSD as ToMeSD
    from tokred.vision.topk import TopK as TopK
    from tokred.vision.zero_tprune import ZeroTPrune as ZeroTPrune
    from tokred.vlm.cdpruner import CDPruner as CDPruner
    from tokred.vlm.corematching import CoreMatching as CoreMatching
    from tokred.vlm.dart import DART as DART
    from tokred.vlm.decouple import LVLMDecoupler as LVLMDecoupler
    from tokred.vlm.divprune import DivPrune as DivPrune
    from tokred.vlm.evs import EVS as EVS
    from tokred.vlm.fastv import FastV as FastV
    from tokred.vlm.gemfilter import GemFilter as GemFilter
    from tokred.vlm.hired import HiRED as HiRED
    from tokred.vlm.mustdrop import MustDrop as MustDrop
    from tokred.vlm.pyramiddrop import PyramidDrop as PyramidDrop
    from tokred.vlm.quota import QuoTA as QuoTA
    from tokred.vlm.sparsevlm import SparseVLM as SparseVLM
    from tokred.vlm.visionzip import VisionZip as VisionZip
    from tokred.vlm.vispruner import VisPruner as VisPruner


def load_methods() -> None:
    """Import every method that ships with tokred, which registers it."""
    for module in _METHODS.values():
        importlib.import_module(module)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"tokred.{name}")
    else:
        raise AttributeError(f"module 'tokred' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
