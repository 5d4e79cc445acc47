"""The one door to a model under measurement: what it loses and gains with changes in place, and what they propose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peelwise.engine.clock import Clock
from peelwise.engine.proposals import BlockProposals, Direction
from peelwise.engine.sweep import sweep
from peelwise.evidence.intervals import Paired, paired
from peelwise.model.capture import Capture, captured, ended_by
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.spill import Spill
from peelwise.model.splice import spliced
from peelwise.model.trace import Batch, Trace
from peelwise.model.weights.held import Held
from peelwise.probe.probe import Probe
from peelwise.records.base import Note
from peelwise.records.codes import Stage

WITNESS_DTYPE = torch.bfloat16

# Stages that only run the model forwards, in the order they come in; they tell what a pass takes.
LOSSES: Stage = "losses"
REMOVED: Stage = "ablation"
WITHOUT: Stage = "leave-one-out"
FORWARD_STAGES = LOSSES, REMOVED, WITHOUT

Changes = dict[LinearLayer, Tensor]
Wanted = tuple[LinearLayer, int]  # a layer, and how often it runs


@dataclass
class ReportSession:
    """A model and its losses on report: all that is needed to evaluate changes that are already known.

    Weights are never written: changes are in place while a loss is computed, and gone afterwards.
    """

    runner: Runner
    report: Trace

    def losses(self, part: Trace, changes: Mapping[LinearLayer, Tensor] | None = None, start: int = 0) -> Tensor:
        """Return the losses ``[sequences]`` on a part with ``changes`` in place, nats.

        Args:
            part: tokens, with stations that are right up to ``start``.
            changes: per linear layer; none for the model as it stands.
            start: the lowest block that is run.
        """
        with spliced(changes or {}):
            return self.runner.losses_from(part, start)

    def refreshed(self, part: Trace, changes: Mapping[LinearLayer, Tensor], start: int = 0) -> Trace:
        """Return a part with the losses, and the stations behind block ``start``, of the model with ``changes``."""
        with spliced(changes):
            return self.runner.refreshed(part, start)

    def losses_without(self, part: Trace, block: int) -> Tensor:
        """Return the losses ``[sequences]`` of the model with a block's input passed on as its output."""
        return self.runner.losses_without(part, block)

    def gain(self, before: Tensor, after: Tensor) -> Paired:
        """Return the paired decrease on report from ``before`` to ``after`` ``[sequences]``, nats per token."""
        return paired((before - after).cpu().numpy(), self.report.tokens.cpu().numpy())


@dataclass
class Session(ReportSession):
    """One model, one probe, the model's own stations and losses on its three parts, and the clock.

    ``held`` is what low-bit maps hold: their witness is of the same formats. ``notes`` is what the self-checks of the
    model have to say.
    """

    probe: Probe
    fit: Trace
    select: Trace
    clock: Clock
    seed: int
    held: dict[LinearLayer, Held] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def relinearised(
        self, changes: Mapping[LinearLayer, Tensor], block: int | None = None
    ) -> dict[int, BlockProposals]:
        """Return what a sweep proposes at the model with ``changes`` in place: for all blocks, or for one.

        Args:
            changes: per linear layer; those of ``block`` alone if it is given.
            block: the only one that proposals are made for.
        """
        if block is not None:
            return self.swept(changes, block, only=[block])[0]
        return self.swept(changes, after_block=self.tell_block)[0]

    def swept(
        self, changes: Mapping[LinearLayer, Tensor], start: int = 0, **how: Any
    ) -> list[dict[int, BlockProposals]]:
        """Return what `sweep` does at the model with ``changes`` in place.

        Args:
            changes: per linear layer; none for the model as it stands.
            start: the lowest block that is changed or asked about.
            how: further arguments of `sweep`.
        """
        fit, select = self.fit, self.select
        with spliced(changes):
            if changes:
                fit, select = (self.runner.refreshed(part, start) for part in (fit, select))
            return sweep(self.runner, fit, select, **how)

    def counted_gain(self, part: Trace, before: Tensor, after: Tensor) -> float:
        """Return the decrease of the loss on a part that choices go by, in nats per token or the unit of the examples.

        Examples are fewer than tokens by far, and a few of them are most of a small loss: of batches the lower end of
        the 95 % interval counts, 0 of a single example.

        Args:
            part: whose losses they are.
            before, after: losses ``[sequences]``.
        """
        if self.probe.examples is None:
            return part.mean_of(before) - part.mean_of(after)
        if len(before) < 2 or not bool(after.isfinite().all()):
            return 0.0
        return paired((before - after).cpu().numpy(), part.tokens.cpu().numpy()).interval().low

    def some_of_select(self, tokens: int) -> Trace:
        """Return the first sequences of select, of so many predicted tokens at most, but one sequence at least."""
        split = self.probe.select
        few = max(int((split.weights.sum(dim=1).cumsum(0) <= tokens).sum()), 1)
        return self.select if few == split.sequences else self.runner.trace(split.at(slice(few)))

    def tell_block(self, done: int) -> None:
        """Report that a sweep over all blocks has done so many."""
        self.clock.tell(done, len(self.runner.blocks))

    def seconds_for(self, token_forwards: float) -> float:
        """Estimate the seconds that so many token passes take, from the latest stage that was nothing else."""
        rates = [self.clock.stages[name] for name in FORWARD_STAGES if name in self.clock.stages]
        seconds, forwards = rates[-1] if rates else (0.0, 0.0)
        return token_forwards * seconds / forwards if forwards else 0.0

    def share_from(self, start: int) -> float:
        """Part of a forward pass that lies in blocks ``start..`` and the head."""
        return sum(self.runner.shares[start:]) + self.runner.head_share


