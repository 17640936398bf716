"""The job of the tab Ask: a question about a picture or a video, unreduced and under a method."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokred.adapters.scorers import default_scorer
from tokred.core.errors import InvalidParameterError, TokredError
from tokred.core.flops import flops
from tokred.core.method import Method, registered
from tokred.core.patch import patch
from tokred.demo.pictures import Stage, enlarged, stages
from tokred.demo.timing import Timed, timed_pairs
from tokred.eval.hub import impatient
from tokred.eval.inside import SETTINGS, budget_field, fit_threshold, inside_method, tokens_read
from tokred.eval.vlm import cache_bytes, time_call
from tokred.eval.vqa_hosts import VLMHost, frame_scorer
from tokred.eval.vqa_media import MediaError, read_frames

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = ["FRAMES", "IMAGE_METHODS", "VIDEO_METHODS", "Asked", "Media", "Said", "ask", "open_video", "vlm_method"]

_INSIDE = tuple(dict.fromkeys(name for name, _ in SETTINGS.values()))
#: methods for images and for videos: before the language model, then inside it
_BEFORE = ("cdpruner", "divprune", "hired", "vispruner", "visionzip", "random_tokens")
IMAGE_METHODS = (*_BEFORE, *_INSIDE)
VIDEO_METHODS = ("quota", "evs", *_BEFORE, *_INSIDE)
FRAMES = 16
#: tokens of an answer: of the bundled models, of others
TOKENS, OTHER_TOKENS = 3, 48
PAIRS = 3  # timed pairs of a bundled model
STEPS = 6  # prefills with which the threshold of MustDrop is fitted


@dataclass(frozen=True, eq=False)
class Media:
    """What is asked about: a picture, or frames (T, H, W, 3) uint8 of a video."""

    picture: Image | None = None
    frames: np.ndarray | None = None

    @property
    def kind(self) -> str:
        return "image" if self.frames is None else "video"


class Said(NamedTuple):
    """One answer.

    Attributes:
        text: of the answer. tokens: visual tokens behind the last layer. read: that a layer reads, on average.
        gmacs: of the prefill, None where the model cannot be counted. seconds: to the first token, None where it was
            not measured. cache: bytes of keys and values.
    """

    text: str
    tokens: int
    read: float
    gmacs: float | None
    seconds: float | None
    cache: int


@dataclass(frozen=True, eq=False)
class Asked(Timed):
    """What a question gave: answers without and with the method, which can be written as `method`.

    `pairs` were timed; their best times are in `before` and `after`.
    """

    method: str
    before: Said
    after: Said
    pairs: int
    stages: list[Stage]
    notes: list[str]


def open_video(path: str | Path | None, frames: int = FRAMES) -> Media:
    """Frames of an uploaded video, from the middles of as many equal parts.

    Raises:
        InvalidParameterError: nothing was given, or it is no video.
    """
    if path is None:
        raise InvalidParameterError("there is no video yet: upload one, or click on an example")
    try:
        return Media(frames=read_frames(Path(path), frames))
    except MediaError as error:
        raise InvalidParameterError(str(error)) from error
    except ImportError:
        raise
    except Exception as error:
        raise InvalidParameterError(
            f"{Path(path).name} cannot be read as a video: expected MP4, WebM, MOV, MKV or AVI"
        ) from error


def question_of(host: VLMHost, text: str) -> tuple[str, list[str]]:
    """The question as the model is asked it, and what to say about it.

    The bundled model reads words of its own: small letters, a space before the question mark.

    Raises:
        InvalidParameterError: it is empty.
    """
    text = " ".join(text.split())
    if not text:
        raise InvalidParameterError("there is no question yet: type one, or click on an example")
    if not host.bundled:
        return text, []
    words = re.findall(r"[\w<>-]+|\?", text.lower())
    known = host.processor.tokenizer.get_vocab()
    strange = [word for word in words if word not in known]
    if words[-1:] != ["?"]:
        words.append("?")
    notes = []
    if strange:
        notes.append(
            f"The bundled model was never taught: {', '.join(strange)}. It understands “which digit is red ?”, “what "
            "colour is the 4 ?”, “is there a 7 ?”, “how many digits are there ?”, “which digit is left-most ?”."
        )
    return " ".join(words), notes


def fitted(host: VLMHost, media: Media) -> Media:
    """The media at the size that the model reads, cut to a square where its processor does that."""
    from PIL import Image, ImageOps

    processor = getattr(host.processor, "image_processor", None)
    side = host.side
    if media.frames is not None:
        if side is None:
            return media
        frames = [ImageOps.fit(Image.fromarray(frame), (side, side)) for frame in media.frames]
        import numpy as np

        return Media(frames=np.stack([np.asarray(frame) for frame in frames]))
    assert media.picture is not None
    if side is not None:
        return Media(ImageOps.fit(media.picture, (side, side)))
    if getattr(processor, "do_center_crop", False):  # the trace is drawn on what is left of the picture
        least = min(media.picture.size)
        return Media(ImageOps.fit(media.picture, (least, least)))
    return media


def vlm_method(
    name: str, tokens: int, host: VLMHost, kind: str, left: Callable[[Method], float] | None = None
) -> tuple[Method, list[str]]:
    """The method `name` with a budget of visual tokens, and what to say about it.

    Args:
        kind: "image" or "video". left: visual tokens behind the last layer under a method, to fit the thresholds of
            MustDrop; None takes its own.

    Raises:
        InvalidParameterError: the method does not act there.
    """
    known = IMAGE_METHODS if kind == "image" else VIDEO_METHODS
    if name not in known:
        raise InvalidParameterError(f"{name} does not act on one {kind}: choose {', '.join(known)}")
    if name not in _INSIDE:
        own: dict[str, Any] = {"budget": tokens}
        if name == "quota":
            own["scorer"] = _scorer(host)
        return registered()[name](**own), []  # type: ignore[call-arg]
    chosen: Mapping[str, Any] = next(own for other, own in SETTINGS.values() if other == name)
    if not host.bundled:  # those settings are for its six layers
        chosen = {"scope": "visual"} if name == "gemfilter" else {}
    method = inside_method(name, tokens, chosen)
    if budget_field(name) is not None or left is None:
        return method, []

    def behind(threshold: float) -> float:
        return left(method.replace(global_threshold=threshold, individual_threshold=threshold))

    found = fit_threshold(behind, tokens, STEPS)
    note = f"{method.title} drops by thresholds; {found:g} was fitted to this question and budget."
    return method.replace(global_threshold=found, individual_threshold=found), [note]


_scorers: WeakKeyDictionary[VLMHost, Any] = WeakKeyDictionary()


def _scorer(host: VLMHost) -> Any:
    """What scores frames beside a model: the bundled CLIP, or the library's default; loaded once."""
    if host not in _scorers:
        with impatient("open_clip"):
            _scorers[host] = frame_scorer(None, host) if host.bundled else default_scorer()
    return _scorers[host]


