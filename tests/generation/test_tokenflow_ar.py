"""TokenFlow's generator: one pass against plain formulas, the loop over scales against teacher forcing, and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import ROOT
from tokred.core.errors import InvalidParameterError, UnknownParameterError
from tokred.generation import tokenflow_ar
from tokred.generation.tokenflow_ar import (
    TokenFlowARConfig,
    TokenFlowARModel,
    next_scale_features,
    visible_positions,
)
from tokred.generation.tokenflow_ar_official import config_of_weights, from_official, load_official, to_official

SCALES, CODES, DIM, START = [1, 2, 3], 20, 6, 12
N = 14  # 1 + 4 + 9
SMALL: dict[str, Any] = {
    "vocab_size": START + CODES + 2, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "scales": SCALES, "codebook_size": CODES, "code_dim": DIM, "image_token_start": START,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
GREEDY: dict[str, Any] = {"top_k": 1, "top_p": 0.0, "guidance_scale": 2.0}
STRATEGIES = {1: ([1], [0.0]), 2: ([1, 1], [0.0, 0.0]), 3: ([1, 1, 1], [0.0, 0.0, 0.0])}
TABLE = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(0))


def lookup(codes: Tensor) -> Tensor:
    return TABLE.to(codes.device)[codes]


def make(seed: int = 0, **options: Any) -> TokenFlowARModel:
    torch.manual_seed(seed)
    model = TokenFlowARModel(TokenFlowARConfig(**{**SMALL, **options})).eval()
    for name, value in model.named_parameters():  # norms and biases start at values that hide mistakes
        if value.ndim == 1:
            nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def prompt(batch: int = 2, length: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(1, START, (batch, length), generator=torch.Generator().manual_seed(seed))


def codes(batch: int = 2, seed: int = 2, scales: list[int] = SCALES) -> Tensor:
    count = sum(side * side for side in scales)
    return torch.randint(CODES, (batch, count), generator=torch.Generator().manual_seed(seed))


def forced(model: TokenFlowARModel, words: Tensor, found: Tensor, **options: Any) -> Tensor:
    """Logits (B, N, V) of every code given those before it."""
    features = next_scale_features(found, SCALES, lookup)
    return model(words, image_features=features, **options).logits


# -- features --------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    scales=st.lists(st.integers(2, 7), min_size=0, max_size=4, unique=True).map(lambda s: [1, *sorted(s)]),
    data=st.data(),
)
def test_features_against_the_loop_of_the_paper(scales: list[int], data: st.DataObject) -> None:
    known = data.draw(st.integers(1, len(scales)))
    refined = data.draw(st.sampled_from([None, *range(1, known)]))
    found = codes(1, scales=scales[:known])
    before, start, want = None, 0, []
    for k, side in enumerate(scales[: known + 1]):
        read = None if before is None else F.interpolate(before, size=side, mode="bicubic")
        if k < known:
            own = torch.stack([TABLE[found[0, start + i]] for i in range(side * side)])
            own = own.T.reshape(1, DIM, side, side)
            start += side * side
            before = own if read is None else read + own
        if read is not None:
            shown = before if k == refined else read
            want += [shown[0, :, i // side, i % side] for i in range(side * side)]
    got = next_scale_features(found, scales, lookup, refined)
    assert got.shape == (1, len(want), DIM)
    if want:
        torch.testing.assert_close(got[0], torch.stack(want), atol=1e-5, rtol=1e-5)


def test_features_end_with_a_scale() -> None:
    for count in (2, 4, 6, N + 1):
        with pytest.raises(InvalidParameterError, match="end after 1, 5, 14"):
            next_scale_features(torch.zeros(1, count, dtype=torch.int64), SCALES, lookup)


@settings(max_examples=30)
@given(words=st.integers(1, 5), padding=st.integers(0, 4), known=st.integers(1, 4), tail=st.integers(0, 3))
def test_what_is_visible(words: int, padding: int, known: int, tail: int) -> None:
    padding, tail = min(padding, words - 1), tail if known == 4 else 0
    levels = [k + 1 for k, side in enumerate([1, 2, 3, 5][:known]) for _ in range(side * side)]
    mask = torch.arange(words) >= padding
    got = visible_positions(mask[None], levels, tail)[0]
    level = {words - 1 + i: value for i, value in enumerate(levels)}
    for query in range(len(got)):
        for key in range(len(got)):
            inside = query in level and key in level and level[query] >= level[key]
            assert bool(got[query, key]) == ((key <= query or inside) and key >= padding)


# -- one pass --------------------------------------------------------------------------------------------------------


def slow_norm(norm: Any, x: Tensor) -> Tensor:
    return x / (x.square().mean() + norm.variance_epsilon).sqrt() * norm.weight


def turned(x: Tensor, place: int) -> Tensor:
    """Rotary embedding with base 10000: pairs (i, i + d/2) turned by place / 10000^(2 i / d)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = place * 10000 ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def slow_logits(model: TokenFlowARModel, words: Tensor, features: Tensor, seen: Tensor) -> Tensor:
    """Logits (L, V) of one sequence, place by place, from the equations of section 7."""
    c, first = model.config, len(words) - 1
    level = [k + 1 for k, side in enumerate(SCALES) for _ in range(side * side)]
    stream = []
    for place in range(first + 1 + len(features)):
        j = place - first
        if j <= 0:
            x = model.model.embed_tokens.weight[words[place]] + model.level_embed.weight[0]
        else:
            x = model.projector[2](F.gelu(model.projector[0](features[j - 1]))) + model.level_embed.weight[level[j]]
        stream.append(x + model.positions[j] if j >= 0 else x)
    for layer in model.model.layers:
        a, after = layer.self_attn, []
        heads = [slice(h * c.head_dim, (h + 1) * c.head_dim) for h in range(c.num_attention_heads)]
        for query, x in enumerate(stream):
            out = []
            for part in heads:
                q = turned(slow_norm(a.q_norm, a.q_proj(x)[part]), query)
                keys = [key for key in range(len(stream)) if seen[query, key]] or [query]  # padding: any
                scores = [q @ turned(slow_norm(a.k_norm, a.k_proj(stream[i])[part]), i) for i in keys]
                weights = torch.softmax(torch.stack(scores) / c.head_dim**0.5, dim=0)
                out.append(sum(w * a.v_proj(stream[i])[part] for w, i in zip(weights, keys, strict=True)))
            after.append(x + slow_norm(layer.post_attention_layernorm, a.o_proj(torch.cat(out))))
        stream = []
        for x in after:
            m = layer.mlp
            branch = m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))
            stream.append(x + slow_norm(layer.post_feedforward_layernorm, branch))
    return torch.stack([model.lm_head(slow_norm(model.model.norm, x)) for x in stream[first:]])


