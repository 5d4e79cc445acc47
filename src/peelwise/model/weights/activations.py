"""Layers whose inputs are quantised when they run: which, how, and how to run them with floating-point inputs instead.

Two kinds: layers in memory that round their inputs themselves (torchao), and layers that a folder says it of and that
were read here as weights alone, so that the rounding has to be put in front of them. Rows of a matrix of inputs are
tokens, so "a scale per channel" of a format is a scale per token here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peelwise.formats.base import Format
from peelwise.formats.integer import Integer, Kind
from peelwise.formats.layout import Layout
from peelwise.formats.membership import scaled_part
from peelwise.formats.uneven import Uneven
from peelwise.model.layers import LinearLayer
from peelwise.model.replaced import forward_replaced
from peelwise.model.weights.reading import Reading


@dataclass(frozen=True, eq=False)
class InputRounding:
    """How inputs ``[.., d_in]`` are rounded.

    Attributes:
        format: of the matrix ``[tokens, d_in]``.
        scale: the one for all tokens, where it was fixed beforehand.
        outliers: columns with a larger value than this in any token stay as they are (arXiv:2208.07339); 0 for none.
    """

    format: Format
    scale: Tensor | None = None
    outliers: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rounded inputs, in the dtype of ``x``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        far = (rows.abs() > self.outliers).any(0) if self.outliers else torch.zeros(rows.shape[1], dtype=torch.bool)
        inner = scaled_part(self.format)
        near = rows.masked_fill(far.to(rows.device), 0.0)
        if self.scale is not None and inner is not None:
            found = inner.decode(inner.quantized(near, self.scale.to(near).reshape(1, 1), None))
        else:
            found = self.format.decode(self.format.rounded(near))
        return torch.where(far.to(rows.device), rows, found).reshape(x.shape).to(x.dtype)


def said_of_folder(reading: Reading | None, linears: Iterable[LinearLayer]) -> dict[LinearLayer, InputRounding]:
    """Return how a quantised folder says that inputs are rounded, for the layers that it says it of."""
    if reading is None:
        return {}
    of = _SAID.get(reading.method)
    found = {}
    for linear in linears:
        form = None if of is None or linear.held() is None else of(reading.said, linear.name)
        if form is not None:
            scale = reading.scales.get(linear.name)
            fixed = None if scale is None or scale.numel() != 1 else scale
            outliers = float(reading.said.get("llm_int8_threshold", 6.0)) if "bitsandbytes" in reading.method else 0.0
            found[linear] = InputRounding(form, fixed, outliers)
    return found


def rounds_inputs(module: nn.Module) -> str | None:
    """Return how a module in memory rounds its inputs by itself, in words; ``None`` if it does not."""
    weight = getattr(module, "weight", None)
    arguments = getattr(weight, "act_quant_kwargs", None)
    if arguments is not None:
        return f"int8 ({type(getattr(arguments, 'granularity', arguments)).__name__})"
    asked = getattr(weight, "activation_quantization", None)
    if asked is not None:
        return str(asked)
    for name, where, how in _THEMSELVES:
        if any(base.__name__ == name and base.__module__.startswith(where) for base in type(module).__mro__):
            return how
    fake = getattr(module, "activation_fake_quantizer", None)
    if fake is not None and getattr(fake, "enabled", True):
        return f"{str(getattr(fake.config, 'dtype', '')).removeprefix('torch.')} (in training)"
    return None


@contextmanager
def float_inputs(linears: Iterable[LinearLayer]) -> Iterator[None]:
    """Run layers that round their inputs themselves with the same weights and floating-point inputs."""
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(forward_replaced(linear.module, _plain(linear)))
        yield


@contextmanager
def rounded_inputs(roundings: Mapping[LinearLayer, InputRounding]) -> Iterator[None]:
    """Round the inputs of layers in front of them; leaves no hook behind."""
    handles = [linear.module.register_forward_pre_hook(_before(each)) for linear, each in roundings.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_rounded_inputs(linear: LinearLayer, rounding: InputRounding | None) -> Callable[[Tensor], Tensor]:
    """Return what a layer computes with rounded inputs: by itself, or with the rounding in front of its weights."""
    if rounding is None:
        module: Any = linear.module
        return lambda x: type(module).forward(module, x)
    plain = _plain(linear)
    return lambda x: plain(rounding(x))


def _plain(linear: LinearLayer) -> Callable[[Tensor], Tensor]:
    weight, bias = linear.weight().float(), linear.bias()

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)

    return forward


def _before(rounding: InputRounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (rounding(args[0]), *args[1:])


def _of_float8(said: Mapping[str, Any], name: str) -> Format | None:
    block = said.get("weight_block_size")
    layout = Layout("group", int(block[1])) if block else Layout("channel")
    if said.get("activation_scheme") == "static":
        layout = Layout("tensor")
    return Uneven(layout, torch.float32, "float8_e4m3")


def _of_compressed(said: Mapping[str, Any], name: str) -> Format | None:
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        inputs = group.get("input_activations")
        if not inputs or not any(_is_target(target, name) for target in group.get("targets") or ()):
            continue
        layouts = {"token": Layout("channel"), "tensor": Layout("tensor"), None: Layout("tensor")}
        strategy = inputs.get("strategy")
        layout = Layout("group", int(inputs["group_size"])) if strategy == "group" else layouts.get(strategy)
        if layout is None:
            return None
        if inputs.get("type") == "float":
            return Uneven(layout, torch.float32, "float8_e4m3")
        kind: Kind = "symmetric" if inputs.get("symmetric", True) else "affine"
        return Integer(layout, torch.float32, width=int(inputs.get("num_bits") or 8), kind=kind)
    return None


def _is_target(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == "Linear" or name == target or name.endswith(f".{target}")


def _of_bytes(said: Mapping[str, Any], name: str) -> Format | None:
    return Integer(Layout("channel"), torch.float32, width=8) if said.get("load_in_8bit") else None


# Class, package, and how its inputs are rounded.
_THEMSELVES = (
    ("Linear", "torch.ao.nn.quantized.dynamic.", "uint8 per tensor"),
    ("Linear8bitLt", "bitsandbytes.", "int8 per token, outlier columns kept"),
    ("FP8Linear", "transformers.", "float8_e4m3"),
)

# Method -> the format of a layer's inputs, from the configuration and the layer's name.
_SAID: Mapping[str, Callable[[Mapping[str, Any], str], Format | None]] = {
    "fp8": _of_float8,
    "fbgemm_fp8": _of_float8,
    "compressed-tensors": _of_compressed,
    "bitsandbytes": _of_bytes,
    "bitsandbytes_8bit": _of_bytes,
}
