"""Released FlexTok checkpoints: names, sizes, configurations, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import ROOT
from tokred.core.errors import InvalidParameterError
from tokred.generation import flextok_official as official
from tokred.generation.flextok import FlexTok, FlexTokModel, _load

SPECS = ROOT.parent / "shared" / "specs"
#: name -> (tensors, parameters of the VAE, the encoder and the decoder): the sizes that the Hub shows
RELEASES = {
    "d12_d12": (462, 83821011, 85382406, 172448320),
    "d18_d18": (558, 83821011, 287326086, 578587456),
    "d18_d28": (648, 83821011, 287326086, 2169735744),
}
TOY = {"enc_depth": 1, "dec_depth": 2, "enc_dim": 32, "dec_dim": 48, "head_dim": 16, "registers": 6, "levels": [8, 5]}
TOY |= {"channels": 4, "patch": 2, "grid": 4}
BIG = {"head_dim": 64, "registers": 256, "levels": [8, 8, 8, 5, 5, 5], "channels": 16, "patch": 2, "grid": 16}


def released(*, enc_depth, dec_depth, enc_dim, dec_dim, head_dim, registers, levels, channels, patch, grid) -> dict:
    """A configuration as the Hub's are: a graph of modules."""

    def module(target: str, **entries: Any) -> dict[str, Any]:
        return {"_target_": f"flextok.{target}", **entries}

    def positions(width: int, sizes: list[int], kind: str) -> dict[str, Any]:
        return module("posembs.PositionalEmbeddingAdder", dim=width, max_sizes=sizes, posemb_type=kind, read_key="x")

    def swap(op: str) -> dict[str, Any]:
        return module("dict_ops.PerSampleOp", per_sample_op={"_target_": f"flextok.dict_ops.{op}", "_partial_": True})

    def embed(width: int) -> dict[str, Any]:
        shape = {"channels_in": channels, "patch_sizes": [patch, patch]}
        return module("patching.PatchEmbedder", dim=width, flatten_patches=False, **shape)

    def trunk(width: int, depth: int, **entries: Any) -> dict[str, Any]:
        return module("transformers.FlexTransformer", dim=width, depth=depth, head_dim=head_dim, **entries)

    codes, packer = len(levels), "seq_packing.BlockWiseSequencePacker"
    encoder = {
        "enc_channels_to_last": swap("channels_first_to_last"),
        "enc_patch_emb": embed(enc_dim),
        "enc_posemb_module": positions(enc_dim, [grid, grid], "sincos"),
        "enc_register_module": module("registers.Registers1D", dim=enc_dim, n_min=registers, n_max=registers),
        "enc_seq_packer": module(packer, mask_mode="causal_last", pad_to_multiple=128),
        "enc_transformer": trunk(enc_dim, enc_depth),
        "enc_unpacker": module("seq_unpacking.SequenceUnpacker"),
        "enc_to_latents": module("heads.LinearHead", dim=enc_dim, dim_out=codes, use_mup_readout=False),
    }
    decoder = {
        "dec_from_latents": module("linear.LinearLayer", dim_in=codes, dim=dec_dim),
        "dec_registers_posemb_module": positions(dec_dim, [registers], "learnable_sum"),
        "dec_nested_dropout": module("token_dropout.MaskedNestedDropout", dim=dec_dim, size_sampling_mode="pow2"),
        "dec_latent_dropout": module("nullcond.LearnedNullCond", dim=dec_dim, dropout_prob=0.1),
        "dec_noise_channels_to_last": swap("channels_first_to_last"),
        "dec_noise_patch_emb": embed(dec_dim),
        "dec_patches_posemb_module": positions(dec_dim, [grid, grid], "sincos"),
        "dec_seq_packer": module(packer, mask_mode="full", per_subseq_embs=True),
        "dec_time_embedder": module("time_embedding.TimestepEmbedder", dim=dec_dim),
        "dec_transformer": trunk(
            dec_dim, dec_depth, adaLN_emb_read_key="temb", adaLN_expansion=2, intermediate_layers=[1]
        ),
        "dec_unpacker": module("seq_unpacking.SequenceUnpacker"),
        "dec_to_patches": module(
            "heads.ToPatchesLinearHead",
            dim=dec_dim,
            channels_out=channels,
            patch_sizes=[patch, patch],
            use_mup_readout=False,
            adaLN_emb_read_key="temb",
        ),
        "dec_channels_to_first": swap("channels_last_to_first"),
    }
    wrapper = "wrappers.SequentialModuleDictWrapper"
    return {
        "vae": module("vae_wrapper.StableDiffusionVAE", latent_channels=channels, scaling_factor=0.5),
        "encoder": module(wrapper, module_dict=encoder),
        "decoder": module(wrapper, module_dict=decoder),
        "regularizer": module("regularizers.FSQ", levels=levels),
        "flow_matching_noise_module": module("noise.MinRFNoiseModule", ln=False, mode_scale=0.25),
        "pipeline": module("pipelines.MinRFPipeline", _partial_=True, out_channels=channels),
    }


