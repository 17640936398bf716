"""Backbones as timm models: importing this package registers those of every family, if timm is installed."""

from __future__ import annotations

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "timm":  # timm is there, and something that it needs is not
        raise
else:
    from tokred.vision.backbones import dualtoken_vit, lookup_vit, strip_mlp

    __all__ = ["dualtoken_vit", "lookup_vit", "strip_mlp"]
