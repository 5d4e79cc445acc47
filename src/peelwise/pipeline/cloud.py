"""The upper edge of the loss's cloud: what the model would reach without any of its blocks (METHOD: YES-0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peelwise.pipeline.bench import Bench
from peelwise.references.head import fit_head, token_cross_entropy
from peelwise.stats.gram import with_ones

# Weak, because the head starts from nothing: at 1e-2 its loss is a quarter of a nat higher on a byte model.
_PENALTY = 1e-3
_COPIES = 15  # of the head are alive in its fit: iterate, gradient, and six pairs of both
_MOST_BYTES = 2 * 2**30


def without_blocks(bench: Bench, *, seconds: float) -> float | None:
    """Return the report loss of a new head on station ``H_0``, in nats per token.

    Softmax regression from zero on what the head would see were there no block: the model's own embedding and final
    norm, nothing else of what it has learned. Fit tokens make it, select tokens choose its iterate. It is an explicit
    reference, so a fit that is cut short is only a looser (higher) one.

    Args:
        bench: model and traces.
        seconds: after which no further iteration is begun.

    Returns:
        The loss; ``None`` where no head was found, where the model changes its logits behind it, or where the fit
        would take more than 2 GiB of memory.
    """
    head = bench.runner.head
    if not isinstance(head, nn.Linear) or _COPIES * 4 * head.in_features * head.out_features > _MOST_BYTES:
        return None
    stop = bench.clock.elapsed + seconds
    parts = []
    for trace in (bench.fit, bench.select, bench.report):
        x, y, agree = bench.runner.head_inputs(trace, station=0)
        if not bool(agree):
            return None
        parts.append((with_ones(x) if head.bias is not None else x, y))
    fit, select, report = parts
    vocabulary = head.out_features

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], vocabulary)

    with torch.no_grad():
        reference = fit_head(fit, select, nothing, penalty=_PENALTY, keep_going=lambda: bench.clock.elapsed < stop)
        loss = float(token_cross_entropy(*report, nothing, reference.change).mean())
    # Every process has all rows and fits for itself, but when its time is over hangs on its clock.
    loss = float(bench.runner.ranks.told(loss))
    bench.runner.work.add(bench.runner.head_share, 3.0 * (reference.steps + 1) * len(fit[1]))
    return loss
