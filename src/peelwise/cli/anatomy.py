"""The command ``peelwise anatomy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from peelwise.cli.options import (
    DeviceOption,
    DtypeOption,
    FieldOption,
    ForceOption,
    InDistributionOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    PickleOption,
    SeedOption,
    StoredOption,
    StreamOption,
    TextOption,
    TokenizerOption,
    TokensOption,
    flag,
    output,
    probe_options,
)
from peelwise.cli.terminal import at_work
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.tasks.anatomy.settings import AnatomySettings

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise anatomy smollm2 --budget 10m --out out/anatomy`",
    short_help="How much each block matters, and how far it bends.",
)
def anatomy(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    budget: Annotated[str, flag(AnatomySettings, "budget", metavar="TIME")] = str(AnatomySettings.budget),
    studies: Annotated[str | None, flag(AnatomySettings, "studies", metavar="NAMES")] = None,
    margin: Annotated[float | None, flag(AnatomySettings, "margin")] = AnatomySettings.margin,
    micro_batch_tokens: Annotated[
        int, flag(AnatomySettings, "micro_batch_tokens", min=1)
    ] = AnatomySettings.micro_batch_tokens,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    tokenizer: TokenizerOption = None,
    out: Annotated[Path | None, output(metavar="DIR", help="Folder for anatomy.json and the page.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell how much each block of MODEL matters, what other blocks tell of its weights, and how far it can be bent.

    Every cost has its interval, and every claim about weights the null control that decides it. NAMES are separated by
    commas. What is not reached within the budget is listed as not measured; with --out, the same command goes on from
    there, also where it was killed.
    """
    from peelwise.api import anatomy as api
    from peelwise.show.views import print_record

    settings = AnatomySettings(budget, _names(studies), margin, micro_batch_tokens)
    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    opening = OpenOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream)
    with at_work(f"Opening {model} ...") as watcher:
        report = api.anatomy(model, probe, settings, opening=opening, out=out, force=force, progress=watcher)
    if as_json:
        typer.echo(report.to_json())
    else:
        print_record(report.record, Console(highlight=False), out)


def _names(studies: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in (studies or "").split(","))))
