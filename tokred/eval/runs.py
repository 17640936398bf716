"""Rows of an evaluation as a command line writes them: ``--method "hired budget=0.2|0.4"``, once for each method.

Every command of `tokred eval` that patches a model reads them here.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from tokred.core.errors import InvalidParameterError
from tokred.core.method import Method, resolve
from tokred.core.patch import split_options

__all__ = ["Chosen", "Run", "choose", "drawn", "literal", "parse_runs", "redrawn"]

Run: TypeAlias = tuple[str, Mapping[str, Any]]  #: a method by name and its parameters (and options of `patch`)
EXAMPLE = 'such as "tome r=8" or "hired budget=0.2|0.4 alpha=0.5"'


class Chosen(NamedTuple):
    """One run, resolved.

    Attributes:
        label: names the row, with every parameter as it was given. options: of `patch`.
    """

    label: str
    method: Method
    options: dict[str, Any]


def literal(text: str) -> Any:
    """A Python literal (0.5, 3,6,9, None, {1: (10, 0.9)}; also true, false, none), else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def parse_runs(texts: Sequence[str]) -> list[Run]:
    """``["tome r=8|13", "topk keep_rate=0.7"]`` as three runs: a bar parts values, of which each makes a run.

    Raises:
        InvalidParameterError: a text is not a method and its parameters by name.
    """
    return [run for text in texts for run in _parse(text)]


def _parse(text: str) -> list[Run]:
    name, *given = re.split(r"\s+(?=[A-Za-z_]\w*\s*=)", text.strip())
    if re.fullmatch(r"[\w-]+[:,].*", name):
        raise InvalidParameterError(
            f"--method {text!r}: expected one method, and its parameters by name, {EXAMPLE}; say --method again for "
            "another"
        )
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise InvalidParameterError(f"--method {text!r}: expected METHOD KEY=VALUE ..., {EXAMPLE}")
    choices: dict[str, list[Any]] = {}
    for one in given:
        key, _, values = (part.strip() for part in one.partition("="))
        if key in choices:
            raise InvalidParameterError(f"--method {text!r}: {key} is there twice; a bar parts values: {key}=1|2")
        choices[key] = [literal(value.strip()) for value in values.split("|")]
        if "" in choices[key]:
            raise InvalidParameterError(f"--method {text!r}: {key} has no value; expected {EXAMPLE}")
    name = name.replace("-", "_")
    return [(name, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


def choose(run: Run) -> Chosen:
    """The method of a run.

    Raises:
        UnknownMethodError, UnknownParameterError, InvalidParameterError: with the nearest known name, or the range.
    """
    name, parameters = run
    options, rest = split_options(parameters)
    if "processor" in options:
        raise InvalidParameterError(f"--method {name}: processor is the model's own; leave it away")
    (method,) = resolve(name, rest)
    return Chosen(" ".join([method.name, *(f"{k}={_compact(v)}" for k, v in parameters.items())]), method, options)


def _compact(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_compact(item) for item in value) + ")"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_compact(item)}" for key, item in value.items()) + "}"
    return str(value)


def drawn(method: Method | None) -> bool:
    """Whether chance decides. An evaluation then draws anew for every batch (`redrawn`), whose items count as one."""
    return method is not None and (method.name == "random_tokens" or "random" in method.to_dict().values())


def redrawn(method: Method, number: int) -> Method:
    """The method for batch `number`: another seed where chance decides, else itself."""
    return method.replace(seed=method.seed + number) if drawn(method) else method  # type: ignore[attr-defined]
