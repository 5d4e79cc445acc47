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
from peelwise.probe.examples import Examples
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split

TOKENS = 1024  # about so many
_FEWEST, _FEWEST_EXAMPLES = 8, 32  # sequences, for an interval; examples have one number each, not one a token


def few_of(probe: Probe, tokens: int = TOKENS) -> Split:
    """Return the first sequences of a probe's report part, about so many tokens but at least eight sequences.

    Of examples, about so many of the positions that a model makes of them, but at least 32.
    """
    report = probe.report
    of_examples = isinstance(report, Examples)
    per_sequence = float(report.width) if of_examples else max(report.tokens / max(report.sequences, 1), 1.0)
    fewest = _FEWEST_EXAMPLES if of_examples else _FEWEST
    count = min(report.sequences, max(fewest, round(tokens / per_sequence)))
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
        if isinstance(split, Examples):
            return PulseFacts(paired(runner.own_losses(split).cpu(), split.weights.sum(1).double()).interval(), None)
        loss, tokens, own, after = (t.cpu() for t in runner.losses_ahead(split))
    both = (tokens - 1).clamp_min(1)
    return PulseFacts(paired(loss, tokens).interval(), paired(own - after, both).interval())
