"""What the scripts in demos/ share: a picture to run on, a clock, and one line instead of a traceback."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from tokred.core.errors import TokredError
from tokred.eval.hub import impatient, unreachable, what_to_do

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["default_device", "failing_in_one_line", "gmacs", "photograph", "timed"]

Result = TypeVar("Result")


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def photograph(path: str | None = None) -> Image:
    """A picture file as RGB; None is a photograph of a cat that comes with scikit-image.

    Raises:
        FileNotFoundError, InvalidParameterError: no such file, or no picture. MissingExtraError: no scikit-image.
    """
    from tokred.eval.bench import require
    from tokred.eval.token_files import open_picture

    if path is None:
        require("demo", "skimage", what="the picture of a cat (or give --image)")
        import skimage.data  # the file lies in its wheel; its own loader may ask the network

        path = str(Path(str(skimage.data.__file__)).parent / "chelsea.png")
    return open_picture(path).convert("RGB")


def timed(call: Callable[[], Result], repeats: int = 1) -> tuple[Result, float]:
    """What a call returns, and its seconds: the median of `repeats`, after one call that is not counted.

    Work on a GPU is waited for.
    """
    seconds = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        found = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds[1:])


def gmacs(model: object, inputs: object = None) -> str:
    """Multiply-adds as `tokred.flops` counts them, with the unit; "GMACs unknown" where it cannot."""
    import tokred

    try:
        return f"{tokred.flops(model, inputs).total / 1e9:,.4g} GMACs"
    except TokredError:
        return "GMACs unknown"


@contextmanager
def failing_in_one_line(model: str) -> Iterator[None]:
    """Turn what goes wrong inside into a line that says what to do, and exit code 1.

    That is: `model` is not to be had, from the hub or a folder; and everything that tokred refuses.
    """
    try:
        with impatient(model):
            yield
    except (TokredError, ImportError, OSError, ValueError, RuntimeError) as error:
        if unreachable(error):
            raise SystemExit(what_to_do(f"the model {model}", "give --model a folder with it")) from error
        line = textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
        raise SystemExit(line if isinstance(error, TokredError) else f"{type(error).__name__}: {line}") from error
