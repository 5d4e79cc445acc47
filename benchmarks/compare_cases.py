"""Known changes to one block of SmolLM2-135M, by kind, and what a comparison should call them.

The two halves were fixed before anything was measured: thresholds were looked at on the first half alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Alter = Callable[[nn.Module, int], nn.Module]  # (model, block) -> altered copy, or a module with hooks


@dataclass(frozen=True)
class Known:
    """One kind of change; ``kind`` is the code that is right."""

    name: str
    kind: str
    alter: Alter
    held_back: bool = False


def _generator(block: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + block)


def _normal(w: Tensor, block: int) -> Tensor:
    return torch.randn(w.shape, generator=_generator(block), dtype=torch.float32).to(w.dtype)


@torch.no_grad()
def changed(change: Callable[[Tensor, int], Tensor], *only: str, vectors: bool = False) -> Alter:
    """Return what changes the matrices (or vectors) of a block, those whose names hold one of ``only``."""

    def alter(model: nn.Module, block: int) -> nn.Module:
        altered = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in altered.model.layers[block].named_parameters():
                if (p.dim() == 1) == vectors and (not only or any(part in name for part in only)):
                    p.copy_(change(p.detach().clone(), block))
        return altered

    return alter


def _low_rank_update(rank: int, relative: float) -> Callable[[Tensor, int], Tensor]:
    def update(w: Tensor, block: int) -> Tensor:
        g = _generator(block)
        d = torch.randn(w.shape[0], rank, generator=g) @ torch.randn(rank, w.shape[1], generator=g)
        return w + relative * w.norm() / d.norm() * d

    return update


def _truncated(rank: int) -> Callable[[Tensor, int], Tensor]:
    def cut(w: Tensor, block: int) -> Tensor:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    return cut


def _bits(bits: int, group: int | None = None) -> Callable[[Tensor, int], Tensor]:
    largest = 2 ** (bits - 1) - 1

    def rounded(w: Tensor, block: int) -> Tensor:
        rows = w.reshape(-1, group or w.shape[1])
        step = rows.abs().amax(dim=1, keepdim=True) / largest
        return ((rows / step).round() * step).reshape(w.shape)

    return rounded


def _permuted_columns(w: Tensor, block: int) -> Tensor:
    return w[:, torch.randperm(w.shape[1], generator=_generator(block))]


def _permuted_rows(w: Tensor, block: int) -> Tensor:
    return w[torch.randperm(w.shape[0], generator=_generator(block))]


def _rotary_layout(w: Tensor, block: int) -> Tensor:
    """Interleave the two halves of every head, as converters between rotary conventions do."""
    return w.reshape(-1, 2, 32, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _heads(w: Tensor, heads: range, factor: float) -> Tensor:
    """Multiply columns of the output projection that belong to some heads."""
    w[:, heads.start * 64 : heads.stop * 64] *= factor
    return w


def _pruned(w: Tensor, block: int) -> Tensor:
    return torch.where(w.abs() < w.abs().median(), 0.0, w)


def _block_of(step: int) -> Alter:
    def alter(model: nn.Module, block: int) -> nn.Module:
        altered = copy.deepcopy(model)
        source = block - step if block >= step else block + step
        altered.model.layers[block].load_state_dict(model.model.layers[source].state_dict())
        return altered

    return alter


def _norms_of_neighbour(model: nn.Module, block: int) -> nn.Module:
    altered = copy.deepcopy(model)
    source = dict(model.model.layers[block - 1 if block else 1].named_parameters())
    with torch.no_grad():
        for name, p in altered.model.layers[block].named_parameters():
            if "norm" in name:
                p.copy_(source[name])
    return altered


def _epsilon(model: nn.Module, block: int) -> nn.Module:
    altered = copy.deepcopy(model)
    altered.model.layers[block].input_layernorm.variance_epsilon = 1.0
    return altered


def _int8_activations(model: nn.Module, block: int) -> nn.Module:
    altered = copy.deepcopy(model)

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = args[0].abs().amax(dim=-1, keepdim=True) / 127
        return ((args[0] / step).round() * step, *args[1:])

    for module in altered.model.layers[block].modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounded)
    return altered


def _as(dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    return lambda w, block: w.to(dtype).to(w.dtype)


def _rows_scaled(w: Tensor, block: int) -> Tensor:
    return w * (0.5 + torch.rand(w.shape[0], 1, generator=_generator(block)))


def _noise(strength: float) -> Callable[[Tensor, int], Tensor]:
    return lambda w, block: w + strength * w.std() * _normal(w, block)


DEVELOPMENT = (
    Known("noise 0.3", "noise", changed(_noise(0.3))),
    Known("scale 1.3", "scale", changed(lambda w, block: 1.3 * w)),
    Known("reset", "re-drawn", changed(lambda w, block: w.std() * _normal(w, block))),
    Known("outputs negated", "sign", changed(lambda w, block: -w, "o_proj", "down_proj")),
    Known("update of rank 8", "low-rank", changed(_low_rank_update(8, 0.1))),
    Known("truncated to 64", "truncated", changed(_truncated(64))),
    Known("neurons permuted on one side", "permutation", changed(_permuted_columns, "down_proj")),
    Known("3 bits", "lattice", changed(_bits(3))),
    Known("one head zeroed", "zeroed", changed(lambda w, b: _heads(w, range(2, 3), 0.0), "o_proj")),
    Known("copy of neighbour", "copied", _block_of(1)),
    Known("norm's epsilon", "config-or-code", _epsilon),
    Known("bfloat16", "rounding", changed(_as(torch.bfloat16))),
)
HELD_BACK = tuple(
    Known(name, kind, alter, held_back=True)
    for name, kind, alter in (
        ("noise 0.1", "noise", changed(_noise(0.1))),
        ("every weight times noise", "noise", changed(lambda w, b: w * (1 + 0.2 * _normal(w, b)))),
        ("scale 0.7", "scale", changed(lambda w, block: 0.7 * w)),
        ("attention temperature", "scale", changed(lambda w, block: 0.5 * w, "q_proj")),
        ("rows scaled one by one", "scale", changed(_rows_scaled, "down_proj")),
        ("one head doubled", "scale", changed(lambda w, b: _heads(w, range(4, 5), 2.0), "o_proj")),
        ("MLP re-drawn small", "re-drawn", changed(lambda w, b: 0.003 * _normal(w, b), "mlp")),
        ("queries negated", "sign", changed(lambda w, block: -w, "q_proj")),
        ("update of rank 32", "low-rank", changed(_low_rank_update(32, 0.3))),
        ("truncated to 256", "truncated", changed(_truncated(256))),
        ("rotary layout", "permutation", changed(_rotary_layout, "q_proj", "k_proj")),
        ("rows of up shuffled", "permutation", changed(_permuted_rows, "up_proj")),
        ("2 bits", "lattice", changed(_bits(2))),
        ("3 bits in groups of 32", "lattice", changed(_bits(3, 32))),
        ("four heads zeroed", "zeroed", changed(lambda w, b: _heads(w, range(3, 7), 0.0), "o_proj")),
        ("half of the MLP pruned", "zeroed", changed(_pruned, "mlp")),
        ("block of four before", "copied", _block_of(4)),
        ("gains of a neighbour", "copied", _norms_of_neighbour),
        ("gains shifted", "shifted", changed(lambda v, b: v + 0.5 * v.mean(), vectors=True)),
        ("activations of eight bits", "config-or-code", _int8_activations),
        ("float8", "rounding", changed(_as(torch.float8_e4m3fn))),
    )
)
BLOCKS = (0, 6, 19, 29)


def cases(blocks: Iterable[int] = BLOCKS) -> Iterator[tuple[Known, int]]:
    """Yield every kind at every block, one block after the other, the development half of the kinds first."""
    for block in blocks:
        for known in (*DEVELOPMENT, *HELD_BACK):
            yield known, block
