"""Checks without a probe: each fault is found, and a healthy run has none."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from peelwise.evidence.events import wrong
from peelwise.model.architectures import find_blocks
from peelwise.tasks.monitor.vitals import Vitals, _all_zero
from zoo import ZOO, sample_ids


def named(model, start):
    return [p for name, p in model.named_parameters() if name.startswith(start)]


class Training:
    """A short training run with a check behind every step."""

    def __init__(self, name="plain", fault=None, **options):
        self.model = ZOO[name]().train()
        groups = fault(self.model) if fault else None
        fused = options.pop("fused", False)
        self.optimizer = torch.optim.AdamW(groups or self.model.parameters(), lr=1e-3, fused=fused)
        self.clear_first, self.clip = options.pop("clear_first", False), options.pop("clip", None)
        self.vitals = Vitals(self.model, find_blocks(self.model), options.pop("optimizer", self.optimizer))

    def check(self, steps=4):
        found = []
        for seed in range(steps):
            ids = sample_ids(seed=seed)
            logits = self.model(ids[:, :-1])
            cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), ids[:, 1:].flatten()).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            if self.clear_first:
                self.optimizer.zero_grad()
            found.append({finding.kind: finding for finding in self.vitals.check()})
            self.optimizer.zero_grad()
        return found


@pytest.mark.parametrize("name", ["plain", "llama", "gpt2", "qwen2-tied"])
@pytest.mark.parametrize("clear_first", [False, True])
def test_a_healthy_run_has_no_fault(name, clear_first):
    training = Training(name, clear_first=clear_first)
    assert training.check() == [{}] * 4
    assert training.vitals.saw_gradients is not clear_first


def test_frozen():
    def freeze(model):
        for parameter in named(model, "blocks.1"):
            parameter.requires_grad_(False)

    found = Training(fault=freeze).check(1)[0]
    assert found.keys() == {"frozen"}
    assert found["frozen"].blocks == (1,)
    assert len(found["frozen"].names) == 12
    assert "12 of 42 parameters are frozen" in wrong(1, found["frozen"]).text


def test_not_in_the_optimiser():
    found = Training(fault=lambda m: named(m, "blocks.0") + named(m, "blocks.2") + named(m, "head")).check(1)[0]
    assert found.keys() == {"not-optimised"}
    assert found["not-optimised"].blocks == (1,)
    assert "tokens.weight" in found["not-optimised"].names


def test_a_rate_of_zero_for_some_at_once_for_all_only_if_it_stays():
    def split(model):
        own = named(model, "blocks.1.attention")
        rest = [p for p in model.parameters() if all(p is not o for o in own)]
        return [{"params": rest}, {"params": own, "lr": 0.0}]

    found = Training(fault=split).check(1)[0]
    assert found.keys() == {"zero-rate"}
    assert found["zero-rate"].blocks == (1,)
    warm_up = Training(fault=lambda model: [{"params": list(model.parameters()), "lr": 0.0}])
    first, second = warm_up.check(2)
    assert (first, second.keys()) == ({}, {"zero-rate"})
    warm_up.optimizer.param_groups[0]["lr"] = 1e-3
    assert warm_up.check(1) == [{}]


class Detached(nn.Module):
    """A block that lets no gradient into its feed-forward part."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        x = x + self.block.attention(self.block.norm_1(x))
        return x + self.block.feed_forward(self.block.norm_2(x)).detach()


def detach(model):
    model.blocks = nn.ModuleList(Detached(block) for block in model.blocks[:2])


def test_no_gradient():
    found = Training(fault=detach).check(1)[0]
    assert found.keys() == {"no-gradient"}
    assert found["no-gradient"].blocks == (0, 1)
    assert all("feed_forward" in name or "norm_2" in name for name in found["no-gradient"].names)


def test_what_stands_still_is_seen_without_gradients_and_without_the_optimiser():
    training = Training(fault=detach, clear_first=True, optimizer=None)
    *before, last = training.check(4)
    assert before == [{}, {}, {"not-updated": before[-1]["not-updated"]}]
    assert last.keys() == {"not-updated"}
    assert last["not-updated"].blocks == (0, 1)


def test_gradients_that_are_no_numbers():
    training = Training()
    model = training.model
    training.check(1)
    model.blocks[2].feed_forward[0].register_forward_hook(lambda m, args, y: y * torch.inf)
    (found,) = training.check(1)
    assert "non-finite" in found
    assert 2 in found["non-finite"].blocks


def test_what_stands_still_is_seen_behind_a_fused_optimiser():
    training = Training(fault=detach, clear_first=True, fused=True)
    *_, last = training.check(4)
    assert last.keys() == {"not-updated"}
    assert last["not-updated"].blocks == (0, 1)


def test_a_gradient_whose_square_overflows_is_a_number_still():
    training = Training()
    training.model.blocks[2].feed_forward[0].weight.register_hook(lambda gradient: torch.full_like(gradient, 1e25))
    assert "non-finite" not in training.check(1)[0]


@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_without_a_gradient_are_found_wherever_their_only_number_lies(dim):
    gradient = torch.zeros(300, 200)
    for row in range(0, 200, 3):
        gradient[row, row] = 1.0  # most of these lie between the numbers that are looked at first
    gradient = gradient if dim == 1 else gradient.T
    assert torch.equal(_all_zero(gradient, dim), (gradient == 0).all(dim=dim))


@pytest.mark.parametrize("units", [5, 40])
def test_dead_units(units):
    """ReLU units with a large negative bias; 40 of 192 are too many, 5 are not."""

    def kill(model):
        model.blocks[1].feed_forward[1] = nn.ReLU()
        with torch.no_grad():
            model.blocks[1].feed_forward[0].bias[:units] = -50.0

    found = Training(fault=kill).check(4)
    assert found[:2] == [{}, {}]
    if units == 5:
        assert found[3] == {}
    else:
        assert found[3].keys() == {"dead-units"}
        assert found[3]["dead-units"].names == ("blocks.1.feed_forward.0",)
        assert "40 of 192 outputs got no gradient" in wrong(4, found[3]["dead-units"]).text


def test_dead_units_of_a_transposed_map():
    def kill(model):
        model.transformer.h[1].mlp.act = nn.ReLU()
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.bias[:40] = -50.0

    found = Training("gpt2", fault=kill).check(4)
    assert found[3]["dead-units"].names == ("transformer.h.1.mlp.c_fc",)


def test_gradients_that_are_clipped_at_every_check():
    often, never, unclipped = Training(clip=0.01), Training(clip=1e6), Training()
    often.check(3)
    assert often.vitals.clipped_to is None  # three alike may still be chance
    for training in (often, never, unclipped):
        training.check()
    assert often.vitals.clipped_to == pytest.approx(0.01, rel=1e-3)
    assert (never.vitals.clipped_to, unclipped.vitals.clipped_to) == (None, None)


def test_rates():
    def split(model):
        return [{"params": named(model, "blocks.0")}, {"params": named(model, "blocks.1"), "lr": 1e-4}]

    assert Training(fault=split).vitals.rates() == [pytest.approx(1e-3), pytest.approx(1e-4), None]
    assert Training(optimizer=None).vitals.rates() == [None] * 3
