"""What the benchmarks of multimodal models share: answers by `generate`, their statistics, and what one call takes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, UnknownMethodError, nearest
from tokred.core.method import Method, VisualMethod, from_dict, registered
from tokred.core.patch import Patch, patch
from tokred.core.sites import MediaLayout, PromptInfo
from tokred.eval.bench import BenchOptions
from tokred.eval.inside import budget_field
from tokred.eval.report import table
from tokred.eval.speed import ratio
from tokred.eval.vision import mean

__all__ = [
    "Answered",
    "Call",
    "Row",
    "ask",
    "cache_bytes",
    "changed_settings",
    "check_methods",
    "choosers",
    "judged",
    "load",
    "machine",
    "patched",
    "prompt_info",
    "refuse",
    "remembered",
    "report",
    "scores",
    "serving",
    "time_call",
    "visual_method",
]

#: tokens of an answer: one word, the end, and one that is never needed
ANSWER_TOKENS = 3
#: tokens after the first one that a timed call goes on to make
DECODED = 8


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table before it is measured.

    Attributes:
        kind: "unpatched", "uniform", "random" or "method". label: of the table. tokens: the budget, None for all.
        method: None runs the model as it is. frames: of a clip that are shown.
        scores: of frames: "equal", "clip", or None where they do not matter.
        inside: whether tokens go inside the language model, not before it.
    """

    kind: str
    label: str
    tokens: int | None
    method: Method | None = None
    frames: int = 0
    scores: str | None = None
    inside: bool = False

    @property
    def key(self) -> str:
        return f"{self.label} {self.tokens}"

    def numbered(self, number: int) -> Method | None:
        """The method for batch `number`: random subsets are drawn anew for each batch."""
        if self.kind != "random" or self.method is None:
            return self.method
        return self.method.replace(seed=self.method.seed + number)  # type: ignore[attr-defined]


# -- what was asked for ------------------------------------------------------------------------------------------------


def refuse(options: BenchOptions, task: str, *unused: str) -> None:
    """Refuse options that a task has no use for."""
    for name in unused:
        if getattr(options, name) is not None:
            raise InvalidParameterError(f"--{name}: the task {task} does not take it")


def load(function: Callable[[Path], Any], given: Path | None, bundled: Path, *files: str) -> tuple[Any, dict[str, Any]]:
    """``function(folder)`` of bundled or given weights, and where they come from.

    Raises:
        FileNotFoundError: the folder lacks the weights or one of `files` (without a config, transformers would build
            a model of its default size). InvalidParameterError: they cannot be read.
    """
    folder = given or bundled
    path = folder / "model.safetensors"
    for needed in (*(folder / name for name in files), path):
        if not needed.is_file():
            raise FileNotFoundError(f"no weights of such a model in {folder}: {needed.name} is missing")
    try:
        found = function(folder)
    except Exception as error:
        raise InvalidParameterError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return found, {"file": str(folder) if given else f"{folder.name}/{path.name}", "sha256": digest}


def machine(options: BenchOptions) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "processor": platform.machine(),
        "accuracy_threads": options.threads,
        "speed_threads": torch.get_num_threads(),
        "speed_pairs": options.rounds,
        "decoded_tokens": DECODED,
    }


def prompt_info(model: nn.Module, inputs: Mapping[str, Any]) -> PromptInfo:
    """A prompt in numbers, from what the processor returned for it."""
    from tokred.adapters.registry import find_host

    return find_host(model).describe_prompt(inputs)  # type: ignore[attr-defined]


def choosers(layout: MediaLayout) -> list[str]:
    """Names of the methods that shorten such an image or video to a budget, random choice apart."""
    found = {name: cls for name, cls in registered().items() if issubclass(cls, VisualMethod) and _has_budget(cls)}
    found.pop("random_tokens", None)
    return [name for name, cls in found.items() if not cls(budget=1).bypasses(layout)]  # type: ignore[call-arg]


def _has_budget(cls: type) -> bool:
    return "budget" in {field.name for field in fields(cls)}


def check_methods(
    options: BenchOptions, default: Sequence[str], known: Sequence[str], control: str | None = "random_tokens"
) -> list[str]:
    """The methods asked for; they and those of --set must be known. The control is there in any case."""
    names = [name for name in options.methods or default if name != control]
    for name in names:
        if name not in known:
            raise UnknownMethodError(f"--methods {name}{nearest(name, known)}; there are: {', '.join(known)}")
    settable = [*names, control] if control else names
    for name in options.parameters:
        if name not in settable:
            raise InvalidParameterError(f"--set {name}...: the methods here are {', '.join(settable)}")
    return names


def visual_method(name: str, tokens: int, options: BenchOptions, **further: Any) -> VisualMethod:
    """The method `name` with a budget of `tokens` and the parameters of --set."""
    parameters = options.parameters.get(name, {})
    fixed = [key for key in ("budget", "keep_rate", "counts", "scorer", *further) if key in parameters]
    if fixed:
        raise InvalidParameterError(f"--set {name}.{fixed[0]}: is set by the benchmark; set other parameters")
    return registered()[name](budget=tokens, **parameters, **further)  # type: ignore[call-arg, return-value]


