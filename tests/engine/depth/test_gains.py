"""The search for a factor, on functions whose minimum is known."""

from __future__ import annotations

import pytest

from peelwise.engine.depth.gains import search


@pytest.mark.parametrize("best", [-0.9, 0.0, 0.6, 1.4, 2.3])
@pytest.mark.parametrize("told", [False, True])
def test_the_minimum_of_a_parabola_is_found(best: float, told: bool) -> None:
    def loss(factor: float) -> float:
        return 2.0 + 3.0 * (factor - best) ** 2

    slope = 6.0 * (1 - best) if told else None
    factor, value = search(loss, loss(1.0), slope)
    assert factor == pytest.approx(best, abs=2e-3)
    assert value == pytest.approx(2.0, abs=1e-4)


def test_where_one_is_best_nothing_is_found() -> None:
    factor, value = search(lambda factor: 2.0 + (factor - 1) ** 2, 2.0, None)
    assert factor == pytest.approx(1.0, abs=2e-3)
    assert value <= 2.0


def test_a_wrong_slope_costs_a_few_evaluations_and_nothing_else() -> None:
    tried: list[float] = []

    def loss(factor: float) -> float:
        tried.append(factor)
        return 2.0 + (factor - 1.4) ** 2

    assert search(loss, loss(1.0), slope=1.0) == (1.0, pytest.approx(2.16))
    assert len(tried) <= 4
