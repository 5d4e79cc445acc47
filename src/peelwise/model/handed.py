"""What blocks hand on beside the hidden state, such as keys and values that later blocks attend to.

There are two ways: a mapping that is given to every block and that some of them write into (Gemma 3n and 4), and a
tensor beside the hidden state that a block returns and the next one is given (ZAYA's router, the tokens that HY 4 has
chosen). Both are seen when the model runs as a whole. Called again, a block is given what it was given then, or what
blocks before it have handed on since; gradients go the same ways back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Slot = int | str  # where an argument stands: its place behind the hidden state, or its keyword
Key = tuple[Any, ...]  # a slot; of a mapping also its key, and the place in a tuple there
Handed = dict[Key, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, without the hidden state


@dataclass
class Ways:
    """By which ways the blocks of a model hand something on.

    Attributes:
        mappings: slots of mappings that blocks write into.
        returned: of the tensors that a block returns beside the hidden state, by their place, the next one's slot.
    """

    mappings: set[Slot] = field(default_factory=set)
    returned: dict[int, Slot] = field(default_factory=dict)

    def given(self, call: Arguments) -> Handed:
        """Return what a block is given by those before it."""
        found: Handed = {}
        for slot, value in _slots(call):
            if slot in self.mappings:
                found |= _contents(slot, value)
            elif slot in self.returned.values() and isinstance(value, Tensor):
                found[(slot,)] = value
        return found

    def with_handed(self, call: Arguments, handed: Mapping[Key, Tensor]) -> Arguments:
        """Return a block's arguments with ``handed`` in their places, and mappings of its own to write into."""
        if not self.mappings and not self.returned:
            return call
        args, kwargs = list(call[0]), dict(call[1])
        for slot, value in _slots(call):
            if slot in self.mappings:
                value = copy.copy(value)
                for key, each in list(value.items()):
                    value[key] = _replaced(each, (slot, key), handed)
            value = handed.get((slot,), value)
            if isinstance(slot, int):
                args[slot] = value
            else:
                kwargs[slot] = value
        return tuple(args), kwargs

    def written(self, call: Arguments, before: Mapping[Key, Tensor], out: Any) -> Handed:
        """Return what a block has handed on: what it wrote into mappings, and what it returned for the next one.

        Args:
            call: what it was called with, afterwards.
            before: what it was `given` in that call.
            out: what it returned.
        """
        found: Handed = {}
        for slot, value in _slots(call):
            if slot in self.mappings:
                found |= {key: each for key, each in _contents(slot, value).items() if before.get(key) is not each}
        rest = out[1:] if isinstance(out, (tuple, list)) else ()
        found |= {(slot,): rest[place] for place, slot in self.returned.items() if place < len(rest)}
        return {key: each for key, each in found.items() if isinstance(each, Tensor)}


class Watch:
    """Finds the ways while the model runs as a whole, block after block."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self._returned: Sequence[Any] = ()
        self._open: dict[Slot, tuple[Any, dict[Any, Any]]] = {}

    def before(self, call: Arguments) -> Arguments:
        """Note what a block is called with; return it with mappings as they are now."""
        args, kwargs = list(call[0]), dict(call[1])
        self._open = {}
        for slot, value in _slots(call):
            for place, each in enumerate(self._returned):
                if each is value and isinstance(value, Tensor):
                    self.ways.returned[place] = slot
            if isinstance(value, MutableMapping):
                self._open[slot] = value, dict(value)
                if isinstance(slot, int):
                    args[slot] = copy.copy(value)
                else:
                    kwargs[slot] = copy.copy(value)
        return tuple(args), kwargs

    def after(self, rest: Sequence[Any]) -> None:
        """Note what a block has written, and what it ``rest`` returned beside the hidden state."""
        self._returned = rest
        for slot, (mapping, was) in self._open.items():
            if len(mapping) != len(was) or any(value is not was.get(key) for key, value in mapping.items()):
                self.ways.mappings.add(slot)


@dataclass
class Gradient:
    """The gradient of a loss at a station: at the hidden state, and at what had been handed on until there."""

    hidden: Tensor  # [b, t, d]
    handed: Handed = field(default_factory=dict)


@dataclass
class Passed:
    """One block's run in a graph of its own, from leaves to what it gives."""

    hidden: Tensor
    given: Handed
    out: Tensor
    written: Handed
    gathering: Callable[[], AbstractContextManager[None]] = nullcontext  # in which it is passed back

    def back(
        self, above: Gradient, inner: Sequence[Tensor], *, again: bool = False
    ) -> tuple[Gradient, tuple[Tensor | None, ...]]:
        """Return the gradient before the block, and those at tensors ``inner`` of it.

        Args:
            above: the gradient behind it.
            inner: tensors of its graph.
            again: whether the graph is needed once more.
        """
        outs, gradients = [self.out], [above.hidden.to(self.out.dtype)]
        for key, gradient in above.handed.items():
            if key in self.written and self.written[key].requires_grad:
                outs.append(self.written[key])
                gradients.append(gradient)
        leaves = [self.hidden, *self.given.values()]
        with self.gathering():
            found = torch.autograd.grad(outs, [*leaves, *inner], gradients, retain_graph=again, allow_unused=True)
        below = {key: gradient for key, gradient in above.handed.items() if key not in self.written}
        for key, own in zip(self.given, found[1:], strict=False):
            if own is not None:
                below[key] = below[key] + own if key in below else own
        hidden = torch.zeros_like(self.hidden) if found[0] is None else found[0]
        return Gradient(hidden, below), found[len(leaves) :]


def _slots(call: Arguments) -> Iterator[tuple[Slot, Any]]:
    yield from enumerate(call[0])
    yield from call[1].items()


def _contents(slot: Slot, mapping: Any) -> Handed:
    found: Handed = {}
    for key, value in mapping.items():
        if isinstance(value, Tensor):
            found[slot, key] = value
        elif isinstance(value, (tuple, list)):
            found |= {(slot, key, i): each for i, each in enumerate(value) if isinstance(each, Tensor)}
    return found


def _replaced(value: Any, key: Key, handed: Mapping[Key, Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(handed.get((*key, i), each) for i, each in enumerate(value))
    return handed.get(key, value)
