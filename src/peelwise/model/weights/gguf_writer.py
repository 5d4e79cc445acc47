"""A GGUF file with other codes: everything of a file as it is, but the linear layers that were quantised again.

Names, metadata and vocabulary are those of the file that the model was opened from; layouts of blocks are those of the
ggml project, the reverse of `peelwise.model.weights.gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from peelwise.errors import FormatError, MissingExtraError, ModelError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.weights.gguf import BLOCK_FORMATS, names_in, read_blocks, rows_in_file
from peelwise.model.weights.gguf_k import LAYOUTS, integers
from peelwise.model.weights.gguf_reader import FileReader, dequantize

_Bytes = NDArray[np.uint8]
_Codes = Mapping[str, tuple[Format, Encoded]]


def kind_of(form: Format) -> str:
    """Return the type of GGUF that holds a format, such as ``"Q4_1"``.

    Raises:
        FormatError: If there is none.
    """
    for kind, (name, _, _) in BLOCK_FORMATS.items():
        if kind in WRITTEN and parse_format(name).name == form.name:
            return kind
    have = ", ".join(f"{BLOCK_FORMATS[kind][0]} ({kind})" for kind in WRITTEN)
    raise FormatError(f"GGUF has no blocks for {form.name}. Expected one of {have}.")


def write_gguf(source: Path, file: Path, model: nn.Module, codes: _Codes) -> None:
    """Write a copy of a GGUF file in which the layers given have other codes.

    Args:
        source: the file that ``model`` was opened from.
        file: to write.
        model: with the weights of ``source``; some converters keep rows in another order, found by comparing them.
        codes: format and codes per layer, by its name in the model.

    Raises:
        FormatError: If GGUF has no such format, or ``source`` is not the model's file.
        ModelError: If what was written does not read back as the same weights to the bit.
        MissingExtraError: Without the gguf package.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("Writing a .gguf file", "gguf") from error
    reader, blocks = FileReader(source), find_blocks(model)
    names = names_in(reader, len(blocks))
    by_name = {linear.name: linear for block in blocks for linear in block.linears}
    packed: dict[str, tuple[str, _Bytes]] = {}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, (form, encoded) in codes.items():
        there = f"{names.get_name(name, try_suffixes=('.weight',))}.weight"
        if there not in stored:
            raise FormatError(f"{source} holds no tensor for {name}. Give the file that the model was opened from.")
        held = torch.from_numpy(np.array(dequantize(stored[there].data, stored[there].tensor_type), dtype=np.float32))
        rows = rows_in_file(held, by_name[name].weight().float().cpu())
        if rows is None:
            raise FormatError(f"{source} does not store the weights of {name}. Give the file that it was opened from.")
        kind = kind_of(form)
        packed[there] = kind, pack(kind, _in_rows(encoded, rows))
    writer = gguf.GGUFWriter(file, str(reader.architecture))
    for field in gguf.GGUFReader(source).fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        kinds = field.types
        inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name in packed:
            kind, data = packed[tensor.name]
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check_same(file, packed)


def pack(kind: str, encoded: Encoded) -> _Bytes:
    """Return the bytes ``[d_out, bytes of a row]`` of one tensor, the reverse of `read_blocks`.

    Args:
        kind: its type, such as ``"Q4_1"``.
        encoded: codes and scales of the format that this type holds.
    """
    size = BLOCK_FORMATS[kind][1]
    d_out = len(encoded.codes)
    codes = encoded.codes.cpu().numpy().astype(np.int16).reshape(-1, size)
    assert encoded.scales is not None
    if kind in LAYOUTS:
        parts = integers(kind, encoded.scales, encoded.zeros, codes)
        return LAYOUTS[kind].write(parts).reshape(d_out, -1)
    heads = [_two_bytes(encoded.scales)]
    if encoded.zeros is not None:
        heads.append(_two_bytes(encoded.zeros))
    return np.concatenate([*heads, PACKERS[kind](codes)], axis=1).reshape(d_out, -1)


def _check_same(file: Path, packed: Mapping[str, tuple[str, _Bytes]]) -> None:
    """Read the file back and compare what it holds with what was to be written."""
    for tensor in FileReader(file).tensors:
        if tensor.name in packed:
            kind, data = packed[tensor.name]
            form, written = read_blocks(kind, np.asarray(tensor.data))
            _, meant = read_blocks(kind, data)
            if tensor.tensor_type.name != kind or not torch.equal(form.decode(written), form.decode(meant)):
                raise ModelError(f"{file}: {tensor.name} does not read back as it was written. Nothing was kept.")


def _in_rows(encoded: Encoded, rows: torch.Tensor) -> Encoded:
    """Return the codes in the order of the file: row ``i`` of the model is row ``rows[i]`` there."""
    order = torch.empty_like(rows)
    order[rows] = torch.arange(len(rows))
    assert encoded.scales is not None
    zeros = None if encoded.zeros is None else encoded.zeros[order]
    return Encoded(encoded.codes[order], encoded.scales[order], zeros)


def _two_bytes(values: torch.Tensor) -> _Bytes:
    halves = np.ascontiguousarray(values.cpu().to(torch.float16).numpy()).reshape(-1, 1)
    return halves.view(np.uint8)


def _halves(codes: NDArray[np.int16]) -> _Bytes:
    """Return 16 bytes from 32 codes of four bits: the first half in the low bits."""
    low, high = codes[:, :16] & 15, codes[:, 16:] & 15
    return (low | (high << 4)).astype(np.uint8)


def _fifth_bits(codes: NDArray[np.int16]) -> _Bytes:
    return np.packbits(((codes >> 4) & 1).astype(np.uint8), axis=1, bitorder="little")


def _fives(codes: NDArray[np.int16]) -> _Bytes:
    return np.concatenate([_fifth_bits(codes), _halves(codes)], axis=1)


# Type -> its codes as bytes, behind scale and minimum.
PACKERS: dict[str, Callable[[NDArray[np.int16]], Any]] = {
    "Q4_0": lambda codes: _halves(codes + 8),
    "Q4_1": _halves,
    "Q5_0": lambda codes: _fives(codes + 16),
    "Q5_1": _fives,
    "Q8_0": lambda codes: codes.astype(np.int8).view(np.uint8),
}
WRITTEN = (*PACKERS, *LAYOUTS)
