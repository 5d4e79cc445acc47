"""The published YES bounds as first written down: slow, obvious, one pseudo-inverse per layer and map."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn


def yes_reference(net: nn.Sequential, x: Tensor, y: Tensor) -> tuple[float, list[float], float]:
    """Return (YES-0, [YES-1 .. YES-(L-1)], loss) at this moment, in the dtype of the data."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    with torch.no_grad():
        stations, h = [], x
        for i, linear in enumerate(linears):
            h = linear(h)
            if i < len(linears) - 1:
                h = torch.relu(h)
                stations.append(h)
        loss = float((h - y).square().sum(1).mean())
        best, bounds = float("inf"), []
        for k in range(len(linears)):
            for subset in combinations(range(len(linears) - 1), k):
                best = min(best, _stack(linears, x, y, stations, subset))
            bounds.append(best)
    return bounds[0], bounds[1:], loss


def _stack(linears, x: Tensor, y: Tensor, stations: list[Tensor], subset: tuple[int, ...]) -> float:
    a = x
    last = len(linears) - 1
    for i, linear in enumerate(linears):
        ahead = [s for s in subset if s >= i]
        target = stations[ahead[0]] if ahead else y
        design = a if linear.bias is None else torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
        z = design @ (torch.linalg.pinv(design) @ target)
        a = z if i == last else torch.relu(z)
    return float((a - y).square().sum(1).mean())
