"""Methods inside a language model, on every text and multimodal family, against the slow oracle of `llm_probes`.

Identity and undo run for every family. The other checks run for each family in a few settings in turn, and in all
settings with --all. A new family of text models needs a row in `llm_models.TEXTS`: the first test fails without.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokred
from tests.matrix.llm_models import HOSTS, TEXTS, Host, Request
from tests.matrix.llm_probes import Attended, Chosen, Firing, Folded, Reference, Signed, Spaced, Trim
from tests.matrix.test_vlm import CACHES, fingerprint, forward, greedy, text_tail
from tests.matrix.vlm_models import PAD_ID
from tests.matrix.vlm_probes import Evenly
from tokred.adapters.hf_llm import HFLLMHost
from tokred.core.decoder import DecoderMethod, PromptMethod
from tokred.core.method import registered

STEPS = 4
METHODS: dict[str, list] = {
    "spaced": [Spaced()],
    "compact": [Spaced(positions="compact")],
    "cut": [Spaced(cut=True)],
    "cut-compact": [Spaced(cut=True, positions="compact")],
    "length": [Spaced(positions="compact", decode_position="cache_length")],
    "cut-length": [Spaced(cut=True, positions="compact", decode_position="cache_length")],
    "signed": [Signed()],
    "signed-compact": [Signed(positions="compact")],
    "signed-cut": [Signed(cut=True)],
    "attended": [Attended()],
    "attended-own": [Attended(own=True)],
    "own-compact": [Attended(own=True, positions="compact")],
    "folded": [Folded()],
    "folded-compact": [Folded(positions="compact")],
    "trim": [Trim()],
    "trim-first": [Trim(keep_at=(0, 3), zero_at=(1, 4))],
    "trim-length": [Spaced(cut=True, positions="compact"), Trim(decode_position="cache_length")],
    "firing": [Firing()],
    "firing-drop": [Firing(at=(0, 2, 4), before=(3,))],
    "chosen": [Chosen()],
    "chosen-original": [Chosen(positions="original")],
    "behind": [Spaced(before=(2, -1), keep=(4, 2))],
    "all": [Chosen(0.8), Spaced(before=(3,), keep=(3,)), Firing(at=(1, 3))],
    "vision": [Evenly(9), Chosen(0.8, layer=2), Spaced(before=(1, 3), keep=(5, 3), cut=True)],
}
FULL = pytest.mark.full
CACHED = {name: CACHES[name] for name in ("dynamic", "static")}
every_host = pytest.mark.parametrize("name", HOSTS)
#: written like another family, or the same with another part
COUSINS = (
    "mistral", "phi3", "gemma", "gemma2_wide", "qwen2", "llava_full", "llava_siglip", "llava_next_video",
    "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm", "paligemma2", "gemma3_wide",
)  # fmt: skip
most_hosts = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in COUSINS)) for n in HOSTS]
)
FEW = ("llama", "gemma3_text", "llava", "qwen3_vl")
few_hosts = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n not in FEW)) for n in HOSTS])


def fits(host: Host, method: str) -> bool:
    """Whether a host takes these methods; what it does not take is refused by name."""
    compact = any(getattr(m, "positions", None) == "compact" for m in METHODS[method])
    return not ((host.mrope and compact) or (method == "vision" and host.visual is None))


def settings() -> list:
    """(host, method, cache, kernel): everything with --all; by default each host in a few settings, in turn."""
    chosen = []
    for turn, (name, host) in enumerate(HOSTS.items()):
        own = [
            (name, method, cache, kernel)
            for method in METHODS
            for cache in CACHED
            for kernel in host.kernels
            if fits(host, method) and (cache == "dynamic" or host.static)
        ]
        quick = {(7 * turn + step * len(own) // 3) % len(own) for step in range(3)}
        for place, case in enumerate(own):
            chosen.append(pytest.param(*case, marks=[pytest.mark.full] * (place not in quick)))
    return chosen


@functools.lru_cache(maxsize=4)
def model_of(name: str, kernel: str = "") -> Any:
    return HOSTS[name].make(kernel)


@contextlib.contextmanager
def patched(model: nn.Module, request: Request | None, methods: Any, **options: Any) -> Iterator[tokred.Patch]:
    """The model under some methods, which a text model's caller tells what may go."""
    with tokred.patch(model, methods, **options) as patch, asking(patch, request):
        yield patch


