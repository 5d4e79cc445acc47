"""The benchmark of actions in the smallest size: every arm trains within its budget, and a second call does nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ARMS = ("uniform", "growth by importance", "random half of the blocks per step", "map [1, 5] by permutation")


def run(out):
    command = [sys.executable, str(ROOT / "benchmarks" / "actions" / "run.py"), "--size", "smoke", "--out", str(out)]
    done = subprocess.run([*command, "--seeds", "11", "12", "--arms", *ARMS], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (out / "smoke" / "runs.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_arms_share_a_budget_and_finished_trainings_are_not_repeated(tmp_path):
    rows = run(tmp_path)
    full = {(row["arm"], row["seed"]): row for row in rows if row["budget"] == 1.0 and row["seed"] != 1}
    assert set(full) == {(arm, seed) for arm in ARMS for seed in (11, 12)}
    uniform = full["uniform", 11]
    assert uniform["steps"] == 24
    assert uniform["block_steps"] == [24] * 3
    half = full["random half of the blocks per step", 11]
    assert sum(half["block_steps"]) == half["steps"]  # one block of three a step
    assert half["steps"] > 24  # cheaper steps, so more of them
    growth = full["growth by importance", 11]
    assert min(growth["block_steps"]) < max(growth["block_steps"]) == growth["steps"]
    assert all(len(row["by_window"]) == 128 for row in rows)
    file = tmp_path / "smoke" / "runs.jsonl"
    text = file.read_text()
    assert run(tmp_path) == rows
    assert file.read_text() == text
    lines = text.splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # killed while it wrote
    again = run(tmp_path)
    assert [{k: row[k] for k in ("arm", "seed", "rate", "held_out", "steps")} for row in again] == [
        {k: row[k] for k in ("arm", "seed", "rate", "held_out", "steps")} for row in rows
    ]
