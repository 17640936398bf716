"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import tokred
from tokred.core.patch import OPTIONS, patch

DOCS = Path(__file__).resolve().parent.parent / "docs"
LIBRARIES = ("timm", "open_clip", "transformers", "diffusers")


@pytest.mark.skipif(
    any(importlib.util.find_spec(library) is None for library in LIBRARIES),
    reason="the page lists the families of every model library; install tokred[all]",
)
def test_the_hosts_page_is_what_the_code_says():
    from tokred.eval.hosts_page import hosts_page

    page = hosts_page()
    assert (DOCS / "hosts.md").read_text(encoding="utf-8") == page, "docs/hosts.md is old; run: make docs-hosts"
    for host in tokred.hosts():
        section = page.split(f"## {host.family}\n")[1].split("\n## ")[0]
        assert f"Refused: {len(host.refusals)}." in section
        assert all(f"`{name}`" in section for name in (*host.classes, *host.sites, *host.options, *host.refusals))
        assert all(reason.replace("|", "\\|") in section for reason in host.refusals.values())


def test_the_page_leaves_out_what_others_registered():
    from dataclasses import dataclass

    from tokred.core import method as registry
    from tokred.eval.hosts_page import hosts_page

    before = hosts_page()

    @dataclass(frozen=True, repr=False)
    class Foreign(registry.VisualMethod):
        name = "foreign"
        title = paper = "of another package"

    try:
        assert hosts_page() == before
    finally:
        del registry._REGISTRY["foreign"]


def test_every_option_of_patch_has_a_meaning_and_a_host():
    assert set().union(*(host.options for host in tokred.hosts())) == set(OPTIONS)
    assert all(name in patch.__doc__ for name in OPTIONS)
