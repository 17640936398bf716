"""`tokred bench --all`: one page and one JSON that say the same, every method on them, and nothing from elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

import tokred
from tests.browser import browser, visit  # noqa: F401 (browser is a fixture)
from tokred import cli
from tokred.core.catalog import compatibility
from tokred.core.errors import InvalidParameterError
from tokred.core.method import registered
from tokred.eval import leaderboard
from tokred.eval.bench import BenchOptions, MissingExtraError, Progress
from tokred.eval.leaderboard import Part
from tokred.eval.leaderboard_page import page, svg
from tokred.eval.leaderboard_sections import mark_best
from tokred.eval.report import Curve, Look, accuracy_figure
from tokred.vision.backbones.compare import compare
from tokred.zoo.digit_backbones import bundled_runs


@dataclass
class Made:
    folder: Path
    printed: dict[str, Any]
    results: dict[str, Any]
    html: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The dry run, once."""
    folder, said = tmp_path_factory.mktemp("bench") / "all", io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(["bench", "--all", "--fast", "--json", "--threads", "1", "--out", str(folder)])
    assert code == 0
    results = json.loads((folder / "leaderboard.json").read_text())
    return Made(folder, json.loads(said.getvalue()), results, (folder / "leaderboard.html").read_text())


@dataclass
class Page(HTMLParser):
    """Rows of the tables by section, addresses, ids, and references to ids."""

    html: str
    rows: dict[str, list[list[str]]] = field(default_factory=dict)
    best: dict[str, list[bool]] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    section: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._cell: list[str] | None = None
        self._row = False
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[key] for key in ("src", "href", "srcset", "action", "data") if key in given]
        if tag == "section":
            self.section = given["id"]
            self.rows[self.section], self.best[self.section] = [], []
        elif tag == "tr":
            self._row = given.get("class", "").startswith("row")  # no heading, no name of a group
            if self._row:
                self.rows[self.section].append([])
                self.best[self.section].append(False)
        elif tag in ("td", "th") and self._row:
            self._cell = []
        elif tag == "span" and given.get("class") == "star" and self._cell is not None:
            self.best[self.section][-1] = True

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            text = "".join(self._cell).strip()
            self.rows[self.section][-1].append(text.removesuffix("★").strip())
            self._cell = None
        elif tag == "tr":
            self._row = False


def sections_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [section for part in results["parts"] for section in part["sections"]]


# -- the dry run -------------------------------------------------------------------------------------------------------


def test_json_is_printed_and_written(made: Made) -> None:
    assert made.printed == made.results
    assert made.results["failed"] == {}
    assert made.results["fast"] is True
    assert sorted(path.name for path in made.folder.iterdir()) == ["leaderboard.html", "leaderboard.json"]
    assert made.results["files"] == {
        "page": str(made.folder / "leaderboard.html"),
        "results": str(made.folder / "leaderboard.json"),
    }


def test_page_has_the_rows_of_the_json(made: Made) -> None:
    found = Page(made.html)
    sections = sections_of(made.results)
    assert list(found.rows) == [section["name"] for section in sections]
    for section in sections:
        assert found.rows[section["name"]] == [row["cells"] for row in section["rows"]], section["name"]
        assert all(len(row["cells"]) == len(section["header"]) for row in section["rows"])
        assert found.best[section["name"]] == [row["best"] for row in section["rows"]]


def test_every_method_is_on_the_page(made: Made) -> None:
    names = {name for name, cls in registered().items() if cls.__module__.startswith("tokred.")}  # none of other tests
    assert {"tome", "evs", "random_tokens", "todo", "gemfilter"} < names <= set(made.results["methods"])
    assert names <= {method.name for method in tokred.methods()}
    found = Page(made.html)
    for name in names:
        entry = made.results["methods"][name]
        assert entry["absent"] is None, name
        rows = [row for s in sections_of(made.results) if s["name"] in entry["sections"] for row in s["rows"]]
        mine = [row for row in rows if row.get("method") == name]
        assert len({row["label"] for row in mine}) >= 1
        shown = [cells for where in entry["sections"] for cells in found.rows[where]]
        assert all(row["cells"] in shown for row in mine)


