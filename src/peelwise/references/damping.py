"""The choice of a damping on other samples, with as few solves as will do."""

from __future__ import annotations

from collections.abc import Callable


def climb(value: Callable[[float], float], start: float, *, factor: float, lowest: float, highest: float) -> float:
    """Return the damping that ``value`` likes better than both neighbours on a geometric grid, or one at its end.

    Args:
        value: what a damping is worth, on samples that did not make the solution; asked once per damping.
        start: damping to try first.
        factor: between neighbours of the grid.
        lowest, highest: ends of the grid, both included.
    """
    tried: dict[float, float] = {}

    def look(damping: float) -> float:
        if damping not in tried:
            tried[damping] = value(damping)
        return tried[damping]

    best = start
    for step in (factor, 1 / factor):
        while lowest <= best * step <= highest and look(best * step) > look(best):
            best *= step
    return best
