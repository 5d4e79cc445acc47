"""Train replicas in two processes, for test_replicas: ``torchrun replicas.py OUT WATCHED``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import peelwise
from audits import tiny_probe
from peelwise.errors import UnsupportedModelError
from zoo import ZOO, sample_ids


def train(out: Path, *, watched: bool) -> None:
    """Train with DDP and leave each rank's weights."""
    rank = distributed.get_rank()
    model = ZOO["plain"]().train()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"budget": None, "schedule": peelwise.every(2), "store": out / "run.db"}
    monitor = peelwise.Monitor(wrapped, tiny_probe(), optimizer=optimizer, **options) if watched else None
    for step in range(7):
        ids = sample_ids(2, 13, seed=2 * step + rank)
        loss = cross_entropy(wrapped(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if monitor:
            found = monitor.step(step, loss=loss)
            assert (found is not None) == (rank == 0 and step % 2 == 0)
        optimizer.zero_grad()
    if monitor:
        monitor.close()
    torch.save(model.state_dict(), out / f"rank-{rank}-{watched}.pt")


def shard() -> None:
    """A sharded model is refused in every process, instead of waiting for ever."""
    from torch.distributed.fsdp import fully_shard

    model = ZOO["plain"]()
    fully_shard(model)
    with pytest.raises(UnsupportedModelError, match="Not yet: sharded models"):
        peelwise.Monitor(model, tiny_probe(), store=None)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    train(Path(sys.argv[1]), watched=False)
    train(Path(sys.argv[1]), watched=True)
    shard()
    distributed.destroy_process_group()
