"""QuoTA against the released code: weights, token counts, the five ways to shrink, packing, sampler, parser, scorer."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import ROOT, golden_dirs
from tests.methods import quota_oracles as slow
from tests.parity._golden import Golden, read_manifest
from tokred.adapters.scorers import LVLMScorer, _Scorer, answer_probability
from tokred.vlm.allocate import allocate, cap_weights, frame_weights
from tokred.vlm.decouple import parse_objects
from tokred.vlm.frames import sample_frames
from tokred.vlm.shrink import Shrunk, pack, shrink_plan, video_plan

METHOD = "quota"

OPTIONS = ("tag", "T", "P", "D", "din", "total", "max_token", "scores")
SECTIONS = {"method", "reference", "generated_with", "files", "cases", "sampler", "parse", "scorer"}
SECTIONS |= {"tensor_meaning", "versions", "tolerance", "shims"}
FLOATS, WEIGHTS = "float32 tensors", "integers/weights"
#: released version: our name, and the name of the token counts that it uses
VERSIONS = {
    "v1": ("bilinear", "v1"),
    "v2": ("adaptive_pool", "capped"),
    "v3": ("linspace", "capped"),
    "v4": ("tome", "capped_pooled"),
    "v5": ("tome_separable", "capped"),
}


class Batches(_Scorer):
    """A scorer of which only the batches are wanted."""

    def _score(self, *args: Any) -> Tensor:
        raise AssertionError("nothing is scored here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "manifest" in metafunc.fixturenames:
        found = [folder / METHOD for folder in golden_dirs(metafunc.config)]
        found = [folder for folder in found if (folder / "manifest.json").is_file()]
        metafunc.parametrize("manifest", found, indirect=True, ids=[str(folder.parent) for folder in found])


@pytest.fixture
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**json.loads((request.param / "manifest.json").read_text()), "folder": request.param}


def test_case(golden: Golden) -> None:
    golden.known(OPTIONS)
    check_contents(golden)
    case, scores = golden.entry, golden["scores"]
    assert scores.tolist() == case.get("scores", scores.tolist())
    cells, pooled = case["P"] ** 2, math.ceil(case["P"] / 2) ** 2
    budget = case["total"] * case["max_token"]
    golden.check("budget", torch.tensor(budget))
    assert golden["vision_features"].shape == (case["T"], cells, case["din"])
    assert golden["projected"].shape == (case["T"], cells, case["D"])

    weights = frame_weights(scores)
    golden.check("weights_raw", weights * (100 * scores).square().sum(), WEIGHTS)
    golden.check("weights_norm", weights, WEIGHTS)
    golden.check("weights_capped", cap_weights(weights, cells / budget), WEIGHTS)
    golden.check("weights_capped_pooled", cap_weights(weights, pooled / budget), WEIGHTS)
    limits = {"v1": None, "capped": cells, "capped_pooled": pooled}
    counts = {name: allocate(scores, budget, max_tokens=limit) for name, limit in limits.items()}
    for name, n in counts.items():
        golden.check(f"n_tokens.{name}", n)
        golden.check(f"kept_frames.{name}", n.nonzero().flatten())

    x = golden["projected"]
    golden.check("projected", project(golden), FLOATS)
    videos = {name: check_version(golden, name, x, counts[key]) for name, (_, key) in VERSIONS.items()}
    plan = shrink_plan(x, case["P"], case["P"], pooled)
    golden.check("pooled_baseline", plan.apply(x), FLOATS)
    baseline = [Shrunk(*frame, plan.grid) for frame in zip(plan.apply(x), plan.sources, strict=True)]
    for name in [key for key in golden._tensors if key.startswith("embeds.")]:
        _, version, newline = name.split(".")
        frames = baseline if version == "baseline" else videos[version]
        golden.check(name, packed(golden, frames, newline), FLOATS)
    golden.finish()


def check_contents(golden: Golden) -> None:
    """The tensors are those that the manifest lists."""
    listed = golden.case.manifest.get("files", {}).get(golden.entry["file"])
    if listed is not None:
        stored = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in golden._tensors.items()}
        assert stored == listed


def project(golden: Golden) -> Tensor:
    """Linear, GELU, Linear."""
    weights = golden.state_dict()
    first, second = ((weights[f"mm_projector.{i}.weight"], weights[f"mm_projector.{i}.bias"]) for i in (0, 2))
    return F.linear(F.gelu(F.linear(golden["vision_features"], *first)), *second)


def check_version(golden: Golden, version: str, x: Tensor, counts: Tensor) -> list[Shrunk]:
    mode, side = VERSIONS[version][0], golden.entry["P"]
    frames = video_plan(x, side, side, counts, mode, pool=2).apply(x)
    golden.check(f"{version}.tokens", torch.cat([frame.tokens for frame in frames]), FLOATS)
    golden.check(f"{version}.lens", torch.tensor([len(frame.tokens) for frame in frames]))
    golden.check(f"{version}.grid_hw", lambda: torch.tensor([frame.grid for frame in frames]))
    return frames


def packed(golden: Golden, frames: list[Shrunk], newline: str) -> Tensor:
    """(1, S, D): the words' embeddings, with the packed video in the place of the image token, whose id is negative."""
    ids = golden["input_ids"][0]
    table = golden["sd.embed_tokens.weight"]
    at = int((ids < 0).nonzero()[0])
    video = pack(frames, golden["sd.image_newline"], newline)
    return torch.cat([table[ids[:at]], video, table[ids[at + 1 :]]])[None]


