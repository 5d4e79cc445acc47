"""Random numbers with a known truth in them, for the tests of the pure mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from peelwise.stats.gram import CrossSum, GramSum, Moments


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moments(x: Tensor, g: Tensor) -> Moments:
    """The moments of inputs ``x [n, d_in]`` and gradients ``g [n, d_out]``."""
    S, C, F = GramSum(), CrossSum(), GramSum()
    S.update(x)
    C.update(g, x)
    F.update(g)
    return Moments(S.n, S.mean(), C.mean(), F.mean())


def planted_moments(
    slope: Tensor, tokens: tuple[int, int], *, noise: float, spread: Tensor | float = 1.0, seed: int = 0
) -> tuple[Moments, Moments]:
    """Moments of a fit and a select part in which ``g = x slope^T + noise``; ``x`` has deviations ``spread``."""
    d_out, d_in = slope.shape
    parts = []
    for part, n in enumerate(tokens):
        x = normal(n, d_in, seed=1000 * seed + 2 * part) * spread
        parts.append(moments(x, x @ slope.T + noise * normal(n, d_out, seed=1000 * seed + 2 * part + 1)))
    return parts[0], parts[1]
