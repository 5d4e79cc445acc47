"""Weights in eight-bit floating-point numbers with scales beside them: one for all, per output, or per square block.

W = weight * weight_scale_inv      transformers' fine-grained FP8 (DeepSeek's layout), blocks of 128 x 128
W = weight * weight_scale          per tensor or per channel (FBGEMM, vLLM, compressed-tensors)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peelwise.errors import ModelError
from peelwise.formats.base import Encoded
from peelwise.formats.scaled import SCALE_DTYPES
from peelwise.formats.uneven import Uneven
from peelwise.model.weights.held import Adapter, Held, is_class
from peelwise.model.weights.packing import Read, layout_of, spread

PARTS = ("weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale")
_TABLES = {torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2"}


def read_float8(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Read:
    """Return what one layer holds."""
    scale = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    if scale is None:
        raise ModelError("its float8 weight has no scale beside it")
    return floats(tensors["weight"], scale, said.get("weight_block_size"))


def floats(weight: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Read:
    """Return ``weight [d_out, d_in]`` times ``scale``: one number, one per output, or ``[rows, groups]``.

    Args:
        weight: float8.
        scale: beside it.
        block: outputs and inputs that share a scale, where the configuration says so; the last blocks may be cut off.
    """
    table = _TABLES.get(weight.dtype)
    if table is None or weight.dim() != 2:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ModelError(f"expected a matrix in float8_e4m3fn or float8_e5m2, got {tuple(weight.shape)} in {dtype}")
    scales = scale if scale.dtype in SCALE_DTYPES.values() else scale.float()
    scales = scales if scales.dim() == 2 else scales.reshape(-1, 1)
    d_out, d_in = weight.shape
    values = weight.float()
    if block is not None and scales.numel() > 1:
        rows, columns = min(int(block[0]), d_out), min(int(block[1]), d_in)  # a file may say anything
        if tuple(scales.shape) != (-(-d_out // rows), -(-d_in // columns)):
            raise ModelError(f"scales {tuple(scales.shape)} are not those of blocks of {block} in [{d_out}, {d_in}]")
        if d_out % rows or d_in % columns:
            wide = scales.float().repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
            return values * wide[:d_out, :d_in]
    layout = layout_of((d_out, d_in), scales)
    if layout is None or not bool(values.isfinite().all()):
        return values * spread(scales, d_out, d_in)
    return Held(Uneven(layout, scales.dtype, table), Encoded(values, scales.contiguous()))


def _read_module(module: Any) -> Held:
    found = read_float8({name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}, {})
    assert isinstance(found, Held)
    return found


ADAPTERS = (Adapter("FP8", is_class("FP8Linear", "transformers."), _read_module),)
