"""Text files of any size: read whole where they are small, sampled block by block where they are not.

A block is 64 KiB of one file. Drawn from all blocks of all files, each block is as likely as any other; a line of JSON
belongs to the block in which it begins, so every line is as likely as any other. What is held in memory does not grow
with the files.
"""

from __future__ import annotations

import codecs
import os
import random
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from peelwise.errors import ProbeError

WHOLE_BYTES = 32 * 2**20  # of all files together; up to here they are read whole
SAMPLE_BYTES = 16 * 2**20  # read of larger ones
LONGEST_LINE_BYTES = 8 * 2**20
_BLOCK_BYTES = 64 * 2**10
_LONGEST_WORD = 256  # looked through for the beginning of the next word


@dataclass(frozen=True)
class Piece:
    """What one block of a file gives.

    Args:
        start: Where it begins in the file, in bytes.
        raw: Its bytes: whole lines, or a stretch of text.
        is_start: Whether the file begins here.
        is_end: Whether the file ends here.
    """

    start: int
    raw: bytes
    is_start: bool
    is_end: bool


def check_regular(path: Path) -> int:
    """Return the size of a text file, in bytes.

    Raises:
        ProbeError: If it is missing, a folder, a pipe or a device, or cannot be looked at.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ProbeError(
            f"{path} not found: expected a .txt, .jsonl or .parquet file, or - for standard input."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ProbeError(f"{str(path)[:200]!r} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if stat.S_ISDIR(found.st_mode):
        raise ProbeError(f"{path} is a folder: expected a file of text. Name the files inside it.")
    if not stat.S_ISREG(found.st_mode):
        raise ProbeError(f"{path} is a pipe or a device: expected a file of text. Use - to read from a pipe.")
    return found.st_size


def read_whole(path: Path) -> bytes:
    """Return the content of a file that was small when it was looked at.

    Raises:
        ProbeError: If it cannot be read, or is larger after all.
    """
    try:
        with path.open("rb") as file:
            return limited(file, str(path))
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {error.strerror}.") from error


def limited(file: BinaryIO, label: str) -> bytes:
    """Return all that can be read, if it is no more than is read whole.

    Raises:
        ProbeError: If it is more.
    """
    raw = file.read(WHOLE_BYTES + 1)
    if len(raw) > WHOLE_BYTES:
        raise ProbeError(
            f"{label} goes on after {WHOLE_BYTES} bytes, and only files with a length can be sampled. "
            "Write it to a file and give that, or less of it."
        )
    return raw


def draw_blocks(sizes: Sequence[int], seed: int) -> dict[int, list[int]]:
    """Return file -> blocks that are read of it, in random order, from everywhere in files too large to read whole.

    Args:
        sizes: Bytes of every file.
        seed: Draws the blocks.
    """
    counts = [-(-size // _BLOCK_BYTES) for size in sizes]
    total = sum(counts)
    drawn = random.Random(seed).sample(range(total), min(total, SAMPLE_BYTES // _BLOCK_BYTES))
    first, blocks_of = 0, {}
    for number, count in enumerate(counts):
        blocks_of[number] = [block - first for block in drawn if first <= block < first + count]
        first += count
    return blocks_of


def stretches(path: Path, blocks: Sequence[int]) -> Iterator[Piece]:
    """Yield the bytes of the named blocks of a file.

    Raises:
        ProbeError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for block in blocks:
                start = block * _BLOCK_BYTES
                file.seek(start)
                raw = file.read(_BLOCK_BYTES)
                yield Piece(start, raw, start == 0, start + len(raw) >= size)
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {error.strerror}.") from error


def lines(path: Path, blocks: Sequence[int]) -> Iterator[Piece]:
    """Yield the lines that begin in the named blocks of a file.

    Raises:
        ProbeError: If it cannot be read, or a line is too long.
    """
    try:
        with path.open("rb") as file:
            for block in blocks:
                start, end = block * _BLOCK_BYTES, (block + 1) * _BLOCK_BYTES
                if start > 0:
                    file.seek(start - 1)
                    start = start - 1 + len(_line(file, path, start))  # the rest of a line that began before
                else:
                    file.seek(0)
                while start < end and (line := _line(file, path, start)):
                    yield Piece(start, line, start == 0, False)
                    start += len(line)
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {error.strerror}.") from error


def decode(raw: bytes, label: str) -> str:
    """Return text without byte-order mark, with ``\\n`` at the end of lines.

    Raises:
        ProbeError: If it is not UTF-8.
    """
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    try:
        text = raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(label, raw[error.start + mark], error.start + mark) from error
    return text.replace("\r\n", "\n")


def decode_stretch(piece: Piece, label: str) -> str:
    """Return the text of a stretch from anywhere in a file, from the first word that begins in it.

    Raises:
        ProbeError: If it is not UTF-8, or holds nothing but zero bytes.
    """
    if piece.raw and not piece.raw.strip(b"\0"):
        raise ProbeError(f"{label} holds only zero bytes at {piece.start}: it is no text, or damaged. Copy it again.")
    if piece.is_start and piece.is_end:
        return decode(piece.raw, label)
    raw = piece.raw if piece.is_start else piece.raw[_continuation(piece.raw) :]
    raw = raw.removeprefix(codecs.BOM_UTF8) if piece.is_start else raw
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=piece.is_end)
    except UnicodeDecodeError as error:
        skipped = len(piece.raw) - len(raw)
        raise _not_utf8(label, raw[error.start], piece.start + skipped + error.start) from error
    text = text.replace("\r\n", "\n")
    return text if piece.is_start else from_next_word(text)


def from_next_word(text: str) -> str:
    """Return a text that begins anywhere from its next word on, all of it where words are not parted by spaces."""
    head = text[:_LONGEST_WORD]
    at = next((index for index, letter in enumerate(head) if letter.isspace()), 0)
    return text[at:].lstrip()


def _line(file: BinaryIO, path: Path, start: int) -> bytes:
    line = file.readline(LONGEST_LINE_BYTES + 1)
    if len(line) > LONGEST_LINE_BYTES:
        raise ProbeError(
            f"{path}: the line at byte {start} is longer than {LONGEST_LINE_BYTES} bytes. "
            "Expected a document per line; split it, or give plain text."
        )
    return line


def _continuation(raw: bytes) -> int:
    """Return how many bytes at the beginning belong to a letter that began before."""
    head = raw[:4]  # a letter has four bytes at most, the first of which is no continuation
    return next((index for index, byte in enumerate(head) if byte & 0xC0 != 0x80), len(head) % 4)


def _not_utf8(label: str, byte: int, at: int) -> ProbeError:
    return ProbeError(
        f"{label} is not UTF-8: byte {byte:#04x} at position {at}. Convert it, for example with iconv -t UTF-8."
    )
