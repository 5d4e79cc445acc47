"""Probes of which every measurement takes another part: what many small measurements find can be put together.

A sequence belongs to ``fit``, ``select`` or ``report`` for good, by the hash of its content, as in every probe
(`probe.split`). So what was fitted on is never reported on, whatever of it is still in use. Within a part sequences are
taken in the order of their hashes, from the beginning again when all were taken. The first ones to report on are kept
for the loss: a curve must be of the same text throughout.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peelwise.errors import ProbeError
from peelwise.probe.answers import Row, masked
from peelwise.probe.options import SEQUENCE_LENGTH
from peelwise.probe.probe import MESSAGES_LENGTH, SHARES, Probe
from peelwise.probe.rows import Split
from peelwise.probe.split import PARTS
from peelwise.probe.texts import Document, characters_of, document_of

CORPUS_TOKENS, EACH = 200_000, 8_192
_FIXED_TOKENS, _FIXED_SHARE = 1_024, 0.25  # of report, for the loss
_FEWEST = {"fit": 2, "select": 1, "report": 8}  # sequences of a measurement
_CHARACTERS_PER_TOKEN = 16  # read of documents: several times what is drawn


@dataclass(frozen=True, eq=False)
class RollingProbe(Probe):
    """A large probe of which a monitor measures another part each time; made by `Probe.rolling`.

    Args:
        each: predicted tokens of one measurement, at most.
    """

    each: int = EACH

    @property
    def fixed(self) -> Split:
        """The sequences to report on that every measurement takes the loss of, and nothing else."""
        return self.report.at(range(self._fixed))

    @property
    def _fixed(self) -> int:
        per_sequence = max(self.report.tokens / self.report.sequences, 1.0)
        most = max(_FEWEST["report"], int(_FIXED_SHARE * self.report.sequences))
        return min(most, max(_FEWEST["report"], round(_FIXED_TOKENS / per_sequence)))

    def check(self) -> None:
        """Raise unless there are two measurements in it.

        Raises:
            ProbeError: If not.
        """
        counts = {part: getattr(self, part).sequences for part in PARTS}
        counts["report"] -= self._fixed
        few = [part for part in PARTS if counts[part] < 2 * _FEWEST[part]]
        if few:
            raise ProbeError(
                f"A rolling probe needs two measurements' sequences and {self._fixed} for the loss; {few[0]} has "
                f"{counts[few[0]]}, expected {2 * _FEWEST[few[0]]}. Give more text, or use Probe.from_text."
            )


@dataclass(frozen=True)
class Part:
    """What one measurement is made on.

    Attributes:
        probe: its sequences.
        report: places of its sequences to report on, counted on over all passes through the corpus.
        corpus: sequences to report on that there are; places so far apart are of the same sequence.
    """

    probe: Probe
    report: range
    corpus: int

    def repeats(self, earlier: range) -> bool:
        """Whether a sequence of an earlier measurement's report part is reported on again."""
        return self.report.stop - self.corpus > earlier.start


