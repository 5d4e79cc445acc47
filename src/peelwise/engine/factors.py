"""Factors on linear layers: the change that multiplies a layer's output, or the inputs of one head, by a number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from peelwise.engine.session import Changes
from peelwise.errors import CertificateError
from peelwise.model.layers import Block, LinearLayer
from peelwise.records.check import GainWitness


def scaled_change(linear: LinearLayer, factor: float, head: int | None = None, head_dim: int | None = None) -> Tensor:
    """Return ``(factor - 1) W [d_out, d_in]``, one more column where there is a bias; of one head's columns alone.

    Of a layer that is spread over processes all of them ask at once.

    Args:
        linear: the layer.
        factor: by which it is multiplied.
        head: the head whose inputs are scaled, or ``None`` for the layer as a whole, with its bias.
        head_dim: channels of a head, where ``head`` is given.
    """
    W = (factor - 1) * linear.whole_weight().float()
    bias = linear.whole_bias()
    if head is None or head_dim is None:
        return W if bias is None else torch.cat([W, (factor - 1) * bias.float()[:, None]], dim=1)
    change = torch.zeros_like(W)
    columns = slice(head * head_dim, (head + 1) * head_dim)
    change[:, columns] = W[:, columns]
    return change if bias is None else torch.cat([change, torch.zeros_like(bias.float())[:, None]], dim=1)


def changes_of_factors(witnesses: Iterable[GainWitness], blocks: tuple[Block, ...]) -> Changes:
    """Return the changes that gain witnesses stand for.

    Raises:
        CertificateError: If one names a layer or a head that the model does not have, or two the same layer.
    """
    linears = {linear.name: linear for block in blocks for linear in block.linears}
    changes: Changes = {}
    for witness in witnesses:
        linear = linears.get(witness.layer)
        if linear is None or linear in changes:
            raise CertificateError(f"A gain witness names {witness.layer[:80]}, which the model does not have (once).")
        width = linear.shape[1]
        if witness.head is not None and not 0 <= (witness.head + 1) * (witness.head_dim or 0) <= width:
            raise CertificateError(f"{linear.name} has no head {witness.head} of {witness.head_dim} inputs.")
        changes[linear] = scaled_change(linear, witness.factor, witness.head, witness.head_dim)
    return changes
