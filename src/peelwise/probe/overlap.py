"""How much of a sequence stands in others: shingles of eight ids, as web pages are compared (Broder, 1997)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

SHINGLE = 8  # ids in a row; prose repeats few of these by chance
NEAR_DUPLICATE = 0.5  # of a sequence's shingles stand in one part and another: the same text, edited or shifted
OVERLAP = 0.25  # of them stand in a certificate's own text: not fresh
_FACTOR = 6_364_136_223_846_793_005  # Knuth's multiplier for 64 bits


def shingles(row: Sequence[int]) -> set[int]:
    """Return hashes of all runs of `SHINGLE` ids of a sequence; of the whole sequence if it is shorter."""
    ids = np.asarray(row, dtype=np.uint64) + np.uint64(1)
    width = max(min(SHINGLE, len(ids)), 1)
    factors = np.array([pow(_FACTOR, k, 2**64) for k in range(width, 0, -1)], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, width)  # [runs, width]
    return set((windows * factors).sum(axis=1, dtype=np.uint64).tolist())


class Seen:
    """The shingles of sequences that were taken before.

    Args:
        rows: the first of them.
    """

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self._known: set[int] = set()
        for row in rows:
            self.add(row)

    def add(self, row: Sequence[int]) -> None:
        """Take a sequence."""
        self._known |= shingles(row)

    def share(self, row: Sequence[int]) -> float:
        """Return which share of a sequence's shingles stands in those taken before, 0..1."""
        own = shingles(row)
        return len(own & self._known) / len(own)
