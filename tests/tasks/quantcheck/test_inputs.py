"""Quantised inputs beside quantised weights: told apart in every layer and in the loss."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peelwise
from audits import Snapshot, tiny_probe
from gguf_files import llama_of_whole_blocks
from packed_files import CASES, write_packed
from peelwise.errors import OptionError
from peelwise.formats import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.weights.activations import InputRounding
from peelwise.nn import quantize_
from peelwise.show.quantcheck.words import activations
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

QUICK = QuantcheckSettings(budget=1e-6)
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }
    },
}


class Slow(nn.Module):
    """One token at a time: the scale that clips nothing, and the nearest of 256 codes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:-1], len(self.weight))
        for at in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).tolist():
            row = x[tuple(at)]
            scale = max(float(row.max()) / 127, float(row.min()) / -128)
            codes = torch.floor(row / scale + 0.5).clamp(-128, 127)
            out[tuple(at)] = (codes * scale) @ self.weight.T
        return out


def _loss(model: nn.Module, part) -> float:
    with torch.no_grad():
        logits = model(part.ids[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.ids[:, 1:].flatten()))


def test_a_folder_that_says_so_is_measured_with_rounded_inputs_too(tmp_path: Path) -> None:
    parent = llama_of_whole_blocks()
    expected = write_packed(parent, tmp_path, CASES["int-quantized"][0], W8A8)
    probe = tiny_probe(in_distribution=True)
    record = peelwise.quantcheck(tmp_path, parent, probe, QUICK).record
    plain = llama_of_whole_blocks()
    plain.load_state_dict(expected)
    assert record.loss.quantised == pytest.approx(_loss(plain, probe.report), abs=1e-5)
    for linear in (linear for block in find_blocks(plain) for linear in block.linears):
        owner, _, last = linear.name.rpartition(".")
        setattr(plain.get_submodule(owner), last, Slow(linear.weight()))
    assert record.loss.as_run == pytest.approx(_loss(plain, probe.report), abs=1e-5)
    assert record.loss.activations.mean == pytest.approx(record.loss.as_run - record.loss.quantised, abs=1e-9)
    assert record.activations == "int8:channel,symmetric,scale=float32"
    assert all(0 < layer.inputs < 1e-3 for layer in record.layers)
    assert activations(record)[0].startswith("Quantised inputs (int8:channel,symmetric,scale=float32)")


def test_without_them_nothing_is_said(tmp_path: Path) -> None:
    parent = llama_of_whole_blocks()
    write_packed(parent, tmp_path, CASES["int-quantized"][0], W8A8)
    settings = QuantcheckSettings(budget=1e-6, activations="none")
    record = peelwise.quantcheck(tmp_path, parent, tiny_probe(in_distribution=True), settings).record
    assert record.loss.as_run is None
    assert record.activations is None
    assert all(layer.inputs is None for layer in record.layers)
    assert activations(record) == []


def _with_outliers(model: nn.Module) -> nn.Module:
    """The same function, one channel of the normed stream 100 times as large: weights there are 100 times as small."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[3] *= 100
                for reader in readers:
                    reader.weight[:, 3] /= 100
    return model


def test_an_outlier_channel_is_damage_of_inputs_and_not_of_weights() -> None:
    parent = _with_outliers(llama_of_whole_blocks())
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int8:group=32")
    before = Snapshot.of(quantised)
    probe = tiny_probe(in_distribution=True)
    settings = QuantcheckSettings(budget=1e-6, activations="int8:channel")
    record = peelwise.quantcheck(quantised, parent, probe, settings).record
    before.assert_unchanged(quantised)
    reads_the_norm = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for layer in record.layers:
        if layer.name.rpartition(".")[2] in reads_the_norm:
            assert layer.inputs > 5 * layer.error
        else:
            assert layer.inputs < 5 * layer.error  # the control: their inputs have no such channel
    said = activations(record)
    assert "Their rounding changes the output more than that of the weights does in" in said[1]
    calm = llama_of_whole_blocks()
    other = copy.deepcopy(calm)
    quantize_(other, "int8:group=32")
    control = peelwise.quantcheck(other, calm, probe, settings).record
    assert max(layer.inputs for layer in control.layers) < min(
        layer.inputs for layer in record.layers if layer.name.rpartition(".")[2] in reads_the_norm
    )


@pytest.mark.parametrize("config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_layers_of_torchao_round_their_inputs_themselves(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    parent = llama_of_whole_blocks()
    quantised = copy.deepcopy(parent)
    only = {linear.name for block in find_blocks(parent) for linear in block.linears}
    quantization.quantize_(quantised, getattr(quantization, config)(), filter_fn=lambda module, name: name in only)
    probe = tiny_probe(in_distribution=True)
    record = peelwise.quantcheck(quantised, parent, probe, QUICK).record
    assert record.loss.as_run == pytest.approx(_loss(quantised, probe.report), abs=1e-5)
    plain = copy.deepcopy(parent)
    with torch.no_grad():
        for name in only:
            plain.get_submodule(name).weight.copy_(quantised.get_submodule(name).weight.dequantize())
    assert record.loss.quantised == pytest.approx(_loss(plain, probe.report), abs=1e-5)
    assert record.loss.as_run != record.loss.quantised
    assert record.activations.startswith("int8")
    assert all(layer.inputs > 0 for layer in record.layers)
    with pytest.raises(OptionError, match="round their inputs themselves"):
        peelwise.quantcheck(quantised, parent, probe, QuantcheckSettings(budget=1e-6, activations="int8:channel"))


def test_columns_of_outliers_stay_and_fixed_scales_are_used() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1, 3] = 9.0
    kept = InputRounding(parse_format("int8:channel"), outliers=6.0)(x)
    assert torch.equal(kept[..., 3], x[..., 3])
    assert not torch.equal(kept[..., 2], x[..., 2])
    all_rounded = InputRounding(parse_format("int8:channel"))(x)
    row = (kept - x).abs()[0, 1], (all_rounded - x).abs()[0, 1]
    assert row[0].max() < row[1].max()  # the outlier no longer widens its token's steps
    fixed = InputRounding(parse_format("int8:tensor,scale=float32"), torch.tensor(0.1))(x)
    torch.testing.assert_close(fixed, (x / 0.1 + 0.5).floor().clamp(-128, 127) * 0.1)
