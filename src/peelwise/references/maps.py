"""Station maps: which target each layer of a stack of references regresses to. A plan, no execution.

A map is a tuple ``(sigma_1, .., sigma_L)`` of stations, counted from 1; station ``L`` is the targets ``Y``.
It never decreases and never points backwards: ``l <= sigma_l``, ``sigma_L = L``. A subset ``S`` of the hidden
stations ``1..L-1`` is the map that sends each layer to the next station of ``S + {L}`` (arXiv:2410.10984):

    S = {}       (4, 4, 4, 4)   everything to the targets: YES-0
    S = {3}      (3, 3, 3, 4)
    S = {1,2,3}  (1, 2, 3, 4)   the direct map

These ``2^(L-1)`` maps are exactly the ones with ``sigma(sigma(l)) = sigma(l)``. Other non-decreasing maps,
such as ``(2, 3, 3)``, leave a station before it is reached; they are legal and may be asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from peelwise.errors import MapError

StationMap = tuple[int, ...]  # as in the records, which this mathematics does not know


def map_of_subset(subset: Iterable[int], layers: int) -> StationMap:
    """Return the map of a subset of the hidden stations ``1..layers-1``.

    Raises:
        MapError: If a station is not hidden.
    """
    stations = sorted({*subset, layers})
    if stations[0] < 1 or stations[-1] > layers:
        raise MapError(
            f"maps: hidden stations of {layers} layers are 1..{layers - 1}, got {stations}. Leave the others out."
        )
    return tuple(next(s for s in stations if s >= layer) for layer in range(1, layers + 1))


def subset_of_map(stations: StationMap) -> tuple[int, ...]:
    """Return the hidden stations that a map regresses to, in order; their number is the ``k`` of YES-k."""
    return tuple(sorted({s for s in stations if s < len(stations)}))


def all_maps(layers: int) -> Iterator[StationMap]:
    """Yield the ``2^(layers-1)`` maps of subsets, smallest subsets first."""
    for size in range(layers):
        for subset in combinations(range(1, layers), size):
            yield map_of_subset(subset, layers)


def checked_map(stations: Sequence[int], layers: int) -> StationMap:
    """Return ``stations`` as a map of ``layers`` layers.

    Raises:
        MapError: If the length is wrong, a station is no integer, the map decreases, points backwards, or
            does not end at the targets.
    """
    found = tuple(stations)
    if len(found) != layers or not all(isinstance(s, int) and not isinstance(s, bool) for s in found):
        raise MapError(f"maps: expected {layers} integers, one station per layer, got {list(found)}.")
    remedy = f"The direct map is {list(range(1, layers + 1))}, YES-0 is {[layers] * layers}."
    for layer, station in enumerate(found, start=1):
        if not layer <= station <= layers:
            where = "backwards" if station < layer else "beyond the targets"
            raise MapError(f"maps: {list(found)} points {where} at layer {layer} (station {station}). {remedy}")
    if any(a > b for a, b in pairwise(found)):
        raise MapError(f"maps: {list(found)} decreases; stations must be visited in order. {remedy}")
    return found


class MapPlan:
    """The prefix tree of the maps to visit: which targets may follow a prefix.

    Args:
        layers: number of affine layers ``L``.
        maps: the maps to visit, or ``None`` for all ``2^(L-1)`` subsets. YES-0 is always among them.

    Attributes:
        total: number of complete maps in the tree.
    """

    def __init__(self, layers: int, maps: Sequence[Sequence[int]] | None = None) -> None:
        self.layers = layers
        self._following: dict[StationMap, tuple[int, ...]] | None = None
        self.total = 2 ** (layers - 1)
        if maps is not None:
            chosen = {(layers,) * layers, *(checked_map(m, layers) for m in maps)}
            self.total = len(chosen)
            edges = sorted({(m[:i], m[i]) for m in chosen for i in range(layers)})
            self._following = {}
            for prefix, station in edges:
                self._following[prefix] = (*self._following.get(prefix, ()), station)

    def targets(self, prefix: StationMap) -> tuple[int, ...]:
        """Return the stations that the layer after ``prefix`` may regress to, in increasing order."""
        if self._following is not None:
            return self._following.get(prefix, ())
        layer = len(prefix) + 1
        if layer > self.layers:
            return ()
        pending = prefix[-1] if prefix else 0
        # A station that was aimed at is reached before another may be chosen.
        return (pending,) if pending >= layer else tuple(range(layer, self.layers + 1))


def best_by_size(values: Mapping[StationMap, float], layers: int) -> list[tuple[float, StationMap]]:
    """Return for ``k = 0..layers-1`` the smallest value over maps with at most ``k`` hidden stations.

    Raises:
        MapError: If no map without hidden stations (YES-0) is among them.
    """
    best: list[tuple[float, StationMap]] = []
    for size in range(layers):
        here = [(v, m) for m, v in values.items() if len(subset_of_map(m)) == size]
        candidates = sorted([*here, *best[-1:]])
        if not candidates:
            raise MapError(f"maps: YES-0, {[layers] * layers}, is missing, and every bound includes it. Add it.")
        best.append(candidates[0])
    return best


def beam(scores: Mapping[StationMap, float], width: int, layers: int) -> list[StationMap]:
    """Return the prefixes to go on with: the ``width`` best, and the best one of every kind.

    The kind of a prefix is the number of hidden stations that it has reached, and whether it aims at the
    targets. So every YES-k stays reachable, and YES-0 and the direct map are never dropped: each is the only
    one of its kind.

    Args:
        scores: prefix -> value, smaller is better; all of the same length.
        width: how many to keep regardless of kind.
        layers: ``L``, the number of the station of the targets.
    """
    ranked = sorted(scores, key=lambda prefix: (scores[prefix], prefix))
    kept = set(ranked[:width])
    seen: set[tuple[int, bool]] = set()
    for prefix in ranked:
        reached = len({s for s in prefix if s <= len(prefix) and s < layers})
        kind = (reached, prefix[-1:] == (layers,))
        if kind not in seen:
            seen.add(kind)
            kept.add(prefix)
    return sorted(kept)
