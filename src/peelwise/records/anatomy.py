"""What an anatomy found: how each block matters, how far it can be bent, what others tell of it. No torch.

The names of the fields are the keys of the file, and others rely on them: add, do not rename. Costs are increases of
the loss in nats per token on the report part of the probe, paired by sequence; below 0 the model is better so.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peelwise.records.base import Interval, Record, SealedRecord

Ablation = Literal["skipped", "attention", "mlp", "mean", "neighbours"]
Bend = Literal["scale-down", "scale-up", "noise", "low-rank", "rounding", "signs"]

ABLATIONS: tuple[Ablation, ...] = ("skipped", "attention", "mlp", "mean", "neighbours")
BENDS: tuple[Bend, ...] = ("scale-down", "scale-up", "noise", "low-rank", "rounding", "signs")


class Bent(Record):
    """What one way of bending the weights of a block costs.

    ``scale-down`` and ``scale-up``: all matrices times a factor. ``noise``: normal noise of so many standard deviations
    of each matrix. ``low-rank``: the share of singular values that is dropped, the smallest first. ``rounding``: bits
    per weight, symmetric, a scale per output channel. ``signs``: the share of weights whose sign is flipped.

    Attributes:
        kind: one of these.
        strengths: that were tried, the mildest first.
        costs: of each, as far as they were measured: it ends behind the first whose mean is above the margin.
        tolerated: the largest strength up to which the upper end of every interval is within the margin; ``None``
            where already the mildest is not.
    """

    kind: Bend
    strengths: tuple[float, ...]
    costs: tuple[Interval, ...]
    tolerated: float | None = None


class BestScale(Record):
    """The factor on all matrices of a block that is best on select, and what it gains on report."""

    factor: float
    gain: Interval


class Retrained(Record):
    """A damaged block trained alone, stopped early on select.

    Attributes:
        steps: of the optimiser until the cost on select was within the margin, looked at every few steps; ``None``
            where it never was: the fit tokens are not enough, or the steps.
        best_step: after which the loss on select was lowest.
        tokens: of the fit text that went forward and back by then.
        most_steps: that it was given.
        left: what is left of the damage's cost after the best step, on report.
        share: ``1 - left / damage``, of the means.
    """

    steps: int | None
    best_step: int
    tokens: int
    most_steps: int
    left: Interval
    share: float


class Recovery(Record):
    """How much of a damage one closed-form round of the block alone takes back, and what training it alone does.

    Attributes:
        damage: what the noise costs.
        left: what is left of that cost after the round.
        share: ``1 - left / damage``, of the means; ``None`` where the damage is not above the margin.
        retrained: the same damage, the block trained alone; ``None`` where there was no time, or no damage.
    """

    damage: Interval
    left: Interval
    share: float | None = None
    retrained: Retrained | None = None


class BlockAnatomy(Record):
    """One block. What is missing was not measured: not within the budget, not asked for, or not there to measure.

    Attributes:
        index, name: of the block.
        ablation: per way what it costs: ``skipped`` (its input passed on), ``attention`` or ``mlp`` alone silent,
            ``mean`` (what it adds replaced by its mean over fit tokens), ``neighbours`` (linear layers replaced by the
            mean of those of the blocks beside it).
        perplexity_ratios: the same as perplexity over that of the whole model, ``exp(mean)``.
        predicted: cost of the block's matrices predicted from those of all other blocks.
        bent: what bending its weights costs.
        best_scale: the best factor on its matrices.
        recovery: after noise.
        signals: those of a check, ``signal.part`` -> value.
    """

    index: int
    name: str
    ablation: dict[Ablation, Interval] = Field(default_factory=dict)
    perplexity_ratios: dict[Ablation, float] = Field(default_factory=dict)
    predicted: Interval | None = None
    bent: tuple[Bent, ...] = ()
    best_scale: BestScale | None = None
    recovery: Recovery | None = None
    signals: dict[str, float] = Field(default_factory=dict)


class Explained(Record):
    """The share of a kind of matrix that a predictor explains, pooled over blocks: ``1 - sum |W - P|^2 / sum |W|^2``.

    Attributes:
        mean: predictor: the mean of all other blocks' matrices.
        neighbours: the mean of the blocks beside it.
        ridge: the best sum of the other blocks' matrices, a coefficient for each, fitted on one half of the rows; the
            share is that of the other half.
    """

    mean: float
    neighbours: float
    ridge: float


class Predictability(Record):
    """How well matrices of one kind are told by those of other blocks, each number beside its null control.

    Attributes:
        part: name of the linear layer within a block.
        explained: of the model.
        independent: the same of independent normal matrices of the same norms.
        neighbours_shuffled: mean, 2.5 % and 97.5 % of ``explained.neighbours`` over random orders of the blocks.
        deltas: mean cosine of successive differences over depth, ``W_{l+1} - W_l`` and ``W_{l+2} - W_{l+1}``.
        deltas_shuffled: mean, 2.5 % and 97.5 % of the same over random orders of the blocks.
        deltas_independent: the same of independent matrices of the same norms: -1/2 by construction where norms agree.
    """

    part: str
    explained: Explained
    independent: Explained
    neighbours_shuffled: tuple[float, float, float]
    deltas: float
    deltas_shuffled: tuple[float, float, float]
    deltas_independent: float


class Correlation(Record):
    """Spearman's rank correlation over blocks of a column with a target.

    Attributes:
        column: a signal, an ablation, or what a bend tolerates.
        target: ``skipped`` (ablation) or ``recovery``.
        rho: the correlation.
        p: two-sided, by Student's t.
        significant: after Holm's adjustment over all columns of the target.
    """

    column: str
    target: Literal["skipped", "recovery"]
    rho: float
    p: float
    significant: bool


class BetterWithout(Record):
    """A block and a way of ablation after which the loss is lower, adjusted for asking about all of them (Holm)."""

    block: int
    ablation: Ablation


class AnatomyRecord(SealedRecord):
    """Everything that one anatomy found. ``complete`` is false where the budget ended or the user stopped it."""

    kind: Literal["anatomy"] = "anatomy"
    informative: bool | None = None
    loss: float
    blocks: tuple[BlockAnatomy, ...]
    predictability: tuple[Predictability, ...] = ()
    better_without: tuple[BetterWithout, ...] = ()
    correlations: tuple[Correlation, ...] = ()
