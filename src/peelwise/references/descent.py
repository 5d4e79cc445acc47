"""Coordinate descent inside a low-bit format: codes column by column, then scales and offsets.

It begins with rounding column after column while the columns not yet rounded make up for the error as well as any
dense matrix could (the idea of arXiv:2210.17323).

Then, for ``q(W) = tr((W - T) S (W - T)^T)`` and the gradient ``G = (W - T) S``, the best value of one weight, all
others fixed, is ``W_ij - G_ij / S_jj``; the code nearest to it never raises ``q`` (arXiv:2309.01885). With all codes
fixed ``q`` is a parabola in each scale, zero point and minimum; the stored value nearest to its lowest point never
raises ``q`` either. Rows are independent but for a shared scale, so each step is done for all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.formats.base import Encoded
from peelwise.formats.scaled import Scaled
from peelwise.stats.linalg import DampedFactor

# Columns whose gradients are kept up to date one by one; the rest of the matrix follows once per block.
_BLOCK = 64
_FEEDBACK_DAMPING = 0.01  # of the mean diagonal: what no token has shown must not make up for anything


@dataclass(frozen=True)
class Parabola:
    """``q(t) - q(0) = curvature t^2 - 2 slope t`` along a change of one parameter, per parameter."""

    slope: Tensor
    curvature: Tensor

    def lowest(self) -> Tensor:
        """Return where the parabola is lowest; 0 where it is flat."""
        return torch.where(self.curvature > 0, self.slope / self.curvature, torch.zeros_like(self.slope))


class Descent:
    """A matrix of a format on its way down; everything is kept transposed, one input per row.

    Args:
        S: ``[d_in, d_in]``, symmetric positive semi-definite; its dtype is what is computed in.
        T: ``[d_out, d_in]``, the target.
        form: the format, without its mask.
        start: where to begin, with the support if there is one.
    """

    def __init__(self, S: Tensor, T: Tensor, form: Scaled, start: Encoded) -> None:
        assert start.scales is not None
        self.S, self.form = S, form
        self._target = T.T.to(S)  # [d_in, d_out]
        d_in, d_out = self._target.shape
        diagonal = S.diagonal()
        self._inverse = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))  # [d_in]
        self._size = form.layout.columns(d_in)
        self._support = None if start.support is None else start.support.T.contiguous()
        self._codes = start.codes.T.to(S, copy=True).contiguous()  # [d_in, d_out]
        self._scales = self._wide(start.scales, d_out)  # [groups, d_out]
        self._zeros = None if start.zeros is None else self._wide(start.zeros, d_out)
        self.refresh()

    def _wide(self, values: Tensor, d_out: int) -> Tensor:
        return values.T.to(self.S).repeat_interleave(d_out // len(values), dim=1).contiguous()

    def refresh(self) -> None:
        """Compute weights and gradient from the codes again, which removes rounding errors of many updates."""
        rows = torch.arange(len(self._codes), device=self.S.device) // self._size
        self._weight = self._at(self._codes, rows)  # [d_in, d_out]
        if self._support is not None:
            self._weight = self._weight * self._support
        self._gradient = self.S @ (self._weight - self._target)  # [d_in, d_out]

    def _at(self, codes: Tensor, group: int | Tensor) -> Tensor:
        """Return the weights that codes of the given groups stand for, structural zeros not yet taken out."""
        scales = self._scales[group]
        if self._zeros is None:
            return codes * scales
        zeros = self._zeros[group]
        return (codes - zeros) * scales if self.form.offset == "zero point" else codes * scales + zeros

    def errors(self) -> Tensor:
        """Return ``q`` of every row ``[d_out]``, float64."""
        return ((self._weight - self._target).double() * self._gradient).sum(0).clamp_min(0.0)

    def encoded(self) -> Encoded:
        """Return the matrix as its format writes it down."""
        form, d_out = self.form, self._codes.shape[1]
        rows = slice(None, None, d_out // form.layout.rows(d_out))
        zeros = None
        if self._zeros is not None:
            kind = form.levels.dtype if form.offset == "zero point" else form.scale_dtype
            zeros = self._zeros[:, rows].T.contiguous().to(kind)
        codes = self._codes.T.contiguous().to(form.levels.dtype)
        scales = self._scales[:, rows].T.contiguous().to(form.scale_dtype)
        support = None if self._support is None else self._support.T.contiguous()
        return form.with_positive_scales(Encoded(codes, scales, zeros, support))

    # -- codes -----------------------------------------------------------------------------------------

    def feed_back(self) -> None:
        """Round the target column after column, largest ``S_jj`` first, each error carried to the columns behind.

        With ``(S + damping)^-1 = U^T U`` and ``U`` upper triangular, an error ``e`` in column ``j`` is made up for best
        by adding ``-e U_jk / U_jj`` to every column ``k`` behind it.
        """
        order = self.S.diagonal().argsort(descending=True)
        U = _inverse_root(self.S[order[:, None], order])
        left = self._target[order]  # [d_in, d_out], what is still to be rounded
        for start in range(0, len(order), _BLOCK):
            stop = min(start + _BLOCK, len(order))
            errors = torch.zeros_like(left[start:stop])
            for i, column in enumerate(order[start:stop].tolist(), start=start):
                group = column // self._size
                codes = self._chosen(left[i], group, column)
                rounded = self._at(codes, group)
                if self._support is not None:
                    rounded = rounded * self._support[column]
                self._codes[column] = codes
                errors[i - start] = (left[i] - rounded) / U[i, i]
                left[i + 1 : stop].addr_(U[i, i + 1 : stop], errors[i - start], alpha=-1)
            left[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        self.refresh()

    def sweep(self) -> int:
        """Move every code once to its best level, column after column; return how many changed."""
        d_in, changed = len(self._codes), 0
        for start in range(0, d_in, _BLOCK):
            stop = min(start + _BLOCK, d_in)
            moves = self._move_block(start, stop)  # [block, d_out]
            changed += int((moves != 0).sum())
            self._weight[start:stop] += moves
            self._gradient.addmm_(self.S[:, start:stop], moves)
        return changed

    def _move_block(self, start: int, stop: int) -> Tensor:
        """Return the changes of the columns ``start..stop-1`` [block, d_out], each knowing those before it."""
        S, gradient = self.S[start:stop, start:stop], self._gradient[start:stop].clone()
        moves = torch.zeros_like(gradient)
        for i, column in enumerate(range(start, stop)):
            group = column // self._size
            codes = self._chosen(self._weight[column] - gradient[i] * self._inverse[column], group, column)
            move = self._at(codes, group) - self._weight[column]
            if self._support is not None:
                move *= self._support[column]
            self._codes[column] = codes
            moves[i] = move
            gradient[i + 1 :].addr_(S[i + 1 :, i], move)
        return moves

    def _chosen(self, wanted: Tensor, group: int, column: int) -> Tensor:
        """Return the codes nearest to the weights wanted ``[d_out]``; where the scale is 0, those that are there."""
        scales = self._scales[group]
        safe = torch.where(scales != 0, scales, torch.ones_like(scales))
        if self._zeros is None:
            x = wanted / safe
        elif self.form.offset == "zero point":
            x = wanted / safe + self._zeros[group]
        else:
            x = (wanted - self._zeros[group]) / safe
        return torch.where(scales != 0, self.form.levels.nearest(x), self._codes[column])

    # -- scales and offsets ----------------------------------------------------------------------------

    def refit(self) -> None:
        """Move every scale and offset once to the best value that can be stored."""
        if self.form.scales_stay:
            return
        for group in range(len(self._scales)):
            parabola, along = self.scale_parabola(group)
            self.move_scale(group, parabola.lowest(), along)
            if self._zeros is not None:
                self._move_zero(group)

    def scale_parabola(self, group: int) -> tuple[Parabola, Tensor]:
        """Return the parabola of a group's scale per row, summed over rows that share it, and ``S A [d_in, d_out]``.

        ``A`` is the change of the weights per unit of scale.
        """
        columns = self._columns(group)
        change = self._codes[columns]
        if self._zeros is not None and self.form.offset == "zero point":
            change = change - self._zeros[group]
        return self._parabola(columns, change)

    def move_scale(self, group: int, by: Tensor, along: Tensor) -> None:
        """Add ``by [d_out]`` to a group's scale, as near as can be stored; a scale never becomes 0.

        Args:
            group: the group.
            by: wanted change per row.
            along: ``S A`` from `scale_parabola`.
        """
        old = self._scales[group].clone()
        wanted = self._rounded(old + by)
        new = torch.where((wanted != 0) & wanted.isfinite(), wanted, old)  # with 0 no other code could be chosen
        self._scales[group] = new
        self._take(group, (new - old) * along)

    def _move_zero(self, group: int) -> None:
        """Move a group's zero point or minimum to its best value."""
        assert self._zeros is not None
        columns, old = self._columns(group), self._zeros[group].clone()
        if self.form.offset == "minimum":
            change = torch.ones_like(self._codes[columns])
        else:
            change = -self._scales[group].expand_as(self._codes[columns])
        parabola, along = self._parabola(columns, change)
        wanted = old + parabola.lowest()
        new = self._rounded(wanted) if self.form.offset == "minimum" else self.form.levels.nearest(wanted)
        new = torch.where(new.isfinite(), new, old)
        self._zeros[group] = new
        self._take(group, (new - old) * along)

    def _parabola(self, columns: slice, change: Tensor) -> tuple[Parabola, Tensor]:
        if self._support is not None:
            change = change * self._support[columns]
        along = self.S[:, columns] @ change  # [d_in, d_out]
        slope = -(change * self._gradient[columns]).sum(0)  # [d_out]
        curvature = (change * along[columns]).sum(0)
        if self.form.layout.shared_by_rows:
            slope, curvature = self._over_shared_rows(slope), self._over_shared_rows(curvature)
        return Parabola(slope, curvature), along

    def _over_shared_rows(self, values: Tensor) -> Tensor:
        """Return for every row the sum of ``values [d_out]`` over the rows that have the same scale."""
        rows = self.form.layout.rows(len(values))
        return values.reshape(rows, -1).sum(1).repeat_interleave(len(values) // rows)

    def _take(self, group: int, gradient_change: Tensor) -> None:
        """Bring the weights of a group up to date with its parameters, and the gradient by what is known of it."""
        columns = self._columns(group)
        weight = self._at(self._codes[columns], group)
        self._weight[columns] = weight if self._support is None else weight * self._support[columns]
        self._gradient += gradient_change

    def _columns(self, group: int) -> slice:
        return slice(group * self._size, (group + 1) * self._size)

    def _rounded(self, values: Tensor) -> Tensor:
        """Return values as they are stored; what does not fit becomes infinite, and is never taken."""
        return values.to(self.form.scale_dtype).to(values)


def _inverse_root(S: Tensor) -> Tensor:
    """Return the upper triangular ``U`` with ``U^T U = (S + damping)^-1``.

    With rows and columns of ``S`` in reverse its Cholesky factor ``L`` is lower triangular; in reverse again it is an
    upper triangular ``R`` with ``R R^T = S``, and ``U = R^-1``: a fifth of the work of inverting ``S`` first.
    """
    upper = DampedFactor(S.flip(0, 1), _FEEDBACK_DAMPING, name="S").root.flip(0, 1)
    identity = torch.eye(len(S), dtype=upper.dtype, device=S.device)
    root: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return root.to(S)
