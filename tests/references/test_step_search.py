import math

import pytest

from peelwise.references.step_search import search_step

NOT_A_LOSS = [math.nan, math.inf, -math.inf]


class Counted:
    """A loss that notes where it was evaluated."""

    def __init__(self, loss):
        self.loss, self.steps = loss, []

    def __call__(self, step):
        self.steps.append(step)
        return self.loss(step)


def search(loss, start, slope, **options):
    counted = Counted(loss)
    choice = search_step(counted, loss(0.0), start, slope=slope, **options)
    assert choice.evaluations == len(counted.steps) == len(set(counted.steps))
    assert all(math.isfinite(step) and step > 0 for step in counted.steps)
    assert choice.step == 0 or choice.step in counted.steps
    assert choice.loss == min([loss(0.0), *(value for value in map(loss, counted.steps) if math.isfinite(value))])
    return choice, counted.steps


@pytest.mark.parametrize("scale", [10.0**exponent for exponent in range(-4, 5)])
@pytest.mark.parametrize("start", [1 / 100, 1 / 10, 0.5, 1.7, 10, 100])
def test_a_quadratic_is_solved_at_any_scale(scale, start):
    """The minimum lies at ``scale``; the first step is up to a hundred times too short or too long."""
    choice, steps = search(lambda step: 3 + (step / scale - 1) ** 2, start * scale, 2 / scale)

    assert choice.step == pytest.approx(scale, rel=1e-6)
    assert choice.loss == pytest.approx(3.0)
    assert len(steps) <= 4  # the slope is known: one evaluation finds the parabola, a far start takes one or two more


@pytest.mark.parametrize("start", [0.85, 1.0, 1.2])
def test_a_start_that_is_good_enough_is_taken_after_one_evaluation(start):
    choice, steps = search(lambda step: 3 + (step - 1) ** 2, start, 2.0)

    assert steps == [start]
    assert choice.loss - 3 < 0.05  # of a gain of 1


@pytest.mark.parametrize("depth", [1e-6, 1e6])
def test_the_height_of_the_loss_does_not_matter(depth):
    choice, steps = search(lambda step: depth * ((step - 1) ** 2 - 1), 0.3, 2 * depth)
    _, same_steps = search(lambda step: (step - 1) ** 2 - 1, 0.3, 2.0)

    assert choice.step == pytest.approx(1, rel=1e-6)
    assert steps == pytest.approx(same_steps)


@pytest.mark.parametrize("start", [0.01, 0.3, 3.0, 20.0])
def test_what_is_no_parabola_is_still_found(start):
    choice, _ = search(lambda step: math.exp(step) - 3 * step, start, 2.0)

    gain = 3 * math.log(3) - 2
    assert 1 - choice.loss > 0.9 * gain


@pytest.mark.parametrize("slope", [0.2, 20.0])
def test_a_slope_that_is_wrong_costs_evaluations_only(slope):
    """A slope of other tokens may be off by any factor; what was evaluated decides."""
    choice, _ = search(lambda step: (step - 1) ** 2, 0.1, slope)

    assert choice.loss < 0.2


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 7, 10, 25])
@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (lambda step: -step, 1.0),
        (lambda step: step, 1.0),
        (lambda step: (step - 40) ** 2, 80.0),
        (lambda step: (100 * step - 1) ** 2, 200.0),
        (lambda step: 0.0, 1.0),
    ],
    ids=["falling", "rising", "far minimum", "near minimum", "flat"],
)
def test_never_more_evaluations_than_allowed_and_never_worse_than_the_start(loss, slope, evaluations):
    choice, steps = search(loss, 1.0, slope, evaluations=evaluations)

    assert 1 <= len(steps) <= evaluations
    assert choice.loss <= loss(0.0)


def test_a_falling_loss_is_followed_until_the_evaluations_run_out():
    choice, steps = search(lambda step: -step, 1.0, 1.0, evaluations=6)

    assert choice.step == max(steps) == 8.0**5


@pytest.mark.parametrize("loss", [lambda step: step, lambda step: 1.0], ids=["rising", "flat"])
def test_no_improvement_is_step_zero(loss):
    choice, steps = search(loss, 1.0, 1.0)

    assert (choice.step, choice.loss) == (0.0, loss(0.0))
    assert len(steps) == 4  # half of the evaluations are spent on a direction that does not help
    assert min(steps) < 0.2


@pytest.mark.parametrize("exponent", range(-20, 1))
def test_what_is_given_up_is_a_tiny_part_of_what_the_slope_promised(exponent):
    best = 2.0**exponent / 1.5  # a parabola of slope -1 at the start, which is searched from step 1
    choice, _ = search(lambda step: step**2 / (2 * best) - step, 1.0, 1.0)

    assert choice.step == pytest.approx(best, rel=0.25) or (choice.step == 0 and best / 2 < 1 / 16384)
    assert (choice.step == 0) == (2 * best <= 1 / 4096)  # the control: where a step within reach helps, it is found


@pytest.mark.parametrize("bad", NOT_A_LOSS)
def test_no_finite_loss_is_no_improvement(bad):
    choice, steps = search(lambda step: 1.0 if step == 0 else bad, 1.0, 1.0)

    assert (choice.step, choice.loss) == (0.0, 1.0)
    assert len(steps) > 1


@pytest.mark.parametrize("bad", NOT_A_LOSS)
@pytest.mark.parametrize(
    "start", [0.01, 0.06, 1.0], ids=["far before the cliff", "before the cliff", "behind the cliff"]
)
def test_a_loss_that_overflows_beyond_some_step_is_searched_below_it(bad, start):
    choice, _ = search(lambda step: (step - 0.09) ** 2 if step < 0.1 else bad, start, 0.18)

    assert 0.04 < choice.step < 0.1
    assert choice.loss < 0.09**2


def test_a_start_that_is_no_loss_is_left_alone():
    choice, _ = search_step(lambda step: math.nan, math.nan, 1.0, slope=1.0), None

    assert choice.step == 0


def test_a_search_that_cannot_win_ends_after_its_first_parabola():
    """Its parabola through (0, 1), slope 2 and (0.5, 0.25) has its minimum, 0, at 1: not below what was reached."""
    choice, steps = search(lambda step: (step - 1) ** 2, 0.5, 2.0, beat=0.0)
    _, all_steps = search(lambda step: (step - 1) ** 2, 0.5, 2.0, beat=0.1)

    assert steps == [0.5]
    assert choice.loss == 0.25
    assert all_steps == [0.5, pytest.approx(1.0)]
