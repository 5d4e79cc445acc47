"""What a probe costs without the model: the loss that a working one is far below."""

from __future__ import annotations

from torch import nn

from peelwise.model.layers import vocabulary_size
from peelwise.probe.examples import IGNORED, LABELS, Examples, labelled_loss
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.probe.split import PARTS
from peelwise.stats.unigram import unigram, unigram_loss


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


def probe_labels(probe: Probe) -> float | None:
    """Return what the report part costs one that counts the labels of fit, nats per example.

    ``None`` of tokens, and of batches with a loss of their own, which may be of anything.
    """
    parts: list[Split] = [getattr(probe, part) for part in PARTS]
    if probe.examples is None or probe.examples.loss is not None:
        return None
    labels = [part.taken(part.inputs)[LABELS].long() for part in parts if isinstance(part, Examples)]
    fit, select, report = (each[each != IGNORED] for each in labels)
    log_p = unigram(fit, select, max(int(ids.max()) for ids in (fit, select, report)) + 1)  # [classes]
    logits = log_p.to(labels[2].device).expand(*labels[2].shape, -1)
    return float(labelled_loss(logits, {LABELS: labels[2]}).mean())
