"""Which token fills rows up to one length: many rows end or begin in it again and again, and no text repeats it inside.

Text repeats tokens too: rules of dashes, indentation, blank lines. Rows cut from a stream begin or end within such a
run now and then, and have as many of them inside. A token that fills rows up has its runs at their ends alone.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_LATE = 64  # rows that count as of late
_FEWEST_ROWS, _PART = 8, 0.25  # rows of late that must be filled up, and their share
_INSIDE = 0.02  # tokens in runs inside of rows, over those in runs at their ends
NONE = -1  # no token


class Runs(NamedTuple):
    """Where tokens of rows are repeated, each ``[batch, length]``: at the end, at the beginning, and inside."""

    last: Tensor
    first: Tensor
    inside: Tensor


def runs_of(ids: Tensor) -> Runs:
    """Return the tokens that are part of a run of at least two equal ones, by the run's place in its row.

    Args:
        ids: ``[batch, length]``.
    """
    same = torch.zeros_like(ids, dtype=torch.bool)
    same[:, 1:] = ids[:, 1:] == ids[:, :-1]
    run = same.clone()
    run[:, :-1] |= same[:, 1:]
    last = run & (ids == ids[:, -1:]).flip(1).long().cumprod(dim=1).flip(1).bool()
    first = run & ~last & (ids == ids[:, :1]).long().cumprod(dim=1).bool()
    return Runs(last, first, run & ~last & ~first)


@dataclass
class PaddingWatch:
    """Remembers the runs of all rows seen; `token` is the one that fills rows up, or ``None``."""

    _late: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_LATE))
    _edges: Counter[int] = field(default_factory=Counter)
    _inside: Counter[int] = field(default_factory=Counter)

    def add(self, edges: Tensor, inside: Tensor) -> None:
        """Note the rows of some forward passes.

        Args:
            edges: ``[rows, 2, 2]``: the token that each row ends in again and again (or `NONE`) and how often; the same
                for its beginning.
            inside: tokens of runs inside of rows, `NONE` among them.
        """
        for (last, times), (first, before) in edges.long().tolist():
            self._late.append((last, first))
            self._edges[last] += times
            self._edges[first] += before
        self._inside.update(inside[inside != NONE].tolist())

    @property
    def token(self) -> int | None:
        """The token that fills rows up, as far as the rows of late tell."""
        rows = Counter(token for pair in self._late for token in {*pair} if token != NONE)
        for token, count in rows.most_common(1):
            enough = count >= max(_FEWEST_ROWS, _PART * len(self._late))
            if enough and self._inside[token] <= _INSIDE * self._edges[token]:
                return token
        return None