def asking(patch: tokred.Patch, request: Request | None) -> Any:
    if request is None or request.prunable is None:
        return contextlib.nullcontext()
    return patch.request(prunable=request.prunable)


def check_rows(request: Request, methods: list, out: Any, cached: bool = True, tail: Tensor | None = None) -> None:
    """Each row of a batch is what the oracle makes of it alone."""
    host, oracle = request.host, model_of(request.host.name, "eager")
    logits = torch.stack(out.logits, dim=1)
    for row in range(len(request.rows)):
        tokens = out.sequences[row, request.width :].tolist()
        reference = Reference(oracle, request.single(row), methods)
        scores = reference.generate(len(tokens), tokens, cached)[1]
        torch.testing.assert_close(logits[row], scores[-logits.shape[1] :], atol=host.tolerance, rtol=0)
        if tail is None:
            assert reference.generate(len(tokens), None, cached)[0] == tokens


def test_every_class_has_a_row():
    assert {type(host.make()).__name__ for host in TEXTS.values()} == set(HFLLMHost.classes)


@every_host
def test_keep_all_is_bit_exact_and_undone(name):
    host, model = HOSTS[name], model_of(name)
    request = host.requests()
    plain, logits = greedy(model, request.inputs), forward(model, request.inputs).logits
    before, keys = fingerprint(model), list(model.state_dict())
    methods = [Spaced(before=(1, 3, -1), keep=(None,) * 3, cut=True), Attended(keep=10**6, own=True), Chosen(rate=1.0)]
    with patched(model, request, methods) as patch:
        out = greedy(model, request.inputs)
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
        assert torch.equal(forward(model, request.inputs).logits, logits)
        assert type(out.past_key_values) is type(plain.past_key_values)
        assert len(patch.trace) == 0
        assert list(model.state_dict()) == keys
    assert fingerprint(model) == before
    for methods in ([Firing(before=(3,)), Trim(keep_at=(), zero_at=())], [Chosen()]):
        with patched(model, request, methods):
            greedy(model, request.inputs)
        assert fingerprint(model) == before
    again = greedy(model, request.inputs)
    assert torch.equal(again.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))


@pytest.mark.parametrize(("name", "method", "cache", "kernel"), settings())
def test_generation_equals_the_manual_loop_of_each_row(name, method, cache, kernel):
    host, model = HOSTS[name], model_of(name, kernel)
    batch = host.requests()
    for request in (batch, batch.single(0)):  # with padding and without, which masks tell apart
        with patched(model, request, METHODS[method]):
            out = greedy(model, request.inputs, **CACHED[cache])
        assert torch.equal(out.sequences[:, :-STEPS], request.inputs["input_ids"])
        check_rows(request, METHODS[method], out)


def test_the_quick_settings_show_every_method():
    quick = [case.values for case in settings() if not case.marks]
    assert {case[1] for case in quick} == set(METHODS)
    assert {case[0] for case in quick} == set(HOSTS)


@pytest.mark.parametrize("method", ["compact", "attended", "attended-own", "firing", "chosen", "all"])
@few_hosts
def test_without_a_cache_each_pass_reads_all_anew(name, method):
    """Methods between layers choose again, by the newest token; the part of the prompt that is read stays."""
    host, model = HOSTS[name], model_of(name)
    if not fits(host, method) or name.startswith("paligemma"):
        pytest.skip("refused by name, or the library's own prefix grows with the text")
    request, methods = host.requests(), METHODS[method]
    with patched(model, request, methods):
        out = greedy(model, request.inputs, use_cache=False)
    if method in ("firing", "all"):
        methods = [m for m in methods if not isinstance(m, Firing)]  # every pass is a prefill, which runs all neurons
    check_rows(request, methods, out, cached=method == "chosen")


