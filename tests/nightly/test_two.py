"""Two processes share audits by night: other models, budgets that end anywhere, and what a user may do wrong."""

import pytest

from audits import flat, same_bits
from distributed import two
from peelwise.certificate.audit import read_certificate

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def both(folder):
    return two.run(folder, "night")


def test_a_low_bit_model_is_audited_as_in_one_process(both):
    (ours, witness), (other, other_witness) = (found["audited"] for found in both)
    assert ours == other
    assert same_bits(witness, other_witness)
    alone, own_witness = two.audited("low-bit")
    assert own_witness.keys() == witness.keys()
    assert ours["loss"]["current"] == pytest.approx(alone["loss"]["current"], rel=1e-6)
    for one, two_ in zip(alone["blocks"], ours["blocks"], strict=True):
        assert two_["verdict"] == one["verdict"]
        # In float32, and with codes that flip or do not.
        assert two_["recoverable_nats"]["mean"] == pytest.approx(one["recoverable_nats"]["mean"], abs=3e-3)
    assert [key for key, _ in flat(alone)] == [key for key, _ in flat(ours)]


@pytest.mark.parametrize("budget", two.BUDGETS["night"])
def test_a_budget_ends_all_at_the_same_place(both, budget):
    first, second = (found["ended"][budget] for found in both)
    assert first == second
    assert not first["complete"]


def test_a_sharded_model_is_refused(both):
    for found in both:
        assert found["sharded"].startswith("UnsupportedModelError: Not yet: an audit of a model whose weights")


def test_a_model_that_one_cannot_open_ends_all(both):
    assert both[0]["no model"].startswith("OtherProcessError: Process 1 failed: ModelError: /nowhere not found")
    assert both[1]["no model"].startswith("ModelError: /nowhere not found")


def test_a_replicated_model_is_audited_told_and_saved_by_the_first(both, folder):
    assert both[0]["replicated"] == both[1]["replicated"]
    assert both[0]["told"] > 10
    assert both[1]["told"] == 0
    assert read_certificate(folder / "certificate").record.model.name
    assert both[0]["taken"].startswith("OutputError")
    assert both[1]["taken"].startswith("OtherProcessError: Process 0 failed: OutputError")
