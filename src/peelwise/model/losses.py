"""Losses of what a model returns: of next tokens, or of examples by the loss of their probe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peelwise.model.trace import Batch

_NUMBERS = 2**22  # logits whose losses are taken at once


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy ``[b, t]`` of logits ``[b, t, vocabulary]`` against ``targets [b, t]``, in nats."""
    # A few rows at a time: what lies between logits and losses is as wide as the vocabulary, and stays in the cache.
    few = max(_NUMBERS // logits.shape[-1], 1)
    rows = zip(torch.split(logits.flatten(0, 1), few), torch.split(targets.flatten(), few), strict=True)
    losses = [F.cross_entropy(each.float(), wanted, reduction="none") for each, wanted in rows]
    return torch.cat(losses).view(targets.shape)


def losses_of(outputs: Any, targets: Tensor, batch: Batch) -> Tensor:
    """Return the losses of tokens ``[b, t]``, or of examples ``[b, 1]`` against the targets of those named."""
    if batch.examples is None:
        return token_losses(outputs, targets)
    columns = batch.columns
    if targets is not batch.targets:
        columns = {n: c.to(columns[n]) for n, c in batch.examples.taken(targets).items()}
    return batch.examples.losses(outputs, columns)


def sequence_losses(outputs: Any, batch: Batch) -> Tensor:
    """Return the losses ``[b]`` of a micro-batch, float64, each summed over what its sequence predicts."""
    losses = losses_of(outputs, batch.targets, batch).double() * batch.weights
    return losses.sum(dim=1)
