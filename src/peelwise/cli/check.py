"""The command ``peelwise check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    ShardOption,
    StoredOption,
    StreamOption,
    TextOption,
    TokenizerOption,
    TokensOption,
    flag,
    output,
    probe_options,
)
from peelwise.cli.several import joined
from peelwise.cli.terminal import at_work
from peelwise.errors import OptionError
from peelwise.model.options import OpenOptions, ShardedOptions
from peelwise.probe.options import ProbeOptions
from peelwise.tasks.check.settings import CHECK_LENGTH, CHECK_TOKENS, CheckSettings

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise check smollm2 --out out/check`",
    short_help="Find blocks unlike their neighbours.",
)
def check(
    model: ModelArgument,
    text: TextOption = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Look at the weights alone, without text.", rich_help_panel="Text")
    ] = False,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = CHECK_TOKENS,
    sequence_length: LengthOption = CHECK_LENGTH,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    signals: Annotated[str | None, flag(CheckSettings, "signals", metavar="NAMES")] = None,
    most_witnesses: Annotated[int, flag(CheckSettings, "most_witnesses", min=0)] = CheckSettings.most_witnesses,
    micro_batch_tokens: Annotated[
        int, flag(CheckSettings, "micro_batch_tokens", min=1)
    ] = CheckSettings.micro_batch_tokens,
    stack: Annotated[str | None, flag(CheckSettings, "stack", metavar="NAME")] = CheckSettings.stack,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    shard: ShardOption = ShardedOptions.shard,
    tokenizer: TokenizerOption = None,
    out: Annotated[Path | None, output(metavar="DIR", help="Folder for certificate, factors and report.")] = None,
    force: ForceOption = False,
    fail_on: Annotated[
        Literal["unlike"] | None, output(help="Exit with code 1 if a block is unlike its neighbours.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which blocks of MODEL are unlike their neighbours, and what says so.

    Signals of the weights and of one pass forward and back over a little text are compared over depth. For blocks that
    stand out, a factor on one of their parts may lower the loss: that is proved on text that it was not chosen on.
    NAMES are separated by commas; the page on signals lists them. `torchrun --nproc-per-node 2 -m peelwise check MODEL`
    shares it between two processes; with --shard, the weights too.
    """
    from peelwise.api import check as api
    from peelwise.show.views import print_record

    if no_text and text:
        raise OptionError("--no-text and --text exclude each other. Leave one of them out.")
    settings = CheckSettings(_names(signals), most_witnesses, micro_batch_tokens, stack)
    probe = None if no_text else probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    opening = ShardedOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream, shard)
    with joined(device), at_work(f"Opening {model} ...") as watcher:
        report = api.check(
            model, probe, settings, text=not no_text, opening=opening, out=out, force=force, progress=watcher
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        print_record(report.record, Console(highlight=False), out)
    if fail_on is not None and report.record.unlike:
        raise typer.Exit(1)


def _names(signals: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in (signals or "").split(","))))
