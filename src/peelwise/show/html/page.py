"""The page that every report stands on: one file, no script, nothing loaded from anywhere."""

from __future__ import annotations

from importlib.resources import files

from peelwise.records.allocation import AllocationRecord
from peelwise.records.base import SealedRecord
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.records.quantise import QuantiseRecord
from peelwise.show.html.markup import esc
from peelwise.show.words import VERDICTS, amount

# Nothing may be loaded from anywhere and nothing may run, whatever a record's strings contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def document(title: str, body_html: str) -> str:
    """Return a whole HTML document with the style sheet inside.

    Args:
        title: Text of the tab.
        body_html: Markup of the body.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/><link rel="icon" href="data:,"/>'
        f"<title>{esc(title)}</title><style>{style_sheet()}</style></head>"
        f"<body>{body_html}</body></html>\n"
    )


def facts(record: SealedRecord | QuantiseRecord | AllocationRecord | QuantcheckRecord) -> str:
    """Return the line under the title: what was measured, and when."""
    model = record.model
    found = (
        f"{amount(model.parameters)} parameters",
        f"{model.blocks} blocks",
        model.architecture,
        model.dtype,
        record.created,
    )
    return f'<p class="facts">{"".join(f"<span>{esc(fact)}</span>" for fact in found)}</p>'


def heading(command: str, record: SealedRecord | QuantiseRecord | AllocationRecord | QuantcheckRecord) -> str:
    """Return how the head of every report on one model begins: the command, the model, and the line below."""
    return f'<header><p class="eyebrow">peelwise {command}</p><h1>{esc(record.model.name)}</h1>{facts(record)}'


def style_sheet() -> str:
    """Return the style sheet, its verdict colours taken from the one place that holds them."""
    light = "".join(f"--{colour}:{words.light};" for colour, words in VERDICTS.items())
    dark = "".join(f"--{colour}:{words.dark};" for colour, words in VERDICTS.items())
    sheet = files("peelwise.show.html").joinpath("report.css").read_text(encoding="utf-8")
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{sheet}"
