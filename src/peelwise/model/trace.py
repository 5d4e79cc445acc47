"""What running a model leaves behind: micro-batches with the stations between blocks, and the losses of a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peelwise.model.handed import Handed, Ways
from peelwise.probe.examples import Examples


@dataclass
class Batch:
    """One micro-batch of a split, with what the blocks were called with and the stations between them."""

    inputs: Tensor  # [b, t] token ids
    targets: Tensor  # [b, t] token ids
    weights: Tensor  # [b, t] bool: predicted tokens
    padded: bool
    attended: Tensor  # [b, t] bool: real input positions with a next token, also in rows that only fill up
    read: Tensor  # [b, t] bool: the same, in rows that count; `weights` only where the next token is asked for
    # Per block, without H; ``None`` for a block that the model skips for such a text.
    calls: list[tuple[tuple[Any, ...], dict[str, Any]] | None] = field(default_factory=list)
    stations: list[Tensor] = field(default_factory=list)  # L + 1 of [b, t, d]
    ways: Ways = field(default_factory=Ways)  # how blocks hand on more than H
    rest: tuple[Any, ...] | list[Any] | None = None  # what the last block returns beside H, if it is one of several
    # Of a probe of batches: `inputs`, `targets` and `weights` are ``[b, 1]``, places of examples and which of them
    # count; `attended` and `read` are of the positions that the model makes of them, known once it has run.
    examples: Examples | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)  # what the model is called with

    def handed_to(self, block: int) -> Handed:
        """Return what a block is given by those before it beside the hidden state."""
        call = self.calls[block] if block < len(self.calls) else None
        return {} if call is None else self.ways.given(call)

    def hand_on(self, block: int, handed: Handed) -> None:
        """Enter what a block has handed on into the calls of those behind it."""
        if handed:
            behind = self.calls[block + 1 :]
            self.calls[block + 1 :] = [call and self.ways.with_handed(call, handed) for call in behind]


def by_token(values: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of some tokens, ``[n, ..]``.

    Args:
        values: ``[b, t, ..]``, or several streams of one ``[s, b, t, d]``, as Gemma 3n's hidden state is.
        mask: ``[b, t]`` bool.
    """
    values = batch_first(values, mask)
    return (values if values.shape[:2] == mask.shape or values.dim() < 4 else values.movedim(0, 2))[mask]


def batch_first(values: Tensor, mask: Tensor) -> Tensor:
    """Return ``[b, t, d]`` where values are ``[t, b, d]``, as XLNet's are; others as they are."""
    b, t = mask.shape
    return values.transpose(0, 1) if values.dim() == 3 and values.shape[:2] == (t, b) != (b, t) else values


@dataclass
class Trace:
    """A split run once through the model: cached stations and the loss of every sequence.

    Where processes share a probe, each keeps the stations of its own sequences and knows the losses of all.
    """

    batches: list[Batch]
    losses: Tensor  # [sequences] float64, nats summed over the sequence's predicted tokens; of examples their loss
    tokens: Tensor  # [sequences] float64
    parts: tuple[int, ...] = ()  # of several splits, how many batches each has

    @property
    def mean(self) -> float:
        """Loss in nats per token; of examples in their own unit."""
        return self.mean_of(self.losses)

    @property
    def predicted(self) -> float:
        """Number of predicted tokens."""
        return float(self.tokens.sum())

    def mean_of(self, losses: Tensor) -> float:
        """Return other losses of the same sequences, ``[sequences]``, in nats per token."""
        return float(losses.sum() / self.tokens.sum())
