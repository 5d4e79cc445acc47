"""Mixtures of experts: their matrices are linear layers, and running them one by one changes nothing but that."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from peelwise.engine.sweep import block_moments
from peelwise.errors import UnsupportedModelError
from peelwise.model import experts
from peelwise.model.architectures import find_blocks
from peelwise.model.experts import ExpertLinear, experts_called, layers_of
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.splice import spliced
from peelwise.probe.rows import Split
from zoo import BLOCKS, ZOO, sample_ids

MIXTURES = ["mixtral", "gpt-oss"]


def split(sequences: int = 6, length: int = 24) -> Split:
    ids = sample_ids(sequences, length, seed=1)
    return Split(ids, torch.ones_like(ids, dtype=torch.bool))


def mixtures(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if layers_of(module)]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_one_by_one_is_what_the_model_computes_and_nothing_stays(name: str, implementation: str) -> None:
    model, ids = ZOO[name](), sample_ids()
    model.set_experts_implementation(implementation)
    before = [dict(module.__dict__) for module in model.modules()]
    own = model(ids, use_cache=False).logits
    called: list[Tensor] = []
    handle = layers_of(mixtures(model)[0])["gate_up_proj"][0].register_forward_hook(lambda _m, _x, y: called.append(y))
    with experts_called(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, own, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert len(called) == 1
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(model(ids, use_cache=False).logits, own)


@pytest.mark.parametrize("name", MIXTURES)
def test_sums_of_an_expert_are_the_gradient_of_the_mean_loss(name: str) -> None:
    """Divided by all tokens, not by those that were routed to it."""
    model, text = ZOO[name](), split()
    with untouched(model):
        runner = Runner(model, find_blocks(model), micro_batch_tokens=48)  # several micro-batches
        trace = runner.trace(text)
        (moments,), _ = block_moments(
            runner, runner.blocks[-1], trace, [runner.tail_gradients(trace)], keep=True, with_F=True
        )
    logits = model(text.inputs, use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), text.targets.flatten()).backward()
    used = [linear for linear in moments if linear.is_expert]
    assert len(used) > 2
    for linear in used:
        weight = linear.module.weight  # a view, with its part of the gradient
        torch.testing.assert_close(moments[linear].C[:, : weight.shape[1]].float(), weight.grad, rtol=1e-3, atol=1e-6)
        assert 0 < moments[linear].n < text.tokens
        if linear.has_bias:
            ones = moments[linear].S[-1, -1]
            assert float(ones) == pytest.approx(moments[linear].n / text.tokens)


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_a_splice_is_what_the_change_in_the_parameter_does(name: str) -> None:
    model, ids = ZOO[name](), sample_ids()
    linears = [linear for block in find_blocks(model) for linear in block.linears if linear.is_expert]
    changes = {m: torch.randn(m.weight().shape[0], m.weight().shape[1] + m.has_bias) * 0.1 for m in linears}
    with untouched(model):
        before = model(ids, use_cache=False).logits
        with spliced(changes):
            hooked = model(ids, use_cache=False).logits
    for linear, change in changes.items():
        linear.module.weight.add_(change[:, : linear.weight().shape[1]])
        if linear.has_bias:
            linear.module.bias.add_(change[:, -1])
    written = model(ids, use_cache=False).logits  # by the model's own code
    torch.testing.assert_close(hooked, written, rtol=1e-3, atol=1e-3)
    assert float((written - before).abs().max()) > 0.1


def test_experts_that_run_otherwise_than_thought_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: were a kind run by a wrong formula, the self-check would name an expert."""
    model = ZOO["mixtral"]()
    right = experts.KINDS[0]

    def wrong(module: nn.Module, layers: experts.Layers, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return right.run(module, layers, hidden, index, weights.square())

    monkeypatch.setattr(experts, "KINDS", (experts.Kind(right.name, right.stacks, wrong), *experts.KINDS[1:]))
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"hooked into model\.layers\.0\.\S+ does not"):
        self_check(Runner(model, find_blocks(model)), split(1))


def test_views_are_the_same_for_all_and_go_with_the_model() -> None:
    model = ZOO["mixtral"]()
    one, two = find_blocks(model), find_blocks(model)
    assert [m.module for m in one[0].linears] == [m.module for m in two[0].linears]
    twin = copy.deepcopy(model)
    assert find_blocks(twin)[0].linears[-1].module is not one[0].linears[-1].module
    gone = weakref.ref(one[0].linears[-1].module)
    assert isinstance(gone(), ExpertLinear)
    del model, one, two
    gc.collect()
    assert gone() is None


def test_a_copy_made_while_experts_are_called_calls_its_own() -> None:
    model, ids = ZOO["mixtral"](), sample_ids()
    with untouched(model), torch.no_grad():
        twin = copy.deepcopy(model)
        own = twin(ids, use_cache=False).logits
        for linear in find_blocks(twin)[0].linears:
            if linear.is_expert:
                linear.module.weight.mul_(2.0)
        assert not torch.allclose(twin(ids, use_cache=False).logits, own)
        assert torch.allclose(model(ids, use_cache=False).logits, own)


def test_every_block_has_its_experts() -> None:
    blocks = find_blocks(ZOO["mixtral"]())
    assert [sum(linear.is_expert for linear in block.linears) for block in blocks] == [8] * BLOCKS
