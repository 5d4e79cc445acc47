"""What must be true of a model and a probe before anything is measured."""

from __future__ import annotations

import math

from torch import nn

from peelwise.errors import ModelError
from peelwise.model.checkpoints import check_finite
from peelwise.model.layers import Block, context_length, find_blocks, vocabulary_size
from peelwise.probes import Probe, check_context, check_vocabulary


def checked_blocks(model: nn.Module, probe: Probe) -> tuple[Block, ...]:
    """Return the blocks of a model that can be measured on ``probe``.

    Raises:
        UnsupportedModelError: If the architecture cannot be measured.
        ModelError: If the model holds NaN or Inf.
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
    """
    blocks = find_blocks(model)
    size = vocabulary_size(model)
    if size is not None:
        check_vocabulary(probe, size)
    limit = context_length(model)
    if limit is not None:
        check_context(probe, limit)
    check_finite(model)
    return blocks


def check_loss(loss: float, name: str) -> None:
    """Raise unless the model's loss on a part of the probe is a number.

    Raises:
        ModelError: If it is not.
    """
    if not math.isfinite(loss):
        raise ModelError(f"The loss of {name} on the probe is {loss}: its activations overflow. Try --dtype float32.")
