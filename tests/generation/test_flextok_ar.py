"""FlexTok's generators: one pass against plain formulas, `generate` against recomputation, files, and the pipeline."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tokred.core.errors import InvalidParameterError, UnknownParameterError
from tokred.generation.flextok_ar import FlexTokARConfig, FlexTokARModel, position_table
from tokred.generation.flextok_ar_official import load_official, read_options, to_official
from tokred.generation.flextok_generate import FlexTokGenerationPipeline
from tokred.generation.tokenizer import ImageTokenizer

CODEBOOK, TOKENS, CLASSES, TEXT = 50, 9, 4, 12
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
SMALL |= {"codebook_size": CODEBOOK, "num_tokens": TOKENS, "initializer_range": 0.3}
CLASS = {"num_classes": CLASSES}
WITH_TEXT = {"num_classes": None, "text_dim": TEXT}
VARIANTS: dict[str, dict[str, Any]] = {
    "class": CLASS,
    "text": WITH_TEXT,
    "class and text": {**CLASS, "text_dim": TEXT},
    "projected text, q and k norm": {**WITH_TEXT, "text_projection": False, "qk_norm": True},
    "biases, norms without": {**CLASS, "qkv_bias": True, "use_bias": True, "norm_bias": False, "norm_eps": 1e-3},
    "rms norms, none at the end": {**WITH_TEXT, "norm_type": "rmsnorm", "qk_norm": True, "final_norm": False},
}
SOS = CODEBOOK


def make(seed: int = 0, **options: Any) -> FlexTokARModel:
    torch.manual_seed(seed)
    model = FlexTokARModel(FlexTokARConfig(**{**SMALL, **options})).eval()
    for name, value in model.named_parameters():  # biases and norms start at values that hide mistakes
        if value.ndim == 1:
            nn.init.normal_(value, 1.0 if "weight" in name else 0.0, 0.2)
    return model


def condition(model: FlexTokARModel, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    if model.config.num_classes is not None:
        found["class_labels"] = torch.randint(CLASSES, (batch,), generator=random)
    if model.config.text_dim is not None:
        found["text_embeds"] = torch.randn(batch, 5, TEXT, generator=random)
        found["text_mask"] = (torch.arange(5) < torch.randint(1, 6, (batch, 1), generator=random)).long()
    return found


def negative(model: FlexTokARModel) -> dict[str, Tensor]:
    if model.config.text_dim is None:
        return {}
    return {"negative_text_embeds": torch.randn(1, 7, TEXT, generator=torch.Generator().manual_seed(9))}


def inputs(batch: int = 2, length: int = TOKENS, seed: int = 2) -> Tensor:
    ids = torch.randint(CODEBOOK, (batch, length - 1), generator=torch.Generator().manual_seed(seed))
    return F.pad(ids, (1, 0), value=SOS)


def without(given: dict[str, Tensor], free: dict[str, Tensor], batch: int = 2) -> dict[str, Tensor]:
    """The condition of the unconditional branch."""
    found = {name.removeprefix("negative_"): value.expand(batch, -1, -1) for name, value in free.items()}
    if "class_labels" in given:
        found["class_labels"] = torch.full((batch,), -1)
    return found


# -- one pass --------------------------------------------------------------------------------------------------------


def slow_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.RMSNorm):
        return x / (x.square().mean() + norm.eps).sqrt() * norm.weight
    x = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt() * norm.weight
    return x if norm.bias is None else x + norm.bias


def slow_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], heads: int, norms: Any) -> Tensor:
    """One query (D,) over keys and values of (D,) each, head by head."""
    out = []
    for head in range(heads):
        size = len(q) // heads
        part = slice(head * size, (head + 1) * size)
        query = slow_norm(norms.q_norm, q[part])
        scores = torch.stack([query @ slow_norm(norms.k_norm, k[part]) / math.sqrt(size) for k in keys])
        weights = scores.exp() / scores.exp().sum()
        out.append(sum(w * v[part] for w, v in zip(weights, values, strict=True)))
    return norms.proj(torch.cat(out))


def slow_logits(model: FlexTokARModel, ids: Tensor, label: int, text: Tensor | None) -> Tensor:
    """Logits (L, V) of one sequence, token by token, from the equations of section 11."""
    c = model.config
    if text is not None and c.text_projection:
        text = F.gelu(text @ model.text_projection.fc1.weight.T, approximate="tanh")
        text = text @ model.text_projection.fc2.weight.T
    stream = []
    for place, token in enumerate(ids.tolist()):
        x = model.start_token[0, 0] if token == SOS else model.embed_tokens.weight[token]
        x = x + model.positions[place]
        if token == SOS and label >= 0:
            x = x + model.embed_class.weight[label]
        stream.append(x)
    for block in model.blocks:
        keys, values, after = [], [], []
        for x in stream:
            q, k, v = block.self_attn.qkv(slow_norm(block.norm_self, x)).chunk(3)
            keys.append(k)
            values.append(v)
            x = x + slow_attention(q, keys, values, c.num_attention_heads, block.self_attn)
            if text is not None:
                cross = block.cross_attn
                told = [list(map(layer, text)) for layer in (cross.k, cross.v)]
                x = x + slow_attention(cross.q(slow_norm(block.norm_cross, x)), *told, c.num_attention_heads, cross)
            h = slow_norm(block.norm_mlp, x)
            a, b = block.mlp.fc1(h), block.mlp.fc3(h)
            after.append(x + block.mlp.fc2(a * torch.sigmoid(a) * b))
        stream = after
    return torch.stack([model.head(slow_norm(model.norm, x)) for x in stream])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_against_plain_formulas(variant: str) -> None:
    model = make(**VARIANTS[variant]).double()
    given, ids = condition(model), inputs()
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    got = model(ids, **given).logits
    for row in range(2):
        text = given["text_embeds"][row][given["text_mask"][row].bool()] if "text_embeds" in given else None
        label = int(given["class_labels"][row]) if "class_labels" in given else -1
        want = slow_logits(model, ids[row], label, text)
        torch.testing.assert_close(got[row], want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(1, 8), (5, 8), (12, 32)])
def test_position_table(n: int, dim: int) -> None:
    want = torch.zeros(n, dim)
    for row in range(1, n):
        for i in range(dim // 4):
            angle = (row - 1) * 10000 ** (-i / (dim / 4))
            for quarter, value in enumerate((0.0, 1.0, math.sin(angle), math.cos(angle))):
                want[row, quarter * dim // 4 + i] = value
    torch.testing.assert_close(position_table(n, dim), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_later_tokens_and_other_rows_change_nothing(variant: str, attention: str) -> None:
    model = make(**VARIANTS[variant])
    model.set_attn_implementation(attention)
    given, ids = condition(model), inputs()
    whole = model(ids, **given).logits
    for length in (1, 4):
        torch.testing.assert_close(model(ids[:, :length], **given).logits, whole[:, :length], atol=1e-5, rtol=1e-5)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        torch.testing.assert_close(model(ids[row : row + 1], **alone).logits[0], whole[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masked_text_changes_nothing() -> None:
    model = make(**WITH_TEXT)
    ids, text = inputs(), torch.randn(2, 3, TEXT)
    padded = torch.cat([text, torch.full((2, 2, TEXT), 1e3)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(2, -1)
    want = model(ids, text_embeds=text).logits
    torch.testing.assert_close(model(ids, text_embeds=padded, text_mask=mask).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@torch.no_grad()
def test_guidance_is_two_passes(variant: str, scale: float) -> None:
    model = make(**VARIANTS[variant])
    given, free, ids = condition(model), negative(model), inputs()
    u = model(ids, **without(given, free)).logits
    c = model(ids, **given).logits
    got = model(ids, **given, **free, guidance_scale=scale).logits
    torch.testing.assert_close(got, u + scale * (c - u), atol=1e-4, rtol=1e-4)
    assert torch.equal(model(ids, **given, **free, guidance_scale=1).logits, c)


@torch.no_grad()
def test_guidance_of_another_dtype_is_float32() -> None:
    model = make(**CLASS).to(torch.bfloat16)
    logits = model(inputs(), **condition(model), guidance_scale=2.0).logits
    assert logits.dtype == torch.float32
    assert model(inputs(), **condition(model)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bf16_is_close(variant: str) -> None:
    model = make(**VARIANTS[variant], **{"initializer_range": 0.1})
    given, ids = condition(model), inputs()
    want = model(ids, **given).logits
    got = model.to(torch.bfloat16)(ids, **given).logits.float()
    assert (got - want).abs().max() < 0.05 * want.abs().max()


# -- training --------------------------------------------------------------------------------------------------------


def test_loss_counts_each_label_once() -> None:
    model = make(**CLASS)
    labels = inputs()[:, 1:].clone()
    labels[1, -3:] = -100
    output = model(labels=labels, **condition(model))
    start = torch.full((2, 1), SOS)
    logits = model(torch.cat([start, labels.clamp(min=0)[:, :-1]], dim=1), **condition(model)).logits
    chosen = [-logits[b, i].log_softmax(0)[labels[b, i]] for b in range(2) for i in range(8) if labels[b, i] >= 0]
    assert len(chosen) == 13
    torch.testing.assert_close(output.loss, sum(chosen) / 13)
    torch.testing.assert_close(output.logits, logits)
    loss, *_ = model(labels=labels, **condition(model), return_dict=False)
    assert torch.equal(loss, output.loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter_with_and_without_checkpointing(variant: str) -> None:
    model = make(**VARIANTS[variant]).train()
    labels = torch.arange(2 * TOKENS).view(2, TOKENS) % CODEBOOK
    found = []
    for checkpointing in (False, True):
        if checkpointing:  # newer releases of transformers warn of the other name
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(labels=labels, **condition(model)).loss.backward()
        missing = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
        assert not missing
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_few_steps_learn_a_class() -> None:
    model = make(**CLASS, **{"initializer_range": 0.02}).train()
    labels = torch.randint(CODEBOOK, (CLASSES, TOKENS), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(labels=labels, class_labels=torch.arange(CLASSES)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    drawn = model.eval().generate_tokens(range(CLASSES), guidance_scale=1, temperature=0)
    assert torch.equal(drawn, labels)


# -- generate --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(model: FlexTokARModel, n: int, scale: float, given: Any, free: Any, prefix: Tensor) -> Tensor:
    """Greedy ids, each from passes over everything before it, one for each branch."""
    ids = prefix
    for _ in range(n):
        c = model(ids, **given).logits[:, -1]
        u = model(ids, **without(given, free, len(ids))).logits[:, -1]
        ids = torch.cat([ids, (u + scale * (c - u)).argmax(dim=1, keepdim=True)], dim=1)
    return ids


WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize(
    ("variant", "scale"), [*((variant, 2.5) for variant in VARIANTS), *itertools.product(["class", "text"], [1.0, 0.0])]
)
def test_generate_equals_recomputation(variant: str, scale: float) -> None:
    model = make(**VARIANTS[variant])
    given, free = condition(model), negative(model)
    want = recomputed(model, TOKENS, scale, given, free, torch.full((2, 1), SOS))
    assert want.unique().numel() > 2
    for way, options in WAYS.items():
        got = model.generate(**given, **free, guidance_scale=scale, max_new_tokens=TOKENS, do_sample=False, **options)
        assert torch.equal(got, want), way
    assert torch.equal(model.generate(**given, **free, guidance_scale=scale, do_sample=False), want)


@pytest.mark.parametrize("variant", ["class", "text"])
def test_fewer_tokens_are_the_first_and_rows_are_alone(variant: str) -> None:
    model = make(**VARIANTS[variant])
    given, free = condition(model, 3), negative(model)
    options: dict[str, Any] = {**free, "guidance_scale": 2.0, "temperature": 0}
    whole = model.generate_tokens(**given, **options)
    assert whole.shape == (3, TOKENS)
    assert whole.dtype == torch.int64
    assert torch.equal(model.generate_tokens(**given, **options, num_tokens=4), whole[:, :4])
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        assert torch.equal(model.generate_tokens(**alone, **options), whole[row : row + 1])


@pytest.mark.parametrize("variant", ["class", "text"])
@pytest.mark.parametrize("cached", [True, False])
def test_beams_carry_both_branches(variant: str, cached: bool) -> None:
    """With as many beams as there are sequences of two tokens, the search is exhaustive."""
    model = make(**VARIANTS[variant], codebook_size=6)
    given, free = condition(model), negative(model)
    got = model.generate(
        **given, **free, guidance_scale=2.0, max_new_tokens=3, num_beams=36, do_sample=False, use_cache=cached
    )
    every = torch.cartesian_prod(*[torch.arange(6)] * 3)
    ids = F.pad(every[:, :-1], (1, 0), value=6)
    for row in range(2):
        one = {name: value[row : row + 1].expand(216, *value.shape[1:]) for name, value in given.items()}
        with torch.no_grad():
            logits = model(ids, **one, **free, guidance_scale=2.0).logits
        scores = logits.log_softmax(dim=2).gather(2, every[:, :, None]).sum(dim=(1, 2))
        assert got[row, 1:].tolist() == every[scores.argmax()].tolist()


@torch.no_grad()
def test_a_prefix_goes_on_and_may_be_padded_on_the_left() -> None:
    model = make(**CLASS)
    given = condition(model)
    short, long = inputs(1, 3, seed=3), inputs(1, 5, seed=4)
    want = [
        recomputed(model, 2, 2.0, {"class_labels": given["class_labels"][row : row + 1]}, {}, ids)
        for row, ids in enumerate((short, long))
    ]
    both = torch.cat([F.pad(short, (2, 0)), long])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for cached in (True, False):
        options: dict[str, Any] = {"guidance_scale": 2.0, "max_new_tokens": 2, "use_cache": cached}
        got = model.generate(both, attention_mask=mask, **given, **options)
        assert got[0, 2:].tolist() == want[0][0].tolist()
        assert got[1].tolist() == want[1][0].tolist()


@torch.no_grad()
def test_official_guidance_is_away_from_class_zero_after_the_first_token() -> None:
    model = make(**CLASS)
    labels = torch.tensor([2, 3])
    ids = torch.full((2, 1), SOS)
    for step in range(TOKENS):
        c = model(ids, class_labels=labels).logits[:, -1]
        u = model(ids, class_labels=torch.full((2,), -1 if step == 0 else 0)).logits[:, -1]
        ids = torch.cat([ids, (u + 2.5 * (c - u)).argmax(dim=1, keepdim=True)], dim=1)
    for options in WAYS.values():
        got = model.generate(class_labels=labels, guidance_scale=2.5, official=True, do_sample=False, **options)
        assert torch.equal(got, ids)
    assert torch.equal(model.generate_tokens(labels, guidance_scale=2.5, official=True, temperature=0), ids[:, 1:])
    assert not torch.equal(model.generate_tokens(labels, guidance_scale=2.5, temperature=0), ids[:, 1:])


def test_a_guided_step_is_one_pass_and_text_is_read_once() -> None:
    model = make(**WITH_TEXT)
    rows, read = [], []
    model.head.register_forward_hook(lambda _, given, out: rows.append(len(out)))
    model.blocks[1].cross_attn.k.register_forward_hook(lambda _, given, out: read.append(len(out)))
    model.generate_tokens(**condition(model), **negative(model))
    assert rows == [4] * TOKENS
    assert read == [4]
    model.generate_tokens(**condition(model), guidance_scale=1)
    assert rows[TOKENS:] == [2] * TOKENS


# -- sampling --------------------------------------------------------------------------------------------------------


def slow_filter(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities after temperature, then top-k, then top-p, as section 11 words them."""
    scores = [value / temperature for value in logits]
    if top_k:
        kth = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = [value if value >= kth else -math.inf for value in scores]
    if 0 < top_p < 1:
        total = sum(math.exp(value) for value in scores)
        mass = 0.0
        order = sorted(range(len(scores)), key=scores.__getitem__)
        for place in order[:-1]:
            mass += math.exp(scores[place]) / total
            if mass <= 1 - top_p:
                scores[place] = -math.inf
    total = sum(math.exp(value) for value in scores)
    return [math.exp(value) / total for value in scores]


