"""Released FlexTok checkpoints: names of tensors both ways, and their configuration as literals.

A checkpoint is `model.safetensors` beside `config.json` (a graph of modules with `_target_` strings, under "config" or
at the top), or one safetensors file whose metadata holds the same graph as Python literals. Nothing named in it is
imported or called: each module, class and entry must be one that this file knows, else the error names it.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokred.core.errors import InvalidParameterError, nearest

__all__ = [
    "OfficialConfig",
    "TrainingLaws",
    "convert_state_dict",
    "from_official_key",
    "official_state_dict",
    "parse_config",
    "read_config",
    "read_weights",
    "to_official_key",
    "vae_config",
]

logger = logging.getLogger(__name__)

# -- names of tensors ------------------------------------------------------------------------------------------------

_E, _D = "encoder.module_dict.", "decoder.module_dict."
#: released name -> ours; one that ends with a dot stands for all that begin with it; the VAE's begin with "vae."
RENAMED = {
    "vae.vae.": "vae.",
    f"{_E}enc_patch_emb.patch_proj.": "encoder.patch_embed.",
    f"{_E}enc_posemb_module.posembs": "encoder.pos_embed",
    f"{_E}enc_register_module.registers": "encoder.registers",
    f"{_E}enc_transformer.blocks.": "encoder.blocks.",
    f"{_E}enc_to_latents.proj.": "encoder.to_latents.",
    f"{_D}dec_from_latents.proj.": "decoder.from_latents.",
    f"{_D}dec_registers_posemb_module.posembs": "decoder.register_pos_embed",
    f"{_D}dec_nested_dropout.dropout_mask_token": "decoder.mask_token",
    f"{_D}dec_latent_dropout.nullcond": "decoder.null_token",
    f"{_D}dec_noise_patch_emb.patch_proj.": "decoder.patch_embed.",
    f"{_D}dec_patches_posemb_module.posembs": "decoder.pos_embed",
    f"{_D}dec_time_embedder.mlp.": "decoder.time_embed.",
    f"{_D}dec_transformer.blocks.": "decoder.blocks.",
    f"{_D}dec_to_patches.adaLN_modulation.1.": "decoder.head_modulation.",
    f"{_D}dec_to_patches.proj.": "decoder.head.",
}
_BACK = {ours: official for official, ours in RENAMED.items()}
REPA_PREFIX = f"{_D}dec_repa"  # a training head that no release is known to hold


def from_official_key(key: str) -> str:
    """Our name of a released tensor: "encoder...", "decoder...", or "vae..." for the AutoencoderKL."""
    return _renamed(key, RENAMED, "released FlexTok")


def to_official_key(key: str) -> str:
    """The released name of ours; undoes `from_official_key`."""
    return _renamed(key, _BACK, "our FlexTok")


def _renamed(key: str, table: Mapping[str, str], what: str) -> str:
    for old, new in table.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    raise InvalidParameterError(f"{key!r} is no tensor of a {what}")


def convert_state_dict(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a checkpoint as (those of `FlexTokModel`, those of the AutoencoderKL). Pure renames.

    Raises:
        InvalidParameterError: an unknown name.
    """
    dropped = [key for key in state if key.startswith(REPA_PREFIX)]
    if dropped:
        logger.warning("left out %d tensors of a training head, %s...", len(dropped), REPA_PREFIX)
    renamed = {from_official_key(key): tensor for key, tensor in state.items() if key not in dropped}
    vae = {key.removeprefix("vae."): tensor for key, tensor in renamed.items() if key.startswith("vae.")}
    return {key: tensor for key, tensor in renamed.items() if not key.startswith("vae.")}, vae


