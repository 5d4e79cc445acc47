"""What a text costs a model that only counts its tokens: the cheapest baseline of a language model."""

from __future__ import annotations

import torch
from torch import Tensor

_PSEUDO_COUNTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def unigram_loss(fit: Tensor, select: Tensor, report: Tensor, vocabulary: int) -> float:
    """Return the mean of ``-log p(y)`` over report, with ``p(v) = (count(v) + a) / (n + a V)`` counted on fit.

    Args:
        fit: token ids ``[n]`` that are counted.
        select: ids ``[m]`` that choose the pseudo-count ``a``.
        report: ids ``[k]`` that the loss is of.
        vocabulary: ``V``, above every id.

    Returns:
        Nats per token.
    """
    counts = torch.bincount(fit.cpu(), minlength=vocabulary).double()  # [V]

    def loss(ids: Tensor, pseudo: float) -> float:
        log_p = ((counts + pseudo) / (counts.sum() + pseudo * vocabulary)).log()
        return -float(log_p[ids.cpu()].mean())

    return loss(report, min(_PSEUDO_COUNTS, key=lambda pseudo: loss(select, pseudo)))
