"""Examples run, in a shortened form."""

import importlib.util
from pathlib import Path

import pytest

from peelwise.store.reader import RunReader

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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


@pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")
def test_find_the_fault(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["find_the_fault.py", "--quick", "--tokens", "2400", "--out", str(tmp_path)])
    load("find_the_fault").main()
    healthy, flipped = capsys.readouterr().out.split("signs flipped")
    assert "red" not in healthy.split("None found")[1]
    assert "Look first at block 3" in flipped
    assert (tmp_path / "find-the-fault.svg").stat().st_size > 10_000
