"""Two real processes (gloo, torchrun) share audits: they find what one finds, and none waits for ever."""

import pytest

from audits import flat, same_bits
from distributed import two
from peelwise.distributed.processes import ONE_PROCESS

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return two.run(tmp_path_factory.mktemp("two"), "day")


@pytest.mark.parametrize("case", two.SWEPT, ids=str)
def test_a_sweep_finds_what_one_process_finds_and_the_same_to_the_bit_in_both(both, case):
    losses, from_first, signals, layers = two.swept(*case, ONE_PROCESS)
    first, second = (found["swept"][case] for found in both)
    assert same_bits(first, second)  # what is tried next hangs on them
    assert first[0].tolist() == pytest.approx(losses.tolist(), rel=1e-5)
    assert first[1].tolist() == pytest.approx(from_first.tolist(), rel=1e-5)
    assert first[3].keys() == layers.keys()
    for index, expected in signals.items():
        assert first[2][index] == pytest.approx(expected, rel=1e-3)
    for layer, (slope, _, change) in layers.items():
        assert first[3][layer][0] == pytest.approx(slope, rel=5e-3), layer
        assert first[3][layer][2].shape == change.shape


def test_an_audit_says_what_one_process_says(both):
    (ours, witness), (other, other_witness) = (found["audited"] for found in both)
    assert ours == other
    assert same_bits(witness, other_witness)
    alone, own_witness = two.audited("llama")
    assert own_witness.keys() == witness.keys()
    timeless = {"created", "cost", "digest", "witness"}
    expected, found = (dict(flat({k: v for k, v in each.items() if k not in timeless})) for each in (alone, ours))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if not isinstance(value, float):
            assert found[key] == value, key
        else:
            # Weights are rounded to bfloat16, which sums in another order may do otherwise.
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    for key in ("current", "unigram"):
        assert ours["loss"][key] == pytest.approx(alone["loss"][key], rel=1e-9)
    done, passes = (
        {stage["name"]: stage["forward_equivalents"] for stage in each["cost"]["stages"]} for each in (alone, ours)
    )
    assert done.keys() == passes.keys()
    for stage, forwards in done.items():
        assert passes[stage] == pytest.approx(forwards), stage


@pytest.mark.parametrize("budget", two.BUDGETS["day"])
def test_a_budget_ends_all_at_the_same_place_by_the_clock_of_the_first(both, budget):
    first, second = (found["ended"][budget] for found in both)
    assert first == second
    assert not first["complete"]
    assert {note["code"] for note in first["notes"]} >= {"budget-ended"}


def test_one_that_fails_ends_all_with_its_reason(both):
    assert both[0]["failed"] == "OtherProcessError: Process 1 failed: ZeroDivisionError: nothing to divide by"
    assert both[1]["failed"] == "ZeroDivisionError (unforeseen): nothing to divide by"


def test_ctrl_c_in_one_stops_all_at_the_same_place_with_what_was_finished(both):
    first, second = (found["stopped"] for found in both)
    assert first == second
    assert [note["code"] for note in first["notes"]].count("stopped") == 1
    assert not first["complete"]
    assert first["loss"]["composed"] is not None
    assert "leave-one-out" not in {stage["name"] for stage in first["cost"]["stages"]}


@pytest.mark.parametrize("what", ["other model", "other probe"])
def test_other_models_and_probes_are_refused_in_all(both, what):
    for found in both:
        assert found[what].startswith("OptionError: The processes hold different models or probes")
