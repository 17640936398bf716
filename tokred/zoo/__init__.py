"""Small trained models that ship with the package, so that accuracy against token budget can be measured offline.

::

    model = tokred.zoo.load("digit-vit")      # a timm VisionTransformer, eval, float32
    tokred.zoo.card("digit-vit")["accuracy"]  # how it was made and what it scores
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokred.zoo.digit_vit import DATA_CONFIG as DIGIT_VIT_DATA_CONFIG
from tokred.zoo.digit_vit import digit_vit, digit_vit_card

if TYPE_CHECKING:
    from torch import nn

_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "digit-vit": (digit_vit, digit_vit_card),
}

__all__ = ["DIGIT_VIT_DATA_CONFIG", "card", "digit_vit", "load", "names"]


def names() -> list[str]:
    """Names that ``load`` and ``card`` take."""
    return sorted(_MODELS)


def _entry(name: str) -> tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]:
    if name not in _MODELS:
        raise ValueError(f"no bundled model is called {name!r}; there are: {', '.join(names())}")
    return _MODELS[name]


def load(name: str) -> nn.Module:
    """A bundled model with its weights, in eval mode and float32, without a network. ``ValueError``: unknown name."""
    return _entry(name)[0]()


def card(name: str) -> dict[str, Any]:
    """The model's card: architecture, training, data and licences, held-out accuracy. ``ValueError``: unknown name."""
    return _entry(name)[1]()
