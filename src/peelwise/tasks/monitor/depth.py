"""The signals of a check beside a training run: of every block, as often as the budget pays for them, with history.

A measurement of a monitor has a few signals for nothing. Those that `peelwise check` compares over depth cost a pass or
a decomposition of their own, so they are taken after a measurement, and only what the budget pays for by then: first
those of the pass back, then those of the pass forward, then those of the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import nn

from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.look import stream_width
from peelwise.engine.depth.table import DepthTable, block_weights, joined, pass_table, weight_table
from peelwise.evidence.unlike import unlikeness
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.parts import Parts, parts_of
from peelwise.model.runner import Runner
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.records.run import Measurement
from peelwise.records.signals import FROM_BACKWARD, FROM_FORWARD, FROM_WEIGHTS, SIGNALS, Kind, of_kinds
from peelwise.tasks.monitor.own import OwnHistory
from peelwise.tasks.monitor.schedules import affordable

SCORE = "unlikeness"
# What is taken as one, the cheapest first.
_GROUPS: tuple[tuple[Kind, ...], ...] = (FROM_BACKWARD, FROM_FORWARD, FROM_WEIGHTS)
# Costs as long as they were never measured: passes forward over the tokens, and seconds per weight.
_PASSES = {FROM_BACKWARD: 6.0, FROM_FORWARD: 4.0, FROM_WEIGHTS: 0.0}
_PER_WEIGHT = 2e-7


class DepthSignals:
    """Follows the signals of a check through one run; the model is left as it was.

    Args:
        wanted: names of signals.
        budget: share of wall time that the monitor may take, or ``None`` for no limit.
        per_token: seconds of a forward pass.
    """

    def __init__(self, wanted: Collection[str], budget: float | None, per_token: float) -> None:
        self._wanted, self._budget, self._per_token = frozenset(wanted), budget, per_token
        self._costs: dict[tuple[Kind, ...], float] = {}
        self._history = OwnHistory()

    def noted(
        self,
        row: Measurement,
        model: nn.Module,
        blocks: Sequence[Block],
        probe: Probe,
        *,
        micro_batch_tokens: int,
        spent: float,
        elapsed: float,
    ) -> Measurement:
        """Return the row of a measurement with the signals that the budget pays for now.

        Args:
            row: of the measurement that was just made.
            model: in training.
            blocks: its blocks.
            probe: what it was measured on; signals are of its select part.
            micro_batch_tokens: tokens that go through the model at a time.
            spent: seconds that the monitor has taken so far.
            elapsed: seconds of the run.
        """
        chosen = self._affordable(blocks, probe, spent, elapsed)
        if not chosen:
            return row
        all_parts = [parts_of(block) for block in blocks]
        linears = [linear for block in blocks for linear in block.linears]
        with untouched(model), frozen(linears), torch.no_grad():
            runner = Runner(model, blocks, micro_batch_tokens=micro_batch_tokens)
            table = joined(*(self._taken(group, runner, all_parts, probe) for group in chosen))
        found = over_blocks(table)
        if set(chosen) == {group for group in _GROUPS if self._names(group)}:  # else scores jump with what is there
            gates = [len(gates_of(parts)) for parts in all_parts]
            scored = unlikeness(table.values, len(blocks), gates)
            if scored is not None:
                for block, score in enumerate(scored.scores):
                    found.setdefault(block, {})[SCORE] = float(score)
        return replace(row, statistics=(*row.statistics, *self._history.rows(row.step, found)))

    def _affordable(
        self, blocks: Sequence[Block], probe: Probe, spent: float, elapsed: float
    ) -> list[tuple[Kind, ...]]:
        """Return the groups that the budget pays for together; one that was never too dear comes before dearer ones."""
        chosen, cost = [], 0.0
        for group in _GROUPS:
            if not self._names(group):
                continue
            cost += self._costs.get(group, self._guess(group, blocks, probe))
            if self._budget is not None and not affordable(spent, cost, elapsed, self._budget):
                break
            chosen.append(group)
        return chosen

    def _guess(self, group: tuple[Kind, ...], blocks: Sequence[Block], probe: Probe) -> float:
        weights = sum(math.prod(linear.weight().shape) for block in blocks for linear in block.linears)
        of_weights = _PER_WEIGHT * weights if group == FROM_WEIGHTS else 0.0
        return _PASSES[group] * self._per_token * probe.select.tokens + of_weights

    def _names(self, group: tuple[Kind, ...]) -> list[str]:
        return [signal.name for signal in of_kinds(group) if signal.name in self._wanted]

    def _taken(self, group: tuple[Kind, ...], runner: Runner, all_parts: Sequence[Parts], probe: Probe) -> DepthTable:
        """Return one group's signals, and remember what they took."""
        began, names = time.monotonic(), self._names(group)
        if group == FROM_WEIGHTS:
            width = stream_width(all_parts)
            table = weight_table([block_weights(parts, width, names) for parts in all_parts], names)
        else:
            table = pass_table(runner, all_parts, runner.trace(probe.select), signals=names)
        self._costs[group] = time.monotonic() - began
        return table


def over_blocks(table: DepthTable) -> dict[int, dict[str, float]]:
    """Return block -> signal -> one value of all the block's parts: that of the part that says most.

    For a signal of one side the value farthest to that side; else the mean of quotients, and of differences the value
    farthest from 0.
    """
    found: dict[int, dict[str, list[float]]] = {}
    for (name, _), row in table.values.items():
        for block, value in enumerate(row):
            if value is not None:
                found.setdefault(block, {}).setdefault(name, []).append(value)
    return {block: {name: _one(name, values) for name, values in found[block].items()} for block in sorted(found)}


def _one(name: str, values: Sequence[float]) -> float:
    signal = SIGNALS[name]
    if signal.side != "both":
        return max(values) if signal.side == "high" else min(values)
    return sum(values) / len(values) if signal.quotient else max(values, key=abs)
