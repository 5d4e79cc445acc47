"""Which kind of measurement is next, on how much of the probe, what it costs, and whether the budget allows it now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peelwise.distributed.processes import Processes
from peelwise.evidence.events import cost
from peelwise.probe.probe import Probe
from peelwise.probe.rolling import Part, Roll, RollingProbe
from peelwise.records.run import Event, MeasurementKind
from peelwise.tasks.monitor.costs import Costs
from peelwise.tasks.monitor.schedules import affordable
from peelwise.tasks.monitor.sizes import affordable_tokens, fewest_of, part_of, tokens_of

# Rankings date what changes, refining tells how much there is to gain, a joint round what only one block can give.
PLAN: tuple[MeasurementKind, ...] = ("ranking", "alone", "ranking", "joint", "ranking", "alone")
_KINDS: tuple[MeasurementKind, ...] = ("slopes", "ranking", "alone", "joint")
_FEW_UNDECIDED = 0.2  # of the blocks that are asked about
_NO_RANKING_AMONG = 8  # first measurements: fewer date no change, and a ranking takes two thirds of a refinement
# Gain slopes come first where what decides takes so many times as long; of the budget, at most, meanwhile.
_FAR_DEARER, _SHARE_OF_SLOPES = 10.0, 1 / 3


class Planner:
    """Plans the measurements of one run; in all of its processes alike, by the clock of the first.

    Args:
        probe: the whole of it.
        plan: kinds in turn.
        budget: share of wall time, or ``None`` for no limit.
        per_token: seconds of a forward pass, as a first look has shown.
        processes: that train together.
        solves: what the solves of all layers take, in tokens that go forward (`costs.solve_tokens`).

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
        solves: float = 0.0,
    ) -> None:
        self._whole, self._plan, self._budget = probe, plan, budget
        self._costs = Costs(per_token, solves)
        self._processes = processes
        self._begun = self._planned = self._size = 0
        self._on_slopes = self._slopes_again = 0.0  # seconds that looks took; of the run, before the next
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
        sizes = self._full, tokens_of(self.probe)
        seconds = [self._costs.expected("alone", tokens) for tokens in sizes]
        told = cost(step, *sizes, (seconds[0], seconds[1]), self._budget, of=of)
        if not self._slopes_come_first:
            return told
        return replace(told, suggestion=f"{told.suggestion} Until the first, gain slopes are looked at.".strip())

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
        now = affordable(spent, self._costs.of(kind, self.probe), elapsed, self._budget)
        if not now and self._slopes_meanwhile(spent, elapsed, self._budget):
            kind, now, self._slopes_again = "slopes", True, 2 * elapsed
        code = self._processes.broadcast_number(1 + _KINDS.index(kind) if now else 0)
        return _KINDS[code - 1] if code else None

    def _slopes_meanwhile(self, spent: float, elapsed: float, budget: float) -> bool:
        """Whether to look at the gain slopes until the budget has paid for a first measurement.

        They decide no block, but tell the probe's loss, a block whose scales are wrong, and which to refine first. One
        look is much like the last until the run is twice as long.
        """
        if elapsed < self._slopes_again or self._begun or not self._slopes_come_first:
            return False
        seconds = self._costs.of("slopes", self.probe)
        of_slopes = affordable(self._on_slopes, seconds, elapsed, _SHARE_OF_SLOPES * budget)
        return of_slopes and affordable(spent, seconds, elapsed, budget)

    @property
    def _slopes_come_first(self) -> bool:
        """Whether what decides takes so much longer that gain slopes are worth a look before it."""
        if self._plan is not PLAN or self._roll is not None or self._processes.count > 1:
            return False
        return _FAR_DEARER * self._costs.of("slopes", self.probe) < self._costs.of("alone", self.probe)

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
        """Note that a measurement begins; that of slopes is beside the plan."""
        if kind == "slopes":
            return
        self._planned += kind == self._next or (self._refines and self._next == "ranking")
        self._begun += 1

    def took(self, kind: MeasurementKind, seconds: float, *, failed: bool = False) -> None:
        """Note what a measurement took."""
        self._costs.took(kind, self.probe, seconds, failed=failed)
        self._on_slopes += seconds if kind == "slopes" else 0.0

    def grow(self, elapsed: float) -> bool:
        """Take more of the probe where the budget pays for it by now; return whether its loss is of other text then."""
        if self._size == self._full:
            return False
        # By what the first process has measured.
        rolling = self._roll is not None
        size = self._processes.broadcast(
            affordable_tokens(
                self._full,
                self._costs.per_token,
                self._budget,
                elapsed,
                self._size,
                fewest=fewest_of(self._whole),
                solves=self._costs.solves,
            )
        )
        if size == self._size:
            return False
        first = self._size == 0
        self._size, self.probe = size, part_of(self._whole, size)
        return not first and not rolling
