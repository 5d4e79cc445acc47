import math

import pytest
import torch
from torch.testing import assert_close

from peelwise.errors import IllConditionedWarning, ModelError
from peelwise.stats.linalg import DampedFactor, Spectrum, eigh, eigvalsh
from planted import normal

D = 12


def of_rank(rank, columns=range(D)):
    x = normal(rank, D)[:, list(columns)]
    return x.T @ x


def explicit(S, damping):
    """The damped matrix, written out."""
    return S + damping * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.1, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_solves_equal_the_dense_solve_at_any_scale(damping, scale):
    S, right = scale * of_rank(3 * D), normal(D, 5, seed=1)
    factor = DampedFactor(S, damping)  # a warning would be an error here

    expected = torch.linalg.solve(explicit(S, damping), right)
    assert factor.damping == damping
    assert_close(factor.solve(right) * scale, expected * scale, rtol=1e-10, atol=1e-10)
    assert_close(factor.solve_right(right.T) * scale, expected.T * scale, rtol=1e-10, atol=1e-10)


def test_right_sides_may_come_in_lower_precision():
    S, right = of_rank(3 * D), normal(D, 2, dtype=torch.bfloat16)
    factor = DampedFactor(S.float(), 0.1)

    assert factor.solve(right).dtype == torch.float64
    assert_close(factor.solve(right), torch.linalg.solve(explicit(S.float().double(), 0.1), right.double()))


SINGULAR = {
    "rank deficient": of_rank(4),
    "one input twice": of_rank(3 * D, columns=[*range(D - 1), 0]),
    "zero": torch.zeros(D, D, dtype=torch.float64),
    "tiny": 1e-30 * of_rank(4),
    "huge": 1e30 * of_rank(4),
    "slightly indefinite": of_rank(4) - 1e-9 * torch.eye(D, dtype=torch.float64),
    "rounded to float32": of_rank(4).float(),
}
BROKEN = {
    "negative definite": -of_rank(3 * D),
    "overflowed": torch.full((D, D), torch.inf),
    "not a number": torch.full((D, D), torch.nan),
}


@pytest.mark.parametrize("S", SINGULAR.values(), ids=SINGULAR)
def test_a_singular_matrix_is_damped_more_and_named(S):
    with pytest.warns(IllConditionedWarning, match=r"^mlp\.down_proj: \[12, 12\]") as caught:
        factor = DampedFactor(S, 0.0, name="mlp.down_proj")

    solved = factor.solve(torch.eye(D))
    unit = float(S.diagonal().mean()) or 1.0
    assert len(caught) == 1
    assert 0 < factor.damping < 1e-4
    # What it solved is the matrix with the damping that it reports.
    assert_close((S.double() + factor.damping * unit * torch.eye(D)) @ solved, torch.eye(D).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_a_singular_matrix_is_noticed_even_where_rounding_lets_it_be_factored(rank):
    factored = 0
    for seed in range(50):
        x = normal(rank, D, seed=seed)
        factored += int(torch.linalg.cholesky_ex(x.T @ x)[1]) == 0
        with pytest.warns(IllConditionedWarning):
            DampedFactor(x.T @ x, 0.0)
    assert rank < 11 or factored > 0  # the control: Cholesky alone does let some pass


@pytest.mark.parametrize("S", SINGULAR.values(), ids=SINGULAR)
def test_usual_damping_needs_no_warning(S):
    factor = DampedFactor(S, 0.1)  # a warning would be an error here

    assert factor.damping == 0.1
    assert factor.solve(torch.eye(D)).isfinite().all()


@pytest.mark.parametrize("S", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("damping", [0.0, 0.1, 1.0])
def test_even_no_covariance_at_all_gives_a_finite_result_and_a_warning(S, damping):
    with pytest.warns(IllConditionedWarning, match="head"):
        factor = DampedFactor(S, damping, name="head")

    assert factor.solve(torch.ones(D, 1)).isfinite().all()


RANKS = {
    "full": (of_rank(3 * D), D),
    "four": (of_rank(4), 4),
    "four, tiny": (1e-30 * of_rank(4), 4),
    "one input twice": (of_rank(3 * D, columns=[*range(D - 1), 0]), D - 1),
    "below float32": (torch.diag(torch.tensor([1.0, 1e-3, 1e-9])), 2),
    "zero": (torch.zeros(3, 3), 0),
    "negative": (-torch.eye(3), 0),
}


@pytest.mark.parametrize(("matrix", "rank"), RANKS.values(), ids=RANKS)
def test_numerical_rank(matrix, rank):
    assert Spectrum(matrix).rank() == rank


@pytest.mark.parametrize("rank", [9, 4, 0])
def test_eigenvalues_where_the_fast_solver_does_not_converge(rank, monkeypatch):
    A = torch.randn(9, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = A @ A.T
    expected, _ = eigh(S)

    def fail(*_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    values, vectors = eigh(S)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(eigvalsh(S), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, S, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("solve", [eigh, eigvalsh])
def test_sums_that_overflowed_are_said(number, solve):
    with pytest.raises(ModelError, match="NaN or Inf"):
        solve(torch.full((3, 3), number, dtype=torch.float64))
