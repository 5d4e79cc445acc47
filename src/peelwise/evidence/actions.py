"""Which actions were measured to help in which case: the one place that suggestions name an action from. No torch.

Every row is held against its result file by the tests: ``helps`` is what the file says, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAGE = "docs/actions.md"

Case = Literal["damaged-block", "healthy-training"]

CASES: dict[Case, str] = {
    "damaged-block": "a block was damaged in the training, and the cause is gone",
    "healthy-training": "nothing is wrong: could training be cheaper?",
}


@dataclass(frozen=True)
class Measured:
    """An action in a case, and what came of it at equal cost.

    Attributes:
        case: in which it was tried.
        arm: its name in the result file.
        words: what one does, behind "..., try"; empty where it did not help.
        helps: whether it was better than training on as before, at equal cost, over all seeds, and than its control.
        result: the file under ``benchmarks/results``.
        section: of the page.
        control: an arm of the same file that does the same without the idea, where there is one.
    """

    case: Case
    arm: str
    words: str
    helps: bool
    result: str
    section: str
    control: str | None = None


def _damaged(arm: str, words: str, helps: bool, control: str | None = None) -> Measured:
    return Measured("damaged-block", arm, words, helps, "mended_block.json", "a-block-that-was-damaged", control)


def _healthy(arm: str) -> Measured:
    return Measured("healthy-training", arm, "", False, "actions.json", "arms-at-equal-cost")


MEASURED: tuple[Measured, ...] = (
    _damaged("block drawn anew", "drawing the block anew", True),
    _damaged("witness", "putting its replacement weights in place (peelwise.act.apply_witness_)", True),
    _damaged("rate of the block x 5", "", False, control="rate of all x 5"),
    _healthy("map [1, 5] by Hill alpha"),
    _healthy("map [1, 5] by natural-gradient score"),
    _healthy("growth by importance"),
    _healthy("random half of the blocks per step"),
    _healthy("witness once, at half of the steps"),
    _healthy("blockwise rates by kind"),
)


def helpful(case: Case) -> tuple[Measured, ...]:
    """Return the actions that were measured to help in a case, the best first."""
    return tuple(row for row in MEASURED if row.case == case and row.helps)


def suggestion(case: Case) -> str:
    """Return a sentence that names what helped in a case, with a link to its measurement; empty if nothing did."""
    rows = helpful(case)
    if not rows:
        return ""
    *first, last = [row.words for row in rows]
    named = f"{', '.join(first)} or {last}" if first else last
    return f"If {CASES[case]}, what helped where it was measured is {named}: {PAGE}#{rows[0].section}."
