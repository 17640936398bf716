"""`tokred inspect`: what a method keeps of one image, layer by layer, in any model that a host serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, UnsupportedModelError, nearest
from tokred.core.flops import flops
from tokred.core.patch import Patch, patch
from tokred.core.trace import Trace
from tokred.eval.bench import require
from tokred.eval.hub import impatient, unreachable, what_to_do
from tokred.eval.report import Panel, contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Subject", "inspect", "load_image", "load_subject"]

COLUMNS = 7  # panels in a row of the picture


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its preprocessing.

    Attributes:
        name: as given. model: in eval mode. prepare: picture -> (1, 3, H, W) as the model takes it.
        mean, std: (3,) of that normalisation, to show the pixels that the model saw.
        weights: "bundled", "pretrained", "random" or the path of a checkpoint.
    """

    name: str
    model: nn.Module
    prepare: Callable[[Image], Tensor]
    mean: Tensor
    std: Tensor
    weights: str

    def pixels(self, batch: Tensor) -> Tensor:
        """(3, H, W) in [0, 1]: the first image of a prepared batch."""
        return (batch[0].float().cpu() * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)


def load_image(source: str) -> Image:
    """Open a picture as RGB; "demo" is a scene of the held-out test set.

    Raises:
        OSError: no such file, or no picture. MissingExtraError: "demo" without scikit-learn and scikit-image.
    """
    from PIL import Image

    if source == "demo":
        require("demo", "sklearn", "skimage", what="the demo scene")
        from tokred.data.scenes import DigitScenes

        scene = DigitScenes("test", seed=777).render(1).images[0]
        return Image.fromarray(scene.permute(1, 2, 0).numpy())
    if not Path(source).is_file():
        raise FileNotFoundError(f"no picture at {source!r} (a path, or the word: demo)")
    try:
        with Image.open(source) as file:
            return file.convert("RGB")
    except Exception as error:
        raise InvalidParameterError(f"{source} cannot be read as a picture: {error}") from error


def load_subject(
    name: str, pretrained: bool = False, checkpoint: Path | None = None, image_size: int | None = None
) -> Subject:
    """Load a model by name.

    Args:
        name: "digit-vit" (bundled), a timm architecture, or ``hf:`` and the id or path of a
            transformers vision model.
        pretrained: with timm's released weights (downloads them). Otherwise they are random, from seed 0.
        checkpoint: weights for the architecture (safetensors, or a state dict that torch reads).
        image_size: height and width in pixels at which a timm model runs; None is its own.

    Raises:
        InvalidParameterError: no such model, or the weights do not fit it.
    """
    if pretrained and checkpoint is not None:
        raise InvalidParameterError("--pretrained and --checkpoint exclude each other")
    if name.startswith("hf:"):
        if checkpoint is not None or image_size is not None:
            raise InvalidParameterError(
                "--checkpoint and --image-size are for timm models; an hf: model brings its own"
            )
        return _transformers(name)
    require("timm", "timm", "torchvision", what=f"the model {name!r}")

    if name == "digit-vit":
        if pretrained or image_size is not None:
            raise InvalidParameterError(f"{name} is bundled with its weights and has one size; leave the option away")
        return _bundled(name, checkpoint)
    return _timm(name, pretrained, checkpoint, image_size)


def _bundled(name: str, checkpoint: Path | None) -> Subject:
    from tokred import zoo
    from tokred.zoo.digit_vit import build_digit_vit

    if checkpoint is None:
        model = zoo.load(name)
    else:
        model = build_digit_vit().eval()
        _fill(model, checkpoint)
    # scenes are made at the model's own size: no margin is cut away
    return _from_timm(name, model, "bundled" if checkpoint is None else str(checkpoint), {"crop_pct": 1.0})


def _timm(name: str, pretrained: bool, checkpoint: Path | None, image_size: int | None) -> Subject:
    import timm

    base = name.removeprefix("timm/").split(".")[0]
    if not timm.is_model(base):
        known = ["digit-vit", *timm.list_models()]
        raise InvalidParameterError(
            f"no model {name!r}{nearest(base, known)}: expected the bundled digit-vit, a timm architecture, or "
            "hf:<id or path>"
        )
    torch.manual_seed(0)  # random weights are the same ones every time
    size = {} if image_size is None else {"img_size": image_size}
    try:
        with impatient(name) if pretrained else contextlib.nullcontext():
            model = timm.create_model(name, pretrained=pretrained, **size).eval()
    except Exception as error:
        if unreachable(error):
            local = "give the weights by --checkpoint FILE instead of --pretrained"
            raise InvalidParameterError(what_to_do(f"the model {name!r}", local)) from error
        raise InvalidParameterError(f"timm cannot make {name!r}: {_first_line(error)}") from error
    if checkpoint is not None:
        _fill(model, checkpoint)
    weights = "pretrained" if pretrained else str(checkpoint or "random")
    override = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    return _from_timm(name, model, weights, override)


