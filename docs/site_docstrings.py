"""Docstrings as the reference shows them: one entry for each name.

The code's docstrings save lines: two short entries may share one (`low: ... high: ...`), and several names one text
(`rows, columns: ...`). The parser of the site knows neither, so they are taken apart before it reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

HEADER = re.compile(r"^( *)(Attributes|Class attributes|Args|Raises):$")
NAME = r"\*{0,2}[A-Za-z_]\w*\*?"
FIRST = re.compile(rf"({NAME}(?:, {NAME})*): ")
FURTHER = re.compile(rf"(?<=[.;)\]] )({NAME}(?:, {NAME})*): ")
ROLE = re.compile(r":(?:mod|func|class|meth):(?=`)")
SHORT = 80  # characters of a text that each of its names gets; of a longer one the others refer to the first


class OneEntryEach(griffe.Extension):
    """Applies `entries` to every class and function."""

    def on_class(self, *, cls: Any, **_: Any) -> None:
        init = cls.members.get("__init__")
        parameters = init.parameters if init is not None and init.is_function else ()
        self.change(cls, {*cls.members, *(parameter.name for parameter in parameters)})

    def on_function(self, *, func: Any, **_: Any) -> None:
        self.change(func, {parameter.name for parameter in func.parameters})

    def on_module(self, *, mod: Any, **_: Any) -> None:
        self.change(mod, set())

    @staticmethod
    def change(obj: Any, names: set[str]) -> None:
        if obj.docstring is not None:
            obj.docstring.value = entries(obj.docstring.value, names)


def entries(text: str, names: set[str]) -> str:
    """A docstring with one entry a line in its sections of arguments and errors.

    `names`, and names of errors, may begin an entry inside another.
    """
    found: list[str] = []
    lines = ROLE.sub("", text).split("\n")
    while lines:
        line = lines.pop(0)
        header = HEADER.match(line)
        found.append(line.replace("Class attributes:", "Attributes:"))  # the parser does not know them
        if header:
            indent = len(header[1]) + 4
            block = []
            while lines and (len(lines[0]) - len(lines[0].lstrip()) >= indent or not lines[0].strip()):
                if not lines[0].strip() and not (lines[1:] and lines[1].startswith(" " * indent)):
                    break
                block.append(lines.pop(0))
            known = {*re.findall(r"\b\w+Error\b", " ".join(block))} if header[2] == "Raises" else names
            found += [entry for part in _parts(block, indent) for entry in _split(part, indent, known)]
    return "\n".join(found)


def _parts(block: list[str], indent: int) -> Iterator[str]:
    """Each entry of a section on one line, without its indent."""
    part = ""
    for line in block:
        begins = len(line) - len(line.lstrip()) == indent
        if part and begins:
            yield part
            part = ""
        part = f"{part} {line.strip()}".strip()
    if part:
        yield part


def _split(part: str, indent: int, names: set[str]) -> Iterator[str]:
    first = FIRST.match(part)
    if first is None:
        yield " " * indent + part
        return
    starts = [first, *(match for match in FURTHER.finditer(part) if set(match[1].split(", ")) <= names)]
    ends = [match.start() for match in starts[1:]] + [len(part)]
    for match, end in zip(starts, ends, strict=True):
        own, *others = match[1].split(", ")
        text = part[match.end() : end].strip()
        yield f"{' ' * indent}{own}: {text}"
        for other in others:
            yield f"{' ' * indent}{other}: {text if len(text) <= SHORT else f'see `{own}`.'}"
