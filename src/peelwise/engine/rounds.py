"""How a round of refinement is taken: densely, or inside the formats of low-bit maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from peelwise.engine.proposals import Direction
from peelwise.engine.refine import Proposals, Refined, take_round
from peelwise.engine.refine_coded import take_coded_round
from peelwise.engine.session import Session

# "certified" keeps every map in its format; "dense" leaves the formats of low-bit maps, to tell what the bits cost.
Kind = Literal["certified", "dense"]


def kinds(session: Session) -> tuple[Kind, ...]:
    """Return which witnesses are looked for: two where there are low-bit maps."""
    return ("certified", "dense") if session.held else ("certified",)


def next_round(
    session: Session,
    before: Refined,
    proposals: Proposals | None,
    kind: Kind = "certified",
    *,
    output_changes: dict[Direction, float],
    evaluations: int = 8,
    block: int | None = None,
) -> Refined | None:
    """Return ``before`` after one more round, evaluated on report, or ``None`` if none helps on select.

    Args:
        session: model and traces.
        before: the changes so far.
        proposals: for the first round, those of the first sweep; ``None`` for new ones, linearised at ``before``.
        kind: which witness is refined.
        output_changes: per direction the step length to try first; see `take_round`.
        evaluations: most evaluations of the select loss per direction.
        block: the only one that is refined; ``None`` for all of them together.
    """
    if proposals is None:
        proposals = session.relinearised(before.changes, block)
    if kind == "certified" and session.held:
        better = take_coded_round(session, before, proposals)
    else:
        better = take_round(session, before, proposals, output_changes=output_changes, evaluations=evaluations)
    if better is None:
        return None
    return replace(better, report_losses=session.losses(session.report, better.changes, better.start))
