"""Text for probes: files that the user names, and reference prose that every Python brings along."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from peelwise.errors import MissingExtraError, ProbeError
from peelwise.probe import files
from peelwise.probe.files import SAMPLE_BYTES, WHOLE_BYTES, check_regular, decode, decode_stretch

_HEADING = re.compile(r"\A\s*[^\n]+\n([*=\-~])\1+\n+")  # a title and the line drawn under it
_BLANK_LINES = re.compile(r"\n\s*\n")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_MOST_ROW_GROUPS = 64  # of a .parquet file that is sampled
_BATCH_ROWS = 256


# Text, or a conversation: a list of messages.
Document = str | list[Any]


def read_texts(paths: Sequence[str | Path], *, field: str = "text", seed: int = 0) -> list[Document]:
    """Return the documents that the named files hold, in the order given.

    Up to 32 MiB of files are read whole. Of more, 16 MiB are read from random places everywhere in them: the same
    places for the same files and seed.

    Args:
        paths: ``.jsonl`` and ``.ndjson`` give one document per line and ``.parquet`` one per row; any other
            file is one document of plain text (sampled: one for each place); ``-`` is standard input, read as plain
            text and never sampled.
        field: The key or column that holds the text, or lists of messages (conversations); rows where it is empty or
            null are left out.
        seed: Draws the places.

    Returns:
        Documents without byte-order mark, with ``\\n`` at the end of lines; or conversations alone.

    Raises:
        ProbeError: If a file is missing, no regular file, empty, not UTF-8, malformed or without ``field``; if some
            rows hold text and others conversations.
        MissingExtraError: If a ``.parquet`` file is given and pyarrow is not installed.
    """
    if not paths:
        raise ProbeError("No text given: expected at least one file, or - for standard input.")
    sizes = [_size_of(path, field) for path in paths]
    if sum(sizes) > WHOLE_BYTES:
        return _of_one_kind(_sampled(paths, sizes, field, seed))
    documents: list[Document] = []
    for path in paths:
        found = [document for document in _read_one(path, field) if not _is_empty(document)]
        if not found:
            raise ProbeError(f"{_label(path)} holds no text. Give a file with text in it.")
        documents += found
    return _of_one_kind(documents)


def _of_one_kind(documents: list[Document]) -> list[Document]:
    conversations = sum(isinstance(document, list) for document in documents)
    if 0 < conversations < len(documents):
        raise ProbeError(
            f"{conversations} of {len(documents)} documents are conversations, the others text; give one kind."
        )
    return documents


def _is_empty(document: Document) -> bool:
    return not (document.strip() if isinstance(document, str) else document)


def reference_prose() -> list[str]:
    """Return the prose of the Python language reference, one document per topic of ``pydoc``.

    Titles are stripped. Topics quote each other at length, so a paragraph is kept only where it comes first
    in alphabetical order of topics: otherwise the same text could be fitted on and reported on. Topics with
    nothing of their own are left out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = []
        for paragraph in _BLANK_LINES.split(_HEADING.sub("", topics[name])):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def text_of(row: Mapping[str, Any] | str, field: str, where: str) -> str:
    """Return the text of one row, empty if it is null.

    Args:
        row: The text itself, or a mapping that holds it under ``field``.
        field: The key of the text.
        where: How an error names the row, such as ``data.jsonl:7``.

    Raises:
        ProbeError: If the row is neither text nor mapping, lacks ``field`` or holds something else there.
    """
    if isinstance(row, str):
        return check_text(row, where)
    if not isinstance(row, Mapping):
        raise ProbeError(f"{where}: expected an object with the field {field!r}, got {type(row).__name__}.")
    if field not in row:
        raise ProbeError(f"{where} has no field {field!r}; found {_listed(row)}. Name the one that holds text.")
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ProbeError(f"{where}: the field {field!r} should hold text, got {type(value).__name__}.")
    return check_text(value, where)


def document_of(row: Mapping[str, Any] | str, field: str, where: str) -> Document:
    """Return the text of one row as `text_of` does, or the list of messages that it holds instead."""
    value = row.get(field) if isinstance(row, Mapping) else None
    return value if isinstance(value, list) else text_of(row, field, where)


def characters_of(document: Document) -> int:
    """Return how many characters a text has, or all messages of a conversation together."""
    if isinstance(document, str):
        return len(document)
    return sum(len(str(each.get("content"))) for each in document if isinstance(each, Mapping))


