"""A small Llama written as other tools store quantised models, and the weights that these files stand for.

Every layout is written here from its description, one loop per word, so that reader and writer share nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from peelwise.formats.uneven import table_of

Tensors = dict[str, Tensor]
Made = tuple[Tensors, Tensor]  # tensors behind a layer's name, and the weight they stand for


def words_along(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``[n, count]`` as words of 32 bits, one code behind the other, bit by bit."""
    n, count = codes.shape
    words = torch.zeros(n, -(-count * bits // 32), dtype=torch.int64)
    for position in range(count * bits):
        bit = (codes[:, position // bits].long() >> (position % bits)) & 1
        words[:, position // 32] |= bit << (position % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _coded(W: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes from 0 on, scales in float16 and zero points per output and group of inputs."""
    d_out, d_in = W.shape
    pooled = W.reshape(d_out, d_in // group, group)
    high, low = pooled.amax(-1).clamp_min(0), pooled.amin(-1).clamp_max(0)
    top = 2**bits - 1
    if symmetric:
        scales = (2 * torch.maximum(high, -low) / top).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(1, top)  # 0 cannot be stored less 1
    codes = (pooled / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top).reshape(d_out, d_in)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def _weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    return (codes.float() - zeros.float()[:, group_of]) * scales.float()[:, group_of]


def gptq(
    W: Tensor, bits: int = 4, group: int = 32, symmetric: bool = True, older: bool = True, shuffled: bool = False
) -> Made:
    codes, scales, zeros = _coded(W, bits, group, symmetric)
    group_of = torch.arange(W.shape[1]) // group
    if shuffled:
        order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(1))
        group_of = group_of[order]
        codes = codes[:, order]
    return {
        "qweight": words_along(codes, bits).T.contiguous(),
        "qzeros": words_along(zeros.T - int(older), bits),
        "scales": scales.T.contiguous(),
        "g_idx": group_of.to(torch.int32),
    }, _weight(codes, scales, zeros, group_of)


def awq(W: Tensor, group: int = 32) -> Made:
    codes, scales, zeros = _coded(W, 4, group, False)

    def packed(values: Tensor) -> Tensor:  # [n, d_out]
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return words_along(values.reshape(len(values), -1, 8)[..., order].reshape(len(values), -1), 4)

    made = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.contiguous()}
    return made, _weight(codes, scales, zeros, torch.arange(W.shape[1]) // group)


def pack_quantized(W: Tensor, bits: int = 4, group: int = 32, symmetric: bool = True) -> Made:
    codes, scales, zeros = _coded(W, bits, group, symmetric)
    made = {
        "weight_packed": words_along(codes, bits),
        "weight_shape": torch.tensor(W.shape),
        "weight_scale": scales.bfloat16(),
    }
    if not symmetric:
        made["weight_zero_point"] = words_along(zeros.T, bits).T.contiguous()
    return made, _weight(codes, scales.bfloat16(), zeros, torch.arange(W.shape[1]) // group)


def int_quantized(W: Tensor) -> Made:
    scales = W.abs().amax(1, keepdim=True) / 127
    codes = (W / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def float_quantized(W: Tensor, name: str = "weight_scale", block: int = 0, whole: bool = False) -> Made:
    d_out, d_in = W.shape
    rows, columns = (block, block) if block else (d_out, d_in) if whole else (1, d_in)
    pooled = W.reshape(d_out // rows, rows, d_in // columns, columns)
    scales = pooled.abs().amax((1, 3)) / 448
    weight = (pooled / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    expected = (weight.float() * scales[:, None, :, None]).reshape(d_out, d_in)
    return {"weight": weight.reshape(d_out, d_in), name: scales.reshape(()) if whole else scales}, expected


def four_bits(W: Tensor, block: int = 32) -> Made:
    """Return bitsandbytes' nf4: two codes to a byte, the first in the high half, over the flattened matrix."""
    table = torch.tensor(table_of("nf4").values)
    scales = W.reshape(-1, block).abs().amax(1)
    codes = (W.reshape(-1, block) / scales[:, None])[..., None].sub(table).abs().argmin(-1)
    halves = codes.flatten().reshape(-1, 2)
    state = json.dumps({"shape": list(W.shape), "blocksize": block, "dtype": "float32", "quant_type": "nf4"}).encode()
    return {
        "weight": (16 * halves[:, 0] + halves[:, 1]).to(torch.uint8)[:, None],
        "weight.absmax": scales,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }, (table[codes] * scales[:, None]).reshape(W.shape)


def eight_bits(W: Tensor) -> Made:
    """Return bitsandbytes' eight bits: integers, and the largest absolute weight of every output."""
    largest = W.abs().amax(1)
    codes = (127 * W / largest[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": largest}, codes.float() * (largest / 127)[:, None]


PLAIN = ("embed_tokens", "lm_head", "norm")

# Case -> how a layer is written, and what config.json says.
CASES: Mapping[str, tuple[Callable[[Tensor], Made], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq-3-bits": (
        lambda W: gptq(W, bits=3, symmetric=False),
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "checkpoint_format": "gptq"},
    ),
    "gptq-v2": (
        lambda W: gptq(W, bits=8, symmetric=False, older=False),
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "gptq-act-order": (
        lambda W: gptq(W, symmetric=False, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    ),
    "auto-round": (
        lambda W: gptq(W, symmetric=False, older=False),
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round"},
    ),
    "auto-round-as-gptq": (
        lambda W: gptq(W, bits=2, symmetric=False),
        {"quant_method": "auto-round", "bits": 2, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
    ),
    "auto-round-as-awq": (
        awq,
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "pack-quantized": (pack_quantized, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "pack-quantized-3-bits": (
        lambda W: pack_quantized(W, bits=3, symmetric=False),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "int-quantized": (int_quantized, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "float-quantized": (float_quantized, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "bitsandbytes-nf4": (
        four_bits,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "bitsandbytes-int8": (eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8-blocks": (
        lambda W: float_quantized(W, "weight_scale_inv", block=32),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    "fp8-tensor": (
        lambda W: float_quantized(W, whole=True),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
}


def write_packed(
    model: LlamaForCausalLM, folder: Path, made_by: Callable[[Tensor], Made], said: dict[str, Any]
) -> Tensors:
    """Write a folder in which all matrices of the blocks are packed; return the weights by the names of parameters."""
    model.save_pretrained(folder)
    stored: Tensors = {}
    expected: Tensors = {}
    for name, weight in model.state_dict().items():
        if weight.dim() < 2 or any(part in name for part in PLAIN):
            stored[name] = expected[name] = weight
            continue
        made, expected[name] = made_by(weight)
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in made.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return expected
