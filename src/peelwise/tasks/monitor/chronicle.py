"""What a monitor remembers of a run, and the rows it makes of each measured: statistics, verdicts, events."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from peelwise.evidence import events as alerts
from peelwise.evidence.events import Change, Seen
from peelwise.evidence.mixtures import MixtureWatch
from peelwise.evidence.reds import RedBlock, Reds
from peelwise.evidence.trends import (
    Slope,
    against_own,
    change_points,
    equivalent_steps,
    loss_gap,
    loss_slope,
    own_parts,
    probe_slope,
    progress_slope,
)
from peelwise.evidence.unlike import OWN, named
from peelwise.evidence.verdict import Verdict, default_margin, judge
from peelwise.probe.rolling import Part
from peelwise.records.base import NATS
from peelwise.records.run import LETTERS, WHOLE_MODEL, Event, Measurement, Statistic, VerdictRow
from peelwise.records.signals import RANKED_BY, SIGNALS
from peelwise.tasks.monitor.measure import Measured, finite
from peelwise.tasks.monitor.memory import Memory
from peelwise.tasks.monitor.pace import Pace, missing
from peelwise.tasks.monitor.progress import unless_soon, within_progress

_SMALLEST_CHANGE = math.log(1.5)
_LOOKED_BACK = 200  # measurements in which changes are looked for
_REMEMBERED_LOSSES = 20_000
_COMPARED = 50  # losses of training, at most, that the probe's is compared with
_APART_TWICE = 2
_RECENT = 16  # losses
_CHANCE = 3.0  # times the evidence of chance; of few blocks that all have none, one stands out easily
_AT_FAULT = Verdict("grey", "run-at-fault")


@dataclass
class _Series:
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Drop what is not of before a step."""
        kept = sum(each < step for each in self.steps)
        del self.steps[kept:], self.values[kept:]


