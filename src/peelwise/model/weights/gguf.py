"""Codes and scales of GGUF files as they are stored, for the linear layers of the model opened from the same file.

A block is 32 neighbouring inputs (256 in ternary types) with a float16 scale, perhaps a float16 minimum, and codes of
two, four, five or eight bits; K-quants are in `gguf_k`. Layouts and names of tensors are those of the ggml project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peelwise.errors import FormatError, MissingExtraError, UnsupportedModelError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.dense import Stored
from peelwise.formats.superblock import SUPER
from peelwise.formats.table import parse_format
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.weights.gguf_k import LAYOUTS, products
from peelwise.model.weights.gguf_reader import FileReader
from peelwise.model.weights.held import Held

_Bytes = NDArray[np.uint8]
# Scales, minima or none, and codes: [blocks, groups], [blocks, groups], [blocks, weights]; one group but in K-quants.
_Parts = tuple[NDArray[np.floating], NDArray[np.floating] | None, NDArray[np.int16]]


def stored_layers(file: str | Path, blocks: Sequence[Block], *, numbers: bool = False) -> dict[LinearLayer, Held]:
    """Return what a GGUF file holds for every linear layer of a model that was opened from it.

    Rows are in the order of the model's own weights: some converters keep those of queries and keys in another.

    Args:
        file: the ``.gguf`` file.
        blocks: of the opened (dequantised) model; see `find_blocks`.
        numbers: take the dequantised numbers of layers whose blocks are not read, instead of raising an error.

    Returns:
        Per layer, format and codes; layers stored as floating-point numbers are left out.

    Raises:
        ModelError: If the file is damaged.
        FormatError: If the file does not hold the weights of the model.
        UnsupportedModelError: If a layer is stored in a block format that is not read yet.
        MissingExtraError: Without the gguf package.
    """
    path = Path(file)
    if find_spec("gguf") is None:
        raise MissingExtraError("Reading the blocks of a .gguf file", "gguf")
    reader = FileReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = names_in(reader, len(blocks))
    found = {}
    for linear in (linear for block in blocks for linear in block.linears):
        name = names.get_name(linear.name, try_suffixes=(".weight",))
        tensor = tensors.get(f"{name}.weight")
        if tensor is None:
            raise FormatError(
                f"{path} holds no tensor for {linear.name}. Give the file that the model was opened from."
            )
        kind = tensor.tensor_type.name
        if kind in ("F32", "F16", "BF16"):
            continue
        if kind not in BLOCK_FORMATS:
            if numbers:
                weight = linear.weight().float()
                stored = Stored(layout=kind, each=8 * np.asarray(tensor.data).nbytes / weight.numel())
                found[linear] = Held(stored, Encoded(weight))
                continue
            raise UnsupportedModelError(
                f"Not yet: {linear.name} is stored as {kind}; blocks that are read: {', '.join(BLOCK_FORMATS)}. "
                "The dequantised weights can be audited all the same."
            )
        form, encoded = read_blocks(kind, np.asarray(tensor.data))
        found[linear] = Held(form, _in_row_order(encoded, form, linear, path))
    return found


def read_blocks(kind: str, data: _Bytes) -> tuple[Format, Encoded]:
    """Return format and codes of one tensor.

    Args:
        kind: its type, such as ``"Q4_1"``.
        data: its bytes ``[d_out, bytes of a row]``.
    """
    name, _, unpack = BLOCK_FORMATS[kind]
    form = parse_format(name)
    width = BLOCK_BYTES[kind]
    d_out = data.shape[0]
    scales, minima, codes = unpack(np.ascontiguousarray(data).reshape(-1, width))
    dtype = np.uint8 if minima is not None else np.int8
    zeros = None if minima is None else torch.from_numpy(minima.reshape(d_out, -1).copy())
    return form, Encoded(
        torch.from_numpy(codes.astype(dtype).reshape(d_out, -1)),
        torch.from_numpy(scales.reshape(d_out, -1).copy()),
        zeros,
    )


def names_in(reader: FileReader, blocks: int) -> Any:
    """Return the package's table of tensor names for the architecture of a file."""
    import gguf

    architecture = reader.architecture
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UnsupportedModelError(f"Not yet: GGUF files of architecture {architecture!r}, whose names are not known.")
    return gguf.get_tensor_name_map(known[architecture], blocks)


