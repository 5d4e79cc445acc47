"""One record of any kind, as it is shown: says which view belongs to which record."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, RenderableType

from peelwise.records.allocation import AllocationRecord
from peelwise.records.anatomy import AnatomyRecord
from peelwise.records.audit import AuditRecord
from peelwise.records.check import CheckRecord
from peelwise.records.compare import CompareRecord, CompareSeries
from peelwise.records.peel import PeelRecord
from peelwise.records.plan import PlanRecord
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.records.quantise import QuantiseRecord
from peelwise.show.allocate import report as allocate_report
from peelwise.show.allocate import terminal as allocate_terminal
from peelwise.show.allocate import words as allocate_words
from peelwise.show.anatomy import report as anatomy_report
from peelwise.show.anatomy import terminal as anatomy_terminal
from peelwise.show.anatomy import words as anatomy_words
from peelwise.show.audit import report, terminal
from peelwise.show.audit import words as audit_words
from peelwise.show.check import report as check_report
from peelwise.show.check import terminal as check_terminal
from peelwise.show.check import words as check_words
from peelwise.show.compare import report as compare_report
from peelwise.show.compare import terminal as compare_terminal
from peelwise.show.compare import words as compare_words
from peelwise.show.peel import report as peel_report
from peelwise.show.peel import terminal as peel_terminal
from peelwise.show.peel import words as peel_words
from peelwise.show.plan import terminal as plan_terminal
from peelwise.show.plan import words as plan_words
from peelwise.show.quantcheck import report as quantcheck_report
from peelwise.show.quantcheck import terminal as quantcheck_terminal
from peelwise.show.quantcheck import words as quantcheck_words
from peelwise.show.quantise import report as quantise_report
from peelwise.show.quantise import terminal as quantise_terminal
from peelwise.show.quantise import words as quantise_words

PageRecord = (
    AuditRecord
    | CheckRecord
    | PeelRecord
    | CompareRecord
    | CompareSeries
    | AnatomyRecord
    | QuantiseRecord
    | AllocationRecord
    | QuantcheckRecord
)
AnyRecord = PageRecord | PlanRecord


def render(record: AnyRecord, folder: Path | str | None = None) -> RenderableType:
    """Return a view for the terminal that adapts itself to the width it is printed at.

    Args:
        record: what was found.
        folder: where its files are, if they were written.
    """
    if isinstance(record, PlanRecord):
        return plan_terminal.render(record)
    if isinstance(record, QuantcheckRecord):
        return quantcheck_terminal.render(record)
    if isinstance(record, AllocationRecord):
        return allocate_terminal.render(record)
    if isinstance(record, QuantiseRecord):
        return quantise_terminal.render(record)
    if isinstance(record, CheckRecord):
        return check_terminal.render(record, folder)
    if isinstance(record, CompareRecord):
        return compare_terminal.render(record, folder)
    if isinstance(record, CompareSeries):
        return compare_terminal.render_series(record)
    if isinstance(record, AnatomyRecord):
        return anatomy_terminal.render(record, folder)
    if isinstance(record, PeelRecord):
        return peel_terminal.render(record, folder)
    return terminal.render(record, folder)


def print_record(record: AnyRecord, console: Console, folder: Path | str | None = None) -> None:
    """Print the view on a console, in plain characters where the terminal cannot show others."""
    terminal.print_view(render(record, folder), console)


def conclusion(record: AnyRecord) -> str:
    """Return in a few sentences what was found."""
    if isinstance(record, PlanRecord):
        return plan_words.conclusion(record)
    if isinstance(record, QuantcheckRecord):
        return quantcheck_words.conclusion(record)
    if isinstance(record, AllocationRecord):
        return allocate_words.conclusion(record)
    if isinstance(record, QuantiseRecord):
        return quantise_words.conclusion(record)
    if isinstance(record, CheckRecord):
        return check_words.conclusion(record)
    if isinstance(record, CompareRecord):
        return compare_words.conclusion(record)
    if isinstance(record, CompareSeries):
        return "\n".join(f"{one.model.name}: {compare_words.conclusion(one)}" for one in record.pairs)
    if isinstance(record, AnatomyRecord):
        return anatomy_words.conclusion(record)
    return peel_words.conclusion(record) if isinstance(record, PeelRecord) else audit_words.conclusion(record)


def render_html(record: PageRecord) -> str:
    """Return the report as one self-contained HTML document.

    Raises:
        MissingExtraError: If matplotlib is not installed, which the page of a check does not need.
    """
    if isinstance(record, CheckRecord):
        return check_report.render_html(record)
    if isinstance(record, CompareRecord):
        return compare_report.render_html(record)
    if isinstance(record, CompareSeries):
        return compare_report.render_series(record)
    if isinstance(record, AnatomyRecord):
        return anatomy_report.render_html(record)
    if isinstance(record, QuantiseRecord):
        return quantise_report.render_html(record)
    if isinstance(record, QuantcheckRecord):
        return quantcheck_report.render_html(record)
    if isinstance(record, AllocationRecord):
        return allocate_report.render_html(record)
    return peel_report.render_html(record) if isinstance(record, PeelRecord) else report.render_html(record)