@settings(max_examples=15)
@given(st.data())
def test_filters_of_generate(data: st.DataObject) -> None:
    model = make(**CLASS, codebook_size=8, num_hidden_layers=1)
    logits = data.draw(st.lists(st.floats(-4, 4, width=16), min_size=8, max_size=8, unique=True))
    temperature, top_k = data.draw(st.sampled_from([0.5, 1.0, 1.7])), data.draw(st.integers(0, 9))
    top_p = data.draw(st.sampled_from([0.15, 0.55, 0.85, 1.0]))
    want = torch.tensor(slow_filter(logits, temperature, top_k, top_p))
    handle = model.head.register_forward_hook(lambda *_: torch.tensor(logits)[None, None])
    output = model.generate(
        class_labels=torch.tensor([0]),
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    handle.remove()
    torch.testing.assert_close(output.scores[0][0].softmax(dim=0), want, atol=1e-5, rtol=1e-4)


def test_draws_follow_the_probabilities() -> None:
    model = make(**CLASS, codebook_size=6)
    labels = torch.full((4000,), 2)
    with torch.no_grad():
        logits = model(torch.tensor([[6]]), class_labels=labels[:1], guidance_scale=2.0).logits[0, 0]
    want = (logits / 1.5).softmax(dim=0)
    drawn = model.generate_tokens(
        labels, num_tokens=1, guidance_scale=2.0, temperature=1.5, generator=torch.Generator().manual_seed(3)
    )
    found = drawn[:, 0].bincount(minlength=6) / len(labels)
    assert (found - want).abs().max() < 4 * (0.25 / len(labels)) ** 0.5


def test_the_generator_alone_decides() -> None:
    model = make(**CLASS)

    def draw(seed: int) -> Tensor:
        return model.generate_tokens([0, 1], generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = draw(5)
    assert torch.equal(torch.rand(3), expected)  # torch's own numbers are where they were
    assert torch.equal(draw(5), first)
    assert not torch.equal(draw(6), first)


def test_greedy_by_three_options() -> None:
    model = make(**CLASS)
    want = model.generate_tokens([0, 1], temperature=0)
    assert torch.equal(model.generate_tokens([0, 1], top_k=1), want)
    assert torch.equal(model.generate_tokens([0, 1], top_p=1e-6), want)
    draws = [model.generate_tokens([0, 1], top_p=0.0) for _ in range(4)]  # 0 is off, as in the released code
    assert not all(torch.equal(draw, want) for draw in draws)


def test_defaults_of_guidance() -> None:
    for options, scale in ((CLASS, 1.5), (WITH_TEXT, 3.0)):
        model = make(**options)
        given = {**condition(model), **negative(model), "temperature": 0}
        assert torch.equal(model.generate_tokens(**given), model.generate_tokens(**given, guidance_scale=scale))


def test_callback_sees_every_prefix_and_may_stop() -> None:
    model = make(**CLASS)
    seen: list[Tensor] = []
    whole = model.generate_tokens([0, 1], temperature=0, callback_on_prefix=lambda ids: seen.append(ids.clone()))
    assert [ids.shape for ids in seen] == [(2, n) for n in range(1, TOKENS + 1)]
    assert all(torch.equal(ids, whole[:, : ids.shape[1]]) for ids in seen)
    short = model.generate_tokens([0, 1], temperature=0, callback_on_prefix=lambda ids: ids.shape[1] == 3)
    assert torch.equal(short, whole[:, :3])


# -- what is refused -------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "no condition": ({"num_classes": None}, "num_classes=None and text_dim=None"),
    "heads": ({"num_attention_heads": 5}, "hidden_size=24"),
    "width": ({"hidden_size": 6, "num_attention_heads": 3}, "multiple of 4"),
    "no tokens": ({"num_tokens": 0}, "num_tokens=0"),
    "no classes": ({"num_classes": 0}, "num_classes=0"),
    "norm": ({"norm_type": "batchnorm"}, "norm_type='batchnorm'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    options, match = BAD_CONFIGS[case]
    with pytest.raises(InvalidParameterError, match=match):
        FlexTokARConfig(**{**SMALL, **options})


FEATURES = torch.zeros(2, 5, TEXT)
BAD_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no ids": (CLASS, {"input_ids": None}, "input_ids=None"),
    "ids beyond SOS": (CLASS, {"input_ids": torch.full((2, 2), SOS + 1)}, f"0 to {SOS}"),
    "negative ids": (CLASS, {"input_ids": torch.full((2, 2), -1)}, f"0 to {SOS}"),
    "ids of floats": (CLASS, {"input_ids": torch.zeros(2, 2)}, "int64"),
    "SOS as a label": (CLASS, {"input_ids": None, "labels": torch.full((2, 2), SOS)}, f"0 to {SOS - 1}"),
    "too many": (CLASS, {"input_ids": inputs(2, TOKENS + 1)}, "positions for 9"),
    "too many labels": (CLASS, {"input_ids": None, "labels": torch.zeros(2, 10).long()}, "positions for 9"),
    "guided loss": (CLASS, {"labels": torch.zeros(2, 2).long(), "guidance_scale": 2.0}, "one branch"),
    "class beyond": (CLASS, {"class_labels": torch.tensor([0, CLASSES])}, "0 to 3"),
    "class below": (CLASS, {"class_labels": torch.tensor([0, -2])}, "0 to 3"),
    "classes of another batch": (CLASS, {"class_labels": torch.tensor([0])}, r"int64 \(2,\)"),
    "classes of floats": (CLASS, {"class_labels": torch.zeros(2)}, r"int64 \(2,\)"),
    "classes for a text": (WITH_TEXT, {"class_labels": torch.zeros(2).long()}, "no classes"),
    "text for a class": (CLASS, {"text_embeds": FEATURES}, "no text"),
    "mask for a class": (CLASS, {"text_mask": torch.ones(2, 5)}, "text_embeds missing"),
    "no text": (WITH_TEXT, {}, "text_embeds missing"),
    "text of another width": (WITH_TEXT, {"text_embeds": torch.zeros(2, 5, 3)}, r"\(2, T, 12\)"),
    "text of another batch": (WITH_TEXT, {"text_embeds": FEATURES[:1]}, r"\(2, T, 12\)"),
    "mask of another length": (WITH_TEXT, {"text_embeds": FEATURES, "text_mask": torch.ones(2, 4)}, r"\(2, 5\)"),
    "text without text": (WITH_TEXT, {"text_embeds": FEATURES, "text_mask": torch.zeros(2, 5)}, "without any 1"),
    "guidance without": (WITH_TEXT, {"text_embeds": FEATURES, "guidance_scale": 2.0}, "negative_text_embeds"),
    "another negative": (
        WITH_TEXT,
        {"text_embeds": FEATURES, "negative_text_embeds": torch.zeros(3, 1, TEXT), "guidance_scale": 2.0},
        r"\(2, T, 12\)",
    ),
    "official text": (WITH_TEXT, {"text_embeds": FEATURES, "official": True}, "official=True"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    options, given, match = BAD_CALLS[case]
    with pytest.raises(InvalidParameterError, match=match):
        make(**options)(**{"input_ids": inputs(2, 3), **given})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"num_tokens": TOKENS + 1}, "1 to 9"),
        ({"num_tokens": 2.0}, "num_tokens=2.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"class_labels": None}, "no condition"),
    ],
)
def test_bad_draws(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidParameterError, match=match):
        make(**CLASS).generate_tokens(**{"class_labels": 1, **options})


@pytest.mark.parametrize("options", [{"max_new_tokens": TOKENS + 1}, {"max_length": TOKENS + 2}])
def test_too_many_tokens_are_refused_before_the_first(options: dict[str, int]) -> None:
    model = make(**CLASS)
    model.head.register_forward_hook(lambda *_: pytest.fail("a step was made"))
    with pytest.raises(InvalidParameterError, match="at most 9"):
        model.generate(class_labels=torch.tensor([1]), **options)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtype"), [*((variant, torch.float32) for variant in VARIANTS), ("text", torch.bfloat16)]
)
def test_save_and_load(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    model = make(**VARIANTS[variant]).to(dtype)
    model.save_pretrained(tmp_path)
    again = FlexTokARModel.from_pretrained(tmp_path, dtype=dtype)
    assert {**again.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert again.training is False
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    given = {**condition(model), **negative(model)}
    assert torch.equal(again.generate_tokens(**given, temperature=0), model.generate_tokens(**given, temperature=0))


def released(model: FlexTokARModel, folder: Path, described: str = "ar_image_model: {num_heads: 3}") -> Path:
    state = {name: value.contiguous() for name, value in to_official(model.state_dict()).items()}
    save_file({**state, "models.text_encoder.t5_embedder.model.x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(described)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_released_layout_and_back(tmp_path: Path, variant: str) -> None:
    model = make(**VARIANTS[variant])
    options: dict[str, Any] = {"norm_type": model.config.norm_type, "norm_eps": model.config.norm_eps}
    again = FlexTokARModel.from_official(released(model, tmp_path), **options)
    same = {**model.config.to_dict(), "initializer_range": None, "dtype": None}
    assert {**again.config.to_dict(), "initializer_range": None, "dtype": None} == same
    given = condition(model)
    with torch.no_grad():
        assert torch.equal(again(inputs(), **given).logits, model(inputs(), **given).logits)


def test_names_of_the_released_layout() -> None:
    names = set(to_official(make(**WITH_TEXT, qk_norm=True).state_dict()))
    image, block = "models.ar_image_model.", "models.ar_image_model.trunk.blocks.1."
    assert {f"{block}self_attn.qkv.weight", f"{block}cross_attn.Wk.weight", f"{block}norm_3.bias"} <= names
    assert {f"{image}trunk.post_trunk_norm.weight", "models.text_encoder.mlp.fc2.weight"} <= names
    assert {f"{block}cross_attn.q_norm.weight", f"{block}self_attn.k_norm.bias"} <= names
    names = set(to_official(make(**CLASS).state_dict()))
    assert {f"{block}attn.qkv.weight", f"{block}norm_2.bias", f"{image}preprocessor.cls_embedding.weight"} <= names


RELEASED = {
    "FlexAR-113M-T2I": (12, 768, 113e6, 16),
    "FlexAR-382M-T2I": (18, 1152, 382e6, 16),
    "FlexAR-1B-T2I": (26, 1664, 1.15e9, 16),
    "FlexAR-3B-T2I": (36, 2304, 3.06e9, 16),
    "paper, 49M": (10, 640, 49e6, 12),
    "paper, 85M": (12, 768, 85e6, 12),
    "paper, 201M": (16, 1024, 201e6, 12),
    "paper, 1.33B": (30, 1920, 1.33e9, 12),
}


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_the_released_models(name: str) -> None:
    depth, width, total, squares = RELEASED[name]
    text = {"num_classes": None, "text_dim": 2048} if squares == 16 else {}
    with torch.device("meta"):
        model = FlexTokARModel(
            FlexTokARConfig(
                hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, codebook_size=10, **text
            )
        )
    count = sum(value.numel() for value in model.blocks.parameters())
    assert count == pytest.approx(total, rel=0.05)
    assert count == pytest.approx(squares * depth * width**2, rel=0.05)  # SwiGLU is rounded up to multiples of 256


FULL = """
width: {heads: 3}
model: {meta_model: {models: {ar_image_model: {trunk: {_target_: l3m.Trunk,
  attn_target: {_target_: l3m.EfficientAttention, _partial_: true, num_heads: "${width.heads}", qk_norm: null},
  norm_layer: {_target_: torch.nn.LayerNorm, _partial_: true, eps: 1e-5}, ffn_target: {_target_: l3m.SwiGLUFFN}}},
  other: {num_heads: 99}}}}
"""


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (FULL, {"num_attention_heads": 3, "norm_type": "layernorm", "norm_eps": 1e-5}),
        ("a: [{num_heads: 2}, {num_heads: 2}]", {"num_attention_heads": 2}),
        ("norm_layer: {_target_: l3m.RMSNorm}", {"norm_type": "rmsnorm", "norm_eps": 1e-6}),
        ("norm_layer: {_target_: hydra.get, path: l3m.LAYER_NORM}", {"norm_type": "layernorm", "norm_eps": 1e-6}),
        ("rope_pos_embed: null", {}),
    ],
)
def test_options_of_a_released_file(tmp_path: Path, text: str, want: dict[str, Any]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert read_options(tmp_path / "config.yaml") == want


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("num_heads: [", "YAML"),
        ("- 5", "mapping"),
        ("a: {num_heads: 2}\nb: {num_heads: 3}", "more than one value of num_attention_heads"),
        ("a: ${b.c}", "refers to nothing"),
        ("a: ${a}", "refers to itself"),
        ("norm_layer: {_target_: x.BatchNorm}", "BatchNorm"),
        ("rope_pos_embed: {_target_: x.Rope}", "does not have"),
        ("ffn_target: {_target_: x.MLP}", "does not have"),
        ("qk_scale: 0.5", "does not have"),
        ("a: !!python/object/apply:os.system [ls]", "YAML"),
    ],
)
def test_released_files_that_are_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InvalidParameterError, match=match):
        read_options(tmp_path / "config.yaml")


