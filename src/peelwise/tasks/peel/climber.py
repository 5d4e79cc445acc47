"""Build the reference stack of a map, reusing what maps with the same beginning have fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from peelwise.engine.permute import Shuffle
from peelwise.engine.session import Session
from peelwise.model.layers import Block
from peelwise.references.map_search import shared_prefix
from peelwise.references.maps import StationMap
from peelwise.tasks.peel.fit import FitOptions, Fitted, coordinate_weights, fit_block
from peelwise.tasks.peel.reference_block import ReferenceBlock, State
from peelwise.tasks.peel.stack import Stack
from peelwise.tasks.peel.station_error import Target

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Reference:
    """A fitted reference block, small enough to be kept: what is not the model's, and how well it hits its station."""

    state: State
    fitted: Fitted


class BudgetEndedError(Exception):
    """The time allowed ended inside a map; what was fitted for it is kept, the map itself has no result."""


class Climber:
    """Fits reference stacks map by map. References of shared prefixes are fitted once.

    Kept are the references by prefix (changes and codes only, oldest forgotten beyond ``cache_bytes``) and the stations
    of the present path.

    Args:
        session: the model and its own traces.
        options: how hard each block is fitted.
        weighted: whether coordinates are weighted by their inverse variance.
        fresh: the same blocks at initialisation for a cold start, ``None`` for a warm one.
        shuffle: permutes target stations of the fit tokens across sequences (null control).
    """

    def __init__(
        self,
        session: Session,
        options: FitOptions,
        *,
        weighted: bool = True,
        fresh: tuple[Block, ...] | None = None,
        shuffle: Shuffle | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.runner, self.options, self.weighted = session.runner, options, weighted
        self._traces = {"fit": session.fit, "select": session.select, "report": session.report}
        self.stack = Stack(self.runner, self._traces)
        self._fresh, self._shuffle, self._cache_bytes = fresh, shuffle, cache_bytes
        self._references: dict[StationMap, Reference] = {}
        self._weights: dict[int, Tensor] = {}
        self._exact = shuffle is None and fresh is None

    def climb(
        self,
        stations: StationMap,
        *,
        keep_going: Callable[[], bool] = lambda: True,
        after_block: Callable[[int], None] = lambda done: None,
    ) -> list[Reference]:
        """Put the stack of a map in place and return its references, fitting those that are not there yet.

        Args:
            stations: the map.
            keep_going: asked before each fit.
            after_block: called with the number of blocks in place.

        Raises:
            BudgetEndedError: If ``keep_going`` said no.
        """
        self.stack.cut(shared_prefix(stations, self.stack.prefix))
        for depth in range(self.stack.depth, len(stations)):
            prefix = stations[: depth + 1]
            known = self._references.get(prefix)
            block = ReferenceBlock(self.runner.blocks[depth], known.state if known else None, dense=self.options.dense)
            if known is None:
                if not keep_going():
                    raise BudgetEndedError
                self._remember(prefix, self._fit(block, stations[depth]))
            self.stack.push(stations[depth], block)
            after_block(depth + 1)
        return [self._references[stations[: depth + 1]] for depth in range(len(stations))]

    def to_fit(self, stations: StationMap) -> int:
        """Return how many references a map still needs; a warm one that already is its station costs nothing."""
        needed = 0
        for depth in range(len(stations)):
            prefix = stations[: depth + 1]
            exact = self._exact and prefix == tuple(range(1, depth + 2))
            needed += prefix not in self._references and not exact
        return needed

    def _fit(self, block: ReferenceBlock, station: int) -> Reference:
        if self._fresh is not None:
            block.set(block.initialised(self._fresh[block.own.index]))
        fitted = fit_block(
            self.runner,
            block,
            self.stack.traces["fit"],
            self.stack.traces["select"],
            self._target(station),
            self.options,
        )
        return Reference(block.state, fitted)

    def _target(self, station: int) -> Target:
        fit, select = ([b.stations[station] for b in self._traces[part].batches] for part in ("fit", "select"))
        if station not in self._weights:
            self._weights[station] = coordinate_weights(self._traces["fit"], fit, weighted=self.weighted)
        return Target(self._shuffle(fit) if self._shuffle else fit, select, self._weights[station])

    def _remember(self, prefix: StationMap, reference: Reference) -> None:
        self._references[prefix] = reference
        total = sum(r.state.bytes for r in self._references.values())
        # The oldest go first, but never those of the path that is being climbed.
        for old in list(self._references):
            if total <= self._cache_bytes:
                break
            if prefix[: len(old)] != old:
                total -= self._references.pop(old).state.bytes
