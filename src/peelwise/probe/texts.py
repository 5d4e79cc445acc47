"""Text for probes: files that the user names, and reference prose that every Python brings along."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peelwise.errors import MissingExtraError, ProbeError

_HEADING = re.compile(r"\A\s*[^\n]+\n([*=\-~])\1+\n+")  # a title and the line drawn under it
_BLANK_LINES = re.compile(r"\n\s*\n")


def read_texts(paths: Sequence[str | Path], *, field: str = "text") -> list[str]:
    """Return the documents that the named files hold, in the order given.

    Args:
        paths: ``.jsonl`` and ``.ndjson`` give one document per line and ``.parquet`` one per row; any other
            file is one document of plain text; ``-`` is standard input, read as plain text.
        field: The key or column that holds the text; rows where it is empty or null are left out.

    Returns:
        Documents without byte-order mark, with ``\\n`` at the end of lines.

    Raises:
        ProbeError: If a file is missing, a folder, empty, not UTF-8, malformed or without ``field``.
        MissingExtraError: If a ``.parquet`` file is given and pyarrow is not installed.
    """
    if not paths:
        raise ProbeError("No text given: expected at least one file, or - for standard input.")
    documents: list[str] = []
    for path in paths:
        found = [text for text in _read_one(path, field) if text.strip()]
        if not found:
            raise ProbeError(f"{_label(path)} holds no text. Give a file with text in it.")
        documents += found
    return documents


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
        return row
    if not isinstance(row, Mapping):
        raise ProbeError(f"{where}: expected an object with the field {field!r}, got {type(row).__name__}.")
    if field not in row:
        raise ProbeError(f"{where} has no field {field!r}; found {_listed(row)}. Name the one that holds text.")
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ProbeError(f"{where}: the field {field!r} should hold text, got {type(value).__name__}.")
    return value


def _read_one(path: str | Path, field: str) -> Iterator[str]:
    if str(path) == "-":
        yield _decode(sys.stdin.buffer.read(), _label(path))
        return
    path = Path(path)
    if path.is_dir():
        raise ProbeError(f"{path} is a folder: expected a file of text. Name the files inside it.")
    if not path.exists():
        raise ProbeError(f"{path} not found: expected a .txt, .jsonl or .parquet file, or - for standard input.")
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path, field)
        return
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {error.strerror}.") from error
    text = _decode(raw, str(path))
    if path.suffix.lower() in {".jsonl", ".ndjson"}:
        yield from _json_lines(text, path, field)
    else:
        yield text


def _json_lines(text: str, path: Path, field: str) -> Iterator[str]:
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProbeError(
                f"{where}: not valid JSON at column {error.colno} ({error.msg}). Expected an object per line."
            ) from error
        yield text_of(row, field, where)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("Reading .parquet", "parquet") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise ProbeError(
                    f"{path} has no column {field!r}; found {_listed(columns)}. Name the one that holds text."
                )
            start = 0
            for batch in file.iter_batches(columns=[field]):
                values = batch.column(0).to_pylist()
                for row, value in enumerate(values, start=start):
                    yield text_of({field: value}, field, f"{path} row {row}")
                start += len(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise ProbeError(f"{path} is not a readable .parquet file: {_first_line(error)}") from error


def _decode(raw: bytes, label: str) -> str:
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    try:
        text = raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + mark
        raise ProbeError(
            f"{label} is not UTF-8: byte {raw[at]:#04x} at position {at}. Convert it, for example with iconv -t UTF-8."
        ) from error
    return text.replace("\r\n", "\n")


def _label(path: str | Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") if shown else "none"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
