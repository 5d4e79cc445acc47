"""Which directions of a layer's output the loss minds: ``F = E[g g^T]`` of every layer, from one pass back."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from peelwise.engine.sweep import block_moments, sums_in_parts
from peelwise.model.layers import LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace

MOST_BYTES = 2 * 2**30


def fits(wanted: Collection[LinearLayer], most_bytes: int = MOST_BYTES) -> bool:
    """Whether the curvatures of all layers together are no larger than allowed."""
    return sum(4 * linear.weight().shape[0] ** 2 for linear in wanted) <= most_bytes


def output_curvatures(
    runner: Runner,
    trace: Trace,
    wanted: Collection[LinearLayer],
    *,
    most_bytes: int = MOST_BYTES,
    after_block: Callable[[int], None] = lambda done: None,
) -> dict[LinearLayer, Tensor] | None:
    """Return ``E[g g^T] [d_out, d_out]`` of the loss's gradients ``g`` at each layer's output, float32.

    To second order, errors ``E`` of a layer's weights cost ``tr(F E S E^T) / 2`` where gradients and inputs are
    independent (the Kronecker-factored curvature, arXiv:1503.05671).

    Args:
        runner: the model.
        trace: tokens to differentiate.
        wanted: layers.
        most_bytes: ``None`` is returned where all matrices together would be larger.
        after_block: called with the number of blocks done.
    """
    if not fits(wanted, most_bytes):
        return None
    above = [runner.tail_gradients(trace)]
    found: dict[LinearLayer, Tensor] = {}
    for done, block in enumerate(reversed(runner.blocks), start=1):
        keep, behind = any(linear in wanted for linear in block.linears), above
        for linears in sums_in_parts(runner, block, 1, keep) if keep else [block.linears]:
            (moments,), above = block_moments(runner, block, trace, behind, keep=keep, with_F=keep, linears=linears)
            for linear, each in moments.items():
                if linear in wanted and each.F is not None:
                    found[linear] = runner.kept(each.F.float())
        after_block(done)
    return found
