"""Quantisation-aware training: fake quantisers that are off, are switched late, or would follow what is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import peelwise
from audits import Snapshot, tiny_probe
from gguf_files import llama_of_whole_blocks
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.weights.fakes import fake_quantisers
from peelwise.model.weights.table import held
from peelwise.records.run import Measurement
from peelwise.show.words import note_words
from peelwise.tasks.monitor.code_signals import CodeSignals
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

QUICK = QuantcheckSettings(budget=1e-6)


def _of_blocks(model: nn.Module) -> set[str]:
    return {linear.name for block in find_blocks(model) for linear in block.linears}


def _torchao(model: nn.Module, step: str) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.qat import QATConfig

    base = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    names = _of_blocks(llama_of_whole_blocks())
    quantization.quantize_(model, QATConfig(base, step=step), filter_fn=lambda module, name: name in names)
    return model


def _switch(model: nn.Module, names: list[str], on: bool) -> None:
    for name in names:
        model.get_submodule(name).weight_fake_quantizer.enabled = on


def test_quantisers_that_are_off_are_counted_and_named() -> None:
    model = _torchao(llama_of_whole_blocks(), "prepare")
    probe = tiny_probe(in_distribution=True)
    assert len(fake_quantisers(model).on) == 14
    assert not [n for n in peelwise.check(model, probe).record.notes if n.code == "fake-quant-off"]
    off = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    _switch(model, off, False)
    assert fake_quantisers(model).off == tuple(f"{name}.weight_fake_quantizer" for name in off)
    (note,) = [n for n in peelwise.check(model, probe).record.notes if n.code == "fake-quant-off"]
    assert note_words(note).startswith(f"2 of 14 fake quantisers are switched off, such as {off[0]}.weight_fake")
    assert held(model.get_submodule(off[0])) is None
    assert held(model.get_submodule("model.layers.0.mlp.gate_proj")) is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_switching_them_late_is_an_event(compiled: bool) -> None:
    model = _torchao(llama_of_whole_blocks(), "prepare")
    names = sorted(_of_blocks(model))
    _switch(model, names, False)
    watched = torch.compile(model, backend="eager") if compiled else model
    signals = CodeSignals(watched, find_blocks(watched))
    rows = [Measurement(step, "ranking", 2.0, 0.1, 0.01, "??") for step in (10, 20, 30)]
    assert not [e for e in signals.noted(rows[0]).events if e.kind == "fake-quant-switched"]
    _switch(model, names, True)
    (event,) = [e for e in signals.noted(rows[1]).events if e.kind == "fake-quant-switched"]
    assert event.text == "Fake quantisers were switched: 14 are on now and 0 off."
    assert ("The model is compiled" in event.suggestion) == compiled
    assert not [e for e in signals.noted(rows[2]).events if e.kind == "fake-quant-switched"]


def test_a_converted_model_is_the_prepared_one_and_a_stale_one_is_not() -> None:
    prepared = _torchao(llama_of_whole_blocks(), "prepare")
    converted = _torchao(copy.deepcopy(prepared), "convert")
    probe = tiny_probe(in_distribution=True)
    record = peelwise.quantcheck(converted, prepared, probe, QUICK).record
    assert all(layer.error == 0 for layer in record.layers)
    assert record.loss.damage.mean == pytest.approx(0, abs=1e-6)
    with torch.no_grad():  # trained on after it was converted
        for name in _of_blocks(prepared):
            prepared.get_submodule(name).weight.mul_(
                1 + 0.2 * torch.randn(64, generator=torch.Generator().manual_seed(0))[0]
            )
    stale = peelwise.quantcheck(converted, prepared, probe, QUICK).record
    assert all(layer.error > 1e-6 for layer in stale.layers)


def _torch_ao(model: nn.Module) -> nn.Module:
    from torch.ao import quantization

    quantiser = quantization.FakeQuantize.with_args(
        observer=quantization.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0,
    )  # fmt: skip
    config = quantization.QConfig(activation=torch.nn.Identity, weight=quantiser)
    for name in _of_blocks(model):
        owner, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        linear.qconfig = config
        setattr(model.get_submodule(owner), last, torch.ao.nn.qat.Linear.from_float(linear))
    return model


def _computed(module: nn.Module, d_in: int) -> Tensor:
    with torch.no_grad():
        return module(torch.eye(d_in)).T


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_of_torch_ao_are_read_and_keep_their_scales_while_they_are_measured() -> None:
    model = _torch_ao(llama_of_whole_blocks())
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match="has seen no weights yet"):
        held(layer)
    model.train()
    model(torch.arange(40)[None])
    with torch.no_grad():
        layer.weight[3] *= 4  # an observer that runs would widen this row's scale
    before = Snapshot.of(model), layer.weight_fake_quant.scale.clone()
    with untouched(model):
        found = held(layer)
        torch.testing.assert_close(found.weight, _computed(layer, 64), rtol=1e-5, atol=1e-7)
    assert found.format.name == "int8:channel,symmetric,scale=float32"
    peelwise.check(model, tiny_probe(in_distribution=True))
    before[0].assert_unchanged(model)
    assert torch.equal(layer.weight_fake_quant.scale, before[1])
    assert bool(layer.weight_fake_quant.observer_enabled)
    model.eval()(torch.arange(40)[None])  # the control: any other forward pass moves them, in eval mode too
    assert not torch.equal(layer.weight_fake_quant.scale, before[1])
    layer.weight_fake_quant.disable_fake_quant()
    assert held(layer) is None
    assert fake_quantisers(model).off == ("model.layers.0.mlp.up_proj.weight_fake_quant",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_layers_of_torch_ao_are_read_and_round_their_inputs() -> None:
    from torch.ao import quantization

    parent = llama_of_whole_blocks()
    names = _of_blocks(parent)
    quantised = quantization.quantize_dynamic(
        copy.deepcopy(parent), dict.fromkeys(names, quantization.default_dynamic_qconfig)
    )
    layer = quantised.get_submodule("model.layers.0.mlp.up_proj")
    found = held(layer)
    assert found.format.name == "int8:tensor,symmetric,scale=float32"
    assert torch.equal(found.weight, layer.weight().dequantize())
    record = peelwise.quantcheck(quantised, parent, tiny_probe(in_distribution=True), QUICK).record
    assert record.activations == "uint8 per tensor"
    assert all(layer.inputs > 0 for layer in record.layers)
    assert record.loss.as_run != record.loss.quantised


def test_static_layers_of_torch_ao_are_refused() -> None:
    layer = torch.ao.nn.quantized.Linear(8, 4)
    with pytest.raises(UnsupportedModelError, match="inputs are quantised tensors"):
        held(layer)
