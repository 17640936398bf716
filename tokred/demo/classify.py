"""The job of the tab Classify: one picture through a classifier, unpatched and under a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokred.adapters.registry import find_host
from tokred.core.errors import InvalidParameterError
from tokred.core.flops import encoder_macs
from tokred.core.method import EncoderMethod
from tokred.core.patch import patch
from tokred.core.sites import EncoderInfo
from tokred.demo.pictures import Stage, enlarged, seen, stages
from tokred.eval.classifiers import Classifier
from tokred.eval.cost import MATCHED, match_cost, twin
from tokred.eval.report import token_chain
from tokred.eval.speed import Speed, interleaved

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["METHODS", "Classified", "classify", "encoder_method"]

METHODS = (*MATCHED, "random_tokens")
TOP = 5
#: patches of a timed batch, so that a small model is not all overhead; pairs of timed runs
TIMED_TOKENS, PAIRS = 1152, 5


@dataclass(frozen=True, eq=False)
class Classified:
    """What one picture gave.

    Attributes:
        method: as it can be written in Python. before, after: the best classes with their probabilities.
        stages: what the model saw, then what was left. gmacs: before and after. tokens: that leave each block.
        speed: of batches of `batch` such pictures; None where it was not measured.
    """

    method: str
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    stages: list[Stage]
    gmacs: tuple[float, float]
    tokens: str
    speed: Speed | None
    batch: int


def encoder_method(name: str, info: EncoderInfo, share: float) -> EncoderMethod:
    """The method `name` of `METHODS` at a share of the multiply-adds; "random_tokens" keeps as many as Top-K.

    Raises:
        InvalidParameterError: another name, or no setting costs that.
    """
    if name not in METHODS:
        raise InvalidParameterError(f"{name} is no method of this tab: choose {', '.join(METHODS)}")
    if name == "random_tokens":
        return twin(match_cost("topk", info, share), info)
    return match_cost(name, info, share)


@torch.inference_mode()
def classify(
    classifier: Classifier,
    picture: Image,
    name: str,
    share: float,
    rounds: int = PAIRS,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> Classified:
    """Run a picture before and after.

    Args:
        name: of a method in `METHODS`. share: of the unpatched multiply-adds, in (0, 1).
        rounds: timed pairs; 0 measures no time.

    Raises:
        TokredError: the model has no encoder that methods fit, or the share is out of reach.
    """
    model = classifier.model
    device = next(model.parameters()).device
    info: EncoderInfo = find_host(model).info  # type: ignore[attr-defined]
    method = encoder_method(name, info, share)
    pixels = classifier.transform(picture)
    batch = pixels[None].to(device)
    progress(0.2, "unpatched")
    before = _best(classifier, model(batch))
    progress(0.3, method.title)
    with patch(model, method) as handle:
        after = _best(classifier, model(batch))
        trace = handle.trace
    shown = enlarged(seen(classifier.transform, pixels))
    pictures = [Stage(shown, f"input: {info.tokens} patches"), *stages(trace, shown)]
    cost = encoder_macs(info, method)
    many = max(1, TIMED_TOKENS // info.tokens)
    speed = None
    if rounds:
        progress(0.5, "timing")
        speed = interleaved(model, {name: method}, batch.expand(many, -1, -1, -1).contiguous(), rounds)[name]
    return Classified(
        repr(method),
        before,
        after,
        pictures,
        (cost.unreduced / 1e9, cost.total / 1e9),
        token_chain(info.tokens, method.plan(info)),
        speed,
        many,
    )


def _best(classifier: Classifier, logits: Tensor) -> list[tuple[str, float]]:
    scale = getattr(getattr(classifier.model, "clip", None), "logit_scale", None)
    values = logits[0].float() * (1 if scale is None else scale.exp())  # of a CLIP they are cosines
    chances, places = values.softmax(0).topk(min(TOP, len(values)))
    names = class_names(classifier)
    return [(names[place], chance) for place, chance in zip(places.tolist(), chances.tolist(), strict=True)]


def class_names(classifier: Classifier) -> Sequence[str]:
    """In the order of the logits; numbers where nobody knows the names."""
    if classifier.class_names is not None:
        return classifier.class_names
    if classifier.classes == 1000:
        from timm.data import ImageNetInfo

        known = ImageNetInfo()
        return [known.index_to_description(number) for number in range(1000)]
    return [f"class {number}" for number in range(classifier.classes)]
