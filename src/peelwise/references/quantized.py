"""The best weights inside a format for a quadratic objective: relaxed, achieved, and how they are found.

    q(W) = tr((W - T) S (W - T)^T)        S = E[x x^T]  [d_in, d_in]        T  [d_out, d_in]

``T`` is the best dense matrix of the problem: the least-squares solution for station targets, the weights plus the
step for label-driven references. What the problem loses even at ``T`` is not part of ``q``.

    relaxed     lowest q over dense matrices on the format's support: exact, and 0 without structural zeros
    achieved    q at the codes and scales found: an upper bound of the lowest q inside the format

Nothing says that ``achieved`` is the lowest possible; ``current - achieved`` is certified, ``achieved - relaxed`` is at
most due to the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format, check_matrix
from peelwise.formats.masked import Masked
from peelwise.formats.scaled import Scaled
from peelwise.references.descent import Descent
from peelwise.stats.gram import widened

MAX_SWEEPS = 20
TOLERANCE = 1e-3  # of q, per sweep
# Clipping the largest weights pays off where there are few levels.
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_JITTER = 1e-10  # of the mean diagonal: far below what sums of float32 products know


@dataclass(frozen=True, eq=False)
class QuantizedReference:
    """The best that was found inside a format, and what it is measured against; all in units of ``q``.

    Attributes:
        encoded: codes, scales and zero points.
        achieved: ``q`` of what ``encoded`` stands for.
        relaxed: the lowest ``q`` of dense matrices on the same support.
        rounded: ``q`` of rounding ``T`` to nearest with the format's own rule.
        history: ``q`` at the start and after every sweep of the first start.
    """

    encoded: Encoded
    achieved: float
    relaxed: float
    rounded: float
    history: tuple[float, ...]


def quadratic(S: Tensor, D: Tensor) -> Tensor:
    """Return ``q`` of every row ``[d_out]`` for the difference ``D = W - T [d_out, d_in]``, float64."""
    D = D.to(S)
    return ((D @ S) * D).sum(1).double().clamp_min(0.0)


def solve(
    S: Tensor,
    T: Tensor,
    form: Format,
    *,
    starts: Sequence[Encoded] = (),
    feedback: bool = True,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> QuantizedReference:
    """Return the best matrix of the format that coordinate descent finds; never worse than rounding or any start.

    Args:
        S: ``[d_in, d_in]``, symmetric positive semi-definite. Its dtype is what is computed in.
        T: ``[d_out, d_in]``, the best dense matrix.
        form: the format. Patterns that depend on the weights look at the first start, or at ``T``.
        starts: further places to begin, such as the weights in use; the best is kept, row by row where rows are
            independent.
        feedback: begin where rounding with error feedback ends, which costs less than a sweep; otherwise at plain
            rounding with the best of several scales.
        max_sweeps: most sweeps over all codes from each start.
        tolerance: stop when a sweep lowers ``q`` by less than this part.

    Raises:
        FormatError: If the shapes, the format and the support do not go together.
    """
    return solve_together(
        [(S, T)], form, starts=[starts], feedback=feedback, max_sweeps=max_sweeps, tolerance=tolerance
    )[0]


def solve_together(
    problems: Sequence[tuple[Tensor, Tensor]],
    form: Format,
    *,
    starts: Sequence[Sequence[Encoded]] | None = None,
    feedback: bool = True,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> list[QuantizedReference]:
    """Solve several matrices; a format with one scale for the whole model gives all of them the same scale.

    Args:
        problems: ``(S, T)`` of every matrix; see `solve`.
        form: the format of all of them.
        starts: per matrix, further places to begin; the same number for each.
        feedback, max_sweeps, tolerance: as in `solve`.
    """
    extra = [tuple(own) for own in starts] if starts is not None else [()] * len(problems)
    if len({len(own) for own in extra}) > 1:
        raise FormatError(f"starts: expected the same number for every matrix, got {[len(own) for own in extra]}.")
    for S, T in problems:
        _check(S, T)
    problems = [(widened(S), T) for S, T in problems]
    supports = [_support(form, T, own) for (_, T), own in zip(problems, extra, strict=True)]
    inner = form.inner if isinstance(form, Masked) else form
    if not isinstance(inner, Scaled):
        return [_dense(S, T, inner, support) for (S, T), support in zip(problems, supports, strict=True)]
    rounded = _rounded(inner, problems, supports)
    first = [shrunk(inner, S, T, start) for (S, T), start in zip(problems, rounded, strict=True)]
    if inner.scales_stay and extra[0]:  # the scales in use are better than those of a rule
        first = [_at_scales_in_use(inner, T, own[0]) for (_, T), own in zip(problems, extra, strict=True)]
    candidates = [rounded]
    history: tuple[float, ...] = ()
    for number, begin in enumerate([first, *zip(*extra, strict=True)]):
        descents = [Descent(S, T, inner, start) for (S, T), start in zip(problems, begin, strict=True)]
        if number == 0 and feedback:
            for descent in descents:
                descent.feed_back()
        sums = _descend(descents, max_sweeps, tolerance)
        history = sums if number == 0 else history
        candidates.append([descent.encoded() for descent in descents])
        candidates.append(list(begin))  # so that the result is never worse than any of the starts
    return _best(problems, inner, candidates, supports, history)


class ErrorParts(NamedTuple):
    """A layer's error in three parts that add up; units of the error."""

    irreducible: float
    price_of_precision: float
    left_on_the_table: float


