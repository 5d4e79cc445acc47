"""The trainers' own ways of training in two processes (gloo, torchrun): watched alike in both, and nothing changes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

WAYS = {
    "trainer-ddp": "transformers",
    "accelerate": "accelerate",
    "lightning-ddp": "lightning",
    "trainer-zero-1": "deepspeed",
    "trainer-zero-2": "deepspeed",
}


def run(folder: Path, way: str) -> list[Any]:
    """Train in two processes, and return what each of them found."""
    script = Path(__file__).with_name("trainers.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), way], capture_output=True, text=True, env=environment, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [pickle.loads((folder / f"{way}-{rank}.pickle").read_bytes()) for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_find_the_same_and_train_as_without(way: str, tmp_path: Path) -> None:
    if find_spec(WAYS[way]) is None:
        pytest.skip(f"{WAYS[way]} is not installed")
    first, second = run(tmp_path, way)
    assert first == second
    assert first["same"]
    assert not first["told"]
    step, _, loss, letters = first["last"]
    assert step in (4, 6)  # the loop counts from 0, the trainers from 1
    assert 0 < loss < 10
    assert len(letters) == 3


def test_parameters_that_deepspeed_spreads_are_refused(tmp_path: Path) -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    first, second = run(tmp_path, "zero-3")
    assert first == second
    assert first.startswith("UnsupportedModelError: Not yet: parameters that DeepSpeed spreads over processes (ZeRO-3)")
