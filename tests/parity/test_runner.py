"""The runners themselves: they serve folders with other cases, sizes and options, and they notice what is wrong.

Golden folders are written here from the slow definitions of `tests/methods/oracles.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.methods import oracles
from tests.methods.models import KINDS, images, tiny
from tests.parity import test_tome, test_topk_cls, test_zero_tprune
from tests.parity._golden import Golden, collect, read_manifest

Case = tuple[str, dict[str, Any], dict[str, Tensor]]
RUNNERS = {"tome": test_tome, "topk_cls": test_topk_cls, "zero_tprune": test_zero_tprune}
TOLERANCE = {"indices": "exact", "importance": "rtol 1e-4", "floats": "atol 2e-5 rtol 1e-4"}


def write(folder: Path, method: str, cases: list[Case], as_list: bool = False, key: str = "files") -> Path:
    """A golden folder of one method."""
    place = folder / method
    place.mkdir(parents=True)
    entries = {}
    for name, entry, tensors in cases:
        save_file({k: v.contiguous() for k, v in tensors.items()}, place / f"{name}.safetensors")
        entries[name] = entry
    listed = [{"name": name, **entry} for name, entry in entries.items()]
    manifest = {"method": method, "tolerance": TOLERANCE, key: listed if as_list else entries}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(folder: Path, method: str) -> None:
    for case in read_manifest(folder / method / "manifest.json"):
        RUNNERS[method].test_case(Golden(case))


def made_up_model(kind: str, **cfg: Any) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A model, the part of a case that describes it, and its weights."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    cfg = {**size, **KINDS[kind], **cfg}
    model = tiny(kind, **cfg)
    return model, {"cfg": cfg}, {f"sd.{name}": value for name, value in model.state_dict().items()}


def stack(rows: list[list[Any]]) -> list[Tensor]:
    """Tensors of several images, position by position."""
    return [torch.stack([torch.as_tensor(row) for row in column]) for column in zip(*rows, strict=True)]


# -- cases from the slow definitions ---------------------------------------------------------------------------------


def tome_case(name: str, model_kind: str, r: Any, plan: list[int], weighted: bool = False, **options: Any) -> Case:
    cfg = options.pop("cfg", {})
    model, entry, tensors = made_up_model(model_kind, **cfg)
    prefix, exact = model.num_prefix_tokens, copy.deepcopy(model).double()
    x = images(2, 32)[:, : cfg.get("in_chans", 3)]
    rows = []
    for image in x:
        sizes_after: list[Tensor] = []
        metrics: list[Tensor] = []
        indices: list[Tensor] = []

        def merge(
            block: oracles.Block, metrics: list[Tensor] = metrics, indices: list[Tensor] = indices,
            sizes_after: list[Tensor] = sizes_after,
        ) -> Any:  # fmt: skip
            metric = block.keys.mean(0)
            official = options.get("order", "official") == "official"
            answer = oracles.tome(metric, block.x, block.sizes, plan[block.layer], prefix, official)
            sizes_after.append(torch.tensor(answer.sizes, dtype=torch.float32))
            if not plan[block.layer]:
                return None
            metrics.append(metric.float())
            pairs = [
                (t // 2, owner // 2)
                for owner, group in zip(answer.owners, answer.groups, strict=True)
                for t in group
                if t != owner
            ]
            unmerged = [owner // 2 for owner in answer.owners if owner % 2 == 0]
            indices.extend([torch.tensor(unmerged), *torch.tensor(pairs[::-1]).unbind(1)])
            return answer.x, answer.sizes

        with torch.no_grad():
            prop = options.get("prop_attn", True)
            outputs, normed, sizes = oracles.slow_vit(exact, image, after_attention=merge, proportional=prop)
            if weighted:
                weight = torch.tensor(sizes[prefix:], dtype=torch.float64)[:, None]
                logits = exact.head(exact.fc_norm(((weight * normed[prefix:]).sum(0) / weight.sum())[None]))[0]
            else:
                logits = exact.forward_head(normed[None])[0]
        rows.append([logits.float(), *(y.float() for y in outputs), *sizes_after, *metrics, *indices])
    names = ["out.logits", *(f"out.tokens_after_block.{layer}" for layer in range(3))]
    names += [f"out.size_after_block.{layer}" for layer in range(3)]
    active = [layer for layer in range(3) if plan[layer]]
    names += [f"out.metric.{layer}" for layer in active]
    names += [f"out.{what}_idx.{layer}" for layer in active for what in ("unm", "src", "dst")]
    tensors |= {"input": x, **dict(zip(names, stack(rows), strict=True))}
    with torch.no_grad():
        tensors["out.logits_unpatched"] = model(x)
    return name, {**entry, "r": r, "r_list": plan, "B": 2, **options}, tensors


def zero_case(name: str, model_kind: str, schedule: dict[int, dict[str, Any]], **options: Any) -> Case:
    cfg = options.pop("cfg", {})
    model, entry, tensors = made_up_model(model_kind, **cfg)
    prefix, exact = model.num_prefix_tokens, copy.deepcopy(model).double()
    x = images(2, 32)[:, : cfg.get("in_chans", 3)]
    inner = options.get("options", {})
    boosted = options.get("boosted", [0, 1] if model_kind == "distilled" else [0] if prefix else [])
    boosted = [] if inner.get("boost") == "none" else boosted
    partition = {"seq-u": "sequential_u", "seq-i": "sequential_i"}.get(inner.get("partition"), inner.get("partition"))
    more = {key: inner[key] for key in ("order", "eir", "vhf", "renorm") if key in inner}
    more |= {"partition": partition} if partition else {}
    rows = []
    for image in x:
        origins = list(range(prefix + 16))
        kept_after = []

        def prune(block: oracles.Block, origins: list[int] = origins, kept_after: list[Tensor] = kept_after) -> Any:
            if block.layer not in schedule:
                return None
            rule = schedule[block.layer]
            mean = options.get("feature", inner.get("feature")) == "key_mean"
            feature = block.keys.mean(0) if mean else block.keys.transpose(0, 1).flatten(1)
            kept = oracles.zero_tprune(
                block.attention, feature, prefix, boosted, rule["r_s"], rule["keep"], rule["iters"], **more
            )
            kept_after.append(torch.tensor(kept))
            stays = [*range(prefix), *kept]
            origins[:] = [origins[position] for position in stays]
            return block.x[stays], [1.0] * len(stays)

        with torch.no_grad():
            _, normed, _ = oracles.slow_vit(exact, image, after_block=prune)
            logits = exact.forward_head(normed[None])[0]
        rows.append([logits.float(), normed.float(), torch.tensor(origins), *kept_after])
    names = ["out.logits", "out.tokens_normed", "out.final_token_origin"]
    names += [f"block{layer}.out.kept" for layer in sorted(schedule)]
    tensors |= {"input": x, **dict(zip(names, stack(rows), strict=True))}
    return name, {**entry, "schedule_0indexed": {str(k): v for k, v in schedule.items()}, "B": 2, **options}, tensors


def layer_case(name: str, protected: list[int], boosted: list[int], given: dict[str, Any], **amounts: Any) -> Case:
    """One pruning layer with protected positions anywhere: the oracle has them in front, the case in their places."""
    tokens, heads = 19, 3
    scale = torch.tensor([0.3, 1.0, 2.0]).view(1, 3, 1, 1)
    attention = (torch.randn(2, heads, tokens, tokens) * scale).softmax(-1)
    feature = torch.randn(2, tokens, 6)
    order = protected + [t for t in range(tokens) if t not in protected]
    front = [order.index(t) for t in boosted]
    rule = {"r_s": 4, "keep": 0.7, "iters": 3, **amounts}
    kept, importance = [], []
    for a, f in zip(attention[:, :, order][:, :, :, order], feature[:, order], strict=True):
        prefix = len(protected)
        chosen = oracles.zero_tprune(a, f, prefix, front, rule["r_s"], rule["keep"], rule["iters"])
        kept.append(torch.tensor(sorted(order[t] for t in chosen)))
        score = oracles.vote(a, range(prefix, tokens), prefix, 1, front).score
        by_position = {order[t]: value for t, value in score.items()}
        importance.append(torch.tensor([by_position[t] for t in sorted(by_position)], dtype=torch.float64))
    tensors = {"attn": attention, "feat": feature, "out.kept": torch.stack(kept)}
    tensors["out.pre.importance"] = torch.stack(importance)
    return name, {"B": 2, "H": heads, "N": tokens, "Df": 6, "options": {**rule, **given}}, tensors


def topk_case(name: str, model_kind: str, rates: list[float], fuse: bool, **options: Any) -> Case:
    """Kept tokens stand in descending order of attention, as the released code leaves them."""
    model, entry, tensors = made_up_model(model_kind)
    exact, x, rows = copy.deepcopy(model).double(), images(2, 32), []
    for image in x:
        found: list[Tensor] = []

        def drop(block: oracles.Block, found: list[Tensor] = found) -> Any:
            if rates[block.layer] == 1:
                return None
            scores = block.attention[:, 0, 1:].mean(0)
            top = scores.argsort(descending=True)[: math.ceil(rates[block.layer] * len(scores))]
            found.extend([top, scores.float()])
            y = torch.cat([block.x[:1], block.x[1:][top]])
            if fuse:
                rest = [j for j in range(len(scores)) if j not in top.tolist()]
                y = torch.cat([y, (scores[rest, None] * block.x[1:][rest]).sum(0, keepdim=True)])
            return y, [1.0] * len(y)

        with torch.no_grad():
            outputs, normed, _ = oracles.slow_vit(exact, image, after_attention=drop)
            logits = exact.forward_head(normed[None])[0]
        rows.append([logits.float(), *(y.float() for y in outputs), *found])
    names = ["out.logits", *(f"out.tokens_after_block.{layer}" for layer in range(3))]
    names += [f"out.{what}.{layer}" for layer in range(3) if rates[layer] < 1 for what in ("idx", "cls_attn")]
    tensors |= {"input": x, **dict(zip(names, stack(rows), strict=True))}
    return name, {**entry, "keep_rate": rates, "fuse_token": fuse, "B": 2, **options}, tensors


RICH = {"init_values": 0.7, "qk_norm": True, "reg_tokens": 4}
FULL = {0: {"r_s": 3, "keep": 1.0, "iters": 30}, 1: {"r_s": 2, "keep": 0.7, "iters": 4}}
MADE_UP: dict[str, tuple[str, Callable[[], list[Case]]]] = {
    "tome, class token": ("tome", lambda: [tome_case("vit_a", "class token", 3, [3, 3, 3], kind="vit")]),
    "tome, no kind": ("tome", lambda: [tome_case("deit_q", "distilled", [2, 0, 100, 9], [2, 0, 100])]),
    "tome, inflection in whole numbers": (
        "tome", lambda: [tome_case("vit_b", "class token", [3, -1], [6, 3, 0], cfg={"in_chans": 1}, prop_attn=False)],
    ),
    "tome, two counts": ("tome", lambda: [tome_case("vit_c", "class token", [3, 1], [3, 1, 0])]),
    "tome, no class token": (
        "tome", lambda: [tome_case("vit_n", "no class token", 3, [3, 3, 3], class_token=False)],
    ),
    "tome, no class token, ascending": (
        "tome", lambda: [tome_case("vit_n", "no class token", [4], [4, 0, 0], kind="vit", order="ascending")],
    ),
    "tome, average pooling as MAE": (
        "tome", lambda: [tome_case("mae_a", "class token, average", 3, [3, 3, 3], weighted=True)],
    ),
    "tome, average pooling as timm": (
        "tome", lambda: [tome_case("vit_a", "class token, average", 3, [3, 3, 3], kind="vit")],
    ),
    "tome, registers, layer scale, q/k norm": (
        "tome", lambda: [tome_case("vit_x", "class token", 3, [3, 3, 3], cfg=RICH)],
    ),
    "topk": ("topk_cls", lambda: [topk_case("topk_a", "class token", [1, 0.6, 0.7], False)]),
    "topk, fused twice": ("topk_cls", lambda: [topk_case("a", "class token", [0.7, 0.5, 1], True, kind="vit")]),
    "topk, first block": ("topk_cls", lambda: [topk_case("b", "class token", [0.5, 1, 1], False)]),
    "zero": ("zero_tprune", lambda: [zero_case("model_a", "class token", FULL)]),
    "zero, distilled": ("zero_tprune", lambda: [zero_case("x", "distilled", FULL, protected=[0, 1], boosted=[0, 1])]),
    "zero, dist not boosted": ("zero_tprune", lambda: [zero_case("model_d", "distilled", FULL, boosted=[0])]),
    "zero, no class token": (
        "zero_tprune",
        lambda: [zero_case("model_n", "no class token", FULL, protected=[], boosted=[], cfg={"in_chans": 1})],
    ),
    "zero, registers, layer scale, q/k norm": (
        "zero_tprune",
        lambda: [zero_case("model_r", "class token", FULL, cfg=RICH, protected=[0, 1, 2, 3, 4], feature="key_mean")],
    ),
    "zero, options": (
        "zero_tprune",
        lambda: [
            zero_case("model_o", "class token", FULL, options={
                "boost": "none", "vhf": None, "eir": False, "renorm": False, "partition": "alternate",
            }),
            zero_case("model_p", "class token", FULL, options={"order": "IS", "partition": "seq-i", "vhf": [0.0, 9.0]}),
        ],
    ),
    "zero, layers": (
        "zero_tprune",
        lambda: [
            layer_case("layer_a", [0], [0], {}),
            layer_case("layer_b", [0], [], {"boosted": []}),
            layer_case("layer_c", [0, 1], [0, 1], {"boost_idx": [0, 1]}),
            layer_case("layer_d", [0], [0, 1], {"boosted": [0, 1], "protected": [0]}),
            layer_case("layer_e", [0, 1, 2, 3], [0], {"protected": [0, 1, 2, 3]}),
            layer_case("layer_f", [0, 7], [7], {"protected": [0, 7], "boosted": [7]}),
            layer_case("layer_g", [], [], {"protected": [], "boosted": []}),
            layer_case("layer_h", [0], [0], {}, r_s=0, keep=0.5),
            layer_case("layer_i", [0], [0], {}, r_s=5, keep=1.0),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_UP)
def test_other_cases_and_options_run(name: str, tmp_path: Path) -> None:
    method, make = MADE_UP[name]
    run(write(tmp_path, method, make()), method)


@pytest.mark.parametrize(("as_list", "key"), [(True, "cases"), (False, "cases"), (True, "files")])
def test_other_layouts_run(as_list: bool, key: str, tmp_path: Path) -> None:
    run(write(tmp_path, "zero_tprune", [layer_case("layer_a", [0], [0], {})], as_list, key), "zero_tprune")


# -- what must not pass ----------------------------------------------------------------------------------------------

SPOILT = [name for name in MADE_UP if not name.endswith("options")][::3]


@pytest.mark.parametrize("name", SPOILT)
def test_every_stored_tensor_is_compared(name: str, tmp_path: Path) -> None:
    """Change one number of one stored output at a time: the case has to fail, whichever it was."""
    method, make = MADE_UP[name]
    case, entry, tensors = make()[0]
    write(tmp_path, method, [(case, entry, tensors)])
    outputs = [key for key in tensors if "out." in key]
    assert outputs
    for key in outputs:
        spoilt = {**tensors, key: spoil(tensors[key])}
        save_file({k: v.contiguous() for k, v in spoilt.items()}, tmp_path / method / f"{case}.safetensors")
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run(tmp_path, method)


@pytest.mark.parametrize("method", RUNNERS)
def test_the_recorded_goldens_are_compared_to_the_last_tensor(method: str) -> None:
    """The same with the small copy that ships: every one of its output tensors, spoilt, makes its case fail."""
    folder = Path(__file__).parent.parent / "golden"
    cases = read_manifest(folder / method / "manifest.json")
    seen = 0
    for case in cases:
        for key in [key for key in case.load() if "out." in key]:
            golden = Golden(case)
            golden._tensors[key] = spoil(golden._tensors[key])
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                RUNNERS[method].test_case(golden)
            seen += 1
    assert seen >= 2 * len(cases)


def spoil(tensor: Tensor) -> Tensor:
    """One entry changed, by more than the tolerance and within the range of an index."""
    changed = tensor.clone()
    flat = changed.view(-1)
    if flat.is_floating_point():
        flat[0] += 1e-2 + 1e-2 * flat[0].abs()
    else:
        flat[0] = flat[1] if flat[0] != flat[1] else 1 - flat[0]
    return changed


def test_unknown_options_kinds_and_tensors_fail(tmp_path: Path) -> None:
    def fails(number: int, method: str, case: Case, match: str) -> None:
        folder = write(tmp_path / str(number), method, [case])
        with pytest.raises((pytest.fail.Exception, AssertionError), match=match):
            run(folder, method)

    name, entry, tensors = layer_case("layer_a", [0], [0], {})
    options = entry["options"]
    fails(0, "zero_tprune", (name, {**entry, "options": {**options, "heads": 3}}, tensors), "does not know.*heads")
    fails(1, "zero_tprune", (name, {**entry, "windows": 2}, tensors), "does not know.*windows")
    fails(2, "zero_tprune", (name, {**entry, "options": {**options, "boost": "dist"}}, tensors), "unknown boost")
    fails(3, "zero_tprune", (name, entry, {**tensors, "out.i.rank": torch.zeros(2)}), "did not look at.*out.i.rank")
    name, entry, tensors = tome_case("vit_a", "class token", 3, [3, 3, 3])
    fails(4, "tome", (name, {**entry, "temperature": 1}, tensors), "does not know.*temperature")
    fails(5, "tome", (name, {**entry, "kind": "swin"}, tensors), "unknown kind 'swin'")
    fails(6, "tome", ("model_a", entry, tensors), "no kind")
    fails(7, "tome", (name, {**entry, "r_list": [3, 3, 2]}, tensors), "r_list")
    only = {key: value for key, value in tensors.items() if "out." not in key}
    fails(8, "tome", (name, entry, only), "nothing was compared")
    metric = {"metric": torch.randn(1, 8, 3), "x": torch.randn(1, 8, 3), "out.x": torch.randn(1, 6, 3)}
    fails(9, "tome", ("fn_random_a", {"r": 2}, metric), "not reproducible")
    name, entry, tensors = zero_case("model_a", "distilled", FULL)
    fails(10, "zero_tprune", (name, {**entry, "protected": [0]}, tensors), "prefix tokens are protected")
    entry["schedule_0indexed"]["1"]["window"] = 3
    fails(11, "zero_tprune", (name, entry, tensors), "does not know.*window")


def test_a_stated_tolerance_is_used(tmp_path: Path) -> None:
    name, entry, tensors = layer_case("layer_a", [0], [0], {})
    tensors["out.pre.importance"] = tensors["out.pre.importance"] * 1.001
    write(tmp_path, "zero_tprune", [(name, entry, tensors)])
    with pytest.raises(AssertionError, match=r"out\.pre\.importance"):
        run(tmp_path, "zero_tprune")
    path = tmp_path / "zero_tprune" / "manifest.json"
    manifest = json.loads(path.read_text())
    for loose in ("rtol 1e-2", {"rtol": 1e-2, "atol": 0}):
        path.write_text(json.dumps({**manifest, "tolerance": {**TOLERANCE, "importance": loose}}))
        run(tmp_path, "zero_tprune")


def test_no_goldens_is_a_failure_unless_the_folder_was_given(tmp_path: Path) -> None:
    def config(given: list[str] | None) -> Any:
        place = SimpleNamespace(dir=tmp_path)
        return SimpleNamespace(getoption=lambda _: given, invocation_params=place)

    (tmp_path / "empty").mkdir()
    (only,) = collect(config(["empty"]), "tome")
    assert [mark.name for mark in only.marks] == ["skip"]
    assert "no goldens of tome" in only.marks[0].kwargs["reason"]
    (only,) = collect(config(None), "a method without goldens")
    assert only.marks == ()
    assert isinstance(only.values[0], str)  # the fixture fails on it
    for text, problem in (("{", "cannot be read"), ('{"cases": {}}', "lists no case"), ('{"a": 1}', "cannot be read")):
        place = tmp_path / problem.replace(" ", "-") / "tome"
        place.mkdir(parents=True, exist_ok=True)
        (place / "manifest.json").write_text(text)
        (only,) = collect(config([place.parent.name]), "tome")
        assert problem in only.values[0]
        assert only.marks == ()
    place = tmp_path / "small" / "tome"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text('{"cases": {}, "left_out": {"big": "too large"}}')
    (only,) = collect(config(["small"]), "tome")
    assert [mark.name for mark in only.marks] == ["skip"]
    assert only.marks[0].kwargs["reason"].endswith("tome: too large")


def test_ids_name_folder_and_case(request: pytest.FixtureRequest) -> None:
    ids = [param.id for param in collect(request.config, "tome")]
    assert len(set(ids)) == len(ids)
    assert all("/" in one for one in ids) or ids == ["none"]


def test_cut_copies_hold_the_same_numbers_as_the_recorded_files() -> None:
    """Where the folder with the whole recordings is at hand: the copy that ships was cut, never changed."""
    copy_of, whole = Path(__file__).parent.parent / "golden", Path(__file__).parents[3] / "shared" / "golden"
    if not whole.is_dir():
        pytest.skip("the whole recordings are not here")
    for method in RUNNERS:
        for case in read_manifest(copy_of / method / "manifest.json"):
            full = load_file(whole / method / f"{case.name}.safetensors")
            for name, value in case.load().items():
                stored = full[name] if name.startswith("sd.") else full[name][: len(value)]
                assert torch.equal(value, stored), f"{method}/{case.name}: {name}"