#: Methods that fit a bundled model and that no part runs on it.
LEFT_OUT = {
    "digit-clip": {"random_tokens", "tome", "topk", "zero_tprune"},
    "digit-vlm, images": {"tome", "topk", "zero_tprune"},
    "digit-video-vlm, clips": {"tome", "topk", "zero_tprune", "mustdrop"},
}


@pytest.mark.parametrize("model", leaderboard.MODELS, ids=lambda model: model.name)
def test_every_method_that_fits_a_model_is_measured_on_it_or_said_to_be_left_out(
    made: Made, model: leaderboard.Model
) -> None:
    measured_, fits = set(), set()
    for name, method in made.results["methods"].items():
        own = method["models"][model.name]
        rows = {
            section["name"]
            for part in made.results["parts"]
            if part["name"] in model.parts
            for section in part["sections"]
            if any(row.get("method") == name for row in section["rows"])
        }
        assert rows == (set() if isinstance(own, str) else set(own)), name
        if own == "fits":
            fits.add(name)
        elif own == "no":
            only_videos = name in ("evs", "quota") and model.media == "image"
            assert only_videos or not compatibility()[name][model.family], name
        else:
            assert compatibility()[name][model.family]
            measured_.add(name)
    assert fits & set(tokred_methods()) == LEFT_OUT.get(model.name, set())
    assert bool(measured_) == bool(model.parts)


def tokred_methods() -> list[str]:
    return [name for name, cls in registered().items() if cls.__module__.startswith("tokred.")]


def test_table_of_methods_and_models_is_on_the_page(made: Made) -> None:
    table = made.html[made.html.index('<table class="methods">') :].partition("</table>")[0]
    heads, *rows = re.findall(r"<tr>(.*?)</tr>", table)
    assert re.findall(r"<th[^>]*>(.*?)</th>", heads) == ["method", *(model.name for model in leaderboard.MODELS)]
    told = {"fits": "fits, not run", "no": "–"}
    for row, method in zip(rows, made.results["methods"].values(), strict=True):
        assert method["title"] in row
        for cell, own in zip(re.findall(r"<td.*?>(.*?)</td>", row), method["models"].values(), strict=True):
            if isinstance(own, str):
                assert cell == told[own]
            else:
                assert re.findall(r'href="#([^"]+)"', cell) == own


def test_every_bundled_backbone_and_tokenizer_is_on_the_page(made: Made) -> None:
    labels = {row.get("label", "") for section in sections_of(made.results) for row in section["rows"]}
    for folder in bundled_runs():
        assert any(label.startswith(folder.name) for label in labels), folder.name
    names = {section["name"] for section in sections_of(made.results)}
    from tokred.eval.bench_tokenize import EXPERIMENTS

    assert {f"tokenize-{name}" for name in EXPERIMENTS} <= names


def test_accuracies_have_standard_errors_and_paired_differences(made: Made) -> None:
    compared = 0
    for section in sections_of(made.results):
        for row in section["rows"]:
            if row.get("kind") == "method" and section["name"] != "diffusion":
                assert 0 <= row["accuracy"] <= 1
                assert {"difference", "se", "significant"} == set(row["difference"])
                assert row["speedup"] > 0
                compared += 1
    assert compared > 20
    assert all(row.get("accuracy") is None for row in sections_of(made.results)[-1]["rows"])  # random weights


def test_plots_hold_the_points_of_the_rows(made: Made) -> None:
    plotted = [section for section in sections_of(made.results) if section["plot"] is not None]
    assert {"vit", "vqa", "vqa-inside", "video", "needle", "backbones", "tokenize-reconstruct"} == {
        section["name"] for section in plotted
    }
    for section in plotted:
        key = "gmacs" if section["name"] in ("vit", "backbones") else "tokens"
        for line in section["plot"]["lines"]:
            if section["name"].startswith("tokenize"):
                continue
            mine = [row for row in section["rows"] if row["label"] == line["label"]]
            points = {(row[key], row["accuracy"]) for row in mine}
            assert {(x, y) for x, y, _ in line["points"]} == points


