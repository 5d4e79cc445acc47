"""Choose a step length by evaluating a loss; no model and no tensors here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepChoice:
    """The step with the lowest loss seen; ``step`` is 0 if nothing beat the start."""

    step: float
    loss: float
    evaluations: int


def search_step(
    loss_at: Callable[[float], float],
    base: float,
    start: float,
    *,
    evaluations: int = 10,
    factor: float = 2.0,
) -> StepChoice:
    """Bracket the best step on a geometric grid, then refine it by one parabola.

    The grid is open at both ends, so the choice is never on its edge unless ``evaluations`` runs out.

    Half of the evaluations may look for any improvement, each at a ``factor^2`` shorter step; then the search gives
    up, with ten evaluations at ``start / 256``. Nothing worth having is lost: if the loss is a parabola of slope
    ``-s`` that has risen above the start there, its minimum lies below half of that step and gains less than
    ``s * start / 1024``, a thousandth of what the slope promised for ``start`` (0.05 nats by default).

    Args:
        loss_at: the loss at a step length; evaluated on select tokens.
        base: the loss at step 0.
        start: the step to try first.
        evaluations: most evaluations of ``loss_at``.
        factor: ratio of the grid.
    """
    tried = {0.0: base}

    def look(step: float) -> float:
        if step not in tried:
            loss = loss_at(step)
            # A loss that overflows, either way, is no improvement.
            tried[step] = loss if math.isfinite(loss) else math.inf
        return tried[step]

    best = start
    while look(best) >= base and len(tried) <= evaluations // 2:
        best /= factor**2
    if tried[best] >= base:
        return StepChoice(0.0, base, len(tried) - 1)
    for ratio in (factor, 1 / factor):
        while len(tried) < evaluations and look(best * ratio) < tried[best]:
            best *= ratio
    if best / factor in tried and best * factor in tried and len(tried) <= evaluations:
        look(_parabola_minimum(*((s, tried[s]) for s in (best / factor, best, best * factor))))
    best = min(tried, key=lambda step: tried[step])
    return StepChoice(best, tried[best], len(tried) - 1)


def _parabola_minimum(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Return the abscissa of the lowest point of the parabola through three bracketing points."""
    left, right = (b[0] - a[0]) * (b[1] - c[1]), (b[0] - c[0]) * (b[1] - a[1])
    curvature = 2 * (left - right)
    if curvature == 0 or not math.isfinite(curvature):
        return b[0]
    shift = ((b[0] - a[0]) * left - (b[0] - c[0]) * right) / curvature
    return min(max(b[0] - shift, a[0]), c[0])
