"""The command line, ``peelwise audit | peel | quantcheck | verify | apply | report | export | watch | serve | demo``.

Exit codes: 0 fine, 1 finding, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from peelwise import cli_runs
from peelwise.cli_terminal import progress_bar, quiet_warnings, status, stderr
from peelwise.errors import OutputError, PeelwiseError

if TYPE_CHECKING:
    from peelwise.model.checkpoints import OpenedModel
    from peelwise.probes import Probe

app = typer.Typer(
    name="peelwise",
    help="Tells, block by block, how far a transformer is from what it could achieve, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.add_typer(cli_runs.app)
_INTERRUPTED = 130

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .gguf file, or `smollm2`.")]
TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE", help="Text: .txt, .jsonl, .parquet or - ; may be repeated."),
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="DIR", help="Folder of the tokenizer; default: the model's.")
]
FieldOption = Annotated[str, typer.Option(help="Field of .jsonl and .parquet that holds the text.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a certificate.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier result.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]

TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of text to use at most.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
BudgetOption = Annotated[str, typer.Option(help="Wall time: 90s, 5m, 1h.")]
InDistributionOption = Annotated[
    bool, typer.Option("--in-distribution", help="The text is what the model was trained on.")
]
MarginOption = Annotated[float | None, typer.Option(min=0.0, help="Nats per token that matter.")]
ControlsOption = Annotated[bool, typer.Option("--controls/--no-controls", help="Run the null controls.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option(help="Draws and splits the text.")]
OutOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for certificate, witness, report.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of the table.")]
PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Also open pickled weights.")]


def main() -> None:
    """Run the command line; errors a user can act on become one or two lines and exit code 2."""
    # OpenMP threads that spin while they wait are slow on a machine that does other work too. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except PeelwiseError as error:
        stderr.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # what typer makes of Ctrl-C
            stderr.print("Stopped before there was anything to report; nothing was written.")
        raise


@app.command(
    epilog="Example: `peelwise audit smollm2 --text notes.txt --budget 5m --out out/mine`",
    short_help="Audit a model and write a certificate.",
)
def audit(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = "text",
    tokenizer: TokenizerOption = None,
    tokens: TokensOption = 6_400,
    sequence_length: LengthOption = 128,
    budget: BudgetOption = "5m",
    in_distribution: InDistributionOption = False,
    margin: MarginOption = None,
    controls: ControlsOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    force: ForceOption = False,
    fail_on: Annotated[str | None, typer.Option(help="red or yellow: exit 1 if a block is at least that.")] = None,
    as_json: JsonOption = False,
    allow_pickle: PickleOption = False,
    as_stored: Annotated[
        bool, typer.Option("--as-stored", help="Audit the codes of a .gguf file: witnesses at the same bits.")
    ] = False,
) -> None:
    """Audit MODEL: how much lower could its loss be, block by block, with weights that prove it.

    Without --text the Python reference prose of the standard library is used. Ctrl-C ends the audit early and
    reports what was finished.
    """
    from peelwise.api import AuditReport, parse_seconds
    from peelwise.pipeline.audit import AuditSettings, run_audit
    from peelwise.pipeline.folder import check_free
    from peelwise.recordfile import RECORD_FILE

    if fail_on not in (None, "red", "yellow"):
        raise PeelwiseError(f"--fail-on takes red or yellow, got {fail_on!r}.")
    settings = AuditSettings(parse_seconds(budget), margin_nats=margin, controls=controls)
    if out is not None:
        check_free(out, force=force, ours=RECORD_FILE)
    draw = {"tokens": tokens, "sequence_length": sequence_length, "seed": seed, "in_distribution": in_distribution}
    how = {
        "device": device,
        "dtype": dtype,
        "allow_pickle": allow_pickle,
        "as_stored": as_stored,
        "tokenizer": tokenizer,
    }
    opened, probe = _open(model, text, field, draw, how)
    with quiet_warnings(), progress_bar() as watcher:
        outcome = run_audit(opened.model, probe, settings, name=opened.name, source=opened.source, watcher=watcher)
    report = AuditReport(outcome.record, outcome.witness, outcome.probe)
    _save_and_print(report, out, force=force, as_json=as_json)
    worst = {"red": {"red"}, "yellow": {"red", "yellow"}}.get(fail_on or "", set())
    if any(block.verdict in worst for block in report.record.blocks):
        raise typer.Exit(1)


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

    from peelwise.api import parse_seconds
    from peelwise.api_peel import PeelReport, checked_maps, parse_maps
    from peelwise.pipeline.folder import check_free
    from peelwise.pipeline.peel.run import PeelSettings, Start, run_peel
    from peelwise.recordfile import RECORD_FILE
    from peelwise.show.peel_words import beats_head

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
    opened, probe = _open(model, text, field, draw, how)
    with quiet_warnings(), progress_bar() as watcher:
        outcome = run_peel(opened.model, probe, settings, name=opened.name, source=opened.source, watcher=watcher)
    report = PeelReport(outcome.record, outcome.witness, outcome.probe)
    _save_and_print(report, out, force=force, as_json=as_json)
    if fail_on_bound and beats_head(report.record):
        raise typer.Exit(1)


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
    from peelwise.api import parse_seconds
    from peelwise.formats.table import parse_format
    from peelwise.model.checkpoints import open_model
    from peelwise.pipeline.quantcheck import Candidate, QuantcheckSettings, run_quantcheck
    from peelwise.show.quant_terminal import MOST_LAYERS, print_record

    settings = QuantcheckSettings(parse_seconds(budget), parse_format(form) if form else None)
    if out is not None and out.exists() and not force:
        raise OutputError(f"{out} exists. Choose another --out, or replace it with --force.")
    how = {"device": device, "dtype": dtype, "allow_pickle": allow_pickle, "tokenizer": tokenizer}
    opened, probe = _open(
        quantised, text, field, {"tokens": tokens, "sequence_length": sequence_length, "seed": seed}, how
    )
    with quiet_warnings(), status(f"Opening {against} ..."):
        parent = open_model(against, with_tokenizer=False, **how)  # type: ignore[arg-type]
    pair = (Candidate(opened.model, opened.name, opened.source), Candidate(parent.model, parent.name, parent.source))
    with quiet_warnings(), progress_bar() as watcher:
        record = run_quantcheck(*pair, probe, settings, watcher)
    if out is not None:
        _write_text(out, record.to_json() + "\n")
    if as_json:
        typer.echo(record.to_json())
    else:
        print_record(record, Console(highlight=False), None if every_layer else MOST_LAYERS)


@app.command(epilog="Example: `peelwise verify out/demo --full`", short_help="Recheck a certificate.")
def verify(
    folder: FolderArgument,
    model: Annotated[str | None, typer.Option(help="Where the model is; default: where it was audited.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Recheck every block's numbers too (slower).")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Recompute the losses that the certificate in DIR claims: holds, does not hold, or not the same model or data.

    Prints what was rechecked and what was not. Exit code 0 if it holds, 1 if not.
    """
    from peelwise import api

    with status("Recomputing the certified losses ..."):
        result = api.verify(folder, model, full=full, device=device)
    console = Console(highlight=False)
    for check in result.checks:
        mark = "ok" if check.holds else "[bold red]differs[/]"
        console.print(f"  {check.name:<34} certified {check.recorded:+.6f}   found {check.found:+.6f}   {mark}")
    style = "bold green" if result.holds else "bold red"
    console.print(f"[{style}]{result.status}[/]: {escape(result.reason)}", soft_wrap=True)
    if result.rechecked:
        for words, what in (("Rechecked", result.rechecked), ("Not rechecked", result.not_rechecked)):
            console.print(f"{words}: {'; '.join(what)}.", soft_wrap=True)
        console.print(f"Tolerance: {result.tolerance:g} nats per token.")
    if not result.holds:
        raise typer.Exit(1)


