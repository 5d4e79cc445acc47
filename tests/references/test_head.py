import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch.testing import assert_close

from peelwise.evidence.intervals import paired
from peelwise.references.head import _METRIC_DAMPING, _Problem, fit_head, mean_cross_entropy, token_cross_entropy
from planted import normal

D, V = 6, 5
TRUTH = 1.5 * normal(V, D, seed=5)
SPREAD = torch.tensor([10.0, 3.0, 1.0, 1.0, 0.3, 0.1])  # inputs as uneven as a transformer's
COLUMN_SCALE = TRUTH / SPREAD  # logits of order one from uneven inputs


def tokens(n, seed):
    """Inputs, and labels drawn from the softmax of ``COLUMN_SCALE``: the best head of this distribution."""
    x = normal(n, D, seed=seed, dtype=torch.float32) * SPREAD
    p = F.softmax(x.double() @ COLUMN_SCALE.T, dim=1)
    return x, torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def head(W):
    return lambda x: x @ W.T.float()


DAMAGED = head(0.3 * COLUMN_SCALE + 0.1 * normal(V, D, seed=6))
FIT, SELECT, REPORT = tokens(600, seed=1), tokens(300, seed=2), tokens(4000, seed=3)


def phi(change, fit, logits, penalty):
    """The objective of the fit, written out in float64."""
    x, y = fit[0].double(), fit[1]
    M = x.T @ x / len(x)
    M = M + _METRIC_DAMPING * M.trace() / D * torch.eye(D)
    z = logits(fit[0]).double() + x @ change.T
    return F.cross_entropy(z, y) + penalty / 2 * torch.trace(change @ M @ change.T)


def true_minimum(fit, logits, penalty):
    """The minimum of ``phi`` by a general solver in float64, and where it lies."""

    def value_and_gradient(flat):
        change = torch.tensor(flat).view(V, D).requires_grad_()
        value = phi(change, fit, logits, penalty)
        value.backward()
        return value.item(), change.grad.numpy().ravel()

    found = minimize(value_and_gradient, np.zeros(V * D), jac=True, method="BFGS", options={"gtol": 1e-9})
    return found.fun, torch.tensor(found.x).view(V, D)


def test_value_and_gradient_agree_with_finite_differences():
    problem = _Problem(FIT, DAMAGED, penalty=0.1)
    E = 0.3 * normal(V, D, seed=9, dtype=torch.float32)
    value, gradient = problem.value_and_gradient(E)

    def value_at(E):
        return phi(E.double() @ problem.root.double(), FIT, DAMAGED, 0.1)

    assert value == pytest.approx(float(value_at(E)), abs=1e-6)
    for row, column in itertools.product(range(V), range(D)):
        nudge = torch.zeros(V, D, dtype=torch.float64)
        nudge[row, column] = 1e-5
        slope = (value_at(E.double() + nudge) - value_at(E.double() - nudge)) / 2e-5
        assert float(gradient[row, column]) == pytest.approx(float(slope), abs=2e-5)


@pytest.mark.parametrize("penalty", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 3, 200])
def test_relaxed_and_achieved_bracket_the_true_minimum(penalty, steps):
    minimum, _ = true_minimum(FIT, DAMAGED, penalty)
    found = fit_head(FIT, SELECT, DAMAGED, penalty=penalty, max_steps=steps, gap=1e-6)

    assert found.steps <= steps
    assert found.relaxed - 1e-6 <= minimum <= found.achieved + 1e-6
    assert found.achieved <= found.current
    assert found.current == pytest.approx(float(phi(torch.zeros(V, D).double(), FIT, DAMAGED, penalty)), abs=1e-6)
    if steps == 200:
        assert found.achieved - found.relaxed < 2e-6
    if steps == 0:  # the control: far from the minimum the bracket is wide
        assert found.achieved - found.relaxed > 1e-2
        assert not found.change.any()


