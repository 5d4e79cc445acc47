"""The stages of a peel after the model's own losses are known: maps, heads, controls. Each leaves its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from peelwise.engine.heads import LIGHT_STEPS, LightHead, Losses, light_head, own_head_losses
from peelwise.engine.opening import untrained_session
from peelwise.engine.permute import shuffled_stations, shuffled_targets
from peelwise.engine.session import LOSSES, Session
from peelwise.engine.sweep import Targets
from peelwise.model.architectures import find_blocks
from peelwise.model.fresh import fresh_copy
from peelwise.model.layers import Block
from peelwise.model.runner import Runner
from peelwise.records.base import Note, note
from peelwise.references.map_search import MapSearch
from peelwise.references.maps import StationMap
from peelwise.tasks.peel.climber import BudgetEndedError, Climber, Reference
from peelwise.tasks.peel.fit import FitOptions

HEADS_OF_LARGE = 4
_LARGE_HEAD = 0.15  # share of blocks and head together from which a fitted head per map costs too much


@dataclass
class MapVisit:
    """What one map reached. ``head`` is ``None`` until a head was fitted on its stack."""

    stations: StationMap
    references: list[Reference]
    own: Losses
    head: LightHead | None
    blocks_fitted: int
    wall_seconds: float
    token_forwards: float

    @property
    def losses(self) -> Losses:
        """Losses with the fitted head, or with the model's own."""
        return self.head.losses if self.head else self.own

    @property
    def is_model(self) -> bool:
        """Whether every reference is the model's own block: the direct map, started warm."""
        return not any(reference.state for reference in self.references)


@dataclass
class PeelFindings:
    """Filled stage by stage; valid whenever work stops."""

    visits: dict[StationMap, MapVisit] = field(default_factory=dict)
    head_control: LightHead | None = None
    shuffled: Losses | None = None
    untrained: Losses | None = None
    head_steps: int = LIGHT_STEPS
    notes: list[Note] = field(default_factory=list)
    maps_total: int = 0
    complete: bool = False

    def best(self) -> MapVisit | None:
        """Return the map with the lowest loss on select; only those with a fitted head if any has one."""
        return min(self.comparable(), key=lambda v: (v.losses.select, -len(set(v.stations))), default=None)

    def comparable(self) -> list[MapVisit]:
        """Return the visits whose losses were measured in the same way."""
        with_head = [visit for visit in self.visits.values() if visit.head]
        return with_head or list(self.visits.values())


def head_control(session: Session, *, share: float) -> tuple[LightHead | None, bool]:
    """Fit the head on the model itself: what every map has to beat.

    Returns the head, or ``None`` where none can be fitted, and whether it ended before ``share`` of the budget did.
    """
    clock = session.clock
    stop = clock.elapsed + share * clock.budget
    with clock.stage("head-control"):
        head = light_head(session, keep_going=lambda: clock.elapsed < stop)
    return head, clock.elapsed < stop


def visit_maps(
    session: Session,
    findings: PeelFindings,
    search: MapSearch,
    climber: Climber,
    *,
    controls: bool,
    most_reserved: float,
) -> bool:
    """MapVisit map after map until none is left or the rest of the budget is needed for heads and controls.

    Args:
        session: model and traces.
        findings: ``visits`` is filled.
        search: says which map is next.
        climber: builds the stacks.
        controls: whether time for them is kept.
        most_reserved: part of the budget that is kept at most, so that maps always get their turn.

    Returns whether the search ended by itself: no map that it wanted to visit was out of reach.
    """
    clock, pace = session.clock, Pace()
    every_head = fits_every_head(session.runner) and findings.head_control is not None

    def stop() -> float:
        return clock.budget - min(_reserve(session, pace, controls=controls), most_reserved * clock.budget)

    def affordable(stations: StationMap) -> bool:
        return clock.elapsed + pace.seconds(climber.to_fit(stations)) < stop()

    with clock.stage("maps"):
        while (stations := search.following(affordable)) is not None:
            clock.tell(len(findings.visits), search.total)
            findings.maps_total = search.total
            try:
                visit = _visit(session, climber, stations, lambda: clock.elapsed < stop(), pace)
            except BudgetEndedError:
                findings.notes.append(note("map-unfinished", map=" ".join(map(str, stations))))
                return False
            if visit.is_model:
                visit.head = findings.head_control
            elif every_head:
                visit.head = light_head(_on_stack(session, climber), max_steps=findings.head_steps)
            findings.visits[stations] = visit
            search.tell(stations, visit.losses.select)
    findings.maps_total = search.total
    return search.refused == 0


