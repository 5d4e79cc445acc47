"""Text of a third party for a witness that exists already: all of it in one part, nothing of it seen before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peelwise.errors import ProbeError
from peelwise.probe.overlap import NEAR_DUPLICATE, OVERLAP, Seen
from peelwise.probe.rows import Split, padded
from peelwise.probe.sequences import sequences_of
from peelwise.probe.split import key_of

FEWEST = 8  # sequences; fewer have no interval worth the name


@dataclass(frozen=True)
class Unseen:
    """Sequences that a certificate's probe does not have, and how many were left out because it has them."""

    split: Split
    overlapping: int


def unseen(
    documents: Sequence[str],
    tokenizer: Any,
    known: Sequence[Sequence[int]],
    *,
    tokens: int | None,
    sequence_length: int,
    seed: int = 0,
) -> Unseen:
    """Cut text like that of a probe, and leave out what stands in the ``known`` sequences or was taken already.

    Args:
        documents: the text.
        tokenizer: that of the model.
        known: ids of the certificate's own probe.
        tokens: upper limit of predicted tokens, ``None`` for all.
        sequence_length: predicted tokens per sequence.
        seed: draws the sequences.

    Raises:
        ProbeError: If fewer than eight sequences are left.
    """
    rows, _ = sequences_of(documents, tokenizer, tokens=tokens, sequence_length=sequence_length, seed=seed)
    theirs, taken = Seen(known), Seen()
    drawn: list[list[int]] = []
    overlapping = used = 0
    for row in sorted(rows, key=lambda row: key_of(row, seed)):
        if tokens is not None and used + len(row) - 1 > tokens:
            break
        if theirs.share(row) >= OVERLAP:
            overlapping += 1
        elif taken.share(row) < NEAR_DUPLICATE:
            taken.add(row)
            drawn.append(row)
            used += len(row) - 1
    if len(drawn) < FEWEST:
        left_out = f", after {overlapping} were left out that the certificate was made on" if overlapping else ""
        raise ProbeError(
            f"The text gives {len(drawn)} sequences of {sequence_length} tokens{left_out}; expected at least {FEWEST}. "
            "Give more text that the certificate was not made on."
        )
    return Unseen(padded(drawn, max(map(len, drawn))), overlapping)
