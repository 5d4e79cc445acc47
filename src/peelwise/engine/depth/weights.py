"""Signals of weights: one number per matrix or norm, without any text.

Each is a function of a `Matrix` or a `Gain`; the row of `records.signals.SIGNALS` that names it says what high and low
mean. Cost: one eigen-decomposition of the smaller side per matrix, ``min(d_in, d_out)^3``, serves all that need one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peelwise.model.parts import Parts, gain_of
from peelwise.stats.linalg import eigvalsh

# Entries that stand for a matrix where it is compared with all others of its kind.
_SAMPLE = 16_384


@dataclass(frozen=True, eq=False)
class Matrix:
    """The weight of one linear layer.

    Attributes:
        weight: ``[d_out, d_in]``, float32 or better.
        head_dim: width of a head where the layer's outputs (queries, keys, values) or inputs (attention's last layer)
            are heads, else ``None``.
        heads_last: whether the heads are its inputs.
        writes: whether the layer writes to the residual stream (else it reads it).
    """

    weight: Tensor
    head_dim: int | None = None
    heads_last: bool = False
    writes: bool = False

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values in descending order, float64, ``[min(d_in, d_out)]``.

        From the eigenvalues of the smaller Gram matrix: half the time of a decomposition of the matrix itself; values
        below 1e-8 of the largest are lost to rounding, which none of the signals here looks at.
        """
        W = self.weight.double()
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        values: Tensor = eigvalsh(gram)
        return values.flip(0).clamp_min(0).sqrt()


@dataclass(frozen=True, eq=False)
class Gain:
    """The gains ``[d]`` of one normalisation."""

    gain: Tensor


def weight_rms(matrix: Matrix) -> float:
    """Return ``|W|_F / sqrt(d_out d_in)``: the size of an entry."""
    return float(matrix.weight.square().mean().sqrt())


def stable_rank(matrix: Matrix) -> float | None:
    """Return ``|W|_F^2 / s_1^2``, from 1 to ``min(d_in, d_out)``."""
    s = matrix.singular_values
    return float(s.square().sum() / s[0].square()) if s[0] > 0 else None


def effective_rank(matrix: Matrix) -> float | None:
    """Return ``exp(H(s / sum s)) / min(d_in, d_out)``, the exponential of the entropy of the singular values."""
    s = matrix.singular_values
    return float(_entropy(s).exp() / len(s)) if s[0] > 0 else None


def singular_tail(matrix: Matrix) -> float | None:
    """Return the singular value with 95 % of them above it over the median: near 0 where the matrix is of low rank."""
    s = matrix.singular_values
    middle = s[len(s) // 2]
    small = s[min(int(0.95 * len(s)), len(s) - 1)]
    if s[0] == 0:
        return None
    return float((small + 1e-6 * s[0]) / (middle + 1e-6 * s[0]))


def hill_alpha(matrix: Matrix) -> float | None:
    """Return Hill's exponent of the eigenvalues ``l = s^2`` above their median, ``1 + k / sum log(l_i / l_k)``.

    Layer-wise rates are set by it in arXiv:2605.22297; small means heavy-tailed.
    """
    eigenvalues = matrix.singular_values.square()
    k = len(eigenvalues) // 2
    if k < 2 or eigenvalues[k] <= 0:
        return None
    total = float((eigenvalues[:k] / eigenvalues[k]).log().sum())
    return 1 + k / total if total > 0 else None


def row_dispersion(matrix: Matrix) -> float | None:
    """Return the standard deviation of the log norms of the rows (outputs); rows of zeros are left out."""
    return _dispersion(matrix.weight.norm(dim=1))


def column_dispersion(matrix: Matrix) -> float | None:
    """Return the standard deviation of the log norms of the columns (inputs); columns of zeros are left out."""
    return _dispersion(matrix.weight.norm(dim=0))


def trace_of_training(matrix: Matrix) -> float | None:
    """Return the dispersions of rows and columns, geometric mean, over those of independent normal weights.

    The log norm of a row of ``d`` independent normal weights has the standard deviation ``1 / sqrt(2 d)``. Training
    makes rows and columns differ: 1 where a matrix was drawn and never trained, 2 and more where it was.
    """
    rows, columns = row_dispersion(matrix), column_dispersion(matrix)
    d_out, d_in = matrix.weight.shape
    if rows is None or columns is None:
        return None
    return float((rows * columns * 2 * (d_out * d_in) ** 0.5) ** 0.5)


def large_weights(matrix: Matrix) -> float | None:
    """Return the share of entries above one standard deviation of the matrix, ZD of arXiv:2406.17415."""
    W = matrix.weight
    spread = W.std()
    return float((W.mean() + spread < W).float().mean()) if spread > 0 else None


def weight_kurtosis(matrix: Matrix) -> float | None:
    """Return ``E[(w - m)^4] / E[(w - m)^2]^2``: 3 for a normal distribution, 1.8 for a uniform one."""
    centred = matrix.weight.double() - matrix.weight.double().mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square()) if variance > 0 else None