def fit_heads(session: Session, findings: PeelFindings, climber: Climber, *, share: float) -> bool:
    """Where heads are large, fit them on the stacks that do best with the model's own; return whether all were."""
    if findings.head_control is None or fits_every_head(session.runner):
        return True
    clock, spent = session.clock, session.clock.stages["head-control"][0]
    ranked = sorted(findings.visits.values(), key=lambda v: v.own.select)[:HEADS_OF_LARGE]
    with clock.stage("map-heads"):
        for done, visit in enumerate(v for v in ranked if v.head is None):
            clock.tell(done, len(ranked))
            if clock.elapsed + spent > share * clock.budget:
                return False
            climber.climb(visit.stations)
            visit.head = light_head(_on_stack(session, climber), max_steps=findings.head_steps)
    findings.notes.append(note("few-heads", heads=len(ranked)))
    return True


def shuffled_control(
    session: Session, best: MapVisit, options: FitOptions, *, weighted: bool, max_steps: int
) -> Losses:
    """Build the best map again from stations and labels of the fit tokens permuted across sequences."""
    with session.clock.stage("shuffled-control"):
        shuffle = shuffled_stations(session.fit, session.seed)
        climber = Climber(session, options, weighted=weighted, shuffle=shuffle)
        return _built(session, best, climber, shuffled_targets(session.fit, session.seed), max_steps)


def untrained_control(
    session: Session, best: MapVisit, options: FitOptions, *, weighted: bool, max_steps: int
) -> Losses | None:
    """Build the best map on the same architecture at initialisation, with its own stations.

    Returns ``None`` where the model cannot be initialised again.
    """
    with session.clock.stage("untrained-control"):
        fresh = untrained_session(session, session.probe)
        if fresh is None:
            return None
        return _built(fresh, best, Climber(fresh, options, weighted=weighted), None, max_steps)


def initialised_blocks(model: nn.Module, seed: int) -> tuple[Block, ...] | None:
    """Return the blocks of the same architecture at initialisation, for a cold start, or ``None``."""
    fresh = fresh_copy(model, seed)
    return None if fresh is None else find_blocks(fresh)


def fits_every_head(runner: Runner) -> bool:
    """Whether the head is small enough to be fitted on every map's stack."""
    return runner.head_share < _LARGE_HEAD


def _reserve(session: Session, pace: Pace, *, controls: bool) -> float:
    """Estimate the seconds that heads and controls will take; a control fits every block of a map anew."""
    head, _ = session.clock.stages["head-control"]
    opening, _ = session.clock.stages[LOSSES]
    heads = 0.0 if fits_every_head(session.runner) else HEADS_OF_LARGE * head
    return heads + (2 * (pace.seconds(len(session.runner.blocks)) + head) + opening if controls else 0.0)


class Pace:
    """How long fitting a reference has taken so far."""

    def __init__(self) -> None:
        self._seconds, self._fits = 0.0, 0

    def add(self, seconds: float, fits: int) -> None:
        """Note that ``fits`` references took so long."""
        if fits:
            self._seconds, self._fits = self._seconds + seconds, self._fits + fits

    def seconds(self, fits: int) -> float:
        """Estimate how long so many take."""
        return fits * self._seconds / self._fits if self._fits else 0.0


def _visit(
    session: Session, climber: Climber, stations: StationMap, keep_going: Callable[[], bool], pace: Pace
) -> MapVisit:
    began, worked, to_fit = time.monotonic(), session.clock.work.token_forwards, climber.to_fit(stations)
    references = climber.climb(stations, keep_going=keep_going)
    seconds = time.monotonic() - began
    pace.add(seconds, to_fit)
    own = own_head_losses(_on_stack(session, climber))
    worked = session.clock.work.token_forwards - worked
    return MapVisit(stations, references, own, None, to_fit, seconds, worked)


def _built(session: Session, best: MapVisit, climber: Climber, targets: Targets | None, max_steps: int) -> Losses:
    """Return what a control's construction of the best map reaches, with the same kind of head."""
    total = len(best.stations)
    climber.climb(best.stations, after_block=lambda done: session.clock.tell(done, total))
    built = _on_stack(session, climber)
    head = light_head(built, targets=targets, max_steps=max_steps) if best.head else None
    return head.losses if head else own_head_losses(built)


def _on_stack(session: Session, climber: Climber) -> Session:
    """Return the session whose last stations are those of the stack in place."""
    traces = climber.stack.traces
    return replace(session, fit=traces["fit"], select=traces["select"], report=traces["report"])
