"""Layers as AutoGPTQ, GPTQModel and AutoRound store them, and as AutoAWQ does; read without these packages.

    qweight   codes of all inputs of an output in words of 32 bits [d_in bits / 32, d_out]
    qzeros    zero points [groups, d_out bits / 32]; the older layout stores them less 1
    scales    [groups, d_out]
    g_idx     the group of every input [d_in]; in any order after quantising "by activation order"

AWQ packs along the outputs instead, eight codes of four bits to a word in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.weights.packing import Read, by_column, in_order, integers, unpacked_bits

PARTS = ("qweight", "qzeros", "scales", "g_idx")
# How AutoRound calls them, and which of GPTQ's layouts of zero points they have.
_AUTO_ROUND = {"auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "auto_round:auto_gptq": "gptq"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_gptq(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Read:
    """Return what one layer holds.

    Args:
        tensors: `PARTS` by name.
        said: the configuration: ``bits``, and ``checkpoint_format`` (``"gptq_v2"`` for zero points as they are).
    """
    layout = str(said.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(
            f"Not yet: GPTQ layers packed for {layout[:60]!r}. Expected 'gptq' or 'gptq_v2': save it so."
        )
    qweight, scales = tensors["qweight"], tensors["scales"].T
    group_of, (d_out, groups) = tensors.get("g_idx"), scales.shape
    bits = int(said.get("bits") or 4)
    d_in = len(group_of) if group_of is not None else qweight.shape[0] * 32 // bits
    bits = qweight.shape[0] * 32 // d_in or bits  # layers may have bits of their own
    words = qweight.shape[0], tensors["qzeros"].shape[1]
    if words != (-(-bits * d_in // 32), -(-bits * d_out // 32)):
        raise ModelError(f"{words} words of qweight and qzeros are not those of {bits} bits for [{d_out}, {d_in}]")
    codes = unpacked_bits(qweight.T, bits, d_in)
    zeros = unpacked_bits(tensors["qzeros"], bits, d_out).T.to(torch.int16)
    zeros = zeros + (layout == "gptq")
    if not in_order(group_of, groups, d_in):
        assert group_of is not None
        return by_column(codes, scales, zeros, group_of)
    return integers(codes, scales, zeros, bits)


def read_auto_round(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Read:
    """Return what one layer of AutoRound holds; its ``packing_format`` says which of these layouts it has."""
    packing = str(said.get("packing_format") or said.get("backend") or "auto_round")
    if int(said.get("act_bits") or 16) < 16:
        raise UnsupportedModelError(
            "Not yet: AutoRound's own layout with quantised inputs. Save it for compressed-tensors."
        )
    if packing == "auto_round:auto_awq":
        return read_awq(tensors, {**said, "version": "gemm"})
    if packing not in _AUTO_ROUND:
        raise UnsupportedModelError(
            f"Not yet: AutoRound layers packed for {packing[:60]!r}. Expected auto_round:auto_awq or one of "
            f"{', '.join(_AUTO_ROUND)}: save it so."
        )
    return read_gptq(tensors, {**said, "checkpoint_format": _AUTO_ROUND[packing]})


def read_awq(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Read:
    """Return what one layer holds.

    Args:
        tensors: ``qweight``, ``qzeros`` and ``scales``.
        said: the configuration: ``version`` or ``format``, ``bits``.
    """
    version = str(said.get("version") or said.get("format") or "gemm").lower()
    if version != "gemm" or int(said.get("bits") or said.get("w_bit") or 4) != 4:
        raise UnsupportedModelError(
            f"Not yet: AWQ layers packed for {version[:60]!r}. Expected four bits packed for 'gemm': save it so."
        )
    scales = tensors["scales"].T
    codes = _awq_codes(tensors["qweight"], len(scales)).T
    zeros = None if "qzeros" not in tensors else _awq_codes(tensors["qzeros"], len(scales)).T
    return integers(codes, scales, zeros, 4)


def _awq_codes(words: Tensor, d_out: int) -> Tensor:
    packed = unpacked_bits(words, 4, d_out).reshape(len(words), -1, len(_AWQ_ORDER))
    codes = torch.empty_like(packed)
    codes[..., list(_AWQ_ORDER)] = packed
    return codes.reshape(len(words), d_out)
