"""A grid of codes as image tokens: `VQTokenizer` around `diffusers.VQModel`, and LlamaGen's VQ-16 as one.

LlamaGen (FoundationVision/LlamaGen at ce98ec4, MIT) looks its codes up by cosine. Here the rows of the codebook are
brought to length 1 at conversion: then the nearest row is the same one, whatever the length of the latent, and
diffusers' model does the rest unchanged.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, VQModel
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tokred.core.errors import InvalidParameterError, UnsafeCheckpointError
from tokred.generation.images import ImageInput, to_pixels
from tokred.generation.tokenizer import ImageTokenizer

__all__ = [
    "VQTokenizer",
    "config_of_official",
    "from_official_key",
    "official_state_dict",
    "to_official_key",
    "vq_state_dict",
]

GROUPS = 32  # of every group norm in the release
CHUNK = 4096  # latents that are compared with the codebook at once
STATE_KEYS = ("model", "ema", "state_dict")
COUNTER = "quantize.codebook_used"  # statistics of training

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RESIDUAL = {**{part: part for part in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "conv_shortcut"}
_CONV = {"conv": "conv"}
#: released name, diffusers' name (# is a number, the same in both), and what comes behind in each
RULES: list[tuple[str, str, dict[str, str]]] = [
    ("encoder.conv_blocks.#.res.#.", "encoder.down_blocks.#.resnets.#.", _RESIDUAL),
    ("decoder.conv_blocks.#.res.#.", "decoder.up_blocks.#.resnets.#.", _RESIDUAL),
    ("encoder.conv_blocks.#.attn.#.", "encoder.down_blocks.#.attentions.#.", _ATTENTION),
    ("decoder.conv_blocks.#.attn.#.", "decoder.up_blocks.#.attentions.#.", _ATTENTION),
    ("encoder.conv_blocks.#.downsample.", "encoder.down_blocks.#.downsamplers.0.", _CONV),
    ("decoder.conv_blocks.#.upsample.", "decoder.up_blocks.#.upsamplers.0.", _CONV),
    *(
        (f"{half}.mid.{official}.", f"{half}.mid_block.{ours}.", parts)
        for half in ("encoder", "decoder")
        for official, ours, parts in (
            (0, "resnets.0", _RESIDUAL),
            (1, "attentions.0", _ATTENTION),
            (2, "resnets.1", _RESIDUAL),
        )
    ),
    *(
        (f"{half}.", f"{half}.", {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"})
        for half in ("encoder", "decoder")
    ),
    ("", "", {name: name for name in ("quantize.embedding", "quant_conv", "post_quant_conv")}),
]


def from_official_key(key: str) -> str:
    """diffusers' name of a tensor of LlamaGen's tokenizer.

    Raises:
        InvalidParameterError: no such tensor.
    """
    return _renamed(key, RULES, "LlamaGen's image tokenizer")


def to_official_key(key: str) -> str:
    """The released name of a tensor of `diffusers.VQModel`; undoes `from_official_key`."""
    back = [(ours, official, {new: old for old, new in parts.items()}) for official, ours, parts in RULES]
    return _renamed(key, back, "a VQModel that LlamaGen's tokenizer can be")


def _renamed(key: str, rules: list[tuple[str, str, dict[str, str]]], what: str) -> str:
    for old, new, parts in rules:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), key)
        part, _, last = key[match.end() :].rpartition(".") if match else ("", "", "")
        if match and part in parts and last in ("weight", "bias"):
            for number in match.groups():
                new = new.replace("#", number, 1)
            return f"{new}{parts[part]}.{last}"
    raise InvalidParameterError(f"{key!r} is no tensor of {what}")


def vq_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for `diffusers.VQModel`: renamed, attention's 1x1 convolutions as matrices, codebook rows of length 1."""
    state = {}
    for key, tensor in official.items():
        if key == COUNTER:
            continue
        name = from_official_key(key)
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        if name == "quantize.embedding.weight":
            tensor = F.normalize(tensor.float(), dim=-1).to(tensor.dtype)
        state[name] = tensor
    return state


def official_state_dict(model: VQModel) -> dict[str, Tensor]:
    """Tensors of a converted model under the released names; the rows of the codebook keep their length of 1."""
    state = {}
    for name, tensor in model.state_dict().items():
        key = to_official_key(name)
        attention = ".attn." in key or ".mid.1." in key
        state[key] = tensor[:, :, None, None] if attention and tensor.ndim == 2 else tensor
    return state


