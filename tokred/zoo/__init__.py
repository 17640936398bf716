"""Small trained models that ship with the package, so that accuracy against token budget can be measured offline.

::

    model = tokred.zoo.load("digit-vit")                     # a timm VisionTransformer
    model, processor = tokred.zoo.load("digit-vlm")          # a LLaVA; "digit-video-vlm": LLaVA-NeXT-Video
    model, preprocess, tokenizer = tokred.zoo.load("digit-clip")  # an open_clip CLIP
    model, tokenizer = tokred.zoo.load("needle-llm")         # a Llama
    model = tokred.zoo.load("digit-lookup-vit")              # "digit-strip-mlp", "digit-dualtoken-vit": backbones
    tokenizer = tokred.zoo.load("tiny-flextok")              # also tiny-textok, tiny-tokenflow, tiny-vq
    tokred.zoo.card("digit-vit")["accuracy"]                 # how it was made and what it scores
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokred.zoo.digit_backbones import BACKBONES, digit_backbone, digit_backbone_card
from tokred.zoo.digit_clip import digit_clip, digit_clip_card
from tokred.zoo.digit_vit import DATA_CONFIG as DIGIT_VIT_DATA_CONFIG
from tokred.zoo.digit_vit import digit_vit, digit_vit_card
from tokred.zoo.digit_vlm import answer_text, digit_video_vlm, digit_vlm, digit_vlm_card, question_prompt
from tokred.zoo.needle_llm import needle_llm, needle_llm_card
from tokred.zoo.tokenizers import (
    TOKENIZERS,
    tiny_flextok,
    tiny_flextok_ar,
    tiny_shuffle,
    tiny_textok,
    tiny_textok_grid,
    tiny_textok_no_text,
    tiny_tokenflow,
    tiny_tokenflow_qa,
    tiny_vq,
    tokenizer_card,
)

_TOKENIZERS: tuple[Callable[[], Any], ...] = (
    tiny_flextok,
    tiny_flextok_ar,
    tiny_textok,
    tiny_textok_no_text,
    tiny_textok_grid,
    tiny_tokenflow,
    *(partial(tiny_tokenflow_qa, features) for features in ("both", "semantic", "pixel")),
    tiny_vq,
    *(partial(tiny_shuffle, window) for window in (1, 2, 4)),
)
_MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "digit-clip": (digit_clip, digit_clip_card),
    "digit-video-vlm": (digit_video_vlm, digit_vlm_card),
    "digit-vit": (digit_vit, digit_vit_card),
    "digit-vlm": (digit_vlm, digit_vlm_card),
    "needle-llm": (needle_llm, needle_llm_card),
    **{name: (partial(digit_backbone, name), partial(digit_backbone_card, name)) for name in BACKBONES},
    **{name: (load, partial(tokenizer_card, name)) for name, load in zip(TOKENIZERS, _TOKENIZERS, strict=True)},
}

__all__ = [
    "DIGIT_VIT_DATA_CONFIG",
    "answer_text",
    "card",
    "digit_backbone",
    "digit_clip",
    "digit_video_vlm",
    "digit_vit",
    "digit_vlm",
    "load",
    "names",
    "needle_llm",
    "question_prompt",
    "tiny_flextok",
    "tiny_flextok_ar",
    "tiny_shuffle",
    "tiny_textok",
    "tiny_textok_grid",
    "tiny_textok_no_text",
    "tiny_tokenflow",
    "tiny_tokenflow_qa",
    "tiny_vq",
]


def names() -> list[str]:
    """Names that ``load`` and ``card`` take."""
    return sorted(_MODELS)


def _entry(name: str) -> tuple[Callable[[], Any], Callable[[], dict[str, Any]]]:
    if name not in _MODELS:
        raise ValueError(f"no bundled model is called {name!r}; there are: {', '.join(names())}")
    return _MODELS[name]


def load(name: str) -> Any:
    """A bundled model with its weights, in eval mode and float32, without a network. ``ValueError``: unknown name.

    Returns what the function of that name returns: ``"digit-vit"`` the model; ``"digit-vlm"`` and
    ``"digit-video-vlm"`` (two forms of the same weights) the model and its processor; ``"digit-clip"`` the model, its
    image transform and its tokenizer; ``"needle-llm"`` the model and its tokenizer; the backbones, tokenizers and
    generators the model.
    """
    return _entry(name)[0]()


def card(name: str) -> dict[str, Any]:
    """The model's card: architecture, training, data and licences, held-out accuracy. ``ValueError``: unknown name."""
    return _entry(name)[1]()
