"""What follows from the numbers of an anatomy. No model, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peelwise.evidence.intervals import Paired, holm_rejections
from peelwise.records.anatomy import Ablation, Bent, BetterWithout, BlockAnatomy, Correlation
from peelwise.records.base import Interval

LEVEL = 0.05
LEAST_BLOCKS = 5  # for a rank correlation
_LARGEST_LOGARITHM = 700.0  # of a double


def better_without(blocks: Sequence[BlockAnatomy]) -> tuple[BetterWithout, ...]:
    """Return the ablations after which the loss is lower, Holm over all blocks and ways together at 5 %."""
    asked: list[tuple[int, Ablation]] = [(b.index, way) for b in blocks for way in b.ablation]
    costs = [block.ablation[way] for block in blocks for way in block.ablation]
    rejected = holm_rejections([Paired.of(cost).p_at_least(0.0) for cost in costs], LEVEL)
    return tuple(BetterWithout(block=b, ablation=w) for (b, w), no in zip(asked, rejected, strict=True) if no)


def perplexity_ratio(cost: Interval) -> float:
    """Return ``exp(mean)``: by what a cost in nats per token multiplies the perplexity."""
    return math.exp(min(cost.mean, _LARGEST_LOGARITHM))


def tolerated(strengths: Sequence[float], costs: Sequence[Interval], margin: float) -> float | None:
    """Return the last strength, the mildest first, up to which every upper end is within the margin."""
    last = None
    for strength, cost in zip(strengths, costs, strict=False):
        if cost.high > margin:
            break
        last = strength
    return last


def rank_correlation(x: ArrayLike, y: ArrayLike) -> tuple[float, float] | None:
    """Return Spearman's rank correlation and its two-sided p-value by Student's t; ``None`` where ranks are all tied.

    Ties have the mean of their ranks. Of few blocks ``2 / n!``, the chance of a perfect order, is the least p-value.
    """
    from scipy.special import stdtr

    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    if size == 0:
        return None
    rho = float(np.clip((a @ b) / size, -1, 1))
    least, freedom = 2 / math.factorial(len(a)), len(a) - 2
    if 1 - rho**2 < 1e-12:
        return rho, least
    return rho, max(least, float(2 * stdtr(freedom, -abs(rho) * (freedom / (1 - rho**2)) ** 0.5)))


def correlations(blocks: Sequence[BlockAnatomy]) -> tuple[Correlation, ...]:
    """Return the rank correlation of every column that all blocks have with ablation and with recovery."""
    if len(blocks) < LEAST_BLOCKS:
        return ()
    columns = _columns(blocks)
    found: list[Correlation] = []
    for target in ("skipped", "recovery"):
        key = "ablation.skipped" if target == "skipped" else "recovery"
        if key not in columns:
            continue
        pairs = {name: rank_correlation(row, columns[key]) for name, row in columns.items() if name != key}
        known = {name: pair for name, pair in pairs.items() if pair is not None}
        rejected = holm_rejections([p for _, p in known.values()], LEVEL)
        found += [
            Correlation(column=name, target=target, rho=rho, p=p, significant=yes)
            for (name, (rho, p)), yes in zip(known.items(), rejected, strict=True)
        ]
    return tuple(found)


def _columns(blocks: Sequence[BlockAnatomy]) -> Mapping[str, list[float]]:
    """Return the columns in which no block is missing."""
    rows = [_row(block) for block in blocks]
    return {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}


def _row(block: BlockAnatomy) -> dict[str, float]:
    row = {f"ablation.{way}": cost.mean for way, cost in block.ablation.items()}
    if block.predicted is not None:
        row["predicted"] = block.predicted.mean
    if block.recovery is not None and block.recovery.share is not None:
        row["recovery"] = block.recovery.share
    if block.recovery is not None and block.recovery.retrained is not None:
        row["retrained"] = block.recovery.retrained.share
    row |= {f"bent.{bent.kind}": first for bent in block.bent if (first := _mildest(bent)) is not None}
    return row | block.signals


def _mildest(bent: Bent) -> float | None:
    """Return what the mildest strength costs: the one that is measured of every block."""
    return bent.costs[0].mean if bent.costs else None


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    _, where, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[where]
    return ranks