def check_text(text: str, where: str) -> str:
    """Return a text that has an encoding, as tokenizers ask for.

    Raises:
        ProbeError: If it holds half of a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    half = None if text.isascii() else _HALF_PAIR.search(text)
    if half is not None:
        raise ProbeError(
            f"{where}: U+{ord(half[0]):04X} at character {half.start()} is half of a surrogate pair, which is no text. "
            "Remove or replace it."
        )
    return text


def _size_of(path: str | Path, field: str) -> int:
    """Return how many bytes of text a file holds, about; nothing is known of standard input."""
    if str(path) == "-":
        return 0
    size = check_regular(Path(path))
    return _parquet_size(Path(path), field) if _is_parquet(path) else size


def _sampled(paths: Sequence[str | Path], sizes: Sequence[int], field: str, seed: int) -> list[Document]:
    """Return documents from random places of files that are too large to be read whole, in the order of the files."""
    plain = [0 if str(path) == "-" or _is_parquet(path) else size for path, size in zip(paths, sizes, strict=True)]
    blocks = files.draw_blocks(plain, seed)
    documents: list[Document] = []
    characters = 0
    for number, path in enumerate(paths):
        if str(path) == "-":
            found: Iterator[tuple[int, Document]] = enumerate(_read_one(path, field))
        elif _is_parquet(path):
            found = _sampled_rows(Path(path), field, SAMPLE_BYTES * sizes[number] // sum(sizes), seed)
        elif _is_json(path):
            found = _sampled_lines(Path(path), field, blocks[number])
        else:
            found = ((p.start, decode_stretch(p, str(path))) for p in files.stretches(Path(path), blocks[number]))
        kept = []
        for place, text in found:
            if not _is_empty(text):
                kept.append((place, text))
                characters += characters_of(text)
            if characters > WHOLE_BYTES:  # long lines: each is worth many blocks
                break
        documents += [text for _, text in sorted(kept, key=itemgetter(0))]
    if not documents:
        raise ProbeError(f"{', '.join(map(_label, paths))[:200]}: no text was found. Give files with text in them.")
    return documents


def _read_one(path: str | Path, field: str) -> Iterator[Document]:
    if str(path) == "-":
        yield decode(files.limited(sys.stdin.buffer, _label(path)), _label(path))
        return
    path = Path(path)
    if _is_parquet(path):
        yield from _read_parquet(path, field)
        return
    text = decode(files.read_whole(path), str(path))
    if _is_json(path):
        # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _text_of_line(line, field, f"{path}:{number}")
    else:
        yield text


def _sampled_lines(path: Path, field: str, blocks: Sequence[int]) -> Iterator[tuple[int, Document]]:
    for piece in files.lines(path, blocks):
        where = f"{path}, the line at byte {piece.start}"
        line = decode(piece.raw, where)
        if line.strip():
            yield piece.start, _text_of_line(line, field, where)


def _text_of_line(line: str, field: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ProbeError(
            f"{where}: not valid JSON at column {error.colno} ({error.msg}). Expected an object per line."
        ) from error
    except RecursionError as error:
        raise ProbeError(f"{where}: nested too deeply. Expected an object with the field {field!r}.") from error
    except ValueError as error:  # numbers of thousands of digits
        raise ProbeError(f"{where}: {_first_line(error)[:80]}. Expected an object with the field {field!r}.") from error
    return document_of(row, field, where)


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    characters = 0
    for _, text in _rows(path, field, None):
        characters += characters_of(text)
        if characters > WHOLE_BYTES:  # compressed a thousand times
            raise ProbeError(f"{path} holds more text than {WHOLE_BYTES} characters when unpacked. Give fewer rows.")
        yield text


def _sampled_rows(path: Path, field: str, size: int, seed: int) -> Iterator[tuple[int, Document]]:
    """Yield the first rows of random groups of rows, about ``size`` characters in all."""
    with _parquet(path) as file:
        count = file.num_row_groups
    groups = random.Random(seed).sample(range(count), min(count, _MOST_ROW_GROUPS))
    for group in groups:
        characters = 0
        for number, text in _rows(path, field, group):
            yield group * 2**40 + number, text  # their order in the file
            characters += characters_of(text)
            if characters > size // len(groups):
                break


def _rows(path: Path, field: str, group: int | None) -> Iterator[tuple[int, Document]]:
    """Yield the texts of one group of rows, or of all, with their numbers."""
    with _parquet(path) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ProbeError(f"{path} has no column {field!r}; found {_listed(columns)}. Name the one that holds text.")
        start = 0
        groups = None if group is None else [group]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=[field]):
            values = batch.column(0).to_pylist()
            for row, value in enumerate(values, start=start):
                yield row, document_of({field: value}, field, f"{path} row {row}")
            start += len(values)


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a .parquet file, and say which it was where it cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("Reading .parquet", "parquet") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ProbeError(f"{path} is not a readable .parquet file: {_first_line(error)}") from error


def _parquet_size(path: Path, field: str) -> int:
    """Return the bytes of one column before they were packed."""
    size = 0
    with _parquet(path) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            columns = (group.column(index) for index in range(group.num_columns))
            size += sum(int(c.total_uncompressed_size) for c in columns if c.path_in_schema.split(".")[0] == field)
    return size


def _is_parquet(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".parquet"


def _is_json(path: str | Path) -> bool:
    return Path(path).suffix.lower() in {".jsonl", ".ndjson"}


def _label(path: str | Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") if shown else "none"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
