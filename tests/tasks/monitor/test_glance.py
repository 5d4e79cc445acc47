"""A first look by gain slopes: which block is unlike the others, at a small part of what a measurement costs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peelwise
from peelwise.errors import ModelError
from peelwise.evidence.unlike import THRESHOLD
from peelwise.model.architectures import find_blocks
from peelwise.probe.texts import reference_prose
from peelwise.tasks.monitor import follower
from peelwise.tasks.monitor.glance import glance
from stages import stage_folder

TURNED = 3


@pytest.fixture(scope="module")
def probe():
    tokenizer = AutoTokenizer.from_pretrained(stage_folder("final"))
    return peelwise.Probe.from_text(reference_prose(), tokenizer, tokens=3000, sequence_length=128)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(stage_folder("final"), dtype=torch.float32)


def turn(model):
    """Let one block write with the wrong sign, which keeps every spectrum."""
    with torch.no_grad():
        model.model.layers[TURNED].self_attn.o_proj.weight.neg_()


def test_the_block_that_writes_with_the_wrong_sign_is_unlike_and_no_sound_one(model, probe):
    healthy = glance(model, find_blocks(model), probe, micro_batch_tokens=1024)
    assert max(healthy.scales.values()) < THRESHOLD
    turn(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = glance(model, find_blocks(model), probe, micro_batch_tokens=1024)
    assert max(found.scales, key=found.scales.get) == TURNED
    assert found.scales[TURNED] >= THRESHOLD
    assert found.free["gain_slope"][TURNED] > 0  # less of what it writes would be better
    assert found.loss > healthy.loss
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_slopes_are_the_derivative_of_the_loss_by_a_scale(model, probe):
    blocks = find_blocks(model)
    found = glance(model, blocks, probe, micro_batch_tokens=1024)
    weight, step = model.model.layers[0].mlp.down_proj.weight, 0.02

    def loss(scale):
        with torch.no_grad():
            weight.mul_(scale)
            value = glance(model, blocks, probe, micro_batch_tokens=1024).loss
            weight.div_(scale)
        return value

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    parts = abs(found.free["gain_slope"][0])  # of the part that says most
    assert abs(slope) <= parts + 1e-3


def test_a_loss_that_is_no_number_has_no_slopes(model, probe):
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="no slopes"):
        glance(model, find_blocks(model), probe, micro_batch_tokens=1024)


def test_a_monitor_that_cannot_pay_for_solves_says_which_block_is_unlike(model, probe, monkeypatch):
    monkeypatch.setattr(follower, "solve_tokens", lambda *_: 1e12)
    turn(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    rows = probe.fit.inputs[:2, :32]
    with peelwise.Monitor(model, probe, optimizer=optimizer, budget=0.3, store=None) as monitor:
        for step in range(400):
            loss = model(rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(step, loss.detach())
            if monitor.last is not None:
                break
    assert monitor.last.kind == "slopes"
    assert monitor.last.letters == "?" * 6
    (event,) = [event for event in monitor.last.events if event.kind == "unlike-scales"]
    assert event.block == TURNED
    assert event.text.startswith(f"block {TURNED} is unlike the others: the loss asks for smaller scales in it")
    assert monitor.last.probe_loss > 2.0
