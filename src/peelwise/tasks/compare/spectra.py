"""Spectra of matrices, as far as kinds of change need them: rank up to rounding, and likeness to random numbers."""

from __future__ import annotations

from torch import Tensor

from peelwise.stats.linalg import eigvalsh

# How far the largest singular value of independent numbers of one variance may lie above the asymptotic edge,
# sqrt(m) + sqrt(n). Its fluctuations shrink with n^(-2/3) (Tracy and Widom).
_EDGE_SLACK, _EDGE_FLUCTUATION = 0.02, 0.5
_SWEEPS = 4  # of scaling rows and columns in turn
_LEAST = 16  # rows and columns from which on a spectrum tells anything


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of ``W [m, n]``, descending, float64.

    By the eigenvalues of the smaller of its two products with itself, which costs ``min(m, n)^2 max(m, n)``: values
    below 1e-8 of the largest are rounding.
    """
    short = W.double() if W.shape[0] <= W.shape[1] else W.double().T
    values: Tensor = eigvalsh(short @ short.T)
    return values.clamp_min(0).sqrt().flip(0)


def rank_within(values: Tensor, tolerance: float) -> int:
    """Return the least ``r`` with ``sqrt(sum_{i > r} s_i^2) <= tolerance``.

    Args:
        values: singular values ``[k]``, descending.
        tolerance: in their unit.
    """
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # [k], of r = 0 .. k - 1
    return int((tails > tolerance).sum())


def is_cut(values: Tensor, rank: int, gap: float) -> bool:
    """Whether the spectrum falls by ``gap`` or more behind ``rank`` values: a cut, not a slope."""
    return 0 < rank < len(values) and float(values[rank]) <= gap * float(values[rank - 1])


def is_random_like(W: Tensor) -> bool:
    """Whether no direction of ``W [m, n]`` stands out from independent numbers, see `outstanding`."""
    slack = _EDGE_SLACK + _EDGE_FLUCTUATION * min(W.shape) ** (-2 / 3)
    return min(W.shape) >= _LEAST and outstanding(W) <= 1 + slack


def outstanding(W: Tensor) -> float:
    """Return the largest singular value of ``W [m, n]`` in units of ``sqrt(m) + sqrt(n)``.

    Rows and columns are scaled to unit mean square first, so that noise in proportion to the weights counts as noise.
    Independent numbers have 1 up to fluctuations (Marchenko and Pastur 1967); what was learnt, or is of low rank, more.
    ``inf`` where a row or column is zero.
    """
    scaled = W.double()
    for _ in range(_SWEEPS):
        for along in (1, 0):
            size = scaled.square().mean(dim=along, keepdim=True).sqrt()
            if float(size.min()) == 0:
                return float("inf")
            scaled = scaled / size
    m, n = W.shape
    return float(singular_values(scaled)[0]) / float(m**0.5 + n**0.5)
