"""What a step did, from a sample, against all weights; and each fault of a step beside the healthy one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from peelwise.model.architectures import find_blocks
from peelwise.tasks.monitor.updates import UpdateWatch
from zoo import ZOO, sample_ids


class Training:
    """A short training whose steps are all looked at from both sides."""

    def __init__(self, *, change=None, groups=None, make=torch.optim.AdamW, clears=True, clip=None, **options):
        torch.manual_seed(0)
        self.model = ZOO["plain"]().train()
        if change:
            change(self.model)
        options = {"lr": 1e-3} | options
        self.optimizer = make(groups(self.model) if groups else self.model.parameters(), **options)
        self.watch = UpdateWatch(self.model, find_blocks(self.model), self.optimizer)
        self.clears, self.clip, self.seed, self.steps = clears, clip, 0, 0

    def backward(self):
        ids = sample_ids(seed=self.seed)
        self.seed += 1
        logits = self.model(ids[:, :-1]).float()
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    def step(self, accumulated=1, scale=1.0):
        self.watch.before()
        for _ in range(accumulated):
            self.backward()
        for parameter in self.model.parameters():
            parameter.grad.mul_(scale)
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        facts = self.watch.after(self.steps)
        self.steps += 1
        if self.clears:
            self.optimizer.zero_grad(set_to_none=self.clears != "in place")
        return facts


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_updates_of_blocks_are_those_of_all_their_weights(options):
    training = Training(**options)
    training.step()
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    facts = training.step()
    for block in range(3):
        own = [n for n, p in training.model.named_parameters() if n.startswith(f"blocks.{block}.") and p.dim() > 1]
        now = dict(training.model.named_parameters())
        change = torch.cat([(now[n].detach() - before[n]).flatten() for n in own]).double()
        weight = torch.cat([before[n].flatten() for n in own]).double()
        assert facts.moved[block] == pytest.approx(float(change.square().mean()) ** 0.5, rel=0.1)
        assert facts.relative[block] == pytest.approx(float(change.norm() / weight.norm()), rel=0.1)
    assert facts.rates == pytest.approx((1e-3,) * 3)
    assert (facts.highest_rate, facts.lost, facts.coupled) == (1e-3, None, 0.0)


@pytest.mark.parametrize("clears", [True, "in place"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"make": torch.optim.SGD}])
def test_a_gradient_that_is_cleared_holds_nothing_of_the_last(clears, options):
    training = Training(clears=clears, **options)
    assert [training.step().stale for _ in range(4)][1:] == ([0.0] * 3 if clears == "in place" else [None] * 3)


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}, {"make": torch.optim.SGD, "lr": 0.01}])
def test_a_gradient_that_is_kept_is_told_also_when_it_is_clipped(options):
    training = Training(clears=False, **options)
    first, *later = [training.step().stale for _ in range(4)]
    assert first is None
    assert min(later) > 0.1


def test_accumulation_and_scaling_are_no_stale_gradients():
    training = Training(clears="in place")
    assert [training.step(accumulated=3, scale=0.25).stale for _ in range(3)][1:] == [0.0] * 2


def test_within_an_accumulation_nothing_is_said():
    training = Training()
    training.watch.before()
    training.backward()
    assert training.watch.after(0) is None


def test_a_fused_optimiser_that_counts_no_steps_is_seen_by_what_it_does():
    training = Training(make=torch.optim.SGD, fused=True)
    assert all(moved > 0 for moved in training.step().moved)
    training.watch.before()
    training.backward()
    assert training.watch.after(1) is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("rate", "lost"), [(1e-5, True), (3e-3, False)])
def test_updates_that_are_lost_in_half_precision(rate, lost, fused):
    training = Training(change=lambda m: m.bfloat16(), lr=rate, fused=fused)
    facts = [training.step() for _ in range(3)][-1]
    assert (facts.lost > 0.5, facts.dtype) == (lost, "bfloat16")
    assert Training(lr=rate).step().lost is None


def test_an_optimiser_that_rounds_at_random_loses_nothing():
    class RoundedAtRandom(torch.optim.AdamW):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.bf16_stochastic_round = True

    assert Training(change=lambda m: m.bfloat16(), lr=1e-5, make=RoundedAtRandom).step().lost is None


def test_what_decay_takes():
    strong, usual = Training(weight_decay=40.0), Training(weight_decay=0.1)
    for training, shrink in ((strong, 0.04), (usual, 1e-4)):
        facts = [training.step() for _ in range(12)][-1]
        assert facts.shrink == pytest.approx(shrink)
        assert (facts.kept_norm < 0.8) is (training is strong)
    coupled = Training(make=torch.optim.SGD, lr=1e-3, weight_decay=5.0).step()
    assert coupled.shrink == 0.0
    assert coupled.coupled > 3
    assert Training(make=torch.optim.SGD, lr=1e-3, weight_decay=5e-4).step().coupled < 0.1


def test_blocks_at_another_rate_and_frozen_ones():
    def groups(model):
        fast = list(model.blocks[2].parameters())
        return [
            {"params": [p for p in model.parameters() if all(p is not f for f in fast)]},
            {"params": fast, "lr": 0.1},
        ]

    facts = Training(groups=groups).step()
    assert facts.moved[2] == pytest.approx(100 * facts.moved[1], rel=0.2)
    assert facts.rates[2] == pytest.approx(0.1)
    frozen = Training(
        change=lambda m: m.blocks[1].requires_grad_(False), groups=lambda m: list(m.blocks[0].parameters())
    )
    frozen.model.requires_grad_(False).blocks[0].requires_grad_(True)
    frozen.watch.before()
    frozen.backward()
    frozen.optimizer.step()
    assert frozen.watch.after(0).relative[1:] == (None, None)


def test_copies_of_a_model_that_is_looked_at_are_free_of_it():
    training = Training(clears="in place")
    training.step()
    training.watch.before()
    for other in (copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))):
        cross_entropy(other(sample_ids()[:, :-1]).flatten(0, 1), sample_ids()[:, 1:].flatten()).backward()
    assert training.watch._fresh == {}
    training.watch.drop()
    assert all(not p._backward_hooks for p in training.model.parameters())


def test_blocks_are_compared_with_what_they_were_two_checks_ago():
    training = Training()
    first, second = training.step(), training.step()
    assert (first.alike, first.since, second.alike, second.since) == ((), None, (), None)
    before = copy.deepcopy(training.model)
    training.step()
    with torch.no_grad():
        for parameter in training.model.blocks[1].parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.std().nan_to_num(1.0))
    facts = training.step()
    assert facts.since == 1
    for block, found in enumerate(facts.alike):
        old, now = (
            torch.cat([p.detach().flatten() for p in model.blocks[block].parameters() if p.dim() > 1]).double()
            for model in (before, training.model)
        )
        assert found == pytest.approx(float(torch.cosine_similarity(old, now, dim=0)), abs=0.02)
    assert abs(facts.alike[1]) < 0.1
    assert min(facts.alike[0], facts.alike[2]) > 0.98
    assert abs(training.step().alike[1]) < 0.1  # against the check before it was re-drawn
    assert training.step().alike[1] > 0.98


def test_parameters_that_are_other_ones_are_compared_with_nothing():
    training = Training()
    for _ in range(3):
        training.step()
    linear = next(m for m in training.model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    training.optimizer.add_param_group({"params": [linear.weight]})
    assert [training.step().since for _ in range(3)] == [None, None, 3]


def test_steps_that_went_back_are_compared_with_nothing():
    training = Training()
    for _ in range(3):
        training.step()
    training.steps = 1
    assert training.step().since is None
