"""One round of refinement inside the formats of low-bit maps: new codes and scales, chosen by the real loss on select.

What is evaluated is what the codes stand for; nothing is rounded afterwards. Maps that are not low-bit take a dense
step of their own before; biases of low-bit maps keep the mean output where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.shared import Shared
from peelwise.engine.refine import Proposals, Refined, take_round
from peelwise.engine.session import Changes, Session, rounded
from peelwise.formats.base import Encoded
from peelwise.model.layers import LinearLayer
from peelwise.model.weights.held import Held
from peelwise.records.audit import RoundRecord
from peelwise.references.coded import LocalProblem, Metric, flip_steps, flipped, projected, step_for_share

# Shares of codes to flip, a factor of about 3 apart; the climb begins in the middle.
SHARES = tuple(10 ** (-k / 2) for k in range(10, 0, -1))  # 1e-5 .. 0.3
_FIRST = SHARES.index(1e-2)
_EVALUATIONS = 6  # most of the select loss for flips; half as many for projections, which start where flips ended

Codes = dict[LinearLayer, Encoded]


@dataclass(frozen=True)
class Candidate:
    """Codes and changes to try, and how they came about."""

    direction: str
    step: float
    codes: Codes
    changes: Changes


def take_coded_round(session: Session, before: Refined, proposals: Proposals) -> Refined | None:
    """Try projections and flips on top of ``before``; return the better, or ``None`` if none helps on select.

    Args:
        session: model, select tokens and what low-bit maps hold.
        before: the codes and changes so far.
        proposals: what the sweep proposed, linearised at ``before``.
    """
    start, select = _dense_step(session, before, proposals), session.select
    site = Site(start, proposals, session.held, session.runner.processes)

    def loss_of(candidate: Candidate) -> float:
        return select.mean_of(session.losses(select, candidate.changes, before.start))

    best = best_candidate(site, start.select_loss, loss_of)
    if best is None:
        return start if start is not before else None
    loss, candidate = best
    record = RoundRecord(
        direction=candidate.direction,
        step=candidate.step,
        output_change=site.output_change(candidate.codes),
        select_before=start.select_loss,
        select_after=loss,
        flipped=site.flipped(candidate.codes),
    )
    return Refined(candidate.changes, (*start.rounds, record), loss, None, before.start, candidate.codes)


def best_candidate(site: Site, base: float, loss_of: Callable[[Candidate], float]) -> tuple[float, Candidate] | None:
    """Try flips, then projections, over shares of codes to flip; return the best and its loss if it is below ``base``.

    Args:
        site: makes the candidates.
        base: the loss at the codes in use, on what chooses.
        loss_of: the loss of a candidate there, with the real low-bit forward.
    """
    best: tuple[float, Candidate] | None = None
    first = _FIRST
    for family, evaluations in ((site.flips, _EVALUATIONS), (site.projection, _EVALUATIONS // 2)):
        tried: dict[int, float] = {}
        at = first
        while at not in tried and 0 <= at < len(SHARES) and len(tried) < evaluations:
            candidate = family(SHARES[at])
            if candidate is None:
                break
            loss = loss_of(candidate)
            tried[at] = loss
            if loss < (best[0] if best else base):
                best, first = (loss, candidate), at
            at = _next(tried, base)
    return best


def _dense_step(session: Session, before: Refined, proposals: Proposals) -> Refined:
    """Return ``before`` after a step of the maps that are not low-bit, with a step length of their own."""
    rest: Proposals = {}
    for index, block in proposals.items():
        changes = {d: {m: p for m, p in maps.items() if m not in block.local} for d, maps in block.changes.items()}
        rest[index] = replace(block, changes=changes)
    if not any(maps for block in rest.values() for maps in block.changes.values()):
        return before
    better = take_round(session, before, rest, output_changes={})
    return before if better is None else replace(better, codes=before.codes)


def _next(tried: Mapping[int, float], base: float) -> int:
    """Return the share to try next: the neighbour of the best, downwards first; one already tried ends the climb."""
    best = min(tried, key=lambda at: tried[at])
    if tried[best] >= base:  # too many flips, if anything
        return min(tried) - 1
    if best + 1 not in tried:
        return best + 1
    return best - 1


class Site:
    """The codes in use, the sums around them, and the candidates that can be made of both.

    Several processes share out the layers for which codes are looked for.
    """

    def __init__(
        self,
        before: Refined,
        proposals: Proposals,
        held: Mapping[LinearLayer, Held],
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self.before, self.held, self._processes = before, held, processes
        self.local: dict[LinearLayer, LocalProblem] = {m: p for b in proposals.values() for m, p in b.local.items()}
        changes = [block.changes for block in proposals.values()]
        self.direction = next(iter(changes[0]))
        self.steps = {m: p.change.float() for each in changes for m, p in each[self.direction].items()}
        self.codes = {m: before.codes.get(m, held[m].encoded) for m in self.local}
        self.weights = {m: held[m].format.decode(codes) for m, codes in self.codes.items()}

    def projection(self, share: float) -> Candidate | None:
        """Return the projections of ``W + a D``, with the ``a`` at which about ``share`` of the codes would flip."""
        step = step_for_share(self._projection_steps, share)

        def of_layer(linear: LinearLayer) -> Encoded:
            target = self.weights[linear] + step * self._weight_step(linear)
            return projected(self.local[linear].S, target, self.held[linear].format, self.codes[linear])

        codes = self._shared(self.local, of_layer)
        return Candidate(f"{self.direction}, projected", step, codes, self._changes(codes)) if step else None

    def flips(self, share: float) -> Candidate | None:
        """Return the codes after flips towards ``W + a D``, with the ``a`` at which about ``share`` would flip."""
        step = step_for_share(self._flip_steps, share)

        def of_layer(linear: LinearLayer) -> Encoded:
            form, now = self.held[linear].format, self.codes[linear]
            return flipped(self._curvatures[linear], step * self._weight_step(linear), form, now)

        codes = self._shared(self._curvatures, of_layer)
        return Candidate(f"{self.direction}, flips", step, codes, self._changes(codes)) if step else None

    def _shared(self, linears: Iterable[LinearLayer], of_layer: Callable[[LinearLayer], Encoded]) -> Codes:
        every, shared = list(linears), Shared[Encoded](self._processes)
        for linear in every:
            shared.ask(float(self.weights[linear].numel() * self.weights[linear].shape[1]), partial(of_layer, linear))
        return dict(zip(every, shared.results(), strict=True))

    @cached_property
    def _curvatures(self) -> dict[LinearLayer, Metric]:
        found = {linear: problem.curvature for linear, problem in self.local.items()}
        return {linear: metric for linear, metric in found.items() if metric is not None}

    @cached_property
    def _projection_steps(self) -> list[Tensor]:
        return self._steps({linear: problem.inputs for linear, problem in self.local.items()})

    @cached_property
    def _flip_steps(self) -> list[Tensor]:
        return self._steps(self._curvatures)

    def _steps(self, metrics: Mapping[LinearLayer, Metric]) -> list[Tensor]:
        return [
            flip_steps(metric, self._weight_step(linear), self.held[linear].format, self.codes[linear])
            for linear, metric in metrics.items()
        ]

    def flipped(self, codes: Codes) -> float:
        """Return the share of codes that differ from those in use."""
        weights = sum(c.codes.numel() for c in codes.values())
        return sum(int((c.codes != self.codes[m].codes).sum()) for m, c in codes.items()) / max(weights, 1)

    def output_change(self, codes: Codes) -> float:
        """Return ``sqrt(sum tr(d S d^T))`` of the changes ``d`` of all coded weights."""
        total = 0.0
        for linear, problem in self.local.items():
            change = self._moved(linear, codes)
            total += float(((change @ problem.S) * change).sum())
        return float(max(total, 0.0) ** 0.5)

    def _weight_step(self, linear: LinearLayer) -> Tensor:
        return self.steps[linear][:, :-1] if linear.has_bias else self.steps[linear]

    def _moved(self, linear: LinearLayer, codes: Codes) -> Tensor:
        return self.held[linear].format.decode(codes[linear]) - self.weights[linear]

    def _changes(self, codes: Codes) -> Changes:
        """Return the changes against the model itself."""
        return self.before.changes | {linear: self._coded_change(linear, codes) for linear in codes}

    def _coded_change(self, linear: LinearLayer, codes: Codes) -> Tensor:
        held = self.held[linear]
        weight = held.format.decode(codes[linear]) - held.weight
        if not linear.has_bias:
            return weight
        mean = self.local[linear].mean
        assert mean is not None
        bias = -self._moved(linear, codes) @ mean
        if linear in self.before.changes:
            bias = bias + self.before.changes[linear][:, -1]
        return torch.cat([weight, rounded(bias)[:, None]], dim=1)
