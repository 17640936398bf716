"""`tokred bench`: the tasks that it knows, what they are given and what they give back.

A task is a module with ``run(options, progress) -> dict`` (the results, of JSON types, pictures already written) and
``show(results) -> str`` (the table). It is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tokred.core.errors import InvalidParameterError, TokredError, nearest

__all__ = ["TASKS", "BenchOptions", "MissingExtraError", "Progress", "Task", "require", "task"]


@dataclass(frozen=True)
class Task:
    """What `tokred bench --task` can measure, and its defaults.

    Attributes:
        module: where it is. about: what it measures. methods, level: what `--methods` and `--levels` mean there.
        levels, scenes: default. fast: levels and scenes of `--fast`.
        context: default of `--context`; None where it means nothing.
    """

    module: str
    about: str
    methods: str
    level: str
    levels: tuple[float, ...]
    scenes: int
    fast: tuple[tuple[float, ...], int]
    context: int | None = None


TASKS: dict[str, Task] = {
    "vit": Task(
        "tokred.eval.bench_vit",
        "the bundled digit-scene ViT under ToMe, Top-K and Zero-TPrune",
        methods="topk,zero_tprune,tome",
        level="costs, as shares of the unpatched GMACs",
        levels=(0.8, 0.65, 0.5),
        scenes=1000,
        fast=((0.65,), 50),
    ),
    "vqa": Task(
        "tokred.eval.bench_vqa",
        "the bundled LLaVA on questions about images, under every method that drops visual tokens before the language "
        "model or inside it",
        methods="all that act on images",
        level="shares of the 144 visual tokens",
        levels=(0.5, 0.25, 0.11),
        scenes=1000,  # at one level four minutes of one core
        fast=((0.25,), 50),
    ),
    "video": Task(
        "tokred.eval.bench_video",
        "the same weights on questions about clips: fewer frames, or more frames and fewer tokens of each",
        methods="evs,quota",
        level="visual tokens of a clip, in whole frames of 36",
        levels=(36, 72, 144),
        scenes=500,  # what four minutes on one core allow
        fast=((72,), 16),
    ),
    "needle": Task(
        "tokred.eval.bench_needle",
        "the bundled text model on questions about needles in a long prompt, of which it reads a part",
        methods="gemfilter",
        level="tokens of the prompt that are read",
        levels=(32, 64, 128),
        scenes=500,
        fast=((64,), 16),
        context=512,
    ),
    "tokenize": Task(
        "tokred.eval.bench_tokenize",
        "the bundled image tokenizers on held-out cards: what few tokens give back, what their generators draw",
        methods="reconstruct, generate, captions, grid, scales, questions, windows",
        level="tokens of a picture",
        levels=(1, 2, 4, 8, 16),
        scenes=200,
        fast=((1, 4), 16),
    ),
}


class MissingExtraError(TokredError, ImportError):
    """An optional package is not installed."""


@dataclass(frozen=True)
class BenchOptions:
    """What `tokred bench` was asked for. None leaves the choice to the task.

    Attributes:
        methods: by name. levels: see `Task.level`. scenes: held-out scenes, questions or clips.
        seed: of the scenes' sequence; random subsets are numbered from it too. split: "test" or "val".
        threads: for accuracy; speed is always measured on one. rounds: timed pairs for each row.
        parameters: {method: {parameter: value}}.
        ablate: a method to take apart instead. checkpoint: other weights of the task's model.
        context: tokens of a context.
        out: folder for pictures and results.json.
    """

    out: Path
    methods: Sequence[str] | None = None
    levels: Sequence[float] | None = None
    scenes: int | None = None
    seed: int = 777
    split: str = "test"
    threads: int = 1
    rounds: int = 5
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ablate: str | None = None
    checkpoint: Path | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("scenes", 2), ("seed", 0), ("threads", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidParameterError(f"--{name} {value}: expected at least {least}")

    def shares(self, of: str) -> tuple[float, ...]:
        """The levels of a task in which they are shares; None are given: (). Refuses what is outside (0, 1)."""
        for level in self.levels or ():
            if not 0 < level < 1:
                raise InvalidParameterError(f"--levels {level:g}: expected shares of the {of} in (0, 1)")
        return tuple(self.levels or ())

    def counts(self, of: str) -> tuple[int, ...]:
        """The levels of a task in which they are numbers; None are given: (). Refuses what is none."""
        for level in self.levels or ():
            if level < 1 or level != int(level):
                raise InvalidParameterError(f"--levels {level:g}: expected numbers of {of}")
        return tuple(map(int, self.levels or ()))

    def check_split(self) -> None:
        if self.split not in ("test", "val"):
            raise InvalidParameterError(f"--split {self.split}: expected test or val")


def task(name: str) -> ModuleType:
    """The module of a task."""
    if name not in TASKS:
        raise InvalidParameterError(f"no task {name!r}{nearest(name, TASKS)}; there are: {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name].module)


def require(extra: str, *packages: str, what: str) -> None:
    """Say at once what is missing, rather than minutes later.

    Raises:
        MissingExtraError: with the command that installs it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(f'{what} needs {", ".join(missing)}; run: pip install "tokred[{extra}]"')


class Progress:
    """Progress bars on stderr, one at a time, that may be advanced from several threads."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, label: str, total: int, unit: str) -> None:
        from tqdm import tqdm

        self.stop()
        shape = "{desc:<22}{percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"
        self._bar = tqdm(
            total=total, desc=label, unit=unit, file=sys.stderr, disable=self.quiet, bar_format=shape, mininterval=0.2
        )

    def advance(self, amount: int = 1) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.update(amount)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
