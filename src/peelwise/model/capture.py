"""Record what enters and leaves the linear layers of a block while it runs. No mathematics here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.layers import LinearLayer


@dataclass
class Capture:
    """Inputs and outputs of linear layers during one forward; layers fed by one tensor share a group.

    Attributes:
        inputs: per layer, the input ``[..., d_in]`` detached.
        outputs: per layer, the output ``[..., d_out]``, still in the graph.
        groups: per layer, the name of the first layer that was fed the very same tensor.
    """

    inputs: dict[LinearLayer, Tensor] = field(default_factory=dict)
    outputs: dict[LinearLayer, Tensor] = field(default_factory=dict)
    groups: dict[LinearLayer, LinearLayer] = field(default_factory=dict)


@contextmanager
def captured(linears: Sequence[LinearLayer]) -> Iterator[Capture]:
    """Record into the yielded `Capture` while the context is open, and leave no hook behind.

    Close it before the backward pass: activation checkpointing runs forward hooks again there.
    """
    capture = Capture()
    first_with: dict[int, LinearLayer] = {}
    handles = []

    def record(linear: LinearLayer, x: Tensor, y: Tensor) -> None:
        if linear in capture.inputs:
            raise UnsupportedModelError(f"Not yet: {linear.name} runs more than once per forward pass.")
        first = first_with.setdefault(id(x), linear)
        # Sharing a sum needs the same augmentation by ones.
        capture.groups[linear] = first if first.has_bias == linear.has_bias else linear
        # The tensor itself is kept so that its id stays its own until the context closes.
        capture.inputs[linear] = x
        capture.outputs[linear] = y

    def hook(linear: LinearLayer) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            record(linear, x, y)

        return after

    try:
        for linear in linears:
            handles.append(linear.module.register_forward_hook(hook(linear), with_kwargs=True))
        yield capture
    finally:
        for handle in handles:
            handle.remove()
