"""The command ``peelwise allocate``."""

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
from peelwise.tasks.allocate.settings import AllocateSettings

app = typer.Typer()


@app.command(
    epilog="Example: `peelwise allocate path/to/model --bits 3.5 --out out/plan`, "
    "then `peelwise quantise path/to/model --plan out/plan --out out/mixed`",
    short_help="Tell which layers should get how many bits.",
)
def allocate(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    bits: Annotated[float, flag(AllocateSettings, "bits")] = AllocateSettings.bits,
    formats: Annotated[list[str] | None, flag(AllocateSettings, "formats", metavar="FORMAT")] = None,
    points: Annotated[int, flag(AllocateSettings, "points", min=0)] = AllocateSettings.points,
    micro_batch_tokens: Annotated[
        int, flag(AllocateSettings, "micro_batch_tokens", min=1)
    ] = AllocateSettings.micro_batch_tokens,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None, output("--out", metavar="DIR", help="Folder for the plan, also in the syntax of other tools.")
    ] = None,
    resume: Annotated[
        bool, output("--resume/--no-resume", help="Go on where an interrupted run with the same --out ended.")
    ] = True,
    force: ForceOption = False,
    every_layer: Annotated[bool, output("--all", help="List every layer, not only those that cost most.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell which layers of MODEL should get how many bits, so that it loses least within a budget.

    What each format costs in each layer is predicted from squared gradients and output errors, corrected by blocks that
    are really measured, and spent by an integer programme. Layers that share their input decide together.
    """
    from peelwise.api import allocate as api
    from peelwise.show.allocate.terminal import MOST_LAYERS, render
    from peelwise.show.audit.terminal import print_view

    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    settings = AllocateSettings(bits, tuple(formats or ()), points, micro_batch_tokens)
    opening = OpenOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream)
    with at_work(f"Opening {model} ...") as watcher:
        report = api.allocate(
            model, probe, settings, opening=opening, out=out, resume=resume, force=force, progress=watcher
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        print_view(render(report.record, None if every_layer else MOST_LAYERS), Console(highlight=False))
        if out is not None:
            typer.echo(f"Written to {out}.")
