"""Token sequences before they become a probe: encoded, cut and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peelwise.errors import ProbeError
from peelwise.probe.files import from_next_word
from peelwise.probe.options import check_sizes
from peelwise.probe.texts import check_text

WHOLE_CHARACTERS = 4 * 2**20  # of all documents together; up to here they are tokenised whole
FEWEST = (2, 1, 2)  # sequences without which fit, select or report cannot do its work
_PIECE_CHARACTERS = 16  # per token of a sequence: room for three or four sequences of prose
_SPARE = 4  # tokens that are drawn from, for each that is asked for
_PLACES_PER_SEQUENCE = 2


def sequences_of(
    text: str | Sequence[str], tokenizer: Any, *, tokens: int | None, sequence_length: int, seed: int
) -> tuple[list[list[int]], list[int]]:
    """Return the sequences that documents are cut into, and the number of the document of each.

    The arguments are those of `Probe.from_text`.

    Raises:
        ProbeError: If there is no text, or none as long as a sequence.
    """
    check_sizes(tokens, sequence_length)
    documents = [text] if isinstance(text, str) else list(text)
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise ProbeError(f"Document {number}: expected text, got {type(document).__name__}.")
        check_text(document, f"Document {number}")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ProbeError("The text is empty: expected prose or code to predict. Give more text.")
    opening = opening_ids(tokenizer)
    size = sequence_length + 1 - len(opening)
    streams = encode_documents(tokenizer, documents, tokens, size, seed)
    chunks, numbers = chunk_documents(streams, size, getattr(tokenizer, "eos_token_id", None))
    if not chunks:
        found = sum(map(len, streams))
        raise ProbeError(
            f"The text is too short: length {sequence_length} needs {sequence_length + 1} "
            f"tokens, got {found}. Give more text or a shorter sequence length."
        )
    return [opening + chunk for chunk in chunks], numbers


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of ``text`` without special tokens."""
    if callable(tokenizer):
        # Not verbose: the warning about texts longer than the context does not apply, they are cut below.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    encoded = tokenizer.encode(text)
    return list(getattr(encoded, "ids", encoded))


def opening_ids(tokenizer: Any) -> list[int]:
    """Return ``[bos]`` if the tokenizer starts every text with it, else nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not callable(tokenizer):
        return []
    ids = list(tokenizer("a", verbose=False)["input_ids"])
    return [bos] if ids[:1] == [bos] else []


def encode_documents(
    tokenizer: Any, documents: Sequence[str], tokens: int | None, size: int, seed: int
) -> list[list[int]]:
    """Return the ids of documents; of more than can be needed, those of random pieces from everywhere in them.

    Up to 4 Mi characters, or where all tokens are asked for, documents are tokenised whole.

    Args:
        tokenizer: A Hugging Face tokenizer, or anything with ``encode(text)``.
        documents: The texts.
        tokens: How many tokens will be drawn, ``None`` for all.
        size: Tokens of a sequence.
        seed: Draws the pieces.
    """
    if tokens is None or sum(map(len, documents)) <= WHOLE_CHARACTERS:
        return [encode(tokenizer, document) for document in documents]
    width = _PIECE_CHARACTERS * size
    # A short rest at the end of a document goes with the piece before it.
    pieces = [
        (number, start, len(text) if len(text) - start < 2 * width else start + width)
        for number, text in enumerate(documents)
        for start in range(0, max(1, len(text) - width + 1), width)
    ]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    streams: list[list[int]] = []
    found = 0
    for index in order:
        number, start, end = pieces[index]
        text = documents[number][start:end]
        streams.append(encode(tokenizer, text if start == 0 else from_next_word(text)))
        found += len(streams[-1])
        if found >= _SPARE * tokens and len(streams) * size >= _PLACES_PER_SEQUENCE * tokens:
            break
    return streams


def chunk_documents(streams: list[list[int]], size: int, separator: int | None) -> tuple[list[list[int]], list[int]]:
    """Cut long documents one by one; join the short ones, each followed by ``separator``, and cut those.

    Returns the pieces and the number of the document of each; a piece of joined documents has a number of its own.
    """
    chunks: list[list[int]] = []
    numbers: list[int] = []
    joined: list[int] = []
    for number, stream in enumerate(streams):
        if len(stream) >= size:
            pieces = list(cut(stream, size))
            chunks += pieces
            numbers += [number] * len(pieces)
        else:
            joined += stream if separator is None else [*stream, separator]
    rest = list(cut(joined, size))
    return chunks + rest, numbers + [len(streams) + place for place in range(len(rest))]


def cut(stream: list[int], size: int) -> Iterator[list[int]]:
    """Yield pieces of exactly ``size`` ids that do not overlap; a shorter rest is dropped."""
    for start in range(0, len(stream) - size + 1, size):
        yield stream[start : start + size]


def as_rows(sequences: Tensor | Sequence[Sequence[int]] | Sequence[int]) -> Tensor | list[list[int]]:
    """Return a 1-D tensor for a stream and lists for rows, all checked to be non-negative integers."""
    if not isinstance(sequences, Tensor):
        items = list(sequences)
        if any(isinstance(item, Tensor | Sequence) for item in items):
            return [_as_stream(item, f"Sequence {number}").tolist() for number, item in enumerate(items)]
        return _as_stream(items, "The stream")
    if sequences.ndim == 2:
        return [_as_stream(row, f"Sequence {number}").tolist() for number, row in enumerate(sequences)]
    return _as_stream(sequences, "The tensor")


def _as_stream(values: Any, label: str) -> Tensor:
    try:
        ids = torch.as_tensor(values).cpu()  # [n]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProbeError(f"{label}: expected a list of integer token ids, got {type(values).__name__}.") from error
    if ids.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if ids.ndim != 1:
        raise ProbeError(f"{label}: expected one or two dimensions of token ids, got shape {tuple(ids.shape)}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ProbeError(f"{label}: expected integer token ids, got {ids.dtype}.")
    if int(ids.min()) < 0:
        raise ProbeError(f"{label}: token ids cannot be negative, got {int(ids.min())}. Remove padding markers.")
    return ids.long()


def count_parts(sequences: int, shares: Sequence[float]) -> tuple[int, int, int]:
    """Return how many sequences go to fit, select and report, at least 2, 1 and 2."""
    if len(shares) != 3 or not all(math.isfinite(share) and share > 0 for share in shares):
        raise ProbeError(f"Expected three positive shares (fit, select, report), got {tuple(shares)}.")
    total = sum(shares)
    select = max(FEWEST[1], round(sequences * shares[1] / total))
    report = max(FEWEST[2], round(sequences * shares[2] / total))
    fit = sequences - select - report
    if fit < FEWEST[0]:
        raise ProbeError(
            f"Shares {tuple(shares)} of {sequences} sequences leave {fit} to fit on, "
            f"expected at least {FEWEST[0]}. Give more text or a larger first share."
        )
    return fit, select, report
