"""The walk over two models, against runs of whole models with the changes written into their weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from audits import runner_of, tiny_probe
from peelwise.engine.in_order import Walk
from zoo import ZOO


def walked(model, probe, change):
    """Walk a model with ``change(linear, group number)`` put in place; return its groups' sums and block distances."""
    runner = runner_of(model)
    trace = runner.trace(probe.fit)
    linears = [linear for block in runner.blocks for linear in block.linears]
    walk = Walk(runner, runner, {linear: linear for linear in linears}, [trace], [trace])
    groups, behind = [], []
    for block in runner.blocks:
        for group, (sums,) in walk.groups(block):
            groups.append(([linear.name for linear in group], sums))
            for linear in group:
                weight = change(linear)
                if weight is not None:
                    D = weight - linear.weight()
                    walk.changes[linear] = nn.functional.pad(D, (0, int(linear.has_bias)))
        behind.append(walk.leave(block)[0])
    return groups, behind, runner


def written(model, weights):
    """Return a copy of the model with other weights, by name."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            made.get_submodule(name).weight.copy_(weight)
    return made


def seen(model, name, ids, *, output=False):
    """Return what a layer is given, or gives, ``[tokens, d]``, float64."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, y: found.append(y if output else a[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0].double().flatten(0, -2)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sums_are_those_of_whole_models(kind):
    model, probe = ZOO[kind](), tiny_probe()
    changed = {}

    def change(linear):
        generator = torch.Generator().manual_seed(len(changed))
        changed[linear.name] = linear.weight() + 0.05 * torch.randn(linear.weight().shape, generator=generator)
        return changed[linear.name]

    groups, behind, runner = walked(model, probe, change)
    ids, done = probe.fit.ids[:, :-1], {}
    assert [name for names, _ in groups for name in names] == list(changed)  # every layer once
    for names, sums in groups:
        own = written(model, done)
        x, z = (seen(each, names[0], ids) for each in (model, own))
        assert torch.allclose(sums.zz.double(), z.T @ z / len(z), rtol=1e-3, atol=1e-5)
        assert torch.allclose(sums.lost.double(), (x - z).T @ z / len(z), rtol=1e-3, atol=1e-5)
        last = names[0].rpartition(".")[2]
        assert (sums.stream is not None) == (last in ("o_proj", "down_proj"))
        if last == "down_proj":  # the gap of the stream behind the block, but for what this layer itself adds
            block = names[0].removesuffix(".mlp.down_proj")
            gap = _behind(model, block, ids) - _behind(own, block, ids)
            gap = gap - (seen(model, names[0], ids, output=True) - seen(own, names[0], ids, output=True))
            assert torch.allclose(sums.stream.double(), gap.T @ z / len(z), rtol=1e-3, atol=1e-5)
        done |= {name: changed[name] for name in names}
    own = written(model, changed)
    for block, found in zip(runner.blocks, behind, strict=True):
        there, here = (_behind(each, block.name, ids) for each in (model, own))
        assert found == pytest.approx(
            float((there - here).square().sum() / (there - there.mean(0)).square().sum()), rel=1e-3
        )


def _behind(model, block, ids):
    found = []
    hook = model.get_submodule(block).register_forward_hook(
        lambda m, a, y: found.append(y[0] if isinstance(y, tuple) else y)
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0].double().flatten(0, -2)


def test_nothing_changed_nothing_lost():
    groups, behind, _ = walked(ZOO["llama"](), tiny_probe(), lambda linear: None)
    assert all(float(sums.lost.abs().max()) == 0 for _, sums in groups)
    assert behind == [0.0] * len(behind)


def test_no_stream_is_made_up_where_blocks_scale_what_they_add():
    """What the MLP writes is halved behind its last layer, so that layer's output is not what is added."""
    model = ZOO["llama"]()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, arguments, y: 0.5 * y)
    groups, _, _ = walked(model, tiny_probe(), lambda linear: linear.weight() * 1.01)
    assert all(sums.stream is None for _, sums in groups)