def test_heading_says_what_was_measured_where(made: Made) -> None:
    head = made.html[: made.html.index("<section")]
    machine = made.results["machine"]
    for text in (tokred.__version__, machine["torch"], "seed 777", made.results["date"], "dry run", "7 billion"):
        assert text in head
    assert leaderboard.processor() in head.replace("&#x27;", "'")
    assert machine["accuracy_threads"] == 1
    seconds = [part["seconds"] for part in made.results["parts"]]
    assert made.results["seconds"] == pytest.approx(sum(seconds), abs=0.1)


def test_page_needs_nothing_from_elsewhere(made: Made) -> None:
    found = Page(made.html)
    assert found.addresses
    assert all(address.startswith(("#", "data:image/", "data:,")) for address in found.addresses)
    assert "http" not in re.sub(r"http-equiv|data:image/\w+;base64,[^\"]*", "", made.html)
    assert "@import" not in made.html
    assert re.findall(r"url\((?!#)", made.html) == []
    assert str(made.folder) not in made.html  # no path of this machine


def test_ids_are_unique_and_links_lead_somewhere(made: Made) -> None:
    found = Page(made.html)
    assert len(found.ids) == len(set(found.ids))
    aims = {address[1:] for address in found.addresses if address.startswith("#")}
    aims |= set(re.findall(r"url\(#([^)]+)\)", made.html))
    assert aims <= set(found.ids)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_page_opens_from_the_disk(made: Made, browser: Any, width: int, dark: bool) -> None:  # noqa: F811
    with visit(browser, width, dark=dark) as seen:
        seen.page.goto((made.folder / "leaderboard.html").as_uri())
        assert seen.overflow() <= 0
        assert seen.errors == []
        assert [url[:40] for url in seen.outside] == []
        assert seen.page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        light = seen.page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        )
        assert (light < 200) == dark
        text = seen.page.eval_on_selector("#vit .plot svg text", "text => getComputedStyle(text).fill")
        assert text == seen.page.evaluate("getComputedStyle(document.body).color")


@pytest.mark.browser
def test_columns_sort_inside_their_budget(made: Made, browser: Any) -> None:  # noqa: F811
    section = next(s for s in sections_of(made.results) if s["name"] == "vqa")
    column = section["header"].index("GMACs")
    expected = sorted((row["gmacs"] for row in section["rows"] if row["group"]), reverse=True)
    with visit(browser) as seen:
        seen.page.goto((made.folder / "leaderboard.html").as_uri())
        button = seen.page.locator("#vqa thead button").nth(column)
        cells = f"#vqa tbody:last-of-type tr.row > :nth-child({column + 1})"
        button.click()
        falling = [float(text) for text in seen.page.locator(cells).all_inner_texts()]
        button.click()
        rising = [float(text) for text in seen.page.locator(cells).all_inner_texts()]
        sorts = seen.page.locator("#vqa thead th").evaluate_all("all => all.map(th => th.getAttribute('aria-sort'))")
    assert falling == pytest.approx(expected, abs=6e-4)
    assert rising == falling[::-1]
    assert [sort for sort in sorts if sort] == ["ascending"]


# -- parts that fail, and runs that were cut short ---------------------------------------------------------------------


@dataclass
class Fake:
    """A part of one section with one picture, that counts its runs; `raises` comes up instead of a result."""

    name: str
    raises: BaseException | None = None
    label: str = "ToMe"
    runs: list[BenchOptions] = field(default_factory=list)

    def run(self, options: BenchOptions, progress: Progress) -> dict[str, Any]:
        self.runs.append(options)
        if self.raises is not None:
            raise self.raises
        Image.new("RGB", (8, 4)).save(options.out / "kept.png")
        return {"file": str(options.out / "kept.png")}

    def sections(self, results: Any) -> list[dict[str, Any]]:
        row = {
            "label": self.label,
            "method": "tome",
            "kind": "method",
            "group": "",
            "accuracy": 0.5,
            "accuracy_se": math.nan,
            "best": True,
            "cells": [self.label, "50.0"],
        }
        return [
            {
                "name": self.name,
                "title": self.label,
                "about": "What is measured.",
                "header": ["method", "accuracy %"],
                "rows": [row],
                "legend": "",
                "command": "tokred bench",
                "more": "More examples",
                "plot": None,
                "headline": "",
                "pictures": [{"file": results["file"], "caption": "a picture"}],
                "examples": 3,
                "what": "scenes",
                "split": "test",
                "seed": 777,
            }
        ]

    @property
    def part(self) -> Part:
        return Part(self.name, self.name, self.run, self.sections, scenes=7, rounds=3)


