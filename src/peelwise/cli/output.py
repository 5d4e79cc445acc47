"""What a command prints: a table, or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from peelwise.cli.terminal import stderr

if TYPE_CHECKING:
    from peelwise.api.report import Report


def print_report(report: Report, out: Path | None, as_json: bool) -> None:
    """Print a report as a table, or as JSON; ``out`` is where it was saved."""
    from peelwise.show.views import print_record

    if as_json:
        typer.echo(report.to_json())
        return
    print_record(report.record, Console(highlight=False), out)
    if out is not None and not (out / "report.html").exists():
        stderr.print('No report.html: pip install "peelwise\\[plots]", then `peelwise report`.')
