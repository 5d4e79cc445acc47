"""Wall time against a budget, what each stage cost, and progress for whoever is watching."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

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

    Args:
        budget_seconds: wall time allowed; stages ask before they start something.
        work: the counter of token passes, shared with the runner.
        watcher: told about every step.
    """

    def __init__(self, budget_seconds: float, work: Work, watcher: Watcher | None = None) -> None:
        self.budget = budget_seconds
        self.work = work
        self._watcher = watcher
        self._start = time.monotonic()
        self._stage: Stage = "self-checks"
        self.stages: dict[Stage, tuple[float, float]] = {}  # name -> seconds, token forwards

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
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
            self._watcher(Progress(self._stage, done, total, self.elapsed, max(self.left, 0.0)))

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Charge everything inside to ``name``; a name used again adds up."""
        began, worked, outer = time.monotonic(), self.work.token_forwards, self._stage
        self._stage = name
        self.tell(0, 0)
        try:
            yield
        finally:
            seconds, forwards = self.stages.get(name, (0.0, 0.0))
            now = time.monotonic() - began, self.work.token_forwards - worked
            self.stages[name] = seconds + now[0], forwards + now[1]
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
