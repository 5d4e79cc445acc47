"""Pieces of work that need nothing of each other, dealt out over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from peelwise.distributed.processes import Processes

T = TypeVar("T")


class Shared(Generic[T]):
    """Pieces of work, each done in one process, its result known in all: one process alone does all, in their order.

    A piece goes to the process that has least to do so far. What a piece holds is let go at once where it is another
    process's, so that what waits takes about as much memory as in one process alone.

    Args:
        processes: those that share; all ask for the same pieces in the same order.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._loads = [0.0] * processes.count
        self._own: list[tuple[int, Callable[[], T]]] = []
        self._asked = 0

    def ask(self, cost: float, work: Callable[[], T]) -> bool:
        """Ask for one more piece, and return whether it is this process that will do it.

        Within what belongs together the dearest first shares most evenly.

        Args:
            cost: how long it takes beside the others, in any unit.
            work: does it when `results` are asked for; its result is pickled where there are several processes.
        """
        owner = min(range(self._processes.count), key=self._loads.__getitem__)
        self._loads[owner] += cost
        if owner == self._processes.rank:
            self._own.append((self._asked, work))
        self._asked += 1
        return owner == self._processes.rank

    def results(self) -> list[T]:
        """Do what is this process's and return what was asked for since the last call, in the order of asking."""
        own: dict[int, T] = {place: work() for place, work in self._own}
        found: dict[int, Any] = {place: each for part in self._processes.exchange(own) for place, each in part.items()}
        results = [found[place] for place in range(self._asked)]
        self._own, self._asked = [], 0
        return results