@pytest.fixture(scope="module")
def toy() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A small checkpoint: its configuration, and tensors under released names."""
    torch.manual_seed(0)
    config = released(**TOY)
    model = FlexTokModel(**official.parse_config(config).model)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        layers_per_block=2,
        latent_channels=4,
    )
    weights = {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
    return config, official.official_state_dict(weights, vae.state_dict())


def written(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], how: str = "nested") -> Path:
    if how == "metadata":
        path = folder / "other.safetensors"
        save_file(weights, path, metadata={"format": "pt", **{key: str(value) for key, value in config.items()}})
        return path
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": config} if how == "nested" else config))
    return folder


def change(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path; `...` deletes it."""
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    inner = config
    for name in parents:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return config


GROUPS = {"norm_num_groups": 4}

# -- the releases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASES)
def test_released_sizes(name: str) -> None:
    """Names and shapes on the meta device; against the recorded list where that is there."""
    depths = [int(part[1:]) for part in name.split("_")]
    sizes = {"enc_depth": depths[0], "dec_depth": depths[1], "enc_dim": 64 * depths[0], "dec_dim": 64 * depths[1]}
    known = official.parse_config(released(**sizes, **BIG))
    with torch.device("meta"):
        model = FlexTokModel(**known.model)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
        )
    ours = official.official_state_dict(model.state_dict(), vae.state_dict())
    parts = [sum(p.numel() for p in module.parameters()) for module in (vae, model.encoder, model.decoder)]
    assert (len(ours), *parts) == RELEASES[name]

    listed = SPECS / f"flextok_state_dict_{name}.json"
    if not listed.is_file():
        pytest.skip(f"no {listed}")
    params = json.loads(listed.read_text())["params"]
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == params

    weights, vae_weights = official.convert_state_dict({k: torch.empty(v, device="meta") for k, v in params.items()})
    arguments = official.vae_config(vae_weights, known, None, {})
    with torch.device("meta"):
        _load(FlexTokModel(**known.model), weights, "")
        _load(AutoencoderKL(**arguments), vae_weights, "vae.")


def test_the_names_are_a_bijection(toy) -> None:
    _, weights = toy
    ours = [official.from_official_key(key) for key in weights]
    assert len(set(ours)) == len(weights)
    assert [official.to_official_key(key) for key in ours] == list(weights)
    model, vae = official.convert_state_dict(weights)
    again = official.official_state_dict(model, vae)
    assert sorted(again) == sorted(weights)
    assert all(again[key] is weights[key] for key in weights)


