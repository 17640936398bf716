"""Pages in headless Chromium, for tests marked `browser`: one browser a module, one `Visit` a page and width.

    from tests.browser import browser, visit  # noqa: F401 (browser is a fixture)

    @pytest.mark.browser
    def test_page(browser):
        with visit(browser, width=400) as seen:
            seen.page.goto(url)
            assert not seen.errors and not seen.outside and seen.overflow() <= 0

The tests are skipped, with the reason, where playwright or a Chromium of the system is missing: nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

__all__ = ["NAMES", "Visit", "browser", "launched", "visit"]

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """A page and what happened on it: errors of its console and scripts, addresses that it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def outside(self) -> list[str]:
        """Requests that leave this machine."""
        local = ("localhost", "127.0.0.1", "::1", None)  # None: file:, data:, blob:, about:
        return [url for url in self.requests if not url.startswith("blob:") and urlsplit(url).hostname not in local]

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window: 0 unless it scrolls sideways."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextmanager
def launched() -> Iterator[Any]:
    """A headless Chromium (playwright's Browser, sync API); skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright; run: pip install playwright")
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip(f"needs one of {', '.join(NAMES)} on the PATH")
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=binary, args=arguments)
        try:
            yield started
        finally:
            started.close()


@contextmanager
def visit(browser: Any, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Visit]:
    """An empty page of its own context (cookies, storage) whose errors and requests are written down."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    try:
        seen = Visit(context.new_page())
        seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        yield seen
    finally:
        context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """`launched`, one a module."""
    with launched() as started:
        yield started
