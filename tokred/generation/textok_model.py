"""The TexTok model: a picture and the features of its caption to N continuous tokens, and back (arXiv 2412.05796).

No code and no weights were ever published. What the paper says and what is our reading of it is told apart in
`TexTokModel`; the transformer blocks are timm's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.generation.patches import unpatchify

try:
    from timm.models.vision_transformer import Block
except ImportError as error:
    raise ImportError(
        "TexTok is built of timm's blocks, and timm is not installed: pip install 'tokred[timm]'"
    ) from error

__all__ = ["PRESETS", "TexTokDecoderOutput", "TexTokEncoderOutput", "TexTokModel", "TokenGaussian", "latent_statistics"]

LATENT_TYPES = ("ae", "kl")
#: widths and depths by name; `textok_b` is the paper's, the other two are ours
PRESETS: dict[str, dict[str, int]] = {
    "textok_s": {"hidden_size": 384, "num_heads": 6, "encoder_depth": 12, "decoder_depth": 12},
    "textok_b": {"hidden_size": 768, "num_heads": 12, "encoder_depth": 12, "decoder_depth": 12},
    "textok_l": {"hidden_size": 1024, "num_heads": 16, "encoder_depth": 24, "decoder_depth": 24},
}


class TokenGaussian:
    """A diagonal Gaussian for each picture's tokens.

    Args:
        mean, logvar: (B, N, d); logvar is cut to [-30, 20].
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """mean + exp(logvar / 2) * eps, eps from N(0, I): (B, N, d). A list holds one generator a picture."""
        mean = self.mean
        eps = randn_tensor(tuple(mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(self.logvar / 2) * eps

    def mode(self) -> Tensor:
        """The mean, (B, N, d)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to N(0, I) in nats, summed over the N * d entries of a picture: (B,) float32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2))


@dataclass
class TexTokEncoderOutput(BaseOutput):
    """`latents` (B, N, d) of an "ae" model, or `latent_dist` of a "kl" model; the other is None."""

    latents: Tensor | None = None
    latent_dist: TokenGaussian | None = None


@dataclass
class TexTokDecoderOutput(BaseOutput):
    """`sample`: pictures (B, 3, H, W), nominally in [-1, 1], not cut."""

    sample: Tensor


class _Tower(nn.Module):
    """Blocks over [own tokens ; text tokens], and the text side that encoder and decoder have in common."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any

    def __init__(self, config: dict[str, Any], depth: int, takes_text: bool, owns_projection: bool) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.takes_text = takes_text
        self.text_proj = nn.Linear(config["text_dim"], width) if takes_text and owns_projection else None
        positions = takes_text and config["text_positions"]
        self.text_pos_embed = _table(config["max_text_len"], width) if positions else None
        # rows: patches, latent tokens, text
        self.type_embed = _table(3 if takes_text else 2, width) if config["type_embeddings"] else None
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        make = functools.partial(Block, width, config["num_heads"], config["mlp_ratio"], qkv_bias=True, norm_layer=norm)
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.norm = norm(width)

    def run(self, patches: Tensor, latents: Tensor, text: Tensor | None, visible: Tensor | None) -> Tensor:
        """All blocks over (B, P, D), (B, N, D) and (B, T, D); `visible` (B, T) tells which text may be looked at."""
        parts = [patches, latents]
        mask = None
        if text is not None and self.takes_text:
            if self.text_pos_embed is not None:
                text = text + self.text_pos_embed[:, : text.shape[1]]
            parts.append(text)
        if self.type_embed is not None:
            parts = [part + self.type_embed[:, i : i + 1] for i, part in enumerate(parts)]
        if len(parts) == 3 and visible is not None:
            parts[2] = parts[2].masked_fill(~visible[..., None], 0)  # nothing there can spread, not even nan
            own = visible.new_ones(len(visible), patches.shape[1] + latents.shape[1])
            mask = torch.cat([own, visible], dim=1)[:, None, None, :]
        x = torch.cat(parts, dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, mask)
            else:
                x = block(x, attn_mask=mask)
        return x


class TexTokEncoder(_Tower):
    """Pictures to what the latents are made of ("tokenizer" in the paper)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config, config["encoder_depth"], config["text_in_encoder"], owns_projection=True)
        width, patch = config["hidden_size"], config["patch_size"]
        self.grid = config["image_size"] // patch
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.pos_embed = _table(self.grid**2, width)
        self.latent_tokens = _table(config["num_tokens"], width)
        self.to_latent = nn.Linear(width, config["latent_dim"] * (2 if config["latent_type"] == "kl" else 1))

    def forward(self, images: Tensor, text: Tensor | None, visible: Tensor | None) -> Tensor:
        u = self.patch_embed(images)
        grid = (u.shape[2], u.shape[3])
        u = u.flatten(2).transpose(1, 2) + _resized(self.pos_embed, self.grid, grid)
        p, n = u.shape[1], self.latent_tokens.shape[1]
        x = self.run(u, self.latent_tokens.expand(len(u), -1, -1), text, visible)
        return self.to_latent(self.norm(x[:, p : p + n]))


class TexTokDecoder(_Tower):
    """Latents to pictures ("detokenizer" in the paper)."""

    def __init__(self, config: dict[str, Any]) -> None:
        takes_text = config["text_in_decoder"]
        super().__init__(config, config["decoder_depth"], takes_text, owns_projection=not config["shared_text_proj"])
        width, self.patch_size = config["hidden_size"], config["patch_size"]
        self.grid = config["image_size"] // self.patch_size
        self.patch_tokens = _table(self.grid**2, width)
        self.latent_proj = nn.Linear(config["latent_dim"], width)
        self.latent_pos_embed = _table(config["num_tokens"], width)
        self.to_pixels = nn.Linear(width, 3 * self.patch_size**2)

    def forward(self, latents: Tensor, text: Tensor | None, visible: Tensor | None, grid: tuple[int, int]) -> Tensor:
        q = _resized(self.patch_tokens, self.grid, grid).expand(len(latents), -1, -1)
        x = self.run(q, self.latent_proj(latents) + self.latent_pos_embed, text, visible)
        return unpatchify(self.to_pixels(self.norm(x[:, : q.shape[1]])), self.patch_size, grid)


class TexTokModel(ModelMixin, ConfigMixin):
    """TexTok's tokenizer and detokenizer; both read the frozen features of the caption, which the caller makes.

    Depth, width, N and d are the paper's as others report them; fields marked * answer what the paper leaves open or
    we could not read there, with our choice as the default.

    Args:
        image_size: side S of the pictures in pixels.
        patch_size*: p; 8 at 256 pixels and 16 at 512 make P = (S / p)^2 = 1024 patches. 16 at 256 is a cheap choice.
        num_tokens: N, 32 to 256 in the paper; one model per N.
        latent_dim: d.
        hidden_size, num_heads, encoder_depth, decoder_depth, mlp_ratio: of the transformer blocks.
        text_dim: width of the text features (2048 for T5-XL, 4096 for T5-XXL).
        max_text_len*: the most text tokens T.
        latent_type*: "ae", a plain autoencoder, or "kl", a Gaussian for each token.
        latent_shift, latent_scale: d numbers each, of `normalize`; None is 0 and 1.
        text_in_encoder, text_in_decoder: where text goes in; both is the paper's choice.
        mask_padding*: text tokens whose mask is 0 cannot be looked at. False looks at padding too, as unofficial code
            does; rows whose mask is all 0 (no caption) stay hidden.
        text_positions*: learned positions on text tokens; the features of T5 are ordered already.
        type_embeddings*: a learned vector each for patches, latents and text.
        shared_text_proj*: the detokenizer uses the tokenizer's projection of the text features.

    Raises:
        InvalidParameterError: a field outside its range.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 8,
        num_tokens: int = 32,
        latent_dim: int = 8,
        hidden_size: int = 768,
        num_heads: int = 12,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        mlp_ratio: float = 4.0,
        text_dim: int = 2048,
        max_text_len: int = 128,
        latent_type: str = "ae",
        latent_shift: list[float] | None = None,
        latent_scale: list[float] | None = None,
        text_in_encoder: bool = True,
        text_in_decoder: bool = True,
        mask_padding: bool = True,
        text_positions: bool = False,
        type_embeddings: bool = False,
        shared_text_proj: bool = False,
    ) -> None:
        super().__init__()
        config = dict(self.config)
        _check_config(config)
        self.encoder = TexTokEncoder(config)
        self.decoder = TexTokDecoder(config)
        self.apply(_init_linear)

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> TexTokModel:
        """A new model of the width and depth of "textok_s", "textok_b" or "textok_l"; `fields` as in the constructor.

        Raises:
            InvalidParameterError: an unknown name, or a field outside its range.
        """
        if name not in PRESETS:
            raise InvalidParameterError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **fields})

    # -- pictures to latents and back ----------------------------------------------------------------------------------

    def encode(
        self,
        images: Tensor,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        interpolate: bool = False,
    ) -> TexTokEncoderOutput:
        """Latents of pictures.

        Args:
            images: (B, 3, S, S) floats in [-1, 1].
            text_embeds: (B, T, text_dim) features of the captions; None encodes without text.
            text_mask: (B, T), 1 at text and 0 at padding; a row of zeros is a picture without a caption. None is all 1.
            interpolate: also take other sizes that are multiples of the patch, with the position table resized.

        Raises:
            InvalidParameterError: shapes that do not fit the model, or another size without `interpolate`.
        """
        self._check_images(images, interpolate)
        text, visible = self._text(len(images), text_embeds, text_mask)
        z = self.encoder(images.to(self.dtype), self._project(self.encoder, text), visible)
        if self.config.latent_type == "ae":
            return TexTokEncoderOutput(latents=z)
        return TexTokEncoderOutput(latent_dist=TokenGaussian(*z.chunk(2, dim=-1)))

    def decode(
        self,
        latents: Tensor,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> TexTokDecoderOutput:
        """Pictures of latents (B, N, d); text as in `encode`.

        `image_size`: None is the model's own; another side, or (height, width), resizes the table of patch tokens.

        Raises:
            InvalidParameterError: shapes that do not fit the model, or a size that is no multiple of the patch.
        """
        n, d, patch = self.config.num_tokens, self.config.latent_dim, self.config.patch_size
        if latents.ndim != 3 or tuple(latents.shape[1:]) != (n, d):
            raise InvalidParameterError(
                f"latents: shape {tuple(latents.shape)} given, expected (B, {n}, {d}): this model has {n} tokens of "
                f"{d} numbers, and its first tokens alone mean nothing"
            )
        size = self.config.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height < patch or width < patch or height % patch or width % patch:
            raise InvalidParameterError(f"image_size={image_size!r}: expected positive multiples of {patch}")
        text, visible = self._text(len(latents), text_embeds, text_mask)
        # a shared projection is the encoder's
        owner = self.encoder if self.config.shared_text_proj else self.decoder
        grid = (height // patch, width // patch)
        return TexTokDecoderOutput(self.decoder(latents.to(self.dtype), self._project(owner, text), visible, grid))

    def forward(
        self,
        images: Tensor,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
    ) -> TexTokDecoderOutput:
        """Reconstruct pictures; "kl" models decode the mean, or a sample if asked."""
        out = self.encode(images, text_embeds, text_mask)
        dist = out.latent_dist
        latents = out.latents if dist is None else dist.sample(generator) if sample_posterior else dist.mode()
        return self.decode(cast("Tensor", latents), text_embeds, text_mask)

    # -- latents for a generator ---------------------------------------------------------------------------------------

    def normalize(self, latents: Tensor) -> Tensor:
        """(latents - shift) / scale for each of the d channels, in float32: what a generator models."""
        shift, scale = self._statistics(latents.device)
        return (latents.float() - shift) / scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """latents * scale + shift, in float32: undoes `normalize`."""
        shift, scale = self._statistics(latents.device)
        return latents.float() * scale + shift

    def set_latent_statistics(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        """Put shift and scale of `normalize` into the config (see `latent_statistics`): d numbers each, scale > 0."""
        _check_statistics("latent_shift", shift, self.config.latent_dim)
        _check_statistics("latent_scale", scale, self.config.latent_dim)
        self.register_to_config(latent_shift=list(map(float, shift)), latent_scale=list(map(float, scale)))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        d = self.config.latent_dim
        shift = torch.tensor(self.config.latent_shift or [0.0] * d, device=device)
        return shift, torch.tensor(self.config.latent_scale or [1.0] * d, device=device)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _check_images(self, images: Tensor, interpolate: bool) -> None:
        side, patch = self.config.image_size, self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InvalidParameterError(
                f"images: {tuple(images.shape)} {images.dtype} given, expected (B, 3, {side}, {side}) floats in [-1, 1]"
            )
        size = tuple(images.shape[2:])
        if size == (side, side):
            return
        if not interpolate:
            raise InvalidParameterError(
                f"images of {size[0]} x {size[1]} pixels given, expected {side} x {side}; resize them, or encode with "
                "interpolate=True"
            )
        if 0 in size or size[0] % patch or size[1] % patch:
            raise InvalidParameterError(
                f"images of {size[0]} x {size[1]} pixels given, expected multiples of the patch size {patch}"
            )

    def _text(self, batch: int, embeds: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Features in the model's dtype, and which of them may be looked at, (B, T) bool or None for all."""
        if embeds is None:
            if mask is not None:
                raise InvalidParameterError("text_mask given without text_embeds: give both, or neither")
            return None, None
        config = self.config
        if not (config.text_in_encoder or config.text_in_decoder):
            raise InvalidParameterError("text_embeds given, but this model takes text neither in encoder nor decoder")
        if embeds.ndim != 3 or embeds.shape[0] != batch or embeds.shape[2] != config.text_dim:
            raise InvalidParameterError(
                f"text_embeds: shape {tuple(embeds.shape)} given, expected ({batch}, T, {config.text_dim}): one "
                "caption a picture, of the text encoder that the model was trained with"
            )
        if not 1 <= embeds.shape[1] <= config.max_text_len:
            raise InvalidParameterError(
                f"text_embeds of {embeds.shape[1]} tokens given, expected 1 to max_text_len={config.max_text_len}; "
                "shorten the captions before the text encoder"
            )
        if mask is None:
            return embeds.to(self.dtype), None
        if mask.shape != embeds.shape[:2]:
            raise InvalidParameterError(
                f"text_mask: shape {tuple(mask.shape)} given, expected {tuple(embeds.shape[:2])} as in text_embeds"
            )
        visible = mask.to(device=embeds.device, dtype=torch.bool)
        if not config.mask_padding:
            visible = visible.any(dim=1, keepdim=True).expand_as(visible)
        return embeds.to(self.dtype), visible

    def _project(self, owner: _Tower, text: Tensor | None) -> Tensor | None:
        return text if text is None or owner.text_proj is None else owner.text_proj(text)


def latent_statistics(batches: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over latents (B, N, d), one pass, float64: (shift, scale).

    Raises:
        InvalidParameterError: no latents, or a channel that does not vary.
    """
    count, mean, spread = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.detach().to("cpu", torch.float64).flatten(0, -2)
        n, centre = len(rows), rows.mean(dim=0)
        # Chan et al. 1979: joins the sums of squares of two samples
        delta = centre - mean
        spread = spread + (rows - centre).square().sum(dim=0) + delta.square() * (count * n / (count + n))
        mean = mean + delta * (n / (count + n))
        count += n
    if count == 0:
        raise InvalidParameterError("latent_statistics: no latents given")
    scale = (spread / count).sqrt()
    if not bool((scale > 0).all()):
        raise InvalidParameterError(
            f"latent_statistics: channels {(~(scale > 0)).nonzero().flatten().tolist()} do not vary"
        )
    return mean.tolist(), scale.tolist()


def _table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, rows, width) * 0.02)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _resized(table: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """(1, side^2, D) -> (1, h * w, D), bicubic where the grid is another."""
    if grid == (side, side):
        return table
    x = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=grid, mode="bicubic", align_corners=False)
    return x.flatten(2).transpose(1, 2).to(table.dtype)


def _check_config(config: dict[str, Any]) -> None:
    counts = ("image_size", "patch_size", "num_tokens", "latent_dim", "hidden_size", "num_heads", "encoder_depth")
    for name in (*counts, "decoder_depth", "text_dim", "max_text_len"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise InvalidParameterError(f"{name}={config[name]!r}: expected a positive integer")
    for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_heads")):
        if config[whole] % config[part]:
            raise InvalidParameterError(f"{whole}={config[whole]} is no multiple of {part}={config[part]}")
    if not config["mlp_ratio"] > 0:
        raise InvalidParameterError(f"mlp_ratio={config['mlp_ratio']!r}: expected a positive number")
    if config["latent_type"] not in LATENT_TYPES:
        raise InvalidParameterError(f"latent_type={config['latent_type']!r}: expected one of {', '.join(LATENT_TYPES)}")
    if config["shared_text_proj"] and not (config["text_in_encoder"] and config["text_in_decoder"]):
        raise InvalidParameterError("shared_text_proj=True: expected text in both encoder and decoder")
    for name in ("latent_shift", "latent_scale"):
        if config[name] is not None:
            _check_statistics(name, config[name], config["latent_dim"])


def _check_statistics(name: str, values: Sequence[float], d: int) -> None:
    fine = len(values) == d and all(math.isfinite(value) for value in values)
    if not fine or (name == "latent_scale" and min(values) <= 0):
        what = "positive finite" if name == "latent_scale" else "finite"
        raise InvalidParameterError(f"{name}={list(values)!r}: expected {d} {what} numbers, one a latent channel")
