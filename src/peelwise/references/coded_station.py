"""The reference of a low-bit layer that writes into the residual stream: codes near the least-squares solution.

`peelwise.references.station` finds the change ``D`` after which nothing linear is missing. With ``T = W + D`` and the
damped second moment ``S' = S + damping * tr(S)/d I`` that made it, codes and scales of the format are sought with

    lowest  tr((W' - T) S' (W' - T)^T)

A bias is no matter of bits. With ``s`` its column of ``S'`` and ``c`` its diagonal entry the best one for any ``W'`` is
known, and leaves the same problem with another metric:

    b' = T_b - (W' - T_w) s / c              S'' = S'_ww - s s^T / c
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.formats.base import Encoded, Format
from peelwise.formats.membership import scaled_part
from peelwise.references.coded import damped, projected
from peelwise.references.quantized import solve
from peelwise.references.station import StationChange, StationSums, decrease

STEPS = (1.0, 0.5)  # parts of the way to the least-squares solution that are aimed at from the codes in use
MAX_SWEEPS, TOLERANCE = 5, 1e-2


@dataclass(frozen=True, eq=False)
class CodedChange:
    """Codes of a layer, and what they change.

    Attributes:
        encoded: codes, scales and offsets.
        change: against the codes in use, ``[d_out, d_in (+1 with a bias)]``.
        decrease: of the weighted squared error per token on select, as its sums tell.
    """

    encoded: Encoded
    change: Tensor
    decrease: float


def coded_changes(
    S: Tensor, found: StationChange, form: Format, start: Encoded, select: StationSums, weights: Tensor
) -> list[CodedChange]:
    """Return codes that lower the error on select, the best first; empty if none of those tried does.

    All of the way is tried by coordinate descent from rounding with error feedback, which as a rule is best, and the
    parts of it in ``STEPS`` from the codes in use, which flips fewer; scales are re-fitted, but one of the whole model.

    Args:
        S: ``E[x x^T] [d_in (+1), d_in (+1)]`` of the fit tokens; the last column is that of the bias.
        found: the dense least-squares change.
        form: the format.
        start: the codes in use.
        select: sums that score the candidates.
        weights: ``w [d_out]``, one per coordinate of the station.
    """
    D, d_in = found.change.float(), start.codes.shape[1]
    metric, column = without_bias(damped(S, found.damping).float(), d_in)
    W = form.decode(start).to(D)
    inner = scaled_part(form)
    tried = [(part, projected(metric, W + part * D[:, :d_in], form, start)) for part in STEPS]
    if inner is not None and inner.layout.per != "model":
        starts = [] if start.support is None else [start]  # a support stays what it is
        solved = solve(metric, W + D[:, :d_in], form, starts=starts, max_sweeps=MAX_SWEEPS, tolerance=TOLERANCE)
        tried.append((1.0, solved.encoded))
    changes = []
    for part, encoded in tried:
        change = form.decode(encoded).to(D) - W
        if column is not None:
            bias = part * D[:, d_in] - (change - part * D[:, :d_in]) @ column
            change = torch.cat([change, bias[:, None]], dim=1)
        changes.append(CodedChange(encoded, change, decrease(change.double(), select, weights)))
    return sorted((c for c in changes if c.decrease > 0), key=lambda c: -c.decrease)


def without_bias(S: Tensor, d_in: int) -> tuple[Tensor, Tensor | None]:
    """Return the metric of the weights where the bias follows them, and ``s / c [d_in]``; ``S`` itself without a bias.

    Args:
        S: ``[d_in (+1), d_in (+1)]``, damped.
        d_in: inputs of the layer.
    """
    if len(S) == d_in:
        return S, None
    column = S[:d_in, d_in] / S[d_in, d_in]
    return S[:d_in, :d_in] - torch.outer(column, S[:d_in, d_in]), column
