"""K-quants of GGUF files: super-blocks of 256 weights whose groups have integer scales, taken apart and put together.

Layouts are those of the ggml project. ``D`` and ``M`` are the float16 numbers of a super-block, ``a`` and ``b`` the
integers of its groups; what is handed out are the products ``D a`` and ``-M b``, exact in float32 (see
`formats.superblock`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.superblock import SUPER, TYPES, factored

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int16]


class Parts(NamedTuple):
    """Super-blocks taken apart: integers, and the two factors ``[blocks, 1]``."""

    codes: Codes  # [blocks, 256]
    a: Codes  # [blocks, groups]
    D: NDArray[np.float16]
    b: Codes | None = None
    M: NDArray[np.float16] | None = None


def products(parts: Parts) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, Codes]:
    """Return scales and minima ``[blocks, groups]``, float32, and codes ``[blocks, 256]``."""
    scales = parts.D.astype(np.float32) * parts.a.astype(np.float32)
    if parts.b is None or parts.M is None:
        return scales, None, parts.codes
    return scales, -(parts.M.astype(np.float32) * parts.b.astype(np.float32)), parts.codes


def integers(kind: str, scales: Tensor, zeros: Tensor | None, codes: Codes) -> Parts:
    """Return what a file stores for scales and minima ``[d_out, groups]``.

    Raises:
        FormatError: If no factors and integers have these products.
    """
    shape = TYPES[kind.lower()]
    per = SUPER // shape.group
    found: list[tuple[NDArray[np.float16], Codes]] = []
    for values, sign in ((scales, 1), (zeros, -1)):
        if values is None:
            continue
        wanted = values.cpu().float().reshape(-1, per)
        factor, steps = factored(wanted, shape.scale_bits, signed=shape.signed)
        if not torch.equal(factor.float() * steps, wanted):
            raise FormatError(f"{kind}: these scales are no products of a float16 number and integers.")
        found.append(((sign * factor).numpy(), steps.numpy().astype(np.int16)))
    (D, a), *rest = found
    return Parts(codes, a, D, rest[0][1], rest[0][0]) if rest else Parts(codes, a, D)


def _float16(blocks: Bytes, start: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)


def _two_bytes(values: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(values.astype(np.float16).reshape(-1, 1)).view(np.uint8)


_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)


def _pairs(packed: Bytes) -> Codes:
    """Return codes of two bits ``[n, 4 m]`` from runs of 32 bytes: bits 0 and 1 of a whole run first, then 2 and 3."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    return ((runs >> _SHIFTS) & 3).reshape(len(packed), -1).astype(np.int16)


def _packed_pairs(codes: Codes) -> Bytes:
    runs = codes.reshape(len(codes), -1, 4, 32).astype(np.uint8) << _SHIFTS
    packed: Bytes = np.bitwise_or.reduce(runs, axis=2).reshape(len(codes), -1)
    return packed


