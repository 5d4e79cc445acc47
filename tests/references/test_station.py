"""The closed form against plain least squares in float64."""

from __future__ import annotations

import pytest
import torch

from peelwise.references.station import START_DAMPING, StationSums, best_change, decrease, ridge_change


def planted(n: int = 200, d: int = 7, m: int = 4, seed: int = 0, noise: float = 0.3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.diag(torch.linspace(0.2, 3, d).double())
    truth = torch.randn(m, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x, x @ truth.T + noise * torch.randn(n, m, generator=g, dtype=torch.float64)


def sums_of(x, r):
    return StationSums(x.T @ x / len(x), r.T @ x / len(x))


def test_undamped_is_least_squares():
    x, r = planted()
    expected = torch.linalg.lstsq(x, r).solution.T
    torch.testing.assert_close(ridge_change(sums_of(x, r), 0.0), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0])
def test_damped_is_least_squares_with_rows_of_zeros_added(damping):
    x, r = planted()
    d, m = x.shape[1], r.shape[1]
    unit = float((x.T @ x / len(x)).diagonal().mean())
    extra = (damping * unit * len(x)) ** 0.5 * torch.eye(d, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, extra]), torch.cat([r, r.new_zeros(d, m)])).solution.T
    torch.testing.assert_close(ridge_change(sums_of(x, r), damping), expected, rtol=1e-9, atol=1e-10)


def test_decrease_is_what_the_rows_say():
    x, r = planted()
    D, w = torch.randn(4, 7, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    before, after = ((e.square() @ w).mean() for e in (r, r - x @ D.T))
    assert decrease(D, sums_of(x, r), w) == pytest.approx(float(before - after), rel=1e-10)


def test_weights_do_not_change_the_solution_at_a_given_damping():
    """Each coordinate is a regression of its own; a weighted lstsq per row says the same."""
    x, r = planted()
    w = torch.tensor([5.0, 0.1, 1.0, 20.0], dtype=torch.float64)
    rows = [torch.linalg.lstsq(x * w[j].sqrt(), r[:, j : j + 1] * w[j].sqrt()).solution.T for j in range(4)]
    torch.testing.assert_close(ridge_change(sums_of(x, r), 0.0), torch.cat(rows), rtol=1e-9, atol=1e-10)


def test_select_chooses_the_damping():
    ones = torch.ones(4, dtype=torch.float64)
    select = sums_of(*planted(400, seed=1))
    noisy = best_change(sums_of(*planted(9, noise=3.0)), select, ones)
    clean = best_change(sums_of(*planted(4000)), select, ones)
    assert noisy.damping > START_DAMPING > clean.damping
    assert clean.decrease > noisy.decrease
    for factor in (10.0, 0.1):
        other = ridge_change(sums_of(*planted(9, noise=3.0)), noisy.damping * factor)
        assert decrease(other, select, ones) <= noisy.decrease