def test_unknown_names_and_the_training_head(toy, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidParameterError, match="enc_other"):
        official.convert_state_dict({"encoder.module_dict.enc_other.weight": torch.zeros(1)})
    with pytest.raises(InvalidParameterError, match="no tensor of a"):
        official.to_official_key("encoder.head.weight")
    assert official.convert_state_dict({"decoder.module_dict.dec_repa_head.fc.weight": torch.zeros(1)}) == ({}, {})
    assert "dec_repa" in caplog.text
    config = change(released(**TOY), "decoder.module_dict.dec_repa_head", {"_target_": "flextok.heads.MLPHead"})
    assert official.parse_config(config) == official.parse_config(released(**TOY))


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nested", "flat", "metadata"])
def test_checkpoints_load_from_all_three_layouts(toy, tmp_path: Path, how: str) -> None:
    config, weights = toy
    source = written(tmp_path, config, weights, how)
    pipe = FlexTok.from_official(str(source), vae_config=GROUPS)
    assert not pipe.model.training
    assert not pipe.vae.training
    assert pipe.vae.config.scaling_factor == 0.5
    assert pipe.vae.config.layers_per_block == 2
    back = official.official_state_dict(pipe.model.state_dict(), pipe.vae.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    assert not pipe.model.encoder.pos_embed.requires_grad
    assert pipe.model.encoder.registers.requires_grad
    pipe.set_progress_bar_config(disable=True)
    assert pipe(torch.zeros(1, 3, 16, 16), 2, output_type="pt", num_inference_steps=1).images.shape == (1, 3, 16, 16)


def test_what_the_configuration_says() -> None:
    config = released(**TOY)
    known = official.parse_config({"config": config})
    assert known.model["max_timestep"] == 1000.0
    assert known.model["fsq_levels"] == (8, 5)
    assert (known.model["encoder_pos_type"], known.model["pos_grid"]) == ("sincos", 4)
    assert known.scaling_factor == 0.5
    assert known.training == official.TrainingLaws("pow2", 0.1, "mode", 0.25, (1,), True)
    other = change(config, "decoder.module_dict.dec_time_embedder.max_timestep", 1.0)
    other = change(other, "flow_matching_noise_module", {"_target_": "flextok.MinRFNoiseModule", "stratisfied": True})
    known = official.parse_config(change(other, "vae", ...))
    assert known.model["max_timestep"] == 1.0
    assert (known.training.sigma_law, known.scaling_factor) == ("stratified_logit_normal", None)


def test_position_types_are_read_and_must_fit_the_weights(toy, tmp_path: Path) -> None:
    config, weights = toy
    config = change(config, "decoder.module_dict.dec_patches_posemb_module.posemb_type", "learnable_sum")
    with pytest.raises(InvalidParameterError, match=r"dec_patches_posemb_module\.posembs: shape"):
        FlexTok.from_official(written(tmp_path, config, weights), vae_config=GROUPS)
    weights = weights | {"decoder.module_dict.dec_patches_posemb_module.posembs": torch.randn(2, 1, 48, 4)}
    pipe = FlexTok.from_official(written(tmp_path, config, weights), vae_config=GROUPS)
    assert pipe.model.config.decoder_pos_type == "learnable_sum"


def test_the_scaling_factor_is_found_or_asked_for(toy, tmp_path: Path) -> None:
    config, weights = toy
    config = change(config, "vae.scaling_factor", ...)
    with pytest.raises(InvalidParameterError, match="scaling_factor"):
        FlexTok.from_official(written(tmp_path, config, weights), vae_config=GROUPS)
    assert FlexTok.from_official(tmp_path, 0.3, GROUPS).vae.config.scaling_factor == 0.3
    (tmp_path / "vae").mkdir()
    config = change(config, "vae.hf_hub_path", str(tmp_path / "vae"))
    written(tmp_path, config, weights)
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        FlexTok.from_official(tmp_path, vae_config=GROUPS)
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(InvalidParameterError, match="give scaling_factor"):  # diffusers' default is no statement
        FlexTok.from_official(tmp_path, vae_config=GROUPS)
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 0.9}))
    assert FlexTok.from_official(tmp_path, vae_config=GROUPS).vae.config.scaling_factor == 0.9


def test_a_checkpoint_without_vae(toy, tmp_path: Path) -> None:
    config, weights = toy
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")}
    model, vae = FlexTokModel.from_official(written(tmp_path, config, weights))
    assert vae is None
    assert model.encode_latents(torch.zeros(1, 4, 8, 8)).ids.shape == (1, 6)
    with pytest.raises(InvalidParameterError, match="holds no VAE"):
        FlexTok.from_official(tmp_path)


# -- what is refused -------------------------------------------------------------------------------------------------

