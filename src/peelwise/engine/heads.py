"""The output head: softmax regression on top of a frozen stack, of the model itself, or of no block at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.sharding import whole
from peelwise.engine.session import WITNESS_DTYPE, Session
from peelwise.engine.sweep import Targets
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.references.head import CHUNK, MAX_STEPS, PENALTY, HeadReference, fit_head, token_cross_entropy
from peelwise.stats.gram import with_ones

LIGHT_STEPS = 20  # most steps of the heads that peels compare
# Weak, because the head starts from nothing: at 1e-2 its loss is a quarter of a nat higher on a byte model.
_BLANK_PENALTY = 1e-3
_COPIES = 15  # of the head are alive in its fit: iterate, gradient, and six pairs of both
_MOST_BYTES = 2 * 2**30


@dataclass(frozen=True, eq=False)
class HeadRows:
    """What the output head sees at the predicted tokens of one trace, and what a head starts from there.

    Attributes:
        trace: whose tokens they are.
        x: inputs of the head, ``[n, d]``.
        y: labels, ``[n]``.
        logits: maps inputs ``[k, d]`` to the logits ``[k, v]`` that changes are added to.
        processes: all hold all rows, and take some of them each where something is computed.
        chunk: rows whose logits are computed at once.
    """

    trace: Trace
    x: Tensor
    y: Tensor
    logits: Callable[[Tensor], Tensor]
    processes: Processes = ONE_PROCESS
    chunk: int = CHUNK

    @torch.no_grad()
    def token_losses(self, change: Tensor | None = None) -> Tensor:
        """Return the loss ``[n]`` of every token, in nats, optionally with ``change [v, d]``."""
        return token_cross_entropy(self.x, self.y, self.logits, change, processes=self.processes, chunk=self.chunk)

    def per_sequence(self, losses: Tensor) -> Tensor:
        """Add up token losses ``[n]`` per sequence ``[sequences]``."""
        counts = self.trace.tokens.long()
        sequence = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return torch.zeros(len(counts), dtype=losses.dtype, device=losses.device).index_add_(
            0, sequence.to(losses.device), losses
        )


@dataclass(frozen=True, eq=False)
class HeadFit:
    """A fitted head, and the rows of the three parts that it is evaluated on. Large: keep numbers, not this.

    Attributes:
        fit, select, report: the rows.
        reference: the change of what the head started from, and what is known of its optimum.
    """

    fit: HeadRows
    select: HeadRows
    report: HeadRows
    reference: HeadReference


def head_rows(runner: Runner, trace: Trace, *, blank: bool = False) -> HeadRows | None:
    """Return what the output head sees of a trace; ``None`` if none was found, or if logits are changed behind it.

    Args:
        runner: of the model.
        trace: its last stations are read.
        blank: a head from nothing on ``H_0`` instead, what it would see were there no block; the head must be linear.
    """
    head = runner.head
    if head is None:
        return None
    stations = trace.batches[0].stations
    if blank and stations[0].shape != stations[-1].shape:
        return None  # what comes before the blocks does not fit behind them
    x, y, agree = runner.head_inputs(trace, station=0 if blank else -1)
    if not bool(agree):
        return None
    weight = next(head.parameters())  # [v, d]
    own = _called_alone(head) if runner.sharded else head

    def of_model(rows: Tensor) -> Tensor:
        out: Tensor = own(rows.to(weight.dtype))
        return out

    def nothing(rows: Tensor) -> Tensor:
        return rows.new_zeros(rows.shape[0], weight.shape[0])

    chunk = min(CHUNK, runner.micro_batch_tokens)
    if not blank:
        return HeadRows(trace, x, y, of_model, runner.processes, chunk)
    return HeadRows(trace, x if head.bias is None else with_ones(x), y, nothing, runner.processes, chunk)


def _called_alone(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a head computes, its weights gathered: each process gives it other rows, and not as many times."""
    weights = {name: whole(parameter.detach()) for name, parameter in head.named_parameters()}
    if isinstance(head, nn.Linear):
        return lambda rows: F.linear(rows, weights["weight"], weights.get("bias"))
    return lambda rows: functional_call(head, weights, (rows,))


