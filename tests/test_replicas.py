"""The monitor where two processes train replicas of one model (gloo, torchrun)."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from peelwise.store.reader import RunReader


def test_one_process_measures_and_nothing_changes(tmp_path):
    script = Path(__file__).with_name("replicas.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [torch.load(tmp_path / f"rank-{rank}-{watched}.pt") for rank in (0, 1) for watched in (False, True)]
    for other in weights[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in weights[0].items())
    with RunReader(tmp_path / "run.db") as reader:
        assert len(reader.runs()) == 1
        assert len(reader.steps(1)) == 7
        assert [row["step"] for row in reader.probes(1)] == [0, 2, 4, 6]
        assert not reader.events(1) or {e["kind"] for e in reader.events(1)} <= {"few-tokens"}
