"""The commands that show a live page, ``peelwise serve | demo``."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

PortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Default: 8717, or a free one if it is taken; 0: any free one.")
]
OpenOption = Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")]


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


@app.command(epilog="Example: `peelwise demo --store run.db`", short_help="See a fault arrive, live.")
def demo(
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the run history here; default: gone afterwards.")
    ] = None,
    port: PortOption = None,
    browser: OpenOption = True,
) -> None:
    """Train a small GPT on real text for a few minutes, starve one of its blocks half way, and see it on the live page.

    Ctrl-C ends it. Where the output is no terminal, it ends when training is done.
    """
    from peelwise.demo import demonstrate
    from peelwise.show.dashboard.serve import Address

    stay = sys.stdout.isatty()
    demonstrate(store, Address(port=port), browser=browser, stay=stay, say=typer.echo)