def measured(fakes: list[Fake], out: Path, **options: Any) -> dict[str, Any]:
    return leaderboard.run(BenchOptions(out, **options), Progress(quiet=True), parts=[fake.part for fake in fakes])


def test_failed_part_is_named_and_the_others_stay(tmp_path: Path) -> None:
    fakes = [Fake("one"), Fake("two", RuntimeError("a <b>bad</b>\nday"))]
    results = measured(fakes, tmp_path)
    assert results["failed"] == {"two": "RuntimeError: a <b>bad</b> day"}
    html = (tmp_path / "leaderboard.html").read_text()
    assert "RuntimeError: a &lt;b&gt;bad&lt;/b&gt; day" in html
    assert Page(html).rows == {"one": [["ToMe", "50.0"]]}
    assert results["methods"]["evs"]["absent"] == "not measured: two failed"
    assert results["methods"]["tome"]["absent"] is None
    assert "failed: RuntimeError" in leaderboard.show(results)

    fakes[1].raises = None  # the second call measures what is missing, and no more
    results = measured(fakes, tmp_path)
    assert [len(fake.runs) for fake in fakes] == [1, 2]
    assert [part["resumed"] for part in results["parts"]] == [True, False]
    assert results["failed"] == {}
    assert results["methods"]["evs"]["absent"] == "no bundled task runs it"
    assert not list(tmp_path.glob("part-*"))
    first = results["parts"][0]["date"]
    head = (tmp_path / "leaderboard.html").read_text().partition("<nav")[0]
    assert head.count("measured before") == 1
    assert f"one 0 s (measured before, {first})" in head
    assert f"measured before, {first}" in leaderboard.show(results)


