"""Released TokenFlow checkpoints: names both ways against the specification's lists, files, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from tests.conftest import ROOT
from tests.generation.test_tokenflow import SIGLIP, pictures, small
from tokred.core.errors import InvalidParameterError, TokredError, UnknownParameterError, UnsafeCheckpointError
from tokred.generation import tokenflow_official as official
from tokred.generation.tokenflow import TokenFlow

SPECS = ROOT.parent / "shared" / "specs"
#: list of the specification -> parameters of our model in millions, image size
RELEASES = {"clipb_32k_enhanced": (376.6, 256), "clipb_32k_base": (181.9, 224), "siglip_32k": (523, 384)}
RELEASES |= {"vitamin_32k": (560, 256)}
#: which of the official weights' heads a small model has
HEADS: dict[str, Any] = {"semantic_encoder_config": {"num_attention_heads": 2}, "semantic_decoder_config": {"heads": 2}}

needs_specs = pytest.mark.skipif(not SPECS.is_dir(), reason="the specification's lists are not in this checkout")


def listed(name: str) -> dict[str, Tensor]:
    """The tensors of a list of the specification, without memory."""
    tensors = json.loads((SPECS / f"tokenflow_state_dict_{name}.json").read_text())["tensors"]
    return {key: torch.empty(entry["shape"], device="meta") for key, entry in tensors.items()}


# -- names -------------------------------------------------------------------------------------------------------------


@needs_specs
@pytest.mark.parametrize("release", list(RELEASES))
def test_every_tensor_of_a_release_finds_its_place(release: str) -> None:
    state = listed(release)
    config = official.read_config(state, None, None, {})
    with torch.device("meta"):
        model = TokenFlow(**config)
    official.load_strictly(model, official.convert_state_dict(state))
    millions, size = RELEASES[release]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
    assert model.image_size == size
    assert model.num_tokens == {224: 561, 256: 817, 384: 2227}[size]
    dropped = set(official.dropped_names(state))
    back = official.official_state_dict(official.convert_state_dict(state), official.encoder_type(state))
    assert set(back) == set(state) - dropped
    assert all(back[key].shape == state[key].shape for key in back)


@needs_specs
def test_the_default_is_the_release_for_generation() -> None:
    with torch.device("meta"):
        default = TokenFlow()
    config = official.read_config(listed("clipb_32k_enhanced"), None, None, {})
    for name, value in config.items():
        assert default.config[name] == value, name


@needs_specs
def test_the_tokenizer_within_the_released_language_model() -> None:
    tower = "model.vision_tower.vision_tower."
    state = {key: value for key, value in listed("llava_qwen2.5_14b").items() if key.startswith(tower)}
    assert official._own(state).keys() == listed("siglip_32k").keys()


@needs_specs
@pytest.mark.parametrize("release", ["tokenflow_clipb_32k_enhanced", "tokenflow_siglip_32k"])
def test_names_are_those_of_the_key_map(release: str) -> None:
    wanted = json.loads((SPECS / "tokenflow_key_map.json").read_text())[release]
    state = {key: torch.zeros(3) for key in wanted}
    kind, dropped = official.encoder_type(state), set(official.dropped_names(state))
    for key, ours in wanted.items():
        assert (ours is None) == (key in dropped), key
        if isinstance(ours, str) and ours.endswith("attn.qkv.bias"):
            assert official._SPLIT_BIAS.fullmatch(key)
        elif isinstance(ours, str):
            assert official._renamed(key, official._TO_OURS[kind], "") == ours
            assert official._renamed(ours, official._TO_OFFICIAL[kind], "") == key
    found = official.convert_state_dict(state)
    for key, ours in wanted.items():
        for name in [ours] if isinstance(ours, str) else ours or []:
            assert name in found, key


# -- a small release ---------------------------------------------------------------------------------------------------


def official_weights(kind: str = "clip") -> tuple[TokenFlow, dict[str, Tensor]]:
    """A random model, and what its released file would hold."""
    pixels = {"block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 8}
    encoder = {} if kind == "clip" else {"semantic_encoder_config": SIGLIP}
    model = small(pixel_encoder_config=pixels, pixel_decoder_config=pixels, **encoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if name.endswith("qkv.bias") and name.startswith("semantic_decoder"):
                parameter[16:32] = 0  # keys have no bias in a release
    state = model.official_state_dict()
    state["quantize.codebook_used"] = torch.zeros(131072)
    if kind == "siglip":  # what a release has besides: a last layer that is never read, a head, constants
        layer = "encoder_vqkd.vision_model.encoder.layers."
        state |= {key.replace(f"{layer}0.", f"{layer}1."): value + 1 for key, value in state.items() if layer in key}
        state |= {"encoder_vqkd.vision_model.head.probe": torch.zeros(1, 1, 16)}
        state |= {f"scaling_layer.{name}": torch.full((1, 3, 1, 1), 0.5) for name in ("shift", "scale")}
    return model, state


def load(path: Path, **options: Any) -> TokenFlow:
    return TokenFlow.from_official(path, scales=[1, 2, 4, 6], **{**HEADS, **options})


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_release_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model, state = official_weights(kind)
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 3}, tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt", image_size=12)
    assert not loaded.training
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    codes = model.encode(pictures())
    assert torch.equal(loaded.encode(pictures()), codes)
    torch.testing.assert_close(loaded.decode(codes), model.decode(codes))
    torch.testing.assert_close(loaded.decode_semantic(codes), model.decode_semantic(codes))
    back = loaded.official_state_dict()
    dropped = set(official.dropped_names(state))
    assert set(back) == set(state) - dropped
    assert all(torch.equal(back[key], state[key]) for key in back)
    loaded.save_pretrained(tmp_path / "saved")
    again = TokenFlow.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(pictures()), codes)


def test_the_average_of_the_weights_goes_first(tmp_path: Path) -> None:
    _, state = official_weights()
    other = {key: value + 1 for key, value in state.items()}
    for payload in (
        {"model": other, "ema": state},
        {"state_dict": other, "model": state},
        {"state_dict": state},
        state,
    ):
        torch.save(payload, tmp_path / "x.pt")
        found = official.read_checkpoint(tmp_path / "x.pt")
        assert torch.equal(found["quant_conv.bias"], state["quant_conv.bias"])


def test_tables_are_resized_once(tmp_path: Path) -> None:
    from tokred.generation.tokenflow_parts import resize_positions

    _, state = official_weights()
    save_file(state, tmp_path / "x.safetensors")
    loaded = TokenFlow.from_official(tmp_path / "x.safetensors", image_size=20, scales=[1, 5, 10], **HEADS)
    clip = state["encoder_vqkd.positional_embedding"]
    assert torch.equal(loaded.semantic_encoder.embeddings.position_embedding.weight, resize_positions(clip, 10))
    assert torch.equal(loaded.semantic_decoder.pos_embed[0], resize_positions(state["decoder_vqkd.pos_embed"][0], 10))
    assert loaded.decode(loaded.encode(pictures(size=20))).shape == (2, 3, 20, 20)


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_of_a_folder(tmp_path: Path) -> None:
    model, state = official_weights()
    with pytest.raises(InvalidParameterError, match="give filename"):
        load(tmp_path)
    torch.save(state, tmp_path / official.FILES[0])
    codes = model.encode(pictures())
    assert torch.equal(load(tmp_path).encode(pictures()), codes)
    torch.save(state, tmp_path / official.FILES[1])
    with pytest.raises(InvalidParameterError, match="give filename"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, filename=official.FILES[0]).encode(pictures()), codes)
    with pytest.raises(InvalidParameterError, match="no such file"):
        load(tmp_path, filename="none.pt")
    with pytest.raises(InvalidParameterError, match="no name on the Hub"):
        load(tmp_path / "none")


def test_shards_of_a_language_model(tmp_path: Path) -> None:
    model, state = official_weights("siglip")
    keys, prefix = sorted(state), "model.vision_tower.vision_tower."
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    places = {"model.layers.0.weight": "c.safetensors"}  # is not there, and must not be asked for
    for name, some in shards.items():
        other = {"lm_head.weight": torch.zeros(2)} if name == "a.safetensors" else {}
        save_file({prefix + key: state[key].contiguous() for key in some} | other, tmp_path / name)
        places |= {prefix + key: name for key in some}
    (tmp_path / official.INDEX).write_text(json.dumps({"weight_map": places}))
    assert torch.equal(load(tmp_path).encode(pictures()), model.encode(pictures()))
    (tmp_path / official.INDEX).write_text(json.dumps({"weight_map": {prefix + "x": "../x.safetensors"}}))
    with pytest.raises(InvalidParameterError, match="outside its folder"):
        load(tmp_path)
    (tmp_path / official.INDEX).write_text("[]")
    with pytest.raises(InvalidParameterError, match="no index"):
        load(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/tokenflow_bomb"),))


def test_nothing_of_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was executed"):
        load(tmp_path / "x.pt")
    assert not Path("/tmp/tokenflow_bomb").exists()
    (tmp_path / "y.pt").write_bytes(b"no checkpoint")
    (tmp_path / "y.safetensors").write_bytes(b"no checkpoint")
    for name in ("y.pt", "y.safetensors"):
        with pytest.raises(TokredError):
            load(tmp_path / name)
    torch.save({"model": [1, 2]}, tmp_path / "z.pt")
    with pytest.raises(InvalidParameterError, match="no state dict"):
        load(tmp_path / "z.pt")


def test_other_checkpoints_are_errors(tmp_path: Path) -> None:
    _, state = official_weights()

    def attempt(changed: dict[str, Tensor], match: str, **options: Any) -> None:
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(TokredError, match=match):
            load(tmp_path / "x.pt", **options)

    attempt({"a": torch.zeros(1)}, "no TokenFlow with CLIP, SigLIP or ViTamin: its names are a")
    attempt({**state, "quantize.extra": torch.zeros(1)}, "'quantize.extra' is no tensor")
    attempt({**state, "decoder_vqkd.norm.weight": torch.zeros(1)}, "has the unknown decoder_vqkd.norm.weight")
    missing = {key: value for key, value in state.items() if key != "decode_task_layer.0.bias"}
    attempt(missing, "lacks decode_task_layer.0.bias")
    half = {key: value for key, value in state.items() if key != "decoder_vqkd.blocks.0.attn.v_bias"}
    attempt(half, "without its pair")
    attempt({**state, "quant_conv.bias": torch.zeros(5)}, r"quant_conv.bias of shape \(5,\)")
    attempt(state, "multiple of 2", image_size=13)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InvalidParameterError, match="no scales for a grid of 6"):
        TokenFlow.from_official(tmp_path / "x.pt")
    with pytest.raises(UnknownParameterError, match="did you mean"):
        load(tmp_path / "x.pt", distance_weights=2.0)
    assert load(tmp_path / "x.pt", distance_weight=2.0).quantizer.distance_weight == 2.0
