"""When to measure: pure functions of the step, and of what measuring has cost so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from peelwise.errors import OptionError

Schedule = Callable[[int], bool]


def every(n: int) -> Schedule:
    """Return a schedule that says yes at steps 0, n, 2n, ..

    Raises:
        OptionError: If ``n`` is below 1.
    """
    if n < 1:
        raise OptionError(f"every() takes a number of steps of at least 1, got {n}.")
    return lambda step: step % n == 0


def log_spaced(per_decade: int = 10) -> Schedule:
    """Return a schedule that says yes at step 0 and about ``per_decade`` times each time the step grows tenfold.

    The steps are ``round(10^(k / per_decade))``: close together while much changes, far apart later.

    Raises:
        OptionError: If ``per_decade`` is below 1.
    """
    if per_decade < 1:
        raise OptionError(f"log_spaced() takes a number per decade of at least 1, got {per_decade}.")

    def due(step: int) -> bool:
        if step < 2:
            return step >= 0
        k = round(math.log10(step) * per_decade)
        return any(round(10 ** (j / per_decade)) == step for j in (k - 1, k, k + 1))

    return due


def affordable(spent: float, expected: float, elapsed: float, budget: float) -> bool:
    """Whether something may begin so that the share of time taken stays around ``budget``.

    The share after it is ``(spent + expected) / (elapsed + expected)``; it may be above the budget by half of what
    this costs, and then is below it by as much before the next: right on average.

    Args:
        spent: seconds taken so far.
        expected: seconds that it takes, as far as is known.
        elapsed: seconds since the start, ``spent`` included.
        budget: share of wall time, 0..1.
    """
    return spent + expected / 2 <= budget * (elapsed + expected)
