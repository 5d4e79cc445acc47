"""The command ``peelwise quantise``."""

from __future__ import annotations

from enum import StrEnum
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
from peelwise.tasks.quantise.settings import QuantiseSettings

app = typer.Typer()


class To(StrEnum):
    """What is written."""

    folder = "folder"
    gguf = "gguf"
    torchao = "torchao"


@app.command(
    epilog="Example: `peelwise quantise path/to/model --format int3:group=64 --text notes.txt --out out/int3`",
    short_help="Put a model into a low-bit format, without training.",
)
def quantise(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    form: Annotated[str | None, flag(QuantiseSettings, "format", "--format", metavar="FORMAT")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="DIR",
            help="Formats of single layers: the folder of `peelwise allocate`, or a JSON object of formats by layer.",
            rich_help_panel="Measurement",
        ),
    ] = None,
    skip: Annotated[list[str] | None, flag(QuantiseSettings, "skip", metavar="NAME")] = None,
    max_sweeps: Annotated[int, flag(QuantiseSettings, "max_sweeps", min=0)] = QuantiseSettings.max_sweeps,
    tolerance: Annotated[float, flag(QuantiseSettings, "tolerance", min=0.0)] = QuantiseSettings.tolerance,
    asymmetric: Annotated[bool, flag(QuantiseSettings, "asymmetric")] = QuantiseSettings.asymmetric,
    curvature: Annotated[bool, flag(QuantiseSettings, "curvature")] = QuantiseSettings.curvature,
    micro_batch_tokens: Annotated[
        int, flag(QuantiseSettings, "micro_batch_tokens", min=1)
    ] = QuantiseSettings.micro_batch_tokens,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None, output("--out", metavar="DIR", help="Folder for the quantised model and its record.")
    ] = None,
    to: Annotated[
        To,
        output(
            "--to",
            help="Write a folder of peelwise.nn layers, the opened .gguf file with other codes, or torchao's.",
        ),
    ] = To.folder,
    resume: Annotated[
        bool, output("--resume/--no-resume", help="Go on where an interrupted run with the same --out ended.")
    ] = True,
    force: ForceOption = False,
    every_layer: Annotated[bool, output("--all", help="List every layer, not only those that lose most.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put the linear layers of MODEL's blocks into a low-bit format, without training.

    Layers are solved one after the other, for the inputs that they really get from those before them, by rounding with
    error feedback and coordinate descent. Losses are measured on text that nothing was fitted or chosen on, beside
    rounding to nearest.
    """
    from peelwise.api import quantise as api
    from peelwise.api.allocate import read_plan
    from peelwise.show.audit.terminal import print_view
    from peelwise.show.quantise.terminal import MOST_LAYERS, render

    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    planned = read_plan(plan) if plan is not None else {}
    settings = QuantiseSettings(
        form, tuple(skip or ()), max_sweeps, tolerance, asymmetric, curvature, micro_batch_tokens, planned
    )
    opening = OpenOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream)
    with at_work(f"Opening {model} ...") as watcher:
        report = api.quantise(
            model,
            probe,
            settings,
            opening=opening,
            out=out,
            to=to.value,
            resume=resume,
            force=force,
            progress=watcher,
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        print_view(render(report.record, None if every_layer else MOST_LAYERS), Console(highlight=False))
        if out is not None:
            typer.echo(f"Written to {out}.")
