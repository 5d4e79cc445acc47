"""How well a block's matrices are told by those of other blocks, and the null controls of that.

All of it follows from inner products of the blocks' matrices, ``G_ij = <W_i, W_j>``, an ``L x L`` matrix per kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.engine.session import Changes
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import Parts
from peelwise.records.anatomy import Explained, Predictability

SHUFFLES = 500
RIDGE = 1e-2  # of the mean squared norm
_ROWS = 256  # of every block's matrix that are held at a time


@dataclass(frozen=True)
class Grams:
    """Inner products over two random halves of the rows, ``[L, L]`` each, float64."""

    first: Tensor
    second: Tensor

    @property
    def both(self) -> Tensor:
        """Over all rows."""
        return self.first + self.second


def kinds(all_parts: Sequence[Parts]) -> dict[str, list[LinearLayer]]:
    """Return per name within a block the layers of all blocks, where all have one of the same shape."""
    names = [name for name in all_parts[0].linears if all(name in parts.linears for parts in all_parts)]
    found = {name: [parts.linears[name] for parts in all_parts] for name in names}
    return {n: layers for n, layers in found.items() if len({tuple(m.weight().shape) for m in layers}) == 1}


def grams_of(layers: Sequence[LinearLayer], seed: int, *, independent: bool = False) -> Grams:
    """Return the inner products of some layers' weights.

    Args:
        layers: of the same shape.
        seed: of the halves, and of the control.
        independent: of independent normal matrices of the same norms instead.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.weight() for layer in layers]
    order = torch.randperm(weights[0].shape[0], generator=generator)
    halves = []
    for half in (order[0::2], order[1::2]):
        gram = torch.zeros(len(layers), len(layers), dtype=torch.float64)
        for begin in range(0, len(half), _ROWS):
            rows = half[begin : begin + _ROWS]
            stack = torch.stack([w[rows.to(w.device)].float().flatten().cpu() for w in weights])  # [L, rows * d_in]
            if independent:
                noise = torch.randn(stack.shape, generator=generator)
                stack = noise * (stack.norm(dim=1) / noise.norm(dim=1))[:, None]
            gram += stack.double() @ stack.double().T
        halves.append(gram)
    return Grams(*halves)


def predictability(part: str, layers: Sequence[LinearLayer], seed: int) -> Predictability:
    """Return what a kind of matrix says of itself over depth, with its controls. At least three blocks are needed."""
    grams, control = grams_of(layers, seed), grams_of(layers, seed, independent=True)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(layers), generator=generator) for _ in range(SHUFFLES)]
    shuffled = [grams.both[order][:, order] for order in orders]
    return Predictability(
        part=part,
        explained=explained(grams),
        independent=explained(control),
        neighbours_shuffled=_spread([_by_neighbours(gram) for gram in shuffled]),
        deltas=deltas(grams.both),
        deltas_shuffled=_spread([deltas(gram) for gram in shuffled]),
        deltas_independent=deltas(control.both),
    )


def explained(grams: Grams) -> Explained:
    """Return the shares that the three predictors explain."""
    both, count = grams.both, len(grams.first)
    mean = (1 - torch.eye(count, dtype=torch.float64)) / (count - 1)
    ridge = torch.stack([coefficients(grams.first, index) for index in range(count)])
    return Explained(mean=_share(both, mean), neighbours=_by_neighbours(both), ridge=_share(grams.second, ridge))


def coefficients(gram: Tensor, index: int) -> Tensor:
    """Return the ridge coefficients ``[L]`` of the others in the prediction of one, 0 for itself."""
    others = [i for i in range(len(gram)) if i != index]
    inner = gram[others][:, others]
    damping = RIDGE * float(gram.diagonal().mean())
    solved = torch.linalg.solve(inner + damping * torch.eye(len(others), dtype=gram.dtype), gram[others, index])
    found = torch.zeros(len(gram), dtype=gram.dtype)
    found[others] = solved
    return found


def deltas(gram: Tensor) -> float:
    """Return the mean cosine of successive differences over depth."""
    g = gram
    inner = (
        g[1:-1, 2:] - g[1:-1, 1:-1] - g[:-2, 2:] + g[:-2, 1:-1]
    )  # <W_{l+1} - W_l, W_{l+2} - W_{l+1}> on its diagonal
    squares = g.diagonal()[1:] + g.diagonal()[:-1] - 2 * g.diagonal(1)
    lengths = squares.clamp_min(0).sqrt()
    size = lengths[:-1] * lengths[1:]
    return float((inner.diagonal() / size.clamp_min(1e-300)).mean())


def predicted(all_parts: Sequence[Parts], index: int, coefficients_of: dict[str, Tensor]) -> Changes:
    """Return the changes that put predictions in the place of a block's matrices; biases stay.

    Args:
        all_parts: of all blocks.
        index: of the block.
        coefficients_of: per kind those of the other blocks, ``[L]``.
    """
    changes: Changes = {}
    for name, weights in coefficients_of.items():
        layers = [parts.linears[name] for parts in all_parts]
        own = layers[index].weight().float()
        guess = sum((float(c) * m.weight().float() for c, m in zip(weights, layers, strict=True) if c), own * 0)
        change = guess - own
        bias = layers[index].bias()
        changes[layers[index]] = change if bias is None else torch.cat([change, bias.float()[:, None] * 0], dim=1)
    return changes


def _by_neighbours(gram: Tensor) -> float:
    count = len(gram)
    beside = torch.zeros(count, count, dtype=gram.dtype)
    for index in range(count):
        near = [i for i in (index - 1, index + 1) if 0 <= i < count]
        beside[index, near] = 1 / len(near)
    return _share(gram, beside)


def _share(gram: Tensor, weights: Tensor) -> float:
    """Return ``1 - sum |W_l - sum_k c_lk W_k|^2 / sum |W_l|^2`` for ``weights [L, L]``."""
    total = gram.diagonal().sum()
    left = total - 2 * (weights * gram).sum() + (weights @ gram * weights).sum()
    return float(1 - left / total) if total > 0 else 0.0


def _spread(values: list[float]) -> tuple[float, float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    low, high = numbers.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(numbers.mean()), low, high
