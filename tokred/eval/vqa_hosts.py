"""Any multimodal model of transformers as an evaluation asks it: loaded, prompted, answered by `generate`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.core.method import Method, VisualMethod
from tokred.core.patch import Patch, patch
from tokred.eval.bench import require
from tokred.eval.hub import brief, impatient, pretrained, unreachable, what_to_do
from tokred.eval.inside import tokens_read

__all__ = ["BUNDLED", "TOGETHER", "Answers", "VLMHost", "frame_scorer", "generated", "load_vlm", "parted"]

#: bundled models: what they are asked about, and their prompt
BUNDLED = {"digit-vlm": "image", "digit-video-vlm": "video"}
_DIGIT_PROMPT = "{media} USER : {question} ASSISTANT :"
#: prompts of small batches that a row answers under one patch: patching anew for each costs milliseconds
TOGETHER = 8
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


T = TypeVar("T")


class Answers(NamedTuple):
    """Of a batch: what was said, seconds of `generate`, and visual tokens of each prompt.

    Attributes:
        tokens: that are left behind the last layer. read: that a layer reads, on average.
    """

    texts: list[str]
    seconds: float
    tokens: list[int]
    read: list[float]


def generated(model: Any, inputs: Mapping[str, Any], **settings: Any) -> tuple[Tensor, float]:
    """All that is the model's: the ids that `generate` returns, greedy unless told otherwise, and its seconds."""
    settings = {"do_sample": False, **settings}
    if not settings["do_sample"]:  # a checkpoint's own settings of sampling would be warned about
        settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
    start = _now(model.device)
    output = model.generate(**inputs, **settings)
    return output, _now(model.device) - start