class Chronicle:
    """Remembers losses, statistics and measurements of one run; `add` makes the row of a measured.

    Args:
        blocks: number of blocks.
        margin: nats per token that matter, or ``None`` for the default.
        in_distribution: whether the probe is training text.
        frozen: blocks that are not asked about; others later, where training changes them.
        unit: what losses are in.
        comparable: whether training's losses are of the same kind as the probe's, so that they can be told apart.
    """

    def __init__(
        self,
        blocks: int,
        *,
        margin: float | None,
        in_distribution: bool,
        frozen: frozenset[int] = frozenset(),
        unit: str = NATS,
        comparable: bool = True,
    ) -> None:
        self.frozen = frozen
        self._unit, self._comparable = unit, comparable
        self._count, self._margin, self._in_distribution = blocks, margin, in_distribution
        self._losses = _Series()
        self._probe_losses = _Series()
        self._series: defaultdict[tuple[str, int], _Series] = defaultdict(_Series)
        self._memory = Memory()
        self._verdicts: dict[int, tuple[Verdict, int | None]] = {}
        self._reds = Reds()
        self._mixtures = MixtureWatch()
        self._changes: list[tuple[int, Change]] = []
        self._upper: float | None = None
        self._trained: set[int] = set()  # blocks that were seen to train
        self._scales: dict[int, float] = {}  # evidence that the loss asks for other scales, by the last gain slopes
        self._unlike: set[int] = set()  # blocks of which that was told
        self._apart = 0  # measurements in a row at which training's loss was far from the probe's

    def loss(self, step: int, value: float) -> None:
        """Remember a training loss."""
        self._losses.add(step, value)
        if len(self._losses.steps) > 2 * _REMEMBERED_LOSSES:
            del self._losses.steps[:_REMEMBERED_LOSSES], self._losses.values[:_REMEMBERED_LOSSES]

    def forget_from(self, step: int) -> None:
        """Forget what was seen from a step on: training has gone back to before it, to another state of the model."""
        for series in (self._losses, self._probe_losses, *self._series.values()):
            series.cut(step)
        self._memory.forget_from(step)
        self._changes = [(block, change) for block, change in self._changes if change.by_step < step]
        self._reds.forget_from(step)
        self._apart = 0

    def slope(self) -> Slope | None:
        """Return the slope of the training loss; of the probe's where no training loss was ever given."""
        series = self._losses if self._losses.steps else self._probe_losses
        return loss_slope(series.steps, series.values)

    def wanted_first(self) -> list[int]:
        """Return the blocks in the order in which they should be refined alone next.

        Never measured ones come first, those with the highest natural-gradient score before the others, or before there
        was one those whose scales the loss would change most certainly; then undecided
        ones, beginning with that which fewest tokens decide; then those whose level changed since they were measured;
        then the ones measured longest ago. Those that a slope leaves no room for come last.
        """
        changed = {block for block, change in self._changes if change.by_step > self._step_of(block)}

        def rank(block: int) -> tuple[bool, bool, float, bool, float, float]:
            score = self._series[RANKED_BY, block].values[-1:] or [self._scales.get(block, 0.0)]
            measured, verdict = block in self._memory.alone, self._verdicts.get(block)
            screened = verdict is not None and verdict[0].reason == "screened"
            wait = math.inf if verdict is None or verdict[0].colour != "grey" else self._times_more(block, verdict[0])
            return screened, measured, wait, block not in changed, self._step_of(block), -score[0]

        return sorted((block for block in range(self._count) if block not in self.frozen), key=rank)

    def _times_more(self, block: int, verdict: Verdict) -> float:
        """Return how many times the sequences that it was measured on would decide a block, as far as that is known."""
        found = self._memory.alone.get(block)
        if found is None or verdict.sequences_needed is None:
            return 1.0
        return verdict.sequences_needed / found.value.sequences

    def recent(self) -> list[float]:
        """Return the latest training losses."""
        return self._losses.values[-_RECENT:]

    @property
    def undecided(self) -> float:
        """The share of the blocks asked about that have no colour; all, before anything was measured."""
        colours = [verdict.colour for verdict, _ in self._verdicts.values() if verdict.colour != "frozen"]
        return colours.count("grey") / len(colours) if colours else 1.0

    @property
    def count(self) -> int:
        """How many training losses there were."""
        return len(self._losses.values)

    def add(
        self,
        step: int,
        measured: Measured,
        *,
        seconds: float,
        share: float,
        seen: Mapping[int, Seen] | None = None,
        shared: str = "",
        at_fault: bool = False,
        counting: float | None = None,
        other_text: bool = False,
        part: Part | None = None,
        pace: Pace | None = None,
    ) -> Measurement:
        """Return the row of a measured.

        Args:
            step: of the training.
            measured: what was found.
            seconds: what it took.
            share: the monitor's share of wall time so far.
            seen: what else is known of blocks, for suggestions.
            shared: what all blocks have in common, in words.
            at_fault: whether something is known to be wrong with the whole run, which has been told.
            counting: what one who only counts tokens has on the probe, nats per token.
            other_text: whether more of the probe is measured than last time.
            part: of a rolling probe, what it was measured on; the loss is always of the same text then.
            pace: what measuring costs in this run, for how long it takes until undecided blocks are decided.
        """
        if other_text:
            self._rebase(measured.loss)
        measured, unknown = finite(measured)
        self._probe_losses.add(step, measured.loss)
        apart = self._losses_apart(step)
        slope = self.slope()
        statistics = [*self._free(step, measured), *self._measured(step, measured, slope, part), *self._cloud(measured)]
        changes = self._new_changes(step)
        falling = self._falling(measured.loss, slope)
        verdicts = self._judge(step, measured.loss, falling=falling)
        if at_fault or self._worse_than_none(measured.loss, counting):
            verdicts = [_AT_FAULT if verdict.colour == "green" else verdict for verdict in verdicts]
        if at_fault:  # progress towards something else
            verdicts = [_AT_FAULT if verdict.reason == "within-progress" else verdict for verdict in verdicts]
        if pace is not None:
            statistics += self._missing(verdicts, pace, together=part is not None)
        # Asked before the row's own verdicts replace the last ones.
        news = self._news(verdicts)
        events = [
            *([alerts.gains_not_finite(step, unknown)] if unknown else []),
            *([apart] if apart else []),
            *[
                alerts.changed(step, block, change)
                for block, change in self._worth_a_word(changes, seen or {}, at_fault)
            ],
            *self._mixtures.add(step, measured.free),
            *self._unlike_scales(step, measured),
            *self._reds.events(step, self._red_blocks(step, verdicts, slope, seen or {}), shared, quiet=at_fault),
        ]
        return Measurement(
            step,
            measured.kind,
            measured.loss,
            seconds,
            share,
            "".join(LETTERS[verdict.colour] for verdict in verdicts),
            slope=slope.mean if slope else None,
            slope_low=slope.low if slope else None,
            slope_high=slope.high if slope else None,
            still_falling=slope.falling if slope else None,
            statistics=tuple(statistics),
            matrices=measured.matrices,
            verdicts=tuple(news),
            events=tuple(events),
            unit=self._unit,
        )

    def _rebase(self, loss: float) -> None:
        """Move all losses of the probe to other text: the model is taken to be as it was at the last measurement."""
        if not self._probe_losses.values:
            return
        shift = loss - self._probe_losses.values[-1]
        self._probe_losses.values = [value + shift for value in self._probe_losses.values]
        self._memory.rebase(shift)

    def _losses_apart(self, step: int) -> Event | None:
        """Return an event where training's loss is far from the probe's, at the second measurement in a row."""
        if not self._comparable:
            return None
        before = self._probe_losses.steps[-2] if len(self._probe_losses.steps) > 1 else None
        recent = [v for s, v in zip(self._losses.steps[-_COMPARED:], self._losses.values[-_COMPARED:], strict=True)
                  if before is not None and s > before]  # fmt: skip
        gap = loss_gap(recent, self._probe_losses.values[-2:])
        # On text of another kind the probe's loss is higher by nature.
        if gap is None or (gap < 0 and not self._in_distribution):
            self._apart = 0
            return None
        self._apart += 1
        if self._apart != _APART_TWICE:
            return None
        return alerts.losses_disagree(step, median(recent), self._probe_losses.values[-1])

    def _step_of(self, block: int) -> float:
        return self._memory.alone[block].step if block in self._memory.alone else -math.inf

    def _free(self, step: int, measured: Measured) -> list[Statistic]:
        """Return the signals of the sweep against their own history."""
        return [
            Statistic(name, block, value, None, None, *self._against_own(step, name, block, value))
            for name, values in measured.free.items()
            for block, value in enumerate(values)
            if value is not None
        ]

    def _against_own(self, step: int, name: str, block: int, value: float) -> tuple[float | None, float | None]:
        """Remember a value, and return it against the running median and trend of its own."""
        series = self._series[name, block]
        series.add(step, value)
        return against_own(series.steps, series.values, quotient=SIGNALS[name].quotient)

    def _measured(self, step: int, measured: Measured, slope: Slope | None, part: Part | None) -> list[Statistic]:
        """Return the paired differences with their intervals, what they are worth in steps, and their levels."""
        self._memory.note("recoverable", step, measured.loss, measured.alone, part)
        self._memory.note("unique", step, measured.loss, measured.unique, part)
        self._memory.note("first_order", step, measured.loss, measured.bounds, part)
        rows = []
        for name, found in (
            ("recoverable", measured.alone),
            ("unique", measured.unique),
            ("first_order", measured.bounds),
            ("composed", {} if measured.composed is None else {WHOLE_MODEL: measured.composed}),
        ):
            for block, value in found.items():
                interval = value.interval()
                compared = self._against_own(step, name, block, value.mean)
                rows.append(Statistic(name, block, value.mean, interval.low, interval.high, *compared))
                worth = equivalent_steps(interval, slope) if slope and name == "recoverable" else None
                if worth is not None and worth.mean is not None:
                    rows.append(Statistic("equivalent_steps", block, worth.mean, worth.low, worth.high))
        self._memory.drop_outdated(measured.loss, self._margin_at(measured.loss))
        for of, block, value in self._memory.levels(step):
            level = value.interval()
            rows.append(Statistic(f"{of}_level", block, level.mean, level.low, level.high))
        return rows

    def _cloud(self, measured: Measured) -> Iterator[Statistic]:
        """Yield the edges of the loss's cloud: the upper one as last measured, the lower one where it is measured."""
        self._upper = measured.upper if measured.upper is not None else self._upper
        if self._upper is not None:
            yield Statistic("bound_upper", WHOLE_MODEL, self._upper)
        if measured.kind == "joint":
            # The model as it stands is a witness too: one that does worse on report moves no edge.
            gain = measured.composed.interval() if measured.composed is not None else None
            gains = (gain.mean, gain.high, gain.low) if gain is not None else (0.0, 0.0, 0.0)
            yield Statistic("bound_lower", WHOLE_MODEL, *(measured.loss - max(nats, 0.0) for nats in gains))

    def _missing(self, verdicts: list[Verdict], pace: Pace, *, together: bool) -> Iterator[Statistic]:
        """Yield of every undecided block how many tokens would decide it, and how long the budget takes to pay them."""
        for block, verdict in enumerate(verdicts):
            if verdict.colour != "grey" or verdict.sequences_needed is None:
                continue
            found = self._memory.alone.get(block)
            held = found.value.sequences if found is not None and together else 0
            tokens, seconds = missing(verdict.sequences_needed, held, pace)
            yield Statistic("tokens_to_decide", block, tokens)
            if seconds is not None:
                yield Statistic("seconds_to_decide", block, seconds)

    def _judge(self, step: int, loss: float, *, falling: bool) -> list[Verdict]:
        margin = self._margin_at(loss)
        evidence = self._memory.evidence(self._count, self.frozen, loss, margin)
        judged = judge(evidence, margin, in_distribution=self._in_distribution, still_falling=falling)
        slope = self.slope()
        if slope is not None:
            judged = [self._unless_soon(block, verdict, slope) for block, verdict in enumerate(judged)]
        lasting = list(self._memory.lasting(step, judged, loss, margin, slope=slope, falling=falling))
        progress = progress_slope(self._losses.steps, self._losses.values) if self._losses.steps else slope
        return [self._or_settled(block, verdict, progress, loss) for block, verdict in enumerate(lasting)]

    def _unless_soon(self, block: int, verdict: Verdict, slope: Slope) -> Verdict:
        found = self._memory.of(block, verdict) if verdict.colour == "red" else None
        return verdict if found is None else unless_soon(verdict, found.value.interval(), slope)

    def _or_settled(self, block: int, verdict: Verdict, slope: Slope | None, loss: float) -> Verdict:
        """Return a verdict; where none was reached and none lasts, what the progress of training settles."""
        found = self._memory.at_most(block)
        # What the text of training gains says nothing of other text.
        if found is None or slope is None or not self._in_distribution:
            return verdict
        settled = within_progress(verdict, found.value.interval(), slope)
        if settled is not verdict:
            self._memory.keep(block, settled, found.step, loss)
        return settled

    def _falling(self, loss: float, slope: Slope | None) -> bool:
        """Whether training makes progress: until the slope is known it counts as going on; red says that it is not.

        Losses of small batches may be too noisy to show what the probe shows; how slow is too slow, the margin says.
        """
        own = probe_slope(self._probe_losses.steps, self._probe_losses.values, slope.steps) if slope else None
        return slope is None or slope.falling or (own is not None and own.gains(self._margin_at(loss)))

    def _margin_at(self, loss: float) -> float:
        return default_margin(loss, self._unit) if self._margin is None else self._margin

    def _news(self, verdicts: list[Verdict]) -> list[VerdictRow]:
        """Return the rows of blocks whose verdict changed, and remember all."""
        rows = []
        for block, verdict in enumerate(verdicts):
            measured = self._memory.step_of(block)
            before, _ = self._verdicts.get(block, (None, None))
            if before is None or (before.colour, before.code) != (verdict.colour, verdict.code):
                rows.append(VerdictRow(block, verdict.colour, verdict.code, measured))
            self._verdicts[block] = verdict, measured
        return rows

    def _new_changes(self, step: int) -> list[tuple[int, Change]]:
        """Return changes of level that were not told before; one per block, the clearer statistic first."""
        found = []
        for name in (signal.name for signal in SIGNALS.values() if signal.watched):
            asked = [block for block in range(self._count) if block not in self.frozen]
            rows = [self._series[name, block] for block in asked]
            recent = [row.values[-_LOOKED_BACK:] for row in rows]
            steps = rows[0].steps[-_LOOKED_BACK:]
            # Blocks are compared with each other, by logarithms: all must have it, at all times, and above zero.
            if not steps or any(row.steps[-_LOOKED_BACK:] != steps for row in rows) or min(map(min, recent)) <= 0:
                continue
            for point in change_points(own_parts(recent), smallest=_SMALLEST_CHANGE):
                change = Change(name, math.exp(point.size), steps[point.index - 1], steps[point.index])
                found.append((point.deviations, asked[point.series], change))
        new = []
        for _, block, change in sorted(found, key=lambda item: -item[0]):
            # As measurements come in, the date of a change may move by one of them.
            near = (_near(change, told, self._probe_losses.steps) for b, told in self._changes if b == block)
            if not any(near):
                self._changes.append((block, change))
                new.append((block, change))
        return new

    def _worth_a_word(
        self, changes: list[tuple[int, Change]], seen: Mapping[int, Seen], at_fault: bool
    ) -> list[tuple[int, Change]]:
        """Return the changes of level whose cause is not known: where one block broke in mid-run, the others follow it.

        A block that has not trained from the beginning on, such as a frozen one, explains no change of another.
        """
        stopped = {block for block, each in seen.items() if each.untrained is not None}
        self._trained |= {*seen} - stopped
        broken = stopped & self._trained
        return [] if at_fault else [(b, change) for b, change in changes if not broken or b in broken]

    def _unlike_scales(self, step: int, measured: Measured) -> Iterator[Event]:
        """Yield an event for each block whose scales the loss would change far more certainly than the others'."""
        if not measured.scales:
            return
        self._scales = dict(measured.scales)
        asked = sorted(block for block in self._scales if block not in self.frozen)
        scores = np.array([self._scales[block] for block in asked])
        for block in (asked[place] for place in (named(scores) if len(scores) else [])):
            slope, evidence = (measured.free[name][block] for name in ("gain_slope", OWN))
            if block not in self._unlike and slope is not None and (evidence or 0.0) > _CHANCE:
                self._unlike.add(block)
                yield alerts.unlike_scales(step, block, self._scales[block], slope)

    def _worse_than_none(self, loss: float, counting: float | None) -> bool:
        """Whether the loss is above what is reached without blocks: then nothing that was not found says anything."""
        return any(loss > each for each in (self._upper, counting) if each is not None)

    def _red_blocks(
        self, step: int, verdicts: list[Verdict], slope: Slope | None, seen: Mapping[int, Seen]
    ) -> list[RedBlock | str]:
        """Return per block what there is to say of it if it is red, else its colour."""
        rows: list[RedBlock | str] = []
        for block, verdict in enumerate(verdicts):
            if verdict.colour != "red":
                rows.append(verdict.colour)
                continue
            measured = self._memory.of(block, verdict)
            assert measured is not None
            gain = measured.value.interval()
            worth = equivalent_steps(gain, slope) if slope else None
            rows.append(
                RedBlock(gain, worth, measured.step, self._with_change(block, seen.get(block, Seen())), self._unit)
            )
        return rows

    def _with_change(self, block: int, seen: Seen) -> Seen:
        changes = [change for b, change in self._changes if b == block]
        return replace(seen, change=max(changes, key=lambda c: c.by_step)) if changes else seen


def _near(one: Change, other: Change, steps: list[int]) -> bool:
    """Whether two dates are within three measurements of each other."""
    between = sum(min(one.by_step, other.by_step) < s <= max(one.by_step, other.by_step) for s in steps)
    return between <= 3
