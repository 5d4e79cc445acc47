"""Mistakes in real small trainings are named, with the monitor as people use it; the same training without is not."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import peelwise
from audits import tiny_probe
from odd_models import Attention, Lm
from zoo import ZOO, sample_ids

MISTAKES = {
    "decay-too-strong": {"weight_decay": 40.0},
    "gradients-kept": {"clears": False},
    "labels-shifted": {"ahead": 2, "steps": 110},
    "padding-in-loss": {"padded": True},
    "updates-lost": {"dtype": torch.bfloat16, "rate": 1e-5},
    "rate-too-large": {"fast": 2},
    "rate-too-small": {"rate": 1e-7, "steps": 60},
}


def train(
    *, ahead=1, steps=12, dtype=torch.float32, rate=1e-3, weight_decay=0.01, clears=True, padded=False, fast=None
):
    torch.manual_seed(0)
    model = ZOO["plain"]().train().to(dtype)
    own = list(model.blocks[fast].parameters()) if fast is not None else []
    rest = [p for p in model.parameters() if all(p is not o for o in own)]
    groups = [{"params": rest}, *([{"params": own, "lr": 100 * rate}] if own else [])]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
    with peelwise.Monitor(
        model, tiny_probe(), optimizer=optimizer, store=None, budget=None, schedule=peelwise.every(10_000)
    ) as monitor:
        for step in range(1, steps):
            # Every token says the one after the next: easy to learn, in either way of shifting labels.
            ids = sample_ids(seed=step).clone()
            if ahead == 2:
                for place in range(2, ids.shape[1]):
                    ids[:, place] = (ids[:, place - 2] + 1) % 40
            if padded:
                ids[:, -8:] = 7
            logits = model(ids).float()
            loss = cross_entropy(logits[:, :-ahead].flatten(0, 1), ids[:, ahead:].flatten())
            loss.backward()
            optimizer.step()
            monitor.step(step, loss=loss)
            if clears:
                optimizer.zero_grad()
    return {event.kind for event in monitor.events if event.level != "info"}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named(kind):
    assert kind in train(**MISTAKES[kind])


@pytest.mark.parametrize("steps", [12, 110])
def test_a_healthy_training_is_told_nothing_of(steps):
    assert train(steps=steps) == set()


def test_a_leak_is_told_at_the_first_step_and_the_model_is_followed():
    model = Lm(Attention(causal=False), Attention())
    with peelwise.Monitor(model, tiny_probe(), store=None, budget=None, schedule=peelwise.every(1)) as monitor:
        found = monitor.step(0, loss=1.0)
    (event,) = [event for event in monitor.events if event.kind == "leak"]
    assert (event.step, event.level) == (0, "alert")
    assert "is not causal" in event.text
    assert found is not None
    assert "G" not in found.letters
