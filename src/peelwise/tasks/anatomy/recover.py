"""A block is damaged by noise: what one closed-form round of it alone takes back, and what training it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peelwise.engine.refine import Refined
from peelwise.engine.rounds import next_round
from peelwise.engine.session import Changes, Session
from peelwise.model.handed import Handed
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import Parts
from peelwise.model.splice import spliced
from peelwise.model.trace import Batch
from peelwise.records.anatomy import Recovery, Retrained
from peelwise.tasks.anatomy.ablate import cost_of
from peelwise.tasks.anatomy.bend import changer

NOISE = 0.5  # standard deviations of each matrix (arXiv:2603.19348)
MOST_STEPS, LOOK_EVERY, PATIENCE = 100, 5, 4
_COUNTS = ("step", "tokens", "best_step", "best_tokens", "best_loss", "reached")
RATE = 0.01  # of a matrix's standard deviation, per step of Adam


class Memory(Protocol):
    """Where the state of a training is kept, so that one that was killed goes on."""

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept, or ``None``."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state in the place of the last."""


def recovery(
    session: Session,
    parts: Parts,
    margin: float,
    seed: int,
    go_on: Callable[[], bool] = lambda: True,
    memory: Memory | None = None,
) -> Recovery:
    """Return what the damage costs, what of it one round of the block alone leaves, and what training it alone does.

    The round is that of an audit's solo gain: directions from fit, step on select, costs on report.

    Args:
        session: the model.
        parts: of the block.
        margin: nats per token; a damage that costs no more has nothing to recover.
        seed: of the noise.
        go_on: asked at every step of the training whether there is time.
        memory: of an earlier call that ended in the training, and for a later one.
    """
    damage = {m: d for m, d in changer("noise", parts, seed)(NOISE).items() if m in set(parts.block.linears)}
    state = memory.load() if memory is not None else None
    begun = _round(session, parts, damage, margin) if state is None else Recovery.model_validate_json(state["begun"])
    if begun.share is None:
        return begun
    save = None if memory is None else partial(_saved, memory, begun)
    return begun.model_copy(update={"retrained": trained_alone(session, parts, damage, margin, go_on, state, save)})


def _saved(memory: Memory, begun: Recovery, state: dict[str, Any]) -> None:
    memory.save(state | {"begun": begun.model_dump_json(by_alias=True)})


def _round(session: Session, parts: Parts, damage: Changes, margin: float) -> Recovery:
    """Return what the damage costs, and what one closed-form round leaves of it."""
    index, clean = parts.block.index, session.report.losses
    spoilt = session.losses(session.report, damage, index)
    select_loss = session.select.mean_of(session.losses(session.select, damage, index))
    begun = Refined(damage, (), select_loss, spoilt, index)
    better = next_round(session, begun, None, "dense", output_changes={}, block=index)
    mended = spoilt if better is None or better.report_losses is None else better.report_losses
    cost, left = session.gain(spoilt, clean), session.gain(mended, clean)
    share = 1 - left.mean / cost.mean if cost.mean > margin else None
    return Recovery(damage=cost.interval(), left=left.interval(), share=share)