@torch.inference_mode()
def ask(
    host: VLMHost,
    media: Media,
    question: str,
    names: Sequence[str],
    share: float,
    rounds: int = PAIRS,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> list[Asked]:
    """Ask without and under each method.

    Args:
        names: of methods. share: of the visual tokens that are left, in (0, 1].
        rounds: timed pairs (of models that are not bundled one); 0 measures no time.

    Raises:
        TokredError: of the question, the media, or a method that does not fit the model.
    """
    if not 0 < share <= 1:
        raise InvalidParameterError(f"the share of tokens is {share:g}: expected above 0, up to 1")
    text, notes = question_of(host, question)
    media = fitted(host, media)
    shown = media.frames if media.picture is None else enlarged(media.picture)
    prompt = host.prompt(text, [media.kind])
    inputs = host.inputs(
        [prompt],
        [[media.picture]] if media.picture is not None else [],
        [[media.frames]] if media.frames is not None else [],
    )
    visual = host.visual(inputs["input_ids"])
    whole = int(visual.sum())
    tokens = max(1, round(share * whole))
    depth = host.model.config.get_text_config().num_hidden_layers

    def left(method: Method) -> float:
        with patch(host.model, method, processor=host.processor) as handle:
            host.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            return tokens_read(handle.trace, visual, depth).left[0]

    progress(0.1, "without a method")
    before = _say(host, inputs, None, visual)
    found = []
    for number, name in enumerate(names):
        method, own = vlm_method(name, tokens, host, media.kind, left)
        progress(0.2 + 0.8 * number / len(names), method.title)
        with host.under(method, [text]) as handle:
            after = _say(host, inputs, handle, visual)
            there = handle is not None and len(handle.trace) > 0
            pictures = stages(handle.trace, shown, whole, media.kind == "image") if handle and there else []
        times = _times(host, inputs, method, text, rounds)
        if times:
            plain, reduced = (min(column) for column in zip(*times, strict=True))  # other work on the machine only adds
            before, after = before._replace(seconds=plain), after._replace(seconds=reduced)
        if not pictures:
            own = [*own, f"{method.title} kept every token: its budget is not below what there is."]
        found.append(
            Asked(
                repr(_shown(method)),
                before,
                after,
                len(times),
                pictures,
                [*notes, *own],
            )
        )
    return found


def _shown(method: Method) -> Method:
    """Without its scorer, whose name is long."""
    return method.replace(scorer=None) if getattr(method, "scorer", None) is not None else method


def _say(host: VLMHost, inputs: Any, handle: Any, visual: Tensor) -> Said:
    answers = host.answer(inputs, TOKENS if host.bundled else OTHER_TOKENS, handle)
    cache = cache_bytes(host.model, inputs)
    sizes = {**inputs, "kept_tokens": answers.tokens[0]}
    try:
        gmacs = flops(host.model, sizes).total / 1e9
    except TokredError:  # a family that cannot be counted can still be asked
        gmacs = None
    return Said(answers.texts[0], answers.tokens[0], answers.read[0], gmacs, None, cache)


def _times(host: VLMHost, inputs: Any, method: Method, question: str, rounds: int) -> list[tuple[float, float]]:
    """Seconds to the first token, (unreduced, reduced) of each pair."""

    def plain() -> float:
        return time_call(host.model, inputs).first

    def reduced() -> float:
        scorer = getattr(method, "scorer", None)  # it remembers frames: each run has a new one
        chosen = method if scorer is None else method.replace(scorer=scorer.fresh())
        with host.under(chosen, [question]):
            return time_call(host.model, inputs).first

    return timed_pairs(plain, reduced, rounds, host.bundled)
