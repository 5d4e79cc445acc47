"""What every stage of an audit works on: the model's runner, the probe's traces and the clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peelwise.engine.clock import Clock
from peelwise.engine.sweep import BlockProposals, Direction
from peelwise.evidence.intervals import Paired, paired
from peelwise.model.layers import LinearLayer
from peelwise.model.runner import Runner, Trace
from peelwise.model.weights.held import Held
from peelwise.probe.probe import Probe
from peelwise.records.codes import Stage

WITNESS_DTYPE = torch.bfloat16

# Stages that only run the model forwards, in the order they come in; they tell what a pass takes.
LOSSES: Stage = "losses"
REMOVED: Stage = "ablation"
WITHOUT: Stage = "leave-one-out"
FORWARD_STAGES = LOSSES, REMOVED, WITHOUT

Changes = dict[LinearLayer, Tensor]


@dataclass
class Session:
    """One model, one probe, the model's own stations and losses on its three parts, and the clock.

    ``held`` is what low-bit maps hold: their witness is of the same formats.
    """

    runner: Runner
    probe: Probe
    fit: Trace
    select: Trace
    report: Trace
    clock: Clock
    seed: int
    held: dict[LinearLayer, Held] = field(default_factory=dict)

    def seconds_for(self, token_forwards: float) -> float:
        """Estimate the seconds that so many token passes take, from the latest stage that was nothing else."""
        rates = [self.clock.stages[name] for name in FORWARD_STAGES if name in self.clock.stages]
        seconds, forwards = rates[-1] if rates else (0.0, 0.0)
        return token_forwards * seconds / forwards if forwards else 0.0

    def share_from(self, start: int) -> float:
        """Part of a forward pass that lies in blocks ``start..`` and the head."""
        return sum(self.runner.shares[start:]) + self.runner.head_share


def gain(before: Tensor, after: Tensor, trace: Trace) -> Paired:
    """Return the paired decrease from ``before`` to ``after`` (nats summed per sequence)."""
    return paired((before - after).cpu().numpy(), trace.tokens.cpu().numpy())


def combined(
    changes: Mapping[LinearLayer, Tensor],
    proposals: Mapping[int, BlockProposals],
    direction: Direction,
    step: float,
) -> Changes:
    """Return ``changes + step * proposals``, rounded to the number format that the witness is stored in.

    Rounding before anything is evaluated makes the certified numbers those of the stored file.
    """
    out = dict(changes)
    for block in proposals.values():
        for linear, proposal in block.changes[direction].items():
            moved = step * proposal.change.float()
            out[linear] = rounded(moved if linear not in out else out[linear] + moved)
    return out


def rounded(change: Tensor) -> Tensor:
    """Return a dense change in the number format that the witness is stored in."""
    return change.to(WITNESS_DTYPE).float()


def output_change(proposals: Mapping[int, BlockProposals], direction: Direction, step: float) -> float:
    """Return ``step * sqrt(sum tr(D S D^T))``: the step length in units of root mean squared output change."""
    total = sum(p.output_change for block in proposals.values() for p in block.changes[direction].values())
    return float(step * max(total, 0.0) ** 0.5)
