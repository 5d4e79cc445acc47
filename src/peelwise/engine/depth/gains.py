"""Gain witnesses: a factor on what one part of a block gives, found on select and proved on report.

One number is fitted, so few tokens are enough and there is next to no over-fitting. The factor multiplies a weight (and
its bias) exactly, so that it can be merged: 0 is ablation of the part, below 0 its sign was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from peelwise.engine.depth.table import DepthTable
from peelwise.engine.factors import scaled_change
from peelwise.engine.session import Changes, Session
from peelwise.evidence.verdict import default_margin
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import ATTENTION, Parts
from peelwise.model.trace import Trace
from peelwise.records.check import GainWitness

# Tried from 1 outwards on the side that the slope points to, until two in a row are worse; then between neighbours.
_LESS = (0.85, 0.7, 0.5, 0.25, 0.0, -0.5, -1.0, -1.5)
_MORE = (1.15, 1.3, 1.6, 2.0, 3.0)
_REFINEMENTS = 3
# Tried of many blocks: the part left out, half of it; or more of it. The sign turned is tried on either side: the slope
# of a part whose sign is wrong may ask for more of it in a model that is off its distribution.
_SCREEN_LESS, _SCREEN_MORE, _TURNED = (0.0, 0.6), (1.5, 2.5), -1.0
_SCREEN_TOKENS = 512


@dataclass(frozen=True)
class Candidate:
    """What a factor may be put on: a linear layer as a whole, or a head's inputs of it."""

    part: str
    linear: LinearLayer
    slope: float | None
    head: int | None = None
    head_dim: int | None = None

    def change(self, factor: float) -> Changes:
        """Return the change of the layer that multiplies the part by ``factor``: ``(factor - 1) W``, bias included."""
        return {self.linear: scaled_change(self.linear, factor, self.head, self.head_dim)}


def screened(session: Session, few: Sequence[Parts], table: DepthTable) -> dict[int, float]:
    """Return for each block what the best of a few factors on one of its branches gains, nats per token.

    On some hundred select tokens: a factor that mends a block gains far more than the margin.

    Args:
        session: the model.
        few: parts of the blocks in question.
        table: signals, for the side on which to try.
    """
    gains = {}
    tokens = session.some_of_select(_SCREEN_TOKENS) if few else session.select
    for done, parts in enumerate(few, start=1):
        best = 0.0
        for branch in parts.branches:
            slope = _slope(table, branch.name, parts.block.index)
            for factor in (_TURNED, *(_SCREEN_MORE if slope is not None and slope < 0 else _SCREEN_LESS)):
                changes = Candidate(branch.name, branch.writer, slope).change(factor)
                losses = session.losses(tokens, changes, parts.block.index)
                gain = session.counted_gain(tokens, tokens.losses, losses)
                best = max(best, gain) if math.isfinite(gain) else best
        gains[parts.block.index] = best
        session.clock.tell(done, len(few))
    return gains


@dataclass(frozen=True)
class BranchFactor:
    """A factor on what one branch of a block writes."""

    block: int
    part: str
    linear: LinearLayer
    factor: float

    def change(self) -> Tensor:
        """Return the change of the layer that stands for the factor."""
        return scaled_change(self.linear, self.factor)


def factors_on_branches(session: Session, few: Sequence[Parts]) -> list[BranchFactor]:
    """Return factors on what blocks write, each kept if it lowers the loss on select by more than the margin.

    One branch after the other, each with the factors that were kept before it in place.

    Args:
        session: the model; its report part is not looked at.
        few: parts of the blocks in question, the worst first.
    """
    tokens = session.some_of_select(_SCREEN_TOKENS)
    start = min(parts.block.index for parts in few)
    kept: list[BranchFactor] = []
    changes: Changes = {}
    before, best = session.select.losses, tokens.mean
    for parts in few:
        for branch in parts.branches:
            if branch.writer not in parts.block.linears:
                continue  # frozen
            factor, found = _factor_on(session, tokens, branch.writer, changes, start, best)
            if not found < best:
                continue
            tried = changes | {branch.writer: scaled_change(branch.writer, factor)}
            after = session.losses(session.select, tried, start)
            margin = default_margin(session.select.mean, session.probe.unit)
            if session.counted_gain(session.select, before, after) > margin:
                kept.append(BranchFactor(parts.block.index, branch.name, branch.writer, factor))
                changes, before, best = tried, after, found
    return kept


def _factor_on(
    session: Session, tokens: Trace, writer: LinearLayer, changes: Changes, start: int, at_one: float
) -> tuple[float, float]:
    """Return the best of a few factors on a layer beside other ``changes``, and the loss on ``tokens`` with it."""

    def loss(factor: float) -> float:
        tried = changes | {writer: scaled_change(writer, factor)}
        return tokens.mean_of(session.losses(tokens, tried, start))

    tried = {1.0: at_one} | {factor: loss(factor) for factor in (_TURNED, *_SCREEN_LESS, *_SCREEN_MORE)}
    return _refined(loss, {factor: found for factor, found in tried.items() if math.isfinite(found)})


@dataclass(frozen=True)
class GainWitnesses:
    """Factors, the one that gains most first, and the losses ``[sequences]`` on report with the composed ones."""

    each: tuple[GainWitness, ...]
    composed: Tensor | None


