"""Which layers get how many bits: predicted damage, and the integer programme that spends a budget on it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from peelwise.errors import FormatError

_SLACK = 1e-9  # of the budget: rounding of sums of bits


def predicted_damage(D: Tensor, S: Tensor, F: Tensor | None) -> float:
    """Return what changing a layer's weights by ``D`` is predicted to cost, to second order.

        tr(F D S D^T) / 2       nats per token; without F the mean squared change of the output, which only ranks

    Args:
        D: ``[d_out, d_in]``.
        S: ``E[x x^T] [d_in, d_in]`` of the layer's inputs.
        F: ``E[g g^T] [d_out, d_out]`` of the loss's gradients at its outputs.

    Source: squared gradient times output error is the field's usual score; Kronecker-factored, arXiv:1503.05671.
    """
    D = D.to(S)
    weighed = D if F is None else F.to(S) @ D
    return 0.5 * max(float(((D @ S) * weighed).sum()), 0.0)


def cheapest(damage: NDArray[np.float64], bits: NDArray[np.float64], budget: float) -> list[int]:
    """Return the format of every group of layers that makes the sum of damages lowest within a budget of bits.

    Args:
        damage: ``[groups, formats]``, nats per token.
        bits: ``[groups, formats]``, what each takes.
        budget: bits in all.

    Returns:
        The index of a format for each group. Exact, by branch and bound (scipy's ``milp``).

    Raises:
        FormatError: If the smallest formats together are larger than the budget.
    """
    groups, formats = damage.shape
    least = float(bits.min(1).sum())
    if least > budget * (1 + _SLACK):
        raise FormatError(
            f"The smallest of the formats take {least:.0f} bits in all, the budget is {budget:.0f}. Allow more bits "
            "per weight, or name a smaller format."
        )
    each_once = np.kron(np.eye(groups), np.ones(formats))  # [groups, groups * formats]
    unit = float(bits.min())  # numbers of order 1: the solver's tolerances are absolute
    constraints = [
        LinearConstraint(each_once, 1, 1),
        LinearConstraint(bits.reshape(1, -1) / unit, -np.inf, budget / unit * (1 + _SLACK)),
    ]
    with _nothing_printed():
        found = milp(
            damage.flatten() / (float(damage.max()) or 1.0),
            integrality=np.ones(groups * formats),
            bounds=Bounds(0, 1),
            constraints=constraints,
        )
    if found.x is None:
        raise FormatError(f"No allocation was found: {found.message}")
    return [int(row.argmax()) for row in found.x.reshape(groups, formats)]


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Keep the solver's own lines, which no option turns off, out of what a program prints on standard output."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        with suppress(OSError, AttributeError, TypeError):  # C's own buffer, where the program's C library is known
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def bits_of(choice: Sequence[int], bits: NDArray[np.float64]) -> float:
    """Return the bits that a choice takes in all."""
    return float(sum(row[at] for row, at in zip(bits, choice, strict=True)))
