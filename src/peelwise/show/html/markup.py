"""The few pieces of HTML the report is built from. Arguments named ``html`` are markup, others are text."""

from __future__ import annotations

import html as _html
from collections.abc import Iterable, Sequence

from peelwise.records.base import Colour
from peelwise.records.plain_text import clean
from peelwise.show.words import VERDICTS


def esc(text: object) -> str:
    """Return any value as text that can stand in an element or an attribute and do nothing there."""
    return _html.escape(clean(str(text)), quote=True)


def paragraph(text: str, style: str = "") -> str:
    """Return a paragraph of plain text with an optional class."""
    return f'<p class="{style}">{esc(text)}</p>' if style else f"<p>{esc(text)}</p>"


def section(anchor: str, title: str, *html: str) -> str:
    """Return a titled section; empty parts are left out."""
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>{"".join(html)}</section>'


def chart(svg: str, caption_html: str, missing: str) -> str:
    """Return a chart with its caption, or the sentence ``missing`` if there is nothing to draw.

    Args:
        svg: One SVG element, possibly empty.
        caption_html: Markup below the chart.
        missing: Text shown in place of an empty chart.

    Returns:
        A figure that scrolls sideways where the screen is narrower than the chart can bear.
    """
    if not svg:
        return paragraph(missing, "missing")
    body = f'<div class="scroll" tabindex="0">{svg}</div>'
    return f"<figure>{body}<figcaption>{caption_html}</figcaption></figure>"


def figure(svg: str) -> str:
    """Return a picture that says everything itself; it scrolls sideways where the screen is narrower."""
    return f'<figure><div class="scroll" tabindex="0">{svg}</div></figure>'


def bar(share: float) -> str:
    """Return a bar that fills so much of its cell, from 0 to 1."""
    return f'<span class="bar" style="width:{100 * min(max(share, 0.0), 1.0):.0f}%"></span>'


def table(headers: Sequence[str], rows_html: Iterable[Sequence[str]], *, caption: str, style: str = "") -> str:
    """Return a table whose first column names the row.

    Args:
        headers: Column titles, as text.
        rows_html: Cells, as markup.
        caption: What the table holds, for those who hear the page.
        style: Optional classes: ``numbers`` if all but the first column are, ``named`` if the second is not either,
            ``bars`` if the last column is of bars.

    Returns:
        A table that scrolls sideways on a narrow screen.
    """
    head = "".join(f'<th scope="col">{esc(title)}</th>' for title in headers)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows_html
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{style}"><caption>{esc(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def pairs(items: Iterable[tuple[str, object]]) -> str:
    """Return a list of names and values, both as text."""
    inner = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in items)
    return f'<dl class="pairs">{inner}</dl>'


def chip(colour: Colour, text: str | None = None) -> str:
    """Return a verdict's letter on its colour and pattern, with its words behind it."""
    words = VERDICTS[colour]
    label = words.words if text is None else text
    return (
        f'<span class="chip"><b class="tile {colour}" aria-hidden="true">{words.letter}</b>'
        f"<span>{esc(label)}</span></span>"
    )
