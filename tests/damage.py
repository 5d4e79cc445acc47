"""Known faults: every function returns a copy of a model with one block damaged, the model itself untouched.

They read ``model.model.layers`` (Llama and its relatives) and change the weights of ``nn.Linear`` modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Damage = Callable[[nn.Module, int, nn.Module], nn.Module]  # (model, block, earlier model) -> damaged copy

OUTPUT_PROJECTIONS = ("o_proj", "down_proj")  # the two that write into the residual stream


def noise(model: nn.Module, block: int, strength: float, seed: int = 0) -> nn.Module:
    """Add Gaussian noise of ``strength`` standard deviations of each matrix."""
    generator = torch.Generator().manual_seed(seed)
    return _changed(model, block, lambda w: w + strength * w.std() * _normal_like(w, generator))


def reset(model: nn.Module, block: int, seed: int = 0) -> nn.Module:
    """Replace each matrix by a random one of the same standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return _changed(model, block, lambda w: w.std() * _normal_like(w, generator))


def scale(model: nn.Module, block: int, factor: float) -> nn.Module:
    """Multiply every matrix by ``factor``."""
    return _changed(model, block, lambda w: factor * w)


def sign_flip(model: nn.Module, block: int) -> nn.Module:
    """Negate the output projections: it subtracts what it should add; no singular value changes."""
    return _changed(model, block, lambda w: -w, only=OUTPUT_PROJECTIONS)


def round_to_bits(model: nn.Module, block: int, bits: int) -> nn.Module:
    """Round each row to the nearest of ``2**bits - 1`` evenly spaced values, symmetric about zero."""
    if bits < 2:
        raise ValueError(f"a symmetric grid about zero needs at least 2 bits, got {bits}")
    largest = 2 ** (bits - 1) - 1

    def rounded(w: Tensor) -> Tensor:
        step = w.abs().amax(dim=1, keepdim=True) / largest  # [d_out, 1]
        step = step.clamp_min(torch.finfo(w.dtype).tiny)  # a row of zeros stays one
        return (w / step).round() * step

    return _changed(model, block, rounded)


def stale(model: nn.Module, block: int, earlier_model: nn.Module) -> nn.Module:
    """Put back the whole block of an earlier stage."""
    return _replaced(model, block, _layers(earlier_model)[block])


def zero_head(model: nn.Module, block: int, head: int = 0) -> nn.Module:
    """Cut one attention head off: its columns of the output projection are zero."""
    size = _layers(model)[block].self_attn.head_dim
    columns = slice(head * size, (head + 1) * size)

    def cut(w: Tensor) -> Tensor:
        w = w.clone()
        w[:, columns] = 0.0
        return w

    return _changed(model, block, cut, only=("o_proj",))


def permute_neurons(model: nn.Module, block: int, seed: int = 0) -> nn.Module:
    """Permute the inner neurons of the MLP on one side only: every singular value stays, nothing fits."""
    generator = torch.Generator().manual_seed(seed)

    def permuted(w: Tensor) -> Tensor:
        return w[:, torch.randperm(w.shape[1], generator=generator)]

    return _changed(model, block, permuted, only=("down_proj",))


@torch.no_grad()
def shift_gains(model: nn.Module, block: int, shift: float) -> nn.Module:
    """Add ``shift`` times the mean gain to every gain of the block's norms."""
    damaged = copy.deepcopy(model)
    for name, p in _layers(damaged)[block].named_parameters():
        if "norm" in name:
            p.add_(shift * p.mean())
    return damaged


def copy_neighbour(model: nn.Module, block: int) -> nn.Module:
    """Replace the block by a copy of the one before it (of the one behind it, if it is the first)."""
    return _replaced(model, block, _layers(model)[block - 1 if block else 1])


def _layers(model: nn.Module) -> nn.ModuleList:
    return model.model.layers


def _linears(block: nn.Module, only: tuple[str, ...]) -> Iterator[nn.Linear]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and (not only or name.endswith(only)):
            yield module


@torch.no_grad()
def _changed(model: nn.Module, block: int, change: Callable[[Tensor], Tensor], only: tuple[str, ...] = ()) -> nn.Module:
    damaged = copy.deepcopy(model)
    for linear in _linears(_layers(damaged)[block], only):
        linear.weight.copy_(change(linear.weight))
    return damaged


def _replaced(model: nn.Module, block: int, source: nn.Module) -> nn.Module:
    damaged = copy.deepcopy(model)
    # Weights only: a block of transformers knows its own index, which must stay.
    _layers(damaged)[block].load_state_dict(source.state_dict())
    return damaged


def _normal_like(w: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(w.shape, generator=generator, dtype=w.dtype)


# One damage of every kind, by name, all called alike; only "stale" reads the earlier model.
STANDARD: dict[str, Damage] = {
    "noise 0.1": lambda model, block, earlier: noise(model, block, 0.1),
    "noise 0.3": lambda model, block, earlier: noise(model, block, 0.3),
    "noise 0.5": lambda model, block, earlier: noise(model, block, 0.5),
    "stale": stale,
    "scale 0.7": lambda model, block, earlier: scale(model, block, 0.7),
    "scale 1.3": lambda model, block, earlier: scale(model, block, 1.3),
    "reset": lambda model, block, earlier: reset(model, block),
    "sign flip": lambda model, block, earlier: sign_flip(model, block),
    "head zeroed": lambda model, block, earlier: zero_head(model, block),
    "neurons permuted": lambda model, block, earlier: permute_neurons(model, block),
    "gains shifted": lambda model, block, earlier: shift_gains(model, block, 0.5),
    "copy of neighbour": lambda model, block, earlier: copy_neighbour(model, block),
    "3 bits": lambda model, block, earlier: round_to_bits(model, block, 3),
    "2 bits": lambda model, block, earlier: round_to_bits(model, block, 2),
}
