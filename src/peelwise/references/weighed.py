"""Descent for errors that are weighed on both sides: codes tile by tile, no two of a step in one row or column.

For ``q(W) = tr(M (W - T) S (W - T)^T)`` and ``G = M (W - T) S`` the best value of one weight, all others fixed, is
``W_ij - G_ij / (M_ii S_jj)``. Rows are not independent here, as they are in `references.descent`, so a whole column
cannot move at once. But two weights that share neither row nor column are coupled only by ``M_ii' S_jj'``, a product of
two correlations. So a tile of the matrix is walked along its wrapped diagonals: one step moves every code of a diagonal
to its best level, and the gradient of the tile follows exactly before the next. The rest of the rows follow after each
tile, the rest of the columns after each column of tiles.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from peelwise.formats.base import Encoded
from peelwise.formats.scaled import Scaled

_TILE = 64  # larger ones take fewer steps, each with more work


def weighed_descent(
    M: Tensor, S: Tensor, T: Tensor, form: Scaled, start: Encoded, *, max_sweeps: int, tolerance: float
) -> Encoded:
    """Return codes with a lower ``tr(M (W - T) S (W - T)^T)``; scales, offsets and support stay.

    Args:
        M: ``[d_out, d_out]``, symmetric positive semi-definite.
        S: ``[d_in, d_in]``, likewise; its dtype is what is computed in.
        T: ``[d_out, d_in]``, the target.
        form: the format, without its mask.
        start: codes to begin with.
        max_sweeps: most sweeps over all codes.
        tolerance: the sweep that lowers ``q`` by less than this part is the last.
    """
    tiled = _Tiled(M.to(S), S, T.to(S), form, start)
    best, lowest, parts = start, tiled.error(), 1
    for _ in range(max_sweeps):
        tiled.sweep(parts)
        error = tiled.error()
        if error >= lowest:  # moves of one step were in each other's way
            tiled, parts = _Tiled(M.to(S), S, T.to(S), form, best), 4 * parts
            continue
        best, before, lowest = tiled.encoded(), lowest, error
        if error > before * (1 - tolerance):
            break
    return best


class _Tiled:
    """A matrix on its way down, padded to whole tiles; what is padded has no curvature and never moves."""

    def __init__(self, M: Tensor, S: Tensor, T: Tensor, form: Scaled, start: Encoded) -> None:
        assert start.scales is not None
        self.form, self.start, self.target = form, start, T
        below, beyond = (-T.shape[0]) % _TILE, (-T.shape[1]) % _TILE
        self.M = pad(M, (0, below, 0, below))
        self.S = pad(S, (0, beyond, 0, beyond))
        scales = form.layout.spread(start.scales.to(S), *T.shape)
        if start.support is not None:
            scales = scales * start.support
        self.codes, self.scales = (pad(each, (0, beyond, 0, below)) for each in (start.codes.to(S), scales))
        curvature = self.M.diagonal()[:, None] * self.S.diagonal() * self.scales
        # how far a code should move per unit of gradient; none where there is nothing to move
        self.pace = torch.where(curvature != 0, 1 / curvature, torch.zeros_like(curvature))
        self.gradient = pad(M @ (form.decode(start).to(S) - T) @ S, (0, beyond, 0, below))

    def error(self) -> float:
        """Return ``q``."""
        E = self.form.decode(self.encoded()).to(self.target) - self.target
        return float((E.double() * self.gradient[: E.shape[0], : E.shape[1]]).sum())

    def encoded(self) -> Encoded:
        """Return the codes as the format writes them down."""
        d_out, d_in = self.target.shape
        return replace(self.start, codes=self.codes[:d_out, :d_in].contiguous().to(self.start.codes.dtype))

    def sweep(self, parts: int) -> None:
        """Move every code once to its best level, of each diagonal every ``parts``-th at a time."""
        for left in range(0, len(self.S), _TILE):
            columns = slice(left, left + _TILE)
            S = self.S[columns, columns]
            gradient = self.gradient[:, columns].contiguous()
            moves = torch.zeros_like(gradient)
            for top in range(0, len(self.M), _TILE):
                rows = slice(top, top + _TILE)
                moves[rows] = self._tile(rows, columns, gradient[rows].contiguous(), parts)
                below = slice(top + _TILE, None)
                gradient[below].addmm_(self.M[below, rows], moves[rows] @ S)
            self.gradient.addmm_(self.M @ moves, self.S[columns])

    def _tile(self, rows: slice, columns: slice, gradient: Tensor, parts: int) -> Tensor:
        """Move the codes of one tile, and return by how much its weights changed ``[tile, tile]``."""
        M, S = self.M[rows, rows], self.S[columns, columns].repeat(2, 1)
        at = _diagonals(gradient.device)
        codes, scales, pace = (each[rows, columns].flatten()[at] for each in (self.codes, self.scales, self.pace))
        first, flat = codes.clone(), gradient.view(-1)
        for k, part in product(range(_TILE), range(parts)):
            own = slice(part, None, parts)  # of the diagonal; its row i stands in column i + k
            wanted = torch.addcmul(codes[k, own], flat[at[k, own]], pace[k, own], value=-1)
            found = self.form.levels.nearest(wanted)
            move = (found - codes[k, own]) * scales[k, own]
            codes[k, own] = found
            gradient.addmm_(M[:, own] * move, S[k : k + _TILE][own])
        back = at.flatten().argsort()
        self.codes[rows, columns] = codes.flatten()[back].view_as(gradient)
        return ((codes - first) * scales).flatten()[back].view_as(gradient)


def _diagonals(device: torch.device) -> Tensor:
    """Return where the wrapped diagonals of a flattened tile stand: row ``k`` holds ``(i, i + k)`` for every ``i``."""
    rows = torch.arange(_TILE, device=device)
    return rows * _TILE + (rows + rows[:, None]) % _TILE
