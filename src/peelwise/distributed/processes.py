"""Processes that hold one model share the work on a probe: each takes some of its sequences, and some of the solves.

Everything that a measurement adds up or compares passes through here: sums are added over all processes, losses are
put in the order in which one process alone would have them, and numbers that decide what is done next come from the
first process, so that all of them take the same path. A process that fails says so at the place where it would have
met the others, and all of them give the measurement up; nobody waits for somebody who is not coming. Ctrl-C stops all
of them at such a place too.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch import Tensor

from peelwise.distributed.watch import Watch
from peelwise.errors import OptionError, OtherProcessError, PeelwiseError

_PATIENCE = timedelta(minutes=5)  # processes may still be loading their model while others are ready
_LOSS = ("Connection closed by peer", "Connection reset by peer")  # what gloo says
_MADE = count()  # how many times this process has called for the others


class Processes:
    """One process by itself: nothing to add, nobody to tell."""

    rank, count = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def part(self, sequences: int) -> list[int | None]:
        """Return which sequences this process takes: as many for each, in their order, ``None`` where they run out.

        All processes run as many micro-batches then, which those of a sharded model must.
        """
        each = -(-sequences // self.count)
        mine = range(self.rank * each, (self.rank + 1) * each)
        return [place if place < sequences else None for place in mine]

    def rows(self, n: int) -> slice:
        """Return which of ``n`` rows this process takes where all hold all of them: about as many for each."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def all_reduce_(self, totals: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place."""

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one process after another."""
        return rows

    def exchange(self, value: Any) -> list[Any]:
        """Return what each process says, in their order; tensors in it come to this process's device."""
        return [value]

    def all_true(self, yes: bool) -> bool:
        """Return whether all processes say yes."""
        return yes

    def all_sum(self, numbers: Sequence[int]) -> list[int]:
        """Return whole numbers added up over all processes."""
        return list(numbers)

    def check_peers(self) -> None:
        """Wait for the others, unless one of them has failed; before they exchange something in a way of their own.

        Raises:
            OtherProcessError: If one has failed, inside of `agreeing`.
        """

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Wait inside for all processes in a way of their own, and end this one if another has failed meanwhile."""
        self.begin_gathering()
        try:
            yield
        finally:
            self.end_gathering()

    def begin_gathering(self) -> None:
        """Begin what `gathering` is about: see that nobody has failed, and be watched from now on."""

    def end_gathering(self) -> None:
        """End what `gathering` is about."""

    def broadcast(self, value: Any) -> Any:
        """Return what the first process says."""
        return value

    def broadcast_number(self, value: int) -> int:
        """Return the number that the first process says; a shorter way than `broadcast`, for every step."""
        return value

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run what is inside in all processes, or, as soon as one of them fails, end it in all.

        Raises:
            OtherProcessError: If it was another one.
        """
        yield

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C, inside of `agreeing`, stop all processes where they next meet: all have done the same until then.

        A second one stops this process at once.

        Raises:
            KeyboardInterrupt: In all of them.
        """
        yield

    def close(self) -> None:
        """Give up the connections that were made for this object; nothing is exchanged any more."""


ONE_PROCESS = Processes()


class TorchProcesses(Processes):
    """The processes of ``torch.distributed``, all of which call the same methods in the same order."""

    def __init__(self) -> None:
        from torch import distributed

        self._distributed = distributed
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self._watch = Watch(self._store, self._wait_for_all())
        # Decisions are numbers of the processor: telling them must not wait for what a GPU still computes.
        self._control = distributed.new_group(backend="gloo")
        self._agreeing = self._interrupted = False

    @property
    def _store(self) -> Any:
        return self._distributed.distributed_c10d._get_default_store()

    def _wait_for_all(self) -> str:
        """Raise if others do not come, which whatever is exchanged with them would wait for without end.

        Returns a name that is the same in all processes, and in no other group of theirs.
        """
        store, call = self._store, next(_MADE)
        keys = [f"peelwise/{call}/{rank}" for rank in range(self.count)]
        store.set(keys[self.rank], "here")
        try:
            store.wait(keys, _PATIENCE)
        except RuntimeError as error:  # torch's DistStoreError among them
            here = sum(store.check([key]) for key in keys)
            raise OptionError(
                f"Only {here} of {self.count} processes came to share a measurement within "
                f"{_PATIENCE.total_seconds():.0f} s. Make a monitor, or call an audit, in all of them, not only in "
                "the first: they share the work, and the first one writes."
            ) from error
        return str(call)

    def all_reduce_(self, totals: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place."""
        self.check_peers()
        for total in totals:
            self._distributed.all_reduce(total)

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one process after another."""
        counts = self._meet(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        self._distributed.all_gather(found, padded)
        return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)])

    def exchange(self, value: Any) -> list[Any]:
        """Return what each process says, in their order."""
        self.check_peers()
        packed = io.BytesIO()
        torch.save(value, packed)
        found: list[Any] = [None] * self.count
        self._distributed.all_gather_object(found, packed.getvalue(), group=self._control)
        return [value if rank == self.rank else _unpacked(each) for rank, each in enumerate(found)]

    def all_true(self, yes: bool) -> bool:
        """Return whether all processes say yes."""
        return not any(self._meet(int(not yes)))

    def all_sum(self, numbers: Sequence[int]) -> list[int]:
        """Return whole numbers added up over all processes."""
        self.check_peers()
        totals = torch.tensor(list(numbers), dtype=torch.int64)
        self._distributed.all_reduce(totals, group=self._control)
        return [int(total) for total in totals]

    def broadcast(self, value: Any) -> Any:
        """Return what the first process says."""
        self.check_peers()
        values = [value if self.is_main else None]
        self._distributed.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def broadcast_number(self, value: int) -> int:
        """Return the number that the first process says; a shorter way than `broadcast`, for every step."""
        if self._agreeing:
            return self._meet(value)[0]
        number = torch.tensor([value])
        self._distributed.broadcast(number, src=0, group=self._control)
        return int(number)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run what is inside in all processes, or, as soon as one of them fails, end it in all."""
        self._agreeing = True
        self._watch.begin()
        try:
            yield
            self.check_peers()
        except OtherProcessError:
            raise
        except Exception as error:
            if self._agreeing:
                self._tell(error)
            raise
        finally:
            self._agreeing = False
            self._watch.until_now()

    def _tell(self, error: Exception) -> None:
        """Tell the others that this process has failed, unless they are gone.

        Raises:
            OtherProcessError: If it failed because one of them is.
        """
        try:
            self._watch.failed(self.rank, f"{type(error).__name__}: {error}")
            self._told(0, failed=True)
            self._reasons(error)
        except RuntimeError:  # whoever has ended can be told nothing
            if _is_loss(error):
                raise OtherProcessError(None, "killed, or out of memory?", foreseen=True) from error

    def begin_gathering(self) -> None:
        """See that nobody has failed, and be watched from now on."""
        self.check_peers()
        if self._agreeing:
            self._watch.since_now()

    def end_gathering(self) -> None:
        """Note that what was gathered is here."""
        self._watch.until_now()

    def check_peers(self) -> None:
        """Wait for the others, unless one of them has failed."""
        if self._agreeing:
            self._meet(0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C stop all processes where they next meet."""
        # Handlers are the main thread's to set, and whoever has put in another one wants that.
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._interrupted = False

    def _note_interrupt(self, *_: object) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def close(self) -> None:
        """Give up the connections that were made for this object."""
        self._watch.close()
        self._distributed.destroy_process_group(self._control)

    def _meet(self, number: int) -> list[int]:
        """Return what number each process says, unless one of them has failed or is to stop."""
        failed, interrupted, *numbers = self._told(number)
        if failed and self._agreeing:
            self._agreeing = False
            raise next(reason for reason in self._reasons(None) if reason is not None)
        if interrupted and self._agreeing:
            self._interrupted = False
            raise KeyboardInterrupt
        return numbers

    def _told(self, number: int, *, failed: bool = False) -> list[int]:
        """Return how many processes have failed, how many are to stop, and a number from each: one exchange for all.

        Whoever has failed meets the others here wherever they are, so it is always of one size.
        """
        told = torch.zeros(2 + self.count, dtype=torch.int64)
        told[0], told[1], told[2 + self.rank] = failed, self._interrupted, number
        self._distributed.all_reduce(told, group=self._control)
        return [int(each) for each in told]

    def _reasons(self, error: Exception | None) -> Sequence[OtherProcessError | None]:
        reasons: list[Any] = [None] * self.count
        foreseen = isinstance(error, PeelwiseError)
        mine = None if error is None else (self.rank, f"{type(error).__name__}: {error}", foreseen)
        self._distributed.all_gather_object(reasons, mine, group=self._control)
        return [None if reason is None else OtherProcessError(*reason) for reason in reasons]


def _is_loss(error: Exception) -> bool:
    """Whether an error says that the connection to another process has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOSS)


def _unpacked(packed: bytes) -> Any:
    def here(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.cuda()

    return torch.load(io.BytesIO(packed), map_location=here, weights_only=False)  # from a process of our own


def check_same(processes: Processes, own: object) -> None:
    """Check that all processes hold the same model and probe.

    Args:
        processes: those that are about to share the work.
        own: what tells model and probe of this process.

    Raises:
        OptionError: If one of them holds another one.
    """
    if not processes.all_true(processes.broadcast(own) == own):
        raise OptionError(
            "The processes hold different models or probes, which is not supported (pipeline parallel?). "
            "Make the same probe, with the same seed, in all of them."
        )


def current_processes() -> Processes:
    """Return the processes that work together, or this one alone; to be called in all of them at once."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return TorchProcesses()
    return ONE_PROCESS


@contextmanager
def together() -> Iterator[Processes]:
    """Yield `current_processes` for as long as one measurement takes."""
    processes = current_processes()
    try:
        yield processes
    finally:
        processes.close()
