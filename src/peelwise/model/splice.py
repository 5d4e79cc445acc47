"""Apply weight changes to a running model without writing a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peelwise.distributed.sharding import is_sharded
from peelwise.model.carried import Carried
from peelwise.model.experts import ExpertLinear
from peelwise.model.layers import LinearLayer
from peelwise.model.replaced import forward_replaced
from peelwise.model.spill import is_mapped
from peelwise.nn.linear import QuantizedLinear

Changes = Mapping[LinearLayer, Tensor]  # each [d_out, d_in], one more column where the layer has a bias


@contextmanager
def spliced(changes: Changes, scale: float = 1.0) -> Iterator[None]:
    """Run with ``y = x (W + scale D)^T + b + scale d`` in every layer of ``changes``, inside the context.

    A float32 layer computes the sum of weights once and multiplies once; any other (half precision,
    quantised, sharded, or with a third-party forward) gets ``x D^T`` added by a hook, in float32 at least. A change in
    half precision is widened, and the sum made, whenever its layer runs, and so are sums with a change that is on disk
    or an offloaded weight: of all layers that would be too much to hold.
    Parameters are never written, and nothing stays behind when the context ends, however it ends.
    """
    with ExitStack() as stack:
        for linear, change in changes.items():
            stack.enter_context(_merged(linear, change, scale) if _plain(linear) else _hooked(linear, change, scale))
        yield


@contextmanager
def frozen(linears: Iterable[LinearLayer]) -> Iterator[None]:
    """Run with the effective weights of our own low-bit layers computed once, not at every call.

    For contexts in which no weight changes. A splice inside takes the place of this one.
    """
    with ExitStack() as stack:
        for linear in linears:
            if isinstance(linear.module, QuantizedLinear) and _plain(linear):
                stack.enter_context(forward_replaced(linear.module, _Frozen(linear.weight(), linear.bias())))
        yield


class _Frozen:
    """The forward of a linear layer with given weights.

    A splice wraps it, so that a splice inside a splice is not taken for one inside `frozen`: these add up.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        return F.linear(_input(args, named), self.weight, self.bias)


def _plain(linear: LinearLayer) -> bool:
    if isinstance(linear.parameter, Tensor) and is_sharded(linear.parameter):
        return False  # of an expert even a look at its weight would gather it
    module, weight = linear.module, linear.module.weight
    ours = type(module) is nn.Linear or linear.transposed or isinstance(module, QuantizedLinear | ExpertLinear)
    return (
        ours
        and ("forward" not in module.__dict__ or isinstance(module.__dict__["forward"], _Frozen))
        and (type(weight) in (nn.Parameter, Carried) or (isinstance(module, ExpertLinear) and type(weight) is Tensor))
        and weight.dtype in (torch.float32, torch.float64)
        and weight.device.type != "meta"
    )


def _parts(linear: LinearLayer, change: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Split a change into the part of the weight and the part of the bias, scaled, in float32 at least."""
    change = change.float() if _is_narrow(change) else change
    change = change if scale == 1.0 else change * scale
    return (change[:, :-1], change[:, -1]) if linear.has_bias else (change, None)


def _is_narrow(change: Tensor) -> bool:
    return change.element_size() < torch.float32.itemsize


@contextmanager
def _merged(linear: LinearLayer, change: Tensor, scale: float) -> Iterator[None]:
    own, own_bias = _own(linear)

    def summed() -> _Frozen:
        weight_change, bias_change = _parts(linear, change, scale)
        weight = own + weight_change.to(own)  # [d_out, d_in]
        bias = own_bias + bias_change.to(own_bias) if own_bias is not None and bias_change is not None else None
        return _Frozen(weight, bias)

    held = None if _is_narrow(change) or isinstance(own, Carried) or is_mapped(change) else summed()

    def forward(*args: Tensor, **named: Tensor) -> Tensor:
        return (held or summed())(*args, **named)

    with forward_replaced(linear.module, forward):
        yield


def _own(linear: LinearLayer) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias without computing frozen ones again."""
    present = linear.module.__dict__.get("forward")
    return (present.weight, present.bias) if isinstance(present, _Frozen) else (linear.weight(), linear.bias())


@contextmanager
def _hooked(linear: LinearLayer, change: Tensor, scale: float) -> Iterator[None]:
    held = None if _is_narrow(change) else _parts(linear, change, scale)
    handle = linear.module.register_forward_hook(
        _adder(lambda: held or _parts(linear, change, scale)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _adder(parts: Callable[[], tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        x, (weight, bias) = _input(args, named).to(wide), parts()
        extra = F.linear(x, weight.to(x), None if bias is None else bias.to(x))
        return (y.to(wide) + extra).to(y.dtype)

    return add


def _input(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return the one input of a layer, however it was given."""
    x: Tensor = args[0] if args else next(iter(named.values()))
    return x
