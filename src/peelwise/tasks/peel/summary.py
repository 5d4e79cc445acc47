"""From the findings of a peel to its frozen record and the witness tensors."""

from __future__ import annotations

import datetime
from typing import Literal

from torch import Tensor

from peelwise.engine.heads import Losses
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import Session
from peelwise.engine.witness import coded_tensors
from peelwise.evidence.peel import conclusion, informative, station_verdict
from peelwise.evidence.verdict import default_margin
from peelwise.model.layers import Block, device_of
from peelwise.records.base import Interval
from peelwise.records.peel import MapRecord, PartLosses, PeelLossRecord, PeelRecord, StationRecord
from peelwise.references.map_search import map_name, redundancy_pairs
from peelwise.tasks.peel.stages import MapVisit, PeelFindings

STACK, BOUND_HEAD, CONTROL_HEAD = "stack", "head/bound", "head/control"


def summarise(
    session: Session, findings: PeelFindings, setup: Setup, margin: float | None, start: Literal["warm", "cold"]
) -> tuple[PeelRecord, dict[str, Tensor]]:
    """Return the record of everything found, and the witness tensors by name.

    Args:
        session: the model's own losses and the clock.
        findings: what the stages left.
        setup: what was peeled.
        margin: nats per token, or ``None`` for the default.
        start: where reference blocks started from.
    """
    margin = default_margin(session.report.mean) if margin is None else margin
    best = findings.best()
    losses = _losses(session, findings, best)
    maps = tuple(_map_record(session, findings, v) for v in _ranked(findings))
    blocks = tuple(_station_record(session, findings, block, margin) for block in setup.blocks[:-1])
    believed = informative(losses)
    probe = session.probe
    record = PeelRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=conclusion(losses, maps, blocks, informative=believed),
        complete=findings.complete,
        margin_nats=margin,
        informative=believed,
        start=start,
        model=model_record(setup),
        probe=probe.record(),
        loss=losses,
        best_map=best.stations if best else None,
        maps=maps,
        maps_total=max(findings.maps_total, len(maps)),
        blocks=blocks,
        cost=session.clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(setup.model)),
        notes=tuple(findings.notes),
        settings=setup.settings,
        seed=setup.seed,
        versions=versions(),
    )
    return record, _witness(session, findings, best)


def _ranked(findings: PeelFindings) -> list[MapVisit]:
    """Maps with a fitted head first, best first; they are chosen on select, so they are ranked on select."""
    return sorted(findings.visits.values(), key=lambda v: (v.head is None, v.losses.select, -len(set(v.stations))))


def _map_record(session: Session, findings: PeelFindings, visit: MapVisit) -> MapRecord:
    tokens = float(session.probe.fit.tokens + session.probe.select.tokens + session.probe.report.tokens)
    control = findings.head_control
    return MapRecord(
        stations=visit.stations,
        name=map_name(visit.stations),
        own_head=_part_losses(visit.own),
        loss=_part_losses(visit.head.losses) if visit.head else None,
        gain_over_model=session.gain(session.report.losses, visit.losses.report_sequences).interval(),
        gain_over_head=session.gain(control.losses.report_sequences, visit.losses.report_sequences).interval()
        if control and visit.head
        else None,
        unexplained=tuple(reference.fitted.select_error for reference in visit.references),
        blocks_fitted=visit.blocks_fitted,
        wall_seconds=visit.wall_seconds,
        forward_equivalents=visit.token_forwards / tokens,
    )


def _station_record(session: Session, findings: PeelFindings, block: Block, margin: float) -> StationRecord:
    station = block.index + 1
    # With few heads, the model's own head is the one yardstick that every map was measured with.
    alike = findings.comparable() if len(findings.comparable()) == len(findings.visits) else None
    found = {v.stations: v.losses if alike else v.own for v in findings.visits.values()}
    pair = redundancy_pairs({m: losses.select for m, losses in found.items()}, len(session.runner.blocks)).get(station)
    if pair is None:
        return StationRecord(index=block.index, station=station, name=block.name)
    having, lacking = pair
    lost = session.gain(found[lacking].report_sequences, found[having].report_sequences).interval()
    return StationRecord(
        index=block.index,
        station=station,
        name=block.name,
        lost_nats=lost,
        with_map=having,
        without_map=lacking,
        verdict=station_verdict(lost, margin),
    )


def _losses(session: Session, findings: PeelFindings, best: MapVisit | None) -> PeelLossRecord:
    current, control = session.report.losses, findings.head_control
    head = control.losses.report_sequences if control else None
    bound = best.losses.report_sequences if best else None
    shuffled, untrained = findings.shuffled, findings.untrained
    return PeelLossRecord(
        current=session.report.mean,
        head_control=control.losses.report if control else None,
        bound=best.losses.report if best else None,
        shuffled=shuffled.report if shuffled else None,
        untrained=untrained.report if untrained else None,
        head_control_gain=_difference(session, current, head),
        bound_gain=_difference(session, current, bound),
        over_head_control=_difference(session, head, bound),
        over_shuffled=_difference(session, shuffled.report_sequences if shuffled else None, bound),
        over_untrained=_difference(session, untrained.report_sequences if untrained else None, bound),
    )


def _difference(session: Session, before: Tensor | None, after: Tensor | None) -> Interval | None:
    return None if before is None or after is None else session.gain(before, after).interval()


def _part_losses(losses: Losses) -> PartLosses:
    return PartLosses(fit=losses.fit, select=losses.select, report=losses.report)


def _witness(session: Session, findings: PeelFindings, best: MapVisit | None) -> dict[str, Tensor]:
    """Return the best map's stack as changes and codes of the model's own maps, and the two heads' changes."""
    out: dict[str, Tensor] = {}
    formats = {linear.name: held.format for linear, held in session.held.items()}
    if best is not None:
        for state in (reference.state for reference in best.references):
            out |= {f"{STACK}/{name}": change for name, change in state.changes.items()}
            for name, encoded in state.codes.items():
                out |= coded_tensors(f"{STACK}/{name}", encoded, formats[name])
        if best.head:
            out[BOUND_HEAD] = best.head.change
    if findings.head_control:
        out[CONTROL_HEAD] = findings.head_control.change
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in out.items()}
