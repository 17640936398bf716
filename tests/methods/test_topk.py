"""TopK (EViT's rule): kept sets, the fused token and masking equivalence on small timm models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.methods import oracles
from tests.methods.models import KINDS, images, tiny
from tests.parity._golden import block_outputs, recorded
from tokred import ops

WITH_CLASS = [kind for kind in KINDS if kind != "no class token"]
each_kind = pytest.mark.parametrize("kind", WITH_CLASS)


def run(model: Any, method: Any, x: Tensor) -> tuple[Tensor, tokred.Trace]:
    with tokred.patch(model, method) as patch, torch.no_grad():
        return model(x), patch.trace


@each_kind
@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_equals_its_slow_definition(kind: str, fuse: bool) -> None:
    model, x, rates = tiny(kind), images(), {0: 0.9, 2: 0.55}
    prefix = model.num_prefix_tokens
    method = tokred.TopK(keep_rate=list(rates.values()), layers=tuple(rates), fuse=fuse)
    with block_outputs(model) as outputs:
        logits, trace = run(model, method, x)
    kept: list[list[int]] = []

    def drop(block: oracles.Block) -> tuple[Tensor, list[float]] | None:
        if block.layer not in rates:
            return None
        scores = block.attention[:, 0, prefix:].mean(0).tolist()
        k = math.ceil(rates[block.layer] * len(scores))
        top = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]
        kept.append(sorted(top))
        rows = [*range(prefix), *(j + prefix for j in sorted(top))]
        y = block.x[rows]
        if fuse:
            rest = [j for j in range(len(scores)) if j not in top]
            y = torch.cat([y, sum(scores[j] * block.x[prefix + j] for j in rest)[None]])
        return y, [1.0] * len(y)

    exact = copy.deepcopy(model).double()
    for b in range(len(x)):
        kept.clear()
        with torch.no_grad():
            want, normed, _ = oracles.slow_vit(exact, x[b], after_attention=drop)
            head = exact.forward_head(normed[None])
        assert trace[0].origins[b, : len(kept[0])].tolist() == kept[0]
        assert [step.tokens_out for step in trace] == [len(k) + fuse for k in kept]
        for layer in range(4):
            torch.testing.assert_close(outputs[layer][b].double(), want[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[b].double(), head[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mass_score_is_the_attention_received_from_all(kind: str) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    with recorded(tokred.TopK) as log:
        run(model, tokred.TopK(keep_rate=0.4, layers=(2,), score="mass"), x)
    view = log[2].view
    logits = view.queries() @ view.keys().transpose(2, 3) / math.sqrt(16)
    mass = logits.softmax(-1).mean(1).sum(1)[:, prefix:]
    assert torch.equal(log[2].change.indices, ops.top_indices(mass, 10))


@each_kind
def test_pruning_equals_masking_the_pruned_tokens_out_as_keys(kind: str) -> None:
    model, x = tiny(kind), images()
    prefix = model.num_prefix_tokens
    with block_outputs(model) as outputs:
        _, trace = run(model, tokred.TopK(keep_rate=0.7, layers=(0, 2)), x)
    with torch.no_grad():
        y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        mask = None
        for layer, block in enumerate(model.blocks):
            y = block(y, attn_mask=mask)
            for step in trace:
                if step.layer == layer:
                    seen = torch.zeros(2, prefix + 25, dtype=torch.bool)
                    seen[:, :prefix] = True
                    mask = seen.scatter(1, step.origins + prefix, True)[:, None, None]
    rows = torch.cat([torch.arange(prefix).expand(2, -1), trace[-1].origins + prefix], dim=1)
    torch.testing.assert_close(outputs[-1], ops.gather_tokens(y, rows), atol=1e-4, rtol=1e-4)


def test_kept_sets_do_not_depend_on_how_the_score_is_made() -> None:
    model, x = tiny(), images(3)
    for score in ("cls", "mass"):
        found = []
        for backend in ("recompute", "matrix"):
            with tokred.patch(model, tokred.TopK(0.6, (0, 2), score), score_backend=backend) as patch, torch.no_grad():
                found.append((model(x), patch.trace[-1].origins))
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
        assert torch.equal(found[0][1], found[1][1])


@each_kind
def test_a_batch_equals_its_images(kind: str) -> None:
    model, x = tiny(kind), images(3)
    for fuse in (False, True):
        method = tokred.TopK(keep_rate=0.6, layers=(1, 3), fuse=fuse)
        together, trace = run(model, method, x)
        for b in range(3):
            alone, own = run(model, method, x[b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)
            assert torch.equal(trace[-1].origins[b], own[-1].origins[0])


def test_keeping_everything_changes_no_bit() -> None:
    model, x = tiny(), images()
    want = model(x)
    for method in (tokred.TopK(keep_rate=1.0), tokred.TopK(keep_rate=[1.0, 1.0], layers=(0, 1), fuse=True)):
        got, trace = run(model, method, x)
        assert torch.equal(got, want)
        assert len(trace) == 0


def test_a_model_without_class_token_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no class token.*score='mass'"):
        tokred.patch(tiny("no class token"), tokred.TopK(layers=(1,)))


def test_scores_that_are_not_numbers_rank_last() -> None:
    model, x = tiny(), images()
    x[0, 0, 0, 0] = float("nan")
    for options in ({}, {"fuse": True}, {"score": "mass"}):
        method = tokred.TopK(keep_rate=0.5, layers=(1,), **options)
        got, trace = run(model, method, x)
        want, _ = run(model, method, x[1:])
        torch.testing.assert_close(got[1:], want, atol=1e-5, rtol=1e-5)
        assert (trace[0].origins[:, :13].diff(dim=1) > 0).all()
