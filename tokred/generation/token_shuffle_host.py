"""What Token-Shuffle needs of a causal language model of transformers, and the checks that it is there."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokred.core.errors import UnsupportedModelError
from tokred.generation.token_shuffle_ops import rotate_grid

__all__ = ["check_head", "check_hooks", "check_rotary", "positions_of", "takes", "turn_grids"]

HOOKS = ("get_input_embeddings", "get_output_embeddings", "get_decoder")
INPUTS = ("inputs_embeds", "attention_mask", "past_key_values", "use_cache")
TOLERANCE = 1e-3  # of logits, relative: what dtypes may differ by, and no scaling does


def check_hooks(base: Any) -> None:
    """Raise `UnsupportedModelError` unless a model has the parts that Token-Shuffle goes through."""
    name = type(base).__name__
    wanted = "expected a causal language model of transformers (AutoModelForCausalLM)"
    missing = [hook for hook in HOOKS if not callable(getattr(base, hook, None))]
    if missing or not hasattr(base, "config"):
        raise UnsupportedModelError(f"{name} has no {', '.join(missing or ['config'])}: {wanted}")
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder: {wanted}")
    for hook in HOOKS[:2]:
        if getattr(getattr(base, hook)(), "weight", None) is None:
            raise UnsupportedModelError(f"{name}.{hook}() gives no module with a weight: {wanted}")
    decoder = base.get_decoder()
    if decoder is None or decoder is base:
        raise UnsupportedModelError(f"{name}.get_decoder() gives no module below the head: {wanted}")
    lacking = [one for one in INPUTS if not takes(decoder, one)]
    if lacking:
        raise UnsupportedModelError(f"the decoder {type(decoder).__name__} takes no {', '.join(lacking)}: {wanted}")
    width, hidden = base.get_input_embeddings().weight.shape[1], base.config.get_text_config().hidden_size
    if width != hidden:
        raise UnsupportedModelError(f"the embeddings of {name} are {width} wide, its hidden states {hidden}")


@torch.no_grad()
def check_head(base: Any) -> None:
    """Raise unless the logits are the output embeddings on the decoder's last hidden state, and nothing more.

    Models that cap their logits say so; whether they scale them, one token shows.
    """
    if getattr(base.config, "final_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{type(base).__name__} caps its logits, which would be lost")
    table = base.get_input_embeddings().weight
    if table.is_meta:
        return
    ids, training = torch.zeros(1, 1, dtype=torch.int64, device=table.device), base.training
    base.eval()
    try:
        wanted = base(input_ids=ids, use_cache=False).logits
        found = base.get_decoder()(inputs_embeds=base.get_input_embeddings()(ids), use_cache=False).last_hidden_state
        found = base.get_output_embeddings()(found)
    finally:
        base.train(training)
    if float((found - wanted).abs().max()) > TOLERANCE * float(wanted.abs().max()):
        raise UnsupportedModelError(
            f"the logits of {type(base).__name__} are not get_output_embeddings() on the states of get_decoder(): it "
            "changes them elsewhere, which would be lost"
        )


def takes(module: Any, name: str) -> bool:
    """Whether the forward of a module has an argument of this name."""
    kind: Any = type(module)
    return name in _arguments(kind)


@cache
def _arguments(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def rotary_of(decoder: Any) -> Any:
    rotary = getattr(decoder, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or len(frequencies) % 2:
        raise UnsupportedModelError(
            f"position_mode='rope2d': {type(decoder).__name__} has no rotary_emb with one table of an even number of "
            "frequencies; expected a model such as Llama, or position_mode='1d'"
        )
    return rotary


def check_rotary(decoder: Any) -> None:
    """Raise unless 2-D positions can be given: one rotation for all layers, whose pairs lie half a head apart."""
    rotary = rotary_of(decoder)
    if rotary.inv_freq.is_meta:
        return
    place = torch.ones(1, 1, dtype=torch.int64, device=rotary.inv_freq.device)
    angles = rotary.inv_freq.float()
    found = rotary(torch.zeros(1, 1, 1, device=place.device), place)[0][0, 0]
    wanted = torch.cat([angles, angles]).cos() * getattr(rotary, "attention_scaling", 1.0)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, atol=1e-4):
        raise UnsupportedModelError(
            f"position_mode='rope2d': the pairs of {type(rotary).__name__} do not lie half a head apart; expected a "
            "model such as Llama, or position_mode='1d'"
        )


def turn_grids(decoder: Any) -> None:
    """Let pictures turn by row and column: see `tokred.generation.token_shuffle_ops.rotate_grid`."""
    rotary = rotary_of(decoder)
    if rotate_grid not in rotary._forward_hooks.values():
        rotary.register_forward_hook(rotate_grid)


def positions_of(mask: Tensor) -> Tensor:
    """Positions (B, L) that count the ones of a mask from 0; those of padding mean nothing."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