def official_state_dict(model: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `FlexTokModel` and its AutoencoderKL under the released names."""
    ours = {**model, **{f"vae.{key}": tensor for key, tensor in vae.items()}}
    return {to_official_key(key): tensor for key, tensor in ours.items()}


# -- configuration ---------------------------------------------------------------------------------------------------

_NORM = ({"_target_": "Fp32LayerNorm", "bias": False, "elementwise_affine": False},)
_SILU = ({"_target_": "SiLU"}, {"_target_": "get_class", "path": "torch.nn.SiLU"}, "torch.nn.SiLU")


@dataclass(frozen=True)
class _Module:
    """What is known of a module.

    Args:
        cls: its class. fixed: entries that change the arithmetic, with the values that are supported; the first is what
            the released class takes where the entry is absent. needed: entries without which the released class does
            something that is not supported. read: entries that a value is read from. free: entries that change nothing
            here. Entries that end with `_key` or `_keys` name wires, and are free unless listed.
    """

    cls: str
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    free: tuple[str, ...] = ("weight_init_style", "dtype_override")
    needed: tuple[str, ...] = ()


def _per_sample(op: str) -> _Module:
    return _Module("PerSampleOp", {"per_sample_op": ({"_target_": op},)})


def _patches() -> _Module:
    read = ("dim", "channels_in", "patch_sizes")
    return _Module("PatchEmbedder", {"flatten_patches": (False,)}, read, needed=("flatten_patches",))


def _positions(*kinds: str) -> _Module:
    fixed = {"posemb_type": kinds, "posemb_scaling": ("absolute",)}
    needed = () if "sincos" in kinds else ("posemb_type",)
    return _Module("PositionalEmbeddingAdder", fixed, ("dim", "max_sizes"), needed=needed)


def _packer(mask: str, per_subseq: bool) -> _Module:
    fixed = {"mask_mode": (mask,), "per_subseq_embs": (per_subseq,)}
    free = ("pad_to_multiple", "max_seq_len", "compile_block_mask", "return_materialized_mask")
    needed = ("per_subseq_embs",) if per_subseq else ("mask_mode",)
    return _Module("BlockWiseSequencePacker", fixed, free=free, needed=needed)


def _trunk(timed: bool) -> _Module:
    fixed = {
        **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), (False,)),
        **dict.fromkeys(("gated_mlp", "qk_norm"), (True,)),
        **dict.fromkeys(("rope_forward_read_key", "score_mod_read_key"), (None,)),
        "adaLN_expansion": (2 if timed else 1,),
        "norm_layer": _NORM,
        "act_layer": _SILU,
    }
    if not timed:
        fixed["adaLN_emb_read_key"] = (None,)
    read = ("dim", "depth", "head_dim", "mlp_ratio", "intermediate_layers")
    free = ("drop", "drop_path_rate", "use_act_checkpoint", "weight_init_style", "zero_init_query_proj")
    return _Module("FlexTransformer", fixed, read, free, ("adaLN_expansion", "adaLN_emb_read_key") if timed else ())


_HEAD = {"use_mup_readout": (False,), "norm_layer": _NORM, "proj_bias": (True,), "adaLN_bias": (True,)}
_REGISTERS = _Module(
    "Registers1D",
    {"ordering_mode": ("nested",), "extra_registers_write_key": (None,), "extra_registers_dim": (None,)},
    ("dim", "n_max", "n_eval"),
    ("n_min", "size_sampling_mode"),
)

_ENCODER = {
    "enc_channels_to_last": _per_sample("channels_first_to_last"),
    "enc_patch_emb": _patches(),
    "enc_posemb_module": _positions("sincos", "learnable_sum"),
    "enc_register_module": _REGISTERS,
    "enc_seq_packer": _packer("causal_last", False),
    "enc_transformer": _trunk(timed=False),
    "enc_unpacker": _Module("SequenceUnpacker"),
    "enc_to_latents": _Module("LinearHead", {**_HEAD, "adaLN_emb_read_key": (None,)}, ("dim", "dim_out")),
}
_DECODER = {
    "dec_from_latents": _Module("LinearLayer", {"proj_bias": (True,)}, ("dim_in", "dim")),
    "dec_registers_posemb_module": _positions("learnable_sum"),
    "dec_nested_dropout": _Module("MaskedNestedDropout", {}, ("dim", "size_sampling_mode")),
    "dec_latent_dropout": _Module("LearnedNullCond", {"replace_with_single_token": (False,)}, ("dim", "dropout_prob")),
    "dec_noise_channels_to_last": _per_sample("channels_first_to_last"),
    "dec_noise_patch_emb": _patches(),
    "dec_patches_posemb_module": _positions("sincos", "learnable_sum"),
    "dec_seq_packer": _packer("full", True),
    "dec_time_embedder": _Module(
        "TimestepEmbedder",
        {"temb_as_tokens": (False,)},
        ("dim", "frequency_embedding_size", "max_timestep"),
        ("weight_init_style",),
    ),
    "dec_transformer": _trunk(timed=True),
    "dec_unpacker": _Module("SequenceUnpacker"),
    "dec_to_patches": _Module(
        "ToPatchesLinearHead", _HEAD, ("dim", "channels_out", "patch_sizes"), needed=("adaLN_emb_read_key",)
    ),
    "dec_channels_to_first": _per_sample("channels_last_to_first"),
}
_WRAPPER = _Module("SequentialModuleDictWrapper", read=("module_dict",), free=())
_TOP = {
    "vae": _Module(
        "StableDiffusionVAE",
        {"learnable_logvar": (False,)},
        ("latent_channels", "scaling_factor", "hf_hub_path", "sample_posterior"),
        ("dtype_override", "logvar_init", "compile_encode_fn", "force_vae_encode", "frozen"),
    ),
    "encoder": _WRAPPER,
    "decoder": _WRAPPER,
    "regularizer": _Module(
        "FSQ",
        {},
        ("levels",),
        ("drop_quant_p", "corrupt_tokens_p", "min_corrupt_tokens_p", "apply_corrupt_tokens_p", "packed_call"),
    ),
    "flow_matching_noise_module": _Module("MinRFNoiseModule", {}, ("ln", "stratisfied", "mode_scale")),
    "pipeline": _Module("MinRFPipeline", free=("out_channels",)),
}
_HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_")
_REQUIRED = object()


@dataclass(frozen=True)
class TrainingLaws:
    """How a release was trained, as far as its configuration says. None of it changes what the model computes.

    Args:
        nested_dropout: law of the number of kept registers, see `tokred.generation.flextok.sample_keep_k`.
        condition_dropout: share of pictures trained without condition.
        sigma_law, mode_scale: law of the times, see `tokred.generation.flow.sample_sigmas`.
        repa_layers: decoder blocks whose output was aligned with another network's features, 0-based.
        sample_posterior: whether latents were sampled from the VAE's posterior.
    """

    nested_dropout: str
    condition_dropout: float
    sigma_law: str
    mode_scale: float
    repa_layers: tuple[int, ...]
    sample_posterior: bool


@dataclass(frozen=True)
class OfficialConfig:
    """What a released configuration says: arguments of `FlexTokModel`, facts of the VAE, and how it was trained."""

    model: dict[str, Any]
    scaling_factor: float | None
    vae_hub_path: str | None
    training: TrainingLaws


class _Entry:
    """A module of the graph, checked against what is known of it."""

    def __init__(self, graph: Mapping[str, Any], path: str, known: _Module) -> None:
        self.path, self.known = path, known
        self.values = dict(_mapping(graph, path))
        _check_target(self.values.get("_target_"), known.cls, path)
        for key, value in self.values.items():
            if key not in (*_HYDRA, "module_dict"):
                self._check(key, value)
        for key in known.needed:
            if self.values.get(key) is None:
                raise InvalidParameterError(f"{path}.{key} is missing from the configuration")

    def _check(self, key: str, value: Any) -> None:
        known, where = self.known, f"{self.path}.{key}"
        if key in known.fixed:
            allowed = known.fixed[key]
            if _plain(value, where) not in allowed:
                raise InvalidParameterError(
                    f"{where}={value!r} in the configuration: supported is {' or '.join(map(repr, allowed))}"
                )
            return
        names = (*known.read, *known.free)
        if key not in names and not key.endswith(("_key", "_keys")):
            hint = nearest(key, (*known.fixed, *names))
            raise InvalidParameterError(f"{where} in the configuration is unknown{hint}")
        if isinstance(value, Mapping):
            raise InvalidParameterError(f"{where}={value!r} in the configuration: expected a plain value")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """A value to use; `default` is what the released class takes."""
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise InvalidParameterError(f"{self.path}.{key} is missing from the configuration")
        return value

    def fixed(self, key: str) -> Any:
        return self.values.get(key, self.known.fixed[key][0])


def parse_config(config: Mapping[str, Any]) -> OfficialConfig:
    """Read a released configuration: the graph itself, or a mapping that holds it under "config".

    Raises:
        InvalidParameterError: a module, class or entry that is unknown or unsupported, a missing one, or two that
            contradict each other. The message names it.
    """
    graph = _mapping(config.get("config", config) if isinstance(config, Mapping) else config, "config")
    graph = {key: value for key, value in graph.items() if key not in _HYDRA}
    top = {name: _Entry(part, name, known) for name, part, known in _matched(graph, _TOP, "")}
    parts: dict[str, _Entry] = {}
    for side, modules in (("encoder", _ENCODER), ("decoder", _DECODER)):
        path = f"{side}.module_dict"
        inner = _mapping(top[side].get("module_dict"), path)
        parts |= {name: _Entry(part, f"{path}.{name}", known) for name, part, known in _matched(inner, modules, path)}
    order = [name for name in parts if name.startswith("dec_")]
    steps = ("dec_from_latents", "dec_registers_posemb_module", "dec_nested_dropout", "dec_latent_dropout")
    if sorted(steps, key=order.index) != list(steps):
        raise InvalidParameterError(f"decoder.module_dict: expected the order {', '.join(steps)}")
    model = _model_arguments(parts, top["regularizer"])
    laws = _training_laws(parts, top)
    if "vae" not in top:
        return OfficialConfig(model, None, None, laws)
    vae = top["vae"]
    _same("vae.latent_channels", vae.get("latent_channels", 16), "the encoder's channels_in", model["latent_channels"])
    return OfficialConfig(model, vae.get("scaling_factor", None) or None, vae.get("hf_hub_path", None), laws)


def _model_arguments(parts: Mapping[str, _Entry], regularizer: _Entry) -> dict[str, Any]:
    enc, dec = parts["enc_transformer"], parts["dec_transformer"]
    levels = tuple(regularizer.get("levels"))
    for module, name in (("enc_to_latents", "dim_out"), ("dec_from_latents", "dim_in")):
        _same(f"{module}.{name}", parts[module].get(name), "the number of FSQ levels", len(levels))
    for side, trunk in (("enc", enc), ("dec", dec)):
        for name, part in parts.items():
            if name.startswith(f"{side}_") and "dim" in part.known.read:
                _same(f"{name}.dim", part.get("dim"), f"{side}_transformer.dim", trunk.get("dim", 768))
    registers = parts["enc_register_module"].get("n_max")
    _same(
        "enc_register_module.n_eval", parts["enc_register_module"].get("n_eval", None) or registers, "n_max", registers
    )
    places = parts["dec_registers_posemb_module"].get("max_sizes")
    _same("dec_registers_posemb_module.max_sizes", list(places), "the registers", [registers])
    patch, channels = parts["enc_patch_emb"].get("patch_sizes"), parts["enc_patch_emb"].get("channels_in")
    for module, name in (("dec_noise_patch_emb", "channels_in"), ("dec_to_patches", "channels_out")):
        _same(f"{module}.{name}", parts[module].get(name), "the encoder's channels_in", channels)
        _same(f"{module}.patch_sizes", list(parts[module].get("patch_sizes")), "the encoder's", list(patch))
    grid = parts["enc_posemb_module"].get("max_sizes")
    _same(
        "dec_patches_posemb_module.max_sizes",
        list(parts["dec_patches_posemb_module"].get("max_sizes")),
        "the encoder's",
        list(grid),
    )
    for name, sizes in (("patch_sizes", patch), ("enc_posemb_module.max_sizes", grid)):
        if len(sizes) != 2 or sizes[0] != sizes[1]:
            raise InvalidParameterError(f"{name}={sizes!r} in the configuration: expected a square")
    for name, default in (("head_dim", 64), ("mlp_ratio", 4.0)):
        _same(f"dec_transformer.{name}", dec.get(name, default), "the encoder's", enc.get(name, default))
    time = parts["dec_time_embedder"]
    return {
        "encoder_depth": enc.get("depth", 12),
        "encoder_dim": enc.get("dim", 768),
        "decoder_depth": dec.get("depth", 12),
        "decoder_dim": dec.get("dim", 768),
        "head_dim": enc.get("head_dim", 64),
        "mlp_ratio": enc.get("mlp_ratio", 4.0),
        "num_registers": registers,
        "fsq_levels": levels,
        "latent_channels": channels,
        "patch_size": patch[0],
        "pos_grid": grid[0],
        "max_timestep": time.get("max_timestep", 1000.0),
        "freq_dim": time.get("frequency_embedding_size", 256),
        "encoder_pos_type": parts["enc_posemb_module"].fixed("posemb_type"),
        "decoder_pos_type": parts["dec_patches_posemb_module"].fixed("posemb_type"),
    }


def _training_laws(parts: Mapping[str, _Entry], top: Mapping[str, _Entry]) -> TrainingLaws:
    noise = top["flow_matching_noise_module"]
    mode_scale = noise.get("mode_scale", 0.0)
    if noise.get("ln", True):
        law = "stratified_logit_normal" if noise.get("stratisfied", False) else "logit_normal"
    else:
        law = "mode" if mode_scale else "uniform"
    return TrainingLaws(
        parts["dec_nested_dropout"].get("size_sampling_mode", "uniform"),
        parts["dec_latent_dropout"].get("dropout_prob", 0.0),
        law,
        mode_scale,
        tuple(parts["dec_transformer"].get("intermediate_layers", ())),
        top["vae"].get("sample_posterior", True) if "vae" in top else True,
    )


def _matched(
    graph: Mapping[str, Any], known: Mapping[str, _Module], path: str
) -> Iterator[tuple[str, Mapping[str, Any], _Module]]:
    """(name, part, what is known of it), in the graph's order; each known name but the VAE's must be there."""
    for name, part in graph.items():
        if str(name).startswith("dec_repa"):  # a training head: see `convert_state_dict`
            logger.warning("left out %s.%s, a training head", path, name)
            continue
        if name not in known:
            where = f"{path}.{name}" if path else name
            raise InvalidParameterError(f"{where} in the configuration is unknown{nearest(str(name), known)}")
        yield name, part, known[name]
    missing = [name for name in known if name not in graph and name != "vae"]
    if missing:
        raise InvalidParameterError(f"{path or 'the configuration'} has no {', '.join(missing)}")


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"{path}: {type(value).__name__} in the configuration, expected a mapping")
    return value


def _check_target(target: Any, cls: str, path: str) -> None:
    if not isinstance(target, str) or not target.startswith("flextok.") or target.rsplit(".", 1)[-1] != cls:
        raise InvalidParameterError(f"{path}._target_={target!r} in the configuration: supported is flextok...{cls}")


def _plain(value: Any, where: str) -> Any:
    """A nested `_target_` by the last part of its name, so that it can be compared."""
    if not isinstance(value, Mapping):
        return value
    target = value.get("_target_")
    if not isinstance(target, str) or not target.startswith(("flextok.", "torch.nn.", "hydra.utils.")):
        raise InvalidParameterError(f"{where}._target_={target!r} in the configuration is unknown")
    rest = {key: entry for key, entry in value.items() if key not in _HYDRA}
    return {"_target_": target.rsplit(".", 1)[-1], **rest}


def _same(name: str, value: Any, other: str, expected: Any) -> None:
    if value != expected:
        raise InvalidParameterError(f"{name}={value!r} does not fit {other}, {expected!r}")


# -- files -----------------------------------------------------------------------------------------------------------

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_config(source: str | Path) -> tuple[dict[str, Any], Path]:
    """(configuration graph, path of the weights) of a folder, a safetensors file, or a name on the Hub.

    Raises:
        InvalidParameterError: nothing there, or no configuration, or one that is no literal.
    """
    path = Path(source)
    if path.is_dir():
        weights, config = path / WEIGHTS, path / CONFIG
    elif path.is_file():
        weights, config = path, path.with_name(CONFIG)
    elif isinstance(source, str) and _HUB_ID.fullmatch(source):
        weights, config = _download(source)
    else:
        raise InvalidParameterError(f"{source}: no such folder or file, and no name on the Hub (owner/name)")
    if not weights.is_file():
        raise InvalidParameterError(f"{weights} is missing")
    if config.is_file() and not (path.is_file() and _metadata(weights)):
        try:
            graph = json.loads(config.read_text())
        except ValueError as error:
            raise InvalidParameterError(f"{config} is no JSON: {error}") from None
        return dict(_mapping(graph, str(config))), weights
    literals = _metadata(weights)
    if not literals:
        raise InvalidParameterError(f"{weights}: no {CONFIG} beside it, and no configuration in its metadata")
    return {key: _literal(value, f"{weights}: metadata {key}") for key, value in literals.items()}, weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, under their own names."""
    return load_file(path)


def _metadata(weights: Path) -> dict[str, str]:
    with safe_open(weights, framework="pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key != "format"}


def _literal(text: str, where: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise InvalidParameterError(f"{where} is no Python literal: {text[:80]!r}") from None


def _download(name: str) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    logger.warning("%s: the released FlexTok weights are under the Apple ML research model licence", name)
    weights = Path(hf_hub_download(name, WEIGHTS))
    try:
        config = Path(hf_hub_download(name, CONFIG))
    except EntryNotFoundError:
        config = weights.with_name(CONFIG)
    return weights, config


# -- the VAE ---------------------------------------------------------------------------------------------------------


def vae_config(
    weights: Mapping[str, Tensor], config: OfficialConfig, scaling_factor: float | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for these weights: sizes from the tensors' shapes, the rest as released.

    Args:
        weights: tensors of the AutoencoderKL. scaling_factor: in place of the configuration's. changes: other
            arguments of AutoencoderKL, which win.

    Raises:
        InvalidParameterError: no scaling factor here nor there, or a group norm that cannot divide the channels.
    """
    factor = scaling_factor or changes.get("scaling_factor") or config.scaling_factor or _hub_factor(config)
    if not factor or not factor > 0:
        raise InvalidParameterError(
            "the configuration has no vae.scaling_factor and names no VAE that has one; it is not in the weights: "
            "give scaling_factor=..."
        )
    first = {
        i: w for i in range(64) if (w := weights.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")) is not None
    }
    ends = [weights.get(f"{name}.weight") for name in ("encoder.conv_in", "decoder.conv_in", "decoder.conv_out")]
    if not first or any(end is None for end in ends):
        raise InvalidParameterError("the checkpoint holds no AutoencoderKL (vae.vae.encoder..., vae.vae.decoder...)")
    layers = {key.split(".")[4] for key in weights if key.startswith("encoder.down_blocks.0.resnets.")}
    image, latent, out = (end for end in ends if end is not None)
    found = {
        "in_channels": image.shape[1],
        "out_channels": out.shape[0],
        "latent_channels": latent.shape[1],
        "block_out_channels": tuple(weight.shape[0] for weight in first.values()),
        "down_block_types": ("DownEncoderBlock2D",) * len(first),
        "up_block_types": ("UpDecoderBlock2D",) * len(first),
        "layers_per_block": len(layers),
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 1024,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        **changes,
        "scaling_factor": float(factor),
    }
    _same("the VAE's latent_channels", found["latent_channels"], "the model's", config.model["latent_channels"])
    groups = found["norm_num_groups"]
    if any(channels % groups for channels in found["block_out_channels"]):
        raise InvalidParameterError(
            f"norm_num_groups={groups} does not divide the VAE's channels {found['block_out_channels']}: "
            'give vae_config={"norm_num_groups": ...}'
        )
    return found


def _hub_factor(config: OfficialConfig) -> float | None:
    """The scaling factor that the VAE named in the configuration states, if it can be read."""
    if config.vae_hub_path is None:
        return None
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.load_config(config.vae_hub_path).get("scaling_factor")
    except (OSError, ValueError) as error:
        raise InvalidParameterError(
            f"vae.scaling_factor is absent, and the VAE {config.vae_hub_path!r} that the configuration names cannot be "
            f"read: give scaling_factor=... ({error})"
        ) from None
