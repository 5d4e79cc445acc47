"""The command line: ``peelwise check | audit | peel | quantise | allocate | quantcheck | compare | anatomy`` on models,
``plan`` on configs, ``verify | apply | report`` on certificates, and ``export | watch | serve | demo-training`` on
run histories.

Exit codes: 0 fine, 1 finding, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from peelwise.cli import allocate, anatomy, audit, certificate, check, compare, peel, plan, quantcheck, quantise, runs
from peelwise.cli.several import check_shares, one_voice
from peelwise.cli.terminal import one_line, stderr
from peelwise.errors import PeelwiseError

app = typer.Typer(
    name="peelwise",
    help="Tells, block by block, how far a transformer is from what it could achieve, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
# In the order of --help.
COMMANDS = (check, audit, peel, quantise, allocate, quantcheck, compare, anatomy, plan, certificate, runs)
for commands in COMMANDS:
    app.add_typer(commands.app)
_INTERRUPTED = 130


def main() -> None:
    """Run the command line; errors a user can act on become one or two lines and exit code 2."""
    # OpenMP threads that spin while they wait are slow on a machine that does other work too. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with one_voice():
        try:
            app()
        except PeelwiseError as error:
            stderr.print(f"[bold red]error:[/] {escape(one_line(error))}", soft_wrap=True)
            sys.exit(2)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is imported by commands that need it
                raise
            advice = "The GPU's memory is full. Use fewer --micro-batch-tokens, or --device cpu."
            stderr.print(f"[bold red]error:[/] {advice}", soft_wrap=True)
            sys.exit(2)
        except SystemExit as stop:
            if stop.code == _INTERRUPTED:  # what typer makes of Ctrl-C
                stderr.print("Stopped before there was anything to report; nothing was written.")
            raise


@app.callback(invoke_without_command=True)
def version_option(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Print the version if asked."""
    check_shares(context.invoked_subcommand)
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"peelwise {installed('peelwise')}")
        raise typer.Exit
