"""Signals of one forward pass: what a block does to the stream ``[n, d]`` of residual states, token by token.

Each is a function of a `Stream`, what one block was given and what it made of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from peelwise.stats.linalg import DampedFactor, eigvalsh

_DAMPING = 0.1  # of the ridge regression behind `recoverability`, in units of the mean diagonal
_TINY = 1e-30  # a divisor in float32 is not 0; 1e-300 would be rounded to 0
_MASSIVE = 10.0  # a coordinate is massive from so many root mean squares on


@dataclass(frozen=True, eq=False)
class Stream:
    """One block's part in the stream over ``n`` predicted tokens.

    Attributes:
        before, after: residual states ``[n, d]`` that enter and leave the block, float32.
        updates: what each branch adds, ``[n, d]``, by its name.
        earlier: what the block before added, ``[n, d]``, or ``None`` for the first.
        attention: entropy and sink share of its attention, or ``None`` where they could not be seen.
    """

    before: Tensor
    after: Tensor
    updates: dict[str, Tensor]
    earlier: Tensor | None = None
    attention: tuple[float, float] | None = None

    @cached_property
    def update(self) -> Tensor:
        """What the block adds, ``[n, d]``."""
        return self.after - self.before


def update_ratio(stream: Stream, update: Tensor) -> float:
    """Return ``sqrt(E|u|^2 / E|x|^2)``: the size of an update against the stream it is added to (arXiv:2505.13898)."""
    return float((update.square().sum(1).mean() / stream.before.square().sum(1).mean()).sqrt())


def update_cosine(stream: Stream, update: Tensor) -> float:
    """Return ``E cos(u, x)``: below 0 where an update takes away, above where it strengthens (arXiv:2505.13898)."""
    return float(F.cosine_similarity(update, stream.before, dim=1).mean())


def successive_cosine(stream: Stream) -> float | None:
    """Return ``E cos(u_l, u_{l-1})`` of the updates of two blocks in succession."""
    return None if stream.earlier is None else float(F.cosine_similarity(stream.update, stream.earlier, dim=1).mean())


def block_influence(stream: Stream) -> float:
    """Return ``1 - E cos(x, z)`` between the block's input and output (arXiv:2403.03853).

    One minus it is minus LIM of arXiv:2406.17415.
    """
    return float(1 - F.cosine_similarity(stream.before, stream.after, dim=1).mean())


def angular_distance(stream: Stream) -> float:
    """Return ``E arccos cos(x, z) / pi``, from 0 to 1 (arXiv:2412.13795)."""
    return float(F.cosine_similarity(stream.before, stream.after, dim=1).clamp(-1, 1).arccos().mean() / math.pi)


def stream_kurtosis(stream: Stream) -> float:
    """Return the mean over tokens of ``E_d[u^4] / E_d[u^2]^2`` of the update: large where few channels do all."""
    squares = stream.update.double().square()
    return float((squares.square().mean(1) / squares.mean(1).square().clamp_min(1e-300)).mean())


def massive_share(stream: Stream) -> float:
    """Return the share of the update's energy in coordinates above ten times its root mean square."""
    squares = stream.update.double().square()
    massive = squares > _MASSIVE**2 * squares.mean()
    return float((squares * massive).sum() / squares.sum().clamp_min(1e-300))


def linear_cka(stream: Stream) -> float:
    """Return linear CKA of a block's input and output, ``|X'Z|^2 / (|X'X| |Z'Z|)``, centred (arXiv:2410.11451)."""
    x, z = _centred(stream.before), _centred(stream.after)
    norms = (x.T @ x).norm() * (z.T @ z).norm()
    return float((x.T @ z).norm().square() / norms.clamp_min(_TINY))


def station_rank(stream: Stream) -> float:
    """Return ``exp(H(p))`` of the spectrum ``p`` of the update's centred covariance (arXiv:2410.11451), a number of
    directions."""
    u = _centred(stream.update)
    gram = u @ u.T if u.shape[0] < u.shape[1] else u.T @ u
    values = eigvalsh(gram).double().clamp_min(0)  # rounding puts some of a deficient spectrum below 0
    p = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(p).sum().exp())


def recoverability(stream: Stream) -> float:
    """Return how much of a block's update a linear map of its input explains on held-out tokens (arXiv:2606.19379).

    ``1 - E|u - A x|^2 / E|u - mean|^2``, ``A`` by ridge regression on the first half of the tokens, measured on the
    second; not below -1.
    """
    half = len(stream.before) // 2
    x, u = stream.before, stream.update
    x, u = x - x[:half].mean(0), u - u[:half].mean(0)
    if half <= x.shape[1]:  # fewer tokens than inputs: through the kernel of tokens
        kernel = DampedFactor(x[:half] @ x[:half].T, _DAMPING, name="recoverability")
        made = (x[half:] @ x[:half].T) @ kernel.solve(u[:half]).to(x)
    else:
        factor = DampedFactor(x[:half].T @ x[:half], _DAMPING, name="recoverability")
        made = x[half:] @ factor.solve(x[:half].T @ u[:half]).to(x)
    left = (u[half:] - made).square().sum() / u[half:].square().sum().clamp_min(_TINY)
    return max(-1.0, float(1 - left))


def tokenwise_alignment(stream: Stream) -> float:
    """Return ``E cos(u, v)`` of an update ``u`` and of what its token's own channels say of it (arXiv:2604.02459).

    ``v_j = a_j x_j + b_j`` by least squares over tokens, channel by channel: the simplest class of functions of one
    token. High: the block does the same to every token's channels; low: what it adds is made of other tokens and other
    channels. Cost: ``n d``.
    """
    x, u = _centred(stream.before), _centred(stream.update)
    a = (x * u).sum(0) / x.square().sum(0).clamp_min(_TINY)
    return float(F.cosine_similarity(stream.update, a * x + stream.update.mean(0), dim=1).mean())


def attention_entropy(stream: Stream) -> float | None:
    """Return the mean over heads and tokens of the attention's entropy over ``log`` of the keys seen, from 0 to 1."""
    return None if stream.attention is None else stream.attention[0]


def attention_sink(stream: Stream) -> float | None:
    """Return the mean over heads and tokens of the attention paid to the first key."""
    return None if stream.attention is None else stream.attention[1]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=0)