@pytest.mark.parametrize("method", ["compact", "signed-cut", "attended", "trim", "firing-drop", "chosen", "all"])
@few_hosts
def test_beams_and_return_sequences(name, method):
    host, model, methods = HOSTS[name], model_of(name), METHODS[method]
    if not fits(host, method):
        pytest.skip("refused by name")
    request = host.requests()
    for kwargs in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        given = {"max_new_tokens": STEPS, "do_sample": False, **kwargs}
        count = kwargs.get("num_return_sequences", 1)
        with patched(model, request, methods):
            out = model.generate(**request.inputs, **given)
        assert torch.equal(out[::count, : request.width], request.inputs["input_ids"])
        for row in range(len(request.rows)):
            single = request.single(row)
            with patched(model, single, methods):
                alone = model.generate(**single.inputs, **given)
            assert torch.equal(alone[:, -STEPS:], out[row * count : (row + 1) * count, -STEPS:])


@few_hosts
def test_sampling_with_a_seed(name):
    host, model = HOSTS[name], model_of(name)
    request, drawn = host.requests(), []
    with patched(model, request, [Chosen(), Signed()]):
        for kwargs in ({}, {}, {"cache_implementation": "static"} if host.static else {}):
            torch.manual_seed(3)
            given = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
            drawn.append(model.generate(**request.inputs, **given, **kwargs))
    assert all(torch.equal(one, drawn[0]) for one in drawn)


@most_hosts
def test_what_the_caller_sees(name):
    """Lengths, the streamer, the cache, and the prompt in front of what is returned."""
    host, model = HOSTS[name], model_of(name)
    request = host.requests(few=True)
    width = request.width
    with patched(model, request, [Chosen(), Spaced()]):
        out = model.generate(**request.inputs, max_length=width + 3, do_sample=False, return_dict_in_generate=True)
        same = model.generate(**request.inputs, max_new_tokens=3, do_sample=False)
        least = model.generate(**request.inputs, min_length=width + 2, max_length=width + 2, do_sample=False)
    assert torch.equal(out.sequences, same)
    assert torch.equal(out.sequences[:, :width], request.inputs["input_ids"])
    assert least.shape[1] == width + 2
    assert out.past_key_values.get_seq_length() == width + 2
    heard: list = []
    streamer = SimpleNamespace(put=heard.append, end=lambda: heard.append("end"))
    single = request.single(1)
    with patched(model, single, [Chosen(), Spaced()]):
        tokens = model.generate(**single.inputs, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert torch.equal(heard[0], single.inputs["input_ids"])
    assert [int(token) for token in heard[1:-1]] == tokens[0, -3:].tolist()
    assert heard[-1] == "end"


def second_turn(request: Request, sequences: Tensor) -> dict[str, Tensor]:
    """Everything so far and three more text tokens."""
    shown = request.prompt if request.prompt is not None else SimpleNamespace(inputs=request.inputs)
    if request.prompt is None:
        shown.tiny = SimpleNamespace(name="")
    return text_tail(shown, sequences)


@pytest.mark.parametrize(
    "method",
    ["compact", "signed-cut", "trim", "all", *(pytest.param(m, marks=FULL) for m in ("length", "firing", "chosen"))],
)
@few_hosts
def test_a_second_turn_goes_on_where_the_first_ended(name, method):
    """With all ids and with the new ones alone, on dynamic and static caches: later tokens are read whole."""
    host, model, methods = HOSTS[name], model_of(name), METHODS[method]
    if not fits(host, method):
        pytest.skip("refused by name")
    request = host.requests()
    with tokred.patch(model, methods) as patch:
        with asking(patch, request):
            first = greedy(model, request.inputs)
        second = second_turn(request, first.sequences)
        held = copy.deepcopy(first.past_key_values)
        runs = [greedy(model, {**second, "past_key_values": first.past_key_values})]
        new = first.sequences.shape[1] - 1  # the last token of the first answer is not in the cache
        rest = {"input_ids": second["input_ids"][:, new:], "attention_mask": second["attention_mask"]}
        runs.append(greedy(model, {**rest, "past_key_values": held}))
        if host.static:
            cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=512)
            with asking(patch, request):
                greedy(model, {**request.inputs, "past_key_values": cache})
            runs.append(greedy(model, {**second, "past_key_values": cache}))
    grown = SimpleNamespace(sequences=runs[0].sequences, logits=runs[0].logits)
    check_rows(request, methods, grown, tail=second["input_ids"])
    for run in runs[1:]:
        assert torch.equal(run.sequences[:, -STEPS:], runs[0].sequences[:, -STEPS:])
        torch.testing.assert_close(torch.stack(run.logits), torch.stack(runs[0].logits), atol=host.tolerance, rtol=0)


