"""Methods for vision encoders, and backbones that are timm models.

The methods hold the equations of one paper a file, on `tokred.core` and `tokred.ops` alone. The backbones need timm:
`strip_mlp_*`, `lookup_vit_*` and `dualtoken_vit_*` are registered with it as soon as both this package and timm are
imported, in whatever order, and `to_lookup_vit`, `remove_lookup_vit` and `MultiResSampler` load with them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tokred.vision._on_timm import register_with_timm

_BACKBONES = {
    "MultiResSampler": "tokred.vision.backbones.lookup_vit",
    "load_strip_mlp_checkpoint": "tokred.vision.backbones.strip_mlp_checkpoint",
    "remove_lookup_vit": "tokred.vision.backbones.lookup_convert",
    "to_lookup_vit": "tokred.vision.backbones.lookup_convert",
}

__all__ = [*_BACKBONES]


def __getattr__(name: str) -> Any:
    if name not in _BACKBONES:
        raise AttributeError(f"module 'tokred.vision' has no attribute {name!r}")
    value = getattr(importlib.import_module(_BACKBONES[name]), name)
    globals()[name] = value
    return value


if "timm" in sys.modules:
    importlib.import_module("tokred.vision.backbones")
else:
    register_with_timm("tokred.vision.backbones")
