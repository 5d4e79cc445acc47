"""Which kind of measurement is next, on how much of the probe, what it costs, and whether the budget allows it now."""

from __future__ import annotations

from collections.abc import Sequence

from peelwise.distributed.processes import Processes
from peelwise.evidence.events import cost
from peelwise.probe.probe import Probe
from peelwise.probe.rolling import Part, Roll, RollingProbe
from peelwise.records.run import Event, MeasurementKind
from peelwise.tasks.monitor.schedules import affordable
from peelwise.tasks.monitor.sizes import PASSES, affordable_tokens, fewest_of, part_of, tokens_of

# Rankings date what changes, refining tells how much there is to gain, a joint round what only one block can give.
PLAN: tuple[MeasurementKind, ...] = ("ranking", "alone", "ranking", "joint", "ranking", "alone")
_KINDS: tuple[MeasurementKind, ...] = ("ranking", "alone", "joint")
# What a kind costs in forward passes over the probe, as long as it was never measured.
_FIRST_GUESS: dict[MeasurementKind, float] = {"ranking": 5.0, "alone": PASSES, "joint": 12.0}
_FEW_UNDECIDED = 0.2  # of the blocks that are asked about
_NO_RANKING_AMONG = 8  # first measurements: fewer date no change, and a ranking takes two thirds of a refinement


class Planner:
    """Plans the measurements of one run; in all of its processes alike, by the clock of the first.

    Args:
        probe: the whole of it.
        plan: kinds in turn.
        budget: share of wall time, or ``None`` for no limit.
        per_token: seconds of a forward pass, as a first look has shown.
        processes: that train together.

    Attributes:
        probe: what to measure on at present; of a rolling probe, something of that size.
    """

    def __init__(
        self,
        probe: Probe,
        plan: Sequence[MeasurementKind],
        budget: float | None,
        per_token: float,
        processes: Processes,
    ) -> None:
        self._whole, self._plan, self._budget, self._per_token = probe, plan, budget, per_token
        self._processes = processes
        self._begun = self._planned = self._size = 0
        self._costs: dict[MeasurementKind, float] = {}
        self._roll = Roll(probe) if isinstance(probe, RollingProbe) else None
        self._full = min(probe.each, tokens_of(probe)) if isinstance(probe, RollingProbe) else tokens_of(probe)
        self.probe = probe
        self.grow(0.0)

    def take(self) -> Part | None:
        """Return the next part of a rolling probe, which `probe` is then; ``None`` if it is another one."""
        if self._roll is None:
            return None
        part = self._roll.take(self._size)
        self.probe = part.probe
        return part

    def forecast(self, step: int) -> Event | None:
        """Return the event of what measurements are expected to cost, and what fits the budget."""
        if self._budget is None:
            return None
        of = "probe tokens" if self.probe.examples is None else "examples of the probe"
        return cost(step, self._full, tokens_of(self.probe), PASSES * self._per_token, self._budget, of=of)

    def due(self, spent: float, elapsed: float, undecided: float) -> MeasurementKind | None:
        """Return the kind to measure now, if the budget allows it.

        Args:
            spent: seconds taken so far.
            elapsed: seconds since the start.
            undecided: share of blocks without a colour. While there are many, what may decide them comes first at every
                other measurement; where measurements are put together at every one. A mere ranking comes only where
                there are many measurements already.
        """
        kind = self._next
        if self._budget is None:
            return kind
        often = self._roll is not None or self._begun % 2 == 0
        if (self._plan is PLAN and often and undecided > _FEW_UNDECIDED) or (self._refines and kind == "ranking"):
            kind = "alone"
        now = affordable(spent, self._costs[kind], elapsed, self._budget)
        code = self._processes.broadcast_number(1 + _KINDS.index(kind) if now else 0)
        return _KINDS[code - 1] if code else None

    @property
    def _next(self) -> MeasurementKind:
        return self._plan[self._planned % len(self._plan)]

    @property
    def _refines(self) -> bool:
        """Whether the next measurement refines blocks where the plan has a ranking, which decides less.

        Changes are dated among many measurements only, and to a level of a rolling probe a ranking adds nothing.
        """
        few = self._roll is not None or self._begun < _NO_RANKING_AMONG
        return few and self._plan is PLAN and self._budget is not None

    def begin(self, kind: MeasurementKind) -> None:
        """Note that a measurement begins."""
        self._planned += kind == self._next or (self._refines and self._next == "ranking")
        self._begun += 1

    def took(self, kind: MeasurementKind, seconds: float, *, failed: bool = False) -> None:
        """Note what a measurement took."""
        self._costs[kind] = seconds
        if kind == "ranking" and not failed:
            self._per_token = seconds / _FIRST_GUESS[kind] / tokens_of(self.probe)

    def grow(self, elapsed: float) -> bool:
        """Take more of the probe where the budget pays for it by now; return whether its loss is of other text then."""
        if self._size == self._full:
            return False
        # By what the first process has measured.
        rolling = self._roll is not None
        size = self._processes.broadcast(
            affordable_tokens(
                self._full, self._per_token, self._budget, elapsed, self._size, fewest=fewest_of(self._whole)
            )
        )
        if size == self._size:
            return False
        before, first = tokens_of(self.probe), self._size == 0
        self._size, self.probe = size, part_of(self._whole, size)
        times = tokens_of(self.probe) / before
        for kind, passes in _FIRST_GUESS.items():
            guess = self._per_token * tokens_of(self.probe) * passes
            self._costs[kind] = guess if first else self._costs[kind] * times
        return not first and not rolling
