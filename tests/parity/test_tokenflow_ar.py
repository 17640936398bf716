"""TokenFlow's generator against the released code, through the converter of the released names.

The cases are the text-to-image ones of the golden folder `tokenflow`, or of a folder `tokenflow_ar` (a cut copy).
Recorded there: what is read at each scale, one teacher-forced pass (inputs, mask, logits), greedy pictures of several
refinement strategies with their guided logits, and the filters of sampling. The tokenizer's own cases are those of
`test_tokenflow.py`; here it only gives features of codes, and decodes pictures where a case holds its weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import ROOT
from tests.parity._golden import Case, Golden, collect, read_manifest
from tokred.generation import tokenflow_ar
from tokred.generation.images import to_pil
from tokred.generation.tokenflow import TokenFlow
from tokred.generation.tokenflow_ar import TokenFlowARModel, next_scale_features, visible_positions
from tokred.generation.tokenflow_ar_official import load_official, to_official
from tokred.generation.tokenflow_official import convert_state_dict

METHODS = ("tokenflow", "tokenflow_ar")
KIND = "t2i"  # how names of cases begin
SIZES = ("seed", "tok", "image", "text_vocab", "hid", "inter", "layers", "heads", "text_len", "prompt_lens", "tail")
SIZES += ("cfg", "strategies")
ENTRY = ("config", "files", "kind", "image_token_start", "pad_token_id", "num_image_tokens", "generation")
CODEBOOKS = ("tokenizer.quantize.embedding_vqkd.weight", "tokenizer.quantize.embedding_vqgan.weight")


class PartedCase(Case):
    """A case whose tensors lie in several files, which the manifest names."""

    def load(self) -> dict[str, Tensor]:
        files = [self.folder / part["file"] for part in self.entry["files"].values()]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            pytest.fail(f"{self.folder}: the manifest names {', '.join(missing)}, which are missing")
        return {name: value for path in files for name, value in load_file(path).items()}


def parted(case: Case) -> PartedCase:
    return PartedCase(case.name, case.entry, case.manifest, case.folder)


def ours(case: Case) -> bool:
    return str(case.entry.get("kind", case.name)).startswith(KIND)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and metafunc.function is test_case:
        found = [param for method in METHODS for param in collect(metafunc.config, method)]
        cases = [p for p in found if isinstance(p.values[0], Case) and ours(p.values[0])]
        others = [p for p in found if not isinstance(p.values[0], Case)]
        metafunc.parametrize("case", cases or others)


def test_case(case: Case | str, tmp_path: Path) -> None:
    if isinstance(case, str):
        pytest.fail(case, pytrace=False)
    run_case(Golden(parted(case)), tmp_path)


def run_case(golden: Golden, folder: Path, ways: tuple[bool, ...] = (True, False)) -> None:
    golden.known(ENTRY)
    unknown = sorted(set(golden.entry["config"]) - set(SIZES))
    assert not unknown, f"this runner does not know {unknown} of config"
    stated = golden.case.manifest.get("tolerance", {})
    golden._tolerances |= {name: (value, 0.0) for name, value in stated.items() if isinstance(value, float)}

    model = build(golden, folder)
    table = torch.cat([torch.nn.functional.normalize(golden[name], dim=1) for name in CODEBOOKS], dim=1)
    check_features(golden, model, table)
    check_teacher_forcing(golden, model, table)
    for cached in ways:
        check_generation(golden, model, table, cached)
    check_filters(golden)
    check_pictures(golden)
    golden.finish()


def build(golden: Golden, folder: Path) -> TokenFlowARModel:
    """The model as `from_official` reads it from a released folder."""
    entry, config = golden.entry, golden.entry["config"]
    weights = {name: golden[name] for name in golden._tensors if name.startswith(("model.", "lm_head."))}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"pad_token_id": entry["pad_token_id"]}))
    scales = config["tok"]["scales"]
    model = load_official(folder, scales=scales, image_token_start=entry["image_token_start"])
    back = to_official(model.state_dict(), model.config)
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    got = model.config
    sizes = {"hid": got.hidden_size, "inter": got.intermediate_size, "layers": got.num_hidden_layers}
    sizes |= {"heads": got.num_attention_heads, "text_vocab": got.image_token_start - 1}
    assert sizes == {name: config[name] for name in sizes}
    assert got.num_tokens == entry["num_image_tokens"]
    assert got.codebook_size == config["tok"]["K"]
    return model


def check_features(golden: Golden, model: TokenFlowARModel, table: Tensor) -> None:
    codes, scales = golden["inds"], model.config.scales
    known = {"tower.next_scale_feats": None}
    known |= {f"tower.refine_feats.{k}": k for k in range(1, len(scales))}
    for name, refined in known.items():
        got = partial(next_scale_features, codes, scales, table.__getitem__, refined)
        golden.check(name, got, "tower_feats")


@torch.no_grad()
def check_teacher_forcing(golden: Golden, model: TokenFlowARModel, table: Tensor) -> None:
    if "tf.input_ids" not in golden:
        return
    config, codes = golden.entry["config"], golden["inds"]
    words, tail = golden["tf.input_ids"].split([config["text_len"] + codes.shape[1], config["tail"]], dim=1)
    first = golden.entry["image_token_start"]
    assert torch.equal(words[:, config["text_len"] :], codes + first)
    words = words[:, : config["text_len"]]
    mask = words != golden.entry["pad_token_id"]
    features = next_scale_features(codes, model.config.scales, table.__getitem__)
    golden.check("tf.inputs_embeds", model.embed(words, features, tail), "inputs_embeds")
    levels = [k for k, side in enumerate(model.config.scales, 1) for _ in range(side * side)]
    golden.check("tf.mask_is_visible", visible_positions(mask, levels, config["tail"] + 1))
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits = model(words, mask, features, tail_ids=tail).logits
        assert logits.shape[1] == codes.shape[1] + config["tail"]
        golden.check("tf.logits_level0", logits[:, :1], "logits")
        golden.check("tf.logits_img", logits[:, : codes.shape[1]], "logits")
    golden.check("tf.logits_img", model(words, mask, features).logits, "logits")


def check_generation(golden: Golden, model: TokenFlowARModel, table: Tensor, cached: bool) -> None:
    """Codes of each strategy, and the guided logits of its passes."""
    names = sorted(name for name in golden._tensors if name.startswith("prompt."))
    if not names:
        return
    prompts = torch.stack([golden[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))])
    masks = prompts != golden.entry["pad_token_id"]
    if "prompt_lens" in golden.entry["config"]:
        assert masks.sum(dim=1).tolist() == golden.entry["config"]["prompt_lens"]
    half = len(prompts) // 2
    config = golden.entry["config"]
    for j, (top_k, top_p) in enumerate(config["strategies"]):
        seen: list[Tensor] = []
        with recorded(seen):
            codes = model.generate(
                prompts[:half],
                masks[:half],
                lookup=table.__getitem__,
                negative_input_ids=prompts[half:],
                negative_attention_mask=masks[half:],
                guidance_scale=config["cfg"],
                top_k=top_k,
                top_p=[float(p) for p in top_p],
                use_cache=cached,
            )
        golden.check(f"gen{j}.codes", codes)
        assert len(seen) == golden.entry["generation"][j]["n_runs"]
        for r, logits in enumerate(seen):
            golden.check(f"gen{j}.run{r}.cfg_logits", logits.unflatten(0, (half, -1)), "cfg_logits")


class recorded:
    """The guided logits of every pass, as they come to the filters."""

    def __init__(self, seen: list[Tensor]) -> None:
        make = tokenflow_ar._filters

        def spied(*options: Any) -> list[Any]:
            passes = make(*options)
            for filters in passes:
                filters.insert(0, lambda _, scores: seen.append(scores) or scores)
            return passes

        self.patched = mock.patch.object(tokenflow_ar, "_filters", spied)

    def __enter__(self) -> None:
        self.patched.__enter__()

    def __exit__(self, *error: object) -> None:
        self.patched.__exit__(*error)


def check_filters(golden: Golden) -> None:
    """Which logits a pass keeps; a name such as filter.1.k0.p0.6 tells its options."""
    raw = golden.get("filter.logits")
    for name in golden._tensors:
        told = re.fullmatch(r"filter\.\d+\.k(\d+)\.p([\d.]+)", name)
        if told is not None:
            assert raw is not None
            (filters,) = tokenflow_ar._filters(int(told[1]), float(told[2]), 1.0)
            kept = filters(None, raw.flatten(0, -2).clone()).view_as(raw).isfinite()
            golden.check(name, kept)


@torch.no_grad()
def check_pictures(golden: Golden) -> None:
    """Codes decoded by the tokenizer, where a case holds its decoder besides its codebooks."""
    weights = {name: golden[name] for name in golden._tensors if name.startswith("tokenizer.")}
    if set(weights) <= set(CODEBOOKS):
        return
    tokenizer = decoder_of(golden, {name.removeprefix("tokenizer."): value for name, value in weights.items()})
    golden.check("tower.img", lambda: decoded(tokenizer, golden["inds"]), "pix_rec")
    for j in range(len(golden.entry["config"]["strategies"])):
        pixels = decoded(tokenizer, golden[f"gen{j}.codes"])
        golden.check(f"gen{j}.img", pixels, "pix_rec")
        golden.check(f"gen{j}.u8", torch.stack([torch.from_numpy(np.array(one)) for one in to_pil(pixels)]))


def decoder_of(golden: Golden, weights: dict[str, Tensor]) -> TokenFlow:
    """A tokenizer with the case's codebooks and pixel decoder; its encoders are random, and not used."""
    config = golden.entry["config"]
    tok, side = config["tok"], config["tok"]["scales"][-1]
    pixels = {
        kind: {
            "block_out_channels": [tok[kind]["ch"] * factor for factor in tok[kind]["ch_mult"]],
            "layers_per_block": tok[kind]["num_res_blocks"],
            "latent_channels": tok[kind]["z_channels"],
        }
        for kind in ("enc", "dec")
    }
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = TokenFlow(
        image_size=config["image"],
        scales=tok["scales"],
        codebook_size=tok["K"],
        semantic_dim=tok["dsem"],
        pixel_dim=tok["dpix"],
        semantic_encoder_config={"type": "clip", "patch_size": config["image"] // side, **small},
        semantic_decoder_config={"dim": 8, "depth": 1, "heads": 1, "out_dim": 8},
        pixel_encoder_config=pixels["enc"],
        pixel_decoder_config=pixels["dec"],
    )
    mark = "encoder_vqkd.class_embedding"  # says which release's names these are
    state = convert_state_dict({**weights, mark: torch.zeros(8)})
    absent, unknown = tokenizer.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in absent if name.startswith(("pixel_decoder.", "post_quant_conv.", "quantizer."))]
    return tokenizer.eval()


