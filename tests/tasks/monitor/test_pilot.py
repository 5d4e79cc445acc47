"""The pilot that says what a forward pass takes: as many passes in every process, whatever its own clock says."""

from __future__ import annotations

import pytest

from audits import tiny_probe
from peelwise.distributed.processes import Processes
from peelwise.model.runner import Runner
from peelwise.tasks.monitor import follower
from peelwise.tasks.monitor.follower import Follower, MonitorSettings
from zoo import ZOO


class Following(Processes):
    """What another process does, which repeats a pass as often as the first one says: here three times in all."""

    def __init__(self) -> None:
        super().__init__()
        self.said = [1, 1, 0]

    def broadcast_number(self, value: int) -> int:
        return self.said.pop(0) if self.said else value


class Silent:
    def step(self, row: object) -> None: ...

    def measurement(self, row: object) -> None: ...

    def event(self, event: object) -> None: ...


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["own clock says stop", "own clock says go on"])
def test_passes_are_counted_by_the_first_process(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(follower, "_PILOT_SECONDS", seconds)
    passes, kept = [], Runner.trace
    processes = Following()

    def counted(self, split):
        passes.append(len(processes.said))
        return kept(self, split)

    monkeypatch.setattr(Runner, "trace", counted)
    Follower(ZOO["llama"](), tiny_probe(), MonitorSettings(), Silent(), processes=processes)
    assert passes[-3:] == [3, 2, 1]
