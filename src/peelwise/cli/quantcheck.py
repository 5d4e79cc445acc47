"""The command ``peelwise quantcheck``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from peelwise.cli.inputs import open_both
from peelwise.cli.options import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    ForceOption,
    JsonOption,
    LengthOption,
    PickleOption,
    SeedOption,
    TextOption,
    TokenizerOption,
    TokensOption,
)
from peelwise.cli.terminal import progress_bar, quiet_warnings, status
from peelwise.errors import OutputError
from peelwise.records.folder import write_text_file

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise quantcheck out/int3 --against out/full --text notes.txt --out out/check.json`",
    short_help="Compare a quantised model with its parent.",
)
def quantcheck(
    quantised: Annotated[str, typer.Argument(metavar="QUANTISED", help="Folder, .gguf file, or `smollm2`.")],
    against: Annotated[str, typer.Option("--against", metavar="PARENT", help="The model that it was made from.")],
    form: Annotated[
        str | None, typer.Option("--format", help="Format of plain weights quantised before, such as int3:group=32.")
    ] = None,
    text: TextOption = None,
    field: FieldOption = "text",
    tokenizer: TokenizerOption = None,
    tokens: TokensOption = 6_400,
    sequence_length: LengthOption = 128,
    budget: BudgetOption = "10m",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for the record.")] = None,
    force: ForceOption = False,
    every_layer: Annotated[
        bool, typer.Option("--all", help="List every layer, not only those with most left.")
    ] = False,
    as_json: JsonOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Tell which part of the damage in QUANTISED its bits explain, and which better codes would win back.

    For every layer: its output error for the parent's inputs, the price of precision (at most) and what is left on the
    table (certified, at the same bits); and the same of the loss, on text that nothing was fitted on.
    """
    from peelwise.api.inputs import parse_seconds
    from peelwise.formats.table import parse_format
    from peelwise.model.checkpoints import open_model
    from peelwise.show.quantcheck.terminal import MOST_LAYERS, print_record
    from peelwise.tasks.quantcheck.layers import Candidate, QuantcheckSettings
    from peelwise.tasks.quantcheck.run import run_quantcheck

    settings = QuantcheckSettings(parse_seconds(budget), parse_format(form) if form else None)
    if out is not None and out.exists() and not force:
        raise OutputError(f"{out} exists. Choose another --out, or replace it with --force.")
    how = {"device": device, "dtype": dtype, "allow_pickle": allow_pickle, "tokenizer": tokenizer}
    opened, probe = open_both(
        quantised, text, field, {"tokens": tokens, "sequence_length": sequence_length, "seed": seed}, how
    )
    with quiet_warnings(), status(f"Opening {against} ..."):
        parent = open_model(against, with_tokenizer=False, **how)  # type: ignore[arg-type]
    pair = (Candidate(opened.model, opened.name, opened.source), Candidate(parent.model, parent.name, parent.source))
    with quiet_warnings(), progress_bar() as watcher:
        record = run_quantcheck(*pair, probe, settings, watcher)
    if out is not None:
        write_text_file(out, record.to_json() + "\n")
    if as_json:
        typer.echo(record.to_json())
    else:
        print_record(record, Console(highlight=False), None if every_layer else MOST_LAYERS)
