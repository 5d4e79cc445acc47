"""The closed-form reference of one layer: ridge regression from sums, damping chosen on other samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peelwise.errors import TooFewSamplesError
from peelwise.stats.gram import RegressionSums
from peelwise.stats.linalg import eigh

# Relative to the mean variance of a feature. 1e-8 is as good as none, 10 nearly predicts the mean.
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Ridge:
    """Solves one design for any targets and dampings from a single eigendecomposition.

        W = argmin  sum |y - W [x, 1]|^2 + damping * tr(C)/d * n * |W_x|^2,    C the covariance of x

    The intercept is not damped. Without a bias, ``C`` is the second moment and nothing is centred.

    Args:
        sums: Sums over ``n`` fit samples; reads ``x, y, xx, xy``.
        bias: whether the layer has an intercept.
    """

    def __init__(self, sums: RegressionSums, *, bias: bool) -> None:
        if sums.n < 1:
            raise TooFewSamplesError("x: least squares needs at least 1 fit sample, got 0. Give more samples.")
        self._n, self._bias = sums.n, bias
        self._mean = sums.x / sums.n if bias else torch.zeros_like(sums.x)  # [d]
        centred = sums.xx / sums.n - self._mean[:, None] * self._mean  # [d, d]
        values, self._vectors = eigh(centred)
        self._values = values.clamp(min=0)
        self._unit = float(self._values.mean())

    def solve(self, sums: RegressionSums, damping: float) -> Tensor:
        """Return ``[W, b]  [m, d + 1]`` (or ``[m, d]``) for the targets in ``sums``.

        Args:
            sums: the sums that this was made from, or some of their columns.
            damping: no unit; 0 is the projection, least norm where the design is rank deficient.

        Raises:
            TooFewSamplesError: If ``damping`` is zero and there are fewer samples than features.
        """
        d = self._mean.shape[0]
        if damping == 0 and self._n < d + self._bias:
            raise TooFewSamplesError(
                f"damping: undamped least squares needs n >= {d + self._bias} fit samples (features, bias "
                f"included), got n = {self._n}. Give more samples or use damping > 0."
            )
        target_mean = sums.y / sums.n if self._bias else torch.zeros_like(sums.y)  # [m]
        cross = sums.xy / sums.n - self._mean[:, None] * target_mean  # [d, m]
        cut = d * torch.finfo(torch.float64).eps * float(self._values.max()) if d else 0.0
        shifted = self._values + damping * self._unit
        # A direction without variance carries no target either; dividing rounding noise would invent one.
        inverse = torch.where(self._values > cut, 1 / shifted.clamp(min=1e-300), 0.0)
        weight: Tensor = (self._vectors @ (inverse[:, None] * (self._vectors.T @ cross))).T  # [m, d]
        if not self._bias:
            return weight
        return torch.cat([weight, (target_mean - weight @ self._mean)[:, None]], dim=1)


def squared_error(sums: RegressionSums, weight: Tensor) -> float:
    """Return the mean over samples of ``|y - W [x, 1]|^2``, from sums alone.

    Args:
        sums: Sums over any samples, not only those that ``weight`` was fitted on.
        weight: ``[m, d + 1]`` with an intercept, or ``[m, d]``.
    """
    d = sums.x.shape[0]
    w = weight[:, :d]  # [m, d]
    error = sums.yy.sum() - 2 * (w.T * sums.xy).sum() + ((w @ sums.xx) * w).sum()
    if weight.shape[1] > d:
        b = weight[:, d]
        error += 2 * b @ (w @ sums.x) - 2 * b @ sums.y + sums.n * b @ b
    return float(error) / sums.n


def choose(
    ridge: Ridge, fit: RegressionSums, select: RegressionSums, dampings: Sequence[float]
) -> tuple[float, Tensor, float]:
    """Return ``(error on select, weight, damping)`` for the damping that does best on ``select``."""
    best: tuple[float, Tensor, float] | None = None
    for damping in dampings:
        weight = ridge.solve(fit, damping)
        error = squared_error(select, weight) if select.n else squared_error(fit, weight)
        if best is None or error < best[0]:
            best = (error, weight, damping)
    if best is None:
        raise ValueError("damping: at least one value is needed, got none.")
    return best


def shaped(weight: Tensor, fit: RegressionSums, width: int) -> Tensor:
    """Return ``weight`` as a layer of at most ``width`` units that keeps what a linear readout can use.

    A station may be wider or narrower than the layer that regresses to it. Too wide: the leading directions
    of the fitted values (reduced-rank regression), so the layer stays as wide as the network's own. Too
    narrow: spare units carry the fitted values with the sign flipped, which an activation that clips needs.

    Args:
        weight: ``[m, d + 1]`` or ``[m, d]``, fitted to a station of width ``m``.
        fit: Sums of the design over the fit samples.
        width: number of units of the layer.
    """
    m, d = weight.shape[0], fit.x.shape[0]
    if m == width:
        return weight
    if m < width:
        return torch.cat([weight, -weight[: width - m]])
    second = fit.xx
    if weight.shape[1] > d:
        row = torch.cat([fit.x, fit.x.new_tensor([float(fit.n)])])
        second = torch.cat([torch.cat([fit.xx, fit.x[:, None]], dim=1), row[None]])  # [d + 1, d + 1]
    _, vectors = eigh(weight @ second @ weight.T)  # ascending
    leading = vectors[:, -width:].flip(1)  # [m, width]
    # Signs of eigenvectors are arbitrary: the largest entry is made positive, so that results repeat.
    signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()  # [1, width]
    directions: Tensor = (leading * signs).T
    return directions @ weight