# -- the other sections ----------------------------------------------------------------------------------------------


def test_sections_are_known(manifest: dict[str, Any]) -> None:
    assert set(manifest) - {"folder"} <= SECTIONS


def test_sampler(manifest: dict[str, Any]) -> None:
    known = {"total_frames", "avg_fps", "base", "additional", "force_sample", "frame_idx", "frame_time", "video_time"}
    batch = inspect.signature(LVLMScorer).parameters["batch"].default
    picture = np.zeros((1, 1, 3), dtype=np.uint8)
    for entry in manifest.get("sampler", []):
        assert set(entry) <= known | {"scorer_batches"}
        sampled = sample_frames(
            entry["total_frames"],
            entry["avg_fps"],
            entry["base"],
            entry["additional"],
            force_uniform=entry.get("force_sample", True),
        )
        assert list(sampled.indices) == entry["frame_idx"]
        assert sampled.timestamps == entry["frame_time"]
        assert sampled.duration == pytest.approx(entry["video_time"], rel=1e-12)
        batches = [len(pictures) for pictures in Batches(batch)._batches([picture] * len(sampled.indices))]
        assert batches == entry.get("scorer_batches", batches)


def test_parse(manifest: dict[str, Any]) -> None:
    for entry in manifest.get("parse", []):
        assert set(entry) <= {"text", "official_objects"}
        official = entry["official_objects"]
        assert parse_objects(entry["text"]) == ([] if official == "UNSET" else official)


def test_scorer(manifest: dict[str, Any]) -> None:
    entry = manifest.get("scorer")
    if entry is None:
        pytest.skip("this folder has no scorer")
    assert set(entry) <= {"file", "answer_token_id", "meaning"}
    tensors = load_file(manifest["folder"] / entry["file"])
    logits = tensors.pop("logits")
    (want,) = tensors.values()
    got = answer_probability(logits[:, -1], entry["answer_token_id"], no=0)
    torch.testing.assert_close(got.to(want.dtype), want, atol=1e-5, rtol=1e-5)


# -- the runner itself -----------------------------------------------------------------------------------------------


