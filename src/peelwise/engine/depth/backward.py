"""Signals of one backward pass: how the loss answers to a scale on what a part of a block gives.

For a tensor ``y`` inside the model let ``y -> s y``. At ``s = 1`` the derivative ``d loss / d log s = E_t <g_t, y_t>``,
``g`` the gradient of a token's loss at ``y``, is the **gain slope** (arXiv:1611.06440, arXiv:1905.10650): 0 at an
optimum, above 0 where less would be better, below 0 where more would be. One product per element, nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peelwise.stats.linalg import eigvalsh, solve_dtype


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


@dataclass
class GateSums:
    """Sums over tokens of ``<g_t, y_t>`` for one tensor, and channel by channel.

    ``g`` is the gradient of the *summed* loss of a micro-batch, so that nothing is divided before the end.
    """

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    channels: Tensor | None = None  # [d] sum over tokens of g y
    channel_squares: Tensor | None = None  # [d] sum over tokens of (g y)^2
    per_token: list[Tensor] = field(default_factory=list)  # per micro-batch [n], float32

    def update(self, y: Tensor, g: Tensor) -> None:
        """Add the tokens of ``y`` and its gradient ``g``, each ``[n, d]``."""
        products = y.float() * g.float()
        per_token = products.sum(1, dtype=torch.float64)
        self.per_token.append(per_token.float().cpu())
        self.n += len(per_token)
        self.total += float(per_token.sum())
        self.squares += float(per_token.square().sum())
        sums = products.sum(0, dtype=torch.float64)
        squares = products.square_().sum(0, dtype=torch.float64)
        self.channels, self.channel_squares = _added(self.channels, sums), _added(self.channel_squares, squares)

    def merge(self, other: GateSums) -> None:
        """Add the tokens that ``other`` has seen."""
        self.n, self.total, self.squares = self.n + other.n, self.total + other.total, self.squares + other.squares
        self.per_token.extend(other.per_token)
        self.channels = _added(self.channels, other.channels)
        self.channel_squares = _added(self.channel_squares, other.channel_squares)

    def groups(self, size: int) -> Tensor:
        """Return the slopes of groups of ``size`` channels in succession (heads), ``[d / size]``, nats per token."""
        assert self.channels is not None
        return self.channels.view(-1, size).sum(1) / self.n


# Tokens that curvature along the mean gradient is measured on, which is known only after all tokens were seen.
_CURVED = 256


@dataclass
class GradientSums:
    """Sums over tokens for the gradient of one weight ``[d_out, d_in]``, and the first tokens of them as they were."""

    n: int = 0
    cross: Tensor | None = None  # [d_out, d_in] sum over tokens of g x^T
    trace: float = 0.0  # sum over tokens of |g|^2 |x|^2
    first: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # x [m, d_in] and g [m, d_out], 256 tokens in all

    def update(self, x: Tensor, g: Tensor) -> None:
        """Add the tokens of the layer's input ``x [n, d_in]`` and its output's gradient ``g [n, d_out]``."""
        cross = g.T @ x
        if self.n < _CURVED:
            self.first.append((x[: _CURVED - self.n], g[: _CURVED - self.n]))
        self.n += len(x)
        self.cross = _added(self.cross, cross)
        self.trace += float((g.square().sum(1, dtype=torch.float64) * x.square().sum(1, dtype=torch.float64)).sum())

    def merge(self, other: GradientSums) -> None:
        """Add the tokens that ``other`` has seen."""
        for x, g in other.first:
            left = max(_CURVED - sum(len(rows) for rows, _ in self.first), 0)
            self.first.append((x[:left], g[:left]))
        self.n, self.trace, self.cross = self.n + other.n, self.trace + other.trace, _added(self.cross, other.cross)


@dataclass
class Backward:
    """What one backward pass found at one part: a linear layer, a norm, a branch, or a branch's inner channels.

    Attributes:
        gate: sums for a scale on what the part gives.
        gradient: sums for the gradient of its weight, where it is a linear layer.
        head_dim: channels of a head, where the part's channels are attention's heads.
    """

    gate: GateSums = field(default_factory=GateSums)
    gradient: GradientSums | None = None
    head_dim: int | None = None

    def merge(self, other: Backward) -> None:
        """Add the tokens that ``other`` has seen."""
        self.gate.merge(other.gate)
        if other.gradient is not None:
            self.gradient = self.gradient or GradientSums()
            self.gradient.merge(other.gradient)


def gain_slope(part: Backward) -> float:
    """Return ``E_t <g_t, y_t>``, nats per token: minus it is what a part gains per unit of log scale."""
    return part.gate.total / part.gate.n


def gain_t(part: Backward) -> float:
    """Return the gain slope over its standard error over tokens."""
    gate = part.gate
    mean = gate.total / gate.n
    variance = max(gate.squares / gate.n - mean**2, 0.0)
    return mean / math.sqrt(variance / gate.n) if variance > 0 else 0.0


def gain_evidence(part: Backward) -> float | None:
    """Return the mean over channels of ``(sum_t c)^2 / sum_t c^2`` with ``c = g y`` of the channel.

    About 1 where no scale on a single channel would change the loss and tokens are independent; larger the more
    channels want another scale. It is a natural-gradient energy in the family of one scale per channel.
    """
    gate = part.gate
    if gate.channels is None or gate.channel_squares is None:
        return None
    alive = gate.channel_squares > 0
    if not bool(alive.any()):
        return None
    return float((gate.channels[alive].square() / gate.channel_squares[alive]).mean())


def weight_gradient_norm(part: Backward) -> float | None:
    """Return the Frobenius norm of the weight's mean gradient, nats per token and unit of weight."""
    if part.gradient is None or part.gradient.cross is None:
        return None
    return float(part.gradient.cross.norm() / part.gradient.n)


