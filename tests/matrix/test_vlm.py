"""Every multimodal family under small probe methods, against the slow oracle of `vlm_probes`; tiny random models.

Identity and undo run for every family. The other checks run for each family in one setting in turn, and in all settings
with --all. A new family needs a row in `vlm_models.FAMILIES`: the first test fails until it has one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokred
from tests.matrix.vlm_models import FAMILIES, IMAGE_ID, LAST_TEXT, PAD_ID, Prompt, Tiny, language_of, tower_of
from tests.matrix.vlm_probes import Blend, Evenly, Reference, Spy, Uneven
from tokred.adapters.hf_vlm import HFVLMHost
from tokred.adapters.logical_cache import physical_length, reduced_state
from tokred.core.method import VisualMethod, registered

STEPS = 4
METHODS = {
    "compact": Evenly(5),
    "original": Evenly(5, positions="original", keep_newline=True),
    "uneven": Uneven(),
    "uneven-original": Uneven(positions="original"),
    "merged": Blend(0.4),
    "more": Blend(1.6),
    "more-original": Blend(1.6, positions="original", keep_end=False),
}
CACHES = {"dynamic": {}, "none": {"use_cache": False}, "static": {"cache_implementation": "static"}}
every_family = pytest.mark.parametrize("family", FAMILIES)
#: written like another family, line for line, or the same with another part
COUSINS = ("llava_full", "smolvlm", "gemma3_wide", "paligemma2", "qwen2_vl", "llava_next_video")
most_families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.full] * (name in COUSINS)) for name in FAMILIES]
)
two_families = pytest.mark.parametrize(
    "family", [pytest.param(n, marks=[pytest.mark.full] * (n not in ("llava", "qwen3_vl"))) for n in FAMILIES]
)


def settings() -> list:
    """(family, method, cache, kernel): everything with --all; by default each family with each cache, in turn."""
    chosen = []
    pairs = itertools.product(METHODS, CACHES, ("sdpa", "eager"))
    for number, (family, (method, cache, kernel)) in enumerate(itertools.product(FAMILIES, list(pairs))):
        own = number % (len(METHODS) * len(CACHES) * 2)
        turn = (13 * list(FAMILIES).index(family)) % (len(METHODS) * len(CACHES) * 2)
        tiny = FAMILIES[family]
        if kernel in tiny.kernels and (cache != "static" or tiny.static_cache):
            quick = own in (turn, (turn + 17) % 42)
            chosen.append(pytest.param(family, method, cache, kernel, marks=[pytest.mark.full] * (not quick)))
    return chosen


@functools.lru_cache(maxsize=4)
def model_of(family: str, kernel: str = "") -> nn.Module:
    tiny = FAMILIES[family]
    return tiny.make(kernel or tiny.kernels[0])


def rows_of(tiny: Tiny, few: bool = False) -> list[list]:
    """A batch of every kind of row: each variant, none, two images, an image and a video."""
    two = "image:multi" if tiny.name == "llava_onevision" else "image"
    rows: list[list] = [[2, part, 3] for part in tiny.parts()]
    rows.append([6])
    rows.append([1, two, 2, two, 3])
    if "video" in tiny.medias:
        rows.append([1, "video", 2, "video" if tiny.name == "llava_onevision" else "image", 4])
    return rows[1:3] if few else rows


def greedy(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS, **kwargs):
    return model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def forward(model: nn.Module, inputs: dict[str, Tensor], **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def fingerprint(model: nn.Module) -> list:
    """Everything about a model that a patch could leave behind."""
    seen: list = [repr(getattr(model, "config", None)), repr(getattr(model, "generation_config", None))]
    for name, module in model.named_modules():
        plain = {
            key: id(value) if isinstance(value, (nn.Module, Tensor)) else repr(value)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules", "config", "rope_deltas")
        }
        seen.append((name, type(module), plain, list(module._parameters), list(module._modules)))
    return seen


def check_row(model: nn.Module, prompt: Prompt, row: int, method, tokens: list[int], logits: Tensor) -> None:
    """One row of a batch is what the oracle makes of it alone."""
    reference = Reference(model, prompt.tiny, prompt.single(row), method)
    wanted_logits = reference.generate(len(tokens), tokens)[1]
    torch.testing.assert_close(logits, wanted_logits, atol=prompt.tiny.tolerance, rtol=0)
    assert reference.generate(len(tokens))[0] == tokens


def test_every_family_has_a_row():
    served = {type(tiny.make(tiny.kernels[0])).__name__ for tiny in FAMILIES.values()}
    assert served == set(HFVLMHost.classes)


@every_family
def test_keep_all_is_bit_exact_and_undone(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny))
    plain, logits = greedy(model, prompt.inputs), forward(model, prompt.inputs).logits
    before, keys = fingerprint(model), list(model.state_dict())  # the library's own lazy hooks are there by now
    with tokred.patch(model, Evenly(None, bypass=True)) as patch:
        out = greedy(model, prompt.inputs)
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
        assert torch.equal(forward(model, prompt.inputs).logits, logits)
        assert type(out.past_key_values) is type(plain.past_key_values)
        assert len(patch.trace) == 0
        assert list(model.state_dict()) == keys
    with tokred.patch(model, Evenly(None, keep_newline=True)):  # through the machinery
        torch.testing.assert_close(forward(model, prompt.inputs).logits[:, -1], logits[:, -1], atol=1e-5, rtol=0)
    assert fingerprint(model) == before
    again = greedy(model, prompt.inputs)
    assert torch.equal(again.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))


@pytest.mark.parametrize(("family", "method", "cache", "kernel"), settings())
def test_generation_equals_the_manual_loop_of_each_row(family, method, cache, kernel):
    tiny, model = FAMILIES[family], model_of(family, kernel)
    chosen = METHODS[method]
    if tiny.mrope and chosen.positions == "compact":
        pytest.skip("refused by name")
    prompt = tiny.inputs(rows_of(tiny))
    with tokred.patch(model, chosen):
        out = greedy(model, prompt.inputs, **CACHES[cache])
    assert torch.equal(out.sequences[:, :-STEPS], prompt.inputs["input_ids"])
    logits = torch.stack(out.logits, dim=1)
    for row in range(len(prompt.rows)):
        check_row(model, prompt, row, chosen, out.sequences[row, -STEPS:].tolist(), logits[row])


@every_family
def test_trace_counts_and_cells(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny))
    with tokred.patch(model, Evenly(5)) as patch:
        forward(model, prompt.inputs)
        steps = list(patch.trace)
    wanted = [(row, slots) for row, items in enumerate(prompt.media) for _, slots in items]
    assert [step.sample for step in steps] == [row for row, _ in wanted]
    for step, (_, slots) in zip(steps, wanted, strict=True):
        cells = [slot for slot in slots if slot >= 0]
        kept = [cells[place] for place in torch.linspace(0, len(cells) - 1, 5).long()]
        assert step.tokens_in == len(cells)
        assert step.cells.tolist() == kept
        assert step.mask.sum() == 5
        assert step.mask.flatten().nonzero()[:, 0].tolist() == sorted(kept)
        assert sum(step.per_partition) == 5
        assert step.to_dict()["cells"] == kept
        assert tuple(step.layout.slots) == tuple(slots)


@most_families
def test_beams_and_return_sequences(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny))
    calls: list = []
    handle = tower_of(model).register_forward_hook(lambda *given: calls.append(1))
    medias = sum(key.startswith("pixel_values") for key in prompt.inputs)
    method = Evenly(5)
    with tokred.patch(model, method):
        for kwargs in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
            calls.clear()
            given = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, **kwargs}
            cached = model.generate(**prompt.inputs, **given)
            assert len(calls) == medias
            if not family.startswith(
                "paligemma"
            ):  # the library's own prefix grows with the text where nothing is cached
                free = model.generate(**prompt.inputs, **given, use_cache=False)
                assert torch.equal(cached.sequences, free.sequences)
                assert len(calls) == 2 * medias
            count = kwargs.get("num_return_sequences", 1)
            assert cached.sequences.shape[0] == count * len(prompt.rows)
            width = prompt.inputs["input_ids"].shape[1]
            assert torch.equal(cached.sequences[::count, :width], prompt.inputs["input_ids"])
            for row in range(len(prompt.rows)):
                alone = model.generate(**prompt.single(row).inputs, **given)
                for number in range(count):
                    assert torch.equal(
                        alone.sequences[number, -STEPS:], cached.sequences[row * count + number, -STEPS:]
                    )
    handle.remove()


@two_families
def test_sampling_with_a_seed(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny, few=True))
    with tokred.patch(model, Uneven()):
        drawn = []
        caches = ({}, {}, {"use_cache": False}, {"cache_implementation": "static"})
        for kwargs in caches if tiny.static_cache else caches[:3]:
            torch.manual_seed(3)
            drawn.append(
                model.generate(
                    **prompt.inputs, max_new_tokens=6, do_sample=True, temperature=1.5, num_return_sequences=2, **kwargs
                )
            )
    kept = drawn if not family.startswith("paligemma") else [*drawn[:2], *drawn[3:]]
    assert all(torch.equal(one, drawn[0]) for one in kept)


def text_tail(prompt: Prompt, sequences: Tensor, count: int = 3) -> dict[str, Tensor]:
    """Inputs of a second turn: everything so far and `count` more text tokens."""
    tail = torch.randint(5, LAST_TEXT, (sequences.shape[0], count), generator=torch.Generator().manual_seed(9))
    ids = torch.cat([sequences, tail], dim=1)
    grown = ids.shape[1] - prompt.inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(prompt.inputs["attention_mask"], (0, grown), value=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in prompt.inputs:
            # a continuation of PaliGemma is suffix: read causally
            value = 1 if prompt.tiny.name.startswith("paligemma") else 0
            inputs[name] = torch.nn.functional.pad(prompt.inputs[name], (0, grown), value=value)
    return inputs


@most_families
@pytest.mark.parametrize("method", ["compact", "uneven-original", "more"])
def test_a_second_turn_equals_a_fresh_run(family, method, full_matrix):
    """The cache of the first turn goes on with all ids, with the new ones alone, and where it is static."""
    if not full_matrix and method == "more" and family not in ("llava", "gemma3", "qwen3_vl"):
        pytest.skip("with --all")
    tiny, model, chosen = FAMILIES[family], model_of(family), METHODS[method]
    prompt = tiny.inputs(rows_of(tiny))
    with tokred.patch(model, chosen):
        first = greedy(model, prompt.inputs)
        second = text_tail(prompt, first.sequences)
        media = {key: value for key, value in prompt.inputs.items() if key not in second}
        fresh = greedy(model, {**second, **media})
        lengths: list = []
        handle = language_of(model).register_forward_pre_hook(
            lambda m, a, k: lengths.append(k["inputs_embeds"].shape[1]), with_kwargs=True
        )
        held = copy.deepcopy(first.past_key_values)
        runs = [greedy(model, {**second, "past_key_values": first.past_key_values})]
        new = first.sequences.shape[1] - 1  # the last token of the first answer is not in the cache
        rest = {"input_ids": second["input_ids"][:, new:], "attention_mask": second["attention_mask"]}
        runs.append(greedy(model, {**rest, "past_key_values": held}))
        assert [lengths[0], lengths[STEPS]] == [4, 4]
        handle.remove()
        if tiny.static_cache:
            cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=512)
            greedy(model, {**prompt.inputs, "past_key_values": cache})
            runs.append(greedy(model, {**second, "past_key_values": cache}))
    for run in runs:
        assert torch.equal(run.sequences[:, -STEPS:], fresh.sequences[:, -STEPS:])
        torch.testing.assert_close(torch.stack(run.logits), torch.stack(fresh.logits), atol=2 * tiny.tolerance, rtol=0)


@pytest.mark.parametrize("method", ["compact", "uneven-original", "more"])
def test_a_window_in_every_layer(method):
    """A static cache of a windowed model gets a mask that shows the last keys only; which are real is known all the
    same."""
    tiny = FAMILIES["llava_next"]
    config = tiny.config()
    config.text_config.sliding_window = 9
    model, prompt = tiny.make("sdpa", config), tiny.inputs(rows_of(tiny))
    with tokred.patch(model, METHODS[method]):
        runs = [greedy(model, prompt.inputs, **CACHES[cache]) for cache in CACHES]
        for row in range(len(prompt.rows)):
            alone = greedy(model, prompt.single(row).inputs)
            torch.testing.assert_close(
                torch.stack(runs[0].logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-5, rtol=0
            )
    for run in runs[1:]:
        torch.testing.assert_close(torch.stack(run.logits), torch.stack(runs[0].logits), atol=1e-5, rtol=0)


@most_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(family, dtype):
    tiny = FAMILIES[family]
    model, prompt = tiny_copy(family).to(dtype), tiny.inputs(rows_of(tiny))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompt.inputs.items()}
    real = prompt.inputs["attention_mask"].bool()
    plain = forward(model, inputs).logits
    with tokred.patch(model, Evenly(None, keep_newline=True)):
        torch.testing.assert_close(forward(model, inputs).logits[real], plain[real], atol=0.05, rtol=0)
    method = Spy(layers=(0, 1))
    with tokred.patch(model, method):
        assert torch.stack(greedy(model, inputs).logits).isfinite().all()
    assert {value.dtype for _, found in method.seen for value in found.values()} == {torch.float32}


#: Qwen's library code makes positions of a continued conversation from the grids of all its images, but encodes as many
#: images as it is given grids: a new image on a cache does not work there, patched or not
in_line = pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=[pytest.mark.full] * (n in COUSINS)) for n, tiny in FAMILIES.items() if not tiny.mrope],
)


@in_line
def test_an_image_in_the_second_turn_is_reduced_too(family):
    tiny, model = FAMILIES[family], model_of(family)
    part = "video" if tiny.name == "llava_onevision" else "image"
    prompt = tiny.inputs([[2, part, 3], [5]])
    # a window counts padding between the turns: rows of one length there
    more = tiny.inputs([[1, part, 2], [1, part, 2] if family == "gemma3" else [4, part, 3]])
    with tokred.patch(model, Evenly(5)):
        first = greedy(model, prompt.inputs)
        ids = torch.cat([first.sequences, more.inputs["input_ids"]], dim=1)
        answer = torch.ones(2, STEPS, dtype=torch.long)
        mask = torch.cat([prompt.inputs["attention_mask"], answer, more.inputs["attention_mask"]], dim=1)
        second = {**more.inputs, "input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in second:
            suffix = family.startswith("paligemma")  # what comes after the first prompt is read causally
            grown = torch.nn.functional.pad(prompt.inputs["token_type_ids"], (0, STEPS), value=int(suffix))
            tail = more.inputs["token_type_ids"]
            second["token_type_ids"] = torch.cat([grown, torch.ones_like(tail) if suffix else tail], dim=1)
        cached = greedy(model, {**second, "past_key_values": first.past_key_values})
        fresh = greedy(model, {**second, **joined(tiny, prompt, more)})
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(fresh.logits), atol=2 * tiny.tolerance, rtol=0)
    assert torch.equal(cached.sequences, fresh.sequences)


def joined(tiny: Tiny, prompt: Prompt, more: Prompt) -> dict[str, Tensor]:
    """Pixels of both turns, in the order of the rows (row 0 has one image in each, row 1 only in the second)."""
    made = {}
    for key, value in more.inputs.items():
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            continue
        first = prompt.inputs[key]
        if tiny.name in ("idefics3", "smolvlm"):
            rows = [torch.cat([first[0], value[0]]), torch.cat([value[1], torch.zeros_like(value[1])])]
            made[key] = torch.stack(rows)
        elif key == "batch_num_images":
            made[key] = torch.tensor([1, 1, 1])
        else:
            made[key] = torch.cat([first[:1], value]) if first.shape[0] == 1 else torch.cat([first, value])
    return made


@most_families
def test_loss_logits_and_hidden_states(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny)[:1])
    ids = prompt.inputs["input_ids"]
    labels = ids.masked_fill((ids == PAD_ID) | (ids >= IMAGE_ID), -100)
    method = Evenly(5)
    reference = Reference(model, tiny, prompt.single(0), method)
    hidden = reference.hidden(reference.reduced, reference.positions)[0]
    scores = reference.head(hidden)
    with tokred.patch(model, method):
        out = forward(model, prompt.inputs, labels=labels, output_hidden_states=True)
        plain = forward(model, prompt.inputs)
        one = forward(model, prompt.inputs, logits_to_keep=1)
        some = torch.tensor([ids.shape[1] - 3, ids.shape[1] - 1])
        picked = forward(model, prompt.inputs, logits_to_keep=some)
        as_tuple = forward(model, prompt.inputs, return_dict=False)
    assert out.logits.shape[:2] == ids.shape
    torch.testing.assert_close(plain.logits[0, reference.columns], scores, atol=tiny.tolerance, rtol=0)
    torch.testing.assert_close(one.logits, plain.logits[:, -1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(picked.logits, plain.logits[:, some], atol=1e-6, rtol=0)
    assert torch.equal(as_tuple[0], plain.logits)
    assert out.hidden_states[0].shape[1] == len(reference.columns)
    if family.startswith(("paligemma", "gemma3")):  # they leave out the labels of padding in a way of their own
        return
    wanted = []
    for column in range(1, ids.shape[1]):
        if labels[0, column] != -100:
            before = max(place for place, c in enumerate(reference.columns) if c < column)
            wanted.append(torch.nn.functional.cross_entropy(scores[before][None], labels[0, column][None]))
    torch.testing.assert_close(out.loss, torch.stack(wanted).mean(), atol=1e-5, rtol=1e-5)


@most_families
def test_gradients_flow(family):
    tiny, model = FAMILIES[family], tiny_copy(family)
    prompt = tiny.inputs(rows_of(tiny, few=True))

    def reached() -> set[str]:
        model.zero_grad()
        out = model(**prompt.inputs)
        out.logits[:, -1].square().mean().backward()
        return {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    plain = reached()
    with tokred.patch(model, Evenly(5, keep_newline=True)):
        assert reached() == plain


def tiny_copy(family: str) -> nn.Module:
    return copy.deepcopy(model_of(family))


@most_families
def test_embeddings_with_placeholders_are_reduced(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny, few=True))
    inputs = dict(prompt.inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    if tiny.mrope:  # their positions are made of ids
        inputs["position_ids"] = model.model.get_rope_index(
            prompt.inputs["input_ids"],
            **{k: v for k, v in inputs.items() if k.endswith("_thw") or k in ("mm_token_type_ids", "attention_mask")},
        )[0]
    with tokred.patch(model, Evenly(5)) as patch:
        out = forward(model, {**inputs, "inputs_embeds": embeds})
        assert len(patch.trace)
        wanted = forward(model, {**prompt.inputs, **{k: v for k, v in inputs.items() if k == "position_ids"}})
        torch.testing.assert_close(out.logits, wanted.logits, atol=1e-6, rtol=0)
        if tiny.mrope or "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
            return  # the library's own generate() does not take them
        tokens = greedy(model, {**inputs, "inputs_embeds": embeds}).sequences
        assert torch.equal(tokens[:, -STEPS:], greedy(model, prompt.inputs).sequences[:, -STEPS:])


@every_family
def test_text_alone_is_untouched(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs([[6], [3]])
    plain = greedy(model, prompt.inputs)
    with tokred.patch(model, Evenly(5)) as patch:
        out = greedy(model, prompt.inputs)
        assert len(patch.trace) == 0
    assert torch.equal(out.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
    assert type(out.past_key_values) is type(plain.past_key_values)
    assert reduced_state(out.past_key_values) is None


@most_families
def test_lengths_that_the_caller_sees(family):
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny, few=True))
    width = prompt.inputs["input_ids"].shape[1]
    with tokred.patch(model, Evenly(5)):
        out = model.generate(**prompt.inputs, max_length=width + 3, do_sample=False, return_dict_in_generate=True)
        least = model.generate(**prompt.inputs, min_length=width + 2, max_length=width + 2, do_sample=False)
    assert out.sequences.shape[1] == width + 3
    assert least.shape[1] == width + 2
    cache = out.past_key_values
    assert cache.get_seq_length() == width + 2
    assert physical_length(cache) < width
    assert cache.layers[-1].keys.shape[2] == physical_length(cache)


@most_families
def test_a_loop_of_forwards_by_hand(family):
    """Without masks and positions of the caller: those that the library makes by itself must come out right."""
    tiny, model = FAMILIES[family], model_of(family)
    prompt = tiny.inputs(rows_of(tiny)[:1])
    inputs = {key: value for key, value in prompt.inputs.items() if key != "attention_mask"}
    with tokred.patch(model, Evenly(5)):
        wanted = greedy(model, prompt.inputs)
        out = forward(model, inputs, use_cache=True)
        for step in range(STEPS):
            torch.testing.assert_close(out.logits[:, -1], wanted.logits[step], atol=1e-5, rtol=0)
            token = wanted.sequences[:, prompt.inputs["input_ids"].shape[1] + step][:, None]
            out = forward(model, {"input_ids": token}, past_key_values=out.past_key_values, use_cache=True)


# -- methods of tokred ---------------------------------------------------------------------------------------------

#: method: (settings that reduce, settings that keep everything)
SETTINGS = {
    "random_tokens": (tokred.RandomTokens(budget=0.4), tokred.RandomTokens(budget=1.0)),
    "hired": (tokred.HiRED(budget=0.4), tokred.HiRED(budget=1.0)),
    "visionzip": (tokred.VisionZip(budget=0.4), tokred.VisionZip(budget=1.0)),
    "divprune": (tokred.DivPrune(budget=0.4), tokred.DivPrune(budget=1.0)),
    "cdpruner": (tokred.CDPruner(budget=0.4), tokred.CDPruner(budget=1.0)),
    "vispruner": (tokred.VisPruner(budget=0.4), tokred.VisPruner(budget=1.0)),
    "evs": (tokred.EVS(budget=0.4), tokred.EVS(budget=1.0)),
    "quota": (tokred.QuoTA(budget=0.4), tokred.QuoTA(budget=1.0)),
}
#: methods of videos alone, and frames of a video of the families that take them
OF_VIDEOS = ("evs", "quota")
FRAMES = {"llava_next_video": 4, "llava_onevision": 3, "qwen2_vl": 3, "qwen2_5_vl": 3, "qwen3_vl": 3}


def pairs() -> list:
    """(method, family): all with --all, else each family with one method in turn, and each method with two families."""
    chosen, taken = [], 0
    for name in SETTINGS:
        for family in FAMILIES:
            if name in OF_VIDEOS and family not in FRAMES:
                continue
            taken += 1
            quick = taken % 5 == 0
            chosen.append(pytest.param(name, family, marks=[pytest.mark.full] * (not quick)))
    return chosen


def asking(patch, name: str, scores: Tensor):
    return patch.request(frame_scores=scores) if name == "quota" else contextlib.nullcontext()


def test_every_visual_method_has_a_row():
    ours = {name for name, cls in registered().items() if cls.__module__.startswith("tokred.")}
    assert {name for name in ours if issubclass(registered()[name], VisualMethod)} == set(SETTINGS)
    quick = [case.values for case in pairs() if not case.marks]
    assert {name for name, _ in quick} == set(SETTINGS)


@pytest.mark.parametrize(("name", "family"), pairs())
def test_methods(name, family):
    """Budget 1.0 changes nothing; a smaller one makes the prompt shorter, each row as it would be alone."""
    tiny, model = FAMILIES[family], model_of(family)
    rows = [[3, "video", 2], [5], [1, "video", 4]] if name in OF_VIDEOS else rows_of(tiny)
    prompt = tiny.inputs(rows)
    plain = greedy(model, prompt.inputs)
    before = fingerprint(model)
    reduce, keep = SETTINGS[name]
    even, uneven = torch.full((FRAMES.get(family, 1),), 0.5), torch.linspace(0, 1, FRAMES.get(family, 1))
    with tokred.patch(model, keep) as patch, asking(patch, name, even):
        kept = greedy(model, prompt.inputs)
    if name != "quota":  # which resamples frames
        assert torch.equal(torch.stack(kept.logits), torch.stack(plain.logits))
    with tokred.patch(model, reduce) as patch, asking(patch, name, uneven):
        out = torch.stack(greedy(model, prompt.inputs).logits)
        assert len(patch.trace.media) == sum(len(items) for items in prompt.media)
        for step in patch.trace.media:
            assert step.tokens_out < step.tokens_in
        for row in range(len(rows)):
            alone = torch.stack(greedy(model, prompt.single(row).inputs).logits)[:, 0]
            torch.testing.assert_close(alone, out[:, row], atol=3e-5, rtol=0)
    assert fingerprint(model) == before