def made_up_case(frames: int, side: int, width: int, scores: list[float], total: int) -> dict[str, Tensor]:
    """A case of another size, from the slow definitions."""
    pooled_side = math.ceil(side / 2)
    budget = total * pooled_side**2
    sd = {
        "sd.mm_projector.0.weight": torch.randn(width, 3),
        "sd.mm_projector.0.bias": torch.randn(width),
        "sd.mm_projector.2.weight": torch.randn(width, width),
        "sd.mm_projector.2.bias": torch.randn(width),
        "sd.embed_tokens.weight": torch.randn(9, width),
        "sd.image_newline": torch.randn(width),
    }
    features = torch.randn(frames, side**2, 3)
    first, second = ((sd[f"sd.mm_projector.{i}.weight"], sd[f"sd.mm_projector.{i}.bias"]) for i in (0, 2))
    x = F.linear(F.gelu(F.linear(features, *first)), *second)
    images = x.double().view(frames, side, side, width)
    norm = slow.weights(scores, 2)
    capped = {"v1": norm, "capped": slow.official_cap(norm, side**2 / budget)}
    capped["capped_pooled"] = slow.official_cap(norm, pooled_side**2 / budget)
    n = {name: slow.counts(w, budget) for name, w in capped.items()}
    pooled = torch.stack([slow.bilinear(image, pooled_side, pooled_side) for image in images])

    def shrunk(version: str, frame: int, tokens: int) -> Tensor:
        grid = slow.grid(tokens)
        return {
            "v1": lambda: slow.bilinear(images[frame], *grid).flatten(0, 1),
            "v2": lambda: slow.adaptive_pool(images[frame], *grid).flatten(0, 1),
            "v3": lambda: slow.linspace(images[frame].flatten(0, 1), tokens),
            "v4": lambda: torch.stack(slow.tome(list(pooled[frame].flatten(0, 1)), tokens)[0]),
            "v5": lambda: slow.tome_separable(images[frame], *grid).flatten(0, 1),
        }[version]()

    ids = torch.tensor([[1, 2, -200, 4]])
    text = sd["sd.embed_tokens.weight"]
    newline = sd["sd.image_newline"]
    out: dict[str, Tensor] = {
        **sd, "scores": torch.tensor(scores, dtype=torch.float64), "budget": torch.tensor(budget), "input_ids": ids,
        "weights_raw": torch.tensor([(100 * p) ** 2 for p in scores], dtype=torch.float64),
        "weights_norm": torch.tensor(norm, dtype=torch.float64), "vision_features": features, "projected": x,
        "weights_capped": torch.tensor(capped["capped"], dtype=torch.float64),
        "weights_capped_pooled": torch.tensor(capped["capped_pooled"], dtype=torch.float64),
        "pooled_baseline": pooled.flatten(1, 2).float(),
    }  # fmt: skip
    for name, numbers in n.items():
        out[f"n_tokens.{name}"] = torch.tensor(numbers)
        out[f"kept_frames.{name}"] = torch.tensor([t for t, k in enumerate(numbers) if k > 0])
    for version, (_, key) in VERSIONS.items():
        kept = [(t, k) for t, k in enumerate(n[key]) if k > 0]
        parts = [shrunk(version, t, k).float() for t, k in kept]
        out |= {f"{version}.tokens": torch.cat(parts), f"{version}.lens": torch.tensor([len(p) for p in parts])}
        if version in ("v1", "v2", "v5"):
            grids = [slow.grid(k) for _, k in kept]
            out[f"{version}.grid_hw"] = torch.tensor(grids)
            rows = [[*row, newline] for p, (h, w) in zip(parts, grids, strict=True) for row in p.view(h, w, width)]
            video = torch.stack([vector for row in rows for vector in row])
            out[f"embeds.{version}.grid"] = torch.cat([text[ids[0, :2]], video, text[ids[0, 3:]]])[None]
            video = torch.cat([*parts, newline[None]])
            out[f"embeds.{version}.one_token"] = torch.cat([text[ids[0, :2]], video, text[ids[0, 3:]]])[None]
    return out


MADE_UP = [
    (3, 5, 4, [0.2, 0.7, 0.4], 3),
    (1, 4, 6, [0.3], 1),
    (4, 6, 5, [0.9, 0.0, 0.02, 0.8], 2),
    (7, 3, 4, [0.4, 0.5, 0.6, 0.5, 0.4, 0.3, 0.2], 1),  # fewer tokens than frames
]


def write_case(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    frames, cells, width = tensors["projected"].shape
    side = math.isqrt(cells)
    pooled = math.ceil(side / 2) ** 2
    (folder / METHOD).mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / METHOD / "x.safetensors")
    entry = {"file": "x.safetensors", "T": frames, "P": side, "D": width, "din": 3, "max_token": pooled}
    entry |= {"total": int(tensors["budget"]) // pooled, **options}
    tolerance = {FLOATS: "atol 1e-5 rtol 1e-5", WEIGHTS: "exact (weights rtol 1e-12)"}
    (folder / METHOD / "manifest.json").write_text(json.dumps({"cases": [entry], "tolerance": tolerance}))
    return folder / METHOD / "manifest.json"


@pytest.mark.parametrize("size", MADE_UP)
def test_other_sizes_run(size: tuple[Any, ...], tmp_path: Path) -> None:
    for case in read_manifest(write_case(tmp_path, made_up_case(*size))):
        test_case(Golden(case))


def test_unknown_options_fail(tmp_path: Path) -> None:
    tensors = made_up_case(*MADE_UP[0])
    (case,) = read_manifest(write_case(tmp_path, tensors, temperature=2))
    with pytest.raises(pytest.fail.Exception, match=r"does not know.*temperature"):
        test_case(Golden(case))
    (case,) = read_manifest(write_case(tmp_path, {**tensors, "v6.tokens": torch.zeros(1)}))
    with pytest.raises(AssertionError, match=r"did not look at.*v6"):
        test_case(Golden(case))


def test_every_stored_tensor_is_compared() -> None:
    """One number changed in any output of the copy that ships: its case fails."""
    spoilt = 0
    for case in read_manifest(ROOT / "tests" / "golden" / METHOD / "manifest.json"):
        for name in case.load():
            if name.startswith("sd.") or name in ("input_ids", "vision_features"):
                continue
            golden = Golden(case)
            value = golden._tensors[name] = golden._tensors[name].clone()
            value.view(-1)[-1] += 1 if not value.is_floating_point() else 1e-2 * (1 + value.view(-1)[-1].abs())
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                test_case(golden)
            spoilt += 1
    assert spoilt > 60
