import dataclasses

import pytest
import torch
from torch.testing import assert_close

from peelwise.references.whitened import InputWhitened, input_whitened, two_sided
from peelwise.stats.gram import Moments
from planted import moments, normal, planted_moments

D_IN, D_OUT = 12, 8
SLOPE = normal(D_OUT, D_IN, seed=77) / D_IN**0.5
EYE = torch.eye(D_OUT, dtype=torch.float64)
NOTHING = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
UNEVEN = torch.logspace(0, -1.5, D_IN, dtype=torch.float64)
LOUD = torch.logspace(1, -1, D_OUT, dtype=torch.float64)
CASES = {
    "plain": planted_moments(SLOPE, (400, 200), noise=1.0),
    "few tokens": planted_moments(SLOPE, (30, 200), noise=1.0),
    "much noise": planted_moments(SLOPE, (100, 200), noise=4.0),
    "uneven inputs": planted_moments(SLOPE, (60, 300), noise=1.0, spread=UNEVEN),
    "uneven inputs and gradients": planted_moments(LOUD[:, None] * SLOPE, (60, 300), noise=LOUD, spread=UNEVEN),
}
EACH_CASE = pytest.mark.parametrize(("fit", "select"), CASES.values(), ids=CASES)


def inverse(S, damping):
    """(S + damping tr(S)/d I)^-1, written out."""
    return torch.linalg.inv(S + damping * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype))


def calibration(D, select, metric):
    """Weight and held-out energy of the direction ``D``, from the formulas."""
    slope = -(select.C * D).sum()
    squared = torch.trace(metric @ D @ select.S @ D.T)
    return float(slope / squared), float(slope**2 / squared) * float(slope > 0)


def explained_energy(part, damping):
    reference = InputWhitened(part.S, part.S)
    return reference.energy(reference.rotate(part.C), damping)


def one_sided(fit, damping):
    return -fit.C @ inverse(fit.S, damping)


def both_sided(fit, base, damping):
    return -inverse(fit.F, damping) @ fit.C @ inverse(fit.S, base.damping)


@EACH_CASE
def test_input_whitened_is_the_formula_at_the_damping_it_reports(fit, select):
    found = input_whitened(fit, select)
    D = one_sided(fit, found.damping)
    weight, energy = calibration(D, select, EYE)

    assert found.weight == pytest.approx(min(weight, 1.0), rel=1e-4)
    assert found.energy == pytest.approx(energy, rel=1e-4)
    assert found.change.dtype == torch.float32
    assert_close(found.change.double(), found.weight * D, rtol=1e-5, atol=1e-6)
    expected = torch.trace(found.change.double() @ fit.S @ found.change.double().T)
    assert found.output_change == pytest.approx(float(expected), rel=1e-4)


@EACH_CASE
def test_two_sided_is_the_formula_at_the_damping_it_reports(fit, select):
    base = input_whitened(fit, select)
    found = two_sided(fit, select, base, name="q")
    D = both_sided(fit, base, found.damping)
    weight, energy = calibration(D, select, select.F)

    assert found.weight == pytest.approx(weight, rel=1e-4)
    assert found.energy == pytest.approx(energy, rel=1e-4)
    assert_close(found.change.double(), weight * D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["few tokens", "uneven inputs and gradients"])
def test_the_damping_is_an_interior_maximum_of_the_held_out_energy(case):
    fit, select = CASES[case]
    chosen = input_whitened(fit, select)

    def energy(damping):
        return calibration(one_sided(fit, damping), select, EYE)[1]

    fine = [energy(10 ** (tenths / 10)) for tenths in range(-60, 41)]
    assert 1e-5 < chosen.damping < 1e3
    assert chosen.energy >= max(energy(chosen.damping * 10**0.5), energy(chosen.damping / 10**0.5))
    assert chosen.energy > 0.98 * max(fine)
    assert min(fine) < 0.98 * max(fine)  # the control: on this grid the choice matters


def test_the_search_leaves_a_start_where_the_direction_goes_uphill():
    # The strong input carries signal; the weak one noise that points the other way on select.
    S = torch.diag(torch.tensor([2.0, 1e-3])).double()
    fit, select = (Moments(100, S, torch.tensor([row]).double(), None) for row in ([1.0, 1.0], [1.0, -0.3]))
    slope = -(select.C * one_sided(fit, 0.1)).sum()
    found = input_whitened(fit, select)

    assert slope < 0
    assert found.damping > 1
    assert found.weight > 0
    assert found.energy > 0


