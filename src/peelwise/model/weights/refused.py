"""Linear layers whose weights are packed in a way that is not read: refused by name, with what to do instead.

Bytes measured as if they were weights would give numbers that mean nothing. So a layer of an unknown class is refused
too, if what it calls its weight is integers, eight-bit floats, a tensor class of another package, or not of its sizes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.carried import Carried
from peelwise.model.weights.held import Adapter

_FOLDER = "Give peelwise the checkpoint folder instead of the loaded model: it reads these layers itself"
_DEQUANTISE = "Save its dequantised weights (float32 or bfloat16) as an ordinary model, and give that"

# What the name of a class begins or ends with, whose it is, and what to do.
KNOWN: tuple[tuple[str, str, str], ...] = (
    ("QuantLinear", "GPTQ or AWQ (GPTQModel, AutoGPTQ, AutoRound, Optimum)", _FOLDER),
    ("WQLinear", "AWQ", _FOLDER),
    ("CompressedLinear", "compressed-tensors", _FOLDER),
    ("FbgemmFp8Linear", "FBGEMM's FP8", _FOLDER),
    ("HQQLinear", "HQQ", _DEQUANTISE),
    ("QLinear", "quanto", _DEQUANTISE),
    ("EetqLinear", "EETQ", _DEQUANTISE),
    ("QuantizedLinear", "AQLM or torch.ao", _DEQUANTISE),
    ("VQuantLinear", "VPTQ", _DEQUANTISE),
    ("FPQuantLinear", "FP-Quant", _DEQUANTISE),
    ("HiggsLinear", "HIGGS", _DEQUANTISE),
    ("LinearPackedParams", "torch.ao", _DEQUANTISE),
)


def refusal(module: nn.Module) -> str | None:
    """Return why a module's weights are not read, and what to do; ``None`` if they are numbers or there are none."""
    kind = type(module).__name__
    if (
        getattr(module, "quantization_scheme", None) is not None
    ):  # its weight is a number, and not what it computes with
        return f"{kind} (compressed-tensors) rounds its weights as it runs. Save the model compressed. {_FOLDER}."
    what = _packed(module)
    if what is None:
        return None
    rows = [row for row in KNOWN if kind.startswith(row[0]) or kind.endswith(row[0])]
    known = max(rows, key=lambda row: len(row[0]), default=None)
    whose, remedy = (f" ({known[1]})", known[2]) if known else ("", _DEQUANTISE)
    return f"{kind}{whose} keeps its weights packed, {what}, which peelwise does not read. {remedy}."


def _packed(module: nn.Module) -> str | None:
    """Return what is packed in a module's own tensors, in words."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    own += [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]  # HQQ's are neither
    tensors = dict(own)
    weight = tensors.get("weight")
    if weight is not None and not _is_plain(weight):
        return f"weight as {_kind(weight)}"
    if isinstance(module, nn.Linear) and weight is not None and weight.dim() > 1:
        sizes = (module.out_features, module.in_features)
        if tuple(weight.shape) != sizes:  # bytes in the dtype of numbers
            return f"weight of shape {tuple(weight.shape)} instead of {sizes}"
    for name, tensor in tensors.items():
        called = name.lower()
        if ("weight" in called or called.startswith("w_q")) and _is_bytes(tensor) and tensor.dim() > 1:
            return f"{name} as {_kind(tensor)}"
    if weight is None and hasattr(module, "in_features") and hasattr(module, "out_features"):
        packed = [name for name, tensor in tensors.items() if _is_bytes(tensor) and tensor.dim() > 1]
        return f"{packed[0]} as {_kind(tensors[packed[0]])}" if packed else None
    return None


def _is_plain(tensor: Tensor) -> bool:
    # PyTorch's own tensors, a buffer of plain numbers among them (the norms of Falcon Mamba), and not torchao's.
    plain = isinstance(tensor, Carried) or type(tensor).__module__.partition(".")[0] == "torch"
    return plain and not _is_bytes(tensor)


def _is_bytes(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or tensor.element_size() < 2


def _kind(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype if _is_bytes(tensor) else f"{type(tensor).__name__} of {type(tensor).__module__.partition('.')[0]}"


def _refuse(module: Any) -> Any:
    raise UnsupportedModelError(f"Not yet: {refusal(module)}")


ADAPTERS = (Adapter("packed, not read", lambda module: refusal(module) is not None, _refuse),)
