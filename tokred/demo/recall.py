"""The job of the tab Long text: a question about a long text, read whole and under a method that reads a part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.core.method import Method, registered
from tokred.core.patch import patch
from tokred.demo.timing import Timed, timed_pairs
from tokred.eval.bench_needle import LAYER
from tokred.eval.inside import RandomPrompt
from tokred.eval.needle_eval import PROMPT, LLMHost
from tokred.eval.vlm import cache_bytes, time_call

__all__ = ["METHODS", "Read", "Recalled", "prompt_method", "recall", "sample_text"]

METHODS = ("gemfilter", "random_prompt")
TOKENS, OTHER_TOKENS = 2, 48
PAIRS = 3
CONTEXT, NEEDLES = 512, 16  # of `sample_text`
SEED = 777


class Read(NamedTuple):
    """One answer: its text, tokens of the prompt that all layers read, seconds to the first token, bytes of cache."""

    text: str
    tokens: int
    seconds: float | None
    cache: int


@dataclass(frozen=True, eq=False)
class Recalled(Timed):
    """What a question gave.

    Attributes:
        pairs: that were timed; their best times are in `before` and `after`.
        words: the text in runs, with whether the method let the run go on.
    """

    method: str
    before: Read
    after: Read
    pairs: int
    words: list[tuple[str, bool]]
    notes: list[str]


def sample_text(number: int) -> tuple[str, str, str]:
    """A haystack that the bundled model knows the words of, the name that is asked for, and its value."""
    from tokred.data.needles import NAME_AT, NeedleContexts, text_of

    batch = NeedleContexts("test", SEED, CONTEXT, NEEDLES).batch(number, 1)
    name = text_of(batch.questions[0, 0, NAME_AT : NAME_AT + 1])
    return text_of(batch.context[0, 1:]), f"key of {name} is", text_of(batch.answers[0, :1])


def prompt_method(name: str, k: int, host: LLMHost) -> Method:
    """The method `name` of `METHODS` that lets `k` tokens go on.

    Raises:
        InvalidParameterError: another name, or k is too small.
    """
    if name == "random_prompt":
        return RandomPrompt(k=k)
    if name != "gemfilter":
        raise InvalidParameterError(f"{name} is no method of this tab: choose {', '.join(METHODS)}")
    return registered()[name](k=k, layer=LAYER if host.bundled else None)  # type: ignore[call-arg]


def written(host: LLMHost, text: str, question: str) -> tuple[str, list[str]]:
    """The prompt, and what to say about it.

    Raises:
        InvalidParameterError: the text or the question is empty, or there are more tokens than the model reads.
    """
    text, question = " ".join(text.split()), " ".join(question.split())
    if not text or not question:
        what = "text" if not text else "question"
        raise InvalidParameterError(f"there is no {what} yet: type one, or click on an example")
    notes = []
    if host.bundled:
        known = host.tokenizer.get_vocab()
        text, question = text.lower(), question.lower().rstrip(" ?")
        text = re.sub(r"\s*\.", " .", text)
        strange = dict.fromkeys(word for word in f"{text} {question}".split() if word not in known)
        if strange:
            first = ", ".join(list(strange)[:6]) + (" ..." if len(strange) > 6 else "")
            notes.append(
                f"The bundled model knows {sum(map(str.isalpha, known))} words and not: {first}. Sentences that it "
                "learned read “key of alice is tulip .”, and questions “key of alice is”."
            )
        prompt = f"{text} {question}"
    else:
        prompt = host.written(PROMPT.format(context=text, question=question), None)
    longest = getattr(host.model.config, "max_position_embeddings", None)
    tokens = host.count(prompt)
    if longest is not None and tokens + OTHER_TOKENS > longest:
        raise InvalidParameterError(f"the text has {tokens} tokens; {host.name} reads {longest}, the answer included")
    return prompt, notes


@torch.inference_mode()
def recall(
    host: LLMHost,
    text: str,
    question: str,
    name: str,
    k: int,
    rounds: int = PAIRS,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> Recalled:
    """Ask about a text, read whole and under a method.

    Args:
        name: of `METHODS`. k: tokens of the prompt that go on.
        rounds: timed pairs (of models that are not bundled one); 0 measures no time.

    Raises:
        TokredError: of the text, or a method that does not fit the model.
    """
    prompt, notes = written(host, text, question)
    method = prompt_method(name, k, host)
    tokenizer = host.tokenizer
    bos = tokenizer.bos_token
    made = tokenizer(
        prompt,
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=not (bos and prompt.startswith(bos)),
    )
    offsets = made.pop("offset_mapping")[0].tolist()
    inputs = {key: made[key].to(host.model.device) for key in ("input_ids", "attention_mask")}
    progress(0.1, "reading the whole text")
    before = _read(host, inputs, inputs["input_ids"].shape[1])
    progress(0.4, method.title)
    kept: Sequence[int] = range(len(offsets))
    with patch(host.model, method) as handle:
        after = _read(host, inputs, len(kept))
        if handle.trace.prompt:
            kept = handle.trace.prompt[0].kept[0]
            after = after._replace(tokens=len(kept))
        else:
            notes = [*notes, f"{method.title} kept every token: the prompt has only {len(offsets)}."]
    times = _times(host, inputs, method, rounds)
    if times:
        plain, reduced = (min(column) for column in zip(*times, strict=True))  # other work on the machine only adds
        before, after = before._replace(seconds=plain), after._replace(seconds=reduced)
    return Recalled(repr(method), before, after, len(times), _runs(prompt, offsets, set(kept)), notes)


def _read(host: LLMHost, inputs: dict[str, Tensor], tokens: int) -> Read:
    output = host.model.generate(
        **inputs,
        max_new_tokens=TOKENS if host.bundled else OTHER_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=host.tokenizer.pad_token_id,
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    text = host.tokenizer.decode(new, skip_special_tokens=True).strip()
    return Read(text, tokens, None, cache_bytes(host.model, inputs))


def _times(host: LLMHost, inputs: dict[str, Any], method: Method, rounds: int) -> list[tuple[float, float]]:
    def plain() -> float:
        return time_call(host.model, inputs).first

    def reduced() -> float:
        with patch(host.model, method):
            return time_call(host.model, inputs).first

    return timed_pairs(plain, reduced, rounds, host.bundled)


def _runs(prompt: str, offsets: Sequence[Sequence[int]], kept: set[int]) -> list[tuple[str, bool]]:
    """The prompt cut where kept and dropped tokens meet; characters between two tokens go with the first of them."""
    runs: list[tuple[str, bool]] = []
    places = [(start, number in kept) for number, (start, end) in enumerate(offsets) if end > start]
    for (start, own), (end, _) in zip(places, [*places[1:], (len(prompt), False)], strict=True):
        part = prompt[start:end]
        if runs and runs[-1][1] == own:
            runs[-1] = (runs[-1][0] + part, own)
        else:
            runs.append((part, own))
    return runs
