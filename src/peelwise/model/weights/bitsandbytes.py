"""Layers as bitsandbytes stores them, read without it: four bits from a table (nf4, fp4), or eight bits per output.

    4 bits    weight [n / 2, 1], two codes to a byte, the first in the high half; weight.absmax per block of
              neighbours in the flattened matrix; weight.quant_map, the table; its shape in weight.quant_state.*, JSON
    8 bits    weight [d_out, d_in], int8, and SCB, the largest absolute weight of every output

Scales of four-bit blocks may be eight-bit codes themselves; they are read as the float32 numbers that these stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.formats.base import Encoded
from peelwise.formats.integer import Integer
from peelwise.formats.layout import Layout
from peelwise.formats.uneven import Table, Uneven, table_of
from peelwise.model.weights.held import Adapter, Held
from peelwise.model.weights.packing import Read

_PACKS = "support_avx512bf16_for_cpu"
_STATE = "weight.quant_state.bitsandbytes__"
PARTS = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(f"{_STATE}{table}" for table in ("nf4", "fp4")),
    *("SCB", "weight_format"),
)


@contextmanager
def packing_paused(model: nn.Module) -> Iterator[None]:
    """Let four-bit layers keep their codes and scales while a model is measured on a CPU that they are packed for.

    There the first run in eval mode packs the codes anew and rounds the scales to bfloat16, for good.
    """
    packing = [module for module in model.modules() if getattr(module, _PACKS, False)]
    try:
        for module in packing:
            setattr(module, _PACKS, False)
        yield
    finally:
        for module in packing:
            setattr(module, _PACKS, True)


def read_bitsandbytes(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Read:
    """Return what one layer holds."""
    if "SCB" in tensors:
        return _eight_bits(tensors["weight"], tensors["SCB"])
    name = next((name for name in tensors if name.startswith(_STATE)), None)
    if name is None:
        raise ModelError("its quant_state is missing, which has its shape")
    state = json.loads(bytes(tensors[name].to(torch.uint8).tolist()))
    absmax = tensors["weight.absmax"]
    if absmax.dtype == torch.uint8:
        blocks = torch.arange(len(absmax)) // int(state["nested_blocksize"])
        steps = tensors["weight.nested_quant_map"].float()[absmax.long()]
        absmax = steps * tensors["weight.nested_absmax"].float()[blocks] + float(state["nested_offset"])
    shape, table = [int(size) for size in state["shape"]], tensors["weight.quant_map"].float()
    return _four_bits(tensors["weight"], absmax.float(), table, int(state["blocksize"]), (shape[0], shape[1]))


def _four_bits(packed: Tensor, absmax: Tensor, table: Tensor, block: int, shape: tuple[int, int]) -> Read:
    d_out, d_in = shape
    halves = packed.reshape(-1, 1).view(torch.uint8)
    codes = table[torch.cat([halves >> 4, halves & 15], dim=1).flatten()[: d_out * d_in].long()]
    if len(codes) < d_out * d_in or len(absmax) != -(-d_out * d_in // max(block, 1)):
        raise ModelError(f"its bytes and scales are not those of a matrix of {shape} in blocks of {block}")
    known = next((n for n in ("nf4", "fp4") if Table.of(table) == table_of(n)), None)
    if known is None or d_in % block:  # blocks go on from one output to the next
        return (codes * absmax.repeat_interleave(block)[: len(codes)]).reshape(shape)
    form = Uneven(Layout("group", block), torch.float32, known)
    return Held(form, Encoded(codes.reshape(shape), absmax.reshape(d_out, -1)))


def _eight_bits(weight: Tensor, largest: Tensor) -> Held:
    form = Integer(Layout("channel"), torch.float32, width=8)
    return Held(form, Encoded(weight, largest.float().reshape(-1, 1) / 127))


def _read_four_bits(module: Any) -> Held:
    weight, state = module.weight, module.weight.quant_state
    if state is None:
        raise UnsupportedModelError("Its four bits have no quant_state yet. Move the model to its device first.")
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedModelError(
            "Not yet: four bits of bitsandbytes that have run on this CPU, for which it packs the codes anew and "
            "rounds their scales to bfloat16. Give peelwise the folder, or the model as loaded, before it runs."
        )
    absmax = state.absmax
    if state.nested:
        blocks = torch.arange(len(absmax), device=absmax.device) // state.state2.blocksize
        absmax = state.state2.code[absmax.long()] * state.state2.absmax[blocks] + state.offset
    shape = tuple(state.shape)
    found = _four_bits(weight.data, absmax.float(), state.code.float(), state.blocksize, (shape[0], shape[1]))
    if isinstance(found, Tensor):
        raise UnsupportedModelError(
            "Not yet: four-bit blocks that go on from one output to the next. Save it, and give peelwise the folder."
        )
    return found


def _read_eight_bits(module: Any) -> Held:
    largest = getattr(module.weight, "SCB", None)
    largest = module.state.SCB if largest is None else largest
    if module.weight.dtype != torch.int8 or largest is None:
        raise UnsupportedModelError("Its weights are not in eight bits yet. Move the model to its device first.")
    return _eight_bits(module.weight.data, largest)


def _is(kind: str) -> Any:
    return lambda module: any(
        base.__name__ == kind and base.__module__.startswith("bitsandbytes.") for base in type(module).__mro__
    )


ADAPTERS = (
    Adapter("bitsandbytes, 4 bits", _is("Linear4bit"), _read_four_bits),
    Adapter("bitsandbytes, 8 bits", _is("Linear8bitLt"), _read_eight_bits),
)
