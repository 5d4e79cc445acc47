"""What peelwise says of a case: one audit, its statistics per block, and its intervals checked on fresh text."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.certificate.audit import changes_of
from peelwise.engine.opening import open_report
from peelwise.errors import PeelwiseWarning
from peelwise.evidence.intervals import paired
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.audit import AuditRecord
from peelwise.tasks.audit.run import AuditOutcome, run_audit
from peelwise.tasks.audit.settings import AuditSettings

ENDLESS = 1e6  # seconds: what a busy machine would cut short could not be repeated


def audited(model: nn.Module, probe: Probe, *, joint_rounds: int, solo_rounds: int) -> AuditOutcome:
    """Audit a model without the null controls, which say nothing of single blocks."""
    settings = AuditSettings(ENDLESS, joint_rounds, solo_rounds, controls=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeelwiseWarning)
        return run_audit(model, probe, settings)


def diagnosis(record: AuditRecord) -> dict[str, Any]:
    """Return the statistics of every block, with standard errors where they have one, and the verdicts."""
    blocks = record.blocks
    found: dict[str, Any] = {
        "loss": record.loss.current,
        "verdicts": [b.verdict for b in blocks],
        "composed": record.loss.composed_gain.model_dump() if record.loss.composed_gain else None,
        "scores": {
            "natural energy": [b.natural_energy for b in blocks],
            "cross energy": [b.cross_energy for b in blocks],
            "held-out energy": [b.held_out_energy for b in blocks],
            "energy": [b.energy for b in blocks],
        },
        "errors": {},
        "seconds": {stage.name: stage.wall_seconds for stage in record.cost.stages},
    }
    for name, values in (("unique", [b.unique_nats for b in blocks]), ("alone", [b.recoverable_nats for b in blocks])):
        if all(v is not None for v in values):
            found["scores"][name] = [v.mean for v in values if v]
            found["errors"][name] = [v.standard_error for v in values if v]
    return found


def on_fresh_text(model: nn.Module, outcome: AuditOutcome, fresh: Split) -> list[dict[str, Any]]:
    """Return for the composed witness and every block's own: the interval on report, and the gain on fresh text."""
    record, blocks = outcome.record, find_blocks(model)
    rows = []
    with untouched(model):
        session = open_report(model, blocks, fresh, micro_batch_tokens=4096)

        def row(interval: Any, changes: Any, start: int) -> dict[str, Any]:
            found = session.gain(session.report.losses, session.losses(session.report, changes, start))
            return {
                "low": interval.low,
                "high": interval.high,
                "fresh": found.mean,
                "fresh_error": found.standard_error,
            }

        if record.loss.composed_gain:
            changes = changes_of(outcome.witness, "composed", blocks)
            rows.append({"what": "composed", **row(record.loss.composed_gain, changes, 0)})
        alone = changes_of(outcome.witness, "alone", blocks)
        for block in record.blocks:
            own = {m: c for m, c in alone.items() if m in set(blocks[block.index].linears)}
            if block.recoverable_nats and own:  # a block that no step helped gains exactly nothing, everywhere
                named = {"what": "alone", "block": block.index, "verdict": block.verdict}
                rows.append(named | row(block.recoverable_nats, own, block.index))
    return rows


def loss_by_sequence(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Return summed losses and tokens ``[sequences]`` of a model."""
    with untouched(model), torch.no_grad():
        trace = Runner(model, find_blocks(model), micro_batch_tokens=4096).trace(split)
    return trace.losses, trace.tokens


def cost_of_fault(model: nn.Module, healthy: nn.Module, split: Split) -> dict[str, float]:
    """Return by how much the model is worse than the healthy one, nats per token, with its interval."""
    losses, tokens = loss_by_sequence(model, split)
    interval = _gain(losses, loss_by_sequence(healthy, split)[0], tokens).interval()
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _gain(before: Tensor, after: Tensor, tokens: Tensor) -> Any:
    return paired((before - after).numpy(), tokens.numpy())


def without(split: Split, probe: Probe) -> Split:
    """Return the sequences of a split that do not occur in any part of a probe."""
    seen = {tuple(row) for part in (probe.fit, probe.select, probe.report) for row in part.ids.tolist()}
    kept = torch.tensor([tuple(row) not in seen for row in split.ids.tolist()])
    return Split(split.ids[kept], split.mask[kept])
