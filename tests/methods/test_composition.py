"""Several methods on one model: equal to the steps by hand, undone without a trace, and what does not go together."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from torch import nn

import tokred
from tests.matrix.test_vlm import fingerprint, greedy
from tests.matrix.vlm_models import FAMILIES
from tokred.core.errors import ConflictError

LLAVA = FAMILIES["llava"]
PROMPT = [[2, LLAVA.parts()[0], 3], [1, LLAVA.parts()[0], 2, LLAVA.parts()[0], 4]]


def deep() -> nn.Module:
    """The tiny LLaVA with five layers in its language model."""
    small = LLAVA.make("sdpa")
    config = copy.deepcopy(small.config)
    config.text_config.num_hidden_layers = 5
    torch.manual_seed(0)
    model = type(small)(config).eval()
    model.generation_config = small.generation_config
    return model


def made() -> dict[str, tokred.Method]:
    """One of each method, in settings that a tiny model has the layers for."""
    return {
        "ToMe": tokred.ToMe(r=2),
        "TopK": tokred.TopK(keep_rate=0.8, layers=(1,)),
        "HiRED": tokred.HiRED(budget=0.5),
        "VisionZip": tokred.VisionZip(budget=8),
        "MustDrop": tokred.MustDrop(preset=64, pruning_layers=(0,), window=(2, 2)),
        "MustDrop decode": tokred.MustDrop(stages=("decode",), pruning_layers=(0,)),
        "CoreMatching": tokred.CoreMatching(prune_layer=0, beta=0.5),
        "CoreMatching FFN": tokred.CoreMatching(prune_layer=0, keep_tokens=1.0, beta=0.5),
        "GemFilter": tokred.GemFilter(k=12, layer=1),
        "FastV": tokred.FastV(layer=1, keep_rate=0.5),
        "DART": tokred.DART(layer=2, budget=6),
        "SparseVLM": tokred.SparseVLM(stages=(0,), counts=(6,)),
        "PyramidDrop": tokred.PyramidDrop(stages=(2,), keep_rates=(0.5,)),
    }


#: pairs that cannot share a model in the settings above, and the part of the message that says why
FORBIDDEN = {
    ("ToMe", "TopK"): "block 1",
    ("ToMe", "MustDrop"): "ToMe and MustDrop, vision encoder both act in block 0",
    ("HiRED", "VisionZip"): "choose the visual tokens",
    ("HiRED", "MustDrop"): "choose the visual tokens",
    ("VisionZip", "MustDrop"): "choose the visual tokens",
    ("MustDrop", "MustDrop decode"): "rewrite the KV cache",
    ("MustDrop", "CoreMatching"): "before layer 1",
    ("MustDrop", "FastV"): "before layer 1",
    ("MustDrop", "SparseVLM"): "before layer 1",
    ("MustDrop decode", "CoreMatching"): "rewrite the KV cache",
    ("CoreMatching", "CoreMatching FFN"): "choose the neurons",
    ("CoreMatching", "FastV"): "before layer 1",
    ("CoreMatching", "SparseVLM"): "before layer 1",
    ("FastV", "SparseVLM"): "before layer 1",
    ("DART", "PyramidDrop"): "before layer 2",
}


def test_table_of_forbidden_pairs(capsys):
    """Every pair either runs, or is refused by name; the table is printed."""
    model, methods = deep(), made()
    found: dict[tuple[str, str], str] = {}
    prompt = LLAVA.inputs(PROMPT)
    greedy(model, prompt.inputs, steps=2)  # the library's own lazy hooks are there by now
    for one, two in itertools.combinations(methods, 2):
        before = fingerprint(model)
        try:
            with tokred.patch(model, [methods[two], methods[one]]):
                greedy(model, prompt.inputs, steps=2)
        except ConflictError as error:
            found[one, two] = str(error)
        assert fingerprint(model) == before, (one, two)
    with capsys.disabled():
        print("\npairs that cannot share a model:")
        for (one, two), reason in found.items():
            print(f"  {one} + {two}: {reason}")
    assert set(found) == set(FORBIDDEN)
    for pair, reason in found.items():
        assert re.search(FORBIDDEN[pair], reason), (pair, reason)


def rows_equal(model, methods, prompt) -> None:
    """A batch is each of its rows alone."""
    with tokred.patch(model, methods):
        batch = greedy(model, prompt.inputs)
        for row in range(len(prompt.rows)):
            alone = greedy(model, prompt.single(row).inputs)
            assert torch.equal(batch.sequences[row, -4:], alone.sequences[0, -4:])
            for a, b in zip(batch.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "names",
    [
        ("ToMe", "HiRED", "FastV", "MustDrop decode"),
        ("HiRED", "GemFilter"),
        ("HiRED", "CoreMatching FFN"),
        ("ToMe", "HiRED", "GemFilter", "FastV", "PyramidDrop", "MustDrop decode"),
        ("VisionZip", "FastV", "DART"),
    ],
    ids="+".join,
)
def test_many_at_once(names):
    model, methods = deep(), made()
    prompt = LLAVA.inputs(PROMPT)
    plain, before = greedy(model, prompt.inputs), fingerprint(model)
    chosen = [methods[name] for name in names]
    rows_equal(model, chosen, prompt)
    with tokred.patch(model, chosen[::-1]) as patch:  # the order is the pipeline's, not the list's
        turned = greedy(model, prompt.inputs)
        trace = patch.trace
    with tokred.patch(model, chosen):
        straight = greedy(model, prompt.inputs)
    assert torch.equal(turned.sequences, straight.sequences)
    assert len(trace.media) == 3
    assert fingerprint(model) == before
    after = greedy(model, prompt.inputs)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True))


def test_keeping_everything_is_bit_identical():
    model, prompt = deep(), LLAVA.inputs(PROMPT)
    plain = greedy(model, prompt.inputs)
    everything = [
        tokred.ToMe(r=0),
        tokred.HiRED(budget=1.0),
        tokred.GemFilter(k=10_000, layer=1),
        tokred.FastV(layer=1, keep_rate=1.0),
        tokred.MustDrop(preset=None, stages=("prefill", "decode")),
    ]
    with tokred.patch(model, everything):
        out = greedy(model, prompt.inputs)
    assert torch.equal(out.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))


def test_gemfilter_after_hired_by_hand():
    """It sees the reduced prompt, its choice maps to columns of the caller's, and the model reads just these."""
    model = deep()
    prompt = LLAVA.inputs(PROMPT[:1])
    ids = prompt.inputs["input_ids"]
    hired, gem = tokred.HiRED(budget=0.5), tokred.GemFilter(k=9, layer=1)
    with tokred.patch(model, [gem, hired]) as patch:
        out = greedy(model, prompt.inputs)
        trace = patch.trace
    media, step = trace.media[0], trace.prompt[0]
    image = (ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    after_hired = sorted([c for c in range(ids.shape[1]) if c not in image] + [image[t] for t in media.cells.tolist()])
    assert set(step.kept[0]) <= set(after_hired)
    assert len(step.kept[0]) == 9
    assert step.tokens_in == (len(after_hired),)
    embeds = capture_embeddings(model, prompt.inputs)[:, list(step.kept[0])]
    by_hand = greedy(model, {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 9, dtype=torch.long)})
    assert torch.equal(out.sequences[:, -4:], by_hand.sequences[:, -4:])
    torch.testing.assert_close(torch.cat(out.logits), torch.cat(by_hand.logits), atol=2e-5, rtol=0)


