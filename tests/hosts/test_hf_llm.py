"""The text host and the sites inside a language model: requests, refusals, undo, copies, threads, composition."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import tokred
from tests.hosts.flash import flash_stand_in
from tests.matrix.llm_models import HOSTS, Request
from tests.matrix.llm_probes import Attended, Chosen, Firing, Reference, Signed, Spaced, Trim
from tests.matrix.test_llm import check_rows, patched
from tests.matrix.test_vlm import fingerprint, forward, greedy
from tests.matrix.vlm_probes import Evenly
from tokred.adapters.logical_cache import layer_states
from tokred.adapters.registry import find_host
from tokred.core.errors import (
    ConflictError,
    InvalidParameterError,
    LayerError,
    MissingSiteError,
    PaddingError,
    RequestError,
    StaleCacheError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)

LLAMA = HOSTS["llama"]


@pytest.fixture
def llama():
    return LLAMA.make()


def text() -> Request:
    return LLAMA.requests()


# -- what the caller says ----------------------------------------------------------------------------------------------


def test_the_host_describes_itself(llama):
    host = find_host(llama)
    assert host.family == "transformers text"
    info = host.describe_decoder()
    assert (info.depth, info.dim, info.heads, info.kv_heads, info.head_dim) == (6, 32, 4, 2, 8)
    assert find_host(llama.model).family == host.family
    assert host.describe_tokens({"text_tokens": 7, "prunable_tokens": 3}) == (3, 4)
    assert host.describe_tokens(text().single(0).inputs) == (0, 15)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(4, 5, dtype=torch.bool), torch.ones(3, 18, dtype=torch.bool), torch.ones(18, dtype=torch.bool), None],
    ids=["short", "rows", "flat", "long numbers"],
)
def test_a_mask_of_the_wrong_kind_is_named(llama, mask):
    request = text()
    mask = torch.ones(4, 18, dtype=torch.long) if mask is None else mask
    with tokred.patch(llama, Spaced()) as patch, patch.request(prunable=mask):
        for call in (lambda: greedy(llama, request.inputs), lambda: forward(llama, request.inputs)):
            with pytest.raises(RequestError, match=r"request\(prunable=...\) has shape .* expected a bool mask"):
                call()
    plain = greedy(llama, request.inputs)
    assert plain.sequences.shape[1] == 22


def test_a_text_model_is_told_what_may_go(llama):
    with tokred.patch(llama, Spaced()) as patch:
        with pytest.raises(RequestError, match=r"patch.request\(prunable=mask\)"):
            greedy(llama, text().inputs)
        with patch.request(prunable=torch.zeros(4, 18, dtype=torch.bool)):
            greedy(llama, text().inputs)
        assert len(patch.trace) == 0


def test_layers_that_do_not_exist(llama):
    before = fingerprint(llama)
    for method in (Spaced(before=(7,), keep=(3,)), Attended(before=(6,), own=True), Firing(at=(6,))):
        with pytest.raises(LayerError):
            tokred.patch(llama, method)
    with pytest.raises(ConflictError, match="before layer 3"):
        tokred.patch(llama, [Spaced(), Signed(before=(3,))])
    with pytest.raises(ConflictError, match="part of the prompt"):
        tokred.patch(llama, [Chosen(), Chosen(0.2)])
    with pytest.raises(ConflictError, match="cache"):
        tokred.patch(llama, [Trim(), Trim(keep_at=())])
    with pytest.raises(ConflictError, match="neurons"):
        tokred.patch(llama, [Firing(), Firing(at=(3,))])
    with pytest.raises(MissingSiteError):
        tokred.patch(llama, Evenly(5))
    with pytest.raises(InvalidParameterError, match="positions='compact'"):
        tokred.patch(HOSTS["qwen3_vl"].make(), Spaced(positions="compact"))
    assert fingerprint(llama) == before


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("assistant_model", "self"),
        ("prompt_lookup_num_tokens", 2),
        ("prefill_chunk_size", 4),
        ("cache_implementation", "quantized"),
        ("cache_implementation", "offloaded"),
    ],
)
def test_generate_is_refused_before_any_pass(llama, option, value):
    request, before, calls = text(), fingerprint(llama), []
    given = {option: llama if value == "self" else value}
    with patched(llama, request, [Spaced()]):
        handle = llama.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
        with pytest.raises(UnsupportedGenerationError, match=option):
            greedy(llama, request.inputs, **given)
        if option != "assistant_model":
            with pytest.raises(UnsupportedGenerationError, match=option):
                llama.generate(**request.inputs, generation_config=GenerationConfig(max_new_tokens=2, **given))
        handle.remove()
    assert calls == []
    assert fingerprint(llama) == before


def test_right_padding_is_refused(llama):
    request = text()
    mask = request.inputs["attention_mask"].flip(1)
    with patched(llama, request, [Spaced()]), pytest.raises(PaddingError, match="Pad on the left"):
        greedy(llama, {**request.inputs, "attention_mask": mask})


def test_labels_need_the_callers_length(llama):
    request = text()
    ids = request.inputs["input_ids"]
    refused = pytest.raises(InvalidParameterError, match="restore_length")
    with patched(llama, request, [Spaced()], restore_length=False), refused:
        forward(llama, request.inputs, labels=ids)
    with patched(llama, request, tokred.CoreMatching()):
        with pytest.raises(InvalidParameterError, match="labels are refused"):
            forward(llama, request.inputs, labels=ids)
        with pytest.raises(UnsupportedGenerationError, match="use_cache"):
            greedy(llama, request.inputs, use_cache=False)
        first = greedy(llama, request.inputs)
        with pytest.raises(UnsupportedGenerationError, match="past_key_values"):
            greedy(llama, request.inputs, past_key_values=first.past_key_values)
        with pytest.raises(UnsupportedGenerationError, match="training"):
            llama.train()(**request.inputs)


def test_a_reduced_cache_is_stale_without_the_patch(llama):
    request = text()
    with patched(llama, request, [Spaced()]):
        out = greedy(llama, request.inputs)
    token = {"input_ids": out.sequences[:, -1:]}
    with pytest.raises(StaleCacheError, match="not patched"):
        forward(llama, token, past_key_values=out.past_key_values)


# -- undo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prune", "neurons", "cut_cache", "choose", "layer"])
def test_an_error_in_the_middle_leaves_a_usable_model(llama, where, monkeypatch):
    request, methods = text(), [Spaced(cut=True), Firing(at=(3,)), Trim(), Chosen()]
    plain, before = greedy(llama, request.inputs), fingerprint(llama)
    with patched(llama, request, methods):
        wanted = greedy(llama, request.inputs)
    owner = {"prune": Spaced, "neurons": Firing, "cut_cache": Trim, "choose": Chosen}.get(where)

    def fail(*given, **options):
        raise OSError("out of luck")

    with patched(llama, request, methods) as patch:
        with monkeypatch.context() as broken:
            handle = None
            if owner is None:
                handle = llama.model.layers[4].self_attn.register_forward_pre_hook(fail)
            else:
                broken.setattr(owner, where, fail)
            with pytest.raises(OSError, match="out of luck"):
                greedy(llama, request.inputs)
            if handle is not None:
                handle.remove()
        again = greedy(llama, request.inputs)
        assert torch.equal(torch.stack(again.logits), torch.stack(wanted.logits))
        patch.remove()
        patch.remove()
    assert fingerprint(llama) == before
    assert torch.equal(torch.stack(greedy(llama, request.inputs).logits), torch.stack(plain.logits))


def test_config_and_weights_stay_as_they_were(llama, tmp_path):
    request, methods = text(), [Attended(), Chosen(), Firing()]
    llama.save_pretrained(tmp_path / "plain")  # which writes the dtype into the config
    config, keys = llama.config.to_dict(), list(llama.state_dict())
    with patched(llama, request, methods):
        greedy(llama, request.inputs)
        assert llama.config.to_dict() == config
        assert list(llama.state_dict()) == keys
        llama.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def test_the_attention_implementation_can_be_changed_while_patched(llama):
    request, methods = text(), [Attended(), Chosen()]
    with patched(llama, request, methods):
        before = greedy(llama, request.inputs)
        llama.set_attn_implementation("eager")
        after = greedy(llama, request.inputs)
    assert llama.config._attn_implementation == "eager"
    assert llama.model.layers[1].self_attn.config is llama.config
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert llama(**request.inputs, output_attentions=True).attentions[0] is not None
    check_rows(request, methods, after)


# -- copies, threads ---------------------------------------------------------------------------------------------------


def test_a_patched_model_copies_and_pickles(llama):
    request, methods = text(), [Spaced(cut=True), Chosen(), Firing(at=(3,)), Trim()]
    with tokred.patch(llama, methods) as patch:
        with patch.request(prunable=request.prunable):
            wanted = greedy(llama, request.inputs)
        buffer = io.BytesIO()
        torch.save(llama, buffer)
        buffer.seek(0)
        others = [copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)), torch.load(buffer, weights_only=False)]
    for other in others:
        tokred.unpatch(other)
        with patched(other, request, methods):
            again = greedy(other, request.inputs)
        assert torch.equal(torch.stack(again.logits), torch.stack(wanted.logits))
        assert fingerprint(other)[0] == fingerprint(llama)[0]


def test_a_copy_is_independent_of_its_original(llama):
    host = HOSTS["llava"]
    model, request = host.make(), host.requests()
    plain = greedy(model, request.inputs)
    tokred.patch(model, [Spaced(cut=True), Chosen()])
    wanted = greedy(model, request.inputs)
    other = copy.deepcopy(model)
    tokred.unpatch(model)
    assert torch.equal(torch.stack(greedy(other, request.inputs).logits), torch.stack(wanted.logits))
    assert torch.equal(torch.stack(greedy(model, request.inputs).logits), torch.stack(plain.logits))
    tokred.unpatch(other)
    assert torch.equal(torch.stack(greedy(other, request.inputs).logits), torch.stack(plain.logits))


def test_a_cache_copies_pickles_crops_and_reorders(llama):
    request, methods = text(), [Spaced(cut=True), Firing(at=(3,)), Trim()]
    with patched(llama, request, methods):
        out = greedy(llama, request.inputs, steps=5)
    cache, width = out.past_key_values, request.width
    mask = torch.nn.functional.pad(request.inputs["attention_mask"], (0, 5), value=1)
    positions = mask.cumsum(dim=1) - 1
    assert layer_states(cache) is not None
    with tokred.patch(llama, methods):
        for kept in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            kept.crop(-3)  # the prompt and one token are left
            assert kept.get_seq_length() == width + 1
            tail = {"input_ids": out.sequences[:, width + 1 :], "position_ids": positions[:, width + 1 :]}
            logits = forward(llama, {**tail, "attention_mask": mask}, past_key_values=kept).logits
            torch.testing.assert_close(logits[:, :3].transpose(0, 1), torch.stack(out.logits[2:]), atol=1e-5, rtol=0)
        order = torch.tensor([2, 0, 0])
        kept = copy.deepcopy(cache)
        kept.batch_select_indices(order)
        step = {"input_ids": out.sequences[order, -1:], "attention_mask": mask[order]}
        moved = forward(llama, step, past_key_values=kept).logits
        whole = forward(llama, {"input_ids": out.sequences[:, -1:], "attention_mask": mask}, past_key_values=cache)
        torch.testing.assert_close(moved, whole.logits[order], atol=1e-5, rtol=0)


def test_two_threads_do_not_mix(llama):
    one, two = text(), text().single(3)
    methods = [Chosen(), Spaced(cut=True), Firing(at=(3,))]
    found: dict[str, list] = {"one": [], "two": []}
    with tokred.patch(llama, methods) as patch:

        def work(name: str, request: Request) -> None:
            for _ in range(5):
                with patch.request(prunable=request.prunable):
                    found[name].append((greedy(llama, request.inputs).sequences, patch.trace.prompt[0].kept))

        wanted = {}
        for name, request in (("one", one), ("two", two)):
            work(name, request)
            wanted[name] = found[name][0]
        threads = [threading.Thread(target=work, args=case) for case in (("one", one), ("two", two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, runs in found.items():
        assert len(runs) == 10
        for sequences, kept in runs:
            assert torch.equal(sequences, wanted[name][0])
            assert kept == wanted[name][1]


# -- ways of calling ---------------------------------------------------------------------------------------------------


def test_a_loop_of_forwards_by_hand(llama):
    """Without masks and positions of the caller: those that the library makes by itself must come out right."""
    request = text().single(0)
    methods = [Spaced(cut=True, positions="compact")]
    with patched(llama, request, methods):
        wanted = greedy(llama, request.inputs)
        out = forward(llama, {"input_ids": request.inputs["input_ids"]}, use_cache=True)
        for step in range(3):
            torch.testing.assert_close(out.logits[:, -1], wanted.logits[step], atol=1e-5, rtol=0)
            token = wanted.sequences[:, request.width + step][:, None]
            out = forward(llama, {"input_ids": token}, past_key_values=out.past_key_values, use_cache=True)


def test_embeddings_instead_of_ids(llama):
    request, methods = text(), [Chosen(), Spaced()]
    embeds = llama.get_input_embeddings()(request.inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": request.inputs["attention_mask"]}
    with patched(llama, request, methods):
        wanted = greedy(llama, request.inputs)
        out = greedy(llama, given)
        both = greedy(llama, {**request.inputs, "inputs_embeds": embeds})
        none = greedy(llama, given, use_cache=False)
    assert torch.equal(torch.stack(out.logits), torch.stack(wanted.logits))
    assert torch.equal(out.sequences[:, -4:], wanted.sequences[:, -4:])
    assert torch.equal(both.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(none.logits), torch.stack(wanted.logits), atol=1e-5, rtol=0)


def test_the_model_without_its_head(llama):
    request = text()
    with patched(llama, request, [Spaced()]):
        wanted = forward(llama, request.inputs, output_hidden_states=True)
    with patched(llama.model, request, [Spaced()]):
        out = forward(llama.model, request.inputs)
    torch.testing.assert_close(llama.lm_head(out.last_hidden_state), wanted.logits, atol=1e-6, rtol=0)


def test_a_cache_of_the_caller(llama):
    request = text()
    with patched(llama, request, [Spaced(cut=True)]):
        wanted = greedy(llama, request.inputs)
        mine = DynamicCache()
        out = greedy(llama, {**request.inputs, "past_key_values": mine})
    assert out.past_key_values is mine
    assert torch.equal(torch.stack(out.logits), torch.stack(wanted.logits))
    assert [layer.keys.shape[2] for layer in mine.layers][:3] != [request.width + 3] * 3


def test_a_prompt_method_acts_in_generate_alone(llama):
    request = text()
    plain = forward(llama, request.inputs).logits
    with tokred.patch(llama, Chosen()):
        assert torch.equal(forward(llama, request.inputs).logits, plain)


def test_short_prompts_go_on_untouched(llama):
    """Rows that a method leaves whole keep everything, beside rows that it shortens."""
    request, methods = text(), [Chosen(0.5, least=8)]
    with patched(llama, request, methods) as patch:
        out = greedy(llama, request.inputs)
        assert [len(row) for row in patch.trace.prompt[0].kept][1] == 7
    check_rows(request, methods, out)


def test_half_precision(llama):
    request = text()
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(llama).to(dtype)
        with patched(model, request, [Chosen(), Attended(), Firing(at=(3,))]):
            out = greedy(model, request.inputs)
        assert torch.stack(out.logits).isfinite().all()


# -- marks, views ------------------------------------------------------------------------------------------------------


def test_marks_travel_with_the_tokens(llama):
    """What is written at one layer is read at later ones, and in the cache, for the tokens that are left."""
    request, trim = text(), Trim(keep_at=(4,), zero_at=())
    methods = [Firing(at=(0,)), Spaced(before=(2,), keep=(3,)), trim]
    with patched(llama, request, methods):
        greedy(llama, request.inputs, steps=1)
    view = trim.seen[-1]
    assert [columns.shape[1] for columns in view.columns[:2]] == [18, 18]
    for row in range(4):
        reference = Reference(LLAMA.make("eager"), request.single(row), methods)
        with torch.no_grad():
            reference.forward()
        padding = int((request.inputs["attention_mask"][row] == 0).sum())
        for layer, now in enumerate(reference.entered):
            real = view.valid[layer][row]
            assert (view.columns[layer][row, real] - padding).tolist() == now.columns
            assert view.visual[layer][row, real].tolist() == now.visual
            assert view.marks[layer]["probe_fires"][row, real].tolist() == now.fires or layer == 0


def test_what_a_prompt_method_is_shown(llama):
    """Queries and keys are those of the whole model's layer; nothing behind them runs, nothing is cached."""
    request, method = text(), Chosen(layer=2)
    ran: list = []
    handles = [
        llama.model.layers[index].mlp.register_forward_hook(lambda *a, index=index: ran.append(index))
        for index in range(6)
    ]
    with patched(llama, request, [method]):
        greedy(llama, request.inputs, steps=1)
    assert ran == [0, 1, 0, 1, 2, 3, 4, 5]
    for handle in handles:
        handle.remove()
    view, oracle = method.seen[-1], LLAMA.make("eager")
    assert view.layer == 2
    for row in range(4):
        single = request.single(row)
        reference = Reference(oracle, single, [])
        with torch.no_grad():
            reference.prefill(reference.start)
        real = view.valid[row]
        torch.testing.assert_close(view.keys[row][:, real], reference.store.keys[2][0], atol=1e-5, rtol=1e-4)
        assert view.visual[row, real].tolist() == single.prunable[0].tolist()
    method.seen.clear()