def trained_alone(
    session: Session,
    parts: Parts,
    damage: Changes,
    margin: float,
    go_on: Callable[[], bool],
    state: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> Retrained | None:
    """Train a damaged block's linear layers alone on the fit tokens, a micro-batch a step; ``None`` if time ends.

    Adam (0.9, 0.95) with a rate of 1 % of each matrix's own standard deviation, so that it is the same for all blocks
    and models. It ends when the cost on select is within the margin, or has not fallen at a few looks in a row: few fit
    tokens are soon learnt by heart. Weights are those of the model plus a change that is trained; the model itself is
    never written.

    Args:
        session: the model.
        parts: of the block.
        damage: change of each of its linear layers.
        margin: nats per token.
        go_on: asked at every step whether there is time.
        state: of a training that ended early, from ``save``.
        save: told the state every few steps.
    """
    index, select, linears = parts.block.index, session.select, list(damage)
    training = _Training(damage) if state is None else _Training.from_state(damage, state)
    while training.goes_on:
        if not go_on():
            return None
        batch = session.fit.batches[training.step % len(session.fit.batches)]
        with torch.enable_grad():
            # Zero for an expert that no token of this micro-batch was routed to.
            gradients = torch.autograd.grad(
                _loss(session, batch, training.changes, index),
                training.values,
                allow_unused=True,
                materialize_grads=True,
            )
        training.advance(gradients, int(batch.weights.sum()))
        if training.step % LOOK_EVERY == 0:
            now = {m: d.detach().clone() for m, d in training.changes.items()}
            training.look(now, select.mean_of(session.losses(select, now, index)), select.mean + margin)
            if save is not None:
                save({"block": index, **training.state()})
    best = dict(zip(linears, training.best, strict=True))
    left, cost = cost_of(session, best, index), cost_of(session, damage, index)
    return Retrained(
        steps=training.reached,
        best_step=training.best_step,
        tokens=training.best_tokens,
        most_steps=MOST_STEPS,
        left=left,
        share=1 - left.mean / cost.mean,
    )


class _Training:
    """A training as it runs: the changes that are trained, the best of them so far, and the optimiser."""

    def __init__(self, damage: Changes) -> None:
        self.changes = {m: d.clone().requires_grad_(True) for m, d in damage.items()}
        groups = [{"params": [d], "lr": RATE * float(m.weight().float().std())} for m, d in self.changes.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.best, self.best_loss = list(damage.values()), math.inf
        self.step = self.tokens = self.best_step = self.best_tokens = 0
        self.reached: int | None = None  # the step at which the cost on select was first within the margin

    @classmethod
    def from_state(cls, damage: Changes, state: Mapping[str, Any]) -> _Training:
        """Return the training that a state was kept of."""
        self = cls(damage)
        with torch.no_grad():
            for change, value in zip(self.values, state["changes"], strict=True):
                change.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = [value.to(change) for value, change in zip(state["best"], self.values, strict=True)]
        for name in _COUNTS:
            setattr(self, name, state[name])
        return self

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on from here."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        changes = [d.detach() for d in self.values]
        return counts | {"changes": changes, "best": self.best, "optimizer": self.optimizer.state_dict()}

    @property
    def values(self) -> list[Tensor]:
        """The changes that are trained, in order."""
        return list(self.changes.values())

    @property
    def goes_on(self) -> bool:
        """Whether another step is due."""
        patient = self.step - self.best_step < PATIENCE * LOOK_EVERY
        return self.step < MOST_STEPS and self.reached is None and patient

    def advance(self, gradients: Sequence[Tensor], tokens: int) -> None:
        """Take a step."""
        for change, gradient in zip(self.values, gradients, strict=True):
            change.grad = gradient
        self.optimizer.step()
        self.step += 1
        self.tokens += tokens

    def look(self, now: Changes, loss: float, goal: float) -> None:
        """Remember the changes if they are the best so far."""
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_step, self.best_tokens = (
                list(now.values()),
                loss,
                self.step,
                self.tokens,
            )
        self.reached = self.step if loss <= goal else None


def _loss(session: Session, batch: Batch, changes: dict[LinearLayer, Tensor], index: int) -> Tensor:
    """Return the mean loss of a micro-batch, differentiable by the changes."""
    runner, hidden, handed = session.runner, batch.stations[index], Handed()
    with spliced(changes):
        for block in runner.blocks[index:]:
            hidden = runner.run_block(block, hidden, batch, handed)
        logits = runner.logits(batch, hidden)[batch.weights]  # [tokens, vocabulary]
    runner.work.add(3 * session.share_from(index), float(batch.weights.sum()))
    return cross_entropy(logits.float(), batch.targets[batch.weights])
