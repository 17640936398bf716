"""TopK against EViT's released code: kept sets, class attention, tokens and logits of whole models."""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tests.parity._golden import Golden, block_outputs, recorded, timm_model

METHOD = "topk_cls"

OPTIONS = ("kind", "cfg", "keep_rate", "drop_loc", "base_keep_rate", "fuse_token", "B", "state_dict_prefix")


def test_case(golden: Golden) -> None:
    golden.known(OPTIONS)
    model, images = timm_model(golden, golden.entry.get("kind")), golden["input"]
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    rates = keep_rates(golden, depth)
    fuse = golden.entry.get("fuse_token", False)
    golden.check("out.logits_unpatched", lambda: model(images))
    layers = [layer for layer, rate in enumerate(rates) if rate < 1]
    method = tokred.TopK(keep_rate=[rates[layer] for layer in layers] or 1.0, layers=layers or [0], fuse=fuse)

    with torch.no_grad(), block_outputs(model) as outputs, recorded(tokred.TopK) as log:
        patch = tokred.patch(model, method)
        logits = model(images)
    golden.check("out.logits", logits)
    # The released code keeps tokens in descending order of attention, ours in ascending position. Every token has a
    # name (its patch, or the block that fused it), by which its row here is found.
    total = log[min(log)].view.table.total if log else outputs[0].shape[1] - prefix
    names = torch.arange(total).expand(images.shape[0], -1)  # in the released order
    ours = names
    for layer in range(depth):
        if layer in log:
            golden.check(f"out.cls_attn.{layer}", reorder(log[layer].view.class_attention().mean(dim=1), ours, names))
            names, ours = after_block(golden, layer, names, ours, log[layer].change, total + layer)
        tokens = outputs[layer]
        patches = reorder(tokens[:, prefix:], ours, names)
        golden.check(f"out.tokens_after_block.{layer}", torch.cat([tokens[:, :prefix], patches], dim=1))
    origins = patch.trace[-1].origins if len(patch.trace) else None
    if origins is not None and not fuse:
        assert torch.equal(origins, ours)
    golden.finish()


def keep_rates(golden: Golden, depth: int) -> list[float]:
    """One rate a block. `keep_rate` is a list with one entry a block (or one for all), or a number for `drop_loc`."""
    rate = golden.entry.get("keep_rate", golden.entry.get("base_keep_rate", 0.7))
    if isinstance(rate, list):
        assert "drop_loc" not in golden.entry, "keep_rate as a list says where, and drop_loc does too"
        rates = rate * depth if len(rate) == 1 else rate
        assert len(rates) == depth, f"keep_rate has {len(rates)} entries for {depth} blocks"
        return rates
    layers = golden.entry.get("drop_loc", [layer for layer in (3, 6, 9) if layer < depth])
    return [rate if layer in layers else 1 for layer in range(depth)]


def after_block(
    golden: Golden, layer: int, names: Tensor, ours: Tensor, change: object, fused: int
) -> tuple[Tensor, Tensor]:
    """The names of the tokens that leave the block, in the released order and in ours."""
    if isinstance(change, tokred.Keep):
        kept = change.indices
    else:
        assert isinstance(change, tokred.Merge)
        kept = change.representative[:, :-1]  # the last slot is the fused token
    ours_kept = ours.gather(1, kept)
    names_kept = ours_kept
    index = golden.get(f"out.idx.{layer}")
    if index is not None:
        names_kept = names.gather(1, index)
        golden.check_sets(f"out.idx.{layer}", positions(ours_kept, names))
    if isinstance(change, tokred.Merge):
        extra = names.new_full((len(names), 1), fused)
        return torch.cat([names_kept, extra], dim=1), torch.cat([ours_kept, extra], dim=1)
    return names_kept, ours_kept


def positions(wanted: Tensor, names: Tensor) -> Tensor:
    """(B, K): where each of the wanted names stands in `names` (B, n)."""
    return (wanted[:, :, None] == names[:, None]).int().argmax(dim=2)


def reorder(values: Tensor, have: Tensor, want: Tensor) -> Tensor:
    """Rows of `values` (B, n, ...), named `have`, in the order `want`; if the names differ, as they are."""
    if not torch.equal(have.sort(dim=1).values, want.sort(dim=1).values):
        return values
    index = positions(want, have)
    return values[torch.arange(len(values))[:, None], index]
