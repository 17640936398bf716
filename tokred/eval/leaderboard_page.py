"""The page of `tokred bench --all`: one HTML file that needs nothing beside it.

Pictures are data URIs, plots are inline SVG with letters as letters, style and script stand in the page. Its content
security policy lets it load nothing from anywhere.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tokred.eval.report import Curve, Look, accuracy_figure

__all__ = ["page", "svg"]

Record = Mapping[str, Any]

#: Colours that the colour-blind tell apart (Okabe and Ito's, and an olive and a brown) on white and on black, and a
#: marker: one pair a method, the same in every plot. Methods that share a colour never share a plot.
_BLUE, _ORANGE, _GREEN, _RED, _PINK, _SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
_OLIVE, _BROWN, _GREY = "#8a8a1c", "#8c510a", "#888888"
STYLES: dict[str, tuple[str, str]] = {
    "tome": (_BLUE, "o"),
    "topk": (_ORANGE, "s"),
    "zero_tprune": (_GREEN, "^"),
    "hired": (_BLUE, "o"),
    "visionzip": (_ORANGE, "s"),
    "divprune": (_GREEN, "^"),
    "cdpruner": (_RED, "v"),
    "vispruner": (_PINK, "D"),
    "evs": (_OLIVE, "P"),
    "quota": (_SKY, "X"),
    "fastv": (_BLUE, "o"),
    "pyramiddrop": (_ORANGE, "s"),
    "dart": (_GREEN, "^"),
    "sparsevlm": (_RED, "v"),
    "mustdrop": (_PINK, "D"),
    "corematching": (_OLIVE, "P"),
    "gemfilter": (_SKY, "X"),
    "strip_mlp_tiny": (_RED, "v"),
    "dualtoken_vit_tiny": (_PINK, "D"),
    "lookup_vit_tiny": (_OLIVE, "P"),
    "flextok": (_BLUE, "o"),
    "tokenflow": (_ORANGE, "s"),
    "textok": (_GREEN, "^"),
    "random_tokens": (_GREY, "x"),
}
_SPARE = (_BROWN, "*")  # a method of another package, and what has no name
#: Colours that matplotlib writes where the page's own, light or dark, shall stand.
_INKS = {"#010203": "var(--ink)", "#040506": "var(--faint)", "#070809": "var(--line)"}
_INK, _FAINT, _LINE = _INKS


def page(results: Record) -> str:
    """The page of what `tokred.eval.leaderboard.run` measured."""
    sections = [section for part in results["parts"] for section in part["sections"]]
    title = "tokred: token reduction on bundled models" + (" (dry run)" if results["fast"] else "")
    body = [f"<header><h1>{escape(title)}</h1>", _machine(results, sections), "</header>"]
    body += [_failures(results), _notes(results), _contents(results, sections)]
    for part in results["parts"]:
        body += [_section(section) for section in part["sections"]]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(filter(None, body))
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


# -- above the tables --------------------------------------------------------------------------------------------------


def _machine(results: Record, sections: Sequence[Record]) -> str:
    machine = results["machine"]
    counts: dict[str, int] = {}  # parts that see scenes see the same ones
    for section in sections:
        counts[section["what"]] = max(section["examples"], counts.get(section["what"], 0))
    held_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    minutes = f"{results['seconds'] / 60:.1f} min" if results["seconds"] >= 60 else f"{results['seconds']:.0f} s"
    each = ", ".join(map(_spent, results["parts"]))
    memory = results["peak_memory_bytes"]
    threads = f"{machine['accuracy_threads']} for accuracy, {machine['speed_threads']} for speed"
    facts = {
        "Measured": f"{results['date']}, tokred {results['version']}, torch {machine['torch']}",
        "Machine": f"{machine['processor']}, {machine['cores']} cores; threads: {threads}",
        "Held-out data": f"{sum(counts.values())} examples of the {results['split']} split, seed {results['seed']}: "
        f"{held_out}",
        "Time": f"{minutes} ({results['cpu_seconds']:.0f} s of CPU time): {each}",
        "Memory": f"{memory / 1e9:.1f} GB at most" if memory is not None else "not known on this system",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _spent(part: Record) -> str:
    before = f" (measured before, {part['date']})" if part["resumed"] else ""
    return f"{part['name']} {part['seconds']:.0f} s{before}"


def _failures(results: Record) -> str:
    if not results["failed"]:
        return ""
    rows = "".join(f"<li><b>{escape(n)}</b>: {escape(error)}</li>" for n, error in results["failed"].items())
    return f'<div class="failed"><p>These parts failed, and their sections are missing:</p><ul>{rows}</ul></div>'


def _notes(results: Record) -> str:
    dry = "This was a dry run on a handful of examples: its numbers mean nothing. " if results["fast"] else ""
    return (
        f'<p class="note">{dry}Every model here is small, was trained by tokred on drawn scenes, and comes with it. So '
        "the tables say that the methods work and what each gives up on these tasks; they do not rank methods for a "
        "model of 7 billion parameters, and speed on small models is not speed on big "
        "ones. Rows of one budget see the same held-out examples; ± is one standard error over examples. "
        '<span class="star">★</span> marks a budget\'s best: within one standard error (that of the best) of it.</p>'
    )


def _contents(results: Record, sections: Sequence[Record]) -> str:
    titles = {section["name"]: section["title"] for section in sections}
    items = []
    for section in sections:
        best = f"<br><small>{escape(section['headline'])}</small>" if section["headline"] else ""
        items.append(f'<li><a href="#{section["name"]}">{escape(section["title"])}</a>{best}</li>')
    return (
        '<nav aria-label="Contents"><h2 id="contents">Contents</h2><ol>' + "".join(items) + "</ol>"
        "<details open><summary>Which method is measured on which model?</summary>"
        f"{_matrix(results['methods'], titles)}</details></nav>"
    )


def _matrix(methods: Record, titles: Mapping[str, str]) -> str:
    """Methods by bundled models: links to their rows, "fits, not run", or a dash."""
    said = {"fits": "fits, not run", "failed": "failed", "no": "–"}
    models = list(next(iter(methods.values()), {"models": {}})["models"])
    rows = []
    for name, method in methods.items():
        cells = []
        for own in method["models"].values():
            if isinstance(own, str):
                cells.append(f'<td class="{own}">{said[own]}</td>')
            else:
                links = (f'<a href="#{where}" title="{escape(titles[where])}">{escape(where)}</a>' for where in own)
                cells.append(f"<td>{', '.join(links)}</td>")
        title = f'<th scope="row"><span title="{escape(name)}">{escape(method["title"])}</span></th>'
        rows.append(f"<tr>{title}{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{escape(model)}</th>' for model in models)
    return (
        '<div class="scroll" tabindex="0"><table class="methods"><thead><tr><th scope="col">method</th>'
        f'{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div><p class="legend">Links lead to rows. '
        '"fits, not run": the model has the places where the method acts, no table here measures it; –: it does not, '
        "or the method leaves such media alone. Image tokenizers and trained backbones are measured as they are.</p>"
    )


# -- sections ----------------------------------------------------------------------------------------------------------


def _section(section: Record) -> str:
    seen = ""
    if section["examples"]:
        seen = f" {section['examples']} held-out {section['what']} ({section['split']}, seed {section['seed']})."
    parts = [
        f'<section id="{section["name"]}"><h2>{escape(section["title"])}</h2>',
        f"<p>{escape(section['about'])}{escape(seen)}</p>",
    ]
    if section["headline"]:
        parts.append(f'<p class="best">{escape(section["headline"])}</p>')
    more = f"{escape(section['more'])}: <code>{escape(section['command'])}</code>"
    parts += [_table(section), f'<p class="legend">{escape(section["legend"])} {more}</p>']
    if section["plot"] is not None:
        drawn = svg(section["plot"], section["name"])
        said = f"{section['plot']['y']} against {section['plot']['x']}"
        whole = section["plot"]["whole"]
        caption = f"{section['plot']['note']} Bars{' and band' if whole else ''} are one standard error.".strip()
        parts.append(
            f'<figure><div class="scroll plot" tabindex="0" role="img" aria-label="{escape(said)}">{drawn}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    if "words" in section:
        parts.append(_words(section["words"]))
    for picture in section["pictures"]:
        width, height = picture["width"], picture["height"]
        parts.append(
            f'<figure><div class="scroll" tabindex="0"><img src="{picture["uri"]}" width="{width}" height="{height}" '
            f'style="min-width:{min(width, max(560, round(0.6 * width)))}px;max-width:{width}px" '
            f'alt="{escape(picture["caption"])}"></div><figcaption>{escape(picture["caption"])}</figcaption></figure>'
        )
    return "\n".join([*parts, '<p class="up"><a href="#contents">Contents</a></p></section>'])


def _table(section: Record) -> str:
    """A body for each group of rows, which its columns sort on their own."""
    words = [title == "setting" for title in section["header"]]  # the other columns are numbers
    head = "".join(
        f'<th scope="col"{_WORDS * text}><button type="button">{escape(title)}</button></th>'
        for title, text in zip(section["header"], words, strict=True)
    )
    groups: dict[str, list[Record]] = {}
    for row in section["rows"]:
        groups.setdefault(row["group"], []).append(row)
    bodies = []
    for group, rows in groups.items():
        title = f'<tr class="group"><th colspan="{len(section["header"])}">{escape(group)}</th></tr>' if group else ""
        bodies.append(f"<tbody>{title}{''.join(_line(row, words) for row in rows)}</tbody>")
    name = escape(section["title"])
    return (
        f'<div class="scroll" tabindex="0"><table aria-label="{name}"><thead><tr>{head}</tr></thead>'
        + "".join(bodies)
        + "</table></div>"
    )


def _line(row: Record, words: Sequence[bool]) -> str:
    first = row["cells"][0]
    star = ' <span class="star" title="best of its budget, within one standard error">★</span>' if row["best"] else ""
    kind = "control" if row.get("kind") in ("random", "uniform") else "best" if row["best"] else ""
    others = zip(row["cells"][1:], words[1:], strict=True)
    cells = "".join(f"<td{_WORDS * text}>{escape(cell)}</td>" for cell, text in others)
    return f'<tr class="row {kind}"><th scope="row"><span>{escape(first)}</span>{star}</th>{cells}</tr>'


def _words(found: Record) -> str:
    """A prompt of which the words that were read are dark, the needle underlined."""
    read, (start, stop) = set(found["read"]), found["needle"]
    words = []
    for column, word in enumerate(found["words"]):
        classes = ["read"] * (column in read) + ["needle"] * (start <= column < stop)
        words.append(f'<span class="{" ".join(classes)}">{escape(word)}</span>' if classes else escape(word))
    return (
        f'<figure><p class="words">{" ".join(words)}</p><figcaption>{escape(found["title"])}. Words that were read '
        "are marked, the needle is underlined.</figcaption></figure>"
    )


# -- plots -------------------------------------------------------------------------------------------------------------


def svg(plot: Record, name: str) -> str:
    """A plot of a section as an SVG element; `name` sets its ids apart from those of other plots."""
    import matplotlib

    styles: dict[str, dict[str, Any]] = {}
    drawn: set[tuple[str | None, bool]] = set()
    for line in plot["lines"]:
        # random choice has no registered name in every task
        colour, marker = STYLES.get(line["name"] or "", (_GREY, "x") if "Random" in line["label"] else _SPARE)
        style: dict[str, Any] = {"color": colour}
        if line["dashed"]:
            style |= {"marker": "x" if "Random" in line["label"] else marker, "alpha": 0.8}
        else:
            style |= {"marker": marker}
        if (line["name"], line["dashed"]) in drawn:  # another setting of the same method
            style |= {"ls": "-.", "markerfacecolor": "none"}
        drawn.add((line["name"], line["dashed"]))
        styles[line["label"]] = style
    curves = [
        Curve(one["label"], points, dashed=one["dashed"])
        for one, points in zip(plot["lines"], _apart(plot), strict=True)
    ]
    whole = plot["whole"]
    inks = {f"{key}.color": _INK for key in ("xtick", "ytick", "text")}
    inks |= {"axes.labelcolor": _INK, "axes.edgecolor": _FAINT}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, **inks}):
        figure = accuracy_figure(
            curves,
            _finite(whole["point"]) if whole is not None else None,
            plot["x"],
            plot["y"],
            whole["label"] if whole is not None else "",
            plot["ticks"],
            Look(_INK, _FAINT, _LINE, styles, size=(7.6, 4.9), below=True),
        )
        figure.patch.set_alpha(0)
        figure.axes[0].patch.set_alpha(0)
        held = io.StringIO()
        figure.savefig(held, format="svg")
    return _inline(held.getvalue(), name)


def _apart(plot: Record) -> list[list[tuple[float, float, float]]]:
    """The points of each line. Where points of other lines have nearly the same cost (within 2 % of what is shown),
    each line is moved by up to that much."""
    lines = [[_finite(point) for point in line["points"]] for line in plot["lines"]]
    log = bool(plot["ticks"])
    costs = [math.log2(x) if log else x for points in lines for x, _, _ in points]
    near = 0.02 * ((max(costs) - min(costs)) or 1)
    moved = []
    for number, points in enumerate(lines):
        shift = near * (number / max(1, len(lines) - 1) - 0.5)
        row = []
        for x, y, error in points:
            place = math.log2(x) if log else x
            alone = sum(abs(place - cost) < near for cost in costs) == 1
            place += 0 if alone else shift
            row.append((2**place if log else place, y, error))
        moved.append(row)
    return moved


def _finite(point: Sequence[float | None]) -> tuple[float, float, float]:
    """(cost, accuracy, standard error), of one observation none."""
    x, y, error = point
    assert x is not None
    assert y is not None
    return x, y, error or 0.0


def _inline(text: str, name: str) -> str:
    """matplotlib's file as an element of a page: no prolog, no metadata, ids of its own, the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _INKS.items():
        text = text.replace(colour, variable)
    return re.sub(r"font(-family)?: ?([^;\"]*?)'?(DejaVu Sans|sans-serif)[^;\"]*", _font, text).strip()


