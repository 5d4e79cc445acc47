"""Predicted damages and the integer programme, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from peelwise.errors import FormatError
from peelwise.references.allocation import bits_of, cheapest, predicted_damage
from planted import normal


def test_predicted_damage_is_half_of_the_weighed_output_error():
    D, x, g = normal(5, 7, seed=1), normal(900, 7, seed=2), normal(900, 5, seed=3)
    S, F = x.T @ x / len(x), g.T @ g / len(g)
    slow = sum(float(F[i, k] * (D[i] @ S @ D[k])) for i in range(5) for k in range(5)) / 2
    assert predicted_damage(D, S, F) == pytest.approx(slow)
    assert predicted_damage(D, S, None) == pytest.approx(float((x @ D.T).square().sum() / len(x)) / 2)


@pytest.mark.parametrize("seed", range(6))
def test_the_programme_finds_what_enumeration_finds(seed):
    random = np.random.default_rng(seed)
    damage = np.sort(random.exponential(size=(6, 3)), axis=1)[:, ::-1].copy()  # more bits, less damage
    bits = np.array([2.0, 3.0, 4.0]) * random.integers(1, 9, size=(6, 1))
    budget = 0.5 * (bits.min(1).sum() + bits.max(1).sum())
    found = cheapest(damage, bits, budget)
    assert bits_of(found, bits) <= budget * (1 + 1e-9)
    feasible = [plan for plan in itertools.product(range(3), repeat=6) if bits_of(plan, bits) <= budget]
    best = min(sum(damage[g, f] for g, f in enumerate(plan)) for plan in feasible)
    assert sum(damage[g, f] for g, f in enumerate(found)) == pytest.approx(best)


def test_the_solver_prints_nothing(capfd):
    """For one of these draws it would: its own words on standard output."""
    for seed in range(280, 290):
        random = np.random.default_rng(seed)
        groups, formats = random.integers(4, 120), random.integers(2, 5)
        damage = random.exponential(size=(groups, formats)) * 10.0 ** -random.integers(1, 4)
        damage = np.sort(damage, axis=1)[:, ::-1].copy()
        bits = np.array([2.25, 3.25, 4.25, 8.25])[:formats] * random.integers(1, 9, size=(groups, 1)) * 36864.0
        cheapest(damage, bits, 0.5 * (bits.min(1).sum() + bits.max(1).sum()))
    print("and what is printed afterwards arrives")
    assert capfd.readouterr().out == "and what is printed afterwards arrives\n"


def test_a_budget_below_the_smallest_formats_is_refused():
    with pytest.raises(FormatError, match="smallest of the formats take 20 bits"):
        cheapest(np.ones((2, 2)), np.array([[10.0, 20.0]] * 2), 19.0)
    assert cheapest(np.array([[1.0, 0.0]] * 2), np.array([[10.0, 20.0]] * 2), 20.0) == [0, 0]


def test_tensors_of_any_float_dtype_do():
    D = normal(5, 7, seed=1)
    assert predicted_damage(D.bfloat16(), torch.eye(7), torch.eye(5)) == pytest.approx(
        float(D.square().sum()) / 2, rel=0.01
    )
