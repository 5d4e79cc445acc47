"""What a probe's text costs without the model: the loss that a working one is far below."""

from __future__ import annotations

from torch import nn

from peelwise.model.layers import vocabulary_size
from peelwise.probe.probe import Probe
from peelwise.probe.split import PARTS
from peelwise.stats.unigram import unigram_loss


def probe_unigram(probe: Probe, model: nn.Module) -> float | None:
    """Return what the report part costs one that counts the tokens of fit, nats per token; ``None`` of batches.

    Args:
        probe: the text.
        model: says how many ids there are; the highest of the probe counts where it does not.
    """
    if probe.examples is not None:
        return None
    fit, select, report = (split.targets[split.weights] for split in (getattr(probe, part) for part in PARTS))
    highest = max(int(ids.max()) for ids in (fit, select, report)) + 1
    return unigram_loss(fit, select, report, max(vocabulary_size(model) or 0, highest))
