"""The table of signals over depth: which signal has which value at which part of which block."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from peelwise.engine.depth.backward import head_slopes
from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.passes import observe
from peelwise.engine.depth.weights import (
    Sketch,
    gain_sketch,
    gains_of,
    matrices_of,
    neurons_of,
    sketch,
)
from peelwise.model.parts import Parts
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.records.signals import FROM_BACKWARD, FROM_FORWARD, SIGNALS, Kind, Signal, of_kinds

# Those that need the gradient of a weight, not only that of what it gives.
OF_WEIGHTS = frozenset(
    {"weight_gradient_norm", "gradient_rank", "fisher_trace", "gradient_alignment", "gradient_sharpness"}
)
BLOCK = ""  # the part of a signal that is one of the whole block


@dataclass
class DepthTable:
    """Values of signals by ``(signal, part)``, one per block; ``None`` where a block has none.

    A part is a linear layer or norm by its name within the block, a branch, or `BLOCK` for the block as a whole.
    ``heads`` are the gain slopes of attention's heads by block, where a pass backward saw them.
    """

    blocks: int
    values: dict[tuple[str, str], list[float | None]] = field(default_factory=dict)
    heads: dict[int, list[float]] = field(default_factory=dict)

    def put(self, signal: str, part: str, block: int, value: float | None) -> None:
        """Set one value; ``None``, and what is not a finite number, leave the place empty."""
        if value is not None and math.isfinite(value):
            self.values.setdefault((signal, part), [None] * self.blocks)[block] = value

    def of_block(self, block: int) -> dict[str, float]:
        """Return a block's signals as records hold them: by ``signal.part``, or ``signal`` for the block as a whole."""
        return {
            f"{signal}.{part}" if part != BLOCK else signal: value
            for (signal, part), row in self.values.items()
            if (value := row[block]) is not None
        }


@dataclass(frozen=True)
class BlockWeights:
    """What the weights of one block say: values by ``(signal, part)``, and sketches to compare with other blocks'."""

    values: dict[tuple[str, str], float]
    sketches: dict[str, Sketch]


def block_weights(parts: Parts, width: int, signals: Collection[str] = tuple(SIGNALS)) -> BlockWeights:
    """Return what the weights of one block say.

    Args:
        parts: of the block.
        width: channels of the residual stream.
        signals: names of those wanted.
    """
    matrices, gains, neurons = matrices_of(parts), gains_of(parts), neurons_of(parts)
    of: list[tuple[Kind, str, Any]] = [("matrix", part, matrix) for part, matrix in matrices.items()]
    of += [("gain", part, gain) for part, gain in gains.items()]
    of += [("neurons", part, each) for part, each in neurons.items()]
    values = {}
    for kind, part, each in of:
        for signal in _wanted([kind], signals):
            value = _function(signal)(each)
            if value is not None and math.isfinite(value):
                values[signal.name, part] = value
    sketches = {part: sketch(matrix, width) for part, matrix in matrices.items()}
    return BlockWeights(values, sketches | {part: gain_sketch(gain, width) for part, gain in gains.items()})


def weight_table(blocks: Sequence[BlockWeights], signals: Collection[str] = tuple(SIGNALS)) -> DepthTable:
    """Return the signals of the weights of all blocks, those that compare blocks with each other among them."""
    table = DepthTable(len(blocks))
    kin: dict[str, dict[int, Sketch]] = {}
    for index, block in enumerate(blocks):
        for (signal, part), value in block.values.items():
            table.put(signal, part, index, value)
        for part, each in block.sketches.items():
            kin.setdefault(part, {})[index] = each
    for part, sketches in kin.items():
        for one in _wanted(["kin"], signals):
            found = _function(one)(list(sketches.values()))
            for index, value in zip(sketches, found, strict=True):
                table.put(one.name, part, index, value)
    return table


def pass_table(
    runner: Runner,
    all_parts: Sequence[Parts],
    trace: Trace,
    *,
    gradients: bool = True,
    signals: Collection[str] = tuple(SIGNALS),
    after_block: Callable[[int], None] = lambda done: None,
) -> DepthTable:
    """Return the signals of one pass forward and, with ``gradients``, one backward.

    Args:
        runner: the model.
        all_parts: the parts of all blocks, in order.
        trace: tokens, with stations.
        gradients: also differentiate the loss.
        signals: names of those wanted; what none of them needs is not done.
        after_block: called with the number of blocks done.
    """
    table = DepthTable(len(all_parts))
    if not any(_wanted([*FROM_FORWARD, *FROM_BACKWARD], signals)):
        return table
    gradients = gradients and any(_wanted(FROM_BACKWARD, signals))
    products: dict[int, Tensor] = {}
    of_weights = not OF_WEIGHTS.isdisjoint(signals)
    passes = observe(runner, all_parts, trace, gradients=gradients, of_weights=of_weights, after_block=after_block)
    processes = runner.processes
    for parts, seen in passes:
        index = parts.block.index
        gates = [torch.cat(seen.backward[name].gate.per_token) for name in gates_of(parts) if name in seen.backward]
        if gates:
            products[index] = torch.stack(gates, dim=1)
        if index % processes.count != processes.rank:
            continue  # all have seen it, one works out what it says
        _put(table, ["stream"], BLOCK, index, signals, seen.stream)
        for branch, update in seen.stream.updates.items():
            _put(table, ["update"], branch, index, signals, seen.stream, update)
        for part, found in seen.backward.items():
            _put(table, ["gate"], part, index, signals, found)
            slopes = head_slopes(found)
            if slopes is not None:
                table.heads[index] = slopes.tolist()
    if processes.count > 1:
        table = _of_all(processes.exchange(table))
    for signal in _wanted(["joint"], signals):
        for index, value in _function(signal)(products).items():
            table.put(signal.name, BLOCK, index, value)
    return table


def _of_all(tables: Sequence[DepthTable]) -> DepthTable:
    """Return one table of several that hold the same signals of different blocks."""
    whole = DepthTable(tables[0].blocks)
    for table in tables:
        for (signal, part), row in table.values.items():
            for block, value in enumerate(row):
                whole.put(signal, part, block, value)
        whole.heads |= table.heads
    return whole


def joined(*tables: DepthTable) -> DepthTable:
    """Return one table with the signals of several, of the same blocks."""
    values = {key: row for table in tables for key, row in table.values.items()}
    heads = {block: slopes for table in tables for block, slopes in table.heads.items()}
    return DepthTable(tables[0].blocks, values, heads)


def _put(table: DepthTable, kinds: Collection[Kind], part: str, block: int, signals: Collection[str], *of: Any) -> None:
    for signal in _wanted(kinds, signals):
        table.put(signal.name, part, block, _function(signal)(*of))


def _wanted(kinds: Collection[Kind], signals: Collection[str]) -> Iterator[Signal]:
    return (signal for signal in of_kinds(kinds) if signal.name in signals)


@cache
def _resolved(function: str) -> Callable[..., Any]:
    found: Callable[..., Any] = resolve_name(function)
    return found


def _function(signal: Signal) -> Callable[..., Any]:
    return _resolved(signal.function)
