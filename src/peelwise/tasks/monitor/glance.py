"""A first look at a model in training: the gain slopes of all blocks, one pass forward and back over few tokens.

In a wide model most of a measurement on few tokens is solves, so that its first one comes late. Until then the slopes
of the loss along scales tell which block is unlike the others: no weights, no solves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.table import pass_table
from peelwise.errors import ModelError
from peelwise.evidence.unlike import LEAST_BLOCKS, OWN, SLOPES, own_evidence
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.parts import parts_of
from peelwise.model.runner import Runner
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.tasks.monitor.depth import over_blocks
from peelwise.tasks.monitor.measure import Measured

_SIGNALS = ("gain_slope", SLOPES, OWN)


def glance(model: nn.Module, blocks: Sequence[Block], probe: Probe, *, micro_batch_tokens: int) -> Measured:
    """Return the loss and the gain slopes on the report part; the model is left exactly as it was.

    Beside the slopes, `Measured.scales`: how certain it is that the loss asks for other scales in a block whatever the
    others do (`evidence.unlike.own_evidence`), in standard deviations; empty in stacks of fewer than five blocks.

    Args:
        model: in training.
        blocks: its blocks.
        probe: the text.
        micro_batch_tokens: tokens that go through the model at a time.

    Raises:
        ModelError: If the loss is no finite number.
    """
    all_parts = [parts_of(block) for block in blocks]
    linears = [linear for block in blocks for linear in block.linears]
    with untouched(model), frozen(linears), torch.no_grad():
        runner = Runner(model, blocks, micro_batch_tokens=micro_batch_tokens)
        trace = runner.trace(probe.report)
        if not math.isfinite(trace.mean):
            raise ModelError(f"The loss of the model on the probe is {trace.mean}: it has no slopes.")
        table = pass_table(runner, all_parts, trace, signals=_SIGNALS)
    found = over_blocks(table)
    free = {name: [found.get(block, {}).get(name) for block in range(len(blocks))] for name in _SIGNALS}
    return Measured(
        "slopes", trace.mean, free, scales=_scales(free[OWN], [len(gates_of(parts)) for parts in all_parts])
    )


def _scales(evidence: Sequence[float | None], gates: Sequence[int]) -> dict[int, float]:
    """Return block -> evidence of its own scales in standard deviations; none of fewer than five blocks."""
    known = [block for block, value in enumerate(evidence) if value is not None]
    if len(known) < LEAST_BLOCKS:
        return {}
    values = np.array([evidence[block] for block in known], dtype=float)
    scores = own_evidence(values, np.array([gates[block] for block in known], dtype=float))
    return dict(zip(known, scores.tolist(), strict=True))
