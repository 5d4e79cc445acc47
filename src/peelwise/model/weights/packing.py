"""Codes of any number of bits in words of 32, and what codes with scales and zero points are as one of our formats."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peelwise.errors import ModelError
from peelwise.formats.base import Encoded
from peelwise.formats.integer import Integer
from peelwise.formats.layout import Layout
from peelwise.formats.scaled import SCALE_DTYPES
from peelwise.model.weights.held import Held

# What a packed layer holds: codes of a format, or plain numbers where none of our formats has its layout.
Read = Held | Tensor


def unpacked_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return codes ``[.., count]``, uint8, from words ``[.., n]``, int32: one behind the other from the lowest bit on.

    A code may begin in one word and end in the next.

    Raises:
        ModelError: If the words hold fewer codes.
    """
    if words.dtype != torch.int32 or words.shape[-1] * 32 < bits * count:
        raise ModelError(f"expected {count} codes of {bits} bits in 32-bit words, got {_said(words)}")
    stream = np.unpackbits(words.contiguous().cpu().numpy().view(np.uint8), axis=-1, bitorder="little")
    codes = stream[..., : bits * count].reshape(*words.shape[:-1], count, bits)
    return torch.from_numpy(np.packbits(codes, axis=-1, bitorder="little")[..., 0])


def packed_bits(codes: Tensor, bits: int) -> Tensor:
    """Return words ``[.., n]``, int32, of codes ``[.., count]`` from 0 on; the reverse of `unpacked_bits`."""
    count = codes.shape[-1]
    stream = np.unpackbits(codes.to(torch.uint8).numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = stream.reshape(*codes.shape[:-1], count * bits)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view(np.int32).copy())


def integers(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Read:
    """Return ``W = s (q - z)`` as an integer format, or as numbers where a zero point is no code.

    Args:
        codes: ``[d_out, d_in]`` from 0 to ``2^bits - 1``.
        scales: ``[rows, groups]``: ``rows`` is ``d_out``, 1 or the number of square blocks.
        zeros: as ``scales``; ``None`` for ``2^(bits-1)``.
        bits: of a code.

    Raises:
        ModelError: If the scales do not divide the matrix.
    """
    d_out, d_in = codes.shape
    half = 2 ** (bits - 1)
    scales = scales if scales.dtype in SCALE_DTYPES.values() else scales.float()
    layout = layout_of((d_out, d_in), scales)
    if zeros is None or bool((zeros == half).all()):
        signed = (codes.to(torch.int16) - half).to(torch.int8)
        if layout is not None:
            return Held(Integer(layout, scales.dtype, width=bits), Encoded(signed, scales.contiguous()))
        weight: Tensor = signed.float() * spread(scales, d_out, d_in)
        return weight
    if layout is not None and bool(((zeros >= 0) & (zeros < 2 * half)).all()):
        affine = Integer(layout, scales.dtype, width=bits, kind="affine")
        return Held(affine, Encoded(codes.to(torch.uint8), scales.contiguous(), zeros.to(torch.uint8).contiguous()))
    return (codes.float() - spread(zeros, d_out, d_in)) * spread(scales, d_out, d_in)


def layout_of(shape: tuple[int, int], scales: Tensor) -> Layout | None:
    """Return which weights share a scale of ``scales [rows, groups]``; ``None`` for blocks that are not square.

    Raises:
        ModelError: If they do not divide the matrix.
    """
    (d_out, d_in), (rows, groups) = shape, scales.shape
    if rows == 0 or groups == 0 or d_out % rows or d_in % groups:
        raise ModelError(f"scales {tuple(scales.shape)} do not divide a matrix of {shape}")
    if rows == d_out:
        return Layout("channel") if groups == 1 else Layout("group", d_in // groups)
    if rows == groups == 1:
        return Layout("tensor")
    return Layout("block", d_in // groups) if d_out // rows == d_in // groups else None


def spread(values: Tensor, d_out: int, d_in: int) -> Tensor:
    """Return one number per weight ``[d_out, d_in]``, float32, from one per scale ``[rows, groups]``."""
    rows, groups = values.shape
    return values.float().repeat_interleave(d_out // rows, dim=0).repeat_interleave(d_in // groups, dim=1)


def by_column(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    """Return ``W = s (q - z)`` where inputs have their groups in any order; float32.

    Args:
        codes: ``[d_out, d_in]``.
        scales, zeros: ``[d_out, groups]``.
        group_of: the group of every input ``[d_in]``.

    Raises:
        ModelError: If an input names a group that is not there.
    """
    group_of = group_of.long()
    if group_of.shape != codes.shape[1:] or int(group_of.min()) < 0 or int(group_of.max()) >= scales.shape[1]:
        raise ModelError(f"g_idx should name one of {scales.shape[1]} groups for each of {codes.shape[1]} inputs")
    return (codes.float() - zeros.float()[:, group_of]) * scales.float()[:, group_of]


def in_order(group_of: Tensor | None, groups: int, d_in: int) -> bool:
    """Whether groups are neighbouring inputs, one group after the other."""
    if group_of is None:
        return True
    return d_in % groups == 0 and torch.equal(group_of.long(), torch.arange(d_in) // (d_in // groups))


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