class Roll:
    """Takes part after part of a rolling probe; in several processes the same ones, if the same sizes are asked for.

    Args:
        whole: the probe.
    """

    def __init__(self, whole: RollingProbe) -> None:
        whole.check()
        self._whole = whole
        self._first = {"fit": 0, "select": 0, "report": whole.fixed.sequences}
        self._taken = dict.fromkeys(PARTS, 0)
        self._tokens = sum(getattr(whole, part).tokens for part in PARTS)

    def take(self, tokens: int) -> Part:
        """Return the next sequences of every part, about so many tokens in all, and half of what there is at most."""
        splits: list[Split] = []
        places = range(0)
        for part in PARTS:
            split: Split = getattr(self._whole, part)
            there = split.sequences - self._first[part]
            count = max(_FEWEST[part], round(tokens / self._tokens * split.sequences))
            places = range(self._taken[part], self._taken[part] + min(count, there // 2))
            self._taken[part] = places.stop
            splits.append(split.at([self._first[part] + place % there for place in places]))
        whole = self._whole
        fit, select, report = splits
        probe = Probe(fit, select, report, whole.source, whole.in_distribution, whole.seed)
        return Part(probe, places, whole.report.sequences - self._first["report"])  # PARTS ends with report


def rolling_probe(
    text: Any,
    tokenizer: Any | None,
    *,
    tokens: int = CORPUS_TOKENS,
    each: int = EACH,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    in_distribution: bool = False,
    source: str = "corpus",
    shares: Sequence[float] = SHARES,
    field: str = "text",
) -> RollingProbe:
    """Return a rolling probe; see `Probe.rolling`."""
    if each < 1:
        raise ProbeError(f"A measurement takes a positive number of tokens, got each={each}.")
    options: dict[str, Any] = {
        "tokens": tokens,
        "sequence_length": sequence_length,
        "seed": seed,
        "in_distribution": in_distribution,
        "source": source,
        "shares": shares,
    }
    by_index = not isinstance(text, str | Sequence | Tensor) and hasattr(text, "__getitem__")
    if tokenizer is not None:
        read: Any = _documents(text, field, tokens, seed) if by_index else text
        if not isinstance(read, str) and read and isinstance(read[0], list):
            longest = max(sequence_length, MESSAGES_LENGTH)
            whole = Probe.from_messages(read, tokenizer, **options | {"sequence_length": longest})
        else:
            whole = Probe.from_text(read, tokenizer, **options)
    elif by_index:
        rows = _rows_of(text, tokens, seed)
        labels = [row.labels for row in rows] if any(row.asked is not None for row in rows) else None
        whole = Probe.from_tokens([row.ids for row in rows], labels=labels, **options)
    else:
        whole = Probe.from_tokens(text, **options)
    found = RollingProbe(**{name: getattr(whole, name) for name in Probe.__dataclass_fields__}, each=each)
    found.check()
    return found


def _documents(data: Any, field: str, tokens: int, seed: int) -> list[Document]:
    """Return documents or conversations of a data set by random index, until they hold more than is asked for."""
    documents: list[Document] = []
    characters = 0
    for index, row in _drawn(data, seed):
        documents.append(document_of(row, field, f"Row {index}"))
        characters += characters_of(documents[-1])
        if characters >= _CHARACTERS_PER_TOKEN * tokens:
            break
    return documents


def _rows_of(data: Any, tokens: int, seed: int) -> list[Row]:
    """Return rows of a data set by random index, twice as many as are asked for: some may be nearly the same."""
    rows, found = [], 0
    for index, item in _drawn(data, seed):
        rows.append(_row_of(item, index))
        found += max(len(rows[-1].ids) - 1, 0)
        if found >= 2 * tokens:
            break
    return rows


def _drawn(data: Any, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield index and item in random order; what reading an item draws at random is put back."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        with _same_random_states():
            item = data[index]
        yield index, item


@contextmanager
def _same_random_states() -> Iterator[None]:
    """Put the random states of Python, NumPy and PyTorch back."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _row_of(item: Any, index: int) -> Row:
    """Return one item without padding: ids, or a mapping with ``input_ids``, and ``labels`` or masks of answers."""
    if not isinstance(item, Mapping):
        return Row(torch.as_tensor(item).flatten().tolist())
    if "input_ids" not in item:
        raise ProbeError(
            f"Item {index} has {sorted(item)[:5]}, expected 'input_ids'. Give a tokenizer to read its text, or a "
            "data set whose items are token ids."
        )
    row = masked(item, torch.as_tensor(item["input_ids"]).flatten().tolist(), f"Item {index}")
    if item.get("attention_mask") is None:
        return row
    real = [bool(each) for each in torch.as_tensor(item["attention_mask"]).flatten().tolist()]
    asked = None if row.asked is None else tuple(compress(row.asked, real))
    return Row(list(compress(row.ids, real)), asked)
