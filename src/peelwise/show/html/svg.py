"""Turns a matplotlib figure into a small SVG that lives inside a page and takes its colours from it.

The figure is painted with sentinel colours that no chart would use; afterwards each becomes a CSS
variable, so the same drawing is right on a light page, on a dark one and on paper.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from io import StringIO
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peelwise.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = MappingProxyType(
    {
        name: f"#01a2{place:02x}"
        for place, name in enumerate(
            ("ink", "muted", "line", "page", "accent", "mark", "red", "yellow", "green", "grey", "frozen")
        )
    }
)
"""Names of CSS variables and the sentinel each one is painted with."""

# A family that matplotlib carries itself, so that the layout is the same on every machine.
_FAMILY = "DejaVu Sans"
_TEXT = ("text.color", "axes.labelcolor", "axes.titlecolor")
_QUIET = ("xtick.labelcolor", "ytick.labelcolor")
_LINES = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": [_FAMILY],
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 12,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 12,
    **dict.fromkeys(_TEXT, COLOURS["ink"]),
    **dict.fromkeys(_QUIET, COLOURS["muted"]),
    **dict.fromkeys(_LINES, COLOURS["line"]),
}


def draw(name: str, label: str, size: tuple[int, int], paint: Callable[[Figure], None]) -> str:
    """Return the figure that ``paint`` fills, as an SVG element for an HTML page.

    Args:
        name: Short and unique on the page; it keeps the ids of two charts apart.
        label: What the chart shows, for those who hear the page.
        size: Width and height in CSS pixels; text of 12 is 12 pixels high at that width.
        paint: Draws into an empty figure, using ``COLOURS`` only.

    Returns:
        One ``<svg>`` element without foreign references, the same for the same figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.style import context
    except ImportError as error:
        raise MissingExtraError("The HTML report", "plots") from error
    width, height = size
    buffer = StringIO()
    # First the library's own defaults: a style file of the user must not change the report.
    with context("default"), matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), label, width)


def safe_label(text: str, longest: int = 28) -> str:
    """Return a name as matplotlib can measure it: printable ASCII and not too long."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."


def _inline(document: str, label: str, width: int) -> str:
    """Keep the drawing, drop what only a file of its own needs, and hand the colours to the page."""
    body = document[document.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</defs>", r"<!--.*?-->"):
        body = re.sub(pattern, "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', lambda found: _shorter(found.group()), body)
    body = re.sub(rf"'{_FAMILY}'(?:, sans-serif)?", "system-ui, sans-serif", body)
    for name, sentinel in COLOURS.items():
        body = body.replace(sentinel, f"var(--{name})")
    view = re.search(r'viewBox="([^"]*)"', body)
    box = view.group(1) if view else f"0 0 {width} {width}"
    spoken = html.escape(label, quote=True)
    head = f'<svg viewBox="{box}" style="max-width:{width}px;min-width:{min(width, 620)}px" '
    head += f'role="img" aria-label="{spoken}">'
    return re.sub(r">\s+<", "><", re.sub(r"^<svg[^>]*>", head, body.strip()))


def _shorter(attribute: str) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", attribute)).replace(' "', '"')
