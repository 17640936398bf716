"""What a person waits for in `tokred demo`: the start, the first paint, and a click on each tab.

    python benchmarks/demo.py [--threads 1] [--clicks 3] [--pictures DIR] [--dry-run] [--json]

Starts the demo, opens it in headless Chromium (of the system, driven by playwright) at the width of a desktop and of a
phone, and clicks on the examples of every tab, then, at the desktop's, on the slowest choices. A time runs from the
click to the
result on the page. The first paint is the time from opening the address to a page with its first button. Targets: first
paint 5 s, each click 10 s.
--pictures keeps a screenshot of each tab at both widths.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vit import machine

from tokred.demo.codes import TOKENIZERS
from tokred.demo.server import DemoOptions, start

WIDTHS = {"desktop": 1280, "phone": 390}
PAINT, CLICK = 5.0, 10.0  # targets in seconds
#: what is clicked: name -> (tabs to open, what is clicked, the result)
CLICKS = {
    "classify": (("Classify",), "examples", "classify"),
    "ask, picture": (("Ask", "about a picture"), "examples", "ask-image"),
    "ask, video": (("Ask", "about a video"), "examples", "ask-video"),
    "long text": (("Long text",), "Read and answer", "text"),
    "tokenize": (("Tokenize",), "examples", "tokenize"),
    "compare classifiers": (("Compare", "a classifier"), "examples", "compare-classify"),
    "compare answers": (("Compare", "a question about a picture"), "examples", "compare-ask"),
}
#: after its example: name -> (tab of the result, list and what is chosen of it, button); None ticks every method
CHOICES = {
    "classify": {"ToMe": ("Method", "ToMe", "Classify")},
    "ask, picture": {"MustDrop": ("Method", "MustDrop (in the LLM)", "Ask")},
    "ask, video": {"CDPruner": ("Method", "CDPruner", "Ask")},
    "tokenize": {name.partition(":")[0]: ("Tokenizer", name, "Tokenize") for name in list(TOKENIZERS.values())[1:]},
    "compare answers": {"all methods": (None, None, "Compare")},
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--clicks", type=int, default=3, help="examples of each tab (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="where screenshots go")
    parser.add_argument("--dry-run", action="store_true", help="one click a tab, at one width")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    if not 1 <= given.clicks <= 3:  # there are three clips
        parser.error(f"--clicks {given.clicks}: expected 1 to 3")
    found = measure(given.threads, 1 if given.dry_run else given.clicks, given.pictures, given.dry_run)
    print(json.dumps(found, indent=2) if given.json else shown(found))


def measure(threads: int, clicks: int, pictures: Path | None, dry: bool) -> dict[str, Any]:
    """Seconds of everything (JSON types)."""
    from playwright.sync_api import sync_playwright

    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        sys.exit(f"needs one of {', '.join(BROWSERS)} on the PATH, such as Debian's package chromium")
    began = time.perf_counter()
    running = start(DemoOptions(threads=threads))
    found: dict[str, Any] = {"machine": machine("cpu"), "start": time.perf_counter() - began}
    found |= {"paint": {}, "clicks": {name: {} for name in CLICKS}}
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
            for name, width in list(WIDTHS.items())[: 1 if dry else None]:
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.set_default_timeout(120_000)
                _visit(page, running.url, name, clicks, found, pictures)
                page.close()
            browser.close()
    finally:
        running.close()
    return found


def _visit(page: Any, url: str, width: str, clicks: int, found: dict[str, Any], pictures: Path | None) -> None:
    def opened() -> None:
        page.goto(url)
        page.get_by_role("button", name="Classify", exact=True).wait_for()

    found["paint"][width] = _seconds(opened)
    for name, (tabs, what, result) in CLICKS.items():
        for tab in tabs:
            page.get_by_role("tab", name=tab, exact=True).first.click()
        times = []
        for number in range(clicks):
            page.evaluate("id => document.querySelector(id + ' .tk-stack')?.remove()", f"#{result}-out")
            if what == "examples":
                place = page.locator(f"#{result}-examples tbody tr, #{result}-examples button.gallery-item").nth(number)
            else:
                place = page.get_by_role("button", name=what, exact=True)
            place.wait_for()
            times.append(_seconds(lambda place=place, result=result: _clicked(page, place, result)))
        found["clicks"][name][width] = times
        for label, (field, option, button) in (CHOICES.get(name, {}) if width == "desktop" else {}).items():
            _choose(page, field, option)
            page.evaluate("id => document.querySelector(id + ' .tk-stack')?.remove()", f"#{result}-out")
            place = page.get_by_role("button", name=button, exact=True).locator("visible=true").first
            taken = _seconds(lambda place=place, result=result: _clicked(page, place, result))
            found["clicks"].setdefault(f"{name}: {label}", {})[width] = [taken]
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=pictures / f"{width}-{result}.png", full_page=True)


def _choose(page: Any, field: str | None, option: str | None) -> None:
    if field is None:
        free = page.locator("input[type=checkbox]:not(:checked)").locator("visible=true")
        while free.count():
            free.first.check()
        return
    page.get_by_label(field, exact=True).locator("visible=true").first.click()
    page.get_by_role("option", name=option, exact=True).click()


def _clicked(page: Any, place: Any, result: str) -> None:
    place.click()
    page.wait_for_selector(f"#{result}-out .tk-stack")


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def shown(found: dict[str, Any]) -> str:
    """The table."""
    widths = list(found["paint"])
    lines = [
        found["machine"],
        f"start, models loaded: {found['start']:.1f} s",
        "",
    ]
    lines.append(f"{'seconds: median (most)':<30}" + "".join(f"{width:>18}" for width in widths) + "  target")
    paint = "".join(f"{found['paint'][width]:>18.2f}" for width in widths)
    met = max(found["paint"].values()) < PAINT
    lines.append(f"{'first paint':<30}{paint}  < {PAINT:g} {'met' if met else 'missed'}")
    for name, times in found["clicks"].items():
        own = [f"{statistics.median(times[w]):.2f} ({max(times[w]):.2f})" if w in times else "" for w in widths]
        cells = "".join(f"{cell:>18}" for cell in own)
        met = max(map(max, times.values())) < CLICK
        lines.append(f"{name:<30}{cells}  < {CLICK:g} {'met' if met else 'missed'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
