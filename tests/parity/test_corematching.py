"""CoreMatching against CoreInfer's released selection and decoding, and against its own released cache zeroing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokred
from tests.conftest import ROOT
from tests.parity._golden import Case, Golden, read_manifest
from tokred.vlm.core_neurons import above_knee, core_counts, core_neurons, knee_distances, match_scores, token_limits
from tokred.vlm.corematching import SCORE, CoreMatching

METHOD = "corematching"

FILE = ("kind", "n_state_dict_tensors", "meaning")
SELECTION = (*FILE, "prefix", "cases")
MODEL = (*FILE, "config", "weight_seed", "input_seed", "n", "steps")
COREINFER = (*MODEL, "rho", "beta", "start_num", "end_num")
RELEASED = (*MODEL, "image_span", "reference_position", "layers", "comparison")
KNEE_CASE = {"case", "N", "kind", "int_knee_same", "n_max_ties"}
TOKENS_CASE = {"case", "M", "I", "rho", "beta", "kind", "image_span", "boundary_tie", "n_core"}
ROTARY = "rotary_emb.inv_freq"


def test_case(golden: Golden) -> None:
    """The kinds are sentences, so what a file holds tells how it is checked."""
    if "start_num" in golden.entry:
        check_coreinfer(golden)
    elif "reference_position" in golden.entry:
        check_released(golden)
    else:
        golden.known(SELECTION)
        for case in golden.entry["cases"]:
            prefix = golden.entry["prefix"].replace("NN", f"{case['case']:02d}")
            check = check_core_neurons if f"{prefix}acts" in golden else check_knee
            check(golden, prefix, case)
    golden.finish()


# -- pure functions --------------------------------------------------------------------------------------------------


def check_knee(golden: Golden, prefix: str, case: dict[str, Any]) -> None:
    assert set(case) <= KNEE_CASE, f"{prefix}: this runner knows {sorted(KNEE_CASE)}"
    scores = golden[f"{prefix}scores"]
    assert scores.shape == (case["N"],)
    check_threshold(golden, prefix, scores, 0, exact=case.get("int_knee_same", True))


def check_core_neurons(golden: Golden, prefix: str, case: dict[str, Any]) -> None:
    assert set(case) <= TOKENS_CASE, f"{prefix}: this runner knows {sorted(TOKENS_CASE)}"
    assert not case.get("boundary_tie", False), f"{prefix}: a tie at the cut is resolved by chance in the released code"
    activations = golden[f"{prefix}acts"][None]
    assert activations.shape == (1, case["M"], case["I"])
    valid = torch.ones(1, case["M"], dtype=torch.bool)
    limits = token_limits((activations > 0).sum(dim=2), valid, case["rho"])
    assert (limits == limits[0, 0]).all()
    golden.check(f"{prefix}limit", limits[0, :1])
    counts = core_counts(activations, valid, case["rho"])
    golden.check(f"{prefix}counts", counts[0])
    core = core_neurons(counts, case["beta"])
    assert core.sum() == case.get("n_core", core.sum())
    golden.check(f"{prefix}core_sorted", core[0].nonzero()[:, 0])
    scores = match_scores(activations, valid, core)
    golden.check(f"{prefix}match_scores", scores[0])
    start, stop = case["image_span"]
    check_threshold(golden, prefix, scores[0, start:stop], start)


def check_threshold(golden: Golden, prefix: str, scores: Tensor, start: int, exact: bool = True) -> None:
    """Place and height of the knee, and the positions (from `start` on) that it keeps.

    Where the released arithmetic broke a tie of distances by rounding (not `exact`), any of the tied points is right.
    """
    ranked = scores.to(torch.int64).sort(descending=True).values
    distances = knee_distances(ranked).abs()
    elbow, value = golden[f"{prefix}elbow_index"], golden[f"{prefix}elbow_value"]
    if exact:
        assert elbow.item() == distances.argmax()
    assert distances[elbow.item()] == distances.max()
    golden.check(f"{prefix}elbow_value", ranked[elbow.long()].to(value.dtype))
    for name, inclusive in (("kept_ge", True), ("kept_gt", False)):
        kept = above_knee(scores.int(), inclusive)
        if not exact:
            kept = scores >= value if inclusive else scores > value
        golden.check(f"{prefix}{name}", kept.nonzero()[:, 0] + start)


# -- whole models ----------------------------------------------------------------------------------------------------


def check_coreinfer(golden: Golden) -> None:
    """Dense prefill, then decoding with the core neurons of layers start_num < i < end_num."""
    golden.known(COREINFER)
    entry, model = golden.entry, build(golden)
    layers = tuple(range(entry["start_num"] + 1, entry["end_num"]))
    method = CoreMatching(rho=entry["rho"], beta=entry["beta"], neuron_layers=layers)
    with tokred.patch(model, method), answers(CoreMatching, "neurons") as log:
        check_decoding(golden, model)
    seen = {view.layer: (view, answer) for view, answer in log}
    reduced = {layer for layer, (_, answer) in seen.items() if answer is not None and answer.active is not None}
    assert reduced == set(layers)
    for layer in layers:
        view, answer = seen[layer]
        golden.check(f"core.{layer}", answer.active[0].nonzero()[:, 0])
        golden.check(f"counts.{layer}", core_counts(view.activations, view.valid, method.rho)[0])


def check_released(golden: Golden) -> None:
    """Keys and values of image tokens become zero, layer by layer, behind a dense prefill."""
    golden.known(RELEASED)
    entry, model = golden.entry, build(golden)
    assert entry["comparison"] == "strict >"
    start, stop = entry["image_span"]
    prunable = torch.zeros(golden["input_ids"].shape, dtype=torch.bool)
    prunable[:, start:stop] = True
    golden._tolerances["floats"] = (stated(golden), 0.0)
    dense = decoded(model, golden["input_ids"], golden["greedy_tokens"])
    golden.check("dense_logits", dense)

    method = CoreMatching(preset="released", ref_position=entry["reference_position"])
    patch = tokred.patch(model, method)
    with answers(CoreMatching, "cut_cache") as log, patch.request(prunable=prunable):
        logits = check_decoding(golden, model)
    patch.remove()
    assert torch.equal(logits[0], dense[0]), "zeroed entries changed the prefill"
    view, cut = log[0]
    assert sorted(cut.zero) == entry["layers"]
    scores = torch.stack([view.marks[layer][SCORE][0, start:stop] for layer in entry["layers"]])
    golden.check("scores", scores)
    ranked = scores.long().sort(dim=1, descending=True).values
    elbows = torch.stack([knee_distances(row).abs().argmax() for row in ranked])
    golden.check("elbow_index", elbows)
    golden.check("elbow_value", ranked.gather(1, elbows[:, None])[:, 0].float())
    assert not any(cut.zero[layer][~prunable].any() for layer in entry["layers"])
    kept = [(~cut.zero[layer][0, start:stop]).nonzero()[:, 0] for layer in entry["layers"]]
    golden.check("kept_flat", torch.cat(kept))
    golden.check("kept_offsets", torch.tensor([0, *map(len, kept)]).cumsum(0))


def check_decoding(golden: Golden, model: Any) -> Tensor:
    """Logits of the prompt and of each new token, fed and generated; every call is a request of its own."""
    ids, tokens, steps = golden["input_ids"], golden["greedy_tokens"], golden.entry["steps"]
    assert ids.shape == (1, golden.entry["n"])
    golden._tolerances["floats"] = (stated(golden), 0.0)
    logits = decoded(model, ids, tokens)
    for name in ("logits", "logits_f64"):
        golden.check(name, logits)
    assert len(tokens) == steps
    golden.check("greedy_tokens", logits[:steps].argmax(dim=1))
    model.generation_config.eos_token_id = None  # as many tokens as were recorded
    sequences = model.generate(ids, max_new_tokens=steps, do_sample=False)
    assert torch.equal(sequences[:, : ids.shape[1]], ids)
    golden.check("greedy_tokens", sequences[0, ids.shape[1] :])
    return logits


def decoded(model: Any, ids: Tensor, tokens: Tensor) -> Tensor:
    """(steps + 1, vocabulary) float64: the last logits of the prompt, then those of each token fed."""
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        rows = [out.logits[0, -1]]
        for token in tokens:
            out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    return torch.stack(rows)


def build(golden: Golden) -> Any:
    """The case's Llama in float64, where integers are exact."""
    model = LlamaForCausalLM(LlamaConfig(**golden.entry["config"])).double().eval()
    weights = golden.state_dict()
    assert len(weights) == golden.entry["n_state_dict_tensors"]
    missing, unexpected = model.load_state_dict({name: w.double() for name, w in weights.items()}, strict=False)
    assert not unexpected
    assert all(name.endswith(ROTARY) for name in missing), missing
    return model


