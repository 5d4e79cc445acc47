from __future__ import annotations

import pytest
import torch

from peelwise.errors import TooFewSamplesError
from peelwise.references.least_squares import Ridge, choose, shaped, squared_error
from peelwise.stats.gram import RegressionSum, RegressionSums


def _sums(x: torch.Tensor, y: torch.Tensor, pieces: int = 1) -> RegressionSums:
    total = RegressionSum()
    for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        part = RegressionSum()
        part.update(a, b)
        total.merge(part)
    return total.sums()


def _data(n: int = 200, d: int = 7, m: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(n, d, dtype=torch.float64) + 2.0
    return x, x @ torch.randn(d, m, dtype=torch.float64) + torch.randn(n, m, dtype=torch.float64) - 1.0


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank_deficient", [True, False])
def test_undamped_solution_is_the_projection(bias: bool, rank_deficient: bool) -> None:
    x, y = _data()
    if rank_deficient:
        x = torch.cat([x, x[:, :2] @ torch.ones(2, 1, dtype=x.dtype), torch.zeros(len(x), 1)], dim=1)
    sums = _sums(x, y, pieces=7)
    weight = Ridge(sums, bias=bias).solve(sums, 0.0)
    design = _with_ones(x) if bias else x
    expected = design @ torch.linalg.pinv(design) @ y
    torch.testing.assert_close(design @ weight.T, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        squared_error(sums, weight), float((expected - y).square().sum(1).mean()), rtol=1e-9, atol=1e-9
    )


def test_damping_shrinks_the_weights_and_not_the_intercept() -> None:
    x, y = _data()
    sums = _sums(x, y)
    weight = Ridge(sums, bias=True).solve(sums, 1e9)
    torch.testing.assert_close(weight[:, -1], y.mean(0), rtol=1e-6, atol=1e-6)
    assert weight[:, :-1].abs().max() < 1e-6


def test_damping_is_chosen_on_the_other_samples() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 30, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    other = _sums(torch.randn(400, 30, dtype=torch.float64), torch.randn(400, 2, dtype=torch.float64))
    sums = _sums(x, y)
    ridge = Ridge(sums, bias=True)
    assert choose(ridge, sums, other, (1e-6, 10.0))[2] == 10.0  # pure noise: as much as there is
    assert choose(ridge, sums, sums, (1e-6, 10.0))[2] == 1e-6  # control: in-sample, none


def test_too_few_samples_without_damping_is_an_error() -> None:
    x, y = _data(n=3)
    sums = _sums(x, y)
    with pytest.raises(TooFewSamplesError, match=r"n >= 8 .*got n = 3.*damping > 0"):
        Ridge(sums, bias=True).solve(sums, 0.0)
    assert torch.isfinite(Ridge(sums, bias=True).solve(sums, 1e-3)).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_shaped_layers_have_the_width_and_keep_the_best_readout(width: int) -> None:
    x, y = _data()
    sums = _sums(x, y)
    weight = Ridge(sums, bias=True).solve(sums, 0.0)
    layer = shaped(weight, sums, width)
    assert layer.shape[0] == min(width, 6)  # 3 outputs and their negatives
    fitted, units = _with_ones(x) @ weight.T, _with_ones(x) @ layer.T
    rest = fitted - units @ torch.linalg.pinv(units) @ fitted
    values = torch.linalg.svdvals(fitted)
    # Eckart and Young: no layer of this width leaves less of the fitted values.
    torch.testing.assert_close(rest.norm(), values[width:].norm(), rtol=1e-7, atol=1e-7)
