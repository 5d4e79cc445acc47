"""Sums for least squares, streamed over batches of samples in float64; memory does not depend on samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.stats.solve import symmetric_product


@dataclass(frozen=True, eq=False)
class RegressionSums:
    """Frozen sums over ``n`` samples of a design ``x [n, d]`` and targets ``y [n, m]``."""

    n: int
    x: Tensor  # [d]
    y: Tensor  # [m]
    xx: Tensor  # [d, d]
    xy: Tensor  # [d, m]
    yy: Tensor  # [m], sums of squares

    def columns(self, start: int, stop: int) -> RegressionSums:
        """Return the sums of the targets ``start..stop-1`` only."""
        pick = slice(start, stop)
        return RegressionSums(self.n, self.x, self.y[pick], self.xx, self.xy[:, pick], self.yy[pick])


class RegressionAccumulator:
    """Streaming `RegressionSums`: `update` with rows, `merge` with another; all of them add up.

    Args:
        d: width of the design.
        m: width of all targets together.
        device: where the sums live.
    """

    def __init__(self, d: int, m: int, device: torch.device | None = None) -> None:
        self._n = 0
        shapes = ((d,), (m,), (d, d), (d, m), (m,))
        self._sums = [torch.zeros(s, dtype=torch.float64, device=device) for s in shapes]

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of ``x [n, d]`` and ``y [n, m]``, paired."""
        self._n += x.shape[0]
        x, y = x.double(), y.double()
        terms = (x.sum(0), y.sum(0), symmetric_product(x), x.T @ y, y.square().sum(0))
        for total, term in zip(self._sums, terms, strict=True):
            total += term

    def merge(self, other: RegressionAccumulator) -> None:
        """Add the rows that ``other`` has seen."""
        self._n += other._n
        for total, term in zip(self._sums, other._sums, strict=True):
            total += term

    def sums(self) -> RegressionSums:
        """Return the sums so far, frozen."""
        return RegressionSums(self._n, *(s.clone() for s in self._sums))
