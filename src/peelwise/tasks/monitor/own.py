"""Signals of a run that a measurement's own memory does not hold, each against its own history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peelwise.evidence.trends import WINDOW, against_own
from peelwise.records.run import Statistic
from peelwise.records.signals import SIGNALS


class OwnHistory:
    """Remembers the values of some signals of every block, and makes the rows of new ones."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, int], tuple[list[float], list[float]]] = {}  # steps and values

    def rows(self, step: int, found: Mapping[int, Mapping[str, float]]) -> Iterator[Statistic]:
        """Yield the rows of one moment, each against the running median and trend of its own.

        Args:
            step: of the training; what was of later ones is forgotten, since training has gone back to before it.
            found: per block, values by name of the signal.
        """
        for block, values in found.items():
            for name, value in values.items():
                yield Statistic(name, block, value, None, None, *self._compared(step, name, block, value))

    def _compared(self, step: int, name: str, block: int, value: float) -> tuple[float | None, float | None]:
        steps, values = self._series.setdefault((name, block), ([], []))
        while steps and steps[-1] >= step:
            steps.pop()
            values.pop()
        steps.append(step)
        values.append(value)
        del steps[: -WINDOW - 1], values[: -WINDOW - 1]
        return against_own(steps, values, quotient=SIGNALS[name].quotient)
