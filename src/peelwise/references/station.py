"""The closed-form reference of a layer that writes into the residual stream: ridge regression of what is missing.

Where a block's output depends on a linear layer only through ``out + x D^T``, ``x`` its inputs and ``D`` a change
of its weight, the best change for a target station ``T`` is least squares of the residual ``r = T - out``:

    D = argmin  sum |r - D x|^2 + damping * tr(S)/d * |D|^2  =  R (S + damping * tr(S)/d I)^-1
    S = E[x x^T]  [d_in, d_in]        R = E[r x^T]  [d_out, d_in]

Every coordinate of the station is a regression of its own, so weighting coordinates changes nothing in ``D``;
it changes which damping is best. ``D = 0`` is the block as it stands, which is what damping pulls towards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from peelwise.references.damping import climb
from peelwise.stats.linalg import DampedFactor

START_DAMPING = 1e-2
_FACTOR, _LEAST, _MOST = 10.0, 1e-5, 1e2


@dataclass(frozen=True)
class StationSums:
    """Means over tokens of one part of the probe: ``S [d_in, d_in]`` and ``R [d_out, d_in]``, float64."""

    S: Tensor
    R: Tensor


@dataclass(frozen=True)
class StationChange:
    """A weight change and what it is worth.

    Attributes:
        change: ``D [d_out, d_in]``, float64.
        damping: the damping chosen, in units of the mean diagonal of ``S``.
        decrease: of the weighted squared error per token on select, ``sum_j w_j (2 D_j R_j - D_j S D_j^T)``.
        slope: of that error at step 0 along the change, ``sum_j 2 w_j D_j R_j``.
    """

    change: Tensor
    damping: float
    decrease: float
    slope: float


def ridge_change(sums: StationSums, damping: float, *, name: str = "S") -> Tensor:
    """Return ``D = R (S + damping * tr(S)/d I)^-1  [d_out, d_in]``.

    Args:
        sums: of the fit tokens.
        damping: no unit; 0 is plain least squares.
        name: the matrix, for the warning if ``S`` is singular and more damping has to be used.
    """
    return DampedFactor(sums.S, damping, name=name).solve_right(sums.R)


def best_change(fit: StationSums, select: StationSums, weights: Tensor, *, name: str = "S") -> StationChange:
    """Return the ridge change with the damping that lowers the select tokens' error most.

    The damping climbs a grid of factors of ten from 0.01 until both neighbours are worse.

    Args:
        fit: sums that make the change.
        select: sums that choose the damping.
        weights: ``w [d_out]``, one per coordinate of the station.
        name: the matrix, for warnings.
    """

    @cache
    def made(damping: float) -> StationChange:
        D = ridge_change(fit, damping, name=name)
        slope = 2 * float((weights.to(D) * (D * select.R).sum(1)).sum())
        return StationChange(D, damping, decrease(D, select, weights), slope)

    return made(climb(lambda d: made(d).decrease, START_DAMPING, factor=_FACTOR, lowest=_LEAST, highest=_MOST))


def decrease(D: Tensor, sums: StationSums, weights: Tensor) -> float:
    """Return by how much ``D`` lowers the weighted squared error per token, from sums alone."""
    return float((weights.to(D) * (D * (2 * sums.R - D @ sums.S)).sum(1)).sum())
