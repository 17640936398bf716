"""What the jobs found, as HTML for the page; every text that a user wrote is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from tokred.demo.pictures import Stage, webp

__all__ = ["answers", "bars", "code", "facts", "figures", "notes", "passage", "placeholder", "small", "stack"]


def _escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def stack(*parts: str) -> str:
    """Parts below each other; empty ones are left out."""
    return f'<div class="tk-stack">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def placeholder(text: str) -> str:
    """What stands where a result will be."""
    return f'<div class="tk-empty">{_escaped(text)}</div>'


def figures(stages: Sequence[Stage], wide: bool = False) -> str:
    """Pictures with captions, as many beside each other as there is room for; `wide` ones below each other."""
    shown = "".join(
        f'<figure><img alt="{_escaped(stage.caption)}" src="data:image/webp;base64,'
        f'{base64.b64encode(webp(stage.picture)).decode()}"><figcaption>{_escaped(stage.caption)}</figcaption></figure>'
        for stage in stages
    )
    return f'<div class="tk-figures{" tk-wide" if wide else ""}">{shown}</div>'


def bars(titles: tuple[str, str], both: tuple[Sequence[tuple[str, float]], Sequence[tuple[str, float]]]) -> str:
    """Probabilities before and after, beside each other."""
    cards = []
    for title, rows in zip(titles, both, strict=True):
        lines = "".join(
            f'<span title="{_escaped(name)}">{_escaped(name)}</span>'
            f'<i style="width:{100 * chance:.1f}%"></i><b>{100 * chance:.1f} %</b>'
            for name, chance in rows
        )
        cards.append(f'<div class="tk-card"><h4>{_escaped(title)}</h4><div class="tk-bars">{lines}</div></div>')
    return f'<div class="tk-pair">{"".join(cards)}</div>'


def answers(titles: tuple[str, str], both: tuple[str, str]) -> str:
    """Two answers beside each other."""
    cards = []
    for title, text in zip(titles, both, strict=True):
        long = " tk-prose" if len(text) > 60 else ""
        said = _escaped(text) or "<em>(nothing)</em>"
        cards.append(f'<div class="tk-card"><h4>{_escaped(title)}</h4><div class="tk-said{long}">{said}</div></div>')
    return f'<div class="tk-pair">{"".join(cards)}</div>'


def facts(header: Sequence[str], rows: Sequence[Sequence[str]], off: Sequence[int] = ()) -> str:
    """A table; rows whose numbers are in `off` are set back."""
    head = "".join(f"<th>{_escaped(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=tk-off' if number in off else ''}>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="tk-scroll"><table class="tk"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def notes(texts: Sequence[str]) -> str:
    """Remarks on a result."""
    return "".join(f'<div class="tk-note">{_escaped(text)}</div>' for text in texts)


def small(text: str) -> str:
    """What a table's words mean."""
    return f'<div class="tk-small">{_escaped(text)}</div>'


def code(text: str) -> str:
    """How to say it in Python."""
    return f'<div class="tk-code">{_escaped(text)}</div>'


def passage(words: Sequence[tuple[str, bool]], answer: str) -> str:
    """A text of which the kept runs are marked, and the answer in them."""
    parts = []
    for text, kept in words:
        if not kept:
            parts.append(f"<span>{_escaped(text)}</span>")
            continue
        pieces = text.split(answer) if answer else [text]
        inner = f'</mark><mark class="tk-answer">{_escaped(answer)}</mark><mark>'.join(map(_escaped, pieces))
        parts.append(f"<mark>{inner}</mark>".replace("<mark></mark>", ""))
    return f'<div class="tk-passage">{"".join(parts)}</div>'