def _nibbles(packed: Bytes, run: int) -> Codes:
    """Return codes of four bits from runs of bytes: the low halves of a run, then its high halves."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return (np.concatenate([runs & 15, runs >> 4], axis=2)).reshape(len(packed), -1).astype(np.int16)


def _packed_nibbles(codes: Codes, run: int) -> Bytes:
    runs = codes.reshape(len(codes), -1, 2, run).astype(np.uint8)
    packed: Bytes = (runs[:, :, 0] | (runs[:, :, 1] << 4)).astype(np.uint8).reshape(len(codes), -1)
    return packed


def _planes(packed: Bytes) -> Codes:
    """Return one bit per weight ``[n, 256]`` from 32 bytes: bit 0 of all of them first."""
    return ((packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(len(packed), -1).astype(np.int16)


def _packed_planes(bits: Codes) -> Bytes:
    shifted = bits.reshape(len(bits), 8, 32).astype(np.uint8) << np.arange(8, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=1)
    return packed


def _six_bits(packed: Bytes) -> tuple[Codes, Codes]:
    """Return eight scales and eight minima of six bits from 12 bytes: the last four of each lend bits of the first."""
    low, high, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    a = np.concatenate([low & 63, (mixed & 15) | ((low >> 6) << 4)], axis=1)
    b = np.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], axis=1)
    return a.astype(np.int16), b.astype(np.int16)


def _packed_six_bits(a: Codes, b: Codes) -> Bytes:
    a8, b8 = a.astype(np.uint8), b.astype(np.uint8)
    low, high = a8[:, :4] | ((a8[:, 4:] >> 4) << 6), b8[:, :4] | ((b8[:, 4:] >> 4) << 6)
    return np.concatenate([low, high, (a8[:, 4:] & 15) | ((b8[:, 4:] & 15) << 4)], axis=1)


def _read_q2(blocks: Bytes) -> Parts:
    both = blocks[:, :16].astype(np.int16)
    return Parts(_pairs(blocks[:, 16:80]), both & 15, _float16(blocks, 80), both >> 4, _float16(blocks, 82))


def _write_q2(parts: Parts) -> Bytes:
    assert parts.b is not None
    assert parts.M is not None
    both = (parts.a | (parts.b << 4)).astype(np.uint8)
    return np.concatenate([both, _packed_pairs(parts.codes), _two_bytes(parts.D), _two_bytes(parts.M)], axis=1)


def _read_q3(blocks: Bytes) -> Parts:
    codes = _pairs(blocks[:, 32:96]) + 4 * _planes(blocks[:, :32]) - 4
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate([low & 15, low >> 4], axis=1) | (
        ((high[:, None, :] >> _SHIFTS[0].reshape(1, 4, 1)) & 3).reshape(-1, 16) << 4
    )
    return Parts(codes, scales.astype(np.int16) - 32, _float16(blocks, 108))


def _write_q3(parts: Parts) -> Bytes:
    codes, scales = parts.codes + 4, (parts.a + 32).astype(np.uint8)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    high = np.bitwise_or.reduce((scales >> 4).reshape(-1, 4, 4) << _SHIFTS[0].reshape(1, 4, 1), axis=1)
    return np.concatenate(
        [_packed_planes(codes >> 2), _packed_pairs(codes & 3), low, high, _two_bytes(parts.D)], axis=1
    )


def _read_q4(blocks: Bytes) -> Parts:
    a, b = _six_bits(blocks[:, 4:16])
    return Parts(_nibbles(blocks[:, 16:], 32), a, _float16(blocks, 0), b, _float16(blocks, 2))


def _heads(parts: Parts) -> list[Bytes]:
    assert parts.b is not None
    assert parts.M is not None
    return [_two_bytes(parts.D), _two_bytes(parts.M), _packed_six_bits(parts.a, parts.b)]


def _write_q4(parts: Parts) -> Bytes:
    return np.concatenate([*_heads(parts), _packed_nibbles(parts.codes, 32)], axis=1)


def _read_q5(blocks: Bytes) -> Parts:
    a, b = _six_bits(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) + 16 * _planes(blocks[:, 16:48])
    return Parts(codes, a, _float16(blocks, 0), b, _float16(blocks, 2))


def _write_q5(parts: Parts) -> Bytes:
    codes = parts.codes
    return np.concatenate([*_heads(parts), _packed_planes(codes >> 4), _packed_nibbles(codes & 15, 32)], axis=1)


def _read_q6(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, :128], 64) + 16 * _pairs(blocks[:, 128:192]) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.int16)
    return Parts(codes, scales, _float16(blocks, 208))


def _write_q6(parts: Parts) -> Bytes:
    codes, scales = parts.codes + 32, parts.a.astype(np.int8).view(np.uint8)
    return np.concatenate(
        [_packed_nibbles(codes & 15, 64), _packed_pairs(codes >> 4), scales, _two_bytes(parts.D)], axis=1
    )


class Layout(NamedTuple):
    """How super-blocks of one type are read and written, and their bytes."""

    read: Callable[[Bytes], Parts]
    write: Callable[[Parts], Bytes]
    size: int


LAYOUTS = {
    "Q2_K": Layout(_read_q2, _write_q2, 84),
    "Q3_K": Layout(_read_q3, _write_q3, 110),
    "Q4_K": Layout(_read_q4, _write_q4, 144),
    "Q5_K": Layout(_read_q5, _write_q5, 176),
    "Q6_K": Layout(_read_q6, _write_q6, 210),
}
