"""What a check found: signals of every block against depth, and the blocks that are unlike their neighbours. No torch.

The names of the fields are the keys of the file, and others rely on them: add, do not rename. Losses are in nats per
token on the report part of the probe.
"""

from __future__ import annotations

from typing import Literal

from peelwise.records.base import Interval, ProbeRecord, Record, SealedRecord


class SignalReason(Record):
    """One signal that says that a block is unlike its neighbours.

    Attributes:
        signal: its name in the table of signals.
        part: the linear layer, norm or branch it belongs to, or empty for the block as a whole.
        value: of this block.
        typical: median of its neighbours.
        deviation: how far the value is from there, in robust standard deviations over depth; a t-value where the
            signal is one.
    """

    signal: str
    part: str
    value: float
    typical: float | None
    deviation: float


class BlockCheck(Record):
    """One block.

    Attributes:
        index, name: of the block.
        score: larger is more unlike its neighbours; ``None`` where there is no depth to compare with.
        signals: ``signal.part`` -> value; without the part for signals of the whole block.
        ablation: what skipping the block costs, for blocks that are named.
    """

    index: int
    name: str
    score: float | None
    signals: dict[str, float]
    ablation: Interval | None = None


class MatrixCheck(Record):
    """One linear layer: its full name, its block, its name within the block, and its signals."""

    name: str
    block: int
    part: str
    signals: dict[str, float]


class UnlikeBlock(Record):
    """A block that stands out, with the signals that say so, the strongest first."""

    block: int
    score: float
    reasons: tuple[SignalReason, ...]


class GainWitness(Record):
    """A factor on what one part of a block gives, and what it gains: a proof with a single fitted number.

    Attributes:
        block: index.
        part: ``attention``, ``mlp``, a linear layer by its name within the block.
        layer: full name of the linear layer whose weight (and bias) is multiplied.
        head: which head's inputs of that layer alone, or ``None`` for all of it.
        head_dim: channels of a head, where ``head`` is given.
        factor: by which it is multiplied; below 0 it changes the sign, 0 is ablation of the part.
        gain: decrease of the loss on report with the factor in place, nats per token.
        select_gain: the same on select, where the factor was found.
        composed: whether it is one of those that together make the composed gain.
    """

    block: int
    part: str
    layer: str
    head: int | None = None
    head_dim: int | None = None
    factor: float
    gain: Interval
    select_gain: float
    composed: bool = False


class CheckPart(Record):
    """What an audit, which begins with a check, keeps of it.

    Attributes:
        threshold: score from which a block is named.
        scores: of all blocks.
        unlike: those that are named.
        signals: per block as in `BlockCheck`; none in audits of old.
    """

    threshold: float
    scores: tuple[float, ...]
    unlike: tuple[UnlikeBlock, ...] = ()
    signals: tuple[dict[str, float], ...] = ()


class CheckRecord(SealedRecord):
    """Everything that one check found.

    ``unlike`` is empty where no block stands out, and ``None`` where there is no depth to compare with (fewer than
    five blocks). ``threshold`` is the score from which a block is named. ``composed_gain`` is what the gain witnesses
    marked as composed gain together. ``rule`` is the number of the rule that scores follow from
    (`evidence.unlike.RULE`); records of old have none. Without text ``probe``, ``loss`` and all that is measured with
    them are ``None``.
    """

    kind: Literal["check"] = "check"
    rule: int = 1
    complete: bool = True
    informative: bool | None = None
    probe: ProbeRecord | None = None  # type: ignore[assignment]
    loss: float | None = None
    composed_loss: float | None = None
    composed_gain: Interval | None = None
    threshold: float
    blocks: tuple[BlockCheck, ...]
    matrices: tuple[MatrixCheck, ...] = ()
    unlike: tuple[UnlikeBlock, ...] | None
    gain_witnesses: tuple[GainWitness, ...] = ()
