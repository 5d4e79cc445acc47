"""The last layer under cross-entropy: a convex softmax head on given features, streamed over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from peelwise.stats.gram import RegressionSums
from peelwise.stats.linalg import eigh
from peelwise.tasks.yes.samples import FIT, SELECT, Samples

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
_ITERATIONS = 50
# A solve reads the features about two hundred times. They are kept if they fit in here, else computed again.
_KEPT_BYTES = 64 * 2**20

Features = Callable[[Tensor], Tensor]
Batches = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]


def fit_softmax_head(
    samples: Samples,
    features: Features,
    fit: RegressionSums,
    *,
    bias: bool,
    penalties: tuple[float, ...] = PENALTIES,
) -> tuple[float, Tensor]:
    """Return ``(nats on select, [W, b]  [classes, d + 1])`` of the best softmax head on ``features(x)``.

        min  mean CE(W a + b, y) + penalty * tr(C)/d / 2 * |W|^2,    C the covariance of a

    Solved by L-BFGS in coordinates in which ``C + penalty`` is the identity, from strong to weak penalty,
    each start being the solution before; the penalty is chosen on the select part.

    Args:
        samples: where ``x`` and labels come from.
        features: maps ``x [b, d_0]`` to ``a [b, d]``.
        fit: Sums of ``a`` over the fit part.
        bias: whether the head has an intercept.
        penalties: candidates, no unit.
    """
    d = fit.x.shape[0]
    batches = _feature_batches(samples, features, d)
    mean = fit.x / fit.n if bias else torch.zeros_like(fit.x)  # [d]
    values, vectors = eigh(fit.xx / fit.n - mean[:, None] * mean)
    values = values.clamp(min=0)
    unit = max(float(values.mean()), 1e-12)
    weight = torch.zeros(samples.classes, d + 1, dtype=torch.float64, device=fit.x.device)
    found: list[tuple[float, Tensor]] = []
    for penalty in sorted(penalties, reverse=True):
        scale = (values + penalty * unit).sqrt()  # [d]
        weight = _minimise(batches, weight, (mean, vectors, scale), penalty * unit, bias)
        head = torch.cat([weight[:, :-1], (weight[:, -1] - weight[:, :-1] @ mean)[:, None]], dim=1)
        head = head if bias else head[:, :-1]
        found.append((_mean_nats(samples, batches, head), head))
    return min(found, key=lambda pair: pair[0])


def _feature_batches(samples: Samples, features: Features, d: int) -> Batches:
    def computed() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        return ((features(x), y, part) for x, y, part in samples.batches())

    if len(samples) * d * 8 > _KEPT_BYTES:
        return computed
    kept = list(computed())
    return lambda: kept


def _minimise(
    batches: Batches,
    start: Tensor,
    coordinates: tuple[Tensor, Tensor, Tensor],
    penalty: float,
    bias: bool,
) -> Tensor:
    """Return the minimiser ``[classes, d + 1]`` for centred features (intercept at their mean)."""
    mean, vectors, scale = coordinates
    classes = start.shape[0]
    rotation = vectors / scale  # [d, d]

    def objective(flat: Any) -> tuple[float, Any]:
        u = torch.from_numpy(flat).view(start.shape).to(start)
        total, gradient, n = 0.0, torch.zeros_like(u), 0
        for a, y, part in batches():
            rows = part == FIT
            white = (a[rows] - mean) @ rotation  # [b, d]
            logits = white @ u[:, :-1].T + (u[:, -1] if bias else 0.0)
            total += float(functional.cross_entropy(logits, y[rows], reduction="sum"))
            error = logits.softmax(1) - functional.one_hot(y[rows], classes)  # [b, classes]
            gradient[:, :-1] += error.T @ white
            if bias:
                gradient[:, -1] += error.sum(0)
            n += int(rows.sum())
        w = u[:, :-1] / scale
        gradient /= n
        gradient[:, :-1] += penalty * w / scale
        return total / n + penalty / 2 * float(w.square().sum()), gradient.flatten().cpu().numpy()

    u = torch.cat([(start[:, :-1] @ vectors) * scale, start[:, -1:]], dim=1)
    found = minimize(
        objective,
        u.flatten().cpu().numpy(),
        (),
        "L-BFGS-B",
        True,
        options={"maxiter": _ITERATIONS, "ftol": 1e-9, "gtol": 1e-6},
    )
    u = torch.from_numpy(found.x).view(start.shape).to(start)
    return torch.cat([u[:, :-1] @ rotation.T, u[:, -1:]], dim=1)


def _mean_nats(samples: Samples, batches: Batches, head: Tensor) -> float:
    total, n = 0.0, 0
    for a, y, part in batches():
        rows = part == SELECT
        total += float(samples.per_sample_loss(applied(head, a[rows]), y[rows]).sum())
        n += int(rows.sum())
    return total / n


def applied(weight: Tensor, a: Tensor) -> Tensor:
    """Return ``[a, 1] W^T`` for ``a [n, d]`` and ``W [m, d + 1]``, or ``a W^T`` for ``W [m, d]``."""
    d = a.shape[1]
    return functional.linear(a, weight[:, :d], weight[:, d] if weight.shape[1] > d else None)