@pytest.mark.parametrize("own", [False, True], ids=["previous", "own"])
@every_host
def test_attention_rows_are_those_of_the_softmax(name, own):
    host = HOSTS[name]
    model, oracle = model_of(name), model_of(name, "eager")
    request, method = host.requests(), Attended(own=own)
    with patched(model, request, [method]):
        forward(model, request.inputs)
    for row in range(len(request.rows)):
        reference = Reference(oracle, request.single(row), [method])
        with torch.no_grad():
            reference.forward()
        padding = int((request.inputs["attention_mask"][row] == 0).sum())
        for view, rows, embeddings in method.seen:
            if view.layer not in reference.rows:  # no visual token was left
                assert not view.visual[row].any()
                continue
            real = view.valid[row]
            torch.testing.assert_close(rows[row, :, 0, real], reference.rows[view.layer], atol=1e-5, rtol=1e-4)
            assert not rows[row, :, 0, ~real].any()
            columns = view.columns[row, real] - padding
            torch.testing.assert_close(embeddings[row, real], reference.start.x[0, columns], atol=1e-5, rtol=1e-5)
    method.seen.clear()


@most_hosts
def test_trace_says_columns_of_the_callers_prompt(name):
    host, model = HOSTS[name], model_of(name)
    request = host.requests()
    methods: list = [Chosen(0.7), Spaced(), Folded(before=(2,))]
    if host.visual is not None:
        methods.append(Evenly(9))
    with patched(model, request, methods) as patch:
        greedy(model, request.inputs, steps=2)
        language, steps = patch.trace.language, patch.trace.layers
    chosen = patch.trace.prompt if patch.trace.prompt else [s for s in language if s not in steps]
    assert [step.layer for step in steps] == [1, 2, 3]
    for row in range(len(request.rows)):
        reference = Reference(model_of(name, "eager"), request.single(row), methods)
        with torch.no_grad():
            reference.forward()
        padding = int((request.inputs["attention_mask"][row] == 0).sum())
        assert chosen[0].kept[row] == tuple(column + padding for column in reference.start.columns)
        left = list(chosen[0].kept[row])
        for step in steps:
            assert step.tokens_in[row] == len(left)
            if step.layer in reference.kept:
                left = [column + padding for column in reference.kept[step.layer]]
            assert list(step.kept[row]) == left
            own = sum(media.tokens_out for media in step.media if media.sample == row)
            assert own <= len(left)


@pytest.mark.parametrize("method", ["compact", "signed", "folded", "behind"])
@most_hosts
def test_logits_have_the_callers_length(name, method):
    """Each column has the logits of the nearest survivor at or before it, labels fit; without, those of survivors."""
    host, model = HOSTS[name], model_of(name)
    if not fits(host, method) or (method in ("signed", "behind") and name not in FEW):
        pytest.skip("refused by name, or shown elsewhere")
    request = host.requests(few=True).single(1)
    ids = request.inputs["input_ids"]
    labels = ids.masked_fill(ids >= 61, -100)
    reference = Reference(model_of(name, "eager"), request, METHODS[method])
    with torch.no_grad():
        scores, columns = reference.forward()
    with patched(model, request, METHODS[method]):
        out = forward(model, request.inputs, labels=labels)
        one = forward(model, request.inputs, logits_to_keep=1)
        as_tuple = forward(model, request.inputs, return_dict=False)
    assert out.logits.shape[:2] == ids.shape
    torch.testing.assert_close(out.logits[0, columns], scores, atol=host.tolerance, rtol=0)
    nearest = [max((c for c in columns if c <= column), default=min(columns)) for column in range(ids.shape[1])]
    assert torch.equal(out.logits[0], out.logits[0, nearest])
    torch.testing.assert_close(one.logits, out.logits[:, -1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(as_tuple[0], out.logits, atol=1e-5, rtol=0)
    if host.visual is None:
        loss = nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:])
        torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    with patched(model, request, METHODS[method], restore_length=False):
        short = forward(model, request.inputs)
    torch.testing.assert_close(short.logits[0], scores, atol=host.tolerance, rtol=0)


