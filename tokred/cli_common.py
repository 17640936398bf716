"""What the commands' modules share; light, as the command's help needs no other library."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any

__all__ = ["add_command", "written"]


def add_command(commands: Any, common: argparse.ArgumentParser, name: str, run: Any, short: str, text: str) -> Any:
    """Add the parser of a command.

    Args:
        common: options of all. run: called with what was parsed. short: a line for the list. text: for its help.
    """
    made = commands.add_parser(
        name,
        parents=[common],
        help=short,
        description=textwrap.dedent(text).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(run=run)
    return made


def written(results: Mapping[str, Any]) -> None:
    """Print how long it took, and the files there are."""
    print(f"\n{results['seconds']:.0f} s. Written:")
    for path in results["files"].values():
        print(f"  {path}")
