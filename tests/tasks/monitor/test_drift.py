"""How weights turn in a run, against the whole weights, and in the history of a monitored training."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import peelwise
from audits import tiny_probe, trained_beside
from peelwise.model.architectures import find_blocks
from peelwise.records.run import Measurement
from peelwise.store.reader import RunReader
from peelwise.tasks.monitor import drift
from peelwise.tasks.monitor.drift import Drift
from zoo import ZOO


def values(row: Measurement) -> dict[tuple[str, int], float]:
    return {(s.name, s.block): s.value for s in row.statistics}


def test_rotation_and_progress_are_those_of_the_weights() -> None:
    torch.manual_seed(0)
    model = ZOO["llama"]()
    blocks = find_blocks(model)
    followed = Drift(blocks)
    states = [copy.deepcopy(model.state_dict())]
    found = {}
    for step in (10, 20):
        with torch.no_grad():
            for parameter in blocks[1].module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) + (0.05 if step == 20 else 0.1))
        states.append(copy.deepcopy(model.state_dict()))
        found = values(followed.noted(Measurement(step, "ranking", 2.0, 0.1, 0.01, "???"), blocks))

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    names = [f"{linear.name}.weight" for linear in blocks[1].linears]
    turned = np.mean([1 - cosine(states[2][n], states[0][n]) for n in names])
    kept = np.mean([cosine(states[2][n] - states[1][n], states[1][n] - states[0][n]) for n in names])
    assert found["rotation", 1] == pytest.approx(turned, rel=1e-6)
    assert found["progress", 1] == pytest.approx(kept, rel=1e-6)
    assert found["rotation", 0] == pytest.approx(0, abs=1e-12)
    assert ("progress", 0) not in found  # it has not moved


def test_a_monitored_run_has_them_with_their_own_history_and_is_not_changed(tmp_path: Path) -> None:
    def trained(watched: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = ZOO["llama"]()
        options = {"budget": None, "schedule": peelwise.every(1), "store": tmp_path / "run.db"}
        return trained_beside(
            model, (lambda o: peelwise.Monitor(model, tiny_probe(), optimizer=o, **options)) if watched else None
        )

    plain, watched = trained(False), trained(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    reader = RunReader(tmp_path / "run.db")
    run = reader.latest()
    for name in ("rotation", "progress", "weight_norm", "layer_slope", "input_rank", "gradient_agreement"):
        newest = reader.newest(run.id, name)
        assert set(newest) >= {0, 1}, name
        assert newest[0]["to_median"] is not None, name
    assert reader.newest(run.id, "rotation")[0]["value"] > 0


def test_samples_of_many_layers_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_IN_ALL", 6_400)
    blocks = find_blocks(ZOO["mixtral"]())
    layers = sum(len(block.linears) for block in blocks)
    kept = drift._samples(blocks)
    assert len(kept) == layers
    assert max(map(len, kept.values())) <= max(drift._FEWEST, 6_400 // layers)
    assert sum(map(len, kept.values())) <= max(6_400, drift._FEWEST * layers)
