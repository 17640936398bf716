"""Multiply-adds of prompts under methods inside a language model: torch's counter, the papers' numbers and the notes'.

Torch counts matrix products. Scores of some methods are none (GemFilter, CoreMatching), and are then left out here.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

import transformers

import tokred
from tests.matrix.llm_models import DEPTH, HOSTS, TEXTS, Request, VisualHost
from tokred.adapters.decoder_parts import decoder_info
from tokred.core.errors import ConflictError, InvalidParameterError, MissingSiteError
from tokred.core.flops import Flops
from tokred.core.sites import DecoderInfo
from tokred.eval.flops_prompts import MODELS, REPORTED, prompt_config, prompt_rows, prompt_table, reported_rows

SOME = ("llama", "phi3", "starcoder2", "llava_full", "llava_next", "qwen2_5_vl", "gemma3_wide")
FASTV = tokred.FastV(layer=2, keep_rate=0.5)
#: methods whose scores torch counts, and whose neurons are all there
PLAIN = [
    FASTV,
    tokred.DART(layer=3, budget=4, image_pivots=2, text_pivots=2),
    [FASTV, tokred.MustDrop(stages=("decode",))],
    [FASTV, tokred.CoreMatching(preset="released", ref_position=-1, zero_layers=(1, 3))],
]
CORE = [
    tokred.CoreMatching(keep_tokens=0.4, prune_layer=1, beta=1.0),
    tokred.CoreMatching(keep_tokens=3, prune_layer=0, beta=0.25, prune_early_cache=False, neuron_layers=(1, 4)),
]


class Counted:
    """Multiply-adds while it is entered: `total` as torch counts them, `linear` those of a decoder's linear layers."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.linear, self.handles = decoder, 0, []
        self.counter = FlopCounterMode(display=False)

    def __enter__(self) -> Counted:
        linears = [m for m in self.decoder.layers.modules() if isinstance(m, nn.Linear)]
        self.handles = [module.register_forward_hook(self.add) for module in linears]
        self.counter.__enter__()
        return self

    def add(self, module: nn.Linear, args: Any, output: torch.Tensor) -> None:
        self.linear += output[..., 0].numel() * module.weight.numel()

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    @property
    def total(self) -> int:
        return self.counter.get_total_flops() // 2


def made(name: str) -> tuple[Any, Request]:
    """A tiny model and one prompt: 15 tokens, 9 of which may be dropped; or an image."""
    host = HOSTS[name]
    model = host.make("eager")
    if isinstance(host, VisualHost):
        prompt = host.visual.inputs([[2, host.visual.parts()[0], 3]])
        return model, Request(prompt.inputs, prompt.rows, None, host, prompt)
    return model, host.request([[2, "v9", 3]])


def sizes(request: Request) -> dict[str, Any]:
    return {**request.inputs, **({} if request.prunable is None else {"prunable_tokens": int(request.prunable.sum())})}


def asked(patch: Any, request: Request) -> Any:
    return contextlib.nullcontext() if request.prunable is None else patch.request(prunable=request.prunable)


def run(name: str, method: Any) -> tuple[Flops, DecoderInfo, Counted, Counted, list[int]]:
    """Our count, the model in numbers, torch's count of the prefill and of the next token, and the cache's lengths."""
    model, request = made(name)
    decoder = HOSTS[name].decoder(model)
    with tokred.patch(model, method) as patch, torch.no_grad():
        ours = tokred.flops(model, sizes(request))
        with Counted(decoder) as prefill, asked(patch, request):
            cache = model.model(**request.inputs, use_cache=True).past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        with Counted(decoder) as following:
            model.model(input_ids=torch.full((1, 1), 7), past_key_values=cache)
    assert tokred.flops(model, sizes(request), method) == ours
    assert tokred.flops(model, sizes(request)).total == ours.unreduced
    return ours, decoder_info(decoder), prefill, following, held


