"""Effective weights and codes of low-bit modules: each is checked against what the module itself computes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from peelwise.errors import FormatError, UnsupportedModelError
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.layers import is_linear
from peelwise.model.weights.table import held, hold_
from peelwise.nn import BinaryLinear, IntLinear, TernaryLinear, quantize_
from zoo import ZOO


def _computed(module: nn.Module, d_in: int) -> Tensor:
    """The weight that a module computes with, found by running it on the identity."""
    bias = getattr(module, "bias", None)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        y = module(torch.eye(d_in))
    return (y if bias is None else y - bias).T


@pytest.mark.parametrize(
    "make",
    [
        lambda: BinaryLinear(32, 6),
        lambda: TernaryLinear(32, 6, bias=False),
        lambda: IntLinear(32, 6, form="int3:group=8,minimum"),
    ],
)
def test_layers_of_our_own_are_read(make) -> None:
    torch.manual_seed(0)
    module = make()
    found = held(module)
    assert found.format == module.format
    torch.testing.assert_close(found.weight, _computed(module, 32))
    assert found.latent.data_ptr() == module.weight.data_ptr()


class _Scaled(nn.Module):
    """Somebody's own layer that follows the protocol without handing out codes."""

    format = "int3:group=8"

    def __init__(self) -> None:
        super().__init__()
        self.codes = torch.randint(-4, 4, (6, 32)).float()
        self.scales = torch.rand(6, 4) + 0.1

    def effective_weight(self) -> Tensor:
        return self.codes * self.scales.repeat_interleave(8, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.effective_weight().T


def test_any_module_that_follows_the_protocol_is_read() -> None:
    torch.manual_seed(0)
    module = _Scaled()
    assert is_linear(module)
    found = held(module)
    torch.testing.assert_close(found.weight, _computed(module, 32), rtol=2e-3, atol=1e-5)
    assert found.latent is None
    module.format = "int2:group=8"
    with pytest.raises(FormatError, match="do not obey int2:group=8"):
        held(module)


def test_plain_modules_hold_nothing_low_bit() -> None:
    assert held(nn.Linear(3, 4)) is None
    assert held(nn.ReLU()) is None


def _bitnet(kind: str, **options: object) -> nn.Module:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    return getattr(bitnet, kind)(32, 8, bias=True, dtype=torch.float32, **options)


def test_bitnet_layers_in_training_are_read() -> None:
    torch.manual_seed(0)
    module = _bitnet("AutoBitLinear", online_quant=True)
    found = held(module)
    torch.testing.assert_close(found.weight, _computed(module, 32), rtol=1e-5, atol=1e-6)
    assert set(found.encoded.codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(found.latent, module.weight)


def test_bitnet_layers_with_stored_codes_are_read() -> None:
    torch.manual_seed(0)
    module = _bitnet("AutoBitLinear")
    module.weight.data = torch.randint(-1, 2, (8, 32)).float()
    module.weight_scale.fill_(0.37)
    with torch.no_grad():
        module.bias.zero_()  # this layer scales its bias too
    found = held(module)
    torch.testing.assert_close(found.weight, _computed(module, 32))
    module.weight.data[0, 0] = 0.5
    with pytest.raises(FormatError, match="codes -1, 0 and 1"):
        held(module)


def test_packed_bitnet_layers_are_read() -> None:
    torch.manual_seed(0)
    module = _bitnet("BitLinear")
    codes = torch.randint(-1, 2, (8, 32))
    from transformers.integrations.bitnet import pack_weights

    module.weight = pack_weights(codes.clone().float())
    module.weight_scale.fill_(2.5)
    assert is_linear(module)
    found = held(module)
    assert torch.equal(found.encoded.codes, codes.to(torch.int8))
    torch.testing.assert_close(found.weight, _computed(module, 32))


def test_bitnet_layers_with_a_norm_inside_are_declined() -> None:
    with pytest.raises(UnsupportedModelError, match="norm inside"):
        held(_bitnet("AutoBitLinear", online_quant=True, use_rms_norm=True))


def _torchao_configs() -> list[object]:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    mapping = pytest.importorskip("torchao.quantization.quant_primitives").MappingType
    intx = quantization.IntxWeightOnlyConfig
    return [
        quantization.Int8WeightOnlyConfig(),
        intx(weight_dtype=torch.int4, granularity=granularity.PerGroup(16)),
        intx(weight_dtype=torch.int4, granularity=granularity.PerGroup(16), mapping_type=mapping.ASYMMETRIC),
        intx(weight_dtype=torch.int2, granularity=granularity.PerAxis(0)),
    ]


def _torchao_layer(number: int) -> nn.Module:
    config = _torchao_configs()[number]
    from torchao.quantization import quantize_ as torchao_quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    torchao_quantize_(model, config)
    return model[0]


@pytest.mark.parametrize("number", range(4))
def test_torchao_weights_are_read(number: int) -> None:
    layer = _torchao_layer(number)
    found = held(layer)
    expected = ("int8:channel,symmetric", "int4:group=16,symmetric", "int4:group=16,affine", "int2:channel,symmetric")
    assert found.format.name == f"{expected[number]},scale=float32"
    torch.testing.assert_close(found.weight, _computed(layer, 32), rtol=1e-4, atol=1e-5)


def _assert_takes_codes(module: nn.Module) -> None:
    """Half of its codes negated and a scale doubled: the module then computes with just that."""
    found = held(module)
    encoded, form = found.encoded, found.format
    codes = encoded.codes.clone()
    if encoded.zeros is None:
        codes[:, ::2] *= -1
    else:
        codes[:, ::2] = codes[:, ::2].flip(0)
    other = replace(encoded, codes=codes, scales=2 * encoded.scales)
    assert not torch.equal(form.decode(other), found.weight)
    hold_(module, other)
    torch.testing.assert_close(held(module).weight, form.decode(other))
    torch.testing.assert_close(_computed(module, 32), form.decode(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
def test_torchao_weights_take_other_codes(number: int) -> None:
    layer = _torchao_layer(number)
    layer.weight.qdata.clamp_(min=layer.weight.qdata.min() + 1)  # the lowest code has no opposite
    _assert_takes_codes(layer)


@pytest.mark.parametrize("kind", ["BitLinear", "AutoBitLinear"])
def test_bitnet_layers_take_other_codes(kind: str) -> None:
    torch.manual_seed(0)
    module = _bitnet(kind)
    codes = torch.randint(-1, 2, (8, 32)).float()
    if kind == "BitLinear":
        from transformers.integrations.bitnet import pack_weights

        module.weight = pack_weights(codes)
    else:
        module.weight.data = codes
    module.weight_scale.fill_(0.37)
    with torch.no_grad():
        module.bias.zero_()
    _assert_takes_codes(module)


def test_modules_that_derive_or_hide_their_codes_take_none() -> None:
    module = _bitnet("AutoBitLinear", online_quant=True)
    with pytest.raises(UnsupportedModelError, match="online mode takes its scale from its latent weights"):
        hold_(module, held(module).encoded)
    scaled = _Scaled()
    with pytest.raises(UnsupportedModelError, match="_Scaled cannot be given other codes"):
        hold_(scaled, held(scaled).encoded)


@pytest.mark.parametrize("symmetric", [True, False])
def test_torchao_layers_in_training_are_read(symmetric: bool) -> None:
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import quantize_ as torchao_quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=16, is_symmetric=symmetric)
    torchao_quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))
    model[0].weight.data[:, 16:] += 0.2  # so that the zero points are not all the same
    found = held(model[0])
    assert found.format.name.startswith("int4:group=16")
    torch.testing.assert_close(found.weight, _computed(model[0], 32), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.latent, model[0].weight)


def test_other_weights_of_torchao_are_declined_by_name() -> None:
    class Packed(Tensor):
        pass

    Packed.__module__ = "torchao.somewhere"
    with pytest.raises(UnsupportedModelError, match="Not yet: torchao weights stored as Packed"):
        held(_with_weight(torch.ones(2, 2).as_subclass(Packed)))
    Packed.__name__ = "IntxUnpackedToInt8Tensor"
    weight = torch.ones(2, 2).as_subclass(Packed)
    weight.__dict__.update(vars(SimpleNamespace(qdata=torch.zeros(2, 2), scale=torch.ones(2, 1), zero_point=None)))
    weight.__dict__.update(target_dtype="torch.int1", block_size=(1, 2))
    with pytest.raises(UnsupportedModelError, match="int1"):
        held(_with_weight(weight))


def _with_weight(weight: Tensor) -> nn.Module:
    module = nn.Linear(2, 2, bias=False)
    del module.weight
    module.weight = weight
    return module


def test_maps_of_a_quantised_model_are_found_with_their_effective_weights() -> None:
    model = ZOO["llama"]()
    plain = {linear.name: linear.weight().clone() for block in find_blocks(model) for linear in block.linears}
    quantize_(model, "ternary")
    found = {linear.name: linear for block in find_blocks(model) for linear in block.linears}
    assert found.keys() == plain.keys()
    for name, linear in found.items():
        assert linear.low_bit
        torch.testing.assert_close(linear.weight(), parse_format("ternary").project(plain[name]))


def test_a_map_that_holds_something_else_is_named() -> None:
    model = ZOO["llama"]()
    quantize_(model, "int4:group=8")
    linear = find_blocks(model)[1].linears[2]
    linear.module.effective_weight = lambda: linear.module.weight.detach()
    with pytest.raises(FormatError, match=rf"{linear.name}: The weights do not obey int4:group=8"):
        linear.weight()
