"""Frame scorers: how relevant each frame of a video is to a question (QuoTA, arXiv 2503.08689, and cheaper ones).

* `OpenClipScorer` and `HFClipScorer`: similarity of frame and text in CLIP or SigLIP, about 1/1000 of the cost of
  an LVLM. The library's default; the normalisation is ours (the paper's CLIP baseline is not specified in detail).
* `LVLMScorer`: the probability that a small LVLM answers yes; with Qwen/Qwen2-VL-2B-Instruct the paper's own scorer.

All run without gradients, leave the model's mode as it was, and remember their results by the frames' content and the
question. They are `tokred.core.scoring.FrameScorer`s.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError, ScorerError
from tokred.core.sites import Needs, VisualFeatures

__all__ = ["ClipRelevance", "HFClipScorer", "LVLMScorer", "OpenClipScorer", "default_scorer", "strip_options"]

Mode = Literal["minmax", "sigmoid"]
_S = TypeVar("_S", bound="_Scorer")

FLAT = 1e-4  # a spread of similarities below this says nothing: all frames score the same
REMEMBERED = 32  # results that a scorer keeps, and
REMEMBERED_VIDEOS = 4  # videos whose image embeddings it keeps

OBJECTS_QUESTION = """Look at the picture. Can at least one of these be seen in it: {subject}?
{yes}. Yes
{no}. No
Reply with one letter."""

QUERY_QUESTION = """{subject}
Look at the picture. Does it show enough to answer the question above?
{yes}. Yes
{no}. No
Reply with one letter."""


class _Scorer(ABC):
    """Checks what comes in and remembers what went out."""

    def __init__(self, batch: int) -> None:
        self.batch = check_count("batch", batch, minimum=1)
        self._results: dict[object, Tensor] = {}
        self._embeddings: dict[object, Tensor] = {}

    def __call__(self, frames: Sequence[Any], query: str, objects: Sequence[str] = ()) -> Tensor:
        """Score frames: T pictures (PIL, or uint8 (H, W, 3)) and a question give (T,) float64 in [0, 1] on the CPU.

        Raises:
            ScorerError: no frames, a frame that is no picture, or neither a question nor objects.
        """
        if len(frames) == 0:
            raise ScorerError("frames is empty: expected at least one picture")
        if not isinstance(query, str) or isinstance(objects, str):
            raise ScorerError(f"query={query!r}, objects={objects!r}: expected a string and a sequence of strings")
        if not query.strip() and not objects:
            raise ScorerError("query is empty and there are no objects: nothing to score the frames by")
        content = frames_key(frames)
        found = _remember(
            self._results,
            (content, query, tuple(objects)),
            lambda: self._score(frames, content, query, objects).double().cpu(),
            REMEMBERED,
        )
        return found.clone()

    def fresh(self: _S) -> _S:
        """The same scorer, its model shared, that remembers no frames yet: for timing."""
        made = copy.copy(self)
        made._results, made._embeddings = {}, {}
        return made

    @abstractmethod
    def _score(self, frames: Sequence[Any], content: str, query: str, objects: Sequence[str]) -> Tensor:
        """(T,) scores of frames whose content has the key `content`."""

    def _batches(self, frames: Sequence[Any]) -> Iterator[list[Image.Image]]:
        for start in range(0, len(frames), self.batch):
            yield [_picture(frame) for frame in frames[start : start + self.batch]]


# -- CLIP ------------------------------------------------------------------------------------------------------------


class _ClipScorer(_Scorer):
    """The largest cosine c_i of frame i with any of the texts, made a score.

    "minmax": ``floor + (1 - floor) (c_i - min) / (max - min)``, all 0.5 where the frames do not differ. "sigmoid"
    (models with a logit bias, SigLIP): the model's own probability ``sigmoid(exp(scale) c + bias)``.
    """

    model: Any

    def __init__(self, mode: Mode, floor: float, batch: int) -> None:
        super().__init__(batch)
        check_choice("mode", mode, ("minmax", "sigmoid"))
        if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor < 1:
            raise InvalidParameterError(f"floor={floor!r}: expected a score in [0, 1)")
        self.mode, self.floor = mode, float(floor)

    def _check_mode(self) -> None:
        if self.mode == "minmax":
            return
        if getattr(self.model, "logit_bias", None) is None:
            raise InvalidParameterError(
                f"mode='sigmoid': {type(self.model).__name__} has no logit bias, expected a SigLIP; use mode='minmax'"
            )
        warnings.warn(
            "mode='sigmoid': a SigLIP's probabilities are tiny, and raised to a power they give nearly all tokens to "
            "one frame; mode='minmax' spreads them",
            stacklevel=3,
        )

    def _score(self, frames: Sequence[Any], content: str, query: str, objects: Sequence[str]) -> Tensor:
        with torch.inference_mode(), _evaluating(self.model):
            texts = self._embed_texts(list(objects) or [strip_options(query)])
            images = _remember(self._embeddings, content, lambda: self._embed_frames(frames), REMEMBERED_VIDEOS)
            cosine = images @ F.normalize(texts.float(), dim=-1).T  # (T, texts)
            if self.mode == "sigmoid":
                scale, bias = self.model.logit_scale.float(), self.model.logit_bias.float()
                return (scale.exp() * cosine + bias).sigmoid().amax(dim=1)
            return minmax(cosine.amax(dim=1).double(), self.floor)

    def _embed_frames(self, frames: Sequence[Any]) -> Tensor:
        """(T, D) of unit length."""
        parts = [self._embed_images(pictures).float() for pictures in self._batches(frames)]
        return F.normalize(torch.cat(parts), dim=-1)

    @abstractmethod
    def _embed_images(self, pictures: list[Image.Image]) -> Tensor:
        """(batch, D)."""

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor:
        """(texts, D)."""


class OpenClipScorer(_ClipScorer):
    """CLIP or SigLIP of open_clip.

    Args:
        model: a name of open_clip, whose weights `pretrained` are fetched, or a model that is there already; then
            `preprocess` (a PIL image to a (3, H, W) tensor) and `tokenizer` (texts to (n, length) ids) go with it.
            SigLIP by name: ``("ViT-B-16-SigLIP", "webli")``.
        device: None is where a given model is, or CUDA if there is any.
        batch: frames at a time. mode, floor: see `_ClipScorer`; a floor above 0 keeps the least similar frame in play.

    Raises:
        ImportError: open_clip is not installed. InvalidParameterError: a value outside its range.
    """

    def __init__(
        self,
        model: str | nn.Module = "ViT-B-32",
        pretrained: str | None = "laion2b_s34b_b79k",
        *,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
        device: str | torch.device | None = None,
        batch: int = 64,
        mode: Mode = "minmax",
        floor: float = 0.05,
    ) -> None:
        super().__init__(mode, floor, batch)
        if isinstance(model, str):
            open_clip = _import_open_clip()
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            built, _, default = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
            self.model = built.eval()
            self.preprocess = preprocess or default
            self.tokenizer = tokenizer or open_clip.get_tokenizer(model)
        else:
            missing = [name for name, v in (("preprocess", preprocess), ("tokenizer", tokenizer)) if v is None]
            if missing:
                raise InvalidParameterError(
                    f"a model that is built already needs its {' and '.join(missing)}, got None"
                )
            self.model = model if device is None else model.to(device)
            self.preprocess, self.tokenizer = preprocess, tokenizer
        self._check_mode()

    def _embed_images(self, pictures: list[Image.Image]) -> Tensor:
        assert self.preprocess is not None
        weight = next(self.model.parameters())
        return self.model.encode_image(torch.stack([self.preprocess(picture) for picture in pictures]).to(weight))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        assert self.tokenizer is not None
        return self.model.encode_text(self.tokenizer(texts).to(next(self.model.parameters()).device))


class HFClipScorer(_ClipScorer):
    """CLIP or SigLIP of transformers.

    Args:
        model: a `CLIPModel`, `SiglipModel` or another with `get_image_features` and `get_text_features`.
        processor: its processor. batch, mode, floor: as `OpenClipScorer`.
    """

    def __init__(
        self, model: Any, processor: Any, *, batch: int = 64, mode: Mode = "minmax", floor: float = 0.05
    ) -> None:
        super().__init__(mode, floor, batch)
        self.model, self.processor = model, processor
        self._check_mode()

    def _embed_images(self, pictures: list[Image.Image]) -> Tensor:
        inputs = _to_model(self.processor(images=pictures, return_tensors="pt"), self.model)
        return _pooled(self.model.get_image_features(**inputs))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        # SigLIP was trained on texts of full length, and has no mask for shorter ones.
        padding = "max_length" if getattr(self.model, "logit_bias", None) is not None else True
        inputs = self.processor(text=texts, padding=padding, truncation=True, return_tensors="pt")
        return _pooled(self.model.get_text_features(**_to_model(inputs, self.model)))


# -- LVLM ------------------------------------------------------------------------------------------------------------


class ClipRelevance:
    """How relevant each visual token is to the question, by the CLIP model whose vision tower the host runs.

    The recipe of CDPruner's released code (arXiv 2506.10967): the *negated* cosine of patch states (post-layernorm and
    visual projection) and the question's embedding, mean over chunks of the text tower's context length. For
    ``CDPruner(relevance=ClipRelevance(clip, tokenizer))`` on hosts whose tower is this CLIP's and feeds the projector
    token by token (LLaVA, LLaVA-NeXT images).

    Args:
        model: a transformers CLIPModel. tokenizer: its tokenizer.
    """

    needs = Needs(hidden=True)

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def __call__(self, view: VisualFeatures) -> Tensor:
        """(G, n) float32 raw relevance of the tokens of a `VisualFeatures` view, the larger the more relevant.

        Raises:
            ScorerError: the host's projector does not read this tower's tokens one by one.
        """
        width = self.model.config.vision_config.hidden_size
        if not view.tower.projects or view.tower.dim != width:
            raise ScorerError(
                f"ClipRelevance reads tower tokens of {width} channels one by one; this host's tower has "
                f"{view.tower.dim} channels{'' if view.tower.projects else ' and its projector mixes them'}"
            )
        with _evaluating(self.model):
            states = view.at_tokens(view.hidden()).to(self.model.device, self.model.dtype)
            patches = self.model.visual_projection(self.model.vision_model.post_layernorm(states)).float()
            texts = [self._embed(view.query(item)) for item in range(view.items)]
        cosines = [
            (F.normalize(own, dim=-1) @ F.normalize(text, dim=-1).T).mean(dim=1)
            for own, text in zip(patches, texts, strict=True)
        ]
        return -torch.stack(cosines).to(view.features.device)

    def _embed(self, query: str) -> Tensor:
        """(chunks, D) float32: a long question in pieces of the text tower's length."""
        length = self.model.config.text_config.max_position_embeddings
        words = query.split()
        chunks, start = [], 0
        while start < len(words):
            end = len(words)
            while end > start + 1 and len(self.tokenizer(" ".join(words[start:end])).input_ids) > length:
                end -= 1
            chunks.append(" ".join(words[start:end]))
            start = end
        inputs = self.tokenizer(chunks or [""], padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _pooled(self.model.get_text_features(**_to_model(inputs, self.model))).float()


class LVLMScorer(_Scorer):
    """The probability that a small LVLM, shown one frame at a time, answers yes.

    It is asked whether any of the objects can be seen or, without objects, whether the frame is enough to answer. The
    resolution of the frames is the processor's: the released code builds it with ``max_pixels=1280 * 28 * 28``.

    Args:
        model: any `AutoModelForImageTextToText`. processor: its processor, with a chat template.
        yes, no: the two answers offered; each must be a single token.
        prob_mode: "vocab" is the softmax over the whole vocabulary (as released), "yes_no" over the two answers, which
            is steadier for a model that would rather say something else. Both in float32.
        batch: frames at a time.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        yes: str = "A",
        no: str = "B",
        prob_mode: Literal["vocab", "yes_no"] = "vocab",
        batch: int = 64,
    ) -> None:
        super().__init__(batch)
        check_choice("prob_mode", prob_mode, ("vocab", "yes_no"))
        self.model, self.processor, self.yes, self.no, self.prob_mode = model, processor, yes, no, prob_mode
        self.ids = (_token_id(processor.tokenizer, "yes", yes), _token_id(processor.tokenizer, "no", no))

    def _score(self, frames: Sequence[Any], content: str, query: str, objects: Sequence[str]) -> Tensor:
        prompt = self._prompt(query, objects)
        with torch.inference_mode(), _evaluating(self.model):
            logits = torch.cat([self._logits(prompt, images) for images in self._batches(frames)])
        return answer_probability(logits, *self.ids, self.prob_mode)

    def _prompt(self, query: str, objects: Sequence[str]) -> str:
        template, subject = (OBJECTS_QUESTION, ", ".join(objects)) if objects else (QUERY_QUESTION, query)
        question = template.format(subject=subject, yes=self.yes, no=self.no)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        try:
            return self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        except ValueError as error:  # transformers: there is no chat template
            raise ScorerError(
                f"processor {type(self.processor).__name__} cannot format the question: {error}"
            ) from error

    def _logits(self, prompt: str, pictures: list[Image.Image]) -> Tensor:
        """(b, vocabulary): the logits behind the last attended position of each prompt."""
        bos = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        texts, images = [prompt] * len(pictures), [[picture] for picture in pictures]
        inputs = _to_model(
            self.processor(text=texts, images=images, padding=True, return_tensors="pt", **options), self.model
        )
        mask = inputs["attention_mask"]
        length = mask.shape[1]
        # The released code reads the last column, which is padding where frames differ in size and pads go right.
        last = length - 1 - mask.flip(1).int().argmax(dim=1)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=length - int(last.min())).logits
        rows = torch.arange(len(last), device=logits.device)
        return logits[rows, (last - (length - logits.shape[1])).to(logits.device)]


def answer_probability(logits: Tensor, yes: int, no: int, prob_mode: str = "vocab") -> Tensor:
    """(b,) float32, the probability of the token `yes`: (b, vocabulary) logits; see `LVLMScorer`."""
    if prob_mode == "yes_no":
        return logits[:, [yes, no]].float().softmax(dim=-1)[:, 0]
    return logits.float().softmax(dim=-1)[:, yes]


# -- the default -----------------------------------------------------------------------------------------------------


def default_scorer() -> OpenClipScorer:
    """The scorer of a method that was given none: `OpenClipScorer` with its default weights.

    Raises:
        ScorerError: open_clip is not installed, or the weights cannot be had here; it says what can be given instead.
    """
    try:
        return OpenClipScorer()
    except Exception as error:  # of open_clip, of the hub's client, of the network: all mean the same here
        raise ScorerError(
            f"the default frame scorer, open_clip's ViT-B-32, cannot be built ({type(error).__name__}: {error}); give "
            "scorer= as one of: any callable (frames, query, objects) -> (T,) scores in [0, 1]; a tensor of T scores; "
            "tokred.OpenClipScorer(model, preprocess=..., tokenizer=...) with a model that is here; "
            "tokred.zoo.digit_clip()"
        ) from error


# -- helpers ---------------------------------------------------------------------------------------------------------


def strip_options(query: str) -> str:
    """A multiple-choice question without its options ("A. ... B. ..." or "(A) ... (B) ..."), for short text towers."""
    found = re.search(r"\s+\(?A[.):]\s.*?\s\(?B[.):]\s", query, re.DOTALL)
    return query[: found.start()] if found and query[: found.start()].strip() else query


def minmax(similarity: Tensor, floor: float) -> Tensor:
    """Similarities (T,) spread over [floor, 1]; all 0.5 where they do not differ."""
    low, high = similarity.min(), similarity.max()
    if high - low < FLAT:
        return torch.full_like(similarity, 0.5)
    return floor + (1 - floor) * (similarity - low) / (high - low)


def frames_key(frames: Sequence[Any]) -> str:
    """A name for what the frames show."""
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        picture = _array(frame)
        digest.update(f"{picture.shape}{picture.dtype}".encode())
        digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()


def _array(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    picture = frame.detach().cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ScorerError(
            f"a frame is {picture.dtype} of shape {picture.shape}: expected a PIL image, or uint8 of shape (H, W, 3)"
        )
    return picture


def _picture(frame: Any) -> Image.Image:
    return frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(_array(frame))


def _remember(store: dict[object, Tensor], key: object, make: Callable[[], Tensor], most: int) -> Tensor:
    """What `store` has for `key`, or what `make` gives; the oldest entries go first. Two threads may both make it."""
    value = store.get(key)
    if value is None:
        value = store[key] = make()
        while len(store) > most:
            store.pop(next(iter(store)), None)
    return value


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _to_model(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Tensors where the model is, floating ones in its dtype."""
    tensors = {name: value.to(model.device) for name, value in inputs.items() if isinstance(value, Tensor)}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def _pooled(features: Any) -> Tensor:
    """(n, D); transformers before 5 returned the tensor itself."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _token_id(tokenizer: Any, field: str, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InvalidParameterError(
            f"{field}={text!r}: expected a text that is one token of the model, got {list(ids)}"
        )
    return ids[0]


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            'OpenClipScorer by name needs open_clip, which is not installed; run: pip install "tokred[openclip]"'
        ) from error
    return open_clip
