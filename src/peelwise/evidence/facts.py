"""What is known of single steps of a training, from which mistakes in it are told. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from peelwise.evidence.trends import Slope
from peelwise.evidence.verdict import default_margin
from peelwise.records.base import Interval

_TOO_LONG = 20.0  # times as long as the run so far
_REPEATED, _FEWEST_ROWS = 0.75, 32


@dataclass(frozen=True)
class UpdateFacts:
    """What one step of the optimiser did, estimated from a sample of all weights.

    Attributes:
        moved: per block, the root mean square of the change of its matrices; ``None`` where none is trained.
        relative: per block, the same over that of the matrices.
        rates: per block, its learning rate, or ``None``.
        highest_rate: of all groups, or ``None`` without an optimiser.
        lost: part of the half-precision weights that have a gradient and did not change; ``None`` without such.
        dtype: of those.
        shrink: part of the matrices' weights that decoupled weight decay takes in one step.
        kept_norm: the norm of the matrices that are decayed over that at the first check.
        coupled: the norm of what coupled weight decay adds to the gradient, over the norm of the gradient.
        stale: how much of the last step's gradient is in this one's; ``None`` where that cannot be told.
        alike: per block, the cosine of its matrices and what they were at the check before the last; ``None`` where
            none is trained or there was no such check.
        since: the step of that check.
    """

    moved: tuple[float | None, ...]
    relative: tuple[float | None, ...]
    rates: tuple[float | None, ...] = ()
    highest_rate: float | None = None
    lost: float | None = None
    dtype: str = ""
    shrink: float = 0.0
    kept_norm: float = 1.0
    coupled: float = 0.0
    stale: float | None = None
    alike: tuple[float | None, ...] = ()
    since: int | None = None

    @property
    def rates_known(self) -> bool:
        """Whether every block that is trained has a learning rate that is known."""
        pairs = zip(self.moved, self.rates, strict=True) if self.rates else ((moved, None) for moved in self.moved)
        return all(rate is not None for moved, rate in pairs if moved is not None)

    @property
    def usual(self) -> float | None:
        """The median of the blocks' relative updates."""
        known = [value for value in self.relative if value is not None]
        return median(known) if known else None


@dataclass(frozen=True)
class BatchFacts:
    """What training's own forward passes of one step would cost in other ways of computing the loss; nats per token.

    Attributes:
        next, twice, same: with the next token as target, the one after it, and the token itself.
        unpadded: as ``next``, without targets that look like padding.
        labelled_first: as ``next``, without the first of these in each row: labels that were made before the rows were
            filled up have another token there.
        padding: part of the targets that does.
        rows, repeated: sequences seen at checks of late, and how many of them had been seen before.
        distinct: different sequences among all seen.
    """

    next: float
    twice: float
    same: float
    unpadded: float
    padding: float
    rows: int = 0
    repeated: int = 0
    distinct: int = 0
    labelled_first: float | None = None

    @property
    def repeats(self) -> bool:
        """Whether most sequences of late had been seen before."""
        return self.rows >= _FEWEST_ROWS and self.repeated >= _REPEATED * self.rows


@dataclass(frozen=True)
class PulseFacts:
    """The loss of a few sequences of the probe, and what else their logits say; nats per token.

    Attributes:
        loss: with its interval; of a probe of batches in its unit.
        twice: what the token after the next costs less than the next (positive where labels were shifted twice);
            ``None`` where no next token is predicted.
    """

    loss: Interval
    twice: Interval | None


@dataclass(frozen=True)
class StepFacts:
    """All that is known at one check.

    Attributes:
        step: of the training.
        losses: those of training of late.
        loss: the reported one of this very step, or ``None``.
        slope: of the training loss.
        count: losses seen so far.
        counting: what one who only counts tokens would have on the probe, nats per token; of batches one who counts
            labels, ``None`` where there are none.
        nats: per token that matter, or ``None`` for the default.
    """

    step: int
    losses: Sequence[float]
    loss: float | None
    slope: Slope | None
    count: int
    counting: float | None
    nats: float | None = None
    updates: UpdateFacts | None = None
    batch: BatchFacts | None = None
    pulse: PulseFacts | None = None
    of_tokens: bool = True  # whether next tokens are predicted

    @property
    def margin(self) -> float:
        """Nats per token that matter."""
        return default_margin(self.counting or 0.0) if self.nats is None else self.nats

    @property
    def counted(self) -> str:
        """What the simplest model counts."""
        return "tokens" if self.of_tokens else "labels"

    @property
    def recent(self) -> float | None:
        """The median of the losses of training of late."""
        return median(self.losses) if self.losses else None

    @property
    def suspicious(self) -> bool:
        """Whether a mistake may be there that only the probe's loss would show.

        Sequences come again, the loss is above that of counting tokens or not known, or the batch was not seen.
        """
        batch, recent = self.batch, self.recent
        if self.counting is None:
            return False
        unseen = self.of_tokens and batch is None
        repeats = batch is not None and batch.repeats
        return unseen or recent is None or recent > self.counting + self.margin or repeats

    @property
    def hopeless(self) -> bool:
        """Whether the training loss is above what counting tokens costs and will be for long at its present slope."""
        if self.recent is None or self.slope is None or self.counting is None:
            return False
        if self.recent <= self.counting + self.margin:
            return False
        left = self.recent - self.counting
        return not self.slope.falling or left / -self.slope.mean > _TOO_LONG * max(self.count, 100)
