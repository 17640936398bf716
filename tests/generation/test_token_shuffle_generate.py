"""Drawing with Token-Shuffle: one call of the transformer a window, with cache as without, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig
from transformers.generation import BaseStreamer

from tests.generation.shuffle_models import BOS, CODES, FAMILIES, TEXT, codes_of, language_model, randomise, shuffled
from tokred.core.errors import InvalidParameterError, UnsupportedGenerationError
from tokred.generation.token_shuffle import TokenShuffle
from tokred.generation.token_shuffle_ops import EMPTY, guidance_at, pad_codes, unwindow

GREEDY: dict[str, Any] = {"do_sample": False, "guidance_scale": 1}


@torch.no_grad()
def slowly(model: TokenShuffle, prompt: list[int], grid: tuple[int, int], scale: float, schedule: str, **options: Any):
    """Greedy codes (H, W) without cache: the whole of every branch again for each window. Also the least margin."""
    size = model.config.window
    steps = grid[0] * grid[1] // size**2
    windows = torch.zeros(1, steps, size**2, dtype=torch.int64)
    margin = torch.inf
    for step in range(steps):
        codes = unwindow(windows, size, grid)
        branches = []
        for row in (prompt, options.get("free", [BOS])):
            inputs = {**model.pack([row], codes), "labels": None}
            branches.append(model(**inputs).image_logits[0, step].float())
        g = guidance_at(step + 1, steps, scale, schedule)
        logits = branches[1] + g * (branches[0] - branches[1])
        best = logits.topk(2).values
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
        windows[0, step] = logits.argmax(dim=-1)
    return unwindow(windows, size, grid)[0], margin


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("scale", "schedule"), [(1, "constant"), (3.0, "half_linear"), (2.0, "linear")])
def test_greedy_codes_are_those_of_teacher_forcing(family: str, scale: float, schedule: str) -> None:
    model = shuffled(family)
    found = model.generate_codes(
        [[BOS, 3, 1]], (4, 6), do_sample=False, guidance_scale=scale, guidance_schedule=schedule
    )
    wanted, margin = slowly(model, [BOS, 3, 1], (4, 6), scale, schedule)
    assert margin > 1e-4
    assert torch.equal(found[0], wanted)
    assert len(wanted.unique()) > 2


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"position_mode": "rope2d"}])
def test_windows_and_positions(window: int, options: dict[str, Any]) -> None:
    model = shuffled(window=window, **options)
    found = model.generate_codes([[BOS, 3]], (4, 8), do_sample=False, guidance_scale=2.0)
    wanted, margin = slowly(model, [BOS, 3], (4, 8), 2.0, "half_linear")
    assert margin > 1e-4
    assert torch.equal(found[0], wanted)


@torch.no_grad()
def test_cached_logits_are_those_of_one_pass() -> None:
    model = shuffled(position_mode="rope2d")
    out = model.generate(
        torch.tensor([[BOS, 1, model.config.soi_token_id]]), grid=(4, 6), **GREEDY, return_dict_in_generate=True,
        output_logits=True, output_scores=True,
    )  # fmt: skip
    codes = model.codes_of(out.sequences, (4, 6))
    logits = model(**{**model.pack([[BOS, 1]], codes), "labels": None}).image_logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, atol=1e-4, rtol=0)
    assert torch.equal(torch.stack(out.scores), torch.stack(out.logits))


@pytest.mark.parametrize("scale", [1, 4.0])
def test_a_picture_takes_one_call_a_window(scale: float) -> None:
    model, calls, seen = shuffled(), [], []
    handle = model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    prompts = torch.tensor([[BOS, 1, 4, model.config.soi_token_id]] * 3)
    out = model.generate(
        prompts, grid=8, do_sample=True, guidance_scale=scale, return_dict_in_generate=True,
        on_window=lambda step, steps, codes: seen.append((step, steps, codes.shape)),
    )  # fmt: skip
    handle.remove()
    rows = 3 if scale == 1 else 6
    assert [tuple(shape[:2]) for shape in calls] == [(rows, 4)] + [(rows, 1)] * 15
    assert out.past_key_values.get_seq_length() == 4 + 16 - 1
    assert out.sequences.shape == (3, 4 + 64)
    assert torch.equal(out.sequences[:, :4], prompts)
    assert seen == [(step, 16, (3, 4)) for step in range(1, 17)]


def test_ragged_prompts_and_settings_of_caches_change_nothing() -> None:
    model = shuffled()
    prompts = [[BOS, 3, 1, 7], [BOS], [2, 5]]
    options = {"grid": (4, 4), "do_sample": False, "guidance_scale": 3.0}
    alone = torch.cat([model.generate_codes([prompt], **options) for prompt in prompts])
    assert torch.equal(model.generate_codes(prompts, **options), alone)
    assert torch.equal(model.generate_codes(prompts, use_cache=False, **options), alone)
    assert torch.equal(model.generate_codes(prompts, cache_implementation="static", **options), alone)
    best = {**options, "do_sample": True, "top_k": 1}  # transformers returns several of samples only
    several = model.generate_codes(prompts, num_return_sequences=2, **best)
    assert torch.equal(several, alone.repeat_interleave(2, dim=0))
    model.base.set_attn_implementation("eager")
    assert torch.equal(model.generate_codes(prompts, **options), alone)


@pytest.mark.parametrize("options", [{}, {"position_mode": "rope2d"}])
def test_without_cache_positions_are_the_same(options: dict[str, Any]) -> None:
    model = shuffled(**options)
    given = {"grid": (4, 6), "do_sample": False, "guidance_scale": 3.0}
    found = model.generate_codes([[BOS, 3], [4]], **given)
    assert torch.equal(model.generate_codes([[BOS, 3], [4]], use_cache=False, **given), found)


def test_guidance() -> None:
    for schedule in ("half_linear", "linear", "constant"):
        for steps in (1, 2, 7, 8):
            found = [guidance_at(step, steps, 7.5, schedule) for step in range(1, steps + 1)]
            assert found == sorted(found)
            if schedule != "constant":
                assert found[0] == 1
                middle = steps // 2 + 1 if schedule == "half_linear" else steps
                assert all(g == pytest.approx(7.5) for g in found[max(middle, 2) - 1 + steps % 2 :])
            assert all(g == 7.5 for g in found) or schedule != "constant"
    model = shuffled()
    conditional = model.generate_codes([[BOS, 3]], 4, **GREEDY)
    # nothing to be led away from: the same rows in both halves
    same = {"negative_prompt_ids": torch.tensor([[BOS, 3, model.config.soi_token_id]])}
    led = model.generate_codes([[BOS, 3]], 4, do_sample=False, guidance_scale=7.5, guidance_schedule="constant", **same)
    assert torch.equal(led, conditional)
    for scale in (1, 1.0):
        once = model.generate_codes([[BOS, 3]], 4, do_sample=False, guidance_scale=scale, guidance_schedule="constant")
        assert torch.equal(once, conditional)
    wanted, margin = slowly(model, [BOS, 3], (4, 4), 4.0, "constant", free=[2, 6])
    negative = torch.tensor([[2, 6, model.config.soi_token_id]])
    found = model.generate_codes(
        [[BOS, 3]], 4, do_sample=False, guidance_scale=4.0, guidance_schedule="constant", negative_prompt_ids=negative
    )
    assert margin > 1e-4
    assert torch.equal(found[0], wanted)


def test_sampling_repeats_and_stays_among_the_codes() -> None:
    model = shuffled()
    model.get_output_embeddings().weight.data.mul_(0.1)  # nearly even odds
    drawn = [
        model.generate_codes([[BOS, 1]] * 4, 8, do_sample=True, generator=torch.Generator().manual_seed(seed), top_k=99)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].unique().tolist()) == set(range(CODES))
    best = model.generate_codes([[BOS, 1]], 8, do_sample=True, top_k=1, guidance_scale=1)
    assert torch.equal(best, model.generate_codes([[BOS, 1]], 8, **GREEDY))
    sharp = model.generate_codes([[BOS, 1]], 8, do_sample=True, temperature=1e-4, guidance_scale=1)
    assert torch.equal(sharp, best)
    torch.manual_seed(5)
    first = model.generate_codes([[BOS, 1]], 8, do_sample=True, top_p=0.9, min_p=0.01)
    torch.manual_seed(5)
    assert torch.equal(first, model.generate_codes([[BOS, 1]], 8, do_sample=True, top_p=0.9, min_p=0.01))


@torch.no_grad()
def test_slots_are_drawn_from_their_own_odds() -> None:
    model = shuffled()
    prompts = [[BOS, 1]] * 4000
    found = model.generate_codes(
        prompts, 2, do_sample=True, guidance_scale=1, generator=torch.Generator().manual_seed(0)
    )
    logits = model(**{**model.pack([[BOS, 1]], codes_of(1, 2, 2)), "labels": None}).image_logits[0, 0]
    counts = torch.stack([(found.flatten(1) == code).float().mean(dim=0) for code in range(CODES)], dim=1)
    torch.testing.assert_close(counts, logits.softmax(dim=-1), atol=0.03, rtol=0)


def test_a_grid_that_is_filled_up() -> None:
    model = shuffled()
    options = {"do_sample": False, "guidance_scale": 2.0}
    found = model.generate_codes([[BOS, 3]], (3, 5), pad=True, **options)
    assert found.shape == (1, 3, 5)
    # the cells that were cut off are empty to what follows: the same as reading the padded picture
    logits = model(**{**model.pack([[BOS, 3]], pad_codes(found, 2)), "labels": None}).image_logits[0]
    free = model(**{**model.pack([[BOS]], pad_codes(found, 2)), "labels": None}).image_logits[0]
    g = torch.tensor([guidance_at(step, 6, 2.0, "half_linear") for step in range(1, 7)])[:, None, None]
    best = (free + g * (logits - free)).argmax(dim=-1)
    kept = pad_codes(found, 2)[0]
    again = unwindow(best[None], 2, (4, 6))[0]
    assert torch.equal(again[kept != EMPTY], kept[kept != EMPTY])
    with pytest.raises(InvalidParameterError, match="pad=True"):
        model.generate_codes([[BOS, 3]], (3, 5), **options)


def test_pictures_in_the_prompt() -> None:
    model = shuffled(position_mode="rope2d")
    first = codes_of(2, 4, 4)
    inputs = model.pack([[BOS, 1], [4]], first)
    rows = [
        torch.cat([row[mask.bool()], torch.tensor([model.config.soi_token_id])])
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    options: dict[str, Any] = {"grid": (2, 4), "do_sample": False, "guidance_scale": 2.0}
    mask = (ids >= 0).long()
    found = model.generate(ids.clamp(min=0), attention_mask=mask, image_codes=first, **options)
    codes = model.codes_of(found, (2, 4))
    for row, prompt in enumerate(rows):
        alone = model.generate(prompt[None], image_codes=first[row : row + 1], **options)
        assert torch.equal(model.codes_of(alone, (2, 4))[0], codes[row])
    # by teacher forcing: both pictures of a row in one pass
    logits = model(
        **{**model.pack([[BOS, 1]], [[first[0], codes[0]]]), "labels": None}
    ).image_logits[1, :2]  # fmt: skip
    free = model(**{**model.pack([[BOS]], codes[:1]), "labels": None}).image_logits[0]
    g = torch.tensor([guidance_at(step, 2, 2.0, "half_linear") for step in (1, 2)])[:, None, None]
    assert torch.equal(unwindow((free + g * (logits - free)).argmax(dim=-1), 2, (2, 4)), codes[0])
    options |= {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    twice = model.generate(ids.clamp(min=0), attention_mask=mask, image_codes=first, **options)
    assert torch.equal(model.codes_of(twice, (2, 4)), codes.repeat_interleave(2, dim=0))
    codes_ids = list(range(TEXT, TEXT + CODES))
    prompt = ids[:1, :-1]  # up to the EOI of its picture
    text = model.generate(prompt, image_codes=first[:1], max_new_tokens=3, do_sample=False, suppress_tokens=codes_ids)
    assert text.shape == (1, prompt.shape[1] + 3)
    inputs = {"input_ids": text[:, :-1], "image_codes": first[:1]}
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -3:].index_fill(2, torch.tensor(codes_ids), -torch.inf).argmax(dim=-1)
    assert torch.equal(text[:, -3:], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_the_language_model(family: str) -> None:
    model = shuffled(family)
    prompt = torch.tensor([[BOS, 1, 2], [3, 4, 5]])
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "suppress_tokens": list(range(TEXT, TEXT + CODES)),
        "pad_token_id": 0,
    }
    for chosen in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        assert torch.equal(
            model.generate(prompt, **options, **chosen), model.base.generate(prompt, **options, **chosen)
        )


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_window() -> None:
    model, streamer = shuffled(), Collector()
    prompt = torch.tensor([[BOS, model.config.soi_token_id]])
    found = model.generate(prompt, grid=4, streamer=streamer, do_sample=False)
    assert streamer.ended
    assert [part.numel() for part in streamer.seen] == [2, 4, 4, 4, 4]
    assert torch.equal(torch.cat([part.flatten() for part in streamer.seen]), found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    codes = shuffled().to(dtype).generate_codes([[BOS, 1], [BOS]], 8, do_sample=True)
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64


def test_what_is_refused() -> None:
    model = shuffled()
    prompts = torch.tensor([[BOS, 1, model.config.soi_token_id]] * 2)
    for options, says in (
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor looks back"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"suppress_tokens": [1]}, "SuppressTokens"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [1]}, "PrefixConstrained"),
        ({"max_time": 1.0}, "MaxTimeCriteria: a picture needs all of its windows"),
        ({"num_beams": 2}, "num_beams with a grid"),
        ({"past_key_values": DynamicCache()}, "past_key_values with a grid"),
    ):
        with pytest.raises(UnsupportedGenerationError, match=says):
            model.generate(prompts, grid=4, **options)
    for options, says in (
        ({"grid": 5}, "grid=5: the window 2 does not divide it"),
        ({"grid": (4, 4, 4)}, "down and across"),
        ({"grid": 0}, "grid=0"),
        ({"grid": 4, "guidance_scale": -1}, "guidance_scale=-1"),
        ({"grid": 4, "guidance_schedule": "cosine"}, "half_linear"),
        ({"grid": 4, "max_new_tokens": 15}, "max_new_tokens=15"),
        ({"grid": 4, "max_length": 20}, r"max_length=20.*needs 19"),
        ({"grid": 4, "inputs": prompts[:, :2]}, r"end with \[1\], expected SOI"),
        ({"grid": 4, "inputs": prompts.float()}, r"expected ids \(B, T\)"),
        ({"grid": 4, "attention_mask": torch.tensor([[1, 1, 0]] * 2)}, "padded on the left"),
        ({"grid": 4, "negative_prompt_ids": prompts[:, :2]}, "ending with SOI"),
        ({"generator": torch.Generator()}, "generator without grid"),
        ({"pad": True}, "pad without grid"),
    ):
        given = {"inputs": prompts, **options}
        with pytest.raises(InvalidParameterError, match=says):
            model.generate(given.pop("inputs"), **given)
    with pytest.raises(InvalidParameterError, match=r"prompts=\[\]"):
        model.generate_codes([], 4)
    with pytest.raises(InvalidParameterError, match=r"66 positions given.*has 64"):
        shuffled("gpt2").generate_codes([[BOS]], 16, guidance_scale=1)


# -- large pictures --------------------------------------------------------------------------------------------------


def large() -> TokenShuffle:
    config = LlamaConfig(
        vocab_size=TEXT, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        bos_token_id=BOS, eos_token_id=None, max_position_embeddings=4200,
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    model = TokenShuffle.wrap(AutoModelForCausalLM.from_config(config), codebook_size=16, window=1).eval()
    model = model.next_stage(window=2).next_stage(z_loss=1e-5)
    randomise(model)
    return model


def test_2048_pixels_are_read_and_512_drawn() -> None:
    """16,384 codes are 4,096 positions in training; a picture of 1,024 codes takes 256 steps."""
    model = large()
    inputs = model.pack([[BOS, 1]], codes_of(1, 128, 128, size=16))
    assert inputs["input_ids"].shape[1] == 2 + 1 + 4096 + 1
    out = model(**inputs)
    out.loss.backward()
    assert out.image_logits.shape == (1, 4096, 4, 16)
    assert out.loss.isfinite()
    seen: list[int] = []
    codes = model.generate_codes([[BOS, 1]], 32, do_sample=True, on_window=lambda step, *_: seen.append(step))
    assert codes.shape == (1, 32, 32)
    assert seen == list(range(1, 257))


@pytest.mark.slow
@pytest.mark.full
def test_2048_pixels_are_drawn_in_4096_steps() -> None:
    model, calls = large(), []
    handle = model.get_decoder().register_forward_hook(lambda *call: calls.append(0))
    codes = model.generate_codes([[BOS, 1]], 128, do_sample=True, top_k=8)
    handle.remove()
    assert codes.shape == (1, 128, 128)
    assert len(calls) == 128 * 128 // 4
    assert len(codes.unique()) > 8


def test_the_language_model_is_left_alone() -> None:
    base = language_model()
    model = shuffled(base=base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model.generate_codes([[BOS]], 4, do_sample=False)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.generation_config.max_new_tokens is None
