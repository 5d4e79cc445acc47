"""Damped solves with positive semi-definite matrices, in float64, that never return NaN."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from peelwise.errors import IllConditionedWarning

_MAX_ESCALATIONS = 12


class DampedFactor:
    """Cholesky factor of ``S + damping * tr(S)/d * I``, reused for several right-hand sides.

    If the factorisation fails or means nothing (rank deficient), the damping is multiplied by ten until it
    succeeds, and an `IllConditionedWarning` names the matrix and the damping that was used in the end.

    Args:
        matrix: ``S [d, d]``, symmetric positive semi-definite up to rounding; any float dtype.
        damping: lambda in units of the mean diagonal, no unit.
        name: what the matrix is, for the warning.

    Attributes:
        damping: the damping that was used, in units of the mean diagonal.
    """

    def __init__(self, matrix: Tensor, damping: float, *, name: str = "matrix") -> None:
        S = matrix.to(solve_dtype(matrix.device))  # [d, d]
        d = S.shape[0]
        mean_diagonal = float(S.diagonal().mean()) if d else 0.0
        # An all-zero matrix (inputs that never fire) still gets a finite, harmless factor.
        unit = mean_diagonal if 0 < mean_diagonal < math.inf else 1.0
        identity = torch.eye(d, dtype=S.dtype, device=S.device)
        tiny = d * torch.finfo(S.dtype).eps
        for attempt in range(_MAX_ESCALATIONS):
            used = damping if attempt == 0 else max(damping, tiny) * 10.0**attempt
            factor, info = torch.linalg.cholesky_ex(S + used * unit * identity)
            # Undamped, rounding may leave a singular matrix tiny positive pivots: a factor, but of nothing.
            if int(info) == 0 and bool(torch.isfinite(factor).all()) and (used > tiny or _is_regular(S)):
                break
        else:
            # Not positive semi-definite at all: fall back to its scale, which is always valid.
            used, factor = 1.0, identity * unit**0.5
        if attempt:
            warnings.warn(
                f"{name}: [{d}, {d}] is rank deficient or badly conditioned at damping {damping:g}; "
                f"used {used:g} instead. The result is valid; more fit tokens would sharpen it.",
                IllConditionedWarning,
                stacklevel=2,
            )
        self.damping = used
        self._factor = factor

    def solve(self, right: Tensor) -> Tensor:
        """Return ``(S + ..)^-1 right`` for ``right [d, m]``, in the factor's dtype."""
        return torch.cholesky_solve(right.to(self._factor.dtype), self._factor)

    def solve_right(self, left: Tensor) -> Tensor:
        """Return ``left (S + ..)^-1`` for ``left [m, d]``, in the factor's dtype."""
        return self.solve(left.T).T


def _is_regular(matrix: Tensor) -> bool:
    """Say whether the smallest eigenvalue of ``matrix [d, d]`` stands clear of rounding in its own dtype."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    resolution = matrix.shape[0] * torch.finfo(matrix.dtype).eps
    return eigenvalues.numel() == 0 or bool(eigenvalues[0] > resolution * eigenvalues[-1])


def solve_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the one device kind that has no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def numerical_rank(matrix: Tensor) -> int:
    """Return how many eigenvalues of a symmetric ``matrix [d, d]`` exceed ``d * eps * largest``."""
    eigenvalues = torch.linalg.eigvalsh(matrix.to(solve_dtype(matrix.device)))
    if eigenvalues.numel() == 0 or float(eigenvalues[-1]) <= 0:
        return 0
    # The sums come from float32 products, so float32's resolution is what they can carry.
    threshold = matrix.shape[0] * torch.finfo(torch.float32).eps * eigenvalues[-1]
    return int((eigenvalues > threshold).sum())
