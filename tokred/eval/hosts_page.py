"""The page docs/hosts.md, made from the records of methods and hosts.

``python -m tokred.eval.hosts_page > docs/hosts.md`` (``make docs-hosts``) writes it. What a family serves and refuses
stands in its adapter and nowhere else; a test compares the page with this text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tokred.core.catalog import HostRecord, MethodRecord, compatibility, hosts, methods
from tokred.core.method import registered
from tokred.core.sites import SITES

__all__ = ["hosts_page"]

_HEAD = """\
# Hosts

Which models tokred serves, what it refuses and why, and which method fits which family. This page is made from the
code: `make docs-hosts` writes it, a test compares it.

A *host* is a family of models, recognised by its classes; a model that holds one such part (a classifier, a pipeline's
encoder) is served too. A *site* is a place where tokens can be reduced:
"""


def hosts_page() -> str:
    """The page as Markdown; methods that other packages registered are left out."""
    known = registered()
    own = [record for record in methods() if known[record.name].__module__.startswith("tokred.")]
    families = hosts()
    parts = [
        _HEAD + "\n".join(f"\n- `{site}`: {where}." for site, where in SITES.items()).replace("\n\n", "\n"),
        _fits(own, families),
        _options(families),
        *(_family(record) for record in families),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _fits(records: Sequence[MethodRecord], families: Sequence[HostRecord]) -> str:
    """The table of methods and families."""
    fits = compatibility()
    rows: list[list[str]] = [["method", "acts at", *(f.family for f in families)], ["---"] * (2 + len(families))]
    for record in records:
        marks = ["yes" if fits[record.name][family.family] else "" for family in families]
        rows.append([f"[`{record.cls}`](methods/{record.name}.md)", ", ".join(record.sites), *marks])
    refused = sum(len(family.refusals) for family in families)
    text = (
        "A method fits a family that has its sites. What one model lacks beside them (a class token, say) is a named "
        f"error when it is patched. In all, {refused} things are refused by name."
    )
    return "\n".join(["## Methods and families", "", _wrap(text), "", *(_row(row) for row in rows)])


def _options(families: Sequence[HostRecord]) -> str:
    """The table of options of `tokred.patch`, which mean the same wherever a family has them."""
    meanings = {name: meaning for family in families for name, meaning in family.options.items()}
    rows = [_row([f"`{name}`", meaning]) for name, meaning in meanings.items()]
    return "\n".join(["## Options", "", "| option of `tokred.patch` | meaning |", "| --- | --- |", *rows])


def _family(record: HostRecord) -> str:
    """One section."""
    lines = [
        f"## {record.family}",
        "",
        _wrap(f"Classes: {_names(record.classes)}."),
        "",
        _wrap(f"Sites: {_names(record.sites)}. Options: {_names(list(record.options)) or 'none'}."),
        "",
        f"Refused: {len(record.refusals)}.",
    ]
    if record.refusals:
        lines += ["", "| refused | why |", "| --- | --- |"]
        lines += [_row([f"`{name}`", reason]) for name, reason in record.refusals.items()]
    return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


if __name__ == "__main__":
    print(hosts_page(), end="")
