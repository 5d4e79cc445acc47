"""Exact projections onto the columns of a tall matrix, with the semantics of a pseudo-inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from peelwise.stats.gram import symmetric_product

# Up to these bounds of the squared condition number (columns of norm 1) normal equations keep ten digits: as
# they are, and with one correction step from the residual. The bound is loose by a factor of d or more.
_PLAIN = 1e10
_CORRECTED = 1e13


class Projector:
    """``P = A A^+`` for a design ``A [n, d]``: fits any number of targets from one factorisation.

    The cheap way is the normal equations with columns scaled to norm 1. It is taken only where its error is
    known to be small; otherwise a singular value decomposition decides, with the rank that
    ``torch.linalg.pinv(A)`` would see: values below ``max(n, d) * eps * largest`` count as zero.
    Columns of zeros, such as dead ReLU units, have no part in a projection and are left out.

    Args:
        design: ``A [n, d]``, float64.
    """

    def __init__(self, design: Tensor) -> None:
        norms = torch.linalg.vector_norm(design, dim=0)  # [d]
        alive = norms > 0
        self._columns = design if bool(alive.all()) else design[:, alive]  # [n, r]
        self._basis: Tensor | None = None
        self._corrections = 0
        self._inverse = self._columns.new_zeros(self._columns.shape[1], self._columns.shape[1])
        if self._columns.shape[1] and not self._try_normal_equations(norms[alive], max(design.shape)):
            self._basis = _range_basis(self._columns, max(design.shape))

    @property
    def method(self) -> str:
        """How the factorisation was made: ``normal``, ``normal+correction`` or ``svd``."""
        return "svd" if self._basis is not None else "normal+correction" if self._corrections else "normal"

    def fit(self, targets: Tensor) -> Tensor:
        """Return ``A A^+ targets`` for ``targets [n, m]``."""
        if self._basis is not None:
            return self._basis @ (self._basis.T @ targets)
        fitted = self._columns @ (self._inverse @ (self._columns.T @ targets))
        for _ in range(self._corrections):
            rest = targets - fitted
            fitted += self._columns @ (self._inverse @ (self._columns.T @ rest))
        return fitted

    def _try_normal_equations(self, norms: Tensor, size: int) -> bool:
        """Invert ``A^T A`` if it is well conditioned after scaling and of full rank before it."""
        gram = symmetric_product(self._columns) / (norms[:, None] * norms)  # [r, r], ones on the diagonal
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) != 0:
            return False
        r = gram.shape[0]
        inverse = torch.linalg.solve_triangular(factor, torch.eye(r, dtype=gram.dtype, device=gram.device), upper=False)
        # |L^-1|_F^2 bounds 1 / smallest eigenvalue from above, and the largest is at most r.
        smallest = 1.0 / float(inverse.square().sum())
        condition = r / smallest
        cut = size * torch.finfo(gram.dtype).eps * float(norms.norm())
        full_rank = smallest**0.5 * float(norms.min()) > 100 * cut
        if not full_rank or condition > _CORRECTED:
            return False
        self._corrections = 0 if condition <= _PLAIN else 1
        self._inverse = (inverse.T @ inverse) / (norms[:, None] * norms)
        return True


def _range_basis(design: Tensor, size: int) -> Tensor:
    """Return orthonormal columns ``[n, r]`` that span the numerical range of ``design [n, d]``."""
    left, values, _ = torch.linalg.svd(design, full_matrices=False)
    kept: Tensor = left[:, values > size * torch.finfo(design.dtype).eps * values.max()]
    return kept
