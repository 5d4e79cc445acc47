"""Wall time against a budget, what each stage cost, and progress for whoever is watching."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.model.runner import Work
from peelwise.records.base import CostRecord, StageCost
from peelwise.records.codes import Stage


@dataclass(frozen=True)
class Progress:
    """One report of progress: the stage, how far it is, and the seconds used and left at most."""

    stage: Stage
    done: int
    total: int
    elapsed_seconds: float
    left_seconds: float


Watcher = Callable[[Progress], None]


class Clock:
    """Knows how long the audit may still take and writes down what it has cost.

    Processes that share the work go by the clock of the first: what one of them had time for, all of them do.

    Args:
        budget_seconds: wall time allowed; stages ask before they start something.
        work: the counter of token passes, shared with the runner.
        watcher: told about every step.
        processes: those that share the work; all of them ask for the time at the same places.
    """

    def __init__(
        self, budget_seconds: float, work: Work, watcher: Watcher | None = None, processes: Processes = ONE_PROCESS
    ) -> None:
        self.budget = budget_seconds
        self.work = work
        self._watcher, self._processes = watcher, processes
        self._start = time.monotonic()
        self._stage: Stage = "self-checks"
        self.stages: dict[Stage, tuple[float, float]] = {}  # name -> seconds, token forwards

    @property
    def elapsed(self) -> float:
        """Seconds since the start, in the first process."""
        if self._processes.count == 1:
            return self._own
        return self._processes.broadcast_number(round(self._own * 1e6)) / 1e6

    @property
    def _own(self) -> float:
        """Seconds since the start in this process: where nothing is decided, and the others need not be asked."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left of the budget; negative when it is overdrawn."""
        return self.budget - self.elapsed

    def affords(self, seconds: float) -> bool:
        """Whether something that takes about so long can still be finished."""
        return seconds <= self.left

    def tell(self, done: int, total: int) -> None:
        """Report progress within the present stage."""
        if self._watcher is not None:
            elapsed = self._own
            self._watcher(Progress(self._stage, done, total, elapsed, max(self.budget - elapsed, 0.0)))

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Charge everything inside to ``name``; a name used again adds up."""
        began, worked, outer = self.elapsed, self.work.token_forwards, self._stage
        self._stage = name
        self.tell(0, 0)
        ended = None
        try:
            yield
            ended = self.elapsed
        finally:
            if ended is None:  # an error or Ctrl-C: the others need not come here
                ended = self._own
            seconds, forwards = self.stages.get(name, (0.0, 0.0))
            self.stages[name] = seconds + ended - began, forwards + self.work.token_forwards - worked
            self._stage = outer

    def record(self, probe_tokens: int, device: torch.device) -> CostRecord:
        """Return the whole cost; one forward equivalent is one pass over ``probe_tokens``."""
        stages = tuple(
            StageCost(name=name, wall_seconds=s, forward_equivalents=f / probe_tokens)
            for name, (s, f) in self.stages.items()
        )
        return CostRecord(
            forward_equivalents=self.work.token_forwards / probe_tokens,
            wall_seconds=self.elapsed,
            peak_bytes=peak_bytes(device),
            stages=stages,
        )


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the device if it is a CUDA one, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
