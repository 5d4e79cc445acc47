"""Signals of the low-bit layers of a run, beside each of a monitor's looks: per block, with events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from peelwise.evidence import events as alerts
from peelwise.formats.signals import LowBitSignals
from peelwise.model.layers import Block
from peelwise.records.run import Event, Measurement, Statistic
from peelwise.tasks.monitor.codewatch import CodeWatch

# Names in the run history; means over the block's layers, but for the number of dead outputs.
SIGNALS = ("codes_flipped", "near_threshold", "scale_drift", "dead_rows")
_STILL = 1e-5  # of a block's codes: almost none has flipped since the last measurement
_AGAIN = 2  # looks in a row


class CodeSignals:
    """Follows the codes of a model's low-bit blocks; does nothing for a model that has none.

    Args:
        model: the module in training.
        blocks: its blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
        low_bit = any(linear.low_bit for block in blocks for linear in block.linears)
        self._watch = CodeWatch(model) if low_bit and not sharded else None
        self._blocks = blocks
        self._still = [0] * len(blocks)
        self._told: set[tuple[str, int]] = set()
        if self._watch is not None:
            self._watch.look()  # what the first look is compared with

    def noted(self, row: Measurement) -> Measurement:
        """Return the row of a look with the signals of every low-bit block, and events, each told once."""
        if self._watch is None:
            return row
        found = self._watch.look()
        statistics, events = list(row.statistics), list(row.events)
        for block in self._blocks:
            own = {name: s for name, s in found.items() if name.startswith(f"{block.name}.")}
            if own:
                values = _of_block(list(own.values()))
                statistics += [Statistic(name, block.index, v) for name, v in values.items()]
                events += self._events(row.step, block, own, values["codes_flipped"])
        return replace(row, statistics=tuple(statistics), events=tuple(events))

    def _events(self, step: int, block: Block, own: dict[str, LowBitSignals], flipped: float) -> Iterator[Event]:
        at = block.index
        self._still[at] = self._still[at] + 1 if flipped < _STILL else 0
        if self._still[at] >= _AGAIN and self._first("codes-still", at):
            yield alerts.codes_still(step, at, _AGAIN + 1)
        worst = max(own, key=lambda name: own[name].dead_rows)
        dead = own[worst].dead_rows
        if dead and self._first("dead-rows", at):
            yield alerts.dead_rows(step, at, dead, worst.removeprefix(f"{block.name}."))

    def _first(self, kind: str, block: int) -> bool:
        new = (kind, block) not in self._told
        self._told.add((kind, block))
        return new


def _of_block(signals: list[LowBitSignals]) -> dict[str, float]:
    """Return the signals of a block: means over its layers, and the sum of its dead outputs."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "codes_flipped": mean([s.flipped or 0.0 for s in signals]),
        "near_threshold": mean([s.near_threshold for s in signals]),
        "scale_drift": mean([s.scale_drift or 0.0 for s in signals]),
        "dead_rows": float(sum(s.dead_rows for s in signals)),
    }
