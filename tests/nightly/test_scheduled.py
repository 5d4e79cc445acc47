"""Actions where two processes train one model: what one process does with both their batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .scheduled import LAYER, STEPS, fresh, mapped, train, witness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scheduled")
    script = Path(__file__).with_name("scheduled.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, out]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("way", ["replicated", "sharded"])
@pytest.mark.parametrize("outer", ["always", "cut"])
def test_two_processes_train_what_one_does(folder, way, outer):
    expected, block_steps = train(fresh(), outer, [0, 1])
    assert sum(block_steps) == 2 * STEPS
    for rank in (0, 1):
        found, counted = torch.load(folder / f"{way}-{outer}-{rank}.pt")
        assert counted == block_steps
        for name, weight in expected.items():
            assert torch.allclose(found[name], weight, atol=2e-4), name
    alone, _ = train(fresh(), outer, [0])  # the control: another training differs by more
    assert max(float((alone[name] - weight).abs().max()) for name, weight in expected.items()) > 2e-3


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_rates_go_by_the_first_process_and_a_witness_is_put_in_whole_and_taken_out(folder, way):
    expected = mapped(fresh(), 0, [0, 1])
    for rank in (0, 1):
        trained, changed, reverted = torch.load(folder / f"{way}-mapped-{rank}.pt")
        for name, weight in expected[0].items():
            assert torch.allclose(trained[name], weight, atol=2e-4), name
            change = {f"{LAYER}.weight": witness()[:, :-1], f"{LAYER}.bias": witness()[:, -1]}.get(name, 0.0)
            assert torch.allclose(changed[name], trained[name] + change, atol=1e-5), name
            assert torch.equal(reverted[name], trained[name]), name
    other = mapped(fresh(), 1, [0, 1])[0]  # the control: by the second's weights it would be another training
    assert max(float((other[name] - weight).abs().max()) for name, weight in expected[0].items()) > 2e-3
