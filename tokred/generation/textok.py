"""TexTok as a pipeline: pictures and captions to tokens, tokens and captions to pictures, and new pictures.

Language-Guided Image Tokenization for Generation (arXiv 2412.05796). `TexTok` joins the tokenizer (`TexTokModel`), the
frozen text encoder and, to generate, a `TexTokDiT1D` with a diffusers scheduler.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation.flow import Generators, draw_noise
from tokred.generation.images import ImageInput, to_pil, to_pixels
from tokred.generation.textok_dit import TexTokDiT1D, make_scheduler
from tokred.generation.textok_model import TexTokModel
from tokred.generation.tokenizer import ImageTokenizer

__all__ = ["TexTok", "TexTokModel", "load_caption_bank"]

OUTPUT_TYPES = ("pil", "pt", "latent")
CAPTION_POLICIES = ("random", "fixed")

#: one caption, or one a picture, None where a picture has none
Captions = str | Sequence[str | None]
#: a pair of features (B, T, D_t) and mask (B, T), or two times None
Text = tuple[Tensor | None, Tensor | None]


class TexTok(DiffusionPipeline, ImageTokenizer):
    """Pictures to N continuous tokens and back, with the caption known to both sides.

    The caption is part of what is stored: decoding with another one gives another picture.

    Args:
        model: the tokenizer.
        text_encoder, text_tokenizer: of transformers, say `T5EncoderModel` and `AutoTokenizer` of
            "google/t5-v1_1-xl"; any encoder with a `last_hidden_state` of the model's `text_dim` serves. Without them
            features are given as `text_embeds`. T5 must not run in float16.
        generator: makes latents for `__call__`.
        scheduler: of diffusers, for the generator; None takes `make_scheduler`'s.
        class_names: name of each class, the captions of last resort of a class-conditional generator.
        caption_bank: class id -> captions written beforehand, from which `__call__` draws (see `load_caption_bank`).

    Raises:
        InvalidParameterError: components that do not fit together.
    """

    model_cpu_offload_seq = "text_encoder->generator->model"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "text_tokenizer", "generator", "scheduler"]

    def __init__(
        self,
        model: TexTokModel,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        generator: TexTokDiT1D | None = None,
        scheduler: Any = None,
        class_names: list[str] | None = None,
        caption_bank: dict[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_components(model, text_encoder, text_tokenizer, generator)
        classes = generator.config.num_classes if generator is not None else None
        if class_names is not None and classes is not None and len(class_names) != classes:
            raise InvalidParameterError(f"{len(class_names)} class_names given, the generator has {classes} classes")
        bank = None if caption_bank is None else _checked_bank(caption_bank, classes)
        if generator is not None and scheduler is None:
            scheduler = make_scheduler(generator.config.objective, generator.config.learn_sigma)
        self.register_modules(
            model=model,
            text_encoder=text_encoder,
            text_tokenizer=text_tokenizer,
            generator=generator,
            scheduler=scheduler,
        )
        self.register_to_config(class_names=class_names, caption_bank=bank)

    @property
    def num_tokens(self) -> int:
        return self.model.config.num_tokens

    @property
    def codebook_size(self) -> None:
        return None

    @property
    def image_size(self) -> int:
        return self.model.config.image_size

    @property
    def prefixes(self) -> bool:
        return False

    @property
    def _reads_text(self) -> bool:
        return bool(self.model.config.text_in_encoder or self.model.config.text_in_decoder)

    # -- text ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(
        self, captions: Captions, max_length: int | None = None, truncate: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Features of captions from the frozen text encoder, padded to the longest: (B, T, D_t) and mask (B, T) int64.

        Args:
            captions: "" is a caption (its end token); None has a mask of zeros, as if there were no text.
            max_length: tokens of the longest caption, at most and by default the model's `max_text_len`.
            truncate: longer captions are cut, with a warning; False raises instead.

        Raises:
            InvalidParameterError: no text encoder, no caption, a caption that is too long, or features that are not
                finite (T5 in float16).
        """
        if self.text_encoder is None or self.text_tokenizer is None:
            raise InvalidParameterError(
                "captions given, but this TexTok has no text_encoder and text_tokenizer: load them, or give text_embeds"
            )
        limit = self.model.config.max_text_len
        length = limit if max_length is None else max_length
        if not 1 <= length <= limit:
            raise InvalidParameterError(f"max_length={max_length!r}: expected 1 to max_text_len={limit}")
        rows = [captions] if isinstance(captions, str) else list(captions)
        if not rows or not all(row is None or isinstance(row, str) for row in rows):
            raise InvalidParameterError(f"captions={captions!r}: expected one or more strings (None: no caption)")
        texts = [row or "" for row in rows]
        self._check_lengths(texts, length, truncate)
        tokens = self.text_tokenizer(
            texts, padding="longest", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._execution_device)
        mask = tokens["attention_mask"].long()
        embeds = self.text_encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        if not bool(embeds[mask.bool()].isfinite().all()):
            raise InvalidParameterError(
                f"the text encoder ({embeds.dtype}) gave features that are not finite; run it in bfloat16 or float32"
            )
        given = torch.tensor([row is not None for row in rows], device=mask.device)
        return embeds, mask * given[:, None]

    def _check_lengths(self, texts: list[str], length: int, truncate: bool) -> None:
        counts = [len(ids) for ids in self.text_tokenizer(texts, verbose=False)["input_ids"]]
        long = [i for i, count in enumerate(counts) if count > length]
        if not long:
            return
        said = f"captions {long} have {[counts[i] for i in long]} tokens, the limit is {length}"
        if not truncate:
            raise InvalidParameterError(f"{said}: shorten them, or cut them with truncate=True")
        warnings.warn(f"{said}: what is longer is cut", UserWarning, stacklevel=2)

    def _text(
        self, batch: int, captions: Captions | None, embeds: Tensor | None, mask: Tensor | None, truncate: bool
    ) -> Text:
        """Text of a batch from what the caller gave; the model checks shapes of features."""
        if captions is None:
            return self._placed(embeds), self._placed(mask)
        if embeds is not None or mask is not None:
            raise InvalidParameterError("captions and text_embeds given: expected one of them")
        count = 1 if isinstance(captions, str) else len(captions)
        if count != batch:
            raise InvalidParameterError(f"{count} captions given for a batch of {batch}: expected one each")
        return self.encode_text(captions, truncate=truncate)

    def _placed(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(self._execution_device)

    # -- pictures and tokens -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        images: ImageInput,
        captions: Captions | None = None,
        *,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        truncate: bool = True,
        sample_posterior: bool = False,
        generator: Generators = None,
        **options: Any,
    ) -> Tensor:
        """Latents (B, N, d) float32 of pictures, as `decode` takes them (not normalised).

        Args:
            images: see `to_pixels`; PIL images are scaled and cut to `image_size`, tensors must have it.
            captions: one a picture; None encodes without text.
            text_embeds, text_mask: features instead of captions, see `TexTokModel.encode`.
            truncate: see `encode_text`.
            sample_posterior: "kl" models: a sample, drawn with `generator`, instead of the mean.

        Raises:
            InvalidParameterError: pictures, captions or features that do not fit; an option that there is not.
        """
        _no_options(options)
        pixels = to_pixels(images, self.image_size).to(self._execution_device)
        out = self.model.encode(pixels, *self._text(len(pixels), captions, text_embeds, text_mask, truncate))
        if out.latent_dist is None:
            return out.latents.float()
        return (out.latent_dist.sample(generator) if sample_posterior else out.latent_dist.mode()).float()

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        captions: Captions | None = None,
        *,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        truncate: bool = True,
        **options: Any,
    ) -> Tensor:
        """Pictures (B, 3, S, S) float32 in [-1, 1] of latents (B, N, d); text as in `encode`, and the same.

        Raises:
            InvalidParameterError: latents of another shape or not finite; text that does not fit; an unknown option.
        """
        _no_options(options)
        if not tokens.is_floating_point() or not bool(tokens.isfinite().all()):
            raise InvalidParameterError(f"latents: {tokens.dtype} given, expected finite floats")
        text = self._text(len(tokens), captions, text_embeds, text_mask, truncate)
        return self.model.decode(tokens.to(self._execution_device), *text).sample.float().clamp(-1, 1)

    def reconstruct(
        self,
        images: ImageInput,
        captions: Captions | None = None,
        *,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        truncate: bool = True,
    ) -> Tensor:
        """`decode` of `encode`, both with the same text: (B, 3, S, S) float32 in [-1, 1]."""
        if captions is not None and text_embeds is None and text_mask is None:
            text_embeds, text_mask = self.encode_text(captions, truncate=truncate)
            captions = None
        text: dict[str, Any] = {"captions": captions, "text_embeds": text_embeds, "text_mask": text_mask}
        return self.decode(self.encode(images, **text), **text)

    # -- new pictures --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        captions: Captions | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        caption_policy: str = "random",
        truncate: bool = True,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate pictures; the paper's sampler, steps and guidance are not known, so nothing here claims to be them.

        Args:
            prompt: texts for a text-conditional generator, and for the detokenizer unless `captions` are given.
            class_labels: ids for a class-conditional generator.
            captions: what the detokenizer reads. None takes the prompt; with classes, a caption drawn from the
                pipeline's `caption_bank`; without a bank, the class name, with a warning.
            negative_prompt: for the unconditional branch of the generator only; None is no text.
            text_embeds, text_mask: features instead of prompt and captions.
            num_inference_steps: of the scheduler.
            guidance_scale: s in u + s (c - u), one call of twice the batch a step; 1 is the conditional prediction.
            generator: random generator, or one a picture; latents, scheduler noise and captions are drawn with it.
            latents: (B, N, d) noise to start from.
            caption_policy: which caption of the bank: "random", or "fixed", the first.
            truncate: see `encode_text`.
            output_type: "pil", "pt" for (B, 3, S, S) in [-1, 1], or "latent" for what `decode` takes.

        Raises:
            InvalidParameterError: conditions that the generator does not take or lacks, ids outside its classes, a
                scheduler that does not fit its objective, a class without captions, or another value outside its range.
        """
        dit: TexTokDiT1D | None = self.generator
        if dit is None:
            raise InvalidParameterError("this TexTok has no generator: load a TexTokDiT1D as its component `generator`")
        if output_type not in OUTPUT_TYPES:
            raise InvalidParameterError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise InvalidParameterError(f"num_inference_steps={num_inference_steps!r}: expected a positive integer")
        if not math.isfinite(guidance_scale):
            raise InvalidParameterError(f"guidance_scale={guidance_scale!r}: expected a finite number")
        if caption_policy not in CAPTION_POLICIES:
            known = ", ".join(CAPTION_POLICIES)
            raise InvalidParameterError(f"caption_policy={caption_policy!r}: expected one of {known}")
        if negative_prompt is not None and dit.config.text_dim is None:
            raise InvalidParameterError("negative_prompt given, but this generator takes no text")
        _check_scheduler(self.scheduler, dit)
        labels, batch = self._conditions(dit, prompt, class_labels, text_embeds)
        start = self._start(latents, batch, generator)
        own = prompt if captions is None else captions
        if own is None and text_embeds is None and labels is not None and self._reads_text:
            own = self._class_captions(labels, caption_policy, generator)
        text = self._text(batch, own, text_embeds, text_mask, truncate)
        condition: dict[str, Tensor | None] = {}
        nothing: dict[str, Tensor | None] = {}
        if labels is not None:
            condition["class_labels"] = labels
            nothing["class_labels"] = torch.full_like(labels, dit.config.num_classes)
        if dit.config.text_dim is not None:
            read = text if prompt is None or captions is None else self._text(batch, prompt, None, None, truncate)
            _add_text(condition, nothing, read, self._negative(batch, negative_prompt, truncate))
        z = self._denoise(start, condition, nothing, num_inference_steps, guidance_scale, generator)
        z = self.model.denormalize(z)
        if output_type == "latent":
            return ImagePipelineOutput(images=z)
        embeds, mask = text if self._reads_text else (None, None)
        pictures = self.decode(z, text_embeds=embeds, text_mask=mask)
        return ImagePipelineOutput(images=to_pil(pictures) if output_type == "pil" else pictures)

    def _conditions(
        self, dit: TexTokDiT1D, prompt: Any, class_labels: Any, embeds: Tensor | None
    ) -> tuple[Tensor | None, int]:
        """Class ids (B,) or None, and B; whether the conditions are those that the generator takes."""
        classes = dit.config.num_classes
        if prompt is not None and embeds is not None:
            raise InvalidParameterError("prompt and text_embeds given: expected one of them")
        if prompt is not None and dit.config.text_dim is None:
            raise InvalidParameterError(
                "prompt given, but this generator takes classes alone: give class_labels, and what the detokenizer "
                "reads as captions"
            )
        if (class_labels is None) != (classes is None):
            wanted = "no class_labels (it has no classes)" if classes is None else f"class_labels below {classes}"
            raise InvalidParameterError(f"class_labels={class_labels!r}: this generator takes {wanted}")
        if class_labels is not None:
            labels = torch.as_tensor(class_labels)
            labels = labels[None] if labels.ndim == 0 else labels
            whole = labels.dtype in (torch.int32, torch.int64) and labels.ndim == 1 and labels.numel() > 0
            if not whole or not bool(((labels >= 0) & (labels < classes)).all()):
                raise InvalidParameterError(f"class_labels={class_labels!r}: expected integers from 0 to {classes - 1}")
            return labels.long().to(self._execution_device), len(labels)
        if prompt is None and embeds is None:
            raise InvalidParameterError("this generator is conditioned on text: give a prompt, or text_embeds")
        return None, len(embeds) if embeds is not None else 1 if isinstance(prompt, str) else len(prompt)

    def _start(self, latents: Tensor | None, batch: int, generator: Generators) -> Tensor:
        shape = (batch, self.model.config.num_tokens, self.model.config.latent_dim)
        if latents is None:
            return draw_noise(shape, generator, self._execution_device)
        if tuple(latents.shape) != shape or not latents.is_floating_point():
            raise InvalidParameterError(
                f"latents: {tuple(latents.shape)} {latents.dtype} given, expected {shape} floats of unit variance"
            )
        return latents.to(self._execution_device, torch.float32)

    def _class_captions(self, labels: Tensor, policy: str, generator: Generators) -> list[str]:
        """Captions of the bank, else class names."""
        ids: list[int] = labels.tolist()
        bank, names = self.config.caption_bank, self.config.class_names
        if bank is not None:
            known = {int(key): texts for key, texts in bank.items()}
            missing = sorted(set(ids) - set(known))
            if missing:
                raise InvalidParameterError(f"the caption bank has no captions of classes {missing}: give captions")
            single = generator is None or isinstance(generator, torch.Generator)
            draws: Any = [generator] * len(ids) if single else generator
            return [_draw(known[i], policy, g) for i, g in zip(ids, draws, strict=True)]
        if names is None:
            raise InvalidParameterError(
                "the detokenizer reads a caption, and there are neither captions nor a caption_bank nor class_names: "
                "give one of them"
            )
        warnings.warn(
            "no caption bank: the detokenizer reads the class names, not captions as in its training",
            UserWarning,
            stacklevel=3,
        )
        return [names[i] for i in ids]

    def _negative(self, batch: int, prompt: str | Sequence[str] | None, truncate: bool) -> Text:
        if isinstance(prompt, str):
            prompt = [prompt] * batch
        return self._text(batch, prompt, None, None, truncate)

    def _denoise(
        self,
        latents: Tensor,
        condition: dict[str, Tensor | None],
        nothing: dict[str, Tensor | None],
        steps: int,
        scale: float,
        generator: Generators,
    ) -> Tensor:
        """The scheduler's loop, in float32: (B, N, d) noise to normalised latents."""
        dit, scheduler, d = self.generator, self.scheduler, latents.shape[-1]
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = torch.linspace(1.0, 1.0 / steps, steps).tolist()
            scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        else:
            scheduler.set_timesteps(steps, device=latents.device)
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        with_variance = dit.config.learn_sigma and isinstance(scheduler, DDPMScheduler)
        both = {name: _joined(condition[name], nothing[name]) for name in condition}
        x = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in self.progress_bar(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            if scale == 1:
                prediction = dit(seen, t, **condition).sample.float()
            else:
                prediction = _guided(dit(torch.cat([seen, seen]), t, **both).sample.float(), scale, d)
            if not with_variance:
                prediction = prediction[..., :d]
            # schedulers have their channels at dimension 1, and split learned variances there
            stepped = scheduler.step(prediction.transpose(1, 2), t, x.transpose(1, 2), **extra)
            x = stepped.prev_sample.transpose(1, 2)
        return x


def load_caption_bank(path: str | Path) -> dict[int, list[str]]:
    """Captions by class of a JSON file {"0": ["a caption", ...], ...}: the pipeline's `caption_bank`.

    Raises:
        InvalidParameterError: the file holds anything else.
    """
    try:
        bank = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidParameterError(f"{path}: a caption bank is a JSON file; {error}") from error
    return _checked_bank(bank, None)


def _checked_bank(bank: Any, classes: int | None) -> dict[int, list[str]]:
    wanted = 'expected class id -> list of captions, as {"0": ["a caption"]}'
    if not isinstance(bank, Mapping) or not bank:
        raise InvalidParameterError(f"caption_bank: {type(bank).__name__} given, {wanted} with at least one class")
    found: dict[int, list[str]] = {}
    for key, captions in bank.items():
        if not str(key).isdecimal() or (classes is not None and int(key) >= classes):
            limit = "" if classes is None else f" (ids below {classes})"
            raise InvalidParameterError(f"caption_bank: class {key!r}, {wanted}{limit}")
        texts = isinstance(captions, (list, tuple)) and captions and all(isinstance(text, str) for text in captions)
        if not texts:
            raise InvalidParameterError(f"caption_bank: {captions!r} for class {key}, {wanted}")
        found[int(key)] = list(captions)
    return found


def _draw(captions: Sequence[str], policy: str, generator: torch.Generator | None) -> str:
    if policy == "fixed":
        return captions[0]
    device = "cpu" if generator is None else generator.device
    return captions[int(torch.randint(len(captions), (1,), generator=generator, device=device))]


def _guided(both: Tensor, scale: float, d: int) -> Tensor:
    """u + s (c - u) of predictions [c ; u] (2B, N, d or 2d); variances are the conditional ones."""
    conditional, free = both.chunk(2)
    mean = free[..., :d] + scale * (conditional[..., :d] - free[..., :d])
    return torch.cat([mean, conditional[..., d:]], dim=-1)


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _add_text(
    condition: dict[str, Tensor | None], nothing: dict[str, Tensor | None], text: Text, negative: Text
) -> None:
    """Text of both branches, at one length; a branch without text has a mask of zeros."""
    embeds, mask = text
    if embeds is None:
        raise InvalidParameterError("this generator is conditioned on text: give a prompt, or text_embeds")
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    other, other_mask = negative
    if other is None or other_mask is None:
        other, other_mask = torch.zeros_like(embeds), torch.zeros_like(mask)
    length = max(embeds.shape[1], other.shape[1])
    for side, features, valid in ((condition, embeds, mask), (nothing, other, other_mask)):
        more = length - features.shape[1]
        side["text_embeds"] = torch.nn.functional.pad(features, (0, 0, 0, more))
        side["text_mask"] = torch.nn.functional.pad(valid, (0, more))


def _no_options(options: Mapping[str, Any]) -> None:
    if options:
        raise InvalidParameterError(f"TexTok knows no options {sorted(options)}")


def _check_scheduler(scheduler: Any, dit: TexTokDiT1D) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type")
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or prediction == "flow_prediction"
    wanted = "flow_prediction" if dit.config.objective == "flow" else "epsilon"
    if flow != (dit.config.objective == "flow") or (not flow and prediction != "epsilon"):
        raise InvalidParameterError(
            f"{name} (prediction_type {prediction!r}) given, but this generator was trained for "
            f"objective={dit.config.objective!r}: expected one of prediction_type {wanted!r}"
        )
    if config.get("clip_sample") and config.get("clip_sample_range", 1.0) <= 1.0:
        raise InvalidParameterError(
            f"{name} clips samples to [-1, 1], and latents go beyond: make it with clip_sample=False"
        )
    learned = config.get("variance_type") in ("learned", "learned_range")
    if learned and not (dit.config.learn_sigma and isinstance(scheduler, DDPMScheduler)):
        raise InvalidParameterError(
            f"{name} expects learned variances (variance_type={config.variance_type!r}), which DDPMScheduler alone "
            "reads here, of a generator with learn_sigma=True: make it with another variance_type"
        )


def _check_components(model: Any, encoder: Any, tokenizer: Any, dit: TexTokDiT1D | None) -> None:
    if (encoder is None) != (tokenizer is None):
        raise InvalidParameterError("text_encoder and text_tokenizer go together: give both, or neither")
    width = model.config.text_dim
    if encoder is not None:
        encoder_width = getattr(encoder.config, "d_model", None) or getattr(encoder.config, "hidden_size", None)
        if encoder_width is not None and encoder_width != width:
            raise InvalidParameterError(
                f"text_encoder has features of width {encoder_width}, expected text_dim={width} as in the model"
            )
    if dit is None:
        return
    for name in ("num_tokens", "latent_dim"):
        if dit.config[name] != model.config[name]:
            raise InvalidParameterError(
                f"generator: {name}={dit.config[name]} given, expected {model.config[name]} as in the model"
            )
    if dit.config.text_dim not in (None, width):
        raise InvalidParameterError(
            f"generator: text_dim={dit.config.text_dim} given, expected {width} as in the model (one text encoder)"
        )
