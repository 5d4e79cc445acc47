"""The weights that a linear map computes with, and the codes that it stores: one small adapter per kind of module.

A module says so itself by a method ``effective_weight()`` that returns ``[d_out, d_in]`` and an attribute ``format``
(a `Format` or its name); ``encoded()`` may hand out its codes, otherwise they are read from the values. Other people's
modules are known by their class, so that nothing is imported which the model does not use already.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import FormatError, UnsupportedModelError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.integer import Integer
from peelwise.formats.layout import Layout
from peelwise.formats.recover import check_decodes, recover
from peelwise.formats.scaled import SCALE_DTYPES
from peelwise.formats.table import parse_format
from peelwise.formats.ternary import Ternary

_BITNET_FLOOR = 1e-5  # of the scale, as BitNet's layers have it


@dataclass(frozen=True, eq=False)
class Held:
    """What a low-bit linear map holds.

    Attributes:
        format: the format that its weights obey.
        encoded: its codes, scales and zero points.
        latent: the full-precision weight ``[d_out, d_in]`` that training moves, or ``None``.
    """

    format: Format
    encoded: Encoded
    latent: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The effective weight ``[d_out, d_in]``, float32."""
        return self.format.decode(self.encoded)


@dataclass(frozen=True)
class Adapter:
    """How one kind of module is recognised and read, and given other codes where that is possible."""

    name: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[Any], Held]
    write: Callable[[Any, Encoded], None] | None = None


def held(module: nn.Module) -> Held | None:
    """Return what a module holds inside a format, or ``None`` if its weights are plain floating-point numbers.

    Raises:
        FormatError: If the module does not store what its format says.
        UnsupportedModelError: If its codes cannot be read.
    """
    for adapter in ADAPTERS:
        if adapter.matches(module):
            with torch.no_grad():
                return adapter.read(module)
    return None


@torch.no_grad()
def hold_(module: nn.Module, encoded: Encoded) -> None:
    """Let a low-bit module compute with other codes, scales and zero points of its format, in place.

    Args:
        module: one that `held` knows.
        encoded: what it shall hold, on any device.

    Raises:
        FormatError: If the module's own ``hold_`` says so.
        UnsupportedModelError: If modules of its kind cannot be given codes.
    """
    write = getattr(module, "hold_", None)
    if not callable(write):
        own = next((adapter.write for adapter in ADAPTERS if adapter.matches(module)), None)
        write = None if own is None else partial(own, module)
    if write is None:
        raise UnsupportedModelError(f"{type(module).__name__} cannot be given other codes.")
    write(encoded)


def is_low_bit(module: nn.Module) -> bool:
    """Whether `held` knows the module."""
    return any(adapter.matches(module) for adapter in ADAPTERS)


def effective_weight(module: nn.Module) -> Tensor | None:
    """Return the weight ``[d_out, d_in]`` that a low-bit module computes with, ``None`` for any other module."""
    found = held(module)
    return None if found is None else found.weight


def _read_protocol(module: Any) -> Held:
    form = parse_format(module.format) if isinstance(module.format, str) else module.format
    weight = module.effective_weight().detach()
    encoded = module.encoded() if callable(getattr(module, "encoded", None)) else recover(weight, form)
    check_decodes(encoded, weight.float(), form)
    latent = getattr(module, "weight", None)
    if isinstance(latent, nn.Parameter) and latent.shape == weight.shape:
        return Held(form, encoded, latent.detach())
    return Held(form, encoded)


def _read_packed_bitnet(module: Any) -> Held:
    """Four ternary codes to a byte, two bits each, a quarter of the rows apart; outputs are divided by the scale."""
    _refuse_inner_norm(module)
    packed = module.weight
    codes = torch.cat([((packed >> shift) & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])  # [d_out, d_in]
    return _ternary(codes, 1 / module.weight_scale.float())


def _write_packed_bitnet(module: Any, encoded: Encoded) -> None:
    assert encoded.scales is not None
    digits = (encoded.codes + 1).to(torch.uint8).chunk(4)
    module.weight.copy_(sum((digit << shift for digit, shift in zip(digits, (0, 2, 4, 6), strict=True)), digits[0] * 0))
    module.weight_scale.copy_(1 / encoded.scales.reshape(-1))


def _read_auto_bitnet(module: Any) -> Held:
    _refuse_inner_norm(module)
    weight = module.weight.detach().float()
    if module.online_quant:
        scale = weight.abs().mean().clamp_min(_BITNET_FLOOR)
        codes = (weight / scale).round().clamp(-1, 1).to(torch.int8)
        found = _ternary(codes, scale)
        return Held(found.format, found.encoded, module.weight.detach())
    codes = weight.round()
    if not torch.equal(codes, weight) or bool((codes.abs() > 1).any()):
        raise FormatError(
            "AutoBitLinear in offline mode should store codes -1, 0 and 1, got other values. Load it with "
            "quantization_mode='online' if the checkpoint holds latent weights."
        )
    return _ternary(codes.to(torch.int8), module.weight_scale.float())


def _write_auto_bitnet(module: Any, encoded: Encoded) -> None:
    if module.online_quant:
        raise UnsupportedModelError(
            "AutoBitLinear in online mode takes its scale from its latent weights, so it cannot be given another."
        )
    assert encoded.scales is not None
    module.weight.copy_(encoded.codes)
    module.weight_scale.copy_(encoded.scales.reshape(-1))


def _ternary(codes: Tensor, scale: Tensor) -> Held:
    form = Ternary(Layout("tensor"), torch.float32)
    return Held(form, Encoded(codes, scale.reshape(1, 1)))


def _refuse_inner_norm(module: Any) -> None:
    if getattr(module, "rms_norm", None) is not None:
        raise UnsupportedModelError(
            f"Not yet: {type(module).__name__} with a norm inside: its input is not what its weights are multiplied by."
        )


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


def _is(kind: str, where: str) -> Callable[[nn.Module], bool]:
    """Return whether a module is of a class of that name from a package; by name, so that nothing is imported."""
    return lambda module: type(module).__name__ == kind and type(module).__module__.startswith(where)


def _weight_is(*kinds: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        stored = type(getattr(module, "weight", None))
        return stored.__module__.startswith("torchao.") and (not kinds or stored.__name__ in kinds)

    return matches


def _follows_protocol(module: nn.Module) -> bool:
    return callable(getattr(module, "effective_weight", None)) and hasattr(module, "format")


def _trains_in_torchao(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("torchao.") and getattr(module, "weight_fake_quantizer", None) is not None
    return ours and bool(getattr(module.weight_fake_quantizer, "enabled", True))


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("protocol", _follows_protocol, _read_protocol),
    Adapter("BitNet, packed", _is("BitLinear", "transformers."), _read_packed_bitnet, _write_packed_bitnet),
    Adapter("BitNet", _is("AutoBitLinear", "transformers."), _read_auto_bitnet, _write_auto_bitnet),
    Adapter("torchao", _weight_is("IntxUnpackedToInt8Tensor", "Int8Tensor"), _read_torchao, _write_torchao),
    Adapter("torchao, in training", _trains_in_torchao, _read_torchao_training),
    Adapter("torchao, other", _weight_is(), _read_unknown_torchao),
)
