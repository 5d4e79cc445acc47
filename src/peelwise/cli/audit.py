"""The command ``peelwise audit``."""

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
from peelwise.errors import PeelwiseError

app = typer.Typer()


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
    from peelwise.api.audit import AuditReport
    from peelwise.api.inputs import parse_seconds
    from peelwise.records.files import RECORD_FILE
    from peelwise.records.folder import check_free
    from peelwise.tasks.audit.run import AuditSettings, run_audit

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
    opened, probe = open_both(model, text, field, draw, how)
    with quiet_warnings(), progress_bar() as watcher:
        outcome = run_audit(opened.model, probe, settings, name=opened.name, source=opened.source, watcher=watcher)
    report = AuditReport(outcome.record, outcome.witness, outcome.probe)
    save_and_print(report, out, force=force, as_json=as_json)
    worst = {"red": {"red"}, "yellow": {"red", "yellow"}}.get(fail_on or "", set())
    if any(block.verdict in worst for block in report.record.blocks):
        raise typer.Exit(1)
