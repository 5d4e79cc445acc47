"""Signals of the low-bit layers of a run, beside each of a monitor's measurements: per block, with events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from peelwise.engine.signals import of_block, of_layer
from peelwise.evidence import events as alerts
from peelwise.formats.signals import LowBitSignals
from peelwise.model.layers import Block, unwrapped
from peelwise.model.weights.fakes import fake_quantisers
from peelwise.records.run import Event, Measurement, Statistic
from peelwise.records.signals import SIGNALS, Kind
from peelwise.tasks.monitor.codewatch import CodeWatch

_KINDS: tuple[Kind, ...] = ("codes",)
_STILL = 1e-5  # of a block's codes: almost none has flipped since the last measurement
_AGAIN = 2  # measurements in a row


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
        self._model, self._fakes = model, fake_quantisers(model)
        if self._watch is not None:
            self._watch.measure()  # what the first measurement is compared with

    def noted(self, row: Measurement) -> Measurement:
        """Return the row of a measurement with the signals of every low-bit block, and events, each told once."""
        row = self._with_switches(row)
        if self._watch is None:
            return row
        found = self._watch.measure()
        statistics, events = list(row.statistics), list(row.events)
        for block in self._blocks:
            own = {name: s for name, s in found.items() if name.startswith(f"{block.name}.")}
            if own:
                values = of_block(_KINDS, [of_layer(_KINDS, each) for each in own.values()])
                statistics += [Statistic(n, block.index, v) for n, v in values.items() if SIGNALS[n].in_history]
                events += self._events(row.step, block, own, values["codes_flipped"])
        return replace(row, statistics=tuple(statistics), events=tuple(events))

    def _with_switches(self, row: Measurement) -> Measurement:
        """Return the row with an event where fake quantisers are on that were off before, or the reverse."""
        before, self._fakes = self._fakes, fake_quantisers(self._model)
        if before == self._fakes:
            return row
        compiled = unwrapped(self._model) is not self._model or self._model._compiled_call_impl is not None
        event = alerts.fake_quantisers_switched(row.step, len(self._fakes.on), len(self._fakes.off), compiled=compiled)
        return replace(row, events=(*row.events, event))

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


def codes_flipped(of: LowBitSignals) -> float:
    """Return the share of codes that changed since the measurement before; none at the first one."""
    return of.flipped or 0.0


def near_threshold(of: LowBitSignals) -> float:
    """Return the share of latent weights that a small step can flip."""
    return of.near_threshold


def scale_drift(of: LowBitSignals) -> float:
    """Return the mean relative change of the scales since the measurement before."""
    return of.scale_drift or 0.0


def dead_rows(of: LowBitSignals) -> float:
    """Return the number of outputs all of whose weights are zero."""
    return float(of.dead_rows)