# -- torch's counter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_an_unreduced_prompt(name: str) -> None:
    model, request = made(name)
    ids = request.inputs["input_ids"]
    with Counted(model.model) as counted, torch.no_grad():
        model.model(**request.inputs)
    ours, info = tokred.flops(model, request.inputs), decoder_info(model.model)
    assert ours.total == ours.unreduced == ours.llm == counted.total
    assert ours.prompt == (15, 15)
    assert ours.llm_tokens == ours.cache_tokens == (15,) * DEPTH
    for given in (15, ids, ids[0].tolist(), {"text_tokens": 15, "prunable_tokens": 9}):
        assert tokred.flops(model, given) == ours
    assert tokred.flops(TEXTS[name].config(), 15) == ours
    half = tokred.flops(model, 15, causal=True)
    assert ours.llm - half.llm == DEPTH * 15 * 15 * info.width
    assert ours.decode == half.decode == ours.unreduced_decode == DEPTH * (info.layer_macs + 2 * 16 * info.width)


@pytest.mark.parametrize("method", PLAIN, ids=repr)
@pytest.mark.parametrize("name", SOME)
def test_a_reduced_prompt_and_the_next_token(name: str, method: Any) -> None:
    ours, info, prefill, following, held = run(name, method)
    assert prefill.linear == sum(ours.llm_tokens) * info.layer_macs
    released = isinstance(method, list) and method[1].name == "corematching"
    scoring = tokred.FastV(layer=2).scoring_macs(info, [ours.llm_tokens[0]] * DEPTH, 0) if released else ours.scoring
    assert prefill.total == ours.vision + ours.llm + scoring
    assert following.total == ours.decode
    assert list(ours.cache_tokens) == held
    assert len(set(ours.llm_tokens)) == 2
    assert ours.decode < ours.unreduced_decode


@pytest.mark.parametrize("method", CORE, ids=repr)
@pytest.mark.parametrize("name", SOME)
def test_core_neurons(name: str, method: Any) -> None:
    """Neurons that no token uses much are no core neurons: of tiny prompts there may be fewer than counted."""
    ours, info, prefill, following, held = run(name, method)
    assert prefill.linear == sum(ours.llm_tokens) * info.layer_macs
    assert prefill.total == ours.vision + ours.llm
    assert list(ours.cache_tokens) == held
    attention = sum(2 * (tokens + 1) * info.width for tokens in held)
    if method.beta == 1:
        assert following.total == ours.decode == DEPTH * info.layer_macs + attention
    else:
        core = info.mlp_macs * int(0.25 * info.neurons) // info.neurons
        assert ours.decode == DEPTH * info.layer_macs - 2 * (info.mlp_macs - core) + attention
        assert 0.95 * ours.decode <= following.total <= ours.decode


@pytest.mark.parametrize("name", SOME)
def test_gemfilter(name: str) -> None:
    model, request = made(name)
    decoder = HOSTS[name].decoder(model)
    info, method = decoder_info(decoder), tokred.GemFilter(k=5, layer=2)
    with tokred.patch(model, method), torch.no_grad():
        ours = tokred.flops(model, sizes(request))
        with Counted(decoder) as counted:
            model.generate(**request.inputs, max_new_tokens=1, do_sample=False)
    n, projections = ours.prompt[1], info.dim * (info.heads + 2 * info.kv_heads) * info.head_dim
    assert ours.prompt == (5, n)
    assert counted.linear == 2 * n * info.layer_macs + n * projections + 5 * DEPTH * info.layer_macs
    head = info.dim * model.get_output_embeddings().weight.shape[0]
    assert counted.total == ours.total - ours.scoring + head
    assert ours.llm_tokens == ours.cache_tokens == (5,) * DEPTH
    assert ours.scoring == n * info.kv_heads * info.head_dim
    assert tokred.flops(model, sizes(request), method) == ours
    untouched = tokred.flops(model, sizes(request), method.replace(k=1000))
    assert untouched.total == untouched.unreduced