# -- flash attention ---------------------------------------------------------------------------------------------------


def flash_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash attention computes: causal from the right end, with a (B, keys) mask of padding or none."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, 1, -1, -1)
    if attention_mask is not None:
        assert attention_mask.shape == (batch, keys)
        seen = seen & attention_mask[:, None, None].bool()
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2), None


@pytest.fixture
def flash():
    with flash_stand_in(flash_like) as name:
        yield name


@pytest.mark.parametrize(
    "methods",
    [
        [Attended(before=(3,), keep=2)],
        [Spaced(cut=True), Firing(at=(1, 3))],
        [Signed()],
        [Chosen(0.6), Spaced(before=(3,), keep=(2,))],
    ],
    ids=["rows", "cut", "ragged", "prompt"],
)
def test_flash_attention_answers_as_sdpa_does(llama, flash, methods):
    """A stand-in: masks have two dimensions there, and None where nothing is padded."""
    request = text()
    with patched(llama, request, methods):
        wanted = greedy(llama, request.inputs)
        llama.config._attn_implementation = flash
        got = greedy(llama, request.inputs)
        assert torch.equal(got.sequences, wanted.sequences)
        for a, b in zip(got.logits, wanted.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_masks_of_other_kinds_are_refused(llama):
    """Flex attention's block masks, prepared by the caller."""
    request = text()

    class BlockMask:
        shape = (1, 1, 2, 2)

    with (
        patched(llama, request, [Spaced()]),
        pytest.raises(UnsupportedModelError, match=r"mask of type BlockMask.*sdpa"),
    ):
        llama(request.inputs["input_ids"], attention_mask=BlockMask())
