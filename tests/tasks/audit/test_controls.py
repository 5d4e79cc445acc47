"""Null controls: what they do, and that they tell something from nothing."""

import copy

import pytest
import torch
from torch import nn

from audits import ONE_ROUND, runner_of, session_of, tiny_probe
from peelwise.engine.permute import shuffled_targets
from peelwise.model.fresh import fresh_copy
from peelwise.model.guard import untouched
from peelwise.probe.probe import Probe
from peelwise.records.base import note
from peelwise.tasks.audit.controls import head_reference, shuffled_control, untrained_control
from peelwise.tasks.audit.findings import Findings
from peelwise.tasks.audit.run import run_audit
from peelwise.tasks.audit.stages import first_sweep
from plain_gpt import PlainGPT
from zoo import VOCABULARY, ZOO, sample_ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "plain"])
def test_untrained_copy_is_the_architecture_at_initialisation(name):
    model = ZOO[name]().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    with untouched(model):
        fresh, again = fresh_copy(model, 3), fresh_copy(model, 3)
    shapes = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in fresh.state_dict().items()} == shapes
    assert not any(p.requires_grad for p in fresh.parameters())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    changed = [not torch.equal(before[key], value) for key, value in fresh.state_dict().items() if value.dim() > 1]
    assert all(changed)


def test_model_that_cannot_be_initialised_again_leaves_a_note():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.gain * x

    model = ZOO["plain"]()
    model.norm = nn.Sequential(model.norm, Odd())
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    assert outcome.record.loss.untrained is None
    assert note("not-initialised") in outcome.record.notes


def test_controls_start_where_they_should():
    session, findings = session_of(ZOO["plain"]()), Findings()
    with untouched(session.runner.model):
        first_sweep(session, findings, null=shuffled_targets(session.fit, session.seed, shift_first=True))
        shuffled = shuffled_control(session, findings.shuffled_proposals)
        untrained = untrained_control(session)
    assert shuffled.start == session.report.mean
    assert untrained.start != session.report.mean
    for control in (shuffled, untrained):
        assert control.loss == pytest.approx(control.start - control.gain.mean)


# -- the head: a convex toy, where the truth is known ------------------------------------------------------


def toy(trained: bool):
    """A model whose head alone predicts a noisy function of the present token: ``trained`` to its minimum or not."""
    torch.manual_seed(0)
    model = PlainGPT(width=16, blocks=1, heads=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.feed_forward[2].weight.zero_()
        model.positions.weight.zero_()
        model.head.weight.mul_(0.1)
    ids = sample_ids(160, 17) % 8  # eight tokens only: enough of each to know the minimum
    ids[:, 1::2] = torch.where(torch.rand(160, 8) < 0.8, (ids[:, :-1:2] + 1) % 8, ids[:, 1::2])
    probe = Probe.from_tokens(ids)
    if trained:
        runner = runner_of(model)
        x, y, _ = runner.head_inputs(runner.trace(probe.fit))
        head = model.head.requires_grad_(True)
        solver = torch.optim.LBFGS(head.parameters(), lr=1, max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            solver.zero_grad()
            value = nn.functional.cross_entropy(head(x), y)
            value.backward()
            return value

        solver.step(loss)
    return model.requires_grad_(False), probe


@pytest.mark.parametrize("trained", [True, False])
def test_at_the_minimum_of_a_convex_toy_nothing_is_recoverable(trained):
    model, probe = toy(trained)
    session = session_of(model, probe)
    head, control = head_reference(session)
    gained = head.recoverable_nats
    assert head.relaxed <= head.achieved <= head.current
    if trained:
        assert head.current - head.relaxed < 0.01
        assert abs(gained.mean) < 0.01
    else:  # the control: the same toy before its head was fitted
        assert gained.low > 0.5
        assert control.loss == pytest.approx(session.report.mean - gained.mean)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda model: setattr(model, "head", nn.ConstantPad1d((0, VOCABULARY - 48), 0.0)), "no-head"),
        (lambda model: model.register_forward_hook(lambda *a: 0.5 * a[2]), "logits-changed"),
    ],
)
def test_head_that_is_not_this_problem_leaves_a_note(change, code):
    model = ZOO["plain"]()
    change(model)
    assert head_reference(session_of(model)) is None
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    assert outcome.record.head is None
    assert note(code) in outcome.record.notes