def _in_row_order(encoded: Encoded, form: Format, linear: LinearLayer, path: Path) -> Encoded:
    """Return the codes with rows in the order of the layer's weight, found by comparing the rows themselves."""
    stored = form.decode(encoded)
    if not bool(stored.isfinite().all()):
        raise FormatError(f"{path}: blocks of {linear.name} have scales of NaN or Inf. Convert the model again.")
    rows = rows_in_file(stored, linear.weight().float().cpu())
    if rows is None:
        raise FormatError(
            f"{path} does not store the weights of {linear.name}. Give the file that the model was opened from."
        )
    zeros = None if encoded.zeros is None else encoded.zeros[rows]
    assert encoded.scales is not None
    return Encoded(encoded.codes[rows], encoded.scales[rows], zeros)


def rows_in_file(there: torch.Tensor, here: torch.Tensor) -> torch.Tensor | None:
    """Return for every row of a layer's weight which row of the file it is, ``[d_out]``; ``None`` if they differ.

    Args:
        there: weights of the file ``[d_out, d_in]``, float32.
        here: of the opened model.
    """
    if torch.equal(there, here):
        return torch.arange(len(here))
    if there.shape != here.shape:
        return None
    order_there, order_here = (_row_order(matrix) for matrix in (there, here))
    if not torch.equal(there[order_there], here[order_here]):
        return None
    rows = torch.empty_like(order_here)
    rows[order_here] = order_there
    return rows


def _row_order(matrix: torch.Tensor) -> torch.Tensor:
    # Adding 0 turns -0, which is another row of bytes, into 0.
    rows = np.ascontiguousarray((matrix + 0.0).numpy()).view(f"V{4 * matrix.shape[1]}").ravel()
    return torch.from_numpy(np.argsort(rows.view(f"S{4 * matrix.shape[1]}"), kind="stable"))


def _halves(packed: _Bytes) -> NDArray[np.int16]:
    """Return 32 codes of a block from 16 bytes: the low half of every byte, then the high half."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int16)


def _fifth_bits(packed: _Bytes) -> NDArray[np.int16]:
    """Return the fifth bit of 32 codes from four bytes, worth 16."""
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.int16) << 4


def _float16(blocks: _Bytes, start: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)


def _q4_0(blocks: _Bytes) -> _Parts:
    return _float16(blocks, 0), None, _halves(blocks[:, 2:]) - 8


def _q4_1(blocks: _Bytes) -> _Parts:
    return _float16(blocks, 0), _float16(blocks, 2), _halves(blocks[:, 4:])


def _q5_0(blocks: _Bytes) -> _Parts:
    return _float16(blocks, 0), None, _halves(blocks[:, 6:]) + _fifth_bits(blocks[:, 2:6]) - 16


def _q5_1(blocks: _Bytes) -> _Parts:
    return _float16(blocks, 0), _float16(blocks, 2), _halves(blocks[:, 8:]) + _fifth_bits(blocks[:, 4:8])


def _q8_0(blocks: _Bytes) -> _Parts:
    return _float16(blocks, 0), None, np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.int16)


def _tq2_0(blocks: _Bytes) -> _Parts:
    """Two runs of 32 bytes, each with four codes of two bits, 32 weights apart."""
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    codes = ((packed >> shifts) & 3).reshape(len(blocks), 256).astype(np.int16)
    return _float16(blocks, 64), None, codes - 1


def _super(kind: str) -> Callable[[_Bytes], _Parts]:
    return lambda blocks: products(LAYOUTS[kind].read(blocks))


# Type -> our format, weights per block, and how a block is taken apart.
BLOCK_FORMATS: dict[str, tuple[str, int, Callable[[_Bytes], _Parts]]] = {
    "Q4_0": ("int4:group=32", 32, _q4_0),
    "Q4_1": ("int4:group=32,minimum", 32, _q4_1),
    "Q5_0": ("int5:group=32", 32, _q5_0),
    "Q5_1": ("int5:group=32,minimum", 32, _q5_1),
    "Q8_0": ("int8:group=32", 32, _q8_0),
    "TQ2_0": ("ternary:group=256", 256, _tq2_0),
    **{kind: (kind.lower(), SUPER, _super(kind)) for kind in LAYOUTS},
}
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "TQ2_0": 66} | {
    kind: layout.size for kind, layout in LAYOUTS.items()
}