def run_captured(
    runner: Runner,
    block: Block,
    batch: Batch,
    hidden: Tensor,
    changes: Mapping[LinearLayer, Tensor],
    linears: Sequence[LinearLayer] = (),
) -> tuple[Tensor, Capture]:
    """Run one block with ``changes`` in place; return its output ``[b, t, d]`` and what ``linears`` were given."""
    with spliced(changes), captured(linears) as capture:
        return runner.run_block(block, hidden, batch), capture


def run_until(
    runner: Runner,
    block: Block,
    batch: Batch,
    hidden: Tensor,
    changes: Mapping[LinearLayer, Tensor],
    wanted: Wanted,
    beside: Sequence[LinearLayer] = (),
) -> Capture:
    """Run one block with ``changes`` in place until a layer has run so often; return its runs and those ``beside``."""
    linear, runs = wanted
    with spliced(changes), captured([linear, *beside]) as capture, ended_by(linear, runs):
        runner.run_block(block, hidden, batch)
    return capture


def combined(
    changes: Mapping[LinearLayer, Tensor],
    proposals: Mapping[int, BlockProposals],
    direction: Direction,
    step: float,
    spill: Spill | None = None,
) -> Changes:
    """Return ``changes + step * proposals``, rounded to the dtype that the witness is stored in.

    Rounding before anything is evaluated makes the certified numbers those of the stored file.

    Args:
        changes: so far.
        proposals: by block.
        direction: which of them.
        step: their length.
        spill: where the sum goes to; ``None``: it stays in memory.
    """
    out = dict(changes)
    for block in proposals.values():
        for linear, proposal in block.changes[direction].items():
            moved = step * proposal.change.float()
            out[linear] = stored(moved if linear not in out else out[linear] + moved, spill)
    return out


def change_to(linear: LinearLayer, weight: Tensor) -> Tensor:
    """Return what turns a layer's weight into another ``[d_out, d_in]``, float32; a bias stays."""
    own = linear.weight().float()
    return torch.nn.functional.pad(weight.to(own) - own, (0, int(linear.has_bias)))


def rounded(change: Tensor) -> Tensor:
    """Return a dense change in the dtype that the witness is stored in."""
    return change.to(WITNESS_DTYPE).float()


def stored(change: Tensor, spill: Spill | None) -> Tensor:
    """Return a dense change `rounded`; where it is kept on disk in that dtype, widened when its layer runs."""
    return rounded(change) if spill is None else spill.kept(change.to(WITNESS_DTYPE))


def output_change(proposals: Mapping[int, BlockProposals], direction: Direction, step: float) -> float:
    """Return ``step * sqrt(sum tr(D S D^T))``: the step length in units of root mean squared output change."""
    total = sum(p.output_change for block in proposals.values() for p in block.changes[direction].values())
    return float(step * max(total, 0.0) ** 0.5)