def test_the_layer_of_gemfilter_is_the_patch_s() -> None:
    model, _ = made("llama")
    with pytest.raises(InvalidParameterError, match=r"found by running the model.*give layer=, or count the patched"):
        tokred.flops(model, 15, tokred.GemFilter(k=5))
    with pytest.warns(UserWarning, match="no layer of this model finds needles"):
        patch = tokred.patch(model, tokred.GemFilter(k=5))
    assert tokred.flops(model, 15) == tokred.flops(model, 15, tokred.GemFilter(k=5, layer=3))  # 0.42 of 6
    patch.remove()


def test_mustdrop_in_all_stages() -> None:
    """Windows of 2 x 2 merge to so many tokens; thresholds above every score drop all that are no key tokens."""
    model, request = made("llava")
    method = tokred.MustDrop(
        window=(2, 2), retained_tokens=10, key_rate=0.2, global_threshold=1.0, individual_threshold=1.0,
        pruning_layers=(1, 3),
    )  # fmt: skip
    given = {**request.inputs, "kept_tokens": 2}
    ours = tokred.flops(model, given, method)
    text = request.width - 16
    with tokred.patch(model, method), torch.no_grad():
        with Counted(model.model.language_model) as prefill:
            cache = model.model(**request.inputs, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == list(ours.cache_tokens)
        with Counted(model.model.language_model) as following:
            model.model(input_ids=torch.full((1, 1), 7), past_key_values=cache)
    assert ours.prompt == (text + 10, text + 16)
    assert ours.llm_tokens == (text + 10,) * 2 + (text + 2,) * 4
    assert ours.cache_tokens == (text + 10,) + (text + 2,) * 5
    assert prefill.linear == sum(ours.llm_tokens) * decoder_info(model.model.language_model).layer_macs
    assert following.total == ours.decode
    assert ours.vision < tokred.flops(model, given).vision


def test_carried_tokens() -> None:
    """What a method inside the tower removes does not reach the language model with ``exit="carry"``."""
    model, request = made("llava")
    method = tokred.TopK(keep_rate=0.5, layers=(1,))
    with tokred.patch(model, method, exit="carry"), torch.no_grad():
        ours = tokred.flops(model, request.inputs)
        with Counted(model.model.language_model) as counted:
            model.model(**request.inputs)
    assert ours.prompt[0] == ours.prompt[1] - 8
    assert counted.linear == sum(ours.llm_tokens) * decoder_info(model.model.language_model).layer_macs
    assert tokred.flops(model, request.inputs, method).prompt[0] == ours.prompt[1]


def test_before_and_inside() -> None:
    """The methods between vision encoder and language model come first."""
    model, request = made("llava_next")
    both = [tokred.RandomTokens(budget=0.5), FASTV]
    decoder = model.model.language_model
    with tokred.patch(model, both), torch.no_grad():
        ours = tokred.flops(model, request.inputs)
        with Counted(decoder) as counted:
            model.model(**request.inputs)
    first, last, text = ours.llm_tokens[0], ours.llm_tokens[-1], tokred.flops(model, request.inputs).prompt[1] - 88
    assert first == tokred.flops(model, request.inputs, both[0]).prompt[0]
    assert last - text == (first - text) // 2
    assert counted.linear == sum(ours.llm_tokens) * decoder_info(decoder).layer_macs


# -- the papers and the notes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "text", "teraflops", "fewer"),
    [(0, 64, 1.87, 4.5), (1, 64, 2.08, 4.0), (2, 64, 2.29, 3.7), (0, 40, None, 5.2)],
)
def test_corematching(layer: int, text: int, teraflops: float | None, fewer: float) -> None:
    """corematching.md section 9: "after 1 layer" is ``prune_layer=0``; the paper says 5x."""
    given = {"text_tokens": text, "kept_tokens": 64}
    method = tokred.CoreMatching(prune_layer=layer)
    plain = tokred.flops(prompt_config("llava-1.5-7b"), given, causal=True)
    ours = tokred.flops(prompt_config("llava-1.5-7b"), given, method, causal=True)
    assert plain.llm / ours.llm == pytest.approx(fewer, abs=0.05)
    if teraflops is not None:
        assert 2 * plain.llm / 1e12 == pytest.approx(8.40, abs=0.005)
        assert 2 * ours.llm / 1e12 == pytest.approx(teraflops, abs=0.005)
    assert ours.cache_tokens == (text + 64,) * 32
    info = (plain.unreduced_decode, ours.decode)
    weights = [macs - 32 * 2 * (tokens + 1) * 4096 for macs, tokens in zip(info, (text + 576, text + 64), strict=True)]
    assert [2 * macs / 32 / 1e6 for macs in weights] == pytest.approx([405, 242], abs=1)  # 1.67 times less


