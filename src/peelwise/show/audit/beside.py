"""Several audits on one page, one below the other, so that the same block of each stands in one column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peelwise.records.audit import AuditRecord
from peelwise.show.audit.report import verdicts
from peelwise.show.audit.words import conclusion
from peelwise.show.html.markup import esc, paragraph
from peelwise.show.html.page import document, facts
from peelwise.show.words import nats


@dataclass(frozen=True)
class Entry:
    """One audit: what is said about its model, and where its own report is, relative to the page."""

    title: str
    about: str
    href: str
    record: AuditRecord


def render_html(title: str, about: str, entries: Sequence[Entry]) -> str:
    """Return one self-contained HTML document that shows each audit's loss, verdicts and conclusion.

    Args:
        title: of the page.
        about: a sentence or two under it.
        entries: at least one audit.
    """
    first = entries[0].record
    header = (
        f'<header><p class="eyebrow">peelwise audit</p><h1>{esc(title)}</h1>{facts(first)}'
        f'<p class="conclusion">{esc(about)}</p></header>'
    )
    return document(f"{title} – peelwise audit", f"{header}<main>{''.join(map(_card, entries))}</main>")


def _card(entry: Entry) -> str:
    record = entry.record
    return (
        f'<section class="beside"><h2>{esc(entry.title)}</h2>{paragraph(entry.about)}'
        f"{paragraph(f'Loss {nats(record.loss.current)} nats per token. {conclusion(record)}')}"
        f'{verdicts(record)}<p><a href="{esc(entry.href)}">The whole report</a></p></section>'
    )
