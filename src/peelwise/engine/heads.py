"""The light head: softmax regression on top of a frozen stack, or of the model itself as the head control."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peelwise.engine.session import WITNESS_DTYPE, Session
from peelwise.model.runner import Batch, Runner, Trace
from peelwise.references.head import fit_head, token_cross_entropy
from peelwise.stats.gram import with_ones

MAX_STEPS = 20

Targets = Callable[[Batch, int], Tensor]


@dataclass(frozen=True)
class Losses:
    """Losses with one head: nats per token on each part, and per sequence on report ``[sequences]``, float64."""

    fit: float
    select: float
    report: float
    report_sequences: Tensor


@dataclass(frozen=True)
class FittedHead:
    """A fitted head as a change of the model's own, ``[v, d]`` in the format it is stored in; its losses."""

    change: Tensor
    losses: Losses
    steps: int


def own_head_losses(runner: Runner, traces: Mapping[str, Trace]) -> Losses:
    """Return the losses of the last stations with the model's own head."""
    top = len(runner.blocks)
    found = {part: runner.losses_from(trace, top) for part, trace in traces.items()}
    mean = {part: float(found[part].sum() / trace.tokens.sum()) for part, trace in traces.items()}
    return Losses(mean["fit"], mean["select"], mean["report"], found["report"])


def light_head(
    runner: Runner,
    traces: Mapping[str, Trace],
    *,
    targets: Targets | None = None,
    max_steps: int = MAX_STEPS,
    keep_going: Callable[[], bool] = lambda: True,
) -> FittedHead | None:
    """Fit the output head on the fit tokens, stopped early on select, behind the model's own final norm.

    It starts from the model's own head and is pulled towards it; see `peelwise.references.head`. Its change is
    rounded to the witness format before it is evaluated.

    Args:
        runner: of the model.
        traces: what the head is put on: their last stations are read.
        targets: other labels for the fit tokens (null control).
        max_steps: most steps; every head of one comparison gets the same.
        keep_going: asked before each step.

    Returns:
        The head, or ``None`` where the model has none that can be fitted (none found, a bias-like change behind
        it, or logits that are capped behind the head).
    """
    head = runner.head
    if head is None:
        return None
    parts = {}
    for part, trace in traces.items():
        x, y, agree = runner.head_inputs(trace)
        if not bool(agree):
            return None
        parts[part] = x, y
    fit_x, fit_y = parts["fit"]
    if targets is not None:
        batches = enumerate(traces["fit"].batches)
        fit_y = torch.cat([targets(batch, place)[batch.weights] for place, batch in batches])
    dtype = next(head.parameters()).dtype

    def logits(x: Tensor) -> Tensor:
        out: Tensor = head(x.to(dtype))
        return out

    with torch.no_grad():
        found = fit_head((fit_x, fit_y), parts["select"], logits, max_steps=max_steps, keep_going=keep_going)
        change = found.change.to(WITNESS_DTYPE)
        tokens = {part: token_cross_entropy(x, y, logits, change.float()) for part, (x, y) in parts.items()}
    runner.work.add(runner.head_share, 3.0 * (found.steps + 1) * len(fit_y))
    losses = Losses(
        float(tokens["fit"].mean()),
        float(tokens["select"].mean()),
        float(tokens["report"].mean()),
        per_sequence(tokens["report"], traces["report"]),
    )
    return FittedHead(change, losses, found.steps)


def per_sequence(losses: Tensor, trace: Trace) -> Tensor:
    """Add up token losses ``[n]`` of a trace per sequence ``[sequences]``."""
    counts = trace.tokens.long()
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return torch.zeros(len(counts), dtype=losses.dtype, device=losses.device).index_add_(
        0, sequence.to(losses.device), losses
    )


# Weak, because the head starts from nothing: at 1e-2 its loss is a quarter of a nat higher on a byte model.
_PENALTY = 1e-3


_COPIES = 15  # of the head are alive in its fit: iterate, gradient, and six pairs of both


_MOST_BYTES = 2 * 2**30


def without_blocks(session: Session, *, seconds: float) -> float | None:
    """Return the report loss of a new head on station ``H_0``, in nats per token.

    Softmax regression from zero on what the head would see were there no block: the model's own embedding and final
    norm, nothing else of what it has learned. Fit tokens make it, select tokens choose its iterate. It is an explicit
    reference, so a fit that is cut short is only a looser (higher) one.

    Args:
        session: model and traces.
        seconds: after which no further iteration is begun.

    Returns:
        The loss; ``None`` where no head was found, where the model changes its logits behind it, or where the fit
        would take more than 2 GiB of memory.
    """
    head = session.runner.head
    if not isinstance(head, nn.Linear) or _COPIES * 4 * head.in_features * head.out_features > _MOST_BYTES:
        return None
    stop = session.clock.elapsed + seconds
    parts = []
    for trace in (session.fit, session.select, session.report):
        x, y, agree = session.runner.head_inputs(trace, station=0)
        if not bool(agree):
            return None
        parts.append((with_ones(x) if head.bias is not None else x, y))
    fit, select, report = parts
    vocabulary = head.out_features

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], vocabulary)

    with torch.no_grad():
        reference = fit_head(fit, select, nothing, penalty=_PENALTY, keep_going=lambda: session.clock.elapsed < stop)
        loss = float(token_cross_entropy(*report, nothing, reference.change).mean())
    # Every process has all rows and fits for itself, but when its time is over hangs on its clock.
    loss = float(session.runner.processes.broadcast(loss))
    session.runner.work.add(session.runner.head_share, 3.0 * (reference.steps + 1) * len(fit[1]))
    return loss
