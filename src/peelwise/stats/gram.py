"""Streaming sums over rows: the second moments that every reference is made of.

For a linear layer ``y = x W^T`` with inputs ``x [n, d_in]`` and gradients ``g = d loss / d y [n, d_out]``:

    S = E[x x^T]  [d_in, d_in]      C = E[g x^T]  [d_out, d_in]      F = E[g g^T]  [d_out, d_out]

Least squares of targets ``y`` needs the sums of ``x``, ``y`` and ``y^2`` too. Products are taken in float32 or
wider and added up in float64, so memory does not depend on ``n``; several processes add theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from peelwise.distributed.processes import Processes
from peelwise.errors import TooFewSamplesError
from peelwise.stats.linalg import solve_dtype

# Wide enough for full speed, narrow enough to skip most of the other triangle.
_TILE = 256


@dataclass(frozen=True)
class Moments:
    """Frozen means; ``F`` is ``None`` where nobody asked for it.

    ``S`` and ``C`` are sums over the ``n`` rows that the layer saw, divided by *all* tokens: of an expert they weigh as
    much as it is used, and slopes of all layers add up. ``F`` is a mean over the rows: divided by all tokens too, its
    inverse would make the change of an expert the larger the less it is used.
    """

    n: int
    S: Tensor  # [d_in, d_in]
    C: Tensor  # [d_out, d_in]
    F: Tensor | None  # [d_out, d_out]


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


class _Sum:
    """Streaming sums over rows: subclasses `update` with rows; sums reduce across processes by addition."""

    def __init__(self) -> None:
        self.n = 0
        self.totals: tuple[Tensor, ...] = ()  # empty until the first rows tell the shapes

    def merge(self, other: Self) -> None:
        """Add the rows that ``other`` has seen."""
        if other.totals:
            self._add(other.n, *other.totals)

    def _add(self, n: int, *terms: Tensor) -> None:
        self.n += n
        if not self.totals:
            self.totals = tuple(term.to(solve_dtype(term.device), copy=True) for term in terms)
            return
        for total, term in zip(self.totals, terms, strict=True):
            total.add_(term)


class _ProductSum(_Sum):
    """The sum of one product of rows."""

    def mean(self, tokens: float | None = None) -> Tensor:
        """Return the mean product over the rows seen, or over more or fewer tokens than rows.

        Args:
            tokens: what to divide by, where rows are not tokens: only some are routed to an expert.

        Raises:
            TooFewSamplesError: If no row was added.
        """
        if self.n == 0:
            raise TooFewSamplesError("A mean needs at least 1 token, got none. Give a longer probe.")
        (total,) = self.totals
        return total / (self.n if tokens is None else tokens)


class GramSum(_ProductSum):
    """Streaming ``sum_i x_i x_i^T``: `update` with rows, `merge` with another sum, `mean` for ``E[x x^T]``.

    Only the upper triangle of tiles is added up; `mean` mirrors it once.
    """

    def update(self, x: Tensor) -> None:
        """Add the rows of ``x [n, d]``."""
        x = widened(x)
        if not self.totals:
            self.totals = (x.new_zeros(x.shape[1], x.shape[1], dtype=solve_dtype(x.device)),)
        _add_upper_product(self.totals[0], x)
        self.n += x.shape[0]

    def mean(self, tokens: float | None = None) -> Tensor:
        """Return ``E[x x^T] [d, d]`` over the rows seen, or over so many ``tokens``, symmetric to the bit.

        Raises:
            TooFewSamplesError: If no row was added.
        """
        return _mirrored_(super().mean(tokens))


class CrossSum(_ProductSum):
    """Streaming ``sum_i g_i x_i^T``, as `GramSum`, with `mean` for ``E[g x^T]``."""

    def update(self, g: Tensor, x: Tensor) -> None:
        """Add the rows of ``g [n, d_out]`` and ``x [n, d_in]``, paired."""
        self._add(x.shape[0], widened(g).T @ widened(x))


class RegressionSum(_Sum):
    """Streaming `RegressionSums`, everything in float64: least squares subtracts large sums from each other."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of ``x [n, d]`` and ``y [n, m]``, paired."""
        x, y = x.double(), y.double()
        self._add(x.shape[0], x.sum(0), y.sum(0), symmetric_product(x), x.T @ y, y.square().sum(0))

    def sums(self) -> RegressionSums:
        """Return the sums so far, frozen; zeros where every batch was empty.

        Raises:
            TooFewSamplesError: If there was no batch at all.
        """
        if not self.totals:
            raise TooFewSamplesError("Sums need at least one batch of samples, got none. Give more samples.")
        return RegressionSums(self.n, *(total.clone() for total in self.totals))


def all_reduce(sums: Sequence[GramSum | CrossSum], processes: Processes) -> None:
    """Let every one of ``sums`` hold the rows that all processes have seen; each has seen a batch, if an empty one."""
    if processes.count == 1:
        return
    counts = [each.totals[0].new_tensor(float(each.n)) for each in sums]
    processes.all_reduce_([*counts, *(total for each in sums for total in each.totals)])
    for each, count in zip(sums, counts, strict=True):
        each.n = int(count)


def symmetric_product(x: Tensor) -> Tensor:
    """Return ``x^T x`` for ``x [n, d]``, computing only one triangle of its tiles.

    A wide ``x`` saves up to half of the products; the result is symmetric to the bit.
    """
    x = widened(x)
    total = x.new_zeros(x.shape[1], x.shape[1])
    _add_upper_product(total, x)
    return _mirrored_(total)


def _add_upper_product(total: Tensor, x: Tensor) -> None:
    """Add the tiles of ``x^T x`` on and above the diagonal to ``total [d, d]``, which may be of a wider dtype."""
    for start in range(0, x.shape[1], _TILE):
        stop = start + _TILE
        total[start:stop, start:].add_(x[:, start:stop].T @ x[:, start:])  # [tile, d - start]


def _mirrored_(total: Tensor) -> Tensor:
    """Copy the upper triangle of ``total [d, d]`` onto the lower one, in place.

    Of the tiles on the diagonal too: a product of ``x`` with itself may differ from its transpose in the last bit.
    """
    for start in range(0, total.shape[0], _TILE):
        stop = start + _TILE
        upper = total[start:stop, start:stop].triu()
        total[start:stop, start:stop] = upper + upper.triu(1).T
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def with_ones(x: Tensor) -> Tensor:
    """Return ``[x, 1]``, so that a bias is one more column of the weight."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least: a bf16 product is not positive semi-definite."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
