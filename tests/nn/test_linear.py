from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from peelwise.errors import FormatError
from peelwise.formats.table import parse_format
from peelwise.nn import BinaryLinear, IntLinear, QuantizedLinear, TernaryLinear, dense_, quantize_, share_scale_
from zoo import ZOO, sample_ids

LAYERS = [
    lambda: BinaryLinear(12, 5),
    lambda: BinaryLinear(12, 5, form="binary:tensor,band=3", bias=False),
    lambda: TernaryLinear(12, 5),
    lambda: TernaryLinear(12, 5, form="ternary:channel,absmedian"),
    lambda: IntLinear(12, 5),
    lambda: IntLinear(12, 5, form="int2:group=4,affine", dtype=torch.bfloat16),
    lambda: QuantizedLinear(12, 5, form="int3:minimum,keep=2:4"),
]


@pytest.mark.parametrize("make", LAYERS)
def test_forward_uses_the_weights_of_the_format_and_the_gradient_goes_to_the_latent_ones(make) -> None:
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(7, 12, dtype=layer.weight.dtype)
    allowed = layer.format.decode(layer.encoded()).to(x.dtype)
    plain = nn.Linear(12, 5, bias=layer.bias is not None, dtype=x.dtype)
    plain.weight.data, plain.bias = allowed.clone(), layer.bias
    target = torch.randn(7, 5, dtype=x.dtype)
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert not torch.equal(allowed, layer.weight)
    (y - target).square().sum().backward()
    found = layer.weight.grad
    (plain(x) - target).square().sum().backward()
    support = torch.ones(5, 12, dtype=torch.bool) if layer.support is None else layer.support
    torch.testing.assert_close(found, plain.weight.grad * support)
    assert found[support].abs().min() > 0


def test_training_through_the_estimator_learns_what_a_ternary_layer_can_do() -> None:
    torch.manual_seed(0)
    truth = torch.randint(-1, 2, (4, 16)).float() * 0.3
    x = torch.randn(256, 16)
    layer = TernaryLinear(16, 4, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(300):
        loss = (layer(x) - x @ truth.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert torch.equal(layer.encoded().codes.float() * 0.3, truth)


def test_a_diverged_latent_weight_shows() -> None:
    layer = TernaryLinear(12, 5)
    layer.weight.data[2, 3] = math.nan
    assert layer(torch.ones(1, 12)).isnan().any()


def test_the_support_is_fixed_when_the_layer_is_made_and_travels_with_it() -> None:
    torch.manual_seed(0)
    layer = IntLinear(12, 5, form="int4:keep=2:4")
    support = layer.support.clone()
    layer.weight.data = torch.randn(5, 12)  # the largest ones are others now
    assert torch.equal(layer.effective_weight() != 0, support & (layer.effective_weight() != 0))
    other = IntLinear(12, 5, form="int4:keep=2:4")
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.effective_weight(), layer.effective_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "plain"])
def test_quantize_swaps_every_linear_map_but_the_head_and_keeps_the_parameters(name: str) -> None:
    model = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    swapped = quantize_(model, "ternary")
    assert set(swapped) < linears
    assert len(linears - set(swapped)) == 1  # the head
    assert all(isinstance(model.get_submodule(key), TernaryLinear) for key in swapped)
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert model.state_dict().keys() == before.keys()
    quantised = _logits(model)
    by_hand = ZOO[name]()
    with torch.no_grad():
        for key in swapped:
            weight = by_hand.get_submodule(key).weight
            weight.copy_(parse_format("ternary").project(weight))
    torch.testing.assert_close(quantised, _logits(by_hand))
    assert dense_(model) == swapped
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    torch.testing.assert_close(_logits(model), quantised)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model(sample_ids(2, 9))
    return getattr(output, "logits", output)


def test_a_copy_of_a_quantised_model_is_independent() -> None:
    model = ZOO["plain"]()
    quantize_(model, "int2:affine")
    twin = copy.deepcopy(model)
    before = _logits(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2).add_(0.1)
    torch.testing.assert_close(_logits(model), before, rtol=0, atol=0)
    assert not torch.allclose(_logits(twin), before)


def test_layers_can_be_skipped_or_chosen() -> None:
    model = ZOO["llama"]()
    everything = quantize_(ZOO["llama"](), "binary")
    assert len(quantize_(model, "binary", skip=["down_proj"])) == len(everything) - 3
    chosen = quantize_(ZOO["llama"](), "int8", choose=lambda name, linear: "gate" in name or "head" in name)
    assert [name.rpartition(".")[2] for name in chosen] == ["gate_proj"] * 3 + ["lm_head"]


def test_a_format_that_does_not_go_with_a_layer_leaves_the_model_as_it_was() -> None:
    model = ZOO["llama"]()
    with pytest.raises(FormatError, match=r"model.layers.0.self_attn.q_proj: group=32 .* skip="):
        quantize_(model, "int4:group=32")  # 48 inputs
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BinaryLinear(4, 4, form="ternary"), "BinaryLinear cannot train ternary"),
        (lambda: QuantizedLinear(4, 4, form="dense"), "another family"),
        (lambda: IntLinear(4, 4, form="int4:group=3"), "does not divide the 4 inputs"),
        (lambda: quantize_(nn.ReLU(), "binary"), "has no nn.Linear"),
        (lambda: quantize_(nn.Linear(2, 2), "binary"), "itself the layer"),
        (lambda: quantize_(nn.Sequential(nn.Linear(2, 2)), "dense"), "no special layer"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        make()


def test_one_scale_for_the_whole_model_is_the_mean_of_all_weights_on_their_supports() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4, bias=False), nn.Linear(4, 4))
    quantize_(net, "binary:model,blocks=2", choose=lambda name, linear: name != "2")
    layers = [net[0], net[1]]

    def expected() -> torch.Tensor:
        on = [layer.weight.detach()[layer.effective_weight() != 0] for layer in layers]
        assert [len(part) for part in on] == [48, 24]
        return torch.cat(on).abs().mean()

    for _ in range(2):
        for layer in layers:
            used = layer.effective_weight().detach()
            assert used[used != 0].abs().unique().tolist() == [pytest.approx(float(expected()), rel=1e-3)]
        with torch.no_grad():
            net[1].weight.mul_(3)
        before = net[0].effective_weight().detach().clone()
        assert torch.equal(net[0].effective_weight(), before)  # it stays until it is shared anew
        assert share_scale_(net) == ["0", "1"]
        assert float(net[0].effective_weight().detach().abs().max()) > 1.2 * float(before.abs().max())
    alone = BinaryLinear(8, 12, form="binary:tensor,blocks=2")
    assert share_scale_(nn.Sequential(alone)) == []


def test_a_network_with_one_scale_learns_its_own_kind() -> None:
    torch.manual_seed(0)
    truth = [0.25 * torch.randint(0, 2, shape).mul(2).sub(1).float() for shape in ((8, 12), (4, 8))]
    net = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4, bias=False))
    quantize_(net, "binary:model")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 12)
        loss = (net(x) - x @ truth[0].T @ truth[1].T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share_scale_(net)
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert torch.equal(net[0].scales, net[1].scales)
    twin = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4, bias=False))
    quantize_(twin, "binary:model")
    twin.load_state_dict(net.state_dict())
    x = torch.randn(5, 12)
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
