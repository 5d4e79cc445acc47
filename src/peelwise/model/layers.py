"""All knowledge of architectures: which modules are the blocks, the linear layers in them, and the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peelwise.distributed.sharding import whole
from peelwise.errors import FormatError, UnsupportedModelError
from peelwise.model.experts import ExpertLinear, layers_of
from peelwise.model.weights.held import Held
from peelwise.model.weights.table import held, is_low_bit


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One linear layer ``y = x W^T + b`` of a block, whatever way its module stores ``W``."""

    name: str  # full name in the model
    module: nn.Module
    transposed: bool  # the module keeps W as [d_in, d_out] (transformers' Conv1D)

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias; then its change has one more column."""
        if isinstance(self.module, ExpertLinear):
            return bool(self.module.stack.bias)
        return isinstance(getattr(self.module, "bias", None), Tensor)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``, for which no weight is looked at where that would take gathering it."""
        module = self.module
        d_out, d_in = module.shape if isinstance(module, ExpertLinear) else self.weight().shape
        return d_out, d_in

    @property
    def is_expert(self) -> bool:
        """Whether it is one expert's matrix in a parameter of all experts."""
        return isinstance(self.module, ExpertLinear)

    @property
    def is_plain(self) -> bool:
        """Whether its module is an ``nn.Linear`` or a Conv1D and nothing else, so that codes can take its place."""
        return type(self.module) is nn.Linear or self.transposed

    @property
    def parameter(self) -> object:
        """What holds the weight: a parameter, of one expert that of all; ``None`` if the weight is made of others."""
        module = self.module
        return module.parameter if isinstance(module, ExpertLinear) else module._parameters.get("weight")

    @property
    def low_bit(self) -> bool:
        """Whether the layer computes with weights of a low-bit format."""
        return is_low_bit(self.module)

    def held(self) -> Held | None:
        """Return codes, scales and format of a low-bit layer, ``None`` for any other; see `peelwise.model.weights`."""
        try:
            return held(self.module)
        except (FormatError, UnsupportedModelError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def weight(self) -> Tensor:
        """Return the weight that the layer computes with, ``[d_out, d_in]``, never to be written.

        A view of the parameter, or what the codes of a low-bit layer stand for.
        """
        found = self.held()
        if found is not None:
            return found.weight
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()

    def whole_weight(self) -> Tensor:
        """Return `weight`, gathered where it is spread over processes, all of which ask at once."""
        return whole(self.weight())

    def whole_bias(self) -> Tensor | None:
        """Return `bias`, gathered where it is spread over processes, all of which ask at once."""
        bias = self.bias()
        return None if bias is None else whole(bias)

    def bias(self) -> Tensor | None:
        """Return the bias ``[d_out]``, or ``None``."""
        bias = getattr(self.module, "bias", None)
        if callable(bias):  # layers of torch.ao hand it out
            bias = bias()
        return bias.detach() if isinstance(bias, Tensor) else None


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block and its linear layers, in the order of their registration.

    ``linears`` are those that are asked about, ``frozen`` those that are left as they are (`peelwise.model.refined`).
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearLayer, ...]
    frozen: tuple[LinearLayer, ...] = ()


def named_embedding(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """Return what a model of transformers calls its input embedding or its output head; ``None`` if it does not say."""
    getter = getattr(model, f"get_{which}_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except NotImplementedError:  # a class of somebody's own that leaves it to be overridden
        return None
    return found if isinstance(found, nn.Module) else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids the input embedding knows, or ``None`` if it cannot be told."""
    embedding = named_embedding(model, "input")
    if embedding is None:
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    size = getattr(embedding, "num_embeddings", None)
    return int(size) if size is not None else None


def context_length(model: nn.Module) -> int | None:
    """Return how many positions a model of transformers is made for, or ``None`` if it does not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper, or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without the part that ``torch.compile``'s wrapper adds."""
    return name.replace("_orig_mod.", "")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that can be audited: ``nn.Linear``, Conv1D, or a low-bit one."""
    return isinstance(module, nn.Linear) or _is_transposed(module) or is_low_bit(module)


def _is_transposed(module: nn.Module) -> bool:
    # By name, so that transformers need not be imported to audit a model that does not use it.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_layers(module: nn.Module, prefix: str) -> Iterator[LinearLayer]:
    """Yield the linear layers inside of a module, those of experts too, named from the model's root."""
    yield from linear_modules(module, prefix)
    for name, child in module.named_modules():
        for parameter, views in layers_of(child).items():
            path = ".".join(part for part in (prefix, plain_name(name), parameter) if part)
            yield from (LinearLayer(f"{path}.{view.index}", view, False) for view in views)


def linear_modules(module: nn.Module, prefix: str) -> Iterator[LinearLayer]:
    """Yield the linear layers that are modules, named from the model's root."""
    # PyTorch's attention reads the weights of its linear layer itself, so a hook there has no effect.
    read = {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, child in module.named_modules():
        if is_linear(child) and id(child) not in read:
            yield LinearLayer(f"{prefix}.{plain_name(name)}", child, _is_transposed(child))


def parameter_count(model: nn.Module) -> int:
    """Return the number of distinct parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


# Apple's GPUs: `peelwise.stats.linalg.solve_dtype` solves in float32 there, but little else can do without.
NO_FLOAT64 = "has no float64, in which losses and sums are added up"


def check_device(model: nn.Module) -> None:
    """Check that a model is on a device that has what measuring needs.

    Raises:
        UnsupportedModelError: If it is on Apple's GPU.
    """
    if device_of(model).type == "mps":
        raise UnsupportedModelError(
            f"Not yet: {type(unwrapped(model)).__name__} is on mps, which {NO_FLOAT64}. Move it to the CPU."
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
