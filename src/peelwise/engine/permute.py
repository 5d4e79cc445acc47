"""Targets and stations dealt out to other sequences, for the shuffled controls.

Every sequence gets those of another one, the order within is kept. Where the other one is shorter, its last real
position is repeated: padding never becomes a target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.engine.sweep import Targets
from peelwise.model.trace import Trace

Shuffle = Callable[[list[Tensor]], list[Tensor]]


def partner_order(sequences: int, seed: int, *, shift_first: bool = False) -> Tensor:
    """Return a permutation ``[sequences]`` that leaves no sequence in its place (where there are two or more).

    Args:
        sequences: how many there are.
        seed: of the draw.
        shift_first: audits draw the shift before the order, peels after it: what is on record can be drawn again.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn_shift() -> int:
        return int(torch.randint(1, max(sequences, 2), (1,), generator=generator))

    shift = drawn_shift() if shift_first else None
    order = torch.randperm(sequences, generator=generator)
    partner = torch.empty_like(order)
    # A rotation of a random order leaves no sequence in its place.
    partner[order] = order.roll(drawn_shift() if shift is None else shift)
    return partner


def shuffled_stations(
    trace: Trace, seed: int, *, shift_first: bool = False, processes: Processes = ONE_PROCESS
) -> Shuffle:
    """Return a function that gives every sequence of a trace another one's station, position by position.

    Args:
        trace: the sequences.
        seed: of the draw.
        shift_first: see `partner_order`.
        processes: those that share the trace; partners are drawn among the sequences of all.
    """
    sequences = len(trace.tokens)
    lengths = processes.all_gather(torch.cat([batch.read.sum(dim=1) for batch in trace.batches]))[:sequences]
    partner = partner_order(sequences, seed, shift_first=shift_first).to(lengths.device)
    own = torch.tensor([place or 0 for place in processes.part(sequences)], device=lengths.device)
    width = trace.batches[0].weights.shape[1]
    places = torch.arange(width, device=lengths.device).expand(len(lengths), width)
    places = places.minimum((lengths[partner] - 1).clamp_min(0)[:, None])  # [sequences, t]
    counts = [len(batch.weights) for batch in trace.batches]

    def shuffle(stations: list[Tensor]) -> list[Tensor]:
        whole = processes.all_gather(torch.cat(stations))[:sequences][partner]  # [sequences, t, d]
        moved = whole.gather(1, places[..., None].expand(-1, -1, whole.shape[-1]))
        return list(torch.split(moved if processes.count == 1 else moved[own], counts))

    return shuffle


def shuffled_targets(
    trace: Trace, seed: int, *, shift_first: bool = False, processes: Processes = ONE_PROCESS
) -> Targets:
    """Return targets moved in the same way as `shuffled_stations` moves stations."""
    targets = [batch.targets[..., None] for batch in trace.batches]
    shuffle = shuffled_stations(trace, seed, shift_first=shift_first, processes=processes)
    moved = [one[..., 0] for one in shuffle(targets)]
    return lambda batch, place: moved[place]
