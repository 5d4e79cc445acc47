"""Layers as compressed-tensors stores them (llm-compressor, vLLM); read without that package.

    pack-quantized                    weight_packed [d_out, d_in bits / 32], weight_shape; zero points packed too
    int-quantized, naive-quantized    weight, int8
    float-quantized                   weight, float8_e4m3

each with ``weight_scale``: one per tensor, channel ``[d_out, 1]``, group ``[d_out, groups]`` or block. Integers are
counted from ``-2^(bits-1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peelwise.errors import UnsupportedModelError
from peelwise.model.weights.float8 import floats
from peelwise.model.weights.packing import Read, by_column, in_order, integers, unpacked_bits

PARTS = (
    *("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "weight"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense", "mixed-precision")


def read_compressed(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Read:
    """Return what one layer holds.

    Args:
        tensors: of `PARTS` by name.
        said: the configuration, whose ``format`` is one of `FORMATS`.
    """
    if said.get("format") not in (None, *FORMATS):
        raise UnsupportedModelError(
            f"Not yet: compressed-tensors of format {str(said['format'])[:60]!r}. Expected one of "
            f"{', '.join(FORMATS)}: decompress it with compressed-tensors and save that."
        )
    scales = _matrix(tensors["weight_scale"])
    packed, zeros = tensors.get("weight_packed"), tensors.get("weight_zero_point")
    if packed is None:
        weight = tensors["weight"]
        if weight.dtype != torch.int8:
            return floats(weight, scales, _block(said))
        codes, bits = weight.to(torch.int16) + 128, 8
    else:
        d_out, d_in = (int(size) for size in tensors["weight_shape"])
        bits = packed.shape[1] * 32 // d_in
        codes = unpacked_bits(packed, bits, d_in).to(torch.int16)
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = unpacked_bits(zeros.T, bits, d_out).T.to(torch.int16) - 2 ** (bits - 1)
    half = 2 ** (bits - 1)
    zeros = None if zeros is None else _matrix(zeros).to(torch.int16) + half
    group_of = tensors.get("weight_g_idx")
    if not in_order(group_of, scales.shape[1], codes.shape[1]):
        assert group_of is not None
        return by_column(codes, scales, torch.full_like(scales, half) if zeros is None else zeros, group_of)
    return integers(codes, scales, zeros, bits)


def _block(said: Mapping[str, Any]) -> Any:
    """Return the sides of blocks, if the weights of any group have them."""
    groups = said.get("config_groups")
    found = [(group.get("weights") or {}) for group in (groups.values() if isinstance(groups, dict) else ())]
    return next((each["block_structure"] for each in found if each.get("strategy") == "block"), None)


def _matrix(values: Tensor) -> Tensor:
    return values if values.dim() == 2 else values.reshape(-1, 1)
