"""A model of lmms-eval that runs under a method of tokred.

lmms-eval (0.7 and later) finds it by the entry point ``lmms_eval.models`` of the installed package::

    lmms_eval --model tokred_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=hired,budget=0.2 --tasks pope

Every argument that is not named in `TokredHF` is a parameter of the method; without ``method=`` the model is as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokred.core.errors import InvalidParameterError, UnsupportedGenerationError
from tokred.eval.runs import choose
from tokred.eval.vqa_media import MediaError, Video
from tokred.integrations import NAME

if TYPE_CHECKING:
    from tokred.core.method import Method
    from tokred.eval.vqa_hosts import VLMHost

    Base: Any = object
else:
    try:
        from lmms_eval.api.model import lmms as Base
    except ImportError as error:
        raise ImportError(
            "tokred.integrations.lmms_eval is the plug-in of lmms-eval, which is not installed; run: "
            "pip install lmms_eval (or use: tokred eval vqa)"
        ) from error

__all__ = ["TokredHF"]


class TokredHF(Base):
    """Any multimodal model that tokred has a host for, under a method.

    Args:
        pretrained: an id of the hub, a folder, digit-vlm or digit-video-vlm.
        method: by name, see ``tokred list``; None is the model as it is. parameters: of the method and of
            `tokred.patch`; what lmms-eval adds by itself is left aside.
        batch_size: prompts of one `generate`. device, dtype, prompt: see `tokred.eval.vqa_hosts.load_vlm`.
        max_num_frames: of a video. scorer: of frames, for QuoTA, see `tokred.eval.vqa_hosts.frame_scorer`.
        system_prompt: put before every conversation.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "digit-vlm",
        method: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        prompt: str | None = None,
        max_num_frames: int = 32,
        scorer: str | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        from tokred.eval.processes import join
        from tokred.eval.vqa_hosts import frame_scorer, load_vlm

        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InvalidParameterError(f"batch_size={batch_size!r}: expected a number of prompts, at least 1")
        if method is None and parameters:
            raise InvalidParameterError(
                f"{next(iter(parameters))}={next(iter(parameters.values()))!r} is a parameter of a method; name one "
                "with method=..., see: tokred list"
            )
        chosen: Method | None = None
        self.options: dict[str, Any] = {}
        if method is not None:
            _, chosen, self.options = choose((str(method).replace("-", "_"), parameters))
        processes = join(None if device is None else str(device))
        self._rank, self._world_size = processes.rank, processes.count
        self.host: VLMHost = load_vlm(pretrained, processes.device, dtype, prompt)
        if chosen is not None and chosen.name == "quota":
            found = frame_scorer(scorer, self.host)
            chosen = chosen if found is None else chosen.replace(scorer=found)
        self.method = chosen
        self.batch_size = int(batch_size)
        self.frames, self.equal, self.system_prompt = int(max_num_frames), scorer == "equal", system_prompt
        with self.host.under(self.method, options=self.options):
            pass  # a method that does not fit is refused here

    @property
    def model(self) -> Any:
        return self.host.model

    @property
    def config(self) -> Any:
        return self.host.model.config

    @property
    def tokenizer(self) -> Any:
        return self.host.processor.tokenizer

    @property
    def device(self) -> Any:
        return self.host.model.device

    # -- what lmms-eval asks for ---------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, in their order."""
        conversations, settings = [], []
        for request in requests:
            *_, messages, given, number, task, split = request.args
            conversations.append(messages(self.task_dict[task][split][number]))
            settings.append(given)
        return self._said(conversations, settings)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of every round of each request; a task says after each whether it was the last."""
        found = []
        for request in requests:
            *_, messages, given, number, task, split = request.args
            document = self.task_dict[task][split][number]
            conversation, said, information = messages(document), [], None
            while True:
                said.append(self._said([conversation], [given])[0])
                conversation, last, told, information = messages(
                    document, round_idx=len(said), previous_output=list(said), previous_round_info=information
                )
                if last:
                    found.append(list(told) if told is not None else said)
                    break
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused by name: lmms-eval asks models of conversations for generation only."""
        raise UnsupportedGenerationError(
            f"{NAME} is a model of conversations, which lmms-eval asks for answers, not for likelihoods; choose the "
            "task's generating form"
        )

    # -- answers -------------------------------------------------------------------------------------------------------

    def _said(self, conversations: Sequence[Any], settings: Sequence[Mapping[str, Any]]) -> list[str]:
        read = [self._read(conversation) for conversation in conversations]
        groups: dict[Any, list[int]] = {}
        for i, (one, given) in enumerate(zip(read, settings, strict=True)):
            groups.setdefault((bool(one.images), bool(one.videos), repr(sorted(given.items()))), []).append(i)
        answers = [""] * len(read)
        for (_, _, key), members in groups.items():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                said = self._batch([read[i] for i in batch], settings[batch[0]])
                for i, text in zip(batch, said, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", (read[i].prompt, key), text)
        return answers

    def _batch(self, batch: Sequence[_Read], given: Mapping[str, Any]) -> list[str]:
        inputs = self.host.inputs(
            [one.prompt for one in batch], [one.images for one in batch], [one.videos for one in batch]
        )
        counts = [len(video) for one in batch for video in one.videos]
        tokens, stops, settings = _generation(given)
        with self.host.under(self.method, [one.question for one in batch], counts, self.equal, self.options) as handle:
            texts = self.host.answer(inputs, tokens, handle, **settings).texts
        return [_cut(text, stops) for text in texts]

    def _read(self, conversation: Any) -> _Read:
        """A conversation as lmms-eval writes it: turns with parts of type text, image or video, media under "url"."""
        turns, question, images, videos = [], "", [], []
        for turn in conversation:
            turn = turn if isinstance(turn, Mapping) else turn.model_dump()
            content = turn["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            told: list[dict[str, Any]] = []
            for part in parts:
                part = part if isinstance(part, Mapping) else part.model_dump()
                if part["type"] == "text":
                    told.append({"type": "text", "text": part["text"]})
                    question = part["text"] if turn["role"] == "user" else question
                elif part["type"] == "image":
                    told.append({"type": "image"})
                    images.append(self._picture(part["url"]))
                elif part["type"] == "video":
                    shown = self._video(part["url"])
                    if self.host.takes_videos:
                        told.append({"type": "video"})
                        videos.append(shown)
                    else:
                        told += [{"type": "image"}] * len(shown)
                        images += [self._picture(frame) for frame in shown]
                else:
                    raise InvalidParameterError(f"{NAME} reads images, videos and text, and was given {part['type']}")
            turns.append({"role": turn["role"], "content": told})
        if self.system_prompt:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return _Read(self._prompt(turns), question, images, videos)

    def _prompt(self, turns: Sequence[Mapping[str, Any]]) -> str:
        if self.host.template is None:
            return self.host.chat(turns)
        parts = [part for turn in turns for part in turn["content"]]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        return self.host.prompt(text, [part["type"] for part in parts if part["type"] != "text"])

    def _picture(self, given: Any) -> Any:
        from PIL import Image

        try:
            picture = given if hasattr(given, "convert") else _opened(given, Image)
            picture = picture.convert("RGB")
        except Exception as error:
            raise MediaError(f"a picture of the task cannot be read: {error}") from error
        side = self.host.side
        return picture if side is None else picture.resize((side, side))

    def _video(self, given: Any) -> Any:
        import numpy as np
        from PIL import Image

        if isinstance(given, (list, tuple)) and given and not isinstance(given[0], str):
            frames = np.stack([np.asarray(frame) for frame in given])
        elif hasattr(given, "ndim"):
            frames = np.asarray(given)
        else:
            from pathlib import Path

            path = Path(given[0] if isinstance(given, (list, tuple)) else given)
            frames = Video(str(path), path).frames(self.frames)
        side = self.host.side
        if side is None:
            return frames
        return np.stack([np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames])


class _Read:
    """A prompt with its media, and its last question."""

    def __init__(self, prompt: str, question: str, images: list[Any], videos: list[Any]) -> None:
        self.prompt, self.question, self.images, self.videos = prompt, question, images, videos


def _opened(given: Any, image: Any) -> Any:
    return image.fromarray(given) if hasattr(given, "ndim") else image.open(given)


def _generation(given: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """Tokens of an answer, texts that end it, and the settings of `generate`, from a task's generation_kwargs."""
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    temperature = given.get("temperature") or 0
    settings: dict[str, Any] = {}
    if temperature > 0 and given.get("do_sample", True):
        settings = {"do_sample": True, "temperature": temperature, "top_p": given.get("top_p")}
    if (given.get("num_beams") or 1) > 1:
        settings["num_beams"] = given["num_beams"]
    return int(given.get("max_new_tokens") or given.get("max_gen_toks") or 1024), stops, settings


def _cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the first text that ends an answer; blank lines at its beginning end none."""
    for stop in stops:
        if stop:
            text = text.lstrip().partition(stop)[0] if not stop.strip() else text.partition(stop)[0]
    return text.strip()
