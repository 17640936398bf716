"""The bundled needle LLM: loads offline, finds the needle through ``generate``, is trained by one command."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokred import zoo
from tokred.data import NeedleContexts
from tokred.data.needles import BOS, IS, NEEDLE_WORDS, OF, VALUE_IDS, draw_needles, text_of
from tokred.zoo.needle_llm import CONFIG, FOLDER

pytest.importorskip("transformers")
WEIGHTS = FOLDER / "model.safetensors"


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return zoo.load("needle-llm")


@pytest.mark.usefixtures("no_sockets")
def test_loads_without_a_network() -> None:
    model, tokenizer = zoo.load("needle-llm")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.is_fast
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_file_is_small_and_the_cards() -> None:
    stored = zoo.card("needle-llm")["weights"]
    assert WEIGHTS.stat().st_size == stored["bytes"] <= 6e6
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == stored["sha256"]


def test_weights_are_all_there(bundled: tuple[Any, Any]) -> None:
    from safetensors.torch import load_file

    from tokred.zoo.needle_llm import build_needle_llm

    state = load_file(WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float16}
    model = build_needle_llm()
    model.load_state_dict(state, strict=True)
    for name, value in bundled[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for key, value in CONFIG.items():
        stored = getattr(bundled[0].config, key)
        assert value.items() <= stored.items() if isinstance(value, dict) else stored == value, key


def test_text_and_ids_agree(bundled: tuple[Any, Any]) -> None:
    tokenizer = bundled[1]
    prompts = NeedleContexts("val", 0, tokens=50, needles=3).batch(0, 3).prompts()
    for row in prompts:
        assert tokenizer(text_of(row).removeprefix("<s> ")).input_ids == row.tolist()
        assert tokenizer.decode(row) == text_of(row)
    short = tokenizer(["key of alice is", "is"], padding=True, return_tensors="pt")
    assert short.attention_mask.tolist() == [[1] * 5, [0] * 3 + [1] * 2]
    assert tokenizer.convert_tokens_to_ids(list(NEEDLE_WORDS)) == list(range(len(NEEDLE_WORDS)))
    assert tokenizer.unk_token_id == tokenizer("xyzzy", add_special_tokens=False).input_ids[0]


def test_a_text_by_hand(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    text = "the river was dark . key of alice is tulip . rain came at night . key of bruno is copper . key of {} is"
    inputs = tokenizer([text.format("alice"), text.format("bruno")], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert [tokenizer.decode(row[inputs.input_ids.shape[1] :][:2]) for row in output] == ["tulip </s>", "copper </s>"]


@pytest.mark.parametrize(("tokens", "needles", "count"), [(256, 16, 100), (512, 16, 100), (1000, 24, 40)])
def test_finds_the_needle(bundled: tuple[Any, Any], tokens: int, needles: int, count: int) -> None:
    """Test contexts: three standard errors of so few questions below the card."""
    pytest.importorskip("tqdm")
    from tokred.zoo.evaluate_needle_llm import recall

    table = zoo.card("needle-llm")["recall"]["test"]
    stored = table[str(tokens)]
    row = recall(bundled[0], NeedleContexts("test", table["seed"], tokens, needles), count)
    assert row["recall"] >= stored["recall"] - 3 * (stored["recall"] * (1 - stored["recall"]) / count) ** 0.5 - 0.02


def test_float16_weights_lose_nothing(bundled: tuple[Any, Any]) -> None:
    """The file is float16: what float32 arithmetic makes of it and what float16 arithmetic does name the same value."""
    batch = NeedleContexts("val", 5, 256, 16).batch(0, 24)
    half = zoo.load("needle-llm")[0].half()
    with torch.inference_mode():
        full = bundled[0](batch.prompts(), logits_to_keep=1).logits[:, -1]
        low = half(batch.prompts(), logits_to_keep=1).logits[:, -1]
    assert low.dtype == torch.float16
    assert (full.argmax(-1) == low.argmax(-1)).sum() >= 23
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.25)


def test_answer_needs_the_needle(bundled: tuple[Any, Any]) -> None:
    """With its value replaced by another, the model says the other one."""
    batch = NeedleContexts("val", 7, 128, 8).batch(0, 32)
    changed, places = batch.prompts(), batch.answer_spans()[:, 0] + 4
    rows = torch.arange(32)
    assert torch.equal(changed[rows, places], batch.answers[:, 0])
    other = VALUE_IDS.start + (batch.answers[:, 0] - VALUE_IDS.start + 17) % len(VALUE_IDS)
    changed[rows, places] = other
    with torch.inference_mode():
        said = bundled[0](changed, logits_to_keep=1).logits[:, -1].argmax(-1)
    assert (said == other).float().mean() >= 0.85


def test_card_keeps_its_promises() -> None:
    card = zoo.card("needle-llm")
    for split in ("val", "test"):
        table = card["recall"][split]
        assert table["256"]["recall"] >= 0.86
        assert table["512"]["recall"] >= 0.86
        assert table["1000"]["recall"] >= 0.75
    assert card["recall"]["val"]["seed"] != card["recall"]["test"]["seed"]


def test_checksum_is_the_cards() -> None:
    pytest.importorskip("tqdm")
    from tokred.zoo.evaluate_needle_llm import context_checksum

    stored = zoo.card("needle-llm")["checksum"]
    contexts = NeedleContexts(stored.pop("split"), stored.pop("seed"), stored["tokens"], stored["needles"])
    assert context_checksum(contexts) == stored


def test_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"tokred\[transformers\]\""):
        zoo.load("needle-llm")


def test_training_command_runs(tmp_path: Path) -> None:
    """Every phase, the saved files and the card, on a few tiny batches."""
    pytest.importorskip("tqdm")
    from tokred.zoo.train_needle_llm import NeedleRecipe, main

    threads, bundled = torch.get_num_threads(), WEIGHTS.read_bytes()
    try:
        main(["--smoke", "--seed", "3", "--out", str(tmp_path)])
        main(["--smoke", "--evaluate", "--seed", "3", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    card = json.loads((tmp_path / "seed3" / "card.json").read_text())
    log = json.loads((tmp_path / "seed3" / "log.json").read_text())
    assert set(card["recall"]["test"]) == {"seed", "256", "512", "1000"}
    assert [row["phase"] for row in log["log"]] == list(range(len(NeedleRecipe().phases)))
    assert WEIGHTS.read_bytes() == bundled, "without --bundle the package stays as it is"
    with pytest.raises(FileNotFoundError, match=r"train it first"):
        main(["--smoke", "--evaluate", "--seed", "4", "--out", str(tmp_path)])


def test_training_is_deterministic() -> None:
    pytest.importorskip("tqdm")
    from dataclasses import replace

    from tokred.zoo.train_needle_llm import NeedleRecipe, train

    recipe = NeedleRecipe().smoke()
    recipe = replace(recipe, phases=recipe.phases[:3])
    first, second = (train(recipe, seed=4)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_start_finds_the_needle_before_any_step() -> None:
    """Layer 1, heads 0 and 1: the attention of the last word lies on the value it asks for."""
    pytest.importorskip("tqdm")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from tokred.zoo.needle_llm import build_needle_llm
    from tokred.zoo.train_needle_llm import start_values

    model = build_needle_llm()
    start_values(model, torch.Generator().manual_seed(0))
    batch = draw_needles(16, 62, 8, 1, torch.Generator().manual_seed(1))
    prompts, layer = batch.prompts(), model.model.layers[1]
    with torch.inference_mode():
        states = model.model(prompts, output_hidden_states=True, use_cache=False).hidden_states[1]
        x, attention = layer.input_layernorm(states), layer.self_attn
        q, k = (proj(x).unflatten(-1, (-1, 32)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(prompts.shape[1])[None]))
        weights = (q[:, :2, -1:] @ k[:, :1].mT / 32**0.5).softmax(-1)[:, :, 0]
    at_value = weights[torch.arange(16), :, batch.answer_spans()[:, 0] + 4]
    assert at_value.mean() > 0.9


def test_training_leaves_the_written_parts_and_moves_the_rest() -> None:
    pytest.importorskip("tqdm")
    from dataclasses import replace

    from tokred.zoo.needle_llm import build_needle_llm
    from tokred.zoo.train_needle_llm import NeedleRecipe, start_values, train, written_parts

    recipe = NeedleRecipe().smoke()
    model, record = train(replace(recipe, phases=recipe.phases[:1]), seed=4)
    torch.manual_seed(4)
    start = build_needle_llm()
    start_values(start, torch.Generator().manual_seed(4))
    written = {id(p) for part in written_parts(model) for p in part.parameters()}
    old = dict(start.named_parameters())
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, old[name]) == (id(p) in written), name
    assert record["seed"] == 4


def test_questions_of_a_pack_do_not_see_each_other(bundled: tuple[Any, Any]) -> None:
    """A packed question has the logits that its prompt has alone."""
    pytest.importorskip("tqdm")
    from tokred.zoo.train_needle_llm import answer_logits

    model, batch = bundled[0], NeedleContexts("val", 0, 50, 5, questions=4).batch(0, 3)
    with torch.inference_mode():
        together = answer_logits(model, batch.context, batch.questions, batch.answers)
        assert together.shape == (3, 4, 2, len(NEEDLE_WORDS))
        for i in range(4):
            alone = model(torch.cat([batch.prompts(i), batch.answers[:, i : i + 1]], 1)).logits[:, -2:]
            torch.testing.assert_close(together[:, i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", [1, 5])
def test_thinned_contexts_keep_what_is_asked(pool: int) -> None:
    pytest.importorskip("tqdm")
    from tokred.zoo.train_needle_llm import thin

    generator = torch.Generator().manual_seed(0)
    batch = draw_needles(40, 200, 12, 4, generator)
    starts = batch.spans[..., 0].gather(1, batch.asked)
    short = thin(batch.context, starts, 48, pool, 0.5, generator)
    assert short.shape == (40, 48)
    assert 5 <= int((short == BOS).sum()) <= 35
    for row, whole, questions, answers in zip(short, batch.context, batch.questions, batch.answers, strict=True):
        said, rest = text_of(row), iter(whole.tolist())
        assert all(token in rest for token in row.tolist()), "words of the context, in their order"
        for question, answer in zip(questions, answers, strict=True):
            assert text_of([*question[2:].tolist(), int(answer)]) in said
    counts = [int((short == token).sum()) for token in (OF, IS)]
    assert counts[0] < counts[1], "other words of a needle may be lost"
    assert any(int(name) not in row for row, names in zip(short, batch.names, strict=True) for name in names)
