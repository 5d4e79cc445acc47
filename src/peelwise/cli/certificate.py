"""The commands about certificates, ``peelwise verify | apply | report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from peelwise.cli.options import (
    DeviceOption,
    FieldOption,
    FolderArgument,
    ForceOption,
    InDistributionOption,
    PickleOption,
    TokenizerOption,
    TokensOption,
    output,
)
from peelwise.cli.terminal import status
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.records.plain_text import clean

if TYPE_CHECKING:
    from peelwise.certificate.base import OwnText, Verification

app = typer.Typer()

WhereOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--new",
        help="Where the model is; of a comparison: NEW.",
        show_default="where it was opened for the audit",
        rich_help_panel="Model",
    ),
]
OldOption = Annotated[
    str | None,
    typer.Option(
        help="Of a comparison: where OLD is.", show_default="where it was opened for it", rich_help_panel="Model"
    ),
]
OwnTextOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Your own text, which the witness is tried on: .txt, .jsonl, .parquet or - for standard input.",
        rich_help_panel="Text",
    ),
]


@app.command(epilog="Example: `peelwise verify out/theirs --model MODEL --text mine.txt`", short_help="Recheck.")
def verify(
    folder: FolderArgument,
    model: WhereOption = None,
    old: OldOption = None,
    text: OwnTextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Recheck every block's numbers too (slower); of a check or a comparison, all of it."
        ),
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Make the witness again from fit and select (as slow as the audit was).")
    ] = False,
    device: DeviceOption = OpenOptions.device,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    tokenizer: TokenizerOption = None,
) -> None:
    """Recompute the losses that the certificate in DIR claims: holds, does not hold, or not the same model or data.

    With --model and --text, its weights are tried on text of your own: nothing of whoever made it has to be believed.
    Prints what was rechecked and what was not. Exit code 0 if it holds (on your text too), 1 if not, 2 if it cannot be
    read.
    """
    from peelwise.api import certificate as api

    own = None
    if text:
        own = ProbeOptions(tuple(text), field, tokens=tokens, in_distribution=in_distribution)
    with status("Recomputing the certified losses ..."):
        opening = OpenOptions(device, allow_pickle=allow_pickle, tokenizer=tokenizer)
        result = api.verify(folder, model, old=old, full=full, replay=replay, text=own, opening=opening)
    _print_verification(result)
    if not result.holds:
        raise typer.Exit(1)


def _print_verification(result: Verification) -> None:
    console = Console(highlight=False)
    for check in result.checks:
        mark = "ok" if check.holds else "[bold red]differs[/]"
        name = escape(clean(check.name))
        console.print(f"  {name:<34} certified {check.recorded:+.6f}   found {check.found:+.6f}   {mark}")
    style = "bold green" if result.status == "holds" else "bold yellow" if result.holds else "bold red"
    console.print(f"[{style}]{result.status}[/]: {escape(clean(result.reason))}", soft_wrap=True)
    if result.own is not None:
        _print_own(console, result.own)
    if result.replay is not None:
        said = "; not made again: ".join([result.replay.reason.rstrip("."), *result.replay.left_out])
        console.print(f"Made again: {escape(clean(said))}.", soft_wrap=True)
    lines = {
        "Rechecked": "; ".join(result.rechecked),
        "Not rechecked": "; ".join(result.not_rechecked),
        "Split": result.split,
        "Model": result.model,
    }
    for words, what in lines.items():
        if what:
            console.print(f"{words}: {escape(clean(what))}.", soft_wrap=True)
    if result.margin is not None:
        console.print(
            f"Margin: {result.margin:.4g} nats per token; a gain counts above it. Tolerance: {result.tolerance:g}."
        )
    if result.holds and result.own is None:
        console.print("Whoever made it may have fitted the witness to this very text: try yours, with --text FILE.")


def _print_own(console: Console, own: OwnText) -> None:
    text = escape(clean(own.source))
    if own.certified is not None and own.found is not None:
        found = own.found
        console.print(
            f"certified on the author's text: {own.certified.mean:.3f}; on yours: {found.mean:.3f} "
            f"({found.low:.3f} to {found.high:.3f})",
            soft_wrap=True,
        )
    for block in own.blocks:
        certified, gain = ("not measured" if g is None else f"{g.mean:+.3f}" for g in block.gains)
        interval = "" if block.gains[1] is None else f" ({block.gains[1].low:+.3f} to {block.gains[1].high:+.3f})"
        name = escape(clean(block.name))
        console.print(
            f"  {name:<24} {block.certified} {certified}; on yours: {block.found} {gain}{interval}", soft_wrap=True
        )
    left_out = f", {own.overlapping} more left out that the certificate was made on" if own.overlapping else ""
    console.print(
        f"Your text: {text}, {own.tokens} tokens in {own.sequences} sequences{left_out}. Loss {own.loss:.4f}, margin "
        f"{own.margin:.4g}.",
        soft_wrap=True,
    )


@app.command(
    epilog="Example: `peelwise apply out/demo --model smollm2 --out out/better`",
    short_help="Merge the witness.",
)
def apply(
    folder: FolderArgument,
    out: Annotated[Path, output(metavar="NEWDIR", help="New model folder, loadable by transformers.")],
    model: WhereOption = None,
    old: OldOption = None,
    device: DeviceOption = OpenOptions.device,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    force: ForceOption = False,
) -> None:
    """Write a model folder with the composed witness of DIR merged, and check that its loss is the certified one.

    Of a comparison: NEW with OLD's tensors of all parts that hurt put back.
    """
    from peelwise.api import certificate as api

    with status("Merging the witness and checking the result ..."):
        opening = OpenOptions(device, allow_pickle=allow_pickle)
        loss = api.apply(folder, model, out, old=old, force=force, opening=opening)
    typer.echo(f"{out}: loss {loss:.4f} nats per token on report, as certified.")


@app.command(epilog="Example: `peelwise report out/demo`", short_help="Render the HTML report again.")
def report(
    folder: FolderArgument,
    out: Annotated[Path | None, output(metavar="FILE", help="The page.", show_default="report.html in DIR")] = None,
) -> None:
    """Render the HTML report again from the certificate in DIR. Needs neither the model nor torch."""
    from peelwise.api import files as api

    typer.echo(f"wrote {api.write_report(folder, out)}")
