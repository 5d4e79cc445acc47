"""Fit one reference block to a station: closed-form solves of its output projections, steps on the rest.

The error is the share of the station's variance that is left unexplained, on predicted tokens:

    err = mean_tokens mean_j w_j (T_j - A_j)^2,    w_j = 1 / Var(T_j)   (or 1 / mean variance, unweighted)

so 1 is what predicting the mean gives. One round solves each output projection in closed form, in the order in
which the block runs them, then takes one whitened step on all other linear maps; low-bit maps get the codes nearest to
these (`peelwise.tasks.peel.fit_coded`). Every change is accepted by what it does to the error on select, and rounds go
on until select stops improving.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.engine.proposals import BlockProposals, proposals_of
from peelwise.errors import IllConditionedWarning
from peelwise.model.capture import captured
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Batch, Trace
from peelwise.references.station import best_change
from peelwise.tasks.peel.fit_coded import solve_inside, step_inside
from peelwise.tasks.peel.reference_block import ReferenceBlock
from peelwise.tasks.peel.station_error import StationError, Target

# An output projection adds its output to the block's, so a nudge there comes out again nearly as it went in.
_WRITES = 0.3
_NUDGE = 1e-2
_FIRST_GAIN = 0.2  # the first step tried is the one that would win this part of the error, were the error linear
_ENOUGH = 1e-9  # unexplained share below which a block already is its target
_FLOOR = 1e-4  # least variance of a coordinate, in units of the mean: dead coordinates are not worth infinitely much


@dataclass(frozen=True)
class FitOptions:
    """How hard a reference block is fitted.

    Attributes:
        rounds: most rounds of solves and steps.
        steps: whether the maps that do not write into the residual stream are moved too.
        tolerance: smallest relative improvement on select that is worth another round.
        dense: whether references of low-bit maps may leave their formats.
    """

    rounds: int = 3
    steps: bool = True
    tolerance: float = 0.01
    dense: bool = False


@dataclass(frozen=True)
class Fitted:
    """How well a reference block hits its station: unexplained share of its variance, on fit and select."""

    fit_error: float
    select_error: float
    start_error: float
    rounds: int


def coordinate_weights(trace: Trace, stations: list[Tensor], *, weighted: bool) -> Tensor:
    """Return ``w [d]``, float64: inverse variance of each coordinate of a station over the predicted tokens.

    Args:
        trace: says which tokens are predicted.
        stations: the station, one ``[b, t, d]`` per batch.
        weighted: false gives every coordinate the inverse of the mean variance, the plain squared error.
    """
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch, station in zip(trace.batches, stations, strict=True):
        rows = station[batch.weights].double()  # [n, d]
        n, total, squares = n + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    variance = (squares / n - (total / n).square()).clamp_min(0.0)  # [d]
    mean = variance.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return 1.0 / variance.clamp_min(_FLOOR * mean) if weighted else torch.ones_like(variance) / mean


def fit_block(
    runner: Runner, reference: ReferenceBlock, fit: Trace, select: Trace, target: Target, options: FitOptions
) -> Fitted:
    """Fit ``reference`` in place; its input is the last station that ``fit`` and ``select`` hold.

    Args:
        runner: of the model, for the way its blocks are called.
        reference: the block, at its start.
        fit, select: traces of the reference stack up to and including the block's input.
        target: the station to hit.
        options: how hard to try.
    """
    problem = StationError(runner, reference, fit, select, target)
    start = error = problem.select_error()
    rounds = 0
    if start > _ENOUGH:
        writers = find_writers(runner, reference.block, fit.batches[0])
        while rounds < options.rounds:
            before, rounds = error, rounds + 1
            for linear in writers:
                error = _solve(problem, linear, error)
            others = tuple(m for m in reference.block.linears if m not in writers)
            if options.steps and others:
                error = _step(problem, others, error)
            if error > (1 - options.tolerance) * before:
                break
    return Fitted(problem.error(fit, target.fit), error, start, rounds)


@torch.no_grad()
def find_writers(runner: Runner, block: Block, batch: Batch) -> list[LinearLayer]:
    """Return the maps that write into the residual stream, in the order in which they run.

    A small random nudge ``delta`` is added to a map's output. Where the map's output is added to the block's,
    the block's output changes by ``delta`` and little else; any other map scatters it:

        cos(delta, change of the block's output) > 0.3
    """
    hidden = batch.stations[block.index]
    with captured(block.linears) as capture:
        plain = runner.run_block(block, hidden, batch)
    scale = _NUDGE * float(plain.float().std())
    generator = torch.Generator().manual_seed(0)
    found = []
    for linear, calls in capture.calls.items():
        y = calls[0].y
        if len(calls) > 1 or y.numel() != plain.numel() or y.shape[-1] != plain.shape[-1]:
            continue
        delta = (scale * torch.randn(y.shape, generator=generator)).to(y)
        handle = linear.module.register_forward_hook(lambda _m, _x, out, d=delta: out + d)
        try:
            change = (runner.run_block(block, hidden, batch) - plain).double().flatten()
        finally:
            handle.remove()
        pushed = delta.double().flatten()
        norm = float(change.norm() * pushed.norm())
        if norm > 0 and float(pushed @ change) / norm > _WRITES:
            found.append(linear)
    return found


def _solve(problem: StationError, linear: LinearLayer, error: float) -> float:
    """Solve one output projection in closed form; the step is 1 unless the rest of the block objects."""
    fit = problem.sums(problem.fit, problem.target.fit, linear)
    select = problem.sums(problem.select, problem.target.select, linear)
    with quiet_rank():
        found = best_change(fit, select, problem.target.weights, name=linear.name)
    if found.decrease <= 0:
        return error
    if linear in problem.reference.held:
        return solve_inside(problem, linear, fit, select, found, error)
    slope = found.slope / len(problem.target.weights)
    return problem.search({linear: found.change}, error, 1.0, slope=slope, evaluations=4)


def _step(problem: StationError, linears: tuple[LinearLayer, ...], error: float) -> float:
    """Take one whitened step on dense maps that have no closed form, then one of codes on those inside a format."""
    with quiet_rank():
        fit = problem.moments(problem.fit, problem.target.fit, linears)
        select = problem.moments(problem.select, problem.target.select, linears)
        proposals = proposals_of(problem.part(linears), [fit], select, ("two-sided",))[0]
    error = _dense_step(problem, proposals, error)
    return step_inside(problem, proposals, error)


def _dense_step(problem: StationError, proposals: BlockProposals, error: float) -> float:
    found = {m: p for m, p in proposals.changes["two-sided"].items() if m not in problem.reference.held}
    slope = sum(p.slope for p in found.values())
    if slope <= 0:
        return error
    steps = {linear: p.change for linear, p in found.items()}
    return problem.search(steps, error, _FIRST_GAIN * error / slope, slope=slope, evaluations=7)


def quiet_rank() -> warnings.catch_warnings[None]:
    """Return a context in which rank deficiency is no finding: a reference says nothing about the model's layers."""
    return warnings.catch_warnings(action="ignore", category=IllConditionedWarning)
