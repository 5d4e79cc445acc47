"""The convex reference of the output head: softmax regression on fixed inputs, with a lower bound.

For inputs ``x [n, d]``, labels ``y [n]``, present weights ``W0 [v, d]`` and ``D = W - W0``, in the metric
``M = S + eps tr(S)/d I`` of the inputs (``S = E[x x^T]``):

    phi(D) = mean_i CE((W0 + D) x_i, y_i) + penalty/2 tr(D M D^T)

``phi`` is strongly convex with modulus ``penalty`` in that metric, so at any point

    min phi  >=  phi(D) - |grad phi(D)|^2 / (2 penalty)        (norm dual to M)

which is the Fenchel duality gap at the softmax's own dual point. The left side is `relaxed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.stats.gram import symmetric_product
from peelwise.stats.linalg import Spectrum, solve_dtype

PENALTY, MAX_STEPS = 1e-2, 30

_ROWS = 4096  # of the head in one piece
CHUNK = 1024  # rows whose logits are computed at once
_MEMORY = 6
_METRIC_DAMPING = 1e-3


@dataclass(frozen=True)
class HeadReference:
    """Outcome of the head's fit; losses in nats per token on the fit tokens, penalty included.

    ``change`` is ``D [v, d]`` in float32, the iterate that the select tokens liked best; ``achieved`` and
    ``relaxed`` belong to the last iterate and bracket the optimum of ``phi``.
    """

    change: Tensor
    current: float
    achieved: float
    relaxed: float
    penalty: float
    steps: int


def fit_head(
    fit: tuple[Tensor, Tensor],
    select: tuple[Tensor, Tensor],
    logits: Callable[[Tensor], Tensor],
    *,
    penalty: float = PENALTY,
    max_steps: int = MAX_STEPS,
    gap: float = 1e-4,
    keep_going: Callable[[], bool] = lambda: True,
    processes: Processes = ONE_PROCESS,
    kept: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    chunk: int = CHUNK,
) -> HeadReference:
    """Minimise ``phi`` by L-BFGS and keep the iterate with the lowest loss on select.

    Args:
        fit: ``(x [n, d], y [n])`` to fit on.
        select: ``(x [m, d], y [m])`` that choose the iterate (early stopping).
        logits: maps ``x [k, d]`` to the present head's logits ``[k, v]``.
        penalty: strength of the quadratic term, nats per unit of mean squared logit change.
        max_steps: most L-BFGS iterations.
        gap: stop when the duality gap is below this, in nats per token.
        keep_going: asked before each iteration; lets a budget end the fit.
        processes: all hold all rows; each takes its share of them in every sum.
        kept: where iterates and their gradients go to, each as large as the head.
        chunk: rows whose logits are computed at once.
    """
    problem = _Problem(fit, logits, penalty, processes, chunk)
    v = logits(fit[0][:1].float()).shape[1]
    D = torch.zeros(v, fit[0].shape[1], device=fit[0].device)  # whitened coordinates
    best, best_loss = D, mean_cross_entropy(*select, logits, processes=processes, chunk=chunk)
    value, gradient = problem.value_and_gradient(D)
    current, steps = value, 0
    history: list[tuple[Tensor, Tensor]] = []
    while steps < max_steps and _inner(gradient, gradient) / (2 * penalty) > gap and keep_going():
        direction = kept(_lbfgs_direction(gradient, history, penalty))
        moved = _line_search(problem, D, value, gradient, direction, kept)
        if moved is None:
            break
        following, value, new_gradient = moved
        history = [*history[1 - _MEMORY :], (kept(following - D), kept(new_gradient - gradient))]
        D, gradient, steps = following, new_gradient, steps + 1
        select_loss = mean_cross_entropy(*select, logits, problem.unwhiten(D), processes=processes, chunk=chunk)
        if select_loss < best_loss:
            best, best_loss = D, select_loss
    relaxed = max(value - _inner(gradient, gradient) / (2 * penalty), 0.0)
    return HeadReference(problem.unwhiten(best), current, value, relaxed, penalty, steps)


def mean_cross_entropy(
    x: Tensor,
    y: Tensor,
    logits: Callable[[Tensor], Tensor],
    change: Tensor | None = None,
    *,
    processes: Processes = ONE_PROCESS,
    chunk: int = CHUNK,
) -> float:
    """Return the mean cross-entropy in nats of the head, optionally changed by ``change [v, d]``."""
    return float(token_cross_entropy(x, y, logits, change, processes=processes, chunk=chunk).mean())


def token_cross_entropy(
    x: Tensor,
    y: Tensor,
    logits: Callable[[Tensor], Tensor],
    change: Tensor | None = None,
    *,
    processes: Processes = ONE_PROCESS,
    chunk: int = CHUNK,
) -> Tensor:
    """Return the cross-entropy ``[n]`` of every row, in nats, float64; ``processes`` take some rows each."""
    own = processes.rows(len(x))
    x, y, losses = x[own], y[own], [x.new_empty(0, dtype=torch.float64)]
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk].float()
        z = logits(rows).float()
        if change is not None:
            z = z + rows @ change.T
        losses.append(F.cross_entropy(z, y[start : start + chunk], reduction="none").double())
    return processes.all_gather(torch.cat(losses))


class _Problem:
    """``phi`` in coordinates ``E = D M^(1/2)``, where its penalty is ``penalty/2 |E|^2``."""

    def __init__(
        self,
        fit: tuple[Tensor, Tensor],
        logits: Callable[[Tensor], Tensor],
        penalty: float,
        processes: Processes = ONE_PROCESS,
        chunk: int = CHUNK,
    ) -> None:
        self.x, self.y = fit
        self.chunk = chunk
        self.processes = processes
        self.logits = logits
        self.penalty = penalty
        n = self.x.shape[0]
        M = symmetric_product(self.x).to(solve_dtype(self.x.device)) / n  # [d, d]
        spectrum = Spectrum(M)
        self.root = (
            (spectrum.vectors / spectrum.damped(_METRIC_DAMPING).sqrt()) @ spectrum.vectors.T
        ).float()  # M^(-1/2)

    def unwhiten(self, E: Tensor) -> Tensor:
        out: Tensor = E @ self.root
        return out

    def value_and_gradient(self, E: Tensor) -> tuple[float, Tensor]:
        n, total = self.x.shape[0], E.new_zeros(1, dtype=solve_dtype(E.device))
        gradient, own = torch.zeros_like(E), self.processes.rows(n)
        for start in range(own.start, own.stop, self.chunk):
            place = slice(start, min(start + self.chunk, own.stop))
            rows, y = self.x[place].float(), self.y[place]
            white = rows @ self.root  # [k, d]
            log_p = F.log_softmax(self.logits(rows).float() + white @ E.T, dim=1)  # [k, v]
            total -= log_p.gather(1, y[:, None]).sum(dtype=total.dtype)
            residual = log_p.exp_()
            residual[torch.arange(len(y), device=y.device), y] -= 1.0
            gradient += residual.T @ white
        self.processes.all_reduce_([total, gradient])
        value = float(total) / n + self.penalty / 2 * _inner(E, E)
        return value, gradient.div_(n).add_(E, alpha=self.penalty)


def _lbfgs_direction(gradient: Tensor, history: list[tuple[Tensor, Tensor]], penalty: float) -> Tensor:
    """Return ``-H^-1 gradient`` by the two-loop recursion."""
    q = gradient.clone()
    products = []
    for s, t in reversed(history):
        rho = 1.0 / _inner(s, t)
        alpha = rho * _inner(s, q)
        q.sub_(t, alpha=alpha)
        products.append((rho, alpha))
    if history:
        s, t = history[-1]
        q *= _inner(s, t) / _inner(t, t)
    else:
        # The Hessian of cross-entropy is at most 1/2 in whitened coordinates: a step that cannot overshoot.
        q /= 0.5 + penalty
    for (s, t), (rho, alpha) in zip(history, reversed(products), strict=True):
        q.add_(s, alpha=alpha - rho * _inner(t, q))
    return q.neg_()


def _inner(a: Tensor, b: Tensor) -> float:
    """Return ``<a, b>``, in float64 by pieces: each of them is as large as the head."""
    exact = solve_dtype(a.device)
    pieces = (slice(start, start + _ROWS) for start in range(0, len(a), _ROWS))
    return sum(float((a[piece].to(exact) * b[piece]).sum()) for piece in pieces)


def _line_search(
    problem: _Problem,
    D: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
    kept: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float, Tensor] | None:
    """Backtrack until the decrease is sufficient; ``None`` if rounding leaves nothing to gain."""
    slope = _inner(gradient, direction)
    step = 1.0
    for _ in range(10):
        following = kept(torch.add(D, direction, alpha=step))
        new_value, new_gradient = problem.value_and_gradient(following)
        if new_value <= value + 1e-4 * step * slope and new_value < value:
            return following, new_value, kept(new_gradient)
        step *= 0.5
    return None
