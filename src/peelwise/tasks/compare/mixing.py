"""Models put together from the parts of two: the loss with any part taken from OLD or from NEW, by cached stations.

A part is run by the model that it comes from: its own weights, its own code, and the arguments that its own model
calls it with. So no weight of either model is ever written, quantised layers need no unpacking, and a model put
together from all parts of OLD has exactly OLD's loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.handed import Handed
from peelwise.model.layers import Block
from peelwise.model.replaced import forward_replaced
from peelwise.model.runner import Runner
from peelwise.model.trace import Batch, Trace


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models, run over report."""

    runner: Runner
    trace: Trace

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks."""
        return self.runner.blocks

    def block(self, index: int, place: int, hidden: Tensor, handed: Handed) -> Tensor:
        """Return the output ``[b, t, d]`` of one block for a hidden state of the micro-batch at ``place``.

        What blocks before it have ``handed`` on besides is read, and what it does is added.
        """
        batch = self.trace.batches[place]
        return self.runner.run_block(self.blocks[index], like(hidden, batch), batch, handed)


@dataclass(frozen=True, eq=False)
class Mix:
    """Where each part comes from; ``stations`` is whose cached station the run begins with, before block ``start``."""

    stations: Side
    start: int
    blocks: Sequence[Side]  # of blocks start..
    norm: Side
    head: Side


@torch.no_grad()
def mixed_losses(mix: Mix) -> Tensor:
    """Return the losses ``[sequences]`` of a model put together from two, nats."""
    found = []
    for place, batch in enumerate(mix.stations.trace.batches):
        hidden, handed = batch.stations[mix.start], batch.handed_to(mix.start)
        for index, side in enumerate(mix.blocks, start=mix.start):
            hidden = side.block(index, place, hidden, handed)
        found.append(_end(mix.norm, mix.head, place, hidden))
    runner = mix.norm.runner
    runner.work.add(sum(runner.shares[mix.start :]) + runner.head_share, mix.norm.trace.predicted)
    return torch.cat(found)


def _end(norm: Side, head: Side, place: int, hidden: Tensor) -> Tensor:
    with _head_of(norm, head):
        batch = norm.trace.batches[place]
        return norm.runner.end_losses(batch, like(hidden, batch))


@torch.no_grad()
def end_logits(norm: Side, head: Side, place: int, hidden: Tensor) -> Tensor:
    """Return the logits ``[b, t, vocabulary]`` that norm and head, each of one model, make of a last station.

    Of examples the tensor ``[b, ..]`` that the model returns, or the first of several.
    """
    with _head_of(norm, head):
        batch = norm.trace.batches[place]
        return first_tensor(norm.runner.logits(batch, like(hidden, batch)))


def first_tensor(out: Any) -> Tensor:
    """Return what a model returned if it is a tensor; else its ``logits``, or the first tensor ``[b, ..]`` in it.

    Raises:
        UnsupportedModelError: If there is none.
    """
    out = getattr(out, "logits", out)
    for each in out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 0:
            return each
    raise UnsupportedModelError(f"The model returns {type(out).__name__} without a tensor in it to compare.")


@contextmanager
def _head_of(norm: Side, head: Side) -> Iterator[None]:
    """Let the model that the norm comes from compute logits with the other model's head."""
    own, other = norm.runner.head, head.runner.head
    with lent({own: other} if head is not norm and own is not None and other is not None else {}):
        yield


@contextmanager
def lent(pairs: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Let modules compute what others compute, inside the context."""
    with ExitStack() as stack:
        for module, other in pairs.items():
            if module is other:  # held in common: it computes that already
                continue
            stack.enter_context(_lent(module, other))
        yield


@contextmanager
def _lent(module: nn.Module, other: nn.Module) -> Iterator[None]:
    dtype = next((p.dtype for p in other.parameters() if p.is_floating_point()), None)

    def forward(x: Tensor, *args: object, **kwargs: object) -> Any:
        out = other(x if dtype is None or not x.is_floating_point() else x.to(dtype), *args, **kwargs)
        if isinstance(out, tuple):  # a router gives weights and choices
            return tuple(_alike(each, x) for each in out)
        return _alike(out, x)

    with forward_replaced(module, forward):
        yield


def _alike(out: Any, x: Tensor) -> Any:
    """Return what a module gave in the dtype of what it was given, where both are floating-point numbers."""
    floats = isinstance(out, Tensor) and out.is_floating_point() and x.is_floating_point()
    return out.to(x.dtype) if floats else out


def like(hidden: Tensor, batch: Batch) -> Tensor:
    """Return a hidden state in the dtype of a model's own stations."""
    return hidden.to(batch.stations[0])
