"""Which maps are visited, and in which order: a plan that can be tested without a model."""

from __future__ import annotations

import pytest

from peelwise.errors import MapError
from peelwise.references.map_search import (
    ALL_MAPS_UP_TO,
    MapSearch,
    direct_map,
    map_name,
    named_maps,
    neighbours,
    redundancy_pairs,
    shared_prefix,
)
from peelwise.references.maps import all_maps, checked_map, subset_of_map


def everything(search, score=lambda m: 0.0, affordable=lambda m: True, most=10_000):
    found = []
    while len(found) < most and (m := search.following(affordable)) is not None:
        search.tell(m, score(m))
        found.append(m)
    return found


@pytest.mark.parametrize("layers", range(2, ALL_MAPS_UP_TO + 1))
def test_few_blocks_get_every_map_once_the_named_ones_first(layers):
    search = MapSearch(layers)
    assert search.total == 2 ** (layers - 1)
    found = everything(search)
    assert sorted(found) == sorted(all_maps(layers))
    named = named_maps(layers)
    assert found[: len(named)] == named
    assert found[0] == direct_map(layers)


def test_the_named_families():
    assert named_maps(4) == [(1, 2, 3, 4), (4, 4, 4, 4), (1, 4, 4, 4), (2, 2, 4, 4), (3, 3, 3, 4)]
    names = [map_name(m) for m in named_maps(4)]
    assert names == ["direct", "all to last", "first and last", "2 then last", "3 then last"]
    assert map_name((1, 2, 3, 5, 5, 6)) == "without 4"
    assert map_name((1, 3, 3, 8, 8, 8, 8, 8)) == "1, 3, last"
    assert map_name((2, 3, 3)) == "other"


def test_neighbours_differ_by_one_station_and_share_long_beginnings_first():
    found = neighbours(direct_map(6))
    assert all(len(subset_of_map(m)) == 4 for m in found)
    assert len(found) == 5
    shared = [shared_prefix(m, direct_map(6)) for m in found]
    assert shared == sorted(shared, reverse=True) == [4, 3, 2, 1, 0]


def test_beyond_six_blocks_a_beam_climbs_to_the_best_map():
    """A score that falls with every station that is right: the beam finds the one map that has them all."""
    wanted = {2, 3, 7}

    def score(m):
        return float(len(wanted ^ set(subset_of_map(m))))

    search = MapSearch(9, beam_width=2)
    found = everything(search, score, most=80)
    cheap = neighbours(direct_map(9))[0]
    assert found[: len(named_maps(9)) + 1] == [direct_map(9), cheap, *named_maps(9)[1:]]
    assert len(found) == len(set(found)) < 2**8
    assert all(checked_map(m, 9) == m for m in found)
    assert set(subset_of_map(search.best(1)[0])) == wanted
    assert search.total == 2**8


def test_what_cannot_be_afforded_is_counted_and_not_asked_again():
    search = MapSearch(4)
    asked = []

    def affordable(m):
        asked.append(m)
        return m[0] == 1

    found = everything(search, affordable=affordable)
    assert all(m[0] == 1 for m in found)
    assert search.refused == 4
    assert len(asked) == len(set(asked)) == 8


def test_given_maps_are_visited_sorted_and_once():
    assert everything(MapSearch(3, [[3, 3, 3], [1, 2, 3], [3, 3, 3]])) == [(1, 2, 3), (3, 3, 3)]


@pytest.mark.parametrize("bad", [[], [[1, 2]], [[2, 1, 3]], [[1, 1, 3]], [[1, 2, 4]], [[1, 2, 2]], [[1, 2, "3"]]])
def test_bad_maps_are_named(bad):
    with pytest.raises(MapError, match="maps"):
        MapSearch(3, bad)


def test_redundancy_compares_the_best_with_and_without():
    scores = {(1, 2, 3): 1.0, (1, 3, 3): 1.2, (2, 2, 3): 0.9, (3, 3, 3): 2.0}
    assert redundancy_pairs(scores, 3) == {1: ((1, 2, 3), (2, 2, 3)), 2: ((2, 2, 3), (1, 3, 3))}
    assert redundancy_pairs({(1, 2, 3): 1.0}, 3) == {}