def capture_embeddings(model, inputs) -> torch.Tensor:
    """(1, S, D): what enters the language model of the unpatched model."""
    box: dict[str, torch.Tensor] = {}
    language = model.model.language_model
    handle = language.register_forward_pre_hook(
        lambda module, args, kwargs: box.update(x=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return box["x"]


def test_carry_hands_each_merged_token_on_once():
    """`exit="carry"`: the language model reads the tokens that the tower is left with, not copies of them."""
    model = deep()
    prompt = LLAVA.inputs(PROMPT[:1])
    with tokred.patch(model, tokred.ToMe(r=2), exit="carry") as patch:
        out = greedy(model, prompt.inputs)
        trace = patch.trace
    left = trace.encoder[-1].tokens_out
    assert 0 < left < trace.encoder[0].tokens_in
    assert trace.media[0].tokens_out == left
    assert sorted(trace.media[0].cells.tolist()) == sorted(trace.encoder[-1].origins[0].tolist())
    with tokred.patch(model, tokred.ToMe(r=2), exit="restore"):
        copies = greedy(model, prompt.inputs)
    assert not torch.equal(out.logits[0], copies.logits[0])


def test_a_tower_that_cannot_be_entered_is_named():
    model = FAMILIES["qwen2_5_vl"].make("sdpa")
    before = fingerprint(model)
    with pytest.raises(tokred.TokredError, match=r"vision tower.*stages"):
        tokred.patch(model, tokred.MustDrop(pruning_layers=(0,)))
    assert fingerprint(model) == before
