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
_LARGEST_ALIGNMENT = 2**20


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Args:
        values: Key -> value; arrays are left out, only their length is kept, in ``lengths``.
        lengths: Key -> number of elements, of arrays.
        shapes: Tensor -> shape ``[d_out, d_in]`` in the order of torch.
        size: Bytes of the file.
    """

    values: dict[str, str | int | float | bool]
    lengths: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
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
        size = self.number("Q")
        start = self.skip(size)
        return self.blob[start : start + size].decode("utf-8")


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
    values: dict[str, str | int | float | bool] = {}
    lengths: dict[str, int] = {}
    for _ in range(keys):
        _read_value(cursor, cursor.text(), values, lengths)
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0
    for _ in range(tensors):
        name = cursor.text()
        if name in shapes:
            raise ValueError(f"tensor {name[:80]!r} comes twice")
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
        shapes[name] = shape
        end = max(end, offset + prod(shape) // weights * size)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _LARGEST_ALIGNMENT:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    if not shapes or begin + end > len(blob):
        raise ValueError(f"{len(shapes)} tensors need {begin + end} bytes")
    return GgufHeader(values, lengths, shapes, len(blob))


def _read_value(
    cursor: _Cursor, key: str, values: dict[str, str | int | float | bool], lengths: dict[str, int]
) -> None:
    kind = cursor.number("I")
    if kind == _STRING:
        values[key] = cursor.text()
    elif kind in _SCALARS:
        values[key] = cursor.number(_SCALARS[kind])
    elif kind == _ARRAY:
        element = cursor.number("I")
        if element == _STRING:
            lengths[key] = cursor.count("Q", 8)
            for _ in range(lengths[key]):
                cursor.skip(cursor.number("Q"))
        elif element in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[element]}")
            lengths[key] = cursor.count("Q", width)
            cursor.skip(lengths[key] * width)
        else:  # arrays of arrays: nested without end, and used by nobody
            raise ValueError(f"{key[:80]!r} is an array of type {element}")
    else:
        raise ValueError(f"{key[:80]!r} is of the unknown type {kind}")
