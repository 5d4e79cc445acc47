from __future__ import annotations

from itertools import pairwise, product

import pytest

from peelwise.errors import MapError
from peelwise.references.maps import (
    MapPlan,
    all_maps,
    beam,
    best_by_size,
    checked_map,
    map_of_subset,
    subset_of_map,
)


def _walk(plan: MapPlan) -> list[tuple[int, ...]]:
    level: list[tuple[int, ...]] = [()]
    for _ in range(plan.layers):
        level = [(*prefix, t) for prefix in level for t in plan.targets(prefix)]
    return level


@pytest.mark.parametrize("layers", [2, 3, 4, 5, 7])
def test_the_maps_are_the_idempotent_non_decreasing_ones(layers: int) -> None:
    brute = {
        m
        for m in product(range(1, layers + 1), repeat=layers)
        if all(a <= b for a, b in pairwise(m))
        and all(s >= i for i, s in enumerate(m, 1))
        and all(m[s - 1] == s for s in m)
    }
    assert set(all_maps(layers)) == brute
    assert len(brute) == 2 ** (layers - 1)
    walked = _walk(MapPlan(layers))
    assert sorted(walked) == sorted(brute)
    assert len(walked) == len(brute)


def test_subsets_and_maps_are_the_same_thing() -> None:
    assert map_of_subset([], 4) == (4, 4, 4, 4)
    assert map_of_subset([3], 4) == (3, 3, 3, 4)
    assert map_of_subset([1, 2, 3], 4) == (1, 2, 3, 4)
    assert all(map_of_subset(subset_of_map(m), 6) == m for m in all_maps(6))


@pytest.mark.parametrize(
    ("stations", "words"),
    [
        ([1, 1, 3], "backwards at layer 2"),
        ([3, 2, 3], "decreases"),
        ([1, 2], "expected 3 integers"),
        ([1, 2, 4], "beyond the targets"),
        ([1.0, 2, 3], "expected 3 integers"),
    ],
)
def test_a_bad_map_is_named(stations: list[int], words: str) -> None:
    with pytest.raises(MapError, match=f"maps: .*{words}"):
        checked_map(stations, 3)


def test_a_subset_of_a_station_that_does_not_exist_is_named() -> None:
    with pytest.raises(MapError, match=r"hidden stations of 3 layers are 1\.\.2"):
        map_of_subset([0], 3)


def test_chosen_maps_are_walked_with_yes_0_added() -> None:
    plan = MapPlan(4, [[3, 3, 3, 4], [2, 3, 3, 4]])
    assert _walk(plan) == [(2, 3, 3, 4), (3, 3, 3, 4), (4, 4, 4, 4)]
    assert plan.total == 3


def test_best_by_size_takes_smaller_sizes_in() -> None:
    values = {(3, 3, 3): 2.0, (1, 3, 3): 1.0, (2, 2, 3): 3.0, (1, 2, 3): 5.0}
    assert best_by_size(values, 3) == [(2.0, (3, 3, 3)), (1.0, (1, 3, 3)), (1.0, (1, 3, 3))]
    with pytest.raises(MapError, match="YES-0"):
        best_by_size({(1, 2, 3): 5.0}, 3)


def test_beam_keeps_the_best_and_the_best_of_every_kind() -> None:
    scores = {(4, 4): 9.0, (1, 2): 8.0, (1, 3): 1.0, (1, 4): 2.0, (2, 2): 3.0, (3, 3): 4.0}
    assert beam(scores, 2, 4) == [(1, 2), (1, 3), (1, 4), (3, 3), (4, 4)]  # (2, 2) is like (1, 3), and worse
    assert beam(scores, 3, 4) == sorted(scores)


def test_beam_leaves_every_size_reachable_whatever_the_scores() -> None:
    layers = 9
    plan, level = MapPlan(layers), [()]
    for length in range(layers):
        level = [(*prefix, t) for prefix in level for t in plan.targets(prefix)]
        if length < layers - 1:
            level = beam({p: float(hash(p) % 97) for p in level}, 1, layers)
    assert {len(set(m)) - 1 for m in level} == set(range(layers))
    assert {(layers,) * layers, tuple(range(1, layers + 1))} <= set(level)
