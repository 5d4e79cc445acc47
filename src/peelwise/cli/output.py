"""What a command leaves: a folder, a table, or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from peelwise.cli.terminal import stderr


def save_and_print(report: Any, out: Path | None, *, force: bool, as_json: bool) -> None:
    """Save what a command found if it is to be kept, and print it."""
    if out is not None:
        report.save(out, force=force)
    print_report(report, out, as_json)


def print_report(report: Any, out: Path | None, as_json: bool) -> None:
    """Print a report as a table, or as JSON."""
    from peelwise.show.views import print_record

    if as_json:
        typer.echo(report.to_json())
        return
    print_record(report.record, Console(highlight=False), out)
    if out is not None and not (out / "report.html").exists():
        stderr.print('No report.html: pip install "peelwise\\[plots]", then `peelwise report`.')
