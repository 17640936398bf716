"""Pictures as they are uploaded, and what a trace says of them as pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.core.trace import LayerStep, PromptStep, Trace

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST_PIXELS", "SHOWN", "Stage", "enlarged", "normalisation", "open_upload", "seen", "stages", "webp"]

MOST_PIXELS = 50_000_000
SHOWN = 384  # pixels of the longer side of a picture on the page, at least


class Stage(NamedTuple):
    """One picture of what is left, and what it shows."""

    picture: Image
    caption: str


def open_upload(path: str | Path | None) -> Image:
    """An uploaded picture as RGB, turned as its camera says.

    Raises:
        InvalidParameterError: nothing was given, it is no picture, or it is larger than `MOST_PIXELS`.
    """
    from PIL import Image, ImageOps

    if path is None:
        raise InvalidParameterError("there is no picture yet: upload one, or click on an example")
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise InvalidParameterError(
                    f"the picture has {file.width} x {file.height} pixels; scale it below "
                    f"{MOST_PIXELS // 1_000_000} million and upload it again"
                )
            return ImageOps.exif_transpose(file).convert("RGB")
    except InvalidParameterError:
        raise
    except Exception as error:
        raise InvalidParameterError(
            f"{Path(path).name} cannot be read as a picture: expected PNG, JPEG, WebP, GIF or BMP"
        ) from error


def enlarged(picture: Image) -> Image:
    """At least `SHOWN` pixels along the longer side; small pictures keep their pixels as squares."""
    from PIL import Image

    factor = SHOWN / max(picture.size)
    if factor <= 1:
        return picture
    size = round(picture.width * factor), round(picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST if factor >= 3 else Image.Resampling.LANCZOS)


def normalisation(transform: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of a torchvision transform or a processor of transformers; 0 and 1 if none."""
    for part in getattr(transform, "transforms", ()):
        if type(part).__name__ == "Normalize":
            return torch.as_tensor(part.mean).flatten(), torch.as_tensor(part.std).flatten()
    processor = getattr(transform, "processor", None)
    mean = getattr(processor, "image_mean", None) or [0.0] * 3
    std = getattr(processor, "image_std", None) or [1.0] * 3
    return torch.tensor(mean), torch.tensor(std)


def seen(transform: Callable[[Image], Tensor], pixels: Tensor) -> Image:
    """The picture of prepared pixels (3, H, W): what the model saw."""
    from PIL import Image

    mean, std = normalisation(transform)
    plain = (pixels.float().cpu() * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    return Image.fromarray((plain * 255).round().byte().permute(1, 2, 0).numpy())


def stages(trace: Trace, picture: object, whole: int | None = None, encoder: bool = True) -> list[Stage]:
    """A picture for each place at which tokens went.

    Args:
        picture: as `Trace.draw` takes it. whole: tokens before the language model, where the trace does not say.
        encoder: draw the places inside the vision encoder too; of a video it sees one frame at a time.
    """
    captions = [f"after block {step.layer}: {step.tokens_out} tokens" for step in trace.encoder]
    if trace.media:
        left = sum(step.tokens_out for step in trace.media if step.sample == 0)
        before = sum(step.tokens_in for step in trace.media if step.sample == 0) if whole is None else whole
        captions.append(f"before the language model: {left} of {before}")
    for step in trace.language:
        if step.media:
            left = sum(media.tokens_out for media in step.media if media.sample == 0)
            captions.append(f"{_place(step)}: {left} left")
    first = 0 if encoder else len(trace.encoder)
    return [Stage(trace.draw(picture, step=number), captions[number]) for number in range(first, len(captions))]


def _place(step: PromptStep | LayerStep) -> str:
    return f"chosen by layer {step.layer}" if isinstance(step, PromptStep) else f"before layer {step.layer}"


def webp(picture: Image) -> bytes:
    """A picture for the page."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90, method=3)
    return buffer.getvalue()
