"""Linear layers of torch.ao: in quantisation-aware training, and converted with inputs that are rounded as they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.formats.base import Encoded
from peelwise.formats.integer import Integer
from peelwise.formats.layout import Layout
from peelwise.model.weights.held import Adapter, Held, is_class


def _read_training(module: Any) -> Held:
    fake, latent = module.weight_fake_quant, module.weight.detach()
    seen = getattr(getattr(fake, "activation_post_process", None), "min_val", None)
    if isinstance(seen, Tensor) and seen.numel() == 0:
        raise UnsupportedModelError("Its fake quantiser has seen no weights yet. Run the model once in training mode.")
    scale, zero = fake.scale.detach().float(), fake.zero_point.detach().float()
    low, high = int(fake.quant_min), int(fake.quant_max)
    inverse, offset = (1 / scale).reshape(-1, 1), zero.reshape(-1, 1)  # as torch computes it
    codes = ((latent.float() * inverse).round() + offset).clamp(low, high)
    return _integer(codes, scale, zero, low, high, latent)


def _read_dynamic(module: Any) -> Held:
    weight = module.weight()
    if weight.dtype != torch.qint8:
        raise UnsupportedModelError(f"Not yet: torch.ao's dynamic layers with weights in {weight.dtype}. Use qint8.")
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero = torch.tensor([weight.q_scale()]), torch.tensor([float(weight.q_zero_point())])
    else:
        scale, zero = weight.q_per_channel_scales().float(), weight.q_per_channel_zero_points().float()
    return _integer(weight.int_repr(), scale, zero, -128, 127, None)


def _integer(codes: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, latent: Tensor | None) -> Held:
    """Return ``s (q - z)`` for codes ``[d_out, d_in]`` from ``low`` to ``high``, one scale or one per output."""
    width = (high - low).bit_length()
    layout = Layout("channel") if scale.numel() == len(codes) > 1 else Layout("tensor")
    scales = scale.reshape(-1, 1)
    if not bool(zero.any()) and -low == 2 ** (width - 1):
        return Held(Integer(layout, torch.float32, width=width), Encoded(codes.to(torch.int8), scales), latent)
    if high - low != 2**width - 1:
        raise UnsupportedModelError(f"Not yet: fake quantisers with codes from {low} to {high}.")
    form = Integer(layout, torch.float32, width=width, kind="affine")
    zeros = (zero.reshape(-1, 1) - low).to(torch.uint8)
    return Held(form, Encoded((codes.to(torch.int16) - low).to(torch.uint8), scales, zeros), latent)


def _refuse_static(module: Any) -> Held:
    raise UnsupportedModelError(
        "Not yet: torch.ao's layers whose inputs are quantised tensors. Give the model as it was before convert, with "
        "its fake quantisers on and their observers off."
    )


def _trains(module: nn.Module) -> bool:
    fake = getattr(module, "weight_fake_quant", None)
    ours = type(module).__module__.startswith("torch.ao.") and isinstance(module, nn.Linear)
    enabled = getattr(fake, "fake_quant_enabled", None)
    return ours and isinstance(enabled, Tensor) and bool(enabled.any())


ADAPTERS = (
    Adapter("torch.ao, in training", _trains, _read_training),
    Adapter("torch.ao, dynamic", is_class("Linear", "torch.ao.nn.quantized.dynamic."), _read_dynamic),
    Adapter("torch.ao, static", is_class("Linear", "torch.ao.nn.quantized.modules."), _refuse_static),
)
