"""What blocks hand on beside the hidden state: called one by one, they are the model that they are as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peelwise
from audits import random_changes, runner_of, split_of, tiny_probe, written
from odd_models import Lm, Mlp, Relay, Relaying, Sharing, Shortcut, gemma4
from peelwise.model.handed import Gradient
from peelwise.model.runner import Runner
from peelwise.model.splice import spliced
from peelwise.model.trace import Trace
from peelwise.tasks.audit.settings import AuditSettings
from zoo import sample_ids

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mapping": lambda: Shortcut(Sharing(), Sharing(), Sharing()),
    "returned": lambda: Relay(Relaying(), Relaying(), Relaying()),
    "gemma4": gemma4,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def rows() -> list[list[int]]:
    return sample_ids(6, 17).tolist()


def traced(model: nn.Module) -> tuple[Runner, Trace]:
    runner = runner_of(model, micro_batch_tokens=40)
    return runner, runner.trace(split_of(rows()))


def test_what_is_handed_on_is_found(model: nn.Module) -> None:
    ways = traced(model)[1].batches[0].ways
    assert ways.mappings or ways.returned
    assert not traced(Lm(Mlp(), Mlp()))[1].batches[0].handed_to(1)  # the control


def test_changes_of_a_block_reach_those_that_read_what_it_hands_on(model: nn.Module) -> None:
    blocks, changes = random_changes(model)
    first = {linear: changes[linear] for linear in blocks[0].linears}
    expected = runner_of(written(model, first)).trace(split_of(rows()))
    runner, trace = traced(model)
    with spliced(first):
        found, losses = runner.refreshed(trace), runner.losses_from(trace, 0)
        later = [runner.losses_from(found, start) for start in range(len(blocks) + 1)]
    for each in (found.losses, losses, *later):
        torch.testing.assert_close(each, expected.losses, rtol=1e-4, atol=1e-3)
    stale = runner.losses_from(found, 1)  # what the changed block has handed on stays where it was computed
    torch.testing.assert_close(stale, expected.losses, rtol=1e-4, atol=1e-3)
    for start in range(len(blocks) + 1):  # and the model's own is as it was
        torch.testing.assert_close(runner.losses_from(trace, start), trace.losses, rtol=1e-5, atol=1e-4)
    assert (trace.losses - expected.losses).abs().max() > 0.05  # the control: the changes matter


def test_gradients_reach_the_weights_that_made_what_is_handed_on(model: nn.Module) -> None:
    runner, trace = traced(model)
    weights = {linear: linear.parameter for block in runner.blocks for linear in block.linears}
    model.requires_grad_(True)
    sum(runner.own_loss(batch) for batch in trace.batches).backward()  # type: ignore[union-attr]
    above = runner.tail_gradients(trace)
    for block in reversed(runner.blocks):
        found: dict[object, Tensor] = {}
        below: list[Gradient] = []
        for batch, gradient in zip(trace.batches, above, strict=True):
            capture, ((down, grads),) = runner.block_gradients(block, batch, [gradient])
            below.append(down)
            for linear, (g,) in grads.items():
                (call,) = capture.calls[linear]
                own = g.flatten(0, -2).T @ call.x.flatten(0, -2)
                found[linear] = found.get(linear, torch.zeros_like(own)) + own
        above = below
        for linear in block.linears:
            true = weights[linear].grad
            assert true is not None
            torch.testing.assert_close(found[linear], true, rtol=1e-3, atol=1e-3 * float(true.abs().max()))


def test_without_a_block_what_it_hands_on_stays(model: nn.Module) -> None:
    runner, trace = traced(model)
    passed = trace.batches[0].stations[0]
    before = trace.batches[0].handed_to(1)
    assert before
    assert bool(runner.losses_without(trace, 0).isfinite().all())
    assert trace.batches[0].stations[0] is passed
    assert all(one is two for one, two in zip(before.values(), trace.batches[0].handed_to(1).values(), strict=True))


@pytest.mark.slow
def test_an_audit_of_it_verifies_and_its_witness_holds_in_the_weights(model: nn.Module, tmp_path: Path) -> None:
    probe = tiny_probe()
    report = peelwise.audit(model, probe, AuditSettings(600.0, joint_rounds=1, solo_rounds=1, controls=False))
    report.save(tmp_path / "certificate")
    assert peelwise.verify(tmp_path / "certificate", model, full=True).holds
    loss = report.record.loss
    assert loss.composed is not None
    assert abs(loss.composed - loss.current) > 1e-3
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for key, change in report.witness.items():
            kind, _, name = key.partition("/")
            if kind == "composed":
                layer = changed.get_submodule(name)
                layer.weight += change.float()[:, : layer.in_features]
                if layer.bias is not None:
                    layer.bias += change.float()[:, layer.in_features]
    assert runner_of(changed).trace(probe.report).mean == pytest.approx(loss.composed, rel=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["check", "peel", "anatomy"])
def test_other_tasks_take_it(model: nn.Module, task: str) -> None:
    assert getattr(peelwise, task)(model, tiny_probe()).record.loss is not None
