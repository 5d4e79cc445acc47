"""What a text costs a model that only counts its tokens: the cheapest baseline of a language model."""

from __future__ import annotations

import torch
from torch import Tensor

_PSEUDO_COUNTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def unigram(fit: Tensor, select: Tensor, vocabulary: int) -> Tensor:
    """Return ``log p(v)``, ``[V]`` float64, with ``p(v) = (count(v) + a) / (n + a V)`` counted on fit.

    Args:
        fit: token ids ``[n]`` that are counted.
        select: ids ``[m]`` that choose the pseudo-count ``a``.
        vocabulary: ``V``, above every id.
    """
    counts = torch.bincount(fit.cpu(), minlength=vocabulary).double()  # [V]
    found = [((counts + pseudo) / (counts.sum() + pseudo * vocabulary)).log() for pseudo in _PSEUDO_COUNTS]
    return max(found, key=lambda log_p: float(log_p[select.cpu()].mean()))


def unigram_loss(fit: Tensor, select: Tensor, report: Tensor, vocabulary: int) -> float:
    """Return the mean of ``-log p(y)`` over report, with the ``p`` of `unigram`.

    Args:
        fit: token ids ``[n]`` that are counted.
        select: ids ``[m]`` that choose the pseudo-count.
        report: ids ``[k]`` that the loss is of.
        vocabulary: ``V``, above every id.

    Returns:
        Nats per token.
    """
    return -float(unigram(fit, select, vocabulary)[report.cpu()].mean())