@most_hosts
def test_gradients_are_those_of_the_manual_loop(name):
    host = HOSTS[name]
    model, oracle = copy.deepcopy(model_of(name)), copy.deepcopy(model_of(name, "eager"))
    request = host.requests(few=True).single(1)
    methods = [Folded(before=(2,)), Spaced(before=(4,), keep=(2,))]
    reference = Reference(oracle, request, methods)
    logits, _ = reference.forward()
    logits[-1].square().mean().backward()
    with patched(model, request, methods):
        model(**request.inputs).logits[0, -1].square().mean().backward()
    ours, theirs = dict(host.decoder(model).named_parameters()), dict(host.decoder(oracle).named_parameters())
    reached = 0
    for key, parameter in theirs.items():
        if parameter.grad is None or key.startswith("embed_tokens"):
            continue
        torch.testing.assert_close(ours[key].grad, parameter.grad, atol=1e-4, rtol=1e-3)
        reached += 1
    assert reached > 20


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_gradient_checkpointing_chooses_the_same(name):
    host, model = HOSTS[name], copy.deepcopy(model_of(name)).train()
    request = host.requests(few=True)
    found = []
    with patched(model, request, [Signed(), Folded(before=(4,))]):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(**request.inputs, use_cache=False).logits[:, -1].square().mean().backward()
            found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad)


# -- methods of tokred -------------------------------------------------------------------------------------------------

#: settings that reduce these small prompts
SETTINGS: dict[str, Any] = {
    "fastv": tokred.FastV(layer=2, keep_rate=0.5),
    "mustdrop": tokred.MustDrop(
        preset=None,
        global_threshold=0.2,
        individual_threshold=0.5,
        pruning_layers=(2, 4),
        stages=("prefill", "decode"),
        key_rate=0.0,
    ),
    "corematching": tokred.CoreMatching(prune_layer=1),
    "gemfilter": tokred.GemFilter(k=0.6, layer=2),
    "pyramiddrop": tokred.PyramidDrop(stages=(2, 3, 4)),
    "dart": tokred.DART(layer=2, keep_rate=0.5),
    "sparsevlm": tokred.SparseVLM(stages=(2, 3, 4), counts=(8, 5, 3)),
}


def pairs() -> list:
    """(method, host): all with --all, else each host with one or two methods in turn."""
    chosen = []
    for turn, name in enumerate(HOSTS):
        for place, method in enumerate(SETTINGS):
            quick = place in (turn % len(SETTINGS), *[(turn + 3) % len(SETTINGS)] * (turn % 2))
            chosen.append(pytest.param(method, name, marks=[pytest.mark.full] * (not quick)))
    return chosen


def test_every_method_has_a_row():
    ours = {key: cls for key, cls in registered().items() if cls.__module__.startswith("tokred.")}
    inside = {key for key, cls in ours.items() if issubclass(cls, (DecoderMethod, PromptMethod))}
    assert inside == set(SETTINGS)
    assert {case.values[0] for case in pairs() if not case.marks} == inside


@pytest.mark.parametrize(("method", "name"), pairs())
def test_methods(method, name):
    """Rows of a padded batch are what each prompt is alone."""
    host, model = HOSTS[name], model_of(name)
    request = host.requests()
    forward(model, request.inputs)  # the library's own lazy hooks
    before = fingerprint(model)
    with patched(model, request, SETTINGS[method]) as patch:
        out = greedy(model, request.inputs)
        assert len(patch.trace.language) > 0
    assert fingerprint(model) == before
    assert torch.equal(out.sequences[:, : request.width], request.inputs["input_ids"])
    for row in range(len(request.rows)):
        single = request.single(row)
        with patched(model, single, SETTINGS[method]):
            alone = greedy(model, single.inputs)
        assert alone.sequences[0, -STEPS:].tolist() == out.sequences[row, -STEPS:].tolist()
        got, wanted = torch.stack(out.logits)[:, row], torch.stack(alone.logits)[:, 0]
        torch.testing.assert_close(got, wanted, atol=2 * host.tolerance, rtol=0)
    padding = request.inputs["attention_mask"] == 0
    other = {**request.inputs, "input_ids": request.inputs["input_ids"].masked_fill(padding, 7)}
    assert PAD_ID != 7
    with patched(model, request, SETTINGS[method]):
        again = greedy(model, other)
    assert torch.equal(again.sequences[:, -STEPS:], out.sequences[:, -STEPS:])
