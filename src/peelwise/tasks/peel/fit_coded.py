"""Fit the low-bit maps of a reference block without leaving their formats.

What a dense reference would take is the target; codes near it are looked for, and the block's error on select, with the
codes in place, decides. Nothing else is ever in place: every state of the block is inside the formats.
"""

from __future__ import annotations

from peelwise.engine.proposals import BlockProposals
from peelwise.engine.refine import Refined
from peelwise.engine.refine_coded import Candidate, Site, best_candidate
from peelwise.model.layers import LinearLayer
from peelwise.references.coded_station import coded_changes
from peelwise.references.station import StationChange, StationSums
from peelwise.tasks.peel.reference_block import State
from peelwise.tasks.peel.station_error import StationError


def solve_inside(
    problem: StationError,
    linear: LinearLayer,
    fit: StationSums,
    select: StationSums,
    found: StationChange,
    error: float,
) -> float:
    """Give an output projection the codes that lower the error on select most, if any do; return the error.

    What the sums say of select leaves out the way through the rest of the block, so each candidate is put in place.

    Args:
        problem: the block.
        linear: the projection.
        fit, select: its sums.
        found: the dense least-squares change that the codes are to come near.
        error: on select, now.
    """
    reference = problem.reference
    form, now = reference.held[linear].format, reference.codes(linear)
    best, at = error, reference.state
    kept = at
    for candidate in coded_changes(fit.S, found, form, now, select, problem.target.weights):
        biases = {linear: candidate.change[:, -1]} if linear.has_bias else {}
        state = at.recoded({linear: candidate.encoded}, biases)
        after = problem.error_at(state)
        if after < best:
            best, kept = after, state
    reference.set(kept)
    return best


def step_inside(problem: StationError, proposals: BlockProposals, error: float) -> float:
    """Take the flips or the projection of a whitened step that lower the error on select most; return the error.

    Args:
        problem: the block.
        proposals: dense steps of its linear layers and the sums around them; layers without a format are left alone.
        error: on select, now.
    """
    reference, before = problem.reference, problem.reference.state
    if not proposals.local or not reference.held:
        return error
    codes = {linear: reference.codes(linear) for linear in proposals.local}
    site = Site(Refined({}, (), error, None, proposals.index, codes), {proposals.index: proposals}, reference.held)

    def state_of(candidate: Candidate) -> State:
        biases = {m: change[:, -1] for m, change in candidate.changes.items() if m.has_bias}
        return before.recoded(candidate.codes, biases)

    best = best_candidate(site, error, lambda candidate: problem.error_at(state_of(candidate)))
    reference.set(before if best is None else state_of(best[1]))
    return error if best is None else best[0]
