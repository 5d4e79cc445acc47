"""One measurement of a monitor: measure a model in training at one moment, with the stages of an audit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.engine.fading import FadingSums
from peelwise.engine.heads import without_blocks
from peelwise.engine.opening import open_session
from peelwise.engine.refine import Proposals
from peelwise.engine.session import Session
from peelwise.engine.sweep import sweep
from peelwise.errors import IllConditionedWarning, PeelwiseWarning
from peelwise.evidence.intervals import Paired
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.base import Note
from peelwise.records.run import WHOLE_MODEL, MatrixShare, MeasurementKind
from peelwise.records.signals import SWEPT, of_kinds
from peelwise.tasks.audit import stages
from peelwise.tasks.audit.findings import Findings
from peelwise.tasks.audit.loss_parts import matrices_of
from peelwise.tasks.audit.screening import EVALUATIONS, Steps, refine_from, screen, steps_of
from peelwise.tasks.audit.summary import evidence_of

_EVALUATIONS = 5  # of the select loss, in one round of one block, as a rule


@dataclass(frozen=True)
class Measured:
    """What one measurement found.

    Attributes:
        kind: what was done.
        loss: in the probe's unit on its report part, or on what is kept for it.
        free: signal of the sweep -> one value per block, ``None`` where a block has none.
        alone, unique: per block what was measured, paired by report sequence.
        composed: what one joint round gains.
        upper: nats per token of a reference without any block, where it was made.
        matrices: shares of the matrices of the blocks that were refined.
        notes: which sums are ill-conditioned, and what the self-checks have to say where they were made.
        bounds: of blocks that were not refined, what their directions gain to first order at most.
        steps: that blocks refined by themselves take, or took when they last were.
        scales: how certain it is that the loss asks for other scales in a block, in standard deviations (`glance`).
    """

    kind: MeasurementKind
    loss: float
    free: Mapping[str, Sequence[float | None]]
    alone: dict[int, Paired] = field(default_factory=dict)
    unique: dict[int, Paired] = field(default_factory=dict)
    composed: Paired | None = None
    upper: float | None = None
    matrices: tuple[MatrixShare, ...] = ()
    notes: tuple[Note, ...] = ()
    bounds: dict[int, Paired] = field(default_factory=dict)
    steps: Steps = field(default_factory=dict)
    scales: Mapping[int, float] = field(default_factory=dict)


def finite(measured: Measured) -> tuple[Measured, tuple[int, ...]]:
    """Return what was measured without differences that are NaN or Inf, and whose they were."""

    def known(value: Paired) -> bool:
        return math.isfinite(value.mean) and math.isfinite(value.standard_error)

    alone = {block: value for block, value in measured.alone.items() if known(value)}
    unique = {block: value for block, value in measured.unique.items() if known(value)}
    bounds = {block: value for block, value in measured.bounds.items() if known(value)}
    composed = measured.composed if measured.composed is None or known(measured.composed) else None
    lost = ({*measured.alone} - {*alone}) | ({*measured.unique} - {*unique})
    if composed is not measured.composed:
        lost.add(WHOLE_MODEL)
    return replace(measured, alone=alone, unique=unique, bounds=bounds, composed=composed), tuple(sorted(lost))


def measure(
    model: nn.Module,
    blocks: tuple[Block, ...],
    probe: Probe,
    kind: MeasurementKind,
    order: Sequence[int],
    *,
    micro_batch_tokens: int,
    processes: Processes = ONE_PROCESS,
    checked: bool = True,
    steps: Steps | None = None,
    fixed: Split | None = None,
    kept: FadingSums | None = None,
) -> Measured:
    """Measure ``model`` as it stands and leave it, and every random state, exactly as they were.

    Args:
        model: in training.
        blocks: its blocks.
        probe: the text or batches.
        kind: ``ranking``: one sweep, free statistics only, and bounds where ``steps`` are known. ``alone``: the sweep,
            for about as long again one round for blocks by themselves, and bounds for the others. ``joint``: the sweep,
            one round of all together, each left out once, and for no longer than all of that the reference without
            blocks.
        order: blocks for ``alone``, those that are wanted most first; at least one is refined.
        micro_batch_tokens: tokens that go through the model at a time.
        processes: the processes that share the work; what is found is the same in all of them.
        steps: `Measured.steps` of an earlier measurement.
        checked: whether these blocks have passed their self-checks before, such as when the monitor was made.
        fixed: what the loss is taken of; ``None`` for the probe's report part.
        kept: sums of earlier measurements, which this one's are added to.

    Raises:
        PeelwiseError: If the model cannot be measured, such as when its loss is no finite number.
    """
    linears = [linear for block in blocks for linear in block.linears]
    with (
        processes.agreeing(),
        untouched(model),
        frozen(linears),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", IllConditionedWarning)
        session = open_session(
            model,
            blocks,
            probe,
            name="the model",
            budget_seconds=math.inf,
            micro_batch_tokens=micro_batch_tokens,
            watcher=None,
            processes=processes,
            checked=checked,
        )
        loss = session.report.mean if fixed is None else session.runner.trace(fixed).mean
        (proposals,) = sweep(session.runner, session.fit, session.select, kept=kept)
        found, upper = Findings(proposals=proposals), None
        if kind == "alone":
            able = [index for index in order if index in proposals]  # not a block whose layers have no gradient
            steps = _alone(session, found, able, steps or {})
        elif kind == "joint":
            stages.joint_rounds(session, found, rounds=1, share=1.0)
            stages.leave_one_out(session, found, share=1.0)
            if probe.examples is None:  # a new head is one of next tokens
                upper = without_blocks(session, seconds=session.clock.elapsed)
        if kind != "joint" and steps:
            screen(session, found, steps)
    _warn_again(caught)
    own = [w.message for w in caught if isinstance(w.message, IllConditionedWarning)]
    notes = (*{str(w): Note(code=w.code, values=w.values) for w in own}.values(), *session.notes)
    return _measured(kind, session, found, proposals, loss=loss, upper=upper, steps=steps or {}, notes=notes)


def _warn_again(caught: Sequence[warnings.WarningMessage]) -> None:
    """Pass on our own warnings, but for those that become notes.

    What the model's own code warns of, training has said already, and would be said again at every measurement.
    """
    for other in caught:
        if issubclass(other.category, PeelwiseWarning) and not issubclass(other.category, IllConditionedWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


def _measured(
    kind: MeasurementKind,
    session: Session,
    found: Findings,
    proposals: Proposals,
    *,
    loss: float,
    upper: float | None,
    steps: Steps,
    notes: tuple[Note, ...],
) -> Measured:
    """Return what the stages left, as a monitor keeps it."""
    blocks = session.runner.blocks
    evidence = {block.index: evidence_of(session, found, block.index) for block in blocks}
    together = None if found.composed is None else found.composed.report_losses
    refined = {"ranking": (), "alone": found.alone, "joint": found.proposals}[kind]
    free = {
        signal.name: [
            proposals[block.index].signals.get(signal.name) if block.index in proposals else None for block in blocks
        ]
        for signal in of_kinds(SWEPT)
        if signal.in_history
    }
    return Measured(
        kind,
        loss,
        free,
        {index: e.alone for index, e in evidence.items() if e.alone is not None},
        {index: e.unique for index, e in evidence.items() if e.unique is not None},
        None if together is None else session.gain(session.report.losses, together),
        upper,
        tuple(
            MatrixShare(block.index, matrix.name, matrix.share)
            for block in blocks
            if block.index in refined
            for matrix in matrices_of(block, proposals[block.index])
        ),
        notes,
        {index: e.bound for index, e in evidence.items() if e.bound is not None},
        steps,
    )


def _alone(session: Session, found: Findings, order: Sequence[int], steps: Steps) -> Steps:
    """Measure solo gains, for about as long again as all took that came before; return the steps to go by.

    The first block's step is searched for, and is where the others begin, each with a few evaluations less. Where there
    is none to go by, as in low-bit formats, all are searched for.
    """
    proposals, processes = found.proposals, session.runner.processes
    began = session.clock.elapsed
    # One at least: a measurement of this kind that refines nothing is none.
    searched = processes.broadcast(_affordable(session, order, began, _EVALUATIONS) or list(order[:1]))
    dense = not session.held
    found.proposals = {index: proposals[index] for index in (searched[:1] if dense else searched)}
    stages.refine_alone(session, found, rounds=1)
    steps = steps_of(found.alone.values()) or steps
    if dense and not steps:
        found.proposals = {index: proposals[index] for index in searched[1:]}
        stages.refine_alone(session, found, rounds=1)
        steps = steps_of(found.alone.values())
    found.proposals = proposals
    if dense and steps:
        rest = [index for index in order if index not in found.alone]
        seconds = 2 * began - session.clock.elapsed
        refine_from(session, found, processes.broadcast(_affordable(session, rest, seconds, EVALUATIONS)), steps)
    return steps


def _affordable(session: Session, order: Sequence[int], seconds: float, evaluations: int) -> list[int]:
    """Return the first of ``order`` whose refinement takes about so many seconds.

    Args:
        session: model and traces.
        order: indices of blocks.
        seconds: there are.
        evaluations: of select that a block takes, beside one of report.
    """
    tokens, chosen = evaluations * session.select.predicted + session.report.predicted, list[int]()
    for index in order:
        seconds -= session.seconds_for(session.share_from(index) * tokens)
        if seconds < 0:
            break
        chosen.append(index)
    return chosen
