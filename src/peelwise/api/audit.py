"""Audit a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.api.inputs import open_both, with_budget
from peelwise.api.report import Report, check_out, frame
from peelwise.distributed.processes import together
from peelwise.distributed.sharding import unwrap_ddp
from peelwise.engine.clock import Watcher
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.model.whereabouts import checkpoint_note
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.tasks.audit.run import run_audit
from peelwise.tasks.audit.settings import AuditSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True, eq=False)
class AuditReport(Report):
    """What an audit found: the record, and the tensors that prove it.

    Attributes:
        record: every number, as in ``certificate.json``.
        witness: replacement changes by name, ``composed/<layer>`` and ``alone/<layer>``, ``[d_out, d_in (+1)]``.
        probe: the token sequences that were used.
    """

    record: AuditRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per block, intervals as columns ``recoverable_mean``, ``recoverable_low`` and so on.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(block.model_dump()) for block in self.record.blocks], "index")


@measures_offloaded
def audit(
    model: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: AuditSettings | None = None,
    *,
    budget: float | str | None = None,
    opening: OpenOptions | None = None,
    checkpoint: str | Path | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> AuditReport:
    """Tell, block by block, how much lower the loss could be, with replacement weights that prove it.

    Where ``torch.distributed`` has several processes, call it in all of them, with the same model and probe: they share
    the text and the solves, and all return the same report. The first one alone reports progress and saves. A model
    whose blocks were given to ``fully_shard`` stays spread over them: a block is gathered when it runs.

    Args:
        model: a module (left exactly as it was), or what ``peelwise audit`` takes: a folder, a GGUF file.
        probe: the probe (of text or of batches), or the text to draw it from with the model's tokenizer; default: the
            reference prose.
        settings: rounds, margin, controls, budget.
        budget: shorthand for that of ``settings``: wall time, in seconds or like ``"5m"``.
        opening: how a folder or file is opened; `ShardedOptions` spread it over the processes.
        checkpoint: a folder whose tensors are compared with the model's; a note of the report says which differ.
        name: the model's name in the report.
        out: folder to save the report in; refused before the work if it is taken.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` it as a certificate.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.audit(model, peelwise.Probe.from_text(text, tokenizer), budget="2m")
        >>> report = peelwise.audit("smollm2", peelwise.ProbeOptions(["notes.txt"]), budget="5m", out="out/mine")
    """
    settings = with_budget(settings or AuditSettings(), budget)
    with together() as processes:
        with processes.agreeing():
            if out is not None and processes.is_main:
                check_out(out, force=force)
            target, drawn = open_both(model, probe, opening)
            module = target.model if processes.count == 1 else unwrap_ddp(target.model)
            notes = [] if checkpoint is None else [checkpoint_note(module, checkpoint)]
        outcome = run_audit(
            module,
            drawn,
            settings,
            name=name or target.name,
            source=target.source,
            watcher=progress if processes.is_main else None,
            notes=notes,
            processes=processes,
        )
        report = AuditReport(outcome.record, outcome.witness, outcome.probe)
        with processes.agreeing():
            if out is not None and processes.is_main:
                report.save(out, force=force)
    return report


def _row(block: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in block.items() if not isinstance(v, (dict, tuple, list)) and not k.endswith("_nats")}
    for key in ("recoverable", "unique"):
        interval = block[f"{key}_nats"] or {}
        plain |= {f"{key}_{part}": interval.get(part) for part in ("mean", "low", "high")}
    plain |= block["signals"]
    return plain
