"""The stages of an audit after the model's own losses are known. Each leaves its result in the findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from peelwise.engine.depth.gains import factors_on_branches
from peelwise.engine.depth.look import look
from peelwise.engine.proposals import Direction
from peelwise.engine.refine import Refined, unrefined
from peelwise.engine.rounds import Kind, kinds, next_round
from peelwise.engine.session import REMOVED, WITHOUT, Session, rounded
from peelwise.engine.sweep import Targets, gradient_norms
from peelwise.evidence.unlike import LEAST_BLOCKS
from peelwise.model.parts import parts_of
from peelwise.records.audit import RoundRecord
from peelwise.records.base import note
from peelwise.records.codes import Stage
from peelwise.tasks.audit.findings import Findings
from peelwise.tasks.audit.screening import PASSES, screen, steps_of

_JOINT: dict[Kind, Stage] = {"certified": "joint-rounds", "dense": "joint-rounds-dense"}
# How many evaluations of the select loss a round takes as a rule, both directions together, to estimate its time.
_USUAL_EVALUATIONS = 5
# What a look takes, in forward passes over its tokens: blocks once more, back, and some factors on a few of them.
_LOOK_PASSES = 28
_UNSURE = 2.0  # what refining blocks may take, in units of its estimate
_MOST_FACTORS = 3  # blocks unlike their neighbours that factors are put on


def look_over_depth(session: Session, findings: Findings, *, share: float) -> bool:
    """Look at all blocks against depth, as `peelwise check` does, on the select tokens: who is unlike the neighbours?

    Returns whether ``share`` of the whole budget allowed it.
    """
    blocks, clock = session.runner.blocks, session.clock
    if len(blocks) < LEAST_BLOCKS:
        return True
    if session.seconds_for(_LOOK_PASSES * session.select.predicted) > share * clock.budget:
        return False
    findings.look = look(session, [parts_of(block) for block in blocks], session.select)
    return True


def begin_with_factors(session: Session, findings: Findings) -> None:
    """Put a factor on what the blocks unlike their neighbours write, where one lowers the loss by more than the margin.

    A wrong sign or scale is too far away for a step along a gradient, and one number mends it. All rounds begin there.
    Nothing is done for a model of low-bit formats, which factors would leave.
    """
    named = [] if findings.look is None or session.held else findings.look.names[:_MOST_FACTORS]
    if not named or findings.look is None:
        return
    with session.clock.stage("gain-witnesses"):
        all_parts = [parts_of(session.runner.blocks[index]) for index in named]
        found = factors_on_branches(session, all_parts)
        if not found:
            return
        changes = {each.linear: rounded(each.change()) for each in found}
        touched = sorted({each.block for each in found})
        select_loss = session.select.mean_of(session.losses(session.select, changes, touched[0]))
        chosen = RoundRecord(direction="factors", step=1.0, select_before=session.select.mean, select_after=select_loss)
        report = session.losses(session.report, changes, touched[0])
        findings.factors = findings.composed = Refined(changes, (chosen,), select_loss, report, 0)
        if len(touched) == 1:
            findings.alone[touched[0]] = replace(findings.factors, start=touched[0])
    for each in found:
        findings.notes.append(note("factor-first", block=each.block, part=each.part, factor=each.factor))


def first_sweep(session: Session, findings: Findings, *, null: Targets | None = None) -> bool:
    """Make the proposals of all blocks, linearised at the model with the factors found before: the free ranking.

    It goes down from the last block, and ends early only when the whole budget is spent. Gradient norms are of the
    model as it stands.

    Args:
        session: model and traces.
        findings: gets the proposals.
        null: targets of the shuffled control, whose proposals are made in the same pass, from the same sums of inputs.

    Returns whether every block was reached.
    """
    begun = findings.factors.changes if findings.factors is not None else {}
    with session.clock.stage("statistics"):
        findings.proposals, *others = session.swept(
            begun,
            targets=[None] if null is None else [None, null],
            after_block=session.tell_block,
            keep_going=lambda: session.clock.left > 0,
        )
        findings.shuffled_proposals = others[0] if others else None
        if begun:  # directions are those behind the factors, gradients the model's own as ever
            for index, norm in gradient_norms(session.runner, session.fit).items():
                if index in findings.proposals:
                    findings.proposals[index].signals["gradient_norm"] = norm
    return len(findings.proposals) == sum(bool(block.linears) for block in session.runner.blocks)


def take_out(session: Session, findings: Findings, *, share: float) -> bool:
    """Measure the loss on report with each block skipped, its input passed on as its output (arXiv:1605.06431).

    On a deep model and foreign text, where all blocks gain by adapting, it points at the block at fault best
    (docs/truth.md). All blocks or none: the lowest of some says nothing.

    Returns whether ``share`` of the whole budget allowed it.
    """
    blocks, clock = session.runner.blocks, session.clock
    passes = sum(session.share_from(block.index + 1) for block in blocks)
    if session.seconds_for(passes * session.report.predicted) > min(share * clock.budget, clock.left):
        return False
    with clock.stage(REMOVED):
        found = {}
        stations = session.report.batches[0].stations
        for block in blocks:
            clock.tell(block.index, len(blocks))
            if stations[block.index].shape != stations[block.index + 1].shape:
                continue  # its input cannot stand for its output
            found[block.index] = session.losses_without(session.report, block.index)
        findings.removed = found
    return True


def joint_rounds(session: Session, findings: Findings, *, rounds: int, share: float) -> bool:
    """Refine all blocks together, round after round, while select improves and the time share lasts.

    Args:
        session: model and traces.
        findings: ``composed`` is replaced after each round; ``dense_composed`` too where there are low-bit maps.
        rounds: most rounds.
        share: part of the whole budget after which no further round is begun.

    Returns whether the rounds ended by themselves.
    """
    if not findings.proposals:  # the budget ended before the sweep
        return False
    going = {kind: findings.factors or unrefined(session.select) for kind in kinds(session)}
    output_changes: dict[Direction, float] = {}
    for number in range(rounds):
        for kind, state in list(going.items()):
            with session.clock.stage(_JOINT[kind]):
                if number > 0 and not _affordable_round(session, share):
                    return False
                session.clock.tell(number + 1, rounds)
                proposals = findings.proposals if number == 0 else None
                better = next_round(session, state, proposals, kind, output_changes=output_changes)
                if better is None:
                    del going[kind]
                    if kind == "dense" and not state.rounds:  # tried, and no better than the model as it stands
                        findings.dense_composed = replace(state, report_losses=session.report.losses)
                    continue
                going[kind] = better
                if kind == "certified":
                    findings.composed = better
                else:
                    findings.dense_composed = better
    return True


def leave_one_out(session: Session, findings: Findings, *, share: float) -> bool:
    """Measure what only each block gives: the composed witness without it, on report, most energy first.

    Returns whether every block was measured before ``share`` of the time left was used.
    """
    composed = findings.composed
    if composed is None:
        return True
    blocks, clock = session.runner.blocks, session.clock
    stop = clock.elapsed + share * max(clock.left, 0.0)
    with clock.stage(WITHOUT):
        refined = session.refreshed(session.report, composed.changes)
        order = [i for i in by_energy(findings) if not composed.changes.keys().isdisjoint(blocks[i].linears)]
        for done, index in enumerate(order):
            clock.tell(done, len(order))
            needed = session.seconds_for(session.share_from(index) * session.report.predicted)
            if clock.elapsed + needed > stop:
                return False
            # Blocks below are already in the cached station; only those from here on are run.
            above = {m for block in blocks[index + 1 :] for m in block.linears}
            changes = {m: change for m, change in composed.changes.items() if m in above}
            findings.without[index] = session.losses(refined, changes, index)
    return True


def refine_alone(session: Session, findings: Findings, *, rounds: int) -> bool:
    """Refine blocks by themselves, the most promising first, one round each before anybody's next.

    Where the time left is not enough for all, the others are screened once there is a step to go by, and those whose
    slopes leave the most room come first.

    Returns whether every block was refined until select stopped improving or ``rounds`` were taken.
    """
    output_changes: dict[Direction, float] = {}
    going = dict.fromkeys(_promising(findings), kinds(session))
    with session.clock.stage("solo-rounds"):
        for number in range(rounds):
            still: dict[int, tuple[Kind, ...]] = {}
            # The first sweep is of the model with factors, if there are any; a solo gain is of the model as it is.
            swept = number == 0 and findings.factors is None
            waiting = list(going)
            while waiting:
                session.clock.tell(len(going) - len(waiting), len(going))
                if number == 0 and not findings.first_order and _too_many(session, waiting, swept=swept):
                    waiting = _screened(session, findings, waiting)
                index = waiting.pop(0)
                open_kinds = going[index]
                if not session.clock.affords(len(open_kinds) * _alone_seconds(session, index, swept=swept)):
                    return False
                found = tuple(
                    k for k in open_kinds if _alone_round(session, findings, index, k, output_changes, swept=swept)
                )
                if found:
                    still[index] = found
            going = dict(sorted(still.items(), key=lambda item: findings.alone[item[0]].select_loss))
    return True


def _too_many(session: Session, waiting: Sequence[int], *, swept: bool) -> bool:
    """Whether there may be no time to refine all of these blocks, and there is time to screen them.

    What refining takes is estimated; screening is cheap beside it, and of no use once the time is over.
    """
    seconds = sum(_alone_seconds(session, index, swept=swept) for index in waiting)
    screening = session.seconds_for(PASSES * session.report.predicted)
    return not session.clock.affords(_UNSURE * seconds) and session.clock.affords(screening)


def _screened(session: Session, findings: Findings, waiting: list[int]) -> list[int]:
    """Screen these blocks if there is a step to go by, and return them in the order of what they may gain."""
    if not screen(session, findings, steps_of(findings.alone.values())):
        return waiting
    most = {index: float(gained.sum()) for index, gained in findings.first_order.items()}
    return sorted(waiting, key=lambda index: -most.get(index, math.inf))


def by_energy(findings: Findings) -> list[int]:
    """Return block indices: those unlike their neighbours, then by natural-gradient score (docs/truth.md)."""
    unlike = findings.look.names if findings.look is not None else []
    order = sorted(findings.proposals, key=lambda i: -findings.proposals[i].ranking)
    return [*(i for i in unlike if i in findings.proposals), *(i for i in order if i not in unlike)]


def _promising(findings: Findings) -> list[int]:
    """Blocks by what the composed witness lost without them, then by energy."""
    composed = findings.composed
    order = by_energy(findings)
    if composed is None or composed.report_losses is None:
        return order
    whole = float(composed.report_losses.sum())
    return sorted(order, key=lambda i: whole - float(findings.without[i].sum()) if i in findings.without else 0.0)


def _alone_round(
    session: Session,
    findings: Findings,
    index: int,
    kind: Kind,
    output_changes: dict[Direction, float],
    *,
    swept: bool,
) -> bool:
    """Take one more round of a block by itself; return whether it helped on select."""
    into = findings.alone if kind == "certified" else findings.dense_alone
    before = into.get(index) or unrefined(session.select, index)
    own = {index: findings.proposals[index]} if swept else None
    better = next_round(session, before, own, kind, output_changes=output_changes, evaluations=6, block=index)
    if better is None:
        # No step helped on select: the witness is the block as it stands, and it gains nothing.
        into.setdefault(index, replace(before, report_losses=session.report.losses))
        return False
    into[index] = better
    return True


def _alone_seconds(session: Session, index: int, *, swept: bool) -> float:
    share = session.share_from(index)
    select, report = session.select.predicted, session.report.predicted
    seconds = session.seconds_for(share * (_USUAL_EVALUATIONS * select + report))
    if swept:
        return seconds
    sums, _ = session.clock.stages["statistics"]
    again = session.seconds_for(4 * share * (select + session.fit.predicted))
    return seconds + again + sums / len(session.runner.blocks)


def _affordable_round(session: Session, share: float) -> bool:
    clock = session.clock
    seconds, _ = clock.stages["statistics"]
    evaluations = session.seconds_for(_USUAL_EVALUATIONS * session.select.predicted)
    return clock.elapsed + seconds + evaluations <= share * clock.budget
