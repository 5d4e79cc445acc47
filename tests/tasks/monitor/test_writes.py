"""Marks of parameters change with every step that wrote them, and only then."""

import pytest
import torch
from torch import nn

from peelwise.tasks.monitor.writes import writes


class WritesIntoData(torch.optim.Optimizer):
    """An optimiser of the old kind, which moves no version counter."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(0.1 * parameter.grad)
                    self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adagrad(p, fused=True),
        WritesIntoData,
    ],
)
def test_a_step_is_seen_in_the_parameters_that_it_wrote(make):
    stepped, left = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make([stepped, left])
    marks = [writes([stepped, left], optimizer)]
    for _ in range(3):
        stepped.grad = torch.ones(3)
        optimizer.step()
        marks.append(writes([stepped, left], optimizer))
        assert marks[-1] == writes([stepped, left], optimizer)
    first, second = zip(*marks, strict=True)
    assert len(set(first)) == 4
    assert len(set(second)) == 1


def test_without_an_optimiser_version_counters_tell():
    parameter = nn.Parameter(torch.ones(3))
    before = writes([parameter], None)
    with torch.no_grad():
        parameter.add_(1)
    assert writes([parameter], None) != before
