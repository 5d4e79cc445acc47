"""The climb over dampings against looking at all of them."""

import math

import pytest

from peelwise.references.damping import climb

GRID = [10.0**k for k in range(-5, 3)]


def climbed(value, start=1e-2):
    asked = []

    def counted(damping):
        asked.append(damping)
        return value(damping)

    return climb(counted, start, factor=10.0, lowest=1e-5, highest=1e2), asked


@pytest.mark.parametrize("peak", GRID)
def test_it_finds_the_best_of_the_grid_where_there_is_one_peak(peak):
    best, asked = climbed(lambda damping: -abs(math.log10(damping / peak)))
    assert best == pytest.approx(max(GRID, key=lambda d: -abs(math.log10(d / peak))))
    assert len(asked) == len(set(asked))


def test_it_stays_where_both_neighbours_are_worse_or_no_better():
    assert climbed(lambda damping: 0.0) == (1e-2, [1e-1, 1e-2, 1e-3])


@pytest.mark.parametrize(("sign", "end"), [(1, 1e2), (-1, 1e-5)])
def test_it_ends_at_the_ends(sign, end):
    assert climbed(lambda damping: sign * damping)[0] == pytest.approx(end)
