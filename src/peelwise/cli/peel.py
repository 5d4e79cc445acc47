"""The command ``peelwise peel``."""

from __future__ import annotations

from typing import Annotated

import typer

from peelwise.cli.inputs import open_both
from peelwise.cli.options import (
    BudgetOption,
    ControlsOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    ForceOption,
    InDistributionOption,
    JsonOption,
    LengthOption,
    MarginOption,
    ModelArgument,
    OutOption,
    PickleOption,
    SeedOption,
    TextOption,
    TokenizerOption,
    TokensOption,
)
from peelwise.cli.output import save_and_print
from peelwise.cli.terminal import progress_bar, quiet_warnings

app = typer.Typer()


@app.command(
    epilog='Example: `peelwise peel smollm2 --maps "auto" --tokens 3000 --budget 10m --out out/peel`',
    short_help="Bound a model's loss by stacks of layer-wise references.",
)
def peel(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = "text",
    tokenizer: TokenizerOption = None,
    tokens: TokensOption = 6_400,
    sequence_length: LengthOption = 128,
    budget: BudgetOption = "10m",
    maps: Annotated[str, typer.Option(help='auto, or maps like "3,3,3,4 4,4,4,4": a station 1..L per block.')] = "auto",
    start: Annotated[str, typer.Option(help="warm: from the block's own weights; cold: from initialisation.")] = "warm",
    weighted: Annotated[
        bool, typer.Option("--weighted/--unweighted", help="Weight coordinates by their inverse variance.")
    ] = True,
    rounds: Annotated[int | None, typer.Option(min=1, help="Most rounds of fitting a block.")] = None,
    dense_references: Annotated[
        bool, typer.Option("--dense-references", help="Low-bit models: let references leave the formats of their maps.")
    ] = False,
    in_distribution: InDistributionOption = False,
    margin: MarginOption = None,
    controls: ControlsOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    force: ForceOption = False,
    fail_on_bound: Annotated[
        bool, typer.Option("--fail-on-bound", help="Exit 1 if a map is shown to beat the model and its head control.")
    ] = False,
    as_json: JsonOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Peel MODEL (arXiv:2605.02853): what do reference blocks, fitted one after another to its stations, reach?

    Every map says which station each block regresses to; a light head goes on top, and the model gets the same.
    References of low-bit maps obey the formats of these maps.
    Ctrl-C ends the peel early and reports what was finished.
    """
    from typing import cast

    from peelwise.api.inputs import parse_seconds
    from peelwise.api.peel import PeelReport, checked_maps, parse_maps
    from peelwise.records.files import RECORD_FILE
    from peelwise.records.folder import check_free
    from peelwise.show.peel.words import beats_head
    from peelwise.tasks.peel.run import PeelSettings, Start, run_peel

    settings = PeelSettings(
        parse_seconds(budget),
        checked_maps(parse_maps(maps)),
        cast(Start, start),
        weighted,
        rounds,
        dense_references=dense_references,
        controls=controls,
        margin_nats=margin,
    )
    if out is not None:
        check_free(out, force=force, ours=RECORD_FILE)
    draw = {"tokens": tokens, "sequence_length": sequence_length, "seed": seed, "in_distribution": in_distribution}
    how = {"device": device, "dtype": dtype, "allow_pickle": allow_pickle, "tokenizer": tokenizer}
    opened, probe = open_both(model, text, field, draw, how)
    with quiet_warnings(), progress_bar() as watcher:
        outcome = run_peel(opened.model, probe, settings, name=opened.name, source=opened.source, watcher=watcher)
    report = PeelReport(outcome.record, outcome.witness, outcome.probe)
    save_and_print(report, out, force=force, as_json=as_json)
    if fail_on_bound and beats_head(report.record):
        raise typer.Exit(1)
