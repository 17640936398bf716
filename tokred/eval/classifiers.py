"""Image classifiers by name, for `tokred eval imagenet`: an ``nn.Module`` of images -> logits and its transform."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, MissingWeightsError, nearest
from tokred.eval.bench import require
from tokred.eval.hub import brief, impatient, unreachable, what_to_do
from tokred.eval.records import digest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Choice", "Classifier", "load_classifier"]

DIGITS = tuple("0123456789")
DIGIT_TEMPLATES = ("a {}", "the digit {}")  # wordings that the bundled CLIP was trained with
TEMPLATES = ("full", "simple")


@dataclass(frozen=True)
class Choice:
    """Which classifier, as the command line says it.

    Attributes:
        name: a bundled model, a timm architecture, ``hf:<id or folder>`` of a transformers classifier, or
            ``openclip:ARCHITECTURE/WEIGHTS`` (weights: a tag or a file), which names classes by their texts.
        checkpoint: weights for the architecture instead of the released ones. random: take random ones.
        image_size: height and width at which a timm model runs; None is its own.
        templates: "full" (80 wordings a class; None is that) or "simple" (7), for openclip.
    """

    name: str = "digit-vit"
    checkpoint: Path | None = None
    random: bool = False
    image_size: int | None = None
    templates: str | None = None


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model with its preprocessing.

    Attributes:
        model: images (B, 3, H, W) -> logits (B, classes), in eval mode and float32 on the CPU. transform: a picture ->
            (3, H, W); it can travel to worker processes. class_names: in order, where the model knows them.
        weights: "bundled", "pretrained", "random" or a path. architecture, tag: timm's names, for what papers report.
    """

    name: str
    model: nn.Module
    transform: Callable[[Image], Tensor]
    classes: int
    class_names: tuple[str, ...] | None
    weights: str
    architecture: str | None = None
    tag: str | None = None


def load_classifier(choice: Choice, device: torch.device | None = None, cache: Path | None = None) -> Classifier:
    """Load a classifier.

    Args:
        device: where the texts of a zero-shot classifier are encoded (None: the CPU). cache: folder that
            keeps them (1000 classes in 80 wordings take hours on a CPU).

    Raises:
        InvalidParameterError: no such model, options that it does not take, or weights that do not fit.
        MissingWeightsError: the hub cannot be reached.
    """
    if choice.templates is not None and choice.templates not in TEMPLATES:
        raise InvalidParameterError(f"--templates {choice.templates}: expected full or simple")
    if choice.templates is not None and not choice.name.startswith("openclip:"):
        raise InvalidParameterError(
            f"--templates is for openclip models; {choice.name} brings its own wordings or none"
        )
    if choice.random and choice.checkpoint is not None:
        raise InvalidParameterError("--random-weights and --checkpoint exclude each other")
    kind = choice.name.partition(":")[0] if ":" in choice.name else ""
    if kind in ("hf", "openclip"):
        for given, option in (
            (choice.checkpoint is not None, "--checkpoint"),
            (choice.random, "--random-weights"),
            (choice.image_size is not None, "--image-size"),
        ):
            if given:
                raise InvalidParameterError(f"{option} is for timm models; {choice.name} brings its own")
        return _transformers(choice) if kind == "hf" else _open_clip(choice, device or torch.device("cpu"), cache)
    if choice.name == "digit-clip":
        return _digit_clip(choice)
    return _timm(choice)


# -- timm, bundled -----------------------------------------------------------------------------------------------------


def _timm(choice: Choice) -> Classifier:
    require("timm", "timm", "torchvision", what=f"the model {choice.name!r}")
    import tokred.vision  # registers the backbones
    from tokred import zoo
    from tokred.eval.inspection import load_subject
    from tokred.zoo.digit_backbones import BACKBONES

    assert tokred.vision
    bundled = choice.name == "digit-vit" or choice.name in BACKBONES
    _check_name(choice.name, ("digit-vit", "digit-clip", *BACKBONES))
    if bundled and (choice.random or choice.image_size is not None):
        raise InvalidParameterError(
            f"{choice.name} is bundled with its weights and has one size; leave the option away"
        )
    if choice.name in BACKBONES:
        if choice.checkpoint is not None:
            raise InvalidParameterError(f"--checkpoint is for architectures; {choice.name} is bundled with its weights")
        model, weights = zoo.load(choice.name), "bundled"
    else:
        pretrained = not (bundled or choice.random or choice.checkpoint is not None)
        try:
            subject = load_subject(choice.name, pretrained, choice.checkpoint, choice.image_size)
        except InvalidParameterError as error:
            if pretrained and unreachable(error):
                local = "give the weights: --checkpoint FILE (or --random-weights for a dry run)"
                raise MissingWeightsError(what_to_do(f"the model {choice.name!r}", local)) from error
            raise
        model, weights = subject.model, subject.weights
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return Classifier(
        choice.name,
        model,
        _timm_transform(model, bundled, choice.image_size),
        _outputs(model),
        DIGITS if bundled else None,
        weights,
        None if bundled else config.get("architecture"),
        config.get("tag") if weights == "pretrained" else None,
    )


def _check_name(name: str, bundled: Sequence[str]) -> None:
    import timm

    if name not in bundled and not timm.is_model(name):
        raise InvalidParameterError(
            f"no model {name!r}{nearest(name, [*bundled, *timm.list_models()])}; expected {', '.join(bundled)}, a timm "
            "architecture, hf:<id or folder>, or openclip:ARCHITECTURE/WEIGHTS"
        )


