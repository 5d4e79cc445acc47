"""The smallest measurement: the loss of a few sequences of the probe, always the same ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.evidence.facts import PulseFacts
from peelwise.evidence.intervals import paired
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.runner import Runner
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split

TOKENS = 1024  # about so many
_FEWEST = 8  # sequences, for an interval


def few_of(probe: Probe, tokens: int = TOKENS) -> Split:
    """Return the first sequences of a probe's report part, about so many tokens but at least eight sequences."""
    report = probe.report
    per_sequence = max(report.tokens / max(report.sequences, 1), 1.0)
    count = min(report.sequences, max(_FEWEST, round(tokens / per_sequence)))
    return report.at(slice(count))


def pulse(
    model: nn.Module,
    blocks: Sequence[Block],
    split: Split,
    *,
    micro_batch_tokens: int,
    processes: Processes = ONE_PROCESS,
) -> PulseFacts:
    """Measure the loss of ``split`` and leave the model, and every random state, exactly as they were.

    Raises:
        TooFewSamplesError: With fewer than two sequences.
    """
    with processes.agreeing(), untouched(model):
        runner = Runner(model, blocks, micro_batch_tokens=micro_batch_tokens, processes=processes)
        loss, tokens, own, after = (t.cpu() for t in runner.losses_ahead(split))
    both = (tokens - 1).clamp_min(1)
    return PulseFacts(paired(loss, tokens).interval(), paired(own - after, both).interval())