def stated(golden: Golden) -> float:
    """The absolute tolerance of logits that the manifest states for float64."""
    found = re.search(r"([0-9.]+e-?[0-9]+) abs in float64", golden.entry["tolerance"])
    assert found, f"{golden.entry['tolerance']!r} states no absolute tolerance in float64"
    return float(found[1])


@contextmanager
def answers(method: type, name: str) -> Iterator[list[tuple[Any, Any]]]:
    """(view, answer) of every question that the host asks at one site, in order."""
    log: list[tuple[Any, Any]] = []
    asked = getattr(method, name)

    def spy(self: Any, view: Any) -> Any:
        log.append((view, asked(self, view)))
        return log[-1][1]

    with mock.patch.object(method, name, spy):
        yield log


# -- the runner itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", read_manifest(ROOT / "tests" / "golden" / METHOD / "manifest.json"), ids=lambda c: c.name
)
def test_every_stored_output_is_compared(case: Case) -> None:
    """With the copy that ships: each output spoilt in its last place makes the case fail."""
    inputs = ("sd.", "input_ids")
    outputs = [
        name
        for name, values in case.load().items()
        if len(values) and not name.startswith(inputs) and not name.endswith((".acts", ".scores"))
    ]
    assert len(outputs) >= 3
    for name in outputs:
        golden = Golden(case)
        golden._tensors[name].view(-1)[-1:] += 1
        with pytest.raises(AssertionError):
            test_case(golden)
