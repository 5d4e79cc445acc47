"""What a model can read: ids that have a row in its embedding, and sequences within its context."""

from __future__ import annotations

from peelwise.errors import ProbeError
from peelwise.probe.probe import Probe
from peelwise.probe.split import PARTS


def check_vocabulary(probe: Probe, vocab_size: int) -> None:
    """Raise unless every real token of the probe has a row in the model's embedding.

    Args:
        probe: The probe.
        vocab_size: Rows of the embedding.

    Raises:
        ProbeError: If an id is negative or not below ``vocab_size``.
    """
    for part, split in ((part, getattr(probe, part)) for part in PARTS):
        ids = split.ids[split.mask]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ProbeError(
                f"Token ids must lie in 0..{vocab_size - 1}, the vocabulary of this model, got "
                f"{low if low < 0 else high} in {part!r}. Use the tokenizer that belongs to the model."
            )


def check_context(probe: Probe, limit: int) -> None:
    """Raise if a sequence of the probe is longer than the model's context of ``limit`` tokens.

    Raises:
        ProbeError: If it is.
    """
    longest = max(getattr(probe, part).inputs.shape[1] for part in PARTS)
    if longest > limit:
        raise ProbeError(f"The sequences have {longest} tokens, the model's context is {limit}. Use shorter sequences.")
