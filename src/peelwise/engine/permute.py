"""Targets and stations dealt out to other sequences, for the shuffled controls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peelwise.engine.sweep import Targets
from peelwise.model.runner import Batch, Trace


def permuted_targets(trace: Trace, seed: int) -> Targets:
    """Return targets in which every sequence predicts another one's tokens; the order within is kept."""
    targets = torch.cat([batch.targets for batch in trace.batches])
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(1, max(len(targets), 2), (1,), generator=generator))
    # A rotation of a random order leaves no sequence in its place.
    order = torch.randperm(len(targets), generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(shift)
    moved = targets[partner.to(targets.device)]
    starts = [0]
    for batch in trace.batches:
        starts.append(starts[-1] + len(batch.targets))

    def look(batch: Batch, position: int) -> Tensor:
        return moved[starts[position] : starts[position + 1]]

    return look


Shuffle = Callable[[list[Tensor]], list[Tensor]]


def partner_order(sequences: int, seed: int) -> Tensor:
    """Return a permutation ``[sequences]`` that leaves no sequence in its place (where there are two or more)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sequences, generator=generator)
    shift = int(torch.randint(1, max(sequences, 2), (1,), generator=generator))
    partner = torch.empty_like(order)
    partner[order] = order.roll(shift)
    return partner


def shuffled_stations(trace: Trace, seed: int) -> Shuffle:
    """Return a function that gives every sequence of a trace another one's station, position by position.

    Where the partner is shorter, its last real position is repeated: padding never becomes a target.
    """
    lengths = torch.cat([batch.weights.sum(dim=1) for batch in trace.batches])  # [sequences]
    partner = partner_order(len(lengths), seed).to(lengths.device)
    width = trace.batches[0].weights.shape[1]
    places = torch.arange(width, device=lengths.device).expand(len(lengths), width)
    places = places.minimum((lengths[partner] - 1).clamp_min(0)[:, None])  # [sequences, t]
    counts = [len(batch.weights) for batch in trace.batches]

    def shuffle(stations: list[Tensor]) -> list[Tensor]:
        whole = torch.cat(stations)[partner]  # [sequences, t, d]
        moved = whole.gather(1, places[..., None].expand(-1, -1, whole.shape[-1]))
        return list(torch.split(moved, counts))

    return shuffle


def shuffled_labels(trace: Trace, seed: int) -> Callable[[Batch, int], Tensor]:
    """Return labels moved in the same way as `shuffled_stations` moves stations."""
    labels = [batch.targets[..., None] for batch in trace.batches]
    moved = [one[..., 0] for one in shuffled_stations(trace, seed)(labels)]
    return lambda batch, place: moved[place]
