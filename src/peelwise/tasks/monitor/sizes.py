"""How much of a probe a measurement may take, so that a budget allows one in reasonable time.

A probe that is too large for its model and budget is measured once in half an hour, which decides nothing in a run of
an hour. So measurements begin with as many of its sequences as the budget pays for about once a minute, and take more
as the run grows: about one measurement for every twentieth of it.
"""

from __future__ import annotations

from dataclasses import replace

from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split

# Of the whole model forward, that a measurement takes which can decide a block; it solves for all layers, and then
# refines blocks for as long as all of that took.
PASSES, SOLVES = 8.0, 2.0
_SOONEST, _PER_RUN = 60.0, 20  # seconds between measurements at the beginning; measurements in a run, later
_FEWEST_TOKENS, _FEWEST_SEQUENCES, _FEWEST_EXAMPLES = 1024, 8, 128


def tokens_of(probe: Probe) -> int:
    """Return the tokens of all parts, of batches the examples."""
    return probe.fit.tokens + probe.select.tokens + probe.report.tokens


def fewest_of(probe: Probe) -> int:
    """Return the tokens (of batches the examples) that a measurement has at least."""
    return _FEWEST_TOKENS if probe.examples is None else _FEWEST_EXAMPLES


def affordable_tokens(
    full: int,
    per_token: float,
    budget: float | None,
    elapsed: float = 0.0,
    now: int = 0,
    *,
    fewest: int = _FEWEST_TOKENS,
    solves: float = 0.0,
) -> int:
    """Return how many tokens of a probe to measure on; in doublings, so that losses stay comparable for long.

    Args:
        full: tokens of the whole probe.
        per_token: seconds of a forward pass.
        budget: share of wall time, or ``None`` for no limit.
        elapsed: seconds since the run began.
        now: what is measured on at present; never less than that is returned.
        fewest: to begin with.
        solves: what the solves of all layers take, in tokens that go forward.
    """
    if budget is None or per_token <= 0:
        return full
    paid = (budget * max(_SOONEST, elapsed / _PER_RUN) / per_token - SOLVES * solves) / PASSES
    size = max(now, min(fewest, full))
    while 2 * size <= paid:
        size *= 2
    return full if size > full / 2 else size


def part_of(probe: Probe, tokens: int) -> Probe:
    """Return the first sequences of each part of a probe; else the probe itself.

    Args:
        probe: the whole of it.
        tokens: of its parts together, for the sequences to fit and select with; there are up to twice as many to report
            on, since these only go through the model forward and are what narrows an interval.
    """
    share = tokens / tokens_of(probe)
    if share >= 1:
        return probe

    def first(split: Split, share: float) -> Split:
        count = min(split.sequences, max(_FEWEST_SEQUENCES, round(share * split.sequences)))
        return split.at(slice(count))

    fit, select, report = first(probe.fit, share), first(probe.select, share), first(probe.report, 2 * share)
    return replace(probe, fit=fit, select=select, report=report, pool=None, documents=None)