def fit(
    session: Session,
    *,
    blank: bool = False,
    targets: Targets | None = None,
    penalty: float = PENALTY,
    max_steps: int = MAX_STEPS,
    keep_going: Callable[[], bool] = lambda: True,
) -> HeadFit | None:
    """Fit the output head on the fit tokens, its iterate chosen on select, behind the model's own final norm.

    It starts from the model's own head and is pulled towards it; see `peelwise.references.head`. It is an explicit
    reference, so a fit that is cut short is only a looser one.

    Args:
        session: model and traces.
        blank: start from nothing, on what the head would see were there no block.
        targets: other labels for the fit tokens (null control).
        penalty: strength of the pull, nats per unit of mean squared logit change.
        max_steps: most steps; every head of one comparison gets the same.
        keep_going: asked before each step.

    Returns:
        The fit, or ``None`` where no head was found, or where the model changes its logits behind it.
    """
    found = []
    for trace in (session.fit, session.select, session.report):
        rows = head_rows(session.runner, trace, blank=blank)
        if rows is None:
            return None
        found.append(rows)
    own, select, report = found
    labels = own.y
    if targets is not None:
        labels = torch.cat([targets(batch, place)[batch.weights] for place, batch in enumerate(session.fit.batches)])
    with torch.no_grad():
        reference = fit_head(
            (own.x, labels),
            (select.x, select.y),
            own.logits,
            penalty=penalty,
            max_steps=max_steps,
            keep_going=keep_going,
            processes=session.runner.processes,
            kept=session.runner.kept,
            chunk=own.chunk,
        )
    session.runner.work.add(session.runner.head_share, 3.0 * (reference.steps + 1) * len(labels))
    return HeadFit(own, select, report, reference)


@dataclass(frozen=True)
class Losses:
    """Losses with one head: nats per token on each part, and per sequence on report ``[sequences]``, float64."""

    fit: float
    select: float
    report: float
    report_sequences: Tensor


@dataclass(frozen=True)
class LightHead:
    """A fitted head as a change of the model's own, ``[v, d]`` in the format it is stored in; its losses."""

    change: Tensor
    losses: Losses
    steps: int


def own_head_losses(session: Session) -> Losses:
    """Return the losses of the last stations with the model's own head."""
    top = len(session.runner.blocks)
    parts = session.fit, session.select, session.report
    found = [session.losses(trace, start=top) for trace in parts]
    fit_loss, select_loss, report_loss = (trace.mean_of(losses) for trace, losses in zip(parts, found, strict=True))
    return Losses(fit_loss, select_loss, report_loss, found[-1])


def light_head(
    session: Session,
    *,
    targets: Targets | None = None,
    max_steps: int = LIGHT_STEPS,
    keep_going: Callable[[], bool] = lambda: True,
) -> LightHead | None:
    """Return what is kept of a `fit`: its change, rounded to the witness format before it is evaluated."""
    found = fit(session, targets=targets, max_steps=max_steps, keep_going=keep_going)
    if found is None:
        return None
    change = found.reference.change.to(WITNESS_DTYPE)
    tokens = [rows.token_losses(change.float()) for rows in (found.fit, found.select, found.report)]
    fit_loss, select_loss, report_loss = (float(each.mean()) for each in tokens)
    losses = Losses(fit_loss, select_loss, report_loss, found.report.per_sequence(tokens[-1]))
    return LightHead(change, losses, found.reference.steps)


def without_blocks(session: Session, *, seconds: float) -> float | None:
    """Return the report loss of a new head on station ``H_0``, in nats per token.

    Softmax regression from zero on what the head would see were there no block: the model's own embedding and final
    norm, nothing else of what it has learned.

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
    found = fit(session, blank=True, penalty=_BLANK_PENALTY, keep_going=lambda: session.clock.elapsed < stop)
    if found is None:
        return None
    return float(found.report.token_losses(found.reference.change).mean())
