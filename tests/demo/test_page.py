"""The demo as a person uses it: every tab clicked in Chromium, at the width of a desktop and of a phone."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.browser import browser, visit  # noqa: F401 (a fixture)
from tokred.demo import recall

for package in ("gradio", "timm", "transformers", "torchvision", "open_clip", "diffusers", "sklearn", "skimage", "av"):
    pytest.importorskip(package)

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PATIENCE = 60_000  # ms: other work may share the cores
DESKTOP, PHONE = 1280, 390


@pytest.fixture(scope="module")
def demo(browser):  # noqa: F811 (no server where there is no browser)
    import torch

    from tokred.demo.server import DemoOptions, start

    before = torch.get_num_threads()
    running = start(DemoOptions(threads=1))
    yield running
    running.close()
    torch.set_num_threads(before)


class Person:
    """Someone at the page: opens tabs, clicks on examples, reads results."""

    def __init__(self, seen, url: str) -> None:
        from playwright.sync_api import TimeoutError

        self.timeout = TimeoutError
        self.seen, self.page = seen, seen.page
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(url)
        self.page.wait_for_selector("#classify-out")

    def open(self, *tabs: str) -> None:
        for tab in tabs:
            self.page.get_by_role("tab", name=tab, exact=True).first.click()

    def click(self, label: str) -> None:
        self.page.get_by_role("button", name=label, exact=True).locator("visible=true").first.click()

    def example(self, tab: str, number: int = 0) -> str:
        """Click on an example of a tab; the text of its result."""
        self.page.locator(f"#{tab}-examples tbody tr, #{tab}-examples button.gallery-item").nth(number).click()
        return self.result(tab)

    def result(self, tab: str) -> str:
        self.page.wait_for_selector(f"#{tab}-out .tk-stack")
        self.page.wait_for_selector(f"#{tab}-out .wrap.generating, #{tab}-out .progress-text", state="detached")
        assert self.seen.overflow() <= 0
        return self.page.locator(f"#{tab}-out").inner_text()

    def said(self, tab: str) -> list[str]:
        """Both answers."""
        return [one.inner_text() for one in self.page.locator(f"#{tab}-out .tk-said").all()]

    def pictures(self, tab: str) -> int:
        """Pictures of a result, all of which must have been drawn."""
        found = self.page.locator(f"#{tab}-out img")
        found.last.wait_for()
        assert all(found.evaluate_all("all => all.map(one => one.complete && one.naturalWidth > 0)"))
        return found.count()

    def give(self, area: str, path: Path, attempts: int = 3) -> None:
        """Upload a file by the dialogue that a click opens. One that is lost on busy cores is given again."""
        shown = self.page.locator(f"#{area}").get_by_text(path.name).first
        for attempt in range(attempts):
            with self.page.expect_file_chooser() as dialogue:
                self.page.locator(f"#{area} button").locator("visible=true").first.click()
            dialogue.value.set_files(path)
            try:
                shown.wait_for(timeout=PATIENCE / attempts)
                return
            except self.timeout:
                if attempt + 1 == attempts:
                    raise

    def message(self) -> str:
        """The message that comes up; it is closed."""
        toast = self.page.locator(".toast-body").last
        toast.wait_for()
        text = toast.inner_text()
        for close in self.page.locator(".toast-close").all():
            close.click()
        self.page.wait_for_selector(".toast-body", state="detached")
        return text


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def person(request, browser, demo):  # noqa: F811
    with visit(browser, width=request.param) as seen:
        someone = Person(seen, demo.url)
        yield someone
        assert not seen.outside, "a request left this machine"
        assert not seen.errors


def test_first_paint(browser, demo):  # noqa: F811
    with visit(browser) as seen:
        began = time.perf_counter()
        person = Person(seen, demo.url)
        assert person.page.get_by_role("button", name="Classify", exact=True).is_visible()
        assert time.perf_counter() - began < 30  # 5 s on an idle machine; benchmarks/demo.py measures it
        assert [tab.inner_text() for tab in person.page.get_by_role("tab").all()][:5] == [
            "Classify", "Ask", "Long text", "Tokenize", "Compare",
        ]  # fmt: skip


def test_examples_run_with_the_settings_of_the_form(browser, demo):  # noqa: F811
    with visit(browser, DESKTOP) as seen:
        person = Person(seen, demo.url)
        person.page.get_by_label("Method").locator("visible=true").first.click()
        person.page.get_by_role("option", name="ToMe").click()
        assert "tokred.patch(model, tokred.ToMe(r=9))" in person.example("classify")


def test_classify(person):
    text = person.example("classify")
    best = [bars.locator("span").first.inner_text() for bars in person.page.locator("#classify-out .tk-bars").all()]
    assert best == ["4", "4"]
    assert "multiply-adds" in text
    assert "0.244 G" in text
    assert "tokred.patch(model, tokred.ZeroTPrune(flops=0.6))" in text
    assert person.pictures("classify") == 5  # the input, and four blocks that drop
    person.click("Classify")
    person.result("classify")


def test_ask_about_a_picture(person):
    person.open("Ask")
    text = person.example("ask-image")
    assert person.said("ask-image") == ["2", "2"]
    assert re.search(r"visual tokens\s+144\s+36\s+25 %", text)
    assert "memory (cache)" in text
    assert "time to first word" in text
    assert person.pictures("ask-image") == 1


def test_ask_about_a_video(person):
    person.open("Ask", "about a video")
    text = person.example("ask-video")
    assert person.said("ask-video") == ["0", "0"]
    assert re.search(r"visual tokens\s+576\s+\d\d\s+1\d %", text)
    assert person.pictures("ask-video") == 1


def test_long_text(person):
    _, _, answer = recall.sample_text(0)
    person.open("Long text")
    person.click("Read and answer")
    text = person.result("text")
    assert person.said("text") == [answer, answer]
    assert re.search(r"tokens of the prompt\s+516\s+64\s+12 %", text)
    marked = person.page.locator("#text-out mark")
    assert marked.count() > 5
    assert person.page.locator("#text-out mark.tk-answer").first.inner_text() == answer
    _, _, other = recall.sample_text(1)
    person.click("Another text, another question")
    person.page.wait_for_function(
        "word => [...document.querySelectorAll('#text-out .tk-said')].some(one => one.innerText == word)", arg=other
    )
    assert other in person.page.locator("#text-right").inner_text()


def test_tokenize_and_decode(person, tmp_path):
    person.open("Tokenize")
    text = person.example("tokenize")
    assert re.search(r"8 tokens\s+10 bytes", text)
    assert "as much by JPEG" in text
    assert person.pictures("tokenize") == 7  # the card, back from 8, and from 1, 2, 4, 8, 16
    with person.page.expect_download() as download:
        person.page.locator("#token-file a[download]").first.click()
    path = tmp_path / "card.ftk"
    download.value.save_as(path)
    assert f"{path.stat().st_size}" in person.page.locator("#token-file").inner_text()
    person.page.get_by_text("Decode a token file").click()
    person.give("token-upload", path)
    person.click("Decode")
    person.page.wait_for_selector("#decode-out img")
    assert "8 tokens of flextok, decoded" in person.page.locator("#decode-out").inner_text()


def test_the_slider_follows_the_tokenizer(browser, demo):  # noqa: F811
    with visit(browser, DESKTOP) as seen:
        person = Person(seen, demo.url)
        person.open("Tokenize")
        slider = person.page.get_by_label("range slider for Tokens").locator("visible=true").first
        assert slider.get_attribute("max") == "16"
        person.page.get_by_label("Tokenizer", exact=True).click()
        person.page.get_by_role("option", name="TokenFlow: codes in scales").click()
        person.page.get_by_text("in scales: 1, 5, 21, 57, 121").wait_for()
        assert "121 tokens" in person.example("tokenize")


def test_compare(person):
    person.open("Compare")
    text = person.example("compare-classify")
    for title in ("as it is", "Top-K (EViT)", "Zero-TPrune", "ToMe", "Random"):
        assert title in text
    assert person.pictures("compare-classify") == 5
    person.open("a question about a picture")
    text = person.example("compare-ask")
    for title in ("CDPruner", "DivPrune", "HiRED", "Random", "FastV (in the LLM)", "GemFilter (in the LLM)"):
        assert title in text
    assert person.pictures("compare-ask") == 7


def test_what_goes_wrong_is_said(browser, demo, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(51 << 20)
    with visit(browser, DESKTOP) as seen:
        person = Person(seen, demo.url)
        page = person.page
        person.click("Classify")
        assert "there is no picture yet: upload one, or click on an example" in person.message()
        upload = page.locator("input[type=file]").first
        upload.set_input_files(tmp_path / "text.txt")
        assert "Only image/* allowed" in person.message()
        upload.set_input_files(tmp_path / "huge.png")
        assert "exceed the maximum allowed size of 50.0 Mb" in person.message()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "text.png")
        page.get_by_label("Remove Image").locator("visible=true").first.wait_for()
        person.click("Classify")
        assert "text.png cannot be read as a picture: expected PNG, JPEG" in person.message()
        page.get_by_label("Remove Image").locator("visible=true").first.click()
        person.example("classify")
        model = page.get_by_label("Model").locator("visible=true").first
        for name, what in (
            ("no-such-model", "no model 'no-such-model'"),
            ("deit_tiny_patch16_224", "the hub cannot be reached"),
        ):
            model.fill(name)
            model.press("Enter")
            person.click("Classify")
            assert what in person.message()
        assert person.said("classify") == []
        assert person.pictures("classify") == 5
        person.open("Ask")
        page.get_by_label("Question").locator("visible=true").first.fill("which digit is red ?")
        person.click("Ask")
        assert "there is no picture yet" in person.message()
        person.open("Tokenize")
        page.get_by_text("Decode a token file").click()
        person.give("token-upload", tmp_path / "text.png")
        person.click("Decode")
        assert "text.png" in person.message()
        person.open("Compare")
        ticked = page.locator("input[type=checkbox]:checked").locator("visible=true")
        while ticked.count():
            ticked.first.uncheck()
        page.locator("#compare-classify-examples button.gallery-item").nth(1).click()
        assert "no method is ticked" in person.message()
        assert not seen.outside
