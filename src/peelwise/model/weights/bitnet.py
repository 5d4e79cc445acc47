"""BitNet's layers in transformers: packed (``BitLinear``) and in training (``AutoBitLinear``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peelwise.errors import FormatError, UnsupportedModelError
from peelwise.formats.base import Encoded
from peelwise.formats.layout import Layout
from peelwise.formats.ternary import Ternary
from peelwise.model.weights.held import Adapter, Held, is_class

_BITNET_FLOOR = 1e-5  # of the scale, as BitNet's layers have it


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


ADAPTERS = (
    Adapter("BitNet, packed", is_class("BitLinear", "transformers."), _read_packed_bitnet, _write_packed_bitnet),
    Adapter("BitNet", is_class("AutoBitLinear", "transformers."), _read_auto_bitnet, _write_auto_bitnet),
)
