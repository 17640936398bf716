"""What the commands of `tokred eval` share: how they are added, --method, and how their results are printed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["add_method", "add_task", "default_out", "methods", "print_results"]


def add_task(tasks: Any, common: argparse.ArgumentParser, name: str, run: Any, short: str, text: str) -> Any:
    """Add a task to `tokred eval`; errors name it whole."""
    from tokred.cli_common import add_command

    made = add_command(tasks, common, name, run, short, text)
    made.set_defaults(command=f"eval {name}")
    return made


def add_method(made: argparse.ArgumentParser, default: str) -> None:
    """Add --method, the same for all tasks. `default`: what is measured without it."""
    made.add_argument(
        "--method",
        dest="methods",
        action="append",
        metavar='"METHOD KEY=VALUE ..."',
        help='a row of the table: a method (see: tokred list) and its parameters; "hired budget=0.2|0.4" makes two; '
        f"may be repeated; the unpatched model is a row in any case (default: {default})",
    )


def methods(given: argparse.Namespace) -> list[tuple[str, Mapping[str, Any]]] | None:
    """The runs of --method; None without it."""
    from tokred.eval.runs import parse_runs

    return None if given.methods is None else parse_runs(given.methods)


def default_out(task: str, name: str) -> Path:
    """outputs/eval-TASK-NAME, where --out does not say."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return Path("outputs") / f"eval-{task}-{safe}"


def print_results(given: argparse.Namespace, results: dict[str, Any] | None, show: Any) -> None:
    """JSON, or what `show` makes of the results and where they were written; nothing where another process prints."""
    from tokred.cli_common import written
    from tokred.eval.report import dumps

    if results is None:
        return
    if given.json:
        print(dumps(results))
        return
    print(show(results))
    written(results)
