from __future__ import annotations

import torch
from torch import nn

from audits import Snapshot
from peelwise.nn import quantize_
from peelwise.tasks.monitor.codewatch import CodeWatch
from zoo import ZOO, sample_ids


def _step(model: nn.Module, rate: float) -> None:
    ids = sample_ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    logits = model(ids[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_watch_tells_a_run_that_moves_from_one_that_does_not() -> None:
    model = ZOO["plain"]()
    swapped = quantize_(model, "ternary")
    watch = CodeWatch(model)
    first = watch.measure()
    assert list(first) == swapped
    assert all(signals.flipped is None for signals in first.values())
    _step(model, 1e-7)
    stuck = watch.measure()
    _step(model, 0.3)
    moving = watch.measure()
    assert sum(s.flipped for s in stuck.values()) < 0.01 * sum(s.flipped for s in moving.values())
    assert sum(s.scale_drift for s in stuck.values()) < 0.1 * sum(s.scale_drift for s in moving.values())


def test_rows_that_died_are_counted() -> None:
    model = ZOO["plain"]()
    name = quantize_(model, "ternary")[0]
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight[:3] *= 1e-3
    assert CodeWatch(model).measure()[name].dead_rows == 3


def test_looking_changes_nothing() -> None:
    model = ZOO["plain"]().train()
    quantize_(model, "int2:affine")
    before = Snapshot.of(model)
    watch = CodeWatch(model)
    watch.measure()
    watch.measure()
    before.assert_unchanged(model)
    assert CodeWatch(ZOO["plain"]()).measure() == {}