@pytest.mark.parametrize(
    ("model", "fewer"),
    [
        ("llama-3.1-8b", (1.93, 2.35, 2.45)),
        ("mistral-nemo", (1.70, 2.01, 2.09)),
        ("phi-3.5-mini", (1.43, 1.63, 1.68)),
    ],
)
def test_gemfilter_ratios(model: str, fewer: tuple[float, ...]) -> None:
    """gemfilter.md section 9, where the last layer of the first pass is not counted; it is 0.3 to 0.9 %."""
    for length, ratio in zip((8192, 32768, 131072), fewer, strict=True):
        cost = tokred.flops(prompt_config(model), length, tokred.GemFilter(k=1024), causal=True)
        assert cost.unreduced / cost.total == pytest.approx(ratio, rel=0.01)
        assert cost.prompt == (1024, length)


def test_mustdrop_s_share() -> None:
    """The paper's 88.5 % lies between the two readings that leave text out; with text there is no reading of it."""
    rows = {(row["method"], row["sizes"]["text_tokens"]): row["saved"] for row in reported_rows("llava-1.5-7b")}
    assert rows["MustDrop, 312 then 45", 0] == pytest.approx(0.879, abs=5e-4)
    assert rows["45 in every layer", 0] == pytest.approx(0.923, abs=5e-4)
    assert rows["45 in every layer", 24] == pytest.approx(0.886, abs=5e-4)
    assert rows["MustDrop, 312 then 45", 64] == pytest.approx(0.793, abs=5e-4)


@pytest.mark.parametrize("model", MODELS)
def test_the_table(model: str) -> None:
    rows = reported_rows(model)
    assert len([row for row in rows if row["method"] != "unreduced"]) == sum(one.model == model for one in REPORTED)
    text = prompt_table(model, rows)
    assert "paper says" in text
    assert "half of the products" in text
    if model == "llava-1.5-7b":
        assert "8.40" in text
        assert "5x [1]" in text
        assert "88.5% [" in text
        assert "UNVERIFIED" in text
    json.dumps(rows)


def test_a_table_of_one_s_own() -> None:
    rows = prompt_rows("llava-1.5-7b", {"text_tokens": 60}, [("fastv", {"layer": 2})])
    assert [row["method"] for row in rows] == ["unreduced", "FastV(keep_rate=0.5)"]
    assert rows[1]["llm_tokens"][1:3] == [636, 348]
    assert "348" in prompt_table("llava-1.5-7b", rows)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from tokred.cli import main

    assert main(["flops", "--model", "llama-3.1-8b", "--text-tokens", "16384", "--method", "gemfilter"]) == 0
    assert "GemFilter()" in capsys.readouterr().out
    argv = ["flops", "--model", "llava-1.5-7b", "--kept-tokens", "64", "--method", "corematching", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)[1]["llm_tokens"][-1] == 60 + 64
    assert main(["flops", "--text-tokens", "5"]) == 2
    assert "--text-tokens is of prompts, and deit_small_patch16_224 reads images" in capsys.readouterr().err


# -- sizes and errors --------------------------------------------------------------------------------------------------


