"""What refinements have found, while it is about the same model; and verdicts, until something contradicts them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from peelwise.evidence.intervals import Paired
from peelwise.evidence.levels import Levels
from peelwise.evidence.trends import Slope
from peelwise.evidence.verdict import Evidence, Verdict
from peelwise.probe.rolling import Part

Name = Literal["recoverable", "unique", "first_order"]

_NAMES: tuple[Name, ...] = ("recoverable", "unique", "first_order")
_SHORTEST = 50  # steps that a verdict is kept at least
_UNANSWERED = 2  # later measurements that decide nothing, which it outlasts where they are far apart


@dataclass(frozen=True)
class Found:
    """A difference, when it was measured last, and the probe's loss at that time.

    Attributes:
        measurements: 1 for what one has found; more for a level that may be put together from as many.
    """

    step: int
    loss: float
    value: Paired
    measurements: int = 1

    def outdated(self, loss: float, margin: float) -> bool:
        """Whether it is of another model than the one that now has ``loss`` on the probe.

        Training has since gained as much as was found; or nothing was found, and the loss has since risen. The level of
        several measurements is not outdated by training that goes on: its drift is in its interval.
        """
        gained = self.measurements == 1 and self.loss - loss > max(self.value.mean, margin)
        return gained or (self.value.mean < margin < loss - self.loss)


@dataclass(frozen=True)
class _Decided:
    """A verdict that was decided: by a measurement of which step, the probe's loss then, how many found nothing since.

    Attributes:
        unanswered: later measurements that decided nothing of the block.
    """

    verdict: Verdict
    step: int
    loss: float
    unanswered: int = 0

    def is_old(self, step: int) -> bool:
        """Whether the run is twice as long as when it was measured, and later measurements could not renew it."""
        return step > 2 * self.step + _SHORTEST and self.unanswered > _UNANSWERED


@dataclass
class Memory:
    """Remembers by block solo gains, marginal gains, first-order bounds, and the verdicts that were decided.

    Where measurements are made on different parts of a text, what counts is the level that they show together.
    """

    alone: dict[int, Found] = field(default_factory=dict)
    unique: dict[int, Found] = field(default_factory=dict)
    bounds: dict[int, Found] = field(default_factory=dict)
    _decided: dict[int, _Decided] = field(default_factory=dict)
    _levels: dict[Name, Levels] = field(default_factory=dict)

    def note(self, name: Name, step: int, loss: float, values: Mapping[int, Paired], part: Part | None = None) -> None:
        """Take what one measurement found.

        Args:
            name: of the number.
            step: of the training.
            loss: of the probe, nats per token.
            values: per block.
            part: what it was measured on, where every measurement is made on another part.
        """
        self._named(name).update({block: Found(step, loss, value) for block, value in values.items()})
        if part is not None:
            levels = self._levels.setdefault(name, Levels())
            levels.add(step, values, part.report, repeats=part.repeats)

    def levels(self, step: int) -> Iterator[tuple[Name, int, Paired]]:
        """Put the level of every number in its place, as it is at a step, and yield it.

        How fast levels drift is seen from the second measurement of a block on; until then there are none.
        """
        for name, levels in self._levels.items():
            kept, count = self._named(name), levels.count
            for block, level in levels.at(step).items() if count > 1 else ():
                if block in kept:
                    kept[block] = replace(kept[block], value=level, measurements=count)
                    yield name, block, level

    def forget_from(self, step: int) -> None:
        """Forget what was found from a step on."""
        for kept in self._kept():
            for block in [b for b, found in kept.items() if found.step >= step]:
                del kept[block]
        for levels in self._levels.values():
            levels.forget_from(step)
        self._decided = {block: old for block, old in self._decided.items() if old.step < step}

    def rebase(self, shift: float) -> None:
        """Move all losses: the probe has other text now, on which the same model has a loss higher by ``shift``."""
        for kept in self._kept():
            kept.update({block: replace(found, loss=found.loss + shift) for block, found in kept.items()})
        self._decided = {block: replace(old, loss=old.loss + shift) for block, old in self._decided.items()}

    def evidence(self, count: int, frozen: Collection[int], loss: float, margin: float) -> list[Evidence]:
        """Drop what is outdated, and return what is left of every block."""
        self.drop_outdated(loss, margin)
        return [Evidence(frozen=True) if block in frozen else self._evidence(block, margin) for block in range(count)]

    def drop_outdated(self, loss: float, margin: float) -> None:
        """Drop what is of another model than the one that has ``loss`` on the probe."""
        for name in _NAMES:
            kept = self._named(name)
            for block in [b for b, found in kept.items() if found.outdated(loss, margin)]:
                if kept[block].measurements > 1:  # the loss has risen: the next measurement is of something else
                    self._levels[name].drop(block)
                del kept[block]

    def _evidence(self, block: int, margin: float) -> Evidence:
        alone, bound = self.alone.get(block), self.bounds.get(block)
        # A later bound that leaves no room says more of the model as it is now than an earlier gain.
        if alone and bound and bound.step > alone.step:
            alone, bound = (None, bound) if bound.value.interval().high < margin else (alone, None)
        elif alone and bound and bound.step < alone.step:
            bound = None
        solo, first_order = (None if found is None else found.value for found in (alone, bound))
        return Evidence(solo, _value(self.unique, block), bound=first_order)

    def of(self, block: int, verdict: Verdict) -> Found | None:
        """Return the measurement that a verdict rests on."""
        if verdict.reason == "screened":
            return self.bounds.get(block)
        if verdict.reason == "within-progress":
            return self.at_most(block)
        own = verdict.reason in ("own-above-margin", "nothing-of-its-own")
        return (self.unique if own else self.alone).get(block)

    def at_most(self, block: int) -> Found | None:
        """Return what a block gains by itself, measured or bounded by its slope."""
        return self.alone.get(block) or self.bounds.get(block)

    def keep(self, block: int, verdict: Verdict, step: int, loss: float) -> None:
        """Remember a verdict by the measurement of a step, at the probe's loss now."""
        self._decided[block] = _Decided(verdict, step, loss)

    def step_of(self, block: int) -> int | None:
        """Return the step of the measurement that decided a block's verdict, if one has."""
        return self._decided[block].step if block in self._decided else None

    def lasting(
        self, step: int, verdicts: list[Verdict], loss: float, margin: float, *, slope: Slope | None, falling: bool
    ) -> Iterator[Verdict]:
        """Yield the verdicts, where an undecided block keeps what was decided before and nothing has contradicted.

        A measurement of few tokens that decides nothing is no news, and neither is it that training has moved on. A
        verdict is kept until the run is twice as long as when it was measured and more than two measurements have not
        renewed it; green only while the loss has not risen by the margin and what is measured stays below it, red only
        while the measurement counts and is above it, and yellow that is about the progress of training until the slope
        of the loss leaves no room for that. That a loss is not shown to fall does not say that it stands still.
        """
        for block, verdict in enumerate(verdicts):
            found = self.of(block, verdict)
            if verdict.colour in ("red", "yellow", "green") and found is not None:
                self._decided[block] = _Decided(verdict, found.step, found.loss)
            old = self._decided.get(block)
            if verdict.colour != "grey" or old is None:
                yield verdict
                continue
            self._decided[block] = old = replace(old, unanswered=old.unanswered + 1)
            progress = None if falling else slope
            if verdict.interaction or old.is_old(step) or self._contradicted(block, old, loss, margin, progress):
                del self._decided[block]
                yield verdict
            else:
                red_yet_falling = old.verdict.colour == "red" and falling
                yield Verdict("yellow", "still-falling") if red_yet_falling else old.verdict

    def _contradicted(self, block: int, old: _Decided, loss: float, margin: float, slope: Slope | None) -> bool:
        """Whether what was measured since says otherwise; ``slope`` is that of a loss that is not shown to fall."""
        found = self.of(block, old.verdict)
        if old.verdict.colour == "green":
            return loss - old.loss > margin or (found is not None and found.value.mean > margin)
        if old.verdict.reason not in ("still-falling", "within-progress"):
            return found is None or found.value.mean <= margin
        if old.verdict.reason == "still-falling" and found is not None and found.value.mean <= margin:
            return True
        return slope is not None and -slope.low * slope.steps < (margin if found is None else found.value.mean)

    def _named(self, name: Name) -> dict[int, Found]:
        return {"recoverable": self.alone, "unique": self.unique, "first_order": self.bounds}[name]

    def _kept(self) -> tuple[dict[int, Found], ...]:
        return self.alone, self.unique, self.bounds


def _value(kept: Mapping[int, Found], block: int) -> Paired | None:
    return kept[block].value if block in kept else None
