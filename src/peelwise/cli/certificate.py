"""The commands about certificates, ``peelwise verify | apply | report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from peelwise.cli.options import DeviceOption, FolderArgument, ForceOption, PickleOption, output
from peelwise.cli.terminal import status
from peelwise.model.options import OpenOptions

app = typer.Typer()

WhereOption = Annotated[
    str | None,
    typer.Option(help="Where the model is.", show_default="where it was opened for the audit", rich_help_panel="Model"),
]


@app.command(epilog="Example: `peelwise verify out/demo --full`", short_help="Recheck a certificate.")
def verify(
    folder: FolderArgument,
    model: WhereOption = None,
    full: Annotated[bool, typer.Option("--full", help="Recheck every block's numbers too (slower).")] = False,
    device: DeviceOption = OpenOptions.device,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
) -> None:
    """Recompute the losses that the certificate in DIR claims: holds, does not hold, or not the same model or data.

    Prints what was rechecked and what was not. Exit code 0 if it holds, 1 if not.
    """
    from peelwise.api import certificate as api

    with status("Recomputing the certified losses ..."):
        result = api.verify(folder, model, full=full, opening=OpenOptions(device, allow_pickle=allow_pickle))
    console = Console(highlight=False)
    for check in result.checks:
        mark = "ok" if check.holds else "[bold red]differs[/]"
        console.print(f"  {check.name:<34} certified {check.recorded:+.6f}   found {check.found:+.6f}   {mark}")
    style = "bold green" if result.holds else "bold red"
    console.print(f"[{style}]{result.status}[/]: {escape(result.reason)}", soft_wrap=True)
    if result.rechecked:
        for words, what in (("Rechecked", result.rechecked), ("Not rechecked", result.not_rechecked)):
            console.print(f"{words}: {'; '.join(what)}.", soft_wrap=True)
        console.print(f"Tolerance: {result.tolerance:g} nats per token.")
    if not result.holds:
        raise typer.Exit(1)


@app.command(
    epilog="Example: `peelwise apply out/demo --model smollm2 --out out/better`",
    short_help="Merge the witness.",
)
def apply(
    folder: FolderArgument,
    out: Annotated[Path, output(metavar="NEWDIR", help="New model folder, loadable by transformers.")],
    model: WhereOption = None,
    device: DeviceOption = OpenOptions.device,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    force: ForceOption = False,
) -> None:
    """Write a model folder with the composed witness of DIR merged, and check that its loss is the certified one."""
    from peelwise.api import certificate as api

    with status("Merging the witness and checking the result ..."):
        opening = OpenOptions(device, allow_pickle=allow_pickle)
        loss = api.apply(folder, model, out, force=force, opening=opening)
    typer.echo(f"{out}: loss {loss:.4f} nats per token on report, as certified.")


@app.command(epilog="Example: `peelwise report out/demo`", short_help="Render the HTML report again.")
def report(
    folder: FolderArgument,
    out: Annotated[Path | None, output(metavar="FILE", help="The page.", show_default="report.html in DIR")] = None,
) -> None:
    """Render the HTML report again from the certificate in DIR. Needs neither the model nor torch."""
    from peelwise.api import files as api

    typer.echo(f"wrote {api.write_report(folder, out)}")
