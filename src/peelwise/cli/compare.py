"""The command ``peelwise compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
from peelwise.tasks.compare.settings import CompareSettings

if TYPE_CHECKING:
    from peelwise.records.compare import CompareRecord, CompareSeries

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise compare runs/step-1000 runs/step-2000 --text notes.txt --out out/changes`",
    short_help="Compare two checkpoints: which block's change hurt.",
)
def compare(
    old: Annotated[
        str, typer.Argument(metavar="OLD", help="Folder, .gguf file, or `smollm2`; without NEW: folder of a run.")
    ],
    new: Annotated[str | None, typer.Argument(metavar="NEW", help="What was made from OLD.")] = None,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    budget: Annotated[str, flag(CompareSettings, "budget", metavar="TIME")] = str(CompareSettings.budget),
    layers_of: Annotated[int, flag(CompareSettings, "layers_of", min=0)] = CompareSettings.layers_of,
    margin: Annotated[float | None, flag(CompareSettings, "margin")] = CompareSettings.margin,
    path: Annotated[bool, flag(CompareSettings, "path")] = CompareSettings.path,
    micro_batch_tokens: Annotated[
        int, flag(CompareSettings, "micro_batch_tokens", min=1)
    ] = CompareSettings.micro_batch_tokens,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None, output(metavar="DIR", help="Folder for certificate and page; of a run, compare.json.")
    ] = None,
    force: ForceOption = False,
    every_part: Annotated[bool, output("--all", help="List every part, not only those that changed.")] = False,
    fail_on: Annotated[
        Literal["hurt", "worse"] | None,
        output(help="Exit with code 1 if a part's change hurt, or if NEW is worse, by more than the margin."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which part's change from OLD to NEW hurt, which helped, and what kind of change it is.

    Every block, the embedding, the final norm and the head are exchanged between the two, one at a time, then one after
    another. Without NEW, OLD is the folder of a run, and each checkpoint in it is compared with the one before.
    """
    from peelwise.api import compare as api
    from peelwise.show.audit.terminal import print_view
    from peelwise.show.compare import terminal

    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    settings = CompareSettings(budget, layers_of, margin, path, micro_batch_tokens)
    opening = OpenOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream)
    shown: CompareRecord | CompareSeries
    if new is None:
        with at_work(f"Opening the checkpoints in {old} ...") as watcher:
            run = api.compare_run(old, probe, settings, opening=opening, out=out, force=force, progress=watcher)
        shown, found, view = run.record, run.record.pairs, terminal.render_series(run.record)
    else:
        with at_work(f"Opening {old} and {new} ...") as watcher:
            report = api.compare(old, new, probe, settings, opening=opening, out=out, force=force, progress=watcher)
        shown, found = report.record, (report.record,)
        view = terminal.render(report.record, out, every=every_part)
    if as_json:
        typer.echo(shown.to_json())
    else:
        print_view(view, Console(highlight=False))
    if any(_fails(record, fail_on) for record in found):
        raise typer.Exit(1)


def _fails(record: CompareRecord, fail_on: str | None) -> bool:
    worse = record.loss.damage.low > record.margin_nats
    hurt = bool(record.conclusion.hurt or record.conclusion.hurt_ends)
    return {"hurt": hurt, "worse": worse}.get(fail_on or "", False)