def _from_timm(name: str, model: nn.Module, weights: str, override: Mapping[str, Any]) -> Subject:
    from timm.data import create_transform, resolve_data_config

    config = {**resolve_data_config({}, model=model), **override}
    transform = create_transform(**config, is_training=False)
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return Subject(name, model, lambda image: transform(image)[None], mean, std, weights)


def _fill(model: nn.Module, path: Path) -> None:
    """Load a checkpoint strictly."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model"):
                state = state.get(key, state)
    except Exception as error:
        raise InvalidParameterError(
            f"{path} cannot be read as a checkpoint: expected safetensors, or a state dict that torch.save wrote"
        ) from error
    try:
        model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    except Exception as error:
        raise InvalidParameterError(f"{path} does not fit {type(model).__name__}: {_first_line(error)}") from error


def _transformers(name: str) -> Subject:
    require("transformers", "transformers", "torchvision", what=f"the model {name!r}")
    from transformers import AutoImageProcessor, AutoModel

    source = name.removeprefix("hf:")
    try:
        with impatient(source):
            model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
            processor = AutoImageProcessor.from_pretrained(source)
    except Exception as error:
        if unreachable(error):
            raise InvalidParameterError(what_to_do(f"the model {source!r}", "give hf:<folder>")) from error
        raise InvalidParameterError(f"transformers cannot load {source!r}: {_first_line(error)}") from error
    model = getattr(model, "vision_model", model)  # of a two-tower model such as CLIP
    mean = torch.tensor(getattr(processor, "image_mean", None) or [0.0] * 3)
    std = torch.tensor(getattr(processor, "image_std", None) or [1.0] * 3)
    return Subject(
        name, model, lambda image: processor(images=image, return_tensors="pt")["pixel_values"], mean, std, "pretrained"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.inference_mode()
def inspect(
    subject: Subject, image: Image, method: str, parameters: Mapping[str, Any], out: Path, size: int = 224
) -> dict[str, Any]:
    """Run one image through the patched model, write the picture to `out`, and return what was kept (JSON types).

    Args:
        size: side of each panel in pixels.
    """
    batch = subject.prepare(image)
    with patch(subject.model, method, **parameters) as handle:
        subject.model(batch)
        trace = handle.trace
        cost = _cost(subject.model, batch, handle)
        chosen = handle.method
        sheet = _sheet(subject, batch, trace, chosen.title, cost, size)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        sheet.save(out)
    except ValueError as error:
        raise InvalidParameterError(f"--out {out}: {error}") from error
    described = trace.to_dict()
    return {
        "model": subject.name,
        "weights": subject.weights,
        "method": chosen.to_dict(),
        "image_size": list(batch.shape[-2:]),
        "patches": described["total"],
        "grid": described["grid"],
        "prefix": described["prefix"],
        "steps": [
            {key: step[key] for key in ("layer", "tokens_in", "tokens_out")}
            | {"kept": step["kept"][0], "group": step["group"][0]}
            for step in described["steps"]
        ],
        **cost,
        "picture": {"file": str(out), "width": sheet.width, "height": sheet.height},
    }


def _cost(model: nn.Module, batch: Tensor, handle: Patch) -> dict[str, Any]:
    try:
        counted = flops(model, batch)
    except UnsupportedModelError:  # a family that cannot be counted can still be looked at
        return {"gmacs": None, "gmacs_unpatched": None}
    return {"gmacs": counted.total / 1e9, "gmacs_unpatched": counted.unreduced / 1e9}


def _sheet(subject: Subject, batch: Tensor, trace: Trace, title: str, cost: Mapping[str, Any], size: int) -> Image:
    from PIL import Image

    pixels = (subject.pixels(batch) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
    panels = [Panel(picture, f"input: {trace.total or 'all'} patches")]
    for step, (layer, left) in enumerate(trace.counts):
        panels.append(Panel(trace.draw(picture, step=step), f"block {layer}: {left} tokens"))
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    heading = f"{subject.name} with {title}"
    if cost["gmacs"] is not None:
        heading += f": {cost['gmacs_unpatched']:.3g} > {cost['gmacs']:.3g} GMACs"
    return contact_sheet(rows, size, heading=heading)