@torch.no_grad()
def test_logits_against_plain_formulas() -> None:
    model = make().double()
    assert {norm.variance_epsilon for norm in model.modules() if hasattr(norm, "variance_epsilon")} == {1e-5, 1e-6}
    words, features = prompt(1), next_scale_features(codes(1), SCALES, lookup).double()
    mask = torch.tensor([[0, 1, 1, 1]])
    seen = visible_positions(mask.bool(), [1, *[2] * 4, *[3] * 9])[0]
    got = model(words, mask, features).logits[0]
    want = slow_logits(model, words[0], features[0], seen)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # norms and the rotary table are float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_scale_sees_itself_and_those_before_alone(attention: str) -> None:
    """Other codes in scale j change the logits of later scales, of all their places, and of none before."""
    model = make()
    model.set_attn_implementation(attention)
    words, found = prompt(), codes()
    whole = forced(model, words, found)
    for start, end in ((0, 1), (1, 5), (5, 14)):
        other = found.clone()
        other[:, end - 1] = (other[:, end - 1] + 1) % CODES
        changed = (forced(model, words, other) - whole).abs().amax(dim=(0, 2)) > 1e-4
        assert not changed[:end].any()
        assert changed[end:].all()
        part = next_scale_features(found[:, :end], SCALES[: SCALES.index(round((end - start) ** 0.5)) + 1], lookup)
        torch.testing.assert_close(model(words, image_features=part).logits, whole[:, :end], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_and_padding_change_nothing() -> None:
    model = make()
    words, found = prompt(), codes()
    whole = forced(model, words, found)
    for row in range(2):
        alone = forced(model, words[row : row + 1], found[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=1e-5)
    padded = F.pad(words, (3, 0), value=5)
    mask = F.pad(torch.ones_like(words), (3, 0))
    torch.testing.assert_close(forced(model, padded, found, attention_mask=mask), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(forced(model, padded, found), whole, atol=1e-2)


@torch.no_grad()
def test_words_behind_a_picture_change_no_code() -> None:
    model = make()
    words, found = prompt(), codes()
    tail = torch.tensor([[3, 2], [4, 1]])
    logits = forced(model, words, found, tail_ids=tail)
    assert logits.shape == (2, N + 2, model.config.vocab_size)
    torch.testing.assert_close(logits[:, :N], forced(model, words, found), atol=1e-5, rtol=1e-5)
    features = next_scale_features(found, SCALES, lookup)
    behind = model.embed(words, features, tail)[:, -3:]
    assert torch.equal(behind[:, 0], model.level_embed.weight[0].expand(2, -1))  # zeros in the last place
    other = forced(model, words, found, tail_ids=torch.tensor([[5, 2], [6, 1]]))
    torch.testing.assert_close(other[:, : N + 1], logits[:, : N + 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other[:, -1], logits[:, -1], atol=1e-2)


@torch.no_grad()
def test_bf16_is_close() -> None:
    model = make(initializer_range=0.1)
    want = forced(model, prompt(), codes())
    got = forced(model.to(torch.bfloat16), prompt(), codes())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


# -- training --------------------------------------------------------------------------------------------------------


def test_loss_counts_codes_and_the_tail() -> None:
    model = make()
    words, found, tail = prompt(), codes(), torch.tensor([[3, 2], [4, 1]])
    features = next_scale_features(found, SCALES, lookup)
    labels = found.clone()
    labels[1, 4:] = -100
    for behind, count in ((None, 14 + 4), (tail, 14 + 4 + 4)):
        output = model(words, image_features=features, labels=labels, tail_ids=behind)
        wanted = torch.cat([labels + START, *([] if behind is None else [behind])], dim=1)
        chosen = [
            -output.logits[b, i].log_softmax(0)[wanted[b, i]]
            for b in range(2)
            for i in range(wanted.shape[1])
            if wanted[b, i] >= 0
        ]
        assert len(chosen) == count
        torch.testing.assert_close(output.loss, sum(chosen) / count)
        loss, logits = model(words, image_features=features, labels=labels, tail_ids=behind, return_dict=False)[:2]
        assert torch.equal(loss, output.loss)
        assert torch.equal(logits, output.logits)


def test_gradients_reach_every_parameter_with_and_without_checkpointing() -> None:
    model = make().train()
    features, found = next_scale_features(codes(), SCALES, lookup), []
    for checkpointing in (False, True):
        if checkpointing:  # newer releases of transformers warn of the other name
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(prompt(), image_features=features, labels=codes()).loss.backward()
        missing = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
        assert not missing
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert not model.level_embed.weight.grad[1].any()  # the row that nothing reads
    assert (model.positions.grad.abs().amax(dim=1) > 0).all()


def test_a_few_steps_learn_a_class() -> None:
    """A prompt of one word of a class: its picture is drawn."""
    model = make(initializer_range=0.05).train()
    words = torch.tensor([[1, 5, 2], [1, 6, 2]])
    found = codes(seed=5)
    features = next_scale_features(found, SCALES, lookup)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(words, image_features=features, labels=found).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    drawn = model.eval().generate(words, lookup=lookup, guidance_scale=0, top_k=1, top_p=0.0)
    assert torch.equal(drawn, found)


# -- generate --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(
    model: TokenFlowARModel, words: Tensor, free: Tensor, passes: int, scale: float = 2.0, how: str = "linear"
) -> Tensor:
    """Greedy codes from teacher-forced passes over everything before, one for each branch (section 7)."""
    found = torch.empty(len(words), 0, dtype=torch.int64)
    for k in range(len(SCALES)):
        ratio = k / (len(SCALES) - 1) if how == "linear" else 1.0
        drawn = None
        for turn in range(passes if k else 1):
            features = None
            if k:
                features = next_scale_features(found, SCALES, lookup)
                if turn:  # the places of scale k hold its own codes too
                    own = next_scale_features(torch.cat([found, drawn], dim=1), SCALES[: k + 1], lookup, refined=k)
                    features = torch.cat([features[:, : -(SCALES[k] ** 2)], own[:, -(SCALES[k] ** 2) :]], dim=1)
            both = [model(ids, image_features=features).logits[:, -(SCALES[k] ** 2) :] for ids in (words, free)]
            given, other = (logits[..., START : START + CODES] for logits in both)
            t = scale * ratio
            drawn = ((1 + t) * given - t * other).argmax(dim=-1)
        found = torch.cat([found, drawn], dim=1)
    return found


@pytest.mark.parametrize("passes", STRATEGIES)
@pytest.mark.parametrize("how", ["linear", "constant"])
def test_cached_and_uncached_loops_equal_teacher_forcing(passes: int, how: str) -> None:
    model = make()
    words, free = prompt(3), prompt(3, seed=8)
    want = recomputed(model, words, free, passes, how=how)
    assert want.unique().numel() > 3
    top_k, top_p = STRATEGIES[passes]
    runs: list[int] = []
    model.lm_head.register_forward_hook(lambda _, given, out: runs.append(len(out)))
    for cached in (True, False):
        runs.clear()
        got = model.generate(
            words, lookup=lookup, negative_input_ids=free, guidance=how, guidance_scale=2.0, top_k=top_k, top_p=top_p,
            use_cache=cached,
        )  # fmt: skip
        assert torch.equal(got, want)
        assert runs == [6] * (1 + 2 * passes)  # both branches in one batch


def test_passes_of_the_released_sizes() -> None:
    sides = list(TokenFlowARConfig.scales)
    model = make(scales=sides, num_hidden_layers=1)
    runs, read = [], []
    model.lm_head.register_forward_hook(lambda _, given, out: runs.append(out.shape[1]))
    model.model.norm.register_forward_hook(lambda _, given, out: read.append(out.shape[1]))
    got = model.generate(prompt(1, 5), lookup=lookup, guidance_scale=0)
    assert got.shape == (1, 817)
    assert len(runs) == 25
    assert sum(read) == 4 + 1 + 3 * 816  # each place is read three times, never a prefix again


@pytest.mark.parametrize("cached", [True, False])
def test_batches_of_padded_prompts_are_their_rows(cached: bool) -> None:
    model = make()
    rows, free = [prompt(1, 5, seed=3), prompt(1, 2, seed=4), prompt(1, 3, seed=5)], prompt(1, 4, seed=6)
    options = {**GREEDY, "top_k": [1, 1], "top_p": [0.0, 0.0], "lookup": lookup, "negative_input_ids": free}
    want = torch.cat([model.generate(words, **options, use_cache=cached) for words in rows])
    together = torch.cat([F.pad(words, (5 - words.shape[1], 0), value=7) for words in rows])
    mask = torch.cat([F.pad(torch.ones_like(words), (5 - words.shape[1], 0)) for words in rows])
    assert torch.equal(model.generate(together, mask, **options, use_cache=cached), want)


def test_guidance_that_does_nothing() -> None:
    model = make()
    words, free = prompt(), prompt(seed=8)
    none = model.generate(words, lookup=lookup, guidance_scale=0, top_k=1, top_p=0.0)
    same = model.generate(words, lookup=lookup, negative_input_ids=words, **GREEDY)
    assert torch.equal(same, none)
    other = model.generate(words, lookup=lookup, negative_input_ids=free, **{**GREEDY, "guidance_scale": 20.0})
    assert torch.equal(other[:, 0], none[:, 0])  # the ramp starts at 0
    assert not torch.equal(other, none)
    strong = {**GREEDY, "guidance_scale": 200.0, "guidance": "constant"}
    assert not torch.equal(model.generate(words, lookup=lookup, negative_input_ids=free, **strong)[:, 0], none[:, 0])


def test_fewer_scales_are_the_first() -> None:
    model = make()
    options = {**GREEDY, "lookup": lookup, "guidance_scale": 0}
    whole = model.generate(prompt(), **options)
    for count, end in ((1, 1), (2, 5), (3, 14)):
        assert torch.equal(model.generate(prompt(), **options, num_scales=count), whole[:, :end])


def test_one_scale_is_one_pass() -> None:
    model = make(scales=[1])
    got = model.generate(prompt(), lookup=lookup, negative_input_ids=prompt(seed=8), **GREEDY)
    with torch.no_grad():
        logits = model(prompt()).logits[:, 0, START : START + CODES]
    assert torch.equal(got, logits.argmax(dim=1, keepdim=True))


def test_codes_alone_are_drawn_and_the_generator_decides() -> None:
    model = make()
    with torch.no_grad():
        model.lm_head.weight[:START] *= 0
        model.lm_head.weight[:START] += 50 * model.lm_head.weight[START : START + 1]  # words would often win

    def draw(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return model.generate(prompt(), lookup=lookup, guidance_scale=0, top_k=0, top_p=0.0, generator=generator)

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = draw(5)
    assert torch.equal(torch.rand(3), expected)  # torch's own numbers are where they were
    assert first.min() >= 0
    assert first.max() < CODES
    assert torch.equal(draw(5), first)
    assert not torch.equal(draw(6), first)
    torch.manual_seed(11)
    own = draw(None)
    torch.manual_seed(11)
    assert torch.equal(draw(None), own)


def test_draws_follow_the_probabilities() -> None:
    model = make(codebook_size=6, vocab_size=START + 6)
    words = prompt(1).expand(4000, -1)
    free = prompt(1, seed=8)
    with torch.no_grad():
        given, other = (model(ids).logits[0, 0, START:] for ids in (words[:1], free))
    want = ((2.5 * given - 1.5 * other) / 1.7).softmax(dim=0)
    drawn = model.generate(
        words, lookup=lookup, negative_input_ids=free, guidance="constant", guidance_scale=1.5, temperature=1.7,
        top_k=0, top_p=1.0, num_scales=1, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    found = drawn[:, 0].bincount(minlength=6) / len(words)
    assert (found - want).abs().max() < 4 * (0.25 / len(words)) ** 0.5


def slow_filter(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities after temperature, then top-k, then top-p (released order and rules)."""
    scores = [value / temperature for value in logits]
    if top_k:
        kth = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = [value if value >= kth else -math.inf for value in scores]
    if 0 < top_p < 1:
        total = sum(math.exp(value) for value in scores)
        mass = 0.0
        for place in sorted(range(len(scores)), key=scores.__getitem__)[:-1]:
            mass += math.exp(scores[place]) / total
            if mass <= 1 - top_p:
                scores[place] = -math.inf
    total = sum(math.exp(value) for value in scores)
    return [math.exp(value) / total for value in scores]


@settings(max_examples=40)
@given(
    logits=st.lists(st.floats(-4, 4, width=16), min_size=2, max_size=9, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.0, 0.15, 0.55, 0.85, 1.0]),
)
def test_filters(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    (warpers,) = tokenflow_ar._filters(top_k, top_p, temperature)
    got = warpers(None, torch.tensor([logits])).softmax(dim=-1)[0]
    want = torch.tensor(slow_filter(logits, temperature, top_k, top_p))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_callback_sees_every_pass_and_may_stop() -> None:
    model = make()
    seen: list[Tensor] = []
    options: dict[str, Any] = {"lookup": lookup, "guidance_scale": 0, "top_k": [1, 1], "top_p": [0.0, 0.0]}
    whole = model.generate(prompt(), **options, callback_on_prefix=lambda ids: seen.append(ids.clone()))
    assert [ids.shape[1] for ids in seen] == [1, 5, 5, 14, 14]
    assert all(torch.equal(seen[i], whole[:, : seen[i].shape[1]]) for i in (0, 2, 4))
    short = model.generate(prompt(), **options, callback_on_prefix=lambda ids: ids.shape[1] == 5)
    assert torch.equal(short, seen[1])


# -- what is refused -------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "first scale": ({"scales": [2, 3]}, "scales="),
    "no scale": ({"scales": []}, "scales="),
    "same scale": ({"scales": [1, 2, 2]}, "grow"),
    "vocabulary": ({"vocab_size": START + CODES - 1}, f"at least {START + CODES}"),
    "no codes": ({"codebook_size": 0}, "codebook_size=0"),
    "no words": ({"image_token_start": 0}, "image_token_start=0"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    options, match = BAD_CONFIGS[case]
    with pytest.raises(InvalidParameterError, match=match):
        TokenFlowARConfig(**{**SMALL, **options})


FEATURES = torch.zeros(2, N - 1, DIM)
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "ids of floats": ({"input_ids": torch.zeros(2, 3)}, "int64"),
    "no ids": ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "int64"),
    "codes as words": ({"input_ids": torch.full((2, 3), START)}, f"below {START}"),
    "ids beyond": ({"input_ids": torch.full((2, 3), START + CODES + 2)}, f"to {START + CODES + 1}"),
    "negative ids": ({"input_ids": torch.full((2, 3), -1)}, "ids from -1"),
    "mask of another length": ({"attention_mask": torch.ones(2, 4)}, "equal shapes"),
    "padding on the right": ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "on the left"),
    "padding inside": ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "on the left"),
    "all padding": ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "end with a word"),
    "width of features": ({"image_features": FEATURES[..., 1:]}, rf"\(2, n, {DIM}\)"),
    "rows of features": ({"image_features": FEATURES[:1]}, rf"\(2, n, {DIM}\)"),
    "part of a scale": ({"image_features": FEATURES[:, 1:]}, "end after 0, 4, 13"),
    "tail of a part": ({"image_features": FEATURES[:, :4], "tail_ids": torch.ones(2, 1).long()}, "behind 5 of 14"),
    "codes in the tail": ({"image_features": FEATURES, "tail_ids": torch.full((2, 1), START)}, "tail_ids"),
    "labels of another length": ({"image_features": FEATURES, "labels": torch.zeros(2, 3).long()}, r"\(2, 14\)"),
    "labels beyond": ({"image_features": FEATURES, "labels": torch.full((2, N), CODES)}, f"to {CODES - 1}"),
    "labels of floats": ({"image_features": FEATURES, "labels": torch.zeros(2, N)}, "int64"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    options, match = BAD_CALLS[case]
    with pytest.raises(InvalidParameterError, match=match):
        make()(**{"input_ids": prompt(2, 3), **options})


BAD_DRAWS: dict[str, tuple[dict[str, Any], str]] = {
    "no negative": ({"negative_input_ids": None}, "without negative_input_ids"),
    "rows of the negative": ({"negative_input_ids": prompt(3)}, "expected 1 or 2"),
    "guidance": ({"guidance": "cosine"}, "linear, constant"),
    "scale": ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
    "scale of nothing": ({"guidance_scale": math.nan}, "guidance_scale=nan"),
    "strategies": ({"top_k": [1, 1], "top_p": 0.0}, "one of each"),
    "no pass": ({"top_k": [], "top_p": []}, "one of each"),
    "top_k": ({"top_k": -1}, "top_k=-1"),
    "top_k of floats": ({"top_k": [1.5]}, "integers"),
    "top_p": ({"top_p": 1.1}, "from 0 to 1"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0"),
    "scales": ({"num_scales": 4}, "1 to 3"),
    "no scales": ({"num_scales": 0}, "num_scales=0"),
}


@pytest.mark.parametrize("case", BAD_DRAWS)
def test_bad_draws(case: str) -> None:
    options, match = BAD_DRAWS[case]
    model = make()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(InvalidParameterError, match=match):
        model.generate(prompt(), **{**GREEDY, "lookup": lookup, "negative_input_ids": prompt(), **options})


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(qk_norm_eps=1e-3).to(dtype)
    model.save_pretrained(tmp_path)
    again = TokenFlowARModel.from_pretrained(tmp_path, dtype=dtype)
    assert {**again.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    options = {**GREEDY, "lookup": lookup, "negative_input_ids": prompt(seed=8)}
    assert torch.equal(again.generate(prompt(), **options), model.generate(prompt(), **options))


def released(model: TokenFlowARModel, folder: Path) -> dict[str, Tensor]:
    """Two shards, an index and a configuration, as on the hub."""
    weights = {name: value.contiguous() for name, value in to_official(model.state_dict(), model.config).items()}
    names, index = list(weights), {}
    for number, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    described = {"model_type": "llava_llama", "rms_norm_eps": 1e-3, "pad_token_id": 0, "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(described))
    return weights


def test_the_released_layout_and_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3}
    model = make(**options, num_key_value_heads=1, vocab_size=START + CODES).to(torch.bfloat16)
    weights = released(model, tmp_path)
    again = TokenFlowARModel.from_official(str(tmp_path), scales=SCALES)
    assert again.training is False
    assert again.dtype == torch.bfloat16
    for name in ("scales", "codebook_size", "code_dim", "rms_norm_eps", "num_key_value_heads", "head_dim"):
        assert getattr(again.config, name) == getattr(model.config, name)
    back = to_official(again.state_dict(), again.config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    model.save_pretrained(tmp_path / "ours")
    model = TokenFlowARModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)  # its rotary table is float32
    with torch.no_grad():
        assert torch.equal(forced(again, prompt(), codes()), forced(model, prompt(), codes()))
    wide = load_official(tmp_path, scales=SCALES, dtype=torch.float32)
    assert wide.dtype == torch.float32


def test_names_of_the_released_7b() -> None:
    path = ROOT.parent / "shared" / "specs" / "tokenflow_state_dict_t2i_7b.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    shapes = {name: tuple(told["shape"]) for name, told in json.loads(path.read_text())["tensors"].items()}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    weights["image_token_start"] = torch.tensor(32001)
    config = config_of_weights(weights)
    default = TokenFlowARConfig(pad_token_id=None)
    assert config.to_dict() == default.to_dict()
    with torch.device("meta"):
        state = TokenFlowARModel(config).state_dict()
    renamed = from_official(weights)
    assert {name: value.shape for name, value in renamed.items()} == {name: v.shape for name, v in state.items()}
    assert {name: tuple(value.shape) for name, value in to_official(state, config).items()} == shapes


def spoil(folder: Path, how: str) -> None:
    first = folder / "model-00001-of-00002.safetensors"
    weights = load_file(first)
    if how == "damaged":
        first.write_bytes(first.read_bytes()[:50])
    elif how == "a shard is missing":
        first.unlink()
    elif how == "no weights":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    elif how == "no JSON":
        (folder / "config.json").write_text("{")
    elif how == "another name":
        save_file({**weights, "model.vision.weight": torch.zeros(1)}, first)
    elif how == "another model":
        save_file({name: value for name, value in weights.items() if "pos_1LC" not in name}, first)
    elif how == "another shape":
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**weights, name: weights[name][1:].contiguous()}, first)
    elif how == "no id":
        save_file({name: value for name, value in weights.items() if name != "image_token_start"}, first)


SPOILT = {
    "damaged": "damaged",
    "a shard is missing": "which are missing",
    "no weights": "holds no safetensors",
    "no JSON": "cannot be read as JSON",
    "another name": "model.vision.weight",
    "another model": "pos_1LC missing",
    "another shape": "layers.0.mlp.up_proj",
    "no id": "image_token_start is not among",
}


@pytest.mark.parametrize("how", SPOILT)
def test_bad_files(tmp_path: Path, how: str) -> None:
    released(make(vocab_size=START + CODES), tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(InvalidParameterError, match=SPOILT[how]):
        load_official(tmp_path, scales=SCALES)


def test_bad_options_of_files(tmp_path: Path) -> None:
    released(make(vocab_size=START + CODES), tmp_path)
    with pytest.raises(InvalidParameterError, match="14 places in 3 scales"):
        load_official(tmp_path)
    with pytest.raises(UnknownParameterError, match="heads"):
        load_official(tmp_path, heads=2)
    with pytest.raises(InvalidParameterError, match="neither a folder nor a hub id"):
        load_official(tmp_path / "no")
    with pytest.raises(InvalidParameterError, match="is no name of a TokenFlowARModel"):
        to_official({"odd": torch.zeros(1)}, TokenFlowARConfig(**SMALL))
