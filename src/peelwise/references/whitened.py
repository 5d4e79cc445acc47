"""Label-driven directions: the weight changes that one pass of gradients proposes for a linear layer.

With ``S = E[x x^T]``, ``C = E[g x^T]`` and ``F = E[g g^T]`` (g: gradient of a token's loss at the output):

    input-whitened:   D = -C (S + lam tr(S)/d I)^-1
    two-sided:        D = -(F + lam tr(F)/d I)^-1 C (S + lam tr(S)/d I)^-1

The damping is chosen by how well ``D``, made from the fit tokens, predicts the gradient of the select
tokens. Along ``D`` that gradient is ``<C_s, D>``, and in the metric ``M`` of the direction (identity for
input-whitened, ``F_s`` for two-sided) the calibrated step and its held-out energy are

    w = -<C_s, D> / tr(M D S_s D^T)        e = <C_s, D>^2 / tr(M D S_s D^T)

``w`` is 1 if ``D`` generalises perfectly and 0 or less if it is noise; ``e`` is what is maximised. This
costs no forward pass, so every matrix gets a damping of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.references.damping import climb
from peelwise.stats.gram import Moments
from peelwise.stats.linalg import DampedFactor, Spectrum

START_DAMPING = 0.1
_FACTOR = 10**0.5
_LOWEST, _HIGHEST = 1e-6, 1e4
_ROUNDING = 1e-3  # largest relative error of a proposal that float32 may make
# Gradients are of low rank where few outputs matter; less damping than this would amplify their noise.
_LEAST_OUTPUT_DAMPING = 0.03


@dataclass(frozen=True)
class Proposal:
    """A weight change for one linear layer, calibrated on the select tokens.

    Attributes:
        change: ``w D [d_out, d_in]``, float32; its scale is that of the gradient, so a step length is
            still to be chosen.
        damping: the damping chosen, in units of the mean diagonal.
        weight: ``w``, between 0 and 1 (input-whitened) or 0 and more (two-sided).
        energy: held-out energy ``e`` that ``D`` explains.
        slope: decrease of the select loss per unit of step along ``change``, ``-<C_s, change>``.
        output_change: ``tr(D S D^T)`` of ``change`` on the fit tokens: mean squared output change.
    """

    change: Tensor
    damping: float
    weight: float
    energy: float
    slope: float
    output_change: float


class InputWhitened:
    """Input-whitened proposals for all layers that share one input; one eigen-decomposition serves every damping.

    The decomposition is in float32: a proposal is tried on other tokens before anything is said of it. Where rounding
    could change it by more than a thousandth, because of little damping, it is solved in float64.

    Args:
        S: ``E[x x^T] [d_in, d_in]`` on the fit tokens.
        S_select: the same on the select tokens.
        name: a layer with this input, for warnings.
    """

    def __init__(self, S: Tensor, S_select: Tensor, *, name: str = "matrix") -> None:
        self.spectrum = Spectrum(S, torch.float32)
        self._S, self._S_select, self._name = S, S_select.float(), name
        U = self.spectrum.vectors
        self._rotated_select = U.T @ self._S_select @ U  # [d_in, d_in], in the eigenbasis of S
        self._factors: dict[float, DampedFactor] = {}  # in float64, by damping

    def rotate(self, C: Tensor) -> Tensor:
        """Return ``C [d_out, d_in]`` in the eigenbasis of ``S``, float32."""
        rotated: Tensor = C.float() @ self.spectrum.vectors
        return rotated

    def energy(self, rotated: Tensor, damping: float = START_DAMPING) -> float:
        """Return ``tr(C (S + damping tr(S)/d I)^-1 C^T)``: the gradient energy that the inputs explain, in sample.

        It ranks layers before anything is evaluated.

        Args:
            rotated: ``C`` on the fit tokens, rotated.
            damping: in units of the mean diagonal.
        """
        return float((rotated.square().sum(0).double() / self.spectrum.damped(damping)).sum())

    def cross_energy(self, rotated: Tensor, rotated_select: Tensor, damping: float = START_DAMPING) -> float:
        """Return ``tr(C (S + damping tr(S)/d I)^-1 C_s^T)``: the energy that fit and select tokens agree on.

        Their noise is independent, so its mean is that of the true gradient; the value may be negative.

        Args:
            rotated: ``C`` on the fit tokens, rotated.
            rotated_select: ``C`` on the select tokens, rotated.
            damping: in units of the mean diagonal.
        """
        overlap = (rotated * rotated_select).sum(0).double()
        return float((overlap / self.spectrum.damped(damping)).sum())

    def propose(self, C: Tensor, C_select: Tensor, *, rotated: Tensor, rotated_select: Tensor) -> Proposal:
        """Return the proposal for one layer, with the damping that the select tokens like best.

        Args:
            C: ``E[g x^T] [d_out, d_in]`` on the fit tokens.
            C_select: the same on the select tokens.
            rotated, rotated_select: both in the eigenbasis, from `rotate`.
        """
        overlap = (rotated * rotated_select).sum(0).double()  # [d_in]
        # tr(D S_s D^T) = sum_jk (C^T C)_jk (S_s)_jk / (l_j l_k), everything in the eigenbasis
        weighted = (rotated.T @ rotated).mul_(self._rotated_select)  # [d_in, d_in]

        def along(damping: float) -> tuple[float, float]:
            inverse = 1.0 / self.spectrum.damped(damping)
            return float((overlap * inverse).sum()), float(inverse @ weighted @ inverse)

        def held_out(damping: float) -> float:
            slope, squared = along(damping)
            # Signed, so that the climb leads out of where the direction goes uphill on select.
            return slope * abs(slope) / squared if squared > 0 else 0.0

        damping = climb(held_out, START_DAMPING, factor=_FACTOR, lowest=_LOWEST, highest=_HIGHEST)
        if self.spectrum.rounding(damping) > _ROUNDING:
            D = -self._factor(damping).solve_right(C)  # [d_out, d_in]
            slope, squared = -float((C_select * D).sum()), _squared_norm(D.float(), self._S_select, None)
            moved = _squared_norm(D.float(), self._S.float(), None)
        else:
            inverse = 1.0 / self.spectrum.damped(damping)
            D = -(rotated * inverse) @ self.spectrum.vectors.T  # [d_out, d_in]
            slope, squared = along(damping)
            moved = float((rotated.square().sum(0).double() * self.spectrum.values * inverse.double() ** 2).sum())
        weight = min(slope / squared, 1.0) if squared > 0 and slope > 0 else 0.0
        energy = slope**2 / squared if weight > 0 else 0.0
        return Proposal((weight * D).float(), damping, weight, energy, weight * slope, weight**2 * moved)

    def _factor(self, damping: float) -> DampedFactor:
        if damping not in self._factors:
            self._factors[damping] = DampedFactor(self._S, damping, name=self._name)
        return self._factors[damping]


def input_whitened(fit: Moments, select: Moments) -> Proposal:
    """Return the input-whitened proposal of one layer from its moments; see `InputWhitened`."""
    reference = InputWhitened(fit.S, select.S)
    return reference.propose(
        fit.C, select.C, rotated=reference.rotate(fit.C), rotated_select=reference.rotate(select.C)
    )


def two_sided(fit: Moments, select: Moments, base: Proposal, *, name: str) -> Proposal:
    """Return the two-sided proposal: ``base`` whitened by its outputs too, with the same relative damping.

    Args:
        fit: moments that make the direction, with ``F``.
        select: moments that calibrate it, with ``F``.
        base: the input-whitened proposal of the same matrix.
        name: the matrix, for warnings.
    """
    if fit.F is None or select.F is None:
        raise ValueError("The two-sided direction needs moments with F. Ask the capture for it.")
    if base.weight == 0.0:
        return base
    mu = min(max(base.damping, _LEAST_OUTPUT_DAMPING), 1.0)
    # With so much damping float32 is exact to a few thousandths, and what is proposed is calibrated as it is.
    D = DampedFactor(fit.F, mu, name=name, dtype=torch.float32).solve(base.change / base.weight)  # [d_out, d_in]
    slope = -float((select.C * D).sum())
    squared = _squared_norm(D.float(), select.S.float(), select.F.float())
    weight = slope / squared if squared > 0 and slope > 0 else 0.0
    change = (weight * D).float()
    return Proposal(change, mu, weight, weight * slope, weight * slope, _squared_norm(change, fit.S.float(), None))


def _squared_norm(D: Tensor, S: Tensor, metric: Tensor | None) -> float:
    """Return ``tr(M D S D^T)``, with the identity for ``metric=None``."""
    left = D if metric is None else metric @ D
    return float(((D @ S) * left).sum())
