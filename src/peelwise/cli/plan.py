"""The command ``peelwise plan``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from peelwise.cli.options import JsonOption, flag
from peelwise.cli.terminal import quiet_warnings
from peelwise.tasks.plan.settings import PlanSettings

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise plan path/to/config.json --memory 80GB --speed 20T`",
    short_help="Tell what measuring a model would take.",
)
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hugging Face folder, its config.json alone, .gguf file, or `smollm2`."),
    ],
    tokens: Annotated[int | None, flag(PlanSettings, "tokens")] = None,
    processes: Annotated[int, flag(PlanSettings, "processes")] = PlanSettings.processes,
    memory: Annotated[str | None, flag(PlanSettings, "memory", metavar="SIZE")] = None,
    speed: Annotated[str | None, flag(PlanSettings, "speed", metavar="RATE")] = None,
    disk: Annotated[str | None, flag(PlanSettings, "disk", metavar="RATE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what measuring or quantising MODEL would take, command by command: memory, disk, operations and seconds.

    Nothing is loaded and nothing is run: numbers follow from the sizes in its config.
    """
    from peelwise.api import plan as api
    from peelwise.show.views import print_record

    with quiet_warnings():
        report = api.plan(model, PlanSettings(tokens, processes, memory, speed, disk))
    if as_json:
        typer.echo(report.to_json())
    else:
        print_record(report.record, Console(highlight=False))
