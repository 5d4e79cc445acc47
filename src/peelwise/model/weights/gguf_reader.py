"""A GGUF file as the package ``gguf`` hands it out, parsed once and in a tenth of the time.

That package makes several array views of every text of the vocabulary, and takes tensors apart sixteen rows at a time.
Numbers are the same to the bit: fields come from our own header, blocks still go through the package, in longer rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peelwise.model.weights.gguf_header import GgufField, check_gguf

_ROW_BYTES = 2**15  # the package takes 16 rows at once: of four bits, a million weights


@dataclass(frozen=True)
class ReadTensor:
    """One tensor of a file, whose bytes are read when they are used.

    Args:
        name: As the file calls it.
        tensor_type: Its ``gguf.GGMLQuantizationType``.
        shape: In the order of ggml: ``[d_in, d_out]``.
        data: Numbers ``[d_out, d_in]``, or bytes of blocks ``[d_out, bytes of a row]``.
    """

    name: str
    tensor_type: Any
    shape: NDArray[np.uint64]
    data: NDArray[Any]


class FileReader:
    """Stands in for ``gguf.GGUFReader``: what it says of fields and tensors, which is all that loaders ask for.

    Args:
        path: The ``.gguf`` file.

    Raises:
        ModelError: If the file is damaged.
        MissingExtraError: Without the gguf package.
    """

    def __init__(self, path: str | Path) -> None:
        import gguf

        header = check_gguf(Path(path))
        self.fields = header.fields
        self.architecture = header.values.get("general.architecture")

        blob = np.memmap(path, mode="r").view(np.ndarray)  # slices of a memmap itself are slow to make
        self.tensors = []
        for name, tensor in header.tensors.items():
            kind = gguf.GGMLQuantizationType(tensor.kind)
            weights, size = gguf.GGML_QUANT_SIZES[kind]
            stored = blob[tensor.start : tensor.start + tensor.size].view(_NUMBERS.get(kind.name, np.uint8))
            per_row = tensor.shape[-1] if kind.name in _NUMBERS else tensor.shape[-1] // weights * size
            shape = np.array(tensor.shape[::-1], dtype=np.uint64)
            self.tensors.append(ReadTensor(name, kind, shape, stored.reshape(*tensor.shape[:-1], per_row)))

    def get_field(self, key: str) -> GgufField | None:
        """Return the value of a key, ``None`` if there is none."""
        return self.fields.get(key)


# Types that are numbers of numpy; all others, bfloat16 among them, come as bytes.
_NUMBERS: dict[str, Any] = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


def dequantize(data: NDArray[Any], kind: Any) -> NDArray[np.float32]:
    """Return the weights of a tensor, as ``gguf.dequantize`` computes them.

    Blocks are independent of the rows they stand in, so several rows are handed over as one.

    Args:
        data: as `ReadTensor` has it.
        kind: its ``gguf.GGMLQuantizationType``.
    """
    from gguf import quants

    if data.dtype != np.uint8 or data.ndim < 2:
        return np.asarray(quants.dequantize(data, kind))
    together = _rows_together(prod(data.shape[:-1]), data.shape[-1])
    weights = quants.dequantize(np.ascontiguousarray(data).reshape(-1, together * data.shape[-1]), kind)
    return np.asarray(weights).reshape(*data.shape[:-1], -1)


def _rows_together(rows: int, width: int) -> int:
    """Return the largest divisor of the number of rows with which a long row has at most so many bytes, at least 1."""
    return max(n for n in range(1, max(1, min(rows, _ROW_BYTES // width)) + 1) if rows % n == 0)
