"""Signals of low-bit layers beside a monitor's looks."""

from __future__ import annotations

import torch

import peelwise
from audits import tiny_probe
from peelwise.model.architectures import find_blocks
from peelwise.nn import quantize_
from peelwise.records.run import Measurement
from peelwise.records.signals import of_kinds
from peelwise.store.reader import RunReader
from peelwise.tasks.monitor.code_signals import CodeSignals
from zoo import ZOO, sample_ids


def _row(step: int) -> Measurement:
    return Measurement(step, "ranking", 2.0, 0.1, 0.01, "???")


def _values(row: Measurement) -> dict[tuple[str, int], float]:
    return {(s.name, s.block): s.value for s in row.statistics}


def test_codes_that_stand_still_and_dead_outputs_are_told_once_and_flips_are_counted() -> None:
    torch.manual_seed(0)
    model = ZOO["llama"]()
    quantize_(model, "ternary")
    signals = CodeSignals(model, find_blocks(model))
    with torch.no_grad():
        moving = model.model.layers[1].mlp.up_proj
        moving.weight[:, :12] *= -1  # a quarter of one of seven layers
        model.model.layers[2].mlp.gate_proj.weight[:5] = 0
    first, second, third = (signals.noted(_row(step)) for step in (10, 20, 30))
    flipped = _values(first)["codes_flipped", 1]
    codes = moving.encoded().codes
    assert abs(flipped - float((codes[:, :12] != 0).sum()) / codes.numel() / 7) < 1e-6
    assert _values(second)["codes_flipped", 1] == 0
    assert _values(first)["dead_rows", 2] == 5
    assert {name for name, _ in _values(first)} == {signal.name for signal in of_kinds(["codes"])}
    assert [(e.kind, e.block) for e in first.events] == [("dead-rows", 2)]
    assert "5 outputs of mlp.gate_proj have all-zero weights" in first.events[0].text
    assert ("codes-still", 0) in [(e.kind, e.block) for e in second.events]
    assert [(e.kind, e.block) for e in third.events] == [("codes-still", 1), ("codes-still", 2)]


def test_a_dense_model_has_none() -> None:
    model = ZOO["llama"]()
    row = _row(1)
    assert CodeSignals(model, find_blocks(model)).noted(row) is row


def test_a_monitored_run_keeps_them_in_its_history_and_changes_nothing(tmp_path) -> None:
    def trained(watched: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = ZOO["llama"]()
        quantize_(model, "ternary")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        options = {"budget": None, "schedule": peelwise.every(2), "store": tmp_path / "run.db"}
        monitor = peelwise.Monitor(model, tiny_probe(), optimizer=optimizer, **options) if watched else None
        for step in range(1, 5):
            ids = sample_ids(4, 17)
            logits = model(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(step, loss=float(loss.detach()))
        if monitor is not None:
            monitor.close()
        return model.state_dict()

    alone, watched = trained(False), trained(True)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    with RunReader(tmp_path / "run.db") as reader:
        run = reader.latest()
        assert set(reader.newest(run.id, "codes_flipped")) == {0, 1, 2}
        assert all(row["value"] > 0 for row in reader.newest(run.id, "near_threshold").values())
        from rich.console import Console

        from peelwise.show.runs.watch import view

        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(view(reader, run))
    assert "near a threshold" in capture.get()
