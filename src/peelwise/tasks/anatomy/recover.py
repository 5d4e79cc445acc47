"""A block is damaged by noise: what one closed-form round of it alone takes back, and what training it does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peelwise.engine.refine import Refined
from peelwise.engine.rounds import next_round
from peelwise.engine.session import Changes, Session
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import Parts
from peelwise.model.splice import spliced
from peelwise.model.trace import Batch
from peelwise.records.anatomy import Recovery, Retrained
from peelwise.tasks.anatomy.ablate import cost_of
from peelwise.tasks.anatomy.bend import changer

NOISE = 0.5  # standard deviations of each matrix (arXiv:2603.19348)
MOST_STEPS, LOOK_EVERY, PATIENCE = 100, 5, 4
RATE = 0.01  # of a matrix's standard deviation, per step of Adam


def recovery(
    session: Session, parts: Parts, margin: float, seed: int, go_on: Callable[[], bool] = lambda: True
) -> Recovery:
    """Return what the damage costs, what of it one round of the block alone leaves, and what training it alone does.

    The round is that of an audit's solo gain: directions from fit, step on select, costs on report.

    Args:
        session: the model.
        parts: of the block.
        margin: nats per token; a damage that costs no more has nothing to recover.
        seed: of the noise.
        go_on: asked at every step of the training whether there is time.
    """
    index, clean = parts.block.index, session.report.losses
    damage = {m: d for m, d in changer("noise", parts, seed)(NOISE).items() if m in set(parts.block.linears)}
    spoilt = session.losses(session.report, damage, index)
    select_loss = session.select.mean_of(session.losses(session.select, damage, index))
    begun = Refined(damage, (), select_loss, spoilt, index)
    better = next_round(session, begun, None, "dense", output_changes={}, block=index)
    mended = spoilt if better is None or better.report_losses is None else better.report_losses
    cost, left = session.gain(spoilt, clean), session.gain(mended, clean)
    share, retrained = None, None
    if cost.mean > margin:
        share = 1 - left.mean / cost.mean
        retrained = trained_alone(session, parts, damage, margin, go_on)
    return Recovery(damage=cost.interval(), left=left.interval(), share=share, retrained=retrained)


def trained_alone(
    session: Session, parts: Parts, damage: Changes, margin: float, go_on: Callable[[], bool]
) -> Retrained | None:
    """Train a damaged block's linear layers alone on the fit tokens, a micro-batch a step; ``None`` if time ends.

    Adam (0.9, 0.95) with a rate of 1 % of each matrix's own standard deviation, so that it is the same for all blocks
    and models. It ends when the cost on select is within the margin, or has not fallen at a few looks in a row: few fit
    tokens are soon learnt by heart. Weights are those of the model plus a change that is trained; the model itself is
    never written.
    """
    index, select = parts.block.index, session.select
    changes = {m: d.clone().requires_grad_(True) for m, d in damage.items()}
    groups = [{"params": [d], "lr": RATE * float(m.weight().float().std())} for m, d in changes.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    best, best_loss, step, tokens, steps = (0, damage), math.inf, 0, [0], None
    while step < MOST_STEPS and steps is None and step - best[0] < PATIENCE * LOOK_EVERY:
        if not go_on():
            return None
        batch = session.fit.batches[step % len(session.fit.batches)]
        with torch.enable_grad():
            gradients = torch.autograd.grad(_loss(session, batch, changes, index), list(changes.values()))
        for change, gradient in zip(changes.values(), gradients, strict=True):
            change.grad = gradient
        optimizer.step()
        step += 1
        tokens.append(tokens[-1] + int(batch.weights.sum()))
        if step % LOOK_EVERY == 0:
            now = {m: d.detach().clone() for m, d in changes.items()}
            loss = select.mean_of(session.losses(select, now, index))
            best, best_loss = ((step, now), loss) if loss < best_loss else (best, best_loss)
            steps = step if loss <= select.mean + margin else None
    left, cost = cost_of(session, best[1], index), cost_of(session, damage, index)
    share = 1 - left.mean / cost.mean
    return Retrained(
        steps=steps, best_step=best[0], tokens=tokens[best[0]], most_steps=MOST_STEPS, left=left, share=share
    )


def _loss(session: Session, batch: Batch, changes: dict[LinearLayer, Tensor], index: int) -> Tensor:
    """Return the mean loss of a micro-batch, differentiable by the changes."""
    runner, hidden = session.runner, batch.stations[index]
    with spliced(changes):
        for block in runner.blocks[index:]:
            hidden = runner.run_block(block, hidden, batch)
        logits = runner.logits(batch, hidden)[batch.weights]  # [tokens, vocabulary]
    runner.work.add(3 * session.share_from(index), float(batch.weights.sum()))
    return cross_entropy(logits.float(), batch.targets[batch.weights])
