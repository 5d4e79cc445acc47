"""What refinements have found, while it is about the same model; and verdicts, until something contradicts them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import Evidence, Verdict

_SHORTEST = 50  # steps that a verdict is kept at least


@dataclass(frozen=True)
class Found:
    """A difference, when it was measured, and the probe's loss at that time."""

    step: int
    loss: float
    value: Paired

    def outdated(self, loss: float, margin: float) -> bool:
        """Whether it is of another model than the one that now has ``loss`` on the probe.

        Training has since gained as much as was found; or nothing was found, and the loss has since risen.
        """
        return self.loss - loss > max(self.value.mean, margin) or (self.value.mean < margin < loss - self.loss)


@dataclass(frozen=True)
class _Decided:
    """A verdict that was decided: by a measurement of which step, and the probe's loss then."""

    verdict: Verdict
    step: int
    loss: float


@dataclass
class Memory:
    """Remembers by block solo gains, marginal gains, first-order bounds, and the verdicts that were decided."""

    alone: dict[int, Found] = field(default_factory=dict)
    unique: dict[int, Found] = field(default_factory=dict)
    bounds: dict[int, Found] = field(default_factory=dict)
    _decided: dict[int, _Decided] = field(default_factory=dict)

    def forget_from(self, step: int) -> None:
        """Forget what was found from a step on."""
        for kept in self._kept():
            for block in [b for b, found in kept.items() if found.step >= step]:
                del kept[block]
        self._decided = {block: old for block, old in self._decided.items() if old.step < step}

    def rebase(self, shift: float) -> None:
        """Move all losses: the probe has other text now, on which the same model has a loss higher by ``shift``."""
        for kept in self._kept():
            kept.update({block: replace(found, loss=found.loss + shift) for block, found in kept.items()})
        self._decided = {block: replace(old, loss=old.loss + shift) for block, old in self._decided.items()}

    def evidence(self, count: int, frozen: Collection[int], loss: float, margin: float) -> list[Evidence]:
        """Drop what is outdated, and return what is left of every block."""
        for kept in self._kept():
            for block in [b for b, found in kept.items() if found.outdated(loss, margin)]:
                del kept[block]
        return [Evidence(frozen=True) if block in frozen else self._evidence(block, margin) for block in range(count)]

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
        own = verdict.reason in ("own-above-margin", "nothing-of-its-own")
        return (self.unique if own else self.alone).get(block)

    def step_of(self, block: int) -> int | None:
        """Return the step of the measurement that decided a block's verdict, if one has."""
        return self._decided[block].step if block in self._decided else None

    def lasting(
        self, step: int, verdicts: list[Verdict], loss: float, margin: float, *, falling: bool
    ) -> Iterator[Verdict]:
        """Yield the verdicts, where an undecided block keeps what was decided before and nothing has contradicted.

        A measurement of few tokens that decides nothing is no news, and neither is it that training has moved on. A
        verdict is kept until the run is twice as long as when it was measured; green only while the loss has not risen
        by the margin and what is measured stays below it, others only while the measurement counts and is above it.
        """
        for block, verdict in enumerate(verdicts):
            found = self.of(block, verdict)
            if verdict.colour in ("red", "yellow", "green") and found is not None:
                self._decided[block] = _Decided(verdict, found.step, found.loss)
            old = self._decided.get(block)
            if verdict.colour != "grey" or old is None:
                yield verdict
            elif verdict.interaction or step > 2 * old.step + _SHORTEST or self._contradicted(block, old, loss, margin):
                del self._decided[block]
                yield verdict
            else:
                red_yet_falling = old.verdict.colour == "red" and falling
                yield Verdict("yellow", "still-falling") if red_yet_falling else old.verdict

    def _contradicted(self, block: int, old: _Decided, loss: float, margin: float) -> bool:
        found = self.of(block, old.verdict)
        if old.verdict.colour == "green":
            return loss - old.loss > margin or (found is not None and found.value.mean > margin)
        return found is None or found.value.mean <= margin

    def _kept(self) -> tuple[dict[int, Found], ...]:
        return self.alone, self.unique, self.bounds


def _value(kept: Mapping[int, Found], block: int) -> Paired | None:
    return kept[block].value if block in kept else None
