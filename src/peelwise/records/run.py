"""Frozen rows of a run history: what a monitor writes down while a model trains. Plain numbers, no torch.

Losses are in nats per token unless the user's own loss is in something else; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peelwise.records.base import NATS, Colour
from peelwise.records.signals import SIGNALS

WHOLE_MODEL = -1  # the block of statistics that belong to all blocks together

MeasurementKind = Literal["slopes", "ranking", "alone", "joint"]
Level = Literal["info", "warning", "alert"]

# One letter per block in depth order, so that a heat map needs one short text per record.
LETTERS: dict[Colour, str] = {"red": "R", "yellow": "Y", "green": "G", "grey": "?", "frozen": "F"}
COLOURS: dict[str, Colour] = {letter: colour for colour, letter in LETTERS.items()}


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run starts.

    Attributes:
        name: what the user calls the run.
        architecture: class of the model.
        parameters: number of distinct parameters.
        blocks: names of the blocks in depth order.
        budget: share of wall time the monitor may take, or ``None`` without a limit.
        in_distribution: whether the probe is training text.
        probe, settings, versions: further facts, stored as JSON.
    """

    name: str
    architecture: str
    parameters: int
    blocks: tuple[str, ...]
    budget: float | None = None
    in_distribution: bool = False
    probe: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRow:
    """One training step: the loss that was reported, and the monitor's share of wall time so far."""

    step: int
    loss: float | None
    share: float

    def scalars(self) -> dict[str, float]:
        """Return what trackers want."""
        return {"peelwise/share": self.share} | ({} if self.loss is None else {"peelwise/loss": self.loss})


@dataclass(frozen=True)
class Statistic:
    """One number of one block at one record, with its 95 % interval where it has one.

    Attributes:
        name: such as ``energy``; all of them are in `records.signals.SIGNALS` (documentation: Signals of a block).
        block: index, or ``WHOLE_MODEL``.
        value, low, high: the number and its interval.
        to_median, to_trend: the number against its own running median and trend; a quotient or a
            difference, as its row of the table says.
    """

    name: str
    block: int
    value: float
    low: float | None = None
    high: float | None = None
    to_median: float | None = None
    to_trend: float | None = None


@dataclass(frozen=True)
class MatrixShare:
    """The part (0..1) of a block's explained gradient energy that lies in one of its matrices."""

    block: int
    matrix: str
    share: float


@dataclass(frozen=True)
class VerdictRow:
    """A block's verdict from this record on, and the step of the measurement it rests on.

    ``reason`` is one of `codes.Reason`, with `codes.INTERACTS` behind it or not; in runs of old it is a sentence.
    """

    block: int
    colour: Colour
    reason: str
    measured_step: int | None = None


@dataclass(frozen=True)
class Event:
    """Something worth a person's attention.

    Attributes:
        step: when it was noticed.
        level: ``info``, ``warning`` or ``alert``.
        kind: such as ``red``, ``change``, ``frozen``; see docs/monitor.md.
        text: what was seen.
        block: index, or ``None`` for the whole model.
        since_step: when it began, as far as that can be told.
        suggestion: what one may try, or empty.
    """

    step: int
    level: Level
    kind: str
    text: str
    block: int | None = None
    since_step: int | None = None
    suggestion: str = ""

    def __str__(self) -> str:
        advice = f" {self.suggestion}" if self.suggestion else ""
        return f"step {self.step}: {self.text}{advice}"


@dataclass(frozen=True)
class Measurement:
    """Everything one probe of the model found; stored in one transaction.

    Attributes:
        step: the training step it belongs to.
        kind: ``slopes`` (gain slopes alone), ``ranking`` (free statistics), ``alone`` (some blocks refined too),
            ``joint`` (all refined together too).
        probe_loss: on the probe's report part.
        slope, slope_low, slope_high: change of the training loss per step, with its 95 % interval.
        still_falling: whether the slope is shown to be negative; ``None`` while there are too few losses.
        seconds: what the probe took.
        share: the monitor's share of wall time so far, this probe included.
        letters: one letter of ``LETTERS`` per block.
        statistics, matrices, verdicts, events: its rows; ``verdicts`` only of blocks whose verdict changed.
        unit: what losses are in; a run history keeps it once, with the run's probe.
    """

    step: int
    kind: MeasurementKind
    probe_loss: float
    seconds: float
    share: float
    letters: str
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    still_falling: bool | None = None
    statistics: tuple[Statistic, ...] = ()
    matrices: tuple[MatrixShare, ...] = ()
    verdicts: tuple[VerdictRow, ...] = ()
    events: tuple[Event, ...] = ()
    unit: str = NATS

    def scalars(self) -> dict[str, float]:
        """Return what trackers want: the probe's loss, how many blocks have which colour, and numbers per block."""
        found = {"peelwise/probe_loss": self.probe_loss}
        counts = {colour: self.letters.count(letter) for colour, letter in LETTERS.items()}
        found |= {f"peelwise/blocks_{c}": float(number) for c, number in counts.items() if number or c != "frozen"}
        tracked = {name for name, signal in SIGNALS.items() if signal.tracked}
        return found | {tag(s.name, s.block): s.value for s in self.statistics if s.name in tracked}


def tag(name: str, block: int) -> str:
    """Return what a statistic of a block is called in other people's trackers."""
    return f"peelwise/{name}/{'model' if block == WHOLE_MODEL else f'block_{block:02d}'}"
