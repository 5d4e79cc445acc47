"""Apply weight changes to a running model without writing a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peelwise.model.layers import LinearMap
from peelwise.nn.linear import QuantizedLinear

Changes = Mapping[LinearMap, Tensor]  # each [d_out, d_in], one more column where the map has a bias


@contextmanager
def spliced(changes: Changes, scale: float = 1.0) -> Iterator[None]:
    """Run with ``y = x (W + scale D)^T + b + scale d`` in every map of ``changes``, inside the context.

    A float32 map computes the sum of weights once and multiplies once; any other (half precision,
    quantised, sharded, or with a forward of somebody else's) gets ``x D^T`` added by a hook, in float32.
    Parameters are never written, and nothing stays behind when the context ends, however it ends.
    """
    with ExitStack() as stack:
        for linear, change in changes.items():
            stack.enter_context(_merged(linear, change, scale) if _plain(linear) else _hooked(linear, change, scale))
        yield


def _plain(linear: LinearMap) -> bool:
    module, weight = linear.module, linear.module.weight
    ours = type(module) is nn.Linear or linear.transposed or isinstance(module, QuantizedLinear)
    return (
        ours
        and "forward" not in module.__dict__
        and type(weight) is nn.Parameter
        and weight.dtype in (torch.float32, torch.float64)
        and weight.device.type != "meta"
    )


def _parts(linear: LinearMap, change: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Split a change into the part of the weight and the part of the bias, scaled."""
    if linear.has_bias:
        return change[:, :-1] * scale, change[:, -1] * scale
    return change * scale, None


@contextmanager
def _merged(linear: LinearMap, change: Tensor, scale: float) -> Iterator[None]:
    weight_change, bias_change = _parts(linear, change, scale)
    own = linear.weight()
    weight = own + weight_change.to(own)  # [d_out, d_in]
    own_bias = linear.bias()
    bias = own_bias + bias_change.to(own_bias) if own_bias is not None and bias_change is not None else None

    def forward(*args: Tensor, **named: Tensor) -> Tensor:
        return F.linear(_input(args, named), weight, bias)

    linear.module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del linear.module.__dict__["forward"]


@contextmanager
def _hooked(linear: LinearMap, change: Tensor, scale: float) -> Iterator[None]:
    weight_change, bias_change = _parts(linear, change, scale)
    handle = linear.module.register_forward_hook(_adder(weight_change.float(), bias_change), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _adder(weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
        x = _input(args, named).float()
        extra = F.linear(x, weight.to(x.device), None if bias is None else bias.to(x))
        return (y.float() + extra).to(y.dtype)

    return add


def _input(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return the one input of a map, however it was given."""
    x: Tensor = args[0] if args else next(iter(named.values()))
    return x
