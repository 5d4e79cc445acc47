"""Label-driven directions: the weight changes that one pass of gradients proposes for a linear map.

With ``S = E[x x^T]``, ``C = E[g x^T]`` and ``F = E[g g^T]`` (g: gradient of a token's loss at the output):

    input-whitened:   D = -C (S + lam tr(S)/d I)^-1
    two-sided:        D = -(F + mu tr(F)/d I)^-1 C (S + lam tr(S)/d I)^-1

The damping is chosen by how well ``D``, made from the fit tokens, predicts the gradient of the select
tokens. Along ``D`` that gradient is ``<C_s, D>``, and in the metric ``M`` of the direction (identity for
input-whitened, ``F_s`` for two-sided) the calibrated step and its held-out energy are

    w = -<C_s, D> / tr(M D S_s D^T)        e = <C_s, D>^2 / tr(M D S_s D^T)

``w`` is 1 if ``D`` generalises perfectly and 0 or less if it is noise; ``e`` is what is maximised. This
costs no forward pass, so every matrix gets a damping of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.stats.gram import Moments
from peelwise.stats.linalg import DampedFactor

START_DAMPING = 0.1
_FACTOR = 10**0.5
_LOWEST, _HIGHEST = 1e-6, 1e4


@dataclass(frozen=True)
class Proposal:
    """A weight change for one linear map, calibrated on the select tokens.

    Attributes:
        change: ``w D [d_out, d_in]``, float32; its scale is that of the gradient, so a step length is
            still to be chosen.
        damping: the damping chosen, in units of the mean diagonal.
        weight: ``w``, between 0 and 1 (input-whitened) or 0 and more (two-sided).
        energy: held-out energy ``e`` that ``D`` explains.
        output_change: ``tr(D S D^T)`` of ``change`` on the fit tokens: mean squared output change.
    """

    change: Tensor
    damping: float
    weight: float
    energy: float
    output_change: float


def explained_energy(moments: Moments, damping: float = START_DAMPING, *, name: str = "matrix") -> float:
    """Return ``tr(C (S + damping tr(S)/d I)^-1 C^T)``: gradient energy that the inputs explain, in sample.

    It ranks layers before anything is evaluated. Units: squared nats per unit of output change.
    """
    factor = DampedFactor(moments.S, damping, name=name)
    return float((factor.solve_right(moments.C) * moments.C).sum())


def input_whitened(fit: Moments, select: Moments, *, start: float = START_DAMPING, name: str) -> Proposal:
    """Return the input-whitened proposal with the damping that ``select`` likes best.

    Args:
        fit: moments of the tokens that make the direction.
        select: moments of the tokens that choose its damping and calibrate it.
        start: damping to try first, in units of the mean diagonal of ``S``.
        name: the matrix, for warnings.
    """

    def direction(damping: float) -> Tensor:
        return -DampedFactor(fit.S, damping, name=name).solve_right(fit.C)

    return _calibrated(direction, fit, select, metric=None, start=start)


def two_sided(fit: Moments, select: Moments, base: Proposal, *, name: str) -> Proposal:
    """Return the two-sided proposal; the input side keeps the damping of ``base``, ``mu`` is chosen.

    Args:
        fit: moments that make the direction, with ``F``.
        select: moments that choose the damping, with ``F``.
        base: the input-whitened proposal of the same matrix.
        name: the matrix, for warnings.
    """
    if fit.F is None or select.F is None:
        raise ValueError("The two-sided direction needs moments with F. Ask the capture for it.")
    whitened = DampedFactor(fit.S, base.damping, name=name).solve_right(fit.C)
    F = fit.F

    def direction(damping: float) -> Tensor:
        return -DampedFactor(F, damping, name=name).solve(whitened)

    return _calibrated(direction, fit, select, metric=select.F, start=1.0)


def _calibrated(
    direction: Callable[[float], Tensor],
    fit: Moments,
    select: Moments,
    *,
    metric: Tensor | None,
    start: float,
) -> Proposal:
    """Climb the damping grid from ``start`` until both neighbours are worse; return the best, calibrated."""
    tried: dict[float, tuple[float, float, Tensor]] = {}

    def look(damping: float) -> float:
        if damping not in tried:
            D = direction(damping)
            slope = -float((select.C * D).sum())
            squared = _squared_norm(D, select.S, metric)
            weight = slope / squared if squared > 0 and slope > 0 else 0.0
            # Signed, so that the climb leads out of where the direction goes uphill on select.
            tried[damping] = (slope * abs(slope) / squared if squared > 0 else 0.0, weight, D)
        return tried[damping][0]

    best = start
    for factor in (_FACTOR, 1 / _FACTOR):
        while _LOWEST < best * factor < _HIGHEST and look(best * factor) > look(best):
            best *= factor
    energy, weight, D = tried[best]
    weight = min(weight, 1.0) if metric is None else weight
    change = (weight * D).to(torch.float32)
    return Proposal(change, best, weight, max(0.0, energy), _squared_norm(change.to(fit.S.dtype), fit.S, None))


def _squared_norm(D: Tensor, S: Tensor, metric: Tensor | None) -> float:
    """Return ``tr(M D S D^T)``, with the identity for ``metric=None``."""
    left = D if metric is None else metric.to(D.dtype) @ D
    return float(((D @ S.to(D.dtype)) * left).sum())
