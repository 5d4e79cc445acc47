"""How a round of refinement is taken: densely, or inside the formats of low-bit maps."""

from __future__ import annotations

from typing import Literal

from peelwise.engine.refine import Proposals, Refined, take_round
from peelwise.engine.refine_coded import take_coded_round
from peelwise.engine.session import Session
from peelwise.engine.sweep import Direction

# "certified" keeps every map in its format; "dense" leaves the formats of low-bit maps, to tell what the bits cost.
Kind = Literal["certified", "dense"]


def kinds(session: Session) -> tuple[Kind, ...]:
    """Return which witnesses are looked for: two where there are low-bit maps."""
    return ("certified", "dense") if session.held else ("certified",)


def improved(
    session: Session,
    before: Refined,
    proposals: Proposals,
    kind: Kind = "certified",
    *,
    output_changes: dict[Direction, float],
    evaluations: int = 8,
) -> Refined | None:
    """Return ``before`` after one more round, or ``None`` if none helps on select; see `take_round`."""
    if kind == "certified" and session.held:
        return take_coded_round(session.runner, session.select, before, proposals, session.held)
    return take_round(
        session.runner, session.select, before, proposals, output_changes=output_changes, evaluations=evaluations
    )
