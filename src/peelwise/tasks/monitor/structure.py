"""What a model in training is made of may change: layers are replaced, merged, frozen or thawed, blocks added."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks, stack_of
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.refined import chosen, in_training, names_of, only
from peelwise.model.shared_weights import without_shared
from peelwise.records.options import Refine


def looked_at_again(
    model: nn.Module, before: tuple[Block, ...], refine: Refine, stepped: Collection[int] | None = None
) -> tuple[Block, ...]:
    """Return the blocks as they are now: ``before`` itself where nothing has changed that concerns a measurement.

    What was asked about stays so although training no longer changes it, which may be a mistake that is worth seeing;
    layers that came into training since (``refine="trainable"``) are asked about too. Where none of the old layers is
    left (adapters that were merged), the choice is made anew.

    Args:
        model: in training.
        before: its blocks at the last measurement, as many and called as now.
        refine: which layers are asked about.
        stepped: parameters that the optimiser has (`stepped_by`).
    """
    found = find_blocks(model, stack_of(before))
    asked = names_of(before) & names_of(found)
    if refine == "trainable" and any(block.frozen for block in before):
        asked |= in_training(found, stepped)
    now = without_shared(only(found, asked) if asked else chosen(found, refine, stepped))
    return before if _layers(now) == _layers(before) else now


def other_blocks(model: nn.Module, before: Sequence[Block]) -> tuple[str, ...]:
    """Return the names of blocks that were added or are gone, in the order of the model; none if all are as before."""
    names, now = [block.name for block in before], [block.name for block in _found(model, before)]
    return (*(name for name in now if name not in names), *(name for name in names if name not in now))


def _found(model: nn.Module, before: Sequence[Block]) -> tuple[Block, ...]:
    try:
        return find_blocks(model, stack_of(before))
    except UnsupportedModelError:  # the list is gone: the model was wrapped, or its blocks are called otherwise
        return find_blocks(model)


def changed_layers(before: Sequence[Block], now: Sequence[Block]) -> tuple[int, int, int]:
    """Return how many layers are made anew (or are new), how many of all are asked about, and how many there are."""
    known = {(name, module) for name, module, _ in _layers(before)}
    rows = _layers(now)
    return sum(row[:2] not in known for row in rows), sum(asked for *_, asked in rows), len(rows)


def _layers(blocks: Sequence[Block]) -> list[tuple[str, int, bool]]:
    def line(linear: LinearLayer, asked: bool) -> tuple[str, int, bool]:
        return linear.name, id(linear.module), asked

    return [
        row
        for block in blocks
        for row in (*(line(m, True) for m in block.linears), *(line(m, False) for m in block.frozen))
    ]