def decoded(tokenizer: TokenFlow, codes: Tensor) -> Tensor:
    return tokenizer.decode_latents(tokenizer.features(codes))


# -- the runner itself -------------------------------------------------------------------------------------------------


def golden_cases() -> list[Case]:
    folders = [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
    paths = [folder / method / "manifest.json" for folder in folders for method in reversed(METHODS)]
    return [parted(case) for path in paths if path.is_file() for case in read_manifest(path) if ours(case)][:1]


@pytest.mark.parametrize("recording", golden_cases(), ids=lambda case: case.name)
def test_every_output_tensor_is_compared(recording: PartedCase, tmp_path: Path) -> None:
    """One output of each kind spoilt in its last place makes the case fail."""
    inputs = ("inds", "tf.input_ids", "filter.logits")
    outputs = [
        name
        for name in recording.load()
        if name not in inputs and not name.startswith(("model.", "lm_head.", "prompt.", "tokenizer."))
    ]
    kinds = {re.sub(r"\d.*(?=\.)|\d", "#", name): name for name in outputs}
    assert len(kinds) >= 8
    for name in kinds.values():
        golden = Golden(recording)
        last = golden._tensors[name].view(-1)[-1:]
        if last.dtype == torch.bool:
            last ^= True
        else:
            last += 0.02 if last.is_floating_point() else 1 - 2 * last.clamp_max(1)
        with pytest.raises(AssertionError, match=re.escape(name)):
            run_case(golden, tmp_path, ways=(True,))


def test_unknown_options_are_errors(tmp_path: Path) -> None:
    case = golden_cases()[0]
    config = {**case.entry["config"], "rope": 5}
    with pytest.raises(AssertionError, match="rope"):
        run_case(Golden(replace(case, entry={**case.entry, "config": config})), tmp_path)
