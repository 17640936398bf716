"""What the site needs beyond MkDocs: pages, passages and numbers that stand elsewhere in the repository.

- `PAGES` are files outside docs/ that the site shows whole. A link to a file that it shows leads to its page; one to
  another file of the repository becomes the file's name.
- `<!-- section: FILE | HEADING -->` becomes what stands in FILE below that heading.
- A picture that stands alone leads to itself in full size: on a telephone its labels are too small.
- A pattern such as `evaluation*.md` in the navigation stands for the pages that match it.
- `<!-- measured: FILE, COLUMN | LABEL | LABEL -->` becomes those rows of the tables in FILE with a column of that name
  whose first cell begins with one of the labels; of a text file (no column), the lines that name a label below their
  heading, in a code block. So a number stands in one place, beside the command that printed it, and a label that is
  gone stops the build.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

#: file of the repository -> page of the site
PAGES = {
    path.relative_to(ROOT).as_posix(): f"recipes/{path.parent.name}.md"
    for path in sorted(ROOT.glob("tokenizers/*/README.md"))
}

SECTION = re.compile(r"^<!-- section: (.+?) \| (.+?) -->$", re.MULTILINE)
MEASURED = re.compile(r"<!-- measured: (.+?) -->")
IMAGE = re.compile(r'<p>(<img [^>]*?src="([^"]+)"[^>]*>)</p>')
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"(model|method|prompt| +speed-up) .* {2}\S")
#: A space of a cell where a narrow column must not break: a number and its error, a paper's number.
UNBROKEN = re.compile(r"(±|\d(?= ±)|arXiv) ")
MARKUP = str.maketrans("", "", "*`[")


def on_config(config: Any) -> Any:
    config.nav = expanded(config.nav)
    return config


def expanded(nav: Any) -> Any:
    """A navigation with the pages of docs/ in place of each pattern."""
    if isinstance(nav, list):
        return [page for entry in nav for page in _pages(entry)]
    return {title: expanded(entry) for title, entry in nav.items()} if isinstance(nav, dict) else nav


def _pages(entry: Any) -> list[Any]:
    if isinstance(entry, str) and "*" in entry:
        docs = Path(__file__).parent
        return sorted(path.relative_to(docs).as_posix() for path in docs.glob(entry))
    return [expanded(entry)]


def on_files(files: Any, *, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    return site_markdown(markdown, page.file.src_uri)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    return IMAGE.sub(r'<p><a class="picture" href="\2">\1</a></p>', html)


def site_markdown(markdown: str, uri: str) -> str:
    """The text of page `uri` as MkDocs reads it: passages and numbers in place, links that lead somewhere."""
    source = next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")
    text = _change(markdown, lambda line: LINK.sub(lambda match: _link(match, source, uri), line))
    text = SECTION.sub(lambda match: section(match[1], match[2], uri), text)
    text = _change(text, lambda line: MEASURED.sub(lambda match: measured(match[1], uri), line))
    return _change(text, lambda line: UNBROKEN.sub("\\1\u00a0", line) if line.startswith("|") else line)


def section(name: str, heading: str, uri: str) -> str:
    """What stands below `heading` in a file of the repository; `PluginError` if there is no such heading."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    if found is None:
        raise PluginError(f"{uri}: {name} has no heading {heading!r}")
    return _change(found[2].strip(), lambda line: LINK.sub(lambda match: _link(match, name, uri), line))


def _change(markdown: str, change: Callable[[str], str]) -> str:
    return "\n".join(_outside_code(markdown, change))


def _outside_code(markdown: str, change: Callable[[str], str]) -> Iterator[str]:
    fence = ""
    for text in markdown.split("\n"):
        mark = re.match(r"\s*(```+|~~~+)", text)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
            yield text
        else:
            yield text if fence else change(text)


def _link(match: re.Match[str], source: str, uri: str) -> str:
    image, text, target = match.groups()
    path, mark, anchor = target.partition("#")
    if not path or "://" in path or path.startswith(("mailto:", "/")):
        return match[0]
    file = normpath(join(dirname(source), path))
    page = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    if page:
        return f"{image}[{text}]({relpath(page, dirname(uri) or '.')}{mark}{anchor})"
    if (ROOT / file).exists():  # a file that the site does not show
        return text if text.strip("`") == file else f"{text} (`{file}`)"
    return match[0]  # leads nowhere, which MkDocs will say


def measured(what: str, uri: str) -> str:
    """What ``measured: FILE, COLUMN | LABEL | ...`` asks for; `PluginError` where a label names nothing."""
    place, *labels = (part.strip() for part in what.split("|"))
    name, _, column = (part.strip() for part in place.partition(","))
    text = (ROOT / name).read_text(encoding="utf-8")
    found = _rows(text, column, labels) if column else _lines(text, labels)
    missing = [label for label in labels if not any(label in line.translate(MARKUP) for line in found)]
    if missing or not labels:
        raise PluginError(f"{uri}: nothing in {place} is called {', '.join(map(repr, missing or ['']))}")
    return "\n".join(found)


def _rows(text: str, column: str, labels: list[str]) -> list[str]:
    found: list[str] = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, rule, *rows = table.splitlines()
        chosen = [row for row in rows if _cells(row)[0].startswith(tuple(labels))]
        if chosen and column in _cells(header):
            found += [header, rule, *chosen, ""]
    return found


def _cells(row: str) -> list[str]:
    return [cell.translate(MARKUP).strip() for cell in row.strip("|").split("|")]


def _lines(text: str, labels: list[str]) -> list[str]:
    found, heading, shown = ["```text"], "", ""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if HEADING.match(line):
            heading = line
        elif any(label in line for label in labels) and not line.startswith("$"):
            if heading != shown:
                found, shown = [*found, heading], heading
            found.append(line)
            follows = lines[number + 1] if number + 1 < len(lines) else ""
            if re.match(r" {20,}(next tokens|answer)", follows):
                found.append(follows)
    return [*found, "```"]
