"""One statistic of all blocks in one short row per measurement: for numbers what letters are for verdicts.

A heat map of 60 blocks by 10,000 measurements takes 600,000 scattered rows of `statistics`, or 10,000 of `profiles`,
which lie side by side. They repeat numbers of statistics, to seven digits, and hold nothing of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peelwise.records.run import WHOLE_MODEL, Statistic

Kind = Literal["value", "to_median"]
_STORED = np.dtype("<f4")


@dataclass(frozen=True)
class Held:
    """Numbers of one statistic over the measurements that hold it, in the order of the measurements.

    Attributes:
        probe_ids: of the measurements, ``[measurements]``.
        numbers: ``[measurements, blocks]``; NaN where a block has none.
    """

    probe_ids: NDArray[np.int64]
    numbers: NDArray[Any]


def packed(statistics: Iterable[Statistic], blocks: int) -> list[tuple[str, Kind, bytes]]:
    """Return name, kind and numbers of one measurement's statistics: of all blocks, then of the whole model."""
    found: dict[tuple[str, Kind], list[float]] = {}
    for each in statistics:
        kinds: tuple[tuple[Kind, float | None], ...] = (("value", each.value), ("to_median", each.to_median))
        for kind, number in kinds:
            if number is not None and WHOLE_MODEL <= each.block < blocks:
                if (each.name, kind) not in found:
                    found[each.name, kind] = [math.nan] * (blocks + 1)
                found[each.name, kind][each.block] = number
    with np.errstate(over="ignore"):  # what is beyond float32 is as good as infinite
        return [(name, kind, np.array(each).astype(_STORED).tobytes()) for (name, kind), each in found.items()]


def cut(block: int, blocks: int) -> str:
    """Return SQL for one block's number."""
    place = blocks if block == WHOLE_MODEL else block
    return f"substr(numbers, {_STORED.itemsize * place + 1}, {_STORED.itemsize})"


def of_profiles(rows: Sequence[tuple[int, bytes]], width: int) -> Held:
    """Return what rows of ``probe_id, numbers`` hold."""
    ids, texts = zip(*rows, strict=True) if rows else ((), ())
    text = b"".join(texts)
    if len(text) != _STORED.itemsize * width * len(rows):  # a block that the model does not have, or a damaged file
        return Held(np.empty(0, np.int64), np.empty((0, width)))
    return held(np.array(ids, np.int64), np.frombuffer(text, _STORED).reshape(-1, width))


def of_statistics(rows: Sequence[tuple[int, int, float]], width: int) -> Held:
    """Return the same from rows of ``probe_id, block, number``, the blocks counted from 0."""
    plain = np.array(rows, np.float64).reshape(-1, 3)
    plain = plain[plain[:, 1] < width]
    ids, places = np.unique(plain[:, 0].astype(np.int64), return_inverse=True)
    numbers = np.full((len(ids), width), np.nan)
    numbers[places, plain[:, 1].astype(np.int64)] = plain[:, 2]
    return held(ids, numbers)


def held(probe_ids: NDArray[np.int64], numbers: NDArray[Any]) -> Held:
    """Return those measurements that hold anything."""
    there = ~np.isnan(numbers).all(axis=1)
    return Held(probe_ids[there], numbers[there])
