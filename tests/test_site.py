"""The documentation site: it builds without a warning, loads nothing from elsewhere, and its code runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tokred
from tests.browser import browser, visit  # noqa: F401  browser is a fixture
from tokred.cli import parser
from tokred.core import method as registry
from tokred.core.patch import check_free

pytest.importorskip("mkdocs", reason="the site needs MkDocs; run: pip install 'tokred[docs]'")
pytest.importorskip("material", reason="the site needs mkdocs-material; run: pip install 'tokred[docs]'")
pytest.importorskip("mkdocstrings", reason="the site needs mkdocstrings-python; run: pip install 'tokred[docs]'")

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
#: pages of what no patch call takes
MODELS = ("flextok", "textok", "tokenflow", "token_shuffle", "strip_mlp", "lookup_vit", "dualtoken_vit")
SECTIONS = ("When to take it", "What it computes", "Options", "Cost", "Measured here", "Paper says", "Limits")

#: code that needs a model of a hub or of a training run: its names are looked up, it is not run
ELSEWHERE = re.compile(r"from_pretrained\(|from_official\(|pretrained=|\bpipe\(|runs/")


def load(name: str) -> Any:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load("site_hooks")


def methods() -> list[Any]:
    """The classes of our own methods."""
    known = registry.registered()
    classes = [known[record.name] for record in tokred.methods()]
    return [cls for cls in classes if cls.__module__.startswith("tokred.")]


def text_of(page: str) -> str:
    """A page as MkDocs reads it."""
    return HOOKS.site_markdown((DOCS / page).read_text(encoding="utf-8"), page)


def code_of(page: str) -> list[str]:
    return [textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)^ *```", text_of(page), re.M | re.S)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. `strict` makes a warning an error; conftest.py refuses any other machine meanwhile."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in PAGES:
        html = (site / page).with_suffix(".html").read_text(encoding="utf-8")
        assert "<!-- measured:" not in html, page
        assert "<!-- section:" not in html, page
        assert "<p>:::" not in html, page
    for cls in methods():
        options = (site / f"methods/{cls.name}.html").read_text(encoding="utf-8")
        entries = re.findall(r"<b><code[^>]*>(?:<[^>]+>)*([a-z_0-9]+)", options)
        undocumented = {field.name for field in dataclasses.fields(cls)} - set(entries)
        assert not undocumented, (cls, undocumented)
    assert (site / "search/search_index.json").stat().st_size > 100_000


class Resources(HTMLParser):
    """Addresses that a browser asks for by itself; links that a reader may follow are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.found += [given[name] or "" for name in ("src", "srcset", "poster", "data") if name in given]
        if tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.found.append(given.get("href") or "")
        if tag == "base":
            self.found.append("base://")
        self.found += re.findall(r"url\(\s*['\"]?([^'\")]+)", given.get("style") or "")


def test_nothing_is_loaded_from_another_machine(site: Path) -> None:
    for path in site.rglob("*.html"):
        parser = Resources()
        html = path.read_text(encoding="utf-8")
        parser.feed(html)
        assert parser.found, path
        outside = [name for name in parser.found if "//" in name]
        assert not outside, (path.name, outside)
        assert 'class="mermaid"' not in html, "the theme fetches mermaid.js when a page has a diagram"
    styles = list(site.rglob("*.css"))
    assert styles
    for path in styles:
        sheet = path.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", sheet), path.name


def test_the_check_sees_resources() -> None:
    parser = Resources()
    parser.feed('<link rel="stylesheet" href="https://x/a.css"><a href="https://y"></a><img src="//z/b.png">')
    assert parser.found == ["https://x/a.css", "//z/b.png"]


