"""Ablation of blocks, five ways; costs are on report, paired by sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peelwise.engine.factors import scaled_change
from peelwise.engine.session import Changes, Session
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import ATTENTION, MLP, Parts
from peelwise.records.anatomy import Ablation
from peelwise.records.base import Interval


def cost_of(session: Session, changes: Mapping[LinearLayer, Tensor], start: int) -> Interval:
    """Return what ``changes``, of blocks from ``start`` on, cost on report."""
    return session.gain(session.losses(session.report, changes, start), session.report.losses).interval()


def ablations(session: Session, all_parts: Sequence[Parts], index: int) -> Iterator[tuple[Ablation, Interval]]:
    """Yield what each way of ablating a block costs.

    Skipped and mean need a block whose output has the shape of its input; attention and MLP a branch of that name;
    neighbours a block beside it with the same layers.

    Args:
        session: the model; means are those of the fit tokens.
        all_parts: of all blocks.
        index: of the block.
    """
    stations = session.report.batches[0].stations
    if stations[index].shape == stations[index + 1].shape:
        without = session.losses_without(session.report, index)
        yield "skipped", session.gain(without, session.report.losses).interval()
        if stations[index].shape[:2] == session.report.batches[0].attended.shape:
            yield "mean", session.gain(_losses_with_mean(session, index), session.report.losses).interval()
    for branch in all_parts[index].branches:
        if branch.name in (ATTENTION, MLP):
            silent = {branch.writer: scaled_change(branch.writer, 0.0)}
            yield ("attention" if branch.name == ATTENTION else "mlp"), cost_of(session, silent, index)
    beside = [all_parts[i] for i in (index - 1, index + 1) if 0 <= i < len(all_parts)]
    change = averaged(all_parts[index], beside)
    if change:
        yield "neighbours", cost_of(session, change, index)


def averaged(parts: Parts, beside: Sequence[Parts]) -> Changes:
    """Return the changes that make every linear layer the mean of those of the same name in other blocks.

    Weights and biases; gains of norms stay. Layers without a twin of the same shape in each of them stay too.
    """
    changes: Changes = {}
    for name, linear in parts.linears.items():
        twins = [other.linears.get(name) for other in beside]
        own = whole(linear)
        values = [whole(twin) for twin in twins if twin is not None]
        if len(values) == len(beside) and values and all(value.shape == own.shape for value in values):
            changes[linear] = torch.stack(values).mean(dim=0) - own
    return changes


def whole(linear: LinearLayer) -> Tensor:
    """Return weight and bias as one matrix ``[d_out, d_in (+ 1)]``, float32."""
    weight, bias = linear.weight().float(), linear.bias()
    return weight if bias is None else torch.cat([weight, bias.float()[:, None]], dim=1)


def _losses_with_mean(session: Session, index: int) -> Tensor:
    """Return the losses on report with what a block adds replaced by its mean over the fit tokens."""
    total, count = torch.zeros(()), 0
    for batch in session.fit.batches:
        added = (batch.stations[index + 1] - batch.stations[index]).float()[batch.attended]  # [tokens, d]
        total, count = total.to(added) + added.sum(dim=0), count + len(added)
    mean = total / max(count, 1)
    passed = []
    for batch in session.report.batches:
        below = batch.stations[index]
        passed.append(replace(batch, stations=[*batch.stations[: index + 1], below + mean.to(below)]))
    return session.runner.losses_from(replace(session.report, batches=passed), index + 1)
