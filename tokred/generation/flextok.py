"""FlexTok: a picture as 1 to 256 ordered tokens, and a picture from any number of the first of them.

Bachmann et al., FlexTok: Resampling Images into 1D Token Sequences of Flexible Length, arXiv 2502.13967. A VAE gives
latents, an encoder writes them into causal registers, FSQ makes each an integer, and a rectified-flow decoder gives the
latents back under the registers that are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError
from tokred.generation import flextok_official as official
from tokred.generation.flextok_blocks import POSITION_TYPES, FlexTokDecoder, FlexTokEncoder
from tokred.generation.flow import APG, Generators, draw_noise, sample
from tokred.generation.images import ImageInput, to_pil, to_pixels
from tokred.generation.quantize import FSQ
from tokred.generation.tokenizer import ImageTokenizer

__all__ = [
    "NESTED_DROPOUT_LAWS",
    "FlexTok",
    "FlexTokCondition",
    "FlexTokEncoderOutput",
    "FlexTokModel",
    "FlexTokModelOutput",
    "sample_keep_k",
]

logger = logging.getLogger(__name__)

NESTED_DROPOUT_LAWS = ("uniform", "pow2", "uniform_pow2")


@dataclass
class FlexTokEncoderOutput(BaseOutput):
    """`ids` (B, n) int64, `codes` (B, n, L) float32 in [-1, 1], `pre_quant` (B, n, L), the registers before FSQ."""

    ids: Tensor
    codes: Tensor
    pre_quant: Tensor


@dataclass
class FlexTokModelOutput(BaseOutput):
    """`velocity` (B, C, H, W) float32, `encoder`, and `hidden` (B, P + n, D) after the block that was asked for."""

    velocity: Tensor
    encoder: FlexTokEncoderOutput
    hidden: Tensor | None


@dataclass(frozen=True)
class FlexTokCondition:
    """Registers as the decoder reads them: `tokens` (B or 1, n, D), and `bias` (B or 1, n) on their keys, or None."""

    tokens: Tensor
    bias: Tensor | None


class FlexTokModel(ModelMixin, ConfigMixin):
    """FlexTok without its VAE: latents to ids, and the velocity of noised latents under ids.

    Args:
        encoder_depth, encoder_dim, decoder_depth, decoder_dim: blocks and widths; widths are multiples of 4 and
            `head_dim`.
        head_dim: width of a head. The scale of attention is 8 / head_dim, the usual one only at 64.
        mlp_ratio: the gated MLPs' hidden width is two thirds of this many widths.
        num_registers: K, the most tokens of a picture.
        fsq_levels: levels of each number of a token; their product is the codebook size.
        latent_channels, patch_size: C, p; a latent picture (C, H, W) has H / p x W / p patches.
        pos_grid: patches a side that there are positions for.
        max_timestep, freq_dim: of the sinusoid of time; 1000 / max_timestep is its highest frequency.
        encoder_pos_type, decoder_pos_type: "sincos" (fixed), or "learnable_sum" (a row's vector plus a column's).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["EncoderBlock", "DecoderBlock"]

    @register_to_config
    def __init__(
        self,
        encoder_depth: int = 12,
        encoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_dim: int = 768,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_registers: int = 256,
        fsq_levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        latent_channels: int = 16,
        patch_size: int = 2,
        pos_grid: int = 16,
        max_timestep: float = 1000.0,
        freq_dim: int = 256,
        encoder_pos_type: str = "sincos",
        decoder_pos_type: str = "sincos",
    ) -> None:
        super().__init__()
        counts = {
            "encoder_depth": encoder_depth,
            "decoder_depth": decoder_depth,
            "num_registers": num_registers,
            "latent_channels": latent_channels,
            "patch_size": patch_size,
            "pos_grid": pos_grid,
            "freq_dim / 2": freq_dim / 2,
            "encoder_dim / head_dim": encoder_dim / head_dim,
            "decoder_dim / head_dim": decoder_dim / head_dim,
        }
        for name, value in counts.items():
            if isinstance(value, bool) or value != int(value) or value < 1:
                raise InvalidParameterError(f"{name}={value!r}: expected a whole number, 1 or more")
        for name, kind in (("encoder_pos_type", encoder_pos_type), ("decoder_pos_type", decoder_pos_type)):
            if kind not in POSITION_TYPES:
                raise InvalidParameterError(f"{name}={kind!r}: expected one of {', '.join(POSITION_TYPES)}")
        if not max_timestep > 0:
            raise InvalidParameterError(f"max_timestep={max_timestep!r}: expected a positive number")
        self.fsq = FSQ(tuple(fsq_levels))
        shared = (head_dim, mlp_ratio, num_registers, self.fsq.dim, latent_channels, patch_size, pos_grid)
        self.encoder = FlexTokEncoder(encoder_depth, encoder_dim, *shared, encoder_pos_type)
        self.decoder = FlexTokDecoder(decoder_depth, decoder_dim, *shared, decoder_pos_type, freq_dim, max_timestep)
        self._init_weights()

    def _init_weights(self) -> None:
        """As released: Xavier for linears, zero for biases, both heads and all that time modulates."""
        zero = {self.encoder.to_latents, self.decoder.head, self.decoder.head_modulation}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if module in zero or "adaLN_modulation" in name:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def latent_size(self) -> int:
        """Side of the latents that the position tables were made for."""
        return self.config.pos_grid * self.config.patch_size

    # -- encoder -----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode_latents(self, latents: Tensor, num_tokens: int | None = None) -> FlexTokEncoderOutput:
        """Tokens of latents (B, C, H, W), which are already scaled.

        Registers are causal, so the first `num_tokens` are computed with that many registers alone: the same but for
        rounding in `pre_quant`. Gradients pass through FSQ to the encoder.

        Raises:
            InvalidParameterError: a number of tokens outside 1 .. K, or latents that do not fit.
        """
        z = self.encoder(latents, self._count(num_tokens, "num_tokens"))
        codes = self.fsq.quantize(z)
        return FlexTokEncoderOutput(ids=self.fsq.codes_to_ids(codes), codes=codes, pre_quant=z)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Codes (B, n, L) float32 of ids (B, n)."""
        return self.fsq.ids_to_codes(ids)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids (B, n) int64 of codes (B, n, L)."""
        return self.fsq.codes_to_ids(codes)

    # -- decoder -----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def condition(
        self,
        tokens: Tensor | None = None,
        keep_k: int | Sequence[int] | Tensor | None = None,
        drop: bool | Sequence[bool] | Tensor | None = None,
        fast_dropped: bool = True,
    ) -> FlexTokCondition:
        """Registers for `velocity`; make it once for all steps.

        Dropped registers all are one learnt vector without position, so they stay equal in every layer. With
        `fast_dropped` one token stands for n of them, with ln(n) added to its attention scores: the same sums, fewer
        tokens. Exact but for rounding (the bias too is rounded to the dtype of attention).

        Args:
            tokens: ids (B, n) integers, or codes (B, n, L) floats, n <= K. None where everything is dropped.
            keep_k: registers that are kept, 1 .. n, one number or one a picture; None keeps the n given. The others, up
                to K, are replaced by the mask vector.
            drop: pictures without condition: all K registers are replaced by the null vector. None drops none.

        Raises:
            InvalidParameterError: numbers outside these ranges, ids outside the codebook, or wrong shapes.
        """
        decoder, total = self.decoder, self.config.num_registers
        codes = None if tokens is None else self._codes(tokens)
        batch = 1 if codes is None else len(codes)
        dropped = _per_picture(drop if drop is not None else False, batch, "drop", bool)
        if codes is None:
            if not all(dropped) or keep_k is not None:
                raise InvalidParameterError("tokens=None: expected ids or codes, unless drop=True and keep_k=None")
            codes = decoder.null_token.new_zeros(1, 0, self.fsq.dim)
        given = codes.shape[1]
        kept = _per_picture(keep_k if keep_k is not None else given, batch, "keep_k", int)
        if not all(dropped) or keep_k is not None:
            self._check_kept(kept, given)
        kept = [0 if out else k for k, out in zip(kept, dropped, strict=True)]
        length = min(max(kept) + 1, total) if fast_dropped else total
        device = decoder.null_token.device
        held, out = torch.tensor(kept, device=device)[:, None], torch.tensor(dropped, device=device)[:, None, None]
        places = torch.arange(length, device=device)
        filler = torch.where(out, decoder.null_token, decoder.mask_token)
        tokens = decoder.embed_codes(codes[:, :length].to(device))
        tokens = torch.cat([tokens, tokens.new_zeros(batch, length - tokens.shape[1], tokens.shape[2])], dim=1)
        tokens = torch.where((places < held)[..., None], tokens, filler.to(tokens.dtype))
        if not fast_dropped or all(k == length - 1 == total - 1 or k == length for k in kept):
            return FlexTokCondition(tokens, None)
        copies = torch.where(places < held, 1, torch.where(places == held, total - held, 0))
        return FlexTokCondition(tokens, copies.float().log())

    @apply_forward_hook
    def velocity(
        self, x_t: Tensor, t: Tensor, condition: FlexTokCondition, return_hidden: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (B, C, H, W) float32 of noised latents x_t (B, C, H, W) at times t (B,) in [0, 1].

        Args:
            condition: of `condition`; one of a single picture serves every batch.
            return_hidden: give (velocity, tokens (B, P + n, D) that leave this block, 0-based) instead, patches first.
                The releases were aligned with other features (REPA) after block 1.
        """
        depth = self.config.decoder_depth
        if return_hidden is not None and not 0 <= return_hidden < depth:
            raise InvalidParameterError(f"return_hidden={return_hidden!r}: expected a block, 0 to {depth - 1}")
        batch, tokens, bias = len(x_t), condition.tokens, condition.bias
        if t.shape != (batch,) or len(tokens) not in (1, batch):
            raise InvalidParameterError(
                f"x_t {tuple(x_t.shape)}, t {tuple(t.shape)} and a condition of {len(tokens)} given: "
                f"expected t ({batch},) and a condition of {batch}"
            )
        tokens = tokens.expand(batch, -1, -1)
        out, hidden = self.decoder(x_t, t, tokens, bias, return_hidden)
        return out if hidden is None else (out, hidden)

    def decode_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        keep_k: int | Sequence[int] | Tensor | None = None,
        drop: bool | Sequence[bool] | Tensor | None = None,
        return_hidden: int | None = None,
        fast_dropped: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`velocity` under `condition(tokens, keep_k, drop)`, in one call."""
        return self.velocity(x_t, t, self.condition(tokens, keep_k, drop, fast_dropped), return_hidden)

    def forward(
        self,
        latents: Tensor,
        x_t: Tensor,
        t: Tensor,
        keep_k: int | Sequence[int] | Tensor | None = None,
        drop: bool | Sequence[bool] | Tensor | None = None,
        return_hidden: int | None = None,
    ) -> FlexTokModelOutput:
        """Training pass: tokens of `latents` (B, C, H, W), and the velocity at (x_t, t) under them.

        Both transformers take only the registers that are kept (exact, see `condition`).
        """
        kept = self.config.num_registers if keep_k is None else keep_k
        encoded = self.encode_latents(latents, max(_per_picture(kept, len(latents), "keep_k", int)))
        found = self.decode_velocity(x_t, t, encoded.codes, keep_k, drop, return_hidden)
        velocity, hidden = found if isinstance(found, tuple) else (found, None)
        return FlexTokModelOutput(velocity=velocity, encoder=encoded, hidden=hidden)

    # -- input -------------------------------------------------------------------------------------------------------

    def _codes(self, tokens: Tensor) -> Tensor:
        codes = tokens if tokens.is_floating_point() else self.ids_to_codes(tokens)
        total, dim = self.config.num_registers, self.fsq.dim
        if codes.ndim != 3 or codes.shape[2] != dim or not 1 <= codes.shape[1] <= total:
            raise InvalidParameterError(
                f"tokens: shape {tuple(tokens.shape)} given, expected ids (B, n) or codes (B, n, {dim}) "
                f"with 1 <= n <= {total}"
            )
        return codes

    def _count(self, count: int | None, name: str) -> int:
        total = self.config.num_registers
        if count is None:
            return total
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= total:
            raise InvalidParameterError(f"{name}={count!r}: expected a whole number from 1 to {total}")
        return count

    def _check_kept(self, kept: Sequence[int], given: int) -> None:
        if not all(1 <= k <= given for k in kept):
            raise InvalidParameterError(
                f"keep_k={list(kept)}: expected numbers from 1 to {given}, the tokens given "
                "(no token at all is the null condition: drop=True)"
            )

    # -- released checkpoints ----------------------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls,
        source: str | Path,
        scaling_factor: float | None = None,
        vae_config: Mapping[str, Any] | None = None,
    ) -> tuple[FlexTokModel, AutoencoderKL | None]:
        """(model, VAE) of a released checkpoint, in eval mode; every tensor of it must find its place.

        The VAE is None where the checkpoint holds no tensor of one.

        Args:
            source: a folder with model.safetensors and config.json, a safetensors file with the configuration in its
                metadata, or a name on the Hub, for example "EPFL-VILAB/flextok_d18_d28_dfn".
            scaling_factor: of the latents, where the configuration states none.
            vae_config: arguments of `AutoencoderKL` that differ from the releases' (norm_num_groups=32, ...); sizes are
                read off the weights.

        Raises:
            InvalidParameterError: an unknown or missing module, entry or tensor, or no scaling factor.
        """
        config, path = official.read_config(source)
        known = official.parse_config(config)
        weights, vae_weights = official.convert_state_dict(official.read_weights(path))
        with torch.device("meta"):
            model, vae = cls(**known.model), None
            if vae_weights:
                vae = AutoencoderKL(**official.vae_config(vae_weights, known, scaling_factor, vae_config or {}))
        _load(model, weights, "")
        if vae is not None:
            _load(vae, vae_weights, "vae.")
        return model, vae


