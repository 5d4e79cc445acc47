"""What a reference block is fitted on: its inputs, the station it is to hit, and the error there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.engine.sweep import block_moments, token_rows
from peelwise.model.capture import captured
from peelwise.model.handed import Gradient
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Batch, Trace
from peelwise.references.station import StationSums
from peelwise.references.step_search import search_step
from peelwise.stats.gram import CrossSum, GramSum, Moments
from peelwise.tasks.peel.reference_block import ReferenceBlock, State


@dataclass(frozen=True)
class Target:
    """What a reference block regresses to: a station on fit and select, ``[b, t, d]`` per batch, and weights."""

    fit: list[Tensor]
    select: list[Tensor]
    weights: Tensor  # [d], mean_j w_j Var_j = 1


class StationError:
    """One block, its inputs, its target: evaluates the error and counts the work."""

    def __init__(self, runner: Runner, reference: ReferenceBlock, fit: Trace, select: Trace, target: Target) -> None:
        self.runner, self.reference = runner, reference
        self.fit, self.select, self.target = fit, select, target

    @torch.no_grad()
    def error(self, trace: Trace, stations: list[Tensor]) -> float:
        """Return the unexplained share on a part of the probe."""
        total, w = 0.0, self.target.weights
        for batch, out, wanted in self._outputs(trace, stations):
            missing = (wanted - out)[batch.weights].double()  # [n, d]
            total += float(missing.square().sum(0) @ w)
        return total / trace.predicted / len(w)

    def select_error(self) -> float:
        """Return the error on select, which makes every choice."""
        return self.error(self.select, self.target.select)

    @torch.no_grad()
    def sums(self, trace: Trace, stations: list[Tensor], linear: LinearLayer) -> StationSums:
        """Return the sums of one output projection: its inputs against what the block's output lacks."""
        S, R = GramSum(), CrossSum()
        for batch, wanted in zip(trace.batches, stations, strict=True):
            with captured((linear,)) as capture:
                out = self._run(batch)
            (call,) = capture.calls[linear]
            x = token_rows(call.x, call, batch, linear)  # [n, d_in (+1)]
            S.update(x)
            R.update((wanted - out)[batch.weights], x)
        return StationSums(S.mean(), R.mean())

    def moments(
        self, trace: Trace, stations: list[Tensor], linears: tuple[LinearLayer, ...]
    ) -> dict[LinearLayer, Moments]:
        """Return the moments of some linear layers, with gradients of the error."""
        w = 2 * self.target.weights / len(self.target.weights)
        gradients = []
        with torch.no_grad():
            for batch, out, wanted in self._outputs(trace, stations):
                gradients.append(Gradient((out - wanted) * w.to(out) * batch.weights[..., None]))
        part = self.part(linears)
        return block_moments(self.runner, part, trace, [gradients], keep=True, with_F=True)[0][0]

    def part(self, linears: tuple[LinearLayer, ...]) -> Block:
        """Return the reference block as if it had only these maps."""
        block = self.reference.block
        return Block(block.index, block.name, block.module, linears)

    def search(
        self, steps: Mapping[LinearLayer, Tensor], error: float, start: float, *, slope: float, evaluations: int
    ) -> float:
        """Move the block by the best multiple of ``steps`` on select, or leave it; return its error.

        Args:
            steps: change per map.
            error: on select, at step 0.
            start: the step to try first.
            slope: decrease of the error per unit of step at step 0.
            evaluations: most evaluations of the error.
        """
        before = self.reference.state
        choice = search_step(
            lambda step: self.error_at(before.moved(steps, step)), error, start, slope=slope, evaluations=evaluations
        )
        self.reference.set(before.moved(steps, choice.step) if choice.step else before)
        return choice.loss

    def error_at(self, state: State) -> float:
        """Put the block at ``state`` and return its error on select."""
        self.reference.set(state)
        return self.select_error()

    def _outputs(self, trace: Trace, stations: list[Tensor]) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        for batch, wanted in zip(trace.batches, stations, strict=True):
            yield batch, self._run(batch), wanted

    def _run(self, batch: Batch) -> Tensor:
        block = self.reference.block
        self.runner.work.add(self.runner.shares[block.index], float(batch.weights.sum()))
        return self.runner.run_block(block, batch.stations[block.index], batch)