def test_interrupted_run_goes_on_and_ends_with_the_same_page(tmp_path: Path) -> None:
    fakes = [Fake("one"), Fake("two", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        measured(fakes, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part-one.json"]
    fakes[1].raises = None
    results = measured(fakes, tmp_path)
    assert [len(fake.runs) for fake in fakes] == [1, 2]
    whole = measured([Fake("one"), Fake("two")], tmp_path / "whole")
    for part, other in zip(results["parts"], whole["parts"], strict=True):
        assert part["sections"] == other["sections"]
    rows = [Page((folder / "leaderboard.html").read_text()).rows for folder in (tmp_path, tmp_path / "whole")]
    assert rows[0] == rows[1] == {"one": [["ToMe", "50.0"]], "two": [["ToMe", "50.0"]]}


@pytest.mark.parametrize("other", [{"seed": 5}, {"split": "val"}, {"threads": 2}])
def test_part_of_another_run_is_measured_again(tmp_path: Path, other: dict[str, Any]) -> None:
    fakes = [Fake("one"), Fake("two", RuntimeError("no"))]
    measured(fakes, tmp_path)
    measured(fakes, tmp_path, **other)
    assert [len(fake.runs) for fake in fakes] == [2, 2]


@pytest.mark.parametrize("changed", ["_versions", "weights_digest"])
def test_part_of_other_libraries_or_weights_is_measured_again(
    tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [Fake("one"), Fake("two", RuntimeError("no"))]
    measured(fakes, tmp_path)
    other: Any = {"torch": "0"} if changed == "_versions" else "0" * 64
    monkeypatch.setattr(leaderboard, changed, lambda: other)
    measured(fakes, tmp_path)
    assert [len(fake.runs) for fake in fakes] == [2, 2]


def test_digest_covers_every_file_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = leaderboard.weights_digest.__wrapped__
    monkeypatch.setattr(leaderboard.zoo, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "weights" / "one").mkdir(parents=True)
    (tmp_path / "weights" / "one" / "model").write_bytes(b"a")
    (tmp_path / "weights" / "card").write_bytes(b"a")
    found = [digest()]
    (tmp_path / "weights" / "one" / "model").write_bytes(b"b")
    found.append(digest())
    (tmp_path / "weights" / "card").rename(tmp_path / "weights" / "other")
    found.append(digest())
    assert len(set(found)) == 3


def test_commands_have_the_seed_and_split_of_the_page(tmp_path: Path) -> None:
    found = []
    for number, other in enumerate(({}, {"seed": 5, "split": "val"})):
        results = measured([Fake("one")], tmp_path / str(number), **other)
        found.append(sections_of(results)[0]["command"])
    assert found == ["tokred bench", "tokred bench --seed 5 --split val"]
    html = (tmp_path / "1" / "leaderboard.html").read_text()
    assert "More examples: <code>tokred bench --seed 5 --split val</code>" in html


def test_memory_is_told(made: Made) -> None:
    assert made.results["peak_memory_bytes"] > 1e8
    assert f"{made.results['peak_memory_bytes'] / 1e9:.1f} GB at most" in made.html
    told = leaderboard.show(made.results).splitlines()
    memory = f"{made.results['peak_memory_bytes'] / 1e9:.1f} GB of memory at most"
    assert any(line.startswith("together ") and line.endswith(memory) for line in told)
    assert re.fullmatch("[0-9a-f]{64}", made.results["weights_sha256"])
    assert made.results["machine"]["libraries"]["torch"]


def test_damaged_part_is_measured_again(tmp_path: Path) -> None:
    fakes = [Fake("one"), Fake("two", RuntimeError("no"))]
    measured(fakes, tmp_path)
    kept = tmp_path / "part-one.json"
    kept.write_text(kept.read_text()[:-40])
    measured(fakes, tmp_path)
    assert len(fakes[0].runs) == 2


def test_parts_get_what_was_asked_for(tmp_path: Path) -> None:
    fake = Fake("one")
    leaderboard.run(
        BenchOptions(tmp_path, seed=5, split="val", threads=2), Progress(quiet=True), rounds=9, parts=[fake.part]
    )
    given = fake.runs[0]
    assert (given.scenes, given.seed, given.split, given.threads, given.rounds) == (7, 5, "val", 2, 9)
    assert given.out != tmp_path  # pictures go into the page


def test_words_of_others_are_escaped(tmp_path: Path) -> None:
    measured([Fake("one", label='<script>alert("x")</script>')], tmp_path)
    html = (tmp_path / "leaderboard.html").read_text()
    assert "<script>alert" not in html
    assert Page(html).rows == {"one": [['<script>alert("x")</script>', "50.0"]]}


# -- the command -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["bench", "--all", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--task", "vit"),
        ("--methods", "tome"),
        ("--levels", "0.5"),
        ("--scenes", "10"),
        ("--set", "tome.prop_attn=False"),
        ("--ablate", "zero_tprune"),
        ("--checkpoint", "weights.safetensors"),
        ("--context", "256"),
    ],
)
def test_all_refuses_what_is_of_one_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    said = refused(capsys, option, value, "--out", str(tmp_path / "out"))
    assert "--all" in said
    assert option in said
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rounds 0" in refused(capsys, "--rounds", "0")
    assert "--threads 0" in refused(capsys, "--threads", "0")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "--out", str(tmp_path / "file"))


def test_missing_package_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaderboard, "PACKAGES", (*leaderboard.PACKAGES, "no_such_package"))
    with pytest.raises(MissingExtraError):
        measured([Fake("one")], tmp_path / "out")
    said = refused(capsys, "--out", str(tmp_path / "out"))
    assert 'no_such_package; run: pip install "tokred[demo,diffusers]"' in said
    assert not (tmp_path / "out").exists()


def test_missing_package_is_said_where_nothing_is_installed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"for name in {leaderboard.PACKAGES!r}: sys.modules[name] = None\n"
        "from tokred.cli import main\n"
        "sys.exit(main(['bench', '--all']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "tokred bench --all needs timm, transformers" in done.stderr
    assert 'pip install "tokred[demo,diffusers]"' in done.stderr


