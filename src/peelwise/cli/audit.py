"""The commands ``peelwise audit`` and ``peelwise demo-audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    ShardOption,
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
from peelwise.cli.several import joined
from peelwise.cli.terminal import at_work
from peelwise.model.options import OpenOptions, ShardedOptions
from peelwise.probe.options import ProbeOptions
from peelwise.records.options import Refine
from peelwise.tasks.audit.settings import AuditSettings

app = typer.Typer()
_FAILING = {None: (), "red": ("red",), "yellow": ("red", "yellow")}


@app.command(
    epilog="Example: `peelwise audit smollm2 --text notes.txt --budget 5m --out out/mine`",
    short_help="Audit a model and write a certificate.",
)
def audit(
    model: ModelArgument,
    text: TextOption = None,
    field: FieldOption = ProbeOptions.field,
    tokens: TokensOption = ProbeOptions.tokens,
    sequence_length: LengthOption = ProbeOptions.sequence_length,
    in_distribution: InDistributionOption = ProbeOptions.in_distribution,
    seed: SeedOption = ProbeOptions.seed,
    budget: Annotated[str, flag(AuditSettings, "budget", metavar="TIME")] = str(AuditSettings.budget),
    joint_rounds: Annotated[int, flag(AuditSettings, "joint_rounds", min=0)] = AuditSettings.joint_rounds,
    solo_rounds: Annotated[int, flag(AuditSettings, "solo_rounds", min=0)] = AuditSettings.solo_rounds,
    margin: Annotated[float | None, flag(AuditSettings, "margin")] = AuditSettings.margin,
    controls: Annotated[bool, flag(AuditSettings, "controls")] = AuditSettings.controls,
    micro_batch_tokens: Annotated[
        int, flag(AuditSettings, "micro_batch_tokens", min=1)
    ] = AuditSettings.micro_batch_tokens,
    refine: Annotated[Refine, flag(AuditSettings, "refine")] = AuditSettings.refine,
    stack: Annotated[str | None, flag(AuditSettings, "stack", metavar="NAME")] = AuditSettings.stack,
    device: DeviceOption = OpenOptions.device,
    dtype: DtypeOption = OpenOptions.dtype,
    allow_pickle: PickleOption = OpenOptions.allow_pickle,
    as_stored: StoredOption = OpenOptions.as_stored,
    stream: StreamOption = OpenOptions.stream,
    shard: ShardOption = ShardedOptions.shard,
    tokenizer: TokenizerOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    fail_on: Annotated[
        Literal["red", "yellow"] | None, output(help="Exit with code 1 if a block has this verdict or a worse one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Audit MODEL: how much lower could its loss be, block by block, with weights that prove it.

    Ctrl-C ends the audit early and reports what was finished. `torchrun --nproc-per-node 2 -m peelwise audit MODEL`
    shares it between two processes; with --shard, the weights too.
    """
    from peelwise.api import audit as api

    probe = probe_options(text, field, tokens, sequence_length, in_distribution, seed)
    settings = AuditSettings(budget, joint_rounds, solo_rounds, margin, controls, micro_batch_tokens, refine, stack)
    opening = ShardedOptions(device, dtype, allow_pickle, as_stored, tokenizer, stream, shard)
    with joined(device), at_work(f"Opening {model} ...") as watcher:
        report = api.audit(model, probe, settings, opening=opening, out=out, force=force, progress=watcher)
    print_report(report, out, as_json)
    if any(block.verdict in _FAILING[fail_on] for block in report.record.blocks):
        raise typer.Exit(1)


@app.command(
    epilog="Example: `peelwise demo-audit --out out/demo`",
    short_help="Audit the packaged model as it is and with one block damaged.",
)
def demo_audit(
    out: Annotated[Path, output(metavar="DIR", help="Folder for both certificates and the page.")] = Path("out/demo"),
    force: ForceOption = False,
    block: Annotated[int, typer.Option(help="Which block is damaged in the copy.", min=0)] = 15,
    tokens: TokensOption = 3072,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Wall time of each of the two audits.")] = "270s",
) -> None:
    """Audit the packaged model twice: as it is, and a copy in which one block writes with the wrong sign.

    No norm and no singular value of its weights changes. Both are shown on one page. --budget is that of each.
    """
    from peelwise.cli.demo_audit import Plan, demonstrate

    demonstrate(out, Plan(block, tokens, budget), force=force, say=typer.echo, working=at_work)
