"""TokenFlow: pictures to codes that stand for what is seen and for how it looks at once, and back (arXiv 2412.03069).

A code is a row of two codebooks, one for a semantic encoder's tokens and one for a pixel encoder's; codes come in
scales, coarse to fine. The semantic half gives back features of a teacher such as CLIP, the pixel half the picture.
Where paper and released code differ this follows the code, which the released weights were made with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.generation import tokenflow_official as official
from tokred.generation import tokenflow_parts as parts
from tokred.generation.images import ImageInput, to_pixels
from tokred.generation.pyramid import PyramidQuantizer
from tokred.generation.tokenizer import ImageTokenizer

__all__ = ["FEATURE_MODES", "TokenFlow", "TokenFlowEncoderOutput", "TokenFlowOutput"]

#: what `TokenFlow.llm_features` can give
FEATURE_MODES = ("last", "last_semantic", "last_pixel", "full_residual", "full", "prefix")
#: how a PIL image or array becomes a square: see `tokred.generation.tokenflow_parts`
FITS = ("crop", "pad", "squeeze")


@dataclass
class TokenFlowEncoderOutput(BaseOutput):
    """What `TokenFlow.encode_full` gives, float32; D = semantic_dim + pixel_dim, g the last scale."""

    codes: Tensor  #: (B, n) int64
    latents: Tensor  #: (B, D, g, g), the quantized map, semantic channels first
    semantic: Tensor  #: (B, g * g, semantic_dim), before quantizing
    pixel: Tensor  #: (B, pixel_dim, g, g), before quantizing
    residual: Tensor  #: (B, D, g, g), what quantizing lost
    vq_loss: Tensor  #: (), unweighted
    commitment_loss: Tensor  #: (), unweighted


@dataclass
class TokenFlowOutput(BaseOutput):
    """A training pass of `TokenFlow`."""

    sample: Tensor  #: (B, 3, H, W), not cut to [-1, 1]
    features: Tensor  #: (B, g * g, out_dim), to be compared with the teacher's
    encoder: TokenFlowEncoderOutput


class TokenFlow(ModelMixin, ConfigMixin, ImageTokenizer):
    """The tokenizer; `save_pretrained` and `from_pretrained` are those of diffusers.

    The defaults are the released one for generation at 256 pixels (CLIP ViT-B/16 and the larger pixel decoder, 377 M
    parameters, 817 codes). Encoders and decoders may run in half precision; the quantizer computes in float32, and
    `from_pretrained(..., torch_dtype=torch.float16)` leaves its codebooks so. `.to(dtype)` rounds them: other codes.

    Args:
        image_size: side of the pictures in pixels; other sizes are refused, for the position tables are of one.
        scales: sides of the maps of codes, growing; the last is the grid g of both encoders.
        codebook_size: rows K of both codebooks. semantic_dim, pixel_dim: numbers of each half of a code.
        distance_weight: of the pixel half when the nearest row is sought; the paper's and the release's is 1.
        semantic_encoder_config: "type" clip, siglip or timm, "input_norm" none, clamp or clip, and the fields of that
            model; see `tokred.generation.tokenflow_parts.semantic_encoder`.
        semantic_decoder_config: "dim", "depth", "heads", "out_dim" of the ViT that gives back the teacher's features.
        pixel_encoder_config, pixel_decoder_config: "block_out_channels", "layers_per_block", "norm_num_groups",
            "latent_channels" and "attention" of diffusers' VQGAN encoder and decoder.
        pixel_size: side that pictures are scaled to for the pixel encoder, and come out of its decoder with, where g is
            no power of two below image_size (432 for SigLIP at 384 pixels); None scales nothing.
        scale_drop: in training, the probability with which one scale, never the first, takes no part.

    Raises:
        InvalidParameterError: values outside their ranges, or parts that do not have one grid.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantizer"]  # by `from_pretrained`

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        scales: Sequence[int] = (1, 2, 4, 6, 8, 10, 12, 14, 16),
        codebook_size: int = 32768,
        semantic_dim: int = 32,
        pixel_dim: int = 8,
        distance_weight: float = 1.0,
        semantic_encoder_config: Mapping[str, Any] = official.CLIP_B,
        semantic_decoder_config: Mapping[str, Any] = official.SEMANTIC_DECODER_B,
        pixel_encoder_config: Mapping[str, Any] = official.PIXEL_BASE,
        pixel_decoder_config: Mapping[str, Any] = official.PIXEL_ENHANCED,
        pixel_size: int | None = None,
        scale_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise InvalidParameterError(f"image_size={image_size!r}: expected a whole number, 1 or more")
        if not 0 <= scale_drop <= 1:
            raise InvalidParameterError(f"scale_drop={scale_drop!r}: expected a probability")
        self.quantizer = PyramidQuantizer(codebook_size, semantic_dim, pixel_dim, scales, distance_weight)
        grid = self.quantizer.grid
        self.pixel_encoder = parts.pixel_encoder(pixel_encoder_config)
        self.quant_conv = nn.Conv2d(pixel_encoder_config["latent_channels"], pixel_dim, 1)
        self.post_quant_conv = nn.Conv2d(pixel_dim, pixel_decoder_config["latent_channels"], 1)
        self.pixel_decoder = parts.pixel_decoder(pixel_decoder_config)
        self._check_pixel_grid(pixel_size or image_size)
        self.semantic_encoder = parts.semantic_encoder(semantic_encoder_config, image_size)
        width = parts.semantic_width(self.semantic_encoder, semantic_encoder_config)
        self._check_semantic_grid(semantic_encoder_config["type"])
        self.semantic_in = parts.task_layer(width, semantic_dim)
        self.semantic_decoder = parts.semantic_decoder(semantic_decoder_config, semantic_dim, grid)
        self.semantic_out = parts.task_layer(semantic_decoder_config["dim"], semantic_decoder_config["out_dim"])

    def _check_pixel_grid(self, size: int) -> None:
        grid = self.quantizer.grid
        levels = {"pixel_encoder": self.pixel_encoder.down_blocks, "pixel_decoder": self.pixel_decoder.up_blocks}
        for name, blocks in levels.items():
            factor = 2 ** (len(blocks) - 1)
            if size != factor * grid:
                raise InvalidParameterError(
                    f"{name}_config: its levels make a grid of {size / factor:g} from pictures of {size} pixels, and "
                    f"the last scale is {grid}; give other block_out_channels, or pixel_size={factor * grid:g}"
                )

    def _check_semantic_grid(self, kind: str) -> None:
        encoder: Any = self.semantic_encoder
        grid = self.quantizer.grid
        if kind == "timm":
            own = tuple(encoder.patch_embed.grid_size)
        else:
            own = (encoder.config.image_size // encoder.config.patch_size,) * 2
        if own != (grid, grid):
            raise InvalidParameterError(
                f"semantic_encoder_config: its grid is {own[0]} x {own[1]}, the last scale is {grid}"
            )

    @classmethod
    def from_official(
        cls,
        source: str | Path,
        filename: str | None = None,
        image_size: int | None = None,
        scales: Sequence[int] | None = None,
        **changes: Any,
    ) -> TokenFlow:
        """The tokenizer of a released checkpoint, in eval mode; every tensor of it must find its place.

        Nothing else is downloaded: the encoder's weights are in the checkpoint, and its teacher's are not needed.

        Args:
            source: a file (.pt or .safetensors), a folder that holds one, or a name on the Hub, such as
                "ByteVisionLab/TokenFlow". Also the released LLaVA model, which holds a tokenizer among its shards.
            filename: which file of a folder or repository: "tokenflow_clipb_32k_enhanced.pt",
                "tokenflow_siglip_32k.pt".
            image_size: side in pixels; the position tables are resized to it. None is what they were trained at, and
                256 for the larger pixel decoder, which was made for that.
            scales: None is the release's, by the grid.
            changes: other arguments of `TokenFlow` in place of what is read off the weights; of a mapping only the
                given entries. Numbers of heads cannot be read: they are those of the release.

        Raises:
            InvalidParameterError: no such file, unknown or missing tensors, another model.
            UnsafeCheckpointError: a file that asks for more than tensors and plain values.
        """
        state = official.read_checkpoint(source, filename)
        config = official.read_config(state, image_size, scales, changes)
        with torch.device("meta"):
            model = cls(**config)
        official.load_strictly(model, official.convert_state_dict(state))
        return model.eval()

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the released names, without those that this class does not carry (see the module)."""
        return official.official_state_dict(self.state_dict(), self.config.semantic_encoder_config["type"])

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the maps of codes, coarse to fine."""
        return self.quantizer.scales

    @property
    def num_tokens(self) -> int:
        return self.quantizer.lengths[-1]

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def prefixes(self) -> bool:
        """Whole scales can be decoded: 1, 5, 21 ... codes, `quantizer.lengths`."""
        return True

    @property
    def _dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    # -- pictures to codes -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(  # type: ignore[override]
        self,
        images: ImageInput,
        num_tokens: int | None = None,
        fit: str = "crop",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Codes (B, n) int64 of pictures: scale by scale, coarse to fine, row by row within a scale.

        Args:
            images: what `tokred.generation.images.to_pixels` takes. Tensors must have the sides `image_size`.
            num_tokens: n, the codes of whole scales; None is all. Fewer are the first of all.
            fit: how PIL images and arrays become squares: "crop" (halved, scaled, cut: the release's for generation),
                "pad" (with grey, as for its language model) or "squeeze".
            dtype: another than float32 runs encoders in it (autocast); float32 is float32 under an outer autocast too.

        Raises:
            InvalidParameterError: other sizes, values, or numbers of tokens.
        """
        count = self._count(num_tokens)
        pixels = self._pixels(images, fit)
        with _autocast(self.device, dtype):
            return self.encode_full(pixels).codes[:, :count]

    def encode_full(self, pixels: Tensor, dropped: int | None = None) -> TokenFlowEncoderOutput:
        """Codes of pixels (B, 3, S, S), and what they are made of, with gradients.

        Args:
            pixels: nominally in [-1, 1], not checked. dropped: as in `PyramidQuantizer.forward`.

        Raises:
            InvalidParameterError: another shape.
        """
        semantic, pixel = self.semantic_map(pixels), self.pixel_map(pixels)
        found = self.quantizer(torch.cat([semantic.float(), pixel.float()], dim=1), dropped)
        return TokenFlowEncoderOutput(
            codes=found.codes,
            latents=found.quant,
            semantic=semantic.flatten(2).mT,
            pixel=pixel,
            residual=found.residual,
            vq_loss=found.vq_loss,
            commitment_loss=found.commitment_loss,
        )

    def semantic_map(self, pixels: Tensor) -> Tensor:
        """The semantic half (B, semantic_dim, g, g) of pixels (B, 3, S, S), before quantizing."""
        self._check_size(pixels)
        grid, pixels = self.quantizer.grid, pixels.to(self.device, self._dtype)
        tokens = parts.semantic_tokens(self.semantic_encoder, self.config.semantic_encoder_config, pixels)
        return self.semantic_in(tokens).mT.unflatten(2, (grid, grid))

    def pixel_map(self, pixels: Tensor) -> Tensor:
        """The pixel half (B, pixel_dim, g, g) of pixels (B, 3, S, S), before quantizing."""
        self._check_size(pixels)
        pixels = pixels.to(self.device, self._dtype)
        return self.quant_conv(self.pixel_encoder(_resized(pixels, self.config.pixel_size)))

    # -- codes to pictures and features ------------------------------------------------------------------------------

    def lookup(self, codes: Tensor) -> Tensor:
        """Rows (..., D) float32 of codes (...) of any shape: the semantic half and the pixel half, each of norm 1."""
        return self.quantizer.lookup(codes)

    def features(self, codes: Tensor, upto: int | None = None) -> Tensor:
        """The map (B, D, g, g) float32 of codes (B, n) of whole scales, or of the first `upto` scales of them."""
        return self.quantizer.features(codes, upto)

    @torch.no_grad()
    def decode(  # type: ignore[override]
        self, tokens: Tensor, num_tokens: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Pictures (B, 3, S, S) float32 in [-1, 1] of codes (B, n) of whole scales.

        Args:
            num_tokens: use the first so many codes, whole scales too. dtype: as in `encode`, of the decoder.

        Raises:
            InvalidParameterError: codes outside the codebook, or no whole scales.
        """
        latents = self.features(self._prefix(tokens, num_tokens))
        with _autocast(self.device, dtype):
            return self.decode_latents(latents).clamp(-1, 1)

    @torch.no_grad()
    def decode_semantic(
        self, tokens: Tensor, num_tokens: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The teacher's features (B, g * g, out_dim) float32 as codes (B, n) give them back; see `decode`."""
        latents = self.features(self._prefix(tokens, num_tokens))
        with _autocast(self.device, dtype):
            return self.semantic_features(latents)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) float32 of latents (B, D, g, g), with gradients; not cut to [-1, 1]."""
        self._check_latents(latents)
        pixel = latents[:, self.quantizer.semantic_dim :].to(self.device, self._dtype)
        out = self.pixel_decoder(self.post_quant_conv(pixel))
        return _resized(out, self.image_size).float()

    def semantic_features(self, latents: Tensor) -> Tensor:
        """The teacher's features (B, g * g, out_dim) float32 from latents (B, D, g, g), with gradients."""
        self._check_latents(latents)
        semantic = latents[:, : self.quantizer.semantic_dim].to(self.device, self._dtype)
        return self.semantic_out(parts.decode_tokens(self.semantic_decoder, semantic)).float()

    @torch.no_grad()
    def progressive(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Pictures (m, B, 3, S, S) of the first 1, 2, ... m scales of codes (B, n) of m whole scales."""
        maps = list(self.quantizer.partial_sums(self._prefix(tokens, None)))
        with _autocast(self.device, dtype):
            return torch.stack([self.decode_latents(latents).clamp(-1, 1) for latents in maps])

    def forward(self, pixels: Tensor) -> TokenFlowOutput:
        """Training pass: pixels (B, 3, S, S) in [-1, 1] to codes and back, one scale left out now and then.

        `scale_drop` of the config is its probability; it draws from torch's global generator, in training mode alone.
        """
        dropped = self.quantizer.draw_dropped(self.config.scale_drop) if self.training else None
        encoded = self.encode_full(pixels, dropped)
        latents = encoded.latents
        return TokenFlowOutput(
            sample=self.decode_latents(latents), features=self.semantic_features(latents), encoder=encoded
        )

    # -- for language models -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def llm_features(
        self,
        images: ImageInput,
        mode: str = "last",
        upto: int | None = None,
        fit: str = "pad",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Visual tokens (B, n, d) float32 for a projector, of pictures or of their codes.

        | mode | tokens | n | d |
        |---|---|---|---|
        | "last" | the finest map; the release's | g * g | D |
        | "last_semantic", "last_pixel" | its halves | g * g | that half's |
        | "full_residual" | every code's own row | s_1^2 + ... | D |
        | "full" | the map after each scale, pooled to that scale | s_1^2 + ... | D |
        | "prefix" | the map after the first `upto` scales, pooled to the last of them | s_upto^2 | D |

        The paper names "full scale" and "full-scale residual" (Table 8) without a definition; the two here are our
        reading. "prefix" is ours.

        Args:
            images: what `encode` takes, or codes (B, n) of whole scales: an integer tensor with two dimensions.
            upto: take the codes of this many scales; None is all.
            fit: as in `encode`. dtype: as in `encode`.

        Raises:
            InvalidParameterError: another mode or number of scales, and as `encode` and `features`.
        """
        if mode not in FEATURE_MODES:
            raise InvalidParameterError(f"mode={mode!r}: expected one of {', '.join(FEATURE_MODES)}")
        self.quantizer.checked_upto(upto)
        if isinstance(images, Tensor) and images.ndim == 2 and not images.is_floating_point():
            codes = self._prefix(images, None)
        else:
            codes = self.encode(images, fit=fit, dtype=dtype)
        if mode == "full_residual":
            rows = self.quantizer.split(codes)
            return self.lookup(torch.cat(rows[: self.quantizer.checked_upto(upto, len(rows))], dim=1))
        if mode == "full":
            maps = self.quantizer.partial_sums(codes, upto)
            pooled = [_pooled(m, side) for side, m in zip(self.scales, maps, strict=False)]
            return torch.cat([m.flatten(2).mT for m in pooled], dim=1)
        quant, split = self.features(codes, upto), self.quantizer.semantic_dim
        if mode == "last_semantic":
            quant = quant[:, :split]
        elif mode == "last_pixel":
            quant = quant[:, split:]
        elif mode == "prefix":
            given = self.quantizer.scales_of(codes.shape[1])
            quant = _pooled(quant, self.scales[(upto or given) - 1])
        return quant.flatten(2).mT

    # -- input -------------------------------------------------------------------------------------------------------

    def _pixels(self, images: ImageInput, fit: str) -> Tensor:
        if fit not in FITS:
            raise InvalidParameterError(f"fit={fit!r}: expected one of {', '.join(FITS)}")
        if isinstance(images, (Image.Image, np.ndarray)):
            return to_pixels(self._squared(images, fit))
        if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
            return to_pixels([one if isinstance(one, Tensor) else self._squared(one, fit) for one in images])
        return to_pixels(images)

    def _squared(self, image: Image.Image | np.ndarray, fit: str) -> Image.Image:
        cut = parts.crop_square if fit == "crop" else functools.partial(parts.pad_square, pad=fit == "pad")
        return cut(image, self.image_size)

    def _check_size(self, pixels: Tensor) -> None:
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise InvalidParameterError(
                f"pixels: shape {tuple(pixels.shape)} given, expected (B, 3, {size}, {size}); PIL images are scaled by "
                "themselves"
            )

    def _check_latents(self, latents: Tensor) -> None:
        shape = (self.quantizer.dim, self.quantizer.grid, self.quantizer.grid)
        if latents.ndim != 4 or latents.shape[1:] != shape:
            raise InvalidParameterError(
                f"latents: shape {tuple(latents.shape)} given, expected (B, {', '.join(map(str, shape))})"
            )

    def _count(self, num_tokens: int | None) -> int:
        if num_tokens is None:
            return self.num_tokens
        self.quantizer.scales_of(num_tokens)
        return num_tokens

    def _prefix(self, codes: Tensor, num_tokens: int | None) -> Tensor:
        if not isinstance(codes, Tensor) or codes.ndim != 2:
            given = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise InvalidParameterError(f"tokens: {given} given, expected codes (B, n)")
        self.quantizer.scales_of(codes.shape[1])
        count = self._count(num_tokens)
        if num_tokens is not None and count > codes.shape[1]:
            raise InvalidParameterError(f"num_tokens={num_tokens}: only {codes.shape[1]} codes of a picture are given")
        return codes[:, :count]


def _resized(pixels: Tensor, size: int | None) -> Tensor:
    if size is None or pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False)


def _pooled(quant: Tensor, side: int) -> Tensor:
    return quant if quant.shape[-1] == side else F.interpolate(quant, (side, side), mode="area")


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; float32 switches an outer autocast off."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
