"""Attention implementations of the kind of flash attention, whose masks have two dimensions or are none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextlib.contextmanager
def flash_stand_in(function: Callable[..., Any]) -> Iterator[str]:
    """The name under which `function` serves as attention inside the `with`."""
    AttentionInterface.register("flash_like", function)
    AttentionMaskInterface.register("flash_like", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    try:
        yield "flash_like"
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_like")
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("flash_like")
