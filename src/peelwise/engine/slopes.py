"""What changes of linear layers gain to first order: one pass forward and back over a part, for all blocks at once.

    -sum_t <g_t, D x_t>

per sequence, with ``x_t`` what a layer sees, ``g_t`` the gradient of the loss at its output, and ``D`` its change.
Where the loss is convex along a direction no step gains more than its length times the slope at its beginning, so this
is an upper bound of what the change gains, without any evaluation of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peelwise.engine.session import Changes, ReportSession
from peelwise.model.capture import Call
from peelwise.model.trace import Batch, Trace, batch_first
from peelwise.stats.gram import widened, with_ones


def first_order_gains(session: ReportSession, part: Trace, changes: Mapping[int, Changes]) -> dict[int, Tensor]:
    """Return per block ``[sequences]``, float64, nats: what its changes gain to first order, summed over tokens.

    Args:
        session: the model as it stands.
        part: the tokens, with the model's own stations.
        changes: per block index the changes of its linear layers, ``[d_out, d_in (+1 with a bias)]`` each. A block is
            left out where one of its changed layers has no gradient, or rows that are not those of the tokens.

    Raises:
        NotDifferentiableError: If the model hides its inner results from gradients.
    """
    runner, found = session.runner, dict[int, list[Tensor]]()
    if not changes:
        return {}
    above = runner.tail_gradients(part)
    for block in reversed(runner.blocks[min(changes) :]):
        below, sums = [], list[Tensor | None]()
        for batch, gradient in zip(part.batches, above, strict=True):
            capture, ((down, grads),) = runner.block_gradients(block, batch, [gradient])
            below.append(down)
            total: Tensor | None = batch.weights.new_zeros(len(batch.weights), dtype=torch.float64)
            for linear, change in changes.get(block.index, {}).items():
                calls = capture.calls.get(linear, [])
                if calls and linear not in grads:
                    total = None
                    break
                for call, g in zip(calls, grads.get(linear, []), strict=True):
                    gained = _gained(call, g, change, batch, bias=linear.has_bias)
                    total = None if total is None or gained is None else total + gained
            sums.append(total)
        runner.work.add(runner.shares[block.index], part.predicted, 3)
        above = below
        if block.index in changes and all(each is not None for each in sums):
            found[block.index] = [each for each in sums if each is not None]
    every = len(part.tokens)
    known = [i for i in sorted(changes) if runner.processes.all_true(i in found)]
    return {i: runner.processes.all_gather(torch.cat(found[i]))[:every] for i in known}


def _gained(call: Call, g: Tensor, change: Tensor, batch: Batch, *, bias: bool) -> Tensor | None:
    """Return ``-sum_t <g_t, D x_t>`` of one run of a layer, ``[b]``; ``None`` if its rows are not tokens."""
    x, g = (each if call.rows is not None else batch_first(each, batch.read) for each in (call.x.detach(), g))
    x, g = widened(x).flatten(0, -2), widened(g).flatten(0, -2)
    b, t = batch.read.shape
    if call.rows is None and len(x) % (b * t) != 0:
        return None
    places = torch.arange(b * t, device=x.device).repeat_interleave(len(x) // (b * t))
    owner = (places if call.rows is None else call.rows) // t
    rows = with_ones(x) if bias else x
    each = -((rows @ change.to(rows).T) * g).sum(1, dtype=torch.float64)
    return torch.zeros(b, dtype=torch.float64, device=x.device).index_add_(0, owner, each)