def parted(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Runs of `size` neighbours."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(eq=False)
class VLMHost:
    """A model with its processor.

    Attributes:
        name: as it was given. template: of a prompt, with {media} and {question}; None is the processor's own.
        side: pixels along each side that its pictures must have; None where its processor sees to it.
    """

    name: str
    model: Any
    processor: Any
    template: str | None = None
    side: int | None = None

    @property
    def bundled(self) -> bool:
        return self.name in BUNDLED

    @property
    def takes_videos(self) -> bool:
        """Whether videos go in as such; else their frames go in as images."""
        return "video" in self.parts.medias and getattr(self.processor, "video_processor", None) is not None

    @functools.cached_property
    def parts(self) -> Any:
        """What the model's host says of its modules and placeholders."""
        from tokred.adapters.registry import find_host

        return find_host(self.model).parts  # type: ignore[attr-defined]

    def prompt(self, question: str, media: Sequence[str]) -> str:
        """The prompt of a question about a media of these kinds, in order."""
        if self.template is not None:
            tokens = "".join(self._token(kind) for kind in media)
            return self.template.format(media=tokens, question=question).strip()
        content = [{"type": kind} for kind in media] + [{"type": "text", "text": question}]
        return self.chat([{"role": "user", "content": content}])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a conversation, by the processor's template."""
        try:
            return self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:
            raise InvalidParameterError(
                f"the processor of {self.name} cannot write a prompt ({brief(error)}); give one with "
                '--prompt, say "USER: {media}\\n{question} ASSISTANT:"'
            ) from error

    def _token(self, kind: str) -> str:
        token = getattr(self.processor, f"{kind}_token", None) or getattr(
            self.processor.tokenizer, f"{kind}_token", None
        )
        if token is None:
            raise InvalidParameterError(f"the processor of {self.name} has no {kind} token; leave --prompt away")
        return str(token)

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], videos: Sequence[Sequence[Any]]) -> Any:
        """What the model takes, padded on the left, on its device.

        Args:
            images, videos: of each prompt; frames are uint8 (T, H, W, 3).
        """
        given: dict[str, Any] = {}
        if any(images):
            given["images"] = [list(one) for one in images] if all(images) else [list(one) for one in images if one]
        if any(videos):
            given["videos"] = [video for one in videos for video in one]
        bos = self.processor.tokenizer.bos_token
        if bos and all(prompt.startswith(bos) for prompt in prompts):
            given["add_special_tokens"] = False
        self.processor.tokenizer.padding_side = "left"
        try:
            made = self.processor(text=list(prompts), return_tensors="pt", padding=True, **given)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise InvalidParameterError(
                f"the processor of {self.name} does not take these prompts and pictures: {brief(error)}"
            ) from error
        return made.to(self.model.device).to(self.model.dtype)

    @torch.inference_mode()
    def answer(self, inputs: Any, tokens: int, handle: Patch | None = None, **settings: Any) -> Answers:
        """Greedy answers of at most `tokens` tokens, and what they took."""
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token_id is not None:
            settings.setdefault("pad_token_id", tokenizer.pad_token_id)
        output, seconds = generated(self.model, inputs, max_new_tokens=tokens, **settings)
        new = output[:, inputs["input_ids"].shape[1] :]
        said = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        trace = None if handle is None else handle.trace
        left, read = self._tokens(inputs["input_ids"], trace)
        return Answers(said, seconds, left, read)

    def visual(self, ids: Tensor) -> Tensor:
        """(B, S) bool on the CPU: the visual tokens of prompts (B, S)."""
        ids = ids.cpu()
        found = torch.zeros_like(ids, dtype=torch.bool)
        for media in self.parts.medias:
            found |= ids == self.parts.placeholder(media)
        return found

    def _tokens(self, ids: Tensor, trace: Any) -> tuple[list[int], list[float]]:
        visual = self.visual(ids)
        if trace is not None:  # several images of a prompt count together
            sums: dict[int, int] = {}
            for one in trace.media:
                sums[one.sample] = sums.get(one.sample, 0) + one.tokens_out
            media = [SimpleNamespace(sample=row, tokens_out=count) for row, count in sums.items()]
            trace = SimpleNamespace(media=media, prompt=trace.prompt, layers=trace.layers)
        depth = self.model.config.get_text_config().num_hidden_layers
        found = tokens_read(trace, visual, depth)
        return found.left, found.mean

    @contextlib.contextmanager
    def under(
        self,
        method: Method | None,
        questions: Sequence[str] = (),
        frame_counts: Sequence[int] = (),
        equal: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Iterator[Patch | None]:
        """The model under a method, which is told the questions; `equal`: and equal scores of all frames.

        `options`: of `patch`.
        """
        if method is None:
            yield None
            return
        made = patch(self.model, method, processor=self.processor, **(options or {}))
        with made as handle, self.told(handle, questions, frame_counts, equal):
            yield handle

    def told(
        self, handle: Patch | None, questions: Sequence[str], frame_counts: Sequence[int] = (), equal: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, the method of a patch knows the questions (of `under`) of the batch that is answered."""
        if handle is None or not isinstance(handle.method, VisualMethod) or not questions:
            return contextlib.nullcontext()
        told: dict[str, Any] = {"query": list(questions)}
        if equal and handle.method.name == "quota" and frame_counts:
            told["frame_scores"] = [torch.full((count,), 0.5) for count in frame_counts]
        return handle.request(**told)


def load_vlm(
    name: str, device: torch.device | str = "cpu", dtype: str = "auto", template: str | None = None
) -> VLMHost:
    """A bundled model, a folder as from `save_pretrained`, or an id of the hub.

    Args:
        dtype: "auto" (the checkpoint's; float32 on the CPU), "float32", "float16" or "bfloat16".
        template: of prompts, with {media} and {question}, where the processor has no chat template.

    Raises:
        InvalidParameterError: there is no such model, it is no multimodal one, or the hub cannot be reached.
    """
    require("eval", "transformers", "torchvision", what="an evaluation of multimodal models")
    if template is not None:
        _check_template(template)
    if dtype not in ("auto", *DTYPES):
        raise InvalidParameterError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
    device = torch.device(device)
    if name in BUNDLED:
        from tokred import zoo
        from tokred.zoo.digit_vlm import TOWER_CONFIG

        model, processor = zoo.load(name)
        model = model.to(device, DTYPES.get(dtype, torch.float32))
        return VLMHost(name, model, processor, template or _DIGIT_PROMPT, TOWER_CONFIG["image_size"])
    from transformers import AutoModelForImageTextToText, AutoProcessor

    wanted: Any = DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else "auto")
    model, processor = pretrained(
        name, (AutoModelForImageTextToText, AutoProcessor), [*BUNDLED], "multimodal model", wanted
    )
    model = model.to(device)
    from tokred.adapters.registry import find_host

    find_host(model)  # refuses a family without a host, by name
    return VLMHost(name, model, processor, template)


def _check_template(template: str) -> None:
    try:
        filled = template.format(media="<media>", question="<question>")
    except (KeyError, IndexError, ValueError):
        filled = ""
    if not ("<media>" in filled and "<question>" in filled):
        raise InvalidParameterError(
            f"--prompt {template!r}: expected {{media}} and {{question}} in it, other braces doubled"
        )


def frame_scorer(name: str | None, host: VLMHost) -> Any:
    """The scorer of frames for QuoTA: "digit-clip", a folder or an id of a CLIP or SigLIP; None is the method's own."""
    if name is None and host.bundled:
        name = "digit-clip"
    if name is None or name == "equal":
        return None
    from tokred.adapters.scorers import HFClipScorer, OpenClipScorer

    if name == "digit-clip":
        require("openclip", "open_clip", what="the scorer digit-clip")
        from tokred import zoo

        model, preprocess, tokenizer = zoo.load(name)
        return OpenClipScorer(model, preprocess=preprocess, tokenizer=tokenizer)
    from transformers import AutoModel, AutoProcessor

    try:
        with impatient(name):
            model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
        return HFClipScorer(model.to(host.model.device), processor)
    except Exception as error:
        if unreachable(error):
            raise InvalidParameterError(what_to_do(f"the scorer {name}", "give --scorer a folder with it")) from error
        raise InvalidParameterError(
            f"--scorer {name}: expected equal, digit-clip, or a CLIP of transformers: {brief(error)}"
        ) from error
