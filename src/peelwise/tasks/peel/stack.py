"""The stack of reference blocks along one map, with its own stations on the three parts of the probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.references.maps import StationMap
from peelwise.tasks.peel.reference_block import ReferenceBlock


class Stack:
    """Stations ``A_0 = H_0, A_1, .., A_l`` of the references of one prefix of a map.

    Only the stations of the present path are alive; a prefix that is left is forgotten, and run again from
    its references' changes if it comes back.

    Args:
        runner: of the model.
        traces: the model's own traces by part of the probe; read, never changed.
    """

    def __init__(self, runner: Runner, traces: Mapping[str, Trace]) -> None:
        self.runner = runner
        self.prefix: StationMap = ()
        self.traces = {
            part: replace(
                trace, batches=[replace(b, stations=b.stations[:1], calls=list(b.calls)) for b in trace.batches]
            )
            for part, trace in traces.items()
        }

    @property
    def depth(self) -> int:
        """Number of reference blocks in the stack."""
        return len(self.prefix)

    def cut(self, depth: int) -> None:
        """Forget the references from ``depth`` on."""
        self.prefix = self.prefix[:depth]
        for trace in self.traces.values():
            for batch in trace.batches:
                del batch.stations[depth + 1 :]

    @torch.no_grad()
    def push(self, station: int, reference: ReferenceBlock) -> None:
        """Run one more reference block on all parts and keep its output."""
        block = reference.block
        for trace in self.traces.values():
            for batch in trace.batches:
                self.runner.advance(block, batch)
            self.runner.work.add(self.runner.shares[block.index], trace.predicted)
        self.prefix = (*self.prefix, station)