def zero_share(matrix: Matrix) -> float:
    """Return the share of rows and columns all of whose weights are zero."""
    rows, columns = (matrix.weight == 0).all(dim=1), (matrix.weight == 0).all(dim=0)
    return float(torch.cat([rows, columns]).float().mean())


def smallest_head_share(matrix: Matrix) -> float | None:
    """Return the smallest share of a head in ``|W|_F^2``, times the number of heads: 0 where one is dead."""
    shares = _head_shares(matrix)
    return None if shares is None else float(shares.min() * len(shares))


def largest_head_share(matrix: Matrix) -> float | None:
    """Return the largest share of a head in ``|W|_F^2``, times the number of heads: 1 where all are alike."""
    shares = _head_shares(matrix)
    return None if shares is None else float(shares.max() * len(shares))


def head_similarity(matrix: Matrix) -> float | None:
    """Return the largest correlation between the weights of two heads: 1 where one was copied over another."""
    heads = _heads(matrix)
    if heads is None or len(heads) < 2:
        return None
    flat = heads.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return float((flat @ flat.T).fill_diagonal_(-1).max())


def gain_rms(norm: Gain) -> float:
    """Return the root mean square of a norm's gains."""
    return float(norm.gain.double().square().mean().sqrt())


def gain_dispersion(norm: Gain) -> float | None:
    """Return the standard deviation of the log of a norm's absolute gains; gains of zero are left out."""
    return _dispersion(norm.gain.double().abs())


def matrices_of(parts: Parts) -> dict[str, Matrix]:
    """Return the matrices of a block by their name within it, in float32."""
    found = {}
    lasts = {id(branch.writer) for branch in parts.branches}
    attention = {id(linear) for branch in parts.branches if branch.name == "attention" for linear in branch.linears}
    for name, linear in parts.linears.items():
        W = linear.weight().float()
        head_dim = parts.head_dim if id(linear) in attention else None
        last = id(linear) in lasts
        if head_dim is not None and W.shape[1 if last else 0] % head_dim:
            head_dim = None
        found[name] = Matrix(W, head_dim, last, writes=last)
    return found


def gains_of(parts: Parts) -> dict[str, Gain]:
    """Return the gains of a block's norms by their name within it."""
    return {name: Gain(gain_of(norm).float()) for name, norm in parts.norms.items()}


@dataclass(frozen=True, eq=False)
class Neurons:
    """Both sides of an MLP's neurons: a layer that leads into them ``[neurons, d_in]``, up or gate, and the last one
    ``[d_out, neurons]``."""

    first: Tensor
    last: Tensor


def neuron_mismatch(mlp: Neurons) -> float | None:
    """Return how badly an MLP's two sides fit: 1 minus the correlation of the neurons' log norms on them.

    Training lets both sides of a neuron grow together; where one side was permuted nothing of it is left. Of a gated
    MLP it may be one of the two first layers alone that is paired so (in SmolLM2 up is, by 0.4 to 0.95, gate is not).
    """
    found = _correlation_of_logs(mlp.first.norm(dim=1).double(), mlp.last.norm(dim=0).double())
    return None if found is None else _mismatch(found)


