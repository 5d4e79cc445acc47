"""Sequences of token ids as one tensor, padded on the right, and which of their tokens are to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Sequences of token ids with right padding.

    Args:
        ids: ``[sequences, positions]`` int64; padding holds any valid id.
        mask: ``[sequences, positions]`` bool, true at real tokens.
        asked: ``[sequences, positions]`` bool, true at tokens that count as targets; ``None`` for all real ones.
    """

    ids: Tensor
    mask: Tensor
    asked: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What the model reads, ``[sequences, positions - 1]``."""
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """What it has to predict at each position, ``[sequences, positions - 1]``."""
        return self.ids[:, 1:]

    @property
    def read(self) -> Tensor:
        """Where input and target are both real, ``[sequences, positions - 1]`` bool."""
        return self.mask[:, 1:] & self.mask[:, :-1]

    @property
    def weights(self) -> Tensor:
        """Where moreover the target counts, ``[sequences, positions - 1]`` bool."""
        return self.read if self.asked is None else self.read & self.asked[:, 1:]

    @property
    def width(self) -> int:
        """Positions of a sequence that the model reads."""
        return self.inputs.shape[1]

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    def rows(self) -> list[list[int]]:
        """Return the ids of every sequence without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids.cpu(), self.mask.cpu(), strict=True)]

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.weights.sum())

    def to(self, device: torch.device | str) -> Self:
        """Return the same split on ``device``."""
        asked = None if self.asked is None else self.asked.to(device)
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), asked=asked)

    def at(self, places: Sequence[int] | slice) -> Self:
        """Return the sequences at some places as a split of their own."""
        chosen = places if isinstance(places, slice) else list(places)
        asked = None if self.asked is None else self.asked[chosen]
        return replace(self, ids=self.ids[chosen], mask=self.mask[chosen], asked=asked)


def padded(rows: list[list[int]], positions: int) -> Split:
    """Return sequences of any length as one split, padded on the right."""
    ids = torch.zeros(len(rows), positions, dtype=torch.int64)  # [sequences, positions]
    lengths = torch.tensor([len(row) for row in rows])  # [sequences]
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return Split(ids, torch.arange(positions) < lengths[:, None])
