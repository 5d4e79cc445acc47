"""Train in two processes, for test_replicas: ``torchrun replicas.py OUT``."""

from __future__ import annotations

import pickle
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import peelwise
from audits import tiny_probe
from peelwise.distributed import processes
from peelwise.errors import OptionError, OtherProcessError, UnsupportedModelError
from peelwise.tasks.monitor import measure as measuring
from zoo import ZOO, sample_ids

STEPS = 7


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def train(wrap, out: Path, *, watched: bool) -> dict[str, torch.Tensor]:
    """Train, also over two micro-batches before a step, and return the weights."""
    model = wrap(ZOO["plain"]().train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"budget": None, "schedule": peelwise.every(2), "store": out / f"{wrap.__name__}.db"}
    monitor = peelwise.Monitor(model, tiny_probe(), optimizer=optimizer, **options) if watched else None
    for step in range(STEPS):
        for part in range(2):
            if wrap is sharded and part == 0:
                model.set_requires_gradient_sync(False)  # gradients of the first wait for the second
            ids = sample_ids(2, 13, seed=4 * step + 2 * part + distributed.get_rank())
            loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            if wrap is sharded:
                model.set_requires_gradient_sync(True)
            if monitor and part == 0 and step == 3:
                assert monitor.step(100) is not None  # in the middle of an accumulation
        if monitor and step == 1:
            assert monitor.step(102) is not None  # before the step: what was gathered for it must not be used after it
        optimizer.step()
        found = monitor.step(step, loss=loss) if monitor else None
        assert (found is not None) == (watched and step % 2 == 0)
        optimizer.zero_grad()
    if monitor:
        assert not {"not-measured", "non-finite", "dead-units"} & {event.kind for event in monitor.events}
        monitor.close()
    return whole(model)


def look(wrap) -> list:
    """Look at a model that stands still, in float64; how many blocks are refined is left to no clock."""
    measuring._affordable = lambda session, order, *_: list(order)
    model = wrap(ZOO["plain"]().double())
    with peelwise.Monitor(model, tiny_probe(), budget=None, schedule=peelwise.every(1), store=None) as monitor:
        return [monitor.step(step) for step in range(4)]


def fail(wrap) -> None:
    """One process fails in the middle of a look: all give it up and go on, and none waits for it."""
    kept, rank = measuring.sweep, distributed.get_rank()

    def broken(*args, **options):
        if rank == 1:
            raise ZeroDivisionError("nothing to divide by")
        return kept(*args, **options)

    model = wrap(ZOO["plain"]())
    with peelwise.Monitor(model, tiny_probe(), budget=None, schedule=peelwise.every(1), store=None) as monitor:
        measuring.sweep = broken
        try:
            assert monitor.step(0) is None
        finally:
            measuring.sweep = kept
        assert monitor.step(1) is None
        if rank == 0:
            (event,) = [event for event in monitor.events if event.kind == "not-measured"]
            assert "Process 1 failed: ZeroDivisionError: nothing to divide by. It is tried again later." in event.text


def refuse(out: Path) -> None:
    """What cannot be shared is refused in all processes, instead of waiting for ever."""
    model, rank = ZOO["plain"](), distributed.get_rank()
    with pytest.raises(OptionError, match="different models or probes"):
        peelwise.Monitor(model, tiny_probe(seed=rank), store=None)
    with pytest.raises((OptionError, OtherProcessError), match="nonsense"):
        peelwise.Monitor(model, tiny_probe(), store=None, loggers=["nonsense"] if rank == 0 else [])
    with peelwise.Monitor(model, tiny_probe(), store=out / "none" / "run.db") as monitor:
        assert not monitor.recorded
        assert [event.kind for event in monitor.events] == ["not-recorded"] * (rank == 0)
    with pytest.raises(UnsupportedModelError, match="Call fully_shard on every block"):
        peelwise.Monitor(fully_shard(model), tiny_probe(), store=None)


def forget() -> None:
    """A monitor in one process only is an error, not a wait for ever; last of all, because processes then miscount."""
    processes._PATIENCE = timedelta(seconds=1)
    if distributed.get_rank() == 0:
        with pytest.raises(OptionError, match="Only 1 of 2 processes came to share a measurement within 1 s"):
            peelwise.Monitor(ZOO["plain"](), tiny_probe(), store=None)
    distributed.barrier()


def pace() -> None:
    """The first process's clock decides for both: they look at the same steps."""
    with peelwise.Monitor(replicated(ZOO["plain"]()), tiny_probe(), budget=0.5, store=None) as monitor:
        steps = []
        for step in range(100_000):
            time.sleep(0.01)  # the training
            if monitor.step(step) is not None:
                steps.append(step)
            if len(steps) == 2:
                break
    both = [None, None]
    distributed.all_gather_object(both, steps)
    assert both[0] == both[1]


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), distributed.get_rank()
    for wrap in (replicated, sharded):
        weights = [train(wrap, folder, watched=watched) for watched in (False, True)]
        torch.save(weights, folder / f"{wrap.__name__}-{rank}.pt")
        (folder / f"{wrap.__name__}-{rank}.pickle").write_bytes(pickle.dumps(look(wrap)))
    fail(replicated)
    fail(sharded)
    refuse(folder)
    pace()
    forget()
    distributed.destroy_process_group()
