"""GemFilter against the released code: its selection on random queries and keys, and whole models through generate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tokred
from tests.conftest import ROOT
from tests.parity._golden import Case, Golden, read_manifest
from tokred.core.decoder import Prompt
from tokred.vlm.gemfilter import GemFilter, choose_top, pool_scores, prompt_scores

METHOD = "gemfilter"

SELECTION = ("cases", "prefix")
MODEL = ("arch", "config", "n", "topk", "select_layer_idx", "max_gen_len", "pool", "kernel_size")
OPTIONS = ("kind", "meaning", "n_state_dict_tensors", "weight_seed", "input_seed", *SELECTION, *MODEL)
CASE_OPTIONS = {
    "case", "B", "kv_heads", "groups", "n", "head_dim", "k", "pool", "kernel_size", "sum_over_heads", "seed"
}  # fmt: skip
POOLS = {True: "avg", False: None}
#: of a whole model in float64 and in float32; of the selection alone "values" are meant
TOLERANCE = {"values": (5e-6,), "scores": (1e-9, 5e-5), "logits": (1e-6, 2e-5)}


def test_case(golden: Golden) -> None:
    golden.known(OPTIONS)
    golden._tolerances.update(stated_tolerances(golden))
    assert len(golden.state_dict()) == golden.entry.get("n_state_dict_tensors", 0)
    if "cases" in golden.entry:
        for case in golden.entry["cases"]:
            check_selection(golden, case)
    else:
        check_model(golden, torch.float64)
        check_model(golden, torch.float32)
    golden.finish()


def stated_tolerances(golden: Golden) -> dict[str, tuple[float, float]]:
    """Texts such as "scores 1e-9 (float64) / 5e-5 (float32)": ``{"scores float64": (1e-9, 0), ...}``."""
    text, found = str(golden.entry.get("tolerance", "")), {}
    for what, default in TOLERANCE.items():
        stated = re.search(rf"\b{what} ([0-9.e+-]+)(?: \(float64\))?(?: / ([0-9.e+-]+))?", text)
        limits = [float(number) for number in stated.groups() if number] if stated else list(default)
        found[what] = (limits[0], 0.0)
        for dtype, limit in zip((torch.float64, torch.float32), (limits[0], limits[-1]), strict=True):
            found[f"{what} {dtype}"] = (limit, 0.0)
    return found


# -- from queries and keys -------------------------------------------------------------------------------------------


def check_selection(golden: Golden, case: Mapping[str, Any]) -> None:
    unknown = set(case) - CASE_OPTIONS
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know {sorted(unknown)} of {case}")
    prefix = golden.entry["prefix"].replace("NN", f"{case['case']:02d}")
    query, keys = golden[f"{prefix}query"][:, :, 0], golden[f"{prefix}keys"]
    heads = case["kv_heads"] * case["groups"]
    assert query.shape == (case["B"], heads, case["head_dim"])
    assert keys.shape == (case["B"], case["kv_heads"], case["n"], case["head_dim"])
    if not case["sum_over_heads"]:  # a selection for each head: one head is a row of its own
        query = query.flatten(0, 1)[:, None]
        keys = keys.repeat_interleave(case["groups"], dim=1).flatten(0, 1)[:, None]
    valid = torch.ones(query.shape[0], case["n"], dtype=torch.bool)
    pooled = pool_scores(prompt_scores(query, keys), valid, case["kernel_size"], POOLS[case["pool"]])
    chosen = choose_top(pooled, valid, torch.full((len(valid),), case["k"]))
    name = f"{prefix}indices_desc"
    want = golden[name]
    golden.check_sets(name, chosen.nonzero()[:, 1].view_as(want))
    golden.check(f"{prefix}values", pooled.gather(1, want.flatten(0, 1).long()).view(want.shape), "values")
    if case["sum_over_heads"]:
        method = GemFilter(case["k"], layer=0, kernel_size=case["kernel_size"], pool=POOLS[case["pool"]])
        columns = torch.arange(case["n"]).expand_as(valid)
        view = Prompt(0, mock.sentinel.info, query, keys, ~valid, valid, columns, torch.full_like(columns, -1))
        assert torch.equal(method.choose(view), chosen)


# -- whole models ----------------------------------------------------------------------------------------------------


def check_model(golden: Golden, dtype: torch.dtype) -> None:
    entry, ids = golden.entry, golden["input_ids"]
    assert ids.shape == (1, entry["n"])
    model = build(golden).to(dtype)
    eos, model.generation_config.eos_token_id = entry["config"]["eos_token_id"], None
    method = GemFilter(
        k=entry["topk"],
        layer=entry["select_layer_idx"],
        kernel_size=entry.get("kernel_size", 5),
        pool=POOLS[entry.get("pool", True)],
    )
    patch = tokred.patch(model, method)
    with spied() as seen:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=entry["max_gen_len"] + 1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert len(seen) == 1, "one prompt is chosen from once"
    check_choice(golden, dtype, *seen[0])

    kept = torch.as_tensor(patch.trace.prompt[-1].kept[0])
    golden.check("selected", kept)
    golden.check("reduced_ids", ids[:, kept])
    assert torch.equal(output.sequences[:, : entry["n"]], ids), "sequences do not start with the caller's prompt"
    new, want = output.sequences[0, entry["n"] :], golden["generated"]
    golden.check("generated", new[: len(want)])
    if len(want) <= entry["max_gen_len"]:
        assert new[len(want)] == eos, "the released code ended here"
    logits = torch.stack(output.logits, dim=1)[0]
    name = "logits_f64" if dtype == torch.float64 else "logits"
    golden.check(name, lambda: logits[: len(golden[name])], f"logits {dtype}")
    patch.remove()


def check_choice(golden: Golden, dtype: torch.dtype, method: GemFilter, view: Prompt, chosen: Tensor) -> None:
    """What the host showed, and what the method made of it."""
    assert view.layer == golden.entry["select_layer_idx"]
    assert view.query.dtype == view.keys.dtype == dtype
    assert view.text.all()
    assert not view.visual.any()
    scores = prompt_scores(view.query, view.keys)
    golden.check("scores_sum", scores[0], f"scores {dtype}")
    pooled = pool_scores(scores, view.valid, method.kernel_size, method.pool)
    golden.check("scores_pooled", pooled[0], f"scores {dtype}")
    golden.check("selected", chosen[0].nonzero()[:, 0])


@contextmanager
def spied() -> Iterator[list[tuple[GemFilter, Prompt, Tensor]]]:
    """The views that the host shows, with the answers."""
    log: list[tuple[GemFilter, Prompt, Tensor]] = []
    choose = GemFilter.choose

    def spy(self: GemFilter, view: Prompt) -> Tensor:
        log.append((self, view, choose(self, view)))
        return log[-1][2]

    with mock.patch.object(GemFilter, "choose", spy):
        yield log


def build(golden: Golden) -> Any:
    arch, config = golden.entry["arch"], golden.entry["config"]
    if arch not in CONFIG_MAPPING:
        pytest.fail(f"{golden.case.name}: transformers has no model of type {arch!r}")
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[arch](**config))
    model.load_state_dict(golden.state_dict(), strict=True)
    return model.eval()


# -- the runner itself -----------------------------------------------------------------------------------------------

CASES = read_manifest(ROOT / "tests" / "golden" / METHOD / "manifest.json")
INPUTS = re.compile(r"sd\.|input_ids$|(c\d+\.)?(keys|query)$")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_output_tensor_is_compared(case: Case) -> None:
    """With the copy that ships: each output spoilt in its last place makes the case fail."""
    outputs = [name for name in case.load() if not INPUTS.match(name)]
    assert len(outputs) >= 7
    for name in outputs:
        golden = Golden(case)
        last = golden._tensors[name].view(-1)[-1:]
        last += 1e-4 if last.is_floating_point() else 1
        with pytest.raises(AssertionError, match=re.escape(name)):
            test_case(golden)


@pytest.mark.parametrize("where", ["entry", "case"])
def test_unknown_options_are_errors(where: str) -> None:
    case = next(case for case in CASES if "cases" in case.entry)
    entry = json.loads(json.dumps(case.entry))
    (entry if where == "entry" else entry["cases"][0])["protect"] = 3
    with pytest.raises(pytest.fail.Exception, match="protect"):
        test_case(Golden(Case(case.name, entry, case.manifest, case.folder)))


def test_stated_tolerances(tmp_path: Any) -> None:
    text = "positions and tokens exact; scores 1e-8 (float64) / 3e-5 (float32); logits 1e-7 / 4e-5 abs"
    save_file({"values": torch.zeros(1)}, tmp_path / "one.safetensors")
    found = stated_tolerances(Golden(Case("one", {"tolerance": text}, {}, tmp_path)))
    assert found["scores torch.float64"] == (1e-8, 0)
    assert found["scores torch.float32"] == (3e-5, 0)
    assert found["logits torch.float64"] == (1e-7, 0)
    assert found["logits torch.float32"] == (4e-5, 0)
    assert found["values"] == (5e-6, 0)
    found = stated_tolerances(Golden(Case("one", {"tolerance": "index SETS exact; values 7e-6 abs"}, {}, tmp_path)))
    assert found["values"] == (7e-6, 0)
