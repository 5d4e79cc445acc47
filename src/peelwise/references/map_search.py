"""Which station maps to visit, and in what order: all of them for few layers, else families and a beam.

A plan without execution: it is told how well the maps visited so far do, and says which one is next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from peelwise.errors import MapError
from peelwise.references.maps import StationMap, all_maps, checked_map, map_of_subset, subset_of_map

ALL_MAPS_UP_TO = 6
BEAM_WIDTH = 4


def direct_map(layers: int) -> StationMap:
    """Return ``(1, 2, .., L)``: every layer regresses to its own station."""
    return tuple(range(1, layers + 1))


def map_name(stations: StationMap) -> str:
    """Return what a map is called: ``direct``, ``all to last``, ``first and last``, ``5 then last`` or its skips."""
    layers, subset = len(stations), subset_of_map(stations)
    if stations != map_of_subset(subset, layers):
        return "other"
    if len(subset) == layers - 1:
        return "direct"
    if not subset:
        return "all to last"
    if len(subset) == 1:
        return "first and last" if subset[0] == 1 else f"{subset[0]} then last"
    if len(subset) >= layers / 2:
        skipped = [str(s) for s in range(1, layers) if s not in subset]
        return f"without {', '.join(skipped)}"
    return f"{', '.join(map(str, subset))}, last"


def named_maps(layers: int) -> list[StationMap]:
    """Return the named families: direct, all to last, first and last, and every pair ``[s..s, L..L]``."""
    pairs = [map_of_subset([station], layers) for station in range(1, layers)]
    return list(dict.fromkeys([direct_map(layers), map_of_subset([], layers), *pairs]))


def neighbours(stations: StationMap) -> list[StationMap]:
    """Return the maps with one hidden station more or less, those that share the longest beginning first."""
    layers, subset = len(stations), set(subset_of_map(stations))
    found = {map_of_subset(subset ^ {station}, layers) for station in range(1, layers)}
    return sorted(found, key=lambda other: (-shared_prefix(stations, other), other))


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many layers two maps have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class MapSearch:
    """Says which map to visit next.

    Given maps are visited as they are, sorted so that neighbours share their beginnings. Otherwise all
    ``2^(L-1)`` maps up to six layers, the named ones first; beyond that the direct map and its cheapest
    neighbour, the other named families, and then, among the neighbours of the ``beam_width`` best maps so far,
    the one that parts latest from the best.

    Args:
        layers: number of blocks ``L``.
        maps: the maps asked for, or ``None``.
        beam_width: how many of the best maps are searched around.

    Raises:
        MapError: If a map has the wrong length, decreases or points backwards; the message names it.
    """

    def __init__(
        self, layers: int, maps: Sequence[Sequence[int]] | None = None, *, beam_width: int = BEAM_WIDTH
    ) -> None:
        self.layers, self.beam_width = layers, beam_width
        self.scores: dict[StationMap, float] = {}
        self._refused: set[StationMap] = set()
        self._beam = maps is None and layers > ALL_MAPS_UP_TO
        if maps is not None:
            if not maps:
                raise MapError('maps: expected at least one map, got an empty list. Use maps="auto" for the default.')
            self.pending = sorted({checked_map(m, layers) for m in maps})
        else:
            named = named_maps(layers)
            if self._beam:
                # The cheapest of all maps comes second: it tells what a fit takes before one asks for thirty.
                self.pending = [named[0], neighbours(named[0])[0], *named[1:]]
            else:
                self.pending = named + sorted(set(all_maps(layers)) - set(named))

    @property
    def total(self) -> int:
        """Number of maps that an endless budget would visit at most."""
        known = len(self.scores) + len(self._refused) + len(self.pending)
        return 2 ** (self.layers - 1) if self._beam else known

    @property
    def refused(self) -> int:
        """Number of maps that could not be afforded."""
        return len(self._refused)

    def following(self, affordable: Callable[[StationMap], bool]) -> StationMap | None:
        """Return the next map that can be afforded, or ``None``; tell its score before asking again."""
        while self.pending:
            found = self.pending.pop(0)
            if affordable(found):
                return found
            self._refused.add(found)
        if not self._beam:
            return None
        for best in self.best(self.beam_width):
            for found in neighbours(best):
                if found not in self.scores and found not in self._refused:
                    if affordable(found):
                        return found
                    self._refused.add(found)
        return None

    def tell(self, stations: StationMap, score: float) -> None:
        """Note the loss on select of a map that was visited."""
        self.scores[stations] = score

    def best(self, number: int) -> list[StationMap]:
        """Return the best maps so far, best first; of equal ones the one with more stations."""
        return sorted(self.scores, key=lambda m: (self.scores[m], -len(subset_of_map(m)), m))[:number]


def redundancy_pairs(scores: dict[StationMap, float], layers: int) -> dict[int, tuple[StationMap, StationMap]]:
    """Return per hidden station the best map with it as a target and the best without, where both were visited.

    Args:
        scores: select loss per visited map, all measured in the same way.
        layers: number of blocks.
    """

    def rank(stations: StationMap) -> tuple[float, int, StationMap]:
        # Ties go to the map with the most targets: of equals, the one that is closest to the model.
        return scores[stations], -len(set(stations)), stations

    found = {}
    for station in range(1, layers):
        having = [m for m in scores if station in m]
        lacking = [m for m in scores if station not in m]
        if having and lacking:
            found[station] = min(having, key=rank), min(lacking, key=rank)
    return found
