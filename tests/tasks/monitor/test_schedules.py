"""When to look."""

import random

import pytest

from peelwise.errors import OptionError
from peelwise.tasks.monitor.schedules import affordable, every, log_spaced


def test_every():
    assert [s for s in range(30) if every(7)(s)] == [0, 7, 14, 21, 28]
    assert all(every(1)(s) for s in range(5))
    with pytest.raises(OptionError, match="at least 1, got 0"):
        every(0)


@pytest.mark.parametrize("per_decade", [1, 3, 10, 40])
def test_log_spaced(per_decade):
    due = [s for s in range(20_000) if log_spaced(per_decade)(s)]
    expected = sorted({0} | {round(10 ** (k / per_decade)) for k in range(10 * per_decade)})
    assert due == [s for s in expected if s < 20_000]
    with pytest.raises(OptionError, match="at least 1, got -1"):
        log_spaced(-1)


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.2, 0.7])
@pytest.mark.parametrize("cost", [1.0, 12.0])
def test_the_share_settles_at_the_budget(budget, cost):
    """Costs vary by a factor of two around what is expected; steps take half a second."""
    draw, elapsed, spent, shares = random.Random(0), 0.0, 0.0, []
    while elapsed < 60 * cost / budget:
        elapsed += 0.5
        if affordable(spent, cost, elapsed, budget):
            took = cost * draw.uniform(0.67, 1.33)
            spent, elapsed = spent + took, elapsed + took
        shares.append(spent / elapsed)
    late = shares[len(shares) // 2 :]
    assert max(late) <= 1.2 * budget
    assert min(late) >= 0.8 * budget


def test_nothing_is_begun_on_credit():
    assert not affordable(0.0, 1.0, 10.0, 0.03)
    assert not affordable(0.0, 1.0, 0.0, 0.03)
    assert affordable(0.0, 1.0, 16.0, 0.03)
