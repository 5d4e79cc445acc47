"""Refinement rounds: linearise, propose, choose direction and step on select, repeat while select improves.

The same round serves one block alone, all blocks together, and the null controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from peelwise.model.runner import Runner, Trace
from peelwise.model.splice import spliced
from peelwise.pipeline.bench import ChangeMap, combined, output_change
from peelwise.pipeline.search import search_step
from peelwise.pipeline.sweep import BlockProposals, Direction
from peelwise.records import RoundRecord

Proposals = dict[int, BlockProposals]


@dataclass(frozen=True)
class Refined:
    """Weight changes of some blocks after a number of rounds, and how they do.

    Attributes:
        changes: the changes of all rounds added up.
        rounds: what was chosen in each round.
        select_loss: nats per token on select.
        report_losses: nats per sequence on report, or ``None`` where it was not evaluated.
        start: the lowest block that is changed.
    """

    changes: ChangeMap
    rounds: tuple[RoundRecord, ...]
    select_loss: float
    report_losses: Tensor | None
    start: int


def unrefined(select: Trace, start: int = 0) -> Refined:
    """Return the state before the first round."""
    return Refined({}, (), select.mean, None, start)


def take_round(
    runner: Runner,
    select: Trace,
    before: Refined,
    proposals: Proposals,
    *,
    first_step: dict[Direction, float],
    evaluations: int = 10,
    after_look: Callable[[], None] = lambda: None,
) -> Refined | None:
    """Try the directions of ``proposals`` on top of ``before``; return the better, or ``None`` if none helps.

    Args:
        runner: the model, with nothing spliced in.
        select: a trace whose stations are right up to ``before.start``.
        before: the changes so far.
        proposals: what the sweep proposed, linearised at ``before``.
        first_step: per direction the step to try first; updated with the step that was chosen.
        evaluations: most evaluations of the select loss per direction.
        after_look: called after each evaluation.
    """
    tokens = float(select.tokens.sum())
    best: Refined | None = None
    for direction in _directions(proposals):
        if output_change(proposals, direction, 1.0) == 0:
            continue

        def loss_at(step: float, direction: Direction = direction) -> float:
            with spliced(combined(before.changes, proposals, direction, step)):
                loss = float(runner.losses_from(select, before.start).sum()) / tokens
            after_look()
            return loss

        start = first_step.get(direction) or default_step(proposals, direction)
        choice = search_step(loss_at, before.select_loss, start, evaluations=evaluations)
        if choice.step == 0:
            continue
        first_step[direction] = choice.step
        if best is None or choice.loss < best.select_loss:
            best = Refined(
                combined(before.changes, proposals, direction, choice.step),
                (
                    *before.rounds,
                    RoundRecord(
                        direction=direction,
                        step=choice.step,
                        output_change=output_change(proposals, direction, choice.step),
                        select_before=before.select_loss,
                        select_after=choice.loss,
                    ),
                ),
                choice.loss,
                None,
                before.start,
            )
    return best


def default_step(proposals: Proposals, direction: Direction) -> float:
    """Return a first step: where the calibrated slope would win 0.05 nats if the loss were linear.

    The slope of the held-out loss along the direction is the held-out energy, so the guess adapts to the
    scale of the gradients; the search corrects it by factors of two and four.
    """
    slope = sum(p.energy for block in proposals.values() for p in block.changes[direction].values())
    return 0.05 / slope if slope > 0 else 1.0


def _directions(proposals: Proposals) -> Sequence[Direction]:
    first = next(iter(proposals.values()), None)
    return tuple(first.changes) if first is not None else ()