def test_the_change_handed_back_is_that_of_the_minimum():
    """Selected on the tokens it was fitted to, it is the iterate of lowest loss, and close to the lowest ``phi``."""
    minimum, change = true_minimum(FIT, DAMAGED, penalty=1e-2)
    found = fit_head(FIT, FIT, DAMAGED, penalty=1e-2, max_steps=200, gap=1e-7).change

    assert mean_cross_entropy(*FIT, DAMAGED, found) <= mean_cross_entropy(*FIT, DAMAGED, change.float()) + 1e-6
    assert minimum <= float(phi(found.double(), FIT, DAMAGED, 1e-2)) < minimum + 1e-3


def test_the_default_gap_is_reached_within_the_default_steps():
    found = fit_head(FIT, SELECT, DAMAGED)

    assert found.steps < 30
    assert 0 <= found.achieved - found.relaxed < 1e-4


def gain(logits, change):
    """What ``change`` wins on report, over 100 sequences of 40 tokens."""
    before, after = token_cross_entropy(*REPORT, logits), token_cross_entropy(*REPORT, logits, change)
    return paired((before - after).view(100, 40).sum(1).numpy(), [40] * 100).interval()


def test_at_the_minimum_nothing_is_moved():
    _, change = true_minimum(FIT, DAMAGED, penalty=1e-9)
    best = head(0.3 * COLUMN_SCALE + 0.1 * normal(V, D, seed=6) + change)
    found = fit_head(FIT, SELECT, best)

    assert found.steps == 0
    assert not found.change.any()
    assert found.current == found.achieved == pytest.approx(found.relaxed, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_recovered_from_the_best_head_and_much_from_a_damaged_one(seed):
    """Theorem and control: no witness where there is nothing to win, one where there is, from the same tokens."""
    parts = tokens(600, seed=10 + 2 * seed), tokens(300, seed=11 + 2 * seed)
    healthy = gain(head(COLUMN_SCALE), fit_head(*parts, head(COLUMN_SCALE)).change)
    damaged = gain(DAMAGED, fit_head(*parts, DAMAGED).change)

    assert healthy.low <= 0
    assert abs(healthy.mean) < 0.01
    assert damaged.low > 0.1


def test_select_ends_an_overfit():
    few = tokens(12, seed=21)
    found = fit_head(few, SELECT, head(COLUMN_SCALE), penalty=1e-4, max_steps=100, gap=1e-6)
    longest = fit_head(few, few, head(COLUMN_SCALE), penalty=1e-4, max_steps=100, gap=1e-6)

    best = mean_cross_entropy(*SELECT, head(COLUMN_SCALE))
    assert mean_cross_entropy(*SELECT, head(COLUMN_SCALE), found.change) <= best
    assert mean_cross_entropy(*SELECT, head(COLUMN_SCALE), longest.change) > best + 0.1  # the control: no early stop


def test_keep_going_ends_the_fit_early_and_leaves_it_valid():
    budget = iter([True, True, False])
    found = fit_head(FIT, SELECT, DAMAGED, gap=1e-9, keep_going=lambda: next(budget))
    minimum, _ = true_minimum(FIT, DAMAGED, 1e-2)

    assert found.steps == 2
    assert found.relaxed <= minimum <= found.achieved < found.current
    assert gain(DAMAGED, found.change).low > 0


def test_token_losses_do_not_depend_on_chunks_and_take_half_precision():
    x, y = REPORT  # more rows than one chunk
    change = 0.1 * normal(V, D, seed=4, dtype=torch.float32)
    expected = F.cross_entropy(x.double() @ (COLUMN_SCALE + change).T, y, reduction="none")

    assert_close(token_cross_entropy(x, y, head(COLUMN_SCALE), change), expected, rtol=1e-5, atol=1e-5)
    assert mean_cross_entropy(x, y, head(COLUMN_SCALE), change) == pytest.approx(float(expected.mean()), abs=1e-6)
    rounded = x.bfloat16()
    assert_close(
        token_cross_entropy(rounded, y, head(COLUMN_SCALE)),
        token_cross_entropy(rounded.float(), y, head(COLUMN_SCALE)),
    )


def test_inputs_that_never_fire_are_no_trouble():
    x = FIT[0].clone()
    x[:, 2] = 0
    found = fit_head((x, FIT[1]), SELECT, DAMAGED)

    assert found.change.isfinite().all()
    assert fit_head((torch.zeros_like(x), FIT[1]), SELECT, DAMAGED).change.isfinite().all()
