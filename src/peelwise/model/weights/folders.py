"""Checkpoint folders of other quantisation tools, taken apart without them: a row per method.

Tensors of a quantised layer are recognised by their names beside each other, not by what the configuration says of
modules, since a layer that was left in full precision has an ordinary ``weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peelwise.errors import FormatError, ModelError, UnsupportedModelError
from peelwise.formats.membership import check_member
from peelwise.model.checkpoint_files import each_tensor
from peelwise.model.weights import bitsandbytes, compressed, float8, gptq
from peelwise.model.weights.held import Held
from peelwise.model.weights.packing import Read


@dataclass(frozen=True)
class Packing:
    """How the folders of one method hold a layer.

    Attributes:
        parts: what tensors of a layer are called behind its name.
        marks: those that no layer in full precision has.
        read: told the tensors by part and the configuration; returns codes, or numbers where no format of ours fits.
    """

    parts: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Read]


@dataclass
class Unpacked:
    """What a folder holds.

    Attributes:
        state: weights by name, all of them numbers.
        held: by layer, those that are codes of our formats.
        plain: bits per weight of the layers that are numbers only, as no format of ours has their layout.
        said: the configuration.
        scales: by layer, fixed scales of its quantised inputs, where the folder has them.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)


_BYTES = Packing(bitsandbytes.PARTS, ("weight.absmax", "SCB"), bitsandbytes.read_bitsandbytes)
_FLOATS = Packing(float8.PARTS, ("weight_scale_inv", "weight_scale"), float8.read_float8)

PACKINGS: Mapping[str, Packing] = {
    "gptq": Packing(gptq.PARTS, ("qweight",), gptq.read_gptq),
    "auto-round": Packing(gptq.PARTS, ("qweight",), gptq.read_auto_round),
    "awq": Packing(gptq.PARTS, ("qweight",), gptq.read_awq),
    "compressed-tensors": Packing(compressed.PARTS, ("weight_packed", "weight_scale"), compressed.read_compressed),
    "fp8": _FLOATS,
    "fbgemm_fp8": _FLOATS,
    "bitsandbytes": _BYTES,
    "bitsandbytes_4bit": _BYTES,
    "bitsandbytes_8bit": _BYTES,
}
_INPUT_SCALES = ("input_scale", "activation_scale")


def unpacked(folder: Path, names: Mapping[str, tuple[int, ...]], said: Mapping[str, Any]) -> Unpacked:
    """Return weights and codes of all layers in a folder of safetensors.

    Args:
        folder: checked before.
        names: of all of its tensors.
        said: the ``quantization_config``, whose ``quant_method`` is in `PACKINGS`.

    Raises:
        ModelError: If tensors of a layer are missing or do not go together.
        UnsupportedModelError: If a layer is packed in a way that is not read.
    """
    packing = PACKINGS[said["quant_method"]]
    layers = {layer for name in names if (layer := _layer(name, packing.marks)) is not None}
    parts = sorted(packing.parts, key=len, reverse=True)
    open_parts: dict[str, dict[str, Tensor]] = {}
    missing = _counts(names, layers, parts)
    found = Unpacked(said=said)
    for name, tensor in each_tensor(folder, names):
        layer = _layer(name, parts)
        if layer not in layers or layer is None:
            found.state[name] = _checked(folder, name, tensor)
            continue
        own = open_parts.setdefault(layer, {})
        own[name.removeprefix(f"{layer}.")] = tensor
        missing[layer] -= 1
        if missing[layer] == 0:
            _add(found, folder, layer, open_parts.pop(layer), packing, said)
    return found


def _add(
    found: Unpacked, folder: Path, layer: str, own: dict[str, Tensor], packing: Packing, said: Mapping[str, Any]
) -> None:
    try:
        read = packing.read(own, said)
        if isinstance(read, Held):
            check_member(read.encoded, read.format, (read.encoded.codes.shape[0], read.encoded.codes.shape[1]))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{folder}: {layer}: {error}") from error
    except (ModelError, FormatError) as error:
        raise ModelError(
            f"{folder}: {layer}: {str(error).rstrip('.')}. Quantise it again, or copy it again."
        ) from error
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: the tensors of {layer} do not go together ({type(error).__name__}: {str(error)[:120]}): "
            f"expected those of {said['quant_method']}. Quantise the model again, or copy it again."
        ) from error
    if isinstance(read, Held):
        found.held[layer] = read
    else:
        found.plain[layer] = sum(8 * t.numel() * t.element_size() for t in own.values()) / read.numel()
    weight = read.weight if isinstance(read, Held) else read
    _check_finite(folder, layer, weight)
    found.state[f"{layer}.weight"] = weight
    scale = next((own[name] for name in _INPUT_SCALES if name in own), None)
    if scale is not None:
        found.scales[layer] = scale.float()


def _layer(name: str, parts: tuple[str, ...] | list[str]) -> str | None:
    """Return the name of the layer that a tensor with one of these endings belongs to."""
    return next((name[: -len(part) - 1] for part in parts if name.endswith(f".{part}")), None)


def _counts(names: Mapping[str, Any], layers: set[str], parts: list[str]) -> dict[str, int]:
    """Return how many tensors each quantised layer has."""
    counts = dict.fromkeys(layers, 0)
    for name in names:
        layer = _layer(name, parts)
        if layer in counts and layer is not None:
            counts[layer] += 1
    return counts


def _checked(folder: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that is no part of a quantised layer; refuse bytes, which nothing says how to read."""
    if tensor.dim() > 1 and (tensor.dtype in (torch.int8, torch.uint8, torch.int32) or tensor.element_size() < 2):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"Not yet: {folder}: {name} is packed as {dtype}, and no scale stands beside it. Save its dequantised "
            "weights (float32 or bfloat16) as an ordinary model, and give that."
        )
    return tensor


def _check_finite(folder: Path, layer: str, values: Tensor | None) -> None:
    if values is not None and not bool(values.isfinite().all()):
        raise ModelError(f"{folder}: scales or weights of {layer} are NaN or Inf. Quantise it again, or copy it again.")