def neurons_of(parts: Parts) -> dict[str, Neurons]:
    """Return both sides of a block's MLP by the layer that leads in; none where it has no MLP of that kind."""
    names = {id(linear): name for name, linear in parts.linears.items()}
    found = {}
    for branch in parts.branches:
        if branch.name == "mlp" and len(branch.linears) > 1:
            last = branch.writer.weight().float()
            for linear in branch.linears[:-1]:
                W = linear.weight().float()
                if W.shape[0] == last.shape[1]:
                    found[names[id(linear)]] = Neurons(W, last)
    return found


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a matrix, or of a norm's gains, to compare it with those of its kind in the other blocks.

    Attributes:
        stream: log norms along the channels of the residual stream ``[width]``, for what reads or writes it.
        heads: log norms of the positions within a head ``[head_dim]``, averaged over heads, for queries and keys.
        sample: about 16,000 entries in a fixed order.
    """

    stream: Tensor | None
    heads: Tensor | None
    sample: Tensor


def sketch(matrix: Matrix, width: int) -> Sketch:
    """Return the sketch of a matrix in a model whose residual stream has ``width`` channels."""
    W = matrix.weight
    rows, columns = W.norm(dim=1), W.norm(dim=0)
    along = rows if matrix.writes and len(rows) == width else columns
    heads = None if matrix.heads_last else _heads(matrix)
    return Sketch(
        _logs(along) if len(along) == width else None,
        None if heads is None else _logs(heads.square().sum(dim=2)).mean(dim=0),
        _sample(W),
    )


def gain_sketch(norm: Gain, width: int) -> Sketch:
    """Return the sketch of a norm's gains."""
    along = _logs(norm.gain.abs()) if len(norm.gain) == width else None
    return Sketch(along, None, _sample(norm.gain))


def stream_mismatch(kin: Sequence[Sketch]) -> list[float | None]:
    """Return 1 minus the correlation of every sketch's channel profile with the median of its neighbours'.

    The stream's channels differ by orders of magnitude, about alike for all that reads or writes them nearby; where
    the channels of one matrix were mixed up the correlation is lost.
    """
    return [None if r is None else _mismatch(r) for r in _agreement([each.stream for each in kin])]


def head_mismatch(kin: Sequence[Sketch]) -> list[float | None]:
    """Return 1 minus the correlation of every sketch's head profile with the median of its neighbours'.

    Rotary positions give every pair of positions its frequency, in all blocks alike; rows in the layout of another
    convention have another profile.
    """
    return [None if r is None else _mismatch(r) for r in _agreement([each.heads for each in kin])]


def copy_similarity(kin: Sequence[Sketch]) -> list[float | None]:
    """Return the largest absolute correlation of a matrix with the same matrix of another block: 1 for a copy."""
    sizes = {len(each.sample) for each in kin}
    if len(kin) < 2 or len(sizes) > 1:
        return [None] * len(kin)
    sample = torch.stack([each.sample for each in kin])
    sample = sample - sample.mean(dim=1, keepdim=True)
    sample = sample / sample.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return [float(value) for value in (sample @ sample.T).abs().fill_diagonal_(0).max(dim=1).values]


def _agreement(profiles: Sequence[Tensor | None], reach: int = 3) -> list[float | None]:
    """Return the correlation of every profile with the median of those up to ``reach`` blocks away."""
    found: list[float | None] = []
    for place, profile in enumerate(profiles):
        near = [
            other
            for away, other in enumerate(profiles)
            if other is not None and away != place and abs(away - place) <= reach
            if profile is not None and other.shape == profile.shape
        ]
        alone = profile is None or len(near) < 2
        found.append(None if alone or profile is None else _correlation(profile, torch.stack(near).median(0)[0]))
    return found


def _mismatch(correlation: float) -> float:
    # Below 0.02 profiles are alike, and the differences between such values would say nothing as quotients.
    return max(1 - correlation, 0.02)


def _logs(norms: Tensor) -> Tensor:
    return norms.double().clamp_min(1e-30).log()


def _sample(W: Tensor) -> Tensor:
    flat = W.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)].double()


def _heads(matrix: Matrix) -> Tensor | None:
    """Return the weights by head, ``[heads, head_dim, ..]``."""
    if matrix.head_dim is None:
        return None
    W = matrix.weight.T if matrix.heads_last else matrix.weight
    return W.reshape(-1, matrix.head_dim, W.shape[1])


def _head_shares(matrix: Matrix) -> Tensor | None:
    heads = _heads(matrix)
    if heads is None:
        return None
    energy = heads.square().sum(dim=(1, 2))
    return energy / energy.sum().clamp_min(1e-30)


def _dispersion(norms: Tensor) -> float | None:
    alive = norms[norms > 0].double()
    return float(alive.log().std()) if len(alive) > 1 else None


def _entropy(values: Tensor) -> Tensor:
    found: Tensor = torch.special.entr((values / values.sum()).double()).sum()
    return found


def _correlation_of_logs(a: Tensor, b: Tensor) -> float | None:
    alive = (a > 0) & (b > 0)
    return _correlation(a[alive].log(), b[alive].log()) if int(alive.sum()) > 2 else None


def _correlation(a: Tensor, b: Tensor) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else None
