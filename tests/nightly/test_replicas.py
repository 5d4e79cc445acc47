"""The monitor where two processes train one model (gloo, torchrun): replicas, and shards."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peelwise
from audits import tiny_probe
from peelwise.store.reader import RunReader
from peelwise.tasks.monitor import measure as visit
from zoo import ZOO

WAYS = ("replicated", "sharded")
OF_WHOLE_WEIGHTS = {"rotation", "progress"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("replicas")
    script = Path(__file__).with_name("replicas.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, out]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_the_same_to_the_bit_with_and_without(folder, way):
    first, *others = [weights for rank in (0, 1) for weights in torch.load(folder / f"{way}-{rank}.pt")]
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in first.items())
    start = ZOO["plain"]().state_dict()
    assert not any(torch.equal(first[name], weight) for name, weight in start.items() if weight.dim() > 1)


@pytest.mark.parametrize("way", WAYS)
def test_one_process_writes(folder, way):
    with RunReader(folder / f"{way}.db") as reader:
        assert len(reader.runs()) == 1
        assert len(reader.steps(1)) == 9
        assert [row["step"] for row in reader.probes(1)] == [0, 102, 2, 100, 4, 6]
        assert {e["kind"] for e in reader.events(1)} <= {"few-tokens", "not-updated", "stepped-back"}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_found_is_the_same_in_all_and_what_one_process_finds(folder, way, monkeypatch):
    monkeypatch.setattr(visit, "_affordable", lambda session, order, *_: list(order))
    found, other = (pickle.loads((folder / f"{way}-{rank}.pickle").read_bytes()) for rank in (0, 1))
    assert found == other
    options = {"budget": None, "schedule": peelwise.every(1), "store": None}
    with peelwise.Monitor(ZOO["plain"]().double(), tiny_probe(), **options) as monitor:
        alone = [monitor.step(step) for step in range(4)]
    assert [row.kind for row in alone] == ["ranking", "alone", "ranking", "joint"]
    for ours, theirs in zip(alone, found, strict=True):
        assert (ours.kind, ours.letters) == (theirs.kind, theirs.letters)
        assert ours.probe_loss == pytest.approx(theirs.probe_loss, rel=1e-12)
        names = [{(s.name, s.block): s for s in row.statistics} for row in (ours, theirs)]
        # A sharded weight is gathered for a sweep, and not for what is looked at beside it.
        missing = {key for key in names[0] if way == "sharded" and key[0] in OF_WHOLE_WEIGHTS}
        assert names[0].keys() - missing == names[1].keys()
        for key, one in ((key, one) for key, one in names[0].items() if key not in missing):
            values = [[v for v in (s.value, s.low, s.high) if v is not None] for s in (one, names[1][key])]
            # Sums have another order in every number of processes, so proposals and steps differ by their rounding; and
            # weights that are rounded to bfloat16 otherwise gain otherwise: on one processor by 1 % of a marginal gain.
            gains = key[0] in ("recoverable", "unique", "composed", "first_order", "bound_lower")
            assert values[0] == pytest.approx(values[1], rel=2e-2 if gains else 1e-4, abs=5e-4 if gains else 1e-5), key
