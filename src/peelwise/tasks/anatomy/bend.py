"""Bending a block's weights, mildly first: scale, noise, low rank, rounding, signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from peelwise.engine.factors import scaled_change
from peelwise.engine.session import Changes, Session
from peelwise.evidence.anatomy import tolerated
from peelwise.formats import parse_format
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import Parts
from peelwise.records.anatomy import BENDS, Bend, Bent, BestScale
from peelwise.tasks.anatomy.ablate import cost_of

STRENGTHS: Mapping[Bend, tuple[float, ...]] = MappingProxyType(
    {
        "scale-down": (0.9, 0.8, 0.7, 0.5),
        "scale-up": (1.1, 1.2, 1.5),
        "noise": (0.05, 0.1, 0.2, 0.3, 0.5),
        "low-rank": (0.1, 0.25, 0.5, 0.75),
        "rounding": (8, 6, 5, 4, 3, 2),
        "signs": (0.001, 0.003, 0.01, 0.03, 0.1),
    }
)
_SEARCHED = (0.5, 0.7, 0.8, 0.9, 1.1, 1.2, 1.5)
_BISECTIONS = 3


def bent(session: Session, parts: Parts, margin: float, seed: int, go_on: Callable[[], bool]) -> Iterator[Bent]:
    """Yield what each way of bending a block costs, from mild to strong until the mean is above the margin.

    Args:
        session: the model.
        parts: of the block.
        margin: nats per token.
        seed: of noise and of the signs that are flipped.
        go_on: asked before each way whether there is time.
    """
    index = parts.block.index
    for kind in BENDS:
        if not go_on():
            return
        change, costs = changer(kind, parts, seed), []
        for strength in STRENGTHS[kind]:
            costs.append(cost_of(session, change(strength), index))
            if costs[-1].mean > margin:
                break
        last = tolerated(STRENGTHS[kind], costs, margin)
        yield Bent(kind=kind, strengths=STRENGTHS[kind], costs=tuple(costs), tolerated=last)


def changer(kind: Bend, parts: Parts, seed: int) -> Callable[[float], Changes]:
    """Return the function from a strength to the changes of a block's linear layers; biases are scaled, else kept."""
    linears = list(parts.linears.values())
    if kind in ("scale-down", "scale-up"):
        return lambda factor: {m: scaled_change(m, factor) for m in linears}
    if kind == "low-rank":
        decomposed = {m: torch.linalg.svd(m.weight().float(), full_matrices=False) for m in linears}
        return lambda share: {m: _with_bias(m, -_tail(decomposed[m], share)) for m in linears}

    def changes(strength: float) -> Changes:
        generator = torch.Generator().manual_seed(seed * 10_007 + parts.block.index)
        return {m: _with_bias(m, _moved(kind, m.weight().float(), strength, generator)) for m in linears}

    return changes


def _moved(kind: Bend, W: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return the change ``[d_out, d_in]`` of one weight."""
    if kind == "noise":
        return strength * float(W.std()) * torch.randn(W.shape, generator=generator).to(W)
    if kind == "rounding":
        return parse_format(f"int{int(strength)}:channel,scale=float32").project(W).to(W) - W
    flipped = torch.rand(W.shape, generator=generator).to(W) < strength
    return -2 * W * flipped


def _tail(decomposed: tuple[Tensor, Tensor, Tensor], share: float) -> Tensor:
    """Return what goes with the smallest singular values."""
    U, s, Vh = decomposed
    kept = max(1, math.ceil((1 - share) * len(s)))
    return (U[:, kept:] * s[kept:]) @ Vh[kept:]


def _with_bias(linear: LinearLayer, change: Tensor) -> Tensor:
    bias = linear.bias()
    return change if bias is None else torch.cat([change, torch.zeros_like(bias.float())[:, None]], dim=1)


def best_scale(session: Session, parts: Parts) -> BestScale:
    """Return the factor on all matrices of a block that is best on select, by a grid and some halvings beside its best.

    The gain is on report.
    """
    index, select = parts.block.index, session.select

    def loss(factor: float) -> float:
        changes = {m: scaled_change(m, factor) for m in parts.linears.values()}
        found = select.mean_of(session.losses(select, changes, index))
        return found if math.isfinite(found) else math.inf

    tried = {1.0: select.mean} | {factor: loss(factor) for factor in _SEARCHED}
    for _ in range(_BISECTIONS):
        at = sorted(tried)
        place = at.index(min(tried, key=tried.__getitem__))
        for other in (place - 1, place + 1):
            if 0 <= other < len(at):
                middle = (at[place] + at[other]) / 2
                tried[middle] = loss(middle)
    factor = min(tried, key=tried.__getitem__)
    changes = {m: scaled_change(m, factor) for m in parts.linears.values()}
    gain = session.gain(session.report.losses, session.losses(session.report, changes, index))
    return BestScale(factor=factor, gain=gain.interval())