def taken(slope, seed, noise=0.5):
    """The proposal, and the part of the in-sample least squares step that it keeps (as mean squared output change)."""
    fit, select = planted_moments(slope, (2000, 1000), noise=noise, spread=UNEVEN, seed=seed)
    found = input_whitened(fit, select)
    return found, found.output_change / explained_energy(fit, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_signal_is_taken_whole_and_noise_left_alone(seed):
    """A gradient that generalises is followed all the way; one that is noise is not followed, though it looks alike."""
    signal, of_signal = taken(SLOPE, seed)
    noise, of_noise = taken(NOTHING, seed)

    assert signal.weight == pytest.approx(1.0, abs=0.1)
    assert of_signal > 0.8
    assert of_noise < 0.05
    assert signal.energy > 50 * noise.energy


def test_noise_is_left_alone_on_average():
    found = [taken(NOTHING, seed) for seed in range(40)]

    assert sum(part for _, part in found) / 40 < 0.02
    assert sum(proposal.weight == 0 for proposal, _ in found) >= 10


@pytest.mark.parametrize("factor", [4.0, 1.0, -1.0])
def test_the_weight_stays_between_nothing_and_all(factor):
    """Select gradients four times as steep ask for a weight of four, turned ones for a step backwards."""
    fit, _ = CASES["plain"]
    found = input_whitened(fit, dataclasses.replace(fit, C=factor * fit.C))
    D = one_sided(fit, found.damping)

    if factor > 0:
        assert found.weight == pytest.approx(1.0, abs=0.01)
        assert_close(found.change.double(), found.weight * D, rtol=1e-4, atol=1e-5)
    else:
        assert (found.weight, found.energy, found.output_change) == (0, 0, 0)
        assert not found.change.any()


def test_two_sided_change_is_zero_for_a_turned_gradient():
    fit, select = CASES["plain"]
    base = input_whitened(fit, select)
    found = two_sided(fit, dataclasses.replace(fit, C=-fit.C), base, name="q")

    assert found.weight == 0
    assert not found.change.any()


def test_two_sided_says_what_it_lacks():
    fit, select = CASES["plain"]
    base = input_whitened(fit, select)
    with pytest.raises(ValueError, match="needs moments with F"):
        two_sided(dataclasses.replace(fit, F=None), select, base, name="q")


@pytest.mark.parametrize(("inputs", "gradients"), [(1e6, 1.0), (1e-6, 1.0), (1.0, 1e6), (1.0, 1e-6), (1e-4, 1e3)])
def test_scaling_inputs_or_gradients_scales_the_change_and_nothing_else(inputs, gradients):
    def scaled(part):
        return dataclasses.replace(part, S=inputs**2 * part.S, C=inputs * gradients * part.C, F=gradients**2 * part.F)

    fit, select = CASES["few tokens"]
    plain = input_whitened(fit, select)
    found = input_whitened(scaled(fit), scaled(select))
    assert (found.damping, found.weight) == pytest.approx((plain.damping, plain.weight), rel=1e-3)
    assert found.energy == pytest.approx(gradients**2 * plain.energy, rel=1e-3)
    assert_close(found.change, gradients / inputs * plain.change, rtol=1e-4, atol=1e-6 * gradients / inputs)

    plain_both = two_sided(fit, select, plain, name="q")
    found_both = two_sided(scaled(fit), scaled(select), found, name="q")
    assert (found_both.damping, found_both.weight) == pytest.approx((plain_both.damping, plain_both.weight), rel=1e-3)
    # Dividing by F takes the scale of the gradients out twice: once more than they brought in.
    assert_close(found_both.change, plain_both.change / gradients / inputs, rtol=1e-4, atol=1e-6 / gradients / inputs)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_explained_energy_is_the_trace_formula(damping):
    fit, _ = CASES["uneven inputs"]
    expected = torch.trace(fit.C @ inverse(fit.S, damping) @ fit.C.T)

    assert explained_energy(fit, damping) == pytest.approx(float(expected), rel=1e-4)


def test_explained_energy_is_the_decrease_that_regression_predicts():
    """Undamped it is the mean square of what the inputs explain of the gradients, by ordinary least squares."""
    x, noise = normal(300, D_IN), normal(300, D_OUT, seed=1)
    g = x @ SLOPE.T + noise
    fitted = x @ torch.linalg.lstsq(x, g).solution
    assert explained_energy(moments(x, g), 0.0) == pytest.approx(float(fitted.square().sum() / 300))


def cross_energy(fit, select, damping=0.1):
    reference = InputWhitened(fit.S, select.S)
    return reference.cross_energy(reference.rotate(fit.C), reference.rotate(select.C), damping)


@EACH_CASE
def test_cross_energy_is_the_formula(fit, select):
    expected = torch.trace(fit.C @ inverse(fit.S, 0.1) @ select.C.T)
    assert cross_energy(fit, select) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_noise_adds_to_the_energy_and_not_to_the_cross_energy():
    """Where there is no gradient at all the energy is noise, and the two parts do not agree on it."""
    draws = [planted_moments(NOTHING, (40, 40), noise=1.0, seed=seed) for seed in range(200)]
    energies = torch.tensor([explained_energy(fit, 0.1) for fit, _ in draws])
    crossed = torch.tensor([cross_energy(fit, select) for fit, select in draws])
    assert energies.min() > 0.5
    assert crossed.mean().abs() < 3 * crossed.std() / len(draws) ** 0.5 < 0.1 * energies.mean()