def test_released_weights_that_are_refused(tmp_path: Path) -> None:
    model = make(**CLASS)
    with pytest.raises(InvalidParameterError, match="num_attention_heads"):
        load_official(released(model, tmp_path, described="{}"))
    assert load_official(tmp_path, num_attention_heads=3).config.num_attention_heads == 3
    with pytest.raises(UnknownParameterError, match="width"):
        load_official(tmp_path, width=3)
    with pytest.raises(InvalidParameterError, match="norm_type"):
        load_official(released(make(**CLASS, norm_bias=False), tmp_path))
    with pytest.raises(InvalidParameterError, match="neither a folder"):
        load_official(tmp_path / "none")

    weights = load_file(released(model, tmp_path) / "model.safetensors")
    head, embed = "models.ar_image_model.head.linear.weight", "models.ar_image_model.preprocessor.embedding.weight"
    inside = "models.ar_image_model.trunk.blocks.1.mlp.fc2.weight"
    broken = {
        "head.weight missing": {head: None},
        "blocks.1.mlp.fc2.weight": {inside: None},
        "blocks.1.mlp.fc2": {inside: torch.zeros(2, 2)},
        "no name of the released layout": {"models.ar_image_model.trunk.gate": torch.zeros(1)},
        "head.linear.bias": {"models.ar_image_model.head.linear.bias": torch.zeros(CODEBOOK)},
        "embed_tokens.weight": {embed: None},
    }
    for match, change in broken.items():
        kept = {name: value for name, value in {**weights, **change}.items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(InvalidParameterError, match=match):
            load_official(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidParameterError, match="damaged"):
        load_official(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidParameterError, match="missing"):
        load_official(tmp_path)


# -- pipeline --------------------------------------------------------------------------------------------------------


class StubTokenizer(ImageTokenizer):
    """Decodes each picture to the grey of its mean id."""

    num_tokens, codebook_size, image_size, prefixes = TOKENS, CODEBOOK, 4, True

    def encode(self, images: Any, **options: Any) -> Tensor:
        return torch.zeros(1, TOKENS, dtype=torch.long)

    def decode(self, tokens: Tensor, **options: Any) -> Tensor:
        self.options = options
        return (tokens.float().mean(dim=1) / CODEBOOK * 2 - 1)[:, None, None, None].expand(-1, 3, 4, 4)


WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "square"]