def config_of_official(state: Mapping[str, Tensor], image_size: int = 256) -> dict[str, Any]:
    """Arguments of `diffusers.VQModel` for released tensors, read from their shapes.

    Raises:
        InvalidParameterError: a tensor that tells them is missing, so these are not LlamaGen's.
    """
    needed = ("quantize.embedding.weight", "quant_conv.weight", "encoder.conv_in.weight", "decoder.conv_out.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise InvalidParameterError(f"no tensors of LlamaGen's image tokenizer: {', '.join(missing)} is missing")

    def blocks(half: str) -> Iterator[tuple[bool, int, int]]:
        """(attention, residual blocks, channels) from the outside of the encoder, the inside of the decoder on."""
        number = 0
        while (first := f"{half}.conv_blocks.{number}.res.0.conv2.weight") in state:
            there = f"{half}.conv_blocks.{number}."
            depth = len([name for name in state if re.match(re.escape(there) + r"res\.\d+\.conv2\.weight", name)])
            yield f"{there}attn.0.q.weight" in state, depth, len(state[first])
            number += 1

    down, up = list(blocks("encoder")), list(blocks("decoder"))
    if not down or len({depth for _, depth, _ in down}) > 1 or len(up) != len(down):
        raise InvalidParameterError(
            f"{len(down)} blocks of the encoder and {len(up)} of the decoder, with "
            f"{sorted({depth for _, depth, _ in down})} residual blocks: expected as many of each, all alike"
        )
    (codes, width), latents = state["quantize.embedding.weight"].shape, state["quant_conv.weight"].shape[1]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention, *_ in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention, *_ in up],
        "block_out_channels": [channels for *_, channels in down],
        "layers_per_block": down[0][1],
        "act_fn": "silu",
        "latent_channels": latents,
        "sample_size": image_size,
        "num_vq_embeddings": codes,
        "norm_num_groups": GROUPS,
        "vq_embed_dim": width,
        "scaling_factor": 1.0,
        "lookup_from_codebook": True,
    }


