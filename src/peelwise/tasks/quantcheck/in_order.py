"""Better codes of a quantised model, one layer after the other, for what each gets from the better codes before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from peelwise.engine.clock import Clock
from peelwise.engine.in_order import Walk
from peelwise.engine.session import Changes
from peelwise.formats.base import Encoded
from peelwise.formats.membership import scaled_part
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.model.weights.held import Held
from peelwise.references.asymmetric import coded, targets
from peelwise.tasks.quantcheck.kept import Kept
from peelwise.tasks.quantcheck.settings import QuantcheckSettings


def solve_in_order(
    parent: Runner,
    own: Runner,
    parts: tuple[Sequence[Trace], Sequence[Trace]],
    pairs: Mapping[LinearLayer, LinearLayer],
    held: Mapping[LinearLayer, Held],
    curvatures: Mapping[LinearLayer, Tensor],
    settings: QuantcheckSettings,
    clock: Clock,
    stop: float,
    kept: Kept | None = None,
) -> tuple[Changes, bool]:
    """Return changes to better codes, and whether all layers were reached.

    Args:
        parent: the full-precision model.
        own: the quantised model.
        parts: traces of fit and select, of the parent and of the quantised model.
        pairs: the parent's layer of every layer of the quantised model.
        held: what its quantised layers hold.
        curvatures: of the parent's layers, where they are known.
        settings: effort.
        clock: progress.
        stop: seconds of the clock after which no block is begun; its layers and those behind keep their codes.
        kept: where the codes of each block are kept.
    """
    twins = {m: pairs[m] for m, h in held.items() if not m.is_expert and scaled_part(h.format) is not None}
    if not twins:
        return {}, True
    walk = Walk(parent, own, twins, *parts)
    for done, block in enumerate(own.blocks):
        clock.tell(done, len(own.blocks))
        known = kept.in_order(block.index) if kept is not None else None
        if known is None and clock.elapsed > stop:
            return walk.changes, False
        codes = known or _solved(walk, block, held, curvatures, settings)
        if kept is not None and known is None:
            kept.keep_in_order(block.index, codes)
        for linear in (m for m in block.linears if m.name in codes):
            walk.put(linear, held[linear].format.decode(codes[linear.name]))
        walk.leave(block)
    return walk.changes, True


def _solved(
    walk: Walk,
    block: Block,
    held: Mapping[LinearLayer, Held],
    curvatures: Mapping[LinearLayer, Tensor],
    settings: QuantcheckSettings,
) -> dict[str, Encoded]:
    """Return the codes of a block's layers by name; each group is in place before the sums of the next are made."""
    codes: dict[str, Encoded] = {}
    for group, (fit, select) in walk.groups(block):
        weights = [walk.twins[linear].weight().float() for linear in group]
        for linear, W, aim in zip(group, weights, targets(weights, fit, select), strict=True):
            mine = held[linear]
            found = coded(
                W,
                aim,
                fit,
                select,
                mine.format,
                curvature=curvatures.get(walk.twins[linear]),
                starts=[mine.encoded],
                max_sweeps=settings.max_sweeps,
                tolerance=settings.tolerance,
            )
            codes[linear.name] = found.encoded
            walk.put(linear, mine.format.decode(found.encoded))
    return codes