def _font(found: re.Match[str]) -> str:
    """The page's own letters, in the size that matplotlib counted with."""
    return f"font{found[1] or ''}: {found[2]}var(--letters)"


_WORDS = ' class="words"'
_STYLE = """
:root{--paper:#fff;--ink:#1f2430;--faint:#5b6270;--line:#dfe3ea;--soft:#f4f6f9;--good:#0b6e4f;--mark:#fff4d6;
--link:#0b5cad;--letters:system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media (prefers-color-scheme:dark){:root{--paper:#14171d;--ink:#e6e9ef;--faint:#a3abb8;--line:#343a45;--soft:#1d2129;
--good:#5fd3a4;--mark:#3a3115;--link:#7db8ff}}
*{box-sizing:border-box}html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:76rem;padding:1rem clamp(.75rem,3vw,2rem) 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 var(--letters);overflow-wrap:break-word}
h1{font-size:clamp(1.35rem,4vw,2rem);line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:clamp(1.1rem,3vw,1.4rem);line-height:1.25;margin:0 0 .5rem}
a{color:var(--link)}p{margin:.5rem 0;max-width:60rem}small,.legend,figcaption{color:var(--faint);font-size:.85rem}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;margin:0 0 1rem;font-size:.9rem}
.facts dt{color:var(--faint)}.facts dd{margin:0;min-width:0}
.note,.failed{border-left:4px solid var(--line);padding:.1rem 0 .1rem 1rem;font-size:.95rem}
.failed{border-color:#c0392b}.failed ul{padding-left:1.2rem}
nav ol{padding-left:1.4rem;margin:.5rem 0 1rem}nav li{margin:.3rem 0}summary{cursor:pointer}
section{border-top:1px solid var(--line);margin-top:2.5rem;padding-top:1.5rem}
.scroll{overflow-x:auto;max-width:100%;margin:.75rem 0}.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:100%}
td,tbody th{padding:.28rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody th{text-align:left;font-weight:500;position:sticky;left:0;background:var(--paper)}
td.words{text-align:left;white-space:normal;min-width:10rem;font-size:.78rem;overflow-wrap:normal}
thead th{padding:0;border-bottom:2px solid var(--faint);background:var(--paper);text-align:right}
thead th:first-child{position:sticky;left:0;z-index:1}thead th:first-child,th.words{text-align:left}
thead button{all:unset;cursor:pointer;padding:.35rem .5rem;font-weight:600;white-space:nowrap}
thead button:focus-visible{outline:2px solid var(--link)}
th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}
.group th{position:static;background:var(--soft);color:var(--faint);font-weight:600;font-size:.82rem}
.group th span{position:sticky;left:.6rem}
.control td,.control th{color:var(--faint)}.best td,tr.best th{background:var(--mark)}p.best{font-weight:500}
.star{color:#b8860b}@media (prefers-color-scheme:dark){.star{color:#f2c14e}}
.methods td,.methods th{white-space:normal;text-align:left}.methods thead th{padding:.35rem .5rem;vertical-align:bottom}
.methods .no,.methods .fits{color:var(--faint)}
figure{margin:1.25rem 0}.plot svg{display:block;width:100%;min-width:34rem;max-width:54rem;height:auto}
.scroll img{display:block;width:100%;height:auto;background:#fff;border-radius:4px}
p.words{color:var(--faint);line-height:1.75;font-size:.9rem}.read{color:var(--ink);background:var(--mark)}
.needle{border-bottom:3px solid #d55e00}.up{font-size:.85rem}
@media (max-width:30rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}
tbody th{min-width:7.5rem;max-width:9.5rem;white-space:normal}.group th{max-width:none;white-space:nowrap}}
""".strip()

_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")].filter(head => head.querySelector("button"));
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") !== "descending" && (column > 0 || head.hasAttribute("aria-sort"));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = row => {
      const text = row.cells[column].textContent.trim();
      const number = parseFloat(text.replace(/^[^-+0-9.]*/, ""));
      return [text === "" ? null : text, column > 0 && !Number.isNaN(number) ? number : null];
    };
    for (const body of table.tBodies) {
      const rows = [...body.querySelectorAll("tr.row")].map(row => [value(row), row]);
      rows.sort(([[a, x]], [[b, y]]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = x !== null && y !== null ? x - y : a.localeCompare(b);
        return falling ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    }
  }));
}
""".strip()
