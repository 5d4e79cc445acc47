"""Examples that take half a minute each, in a shortened form."""

import json
import os
import subprocess
import sys

import pytest

from examples.test_examples import EXAMPLES, load
from stages import CHECKPOINTS


@pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")
def test_low_bit(tmp_path, capsys):
    example = load("low_bit")
    small = ["--tokens", "2400", "--rounds", "1", "--budget", "2s", "--every", "64"]
    found = example.main(["ternary-stuck", *small, "--out", str(tmp_path), "--results", str(tmp_path)])["ternary-stuck"]
    recorded = json.loads((EXAMPLES / "small_gpt/low_bit/ternary-stuck/training.json").read_text())
    assert found["held_out"]["current"] == pytest.approx(recorded["stages"][0]["held_out_nats_per_token"], abs=0.2)
    assert len(found["audit"]["verdicts"]) == 6
    visited = found["peel"]["bound"] is not None  # not on a busy machine
    assert found["peel"]["conclusion"].startswith("None found: of " if visited else "No verdict yet")
    assert (tmp_path / "low-bit-training.svg").stat().st_size > 20_000


def run(name, *arguments):
    """Run an example as its reader does and return what it printed."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peel_maps(tmp_path):
    printed = run("peel_maps", "--quick", "--tokens", 900, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"peel-training.svg", "peel-damage.svg"}
    assert "over head control" in printed


def test_yes_bounds(tmp_path):
    printed = run("yes_bounds", "--quick", "--out", tmp_path)
    assert "step 30" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"yes-published.svg", "yes-default.svg", "yes-depth.svg"}


def test_training_script_leaves_a_stage_that_opens(tmp_path):
    script = CHECKPOINTS.parent / "train.py"
    command = [sys.executable, script, "--steps", "2", "--held-out", "8", "--out", tmp_path, "--threads", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "step-00002")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "step-00002"))
    assert json.loads((tmp_path / "training.json").read_text())["stages"][0]["step"] == 2
    assert not (tmp_path / "resume.pt").exists()
