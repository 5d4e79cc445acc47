"""Sums over tokens: the second moments that every label-driven reference is made of.

For a linear map ``y = x W^T`` with inputs ``x [n, d_in]`` and gradients ``g = d loss / d y [n, d_out]``:

    S = E[x x^T]  [d_in, d_in]      C = E[g x^T]  [d_out, d_in]      F = E[g g^T]  [d_out, d_out]

Products are taken in float32 or wider and added up in float64; several processes add theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from peelwise.errors import TooFewSamplesError
from peelwise.stats.linalg import solve_dtype

_TILE = 512


@dataclass(frozen=True)
class Moments:
    """Frozen means over ``n`` tokens; ``F`` is ``None`` where nobody asked for it."""

    n: int
    S: Tensor  # [d_in, d_in]
    C: Tensor  # [d_out, d_in]
    F: Tensor | None  # [d_out, d_out]


class _Sum:
    """A streaming sum of products of rows; sums reduce across processes by addition."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Tensor | None = None  # [d, d] or [d_out, d_in]

    def merge(self, other: Self) -> None:
        """Add the rows that ``other`` has seen."""
        if other.total is not None:
            self._add(other.n, other.total)

    def mean(self) -> Tensor:
        """Return the mean product over the rows seen.

        Raises:
            TooFewSamplesError: If no row was added.
        """
        if self.total is None or self.n == 0:
            raise TooFewSamplesError("A mean needs at least 1 token, got none. Give a longer probe.")
        return self.total / self.n

    def _add(self, n: int, product: Tensor) -> None:
        self.n += n
        if self.total is None:
            self.total = product.to(solve_dtype(product.device), copy=True)
        else:
            self.total.add_(product)


class GramSum(_Sum):
    """Streaming ``sum_i x_i x_i^T``: `update` with rows, `merge` with another sum, `mean` for ``E[x x^T]``."""

    def update(self, x: Tensor) -> None:
        """Add the rows of ``x [n, d]``."""
        self._add(x.shape[0], symmetric_product(x))


class CrossSum(_Sum):
    """Streaming ``sum_i g_i x_i^T``, as `GramSum`, with `mean` for ``E[g x^T]``."""

    def update(self, g: Tensor, x: Tensor) -> None:
        """Add the rows of ``g [n, d_out]`` and ``x [n, d_in]``, paired."""
        self._add(x.shape[0], widened(g).T @ widened(x))


def symmetric_product(x: Tensor) -> Tensor:
    """Return ``x^T x`` for ``x [n, d]``, computing only one triangle of its tiles.

    A wide ``x`` saves up to half of the products; the result is symmetric to the bit.
    """
    x = widened(x)
    d = x.shape[1]
    out = x.new_empty(d, d)
    for start in range(0, d, _TILE):
        stop = min(start + _TILE, d)
        out[start:stop, start:] = x[:, start:stop].T @ x[:, start:]  # [tile, d - start]
    # One triangle is mirrored: a product of x with itself may differ from its transpose in the last bit.
    upper = out.triu_()
    return upper + upper.triu(1).T


def with_ones(x: Tensor) -> Tensor:
    """Return ``[x, 1]``, so that a bias is one more column of the weight."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least: a bf16 product is not positive semi-definite."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
