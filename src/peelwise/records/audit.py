"""What an audit writes down: every number of ``certificate.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peelwise.records.base import Colour, Interval, Record, SealedRecord, SplitRecord
from peelwise.records.check import CheckPart
from peelwise.records.codes import Baseline, Reason


class MatrixRecord(Record):
    """One linear layer of a block; ``share`` is its part of the block's input-whitened score (0..1).

    Of low-bit layers also the ``format`` with its bits per weight, the share of codes that the witness of the block by
    itself changes, and ``split``, the parts of the layer's error against its dense witness by the local curvature, in
    nats per token.
    """

    name: str
    share: float
    damping: float | None = None
    step_weight: float | None = None
    format: str | None = None
    bits_per_weight: float | None = None
    flipped: float | None = None
    split: SplitRecord | None = None


class BlockRecord(Record):
    """What was found out about one block.

    ``reason_code`` says why it has its colour; records of old have a sentence under ``reason`` instead.
    Keys are older than the words that are shown. ``recoverable_nats`` is the **solo gain**: the block refined by
    itself. ``unique_nats`` is the **marginal gain** (leave-one-out): what only this block gives once all others are
    refined. ``interaction`` marks one that is significantly negative over all blocks together: neighbours that
    compensate for each other. ``None`` means not measured within the budget, never "nothing there".
    ``energy`` to ``gradient_norm`` are the signals of a sweep that have a field of their own since earlier versions;
    ``signals`` holds all others by name. What they mean is in `records.signals.SIGNALS`.
    ``first_order_nats`` is the **first-order bound** of a block that was not refined by itself: what the best direction
    known for it gains at most, by the slope of the loss along it, at twice the step that a refined block takes.
    ``removal_nats`` is the **ablation**: what the loss rises by when the block is skipped, its input passed on as its
    output. Below zero, the model is better without it, which replacement weights of zero prove.
    ``split`` takes the loss of a low-bit model apart for this block alone, with the interval of its price in
    ``price_nats``. Of a ``frozen`` block no linear layer is asked about; it has an ablation and nothing else.
    """

    index: int
    name: str
    verdict: Colour
    reason_code: Reason | None = None
    recoverable_nats: Interval | None = None
    unique_nats: Interval | None = None
    first_order_nats: Interval | None = None
    removal_nats: Interval | None = None
    rounds: int = 0
    energy: float | None = None
    held_out_energy: float | None = None
    cross_energy: float | None = None
    natural_energy: float | None = None
    gradient_norm: float | None = None
    signals: dict[str, float] = Field(default_factory=dict)
    tokens_needed: int | None = None
    interaction: bool = False
    matrices: tuple[MatrixRecord, ...] = ()
    split: SplitRecord | None = None
    price_nats: Interval | None = None
    frozen: bool = False


class HeadRecord(Record):
    """The convex output head alone: present, best found and lower bound of the same damped objective.

    ``current``, ``achieved`` and ``relaxed`` are in nats per token on the fit tokens and include the
    quadratic penalty, which is zero at ``current``; ``recoverable_nats`` is on report.
    """

    current: float
    achieved: float
    relaxed: float
    penalty: float
    steps: int
    recoverable_nats: Interval


class LossRecord(Record):
    """Losses on report. ``current`` is the model as it stands, ``composed`` with the whole witness.

    Controls (``None`` = not run within the budget): ``head_control`` the model with its head re-fitted,
    ``shuffled`` the same construction from targets permuted across sequences, ``untrained`` the same
    construction on the same architecture at initialisation. ``dense`` is reached by all blocks refined together without
    the formats of low-bit layers, ``price`` is what the composed witness is above it, and ``split`` says it in three
    parts. ``without_blocks`` and ``unigram`` are what the text costs a new head on the embedding and the final norm
    alone, and one that only counts tokens: a model above them is broken, untrained, or made for other text.
    """

    current: float
    composed: float | None = None
    head_control: float | None = None
    shuffled: float | None = None
    untrained: float | None = None
    untrained_start: float | None = None
    composed_gain: Interval | None = None
    head_control_gain: Interval | None = None
    shuffled_gain: Interval | None = None
    untrained_gain: Interval | None = None
    dense: float | None = None
    price: Interval | None = None
    split: SplitRecord | None = None
    without_blocks: float | None = None
    unigram: float | None = None


class RoundRecord(Record):
    """One joint round: which direction and step length were chosen, and the select loss that chose them.

    The direction ``factors`` is a factor on what some blocks write, before any other round. Inside low-bit formats
    ``flipped`` is the share of codes that the round changed; for single flips ``step`` is the least predicted decrease
    that was taken, nats per token.
    """

    direction: str
    step: float
    output_change: float | None = None
    select_before: float
    select_after: float
    flipped: float | None = None


LeadingGain = Literal["solo", "marginal", "marginal-of-tied"]


class LookFirst(Record):
    """The block to look at first, and those that are not distinguishable from it.

    ``by`` says which number decides: the solo gain on training text, and where several have the largest of that as far
    as can be told, their marginal gains (``marginal-of-tied``); the marginal gain on other text.
    """

    block: int
    by: LeadingGain
    tied: tuple[int, ...] = ()


class AuditConclusion(Record):
    """What follows from the numbers of all blocks together.

    ``case`` is the first of these that applies, and ``blocks`` are those that it holds for: some blocks are
    ``certified`` (red), some gains are ``recoverable`` (yellow), blocks were refined by themselves and ``none-found``,
    or nothing was refined: ``not-measured``. Without the ``harmful`` blocks (the worst first) the model is better.
    ``above`` is the best of the cheap baselines, if it does better than the whole model.
    """

    case: Literal["certified", "recoverable", "none-found", "not-measured"]
    blocks: tuple[int, ...] = ()
    look_first: LookFirst | None = None
    harmful: tuple[int, ...] = ()
    above: Baseline | None = None


class AuditRecord(SealedRecord):
    """Everything one audit found; ``check`` is ``None`` in a model of fewer than five blocks, and in records of old.

    ``rule`` is the number of the rule by which verdicts follow (`evidence.verdict.RULE`); records of old have none.
    """

    kind: Literal["audit"] = "audit"
    rule: int = 1
    conclusion: AuditConclusion | str | None = None
    loss: LossRecord
    blocks: tuple[BlockRecord, ...]
    head: HeadRecord | None = None
    rounds: tuple[RoundRecord, ...] = ()
    check: CheckPart | None = None
