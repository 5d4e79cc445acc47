"""Weights of torchao: integer tensors, and layers that train with fake quantisation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.formats.base import Encoded
from peelwise.formats.integer import Integer
from peelwise.formats.layout import Layout
from peelwise.formats.recover import check_decodes
from peelwise.formats.scaled import SCALE_DTYPES
from peelwise.model.weights.held import Adapter, Held


def _read_torchao(module: Any) -> Held:
    weight = module.weight
    bits = 8 if type(weight).__name__ == "Int8Tensor" else _digits(weight.target_dtype)
    found = _integer(weight.qdata, weight.scale, weight.zero_point, bits, weight.block_size)
    check_decodes(found.encoded, weight.dequantize().float(), found.format)
    return found


def _write_torchao(module: Any, encoded: Encoded) -> None:
    weight = module.weight
    assert encoded.scales is not None
    offset = 0 if encoded.zeros is None else 2 ** (_digits(weight.target_dtype) - 1)  # our codes begin at 0 there
    weight.qdata.copy_(encoded.codes.to(torch.int16) - offset)
    weight.scale.copy_(encoded.scales.reshape(weight.scale.shape))
    if encoded.zeros is not None:
        weight.zero_point.copy_((encoded.zeros.to(torch.int16) - offset).reshape(weight.zero_point.shape))


def _read_torchao_training(module: Any) -> Held:
    quantizer, latent = module.weight_fake_quantizer, module.weight.detach()
    if not hasattr(quantizer.config, "group_size"):
        raise UnsupportedModelError(f"Not yet: {type(quantizer.config).__name__} of torchao. Expected integer weights.")
    effective = quantizer(latent)  # also brings its scales up to date
    d_out, d_in = latent.shape
    scale, zero = (t.detach().reshape(d_out, -1) for t in (quantizer.scale, quantizer.zero_point))
    size = d_in // scale.shape[1]
    spread = (t.float().repeat_interleave(size, dim=1) for t in (scale, zero))
    codes = (effective.float() / next(spread)).round() + next(spread)
    found = _integer(codes, scale, zero, _digits(quantizer.config.dtype), (1, size))
    check_decodes(found.encoded, effective.float(), found.format)
    return Held(found.format, found.encoded, latent)


def _integer(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block: Any) -> Held:
    """Return signed codes, with scales and zero points per block, as an integer format."""
    if bits < 2 or scale.dtype not in SCALE_DTYPES.values():
        raise UnsupportedModelError(f"Not yet: int{bits} weights of torchao with {scale.dtype} scales.")
    d_out, d_in = codes.shape
    rows, columns = (int(size) for size in block)
    if rows not in (1, d_out) or (rows == d_out > 1 and columns != d_in):
        raise UnsupportedModelError(f"Not yet: torchao weights with a scale per block of {rows} x {columns}.")
    per_tensor = rows == d_out and columns == d_in and d_out > 1
    layout = Layout("tensor") if per_tensor else Layout("channel") if columns == d_in else Layout("group", columns)
    scales = scale.reshape(1 if per_tensor else d_out, d_in // columns)
    if zero is None or not bool((zero != 0).any()):
        symmetric = Integer(layout, scales.dtype, width=bits, kind="symmetric")
        return Held(symmetric, Encoded(codes.to(torch.int8), scales))
    half = 2 ** (bits - 1)  # our codes of formats with a zero point begin at 0
    zeros = zero.reshape(scales.shape).float() + half
    if bool((zeros != zeros.round()).any()) or bool((zeros < 0).any()) or bool((zeros >= 2 * half).any()):
        raise UnsupportedModelError("Not yet: torchao weights whose zero points are not codes.")
    affine = Integer(layout, scales.dtype, width=bits, kind="affine")
    return Held(affine, Encoded((codes.float() + half).to(torch.uint8), scales, zeros.to(torch.uint8)))


def _read_unknown_torchao(module: Any) -> Held:
    raise UnsupportedModelError(
        f"Not yet: torchao weights stored as {type(module.weight).__name__}. Expected integer weights that are not "
        "packed for one kind of machine (IntxWeightOnlyConfig, Int8WeightOnlyConfig)."
    )


def _digits(dtype: object) -> int:
    match = re.search(r"int(\d+)", str(dtype).lower())
    if match is None:
        raise UnsupportedModelError(f"Not yet: torchao weights of {dtype}. Expected integers.")
    return int(match[1])


def _weight_is(*kinds: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        stored = type(getattr(module, "weight", None))
        return stored.__module__.startswith("torchao.") and (not kinds or stored.__name__ in kinds)

    return matches


def _trains_in_torchao(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("torchao.") and getattr(module, "weight_fake_quantizer", None) is not None
    return ours and bool(getattr(module.weight_fake_quantizer, "enabled", True))


ADAPTERS = (
    Adapter("torchao", _weight_is("IntxUnpackedToInt8Tensor", "Int8Tensor"), _read_torchao, _write_torchao),
    Adapter("torchao, in training", _trains_in_torchao, _read_torchao_training),
    Adapter("torchao, other", _weight_is(), _read_unknown_torchao),
)
