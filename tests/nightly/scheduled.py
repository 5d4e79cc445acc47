"""Train under a schedule of blocks in two processes, for test_scheduled: ``torchrun scheduled.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from peelwise.act import BlockSchedule, random_blocks
from plain_gpt import PlainGPT
from zoo import sample_ids

STEPS = 8


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return PlainGPT(blocks=4)


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    ids = sample_ids(2, 13, seed=2 * step + rank)
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, outer: str, ranks: list[int]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train on the mean over the losses of some ranks; return weights and block-steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = BlockSchedule(model, optimizer, random_blocks(2), outer=outer, seed=3)  # type: ignore[arg-type]
    for step in range(STEPS):
        loss = torch.stack([loss_of(model, step, rank) for rank in ranks]).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    state = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}, schedule.block_steps


def main(out: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for wrap in (replicated, sharded):
        for outer in ("always", "cut"):
            torch.save(train(wrap(fresh()), outer, [rank]), out / f"{wrap.__name__}-{outer}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
