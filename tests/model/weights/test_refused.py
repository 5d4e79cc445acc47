"""Layers whose packed weights are not read: refused by name, never measured as if bytes were weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peelwise.api.allocate import allocate
from peelwise.api.audit import audit
from peelwise.api.check import check
from peelwise.api.quantise import quantise
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks
from peelwise.model.layers import is_linear
from peelwise.model.weights.refused import KNOWN, refusal
from peelwise.model.weights.table import held, unread
from peelwise.probe.probe import Probe
from zoo import ZOO


class Packed(nn.Linear):
    """Somebody's subclass that computes well, and whose weight is not the matrix."""

    def __init__(self, like: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        codes = (like.weight.detach() * 100).round().clamp(-100, 100)
        self.weight = nn.Parameter(codes.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() / 100).T


class Wrapped(Tensor):
    """A weight of somebody's tensor class, which says that it is float32."""


def _wrapped(like: nn.Linear) -> nn.Linear:
    layer = nn.Linear(like.in_features, like.out_features, bias=False)
    del layer.weight
    layer.weight = like.weight.detach().as_subclass(Wrapped)
    return layer


def _in_floats(like: nn.Linear) -> nn.Module:
    """Two codes to a byte, two bytes to a bfloat16: numbers by their dtype, and not of the matrix's shape."""

    class Stored16(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ like.weight.detach().T

    layer = Stored16(like.in_features, like.out_features, bias=False)
    codes = torch.randint(0, 64, (like.weight.numel() // 2, 1), dtype=torch.uint8)  # no NaN among them
    layer.weight = nn.Parameter(codes.view(-1, 2).view(torch.bfloat16))
    return layer


def _hqq(like: nn.Linear) -> nn.Module:
    """Not even a subclass of nn.Linear, its codes a plain attribute."""

    class HQQLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = like.in_features, like.out_features
            self.W_q = (like.weight.detach() * 100).to(torch.uint8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ like.weight.detach().T

    return HQQLinear()


def _gptq(like: nn.Linear) -> nn.Module:
    class MarlinQuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = like.in_features, like.out_features
            self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ like.weight.detach().T

    return MarlinQuantLinear()


def _scheme(like: nn.Linear) -> nn.Module:
    """An ordinary layer whose forward pass rounds its weight, as compressed-tensors leaves one before it is saved."""
    layer = nn.Linear(like.in_features, like.out_features, bias=False)
    layer.load_state_dict({"weight": like.weight.detach()})
    layer.quantization_scheme = object()
    return layer


STUBS: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "int8": (lambda like: Packed(like, torch.int8), "Packed keeps its weights packed, weight as int8"),
    "uint8": (lambda like: Packed(like, torch.uint8), "Packed keeps its weights packed, weight as uint8"),
    "float8": (lambda like: Packed(like, torch.float8_e4m3fn), "weight as float8_e4m3fn"),
    "a tensor class": (_wrapped, "weight as Wrapped of model"),
    "bytes in bfloat16": (_in_floats, r"Stored16 keeps its weights packed, weight of shape \(\d+, 1\) instead of"),
    "HQQ": (_hqq, r"HQQLinear \(HQQ\) keeps its weights packed, W_q as uint8.*Save its dequantised weights"),
    "compressed-tensors": (_scheme, r"Linear \(compressed-tensors\) rounds its weights as it runs"),
    "GPTQ": (_gptq, r"MarlinQuantLinear \(GPTQ or AWQ .*qweight as int32.*Give peelwise the checkpoint folder"),
}


def _model(make: Callable[[nn.Linear], nn.Module]) -> tuple[nn.Module, str]:
    model = ZOO["llama"]().eval()
    name = "model.layers.1.mlp.up_proj"
    owner = model.get_submodule(name.rpartition(".")[0])
    owner.up_proj = make(owner.up_proj)
    return model, name


@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize("product", [audit, check, quantise, allocate])
def test_no_product_measures_bytes(stub: str, product: Callable[..., object]) -> None:
    make, said = STUBS[stub]
    model, name = _model(make)
    ids = torch.randint(0, 90, (24, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModelError, match=rf"{name}: .*{said}"):
        product(model, Probe.from_tokens(ids, in_distribution=True))
    by_name = {linear.name: linear for block in find_blocks(model) for linear in block.linears}
    with pytest.raises(UnsupportedModelError, match=rf"{name}: Not yet: .*{said}"):
        by_name[name].weight()


class Scaled(nn.Linear):
    """A subclass with plain weights, and a table of integers that is none."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(4, 4, dtype=torch.int64))


class Weightless(nn.Module):
    """A norm with a plain tensor in the place of a weight, as Falcon Mamba's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(4), persistent=False)


PLAIN = [nn.Linear(3, 4), nn.Linear(3, 4).bfloat16(), Scaled(), Weightless(), nn.Embedding(3, 4), nn.ReLU()]


@pytest.mark.parametrize("module", [*PLAIN, nn.LayerNorm(4)])
def test_plain_modules_are_not_refused(module: nn.Module) -> None:
    assert refusal(module) is None
    assert unread(module) is None
    assert held(module) is None


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row[0])
def test_each_known_class_has_a_remedy_and_no_layer_of_ours_is_one(row: tuple[str, str, str]) -> None:
    layer = type(row[0], (nn.Linear,), {})(4, 4)
    assert refusal(layer) is None  # the class alone says nothing: its weights are numbers
    layer.weight = nn.Parameter(torch.ones(4, 2, dtype=torch.uint8), requires_grad=False)
    assert refusal(layer).startswith(f"{row[0]} ({row[1]}) keeps its weights packed, weight as uint8")
    assert refusal(layer).endswith(f"{row[2]}.")
    assert is_linear(layer)
