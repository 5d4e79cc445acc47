"""One peel as one HTML file, in the style of the audit's report."""

from __future__ import annotations

from peelwise.peel_records import PeelRecord


def render_html(record: PeelRecord) -> str:
    """Return the report of a peel as one self-contained HTML document."""
    return ""
