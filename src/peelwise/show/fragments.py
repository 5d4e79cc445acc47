"""What fragments of a notebook are made of: the element itself, tiles, lines, tables and the strip of verdicts.

A fragment is self-contained: no script, no style sheet, nothing loaded, every name escaped. Notebooks tell nobody if
they are dark, so text and lines take the notebook's own colour (``currentColor``), and verdicts stand in tiles that are
readable on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peelwise.records.base import Colour, Interval
from peelwise.show.html.markup import esc
from peelwise.show.words import VERDICTS, legend, with_ends

MOST_ROWS = 12  # of a table that is open from the start, and of any other than that of the blocks
TILE, _GAP, _IN_A_LINE = 26, 4, 24
_FONT = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5"
_NUMBERS = "font-variant-numeric:tabular-nums"
_LINE = "border-bottom:1px solid rgba(128,128,128,.35)"
_CELL = f"padding:3px 14px 3px 0;text-align:left;background:none;white-space:nowrap;{_LINE}"
_QUIET = "opacity:.75"


def fragment(*parts_html: str) -> str:
    """Return parts as one element that sets its own type and keeps the notebook's colours."""
    return f'<div class="peelwise" style="{_FONT};{_NUMBERS};max-width:70em">{"".join(parts_html)}</div>'


def strip(colours: Sequence[Colour]) -> str:
    """Return the verdicts of all blocks as one drawing: a tile with a letter for each, in depth order."""
    if not colours:
        return ""
    step = TILE + _GAP
    columns, lines = min(len(colours), _IN_A_LINE), -(-len(colours) // _IN_A_LINE)
    width, height = columns * step, lines * (step + 14)
    label = ", ".join(f"{sum(c == colour for c in colours)} {VERDICTS[colour].words}" for colour in legend(colours))
    tiles = []
    for index, colour in enumerate(colours):
        x, y = index % _IN_A_LINE * step, index // _IN_A_LINE * (step + 14)
        words = VERDICTS[colour]
        middle = x + TILE / 2
        tiles.append(
            f"<g><title>{esc(f'block {index}: {words.words}')}</title>"
            f'<rect x="{x}" y="{y}" width="{TILE}" height="{TILE}" rx="4" fill="{words.light}"/>'
            f'<text x="{middle}" y="{y + 18}" text-anchor="middle" font-size="13" font-weight="700" fill="#fff">'
            f"{esc(words.letter)}</text>"
            f'<text x="{middle}" y="{y + TILE + 11}" text-anchor="middle" font-size="9" fill="currentColor" '
            f'opacity=".75">{index}</text></g>'
        )
    return (
        f'<svg role="img" aria-label="{esc(f"Verdicts of {len(colours)} blocks: {label}")}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" style="max-width:100%;height:auto;display:block;'
        f'margin:8px 0 4px">{"".join(tiles)}</svg>'
    )


def headline(name: str, facts: Iterable[str]) -> str:
    """Return the first line: whose result this is, and what is known of it."""
    more = "".join(f'<span style="margin-left:14px;{_QUIET}">{esc(fact)}</span>' for fact in facts)
    return f'<div><strong style="font-size:15px">{esc(name)}</strong>{more}</div>'


def line(text: str, *, bold: bool = False, quiet: bool = False) -> str:
    """Return a sentence on a line of its own."""
    style = "margin:3px 0" + (";font-weight:600" if bold else "") + (f";{_QUIET}" if quiet else "")
    return f'<div style="{style}">{esc(text)}</div>'


def folded_table(headers: Sequence[str], rows_html: Sequence[Sequence[str]], summary: str) -> str:
    """Return a table that can be folded, folded where it is long; cells are markup."""
    if not rows_html:
        return ""
    head = "".join(f'<th scope="col" style="{_CELL};font-weight:600;{_QUIET}">{esc(title)}</th>' for title in headers)
    body = "".join(
        f'<tr style="background:none">{"".join(f"<td style={_CELL!r}>{cell}</td>" for cell in row)}</tr>'
        for row in rows_html
    )
    opened = " open" if len(rows_html) <= MOST_ROWS else ""
    return (
        f'<details{opened} style="margin:6px 0"><summary style="cursor:pointer">{esc(summary)}</summary>'
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:4px 0 0;color:inherit;{_FONT}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def letter_tile(colour: Colour, text: str) -> str:
    """Return a tile with the letter of a colour, and a text beside it."""
    words = VERDICTS[colour]
    style = (
        f"display:inline-block;min-width:18px;text-align:center;border-radius:3px;color:#fff;background:{words.light}"
    )
    return f'<b style="{style}" aria-hidden="true">{esc(words.letter)}</b> {esc(text)}'


def verdict_tile(colour: Colour) -> str:
    """Return a verdict with its tile."""
    return letter_tile(colour, VERDICTS[colour].words)


def interval_text(interval: Interval | None) -> str:
    """Return a number with its interval, paler where there is none."""
    text = esc(with_ends(interval))
    return f'<span style="{_QUIET}">{text}</span>' if interval is None else text