def text_parts(width: int = TEXT) -> dict[str, Any]:
    torch.manual_seed(4)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).eval()
    return {"text_encoder": encoder, "text_tokenizer": make_words()}


def make_words() -> Any:
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", model_max_length=6)


def test_pictures_of_classes() -> None:
    pipeline = FlexTokGenerationPipeline(make(**CLASS), StubTokenizer())
    output = pipeline(class_labels=[0, 3], num_tokens=4, temperature=0, decode_options={"num_inference_steps": 2})
    assert output.tokens.shape == (2, 4)
    assert torch.equal(output.tokens, pipeline.ar.generate_tokens([0, 3], num_tokens=4, temperature=0))
    assert [type(image) for image in output.images] == [Image.Image] * 2
    assert pipeline.tokenizer.options == {"num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    pixels = pipeline(class_labels=1, generator=generator, output_type="pt")
    assert pixels.images.shape == (1, 3, 4, 4)
    assert pixels.tokens.shape == (1, TOKENS)
    assert pipeline.tokenizer.options == {"generator": generator}


def test_pictures_of_prompts() -> None:
    pipeline = FlexTokGenerationPipeline(make(**WITH_TEXT), StubTokenizer(), **text_parts())
    both = pipeline(["a red square", "red"], temperature=0).tokens
    assert both.shape == (2, TOKENS)
    for row, prompt in enumerate(("a red square", "red")):
        assert torch.equal(pipeline(prompt, temperature=0).tokens, both[row : row + 1])
    embeds, mask = pipeline.encode_prompt(["a red square", ""])
    assert embeds.shape == (2, 4, TEXT)
    assert mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    empty, _ = pipeline.encode_prompt("")
    want = pipeline.ar.generate_tokens(
        text_embeds=embeds[:1], negative_text_embeds=empty, guidance_scale=3.0, temperature=0
    )
    assert torch.equal(want, both[:1])
    unguided = pipeline.ar.generate_tokens(text_embeds=embeds[:1], guidance_scale=1, temperature=0)
    assert torch.equal(pipeline("a red square", guidance_scale=1, temperature=0).tokens, unguided)


def test_pipelines_save_and_load(tmp_path: Path) -> None:
    pipeline = FlexTokGenerationPipeline(make(**WITH_TEXT), StubTokenizer(), **text_parts())
    pipeline.tokenizer.save_pretrained = lambda path: None  # type: ignore[attr-defined]
    pipeline.save_pretrained(tmp_path)
    again = FlexTokGenerationPipeline.from_pretrained(tmp_path, tokenizer=StubTokenizer())
    want = pipeline("a red square", temperature=0).tokens
    assert torch.equal(again.to(torch.float32)("a red square", temperature=0).tokens, want)
    with pytest.raises(InvalidParameterError, match="no folder tokenizer"):
        FlexTokGenerationPipeline.from_pretrained(tmp_path)
    with pytest.raises(InvalidParameterError, match="neither a folder"):
        FlexTokGenerationPipeline.from_pretrained(tmp_path / "none")


def test_with_a_flextok(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from tokred.generation.flextok import FlexTok, FlexTokModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "encoder_depth": 1,
        "encoder_dim": 16,
        "decoder_depth": 1,
        "decoder_dim": 16,
        "head_dim": 8,
    }
    model = FlexTokModel(**sizes, num_registers=TOKENS, fsq_levels=(10, 5), latent_channels=3, pos_grid=2)
    tokenizer = FlexTok(model.eval(), None, FlowMatchEulerDiscreteScheduler())
    tokenizer.set_progress_bar_config(disable=True)
    pipeline = FlexTokGenerationPipeline(make(**CLASS), tokenizer)

    def draw(of: FlexTokGenerationPipeline) -> Any:
        generator = torch.Generator().manual_seed(0)
        return of(class_labels=[1, 2], generator=generator, output_type="pt", decode_options={"num_inference_steps": 2})

    want = draw(pipeline)
    assert want.images.shape == (2, 3, 4, 4)
    assert torch.equal(draw(pipeline).images, want.images)
    pipeline.save_pretrained(tmp_path)
    again = draw(FlexTokGenerationPipeline.from_pretrained(tmp_path))
    assert torch.equal(again.tokens, want.tokens)
    torch.testing.assert_close(again.images, want.images)


def test_parts_that_do_not_fit() -> None:
    class Other(StubTokenizer):
        codebook_size = 5

    class Short(StubTokenizer):
        num_tokens = 3

    class Whole(StubTokenizer):
        prefixes = False

    for tokenizer, match in ((Other(), "50 ids"), (Short(), "found 3"), (Whole(), "prefixes=False")):
        with pytest.raises(InvalidParameterError, match=match):
            FlexTokGenerationPipeline(make(**CLASS), tokenizer)
    with pytest.raises(InvalidParameterError, match="both or neither"):
        FlexTokGenerationPipeline(make(**WITH_TEXT), StubTokenizer(), text_tokenizer=make_words())
    with pytest.raises(InvalidParameterError, match="width 8"):
        FlexTokGenerationPipeline(make(**WITH_TEXT), StubTokenizer(), **text_parts(8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either prompt or class_labels"),
        ({"prompt": "a", "class_labels": 1}, "either prompt or class_labels"),
        ({"class_labels": 1}, "no classes"),
        ({"prompt": "a", "output_type": "np"}, "output_type='np'"),
        ({"prompt": []}, r"prompt=\[\]"),
        ({"prompt": [5]}, r"prompt=\[5\]"),
        ({"prompt": ["a", "a a a a a a"]}, "'a a a a a a'...: 7 text tokens, the encoder reads 6"),
        ({"prompt": "a", "num_tokens": 10}, "1 to 9"),
    ],
)
def test_bad_calls_of_the_pipeline(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidParameterError, match=match):
        FlexTokGenerationPipeline(make(**WITH_TEXT), StubTokenizer(), **text_parts())(**options)


def test_a_prompt_needs_a_text_encoder() -> None:
    with pytest.raises(InvalidParameterError, match="no text_encoder"):
        FlexTokGenerationPipeline(make(**CLASS), StubTokenizer())("a")
