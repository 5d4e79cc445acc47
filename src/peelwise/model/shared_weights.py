"""Linear layers that share one weight: a change of one is a change of all, so none of them can be asked about alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from peelwise.errors import UnsupportedModelError
from peelwise.model.experts import ExpertLinear
from peelwise.model.layers import Block, LinearLayer


def check_shared(blocks: Sequence[Block]) -> None:
    """Check that no weight is in two linear layers: a change of one would, written, change the other too.

    Raises:
        UnsupportedModelError: With the names of the first two that share one.
    """
    for first, other in _sharing(blocks):
        raise UnsupportedModelError(
            f"Not yet: {first.name} and {other.name} share one weight. A change of one layer is a change of both, "
            "which peelwise cannot evaluate block by block."
        )


def without_shared(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return blocks without the linear layers that share a weight, which are left as they are.

    Raises:
        UnsupportedModelError: If none is left; with the names of the first two that share one.
    """
    shared = {linear for pair in _sharing(blocks) for linear in pair}
    if shared and all(linear in shared for block in blocks for linear in block.linears):
        check_shared(blocks)
    return tuple(
        replace(block, linears=tuple(linear for linear in block.linears if linear not in shared)) for block in blocks
    )


def _sharing(blocks: Sequence[Block]) -> Iterator[tuple[LinearLayer, LinearLayer]]:
    """Yield two linear layers each that share a weight, the first one of all with every other."""
    first: dict[object, LinearLayer] = {}
    for block in blocks:
        for linear in block.linears:
            weight = getattr(linear.module, "weight", None)
            if not isinstance(weight, Tensor) or linear.low_bit or weight.is_meta:
                continue
            of_expert = linear.module.index if isinstance(linear.module, ExpertLinear) else None
            holder = weight if linear.parameter is None else linear.parameter
            known = first.setdefault((id(holder), of_expert), linear)
            if known.name != linear.name:
                yield known, linear