E, D = "encoder.module_dict.", "decoder.module_dict."


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        ("other", {"_target_": "flextok.Other"}, "other"),
        (f"{E}enc_rope", {"_target_": "flextok.Rope"}, "enc_rope"),
        (f"{E}enc_unpacker", ..., "enc_unpacker"),
        ("regularizer", ..., "regularizer"),
        ("regularizer._target_", "flextok.regularizers.LFQ", "regularizer._target_"),
        ("regularizer._target_", "os.system", "regularizer._target_"),
        ("regularizer._target_", ..., "regularizer._target_"),
        (f"{E}enc_channels_to_last.per_sample_op", {"_target_": "os.system", "command": "x"}, "per_sample_op"),
        (f"{E}enc_transformer.norm_layer", {"_target_": "torch.nn.RMSNorm"}, "norm_layer"),
        (f"{E}enc_transformer.rope_theta", 100, "enc_transformer.rope_theta"),
        (f"{E}enc_transformer.qk_norm", False, "enc_transformer.qk_norm"),
        (f"{E}enc_transformer.adaLN_emb_read_key", "temb", "enc_transformer.adaLN_emb_read_key"),
        (f"{E}enc_transformer.depth", {"_target_": "flextok.Depth"}, "enc_transformer.depth"),
        (f"{E}enc_transformer.dim", 64, "dim"),
        (f"{E}enc_transformer.head_dim", 32, "head_dim"),
        (f"{E}enc_seq_packer.mask_mode", "full", "enc_seq_packer.mask_mode"),
        (f"{E}enc_seq_packer.mask_mode", ..., "enc_seq_packer.mask_mode"),
        (f"{E}enc_posemb_module.posemb_type", "rope", "enc_posemb_module.posemb_type"),
        (f"{E}enc_posemb_module.posemb_scaling", "interpolate", "posemb_scaling"),
        (f"{E}enc_posemb_module.max_sizes", [4, 8], "max_sizes"),
        (f"{E}enc_patch_emb.flatten_patches", ..., "flatten_patches"),
        (f"{E}enc_patch_emb.patch_sizes", [2, 1], "patch_sizes"),
        (f"{E}enc_register_module.n_eval", 3, "n_eval"),
        (f"{E}enc_register_module.n_max", ..., "n_max"),
        (f"{E}enc_to_latents.use_mup_readout", True, "use_mup_readout"),
        (f"{E}enc_to_latents.dim_out", 6, "dim_out"),
        (f"{D}dec_seq_packer.mask_mode", "causal", "dec_seq_packer.mask_mode"),
        (f"{D}dec_seq_packer.per_subseq_embs", ..., "per_subseq_embs"),
        (f"{D}dec_transformer.adaLN_expansion", ..., "adaLN_expansion"),
        (f"{D}dec_transformer.adaLN_expansion", 1, "adaLN_expansion"),
        (f"{D}dec_transformer.mlp_ratio", 2.0, "mlp_ratio"),
        (f"{D}dec_to_patches.adaLN_emb_read_key", ..., "dec_to_patches.adaLN_emb_read_key"),
        (f"{D}dec_registers_posemb_module.posemb_type", ..., "dec_registers_posemb_module.posemb_type"),
        (f"{D}dec_registers_posemb_module.max_sizes", [7], "max_sizes"),
        (f"{D}dec_latent_dropout.replace_with_single_token", True, "replace_with_single_token"),
        (f"{D}dec_time_embedder.max_period", 256, "dec_time_embedder.max_period"),
        ("vae.latent_channels", 8, "latent_channels"),
        ("vae", "AutoencoderKL", "vae"),
        ("encoder.module_dict", [], "encoder.module_dict"),
    ],
)
def test_the_offending_entry_is_named(path: str, value: Any, names: str) -> None:
    with pytest.raises(InvalidParameterError, match=names):
        official.parse_config(change(released(**TOY), path, value))


def test_dropout_must_follow_positions() -> None:
    config = released(**TOY)
    modules = config["decoder"]["module_dict"]
    modules["dec_registers_posemb_module"] = modules.pop("dec_registers_posemb_module")  # now the last
    with pytest.raises(InvalidParameterError, match="order"):
        official.parse_config(config)


def test_tensors_must_all_find_their_place(toy, tmp_path: Path) -> None:
    config, weights = toy
    gone = "decoder.module_dict.dec_transformer.blocks.1.attn.wq.weight"
    cases = {
        gone: {key: tensor for key, tensor in weights.items() if key != gone},
        gone.replace("blocks.1", "blocks.2"): weights | {gone.replace("blocks.1", "blocks.2"): weights[gone].clone()},
        r"enc_register_module\.registers: shape": weights
        | {"encoder.module_dict.enc_register_module.registers": torch.zeros(5, 32)},
        "vae.vae.decoder.conv_out.bias": {k: v for k, v in weights.items() if k != "vae.vae.decoder.conv_out.bias"},
    }
    for message, state in cases.items():
        with pytest.raises(InvalidParameterError, match=message):
            FlexTok.from_official(written(tmp_path, config, state), vae_config=GROUPS)
    with pytest.raises(InvalidParameterError, match="norm_num_groups=32"):
        FlexTok.from_official(written(tmp_path, config, weights))


def test_files_that_are_none(toy, tmp_path: Path) -> None:
    _, weights = toy
    with pytest.raises(InvalidParameterError, match="no such folder"):
        FlexTok.from_official(tmp_path / "none" / "at" / "all")
    with pytest.raises(InvalidParameterError, match=r"model\.safetensors is missing"):
        FlexTok.from_official(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InvalidParameterError, match="no configuration"):
        FlexTok.from_official(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidParameterError, match="no JSON"):
        FlexTok.from_official(tmp_path)
    path = tmp_path / "code.safetensors"
    save_file(weights, path, metadata={"vae": "__import__('os').system('touch x')"})
    with pytest.raises(InvalidParameterError, match="no Python literal"):
        FlexTok.from_official(path)
    assert load_file(path).keys() == weights.keys()
