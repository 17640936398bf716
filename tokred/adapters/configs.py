"""Models from configs and from timm's names, for `tokred.flops`: built on the meta device, they need no weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred.core.errors import InvalidParameterError, nearest

__all__ = ["model_from_config", "model_from_name"]


def model_from_name(name: str) -> nn.Module:
    """Return a timm architecture by its name."""
    import timm

    if not timm.is_model(name):
        raise InvalidParameterError(f"timm has no architecture {name!r}{nearest(name, timm.list_models())}")
    return timm.create_model(name)


def model_from_config(config: Any) -> nn.Module:
    """Return the model that `config` describes; a composite config (CLIP, SigLIP) gives the model with its towers.

    A config whose ``architectures`` name an image classifier gives that classifier, so that its head is counted.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    names = getattr(config, "architectures", None) or ()
    classifier = any("ForImageClassification" in name for name in names)
    return (AutoModelForImageClassification if classifier else AutoModel).from_config(config)
