"""From the values of linear layers to one of the block."""

import pytest
import torch
import torch.nn.functional as F

from peelwise.engine.signals import (
    LayerSums,
    expert_entropy,
    expert_load,
    experts_used,
    gradient_agreement,
    input_rank,
    layer_slope,
    of_block,
    of_layer,
    of_weight,
    routed,
    weight_norm,
)
from peelwise.engine.sweep import block_moments
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.probe.rows import Split
from peelwise.records.signals import SIGNALS, Signal
from zoo import ZOO, sample_ids


def value(of):
    return of


@pytest.mark.parametrize(
    ("over_layers", "values", "expected"),
    [
        ("sum", [9.0, 16.0], 25.0),
        ("root of sum", [9.0, 16.0], 5.0),
        ("mean", [9.0, 16.0], 12.5),
        ("largest", [9.0, 16.0], 16.0),
        ("mean", [None, 4.0], 4.0),  # a layer that has none counts for nothing
        ("sum", [None, None], None),
    ],
)
def test_a_blocks_value_from_those_of_its_layers(monkeypatch, over_layers, values, expected):
    signal = Signal("dummy", "", "", "", kind="model", function=f"{__name__}:value", over_layers=over_layers)
    monkeypatch.setitem(SIGNALS, "dummy", signal)
    found = of_block(["model"], [of_layer(["model"], each) for each in values])
    assert found.get("dummy") == expected


def test_signals_of_experts_are_those_of_a_count_and_tell_dead_ones() -> None:
    model, ids = ZOO["mixtral"](), sample_ids(6, 24)
    # Two of four experts are told to be the only ones: no token reaches the others.
    gate = model.model.layers[-1].mlp.gate.weight.data
    gate[2:] = 0.0
    seen: list[torch.Tensor] = []
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(Split(ids, torch.ones_like(ids, dtype=torch.bool)))
        handle = model.model.layers[-1].mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
        above = [runner.tail_gradients(trace)]
        (moments,), _ = block_moments(runner, runner.blocks[-1], trace, above, keep=True, with_F=False)
        handle.remove()
    counts = torch.bincount(torch.cat([each.flatten() for each in seen[-1:]]), minlength=4).double()
    p = counts / counts.sum()
    found = routed(runner.blocks[-1], moments)
    sums = [LayerSums(m, moments[m], moments[m], *[None] * 5, each) for m, each in found.items()]
    assert max(filter(None, map(expert_load, sums))) == pytest.approx(float(p.max()) * 4)
    assert sum(filter(None, map(experts_used, sums))) == pytest.approx(float((p > 0).double().mean()))
    entropy = float(-(p[p > 0] * p[p > 0].log()).sum() / torch.tensor(4.0).log())
    assert sum(filter(None, map(expert_entropy, sums))) == pytest.approx(entropy, rel=1e-5)
    assert entropy < 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # without biases and plain; with them and transposed
def test_signals_of_a_sweep_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    model, ids = ZOO[name](), sample_ids(6, 24)
    split = Split(ids, torch.ones_like(ids, dtype=torch.bool))
    block = find_blocks(model)[-1]
    linear = block.linears[-1]
    inputs: list[torch.Tensor] = []
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(split)
        above = [runner.tail_gradients(trace)]
        (moments,), _ = block_moments(runner, block, trace, above, keep=True, with_F=False)
    of = moments[linear]
    sums = LayerSums(linear, of, of, *[None] * 6, of_weight(linear, of))

    def loss(factor: float) -> float:
        def scaled(_module, args, y):
            bias = linear.bias()
            return y * factor if bias is None else (y - bias) * factor + bias

        handle = linear.module.register_forward_hook(scaled)
        kept = linear.module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
        with torch.no_grad():
            logits = model.double()(ids).logits[:, :-1]
            found = float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        handle.remove()
        kept.remove()
        return found

    slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4
    assert layer_slope(sums) == pytest.approx(abs(slope), rel=1e-2)  # the model's norms are in float32
    x = inputs[0][:, :-1].reshape(-1, inputs[0].shape[-1])
    if linear.bias() is not None:
        x = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    spectrum = torch.linalg.svdvals(x).square()
    assert input_rank(sums) == pytest.approx(float(spectrum.sum() ** 2 / spectrum.square().sum()), rel=1e-3)
    assert weight_norm(sums) == pytest.approx(float(linear.module.weight.detach().double().norm()) ** 2, rel=1e-5)
    assert gradient_agreement(sums) == pytest.approx(1.0)
