"""Examples run, in a shortened form."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from peelwise.store.reader import RunReader

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_monitor(tmp_path, capsys, monkeypatch):
    example = load("monitor")
    monkeypatch.setattr(example, "TOKENS", 1_500)
    monitor = example.main(["--steps", "12", "--store", str(tmp_path / "run.db"), "--budget", "0.9"])
    printed = capsys.readouterr().out
    assert "12 of 66 parameters not in the optimiser: blocks.2." in printed
    assert "90.0% were asked for" in printed
    assert monitor.share == pytest.approx(0.9, abs=0.3)
    with RunReader(tmp_path / "run.db") as reader:
        assert len(reader.steps(1)) == 12
        assert reader.probes(1)
        assert reader.latest().info.blocks == tuple(f"blocks.{i}" for i in range(5))


def test_one_bit_recovery(tmp_path):
    example = load("one_bit_recovery")
    result = example.main(["--quick", "--out", str(tmp_path), "--results", str(tmp_path)])
    bits = {row["format"]: row["bits_per_weight"] for row in result["formats"]}
    assert bits["dense"] == 32
    # A quarter of the weights is there, one bit each; 4 matrices of 24 x 16 share one scale of 16 bits.
    assert bits["binary:model,blocks=4"] == pytest.approx(0.25 + 16 / (4 * 24 * 16), abs=1e-4)
    assert min(bits, key=bits.get) == "binary:model,blocks=4"
    assert result["one_bit"][-1]["network"] < result["one_bit"][0]["network"]
    assert all((tmp_path / f"one-bit-{name}.svg").stat().st_size > 5_000 for name in ("formats", "yes"))


def test_an_unrolled_network_is_the_chain_that_its_yes_bounds_are_of():
    example = load("one_bit_recovery")
    problem = example.Problem(example.QUICK, 0)
    net = example.network(problem, example.ONE_BIT)
    y, x = problem.draw(50)
    found = net.as_chain()(y)
    measured = y.shape[1]
    torch.testing.assert_close(found[:, : x.shape[1]], net(y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, -2 * measured :], torch.cat([y, -y], 1))
    assert example.relative_error(net, y, x) < 1  # the algorithm as it is recovers something


@pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")
def test_find_the_fault(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["find_the_fault.py", "--quick", "--tokens", "2400", "--out", str(tmp_path)])
    load("find_the_fault").main()
    healthy, flipped = capsys.readouterr().out.split("signs flipped")
    assert "red" not in healthy.split("None found")[1]
    assert "Look first at block 3" in flipped
    assert (tmp_path / "find-the-fault.svg").stat().st_size > 10_000
