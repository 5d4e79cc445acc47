"""The commands about run histories, ``peelwise export | watch | serve | demo-training``."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from peelwise.cli.options import ForceOption, output

app = typer.Typer()

HistoryArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Run history, such as run.db.")]

PortOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, help="Where to listen; 0: any free one.", show_default="8717, or a free one if it is taken"
    ),
]
OpenOption = Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")]


@app.command(epilog="Example: `peelwise export run.db --to csv --out exported`", short_help="Export a run history.")
def export(
    history: HistoryArgument,
    to: Annotated[
        Literal["csv", "jsonl", "parquet", "tensorboard"], output(help="Format of the files.", show_choices=True)
    ],
    out: Annotated[Path, output(metavar="DIR", help="Folder for the files, one per table.")],
    run: Annotated[int | None, typer.Option(help="Number of one run.", show_default="all of them")] = None,
    force: ForceOption = False,
) -> None:
    """Export the run history FILE, which may still be being written, for other programs."""
    from peelwise.api import files as api

    names = api.export_history(history, to, out, run=run, force=force)
    typer.echo(f"wrote {out}: {', '.join(names)}")


@app.command(epilog="Example: `peelwise watch run.db`", short_help="Follow a run in the terminal.")
def watch(
    history: HistoryArgument,
    run: Annotated[int | None, typer.Option(help="Number of the run.", show_default="the newest")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds between two reads of the file.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the present state and exit.")] = False,
) -> None:
    """Follow the run history FILE live: verdicts, what blocks could gain, what happened. Ctrl-C ends it."""
    from peelwise.show.runs.watch import watch as follow
    from peelwise.store.reader import RunReader

    console = Console(highlight=False)
    with RunReader(history) as reader, suppress(KeyboardInterrupt):
        follow(reader, run, console, seconds=seconds, once=once or not console.is_terminal)


@app.command(
    epilog="Example: `peelwise serve run.db`, then `ssh -L 8717:localhost:8717 HOST` from elsewhere.",
    short_help="Follow runs in a browser.",
)
def serve(
    histories: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Run histories, such as run.db.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; anything but this machine asks for a token.")
    ] = "127.0.0.1",
    port: PortOption = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A further name of this machine.")
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Ask for a token here too: other users share the machine.")
    ] = False,
    browser: OpenOption = True,
) -> None:
    """Serve a local page that follows the run histories FILE... live, several runs side by side. It only reads.

    The page is for this machine unless --host says otherwise. Ctrl-C ends it.
    """
    from peelwise.show.dashboard.serve import Address
    from peelwise.show.dashboard.serve import serve as serve_page

    address = Address(host, port, tuple(allow_host or ()), token=token)
    with suppress(KeyboardInterrupt):
        serve_page(histories, address, browser=browser, say=typer.echo)


@app.command(
    epilog="Example: `peelwise demo-training --store run.db`",
    short_help="Train a small GPT and see a fault arrive, live.",
)
def demo_training(
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the run history here.", show_default="gone afterwards")
    ] = None,
    port: PortOption = None,
    browser: OpenOption = True,
) -> None:
    """Train a small GPT on real text for a few minutes, cut one block off from its gradients half way,
    and see it on the live page.

    Ctrl-C ends it. Where the output is no terminal, it ends when training is done.
    """
    from peelwise.cli.demo_training import demonstrate
    from peelwise.show.dashboard.serve import Address

    stay = sys.stdout.isatty()
    demonstrate(store, Address(port=port), browser=browser, stay=stay, say=typer.echo)