def gradient_rank(part: Backward) -> float | None:
    """Return ``|G|_*^2 / |G|_F^2``, at least 1: the gradient's nuclear norm (arXiv:2410.23743) against its size."""
    if part.gradient is None or part.gradient.cross is None:
        return None
    # Squares of float32 would make a singular value of zero a thousandth of the largest.
    G = part.gradient.cross.to(solve_dtype(part.gradient.cross.device))
    gram = G @ G.T if G.shape[0] <= G.shape[1] else G.T @ G
    s = eigvalsh(gram).clamp_min(0).sqrt()
    size = float(s.square().sum())
    return float(s.sum().square()) / size if size > 0 else None


def fisher_trace(part: Backward) -> float | None:
    """Return ``E_t |g_t|^2 |x_t|^2``, the trace of the empirical Fisher of one weight.

    It is also the trace of the layer's own tangent kernel (arXiv:2205.12372) seen through the loss. Over the number of
    weights it is the mean of `gradient_sharpness` over random directions, so that one has no signal of its own.
    """
    return None if part.gradient is None else part.gradient.trace / part.gradient.n


def gradient_sharpness(part: Backward) -> float | None:
    """Return ``E_t (g_t' D x_t)^2`` with ``D = G / |G|_F``: curvature along the mean gradient ``G`` of one weight.

    Curvature by the empirical Fisher, which is what first derivatives tell of the Hessian (blockwise sharpness:
    arXiv:2502.19002), nats per squared unit of weight. High: a step along the gradient soon meets a wall; low: the
    direction is flat. Cost: one product with a matrix for each of at most 256 tokens.
    """
    if part.gradient is None or part.gradient.cross is None or not part.gradient.first:
        return None
    size = float(part.gradient.cross.norm())
    if not 0 < size < math.inf:
        return None
    x, g = (torch.cat(rows) for rows in zip(*part.gradient.first, strict=True))
    along = ((g @ (part.gradient.cross / size)) * x).sum(1, dtype=torch.float64)
    return float(along.square().mean())


def gradient_alignment(part: Backward) -> float | None:
    """Return ``n |E g x'|^2 / E |g|^2 |x|^2``: about 1 where gradients of tokens have nothing in common.

    The signal-to-noise ratio of the weight's gradient, in units of what chance gives.
    """
    if part.gradient is None or part.gradient.cross is None or part.gradient.trace == 0:
        return None
    return float(part.gradient.cross.double().square().sum()) / part.gradient.trace


def head_slope(part: Backward) -> float | None:
    """Return the largest gain slope of a head in absolute value, nats per token; of what goes into attention's last
    layer alone."""
    slopes = head_slopes(part)
    return None if slopes is None else float(slopes.abs().max())


def head_slopes(part: Backward) -> Tensor | None:
    """Return the gain slope of every head ``[heads]``, nats per token, where the part's channels are heads."""
    channels, size = part.gate.channels, part.head_dim
    return None if channels is None or size is None or len(channels) % size else part.gate.groups(size)
