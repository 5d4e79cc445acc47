"""Two real processes (gloo, torchrun) audit a model that is spread over them: as one that is whole in both."""

import signal

import pytest

from audits import flat, same_bits
from distributed import shards

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")

REFUSED = {
    "low-bit": "UnsupportedModelError: Not yet: model.layers.0.self_attn.q_proj computes with a low-bit format",
    "all at once": "UnsupportedModelError: blocks.0 is sharded only together with others",
    "peel": "UnsupportedModelError: Not yet: this of a model whose weights are spread over processes",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return shards.run(tmp_path_factory.mktemp("shards"), "day")


def timeless(record):
    """Return all numbers of a record, flat, without those of time and memory."""
    return dict(flat({key: value for key, value in record.items() if key not in {"created", "cost"}}))


def assert_same_audit(found, rel, tolerance):
    """Check that what both processes found of a spread model is what they found of the whole one."""
    ((ours, witness, untouched), (whole, of_whole, _)), ((other, other_witness, _), _) = found
    assert untouched
    assert ours == other
    assert same_bits(witness, other_witness)
    assert witness.keys() == of_whole.keys()
    assert all(witness[name].shape == change.shape for name, change in of_whole.items())
    expected, numbers = timeless(whole), timeless(ours)
    assert expected.keys() == numbers.keys()
    for key, value in expected.items():
        if isinstance(value, float | int):
            assert numbers[key] == pytest.approx(value, rel=rel, abs=tolerance), key
        else:  # the fingerprint among them
            assert numbers[key] == value, key
    done, passes = ({s["name"]: s["forward_equivalents"] for s in each["cost"]["stages"]} for each in (whole, ours))
    assert passes == pytest.approx(done)


def test_an_audit_of_a_spread_model_is_that_of_the_whole_one(both):
    assert_same_audit([each["llama"] for each in both], rel=1e-5, tolerance=1e-5)


def test_it_is_that_of_one_process(both):
    record, witness, _ = both[0]["llama"][0]
    alone, own_witness, _ = shards.audited("llama")
    assert record["model"] == alone["model"]
    assert witness.keys() == own_witness.keys()
    for key, value in timeless(alone).items():
        if isinstance(value, float):
            assert timeless(record)[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def check_of(record):
    """Return all numbers of a check, factors by what they are on: those on values and on attention gain alike."""
    factors = {f"{each['layer']} {each['head']}": each | {"composed": None} for each in record["gain_witnesses"]}
    return timeless(record | {"gain_witnesses": dict(sorted(factors.items()))})


def assert_same_check(found, name, rel):
    """Check that checks of a spread model and of a whole one are those of one process, in both processes."""
    for what, text in (("checked", True), ("weights of", False)):
        (spread, whole), other = (each[f"{what} {name}"] for each in found)
        assert (spread, whole) == other
        alone = check_of(shards.checked(name, text=text))
        for record in map(check_of, (spread, whole)):
            assert record.keys() == alone.keys()
            for key, value in alone.items():
                expected = pytest.approx(value, rel=rel, abs=0.1 * rel) if isinstance(value, float) else value
                assert record[key] == expected, key
    assert spread["model"] == whole["model"]


def test_a_check_is_that_of_one_process(both):
    assert_same_check(both, "deep", rel=5e-4)  # gradients are added up in float32, in another order
    assert both[0]["checked deep"][0]["gain_witnesses"]  # so that factors were tried


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_measured_spread_is_refused_in_all(both, what):
    for found in both:
        assert found[what].startswith(REFUSED[what])


@pytest.mark.parametrize("where", ["in_a_block", "between_passes"])
def test_one_that_fails_in_a_pass_of_a_spread_model_ends_all_at_once_and_leaves_it_as_it_was(both, where):
    first, second = (each[where] for each in both)
    assert first["said"] == "OtherProcessError: Process 1 failed: ZeroDivisionError: nothing to divide by"
    assert second["said"] == "ZeroDivisionError (unforeseen): nothing to divide by"
    assert max(first["seconds"], second["seconds"]) < 30  # the group's time-out is half an hour
    assert first["same"]
    assert second["same"]


def test_a_measurement_that_fails_in_a_pass_of_one_stops_no_training(both):
    first, second = (each["in_training"] for each in both)
    assert first["measured"] == second["measured"] == [True, False, False, True, True]
    assert first["losses"] == second["losses"]
    (text,) = first["events"]
    assert "Process 1 failed: ZeroDivisionError: nothing to divide by. It is tried again later." in text


def test_one_that_cannot_gather_what_all_others_wait_for_ends_them_in_seconds(tmp_path):
    (code, said, errors), (_, other, _) = shards.ends(tmp_path / "meeting", "no room")
    assert code == 1
    assert said == ""
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line == (
        "error: Process 1 failed: MemoryError: no room for a block. This process waits for what it will not send, so "
        "it ends."
    )
    assert other.strip() == "MemoryError (unforeseen): no room for a block"


def test_one_that_is_killed_in_a_pass_is_missed_at_once(tmp_path):
    (code, said, _), (other_code, *_) = shards.ends(tmp_path / "meeting", "killed")
    assert (code, other_code) == (0, -signal.SIGKILL)
    assert said.strip() == "OtherProcessError: Another process has ended (killed, or out of memory?)."
