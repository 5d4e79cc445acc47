"""The command ``peelwise quantcheck``."""

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
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise quantcheck out/int3 --against out/full --text notes.txt --out out/check`",
    short_help="Compare a quantised model with its parent.",
)
def quantcheck(
    quantised: Annotated[
        str, typer.Argument(metavar="QUANTISED", help="Folder, .gguf file, folder of a PEFT adapter, or `smollm2`.")
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="PARENT",
            help="The model that it was made from, or the folder of a PEFT adapter.",
            rich_help_panel="Measurement",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The model before the fine-tune that made PARENT: how much of the fine-tune survives.",
            rich_help_panel="Measurement",
        ),
    ] = None,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    budget: Annotated[str, flag(QuantcheckSettings, "budget", metavar="TIME")] = str(QuantcheckSettings.budget),
    form: Annotated[str | None, flag(QuantcheckSettings, "format", "--format", metavar="FORMAT")] = None,
    max_sweeps: Annotated[int, flag(QuantcheckSettings, "max_sweeps", min=1)] = QuantcheckSettings.max_sweeps,
    tolerance: Annotated[float, flag(QuantcheckSettings, "tolerance", min=0.0)] = QuantcheckSettings.tolerance,
    micro_batch_tokens: Annotated[
        int, flag(QuantcheckSettings, "micro_batch_tokens", min=1)
    ] = QuantcheckSettings.micro_batch_tokens,
    activations: Annotated[str | None, flag(QuantcheckSettings, "activations", metavar="FORMAT")] = None,
    allocate: Annotated[float | None, flag(QuantcheckSettings, "allocate", metavar="BITS")] = None,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None,
        output("--out", metavar="DIR", help="Folder for record, page and picture, or FILE.json for the record alone."),
    ] = None,
    resume: Annotated[
        bool, output("--resume/--no-resume", help="Go on where an interrupted run with the same --out ended.")
    ] = True,
    force: ForceOption = False,
    every_layer: Annotated[
        bool, output("--all", help="List every layer, not only those with most to recover.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell which part of the damage in QUANTISED its bits explain, and which better codes would recover.

    For every layer: its output error for the parent's inputs, the quantisation gap (an upper bound) and what is
    recoverable at the same bit width (certified); and the same of the loss, on text that nothing was fitted on.
    """
    from peelwise.api import quantcheck as api
    from peelwise.engine.kept import begin_anew
    from peelwise.show.quantcheck.terminal import MOST_LAYERS, print_record

    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    settings = QuantcheckSettings(budget, form, max_sweeps, tolerance, micro_batch_tokens, activations, allocate)
    opening = OpenOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream)
    if out is not None and not resume:
        begin_anew(out)
    with at_work(f"Opening {quantised} and {against} ...") as watcher:
        report = api.quantcheck(
            quantised,
            against,
            probe,
            settings,
            base=base,
            opening=opening,
            out=out,
            force=force,
            progress=watcher,
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        print_record(report.record, Console(highlight=False), None if every_layer else MOST_LAYERS)
        if out is not None:
            typer.echo(f"Written to {out}.")