def gain_witnesses(session: Session, worst: Sequence[Parts], table: DepthTable) -> GainWitnesses:
    """Return for each block the factors that were found, and what they do together.

    Args:
        session: the model; factors are found on select, gains are those on report.
        worst: parts of the blocks in question.
        table: signals, for the side on which to search.
    """
    found: list[tuple[GainWitness, Changes]] = []
    for done, parts in enumerate(worst, start=1):
        for candidate in candidates(parts, table):
            witness = _witness(session, parts, candidate)
            if witness is not None:
                found.append((witness, candidate.change(witness.factor)))
        session.clock.tell(done, len(worst))
    found.sort(key=lambda each: -each[0].gain.mean)
    composed, losses = _composed(session, found)
    return GainWitnesses(
        tuple(witness.model_copy(update={"composed": i in composed}) for i, (witness, _) in enumerate(found)), losses
    )


def _composed(session: Session, found: Sequence[tuple[GainWitness, Changes]]) -> tuple[set[int], Tensor | None]:
    """Return which witnesses do best together, chosen on select, and the losses ``[sequences]`` on report with them.

    One after the other in the order of what they gain there, the first kept if it gains more than the margin, each of
    the others if the loss falls further; never two on one layer.
    """
    kept: set[int] = set()
    changes: Changes = {}
    select, margin = session.select, default_margin(session.select.mean, session.probe.unit)
    best = select.losses
    for i in sorted(range(len(found)), key=lambda i: -found[i][0].select_gain):
        own = found[i][1]
        if not changes.keys().isdisjoint(own):
            continue
        losses = session.losses(select, changes | own)
        if session.counted_gain(select, best, losses) > (0.0 if kept else margin):
            kept, changes, best = kept | {i}, changes | own, losses
    return kept, session.losses(session.report, changes) if kept else None


def candidates(parts: Parts, table: DepthTable) -> Iterator[Candidate]:
    """Yield what factors are tried on: both branches, the layers that lead into them, and the head that pulls most.

    A head is tried by its columns of attention's last layer, which read what it gives.
    """
    index = parts.block.index
    names = {id(linear): name for name, linear in parts.linears.items()}
    for branch in parts.branches:
        yield Candidate(branch.name, branch.writer, _slope(table, branch.name, index))
        for linear in branch.linears[:-1]:
            name = names[id(linear)]
            yield Candidate(name, linear, _slope(table, name, index))
        slopes = table.heads.get(index)
        if branch.name == ATTENTION and slopes and parts.head_dim is not None:
            head = max(range(len(slopes)), key=lambda h: abs(slopes[h]))
            yield Candidate(branch.name, branch.writer, slopes[head], head, parts.head_dim)


def _slope(table: DepthTable, part: str, block: int) -> float | None:
    row = table.values.get(("gain_slope", part))
    return None if row is None else row[block]


def _witness(session: Session, parts: Parts, candidate: Candidate) -> GainWitness | None:
    start = parts.block.index

    def loss(factor: float) -> float:
        return session.select.mean_of(session.losses(session.select, candidate.change(factor), start))

    factor, best = search(loss, session.select.mean, candidate.slope)
    if factor == 1.0:
        return None
    after = session.losses(session.report, candidate.change(factor), start)
    return GainWitness(
        block=start,
        part=candidate.part,
        layer=candidate.linear.name,
        head=candidate.head,
        head_dim=candidate.head_dim,
        factor=factor,
        gain=session.gain(session.report.losses, after).interval(),
        select_gain=session.select.mean - best,
    )


def search(loss: Callable[[float], float], at_one: float, slope: float | None) -> tuple[float, float]:
    """Return the factor with the lowest loss and that loss, ``(1, at_one)`` where none is lower.

    Args:
        loss: of a factor.
        at_one: of the factor 1.
        slope: the derivative of the loss by the log of the factor; below 0 more is tried, else less; ``None``: both.
    """
    tried = {1.0: at_one}
    sides = [_LESS, _MORE] if slope is None else [_MORE if slope < 0 else _LESS]
    for side in sides:
        worse = 0
        for factor in side:
            tried[factor] = loss(factor)
            worse = worse + 1 if tried[factor] > min(tried.values()) else 0
            if worse == 2:
                break
    return _refined(loss, tried)


def _refined(loss: Callable[[float], float], tried: dict[float, float]) -> tuple[float, float]:
    for _ in range(_REFINEMENTS):
        between = _between(tried)
        if between is None:
            break
        tried[between] = loss(between)
    best = min(tried, key=lambda factor: tried[factor])
    return best, tried[best]


def _between(tried: dict[float, float]) -> float | None:
    """Return the minimum of the parabola through the best factor and its two neighbours, or ``None`` at an edge."""
    places = sorted(tried)
    at = places.index(min(places, key=lambda factor: tried[factor]))
    if at in (0, len(places) - 1):
        return None
    (a, fa), (b, fb), (c, fc) = ((x, tried[x]) for x in places[at - 1 : at + 2])
    top = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    bottom = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    if bottom == 0:
        return None
    x = b - 0.5 * top / bottom
    return None if min(abs(x - each) for each in (a, b, c)) < 1e-3 else round(x, 4)
