"""The command ``peelwise peel``."""

from __future__ import annotations

from typing import Annotated

import typer

from peelwise.cli.options import (
    DeviceOption,
    DtypeOption,
    FieldOption,
    ForceOption,
    InDistributionOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutOption,
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
from peelwise.cli.output import print_report
from peelwise.cli.terminal import at_work
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.tasks.peel.settings import PeelSettings, Start

app = typer.Typer()


@app.command(
    epilog='Example: `peelwise peel smollm2 --maps "auto" --tokens 3000 --budget 10m --out out/peel`',
    short_help="Bound a model's loss by stacks of layer-wise references.",
)
def peel(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    budget: Annotated[str, flag(PeelSettings, "budget", metavar="TIME")] = str(PeelSettings.budget),
    maps: Annotated[str, flag(PeelSettings, "maps", metavar="MAPS")] = str(PeelSettings.maps),
    start: Annotated[Start, flag(PeelSettings, "start")] = PeelSettings.start,
    weighted: Annotated[bool, flag(PeelSettings, "weighted", "--weighted/--unweighted")] = PeelSettings.weighted,
    rounds: Annotated[int | None, flag(PeelSettings, "rounds", min=1)] = PeelSettings.rounds,
    steps: Annotated[bool, flag(PeelSettings, "steps")] = PeelSettings.steps,
    dense_references: Annotated[
        bool, flag(PeelSettings, "dense_references", "--dense-references")
    ] = PeelSettings.dense_references,
    beam_width: Annotated[int, flag(PeelSettings, "beam_width", min=1)] = PeelSettings.beam_width,
    controls: Annotated[bool, flag(PeelSettings, "controls")] = PeelSettings.controls,
    margin: Annotated[float | None, flag(PeelSettings, "margin")] = PeelSettings.margin,
    micro_batch_tokens: Annotated[
        int, flag(PeelSettings, "micro_batch_tokens", min=1)
    ] = PeelSettings.micro_batch_tokens,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    tokenizer: TokenizerOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    fail_on_bound: Annotated[
        bool,
        output("--fail-on-bound", help="Exit with code 1 if a map is shown to beat the model and its head control."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Peel MODEL (arXiv:2605.02853): what do reference blocks, fitted one after another to its stations, reach?

    Every map says which station each block regresses to; a light head goes on top, and the model gets the same.
    References of low-bit layers keep the formats of these layers.
    Ctrl-C ends the peel early and reports what was finished.
    """
    from peelwise.api import peel as api
    from peelwise.show.peel.words import beats_head

    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    settings = PeelSettings(
        budget,
        maps,
        start,
        weighted,
        rounds,
        steps,
        dense_references,
        beam_width,
        controls,
        margin,
        micro_batch_tokens,
    )
    opening = OpenOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream)
    with at_work(f"Opening {model} ...") as watcher:
        report = api.peel(model, probe, settings, opening=opening, out=out, force=force, progress=watcher)
    print_report(report, out, as_json)
    if fail_on_bound and beats_head(report.record):
        raise typer.Exit(1)
