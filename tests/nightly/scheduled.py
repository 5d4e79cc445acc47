"""Train under a schedule, a map of rates and a witness in two processes, for test_scheduled."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from peelwise.act import BlockSchedule, RateMap, apply_witness_, param_groups, random_blocks
from plain_gpt import PlainGPT
from zoo import sample_ids

STEPS = 8
LAYER = "blocks.1.feed_forward.2"


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
    return whole(model), schedule.block_steps


def mapped(model: nn.Module, rank: int, ranks: list[int]) -> list[dict[str, torch.Tensor]]:
    """Train with rates that go by what a process measures; return weights then, with a witness, and without it."""
    optimizer = torch.optim.AdamW(param_groups(model, [1.0, 2.0, 3.0, 4.0], base_lr=1e-2))
    weights = [[4.0, 1.0, 2.0, 3.0], [1.0, 1.5, 9.0, 2.0]][rank]
    rates = RateMap(optimizer, lambda: weights, every=2)
    for step in range(STEPS):
        torch.stack([loss_of(model, step, each) for each in ranks]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    found = [whole(model)]
    applied = apply_witness_(model, {LAYER: witness()}, optimizer)
    found.append(whole(model))
    assert applied.revert()
    return [*found, whole(model)]


def witness() -> torch.Tensor:
    return torch.randn(48, 193, generator=torch.Generator().manual_seed(1))


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("module."): t.detach().clone() for name, t in model.state_dict().items()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def main(out: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for wrap in (replicated, sharded):
        for outer in ("always", "cut"):
            torch.save(train(wrap(fresh()), outer, [rank]), out / f"{wrap.__name__}-{outer}-{rank}.pt")
        torch.save(mapped(wrap(fresh()), rank, [rank]), out / f"{wrap.__name__}-mapped-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