@app.command(
    epilog="Example: `peelwise apply out/demo --model smollm2 --out out/better`",
    short_help="Merge the witness.",
)
def apply(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option(metavar="NEWDIR", help="New model folder, loadable by transformers.")],
    model: Annotated[str | None, typer.Option(help="Where the model is; default: where it was audited.")] = None,
    force: ForceOption = False,
) -> None:
    """Write a model folder with the composed witness of DIR merged, and check that its loss is the certified one."""
    from peelwise import api

    with status("Merging the witness and checking the result ..."):
        loss = api.apply(folder, model, out, force=force)
    typer.echo(f"{out}: loss {loss:.4f} nats per token on report, as certified.")


@app.command(epilog="Example: `peelwise report out/demo`", short_help="Render the HTML report again.")
def report(
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: report.html in DIR.")] = None,
) -> None:
    """Render the HTML report again from the certificate in DIR. Needs neither the model nor torch."""
    from peelwise.recordfile import read_any_record
    from peelwise.show.views import render_html

    path = out or folder / "report.html"
    _write_text(path, render_html(read_any_record(folder)))
    typer.echo(f"wrote {path}")


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Print the version if asked."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"peelwise {installed('peelwise')}")
        raise typer.Exit


def _documents(paths: list[str] | None, field: str) -> tuple[list[str], str]:
    from peelwise.texts import read_texts, reference_prose

    if not paths:
        return reference_prose(), "Python reference prose (pydoc_data.topics)"
    return read_texts(paths, field=field), ", ".join("standard input" if p == "-" else Path(p).name for p in paths)


def _open(
    model: str, text: list[str] | None, field: str, draw: dict[str, Any], how: dict[str, Any]
) -> tuple[OpenedModel, Probe]:
    """Open the model as ``how`` says and draw a probe from the text as ``draw`` says."""
    from peelwise.model.checkpoints import open_model, require_tokenizer
    from peelwise.probes import Probe

    documents, source = _documents(text, field)  # first, since it is quick and may be mistyped
    with quiet_warnings(), status(f"Opening {model} ..."):
        opened = open_model(model, **how)
        return opened, Probe.from_text(documents, require_tokenizer(opened), source=source, **draw)


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _save_and_print(report: Any, out: Path | None, *, force: bool, as_json: bool) -> None:
    if out is not None:
        report.save(out, force=force)
    _print(report, out, as_json)


def _print(report: Any, out: Path | None, as_json: bool) -> None:
    from peelwise.show.views import print_record

    if as_json:
        typer.echo(report.to_json())
        return
    print_record(report.record, Console(highlight=False), out)
    if out is not None and not (out / "report.html").exists():
        stderr.print('No report.html: pip install "peelwise\\[plots]", then `peelwise report`.')
