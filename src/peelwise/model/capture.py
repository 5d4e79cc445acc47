"""Record what enters and leaves the linear layers of a block while it runs. No mathematics here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peelwise.model.experts import ExpertLinear
from peelwise.model.layers import LinearLayer


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a linear layer.

    Attributes:
        x: the input ``[..., d_in]`` detached.
        y: the output ``[..., d_out]``, still in the graph.
        rows: of an expert, which tokens ``[n]`` of all in the micro-batch it was given; ``None`` for all, or unknown.
    """

    x: Tensor
    y: Tensor
    rows: Tensor | None = None


@dataclass
class Capture:
    """The runs of linear layers during one forward; layers that were fed the same tensors share a group.

    Attributes:
        calls: per layer that ran, its runs in order.
        groups: per layer, the first layer that was fed the very same tensor in every run.
    """

    calls: dict[LinearLayer, list[Call]] = field(default_factory=dict)
    groups: dict[LinearLayer, LinearLayer] = field(default_factory=dict)


@contextmanager
def captured(linears: Sequence[LinearLayer]) -> Iterator[Capture]:
    """Record into the yielded `Capture` while the context is open, and leave no hook behind.

    A layer that returns no tensor, as a router that returns weights and indices, or uses its weight in groups of
    channels, is not recorded. Close the context before the backward pass: activation checkpointing runs forward hooks
    again there.
    """
    capture = Capture()
    first_with: dict[tuple[int, ...], LinearLayer] = {}
    handles = []

    def hook(linear: LinearLayer) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(y, Tensor) or not _is_product(module, x, y):
                return
            rows = module.rows if isinstance(module, ExpertLinear) else None
            # The tensor itself is kept so that its id stays its own until the context closes.
            capture.calls.setdefault(linear, []).append(Call(x, y, rows))

        return after

    try:
        for linear in linears:
            handles.append(linear.module.register_forward_hook(hook(linear), with_kwargs=True))
        yield capture
    finally:
        for handle in handles:
            handle.remove()
        for linear, calls in capture.calls.items():
            first = first_with.setdefault(tuple(id(call.x) for call in calls), linear)
            # Sharing a sum needs the same augmentation by ones.
            shared = first.has_bias == linear.has_bias and not linear.is_expert
            capture.groups[linear] = first if shared else linear


class _EnoughError(Exception):
    """Ends a run whose rest nobody needs."""


@contextmanager
def ended_by(linear: LinearLayer, runs: int) -> Iterator[None]:
    """End what runs inside the context once a layer has run so often; the rest of a block's work is saved.

    Open it outside of what records that layer, so that its last run is recorded.
    """
    seen = 0

    def count(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == runs:
            raise _EnoughError

    handle = linear.module.register_forward_hook(count)
    try:
        yield
    except _EnoughError:
        pass
    finally:
        handle.remove()


def _is_product(module: nn.Module, x: Any, y: Tensor) -> bool:
    """Whether ``x [.., d_in]`` and ``y [.., d_out]`` are as wide as the layer's weight."""
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return True  # layers that are no ``nn.Linear`` are recognised by what they compute
    return x.shape[-1] == module.in_features and y.shape[-1] == module.out_features