def test_every_method_has_a_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (DOCS / "methods/index.md").read_text(encoding="utf-8")
    for name in (*(cls.name for cls in methods()), *MODELS):
        text = (DOCS / f"methods/{name}.md").read_text(encoding="utf-8")
        assert f"methods/{name}.md" in nav
        assert f"]({name}.md)" in index
        found = re.findall(r"^## (.+)$", text, flags=re.M)
        assert found == [part for part in SECTIONS if part in found], name
        assert set(SECTIONS) - set(found) <= ({"Paper says"} if name == "random_tokens" else set()), name
        assert len(text.splitlines()) <= 100, name
        parts = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
        assert "```text" in parts["What it computes"], name
        assert ":::" in parts["Options"], name
        assert "<!-- measured: " in parts["Measured here"], name
    for cls in methods():
        assert f"::: tokred.{cls.__name__}\n" in (DOCS / f"methods/{cls.name}.md").read_text()
        assert f"| [`{cls.__name__}(" in index, "a row of the table of all methods"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_no_machine(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert not re.search(r"/(work|root|home|tmp|mnt)/|127\.0\.0\.1|localhost|pypi\.|files\.pythonhosted", text)


# What stands in the code


def names_of(tree: ast.AST) -> Iterator[tuple[ast.AST, Any]]:
    """(node, object) for every import and every `tokred.x.y` of the code; an unknown name raises."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            for alias in node.names:
                yield node, getattr(module, alias.name)
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"tokred(\.\w+)+", ast.unparse(node)):
            value: Any = tokred
            for part in ast.unparse(node).split(".")[1:]:
                value = getattr(value, part)
            yield node, value


def check_names(code: str) -> None:
    """Imports and names of tokred exist, and calls of tokred's take the keywords that they are given."""
    tree = ast.parse(code)
    known = {ast.unparse(node): value for node, value in names_of(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        called = known.get(ast.unparse(node.func)) if isinstance(node, ast.Call) else None
        if called is None:
            continue
        takes = inspect.signature(called).parameters.values()
        if not any(one.kind is one.VAR_KEYWORD for one in takes):
            unknown = {word.arg for word in node.keywords if word.arg} - {one.name for one in takes}
            assert not unknown, (ast.unparse(node), unknown)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_names_in_the_code_exist(page: str) -> None:
    for code in code_of(page):
        check_names(code)


@pytest.mark.parametrize("code", ["import tokred.nothing", "tokred.NoMethod()", "tokred.ToMe(rr=3)"])
def test_a_wrong_name_is_seen(code: str) -> None:
    with pytest.raises((ImportError, AttributeError, AssertionError)):
        check_names(code)


def runnable(page: str) -> list[str]:
    return [code for code in code_of(page) if not ELSEWHERE.search(code)]


@pytest.fixture(scope="module")
def prepared() -> dict[str, dict[str, Any]]:
    """Names that the first block of a quick start leaves behind; each is run once."""
    return {}


def names_for(page: str, prepared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a page's code may use: of its own quick start, the first that it links to."""
    start = page if page.startswith("start/") else next(iter(re.findall(r"\.\./(start/\w+\.md)", text_of(page))), None)
    if start is None:
        return {"__name__": "example"}
    if start not in prepared:
        prepared[start] = {"__name__": "example"}
        run(code_of(start)[0], start, prepared[start])
    return dict(prepared[start])


def run(code: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(code, page, "exec", dont_inherit=True), names)


WITH_CODE = [page for page in PAGES if re.match(r"index|cost|start/|methods/|extend/", page) and runnable(page)]


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_runs(
    page: str, prepared: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # pictures that the code saves
    before = dict(registry.registered())
    names = names_for(page, prepared)
    first = 1 if page.startswith("start/") and runnable(page)[:1] == code_of(page)[:1] else 0
    try:
        for code in runnable(page)[first:]:
            run(code, page, names)
    finally:
        for name in set(registry._REGISTRY) - set(before):  # examples of methods
            del registry._REGISTRY[name]
    for name in ("model", "unet"):
        if name in names:
            check_free(names[name])  # the page cleans up, as it tells its readers to


# Commands


def commands_of(text: str) -> list[list[str]]:
    """The arguments of every `tokred ...` in the blocks of a console."""
    lines = "\n".join(re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S)).replace("\\\n", " ").splitlines()
    calls = [re.split(r"\btokred(?:\.cli)? (?=[a-z])", line, maxsplit=1)[-1] for line in lines if STARTS.match(line)]
    return [shlex.split(call, comments=True) for call in calls]


STARTS = re.compile(r"tokred |accelerate launch (.*)-m tokred\.cli |python -m tokred\.cli ")
WITH_COMMANDS = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("tokenizers/*/README.md")))
    if commands_of(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_are_taken_by_the_command_line(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands_of((ROOT / page).read_text(encoding="utf-8")):
        try:
            parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"tokred {shlex.join(arguments)}: {capsys.readouterr().err.splitlines()[-1]}")


def test_the_check_of_commands_sees_them() -> None:
    text = "```console\ntokred list   # all\ntokred eval imagenet \\\n    --method 'a b=8'\nmake docs\n```\n`tokred`\n"
    assert commands_of(text) == [["list"], ["eval", "imagenet", "--method", "a b=8"]]


def test_every_command_is_in_the_block_of_the_readme() -> None:
    (block,) = [part for part in re.findall(r"```console\n(.*?)```", README, re.S) if "tokred list" in part]
    (choices,) = [set(action.choices) for action in parser()._actions if action.dest == "command"]
    assert {line.split()[1] for line in block.splitlines() if line.startswith("tokred ")} == choices


# README


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    """What it is, one picture, two commands, one table; the rest stands in docs."""
    assert len(README.splitlines()) <= 160
    assert len(re.findall(r"!\[", README)) == 1
    assert len(re.findall(r"^\|-", README, flags=re.M)) == 1
    (two,) = [part for part in re.findall(r"```console\n(.*?)```", README, re.S) if part.startswith("make ")]
    assert len(two.splitlines()) == 2


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert (ROOT / path).exists(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in headings}, target


# What a reader sees


class Quiet(SimpleHTTPRequestHandler):
    """A server without a line a request."""

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The address of the site on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.browser
def test_pages_fit_the_window(site: Path, browser: Any) -> None:  # noqa: F811
    """Nothing is asked of another machine, no script fails, no picture is missing, no page scrolls sideways."""
    with visit(browser) as seen:
        for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # that one is for a server
            seen.page.goto(path.as_uri(), wait_until="load")
            where = path.relative_to(site)
            assert seen.page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), where
            for width in (400, 1280):
                seen.page.set_viewport_size({"width": width, "height": 900})
                assert seen.overflow() <= 0, (where, width)
            assert not seen.errors, (where, seen.errors)
        assert not [url for url in seen.requests if not url.startswith(("file:", "data:"))]


@pytest.mark.browser
def test_a_page_opens_from_a_disk(site: Path, browser: Any) -> None:  # noqa: F811
    with visit(browser) as seen:
        seen.page.goto((site / "index.html").as_uri())
        seen.page.get_by_role("link", name="ToMe", exact=True).first.click()
        assert seen.page.url == (site / "methods/tome.html").as_uri()
        assert not seen.errors
        assert not seen.outside


@pytest.mark.browser
def test_the_search_finds_a_method(served: str, browser: Any) -> None:  # noqa: F811
    with visit(browser) as seen:
        seen.page.goto(f"{served}/index.html")
        field = seen.page.locator(".md-search__input")
        field.click()  # the index is read then
        field.press_sequentially("GemFilter", delay=20)
        found = seen.page.locator(".md-search-result__link[href*='methods/gemfilter.html']")
        found.first.wait_for(state="attached", timeout=20_000)
        assert not seen.outside
        assert not seen.errors


# What stands elsewhere


def test_numbers_come_from_the_files() -> None:
    table = HOOKS.measured("docs/measured.md, 16 tokens | Random | HiRED", "x.md").splitlines()
    assert len(table) == 4  # header, rule, two rows
    assert set(table) <= set((DOCS / "measured.md").read_text(encoding="utf-8").splitlines())
    results = "benchmarks/results/vit-cpu-amd-epyc.txt"
    lines = HOOKS.measured(f"{results} | ToMe r=13", "x.md").splitlines()
    assert lines[0] == "```text"
    assert lines[1].startswith("method ")
    assert lines[2].startswith("ToMe r=13 ")
    assert lines[-1] == "```"
    assert set(lines[1:-1]) < set((ROOT / results).read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("what", ["16 tokens | NoMethod", "no column | Random", "16 tokens"])
def test_numbers_that_are_gone_stop_the_build(what: str) -> None:
    with pytest.raises(PluginError, match=r"nothing in docs/measured"):
        HOOKS.measured(f"docs/measured.md, {what}", "x.md")


def test_a_section_that_is_gone_stops_the_build() -> None:
    assert "ShortKeys" in HOOKS.section("CONTRIBUTING.md", "Add a method", "x.md")
    assert "## " not in HOOKS.section("CONTRIBUTING.md", "Add a host", "x.md")
    with pytest.raises(PluginError, match="no heading"):
        HOOKS.section("README.md", "No such heading", "x.md")


def test_docstrings_fall_into_entries() -> None:
    pytest.importorskip("griffe")
    text = """Title.

    Attributes:
        low: a number. high: another, see low: no name
            of its own.
        rows, columns: of the :func:`grid`.

    Raises:
        ValueError: never. low: is no entry here.
        KeyError: no such key; TypeError, LayerError: rarely."""
    found = load("site_docstrings").entries(text, {"low", "high", "rows", "columns"}).split("\n")
    assert found[-4:] == [
        "        ValueError: never. low: is no entry here.",
        "        KeyError: no such key;",
        "        TypeError: rarely.",
        "        LayerError: rarely.",
    ]
    assert found[3:7] == [
        "        low: a number.",
        "        high: another, see low: no name of its own.",
        "        rows: of the `grid`.",
        "        columns: of the `grid`.",
    ]


def test_a_pattern_in_the_navigation_stands_for_its_pages() -> None:
    assert HOOKS.expanded([{"A": ["x.md", "start/v*.md"]}, {"B": "y.md"}]) == [
        {"A": ["x.md", "start/video.md", "start/vit.md", "start/vlm.md"]},
        {"B": "y.md"},
    ]


def test_links_lead_to_pages_or_lose_their_address() -> None:
    def become(text: str, uri: str = "methods/x.md") -> str:
        return HOOKS.site_markdown(text, uri)

    assert become("[a](../hosts.md#timm)") == "[a](../hosts.md#timm)"
    assert become("[a](../../tokenizers/flextok/README.md)") == "[a](../recipes/flextok.md)"
    assert become("[a](../../README.md)") == "a (`README.md`)"
    assert become("[a](https://arxiv.org/abs/1)") == "[a](https://arxiv.org/abs/1)"
    assert become("[a](nowhere.md)") == "[a](nowhere.md)"  # MkDocs says so
    assert become("[a](../../docs/hosts.md)", "recipes/flextok.md") == "[a](../hosts.md)"
    assert HOOKS.on_page_content('<p><img alt="a" src="x.png"></p>', page=None, config=None, files=None) == (
        '<p><a class="picture" href="x.png"><img alt="a" src="x.png"></a></p>'
    )
    assert become("```\n[a](../../README.md)\n```") == "```\n[a](../../README.md)\n```"