class VQTokenizer(DiffusionPipeline, ImageTokenizer):
    """Pictures to a grid of codes and back. `save_pretrained` and `from_pretrained` are those of diffusers.

    Args:
        vqvae: a `diffusers.VQModel` made with `lookup_from_codebook=True`; its `sample_size` is the side of pictures.

    Raises:
        InvalidParameterError: a model that was made otherwise.
    """

    def __init__(self, vqvae: VQModel) -> None:
        super().__init__()
        if not vqvae.config.lookup_from_codebook:
            raise InvalidParameterError("vqvae: made with lookup_from_codebook=False, expected True: it decodes codes")
        self.register_modules(vqvae=vqvae)

    @classmethod
    def from_official(cls, source: str | Path, filename: str = "vq_ds16_c2i.pt", image_size: int = 256) -> VQTokenizer:
        """LlamaGen's tokenizer of a released checkpoint, in eval mode.

        Args:
            source: a file (`.pt` or safetensors), or a hub id such as FoundationVision/LlamaGen. filename: what of it.
            image_size: side of the pictures that it is used for; any multiple of its factor works.

        Raises:
            InvalidParameterError: no such file, or no LlamaGen tokenizer in it: every tensor must be known and there.
            UnsafeCheckpointError: the file holds more than weights.
        """
        path = Path(source)
        if not path.is_file():
            if path.exists() or str(source).count("/") != 1 or path.suffix in (".pt", ".safetensors"):
                raise InvalidParameterError(f"{source} is neither a file nor a hub id (owner/name)")
            path = Path(hf_hub_download(str(source), filename))
        official = _read(path)
        state = vq_state_dict(official)
        with torch.device("meta"):
            model = VQModel(**config_of_official(official, image_size))
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        wrong = [name for name in {**wanted, **state} if name not in state or wanted.get(name) != state[name].shape]
        if wrong:
            raise InvalidParameterError(
                f"{path}: {len(wrong)} tensors are missing, not known or of another shape, such as "
                f"{to_official_key(wrong[0])}"
            )
        model.load_state_dict(state, assign=True)
        return cls(model.eval())

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels a code, a side."""
        return 2 ** (len(self.vqvae.config.block_out_channels) - 1)

    @property
    def grid(self) -> int:
        """Codes a side of a picture of `image_size`."""
        return self.image_size // self.factor

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def codebook_size(self) -> int:
        return self.vqvae.config.num_vq_embeddings

    @property
    def image_size(self) -> int:
        return self.vqvae.config.sample_size

    @property
    def prefixes(self) -> bool:
        return False

    # -- pictures to codes and back ----------------------------------------------------------------------------------

    def encode(self, images: ImageInput) -> Tensor:  # type: ignore[override]
        """Codes (B, n) int64 of square pictures, in raster order.

        Args:
            images: what `to_pixels` takes; PIL images and arrays are scaled and cut to `image_size`, tensors are taken
                as they are.

        Raises:
            InvalidParameterError: pictures that are not square, whose rows of codes could not be told apart (see
                `encode_grid`), or whose sides the factor does not divide.
        """
        pixels = to_pixels(images, self.image_size)
        if pixels.shape[2] != pixels.shape[3]:
            raise InvalidParameterError(
                f"images: {pixels.shape[2]} x {pixels.shape[3]} pixels given, expected squares; encode_grid keeps the "
                "shape of others"
            )
        return self.encode_grid(pixels).flatten(1)

    @torch.no_grad()
    def encode_grid(self, images: ImageInput) -> Tensor:
        """Codes (B, H / factor, W / factor) int64 of pictures; see `encode`."""
        pixels = to_pixels(images, self.image_size)
        if pixels.shape[2] % self.factor or pixels.shape[3] % self.factor:
            raise InvalidParameterError(
                f"images: {pixels.shape[2]} x {pixels.shape[3]} pixels given, expected multiples of {self.factor}"
            )
        latents = self.vqvae.encode(pixels.to(self.vqvae.device, self.vqvae.dtype)).latents
        codes = self.lookup(latents)
        self.maybe_free_model_hooks()
        return codes

    @torch.no_grad()
    def lookup(self, latents: Tensor) -> Tensor:
        """The nearest codes (B, h, w) of latents (B, e, h, w), ties to the lower; float32 under autocast too.

        Compares z e - |e|^2 / 2, which orders the rows e as their distance to z does.
        """
        with torch.autocast(latents.device.type, enabled=False):
            table = self.vqvae.quantize.embedding.weight.float()
            half = table.square().sum(dim=1) / 2
            flat = latents.float().movedim(1, -1).flatten(0, 2)
            found = [(part @ table.mT - half).argmax(dim=1) for part in flat.split(CHUNK)]
        return torch.cat(found).view(len(latents), *latents.shape[2:])

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Pictures (B, 3, H, W) float32 in [-1, 1] of codes: (B, n) of a square, or (B, h, w).

        Raises:
            InvalidParameterError: another shape or dtype, or codes outside the codebook.
        """
        pixels = self.decode_codes(self._checked(tokens)).float().clamp(-1, 1)
        self.maybe_free_model_hooks()
        return pixels

    def decode_codes(self, codes: Tensor) -> Tensor:
        """What the model makes of codes (B, h, w), in its dtype and not cut to [-1, 1]."""
        shape = (*codes.shape, self.vqvae.config.vq_embed_dim)
        return self.vqvae.decode(codes, force_not_quantize=True, shape=shape).sample

    def _checked(self, tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.ndim not in (2, 3) or not tokens.numel():
            what = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InvalidParameterError(f"tokens: {what} given, expected codes (B, n) or (B, h, w)")
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InvalidParameterError(f"tokens: dtype {tokens.dtype} given, expected integers")
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= self.codebook_size:
            raise InvalidParameterError(
                f"tokens: codes from {low} to {high} given, expected 0 to {self.codebook_size - 1}"
            )
        if tokens.ndim == 2:
            side = round(tokens.shape[1] ** 0.5)
            if side**2 != tokens.shape[1]:
                raise InvalidParameterError(
                    f"tokens: {tokens.shape[1]} codes a picture given, no square: give them as (B, h, w)"
                )
            tokens = tokens.unflatten(1, (side, side))
        return tokens.to(self.vqvae.device).long()


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint; of a pickle, nothing but tensors and plain containers is loaded."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the release's training options
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{path}: {error}") from error
    except (RuntimeError, EOFError) as error:
        raise InvalidParameterError(f"{path} is no file of torch.save: {error}") from error
    state = next((saved[key] for key in STATE_KEYS if key in saved), saved) if isinstance(saved, dict) else saved
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidParameterError(f"{path} holds no tensors under {', '.join(STATE_KEYS)}")
    return state
