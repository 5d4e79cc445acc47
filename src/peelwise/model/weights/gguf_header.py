"""The header of a GGUF file, read with every count checked against the bytes that are there.

The format is that of the ggml project: magic, version, two counts, keys with values, a table of tensors. A count in
a damaged or hostile file can be anything up to 2^64, so nothing is repeated, sliced or stored that the rest of the file
cannot hold.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peelwise.errors import MissingExtraError, ModelError
from peelwise.model.checkpoint_files import check_present

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Types of values -> how they are read; types 8 and 9 have no fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LEAST_BYTES_OF_KEY = 8 + 4 + 1  # length of the name, type, value
_LEAST_BYTES_OF_TENSOR = 8 + 4 + 4 + 8  # length of the name, number of dimensions, type, offset
_MOST_DIMENSIONS = 8
_MOST_KEYS = _MOST_TENSORS = 100_000  # no model has nearly as many; arrays are read whole and count as one
_LARGEST_ALIGNMENT = 2**20
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufField:
    """A key's value as the package ``gguf`` hands it out.

    Args:
        types: Number of its type; of an array that of its elements too.
        parts: A sequence of what it consists of, one thing unless it is an array: texts as bytes, numbers as
            arrays ``[1]``.
    """

    types: list[int]
    parts: Any

    @property
    def data(self) -> range:
        """Which of the parts hold data: all of them."""
        return range(len(self.parts))


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: its type, its shape ``[d_out, d_in]`` in the order of torch, and bytes of the file."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Args:
        fields: Key -> value, of any kind.
        values: Key -> value; arrays are left out.
        tensors: Name -> where it lies.
        size: Bytes of the file.
    """

    fields: dict[str, GgufField]
    values: dict[str, str | int | float | bool]
    tensors: dict[str, GgufTensor]
    size: int


class _Cursor:
    """A position in the mapped file that cannot leave it."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob, self.at = blob, 4

    @property
    def left(self) -> int:
        return len(self.blob) - self.at

    def skip(self, size: int) -> int:
        """Return where ``size`` bytes begin, and go on behind them."""
        if size > self.left:
            raise EOFError(f"{size} bytes are announced at {self.at}, {self.left} are left")
        self.at += size
        return self.at - size

    def number(self, code: str) -> int:
        start = self.skip(struct.calcsize(f"<{code}"))
        value: int = struct.unpack_from(f"<{code}", self.blob, start)[0]
        return value

    def count(self, code: str, least_bytes: int) -> int:
        """Return a number of things that take at least so many bytes each."""
        count = self.number(code)
        if count * least_bytes > self.left:
            raise EOFError(f"{count} entries are announced at {self.at}, {self.left} bytes are left")
        return count

    def text(self) -> str:
        return self.texts(1)[0].decode("utf-8")

    def texts(self, count: int) -> list[bytes]:
        """Return so many texts in a row; a vocabulary has a hundred thousand, so nothing is called for each."""
        found: list[bytes] = []
        blob, at, end = self.blob, self.at, len(self.blob)
        for _ in range(count):
            start = at + 8
            at = start + _LENGTH.unpack_from(blob, at)[0]
            if at > end:
                raise EOFError(f"{at - start} bytes are announced at {start}, {end - start} are left")
            found.append(blob[start:at])
        self.at = at
        return found


def check_gguf(file: Path) -> GgufHeader:
    """Check that a GGUF file has its magic and holds everything that it announces, and return its header.

    Raises:
        ModelError: If it does not.
        MissingExtraError: If the gguf package is not installed.
    """
    check_present(file)
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != _MAGIC:
        raise ModelError(f"{file} is not a GGUF file: expected it to begin with {_MAGIC!r}, got {magic!r}.")
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingExtraError("Opening a .gguf file", "gguf") from error
    size = file.stat().st_size
    sizes = {int(kind): value for kind, value in GGML_QUANT_SIZES.items()}  # type -> (weights, bytes) of a block
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            return _read(blob, sizes)
    except (EOFError, ValueError, struct.error, OSError) as error:  # ValueError covers UTF-8
        raise ModelError(f"{file} is damaged or cut short at {size} bytes ({error}). Copy it again.") from error


def _read(blob: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    cursor = _Cursor(blob)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, expected one of {_VERSIONS}")
    tensors = cursor.count("Q", _LEAST_BYTES_OF_TENSOR)
    keys = cursor.count("Q", _LEAST_BYTES_OF_KEY)
    if keys > _MOST_KEYS or tensors > _MOST_TENSORS:
        raise ValueError(f"{keys} keys and {tensors} tensors are more than any model has")
    fields: dict[str, GgufField] = {}
    values: dict[str, str | int | float | bool] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in fields:
            raise ValueError(f"key {key[:80]!r} comes twice")
        fields[key] = field = _read_field(cursor, key)
        if field.types[0] != _ARRAY:
            values[key] = field.parts[0].decode("utf-8") if field.types[0] == _STRING else field.parts[0].item()
    table = [_read_tensor(cursor, sizes) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
    begin = -(-cursor.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, kind, shape, offset, size in table:
        if name in found:
            raise ValueError(f"tensor {name[:80]!r} comes twice")
        found[name] = GgufTensor(kind, shape, begin + offset, size)
    end = max((tensor.start + tensor.size for tensor in found.values()), default=0)
    if not found or end > len(blob):
        raise ValueError(f"{len(found)} tensors need {end} bytes")
    return GgufHeader(fields, values, found, len(blob))


def _read_tensor(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> tuple[str, int, tuple[int, ...], int, int]:
    """Return name, type, shape, offset and bytes of a tensor."""
    name = cursor.text()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in sizes:
        raise ValueError(f"tensor {name[:80]!r} is of the unknown type {kind}")
    weights, size = sizes[kind]
    if not all(shape) or shape[-1] % weights:
        raise ValueError(f"tensor {name[:80]!r} has shape {shape}, expected rows of whole blocks of {weights}")
    return name, kind, shape, offset, prod(shape) // weights * size


def _read_field(cursor: _Cursor, key: str) -> GgufField:
    kind = cursor.number("I")
    if kind == _STRING:
        return GgufField([kind], cursor.texts(1))
    if kind in _SCALARS:
        return GgufField([kind], _numbers(cursor, kind, 1))
    if kind != _ARRAY:
        raise ValueError(f"{key[:80]!r} is of the unknown type {kind}")
    element = cursor.number("I")
    if element == _STRING:
        return GgufField([kind, element], cursor.texts(cursor.count("Q", 8)))
    if element in _SCALARS:
        count = cursor.count("Q", struct.calcsize(f"<{_SCALARS[element]}"))
        return GgufField([kind, element], _numbers(cursor, element, count))
    # arrays of arrays: nested without end, and used by nobody
    raise ValueError(f"{key[:80]!r} is an array of type {element}")


def _numbers(cursor: _Cursor, kind: int, count: int) -> NDArray[Any]:
    """Return numbers ``[count, 1]``, each an array of one as readers expect it."""
    dtype = np.dtype(f"<{_SCALARS[kind]}" if _SCALARS[kind] != "?" else "?")
    size = count * dtype.itemsize
    start = cursor.skip(size)
    return np.frombuffer(cursor.blob[start : start + size], dtype=dtype).reshape(count, 1)
