"""Choose a step length by evaluating a loss; no model and no tensors here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Two steps closer than this ratio are one step: along a parabola the loss between them differs by 4 % of its gain.
_SAME = 1.25
_FARTHEST, _NEAREST = 8.0, 16.0  # how far one guess may lie from what was tried: times, and parts


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
    slope: float,
    evaluations: int = 8,
    beat: float = math.inf,
) -> StepChoice:
    """Follow the minimum of parabolas until the next guess is a step already tried.

    The slope at step 0 is known from the gradient, so one evaluation gives a first parabola and the second lies
    near its minimum; from then on the parabola goes through the best step and its neighbours. A choice is never
    on the edge of what was tried unless a parabola puts the minimum there or ``evaluations`` runs out.

    Half of the evaluations may look for any improvement, each at most 16 times nearer; then the search gives up, with
    eight evaluations at ``start / 4096``. Nothing worth having is lost: if the loss is a parabola of slope ``-s`` that
    has risen above the start there, its minimum lies below half of that step and gains less than ``s * start / 16384``.

    Args:
        loss_at: the loss at a step length; evaluated on select tokens.
        base: the loss at step 0.
        start: the step to try first.
        slope: decrease of the loss per unit of step at step 0.
        evaluations: most evaluations of ``loss_at``.
        beat: a loss reached elsewhere; the search ends when a parabola cannot get below it.
    """
    tried = {0.0: base}
    step = start
    while True:
        loss = loss_at(step)
        # A loss that overflows, either way, is no improvement.
        tried[step] = loss if math.isfinite(loss) else math.inf
        step, expected = _guess(tried, slope)
        hopeless = min(tried.values()) == base and len(tried) > max(evaluations // 2, 1)
        if len(tried) > evaluations or hopeless or expected >= beat or _was_tried(step, tried):
            break
    best = min(tried, key=lambda step: tried[step])
    return StepChoice(best, tried[best], len(tried) - 1)


def _guess(tried: dict[float, float], slope: float) -> tuple[float, float]:
    """Return the next step to try and the loss that a parabola expects there."""
    best = min(tried, key=lambda step: tried[step])
    below, above = sorted(s for s in tried if s < best), sorted(s for s in tried if s > best)
    if best == 0:
        step, expected = _from_slope(tried[0.0], slope, above[0], tried[above[0]])
        return min(max(step, above[0] / _NEAREST), above[0] / 2), expected
    if above and tried[above[0]] == math.inf:
        return (best * above[0]) ** 0.5, -math.inf  # between what overflows and what does not
    step, expected = _from_slope(tried[0.0], slope, best, tried[best])
    if len(below) > 1 or (above and step * _SAME > above[0]):
        three = (below[-1], best, above[0]) if above else (below[-2], below[-1], best)
        step, expected = _through(*((s, tried[s]) for s in three))
    # What was evaluated says more than any parabola: stay between the neighbours, and near.
    lowest = below[-1] if above else (below[-1] + best) / 2
    highest = above[0] if above else best * _FARTHEST
    return min(max(step, lowest, best / _NEAREST), highest), expected


def _from_slope(base: float, slope: float, step: float, loss: float) -> tuple[float, float]:
    """Return the lowest point of the parabola with value and slope at 0 and a value at ``step``."""
    curvature = 2 * (loss - base + slope * step) / step**2
    if curvature == math.inf:
        return 0.0, base
    if curvature <= 0:
        return math.inf, -math.inf
    return slope / curvature, base - slope**2 / (2 * curvature)


def _through(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> tuple[float, float]:
    """Return the lowest point of the parabola through three points in ascending order."""
    left, right = (b[1] - a[1]) / (b[0] - a[0]), (c[1] - b[1]) / (c[0] - b[0])
    half = (right - left) / (c[0] - a[0])
    if not half > 0:
        return math.inf, -math.inf
    step = (a[0] + b[0]) / 2 - left / (2 * half)
    return step, b[1] - half * (step - b[0]) ** 2 if a[0] < step < c[0] else -math.inf


def _was_tried(step: float, tried: dict[float, float]) -> bool:
    return not step > 0 or any(1 / _SAME < step / other < _SAME for other in tried if other > 0)