def _load(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    _check_tensors(module, state, prefix)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval()


def _check_tensors(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise, with released names, unless `state` has exactly the tensors of `module`."""
    own = module.state_dict()
    missing = [official.to_official_key(prefix + key) for key in own if key not in state]
    foreign = [official.to_official_key(prefix + key) for key in state if key not in own]
    if missing or foreign:
        raise InvalidParameterError(f"the checkpoint lacks {_some(missing)} and has the unknown {_some(foreign)}")
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise InvalidParameterError(
                f"{official.to_official_key(prefix + key)}: shape {tuple(state[key].shape)} in the checkpoint, "
                f"{tuple(tensor.shape)} by its configuration"
            )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} tensors" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")


def _per_picture(value: Any, batch: int, name: str, kind: type) -> list[Any]:
    """One value a picture, of `kind`, from one for all or one for each."""
    values = value.tolist() if isinstance(value, Tensor) else value
    values = list(values) if isinstance(values, Sequence) else [values] * batch
    if len(values) != batch or not all(type(one) is kind for one in values):
        raise InvalidParameterError(f"{name}={value!r}: expected one {kind.__name__}, or {batch}, one a picture")
    return values


def sample_keep_k(
    count: int, num_registers: int, law: str = "pow2", generator: torch.Generator | None = None
) -> Tensor:
    """Registers to keep (count,) int64 in 1 .. K, for training: nested dropout.

    Args:
        law: "uniform" over 1 .. K, "pow2" over 1, 2, 4, ..., K, or "uniform_pow2", a uniform number rounded up to a
            power of two (at most K).

    Raises:
        InvalidParameterError: an unknown law, or "pow2" where K is no power of two.
    """
    if law not in NESTED_DROPOUT_LAWS:
        raise InvalidParameterError(f"law={law!r}: expected one of {', '.join(NESTED_DROPOUT_LAWS)}")
    if law == "pow2":
        if num_registers & (num_registers - 1) or num_registers < 1:
            raise InvalidParameterError(f'law="pow2": {num_registers} registers given, expected a power of two')
        return 2 ** torch.randint(num_registers.bit_length(), (count,), generator=generator)
    kept = torch.randint(1, num_registers + 1, (count,), generator=generator)
    if law == "uniform_pow2":
        kept = torch.tensor([1 << (k - 1).bit_length() for k in kept.tolist()]).clamp_max(num_registers)
    return kept


class FlexTok(DiffusionPipeline, ImageTokenizer):
    """Pictures to ordered token ids and back. `save_pretrained` and `from_pretrained` are those of diffusers.

    Load it by this class: the generic `DiffusionPipeline.from_pretrained` knows no pipeline of other packages. For half
    precision keep the VAE in float32: `from_pretrained(path, torch_dtype={"model": torch.bfloat16, "default":
    torch.float32})`.

    Args:
        model: the tokenizer. scheduler: of the decoder's flow.
        vae: `AutoencoderKL` with a scaling factor, or None: the model then works on pixels.

    Raises:
        InvalidParameterError: a VAE without scaling factor, or with other channels than the model's.
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self, model: FlexTokModel, vae: AutoencoderKL | None, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        channels = 3
        if vae is not None:
            channels, factor = vae.config.latent_channels, vae.config.scaling_factor
            if not factor or not factor > 0:
                raise InvalidParameterError(
                    f"the VAE's scaling_factor is {factor!r}: expected a positive number; set it with "
                    "vae.register_to_config(scaling_factor=...)"
                )
        if channels != model.config.latent_channels:
            of = "pixels have" if vae is None else "the VAE has"
            raise InvalidParameterError(f"{of} {channels} channels, the model works on {model.config.latent_channels}")
        self.register_modules(model=model, vae=vae, scheduler=scheduler)

    @classmethod
    def from_official(
        cls,
        source: str | Path,
        scaling_factor: float | None = None,
        vae_config: Mapping[str, Any] | None = None,
    ) -> FlexTok:
        """Tokenizer of a released checkpoint: see `FlexTokModel.from_official`."""
        model, vae = FlexTokModel.from_official(source, scaling_factor, vae_config)
        if vae is None:
            raise InvalidParameterError(
                f"{source} holds no VAE: load the model by FlexTokModel.from_official, and give FlexTok a VAE"
            )
        return cls(model, vae, FlowMatchEulerDiscreteScheduler())

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return self.model.config.num_registers

    @property
    def codebook_size(self) -> int:
        return self.model.fsq.codebook_size

    @property
    def prefixes(self) -> bool:
        return True

    @property
    def image_size(self) -> int:
        return self.model.latent_size * self._factor

    @property
    def _factor(self) -> int:
        """Pixels a latent, a side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    # -- pictures to tokens ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(  # type: ignore[override]
        self,
        images: ImageInput,
        num_tokens: int | None = None,
        sample_posterior: bool = False,
        generator: Generators = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Ids (B, n) int64 of pictures, coarse to fine, on the model's device.

        Args:
            images: what `tokred.generation.images.to_pixels` takes; PIL images and arrays are scaled and cut to
                `image_size`. Sides of tensors are multiples of 16 (the VAE's factor times the patch) and at most
                `image_size`; other sizes than that were not trained, which is logged.
            num_tokens: n, 1 to `num_tokens`; None is all. Fewer are the first of all, and cheaper.
            sample_posterior: sample the VAE's posterior (the release's default) instead of taking its mode, which
                gives the same ids each time.
            generator: for `sample_posterior`; one, or one for each picture.
            dtype: another than float32 runs the encoder's matrix products in it (autocast); float32 is float32 under
                an outer autocast too. Ids near a boundary of rounding can differ, so keep float32 for files that last.

        Raises:
            InvalidParameterError: other numbers, sizes, values.
        """
        self.model._count(num_tokens, "num_tokens")
        latents = self.encode_latents(to_pixels(images, self.image_size), sample_posterior, generator)
        with _autocast(latents.device, dtype):
            ids = self.model.encode_latents(latents, num_tokens).ids
        self.maybe_free_model_hooks()
        return ids

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor, sample_posterior: bool = False, generator: Generators = None) -> Tensor:
        """Scaled latents (B, C, h, w) float32 of pictures (B, 3, H, W) in [-1, 1], outside autocast."""
        self._check_size(*pixels.shape[-2:])
        pixels = pixels.to(self._execution_device)
        if self.vae is None:
            return pixels
        with _autocast(pixels.device, torch.float32):
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
            latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return latents.float() * self.vae.config.scaling_factor

    # -- tokens to pictures ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(  # type: ignore[override]
        self,
        tokens: Tensor | Sequence[Tensor | Sequence[int]],
        num_tokens: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | Callable[[float], float] = 7.5,
        guidance: str | APG = "apg",
        generator: Generators = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        fast_dropped: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] of ids.

        The decoder is generative: other noise gives another picture of the same tokens. Fix it by `generator` (one for
        all pictures in turn, or one for each) or by `latents`.

        Args:
            tokens: ids (B, n), 1 <= n <= `num_tokens`, or a list of prefixes of any lengths.
            num_tokens: use this many first ids of each picture (all where it has fewer).
            num_inference_steps: Euler steps.
            guidance_scale: g or a function of t in [0, 1]; 1.0 is no guidance, at half the cost.
            guidance: "apg", "cfg", or `tokred.generation.flow.APG(...)`.
            latents: the noise itself (B, C, h, w) instead of `generator`.
            height, width: of the pictures in pixels; None is `image_size`, or what `latents` gives.
            fast_dropped: let one token stand for all dropped ones (exact, see `FlexTokModel.condition`).
            dtype: as in `encode`, of the decoder; noise, guidance, steps and the VAE are not touched by it.

        Raises:
            InvalidParameterError: ids outside the codebook, and numbers, sizes or shapes that do not fit.
        """
        ids, kept = self._prefixes(tokens, num_tokens)
        found = self._sample(
            ids,
            kept,
            self._noise(len(ids), generator, latents, height, width),
            num_inference_steps,
            guidance_scale,
            guidance,
            fast_dropped,
            dtype,
        )
        pictures = self.decode_latents(found).clamp(-1, 1)
        self.maybe_free_model_hooks()
        return pictures

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 of scaled latents (B, C, h, w), outside autocast; not cut to [-1, 1]."""
        if self.vae is None:
            return latents.float()
        with _autocast(latents.device, torch.float32):
            scaled = latents / self.vae.config.scaling_factor
            return self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def sample_latents(
        self,
        tokens: Tensor | Sequence[Tensor | Sequence[int]],
        noise: Tensor,
        num_tokens: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | Callable[[float], float] = 7.5,
        guidance: str | APG = "apg",
        fast_dropped: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Scaled latents (B, C, h, w) float32 of ids, from `noise` of that shape: `decode` before the VAE."""
        ids, kept = self._prefixes(tokens, num_tokens)
        return self._sample(ids, kept, noise, num_inference_steps, guidance_scale, guidance, fast_dropped, dtype)

    def _sample(
        self,
        ids: Tensor,
        kept: list[int],
        noise: Tensor,
        steps: int,
        scale: float | Callable[[float], float],
        guidance: str | APG,
        fast_dropped: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        device = self._execution_device
        with _autocast(device, dtype):
            condition = self.model.condition(ids.to(device), kept, fast_dropped=fast_dropped)
            null = self.model.condition(drop=True, fast_dropped=fast_dropped)
            return sample(
                lambda x, t: self.model.velocity(x, t, condition),
                noise.to(device),
                scheduler=self.scheduler,
                steps=steps,
                null_velocity=lambda x, t: self.model.velocity(x, t, null),
                guidance_scale=scale,
                guidance=guidance,
                progress=self.progress_bar,
            )

    @torch.no_grad()
    def progressive(
        self, tokens: Tensor, lengths: Sequence[int] | None = None, generator: Generators = None, **options: Any
    ) -> Tensor:
        """Pictures (len(lengths), B, 3, H, W) of growing prefixes of ids (B, n), with one noise for all lengths.

        Args:
            lengths: 1, 2, 4, 8, ... and n where None. options: of `decode`, other than `num_tokens`.
        """
        ids, kept = self._prefixes(tokens, None)
        longest = min(kept)
        if lengths is None:
            lengths = [*(2**i for i in range((longest - 1).bit_length())), longest]
        if not lengths or not all(1 <= length <= longest for length in lengths):
            raise InvalidParameterError(f"lengths={list(lengths)!r}: expected numbers from 1 to {longest}")
        shape = {name: options.pop(name, None) for name in ("latents", "height", "width")}
        noise = self._noise(len(ids), generator, **shape)
        return torch.stack([self.decode(ids, length, latents=noise, **options) for length in lengths])

    @torch.no_grad()
    def __call__(
        self,
        images: ImageInput,
        num_tokens: int | None = None,
        output_type: Literal["pil", "pt"] = "pil",
        sample_posterior: bool = False,
        generator: Generators = None,
        **options: Any,
    ) -> ImagePipelineOutput:
        """Pictures as their first `num_tokens` tokens give them back: `.images`.

        Args:
            output_type: "pil", or "pt" for (B, 3, H, W) in [-1, 1]. generator: for the posterior and the noise.
            options: of `decode`.
        """
        if output_type not in ("pil", "pt"):
            raise InvalidParameterError(f'output_type={output_type!r}: expected "pil" or "pt"')
        pixels = to_pixels(images, self.image_size)
        if options.get("latents") is None:
            options = {"height": pixels.shape[-2], "width": pixels.shape[-1], **options}
        ids = self.encode(pixels, num_tokens, sample_posterior, generator)
        pictures = self.decode(ids, generator=generator, **options)
        return ImagePipelineOutput(images=pictures if output_type == "pt" else to_pil(pictures))

    # -- input -------------------------------------------------------------------------------------------------------

    def _prefixes(
        self, tokens: Tensor | Sequence[Tensor | Sequence[int]], num_tokens: int | None
    ) -> tuple[Tensor, list[int]]:
        """Ids (B, n), short rows filled with 0, and how many of each row count."""
        self.model._count(num_tokens, "num_tokens")
        if isinstance(tokens, Tensor):
            if tokens.ndim != 2:
                raise InvalidParameterError(f"tokens: shape {tuple(tokens.shape)} given, expected ids (B, n)")
            rows = list(tokens)
        else:
            rows = [row if isinstance(row, Tensor) else torch.tensor(row) for row in tokens]
        if not rows or any(row.ndim != 1 or not len(row) for row in rows):
            raise InvalidParameterError("tokens: expected ids (B, n), or a list of prefixes, each of 1 id or more")
        longest = max(map(len, rows))
        if longest > self.num_tokens:
            raise InvalidParameterError(f"tokens: {longest} ids of a picture given, expected 1 to {self.num_tokens}")
        self.model.fsq.check_ids(torch.cat(rows))
        kept = [len(row) if num_tokens is None else min(len(row), num_tokens) for row in rows]
        ids = nn.utils.rnn.pad_sequence([row[:k].long() for row, k in zip(rows, kept, strict=True)], batch_first=True)
        return ids, kept

    def _noise(
        self, count: int, generator: Generators, latents: Tensor | None, height: int | None, width: int | None
    ) -> Tensor:
        channels, factor = self.model.config.latent_channels, self._factor
        if latents is not None:
            if latents.ndim != 4 or latents.shape[:2] != (count, channels):
                raise InvalidParameterError(
                    f"latents: shape {tuple(latents.shape)} given, expected ({count}, {channels}, h, w)"
                )
            if generator is not None:
                raise InvalidParameterError("give latents or generator, not both")
            size = (latents.shape[2] * factor, latents.shape[3] * factor)
            if (height or size[0], width or size[1]) != size:
                raise InvalidParameterError(f"latents are of {size[0]} x {size[1]} pixels, not {height} x {width}")
            self._check_size(*size)
            return latents
        height, width = height or self.image_size, width or self.image_size
        self._check_size(height, width)
        return draw_noise((count, channels, height // factor, width // factor), generator, self._execution_device)

    def _check_size(self, height: int, width: int) -> None:
        step, most = self._factor * self.model.config.patch_size, self.image_size
        if height % step or width % step or not (0 < height <= most and 0 < width <= most):
            raise InvalidParameterError(
                f"pictures of {height} x {width} pixels: expected multiples of {step}, at most {most} x {most}; "
                "PIL images are scaled by themselves"
            )
        if (height, width) != (most, most):
            logger.warning("pictures of %d x %d pixels: the model was made for %d x %d", height, width, most, most)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; float32 switches an outer autocast off."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
