"""Damped solves with positive semi-definite matrices, in float64, that never return NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from peelwise.errors import IllConditionedWarning, ModelError

_MAX_ESCALATIONS = 12


class DampedFactor:
    """Cholesky factor of ``S + damping * tr(S)/d * I``, reused for several right-hand sides.

    If the factorisation fails or means nothing (rank deficient), the damping is multiplied by ten until it
    succeeds, and an `IllConditionedWarning` names the matrix and the damping that was used in the end.

    Args:
        matrix: ``S [d, d]``, symmetric positive semi-definite up to rounding; any float dtype.
        damping: lambda in units of the mean diagonal, no unit.
        name: what the matrix is, for the warning.
        dtype: what to solve in; by default float64.

    Attributes:
        damping: the damping that was used, in units of the mean diagonal.
    """

    def __init__(
        self, matrix: Tensor, damping: float, *, name: str = "matrix", dtype: torch.dtype | None = None
    ) -> None:
        S = matrix.to(dtype or solve_dtype(matrix.device))  # [d, d]
        d = S.shape[0]
        mean_diagonal = float(S.diagonal().mean()) if d else 0.0
        # An all-zero matrix (inputs that never fire) still gets a finite, harmless factor.
        unit = mean_diagonal if 0 < mean_diagonal < math.inf else 1.0
        tiny = d * torch.finfo(S.dtype).eps
        for attempt in range(_MAX_ESCALATIONS):
            used = damping if attempt == 0 else max(damping, tiny) * 10.0**attempt
            damped = S.clone()  # no identity beside it: of wide layers these are what memory is needed for
            damped.diagonal().add_(used * unit)
            factor, info = torch.linalg.cholesky_ex(damped)
            del damped
            # Undamped, rounding may leave a singular matrix tiny positive pivots: a factor, but of nothing.
            if int(info) == 0 and bool(torch.isfinite(factor).all()) and (used > tiny or _is_regular(S)):
                break
        else:
            # Not positive semi-definite at all: fall back to its scale, which is always valid.
            used, factor = 1.0, torch.eye(d, dtype=S.dtype, device=S.device) * unit**0.5
        if attempt:
            text = (
                f"{name}: [{d}, {d}] is rank deficient or badly conditioned at damping {damping:g}; "
                f"used {used:g} instead. The result is valid; more fit tokens would sharpen it."
            )
            values: dict[str, int | float | str] = {"layer": name, "size": d, "damping": damping, "used": used}
            warnings.warn(IllConditionedWarning(text, "more-damping", **values), stacklevel=2)
        self.damping = used
        self._factor = factor

    @property
    def root(self) -> Tensor:
        """The lower triangular ``L [d, d]`` with ``L L^T = S + ..``, in the factor's dtype."""
        root: Tensor = self._factor
        return root

    def solve(self, right: Tensor) -> Tensor:
        """Return ``(S + ..)^-1 right`` for ``right [d, m]``, in the factor's dtype."""
        return torch.cholesky_solve(right.to(self._factor.dtype), self._factor)

    def solve_right(self, left: Tensor) -> Tensor:
        """Return ``left (S + ..)^-1`` for ``left [m, d]``, in the factor's dtype."""
        return self.solve(left.T).T


class Spectrum:
    """Eigen-decomposition ``S = U diag(values) U^T`` of a positive semi-definite matrix, for solves at any damping.

    Rounding makes some eigenvalues of a rank-deficient matrix slightly negative; they are taken as zero.

    Args:
        matrix: ``S [d, d]``, any float dtype.
        dtype: what to decompose in; by default what solves are made in. float32 takes half the time and is enough to
            choose a damping by.

    Attributes:
        values: ``[d]``, ascending, at least zero.
        vectors: ``U [d, d]``.
        unit: mean diagonal, which damping is measured in; 1 for an all-zero matrix.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype | None = None) -> None:
        with _one_thread():
            values, self.vectors = eigh(matrix.to(dtype or solve_dtype(matrix.device)))
        self.values = values.clamp_min(0.0)
        self.unit = float(self.values.double().mean()) or 1.0

    def damped(self, damping: float) -> Tensor:
        """Return the eigenvalues ``[d]`` of ``S + damping * unit * I``."""
        shifted: Tensor = self.values + damping * self.unit
        return shifted

    def rounding(self, damping: float) -> float:
        """Return the relative error that rounding can make in a solve with ``S + damping * unit * I``."""
        largest = float(self.values[-1]) if len(self.values) else 0.0
        return torch.finfo(self.values.dtype).eps * (1 + largest / max(damping * self.unit, 1e-300))

    def rank(self) -> int:
        """Return how many eigenvalues float32 sums can tell from zero."""
        return int((self.values > len(self.values) * torch.finfo(torch.float32).eps * self.values[-1]).sum())


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[d]``, ascending, and eigenvectors ``[d, d]`` of a positive semi-definite matrix.

    LAPACK's fast solver does not converge on every matrix; singular values then are its eigenvalues.

    Args:
        matrix: ``S [d, d]``, symmetric, positive semi-definite up to rounding.

    Raises:
        ModelError: If it holds NaN or Inf, or neither way converges.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError:
        values, vectors = _by_singular_values(matrix)
    _check_finite(values)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of `eigh` alone."""
    try:
        values: Tensor = torch.linalg.eigvalsh(matrix)
    except LinAlgError:
        values, _ = _by_singular_values(matrix)
    _check_finite(values)
    return values


def _by_singular_values(S: Tensor) -> tuple[Tensor, Tensor]:
    _check_finite(S)
    try:
        left, values, right = torch.linalg.svd(S)  # descending
    except LinAlgError as error:
        raise ModelError(f"The eigenvalues of a matrix {list(S.shape)} of sums do not converge: {error}") from error
    signs = (left * right.T).sum(0).sign()  # rounding makes some eigenvalues negative
    ascending = (values * signs).argsort()
    return (values * signs)[ascending], left[:, ascending]


def _check_finite(numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise ModelError(
            "Sums of activations or gradients hold NaN or Inf: they overflow. Look for activations above 1e18, or try "
            "--dtype float32."
        )


def _is_regular(matrix: Tensor) -> bool:
    """Say whether the smallest eigenvalue of ``matrix [d, d]`` stands clear of rounding in its own dtype."""
    eigenvalues = eigvalsh(matrix)
    resolution = matrix.shape[0] * torch.finfo(matrix.dtype).eps
    return eigenvalues.numel() == 0 or bool(eigenvalues[0] > resolution * eigenvalues[-1])


def solve_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the one device kind that has no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one CPU thread: LAPACK's eigensolver meets at thousands of barriers.

    Two threads gain it a third on an idle machine and cost it a factor of ten or more on a busy one (NOTES.md).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
