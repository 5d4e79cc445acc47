"""A look at all blocks against depth: signals, scores, and factors where the scores leave it open."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from peelwise.distributed.processes import ONE_PROCESS
from peelwise.distributed.shared import Shared
from peelwise.engine.baselines import probe_unigram
from peelwise.engine.clock import Clock
from peelwise.engine.depth.gains import screened
from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.table import BlockWeights, DepthTable, block_weights, joined, pass_table, weight_table
from peelwise.engine.session import Session
from peelwise.evidence.unlike import Unlikeness, named, reasons, to_screen, unlikeness, with_gains
from peelwise.evidence.verdict import default_margin
from peelwise.model.parts import Parts
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.records.check import UnlikeBlock
from peelwise.records.signals import SIGNALS


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        table: every signal.
        scored: the scores, or ``None`` where there is no depth to compare with.
    """

    table: DepthTable
    scored: Unlikeness | None

    @property
    def names(self) -> list[int]:
        """Blocks that are unlike their neighbours, the most unlike first."""
        return [] if self.scored is None else named(self.scored.scores)

    def unlike(self) -> tuple[UnlikeBlock, ...]:
        """Return those blocks with what says so."""
        if self.scored is None:
            return ()
        scores, values = self.scored.scores, self.table.values
        return tuple(
            UnlikeBlock(block=i, score=float(scores[i]), reasons=reasons(self.scored, values, i)) for i in self.names
        )


def look_at_weights(
    all_parts: Sequence[Parts],
    clock: Clock,
    wanted: Collection[str] = tuple(SIGNALS),
    runner: Runner | None = None,
) -> Look:
    """Return what the weights say by themselves, without any text; processes that share the ``runner`` share that."""
    with clock.stage("weight-signals"):
        table = _weights(all_parts, clock, wanted, runner)
    return Look(table, unlikeness(table.values, len(all_parts)))


def look(
    session: Session,
    all_parts: Sequence[Parts],
    seen: Trace,
    *,
    wanted: Collection[str] = tuple(SIGNALS),
    gradients: bool = True,
) -> Look:
    """Return what weights, a pass over ``seen`` and a few factors on select say of all blocks.

    Args:
        session: the model.
        all_parts: the parts of its blocks, in order.
        seen: tokens to look at; nothing is proved on them.
        wanted: names of the signals to compute.
        gradients: also differentiate the loss.
    """
    clock = session.clock
    with torch.no_grad():
        with clock.stage("weight-signals"):
            weights = _weights(all_parts, clock, wanted, session.runner)
        with clock.stage("pass-signals"):
            passed = pass_table(
                session.runner,
                all_parts,
                seen,
                gradients=gradients,
                signals=wanted,
                after_block=session.tell_block,
            )
        table = session.runner.processes.broadcast(joined(weights, passed))  # which blocks are tried hangs on it
        counted = probe_unigram(session.probe, session.runner.model)
        off = 0.0 if counted is None else max(0.0, session.select.mean - counted)
        scored = unlikeness(table.values, len(all_parts), [len(gates_of(parts)) for parts in all_parts], off)
        if scored is None:
            return Look(table, None)
        with clock.stage("gain-witnesses"):
            gains = screened(session, [all_parts[index] for index in to_screen(scored.scores)], table)
        return Look(table, with_gains(scored, gains, default_margin(session.report.mean, session.probe.unit)))


def _weights(
    all_parts: Sequence[Parts], clock: Clock, wanted: Collection[str], runner: Runner | None = None
) -> DepthTable:
    """Return the signals of weights; each block's are worked out in one process.

    Of a model that is spread over processes every block is gathered in all of them, which goes on in the one that works
    it out: as many blocks at a time as there are processes, so that each holds one of them whole.
    """
    processes = ONE_PROCESS if runner is None else runner.processes
    width, shared = stream_width(all_parts), Shared[BlockWeights](processes)

    def of_block(done: int, parts: Parts) -> BlockWeights:
        found = block_weights(parts, width, wanted)
        clock.tell(done, len(all_parts))
        return found

    if runner is None or not runner.sharded:
        for done, parts in enumerate(all_parts, start=1):
            shared.ask(1.0, partial(of_block, done, parts))
        return weight_table(shared.results(), wanted)
    found: list[BlockWeights] = []
    for start in range(0, len(all_parts), processes.count):
        with ExitStack() as whole:
            for done, parts in enumerate(all_parts[start : start + processes.count], start=start + 1):
                with ExitStack() as block:
                    block.enter_context(runner.whole(parts.block))
                    if shared.ask(1.0, partial(of_block, done, parts)):
                        whole.push(block.pop_all())
            found += shared.results()
    return weight_table(found, wanted)


def both(first: Trace, second: Trace) -> Trace:
    """Return two parts of a probe as one."""
    return Trace(
        [*first.batches, *second.batches],
        torch.cat([first.losses, second.losses]),
        torch.cat([first.tokens, second.tokens]),
        (len(first.batches), len(second.batches)),
    )


def stream_width(all_parts: Sequence[Parts]) -> int:
    """Return the channels of the residual stream: the outputs of the layer that writes to it."""
    branches = all_parts[0].branches
    return branches[-1].writer.shape[0] if branches else 0