def test_counts_that_depend_on_the_data() -> None:
    config = TEXTS["llama"].config()
    given = {"text_tokens": 15, "prunable_tokens": 9}
    with pytest.raises(
        InvalidParameterError, match=r'CoreMatching: how many tokens stay.*"kept_tokens" among the sizes'
    ):
        tokred.flops(config, given, "corematching")
    with pytest.raises(InvalidParameterError, match="kept=10: expected 0 to 9"):
        tokred.flops(config, {**given, "kept_tokens": 10}, "corematching")
    with pytest.raises(InvalidParameterError, match="kept_tokens=-1: expected an integer >= 0"):
        tokred.flops(config, {**given, "kept_tokens": -1}, "corematching")
    vlm = prompt_config("llava-1.5-7b")
    with pytest.raises(InvalidParameterError, match=r'MustDrop drops by thresholds.*"kept_tokens" among the sizes'):
        tokred.flops(vlm, None, "mustdrop")
    assert tokred.flops(vlm, {"kept_tokens": 64}, "mustdrop").llm_tokens[-1] == 60 + 64


def test_errors_say_what_to_give() -> None:
    config, vlm = TEXTS["llama"].config(), prompt_config("llava-1.5-7b")
    with pytest.raises(InvalidParameterError, match=r'give the length of the prompt, say \{"text_tokens": 1024\}'):
        tokred.flops(config)
    with pytest.raises(InvalidParameterError, match="sizes have the key 'image_size'; expected text_tokens, prunable"):
        tokred.flops(config, {"text_tokens": 5, "image_size": 3})
    with pytest.raises(InvalidParameterError, match="sizes have the key 'prunable_tokens'; expected image_size"):
        tokred.flops(vlm, {"prunable_tokens": 5})
    with pytest.raises(InvalidParameterError, match="prunable_tokens=6: the prompt has 5 tokens, these included"):
        tokred.flops(config, {"text_tokens": 5, "prunable_tokens": 6})
    with pytest.raises(InvalidParameterError, match="inputs have 2 prompts"):
        tokred.flops(config, torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(InvalidParameterError, match="FastV drops tokens that are marked as prunable"):
        tokred.flops(config, 15, "fastv")
    with pytest.raises(InvalidParameterError, match="text_tokens='x': expected an integer >= 1"):
        tokred.flops(config, "x")
    with pytest.raises(MissingSiteError, match="HiRED acts at VisualFeatures"):
        tokred.flops(config, 15, tokred.HiRED(budget=0.5))
    with pytest.raises(InvalidParameterError, match="FastV and DART both drop tokens between layers"):
        tokred.flops(vlm, None, [tokred.FastV(layer=2), tokred.DART(layer=4)])
    with pytest.raises(
        InvalidParameterError, match="how many of the 100 tokens that GemFilter lets through are visual"
    ):
        tokred.flops(vlm, None, [tokred.GemFilter(k=100, layer=2), tokred.FastV(layer=2)])
    with pytest.raises(ConflictError, match="HiRED and DivPrune both choose the visual tokens"):
        tokred.flops(vlm, None, [tokred.HiRED(budget=0.5), tokred.DivPrune(budget=0.5)])


def test_a_mask_leaves_padding_out() -> None:
    model, request = made("llama")
    mask = torch.ones(1, 15, dtype=torch.long)
    mask[:, :4] = 0
    assert tokred.flops(model, {**request.inputs, "attention_mask": mask}) == tokred.flops(model, 11)


def test_several_images_for_gemfilter() -> None:
    """With `per_image`, k is of each image."""
    config = prompt_config("llava-1.5-7b")
    method = tokred.GemFilter(k=100, layer=3, scope="visual", per_image=True)
    two = {"image_size": [(336, 336), (336, 336)]}
    assert tokred.flops(config, two, method).prompt == (60 + 200, 60 + 1152)
    assert tokred.flops(config, two, method.replace(per_image=False)).prompt[0] == 160


def test_text_and_json() -> None:
    cost = tokred.flops(TEXTS["llama"].config(), 15)
    assert "vision" not in str(cost)
    assert "for the next token" in str(cost)
    assert json.loads(json.dumps(cost.to_dict()))["cache_tokens"] == [15] * DEPTH


def test_a_fused_projection_has_the_width_of_its_heads() -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(prompt_config("phi-3.5-mini"))
    info = decoder_info(model)
    assert (info.width, info.dim, info.layer_macs) == (3072, 3072, 4 * 3072**2 + 3 * 3072 * 8192)