# -- answers -----------------------------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """Of one row, question by question.

    Attributes:
        right: (N,) bool, answered right. tokens: (N,) int64, visual tokens left at the end.
        read, entered: (N,) visual tokens that a layer of the language model read, on average, and that entered it.
    """

    right: Tensor
    tokens: Tensor
    read: Tensor
    entered: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Answered]) -> Answered:
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))


@contextlib.contextmanager
def patched(model: nn.Module, method: Method | None, processor: Any) -> Iterator[Patch | None]:
    """The model under a method, or as it is."""
    if method is None:
        yield None
        return
    with patch(model, method, processor=processor) as handle:
        yield handle


def ask(model: Any, processor: Any, inputs: Mapping[str, Any], handle: Patch | None) -> tuple[list[str], list[int]]:
    """What greedy `generate` answers to each prompt, and how many visual tokens were left of each (none: all were)."""
    from tokred.zoo import answer_text

    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    words = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    left = [] if handle is None else [step.tokens_out for step in handle.trace.media]
    return [answer_text(word) for word in words], left


def judged(words: Sequence[str], answers: Sequence[str], left: Sequence[int], all_tokens: int) -> Answered:
    """Compare words exactly; all layers read the tokens that are `left` (none: all were)."""
    right = [word == answer for word, answer in zip(words, answers, strict=True)]
    tokens = torch.tensor(left or [all_tokens] * len(right))
    return Answered(torch.tensor(right), tokens, tokens, tokens)


@contextlib.contextmanager
def remembered(tower: nn.Module, memory: dict[Any, tuple[Tensor, Any]]) -> Iterator[None]:
    """Answer repeated calls of a vision tower from `memory`, so that rows that see the same frames encode them once.

    Not for methods that look into the tower: its layers do not run again.
    """
    forward = tower.forward

    @functools.wraps(forward)
    def recall(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = memory.get(pixel_values.shape)
        if known is None or not torch.equal(known[0], pixel_values):
            known = memory[pixel_values.shape] = (pixel_values, forward(pixel_values, *args, **kwargs))
        return known[1]

    tower.forward = recall  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tower.forward


def scores(right: Tensor, kinds: Sequence[str], groups: Tensor | None) -> dict[str, Any]:
    """Accuracy with its standard error (`groups`: see `vision.mean`), and the same of each kind of question."""
    whole = mean(right, groups)
    found: dict[str, Any] = {"accuracy": whole.value, "accuracy_se": whole.error, "kinds": {}}
    for kind in dict.fromkeys(kinds):
        own = torch.tensor([one == kind for one in kinds])
        part = mean(right[own], None if groups is None else groups[own])
        found["kinds"][kind] = {"accuracy": part.value, "accuracy_se": part.error, "questions": int(own.sum())}
    return found


def settings(rows: Sequence[Mapping[str, Any]], told: Sequence[str] = ()) -> list[str]:
    """Lines that say which parameters of methods are not their defaults, budgets, seeds and those `told` apart."""
    changed: dict[str, None] = {}
    for row in rows:
        text = changed_settings(row["method"], told)
        if text:  # there may be several rows of a method inside
            label = row["label"] if row.get("inside") else registered()[row["method"]["method"]].title
            changed[f"{label}: {text}"] = None
    return textwrap.wrap(f"settings: {'; '.join(changed)}", 118) if changed else []


def changed_settings(record: Mapping[str, Any] | None, told: Sequence[str] = ()) -> str:
    """Parameters of a method's record that are not defaults, its budget, its seed and those `told` apart.

    "" of an unreduced model and of the benchmark's own controls.
    """
    if record is None or record["method"] not in registered():
        return ""
    method = from_dict(record)
    budget = budget_field(method.name)
    names = [field.name for field in fields(method)]  # type: ignore[arg-type]
    usual = type(method)(**{budget: getattr(method, budget)} if budget else {})
    own = {key: getattr(method, key) for key in names if key not in ("seed", budget, *told)}
    return ", ".join(f"{key}={value!r}" for key, value in own.items() if value != getattr(usual, key))


# -- time and memory ---------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of `generate`: seconds to the first token, and tokens a second after it."""

    first: float
    rate: float


class _Clock:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_call(model: Any, inputs: Mapping[str, Any]) -> Call:
    """Time `generate` on prepared inputs, as they come from the processor."""
    clock, count = _Clock(), DECODED + 1
    start = time.perf_counter()
    model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count, streamer=clock)
    _, first, *later = clock.times
    return Call(first - start, len(later) / (later[-1] - first))


def cache_bytes(model: Any, inputs: Mapping[str, Any]) -> int:
    """Bytes of keys and values in the cache that `generate` returns behind the prefill."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=1, return_dict_in_generate=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)


def serving(pairs: Sequence[tuple[Call, Call]], cache: int) -> dict[str, Any]:
    """Medians of timed (reference, row) pairs."""
    speedup, low, high = ratio([(plain.first, reduced.first) for plain, reduced in pairs])
    return {
        "ttft_ms": 1000 * statistics.median(reduced.first for _, reduced in pairs),
        "speedup": speedup,
        "speedup_quartiles": [low, high],
        "decode_tokens_per_s": statistics.median(reduced.rate for _, reduced in pairs),
        "cache_bytes": cache,
    }


def report(
    results: Mapping[str, Any],
    title: str,
    header: Sequence[str],
    cells: Callable[[Mapping[str, Any], Sequence[str]], list[str]],
    legend: str,
    told: Sequence[str] = (),
) -> str:
    """The table of a task, rows of one level together, with what its columns mean and the settings of its methods.

    `told` are parameters that the table shows itself.
    """
    kinds = list(results["rows"][0].get("kinds", ()))
    groups: dict[Any, list[list[str]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["level"], row.get("inside")), []).append(cells(row, kinds))
    lines = [title, "", table(header, list(groups.values())), "", *textwrap.wrap(legend, 118)]
    return "\n".join(lines + settings(results["rows"], told))
