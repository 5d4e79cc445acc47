"""Gradients at the outputs of linear layers: which there are, and the error where a model hides them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peelwise.errors import NotDifferentiableError
from peelwise.model.capture import Capture
from peelwise.model.layers import LinearLayer


def differentiable(capture: Capture, out: Tensor, name: str) -> dict[LinearLayer, list[Tensor]]:
    """Return the outputs of the layers that gradients can be had of, one per run.

    Runs of constants, such as the unit matrix by which DoRA finds an adapter's weight, are dropped from ``capture``:
    no token went through them.

    Args:
        capture: what the layers saw.
        out: what is to be differentiated.
        name: of the block, for the error.

    Raises:
        NotDifferentiableError: If ``out`` has none, or hides some by reentrant activation checkpointing.
    """
    used = {}
    for linear, calls in capture.calls.items():
        live = [call for call in calls if call.y.requires_grad]
        if live:
            capture.calls[linear] = live
            used[linear] = [call.y for call in live]
    if not out.requires_grad or (len(used) < len(capture.calls) and _is_checkpointed(out)):
        raise not_differentiable(next((linear.name for linear in capture.calls if linear not in used), name))
    return used


def gradients_by_layer(
    used: dict[LinearLayer, list[Tensor]], found: Sequence[Tensor | None]
) -> dict[LinearLayer, list[Tensor]]:
    """Return the gradients ``found`` at the outputs of ``used``, zero for a run that has none, by layer."""
    rest, grads = iter(found), {}
    for linear, outputs in used.items():
        own = [next(rest) for _ in outputs]
        if any(g is not None for g in own):
            grads[linear] = [torch.zeros_like(y) if g is None else g for y, g in zip(outputs, own, strict=True)]
    return grads


def _is_checkpointed(out: Tensor) -> bool:
    """Whether reentrant activation checkpointing is part of the graph of ``out``."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        left.extend(parent for parent, _ in node.next_functions)
    return False


def not_differentiable(what: str) -> NotDifferentiableError:
    """Return the error for a block or layer whose output has no gradient."""
    return NotDifferentiableError(
        f"{what} hides its inner results from gradients (reentrant activation checkpointing?). "
        "Switch checkpointing off, or use use_reentrant=False."
    )