def _timm_transform(model: nn.Module, bundled: bool, image_size: int | None) -> Callable[[Image], Tensor]:
    from timm.data import create_transform, resolve_model_data_config

    from tokred.zoo.digit_vit import DATA_CONFIG

    config = resolve_model_data_config(model)
    if bundled:  # scenes are made at the model's own size: no margin is cut away
        config |= {**DATA_CONFIG, "crop_pct": 1.0}
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    return create_transform(**config, is_training=False)


def _outputs(model: nn.Module) -> int:
    count = getattr(model, "num_classes", 0)
    if not isinstance(count, int) or count < 2:
        raise InvalidParameterError(f"{type(model).__name__} has {count} classes: it is no classifier")
    return count


# -- transformers ------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A transformers classifier: images -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


@dataclass(frozen=True)
class _Processed:
    processor: Any

    def __call__(self, image: Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _transformers(choice: Choice) -> Classifier:
    require("transformers", "transformers", "torchvision", what=f"the model {choice.name!r}")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    source = choice.name.removeprefix("hf:")
    try:
        with impatient(source):
            model, loaded = AutoModelForImageClassification.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(source)
    except Exception as error:
        if not Path(source).exists() and unreachable(error):
            raise MissingWeightsError(what_to_do(f"the model {source!r}", "give hf:<folder>")) from error
        raise InvalidParameterError(f"transformers cannot load {source!r} as a classifier: {brief(error)}") from error
    if loaded["missing_keys"]:
        raise InvalidParameterError(
            f"{source!r} has no weights for {sorted(loaded['missing_keys'])[0]}: it is no classifier (a CLIP is given "
            "as openclip:ARCHITECTURE/WEIGHTS)"
        )
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    own = tuple(names) if len(set(names)) == len(names) and not names[0].startswith("LABEL_") else None
    return Classifier(choice.name, _Logits(model.eval()), _Processed(processor), len(names), own, "pretrained")


# -- open_clip ---------------------------------------------------------------------------------------------------------


class _ZeroShot(nn.Module):
    """A CLIP that names classes: cosines of images (B, 3, H, W) and of the classes' texts (D, classes)."""

    texts: Tensor

    def __init__(self, clip: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("texts", texts)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(images), dim=-1) @ self.texts  # type: ignore[operator]


def _open_clip(choice: Choice, device: torch.device, cache: Path | None) -> Classifier:
    require("openclip", "open_clip", what=f"the model {choice.name!r}")
    import open_clip

    given = choice.name.removeprefix("openclip:")
    by_place = given.startswith(("hf-hub:", "local-dir:"))
    name, _, tag = (given, "", "") if by_place else given.partition("/")
    if not by_place:
        known = open_clip.list_models()
        if name not in known:
            raise InvalidParameterError(f"open_clip has no model {name!r}{nearest(name, known)}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags and not Path(tag).is_file():
            raise InvalidParameterError(
                f"{choice.name}: open_clip has no weights {tag!r} of {name}{nearest(tag, tags)}; expected "
                f"openclip:{name}/WEIGHTS with a file or one of: {', '.join(tags) or 'none released'}"
            )
    try:
        with _silent(), impatient(tag or given):
            clip, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag or None)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        if unreachable(error):
            local = f"give a file of weights: openclip:{name}/FILE"
            raise MissingWeightsError(what_to_do(f"the model {choice.name!r}", local)) from error
        raise InvalidParameterError(
            f"open_clip cannot load {choice.name!r}: {brief(error)}; expected weights of {name}"
        ) from error
    wordings = choice.templates or TEMPLATES[0]
    full = wordings == "full"
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES if full else open_clip.SIMPLE_IMAGENET_TEMPLATES
    kept = None if cache is None else cache / f"texts-{wordings}-{digest(clip)}.safetensors"
    names = tuple(open_clip.IMAGENET_CLASSNAMES)
    texts = _texts(clip.eval(), tokenizer, names, templates, device, kept)
    return Classifier(choice.name, _ZeroShot(clip, texts), transform, len(names), names, "pretrained")


@contextmanager
def _silent() -> Iterator[None]:
    """open_clip logs what it raises, too: said once is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _digit_clip(choice: Choice) -> Classifier:
    require("openclip", "open_clip", what="the model 'digit-clip'")
    if choice.checkpoint is not None or choice.random or choice.image_size is not None:
        raise InvalidParameterError("digit-clip is bundled with its weights and has one size; leave the option away")
    from tokred import zoo

    clip, transform, tokenizer = zoo.load("digit-clip")
    texts = _texts(clip, tokenizer, DIGITS, DIGIT_TEMPLATES, torch.device("cpu"), None)
    return Classifier(choice.name, _ZeroShot(clip, texts), transform, len(DIGITS), DIGITS, "bundled")


def _texts(
    clip: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    templates: Sequence[Any],
    device: torch.device,
    kept: Path | None,
) -> Tensor:
    """(D, classes): the mean direction of each class's wordings, by open_clip."""
    from open_clip import build_zero_shot_classifier
    from safetensors.torch import load_file, save_file

    if kept is not None and kept.is_file():
        return load_file(kept)["texts"]
    clip.to(device)
    found = build_zero_shot_classifier(clip, tokenizer, names, templates, device=device).cpu().contiguous()
    clip.cpu()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        half = kept.with_suffix(".part")
        save_file({"texts": found}, half)
        half.replace(kept)  # a run that is killed here leaves no half of a file
    return found