def split(reference: QuantizedReference, current: float, *, irreducible: float = 0.0) -> ErrorParts:
    """Return the three parts of a layer's error; they add up to ``irreducible + current``.

    Args:
        reference: from `solve`, with the codes in use among its starts, so that it is not worse than they are.
        current: ``q`` of the weights in use.
        irreducible: what the problem loses even at ``T``.

    Raises:
        FormatError: If the weights in use are better than the reference.
    """
    left = current - reference.achieved
    if left < -1e-9 * abs(current):
        raise FormatError(
            f"The weights in use have an error of {current:.6g}, the reference has {reference.achieved:.6g}. "
            "Give their codes to solve as one of the starts."
        )
    return ErrorParts(
        irreducible=irreducible + reference.relaxed,
        price_of_precision=reference.achieved - reference.relaxed,
        left_on_the_table=max(left, 0.0),
    )


def lowest_on_support(S: Tensor, T: Tensor, support: Tensor) -> Tensor:
    """Return the dense matrix on a support that makes ``q`` lowest: least squares of every row, float64.

    Args:
        S: ``[d_in, d_in]``.
        T: ``[d_out, d_in]``.
        support: ``[d_out, d_in]`` bool.
    """
    S, T = S.double(), T.double()
    wanted = T @ S  # [d_out, d_in]
    out = torch.zeros_like(T)
    patterns, member = torch.unique(support, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, columns = (member == number).nonzero().flatten(), pattern.nonzero().flatten()
        part = S[columns[:, None], columns]
        jitter = _JITTER * float(part.diagonal().mean()) or 1.0
        factor, info = torch.linalg.cholesky_ex(part + jitter * torch.eye(len(part), dtype=S.dtype, device=S.device))
        right = wanted[rows[:, None], columns].T
        solved = torch.linalg.pinv(part, hermitian=True) @ right if int(info) else torch.cholesky_solve(right, factor)
        out[rows[:, None], columns] = solved.T
    return out


def _check(S: Tensor, T: Tensor) -> None:
    check_matrix(T, None)
    if tuple(S.shape) != (T.shape[1], T.shape[1]):
        raise FormatError(f"S: expected [{T.shape[1]}, {T.shape[1]}] for these inputs, got {tuple(S.shape)}.")
    if not bool(S.isfinite().all()):
        raise FormatError("S holds NaN or Inf. Repair the model's activations first.")


def _support(form: Format, T: Tensor, starts: Sequence[Encoded]) -> Tensor | None:
    """Return the support that the format gives; that of the weights in use, where there are any."""
    if not isinstance(form, Masked):
        return None
    return starts[0].support if starts else form.pattern.support(T)


def _dense(S: Tensor, T: Tensor, form: Format, support: Tensor | None) -> QuantizedReference:
    best = T if support is None else lowest_on_support(S, T, support)
    encoded = form.encode(best, support)
    achieved = float(quadratic(S, form.decode(encoded).to(S) - T.to(S)).sum())
    relaxed = 0.0 if support is None else float(quadratic(S, best.to(S) - T.to(S)).sum())
    rounded = achieved if support is None else float(quadratic(S, T.to(S) * support - T.to(S)).sum())
    return QuantizedReference(encoded, achieved, min(relaxed, achieved), rounded, (achieved,))


def _rounded(
    form: Scaled, problems: Sequence[tuple[Tensor, Tensor]], supports: Sequence[Tensor | None]
) -> list[Encoded]:
    """Return every target rounded to nearest; with one scale for all if the format says so."""
    if form.layout.per != "model":
        return [form.encode(T, support) for (_, T), support in zip(problems, supports, strict=True)]
    weights = [T if support is None else T[support] for (_, T), support in zip(problems, supports, strict=True)]
    scales, zeros = form.rule(torch.cat([w.float().flatten() for w in weights])[None, None])
    stored = form.stored(scales), form.stored_zeros(zeros)
    return [form.quantized(T.float(), *stored, support) for (_, T), support in zip(problems, supports, strict=True)]


def _at_scales_in_use(form: Scaled, T: Tensor, used: Encoded) -> Encoded:
    assert used.scales is not None
    return form.quantized(T.float(), used.scales.to(T.device), used.zeros, used.support)


def shrunk(form: Scaled, S: Tensor, T: Tensor, rounded: Encoded) -> Encoded:
    """Return ``T`` rounded at the scales that, alone or a part of them, are best for ``sum_j S_jj (W_ij - T_ij)^2``."""
    assert rounded.scales is not None
    if form.layout.per == "model" or form.scales_stay:
        return rounded
    best, lowest = rounded.scales, None
    weights = S.diagonal().to(T)
    for shrink in _SHRINKS:
        scales = form.stored(rounded.scales.float() * shrink)
        tried = form.quantized(T, scales, rounded.zeros, rounded.support)
        error = form.layout.pooled((form.decode(tried).to(T) - T).square() * weights).sum(-1)  # [rows, groups]
        best = scales if lowest is None else torch.where(error < lowest, scales, best)
        lowest = error if lowest is None else torch.minimum(error, lowest)
    return form.quantized(T, best, rounded.zeros, rounded.support)


def _descend(descents: Sequence[Descent], max_sweeps: int, tolerance: float) -> tuple[float, ...]:
    """Sweep until little is gained; return the sum of ``q`` at the start and after every sweep."""

    def total() -> float:
        return sum(float(descent.errors().sum()) for descent in descents)

    history = [total()]
    shared = descents[0].form.layout.per == "model"
    while len(history) <= max_sweeps:
        changed = sum(descent.sweep() for descent in descents)
        if shared:
            _refit_together(descents)
        else:
            for descent in descents:
                descent.refit()
        history.append(total())
        if not changed or history[-1] >= history[-2] * (1 - tolerance):
            break
    return tuple(history)


def _refit_together(descents: Sequence[Descent]) -> None:
    """Move the one scale of all matrices to its best value; formats with one scale have no offset to move."""
    parabolas = [descent.scale_parabola(0) for descent in descents]
    slope = sum(float(parabola.slope[0]) for parabola, _ in parabolas)
    curvature = sum(float(parabola.curvature[0]) for parabola, _ in parabolas)
    by = slope / curvature if curvature > 0 else 0.0
    for descent, (parabola, along) in zip(descents, parabolas, strict=True):
        descent.move_scale(0, torch.full_like(parabola.slope, by), along)


def _best(
    problems: Sequence[tuple[Tensor, Tensor]],
    form: Scaled,
    candidates: Sequence[Sequence[Encoded]],
    supports: Sequence[Tensor | None],
    history: tuple[float, ...],
) -> list[QuantizedReference]:
    """Return for every matrix the best of its candidates, the first of which is plain rounding."""
    errors = [
        torch.stack([quadratic(S, form.decode(each[i]).to(S) - T.to(S)) for each in candidates])  # [candidates, d_out]
        for i, (S, T) in enumerate(problems)
    ]
    whole = int(torch.stack([e.sum(1) for e in errors]).sum(0).argmin())  # best for all matrices together
    found = []
    for i, ((S, T), support) in enumerate(zip(problems, supports, strict=True)):
        own = [each[i] for each in candidates]
        if form.layout.per == "model":
            encoded, achieved = own[whole], float(errors[i][whole].sum())
        elif form.layout.shared_by_rows:
            at = int(errors[i].sum(1).argmin())
            encoded, achieved = own[at], float(errors[i][at].sum())
        else:
            encoded, achieved = _row_by_row(own, errors[i]), float(errors[i].amin(0).sum())
        relaxed = 0.0
        if support is not None:
            relaxed = float(quadratic(S, lowest_on_support(S, T, support).to(S) - T.to(S)).sum())
        rounded = float(errors[i][0].sum())
        found.append(QuantizedReference(encoded, achieved, min(relaxed, achieved), rounded, history))
    return found


def _row_by_row(candidates: Sequence[Encoded], errors: Tensor) -> Encoded:
    """Return the best candidate of every row."""
    best = errors.argmin(0)  # [d_out]

    def picked(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts)[best, torch.arange(len(best), device=best.device)]

    scales = [each.scales for each in candidates if each.scales is not None]
    zeros = [each.zeros for each in candidates if each.zeros is not None]
    codes = picked([each.codes for each in candidates])
    return replace(candidates[0], codes=codes, scales=picked(scales), zeros=picked(zeros) if zeros else None)
