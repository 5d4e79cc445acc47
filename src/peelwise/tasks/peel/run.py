"""Peel one model at one moment: fit stacks of reference blocks along station maps, and see what they reach."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from peelwise.engine.clock import Watcher
from peelwise.engine.opening import checked_blocks, format_names, low_bit_layers, open_session
from peelwise.engine.provenance import Setup
from peelwise.engine.session import Session
from peelwise.errors import UnsupportedModelError
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.records.base import note
from peelwise.records.peel import PeelRecord
from peelwise.references.map_search import MapSearch
from peelwise.tasks.peel import stages as visits
from peelwise.tasks.peel.climber import Climber
from peelwise.tasks.peel.fit import FitOptions
from peelwise.tasks.peel.settings import PeelSettings
from peelwise.tasks.peel.stages import PeelFindings
from peelwise.tasks.peel.summary import summarise

# The part of the budget that the head control may take; the part that maps leave to heads and controls at most;
# those after which no further head or control is begun.
_HEAD_SHARE, _MOST_RESERVED = 0.06, 0.45
_HEADS_SHARE, _CONTROL_SHARE = 0.8, 0.95


@dataclass(frozen=True)
class PeelOutcome:
    """The record of a peel, and the reference stack and heads that prove it, by name of the witness file."""

    record: PeelRecord
    witness: dict[str, Tensor]
    probe: Probe


def run_peel(
    model: nn.Module,
    probe: Probe,
    settings: PeelSettings,
    *,
    name: str = "model",
    source: str | None = None,
    watcher: Watcher | None = None,
) -> PeelOutcome:
    """Peel ``model`` on ``probe`` and leave the model exactly as it was (arXiv:2605.02853).

    Ctrl-C ends the peel early with what was finished, once the model's own losses are known.

    Args:
        model: a decoder-only language model; see `find_blocks`.
        probe: the text, split in three.
        settings: budget, maps and limits.
        name: the model's name in the record.
        source: where it was opened from, for ``verify``.
        watcher: told about progress.

    Raises:
        UnsupportedModelError: If the architecture cannot be peeled.
        ModelError: If the model holds NaN or Inf, or its loss is not finite.
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
        MapError: If a map has the wrong length, decreases or points backwards.
    """
    blocks = checked_blocks(model, probe)
    search = MapSearch(len(blocks), settings.station_maps, beam_width=settings.beam_width)
    formats = format_names(low_bit_layers(blocks))
    setup = Setup(model, blocks, name, source, identify(model), settings.plain(formats), probe.seed)
    with untouched(model):
        session = open_session(
            model,
            blocks,
            probe,
            name=name,
            budget_seconds=settings.budget_seconds,
            micro_batch_tokens=settings.micro_batch_tokens,
            watcher=watcher,
        )
        _check_stations(session.fit, name)
        findings = PeelFindings(maps_total=search.total, notes=[*session.notes])
        if formats and settings.dense_references:
            findings.notes.append(note("dense-references", formats=formats))
        try:
            findings.complete = _stages(session, findings, search, settings)
        except KeyboardInterrupt:
            findings.notes.append(note("stopped"))
        record, witness = summarise(session, findings, setup, settings.margin, settings.start)
    return PeelOutcome(record, witness, probe)


def _stages(session: Session, findings: PeelFindings, search: MapSearch, settings: PeelSettings) -> bool:
    """Run the stages in the order of what they are worth; return whether all of them ended by themselves."""
    options = FitOptions(settings.most_rounds, settings.steps, dense=settings.dense_references)
    weighted = settings.weighted
    heads_share = _HEADS_SHARE if settings.controls else _CONTROL_SHARE
    _head_control(session, findings)
    climber = Climber(session, options, weighted=weighted, fresh=_fresh(session, settings))
    complete = visits.visit_maps(
        session, findings, search, climber, controls=settings.controls, most_reserved=_MOST_RESERVED
    )
    complete &= visits.fit_heads(session, findings, climber, share=heads_share)
    if settings.controls and findings.visits:
        complete &= _controls(session, findings, options, weighted=weighted)
    if not complete:
        findings.notes.append(note("budget-ended"))
    return complete


def _head_control(session: Session, findings: PeelFindings) -> None:
    """Fit the head on the model; where the time ends that early, maps' heads get as many steps as it took, no more."""
    findings.head_control, in_time = visits.head_control(session, share=_HEAD_SHARE)
    if findings.head_control is None:
        findings.notes.append(note("no-head-fit"))
    elif not in_time:
        findings.head_steps = max(findings.head_control.steps, 1)
        findings.notes.append(note("head-steps", steps=findings.head_steps))


def _controls(session: Session, findings: PeelFindings, options: FitOptions, *, weighted: bool) -> bool:
    """Run the null controls of the best map that the budget still allows; return whether all were run."""
    clock, best = session.clock, findings.best()
    if best is None:
        return True
    steps = findings.head_steps
    if clock.elapsed >= _CONTROL_SHARE * clock.budget:
        return False
    findings.shuffled = visits.shuffled_control(session, best, options, weighted=weighted, max_steps=steps)
    if clock.elapsed >= _CONTROL_SHARE * clock.budget:
        return False
    findings.untrained = visits.untrained_control(session, best, options, weighted=weighted, max_steps=steps)
    if findings.untrained is None:
        findings.notes.append(note("not-initialised"))
    return True


def _fresh(session: Session, settings: PeelSettings) -> tuple[Block, ...] | None:
    if settings.start == "warm":
        return None
    fresh = visits.initialised_blocks(session.runner.model, session.seed)
    if fresh is None:
        raise UnsupportedModelError(
            'start="cold": the model cannot be initialised again (no configuration and no reset_parameters). '
            'Use start="warm".'
        )
    return fresh


def _check_stations(trace: Trace, name: str) -> None:
    batch = trace.batches[0]
    if batch.stations[0].dim() != 3:
        raise UnsupportedModelError(
            f"Not yet: the hidden state of {name} is several streams {list(batch.stations[0].shape)}; a block can only "
            "regress to a station [batch, tokens, width]. Audit the model instead."
        )
    if batch.stations[0].shape[:2] != batch.weights.shape:
        raise UnsupportedModelError(
            f"Not yet: the hidden state of {name} is [tokens, batch, width]; a block can only regress to a station "
            "[batch, tokens, width]. Audit the model instead."
        )
    widths = [tuple(station.shape[-1:]) for station in trace.batches[0].stations]
    if len(set(widths)) > 1:
        raise UnsupportedModelError(
            f"Not yet: the stations of {name} have different widths {[w[0] for w in widths]}; a block can only "
            "regress to a station of its own width. Audit the model instead."
        )
