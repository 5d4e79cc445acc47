"""Two processes share audits by night: other models, budgets that end anywhere, and what a user may do wrong."""

import os
import signal
import subprocess
import sys

import pytest

from audits import flat, same_bits
from distributed import two
from peelwise.certificate.audit import read_certificate
from tiny_llama import tiny_llama, tiny_tokenizer

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


SIZES = ("--tokens", "1200", "--sequence-length", "32", "--budget", "300s", "--joint-rounds", "1", "--solo-rounds", "1")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(*arguments):
    """Start ``torchrun -m peelwise`` with two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peelwise"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*start, *map(str, arguments)], **options)


def ended(*arguments):
    """Return code, output and errors of a command of two processes."""
    with command(*arguments) as process:
        out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def test_the_command_prints_once_and_its_certificate_holds_in_one_process(model_folder, tmp_path, run):
    code, out, err = ended("audit", model_folder, *SIZES, "--out", tmp_path / "two")
    assert code == 0, err[-3000:]
    assert out.count("Files are in") == 1
    assert err.count("Opening") == 1
    code, out, _ = run("verify", tmp_path / "two", "--model", model_folder)
    assert code == 0, out
    assert run("audit", model_folder, *SIZES, "--out", tmp_path / "one")[0] == 0
    one, both = (read_certificate(tmp_path / which).record for which in ("one", "two"))
    assert [block.verdict for block in one.blocks] == [block.verdict for block in both.blocks]
    assert both.loss.current == pytest.approx(one.loss.current, rel=1e-6)


def test_a_command_that_fails_says_one_sentence(tmp_path):
    code, _, err = ended("audit", tmp_path / "nothing")
    assert code != 0
    assert err.count("error: ") == 1


def test_ctrl_c_reports_what_was_finished_once(model_folder, tmp_path):
    long = ("--tokens", "60000", "--sequence-length", "32", "--budget", "600s")
    with command("audit", model_folder, *long, "--out", tmp_path / "stopped") as process:
        for line in process.stderr:
            if "statistics" in line:
                process.send_signal(signal.SIGINT)
                break
        out, _ = process.communicate(timeout=200)
    assert out.count("Stopped by the user") == 1
    assert read_certificate(tmp_path / "stopped").record.complete is False
