"""Which sequences are drawn and which part they go to: decided by hashes of their own content, so that nobody chooses.

The key of a sequence is the SHA-256 of a seed and its ids. Sequences are drawn in the order of their keys, and the
drawn ones are cut in that order: first ``fit``, then ``select``, then ``report``. Where the text consists of many
documents, a document goes to one part as a whole, in the order of the lowest key that it has. Whoever has the sequences
and the seed can compute the order again; what remains a choice is the seed and the text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from peelwise.errors import ProbeError
from peelwise.probe.overlap import NEAR_DUPLICATE, Seen
from peelwise.probe.sequences import FEWEST, count_parts

PARTS = ("fit", "select", "report")
_FEWEST_DOCUMENTS = 20  # of fewer, a split by document leaves parts of any size
_SELDOM = 1e-6

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pool:
    """What the sequences of a probe were drawn from.

    Attributes:
        sequences: different ones that the text gave.
        sha256: over the SHA-256 of each of them, sorted: the same for the same text, in any order.
        left_out: how many were passed over as nearly the same as one that was drawn.
        documents: how many of them the drawn sequences come from, where the split is by document.
    """

    sequences: int
    sha256: str
    left_out: int = 0
    documents: int | None = None


@dataclass(frozen=True)
class Drawn:
    """Sequences in three parts, the document of each (``None``: not split by document), and their pool."""

    parts: tuple[list[list[int]], list[list[int]], list[list[int]]]
    documents: tuple[list[int], list[int], list[int]] | None
    pool: Pool


def key_of(row: Sequence[int], seed: int) -> bytes:
    """Return the SHA-256 of a seed and a sequence of ids (little-endian int64)."""
    return hashlib.sha256(f"peelwise split {seed}\n".encode() + _bytes(row)).digest()


def pool_hash(rows: Sequence[Sequence[int]]) -> str:
    """Return what identifies a pool of sequences whatever their order."""
    digest = hashlib.sha256()
    for one in sorted(hashlib.sha256(_bytes(row)).digest() for row in rows):
        digest.update(one)
    return digest.hexdigest()


def draw_parts(
    sequences: list[list[int]],
    documents: list[int] | None,
    tokens: int | None,
    shares: Sequence[float],
    seed: int,
) -> Drawn:
    """Draw different sequences by their keys, as many as ``tokens`` allows, and split them.

    A sequence of which half stands in those drawn before is left out: it would count twice, or be in two parts.

    Args:
        sequences: all that the text gave.
        documents: number of the document of each, ``None`` where these are not known.
        tokens: upper limit of predicted tokens, ``None`` for all.
        shares: of fit, select and report.
        seed: of the keys.

    Raises:
        ProbeError: If they are too few.
    """
    numbers = documents if documents is not None else [0] * len(sequences)
    different = dict(reversed([(tuple(row), number) for row, number in zip(sequences, numbers, strict=True)]))
    order = sorted(different, key=lambda row: key_of(row, seed))
    rows, left_out = _affordable(order, tokens)
    counts = count_parts(len(rows), shares)
    cuts = counts[0], counts[0] + counts[1]
    document = [different[row] for row in rows]
    by_document = documents is not None and len(set(document)) >= _FEWEST_DOCUMENTS
    if by_document:
        first = {number: place for place, number in reversed(list(enumerate(document)))}
        places = sorted(range(len(rows)), key=lambda place: (first[document[place]], place))
        rows, document = [rows[place] for place in places], [document[place] for place in places]
        nearest = _document_cuts(document, cuts)
        by_document, cuts = nearest is not None, nearest or cuts
        if not by_document:
            rows.sort(key=lambda row: key_of(row, seed))
    pool = Pool(len(different), pool_hash(order), left_out, len(set(document)) if by_document else None)
    whole = [list(row) for row in rows]
    return Drawn(_cut(whole, cuts), _cut(document, cuts) if by_document else None, pool)


def split_faults(
    parts: Sequence[Sequence[Sequence[int]]],
    documents: Sequence[Sequence[int]] | None,
    pool: Pool | None,
    seed: int,
) -> str | None:
    """Return what is wrong with how sequences were assigned to fit, select and report, or ``None``.

    Args:
        parts: the sequences of each part, in their order.
        documents: the document of each, where the split is by document.
        pool: what they were drawn from; ``None`` for probes of old and those put together by hand, where only
            repeated sequences are faults.
        seed: of the keys.
    """
    rows = [tuple(row) for part in parts for row in part]
    if len(set(rows)) < len(rows):
        return "A sequence stands in the probe more than once, within a part or in two of them."
    if pool is None:
        return None
    seen = Seen()
    for row in rows:
        if seen.share(row) >= NEAR_DUPLICATE:
            return "Two sequences of the probe are nearly the same."
        seen.add(row)
    keys = [key_of(row, seed) for row in rows]
    if documents is None:
        if any(a >= b for a, b in pairwise(keys)):
            return "Sequences are not in the part that the hash of their content and the seed assign them to."
    else:
        fault = _document_faults(documents, keys)
        if fault:
            return fault
    if pool.documents != (None if documents is None else len({n for part in documents for n in part})):
        return f"The sequences do not come from {pool.documents or 'an unknown number of'} documents."
    looked_at = len(rows) + pool.left_out
    if not 0 <= pool.left_out <= looked_at <= pool.sequences:
        return f"{len(rows)} sequences cannot be drawn from {pool.sequences}, {pool.left_out} of them left out."
    if len(rows) == pool.sequences and pool_hash(rows) != pool.sha256:
        return "The probe holds as many sequences as its pool, and they are others."
    if _unlikely(keys, looked_at, pool.sequences):
        return f"These are not the first {looked_at} of {pool.sequences} sequences by the hash of their content."
    return None


def _document_faults(documents: Sequence[Sequence[int]], keys: Sequence[bytes]) -> str | None:
    sets = [set(part) for part in documents]
    if sum(map(len, sets)) > len(set().union(*sets)):
        return "Sequences of one document stand in two parts of the probe."
    lowest: dict[int, bytes] = {}
    for number, key in zip((n for part in documents for n in part), keys, strict=True):
        lowest[number] = min(key, lowest.get(number, key))
    order = [(lowest[n], key) for n, key in zip((n for part in documents for n in part), keys, strict=True)]
    if any(a >= b for a, b in pairwise(order)):
        return "Documents are not in the part that the hash of their content and the seed assign them to."
    return None


def _unlikely(keys: Sequence[bytes], looked_at: int, pool: int) -> bool:
    """Return whether the highest key drawn would be this high or low less than once in a million draws.

    The highest of the first n of N random numbers follows a beta distribution, whatever the text.
    """
    from scipy.special import betainc

    highest = max(int.from_bytes(key[:8], "big") for key in keys) / 2**64
    below = float(betainc(looked_at, pool - looked_at + 1, highest))
    return min(below, 1.0 - below) < _SELDOM


def _affordable(order: list[tuple[int, ...]], tokens: int | None) -> tuple[list[tuple[int, ...]], int]:
    """Return the first sequences that are no near-duplicates, and how many were passed over between them."""
    seen, used, alike, left_out = Seen(), 0, 0, 0
    drawn: list[tuple[int, ...]] = []
    for row in order:
        if used + len(row) - 1 > (math.inf if tokens is None else tokens):
            break
        if seen.share(row) >= NEAR_DUPLICATE:
            alike += 1
            continue
        seen.add(row)
        used += len(row) - 1
        drawn.append(row)
        left_out = alike
    needed = sum(FEWEST)
    if len(drawn) >= needed:
        return drawn, left_out
    parts = "(2 to fit, 1 to select, 2 to report)"
    if len(order) - alike >= needed and tokens is not None:
        raise ProbeError(
            f"tokens={tokens} leaves {len(drawn)} sequences, expected at least {needed} "
            f"{parts}. Allow more tokens or use a shorter sequence length."
        )
    raise ProbeError(
        f"The text gives {len(order) - alike} different sequences, expected at least {needed} "
        f"{parts}. Give more text or a shorter sequence length."
    )


def _document_cuts(document: Sequence[int], cuts: tuple[int, int]) -> tuple[int, int] | None:
    """Return the places nearest to ``cuts`` where a document ends; ``None`` if a part would be too small."""
    ends = [place for place in range(1, len(document)) if document[place - 1] != document[place]]
    first, second = (min(ends, key=lambda place: (abs(place - cut), place)) for cut in cuts)
    sizes = first, second - first, len(document) - second
    return (first, second) if all(size >= least for size, least in zip(sizes, FEWEST, strict=True)) else None


def _cut(rows: list[_T], cuts: tuple[int, int]) -> tuple[list[_T], list[_T], list[_T]]:
    return rows[: cuts[0]], rows[cuts[0] : cuts[1]], rows[cuts[1] :]


def _bytes(row: Sequence[int]) -> bytes:
    return np.asarray(row, dtype="<i8").tobytes()
