"""`encode`: the visual part of a prompt, reduced, without running the language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokred.core.encoded import Encoded
from tokred.core.patch import patch

__all__ = ["encode"]


def encode(model: nn.Module, inputs: Mapping[str, Any], method: object, **options: Any) -> Encoded:
    """Run vision encoder, projector and reduction of a multimodal model, and stop before its language model.

    Any method that acts before the language model works, and none that acts inside it. The result goes into
    ``model.generate(**encoded.inputs())`` of the same model without a patch, or, item by item
    (``encoded.images[i][None]``, (1, K, D)), into a serving engine that takes embeddings: vLLM sizes its placeholders
    from K (``LLM(..., enable_mm_embeds=True)``, ``multi_modal_data={"image": embeds}``).

    Args:
        model: as `tokred.patch` takes it; it is left as it was. inputs: what its processor returned.
        method: as `tokred.patch` takes it. **options: of `tokred.patch`, e.g. ``processor=``; or ``query=``,
            ``frames=``, ``frame_scores=`` of `Patch.request`.

    Raises:
        RequestError: there is nothing to encode.
        UnsupportedModelError: embeddings alone cannot carry the prompt (Qwen3-VL), or no host. And what `tokred.patch`
            raises.
    """
    given = {name: options.pop(name) for name in ("query", "frames", "frame_scores") if name in options}
    with patch(model, method, **options) as made:
        if given:
            with made.request(**given):
                return made.encode(inputs)
        return made.encode(inputs)