def test_exit_code_says_that_a_part_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaderboard, "PARTS", [Fake("one").part, Fake("two", OSError("disk full")).part])
    assert cli.main(["bench", "--all", "--out", str(tmp_path), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == {"two": "OSError: disk full"}
    assert "two failed" in err.strip().splitlines()[-1]


def test_help_tells_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--all" in said
    assert "leaderboard.html" in said


# -- pieces ------------------------------------------------------------------------------------------------------------


def scored(*rows: tuple[str, str, float, float]) -> list[dict[str, Any]]:
    names = ("group", "kind", "accuracy", "accuracy_se")
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_best_are_within_one_standard_error_of_the_best_method() -> None:
    rows = scored(
        ("a", "random", 0.99, 0.01),
        ("a", "method", 0.80, 0.02),
        ("a", "method", 0.785, 0.5),
        ("a", "method", 0.77, 0.5),
        ("b", "model", 0.30, math.nan),
        ("b", "method", 0.29, 0.5),
        ("", "whole", 1.0, 0.0),
    )
    mark_best(rows)
    assert [row["best"] for row in rows] == [False, True, True, False, True, False, False]


def test_parts_need_no_two_names() -> None:
    names = [part.name for part in leaderboard.PARTS]
    assert len(names) == len(set(names))


def test_plot_has_its_own_ids_and_the_colours_of_the_page() -> None:
    points = [[16, 0.5, 0.1], [32, 0.7, None]]
    lines = [
        {"label": "FastV", "name": "fastv", "dashed": False, "points": points},
        {"label": "FastV, other", "name": "fastv", "dashed": False, "points": points},
        {"label": "Random", "name": None, "dashed": True, "points": points},
    ]
    plot = {"x": "tokens & more", "y": "accuracy", "whole": None, "lines": lines, "ticks": [16, 32]}
    first, second = svg(plot, "one"), svg(plot, "two")
    for drawn, name in ((first, "one"), (second, "two")):
        ids = re.findall(r'id="([^"]+)"', drawn)
        assert ids
        assert all(each.startswith(f"{name}-") for each in ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn)) == set(ids)
        assert "tokens &amp; more" in drawn
        assert "var(--ink)" in drawn
        assert "#0072b2" in drawn  # FastV's colour
        assert "#010203" not in drawn
        assert "xmlns" not in drawn
    assert svg(plot, "one") == first


def test_legend_below_covers_no_point() -> None:
    curves = [Curve(f"method number {i}", [(16, 0.1 * i, 0.01), (32, 0.1 * i, 0.01)]) for i in range(9)]
    figure = accuracy_figure(curves, (64, 0.9, 0.01), "tokens", "accuracy", look=Look(below=True))
    figure.draw_without_rendering()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert legend.y1 <= axes.y0
    assert len(figure.legends[0].get_texts()) == 10
    assert figure.axes[0].get_legend() is None


def test_backbones_side_by_side_measure_the_same() -> None:
    runs = bundled_runs()[1:2]  # its rows share one model and set its grid
    alone, together = (
        compare(runs, scenes=8, methods=(), grids=[(3, 3), (6, 6)], rounds=1, workers=workers) for workers in (1, 2)
    )
    flat = [[row for group in found["groups"] for row in group] for found in (alone, together)]
    for one, two in zip(*flat, strict=True):
        assert (one["accuracy"], one["gmacs"], one["setting"]) == (two["accuracy"], two["gmacs"], two["setting"])
    with pytest.raises(InvalidParameterError, match="workers"):
        compare(runs, workers=0)


def test_denoiser_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    from tokred.eval import leaderboard_diffusion

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    options = BenchOptions(tmp_path, rounds=1)
    first, second = (leaderboard_diffusion.run(options, Progress(quiet=True), side=16) for _ in range(2))
    assert torch.equal(torch.rand(4), expected)
    assert [row["gmacs"] for row in first["rows"]] == [row["gmacs"] for row in second["rows"]]


def test_page_of_nothing_is_a_page() -> None:
    machine = {"processor": "CPU", "cores": 1, "accuracy_threads": 1, "speed_threads": 1, "torch": "2", "python": "3"}
    facts = {
        "version": "0",
        "date": "now",
        "fast": False,
        "seed": 1,
        "split": "test",
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "peak_memory_bytes": None,
    }
    html = page({**facts, "machine": machine, "methods": {}, "failed": {}, "parts": []})
    assert Page(html).rows == {}
    assert html.startswith("<!doctype html>")
    assert "not known on this system" in html


@pytest.fixture(autouse=True)
def _no_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forgets --out writes here."""
    monkeypatch.chdir(tmp_path)
