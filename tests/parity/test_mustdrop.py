"""MustDrop against the released code: windows and filter as functions, and whole models end to end."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokred
from tests.conftest import ROOT
from tests.parity._golden import Case, Golden, last_output, read_manifest, recorded
from tokred import ops
from tokred.core.carried import CarriedTokens
from tokred.vlm.mustdrop import KEY_MARK, WindowMerge, filter_tokens, merge_windows, text_attention, window_similarity

METHOD = "mustdrop"

MERGE = ("grid", "channels", "batch", "window", "threshold", "merged_windows", "windows_over_threshold", "tokens_out")
FILTER = ("heads", "sys_len", "img_len", "text_len", "global_thr", "individual_thr", "kept")
SETTINGS = ("global_thr", "individual_thr", "pruning_layers", "window", "spatial_threshold", "key_rate")
COUNTS = ("vision_tokens_per_tile_after_merge", "key_tokens_per_tile", "n_placeholders_in_llm")
COUNTS += ("image_tokens_before_each_filter_and_final", "kv_lengths_after_prefill")
MODEL = ("config", "tiles", "pre_len", "post_len", "grid", *SETTINGS, *COUNTS)
KINDS = {"merge_": "merge", "filter_": "filter", "full_": "full"}


def test_case(golden: Golden) -> None:
    kind = golden.kind(KINDS)
    check, options = {
        "merge": (check_merge, MERGE),
        "filter": (check_filter, FILTER),
        "full": (check_model, MODEL),
    }[kind]
    golden.known((*options, "exercises", "kind"))
    check(golden)
    golden.finish()


# -- pure functions --------------------------------------------------------------------------------------------------


def check_merge(golden: Golden) -> None:
    entry, x = golden.entry, golden["in.x"]
    side, window = entry["grid"], tuple(entry["window"])
    assert x.shape == (entry["batch"], 1 + side * side, entry["channels"])
    similarity = window_similarity(x[:, 1:], (side, side), window)
    golden.check("out.similarity_map", similarity, "similarity_map")
    over = (similarity >= entry["threshold"]).sum(dim=1)
    assert over.tolist() == entry["windows_over_threshold"]
    counts = over.amin().expand_as(over)
    assert int(counts[0]) == entry["merged_windows"]
    golden.check("out.topk_windows", ops.rank(similarity)[:, : int(counts[0])])

    merge = merge_windows(similarity, counts, (side, side), window)
    patches, sizes = x[:, 1:], x.new_ones(x.shape[0], side * side)
    if merge is not None:
        assert merge.valid is None
        patches, sizes = ops.merge_tokens(patches, merge.assignment, merge.slots)
    assert patches.shape[1] == entry["tokens_out"]
    golden.check("out.x", torch.cat([x[:, :1], patches], dim=1), "merged_x")
    golden.check("out.size", torch.cat([sizes.new_ones(len(x), 1), sizes], dim=1)[:, :, None])


def check_filter(golden: Golden) -> None:
    entry, attention = golden.entry, golden["in.attn_text_to_image"]
    assert attention.shape[1:] == (entry["heads"], entry["text_len"], entry["img_len"])
    prunable = torch.ones(attention.shape[0], entry["img_len"], dtype=torch.bool)
    keep = filter_tokens(*text_attention(attention), prunable, entry["global_thr"], entry["individual_thr"])
    assert int(keep[0].sum()) == entry["kept"]
    golden.check("out.keep", keep[0].nonzero()[:, 0])


# -- whole models ----------------------------------------------------------------------------------------------------


def check_model(golden: Golden) -> None:
    entry, model = golden.entry, build(golden)
    inputs = model_inputs(golden, model)
    method = tokred.MustDrop(
        official=True,
        global_threshold=entry["global_thr"],
        individual_threshold=entry["individual_thr"],
        pruning_layers=entry["pruning_layers"],
        window=entry["window"],
        spatial_threshold=entry["spatial_threshold"],
        key_rate=entry["key_rate"],
    )
    with torch.no_grad(), tokred.patch(model, method, restore_length=False), ExitStack() as stack:
        tower = stack.enter_context(recorded(WindowMerge))
        handed = stack.enter_context(answers(CarriedTokens, "select"))
        filtered = stack.enter_context(answers(tokred.MustDrop, "prune"))
        # hooks that look go on after those of the patch
        projected = stack.enter_context(inputs_of(model.model.multi_modal_projector))
        language = stack.enter_context(inputs_of(model.model.language_model))
        normed = stack.enter_context(last_output(model.model.language_model.norm))
        output = model(**inputs, use_cache=True)
        check_tower(golden, tower, handed, projected[0])
        check_filters(golden, filtered)
        golden.check("out.prefill_inputs_embeds", language[-1])
        golden.check("out.prefill_last_hidden", normed[-1])
        golden.check("out.prefill_logits_all", output.logits, "logits")
        golden.check("out.prefill_logits_last", output.logits[:, -1], "logits")
        check_cache(golden, output.past_key_values)
    with torch.no_grad(), tokred.patch(model, method):
        check_generation(golden, model, inputs)


def build(golden: Golden) -> Any:
    """LLaVA-1.5 for one image; LLaVA-NeXT for tiles, an overview first and the others beside each other."""
    config, tiles = dict(golden.entry["config"]), golden.entry["tiles"]
    vision, text = dict(config.pop("vision")), dict(config.pop("text"))
    weights = golden.state_dict()
    cls, config_cls = (LlavaForConditionalGeneration, LlavaConfig)
    if tiles:
        cls, config_cls = LlavaNextForConditionalGeneration, LlavaNextConfig
        side = vision["image_size"]
        config["image_grid_pinpoints"] = [[side, side * (tiles - 1)]]
        # flat packing has no row ends, so the released model's own is not among the weights
        weights.setdefault("model.image_newline", torch.full((text["hidden_size"],), math.nan))
    text = CONFIG_MAPPING[text.pop("model_type")](**text)
    model = cls(config_cls(vision_config=CLIPVisionConfig(**vision), text_config=text, **config))
    model.load_state_dict(weights, strict=True)
    return model.eval()


def model_inputs(golden: Golden, model: Any) -> dict[str, Tensor]:
    """The prompt as a processor of today expands it, for tokens of which none was merged."""
    entry, short, pixels = golden.entry, golden["in.input_ids_one_token_per_image"], golden["in.pixel_values"]
    tiles, side, grid = entry["tiles"], pixels.shape[-1], entry["grid"]
    image_id = model.config.image_token_id
    assert (short == image_id).sum() == 1
    assert (short[0] == image_id).nonzero().item() == entry["pre_len"]
    assert short.shape == (1, entry["pre_len"] + 1 + entry["post_len"])
    inputs = {"pixel_values": pixels}
    count = grid * grid
    if tiles:
        assert pixels.shape[0] == tiles
        inputs = {"pixel_values": pixels[None], "image_sizes": torch.tensor([[side, side * (tiles - 1)]])}
        count += grid * (grid * (tiles - 1) + 1)  # and a row end behind each row of the tiles
    ids = torch.cat([one.repeat(count) if one == image_id else one[None] for one in short[0]])[None]
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def answers(method: type, name: str) -> Iterator[list[Any]]:
    """What the host asks of a method by `name`: (method, view, answer, and what `look` makes of the view in time)."""
    log: list[Any] = []
    asked = getattr(method, name)

    def spy(self: Any, view: Any) -> Any:
        answer = asked(self, view)
        log.append((self, view, answer, look(name, self, view)))
        return answer

    with mock.patch.object(method, name, spy):
        yield log


def look(name: str, method: Any, view: Any) -> Any:
    """A view can be asked while its layer runs, so what is to be compared is taken then."""
    if name == "select":
        return [view.carried(item) for item in range(view.items)]
    text = view.text[0].nonzero()[:, 0]
    first = view.visual[0].nonzero()[0]
    return text_attention(view.attention_rows(text[text > first][None]))


@contextmanager
def inputs_of(module: Any) -> Iterator[list[Tensor]]:
    """What enters a module: its first argument, or its embeddings."""
    seen: list[Tensor] = []

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["inputs_embeds"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def check_tower(golden: Golden, tower: dict[int, Any], handed: list[Any], projected: Tensor) -> None:
    """Merged features in the order of the released code, and the key tokens of each tile among them."""
    entry = golden.entry
    tokens, tiles = entry["vision_tokens_per_tile_after_merge"], max(entry["tiles"], 1)
    [(_, view, _, cells)] = handed
    assert view.layout.partitions == tiles
    features = projected
    if projected.shape[1] != tokens:  # restored to all cells, of which the first of a window stands for it
        features = projected.flatten(0, 1)[cells[0]].unflatten(0, (tiles, tokens))
    golden.check("out.vision_features", features, "vision_features")
    [marked] = [seen.view.written[KEY_MARK] for seen in tower.values() if KEY_MARK in seen.view.written]
    assert marked.shape == (tiles, tokens)
    assert marked.sum(dim=1).tolist() == [entry["key_tokens_per_tile"]] * tiles
    key = ops.top_indices(marked.to(torch.uint8), entry["key_tokens_per_tile"])
    golden.check_sets("out.key_index_topk_order", key)
    golden.check_sets("out.key_set_flat", (key + tokens * torch.arange(tiles)[:, None]).flatten())


def check_filters(golden: Golden, filtered: list[Any]) -> None:
    entry = golden.entry
    counts = entry["image_tokens_before_each_filter_and_final"]
    assert counts[0] == entry["n_placeholders_in_llm"]
    assert [int(view.visual.sum()) for _, view, _, _ in filtered] == counts[:-1]
    assert [view.layer - 1 for _, view, _, _ in filtered] == entry["pruning_layers"]
    for i, (method, view, answer, (g, u)) in enumerate(filtered):
        visual = view.visual[0]
        golden.check(f"out.filter{i}.attn_sum", g[0, visual], "attn_sum")
        golden.check(f"out.filter{i}.attn_max", u[0, visual], "attn_sum")
        without_keys = filter_tokens(g, u, view.visual, *method.thresholds())[0, visual]
        golden.check(f"out.filter{i}.keep_before_key_union", without_keys.nonzero()[:, 0])
        assert int((answer.keep & view.visual).sum()) == counts[i + 1]


def check_cache(golden: Golden, cache: Any) -> None:
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == golden.entry["kv_lengths_after_prefill"]
    for name in list(golden._tensors):
        found = re.fullmatch(r"out\.kv_layer(\d+)\.(key|value)", name)
        if found:
            layer = cache.layers[int(found[1])]
            golden.check(name, layer.keys if found[2] == "key" else layer.values, "kv")


def check_generation(golden: Golden, model: Any, inputs: dict[str, Tensor]) -> None:
    steps = golden["out.generated"].shape[1]
    length = {"max_new_tokens": steps, "min_new_tokens": steps}
    told = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    output = model.generate(**inputs, **length, **told)
    prompt = inputs["input_ids"]
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt), "the caller's prompt does not come first"
    golden.check("out.generated", output.sequences[:, prompt.shape[1] :])
    golden.check("out.step_logits", torch.cat(output.logits), "logits")


# -- the runner itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in read_manifest(ROOT / "tests" / "golden" / METHOD / "manifest.json")
        if not case.name.startswith("full_")
    ],
    ids=lambda c: c.name,
)
def test_every_output_tensor_is_compared(case: Case) -> None:
    """With the small cases of the copy that ships: each output spoilt in its last place makes the case fail."""
    outputs = [name for name in case.load() if name.startswith("out.")]
    assert outputs
    for name in outputs:
        golden = Golden(case)
        golden._tensors[name].view(-1)[-1:] += 1
        with pytest.raises(AssertionError):
            test_case(golden)
