"""Better codes for a label-driven step: what a low-bit layer can do about the loss without leaving its format.

A sweep gives every layer a dense direction ``D`` and the sums around its weights ``W``. Two ways lead from the codes in
use to codes near ``T = W + a D``; which codes are taken is decided by the real loss, elsewhere:

    projection   lowest  tr((W' - T) S (W' - T)^T), by coordinate descent from the codes in use, scales re-fitted
    flips        lowest  tr(M (W' - T) S' (W' - T)^T), one level at a time, most promising first

``M`` and ``S'`` are ``F = E[g g^T]`` and ``S = E[x x^T]`` with the damping that made ``D``: the metric of the
Kronecker-factored curvature, in which errors that later layers do not mind cost little. ``a`` is not a step length
alone: the larger it is, the more codes flip. A code that moves by ``d`` lowers the objective from ``a (M D S')_ij d =
M_ii S'_jj d^2 / 2`` on, so the share of codes that flip can be asked for, and ``a`` follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peelwise.formats.base import Encoded, Format
from peelwise.formats.membership import scaled_part
from peelwise.formats.scaled import Scaled
from peelwise.references.descent import Descent
from peelwise.references.quantized import ErrorParts

SWEEPS = 3  # from the codes in use few codes move, and most of them in the first sweep
FLIP_ROUNDS = 60
_MOST_VALUES = 1_000_000  # of which a quantile is taken


@dataclass(frozen=True, eq=False)
class Metric:
    """``tr(M E S E^T)`` for changes ``E [d_out, d_in]``; ``M`` is the identity where it is ``None``."""

    S: Tensor  # [d_in, d_in]
    M: Tensor | None = None  # [d_out, d_out]

    def times(self, E: Tensor) -> Tensor:
        """Return ``M E S``."""
        E = E @ self.S
        return E if self.M is None else self.M @ E

    def diagonal(self) -> Tensor:
        """Return ``M_ii S_jj``, ``[d_out, d_in]`` or a row of it."""
        inputs = self.S.diagonal()
        return inputs if self.M is None else self.M.diagonal()[:, None] * inputs


@dataclass(frozen=True, eq=False)
class LocalProblem:
    """What a sweep knows of the loss around one layer's weights, on the fit tokens, float32.

    Attributes:
        S: ``E[x x^T] [d_in, d_in]``.
        F: ``E[g g^T] [d_out, d_out]``; ``None`` where it was not added up.
        input_damping, output_damping: of the layer's direction, in units of the mean diagonals.
        mean: ``E[x] [d_in]`` where the layer has a bias, else ``None``.
    """

    S: Tensor
    F: Tensor | None
    input_damping: float
    output_damping: float
    mean: Tensor | None = None

    @property
    def inputs(self) -> Metric:
        """The metric of projections."""
        return Metric(self.S)

    @property
    def curvature(self) -> Metric | None:
        """The metric of flips."""
        if self.F is None:
            return None
        return Metric(damped(self.S, self.input_damping), damped(self.F, self.output_damping))


def next_level(form: Format, encoded: Encoded, towards: Tensor) -> Tensor:
    """Return by how much each weight changes if its code moves one level in the direction of ``towards``.

    Args:
        form: a format of codes and scales.
        encoded: the codes in use.
        towards: ``[d_out, d_in]``; only the sign counts.

    Returns:
        ``[d_out, d_in]``; 0 at the end of the levels, off the support, and where the scale is 0.
    """
    levels = _scaled(form).levels
    scales = _spread_scales(form, encoded, towards)
    codes = encoded.codes.to(towards)
    change = (levels.moved(codes, towards.sign() * scales.sign()) - codes) * scales
    return change if encoded.support is None else change * encoded.support


def flip_steps(metric: Metric, D: Tensor, form: Format, encoded: Encoded) -> Tensor:
    """Return per weight the ``a`` from which on moving its code towards ``W + a D`` pays, all other codes fixed.

    Returns:
        The finite ones, flat, at most a million of them.
    """
    pull = metric.times(D)  # [d_out, d_in]
    change = next_level(form, encoded, pull)
    steps = 0.5 * metric.diagonal() * change.abs() / pull.abs()
    return _thinned(steps[(change != 0) & (pull != 0)])


def step_for_share(steps: Sequence[Tensor], share: float) -> float:
    """Return the ``a`` at which about ``share`` (0..1) of the codes flip; 0 if none can."""
    pooled = _thinned(torch.cat([each.cpu() for each in steps])) if steps else torch.empty(0)
    return float(pooled.quantile(share)) if pooled.numel() else 0.0


def projected(S: Tensor, T: Tensor, form: Format, start: Encoded, *, sweeps: int = SWEEPS) -> Encoded:
    """Return codes and scales near ``T`` in the metric ``S``, by coordinate descent from ``start``; never worse.

    Args:
        S: ``[d_in, d_in]``; its dtype is what is computed in.
        T: ``[d_out, d_in]``, the dense target.
        form: the format.
        start: the codes in use.
        sweeps: most sweeps over all codes, each with scales and offsets re-fitted; a scale for the whole model stays.
    """
    inner = _scaled(form)
    descent = Descent(S, T, inner, start)
    before = float(descent.errors().sum())
    for _ in range(sweeps):
        changed = descent.sweep()
        if inner.layout.per != "model":
            descent.refit()
        if not changed:
            break
    descent.refresh()
    return descent.encoded() if float(descent.errors().sum()) < before else start


def flipped(metric: Metric, D: Tensor, form: Format, start: Encoded, *, rounds: int = FLIP_ROUNDS) -> Encoded:
    """Return codes nearer to ``W + D`` in the metric, flips taken in batches that the metric itself agrees with.

    A batch holds the flips with the largest decrease, each computed as if it were the only one. What the whole batch
    does is computed exactly; one that gives less than half of what its flips promised is halved.

    Args:
        metric: in which to be near.
        D: the dense step, ``[d_out, d_in]``.
        form: the format.
        start: the codes in use; scales and offsets stay.
        rounds: most batches.
    """
    gradient = -metric.times(D)  # of half the objective, at W
    curvature, size = metric.diagonal(), len(D)
    for _ in range(rounds):
        change = next_level(form, start, -gradient)
        gain = (gradient + 0.5 * curvature * change) * change
        promising = int((gain < 0).sum())
        size = min(size, promising)
        while size > 0:
            best, at = gain.flatten().topk(size, largest=False)
            batch = torch.zeros_like(change).flatten().index_copy_(0, at, change.flatten()[at]).view_as(change)
            after = metric.times(batch)
            decrease, promised = -float((batch * (gradient + 0.5 * after)).sum()), -float(best.sum())
            if decrease >= 0.5 * promised:
                break
            size //= 2
        if size == 0:
            break
        start = _moved(form, start, -gradient, batch != 0)
        gradient += after
        size = 2 * size if decrease > 0.75 * promised else size
    return start


def local_split(problem: LocalProblem, change: Tensor, form: Format, start: Encoded) -> ErrorParts:
    """Return the parts of one layer's error against its dense target, in its own objective.

    It is ``sum_i F_ii [(W - T) S (W - T)^T]_ii / 2``: what the local curvature says the loss is above the target's,
    nats per token. No target of a label-driven step is out of a dense matrix's reach, so nothing of it is irreducible.

    Args:
        problem: at the codes in use.
        change: ``T - W [d_out, d_in]``, the dense witness's.
        form: the format.
        start: the codes in use.
    """
    weights = torch.ones(len(change)) if problem.F is None else problem.F.diagonal()
    W = form.decode(start).to(problem.S)
    T = W + change.to(W)

    def error(weight: Tensor) -> float:
        gap = weight - T
        return 0.5 * float((((gap @ problem.S) * gap).sum(1).double() * weights.to(W).double()).sum())

    current = error(W)
    achieved = min(error(form.decode(projected(problem.S, T, form, start)).to(W)), current)
    return ErrorParts(irreducible=0.0, price_of_precision=achieved, left_on_the_table=current - achieved)


def _moved(form: Format, encoded: Encoded, towards: Tensor, chosen: Tensor) -> Encoded:
    """Return the codes with those ``chosen [d_out, d_in]`` (bool) one level further in the direction of ``towards``."""
    levels = _scaled(form).levels
    signs = towards.sign() * _spread_scales(form, encoded, towards).sign()
    return replace(encoded, codes=levels.moved(encoded.codes.to(towards), signs * chosen).to(levels.dtype))


def _spread_scales(form: Format, encoded: Encoded, like: Tensor) -> Tensor:
    assert encoded.scales is not None
    return _scaled(form).layout.spread(encoded.scales.to(like), *encoded.codes.shape)


def damped(A: Tensor, damping: float) -> Tensor:
    """Return ``A + damping * tr(A)/d I`` for ``A [d, d]``."""
    return A + damping * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)


def _thinned(values: Tensor) -> Tensor:
    return values[:: len(values) // _MOST_VALUES + 1].float()


def _scaled(form: Format) -> Scaled:
    inner = scaled_part(form)
    assert inner is not None
    return inner
